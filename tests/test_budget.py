"""A time budget is kept, on a clock that only the test moves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_pipeline import data_file, make_pipeline
from test_time_left import SECONDS, SIZES
from toy_problem import WIDTHS, Toy

from hirelc_deploy.config import Limits, SearchConfig
from hirelc_deploy.deliver import agenda
from hirelc_deploy.deliver.agenda import Agenda
from hirelc_deploy.deliver.budget import Budget
from hirelc_deploy.deliver.finalists import UNUSED, Finalist, Search
from hirelc_deploy.deliver.limits import TOLERANCE
from hirelc_deploy.evaluate.training import LONG, REHEARSED
from hirelc_deploy.outcome import Fidelity, Measured, Outcome
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.progress import Progress
from hirelc_deploy.runs import Run
from hirelc_deploy.strategies.baselines import make_strategy
from hirelc_deploy.strategies.knapsack import solve
from hirelc_deploy.strategies.loop import run_search
from hirelc_deploy.time_left import CUT, F1, FILE, TRAINING_STEP, TimeLeft

__all__ = ["data_file"]

FILE_S, SINGLES = 14.4, 120


class Clocked:
    """A search at several budgets that asks a Budget before everything that it begins, as `finalists.Search` does."""

    def __init__(self, run: Run, budget_s: float | None, finalists: int, spent: float = 0.0) -> None:
        self.now = 1000.0
        self.left = TimeLeft(lambda: self.now)
        self.agenda = Agenda(self.left, run, "here", SIZES)
        self.budget = Budget(budget_s, self.agenda, spent=spent, clock=lambda: self.now)
        self.finalists = finalists
        self.did: list[str] = []

    def do(self, kind: str, count: float = 1) -> None:
        self.did.append(kind)
        for _ in range(round(count)):
            with self.left.step(kind):
                self.now += FILE_S if kind == FILE else SECONDS[kind]

    def walk(self) -> float:
        """Return the seconds of the whole."""
        began = self.now
        for kind in (agenda.FORWARD, *agenda.ONCE, CUT):
            self.do(kind)
        self.do(TRAINING_STEP, 4)
        for kind in 3 * (CUT, FILE):
            self.do(kind)
        for single in range(SINGLES):
            if single >= 30 and not self.budget.measures_more():
                break
            self.do(F1)
        for finalist in range(self.finalists):
            needs = self.agenda.finalist_seconds()
            if finalist and not self.budget.decides(f"finalist {finalist + 1}", needs):
                break
            until = self.budget.search_deadline()
            for count in range(SIZES.f1_evaluations):
                if count and self.now >= until:
                    break
                self.do(F1)
            self.do(CUT)
            self.do(FILE)
            depth = (self.agenda.depth_seconds() or 0.0) + (self.agenda.finalist_seconds(search=False) or 0.0)
            if not finalist and self.budget.decides("which branches go", depth):
                self.do(CUT, agenda.DEPTH_TRIALS)
                self.do(TRAINING_STEP, agenda.DEPTH_TRIALS * SIZES.trial_steps)
                self.do(agenda.DEPTH)
            share = self.budget.recovery_share()
            self.do(CUT)
            self.do(TRAINING_STEP, share * SIZES.steps)
            self.do(FILE)
            self.did.append("finalist")
        for kind in (agenda.GUARD, agenda.RACE, agenda.TEST, agenda.BUNDLE):
            self.do(kind)
        return self.now - began


@pytest.mark.parametrize("minutes", [10, 15, 20, 30, 45])
def test_a_budget_is_kept_within_a_tenth(tmp_path: Path, minutes: int) -> None:
    with Run.open(tmp_path / "run", "seed = 0", {}) as run:
        search = Clocked(run, 60 * minutes, finalists=6)
        assert search.walk() <= 1.1 * 60 * minutes
    assert "finalist" in search.did


def test_a_longer_budget_gives_more_finalists_and_none_gives_all(tmp_path: Path) -> None:
    counts = []
    for name, budget_s in (("a", 600.0), ("b", 1800.0), ("c", None)):
        with Run.open(tmp_path / name, "seed = 0", {}) as run:
            search = Clocked(run, budget_s, finalists=6)
            search.walk()
            counts.append(search.did.count("finalist"))
            assert (budget_s is None) == (not run.facts)
    assert counts[0] == 1
    assert counts[0] < counts[1] < counts[2] == 6


def test_a_recovery_is_shortened_to_what_is_left_and_stays_so_when_the_run_is_resumed(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", "seed = 0", {}) as run:
        search = Clocked(run, 600.0, finalists=1)
        search.walk()
        share = search.budget.recovery_share()
        assert 0 < share < 1
    with Run.open(tmp_path / "run", "seed = 0", {}) as run:
        again = Clocked(run, 600.0, finalists=1, spent=590.0)
        assert again.budget.recovery_share() == share
        assert again.budget.decides("which branches go", 0.0) == search.budget.decides("which branches go", 0.0)
        assert not again.budget.time_for(20.0)


def test_after_the_deadline_one_plan_is_judged_and_what_is_journaled_is_taken() -> None:
    for journaled, count in ((0, 1), (7, 7)):
        toy, seen = Toy(0), list[str]()

        def evaluate(plan: CompressionPlan, fidelity: Fidelity, toy: Toy = toy, seen: list[str] = seen) -> Outcome:
            seen.append(fidelity)
            return toy.evaluate(plan, fidelity)

        strategy = make_strategy("random", toy.problem, 0.5 * toy.problem.uncut_ms, 0)
        result = run_search(
            toy.problem,
            strategy,
            evaluate,
            f1_evaluations=20,
            f2_evaluations=1,
            deadline=0.0,
            clock=lambda: 1.0,
            known=lambda plan, seen=seen, most=journaled: seen.count("F1") < most,
        )
        assert (result.count("F1"), result.count("F2"), result.stopped) == (count, 1, "deadline")


class OneBudget(Search):
    """A search at an asked latency whose finalists all lose too much, with sets of branches left to try."""

    def __init__(self, clocked: Clocked) -> None:
        self.pipeline: Any = SimpleNamespace(progress=Progress(quiet=True))
        self.agenda, self.budget, self.config = clocked.agenda, clocked.budget, SearchConfig(finalists=3)
        self._gone, self._other_depths = frozenset("a"), [frozenset("b"), frozenset("c"), frozenset("d")]
        self._to_find, self._settles_depth, self.limits = 1, True, Limits()
        self.clocked, self.gone, self.left_s = clocked, list[frozenset[str] | None](), list[float | None]()

    def _finalist(self, budget_ms: float) -> Finalist:
        self.gone.append(self._gone)
        self.left_s.append(self.clocked.left.seconds())
        for kind, count in ((F1, SIZES.f1_evaluations), (CUT, 2), (FILE, 2), (TRAINING_STEP, SIZES.steps)):
            self.clocked.do(kind, count)
        return Finalist(CompressionPlan(), Measured("plan", "F3", 0.0, None, 0, 0), 9.0, 1.0, keeps_limits=False)


def test_further_finalists_of_one_budget_come_one_by_one_and_as_time_allows(tmp_path: Path) -> None:
    with Run.open(tmp_path / "unlimited", "seed = 0", {}) as run:
        clocked = Clocked(run, None, finalists=1)
        clocked.walk()
        search = OneBudget(clocked)
        assert len(search._finalists_at(1.0)) == 3
        one = clocked.agenda.finalist_seconds()
        delivery = clocked.agenda.delivery_seconds()
    assert search.gone == [frozenset("a"), frozenset("b"), frozenset("c")]
    assert one is not None
    assert delivery is not None
    assert search.left_s == pytest.approx(3 * [one + delivery])
    for finalists in (1, 2):
        with Run.open(tmp_path / str(finalists), "seed = 0", {}) as run:
            clocked = Clocked(run, None, finalists=1)
            spent = clocked.walk()
            clocked.budget = Budget(
                (finalists + 0.5) * one + delivery + spent, clocked.agenda, spent=spent, clock=lambda c=clocked: c.now
            )
            assert len(OneBudget(clocked)._finalists_at(1.0)) == finalists


class OneAim(Search):
    """A search at an asked latency whose files take a tenth longer than is predicted, without time for another one."""

    def __init__(self, toy: Toy) -> None:
        reference: Any = SimpleNamespace(files=SimpleNamespace(reference_ms=1.0))
        self.pipeline, self.limits, self.config = reference, Limits(max_latency_ms=1.0), SearchConfig()
        self.problem, self._gone, self.toy = toy.problem, None, toy
        self.ms = dict[str, float]()

    def _evaluate(self, plan: CompressionPlan, fidelity: Fidelity) -> Outcome:
        choices = np.array([WIDTHS.index(plan.keep[decision.name]) for decision in self.problem.decisions])
        self.ms[plan.digest] = ms = 1.1 * self.toy.ms(choices)
        return Measured(plan.digest, fidelity, self.toy.loss(choices), None, 0, 0, ratio=ms)

    def _best_at(self, aim_ms: float) -> tuple[CompressionPlan, Measured] | None:
        plan = self.problem.plan_of(solve(self.problem, aim_ms))
        found = self._evaluate(plan, "F2")
        assert isinstance(found, Measured)
        return plan, found

    def _has_time_to_correct(self) -> bool:
        return False


def test_a_plan_that_is_known_to_break_its_limit_is_not_trained_where_there_is_no_time_to_search_again() -> None:
    toy = Toy(0)
    search = OneAim(toy)
    budget_ms = 0.5 * toy.problem.uncut_ms
    plan = search._best_plan(budget_ms)
    assert plan is not None
    first, second = search.ms.values()
    assert first > (1 + TOLERANCE) * budget_ms
    assert (1 - UNUSED) * budget_ms < second <= (1 + TOLERANCE) * budget_ms
    assert search.ms[plan.digest] == second


def test_a_short_recovery_is_rehearsed_where_a_budget_needs_to_know(data_file: Path, tmp_path: Path) -> None:
    pipeline = make_pipeline(data_file, tmp_path / "run")
    training, left = pipeline.training, pipeline.progress.left
    plan = CompressionPlan({"stages.0.residual": 8}, default_precision="float")
    assert 2 * REHEARSED < training.steps() < LONG * REHEARSED
    training.rehearse(plan)
    assert left.seconds_of(TRAINING_STEP) is None
    training.rehearse(plan, short=True)
    assert left.measured(TRAINING_STEP)[0] == REHEARSED


def test_no_more_time_is_told_than_a_budget_leaves(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", "seed = 0\n", {})
    with run:
        told = []
        for budget_s in (None, 600.0):
            clocked = Clocked(run, budget_s, 1)
            clocked.left.expect(F1, 10_000)
            clocked.do(F1)
            clocked.now += 100.0
            told.append(clocked.left.seconds() or 0.0)
    assert told[0] > 9_000 * SECONDS[F1]
    assert told[1] == pytest.approx(500.0 - SECONDS[F1])
