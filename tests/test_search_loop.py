"""The loop: equal counting, fronts that are right, and the same answer after any interruption."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from toy_problem import Toy

from hirelc_deploy.outcome import Failed, Fidelity, Measured, Outcome
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.runs import Run
from hirelc_deploy.strategies.baselines import make_strategy
from hirelc_deploy.strategies.loop import SearchResult, Trial, extended_front, objectives, run_search
from hirelc_deploy.strategies.problem import Choices, Evaluate


class Script:
    """A strategy that proposes what it was given, repeats included."""

    name = "script"

    def __init__(self, batches: Sequence[Sequence[Choices]]) -> None:
        self.batches = list(batches)
        self.observed: list[list[Outcome]] = []

    def propose(self, count: int) -> list[Choices]:
        return list(self.batches.pop(0))[:count] if self.batches else []

    def observe(self, tried: Sequence[tuple[Choices, Outcome]]) -> None:
        self.observed.append([outcome for _, outcome in tried])


class Clock:
    """Moves only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def choices(toy: Toy, *first: int) -> Choices:
    found = np.full(len(toy.problem.decisions), 4, dtype=np.int64)
    found[: len(first)] = first
    return found


def search(toy: Toy, evaluate: Evaluate, name: str = "hirelc", f1: int = 14, f2: int = 3) -> SearchResult:
    strategy = make_strategy(name, toy.problem, 0.45 * toy.problem.uncut_ms, 3)
    return run_search(toy.problem, strategy, evaluate, f1_evaluations=f1, f2_evaluations=f2, batch=4)


def asked(result: SearchResult) -> list[tuple[str, Fidelity]]:
    return [(trial.plan.digest, trial.fidelity) for trial in result.trials]


def test_a_repeated_plan_is_neither_evaluated_nor_counted_again() -> None:
    toy = Toy(0, blocks=1)
    a, b, c = choices(toy, 0), choices(toy, 1), choices(toy, 2)
    strategy = Script([[a, a], [a, b], [b], [c]])
    result = run_search(toy.problem, strategy, toy.evaluate, f1_evaluations=3, f2_evaluations=0, batch=2)
    assert result.count("F1") == len(toy.calls) == 3
    assert result.stopped == "evaluations used"
    assert strategy.observed[0][0] == strategy.observed[0][1]


@pytest.mark.parametrize("name", ["hirelc", "flat", "knapsack", "random", "untrained"])
def test_every_strategy_gets_exactly_the_same_number_of_evaluations(name: str) -> None:
    toy = Toy(0)
    result = search(toy, toy.evaluate, name, f1=21, f2=4)
    assert (result.count("F1"), result.count("F2")) == (21, 4)
    assert len(toy.calls) == len(set(toy.calls)) == 25


def test_the_plans_of_least_loss_go_on_to_f2_and_the_best_is_taken_there() -> None:
    toy = Toy(0)
    result = search(toy, toy.evaluate)
    f1 = sorted((t.outcome.loss, t.plan.digest) for t in result.trials if t.fidelity == "F1")
    assert [t.plan.digest for t in result.trials if t.fidelity == "F2"] == [digest for _, digest in f1[:3]]
    best = result.best
    assert best is not None
    assert best[1].fidelity == "F2"
    assert best[0].digest == f1[0][1]


def test_failures_are_recorded_counted_and_survived() -> None:
    toy = Toy(0)

    def sometimes(plan: CompressionPlan, fidelity: Fidelity) -> Outcome:
        if int(plan.digest, 16) % 2:
            return Failed(plan.digest, fidelity, "export", "no such operator")
        return toy.evaluate(plan, fidelity)

    result = search(toy, sometimes, f1=20, f2=20)
    assert result.count("F1") == 20
    failed = [t for t in result.trials if isinstance(t.outcome, Failed)]
    assert failed
    assert result.count("F2") == 20 - len(failed)
    assert all(isinstance(t.outcome, Measured) for front in result.fronts.values() for t in front)


def test_a_search_where_everything_fails_ends_with_nothing() -> None:
    toy = Toy(0)
    result = search(toy, lambda plan, fidelity: Failed(plan.digest, fidelity, "slice", "no"), f1=9)
    assert result.count("F1") == 9
    assert result.best is None
    assert result.fronts["F1"] == []


def test_a_strategy_that_only_repeats_itself_is_stopped() -> None:
    toy = Toy(0, blocks=1)
    strategy = Script([[choices(toy, 0)]] * 40)
    result = run_search(toy.problem, strategy, toy.evaluate, f1_evaluations=5, f2_evaluations=0)
    assert result.count("F1") == 1
    assert result.stopped == "no new plans"


def test_no_evaluation_begins_when_the_time_kept_for_f2_begins_and_f2_still_runs() -> None:
    toy, clock = Toy(0), Clock()

    def slow(plan: CompressionPlan, fidelity: Fidelity) -> Outcome:
        clock.now += 1.0 if fidelity == "F1" else 10.0
        return toy.evaluate(plan, fidelity)

    strategy = make_strategy("random", toy.problem, 0.5 * toy.problem.uncut_ms, 0)
    result = run_search(
        toy.problem, strategy, slow, f1_evaluations=99, f2_evaluations=2, deadline=30.0, f2_reserve_s=10.0, clock=clock
    )
    assert (result.count("F1"), result.count("F2")) == (10, 2)
    assert result.stopped == "deadline"


def test_after_the_deadline_one_file_is_still_measured() -> None:
    toy, clock = Toy(0), Clock()

    def slow(plan: CompressionPlan, fidelity: Fidelity) -> Outcome:
        clock.now += 8.0
        return toy.evaluate(plan, fidelity)

    strategy = make_strategy("random", toy.problem, 0.5 * toy.problem.uncut_ms, 0)
    result = run_search(toy.problem, strategy, slow, f1_evaluations=99, f2_evaluations=5, deadline=10.0, clock=clock)
    assert (result.count("F1"), result.count("F2")) == (2, 1)


def test_time_outside_evaluation_is_told_apart() -> None:
    toy, clock = Toy(0, blocks=1), Clock()

    class Thinking(Script):
        def propose(self, count: int) -> list[Choices]:
            clock.now += 1.0
            return super().propose(count)

    def slow(plan: CompressionPlan, fidelity: Fidelity) -> Outcome:
        clock.now += 3.0
        return toy.evaluate(plan, fidelity)

    strategy = Thinking([[choices(toy, 0)], [choices(toy, 1)]])
    result = run_search(toy.problem, strategy, slow, f1_evaluations=2, f2_evaluations=0, batch=1, clock=clock)
    assert result.seconds == 8.0
    assert result.seconds_evaluating == 6.0
    assert result.overhead == pytest.approx(0.25)


def measured(loss: float, ms: float, size: int, fidelity: Fidelity = "F2") -> Trial:
    outcome = Measured(f"{loss}{ms}{size}", fidelity, loss, None, 1, 1, median_ms=ms, size_bytes=size)
    return Trial(np.zeros(1, dtype=np.int64), CompressionPlan(), fidelity, outcome)


def test_the_front_is_what_nothing_else_beats() -> None:
    rng = np.random.default_rng(0)
    trials = [measured(*(float(v) for v in rng.integers(0, 6, 2)), int(rng.integers(0, 6))) for _ in range(200)]
    front: list[Trial] = []
    for trial in trials:
        front = extended_front(front, trial)
    values = {objectives(trial.outcome) for trial in trials}
    expected = {v for v in values if not any(o != v and all(a <= b for a, b in zip(o, v, strict=True)) for o in values)}
    assert {objectives(trial.outcome) for trial in front} == expected
    assert len(front) == len(expected)


def test_a_loss_that_is_no_number_is_never_on_the_front_nor_best() -> None:
    result = SearchResult("x")
    result.add(measured(float("nan"), 0.1, 1))
    assert result.fronts["F2"] == []
    assert result.best is None
    result.add(measured(1.0, 2.0, 3))
    assert len(result.fronts["F2"]) == 1


def test_progress_sees_every_new_trial_once() -> None:
    toy = Toy(0)
    counts: list[int] = []
    strategy = make_strategy("knapsack", toy.problem, 0.45 * toy.problem.uncut_ms, 0)
    result = run_search(
        toy.problem, strategy, toy.evaluate, f1_evaluations=6, f2_evaluations=2,
        progress=lambda r: counts.append(len(r.trials)),
    )  # fmt: skip
    assert counts == list(range(1, 9))
    assert len(result.trials) == 8


class Killed(BaseException):
    """The process ends here."""


def search_until_killed(toy: Toy, directory: Path, name: str, moment: int, journaled_first: bool) -> None:
    """Search in a run directory until trial number `moment` is about to be evaluated, or has just been journaled."""

    def evaluate(plan: CompressionPlan, fidelity: Fidelity) -> Outcome:
        if not journaled_first and len(toy.calls) == moment:
            raise Killed
        return toy.evaluate(plan, fidelity)

    with Run.open(directory, "", {}) as run:

        def once(plan: CompressionPlan, fidelity: Fidelity) -> Outcome:
            outcome = run.evaluate_once(plan, fidelity, evaluate)
            if journaled_first and len(toy.calls) == moment + 1:
                raise Killed
            return outcome

        search(toy, once, name, f1=10, f2=2)


@pytest.mark.parametrize("name", ["hirelc", "knapsack"])
@pytest.mark.parametrize("journaled_first", [True, False])
def test_killed_at_any_trial_and_resumed_it_ends_as_if_undisturbed(
    tmp_path: Path, name: str, journaled_first: bool
) -> None:
    toy = Toy(1, blocks=2)
    undisturbed = search(toy, toy.evaluate, name, f1=10, f2=2)
    for moment in range(12):
        toy.calls.clear()
        with pytest.raises(Killed):
            search_until_killed(toy, tmp_path / str(moment), name, moment, journaled_first)
        toy.calls.clear()
        with Run.open(tmp_path / str(moment), "", {}) as run:
            finished = moment + journaled_first
            assert len(run.trials) == finished
            resumed = search(toy, lambda p, f, run=run: run.evaluate_once(p, f, toy.evaluate), name, f1=10, f2=2)
        assert asked(resumed) == asked(undisturbed)
        assert resumed.best == undisturbed.best
        assert len(toy.calls) == 12 - finished


def test_ctrl_c_is_passed_on_and_what_was_finished_is_kept(tmp_path: Path) -> None:
    toy = Toy(1, blocks=2)
    seen: list[SearchResult] = []

    def evaluate(plan: CompressionPlan, fidelity: Fidelity) -> Outcome:
        if len(toy.calls) == 5:
            raise KeyboardInterrupt
        return toy.evaluate(plan, fidelity)

    strategy = make_strategy("hirelc", toy.problem, 0.45 * toy.problem.uncut_ms, 3)
    with Run.open(tmp_path / "run", "", {}) as run, pytest.raises(KeyboardInterrupt):
        run_search(
            toy.problem, strategy, lambda p, f: run.evaluate_once(p, f, evaluate),
            f1_evaluations=9, f2_evaluations=1, progress=seen.append,
        )  # fmt: skip
    assert len(Run.read(tmp_path / "run").trials) == 5
    assert len(seen[-1].trials) == 5
    assert seen[-1].fronts["F1"]


def test_rivals_are_the_best_plans_that_leave_out_different_branches() -> None:
    result = SearchResult("any")
    for loss, keep in (
        (0.4, {"a": 0, "b": 8}),
        (0.1, {"a": 4, "b": 8}),
        (0.3, {"a": 0, "b": 4}),
        (0.2, {"a": 8, "b": 8}),
        (0.5, {"a": 0, "b": 0}),
        (0.6, {"a": 4, "b": 0}),
    ):
        plan = CompressionPlan(keep)
        result.add(Trial(np.empty(0, np.int64), plan, "F1", Measured(plan.digest, "F1", loss, None, 1, 1)))
    assert [dict(plan.keep) for plan in result.rivals()] == [
        {"a": 4, "b": 8},
        {"a": 0, "b": 4},
        {"a": 0, "b": 0},
        {"a": 4, "b": 0},
    ]
