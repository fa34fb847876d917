"""In: nodes that pool or resize maps. Out: torch's functions for the same sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hirelc_deploy.inputs.models.onnx_files.layers import padding_of, torch_padding
from hirelc_deploy.inputs.models.onnx_files.node import Call, Function, Node, NotReadError, check_size, reads

POOLS: dict[tuple[str, int], Any] = {
    ("MaxPool", 3): F.max_pool1d,
    ("MaxPool", 4): F.max_pool2d,
    ("AveragePool", 3): F.avg_pool1d,
    ("AveragePool", 4): F.avg_pool2d,
}


@reads("GlobalAveragePool", "GlobalMaxPool")
def _global(node: Node) -> Call:
    x = node.value(0)
    if x.rank != 4:
        raise NotReadError(f"it is given {x.rank} dimensions")
    function = F.adaptive_avg_pool2d if node.operator == "GlobalAveragePool" else F.adaptive_max_pool2d
    return Call(Function(function, output_size=1), [x])


@reads("MaxPool", "AveragePool")
def _pool(node: Node) -> Call:
    x = node.value(0)
    if (node.operator, x.rank) not in POOLS or len(node.outputs) > 1:
        raise NotReadError("it has several results, or other dimensions")
    kernel = list(node.attributes["kernel_shape"])
    size = len(kernel)
    strides = list(node.attributes.get("strides", [1] * size))
    dilations = list(node.attributes.get("dilations", [1] * size))
    if len(kernel) != x.rank - 2 or len(strides) != size or min((*kernel, *strides, *dilations)) < 1:
        raise NotReadError(f"its kernel is {kernel}, its strides are {strides}")
    pads = padding_of(node, kernel, strides, dilations)
    check_size((*x.shape[:2], *(n + a + b for n, a, b in zip(x.shape[2:], pads[:size], pads[size:], strict=True))))
    average = node.operator == "AveragePool"
    counts_padding = bool(node.attributes.get("count_include_pad", 0))
    if average and max(dilations) > 1:
        raise NotReadError("it skips pixels")
    settings: dict[str, Any] = {"kernel_size": tuple(kernel), "stride": tuple(strides)}
    settings |= {"ceil_mode": bool(node.attributes.get("ceil_mode", 0))}
    settings |= {"count_include_pad": counts_padding} if average else {"dilation": tuple(dilations)}
    if pads[:size] == pads[size:] and all(2 * p <= k for p, k in zip(pads, kernel, strict=False)):
        return Call(Function(POOLS[node.operator, x.rank], padding=tuple(pads[:size]), **settings), [x])
    if average and not counts_padding:
        return Call(Function(uncounted, pads=torch_padding(pads), **settings), [x])
    value = 0.0 if average else float("-inf")
    return Call(
        Function(padded_pool, pads=torch_padding(pads), value=value, pool=POOLS[node.operator, x.rank], **settings), [x]
    )


def padded_pool(x: Tensor, pads: list[int], value: float, pool: Any, **settings: Any) -> Tensor:
    """Return the pool of a map that is padded unevenly."""
    result: Tensor = pool(F.pad(x, pads, value=value), **settings)
    return result


def uncounted(x: Tensor, pads: list[int], **settings: Any) -> Tensor:
    """Return the average over the pixels that are there."""
    ones = torch.ones_like(x[:1, :1])
    settings = {**settings, "count_include_pad": True}
    return F.avg_pool2d(F.pad(x, pads), **settings) / F.avg_pool2d(F.pad(ones, pads), **settings)


@reads("Resize", "Upsample")
def _resize(node: Node) -> Call:
    x = node.value(0)
    mode = str(node.attributes.get("mode", "nearest"))
    upsample = node.operator == "Upsample" or node.opset < 11
    how = "asymmetric" if upsample else str(node.attributes.get("coordinate_transformation_mode", "half_pixel"))
    rounding = "floor" if upsample else str(node.attributes.get("nearest_mode", "round_prefer_floor"))
    size = _new_size(node, upsample)
    check_size((*x.shape[:2], *size))
    if x.rank != 4 or min(size) < 1 or node.attributes.get("antialias", 0):
        raise NotReadError("it resizes by other dimensions, or smooths")
    whole = all(new % old == 0 for new, old in zip(size, x.shape[2:], strict=True))
    settings: dict[str, Any] = {"size": size}
    if mode == "nearest":
        # Enlarging by whole numbers, every rule repeats pixels, but for rounding up from uneven places.
        exact = how != "asymmetric" and not (whole and rounding != "ceil")
        settings["mode"] = "nearest-exact" if exact else "nearest"
    elif mode in ("linear", "cubic"):
        if how not in ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"):
            raise NotReadError(f"its coordinates are {how}")
        if how == "asymmetric" and tuple(size) != x.shape[2:]:
            raise NotReadError("it interpolates with coordinates that torch has not (asymmetric)")
        settings |= {"mode": "bilinear" if mode == "linear" else "bicubic", "align_corners": how == "align_corners"}
    else:
        raise NotReadError(f"its mode is {mode}")
    return Call(Function(F.interpolate, **settings), [x])


def _new_size(node: Node, upsample: bool) -> tuple[int, int]:
    x = node.value(0)
    scales = node.setting("scales", 1 if upsample else 2)
    sizes = None if upsample else node.optional(3)
    axes = node.attributes.get("axes")
    if sizes is not None and sizes.array.size:
        if sizes.live:
            raise NotReadError("its size is computed from the images")
        found = [int(n) for n in sizes.run(0).tolist()]
        if axes is not None:
            found = _on_axes(axes, found, list(x.shape))
        return found[-2], found[-1]
    if not scales:
        raise NotReadError("it has neither sizes nor scales")
    if axes is not None:
        scales = _on_axes(axes, scales, [1.0] * x.rank)
    if len(scales) != x.rank or not all(0 < scale < 1e6 for scale in scales):
        raise NotReadError(f"its scales are {scales}")
    return int(x.shape[-2] * scales[-2]), int(x.shape[-1] * scales[-1])


def _on_axes(axes: Sequence[int], values: Sequence[Any], default: list[Any]) -> list[Any]:
    for axis, value in zip(axes, values, strict=True):
        default[axis] = value
    return default


@reads("GridSample")
def _grid_sample(node: Node) -> Call:
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(name := str(node.attributes.get("mode", "bilinear")), name)
    settings: dict[str, Any] = {
        "mode": mode,
        "padding_mode": str(node.attributes.get("padding_mode", "zeros")),
        "align_corners": bool(node.attributes.get("align_corners", 0)),
    }
    return Call(Function(F.grid_sample, **settings), [node.value(0), node.value(1)])
