"""A limit on bytes beside the time budget."""

from __future__ import annotations

import numpy as np
import pytest
from toy_problem import Toy

from hirelc_deploy.strategies.knapsack import smallest, solve
from hirelc_deploy.strategies.priced import with_price, within_bytes
from hirelc_deploy.strategies.problem import Choices


def bytes_of(toy: Toy, choices: Choices) -> np.ndarray:
    """Bytes lie elsewhere than time: every unit counts by its index."""
    return (toy.keep(choices) * 1000 * np.arange(1, choices.shape[1] + 1)).sum(axis=1)


@pytest.mark.parametrize("seed", range(5))
def test_the_answer_of_the_priced_problem_keeps_both_limits(seed: int) -> None:
    toy = Toy(seed)
    budget_ms = 0.6 * toy.problem.uncut_ms
    answer = solve(toy.problem, budget_ms)
    fast_only = float(bytes_of(toy, answer[None])[0])
    problem, budget = within_bytes(toy.problem, budget_ms, 0.85 * fast_only, lambda choices: bytes_of(toy, choices))
    priced = solve(problem, budget)
    assert bytes_of(toy, priced[None])[0] <= 0.85 * fast_only
    assert toy.ms(priced) <= 1.02 * budget_ms
    assert toy.loss(priced) < toy.loss(smallest(toy.problem)[0])


def test_a_limit_that_is_kept_anyway_changes_nothing() -> None:
    toy = Toy(0)
    budget_ms = 0.6 * toy.problem.uncut_ms
    problem, budget = within_bytes(toy.problem, budget_ms, 1e9, lambda choices: bytes_of(toy, choices))
    assert budget == budget_ms
    np.testing.assert_array_equal(solve(problem, budget), solve(toy.problem, budget_ms))


@pytest.mark.parametrize("share", [0.7, 0.85, 1.0, 1.2])
def test_nothing_within_the_budget_is_too_large(share: float) -> None:
    toy = Toy(1)
    budget_ms = 0.6 * toy.problem.uncut_ms
    most = share * float(bytes_of(toy, solve(toy.problem, budget_ms)[None])[0])
    problem, budget = within_bytes(toy.problem, budget_ms, most, lambda choices: bytes_of(toy, choices))
    options = [len(decision.options) for decision in toy.problem.decisions]
    choices = np.random.default_rng(0).integers(0, options, (5000, len(options)))
    fits = problem.predict_batch(choices) <= budget
    assert 0 < fits.sum() < len(choices)
    assert (bytes_of(toy, choices[fits]) <= most).all()


def test_a_price_counts_the_bytes_of_every_choice() -> None:
    toy = Toy(0)
    priced = with_price(toy.problem, 0.01, lambda choices: bytes_of(toy, choices))
    choices = solve(toy.problem, 0.6 * toy.problem.uncut_ms)
    assert priced.predict_ms(choices) == pytest.approx(toy.ms(choices) + 0.01 * bytes_of(toy, choices[None])[0])
