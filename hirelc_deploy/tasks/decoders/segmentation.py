"""In: a segmentation's output as arrays. Out: the mask it means, one dict an image. For Python 3.8 and numpy alone."""

from __future__ import annotations

from typing import Any

import numpy as np


def decode(outputs: dict[str, Any], options: dict[str, Any], arrays: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one dict an image: mask, (height, width) class numbers, and shares, class name to share of the pixels.

    A smaller answer is enlarged to the input's size first (bilinear), as it is judged.

    Args:
        outputs: Name to (n, classes, h, w) logits; with one channel the probability is its sigmoid.
        options: `classes`, `input_size` (channels, height, width) and what the task says in its `decoder_options`.
        arrays: Nothing is needed.
    """
    name = next((name for name in options["outputs"] if name in outputs), next(iter(outputs)))
    names, results = options["classes"], []
    half = 0.5 if options.get("scores") == "probabilities" else 0.0
    for answer in outputs[name]:
        logits = _enlarged(answer, *options["input_size"][1:])
        mask = logits.argmax(0) if len(logits) > 1 else logits[0] > half
        counts = np.bincount(mask.ravel().astype(np.int64), minlength=len(names))
        shares = {names[k]: round(float(counts[k]) / mask.size, 4) for k in counts.argsort()[::-1] if counts[k]}
        results.append({"mask": mask.astype(np.uint8), "shares": shares})
    return results


def line(result: dict[str, Any]) -> str:
    """Return one line for a terminal: the five largest classes and their shares of the picture."""
    largest = list(result["shares"].items())[:5]
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in largest)


def _enlarged(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return (channels, h, w) values at (channels, height, width): bilinear, the corners of both on each other."""
    for axis, size in ((1, height), (2, width)):
        here = image.shape[axis]
        if here == size:
            continue
        places = np.clip((np.arange(size) + 0.5) * here / size - 0.5, 0, here - 1)
        before = np.minimum(places.astype(np.int64), max(here - 2, 0))
        share = (places - before).astype(image.dtype)[:, None] if axis == 1 else (places - before).astype(image.dtype)
        low, high = image.take(before, axis), image.take(np.minimum(before + 1, here - 1), axis)
        image = low + (high - low) * share
    return image
