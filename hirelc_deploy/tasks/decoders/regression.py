"""In: numbers or maps as an array. Out: the same by name, one dict an image. For Python 3.8 and numpy alone."""

from __future__ import annotations

from typing import Any

import numpy as np


def decode(outputs: dict[str, Any], options: dict[str, Any], arrays: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one dict an image: `values`, output name to number, or to the mean of a map; and `mask`, the first map.

    Args:
        outputs: Name to (n, k) numbers, or to (n, h, w) or (n, k, h, w) maps.
        options: `classes`, the names of the k numbers, which may be empty; `unit`.
        arrays: Nothing is needed.
    """
    results = []
    for row in next(iter(outputs.values())):
        maps = row[None] if row.ndim == 2 else row
        means = maps.reshape(len(maps), -1).astype(np.float64).mean(1)
        names = options["classes"] or [str(k) for k in range(len(maps))]
        values = {name: float("%.6g" % value) for name, value in zip(names, means)}  # noqa: B905, UP031
        result = {"values": values, "unit": options.get("unit", "")}
        results.append(dict(result, mask=maps[0]) if row.ndim > 1 else result)
    return results


def line(result: dict[str, Any]) -> str:
    """Return one line for a terminal: the numbers; of maps their means."""
    unit = " " + result["unit"] if result["unit"] else ""
    mean = "mean " if "mask" in result else ""
    return ", ".join("%s %s%.4g%s" % (name, mean, value, unit) for name, value in result["values"].items())  # noqa: UP031
