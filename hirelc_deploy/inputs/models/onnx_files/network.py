"""In: the steps of a graph. Out: a torch module that walks them, whose layers lie in a tree of readable names."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Step:
    """One call of a module.

    Attributes:
        module: Its path.
        given: Names of the values that it reads.
        made: Names of its results.
        dropped: Values that nobody reads afterwards.
    """

    module: str
    given: tuple[str, ...]
    made: tuple[str, ...]
    dropped: tuple[str, ...] = ()


class OnnxNetwork(nn.Module):
    """A network that was read from an ONNX file.

    `forward` takes (n, channels, height, width) images and returns tensors by the names of the file's outputs. Every
    operator is a module below it, so that layers, and messages about them, have names.
    """

    def __init__(self, input_name: str, output_names: Sequence[str]) -> None:
        super().__init__()
        self.input_name = input_name
        self.output_names = tuple(output_names)
        self.channels_last = False
        self._constants: dict[str, str] = {}
        self._steps: tuple[Step, ...] = ()
        self._outputs: tuple[str, ...] = ()

    def walk(self, constants: Mapping[str, str], steps: Sequence[Step], outputs: Sequence[str]) -> None:
        """Set what `forward` does.

        Args:
            constants: Name of a value to the path of the parameter or buffer that holds it.
            outputs: Names of the values that it returns, in the order of `output_names`.
        """
        last: dict[str, int] = {}
        for number, step in enumerate(steps):
            last.update(dict.fromkeys((*step.given, *step.made), number))
        dropped: dict[int, list[str]] = {}
        for name, number in last.items():
            if name not in outputs:
                dropped.setdefault(number, []).append(name)
        self._constants = dict(constants)
        self._steps = tuple(
            Step(step.module, step.given, step.made, tuple(dropped.get(number, ())))
            for number, step in enumerate(steps)
        )
        self._outputs = tuple(outputs)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Answer (n, channels, height, width) images, by the names of the outputs."""
        values: dict[str, Tensor] = {name: attribute(self, path) for name, path in self._constants.items()}
        values[self.input_name] = images.permute(0, 2, 3, 1) if self.channels_last else images
        for step in self._steps:
            result = attribute(self, step.module)(*(values[name] for name in step.given))
            results = result if isinstance(result, tuple | list) else (result,)
            values.update(zip(step.made, results, strict=False))
            for name in step.dropped:
                values.pop(name, None)
        return {name: values[value] for name, value in zip(self.output_names, self._outputs, strict=True)}


def attribute(model: nn.Module, path: str) -> Any:
    """Return the module, parameter or buffer at a path."""
    return functools.reduce(getattr, path.split("."), model)


def place(model: nn.Module, path: str, item: nn.Module | nn.Parameter | Tensor) -> str:
    """Put a layer or a tensor at a path of the tree, or near it where something is there already; return its path.

    What counts its children is a ModuleList, as torch's own networks have it: so that blocks are known as such.
    """
    here: nn.Module = model
    *above, last = [_clean(part) for part in path.split(".")]
    taken: list[str] = []
    for depth, part in enumerate(above):
        below = here._modules.get(part)
        if below is None and not hasattr(here, part):
            following = above[depth + 1] if depth + 1 < len(above) else last
            below = nn.ModuleList() if following.isdecimal() else Part()
            here.add_module(part, below)
        if not isinstance(below, nn.ModuleList | Part):
            last = "_".join((*above[depth:], last))
            break
        here = below
        taken.append(part)
    name, number = last, 2
    while hasattr(here, name) or name in here._modules:
        name, number = f"{last}_{number}", number + 1
    if isinstance(item, nn.Module):
        here.add_module(name, item)
    elif isinstance(item, nn.Parameter):
        here.register_parameter(name, item)
    else:
        here.register_buffer(name, item)
    return ".".join((*taken, name))


class Part(nn.Module):
    """Holds layers under a common name; it is never called."""


def _clean(part: str) -> str:
    cleaned = re.sub(r"\W", "_", part, flags=re.ASCII).strip("_")[:80] or "part"
    return f"{cleaned}_" if cleaned in ("training", "forward") else cleaned


def constant(values: Tensor) -> nn.Parameter | Tensor:
    """Return a constant of a graph as what it is: learned numbers as a parameter, arithmetic as a buffer.

    Arithmetic is whole or half numbers alone, as those of grids, strides and masks are; training leaves them alone.
    """
    learned = values.is_floating_point() and not bool((values * 2 == (values * 2).round()).all())
    return nn.Parameter(values) if learned else values


def scopes(node_name: str, operator: str) -> str:
    """Return the path that the name of a node speaks of, `` for none.

    `/layer2/layer2.0/conv1/Conv` is layer2.0.conv1: below an element of a Sequential, exporters repeat its name.
    """
    if "/" not in node_name:
        return ""
    *steps, last = [step for step in node_name.split("/") if step]
    if not last.startswith(operator):
        steps.append(last)
    path, previous = "", ""
    for step in steps:
        below = step.removeprefix(previous) if previous and step.startswith(f"{previous}.") else f".{step}"
        path, previous = f"{path}{below}".strip("."), step
    return path


def layer_of(weight: str) -> str:
    """Return the layer that the name of a weight speaks of (`layer1.0.conv1.weight`), `` for none.

    `conv2d_0.w_0` and `conv1_weights` are PaddlePaddle's.
    """
    found = re.fullmatch(r"([A-Za-z_]\w*(?:\.\w+)*?)(?:\.weight|\.w_0|_weights)", weight, flags=re.ASCII)
    return found.group(1) if found else ""
