"""In: boxes as tensors. Out: their overlaps, and how far one is from another in tenths of its size."""

from __future__ import annotations

import torch
from torch import Tensor

CODE_UNITS = (0.1, 0.1, 0.2, 0.2)
"""Of centre x, centre y, log width and log height, as the variances of SSD (Liu et al. 2016)."""


def corners(boxes: Tensor) -> Tensor:
    """Return (..., 4) x0, y0, x1, y1 of centre x, centre y, width and height."""
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def centred(boxes: Tensor) -> Tensor:
    """Return (..., 4) centre x, centre y, width and height of x0, y0, x1, y1."""
    return torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], -1)


def codes(boxes: Tensor, reference: Tensor, smallest: float) -> Tensor:
    """Return (..., 4) where boxes lie, seen from reference boxes: 1 is a tenth of its width, or a factor of 1.22.

    Args:
        boxes: (..., 4) centre x, centre y, width and height.
        reference: Boxes in the same form; (..., 4), or what broadcasts to it.
        smallest: Widths and heights below it count as it, so that empty boxes have codes too.
    """
    units = torch.tensor(CODE_UNITS, dtype=boxes.dtype, device=boxes.device)
    sizes = reference[..., 2:].clamp(min=smallest)
    shift = (boxes[..., :2] - reference[..., :2]) / sizes
    growth = (boxes[..., 2:].clamp(min=smallest) / sizes).log()
    return torch.cat([shift, growth], -1) / units


def overlaps(ours: Tensor, theirs: Tensor, of_ours: bool = False) -> Tensor:
    """Return (a, b) intersections over unions, or over the area of ours, of (a, 4) and (b, 4) centred boxes."""
    ours, theirs = corners(ours), corners(theirs)
    edges = torch.minimum(ours[:, None, 2:], theirs[:, 2:]) - torch.maximum(ours[:, None, :2], theirs[:, :2])
    shared = edges.clamp(min=0).prod(-1)
    area, other_area = ((box[:, 2:] - box[:, :2]).clamp(min=0).prod(-1) for box in (ours, theirs))
    whole = area[:, None] if of_ours else area[:, None] + other_area - shared
    return shared / whole.clamp(min=1e-12)
