"""In: files on a device. Out: whether their answers are finite, and what ran in integers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hirelc_deploy.errors import ExportError
from hirelc_deploy.measure.backend import OperatorTime, Outputs, Runner

WITHOUT_ARITHMETIC = frozenset(
    {
        *("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Concat", "Split", "Slice", "Gather", "Identity"),
        *("Expand", "Pad", "Shape", "Cast", "ReorderInput", "ReorderOutput", "QuantizeLinear", "DequantizeLinear"),
        *("Reorder", "Convert", "FakeQuantize", "Concatenation", "StridedSlice"),  # as OpenVINO calls them
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


def operators(runner: Runner, images: NDArray[np.float32]) -> OperatorCount:
    """Count what really ran for (batch, channels, height, width) images, after the runtime's rewriting of the file.

    Operators that only move or convert numbers (WITHOUT_ARITHMETIC) count as neither.
    """
    ran = _arithmetic(runner, images)
    integer = sum(time.is_integer for time in ran)
    return OperatorCount(integer, len(ran) - integer)


def float_kinds(runner: Runner, images: NDArray[np.float32]) -> set[str]:
    """Return the kinds of operators that ran in floating point, as the runtime calls them; see `operators`."""
    return {time.operator for time in _arithmetic(runner, images) if not time.is_integer}


def _arithmetic(runner: Runner, images: NDArray[np.float32]) -> list[OperatorTime]:
    return [time for time in runner.profile(images, 1) if time.operator not in WITHOUT_ARITHMETIC]
