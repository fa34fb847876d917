"""In: nodes that work on each number by itself. Out: torch's functions of the same name."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hirelc_deploy.inputs.models.onnx_files.node import Call, Function, Node, NotReadError, call, reads

PLAIN: dict[str, Callable[..., Any]] = {
    "Relu": F.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh, "Exp": torch.exp, "Log": torch.log,
    "Sqrt": torch.sqrt, "Abs": torch.abs, "Neg": torch.neg, "Erf": torch.erf, "Floor": torch.floor,
    "Ceil": torch.ceil, "Round": torch.round, "Reciprocal": torch.reciprocal, "Sin": torch.sin, "Cos": torch.cos,
    "Softplus": F.softplus, "Softsign": F.softsign, "Mish": F.mish, "HardSwish": F.hardswish, "Sign": torch.sign,
    "Not": torch.logical_not, "Atan": torch.atan, "Tan": torch.tan, "IsNaN": torch.isnan,
    "Sub": operator.sub, "Mul": operator.mul, "Pow": operator.pow, "Equal": operator.eq, "Less": operator.lt,
    "Greater": operator.gt, "LessOrEqual": operator.le, "GreaterOrEqual": operator.ge, "And": torch.logical_and,
    "Or": torch.logical_or, "Add": operator.add,
}  # fmt: skip
"""Operators without settings to the functions that compute them."""


@reads(*PLAIN)
def _plain(node: Node) -> Call:
    if node.operator in SHORT:
        found = SHORT[node.operator](node)
        if found is not None:
            return found
    return call(node, PLAIN[node.operator])


def quotient(first: Tensor, second: Tensor) -> Tensor:
    """Return first / second; whole numbers stay whole, rounded towards zero, as ONNX has it."""
    whole = not (torch.is_tensor(first) and first.is_floating_point())
    whole = whole and not (torch.is_tensor(second) and second.is_floating_point()) and not isinstance(second, float)
    return torch.div(first, second, rounding_mode="trunc") if whole else torch.div(first, second)


@reads("Div")
def _div(node: Node) -> Call:
    return call(node, operator.truediv if node.value(0).runs[0].dtype in (torch.float32, np.float32) else quotient)


@reads("Max", "Min", "Sum", "Mean")
def _several(node: Node) -> Call:
    joined = {"Max": torch.maximum, "Min": torch.minimum, "Sum": operator.add, "Mean": operator.add}[node.operator]
    given = [value for value in node.inputs if value is not None]
    np.broadcast_shapes(*(value.shape for value in given))
    return Call(Function(folded, joined=joined, count=len(given) if node.operator == "Mean" else 1), given)


def folded(*given: Tensor, joined: Callable[[Tensor, Tensor], Tensor], count: int) -> Tensor:
    """Join tensors one after the other, and divide by a count."""
    whole = functools.reduce(joined, given)
    return whole if count == 1 else whole / count


@reads("Identity", "Dropout")
def _identity(node: Node) -> Call:
    if node.operator == "Dropout" and node.setting("training_mode", 2, False):
        raise NotReadError("it is in training mode")
    return Call(Function(same), [node.value(0)])


def same(x: Tensor) -> Tensor:
    """Return x."""
    return x


TYPES = {1: torch.float32, 10: torch.float32, 11: torch.float32, 16: torch.float32, 6: torch.int32, 7: torch.int64}
TYPES |= {2: torch.uint8, 3: torch.int8, 9: torch.bool}
"""ONNX's numbers of types to torch's; floats of any width are computed as float32."""


@reads("Cast")
def _cast(node: Node) -> Call:
    to, x = node.attributes.get("to"), node.value(0)
    if to not in TYPES:
        raise NotReadError(f"it makes numbers of type {to}")
    if x.live and x.runs[0].dtype == TYPES[to]:
        return Call(Function(same), [x])
    return Call(Function(cast, dtype=TYPES[to]), [x])


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x as another type; floats follow the width that the network is computed in."""
    return x.to(torch.get_default_dtype() if dtype.is_floating_point else dtype)


@reads("Clip")
def _clip(node: Node) -> Call:
    low, high = node.setting("min", 1), node.setting("max", 2)
    if (low, high) == (0.0, 6.0):
        return Call(Function(F.relu6), [node.value(0)])
    if low is None and high is None:
        return Call(Function(same), [node.value(0)])
    return Call(Function(torch.clamp, min=low, max=high), [node.value(0)])


@reads("HardSigmoid")
def _hard_sigmoid(node: Node) -> Call:
    alpha, beta = float(node.attributes.get("alpha", 0.2)), float(node.attributes.get("beta", 0.5))
    if math.isclose(alpha, 1 / 6, rel_tol=1e-6) and beta == 0.5:
        return Call(Function(F.hardsigmoid), [node.value(0)])
    return Call(Function(hard_sigmoid, alpha=alpha, beta=beta), [node.value(0)])


def hard_sigmoid(x: Tensor, alpha: float, beta: float) -> Tensor:
    """Return alpha x + beta within [0, 1]."""
    return torch.clamp(x * alpha + beta, 0.0, 1.0)


@reads("LeakyRelu", "Elu", "Selu", "Celu", "ThresholdedRelu", "Gelu")
def _with_setting(node: Node) -> Call:
    alpha = node.attributes.get("alpha")
    x = [node.value(0)]
    match node.operator:
        case "LeakyRelu":
            return Call(Function(F.leaky_relu, negative_slope=0.01 if alpha is None else float(alpha)), x)
        case "Elu":
            return Call(Function(F.elu, alpha=1.0 if alpha is None else float(alpha)), x)
        case "Celu":
            return Call(Function(F.celu, alpha=1.0 if alpha is None else float(alpha)), x)
        case "Selu":
            return Call(Function(F.selu), x)
        case "Gelu":
            return Call(Function(F.gelu, approximate=node.attributes.get("approximate", "none")), x)
        case _:
            return Call(Function(F.threshold, threshold=1.0 if alpha is None else float(alpha), value=0.0), x)


@reads("Where")
def _where(node: Node) -> Call:
    return call(node, torch.where)


@reads("Mod")
def _mod(node: Node) -> Call:
    return call(node, torch.fmod if node.attributes.get("fmod", 0) else torch.remainder)


# Functions that old opsets, and exporters, write out in several nodes ------------------------------------------------


def _silu(node: Node) -> Call | None:
    """x * sigmoid(x)."""
    times = node.next("Mul")
    x = node.value(0)
    if times is None or sorted(times.input_names) != sorted((x.name, node.outputs[0])):
        return None
    return Call(Function(F.silu), [x], [times])


def _hard_swish(node: Node) -> Call | None:
    """x * min(max(x + 3, 0), 6) / 6."""
    x, clip = node.value(0), node.next("Clip")
    three = node.optional(1)
    if (
        clip is None
        or three is None
        or not three.fixed
        or three.array.size != 1
        or float(three.array.reshape(-1)[0]) != 3
    ):
        return None
    limits = [clip.attributes.get(name) for name in ("min", "max")]
    inputs = [node.known(name) for name in clip.input_names[1:3]]
    limits = [one if one is not None else None for one in limits]
    if inputs:
        limits = [None if one is None else float(one.array.reshape(-1)[0]) for one in inputs]
    times = node.next("Mul", clip)
    div = None if times is None else node.next("Div", times)
    six = None if div is None else node.other(div)
    if limits != [0.0, 6.0] or times is None or div is None or six is None:
        return None
    if sorted(times.input_names) != sorted((x.name, clip.outputs[0])) or six.array.size != 1:
        return None
    if float(six.array.reshape(-1)[0]) != 6 or div.input_names[0] != times.outputs[0]:
        return None
    return Call(Function(F.hardswish), [x], [clip, times, div])


SHORT: dict[str, Callable[[Node], Call | None]] = {"Sigmoid": _silu, "Add": _hard_swish}
"""Operators that may begin such a function."""
