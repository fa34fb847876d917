"""Comparing strategies: equal counts, numbers pinned by hand, and a page that stands alone."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from toy_problem import Toy

from hirelc_deploy.outcome import Measured
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.results.agreement import agreement
from hirelc_deploy.results.comparison import (
    Search,
    best_so_far,
    hypervolume,
    paired_test,
    run_all,
    summarise,
    write_json,
    write_page,
)
from hirelc_deploy.runs import TrialRecord


def search(losses: tuple[float, ...], ms: tuple[float, ...], name: str = "a", seed: int = 0) -> Search:
    return Search(name, seed, max(ms), losses, ms, (), {}, (), 0.1, 0.2, {})


def test_the_sign_flip_test_by_hand() -> None:
    # Differences -1, -2, -3: of 8 sign patterns two (all minus, all plus) have a mean as far from 0.
    test = paired_test({1: 0.0, 2: 0.0, 3: 0.0}, {1: 1.0, 2: 2.0, 3: 3.0})
    assert test["p"] == pytest.approx(0.25)
    assert test["log_ratio"] == pytest.approx(-2.0)
    assert (test["better"], test["worse"], test["pairs"]) == (3, 0, 3)
    # Differences 1, -1: nothing is known.
    assert paired_test({1: 1.0, 2: 0.0}, {1: 0.0, 2: 1.0})["p"] == 1.0


def test_many_pairs_are_tested_by_random_signs() -> None:
    ours = {index: float(index % 3) for index in range(20)}
    same = {index: value + (0.01 if index % 2 else -0.01) for index, value in ours.items()}
    worse = {index: value + 0.1 for index, value in ours.items()}
    assert paired_test(ours, same)["p"] > 0.5
    assert paired_test(ours, worse)["p"] < 0.001


def test_the_best_so_far_never_rises_and_lasts() -> None:
    assert np.exp(best_so_far([3.0, 1.0, 2.0, math.inf], 6)) == pytest.approx([3.0, 1.0, 1.0, 1.0, 1.0, 1.0])


def test_hypervolume_by_hand() -> None:
    # Box: 1 to 5 ms, log loss 0 to 2. (2 ms, e^1) covers 3 x 1, (3 ms, e^0.5) adds 2 x 0.5: 4 of 8.
    box = (1.0, 5.0, 0.0, 2.0)
    found = search((math.e, math.exp(0.5), 50.0), (2.0, 3.0, 1.0))
    assert hypervolume([found], box) == pytest.approx(0.5)
    assert hypervolume([search((1.0,), (1.0,))], box) == pytest.approx(1.0)
    assert hypervolume([search((math.inf,), (1.0,))], box) == 0.0


def test_every_strategy_is_charged_the_same_and_ours_is_tested_against_each(tmp_path: Path) -> None:
    toy = Toy(0, blocks=2)
    budgets = [0.4 * toy.problem.uncut_ms, 0.6 * toy.problem.uncut_ms]
    names = ["hirelc", "random", "untrained"]
    said: list[str] = []
    searches = run_all(
        toy.problem, budgets, names, [0, 1], toy.evaluate, f1_evaluations=10, f2_evaluations=1, progress=said.append
    )
    assert len(searches) == len(said) == 12
    assert all(len(one.losses) == 10 and len(one.files) == 1 for one in searches)
    summary = summarise(searches, toy.problem.uncut_ms, "hirelc")
    for name in names:
        found = summary["strategies"][name]
        assert found["evaluations"] == [10]
        assert found["within_budget"] == found["plans"] == 40
        assert 0 <= found["hypervolume_low"] <= found["hypervolume"] <= found["hypervolume_high"] <= 1
        assert found["curve_low"][-1] <= found["curve"][-1] <= found["curve_high"][-1]
        assert ("against_ours" in found) == (name != "hirelc")
        assert [at["budget_ms"] for at in found["at_budget"]] == sorted(budgets)
        # A tighter budget is a part of the looser one's plans, so what was evaluated there loses more.
        assert all(0 < at["best_loss_low"] <= at["best_loss"] <= at["best_loss_high"] for at in found["at_budget"])
        assert all(at["ratio_low"] <= at["ratio"] <= at["ratio_high"] for at in found["at_budget"])
    assert summary["strategies"]["random"]["against_ours"]["log_ratio"] < 0
    again = run_all(toy.problem, budgets, names, [0, 1], toy.evaluate, f1_evaluations=10, f2_evaluations=1)
    assert [one.losses for one in again] == [one.losses for one in searches]
    page = write_page(summary, "Toys & <tests>", tmp_path / "compare.html").read_text("utf-8")
    assert "Toys &amp; &lt;tests&gt;" in page
    assert page.count('class="curve') == 3
    assert "src=" not in page
    assert "http" not in page.replace('"http://www.w3.org', "")
    assert write_json(summary, tmp_path / "compare.json").stat().st_size > 1000


def test_a_plan_is_read_back_as_the_choices_it_came_from() -> None:
    problem = Toy(0, blocks=1).problem
    choices = np.array([0, 4, 2])
    assert np.array_equal(problem.choices_of(problem.plan_of(choices)), choices)
    assert problem.choices_of(CompressionPlan({"unit0": 3})) is None
    assert problem.choices_of(CompressionPlan({"other": 2})) is None


def test_agreement_by_hand() -> None:
    toy = Toy(0, blocks=1)
    problem = toy.problem
    plans = [problem.plan_of(np.array(c)) for c in ([0, 4, 2], [3, 1, 4], [2, 2, 2])]
    sums = [sum(d.loss[c] for d, c in zip(problem.decisions, problem.choices_of(plan), strict=True)) for plan in plans]
    trials = []
    for index, (plan, total) in enumerate(zip(plans, sums, strict=True)):
        ms = problem.predict_ms(problem.choices_of(plan))
        # Whole networks lose twice the sum, take 10 % more than predicted, and F3 turns the order round.
        for fidelity, loss in (("F1", 2 * total), ("F3", 1 / total)):
            ratio = 1.1 * ms / 50.0 if fidelity == "F3" else None
            outcome = Measured(plan.digest, fidelity, float(loss), None, 1, 1, ratio=ratio)
            # Plans of a search carry `auto`; the toy's do not.
            placed = CompressionPlan(plan.keep, default_precision="auto")
            trials.append(TrialRecord(index, "", placed, fidelity, "", outcome))
    found = agreement(problem, trials, reference_ms=50.0)
    assert found["loss"]["measured_over_summed_5_to_95"] == pytest.approx([2.0, 2.0])
    assert found["loss"]["spearman"] == pytest.approx(1.0)
    assert found["ms"]["files"] == 3
    assert found["ms"]["largest_error"] == pytest.approx(1 - 1 / 1.1)
    assert found["f1_f3"] == {"plans": 3, "spearman": pytest.approx(-1.0)}
    assert agreement(problem, [], 50.0) == {"loss": None, "ms": None, "f1_f3": None}
