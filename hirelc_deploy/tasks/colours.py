"""In: the number of a class. Out: its colour, the same in every picture."""

from __future__ import annotations

import colorsys

GOLDEN = 0.618033988749895
"""Steps around the circle of hues by the golden ratio: the first n are far apart for every n."""


def colour(index: int) -> tuple[int, int, int]:
    """Return red, green and blue, 0 to 255, of class `index`: strong and neither dark nor pale."""
    red, green, blue = colorsys.hsv_to_rgb((0.05 + index * GOLDEN) % 1, 0.8, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)
