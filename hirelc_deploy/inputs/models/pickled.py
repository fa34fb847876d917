"""In: a file that torch.save wrote. Out: what is in it; objects of classes that torch does not know stay inert."""

from __future__ import annotations

import math
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

NUMBERS = re.compile(r"[<>|=]?[fiub]\d{1,2}")
"""Types of arrays that hold plain numbers, as numpy writes them."""

ARRAY = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
"""What numpy 1 and 2 name in the pickle of an array."""


MOST_MODULES = 100_000
"""Modules of one network that are looked into."""


class Inert:
    """Stands for an object or the result of a call that a file names; nothing was made or called.

    Attributes:
        arguments: What it would have been made with.
        state: What it would have been given then; None for nothing.
    """

    def __new__(cls, *arguments: Any, **_: Any) -> Inert:
        """Take whatever the file has for the class that is not there."""
        one = super().__new__(cls)
        one.arguments, one.state = arguments, None
        return one

    arguments: tuple[Any, ...]
    state: Any

    def __init__(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    def __setstate__(self, state: Any) -> None:
        """Keep the state, and do nothing with it."""
        self.state = state


class Entries:
    """Stands for an object whose class is a kind of dictionary: nothing but its entries is made."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        """Return an empty dictionary, which the file fills."""
        return OrderedDict()


def read_pickled(file: Path) -> Any:
    """Return what torch.save wrote, by torch's own restricted reader; nothing that the file names is imported or run.

    Modules become their state dicts and numpy's arrays become tensors. Whatever else torch does not know is an `Inert`
    whose class bears the name. Raises whatever torch raises for a file that is broken or names modules it blocks.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickle protocols, which tell the user nothing
        try:
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        except ValueError:  # written before torch 1.6
            unknown = []
        try:
            return _plain(_loaded(file, unknown, Inert))
        except Exception:  # its kind is one of a library that is not imported here
            if not unknown:
                raise
            return _plain(_loaded(file, unknown, Entries))  # a dictionary of another class can only be filled as one


def _loaded(file: Path, unknown: list[str], kind: type) -> Any:
    """Return what the file holds, with objects of this kind in place of those of unknown classes."""
    classes: list[Any] = []
    for name in unknown:
        module, _, own = name.rpartition(".")
        classes.append(type(own, (kind,), {"__module__": module}))
    # As a stream: by its name torch would take files of other kinds.
    with torch.serialization.safe_globals(classes), file.open("rb") as stream:
        return torch.load(stream, map_location="cpu", weights_only=True)


def name_of(value: Any) -> str:
    """Return the full name of the class of a value."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _plain(value: Any) -> Any:
    """Return a value with state dicts in place of modules, and tensors in place of arrays, at any depth of its entries.

    A list may hold itself in a hostile file, so only mappings are gone into, each once.
    """
    return _in_mapping(value, set()) if isinstance(value, dict) else _of_one(value)


def _in_mapping(value: dict[Any, Any], seen: set[int]) -> dict[Any, Any]:
    seen.add(id(value))
    for key, item in value.items():
        if isinstance(item, dict):
            if id(item) not in seen:
                _in_mapping(item, seen)
        else:
            value[key] = _of_one(item)
    return value


def _of_one(value: Any) -> Any:
    if not isinstance(value, Inert):
        return value
    if name_of(value) in ARRAY:
        return _tensor_of(value)
    return dict(_tensors_of(value)) if _is_module(value) else value


def _is_module(value: Any) -> bool:
    return isinstance(value, Inert) and isinstance(value.state, dict) and "_parameters" in value.state


def _tensors_of(module: Inert) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and value of each tensor that the module's state dict would have."""
    waiting = [("", module)]
    for _ in range(MOST_MODULES):  # a hostile file may nest modules in themselves
        if not waiting:
            return
        prefix, module = waiting.pop()
        transient = module.state.get("_non_persistent_buffers_set") or ()
        for kind in ("_parameters", "_buffers"):
            for name, tensor in (module.state.get(kind) or {}).items():
                if isinstance(tensor, Tensor) and name not in transient:
                    yield f"{prefix}{name}", tensor.detach()
        parts = (module.state.get("_modules") or {}).items()
        waiting += [(f"{prefix}{name}.", part) for name, part in parts if _is_module(part)]


def _tensor_of(array: Inert) -> Tensor | Inert:
    """Return an array of plain numbers as a tensor, from the shape, type and bytes that numpy wrote."""
    match array.state:
        case (
            int(),
            tuple() as shape,
            Inert(arguments=(str() as kind, *_)) as dtype,
            bool() as by_columns,
            bytes() as data,
        ):
            if not NUMBERS.fullmatch(kind) or not all(isinstance(edge, int) and edge >= 0 for edge in shape):
                return array
            order = dtype.state[1] if isinstance(dtype.state, tuple) and len(dtype.state) > 1 else "="
            numbers = np.dtype(kind).newbyteorder(">" if order == ">" else "<" if order == "<" else "=")
            if len(data) != math.prod(shape) * numbers.itemsize:
                return array
            values = np.frombuffer(data, numbers).reshape(shape, order="F" if by_columns else "C")
            return torch.from_numpy(values.astype(numbers.newbyteorder("=")))
    return array
