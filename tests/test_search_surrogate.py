"""The surrogate and the votes: pinned to hand-worked numbers, and to a slow twin where there is one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from toy_problem import Toy

from hirelc_deploy.strategies import surrogate as module
from hirelc_deploy.strategies.agent import Agent, Member, Scene, counterfactual_credit
from hirelc_deploy.strategies.hierarchy import neighbours
from hirelc_deploy.strategies.knapsack import solve, tables_around, tables_of
from hirelc_deploy.strategies.ppo import PpoSettings
from hirelc_deploy.strategies.surrogate import NOISE, Surrogate, expected_improvement, rank_correlation
from hirelc_deploy.strategies.votes import weighted_median, weighted_plurality


def plans(toy: Toy, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 5, (count, len(toy.problem.decisions)))


def losses(toy: Toy, choices: np.ndarray) -> np.ndarray:
    return np.array([toy.loss(one) for one in choices])


def test_without_measured_plans_it_says_what_the_tables_say() -> None:
    toy = Toy(0)
    tables, tried = tables_of(toy.problem), plans(toy, 5)
    surrogate = Surrogate(tables)
    assert np.exp(surrogate.mean(tried)) == pytest.approx([tables.additive_loss(one) for one in tried])
    assert not surrogate.trusted


def test_it_learns_what_the_tables_cannot_see() -> None:
    toy = Toy(1)
    tables, known, fresh = tables_of(toy.problem), plans(toy, 60), plans(toy, 40, seed=1)
    surrogate = Surrogate(tables)
    surrogate.learn(known, losses(toy, known))
    truth = np.log(losses(toy, fresh))
    additive = np.log([tables.additive_loss(one) for one in fresh])
    assert surrogate.trusted
    assert (
        np.abs(surrogate.mean(fresh) - truth).mean() < 0.8 * np.abs(additive - truth - np.mean(additive - truth)).mean()
    )
    assert rank_correlation(surrogate.mean(fresh), truth) > rank_correlation(additive, truth)


def test_it_knows_what_it_has_seen_and_is_less_sure_of_the_rest() -> None:
    toy = Toy(2)
    known, fresh = plans(toy, 30), plans(toy, 30, seed=1)
    surrogate = Surrogate(tables_of(toy.problem))
    surrogate.learn(known, losses(toy, known))
    mean, deviation = surrogate.predict(known)
    assert mean == pytest.approx(np.log(losses(toy, known)), abs=5 * NOISE)
    assert deviation.max() <= 1.5 * NOISE
    assert np.median(surrogate.predict(fresh)[1]) > 2 * deviation.max()


def test_leaving_one_out_in_closed_form_is_leaving_it_out() -> None:
    toy = Toy(3)
    known = plans(toy, 12)
    surrogate = Surrogate(tables_of(toy.problem))
    surrogate.learn(known, losses(toy, known))
    fit = surrogate._fit
    assert fit is not None
    missed = surrogate._left_out(fit)
    for index in range(len(known)):
        # Only the measured values are left out: the kernel, and where heights are counted from, stay.
        rest = np.delete(np.arange(len(known)), index)
        others, own = surrogate._features(known[rest]), surrogate._features(known[[index]])
        truth = np.log(losses(toy, known))
        without = module._fitted(fit.kernel, others, truth[rest] - others.log_sum)
        assert without is not None
        predicted = own.log_sum + module._covariance(fit.kernel, own, others) @ without.weights
        assert truth[index] - predicted[0] == pytest.approx(missed[index], abs=1e-8)


def test_what_all_plans_cost_beyond_the_sum_is_no_surprise() -> None:
    # Plans that all cost six times the sum of their parts: eight of them tell what a ninth costs.
    toy = Toy(7)
    tables, known, fresh = tables_of(toy.problem), plans(toy, 8), plans(toy, 20, seed=1)
    surrogate = Surrogate(tables)
    surrogate.learn(known, np.array([6 * tables.additive_loss(one) for one in known]))
    truth = np.log([6 * tables.additive_loss(one) for one in fresh])
    assert surrogate.mean(fresh) == pytest.approx(truth, abs=0.1)
    assert surrogate.correlation > 0.95


def test_the_smooth_part_is_a_matern_kernel_on_the_roots_of_the_shares() -> None:
    toy = Toy(8, blocks=2)
    surrogate, two = Surrogate(tables_of(toy.problem)), plans(toy, 2)
    features = surrogate._features(two)
    roots = np.sqrt(features.shares)
    distance = math.sqrt(3 * 2.0) * float(np.linalg.norm(roots[0] - roots[1]))
    linear = 0.3 * float(features.shares[0] @ features.shares[1])
    together = module.OFFSET + module.SLOPE * features.height[0] * features.height[1]
    expected = together + linear + 0.1 * (1 + distance) * math.exp(-distance)
    assert module._covariance((0.3, 0.1, 2.0), features, features)[0, 1] == pytest.approx(expected)
    both = module._covariance((0.3, 0.1, 2.0), features, features)
    assert module._own_covariance((0.3, 0.1, 2.0), features) == pytest.approx(np.diag(both))


def test_believing_a_plan_makes_it_sure_there_and_moves_no_expectation() -> None:
    toy = Toy(4)
    known, fresh = plans(toy, 20), plans(toy, 3, seed=1)
    surrogate = Surrogate(tables_of(toy.problem))
    surrogate.learn(known, losses(toy, known))
    believing = surrogate.believing(fresh[:1])
    assert believing.mean(fresh) == pytest.approx(surrogate.mean(fresh), abs=1e-6)
    assert believing.predict(fresh)[1][0] < 0.3 * surrogate.predict(fresh)[1][0]
    assert len(surrogate._choices) == 20


def test_expected_improvement_by_hand() -> None:
    # Mean at the best, deviation 1: the density of 0, 1 / sqrt(2 pi). Far below: the difference. Far above: nothing.
    found = expected_improvement(np.array([0.0, -5.0, 50.0]), np.array([1.0, 0.1, 1.0]), best=0.0)
    assert found == pytest.approx([1 / math.sqrt(2 * math.pi), 5.0, 0.0])


def test_rank_correlation_by_hand() -> None:
    # Ranks 1 2 3 4 against 1 3 2 4: 1 - 6 * 2 / (4 * 15) = 0.8. With ties the mean rank: 1.5 1.5 3 against 1 2 3.
    assert rank_correlation(np.array([1.0, 2, 3, 4]), np.array([10.0, 30, 20, 99])) == pytest.approx(0.8)
    assert rank_correlation(np.array([5.0, 5, 7]), np.array([1.0, 2, 3])) == pytest.approx(math.sqrt(0.75))
    assert rank_correlation(np.ones(3), np.array([1.0, 2, 3])) == 0.0


def test_votes_by_hand() -> None:
    assert weighted_median(np.array([4, 0, 2]), np.array([1.0, 1.0, 1.0])) == 2
    assert weighted_median(np.array([4, 0, 2]), np.array([5.0, 1.0, 1.0])) == 4
    # The mean of 0, 2, 2 would be neither; the plurality is what most weight stands behind.
    assert weighted_plurality(np.array([0, 2, 2]), np.array([1.0, 0.4, 0.4])) == 0
    assert weighted_plurality(np.array([0, 2, 2]), np.array([1.0, 0.6, 0.6])) == 2


def test_credit_is_that_of_changing_one_choice_and_nothing_else() -> None:
    toy = Toy(5, blocks=2)
    budget_ms = 0.5 * toy.problem.uncut_ms
    answer = solve(toy.problem, budget_ms)
    scene = Scene(toy.problem, budget_ms, answer, tables_around(toy.problem, answer))
    agent = Agent(scene, Member(PpoSettings()), 0, warm_start=True, high_level=True)
    surrogate = Surrogate(scene.tables)
    known = plans(toy, 20)
    surrogate.learn(known, losses(toy, known))
    draws = agent.draw(4, fill=False)
    slow = np.zeros(draws.options.shape)
    for row, decision in np.ndindex(*slow.shape):
        costs = []
        for option in range(5):
            changed = draws.options[row].copy()
            changed[decision] = option
            price = draws.prices[row] / scene.tables.additive_loss(draws.options[row])
            costs.append(float(surrogate.mean(changed[None])[0]) + price * scene.tables.ms[decision, option])
        expected = np.exp(draws.low_log_probs[row, decision]) @ costs
        slow[row, decision] = expected - costs[draws.options[row, decision]]
    slow /= np.sqrt((slow**2).mean())
    assert counterfactual_credit(surrogate, scene.tables, draws) == pytest.approx(slow)


def test_neighbours_are_one_step_or_an_exchange_away_and_fit() -> None:
    toy = Toy(6, blocks=2)
    budget_ms = 0.5 * toy.problem.uncut_ms
    here = solve(toy.problem, budget_ms)
    near = neighbours(toy.problem, here, budget_ms)
    steps = near - here
    assert len(near) == len(np.unique(near, axis=0)) > 5
    assert (np.abs(steps).sum(axis=1) <= 2).all()
    assert (np.abs(steps.sum(axis=1)) <= 1).all()
    assert (toy.problem.predict_batch(near) <= budget_ms).all()
