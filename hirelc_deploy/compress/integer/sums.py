"""In: a float file, ranges of its tensors, its integer nodes. Out: ranges by which all machines round a sum alike.

ONNX Runtime adds two integer tensors in float32 on x86, and on ARM in fixed point with multipliers of 22 bits, rounding
halves away from zero (MLAS, qladd.cpp). Where a sum lies within about 1e-4 of a half the two answers are one step
apart: one of the 258,048 sums of a ResNet-56 image, three of the 65,536 pairs of bytes that this sum can meet. Logits
then differed by up to 2 % of the largest.

Here the scale of what a sum reads becomes a multiple of 1/GRID of the scale of what it writes. A sum is then m/GRID
steps with a whole m, and since GRID is odd no such number is nearer than 1/(2 GRID) = 0.00098 to a half.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from onnx import ModelProto

from hirelc_deploy.compress.onnx_file.links import makers_of, readers_of

GRID = 511
"""Odd. Scales grow by at most 1/GRID of the sum's: one that is a quarter of it by at most 0.8 %."""

MOST_RATIO = 4.0
"""Up to here both ways of adding are less than 1/(2 GRID) off: multipliers are rounded to 2^-20 or finer and there are
2 x 255 of them (0.00025), and three roundings to 24 bits of numbers up to 2 x 255 x 4 (0.0002)."""

_SAME_SCALE = ("MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Resize")
"""What hands on its input's scale when the runtime's quantizer makes it integer."""


def align_sums(
    proto: ModelProto, ranges: Mapping[str, tuple[float, float]], integer: Collection[str]
) -> dict[str, tuple[float, float]]:
    """Return the ranges, those of what integer sums read widened so that their scales are on the grid of the sum's.

    From the last sum to the first, because a sum's own scale is a later sum's input. A tensor that two sums of unequal
    scales read is on the grid of the later one only; constants and what a Clip writes stay, as their scales are given.

    Args:
        ranges: Tensor name to (lowest, highest) of `proto`'s tensors.
        integer: Names of the nodes that become integer.
    """
    found = dict(ranges)
    makers, readers = makers_of(proto.graph), readers_of(proto.graph)
    aligned = set[str]()

    def written(tensor: str) -> str:
        after = readers[tensor]
        folded = len(after) == 1 and after[0].op_type in ("Relu", "Clip") and after[0].name in integer
        return str(after[0].output[0]) if folded else tensor

    def source(tensor: str) -> str:
        maker = makers.get(tensor)
        while maker is not None and maker.op_type in _SAME_SCALE and maker.name in integer:
            tensor = maker.input[0]
            maker = makers.get(tensor)
        return tensor

    for node in reversed(proto.graph.node):
        if node.op_type != "Add" or node.name not in integer:
            continue
        inputs, result = [source(tensor) for tensor in node.input], written(node.output[0])
        if not {*inputs, result} <= found.keys():
            continue
        step = _width(found[result])
        for tensor in inputs:
            maker = makers.get(tensor)
            width = _width(found[tensor])
            if (
                tensor in aligned
                or (maker is not None and maker.op_type == "Clip")
                or not 0 < width <= MOST_RATIO * step
            ):
                continue
            # Less a hair, so that what is on the grid already stays.
            factor = math.ceil(GRID * width / step - 1e-6) / GRID / (width / step)
            low, high = found[tensor]
            found[tensor] = low * factor, high * factor
            aligned.add(tensor)
    return found


def _width(ends: tuple[float, float]) -> float:
    """Return how far a range reaches, 0 included as in every grid: its scale is 1/255 of that."""
    return max(ends[1], 0.0) - min(ends[0], 0.0)
