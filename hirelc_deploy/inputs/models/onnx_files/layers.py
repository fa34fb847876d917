"""In: nodes with weights. Out: torch's own layers: convolutions and products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hirelc_deploy.inputs.models.onnx_files.node import (
    Call,
    Function,
    Node,
    NotReadError,
    Value,
    call,
    check_size,
    floats,
    reads,
)

CONVOLUTIONS: dict[int, type[nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
TRANSPOSED: dict[int, type[nn.Module]] = {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d, 5: nn.ConvTranspose3d}


class Padded(nn.Sequential):
    """Padding that torch's layer has not, and the layer."""


def with_values(layer: nn.Module, **values: Tensor | None) -> nn.Module:
    """Return a layer, made on no device, with these tensors; None for one that it does without."""
    for name, value in values.items():
        if name in layer._buffers:
            layer.register_buffer(name, value)
        else:
            layer.register_parameter(name, None if value is None else nn.Parameter(value))
    if "num_batches_tracked" in layer._buffers:
        layer.register_buffer("num_batches_tracked", torch.tensor(0))
    return layer.eval()


def padding_of(node: Node, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> list[int]:
    """Return the padding before and after each spatial dimension, [before..., after...] as ONNX has it."""
    how = node.attributes.get("auto_pad", "NOTSET")
    size = len(kernel)
    if how in ("NOTSET", ""):
        pads = list(node.attributes.get("pads", [0] * 2 * size))
        if len(pads) != 2 * size or min(pads, default=0) < 0:
            raise NotReadError(f"its padding is {pads}")
        return pads
    if how == "VALID":
        return [0] * 2 * size
    spatial = node.value(0).shape[2:]
    total = [
        max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
        for n, k, s, d in zip(spatial, kernel, strides, dilations, strict=True)
    ]
    less = [t // 2 for t in total]
    more = [t - one for t, one in zip(total, less, strict=True)]
    return [*less, *more] if how == "SAME_UPPER" else [*more, *less]


def torch_padding(pads: Sequence[int]) -> list[int]:
    """Return ONNX's padding in the order of torch.nn.functional.pad: the last dimension first."""
    size = len(pads) // 2
    return [amount for dim in reversed(range(size)) for amount in (pads[dim], pads[dim + size])]


def bias_after(node: Node, channels: int, dim: int, rank: int) -> tuple[Node | None, Tensor | None]:
    """Return the Add that does nothing but add a bias to a layer's result, and that bias.

    Args:
        dim: The dimension of the channels, of `rank`.
    """
    add = node.next("Add")
    bias = None if add is None else node.other(add)
    if add is None or bias is None or not bias.fixed or bias.array.dtype != np.float32:
        return None, None
    shape = (1,) * (rank - bias.rank) + bias.shape
    if bias.rank > rank or shape != tuple(channels if d == dim else 1 for d in range(rank)):
        return None, None
    return add, floats(bias).reshape(-1)


def _spatial(node: Node, weight: Value) -> tuple[list[int], list[int], list[int], int]:
    kernel = list(weight.shape[2:])
    strides = list(node.attributes.get("strides", [1] * len(kernel)))
    dilations = list(node.attributes.get("dilations", [1] * len(kernel)))
    groups = int(node.attributes.get("group", 1))
    named = list(node.attributes.get("kernel_shape", kernel))
    if named != kernel or len(strides) != len(kernel) or len(dilations) != len(kernel):
        raise NotReadError(f"its kernel is {kernel}, but it says {named} with strides {strides}")
    if min((*strides, *dilations, groups)) < 1:
        raise NotReadError(f"its strides are {strides}, its dilations {dilations}, its groups {groups}")
    return kernel, strides, dilations, groups


@reads("Conv")
def _conv(node: Node) -> Call:
    x, weight, bias = node.value(0), node.value(1), node.optional(2)
    if not weight.fixed or (bias is not None and not bias.fixed):
        raise NotReadError("its weight is computed from the images")
    if x.rank not in CONVOLUTIONS or weight.rank != x.rank:
        raise NotReadError(f"it is given {x.rank} dimensions and a weight of {weight.rank}")
    kernel, strides, dilations, groups = _spatial(node, weight)
    filters, columns = weight.shape[:2]
    if columns * groups != x.shape[1] or filters % groups:
        raise NotReadError(f"its weight is {list(weight.shape)} in {groups} groups, for {x.shape[1]} channels")
    pads = padding_of(node, kernel, strides, dilations)
    size = len(kernel)
    check_size((*x.shape[:2], *(n + a + b for n, a, b in zip(x.shape[2:], pads[:size], pads[size:], strict=True))))
    absorbed, added = bias_after(node, filters, 1, x.rank) if bias is None else (None, None)
    kind: Any = CONVOLUTIONS[x.rank]
    same = pads[:size] == pads[size:]
    layer = kind(
        x.shape[1], filters, kernel, strides, pads[:size] if same else 0, dilations, groups, bias=False, device="meta"
    )
    layer = with_values(layer, weight=floats(weight), bias=floats(bias) if bias is not None else added)
    if not same:
        layer = Padded(Function(F.pad, {1: torch_padding(pads)}), layer)
    return Call(layer, [x], [absorbed] if absorbed else [])


@reads("ConvTranspose")
def _conv_transpose(node: Node) -> Call:
    x, weight, bias = node.value(0), node.value(1), node.optional(2)
    if not weight.fixed or (bias is not None and not bias.fixed) or x.rank not in TRANSPOSED:
        raise NotReadError("its weight is computed from the images, or has other dimensions")
    kernel, strides, dilations, groups = _spatial(node, weight)
    if weight.shape[0] != x.shape[1]:
        raise NotReadError(f"its weight is {list(weight.shape)}, for {x.shape[1]} channels")
    size, filters = len(kernel), weight.shape[1] * groups
    if "output_shape" in node.attributes or node.attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise NotReadError("its padding follows from the size of its result")
    pads = padding_of(node, kernel, strides, dilations)
    extra = list(node.attributes.get("output_padding", [0] * size))
    rows = zip(x.shape[2:], strides, dilations, kernel, extra, strict=True)
    check_size((x.shape[0], filters, *((n - 1) * s + d * (k - 1) + 1 + e for n, s, d, k, e in rows)))
    kind: Any = TRANSPOSED[x.rank]
    # torch crops as much on both sides; what is cropped more at the end is a smaller output padding.
    extra = [e - (after - before) for e, before, after in zip(extra, pads[:size], pads[size:], strict=True)]
    if min(extra, default=0) < 0:
        raise NotReadError(f"its padding is {pads}")
    absorbed, added = bias_after(node, filters, 1, x.rank) if bias is None else (None, None)
    layer = kind(
        x.shape[1], filters, kernel, strides, pads[:size], extra, groups, bias=False, dilation=dilations, device="meta"
    )
    layer = with_values(layer, weight=floats(weight), bias=floats(bias) if bias is not None else added)
    return Call(layer, [x], [absorbed] if absorbed else [])


def linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Return the layer of a (rows, columns) weight."""
    rows, columns = weight.shape
    return with_values(nn.Linear(columns, rows, bias=False, device="meta"), weight=weight.contiguous(), bias=bias)


@reads("Gemm")
def _gemm(node: Node) -> Call:
    x, weight, bias = node.value(0), node.value(1), node.optional(2)
    alpha, beta = (float(node.attributes.get(name, 1.0)) for name in ("alpha", "beta"))
    if not x.live or not weight.fixed or node.attributes.get("transA", 0) or x.rank != 2 or weight.rank != 2:
        raise NotReadError("its second factor is computed from the images, or its first is turned")
    matrix = floats(weight) if node.attributes.get("transB", 0) else floats(weight).T
    if bias is not None and (not bias.fixed or bias.array.size not in (1, len(matrix))):
        raise NotReadError("what it adds is no bias")
    if matrix.shape[1] != x.shape[1]:
        raise NotReadError(f"its weight is {list(weight.shape)}, for {x.shape[1]} features")
    added = None if bias is None else (floats(bias).reshape(-1) * beta).expand(len(matrix)).clone()
    return Call(linear(matrix * alpha, added), [x])


@reads("MatMul")
def _matmul(node: Node) -> Call:
    x, weight = node.value(0), node.value(1)
    if x.rank < 2 or weight.rank < 2 or x.shape[-1] != weight.shape[-2]:
        raise NotReadError(f"it multiplies {list(x.shape)} by {list(weight.shape)}")
    check_size((*np.broadcast_shapes(x.shape[:-2], weight.shape[:-2]), x.shape[-2], weight.shape[-1]))
    if weight.fixed and weight.rank == 2:
        absorbed, added = bias_after(node, weight.shape[1], x.rank - 1, x.rank)
        return Call(linear(floats(weight).T, added), [x], [absorbed] if absorbed else [])
    return Call(Function(torch.matmul), [x, weight])


@reads("PRelu")
def _prelu(node: Node) -> Call:
    x, slope = node.value(0), node.value(1)
    if slope.fixed and slope.array.size in (1, x.shape[1]) and slope.array.size == max(slope.shape, default=1):
        layer = nn.PReLU(slope.array.size, device="meta")
        return Call(with_values(layer, weight=floats(slope).reshape(-1)), [x])
    return call(node, leaky)


def leaky(x: Tensor, slope: Tensor) -> Tensor:
    """Return x where it is positive, else slope times x."""
    return torch.where(x > 0, x, slope * x)
