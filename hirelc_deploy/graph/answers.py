"""In: what a model's forward pass returned. Out: its tensors by name, in a fixed order."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hirelc_deploy.errors import InputError

OUTPUT = "output"
"""Name of the only tensor of a model that returns one."""

Answers = dict[str, Tensor]
"""Name of an output to its (n, ...) tensor."""


def named(answer: Any) -> Answers:
    """Return the tensors of a model's answer by name.

    A tensor, or a container of one without a name, is called `output`. Tuples and lists are numbered (`output_0`, ...),
    mappings, dataclasses and named tuples name their entries, nested ones join names by `_`. None is left out.

    Raises:
        InputError: Something in it is no tensor, there is none, or two have one name.
    """
    found: Answers = {}
    answer = _by_field(answer)
    _collect(answer, "", found)
    if not found:
        raise InputError(f"the model returns {type(answer).__name__} without a tensor in it; return tensors.")
    if len(found) == 1 and not isinstance(answer, Mapping) and not dataclasses.is_dataclass(answer):
        return {OUTPUT: next(iter(found.values()))}
    return found


@torch.no_grad()
def answers(model: nn.Module, images: Tensor) -> Answers:
    """Return what a model answers in eval mode, by name and without gradients."""
    return named(model.eval()(images))


def selected(answer: Any, names: Sequence[str]) -> Answers:
    """Return the outputs called `names`, in that order; tensors of a tuple or list may get other names by position.

    Raises:
        InputError: An output is not there, or there are fewer than names.
    """
    if isinstance(answer, Tensor) and len(names) == 1:
        return {names[0]: answer}
    found, answer = named(answer), _by_field(answer)
    if isinstance(answer, Sequence) and not isinstance(answer, Mapping) and not {*names} <= found.keys():
        if len(found) < len(names):
            raise InputError(f"the model returns {len(found)} tensors, but {len(names)} are named: {', '.join(names)}.")
        return dict(zip(names, found.values(), strict=False))
    if missing := [name for name in names if name not in found]:
        raise InputError(f"the model returns no output {missing[0]!r}; it has {', '.join(found)}.")
    return {name: found[name] for name in names}


def stacked(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Return (n, ...) answers from those to parts of the images; where sizes depend on them, zeros fill the shorter."""
    if len({part.shape[1:] for part in parts}) == 1:
        return np.concatenate(parts)
    size = np.max([part.shape[1:] for part in parts], axis=0)
    fill = [[(0, 0), *((0, int(missing)) for missing in size - np.array(part.shape[1:], int))] for part in parts]
    return np.concatenate([np.pad(part, edges) for part, edges in zip(parts, fill, strict=True)])


def _by_field(value: Any) -> Any:
    """Return a named tuple as a mapping, and all else as it is."""
    return (
        dict(zip(value._fields, value, strict=True))
        if isinstance(value, tuple) and hasattr(value, "_fields")
        else value
    )


def _collect(value: Any, path: str, found: Answers) -> None:
    value = _by_field(value)
    if value is None:
        return
    if isinstance(value, Tensor):
        if path in found:
            raise InputError(f"the model returns two outputs that are called {path!r}; rename an entry.")
        found[path or OUTPUT] = value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _collect(item, f"{path}_{key}" if path else str(key), found)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            _collect(getattr(value, field.name), f"{path}_{field.name}" if path else field.name, found)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for index, item in enumerate(value):
            _collect(item, f"{path or OUTPUT}_{index}", found)
    else:
        where = f" under {path!r}" if path else ""
        raise InputError(
            f"the model returns a {type(value).__name__}{where}; it must return tensors, or containers of them."
        )
