"""In: files on a device. Out: whether their answers are finite, how far two of them disagree, and what ran in integers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hirelc_deploy.errors import ExportError
from hirelc_deploy.measure.backend import Outputs, Runner

WITHOUT_ARITHMETIC = frozenset(
    {
        *("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Concat", "Split", "Slice", "Gather", "Identity"),
        *("Expand", "Pad", "Shape", "Cast", "ReorderInput", "ReorderOutput", "QuantizeLinear", "DequantizeLinear"),
    }
)
"""Operators that move or convert numbers. They take time, but are neither integer nor float arithmetic."""


class OperatorCount(NamedTuple):
    """How many operators of a file really ran on integers, and how many in floating point."""

    integer_ops: int
    float_ops: int


def finite(outputs: Outputs, first: int = 0) -> Outputs:
    """Return the outputs of a file; raises ExportError naming the image (counted from `first`) of a NaN or infinity."""
    for name, values in outputs.items():
        good = np.isfinite(values).reshape(len(values), -1).all(axis=1)
        if not good.all():
            raise ExportError(
                f"{name}: NaN or infinity on image {first + int(np.argmin(good))}; check weights and input scale."
            )
    return outputs


def kl_divergence(logits_p: NDArray[np.float32], logits_q: NDArray[np.float32]) -> float:
    """Return the mean Kullback-Leibler divergence KL(p || q) of two (n, classes) outputs, in nats per image."""
    log_p, log_q = _log_softmax(logits_p), _log_softmax(logits_q)
    return float((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean())


def agreement(logits_p: NDArray[np.float32], logits_q: NDArray[np.float32]) -> float:
    """Return the share of images on which two (n, classes) outputs name the same class, in [0, 1]."""
    return float((logits_p.argmax(axis=1) == logits_q.argmax(axis=1)).mean())


def operators(runner: Runner, image: NDArray[np.float32]) -> OperatorCount:
    """Count what really ran for one (1, channels, height, width) image, after the runtime's own rewriting of the file.

    Operators that only move or convert numbers (WITHOUT_ARITHMETIC) count as neither.
    """
    ran = [time for time in runner.profile(image, 1) if time.operator not in WITHOUT_ARITHMETIC]
    integer = sum(time.is_integer for time in ran)
    return OperatorCount(integer, len(ran) - integer)


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
