"""The strategies: feasible, repeatable, and learning where there is something to learn."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_problem import WIDTHS, Toy, random_problem

from hirelc_deploy.errors import ConstraintError, InputError
from hirelc_deploy.outcome import Failed, Measured
from hirelc_deploy.strategies.baselines import STRATEGIES, make_strategy
from hirelc_deploy.strategies.hierarchy import Hierarchy, Parts
from hirelc_deploy.strategies.high_level import MULTIPLIERS, PricePolicy, block_budgets
from hirelc_deploy.strategies.knapsack import smallest, solve
from hirelc_deploy.strategies.loop import SearchResult, run_search
from hirelc_deploy.strategies.problem import FISHER, Choices, Problem

BUDGET = 0.45
OPTUNA = pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="Optuna is not installed")
NAMES = [pytest.param(name, marks=OPTUNA if name in ("tpe", "nsga2") else ()) for name in STRATEGIES]


def search(toy: Toy, name: str, seed: int, evaluations: int) -> SearchResult:
    strategy = make_strategy(name, toy.problem, BUDGET * toy.problem.uncut_ms, seed)
    return run_search(toy.problem, strategy, toy.evaluate, f1_evaluations=evaluations, f2_evaluations=0)


def losses(result: SearchResult) -> list[float]:
    return [trial.outcome.loss for trial in result.trials if isinstance(trial.outcome, Measured)]


def proposals(toy: Toy, name: str, seed: int, rounds: int = 4) -> list[list[int]]:
    strategy = make_strategy(name, toy.problem, BUDGET * toy.problem.uncut_ms, seed)
    found: list[Choices] = []
    for _ in range(rounds):
        batch = strategy.propose(6)
        strategy.observe([(c, toy.evaluate(toy.problem.plan_of(c), "F1")) for c in batch])
        found += batch
    return [c.tolist() for c in found]


@pytest.mark.parametrize("name", NAMES)
def test_every_proposal_fits_the_budget_and_is_new(name: str) -> None:
    for seed in range(3):
        problem = random_problem(seed)
        _, shortest_ms = smallest(problem)
        budget_ms = shortest_ms + 0.5 * (problem.uncut_ms - shortest_ms)
        strategy = make_strategy(name, problem, budget_ms, seed)
        seen = set()
        for _ in range(3):
            batch = strategy.propose(5)
            assert len(batch) <= 5
            for choices in batch:
                assert problem.predict_ms(choices) <= budget_ms
                assert choices.tobytes() not in seen
                seen.add(choices.tobytes())
            strategy.observe([(c, Measured("", "F1", 1.0, None, 1, 1)) for c in batch])
        assert seen


@pytest.mark.parametrize("name", NAMES)
def test_equal_seeds_propose_equal_plans(name: str) -> None:
    toy = Toy(0)
    assert proposals(toy, name, 5) == proposals(toy, name, 5)
    if name not in ("uniform", "taylor", "greedy"):
        assert proposals(toy, name, 5) != proposals(toy, name, 6)


@pytest.mark.parametrize("name", ["hirelc", "knapsack", "flat"])
def test_the_first_proposal_is_the_solvers_answer(name: str) -> None:
    toy = Toy(2)
    budget_ms = BUDGET * toy.problem.uncut_ms
    first = make_strategy(name, toy.problem, budget_ms, 0).propose(8)[0]
    assert np.array_equal(first, solve(toy.problem, budget_ms))


def test_the_null_starts_far_from_the_solver() -> None:
    toy = Toy(2)
    solved = toy.loss(solve(toy.problem, BUDGET * toy.problem.uncut_ms))
    assert np.median(losses(search(toy, "untrained", 0, 20))) > 1.5 * solved
    assert np.median(losses(search(toy, "hirelc", 0, 20))) < 1.5 * solved


def test_learning_beats_the_untrained_machine_at_equal_evaluations_for_every_seed() -> None:
    for seed in range(3):
        toy = Toy(seed)
        trained, untrained = search(toy, "hirelc", seed, 40), search(toy, "untrained", seed, 40)
        assert trained.count("F1") == untrained.count("F1") == 40
        assert min(losses(trained)) < min(losses(untrained))


def test_agents_alone_propose_better_plans_late_than_their_prior_would() -> None:
    """The prior alone beats the null; this holds only if the updates help."""
    ratios = []
    for seed in range(3):
        toy = Toy(seed)
        medians = []
        for learns in (True, False):
            parts = Parts(surrogate=False, learns=learns)
            strategy = Hierarchy(toy.problem, BUDGET * toy.problem.uncut_ms, seed, parts=parts)
            result = run_search(toy.problem, strategy, toy.evaluate, f1_evaluations=96, f2_evaluations=0)
            medians.append(np.median(losses(result)[-32:]))
        ratios.append(medians[0] / medians[1])
    assert np.mean(ratios) < 0.95


def test_the_surrogate_and_the_agents_together_find_what_the_solver_does_not() -> None:
    for seed in range(3):
        toy = Toy(seed)
        ours, solver = search(toy, "hirelc", seed, 40), search(toy, "knapsack", seed, 40)
        assert min(losses(ours)) < 0.95 * min(losses(solver))


def test_before_the_surrogate_is_trusted_the_tables_choose_half_of_a_batch() -> None:
    toy = Toy(0, blocks=3)
    strategy = make_strategy("hirelc", toy.problem, BUDGET * toy.problem.uncut_ms, 0)
    assert isinstance(strategy, Hierarchy)
    answer, by_tables, drawn, _ = strategy.propose(4)
    pool = [
        choices for draws in strategy._pending for choices in draws.choices if choices.tobytes() != answer.tobytes()
    ]
    expected = strategy.surrogate.expected_by_tables(np.stack(pool))
    assert strategy.surrogate.expected_by_tables(by_tables[None])[0] == pytest.approx(expected.min())
    assert any(np.array_equal(drawn, choices) for choices in pool)


def test_without_fisher_agents_cannot_tell_problems_apart_that_differ_in_it_alone() -> None:
    toy = Toy(0, blocks=3)
    width = FISHER + 2

    def with_fisher(scale: float) -> Problem:
        decisions = [
            replace(d, features=np.where(np.arange(width) == FISHER, scale * index, float(index)))
            for index, d in enumerate(toy.problem.decisions)
        ]
        return replace(toy.problem, decisions=tuple(decisions))

    def plans(scale: float, fisher: bool) -> list[list[int]]:
        problem = with_fisher(scale)
        strategy = Hierarchy(problem, BUDGET * problem.uncut_ms, 0, parts=Parts(fisher=fisher))
        found: list[Choices] = []
        for _ in range(4):
            batch = strategy.propose(4)
            strategy.observe([(c, toy.evaluate(toy.problem.plan_of(c), "F1")) for c in batch])
            found += batch
        return [c.tolist() for c in found]

    assert plans(0.0, fisher=False) == plans(-3.0, fisher=False)
    assert plans(0.0, fisher=True) != plans(-3.0, fisher=True)


def test_the_solver_uses_its_evaluations_too() -> None:
    improved = 0
    for seed in range(5):
        found = losses(search(Toy(seed), "knapsack", seed, 60))
        improved += min(found) < 0.97 * found[0]
    assert improved >= 4


def test_rewards_and_update_statistics_are_kept_for_the_log() -> None:
    toy = Toy(0)
    strategy = Hierarchy(toy.problem, BUDGET * toy.problem.uncut_ms, 0)
    run_search(toy.problem, strategy, toy.evaluate, f1_evaluations=24, f2_evaluations=0)
    assert len(strategy.rewards) == 24
    assert all(reward.ms == 0 and reward.loss <= 0 for reward in strategy.rewards)
    assert len(strategy.rounds) == 6  # batches of four
    assert set(strategy.rounds[-1].updates[0]) == {"entropy", "clipped"}


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_failures_teaches_nothing_and_breaks_nothing(name: str) -> None:
    toy = Toy(0, blocks=2)
    strategy = make_strategy(name, toy.problem, BUDGET * toy.problem.uncut_ms, 0)
    for _ in range(2):
        proposed = strategy.propose(4)
        strategy.observe([(c, Failed("p", "F1", "slice", "no")) for c in proposed])
        assert all(toy.problem.predict_ms(c) <= BUDGET * toy.problem.uncut_ms for c in proposed)


def test_block_budgets_sum_to_the_limit_and_none_is_negative() -> None:
    for seed in range(8):
        toy = Toy(seed)
        budget_ms = BUDGET * toy.problem.uncut_ms
        strategy = Hierarchy(toy.problem, budget_ms, seed)
        for choices in strategy.propose(4):
            unavoidable_ms, parts = strategy.budgets(choices)
            assert unavoidable_ms == pytest.approx(smallest(toy.problem)[1])
            assert unavoidable_ms + parts.sum() == pytest.approx(budget_ms)
            assert (parts >= 0).all()


def test_a_block_that_keeps_more_is_handed_more_time() -> None:
    toy = Toy(3, blocks=2)
    small, _ = smallest(toy.problem)
    wide = small.copy()
    wide[:3] = len(toy.problem.decisions[0].options) - 1
    _, parts = block_budgets(toy.problem, wide, toy.ms(wide))
    assert parts[0] > 0
    assert parts[1] == pytest.approx(0.0)


def test_an_untaught_high_level_leaves_every_block_at_the_common_price_most_often() -> None:
    policy = PricePolicy(torch.randn(4, 7, dtype=torch.float64), torch.Generator().manual_seed(0), with_prior=True)
    probabilities = torch.softmax(policy(), dim=-1).detach()
    assert (MULTIPLIERS[probabilities.argmax(dim=-1).numpy()] == 1.0).all()
    assert float(probabilities.max()) == pytest.approx(0.57, abs=0.01)
    assert policy.octaves() == pytest.approx(np.zeros(4), abs=1e-12)
    with torch.no_grad():
        policy.shared[2].bias[-1] = 50.0  # all on the last multiplier: 4, two octaves up
    assert policy.octaves() == pytest.approx(np.full(4, 2.0))


def test_uniform_keeps_the_same_share_everywhere_and_as_much_as_fits() -> None:
    toy = Toy(4)
    for budget in (0.3, 0.6, 0.9):
        budget_ms = budget * toy.problem.uncut_ms
        (choices,) = make_strategy("uniform", toy.problem, budget_ms, 0).propose(8)
        assert len(set(choices.tolist())) == 1
        assert toy.ms(choices) <= budget_ms
        assert toy.ms(choices + 1) > budget_ms


def test_taylor_keeps_what_reaches_one_threshold_and_as_much_as_fits() -> None:
    toy = Toy(4)
    for budget in (0.3, 0.6, 0.9):
        budget_ms = budget * toy.problem.uncut_ms
        (choices,) = make_strategy("taylor", toy.problem, budget_ms, 0).propose(8)
        assert toy.ms(choices) <= budget_ms
        worth = np.stack([decision.worth for decision in toy.problem.decisions])
        rows = np.arange(len(choices))
        kept, gone = worth[rows, choices], worth[rows, np.minimum(choices + 1, len(WIDTHS) - 1)]
        threshold = kept[choices > 0].min()
        assert (gone[(choices < len(WIDTHS) - 1)] < threshold).all()
        next_one = gone[choices < len(WIDTHS) - 1].max()
        wider = np.where((choices < len(WIDTHS) - 1) & (gone >= next_one), choices + 1, choices)
        assert toy.ms(wider) > budget_ms


def test_taylor_takes_what_fits_where_no_threshold_does() -> None:
    problem = random_problem(0)
    shortest_ms = smallest(problem)[1]
    (choices,) = make_strategy("taylor", problem, 1.001 * shortest_ms, 0).propose(1)
    assert problem.predict_ms(choices) <= 1.001 * shortest_ms


def test_an_unknown_strategy_is_refused_with_the_names_there_are() -> None:
    toy = Toy(0, blocks=1)
    with pytest.raises(InputError, match="'magic' is unknown; use one of hirelc, knapsack, random, uniform"):
        make_strategy("magic", toy.problem, 1.0, 0)


def test_a_model_with_nothing_to_decide_is_refused() -> None:
    problem = replace(Toy(0, blocks=1).problem, decisions=())
    with pytest.raises(InputError, match="nothing in this model can be cut"):
        make_strategy("hirelc", problem, 1.0, 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_above_the_uncut_time_is_searched_like_any_other(name: str) -> None:
    toy = Toy(0, blocks=2)
    strategy = make_strategy(name, toy.problem, 1.5 * toy.problem.uncut_ms, 0)
    result = run_search(toy.problem, strategy, toy.evaluate, f1_evaluations=12, f2_evaluations=1)
    assert result.best is not None
    if name in ("hirelc", "knapsack", "uniform"):
        assert result.best[1].loss == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_a_hopeless_budget_is_refused_before_anything_starts(name: str) -> None:
    toy = Toy(0, blocks=1)
    with pytest.raises(ConstraintError, match="cannot be met"):
        make_strategy(name, toy.problem, 0.9 * smallest(toy.problem)[1], 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_that_leaves_one_choice_ends_by_itself(name: str) -> None:
    toy = Toy(0, blocks=1)
    budget_ms = smallest(toy.problem)[1]
    strategy = make_strategy(name, toy.problem, budget_ms, 0)
    result = run_search(toy.problem, strategy, toy.evaluate, f1_evaluations=50, f2_evaluations=1)
    assert result.count("F1") == 1
    assert result.count("F2") == 1
    assert result.stopped == "no new plans"
