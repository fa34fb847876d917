"""In: a node of an ONNX graph and what its inputs hold. Out: the module that computes it, by tables that join here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hirelc_deploy.inputs.models.onnx_files.proto import Array

LARGEST_VALUE = 2**28
"""Elements of one tensor of a batch of three, 1 GiB of float32; a hostile shape asks for more than any network."""


class NotReadError(Exception):
    """Why an operator cannot become a module; the text ends a sentence."""


class TooLargeError(NotReadError):
    """It makes a tensor that no network of pictures has: nothing may run it."""


class UnreadError(Exception):
    """Why a whole and sound file cannot become a network of layers; the text follows its path."""


@dataclass
class Value:
    """What one name of the graph stands for.

    Attributes:
        name: In the graph.
        runs: Its values for each of the reader's batch sizes; a single one where it is the same for all of them.
        live: Whether it is computed from the images.
        source: Name of the initializer that it is, `` for others.
    """

    name: str
    runs: tuple[Any, ...]
    live: bool = False
    source: str = ""

    def run(self, number: int) -> Any:
        """Return the value in one of the runs."""
        return self.runs[number] if len(self.runs) > 1 else self.runs[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the first run."""
        return tuple(self.runs[0].shape)

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def fixed(self) -> bool:
        """Whether it is a constant that does not depend on the number of images."""
        return not self.live and len(self.runs) == 1

    @property
    def array(self) -> Array:
        """Its values; of constants."""
        found: Array = self.runs[0]
        return found


@dataclass
class Call:
    """A module and the values it is given, in order; constants among them become parameters or buffers.

    Attributes:
        absorbed: Nodes after this one that the module does as well; its result is that of the last of them.
        stretched: Whether constants must have as many rows as there are images, as in Concat.
    """

    module: nn.Module
    given: Sequence[Value]
    absorbed: Sequence[Node] = ()
    stretched: bool = False


@dataclass
class Node:
    """One node, its attributes read and its inputs known.

    Attributes:
        inputs: None where one is left out.
        readers: Nodes that read each value, by name; empty for outputs of the graph, which nobody may absorb.
        known: The value of a name that is a constant, else None.
        batches: The reader's batch sizes.
        batch_is_fixed: Whether the first of them is written into the file.
    """

    operator: str
    name: str
    opset: int
    outputs: tuple[str, ...]
    input_names: tuple[str, ...]
    attributes: Mapping[str, Any]
    inputs: Sequence[Value | None] = ()
    readers: Mapping[str, Sequence[Node]] = field(default_factory=dict)
    known: Callable[[str], Value | None] = lambda _: None
    batches: tuple[int, ...] = ()
    batch_is_fixed: bool = False

    def value(self, place: int) -> Value:
        """Return an input that must be there."""
        found = self.inputs[place] if place < len(self.inputs) else None
        if found is None:
            raise NotReadError(f"its input {place} is missing")
        return found

    def optional(self, place: int) -> Value | None:
        """Return an input that may be left out."""
        return self.inputs[place] if place < len(self.inputs) else None

    def setting(self, name: str, place: int | None = None, default: Any = None) -> Any:
        """Return a setting, which is an attribute in old opsets and a constant input in new ones, as plain numbers."""
        if name in self.attributes:
            return self.attributes[name]
        found = None if place is None else self.optional(place)
        if found is None:
            return default
        if not found.fixed:
            raise NotReadError(f"its {name} depends on the images, or on their number")
        return found.array.tolist()

    def next(self, operator: str, of: Node | None = None) -> Node | None:
        """Return the only reader of this node's (or another's) result, if it is of this operator."""
        readers = self.readers.get((of or self).outputs[0], ())
        return readers[0] if len(readers) == 1 and readers[0].operator == operator else None

    def other(self, reader: Node) -> Value | None:
        """Return the constant that a reader joins with this node's result; None where it is none."""
        return next((known for name in reader.input_names if (known := self.known(name)) is not None), None)


Builder = Callable[[Node], Call]
BUILDERS: dict[str, Builder] = {}
"""Operator to what makes its module."""


def reads(*operators: str) -> Callable[[Builder], Builder]:
    """Register what makes the modules of these operators."""

    def register(builder: Builder) -> Builder:
        BUILDERS.update(dict.fromkeys(operators, builder))
        return builder

    return register


class Function(nn.Module):
    """Calls one function; numbers that it is given are no sizes of layers, and are not followed when those are cut.

    Args:
        fixed: Arguments beside the tensors: a position among them all to a value.
        settings: Keyword arguments.
    """

    def __init__(self, function: Callable[..., Any], fixed: Mapping[int, Any] | None = None, **settings: Any) -> None:
        super().__init__()
        self._function = function
        self._fixed = dict(fixed or {})
        self._settings = settings

    def extra_repr(self) -> str:
        """Return what is computed."""
        return f"{self._function.__name__}, {self._fixed}, {self._settings}"

    def forward(self, *given: Tensor) -> Any:
        """Call the function."""
        rest = iter(given)
        count = len(given) + len(self._fixed)
        arguments = [self._fixed[place] if place in self._fixed else next(rest) for place in range(count)]
        return self._function(*arguments, **self._settings)


def call(node: Node, function: Callable[..., Any], **settings: Any) -> Call:
    """Return the call of a function on all inputs of a node; constants of one float are written into it."""
    given = [value for value in node.inputs if value is not None]
    rank = max(value.rank for value in given if value.live)
    numbers = {
        place: float(value.array.reshape(-1)[0])
        for place, value in enumerate(given)
        if value.fixed and value.array.size == 1 and value.rank <= rank and value.array.dtype.kind == "f"
    }
    check_size(np.broadcast_shapes(*(value.shape for value in given)))
    return Call(Function(function, numbers, **settings), [v for place, v in enumerate(given) if place not in numbers])


def check_size(shape: Sequence[int]) -> None:
    """Raise TooLargeError for a tensor that no network of pictures has."""
    if math.prod(shape) > LARGEST_VALUE:
        raise TooLargeError(f"it makes a tensor of shape {list(shape)}, larger than any in a network of pictures")


def floats(value: Value) -> Tensor:
    """Return a constant as a tensor of its own."""
    return torch.from_numpy(np.array(value.array))
