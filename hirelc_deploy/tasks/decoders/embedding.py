"""In: vectors as an array. Out: the same at length 1, one dict an image. For Python 3.8 and numpy alone."""

from __future__ import annotations

from typing import Any

import numpy as np


def decode(outputs: dict[str, Any], options: dict[str, Any], arrays: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one dict an image: its vector at length 1, so that a dot product of two is their cosine.

    Args:
        outputs: Name to the (n, d) vectors.
        options: Nothing is needed.
        arrays: Nothing is needed.
    """
    return [{"vector": row.tolist()} for row in unit(next(iter(outputs.values())))]


def line(result: dict[str, Any]) -> str:
    """Return one line for a terminal: the first four numbers and how many there are."""
    vector = result["vector"]
    return "%d numbers: %s" % (len(vector), " ".join("%.3f" % value for value in vector[:4]))  # noqa: UP031


def unit(vectors: Any) -> Any:
    """Return (n, d) vectors at length 1; one of zeros stays as it is."""
    lengths = np.sqrt(np.square(vectors, dtype=np.float64).sum(1, keepdims=True))
    return (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
