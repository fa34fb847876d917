"""Which branches go: a problem with that decided is the same problem, and trial recoveries find the best set."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from toy_problem import Toy

from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.strategies.depth import Gone, branches_of, choose_depth, gone_from, with_depth
from hirelc_deploy.strategies.knapsack import solve
from hirelc_deploy.strategies.problem import Choices, Problem


def with_branches(count: int) -> Problem:
    """Return a toy whose first units may go: their narrowest width stands for nothing."""
    toy = Toy(3)
    decisions = tuple(
        replace(d, options=(0, *d.options[1:])) if index < count else d for index, d in enumerate(toy.problem.decisions)
    )

    def plan_of(choices: Choices) -> CompressionPlan:
        return CompressionPlan({d.name: int(d.options[c]) for d, c in zip(decisions, choices, strict=True)})

    return replace(toy.problem, decisions=decisions, plan_of=plan_of)


def test_a_problem_with_its_depth_settled_says_the_same_of_the_rest() -> None:
    problem = with_branches(3)
    names = [decision.name for decision in problem.decisions]
    assert branches_of(problem) == frozenset(names[:3])
    shorter = with_depth(problem, frozenset(names[:2]))
    assert [decision.name for decision in shorter.decisions] == names[2:]
    assert 0 not in shorter.decisions[0].options
    rng = np.random.default_rng(0)
    choices = np.array([[rng.integers(len(d.options)) for d in shorter.decisions] for _ in range(5)])
    whole = np.concatenate([np.zeros((5, 2), np.int64), choices], axis=1)
    whole[:, 2] += 1
    assert shorter.predict_batch(choices) == pytest.approx(problem.predict_batch(whole))
    assert shorter.plan_of(choices[0]) == problem.plan_of(whole[0])
    assert gone_from(shorter.plan_of(choices[0])) == frozenset(names[:2])
    assert shorter.uncut_ms < problem.uncut_ms
    assert branches_of(with_depth(problem, frozenset())) == frozenset()


def test_single_changes_lead_to_the_branches_whose_plans_recover_best() -> None:
    problem = with_branches(4)
    names = [decision.name for decision in problem.decisions]
    budget_ms = 0.6 * problem.uncut_ms
    aim, asked = frozenset({names[1], names[3]}), list[CompressionPlan]()

    def loss_after(plan: CompressionPlan) -> float:
        asked.append(plan)
        return 1.0 + len(gone_from(plan) ^ aim)

    start = problem.plan_of(solve(problem, budget_ms))
    assert choose_depth(problem, budget_ms, {gone_from(start): start}, loss_after)[0] == aim
    assert asked[0] == start
    assert len({gone_from(plan) for plan in asked}) == len(asked)  # no set is trained twice
    times = [problem.predict_ms(_choices(problem, plan)) for plan in asked]
    assert max(times) <= budget_ms


def test_steps_begin_at_the_branches_of_another_budget_where_these_lose_less() -> None:
    problem = with_branches(4)
    names = [decision.name for decision in problem.decisions]
    budget_ms, aim = 0.6 * problem.uncut_ms, frozenset({names[1], names[3]})
    start = problem.plan_of(solve(with_depth(problem, frozenset()), budget_ms).astype(np.int64))

    def tried(elsewhere: Gone | None) -> list[Gone]:
        asked = list[Gone]()

        def loss_after(plan: CompressionPlan) -> float:
            asked.append(gone_from(plan))
            return 1.0 + len(asked[-1] ^ aim)

        assert choose_depth(problem, budget_ms, {gone_from(start): start}, loss_after, elsewhere)[0] == aim
        return asked

    alone, told, misled = tried(None), tried(aim), tried(frozenset({names[0], names[2]}))
    assert told[:2] == [gone_from(start), aim]
    assert len(told) < len(alone)
    assert misled == [alone[0], frozenset({names[0], names[2]}), *alone[1:]]


def test_where_nothing_recovers_better_the_best_known_plan_stays() -> None:
    problem = with_branches(2)
    start = problem.plan_of(solve(with_depth(problem, frozenset()), 0.6 * problem.uncut_ms).astype(np.int64))
    known = {gone_from(start): start}
    asked: list[CompressionPlan] = []
    found = choose_depth(problem, 0.6 * problem.uncut_ms, known, lambda plan: float(len(asked.append(plan) or asked)))
    assert found[0] == gone_from(start)
    assert len(asked) == 3


def test_sets_that_cannot_meet_the_budget_are_not_trained() -> None:
    problem = with_branches(2)
    names = [decision.name for decision in problem.decisions]
    both = frozenset(names[:2])
    tight_ms = 1.001 * with_depth(problem, both).predict_ms(np.zeros(len(names) - 2, np.int64))
    start = problem.plan_of(np.zeros(len(names), np.int64))
    asked: list[CompressionPlan] = []
    found = choose_depth(problem, tight_ms, {both: start}, lambda plan: float(len(asked.append(plan) or asked)))
    assert found[0] == both
    assert all(problem.predict_ms(_choices(problem, plan)) <= tight_ms for plan in asked)


def _choices(problem: Problem, plan: CompressionPlan) -> Choices:
    return np.array([d.options.index(plan.keep.get(d.name, d.options[-1])) for d in problem.decisions])
