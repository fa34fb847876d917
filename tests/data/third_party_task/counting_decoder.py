"""In: densities as an array. Out: how many objects they mean, one dict an image. For Python 3.8 and numpy alone."""

from __future__ import annotations

from typing import Any

import numpy as np


def decode(outputs: dict[str, Any], options: dict[str, Any], arrays: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one dict an image: `count`, the whole number nearest to the sum of its density, and `of` what."""
    sums = next(iter(outputs.values())).reshape(len(next(iter(outputs.values()))), -1).astype(np.float64).sum(1)
    return [{"count": int(np.rint(max(total, 0.0))), "of": options["noun"]} for total in sums]


def line(result: dict[str, Any]) -> str:
    """Return one line for a terminal."""
    return "%d %s" % (result["count"], result["of"])  # noqa: UP031
