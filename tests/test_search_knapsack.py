"""The solver and the projection: whatever is returned fits the budget, and small problems are solved exactly."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from toy_problem import Toy, additive_problem, random_problem

from hirelc_deploy.errors import ConstraintError
from hirelc_deploy.strategies.knapsack import (
    MAX_STATES,
    _undominated,
    check_feasible,
    project,
    smallest,
    solve,
    solve_additive,
    solve_price,
    solve_without,
    tables_around,
    tables_of,
    uncut,
)
from hirelc_deploy.strategies.problem import Choices, Problem


def every_choice(problem: Problem) -> list[Choices]:
    return [np.array(c) for c in itertools.product(*(range(len(d.options)) for d in problem.decisions))]


def summed_loss(problem: Problem, choices: Choices) -> float:
    return float(sum(d.loss[c] for d, c in zip(problem.decisions, choices, strict=True)))


@pytest.mark.parametrize("seed", range(25))
def test_the_solver_equals_brute_force_where_times_add_up(seed: int) -> None:
    problem = additive_problem(seed)
    everything = every_choice(problem)
    times = np.array([problem.predict_ms(c) for c in everything])
    losses = np.array([summed_loss(problem, c) for c in everything])
    for budget_ms in np.quantile(times, [0.02, 0.2, 0.5, 0.9]):
        best = losses[times <= budget_ms].min()
        choices = solve(problem, float(budget_ms))
        assert problem.predict_ms(choices) <= budget_ms
        assert summed_loss(problem, choices) == pytest.approx(best, abs=1e-12)


def test_solving_with_thinned_states_still_fits_and_loses_almost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy(3)
    tables, budget_ms = tables_of(toy.problem), 0.6 * toy.problem.uncut_ms
    exact = solve_additive(tables, budget_ms)  # 868 states at most
    monkeypatch.setattr("hirelc_deploy.strategies.knapsack.MAX_STATES", 200)
    thinned = solve_additive(tables, budget_ms)
    assert exact is not None
    assert thinned is not None
    assert tables.around_ms + tables.ms[np.arange(len(thinned)), thinned].sum() <= budget_ms
    assert tables.additive_loss(thinned) <= 1.01 * tables.additive_loss(exact)


def test_thinning_keeps_for_each_state_one_as_good_within_a_slice_of_time() -> None:
    rng = np.random.default_rng(0)
    ms = np.sort(rng.uniform(0, 7, 5000))
    loss = np.sort(rng.uniform(0, 1, 5000))[::-1]
    kept = _undominated(ms, loss, np.arange(5000))
    assert len(kept) <= MAX_STATES + 1
    following = kept[np.searchsorted(kept, np.arange(5000))]
    assert (loss[following] <= loss).all()
    assert (ms[following] <= ms + 7 / MAX_STATES).all()


@pytest.mark.parametrize("seed", range(30))
def test_projected_choices_always_fit(seed: int) -> None:
    problem = random_problem(seed)
    rng = np.random.default_rng(seed)
    _, shortest_ms = smallest(problem)
    for share in (0.0, 0.05, 0.3, 0.8, 1.0):
        budget_ms = shortest_ms + share * (problem.uncut_ms - shortest_ms)
        for _ in range(4):
            start = rng.integers([len(d.options) for d in problem.decisions])
            for generator in (None, rng):
                choices = project(problem, start, budget_ms, generator)
                assert problem.predict_ms(choices) <= budget_ms
                assert all(0 <= c < len(d.options) for c, d in zip(choices, problem.decisions, strict=True))
        assert problem.predict_ms(solve(problem, budget_ms)) <= budget_ms


def test_smallest_is_the_fastest_of_all_choices_on_small_problems() -> None:
    compared = 0
    for seed in range(40):
        problem = random_problem(seed)
        if np.prod([len(d.options) for d in problem.decisions]) > 3000:
            continue
        compared += 1
        assert smallest(problem)[1] == pytest.approx(min(problem.predict_ms(c) for c in every_choice(problem)))
    assert compared >= 5


def test_projection_hands_back_every_single_step_that_fits() -> None:
    toy = Toy(1)
    budget_ms = 0.5 * toy.problem.uncut_ms
    choices = project(toy.problem, np.zeros(len(toy.problem.decisions), dtype=np.int64), budget_ms)
    for index in range(len(choices)):
        if choices[index] < len(toy.problem.decisions[index].options) - 1:
            wider = choices.copy()
            wider[index] += 1
            assert toy.ms(wider) > budget_ms


def test_choices_within_the_budget_that_cannot_grow_are_left_alone() -> None:
    problem = additive_problem(0)
    assert np.array_equal(project(problem, uncut(problem), problem.uncut_ms), uncut(problem))


def test_a_hopeless_budget_is_refused_with_the_shortest_time_that_can_be_reached() -> None:
    problem = additive_problem(0)
    _, shortest_ms = smallest(problem)
    assert check_feasible(problem, shortest_ms) == shortest_ms
    with pytest.raises(ConstraintError, match=f"Allow at least {shortest_ms:.4g} ms"):
        check_feasible(problem, 0.99 * shortest_ms)
    for refused in (lambda b: project(problem, uncut(problem), b), lambda b: solve(problem, b)):
        with pytest.raises(ConstraintError):
            refused(0.99 * shortest_ms)


def test_tables_taken_around_the_answer_find_a_better_one_where_widths_multiply() -> None:
    better = 0
    for seed in range(8):
        toy = Toy(seed, interaction=0.0)
        budget_ms = 0.35 * toy.problem.uncut_ms
        once = solve_additive(tables_of(toy.problem), budget_ms)
        start = uncut(toy.problem) if once is None else once
        once = project(toy.problem, start, budget_ms)
        again = solve(toy.problem, budget_ms)
        assert summed_loss(toy.problem, again) <= summed_loss(toy.problem, once) + 1e-12
        better += summed_loss(toy.problem, again) < 0.999 * summed_loss(toy.problem, once)
    assert better >= 5


def test_an_option_without_a_loss_is_never_chosen() -> None:
    problem = additive_problem(5)
    problem.decisions[0].loss[:-1] = np.nan
    choices = solve(problem, problem.uncut_ms - 1.0)
    assert choices[0] == len(problem.decisions[0].options) - 1


def test_the_lowest_price_that_fits_is_found() -> None:
    problem = additive_problem(2)
    tables = tables_around(problem, uncut(problem))
    budget_ms = problem.uncut_ms - 2.0
    choices, price = solve_price(tables.cheapest, problem, budget_ms, tables.typical_price)
    assert problem.predict_ms(choices) <= budget_ms
    assert problem.predict_ms(tables.cheapest(price / 1.002)) > budget_ms
    free, nothing = solve_price(tables.cheapest, problem, problem.uncut_ms, 1.0)
    assert nothing == 0.0
    assert np.array_equal(free, uncut(problem))


def test_the_solver_also_answers_without_each_branch() -> None:
    toy = Toy(3)
    budget_ms = 0.5 * toy.problem.uncut_ms
    assert solve_without(toy.problem, budget_ms, 3) == []  # something of every unit stays
    first, *rest = toy.problem.decisions
    branches = [
        replace(d, options=(0, *d.options[1:]), loss=np.append(0.5 + index, d.loss[1:]))
        for index, d in enumerate((first, rest[0]))
    ]
    problem = replace(toy.problem, decisions=(*branches, *rest[1:]))
    answers = solve_without(problem, budget_ms, 3)
    assert [answer[:2].tolist().index(0) for answer in answers] == [0, 1]  # the cheaper branch first
    assert all(problem.predict_ms(answer) <= budget_ms for answer in answers)
    assert len(solve_without(problem, budget_ms, 1)) == 1
