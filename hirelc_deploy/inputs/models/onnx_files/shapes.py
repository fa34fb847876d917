"""In: nodes that move, join, divide or sum values. Out: modules whose sizes follow when a network is cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from hirelc_deploy.inputs.models.onnx_files.layers import torch_padding
from hirelc_deploy.inputs.models.onnx_files.node import Call, Function, Node, NotReadError, Value, check_size, reads

ALL = 2**62
"""Ends of slices beyond this say `to the end`."""


class Reshape(nn.Module):
    """Another shape of the same values; -1 for the dimension that grows with the number of images."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        """Return x in the shape."""
        return x.reshape(self.shape)


class Expand(nn.Module):
    """Repeats dimensions of size 1; -1 for those that stay, and the images' own number where that is repeated."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        """Return x in the shape."""
        return x.expand(self.shape)


class Split(nn.Module):
    """Parts of these sizes along one dimension."""

    def __init__(self, sizes: Sequence[int], dim: int) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self._dim = dim

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the parts."""
        return torch.split(x, list(self.sizes), dim=self._dim)


class Slice(nn.Module):
    """A part of each of some dimensions; -1 for an end that is open."""

    def __init__(self, dims: Sequence[int], starts: Sequence[int], ends: Sequence[int], steps: Sequence[int]) -> None:
        super().__init__()
        self._dims = tuple(dims)
        self._steps = tuple(steps)
        self.starts = tuple(starts)
        self.ends = tuple(ends)

    def forward(self, x: Tensor) -> Tensor:
        """Return the part."""
        key = [slice(None)] * x.ndim
        for dim, start, end, step in zip(self._dims, self.starts, self.ends, self._steps, strict=True):
            key[dim] = slice(start if start > 0 else None, end if end >= 0 else None, step if step > 1 else None)
        return x[tuple(key)]


class Picked(nn.Module):
    """Elements of one dimension by their numbers."""

    index: Tensor

    def __init__(self, index: Tensor, dim: int) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self._dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Return them."""
        return x.index_select(self._dim, self.index)


@reads("Reshape", "Flatten")
def _reshape(node: Node) -> Call:
    x = node.value(0)
    if node.operator == "Flatten":
        axis = int(node.attributes.get("axis", 1)) % (x.rank + 1)
        shapes: list[tuple[int, ...]] = [(math.prod(s[:axis]), math.prod(s[axis:])) for s in _shapes(node, x)]
    else:
        target = node.value(1)
        if target.live:
            raise NotReadError("its shape is computed from the images")
        shapes = _targets(node, x, target)
    return Call(Reshape(_growing(shapes)), [x])


def _shapes(node: Node, x: Value) -> list[tuple[int, ...]]:
    return [tuple(x.run(number).shape) for number in range(len(node.batches))]


def _growing(shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the shape that all runs have, -1 where they differ by the number of images."""
    differ = [dim for dim, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1]
    if len(differ) > 1:
        raise NotReadError("several dimensions of its result depend on the number of images")
    return tuple(-1 if dim in differ else size for dim, size in enumerate(shapes[0]))


def _targets(node: Node, x: Value, target: Value) -> list[tuple[int, ...]]:
    """Return the shape of the result in every run.

    A shape that is written for the file's own number of images is followed for other numbers: the dimension that
    holds the images grows.
    """
    given = _shapes(node, x)
    keeps_zero = bool(node.attributes.get("allowzero", 0))
    if not (node.batch_is_fixed and target.fixed):
        return [_target(shape, target.run(run).tolist(), keeps_zero) for run, shape in enumerate(given)]
    whole = _target(given[0], target.array.tolist(), keeps_zero)
    growing = [dim for dim, sizes in enumerate(zip(*given, strict=True)) if len(set(sizes)) > 1]
    if not growing:
        return [whole] * len(given)
    before = math.prod(given[0][: growing[0]])
    fits = [dim for dim in range(len(whole)) if math.prod(whole[:dim]) == before and whole[dim] % node.batches[0] == 0]
    if not fits:
        raise NotReadError("it is written for a single image")
    place = growing[0] if growing[0] in fits else fits[0]
    return [
        tuple(size // node.batches[0] * batch if dim == place else size for dim, size in enumerate(whole))
        for batch in node.batches
    ]


def _target(shape: Sequence[int], target: Sequence[int], keeps_zero: bool) -> tuple[int, ...]:
    """Return what a Reshape's numbers mean: 0 copies a size, -1 takes what is left."""
    if any(size < -1 for size in target) or list(target).count(-1) > 1 or len(target) > 16:
        raise NotReadError(f"its shape is {list(target)}")
    sizes = [
        shape[dim] if size == 0 and not keeps_zero and dim < len(shape) else size for dim, size in enumerate(target)
    ]
    rest = math.prod(size for size in sizes if size != -1)
    whole = tuple(math.prod(shape) // max(rest, 1) if size == -1 else size for size in sizes)
    if math.prod(whole) != math.prod(shape):
        raise NotReadError(f"its shape is {list(target)}, for {list(shape)}")
    return whole


@reads("Squeeze", "Unsqueeze")
def _squeeze(node: Node) -> Call:
    x = node.value(0)
    axes = node.setting("axes", 1)
    if axes is None:
        axes = [dim for dim, size in enumerate(x.shape) if size == 1]
    axes = list(np.atleast_1d(axes))
    if node.operator == "Squeeze":
        dims = tuple(sorted((int(a) % x.rank for a in axes), reverse=True))
        if any(size != 1 for shape in _shapes(node, x) for size in (shape[d] for d in dims)):
            raise NotReadError("it takes a dimension away that holds the images")
        return Call(Function(squeezed, dims=dims), [x])
    rank = x.rank + len(axes)
    return Call(Function(unsqueezed, dims=tuple(sorted(int(a) % rank for a in axes))), [x])


def squeezed(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Return x without these dimensions, the last first."""
    for dim in dims:
        x = x.squeeze(dim)
    return x


def unsqueezed(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Return x with further dimensions, the first first."""
    for dim in dims:
        x = x.unsqueeze(dim)
    return x


@reads("Transpose")
def _transpose(node: Node) -> Call:
    x = node.value(0)
    order = list(node.attributes.get("perm", range(x.rank)[::-1]))
    if sorted(order) != list(range(x.rank)):
        raise NotReadError(f"its order is {order}, for {x.rank} dimensions")
    return Call(Function(torch.permute, dims=tuple(order)), [x])


@reads("Concat")
def _concat(node: Node) -> Call:
    given = [value for value in node.inputs if value is not None]
    rank = given[0].rank
    return Call(Function(joined, dim=int(node.attributes["axis"]) % rank), given, stretched=True)


def joined(*given: Tensor, dim: int) -> Tensor:
    """Return tensors one behind the other."""
    return torch.cat(given, dim=dim)


@reads("Split")
def _split(node: Node) -> Call:
    x = node.value(0)
    dim = int(node.attributes.get("axis", 0)) % x.rank
    sizes = node.setting("split", 1)
    if sizes is None:
        part = -(-x.shape[dim] // len(node.outputs))
        sizes = [min(part, x.shape[dim] - start) for start in range(0, x.shape[dim], part)]
    if (
        sum(sizes) != x.shape[dim]
        or len(sizes) != len(node.outputs)
        or any(s[dim] != x.shape[dim] for s in _shapes(node, x))
    ):
        raise NotReadError(f"it divides {x.shape[dim]} into {sizes}")
    return Call(Split(sizes, dim), [x])


@reads("Slice")
def _slice(node: Node) -> Call:
    x = node.value(0)
    starts, ends = node.setting("starts", 1), node.setting("ends", 2)
    axes = node.setting("axes", 3, list(range(len(starts))))
    steps = node.setting("steps", 4, [1] * len(starts))
    parts: list[tuple[int, int, int]] = []
    backwards: list[int] = []
    dims = [int(axis) % x.rank for axis in axes]
    for dim, start, end, step in zip(dims, starts, ends, steps, strict=True):
        size = x.shape[dim]
        if step < 0:
            if step != -1 or (abs(end) < ALL and end > -size - 1) or (0 <= start < size - 1):
                raise NotReadError(f"its step is {step}")
            backwards.append(dim)
            continue
        first, last, _ = slice(start, min(end, ALL), step).indices(size)
        if (first > 0 or last < size) and any(shape[dim] != size for shape in _shapes(node, x)):
            raise NotReadError("it takes some of the images")
        parts.append((first, last if last < size else -1, step))
    kept = [(dim, part) for dim, part in zip([d for d in dims if d not in backwards], parts, strict=True)]
    if backwards:
        if kept:
            raise NotReadError("it goes backwards and forwards")
        return Call(Function(torch.flip, dims=tuple(backwards)), [x])
    columns = zip(*(part for _, part in kept), strict=True)
    return Call(Slice([dim for dim, _ in kept], *columns), [x])


@reads("Gather")
def _gather(node: Node) -> Call:
    x, index = node.value(0), node.value(1)
    dim = int(node.attributes.get("axis", 0)) % max(x.rank, 1)
    if not index.fixed:
        if x.fixed and dim == 0 and x.rank == 2:
            raise NotReadError("it looks words up in a table; networks of pictures are read")
        raise NotReadError("its numbers are computed from the images, or depend on their number")
    return _picked(node, x, np.asarray(index.array, np.int64), dim)


def _picked(node: Node, x: Value, numbers: NDArray[np.int64], dim: int) -> Call:
    """Return the call that picks elements of one dimension; the shape of the numbers takes its place."""
    sizes = {shape[dim] for shape in _shapes(node, x)}
    counted = np.where(numbers < 0, numbers + x.shape[dim], numbers)
    if len(sizes) > 1 or (counted.size and not 0 <= counted.min() <= counted.max() < x.shape[dim]):
        raise NotReadError(f"it picks {numbers.reshape(-1)[:4].tolist()} of {x.shape[dim]}")
    if counted.ndim == 0:
        return Call(Function(torch.select, dim=dim, index=int(counted)), [x])
    check_size((*x.shape[:dim], counted.size, *x.shape[dim + 1 :]))
    picked = Picked(torch.from_numpy(counted.reshape(-1).copy()), dim)
    if counted.ndim == 1:
        return Call(picked, [x])
    shapes = [(*shape[:dim], *counted.shape, *shape[dim + 1 :]) for shape in _shapes(node, x)]
    return Call(nn.Sequential(picked, Reshape(_growing(shapes))), [x])


@reads("GatherND")
def _gather_nd(node: Node) -> Call:
    x, index = node.value(0), node.value(1)
    if not index.fixed:
        raise NotReadError("its numbers are computed from the images, or depend on their number")
    if node.attributes.get("batch_dims", 0):
        raise NotReadError("it picks others for each image")
    if index.array.ndim == 0 or index.array.shape[-1] != 1:
        raise NotReadError("it picks along several dimensions at once")
    return _picked(node, x, np.asarray(index.array, np.int64)[..., 0], 0)


@reads("GatherElements")
def _gather_elements(node: Node) -> Call:
    x, index = node.value(0), node.value(1)
    dim = int(node.attributes.get("axis", 0)) % x.rank
    _check_along(node, x, dim)
    if any(bool((index.run(run) < 0).any()) for run in range(len(index.runs))):
        raise NotReadError("it counts from the end")
    return Call(Function(gathered, dim=dim), [x, index])


def gathered(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Return the elements of one dimension that whole numbers name, at each place others."""
    return x.gather(dim, index.long())


@reads("TopK")
def _top(node: Node) -> Call:
    x, dim = node.value(0), int(node.attributes.get("axis", -1))
    count = int(np.ravel(node.setting("k", 1))[0])
    dim %= x.rank
    _check_along(node, x, dim)
    if len(node.outputs) != 2 or not 0 < count <= x.shape[dim]:
        raise NotReadError(f"it takes {count} of {x.shape[dim]}, as {len(node.outputs)} of its two results")
    largest, in_order = (bool(node.attributes.get(name, 1)) for name in ("largest", "sorted"))
    return Call(Function(torch.topk, k=count, dim=dim, largest=largest, sorted=in_order), [x])


def _check_along(node: Node, x: Value, dim: int) -> None:
    """Raise NotReadError where a dimension holds the images."""
    if any(shape[dim] != x.shape[dim] for shape in _shapes(node, x)):
        raise NotReadError("it chooses among the images")


@reads("Expand", "Tile")
def _expand(node: Node) -> Call:
    x, target = node.value(0), node.value(1)
    if target.live:
        raise NotReadError("its shape is computed from the images")
    if node.operator == "Tile":
        if not target.fixed:
            raise NotReadError("it repeats images")
        times = target.array.tolist()
        check_size([size * time for size, time in zip(x.shape, times, strict=True)])
        return Call(Function(Tensor.repeat, {1: tuple(times)}), [x])
    shapes = [np.broadcast_shapes(shape, tuple(target.run(r).tolist())) for r, shape in enumerate(_shapes(node, x))]
    check_size(shapes[0])
    wanted = list(_growing(shapes))
    for offset, size in enumerate(reversed(x.shape), 1):
        if size == shapes[0][-offset]:
            wanted[-offset] = -1
    if -1 in wanted[: len(wanted) - x.rank]:
        raise NotReadError("it repeats images")
    return Call(Expand(wanted), [x])


def reduction(node: Node, function: Callable[..., Any], place: int = 1) -> Call:
    """Return the call of a function that sums over dimensions."""
    x, axes = node.value(0), node.setting("axes", place)
    keep = bool(node.attributes.get("keepdims", 1))
    if not axes and node.attributes.get("noop_with_empty_axes", 0):
        return Call(Function(_nothing), [x])
    dims = tuple(int(axis) % x.rank for axis in np.atleast_1d(axes)) if axes is not None else tuple(range(x.rank))
    if any(len({shape[dim] for shape in _shapes(node, x)}) > 1 for dim in dims):
        raise NotReadError("it is over all images")
    return Call(Function(function, dim=dims, keepdim=keep), [x])


def _nothing(x: Tensor) -> Tensor:
    return x


REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceSum": torch.sum,
    "ReduceMax": torch.amax,
    "ReduceMin": torch.amin,
    "ReduceL2": torch.linalg.vector_norm,
    "ReduceLogSumExp": torch.logsumexp,
}


@reads(*REDUCTIONS)
def _reduction(node: Node) -> Call:
    return reduction(node, REDUCTIONS[node.operator])


@reads("ReduceSumSquare", "ReduceL1", "ReduceProd")
def _other_reduction(node: Node) -> Call:
    inner = {"ReduceSumSquare": square_sum, "ReduceL1": absolute_sum}.get(node.operator)
    if inner is None:
        raise NotReadError("it multiplies along a dimension")
    return reduction(node, inner)


def square_sum(x: Tensor, dim: tuple[int, ...], keepdim: bool) -> Tensor:
    """Return the sum of squares."""
    return x.square().sum(dim, keepdim=keepdim)


def absolute_sum(x: Tensor, dim: tuple[int, ...], keepdim: bool) -> Tensor:
    """Return the sum of sizes."""
    return x.abs().sum(dim, keepdim=keepdim)


@reads("Softmax", "LogSoftmax")
def _softmax(node: Node) -> Call:
    x = node.value(0)
    axis = int(node.attributes.get("axis", -1 if node.opset >= 13 else 1)) % x.rank
    function: Callable[..., Any] = F.softmax if node.operator == "Softmax" else F.log_softmax
    if node.opset < 13 and axis != x.rank - 1 and math.prod(x.shape[axis + 1 :]) > 1:
        raise NotReadError("it is over several dimensions")
    return Call(Function(function, dim=axis), [x])


@reads("ArgMax", "ArgMin")
def _argmax(node: Node) -> Call:
    function = torch.argmax if node.operator == "ArgMax" else torch.argmin
    x = node.value(0)
    axis = int(node.attributes.get("axis", 0)) % x.rank
    keep = bool(node.attributes.get("keepdims", 1))
    return Call(Function(function, dim=axis, keepdim=keep), [x])


@reads("Pad")
def _pad(node: Node) -> Call:
    x, mode = node.value(0), node.attributes.get("mode", "constant")
    pads, value = node.setting("pads", 1), node.setting("value", 2, 0.0)
    axes = node.setting("axes", 3)
    if axes is not None:
        whole = [0] * 2 * x.rank
        for number, axis in enumerate(axes):
            whole[axis % x.rank], whole[axis % x.rank + x.rank] = pads[number], pads[number + len(axes)]
        pads = whole
    if len(pads) != 2 * x.rank or pads[0] or pads[x.rank]:
        raise NotReadError(f"it pads by {pads}")
    check_size([n + max(a, 0) + max(b, 0) for n, a, b in zip(x.shape, pads[: x.rank], pads[x.rank :], strict=True)])
    modes = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    if mode not in modes:
        raise NotReadError(f"its mode is {mode}")
    amounts = torch_padding(pads)
    while len(amounts) > 2 and amounts[-2:] == [0, 0]:
        amounts = amounts[:-2]
    settings = {"value": float(np.ravel(value)[0])} if mode == "constant" else {}
    return Call(Function(F.pad, {1: amounts}, mode=modes[mode], **settings), [x])


@reads("DepthToSpace", "SpaceToDepth")
def _depth_to_space(node: Node) -> Call:
    x, size = node.value(0), int(node.attributes["blocksize"])
    (_, c, h, w), mode = x.shape, node.attributes.get("mode", "DCR")
    if node.operator == "SpaceToDepth":
        shape = (-1, c, h // size, size, w // size, size)
        last = (-1, c * size * size, h // size, w // size)
        order: tuple[int, ...] = (0, 3, 5, 1, 2, 4)
    else:
        small = c // size**2
        last = (-1, small, h * size, w * size)
        shape = (-1, size, size, small, h, w) if mode == "DCR" else (-1, small, size, size, h, w)
        order = (0, 3, 4, 1, 5, 2) if mode == "DCR" else (0, 1, 4, 2, 5, 3)
    return Call(nn.Sequential(Reshape(shape), Function(torch.permute, dims=order), Reshape(last)), [x])


@reads("Einsum")
def _einsum(node: Node) -> Call:
    given = [value for value in node.inputs if value is not None]
    return Call(Function(contracted, equation=str(node.attributes["equation"])), given)


def contracted(*given: Tensor, equation: str) -> Tensor:
    """Return an Einstein sum."""
    return torch.einsum(equation, *given)
