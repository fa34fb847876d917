"""In: one operation of a trace. Out: the labels of its result; the rules of all operations but attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from hirelc_deploy.graph.labels import (
    Factor,
    Labels,
    Value,
    Walk,
    WeightUse,
    handles,
    result_shapes,
    unfollowed,
    unknown,
    where,
)
from hirelc_deploy.graph.sizes import DimSource, Size, TensorRef
from hirelc_deploy.graph.trace import BATCH, Op, refs


@handles(
    "relu", "relu6", "hardtanh", "gelu", "silu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "leaky_relu", "elu",
    "celu", "selu", "mish", "softplus", "clamp", "clip", "exp", "log", "sqrt", "rsqrt", "neg", "abs", "square",
    "reciprocal", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "contiguous",
    "clone", "detach", "to", "type", "float", "half", "double", "bfloat16", "type_as", "cpu", "cuda", "nan_to_num",
    "zeros_like", "ones_like", "logsigmoid", "threshold", "sin", "cos", "erf", "requires_grad", "data", "alias",
    "fill", "zero", "rand_like", "randn_like", "empty_like", "full_like", "identity", "copy",
)  # fmt: skip
def _same(walk: Walk, op: Op) -> Value:
    return walk.value(next(iter(refs((op.args, op.kwargs)))))


@handles(
    "add", "sub", "mul", "div", "pow", "maximum", "minimum", "where", "masked_fill", "lerp", "addcmul",
    "floor_divide", "remainder", "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or",
)  # fmt: skip
def _elementwise(walk: Walk, op: Op) -> Value:
    given = list(refs((op.args, op.kwargs)))
    values = [walk.value(ref) for ref in given]
    result = walk.elementwise(values, f"meets values that cannot be cut in {where(op)}")
    if op.function == "add" and sum(ref.name is None for ref in given) > 1:
        for factor in result.factors:
            walk.couplings.mark(factor.labels, "residual channels")
    return result


CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d


@handles("conv1d", "conv2d", "conv3d")
def _convolution(walk: Walk, op: Op) -> Value:
    x_ref, w_ref = op.arg(0, "input"), op.arg(1, "weight")
    kernel = w_ref.shape[2:]
    if len(x_ref.shape) != len(w_ref.shape):  # an image without a batch
        return unknown(walk, op)[0]
    x, weight = walk.value(x_ref), walk.value(w_ref)
    groups = op.arg(6, "groups", 1)
    reason = f"meets channels that cannot be cut at {op.module}"
    for dim in range(2, len(x_ref.shape)):
        x = walk.freeze(x, dim, reason)
    x, inputs = walk.one_dim(x, 1, reason)
    weight, filters = walk.one_dim(weight, 0, reason)
    weight, columns = walk.one_dim(weight, 1, reason)
    channels = x_ref.shape[1]
    if groups == 1:
        walk.tie_or_pin(inputs, columns, "it reads the image" if inputs is None else reason)
    elif groups == channels:
        if inputs is not None and filters is not None:
            walk.couplings.tie(inputs[:, None], filters.reshape(channels, -1))
        else:
            walk.tie_or_pin(inputs, filters, reason)
    else:
        # Every group must stay as large as the others: an index goes from all groups at once.
        if inputs is not None and columns is not None:
            walk.couplings.tie(inputs.reshape(groups, -1), columns)
        else:
            walk.tie_or_pin(inputs, columns, reason)
        if filters is not None:
            walk.couplings.tie(filters.reshape(groups, -1), filters.reshape(groups, -1)[:1])
    tie_bias(walk, op.arg(2, "bias"), filters)
    stride, dilation = (
        _of_each_dim(op.arg(place, name, 1), kernel) for place, name in ((3, "stride"), (5, "dilation"))
    )
    padding = op.arg(4, "padding", 0)
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        padding = [size // 2 for size in total]
    use = _weight_use(walk, op, "conv", (channels, w_ref.shape[0]), (inputs, filters))
    use.groups, use.kernel, use.stride, use.dilation = groups, kernel, stride, dilation
    use.padding = _of_each_dim(padding, kernel)
    kept = tuple(f for f in x.factors if f.dims == (0,))
    return Value(op.result.shape, kept + factors_at(1, filters))


@handles("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _transposed(walk: Walk, op: Op) -> Sequence[Value]:
    """Stays whole, but counts: every input is multiplied with all that its group makes of it."""
    x, weight = op.arg(0, "input"), op.arg(1, "weight")
    walk.found.macs_apart += math.prod(x.shape) * math.prod(weight.shape[1:]) // BATCH
    return unknown(walk, op)


@handles("linear")
def _linear(walk: Walk, op: Op) -> Value:
    x_ref, w_ref = op.arg(0, "input"), op.arg(1, "weight")
    last = len(x_ref.shape) - 1
    reason = f"meets features that cannot be cut at {op.module}"
    x, inputs = walk.one_dim(walk.value(x_ref), last, reason)
    weight, rows = walk.one_dim(walk.value(w_ref), 0, reason)
    weight, columns = walk.one_dim(weight, 1, reason)
    walk.tie_or_pin(inputs, columns, "it reads the image" if inputs is None else reason)
    tie_bias(walk, op.arg(2, "bias"), rows)
    _weight_use(walk, op, "linear", (x_ref.shape[-1], w_ref.shape[0]), (inputs, rows))
    kept = tuple(f for f in x.factors if last not in f.dims)
    return Value(op.result.shape, kept + factors_at(last, rows))


def _weight_use(
    walk: Walk, op: Op, kind: str, features: tuple[int, int], labels: tuple[Labels | None, Labels | None]
) -> WeightUse:
    """Note the layer; keep what it touches where its weight is not a saved one."""
    x, weight = op.arg(0, "input"), op.arg(1, "weight")
    layer = walk.modules.get(op.module)
    if weight.name is None:
        for array in labels:
            if array is not None:
                walk.couplings.pin(array, f"computed in {op.module or 'the model itself'}, not in a plain layer module")
    name = op.module if weight.name is None else weight.name.removesuffix(".weight")
    use = WeightUse(name, kind, weight.name or "", x, op.result, *features, *labels)
    use.called = isinstance(layer, (*CONVOLUTIONS, nn.Linear)) and weight.name == f"{op.module}.weight"
    walk.found.uses.append(use)
    return use


def tie_bias(walk: Walk, bias: TensorRef | None, features: Labels | None) -> None:
    """Let a bias go with the features it is added to."""
    if bias is not None:
        _, labels = walk.one_dim(walk.value(bias), 0, "")
        walk.tie_or_pin(features, labels, "shares its bias with features that cannot be cut")


def factors_at(dim: int, labels: Labels | None) -> tuple[Factor, ...]:
    """Return the labels of one dim as factors, none where it has none."""
    return () if labels is None else (Factor((dim,), labels),)


def _of_each_dim(value: Any, kernel: Sequence[int]) -> tuple[int, ...]:
    """Return an argument of a convolution for each dim of its kernel; the code may give one for all."""
    given = [value] if isinstance(value, int) else list(value)
    return tuple(int(number) for number in (given if len(given) == len(kernel) else given * len(kernel)))


@handles("batch_norm", "instance_norm", "prelu")
def _per_channel(walk: Walk, op: Op) -> Value:
    x, *parameters = walk.inputs(op)
    reason = f"meets channels that cannot be cut at {where(op)}"
    x, channels = walk.one_dim(x, 1, reason)
    for parameter in parameters:
        if math.prod(parameter.shape) > 1:
            walk.tie_or_pin(channels, walk.one_dim(parameter, len(parameter.shape) - 1, reason)[1], reason)
    return x


@handles("layer_norm", "rms_norm")
def _layer_norm(walk: Walk, op: Op) -> Value:
    """Mean and variance are those of the features that are there: the masked twin takes them over the kept ones."""
    x, *parameters = walk.inputs(op)
    sizes = op.arg(1, "normalized_shape")
    last = len(x.shape) - 1
    reason = f"normalised together with the other features by {op.module or 'the model'}"
    if len(sizes) > 1 or not parameters or op.arg(2, "weight") is None or op.arg(2, "weight").name is None:
        for offset in range(len(sizes)):
            x = walk.freeze(x, last - offset, reason)
        for parameter in parameters:
            walk.freeze_all(parameter, reason)
        return x
    x, features = walk.one_dim(x, last, reason)
    for parameter in parameters:
        walk.tie_or_pin(
            features, walk.one_dim(parameter, 0, reason)[1], f"meets features that cannot be cut at {where(op)}"
        )
    return walk.written_size(x, last, sizes[0], op)


@handles("group_norm")
def _group_norm(walk: Walk, op: Op) -> Value:
    """As a layer norm over each group: every group must stay as large as the others."""
    x, *parameters = walk.inputs(op)
    groups, weight = op.arg(1, "num_groups"), op.arg(2, "weight")
    reason = f"normalised together with the other channels of its group by {op.module or 'the model'}"
    x, channels = walk.one_dim(x, 1, reason)
    if channels is None or weight is None or weight.name is None:
        for parameter in parameters:
            walk.freeze_all(parameter, reason)
        return walk.freeze(x, 1, reason)
    for parameter in parameters:
        walk.tie_or_pin(channels, walk.one_dim(parameter, 0, reason)[1], reason)
    by_group = channels.reshape(groups, -1)
    walk.couplings.tie(by_group, by_group[:1])
    return x


@handles("softmax", "log_softmax", "normalize", "cumsum")
def _along_dim(walk: Walk, op: Op) -> Value:
    x = walk.value(op.arg(0, "input"))
    dim = op.arg(2, "dim", 1) if op.function == "normalize" else op.arg(1, "dim")
    dims = range(len(x.shape)) if dim is None else [dim]
    for d in dims:
        x = walk.freeze(x, d % len(x.shape), f"normalised together with the others by {where(op)}")
    return x


RESPONSE_NORMS = ("GlobalResponseNorm", "GRN", "ConvNextV2GRN")
"""Class names of the norm of ConvNeXt V2 (Woo et al. 2023), in timm, in its authors' code and in transformers."""


@handles("mean", "sum", "amax", "amin", "var", "std", "norm", "linalg_vector_norm")
def _reduction(walk: Walk, op: Op) -> Value:
    x = walk.value(next(iter(refs((op.args, op.kwargs)))))
    rank, dims = len(x.shape), op.arg(2 if op.function.endswith("norm") else 1, "dim")
    if not isinstance(dims, (int, tuple, list, type(None))):
        return unknown(walk, op)[0]
    reduced = set(range(rank)) if dims is None else {d % rank for d in ([dims] if isinstance(dims, int) else dims)}
    response_norm = walk.modules.get(op.module)
    if op.function == "mean" and type(response_norm).__name__ in RESPONSE_NORMS and len(reduced) == 1:
        walk.found.averaged.add(f"{op.module}.{'weight' if hasattr(response_norm, 'weight') else 'gamma'}")
        x = Value(x.shape, tuple(f for f in x.factors if f.dims != tuple(reduced)))
    for dim in reduced:
        x = walk.freeze(x, dim, f"mixed with the others by {where(op)}")
    if len(op.result.shape) == rank:
        return Value(op.result.shape, x.factors)
    left = [d for d in range(rank) if d not in reduced]
    return x.moved(op.result.shape, left.index)


@handles(
    "max_pool2d", "avg_pool2d", "lp_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate", "pad",
    "max_pool1d", "avg_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool1d",
    "max_pool3d", "avg_pool3d", "adaptive_avg_pool3d", "adaptive_max_pool3d",
)  # fmt: skip
def _spatial(walk: Walk, op: Op) -> Value | Sequence[Value]:
    x = walk.value(next(iter(refs((op.args, op.kwargs)))))
    shapes = result_shapes(op)
    if len(shapes) != 1 or len(shapes[0]) != len(x.shape):
        return unknown(walk, op)
    batched = {"1d": 3, "2d": 4, "3d": 5}.get(op.function[-2:], len(x.shape))
    channels = {0, 1} if op.function != "pad" and len(x.shape) == batched else set()
    if op.function == "pad":
        padded = op.arg(1, "pad")
        channels = {d for d in range(len(x.shape)) if not any(_amounts(padded, len(x.shape) - 1 - d))}
    for dim in set(range(len(x.shape))) - channels:
        x = walk.freeze(x, dim, f"moved or padded by {where(op)}")
    return Value(shapes[0], x.factors)


def _amounts(padded: Sequence[int], place: int) -> Sequence[int]:
    return padded[2 * place : 2 * place + 2]


@handles("roll", "flip")
def _reordered(walk: Walk, op: Op) -> Value:
    x = walk.value(op.arg(0, "input"))
    given = op.arg(2, "dims") if op.function == "roll" else op.kwargs.get("dims", op.args[1:])
    moved = np.atleast_1d(np.array(range(len(x.shape)) if given is None or given == () else given)).ravel()
    for dim in moved.tolist():
        x = walk.freeze(x, dim % len(x.shape), f"moved by {where(op)}")
    return x


@handles("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as")
def _reshape(walk: Walk, op: Op) -> Value:
    x = walk.value(next(iter(refs((op.args, op.kwargs)))))
    if any(isinstance(arg, torch.dtype) for arg in op.args):
        return unknown(walk, op)[0]
    result = walk.reshape(x, op.result.shape, f"reshaped together with other dimensions by {where(op)}")
    for dim, size in enumerate(_given_sizes(op, len(x.shape))):
        result = walk.written_size(result, dim, size, op)
    return result


def _given_sizes(op: Op, rank: int) -> Sequence[int]:
    """Return the size that the code gave each dimension of a new shape, negative where it gave none."""
    given = list(op.args[1:]) or list(op.kwargs.values())
    if op.function in ("view_as", "reshape_as", "expand_as"):
        return [Size(size, DimSource(given[0], dim)) for dim, size in enumerate(given[0].shape)]
    if op.function == "unflatten":
        dim, sizes = op.arg(1, "dim") % rank, op.arg(2, "sizes")
        return [*([-1] * dim), *sizes]
    if op.function in ("reshape", "view", "expand", "broadcast_to"):
        return list(given[0]) if isinstance(given[0], (tuple, list)) else given
    return []


def permuted(value: Value, order: Sequence[int]) -> Value:
    """Return the value with its dims in another order."""
    return value.moved([value.shape[d] for d in order], list(order).index)


@handles("permute", "transpose", "t", "T", "mT", "swapaxes", "swapdims", "movedim")
def _permute(walk: Walk, op: Op) -> Value:
    x = walk.value(op.arg(0, "input"))
    # The order of the dims is what the same function does to an empty tensor of that rank.
    probe = torch.empty(0).new_empty(tuple(range(2, len(x.shape) + 2)), device="meta")
    method = getattr(probe, op.function)
    options = {name: value for name, value in op.kwargs.items() if name != "input"}
    moved = method(*op.args[1:], **options) if callable(method) else method
    return permuted(x, [size - 2 for size in moved.shape])


@handles("expand", "expand_as", "broadcast_to", "repeat", "tile")
def _expand(walk: Walk, op: Op) -> Value:
    x, shape = walk.value(next(iter(refs((op.args, op.kwargs))))), op.result.shape
    offset = len(shape) - len(x.shape)
    for dim, size in enumerate(x.shape):
        if size != shape[dim + offset]:
            x = walk.freeze(x, dim, f"repeated by {where(op)}")
    result = x.moved(shape, lambda d: d + offset)
    for dim, size in enumerate(_given_sizes(op, len(x.shape))):
        if dim < offset or x.shape[dim - offset] != shape[dim]:
            result = walk.filled(result, dim, size)
        else:
            result = walk.written_size(result, dim, size, op)
    return result


@handles("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty")
def _constant(walk: Walk, op: Op) -> Value:
    """A tensor whose elements are alike: it has as many as its sizes say, and any may go."""
    given = [arg for arg in op.args if not isinstance(arg, TensorRef)]
    shape = op.kwargs.get("size", given[0] if given and isinstance(given[0], (tuple, list)) else given)
    result = Value(op.result.shape)
    for dim, size in enumerate(shape[: len(result.shape)]):
        result = walk.filled(result, dim, size)
    return result


def repeated(value: Value, dim: int, times: int) -> Value:
    """Return the value with each index along `dim` in a row `times` times."""
    dim %= len(value.shape)
    shape = (*value.shape[:dim], value.shape[dim] * times, *value.shape[dim + 1 :])
    factors = (Factor(f.dims, f.labels.repeat(times, f.dims.index(dim))) if dim in f.dims else f for f in value.factors)
    return Value(shape, tuple(factors))


@handles("repeat_interleave")
def _repeat_interleave(walk: Walk, op: Op) -> Value:
    x, times, dim = walk.value(op.arg(0, "input")), op.arg(1, "repeats"), op.arg(2, "dim")
    if not isinstance(times, int) or dim is None:
        return unknown(walk, op)[0]
    return repeated(x, dim, times)


@handles("cat")
def _cat(walk: Walk, op: Op) -> Value:
    values = [walk.value(ref) for ref in op.arg(0, "tensors")]
    rank = len(values[0].shape)
    dim = op.arg(1, "dim", 0) % rank
    reason = f"joined with values that cannot be cut by {where(op)}"
    pieces: list[Labels | None] = []
    others: list[Value] = []
    for value in values:
        rest, labels = walk.one_dim(value, dim, reason)
        pieces.append(labels)
        shape = tuple(1 if d == dim else size for d, size in enumerate(value.shape))
        others.append(Value(shape, tuple(f for f in rest.factors if f.dims != (dim,))))
    joined = walk.elementwise(others, reason)
    if all(piece is None for piece in pieces):
        return Value(op.result.shape, joined.factors)
    whole = [
        piece if piece is not None else walk.couplings.fresh(v.shape[dim])
        for piece, v in zip(pieces, values, strict=True)
    ]
    for piece, labels in zip(pieces, whole, strict=True):
        if piece is None:
            walk.couplings.pin(labels, reason)
    return Value(op.result.shape, (*joined.factors, Factor((dim,), np.concatenate(whole))))


@handles("stack")
def _stack(walk: Walk, op: Op) -> Value:
    values = [walk.value(ref) for ref in op.arg(0, "tensors")]
    joined = walk.elementwise(values, f"stacked with values that cannot be cut by {where(op)}")
    dim = op.arg(1, "dim", 0) % len(op.result.shape)
    return joined.moved(op.result.shape, lambda d: d + (d >= dim))


@handles("unbind")
def _unbind(walk: Walk, op: Op) -> Sequence[Value]:
    x = walk.value(op.arg(0, "input"))
    dim = op.arg(1, "dim", 0) % len(x.shape)
    return [_selected(walk, x, dim, index, op) for index in range(x.shape[dim])]


def _selected(walk: Walk, x: Value, dim: int, index: int, op: Op) -> Value:
    """Return one index of `dim`; of a joint labelling, what is left must be the same at every index."""
    factor = x.factor_of(dim)
    if factor is not None:
        others = tuple(f for f in x.factors if f is not factor)
        if len(factor.dims) == 1:
            x = walk.freeze(x, dim, f"picked by its number in {where(op)}")
        else:
            axis = factor.dims.index(dim)
            part = Factor(tuple(d for d in factor.dims if d != dim), factor.labels.take([index], axis).squeeze(axis))
            x = Value(x.shape, (*others, part))
    shape = x.shape[:dim] + x.shape[dim + 1 :]
    return x.moved(shape, lambda d: d - (d > dim))


@handles("chunk", "split", "tensor_split", "split_with_sizes")
def _chunk(walk: Walk, op: Op) -> Sequence[Value]:
    x = walk.value(op.arg(0, "input"))
    dim = op.arg(2, "dim", 0) % len(x.shape)
    x, labels = walk.one_dim(x, dim, f"divided by {where(op)}")
    sizes = [shape[dim] for shape in result_shapes(op)]
    given = op.args[1] if len(op.args) > 1 else next(value for name, value in op.kwargs.items() if name != "dim")
    whole = given.quotient_of if isinstance(given, Size) else None
    if whole is not None and whole == x.shape[dim]:
        x = walk.written_size(x, dim, whole, op)
    written = _written_parts(op.function, given, sizes)
    if labels is not None and None in written:
        # Their sizes follow from the whole, so equal parts must stay equal.
        if len(set(sizes)) > 1:
            walk.couplings.pin(labels, f"divided into parts of fixed sizes by {where(op)}")
        else:
            walk.couplings.tie(labels.reshape(len(sizes), -1), labels[None, : sizes[0]])
    rest = tuple(f for f in x.factors if f.dims != (dim,))
    pieces, start = [], 0
    for size, number in zip(sizes, written, strict=True):
        shape = (*x.shape[:dim], size, *x.shape[dim + 1 :])
        piece = Value(shape, (*rest, *factors_at(dim, None if labels is None else labels[start : start + size])))
        pieces.append(piece if number is None else walk.written_size(piece, dim, number, op))
        start += size
    return pieces


def _written_parts(function: str, given: Any, sizes: Sequence[int]) -> list[int | None]:
    """Return for each part the size that the code gave it, or None where that follows from the size of the whole."""
    if function in ("chunk", "tensor_split"):
        return [None] * len(sizes)
    numbers = given if isinstance(given, (tuple, list)) else [given] * len(sizes)
    parts = zip(numbers, sizes, strict=True)
    return [
        None if isinstance(number, Size) and number.source is None else number if number == size else size
        for number, size in parts
    ]


@handles("getitem", "select", "narrow")
def _getitem(walk: Walk, op: Op) -> Value:
    x = walk.value(op.args[0])
    key = op.args[1] if op.function == "getitem" else None
    if op.function == "select":
        key = (slice(None),) * (op.arg(1, "dim") % len(x.shape)) + (op.arg(2, "index"),)
    elif op.function == "narrow":
        start = op.arg(2, "start")
        key = (slice(None),) * (op.arg(1, "dim") % len(x.shape)) + (slice(start, start + op.arg(3, "length")),)
    keys = list(key) if isinstance(key, tuple) else [key]
    picked = [k for k in keys if isinstance(k, TensorRef)]
    if not all(k is None or k is Ellipsis or isinstance(k, (int, slice, TensorRef)) for k in keys):
        return unknown(walk, op)[0]
    if picked and any(isinstance(k, int) for k in keys):
        return unknown(walk, op)[0]
    if Ellipsis in keys:
        place = keys.index(Ellipsis)
        missing = len(x.shape) - sum(k is not None and k is not Ellipsis for k in keys)
        keys[place : place + 1] = [slice(None)] * missing
    dim, by_tensor = 0, list[int]()
    for k in keys:
        if k is None:
            x = x.moved((*x.shape[:dim], 1, *x.shape[dim:]), lambda d, at=dim: d + (d >= at))  # type: ignore[misc]
            dim += 1
        elif isinstance(k, TensorRef):
            by_tensor.append(dim)
            dim += 1
        elif isinstance(k, int):
            x = _selected(walk, x, dim, k % x.shape[dim], op)
        else:
            x = _part(walk, x, dim, k, op)
            dim += 1
    return _picked(walk, x, by_tensor, picked, op) if picked else x


def _part(walk: Walk, x: Value, dim: int, part: slice, op: Op) -> Value:
    """Return a slice of `dim`; it can be cut where the slice's ends are numbers that a module or a shape gives."""
    size, reason = x.shape[dim], f"picked by its number in {where(op)}"
    start, stop, step = part.indices(size)
    shape = (*x.shape[:dim], len(range(start, stop, step)), *x.shape[dim + 1 :])
    if shape == x.shape:
        return x
    ends = [end for end in (part.start, part.stop) if end is not None and end != 0]
    if step != 1 or not all(isinstance(end, Size) and end.source is not None and 0 < end <= size for end in ends):
        return Value(shape, walk.freeze(x, dim, reason).factors)
    x, labels = walk.one_dim(x, dim, reason)
    for end in ends:
        walk.must_agree(None if labels is None else (labels[:end], 0), walk.axis(end), op)
    rest = tuple(f for f in x.factors if f.dims != (dim,))
    return Value(shape, (*rest, *factors_at(dim, None if labels is None else labels[start:stop])))


def _picked(walk: Walk, x: Value, dims: Sequence[int], indices: Sequence[TensorRef], op: Op) -> Value:
    """Return x with `dims` replaced by those of the index tensors, at the place of the first of them."""
    for index in indices:
        walk.freeze_all(walk.value(index), f"they are numbers of what is picked in {where(op)}")
    for dim in dims:
        x = walk.freeze(x, dim, f"picked by its number in {where(op)}")
    try:
        new = np.broadcast_shapes(*(index.shape for index in indices))
    except ValueError:
        return unfollowed(walk, op, [x])[0]
    shape = (*x.shape[: dims[0]], *new, *x.shape[dims[-1] + 1 :])
    if list(dims) != list(range(dims[0], dims[-1] + 1)) or shape != op.result.shape:
        return unfollowed(walk, op, [x])[0]
    return x.moved(shape, lambda d: d if d < dims[0] else d - len(dims) + len(new))


@handles("index_select", "embedding")
def _index_select(walk: Walk, op: Op) -> Value:
    if op.function == "embedding":
        table, dim, index = op.arg(1, "weight"), 0, op.arg(0, "input")
    else:
        table, dim, index = op.arg(0, "input"), op.arg(1, "dim"), op.arg(2, "index")
    return _picked(walk, walk.value(table), [dim % len(table.shape)], [index], op)
