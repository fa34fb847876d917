"""In: a model. Out: the whole numbers its modules keep, by path, and numbers that remember where they came from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class TensorRef:
    """One tensor of the trace. `name` is that of a parameter or buffer of the model, else None."""

    uid: int
    shape: tuple[int, ...]
    name: str | None = None


@dataclass(frozen=True)
class DimSource:
    """A number that was read as the size of one dimension of a tensor."""

    ref: TensorRef
    dim: int


class Size(int):
    """A whole number in a traced forward pass.

    `source` is the dimension it was read from, the path of the module attribute that holds it, or None when it was
    computed from such numbers; `quotient_of` is the number that was divided to get it, if it was made so. A plain `int`
    is a number written into the code.
    """

    source: DimSource | str | None
    quotient_of: Size | None

    def __new__(cls, value: int, source: DimSource | str | None = None, quotient_of: Size | None = None) -> Size:
        """Return `value` with its source."""
        size = super().__new__(cls, value)
        size.source, size.quotient_of = source, quotient_of
        return size

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies are plain numbers: what a model keeps beyond its forward pass has no source."""
        return int, (int(self),)

    def __deepcopy__(self, memo: Any) -> int:
        """Return a plain number, as `__reduce__` does."""
        return int(self)


def _computed(name: str) -> Any:
    plain = getattr(int, name)

    def operate(self: Size, *others: Any) -> Any:
        result = plain(self, *others)
        if type(result) is not int:
            return result
        return Size(result, quotient_of=self if name == "__floordiv__" else None)

    return operate


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    for _way in ("__{}__", "__r{}__"):
        setattr(Size, _way.format(_name), _computed(_way.format(_name)))
Size.__neg__ = _computed("__neg__")  # type: ignore[method-assign]


def whole_numbers(model: nn.Module) -> dict[str, int]:
    """Return path to value of every whole number that the modules keep beside their saved tensors.

    `a.dims.0` is an item of `a.dims`; `a.mask.shape.0` is the size of a buffer that is not saved.
    """
    saved = model.state_dict()
    found = {
        f"{name}.shape.{dim}": size
        for name, buffer in model.named_buffers()
        if name not in saved
        for dim, size in enumerate(buffer.shape)
    }
    for path, _, _, value in _attributes(model):
        if type(value) is int:
            found[path] = value
        else:
            found.update({f"{path}.{place}": number for place, number in enumerate(value)})
    return found


def set_whole_number(model: nn.Module, path: str, number: int) -> None:
    """Give one of the numbers that `whole_numbers` lists a new value; raises KeyError where there is none.

    A buffer keeps its first elements: one that is not saved is only ever cut where all are alike.
    """
    owner_path, _, name = path.rpartition(".")
    place = int(name) if name.isdecimal() else None
    if place is not None:
        owner_path, _, name = owner_path.rpartition(".")
    try:
        if name == "shape" and place is not None and owner_path in dict(model.named_buffers()):
            buffer = model.get_buffer(owner_path)
            owner = model.get_submodule(owner_path.rpartition(".")[0])
            if number < buffer.shape[place]:
                owner._buffers[owner_path.rpartition(".")[2]] = buffer.narrow(place, 0, number).clone()
            return
        holder = vars(model.get_submodule(owner_path))
    except AttributeError:
        raise KeyError(path) from None
    if place is None and type(holder.get(name)) is int:
        holder[name] = number
    elif place is not None and _is_numbers(holder.get(name)) and place < len(holder[name]):
        holder[name] = type(holder[name])((*holder[name][:place], number, *holder[name][place + 1 :]))
    else:
        raise KeyError(path)


@contextmanager
def traced_numbers(model: nn.Module) -> Iterator[None]:
    """Let every attribute that `whole_numbers` lists remember its path while the model runs."""
    before = list(_attributes(model))
    try:
        for path, module, name, value in before:
            if type(value) is int:
                vars(module)[name] = Size(value, path)
            else:
                items = (Size(number, f"{path}.{place}") for place, number in enumerate(value))
                vars(module)[name] = type(value)(items)
        yield
    finally:
        for _, module, name, value in before:
            vars(module)[name] = value


def _attributes(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Any]]:
    for path, module in model.named_modules():
        for name, value in list(vars(module).items()):
            if not name.startswith("_") and (type(value) is int or _is_numbers(value)):
                yield (f"{path}.{name}" if path else name), module, name, value


def _is_numbers(value: Any) -> bool:
    return type(value) in (tuple, list) and len(value) > 0 and all(type(item) is int for item in value)
