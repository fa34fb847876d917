"""In: what PP-PicoDet answers, as arrays. Out: its boxes, one dict an image. For Python 3.8 and numpy alone.

Each of four maps answers (n, cells, classes) probabilities and (n, cells, 32): eight bins for each side, whose
expectation is the distance from the middle of the cell to that side, in strides (Yu et al. 2021, Li et al. 2020).
"""

from __future__ import annotations

from typing import Any

import numpy as np

STRIDES = (8, 16, 32, 64)
BINS = 8
OVERLAP = 0.5
"""From which the less sure box of a class is left out, as in the package that the file comes from."""
COLUMNS = {"text": 0, "title": 1, "figure": 2, "table": 4}
"""Where the file has the classes that are drawn; it knows ten."""


def picodet(outputs: dict[str, Any], options: dict[str, Any], arrays: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one dict an image: boxes (x0, y0, x1, y1 in pixels of the input), scores, labels and names; best first."""
    maps = sorted(outputs.values(), key=lambda found: -found.shape[1])
    scores = np.concatenate([found for found in maps if found.shape[2] != 4 * BINS], 1)
    sides = [found for found in maps if found.shape[2] == 4 * BINS]
    names = options["classes"]
    corners = np.concatenate([_corners(side, options) for side in sides], 1)
    scores = scores[..., [COLUMNS[name] for name in names]]
    return [_picked(corners[i], scores[i], names, options) for i in range(len(scores))]


def line(result: dict[str, Any]) -> str:
    """Return one line for a terminal."""
    return ", ".join("%s %.2f" % pair for pair in zip(result["names"], result["scores"]))  # noqa: B905, UP031


def _corners(sides: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    _, height, width = options["input_size"]
    counts = {-(-height // stride) * -(-width // stride): stride for stride in STRIDES}
    stride = counts[sides.shape[1]]
    rows, columns = np.mgrid[: -(-height // stride), : -(-width // stride)]
    middles = (np.stack([columns.ravel(), rows.ravel()], 1) + 0.5) * stride
    bins = sides.reshape(len(sides), -1, 4, BINS)
    raised = np.exp(bins - bins.max(-1, keepdims=True))
    distances = stride * (raised * np.arange(BINS)).sum(-1) / raised.sum(-1)
    return np.concatenate([middles - distances[..., :2], middles + distances[..., 2:]], -1)


def _picked(corners: np.ndarray, scores: np.ndarray, names: Any, options: dict[str, Any]) -> dict[str, Any]:
    found = []
    for label in range(scores.shape[1]):
        rows = np.flatnonzero(scores[:, label] >= options["score_threshold"])
        rows = rows[np.argsort(-scores[rows, label], kind="stable")][:200]
        while len(rows):
            found.append((float(scores[rows[0], label]), label, rows[0]))
            rows = rows[1:][_overlaps(corners[rows[0]], corners[rows[1:]]) <= OVERLAP]
    found = sorted(found, key=lambda one: -one[0])[: options["max_detections"]]
    _, height, width = options["input_size"]
    boxes = [np.clip(corners[row], 0, [width, height] * 2).tolist() for _, _, row in found]
    labels = [label for _, label, _ in found]
    return {
        "boxes": boxes,
        "scores": [score for score, _, _ in found],
        "labels": labels,
        "names": [names[label] for label in labels],
    }


def _overlaps(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    low, high = np.maximum(one[:2], others[:, :2]), np.minimum(one[2:], others[:, 2:])
    both = np.clip(high - low, 0, None).prod(1)
    return both / ((one[2:] - one[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - both + 1e-9)
