"""In: outputs of files on labelled images. Out: accuracy, its paired difference, and how far two files disagree."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hirelc_deploy.errors import ExportError, InputError
from hirelc_deploy.measure.backend import Runner

Z_95 = 1.959964
"""The normal quantile that 95 % of the mass lies within, on both sides."""

WITHOUT_ARITHMETIC = frozenset(
    {
        *("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Concat", "Split", "Slice", "Gather", "Identity"),
        *("Expand", "Pad", "Shape", "Cast", "ReorderInput", "ReorderOutput", "QuantizeLinear", "DequantizeLinear"),
    }
)
"""Operators that move or convert numbers. They take time, but are neither integer nor float arithmetic."""


@dataclass(frozen=True)
class PairedDrop:
    """Accuracy lost on the same images, in percentage points, with its 95 % interval; negative is a gain."""

    points: float
    low: float
    high: float


class OperatorCount(NamedTuple):
    """How many operators of a file really ran on integers, and how many in floating point."""

    integer_ops: int
    float_ops: int


def predict(runner: Runner, batches: Iterable[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return the (n, classes) outputs of a file on batches of (b, channels, height, width) images.

    Raises:
        InputError: no image.
        ExportError: the file answers NaN or infinity.
    """
    outputs = [runner.infer(batch) for batch in batches if len(batch) > 0]
    if not outputs:
        raise InputError("no images to run the file on.")
    logits = np.concatenate(outputs)
    finite = np.isfinite(logits).all(axis=1)
    if not finite.all():
        raise ExportError(f"output: NaN or infinity on image {int(np.argmin(finite))}; check weights and input scale.")
    return logits


def correct(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return (n,) whether the largest of each row of (n, classes) logits is at its label."""
    if len(logits) != len(labels):
        raise InputError(f"{len(logits)} answers for {len(labels)} labels; both must come from the same images.")
    return np.asarray(logits.argmax(axis=1) == labels)


def top1(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Return the share of images answered right, in [0, 1]."""
    return float(correct(logits, labels).mean())


def paired_drop(correct_before: NDArray[np.bool_], correct_after: NDArray[np.bool_]) -> PairedDrop:
    """Return the accuracy lost from before to after on the same n images.

    Only the images on which the two differ carry information. The interval is Agresti and Min's for paired proportions
    (Statistics in Medicine 2005): half an image is added to each of the four cells of the before-after table, then
    Wald's interval; it keeps its 95 % for small numbers of differing images too, where Wald's own does not.
    """
    n = len(correct_before)
    if n == 0 or n != len(correct_after):
        raise InputError(f"{n} answers before and {len(correct_after)} after; both must come from the same images.")
    lost = int(np.sum(correct_before & ~correct_after))
    gained = int(np.sum(~correct_before & correct_after))
    middle = (lost - gained) / (n + 2)
    half_width = Z_95 * math.sqrt(lost + gained + 1 - (lost - gained) ** 2 / (n + 2)) / (n + 2)
    return PairedDrop(100 * (lost - gained) / n, 100 * (middle - half_width), 100 * (middle + half_width))


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
