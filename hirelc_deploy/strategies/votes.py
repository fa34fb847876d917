"""In: what each member of an ensemble would do. Out: what they do together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hirelc_deploy.strategies.problem import Choices, Decision


def vote(decisions: Sequence[Decision], ballots: Choices, weights: NDArray[np.float64]) -> Choices:
    """Return (decisions,) choices: the weighted median where options have an order, the plurality where they have none.

    Args:
        ballots: (members, decisions).
        weights: (members,) positive.
    """
    elect = {"width": weighted_median}
    columns = zip(decisions, ballots.T, strict=True)
    return np.array([elect.get(d.kind, weighted_plurality)(column, weights) for d, column in columns], dtype=np.int64)


def weighted_median(values: NDArray[np.int64], weights: NDArray[np.float64]) -> int:
    """Return the least value at which half of the weight is reached."""
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order])
    return int(values[order][np.searchsorted(reached, reached[-1] / 2)])


def weighted_plurality(values: NDArray[np.int64], weights: NDArray[np.float64]) -> int:
    """Return the value with the most weight, the smaller one of equals."""
    return int(np.bincount(values, weights=weights).argmax())
