"""How far ahead of the best other file could any file of the same network be, on these kernels? For placement.py.

A runtime's own profile says which share of the time of our file, and of the best other one, goes to the products that
every file of the network has to compute: convolutions, linear layers and products of attention. Let all else cost
nothing: sums, activations, pooling, norms, softmax, conversions. Then our file would be ahead by the measured gain
divided by the share of its products, and the other one by 1 over the share of its products. The greater of the two is
the bound of that network.

It is a bound for the kernels of these runtimes only, and generous: nobody adds up a residual in no time. What a kernel
does to its own output (bias, ReLU, rounding) stays with it. Operators of our file that are no products are listed by
share: a next gain lies where the bound leaves room.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hirelc_deploy.measure.backend import Backend, OperatorTime

PRODUCTS = frozenset(
    {
        *("Conv", "FusedConv", "ConvInteger", "QLinearConv", "NhwcFusedConv", "ConvTranspose", "Gemm", "FusedGemm"),
        *("MatMul", "FusedMatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul"),
        *("QGemm", "MatMulNBits", "Attention", "QAttention", "MultiHeadAttention"),
        *("Convolution", "Deconvolution", "FullyConnected", "ScaledDotProductAttention"),
    }
)
"""Operators of ONNX Runtime, and nodes of OpenVINO, whose work grows with the network's multiply-accumulates."""

SHOWN = 5
RUNS = 30
"""Inferences of each of the profiles of a file."""
TURNS = 3
"""Our file and the other one are profiled in turn so often; each operator counts with its fastest turn."""


def is_product(one: OperatorTime) -> bool:
    """Return whether an operator multiplies; OpenVINO's are called by their kind and kernel."""
    return one.operator.partition(" ")[0] in PRODUCTS


def share_of_products(operators: Iterable[OperatorTime]) -> float:
    """Return the share of a file's operator time that its products take, in (0, 1]."""
    times = [(is_product(one), one.microseconds) for one in operators]
    return sum(time for is_product, time in times if is_product) / sum(time for _, time in times)


def largest_others(operators: Sequence[OperatorTime], count: int = SHOWN) -> dict[str, float]:
    """Return operator type to its share of the time, for the `count` largest of those that are no products."""
    total = sum(one.microseconds for one in operators)
    shares: dict[str, float] = {}
    for one in operators:
        if not is_product(one):
            shares[one.operator] = shares.get(one.operator, 0.0) + one.microseconds / total
    return dict(sorted(shares.items(), key=lambda item: -item[1])[:count])


def bound(gain: float, ours: float, others: float) -> float:
    """Return how many times faster than the best other file one of this network can be.

    Args:
        gain: Of our file over the best other one, as measured.
        ours, others: Shares of products in the time of our file and of the best other one.
    """
    return max(gain / ours, 1 / others)


def fastest(profiles: Sequence[Sequence[OperatorTime]]) -> list[OperatorTime]:
    """Return each operator's fastest time over profiles of one file."""
    return [min(turns, key=lambda one: one.microseconds) for turns in zip(*profiles, strict=True)]


def examined(
    ours: tuple[Path, Backend], other: tuple[Path, Backend], gain: float, image: NDArray[np.float32], threads: int
) -> dict[str, Any]:
    """Profile our file and the best other one of a network and return the bound and where it lies.

    Args:
        ours, other: A file and what runs it.
        gain: Of our file over the other one, as measured.
        image: (1, channels, height, width).
    """
    runners = [backend.build(path, threads) for path, backend in (ours, other)]
    turns = [[runner.profile(image, RUNS) for runner in runners] for _ in range(TURNS)]
    mine, theirs = (fastest([turn[index] for turn in turns]) for index in range(2))
    shares = share_of_products(mine), share_of_products(theirs)
    return {
        "share_of_products": {"ours": round(shares[0], 3), "best of the others": round(shares[1], 3)},
        "bound": round(bound(gain, *shares), 3),
        "what_else_ours_does": {name: round(share, 3) for name, share in largest_others(mine).items()},
        "what_else_the_best_other_does": {name: round(share, 3) for name, share in largest_others(theirs).items()},
    }
