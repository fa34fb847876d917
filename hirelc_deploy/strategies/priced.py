"""In: a problem, a time budget and a limit on bytes. Out: one problem and one budget that stand for both limits.

A surrogate constraint (Glover 1968): plans that keep ms <= T and bytes <= B also keep ms + p * bytes <= T + p * B for
every price p >= 0. The least price at which the solver's answer is small enough is found by bisection; any strategy
that knows only milliseconds then searches near both limits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hirelc_deploy.strategies.knapsack import smallest, solve
from hirelc_deploy.strategies.problem import Choices, Problem

Bytes = Callable[[Choices], NDArray[np.float64]]
"""(n, decisions) choices to (n,) predicted bytes of the file."""

HALVINGS = 12
"""Steps of the search for the price: each halves the interval on a logarithmic scale, once a price is too low."""


def within_bytes(problem: Problem, budget_ms: float, max_bytes: float, bytes_of: Bytes) -> tuple[Problem, float]:
    """Return the problem with bytes priced in milliseconds, and its budget, so that both limits are kept.

    A plan that is too large counts as one that takes too long, however fast it is. The price is 0 where the solver's
    answer to the time budget alone is small enough. Where even a high price leaves the answer too large, the budget
    that is returned cannot be met, and `solve` will say so.
    """

    def size(choices: Choices) -> float:
        return float(bytes_of(choices[None])[0])

    if size(solve(problem, budget_ms)) <= max_bytes:
        return _with_limit(problem, budget_ms, max_bytes, bytes_of), budget_ms
    # At the highest price the bytes of the uncut model cost a hundred times its milliseconds.
    low, high = 0.0, 100 * problem.uncut_ms / max(d.size_bytes.max() - d.size_bytes.min() for d in problem.decisions)
    for _ in range(HALVINGS):
        price = (low * high) ** 0.5 if low else high / 1000
        priced, budget = with_price(problem, price, bytes_of), budget_ms + price * max_bytes
        if smallest(priced)[1] > budget or size(solve(priced, budget)) > max_bytes:
            low = price
        else:
            high = price
    budget = budget_ms + high * max_bytes
    return _with_limit(with_price(problem, high, bytes_of), budget, max_bytes, bytes_of), budget


def _with_limit(problem: Problem, budget: float, max_bytes: float, bytes_of: Bytes) -> Problem:
    """Return the problem in which what exceeds `max_bytes` exceeds `budget` by the same share."""
    return replace(
        problem,
        predict_batch=lambda choices: np.maximum(
            problem.predict_batch(choices), budget * bytes_of(choices) / max_bytes
        ),
    )


def with_price(problem: Problem, price: float, bytes_of: Bytes) -> Problem:
    """Return the problem in which every byte costs `price` milliseconds."""
    decisions = tuple(replace(d, ms=d.ms + price * d.size_bytes) for d in problem.decisions)
    uncut = np.array([len(d.options) - 1 for d in problem.decisions], dtype=np.int64)
    return replace(
        problem,
        decisions=decisions,
        uncut_ms=problem.uncut_ms + price * float(bytes_of(uncut[None])[0]),
        predict_batch=lambda choices: problem.predict_batch(choices) + price * bytes_of(choices),
    )
