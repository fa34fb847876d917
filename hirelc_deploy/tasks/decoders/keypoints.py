"""In: coordinates or heatmaps as array. Out: the points meant, one dict an image. For Python 3.8 and numpy alone."""

from __future__ import annotations

from typing import Any

import numpy as np


def decode(outputs: dict[str, Any], options: dict[str, Any], arrays: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one dict an image: its points, each with name, x and y in input pixels, and the height of its heatmap.

    Args:
        outputs: Name to what `located` takes.
        options: `classes`, the names of the points, which may be empty, and `input_size` (channels, height, width).
    """
    found = located(next(iter(outputs.values())), *options["input_size"][1:])
    names = options["classes"] or [str(k) for k in range(found.shape[1])]
    keys, images = ("name", "x", "y", "score"), found.astype(np.float64).round(3).tolist()
    return [{"points": [dict(zip(keys, [name, *point])) for name, point in zip(names, image)]} for image in images]  # noqa: B905


def line(result: dict[str, Any]) -> str:
    """Return one line for a terminal: the points."""
    return ", ".join("{name} ({x:.0f}, {y:.0f})".format(**point) for point in result["points"])


def located(found: Any, height: int, width: int) -> Any:
    """Return (n, k, 3) x, y, score of (n, k, 2) coordinates or (n, k, h, w) heatmaps: the top cell and a quarter."""
    if found.ndim == 3:
        return np.concatenate([found, np.ones_like(found[..., :1])], 2)
    rows, columns = np.divmod(found.reshape(*found.shape[:2], -1).argmax(2), found.shape[3])
    i, j = np.indices(rows.shape)
    around = np.pad(found, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")  # no move at a border; Newell et al. 2016
    right = np.sign(around[i, j, rows + 1, columns + 2] - around[i, j, rows + 1, columns])
    down = np.sign(around[i, j, rows + 2, columns + 1] - around[i, j, rows, columns + 1])
    x = (columns + 0.5 + 0.25 * right) * width / found.shape[3] - 0.5  # pixels and cells have their centres at integers
    y = (rows + 0.5 + 0.25 * down) * height / found.shape[2] - 0.5
    return np.stack([x, y, found[i, j, rows, columns]], 2)
