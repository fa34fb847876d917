"""In: what a model answers. Out: whether these are probabilities already, and the logits that they come from."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

LOGITS, PROBABILITIES = "logits", "probabilities"
"""What `scores` of a model are: the latter where it ends in a softmax or in sigmoids."""

SCORES_ARE = {"scores": PROBABILITIES}
"""The options that say so."""

LEAST_PROBABILITY = 1e-7
"""Smaller ones count as this, so that those that round to 0 have a logarithm; float32 has steps of 6e-8 at 1."""

LEAST_SPREAD = 0.25
"""Between the least and the greatest of a model's answers, for them to be taken for what sigmoids make."""


def log_of(probabilities: Tensor) -> Tensor:
    """Return logits of which softmax makes these probabilities: their logarithms."""
    return probabilities.clamp(min=LEAST_PROBABILITY).log()


def logit_of(probabilities: Tensor) -> Tensor:
    """Return logits of which sigmoid makes these probabilities."""
    return probabilities.clamp(LEAST_PROBABILITY, 1 - LEAST_PROBABILITY).logit()


def are_shares(answers: Iterable[Tensor]) -> bool:
    """Return whether (n, classes, ...) answers are distributions over classes, as a softmax makes them."""
    return all(
        answer.ndim > 1
        and answer.shape[1] > 1
        and bool((answer >= 0).all())
        and bool(((answer.double().sum(1) - 1).abs() < 1e-3).all())
        for answer in answers
    )


def are_chances(answers: Iterable[Tensor]) -> bool:
    """Return whether all answers lie from 0 to 1, as sigmoids make them, and not all in one place there.

    The logits of an untrained network may: they hardly differ.
    """
    low, high = math.inf, -math.inf
    for answer in answers:
        low, high = min(low, float(answer.min())), max(high, float(answer.max()))
        if low < 0 or high > 1:
            return False
    return high - low >= LEAST_SPREAD
