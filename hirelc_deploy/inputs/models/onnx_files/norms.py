"""In: nodes that normalise, or the first of several that do. Out: torch's own norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from hirelc_deploy.inputs.models.onnx_files.layers import with_values
from hirelc_deploy.inputs.models.onnx_files.node import Call, Node, NotReadError, Value, floats, reads
from hirelc_deploy.inputs.models.onnx_files.shapes import reduction

BATCH_NORMS: dict[int, type[nn.Module]] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@reads("BatchNormalization")
def _batch_norm(node: Node) -> Call:
    x, *rest = (node.value(place) for place in range(5))
    if node.attributes.get("training_mode", 0) or not all(v.fixed and v.shape == (x.shape[1],) for v in rest):
        raise NotReadError("it is in training mode, or its statistics are computed from the images")
    if x.rank not in BATCH_NORMS:
        raise NotReadError(f"it is given {x.rank} dimensions")
    names = ("weight", "bias", "running_mean", "running_var")
    kind: Any = BATCH_NORMS[x.rank]
    norm = kind(x.shape[1], eps=float(node.attributes.get("epsilon", 1e-5)), device="meta")
    return Call(with_values(norm, **{name: floats(v) for name, v in zip(names, rest, strict=True)}), [x])


def layer_norm(features: int, eps: float, weight: Value | None, bias: Value | None) -> nn.Module:
    """Return the norm over the last dimension."""
    norm = nn.LayerNorm(features, eps, device="meta")
    both = {"weight": weight, "bias": bias}
    return with_values(norm, **{n: None if v is None else floats(v).reshape(-1) for n, v in both.items()})


@reads("LayerNormalization")
def _layer_norm(node: Node) -> Call:
    x, weight, bias = node.value(0), node.value(1), node.optional(2)
    axis = int(node.attributes.get("axis", -1)) % x.rank
    constants = [v for v in (weight, bias) if v is not None]
    if axis != x.rank - 1 or not all(v.fixed and v.array.size == x.shape[-1] for v in constants):
        raise NotReadError("it is over several dimensions, or its weight is computed from the images")
    return Call(layer_norm(x.shape[-1], float(node.attributes.get("epsilon", 1e-5)), weight, bias), [x])


@reads("ReduceMean")
def _mean(node: Node) -> Call:
    """A mean, or the layer norm that begins with it where the opset has none of its own (before 17)."""
    return _written_out_norm(node) or reduction(node, torch.mean)


def _written_out_norm(node: Node) -> Call | None:
    """Return the norm of x that is written as (x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias."""
    x, axes, sub = node.value(0), node.setting("axes", 1), node.next("Sub")
    after = {} if sub is None else {one.operator: one for one in node.readers.get(sub.outputs[0], ())}
    square, div = after.get("Pow", after.get("Mul")), after.get("Div")
    if sub is None or square is None or div is None or sub.input_names != (x.name, node.outputs[0]):
        return None
    over_last = [int(axis) % x.rank for axis in np.atleast_1d(0 if axes is None else axes)] == [x.rank - 1]
    two = node.known(square.input_names[1])
    squared = two.array.reshape(-1).tolist() == [2] if two is not None else square.operator == "Mul"
    chain: list[Node] = [square]
    for operator in ("ReduceMean", "Add", "Sqrt"):
        if (following := node.next(operator, chain[-1])) is not None:
            chain.append(following)
    if len(chain) < 4 or not over_last or not squared or x.rank < 2:
        return None
    eps = node.other(chain[2])
    kept = all(one.attributes.get("keepdims", 1) for one in (node, chain[1]))
    if eps is None or eps.array.size != 1 or not kept or div.input_names != (sub.outputs[0], chain[3].outputs[0]):
        return None
    chain = [sub, *chain, div]
    parts: list[Value | None] = [None, None]
    for number, operator in enumerate(("Mul", "Add")):
        joining = node.next(operator, chain[-1])
        constant = None if joining is None else node.other(joining)
        if joining is None or constant is None or constant.array.size != x.shape[-1] != 1:
            break
        parts[number] = constant
        chain.append(joining)
    return Call(layer_norm(x.shape[-1], float(eps.array.reshape(-1)[0]), *parts), [x], chain)


@reads("InstanceNormalization")
def _instance_norm(node: Node) -> Call:
    x, weight, bias = node.value(0), node.value(1), node.value(2)
    if not weight.fixed or not bias.fixed or x.rank not in (3, 4) or weight.shape != (x.shape[1],):
        raise NotReadError("its weight is computed from the images, or it has other dimensions")
    kind: Callable[..., nn.Module] = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d}[x.rank]
    norm = kind(x.shape[1], float(node.attributes.get("epsilon", 1e-5)), affine=True, device="meta")
    return Call(with_values(norm, weight=floats(weight), bias=floats(bias)), [x])


@reads("GroupNormalization")
def _group_norm(node: Node) -> Call:
    x, weight, bias = node.value(0), node.value(1), node.value(2)
    groups = int(node.attributes.get("num_groups", 0))
    if not weight.fixed or not bias.fixed or groups < 1 or x.shape[1] % groups:
        raise NotReadError("its weight is computed from the images, or its groups do not fit")
    times = x.shape[1] // weight.array.size  # one number a group before opset 21
    norm = nn.GroupNorm(groups, x.shape[1], float(node.attributes.get("epsilon", 1e-5)), device="meta")
    values = [floats(v).repeat_interleave(times) for v in (weight, bias)]
    return Call(with_values(norm, weight=values[0], bias=values[1]), [x])
