"""In: a classifier's logits as array. Out: the class they mean, one dict an image. For Python 3.8 and numpy alone."""

from __future__ import annotations

from typing import Any

import numpy as np


def decode(outputs: dict[str, Any], options: dict[str, Any], arrays: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one dict an image: the number of its class, its name (the number where there are no names), its share.

    Args:
        outputs: Name to the (n, classes) logits.
        options: `classes`, which may be empty; `scores`, which is `probabilities` where these are no logits.
        arrays: Nothing is needed.
    """
    logits, names = next(iter(outputs.values())), options["classes"]
    results = []
    for row in logits.astype(np.float64):
        best = int(row.argmax())
        score = row[best] if options.get("scores") == "probabilities" else 1 / np.exp(row - row[best]).sum()  # softmax
        results.append({"index": best, "class": names[best] if names else best, "score": round(float(score), 6)})
    return results


def line(result: dict[str, Any]) -> str:
    """Return one line for a terminal: the class."""
    return str(result["class"])
