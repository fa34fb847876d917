"""In: logits of labels as an array. Out: the labels they mean, one dict an image. For Python 3.8 and numpy alone."""

from __future__ import annotations

from typing import Any

import numpy as np


def decode(outputs: dict[str, Any], options: dict[str, Any], arrays: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one dict an image: numbers, names and scores in [0, 1] of the labels it has; the surest first.

    Args:
        outputs: Name to the (n, labels) logits.
        options: `classes`, which may be empty; `threshold`, the score from which a label counts; `scores`, which is
            `probabilities` where these are no logits.
        arrays: Nothing is needed.
    """
    names, results = options["classes"], []
    for row in next(iter(outputs.values())).astype(np.float64):
        scores = row if options.get("scores") == "probabilities" else 1 / (1 + np.exp(-np.clip(row, -80, 80)))
        order = [int(k) for k in np.argsort(-row, kind="stable") if scores[k] >= options["threshold"]]
        found = {"labels": order, "names": [names[k] if names else str(k) for k in order]}
        results.append(dict(found, scores=[round(float(scores[k]), 6) for k in order]))
    return results


def line(result: dict[str, Any]) -> str:
    """Return one line for a terminal: the labels with their scores."""
    pairs = zip(result["names"], result["scores"])  # noqa: B905
    return ", ".join("%s %.2f" % pair for pair in pairs) or "no label"  # noqa: UP031
