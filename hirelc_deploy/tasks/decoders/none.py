"""In: answers of any shape as arrays. Out: their sizes and means, one dict an image. For Python 3.8 and numpy alone."""

from __future__ import annotations

from typing import Any

import numpy as np


def decode(outputs: dict[str, Any], options: dict[str, Any], arrays: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one dict an image: output name to its `shape` and `mean`.

    Args:
        outputs: Name to (n, ...) numbers.
        options: Nothing is needed.
        arrays: Nothing is needed.
    """
    count = len(next(iter(outputs.values())))
    return [
        {
            name: {"shape": list(values.shape[1:]), "mean": float("%.6g" % np.mean(values[row], dtype=np.float64))}  # noqa: UP031
            for name, values in outputs.items()
        }
        for row in range(count)
    ]


def line(result: dict[str, Any]) -> str:
    """Return one line for a terminal: the size and mean of each output."""
    return ", ".join(
        "%s %s mean %.4g" % (name, "x".join(map(str, one["shape"])) or "number", one["mean"])  # noqa: UP031
        for name, one in result.items()
    )
