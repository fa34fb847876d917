"""In: a network that keeps functions of its author's. Out: the same, whose copies call their own layers.

`old = model.forward; model.forward = lambda x: old(x)["logits"]` and hooks that write into a dictionary hold the
network that they were written for. A copy of it has the same functions: it would run the layers of the original.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
"""Where a module keeps functions beside its attributes."""

COPIED = (nn.Module, Tensor, dict, list, tuple, set)
"""What a function may hold of a network's; all else is nobody's own (a logger, a lock) and stays the same."""


class Carried:
    """A function that is copied with what it holds."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.function)

    def __deepcopy__(self, memo: dict[int, Any]) -> Carried:
        """Return the same function, holding copies."""
        return Carried(_copied(self.function, memo))


def carry(model: nn.Module) -> list[tuple[Any, Any, Any]]:
    """Make functions in attributes and hooks `Carried`, in place; return holder, key and function of each."""
    changed = []
    for module in model.modules():
        for holder in (vars(module), *(vars(module)[name] for name in HOOKS)):
            for key, value in list(holder.items()):
                if _holds(value):
                    holder[key] = Carried(value)
                    changed.append((holder, key, value))
    return changed


@contextmanager
def carried(model: nn.Module) -> Iterator[None]:
    """Let functions be copied with the model, which has its own again afterwards."""
    changed = carry(model)
    try:
        yield
    finally:
        for holder, key, value in changed:
            holder[key] = value


def _holds(value: Any) -> bool:
    """Return whether a value is a function that holds what a copy must have of its own."""
    if isinstance(value, functools.partial):
        return _holds(value.func)  # its arguments are copied as it is
    if isinstance(value, MethodType):
        return _holds(value.__func__)  # its object too
    return isinstance(value, FunctionType) and bool(value.__closure__ or value.__defaults__ or value.__kwdefaults__)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, MethodType):
        return MethodType(_copied(value.__func__, memo), _copied(value.__self__, memo))
    if isinstance(value, functools.partial):
        given = copy.deepcopy((value.args, value.keywords), memo)
        return functools.partial(_copied(value.func, memo), *given[0], **given[1])
    if isinstance(value, FunctionType):
        return _function(value, memo)
    return copy.deepcopy(value, memo) if isinstance(value, COPIED) else value


def _function(value: FunctionType, memo: dict[int, Any]) -> FunctionType:
    if not _holds(value):
        return value
    cells = tuple(memo.setdefault(id(cell), CellType()) for cell in value.__closure__ or ())
    ours = FunctionType(value.__code__, value.__globals__, value.__name__, None, cells)
    memo[id(value)] = ours  # before what it holds is copied: it may hold itself
    ours.__dict__.update(value.__dict__)
    ours.__defaults__ = _each(value.__defaults__, memo)
    ours.__kwdefaults__ = value.__kwdefaults__ and {name: _copied(v, memo) for name, v in value.__kwdefaults__.items()}
    for cell, theirs in zip(cells, value.__closure__ or (), strict=True):
        try:
            cell.cell_contents = _copied(theirs.cell_contents, memo)
        except ValueError:  # an empty cell
            continue
    return ours


def _each(values: tuple[Any, ...] | None, memo: dict[int, Any]) -> tuple[Any, ...] | None:
    return None if values is None else tuple(_copied(value, memo) for value in values)
