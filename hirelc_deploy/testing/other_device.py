"""In: code for a GPU. Out: the same on a device that refuses what mixes it with the CPU, as a GPU does, without one.

Tensors on it are computed as those of the CPU are. It is called `meta`, the only device beside the CPU that every build
of torch knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

OTHER = torch.device("meta")
INDEXING = ("aten::index.", "aten::index_put", "aten::_index_put_impl", "aten::_unsafe_index")
"""May be told where to look by the CPU, as on a GPU."""


class Elsewhere(Tensor):
    """A tensor on the other device; `here` are its numbers."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> Elsewhere:
        """Return a tensor of these numbers on the other device."""
        made = Tensor._make_wrapper_subclass(
            cls, here.shape, here.stride(), here.storage_offset(), dtype=here.dtype, device=OTHER
        )
        made.here = here
        return made

    def tolist(self) -> Any:
        """Return its numbers; torch leaves this to those who make tensors of their own."""
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return computed(function, args, kwargs or {})


@contextmanager
def other_device() -> Iterator[None]:
    """Return a region in which the device is there: `tensor.to(OTHER)` moves to it, `tensor.cpu()` back."""
    with _FromNumbers(), _Computed():  # type: ignore[no-untyped-call]  # torch's
        yield


class _Computed(TorchDispatchMode):
    """Sees operators of which no operand is on the other device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(function, args, kwargs or {})


class _FromNumbers(TorchFunctionMode):
    """Tensors of numbers are made where no operator is seen."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if function is Tensor.new_tensor:
            own, *rest = args
            return function(_here(own), *rest, **{**given, "device": "cpu"}).to(given.get("device", own.device))
        if function in (torch.tensor, torch.as_tensor) and torch.device(given.get("device") or "cpu") == OTHER:
            return function(*args, **{**given, "device": "cpu"}).to(OTHER)
        if function in (Tensor.__getitem__, Tensor.__setitem__):
            own, places, *rest = args
            each = places if isinstance(places, tuple) else (places,)
            args = own, tuple(torch.tensor(one) if isinstance(one, list) else one for one in each), *rest
        return function(*args, **given)


def computed(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute an operator where its operands are; raise RuntimeError where they are on both devices."""
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [value for value in given if isinstance(value, Elsewhere)]
    if any(value.device == OTHER for value in given if not isinstance(value, Elsewhere)):
        # No RuntimeError, which would look as if the code under test did not run on the device.
        raise AssertionError(f"{function}: numbers of an operand were made where no operator is seen, and lost")
    target = kwargs.get("device")
    name = function._schema.name + "."
    moves = name.startswith(("aten::_to_copy.", "aten::copy_."))
    if there and not moves and not name.startswith(INDEXING):
        strangers = [value for value in given if not isinstance(value, Elsewhere) and value.ndim]
        if strangers:
            raise RuntimeError(f"{function}: expected all tensors to be on the same device, found {OTHER} and cpu")
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    found = function(*tree_map(_here, args), **tree_map(_here, kwargs))
    stays_there = bool(there) if target is None else torch.device(target) == OTHER
    if name.startswith("aten::copy_."):
        return args[0]
    if function._schema.is_mutable and isinstance(found, Tensor) and given:
        owner = [value for value in given if _here(value) is found]
        if owner:
            return owner[0]
    return (
        tree_map(lambda value: Elsewhere(value) if isinstance(value, Tensor) else value, found)
        if stays_there
        else found
    )


def _here(value: Any) -> Any:
    return value.here if isinstance(value, Elsewhere) else value
