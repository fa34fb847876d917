"""What is said of the time left of a whole command is right, on a clock that only the test moves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hirelc_deploy.deliver import agenda
from hirelc_deploy.deliver.agenda import Agenda, Sizes
from hirelc_deploy.outcome import Fidelity, Measured, Outcome
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.runs import Run
from hirelc_deploy.time_left import CUT, F1, F3, FILE, TRAINING_STEP, TimeLeft

SECONDS = {
    **{agenda.FORWARD: 4.0, "importance": 20.0, "input moments": 24.0, "precision placement": 50.0, CUT: 3.0},
    **{"export and calibrate the uncut model": 7.0, F1: 3.7, TRAINING_STEP: 0.9, agenda.DEPTH: 30.0},
    **{agenda.GUARD: 0.5, agenda.RACE: 100.0, agenda.TEST: 2.0, agenda.BUNDLE: 3.0},
}
JUDGE, TIME, EXPORT = 0.4, 7.5, 6.5
"""Of a file. All as blood cells took them, searched with two processes on two cores."""
SIZES = Sizes(steps=260, trial_steps=20, judged_share=0.25, test_share=2.0, f1_evaluations=24, limits_drop=True)
SINGLES = 120


class Simulated:
    """A search whose steps take what SECONDS says; `said` holds (time, what was said of the time left)."""

    def __init__(self, run: Run, before: TimeLeft | None = None) -> None:
        self.now = 0.0
        self.run = run
        self.left = TimeLeft(lambda: self.now)
        if before is not None:
            self.left.take_up(before.record())
        self.said: list[tuple[float, float | None]] = []
        self.files = self.judged = 0

    def do(self, kind: str) -> None:
        with self.left.step(kind):
            self.now += SECONDS[kind]
        self.tell()

    def tell(self) -> None:
        self.said.append((self.now, self.left.seconds()))

    def outcome(self, plan: CompressionPlan, fidelity: Fidelity) -> None:
        kind = F1 if fidelity == "F1" else FILE
        if self.run.knows(plan, fidelity, "" if kind == F1 else "here"):
            for one in {"F1": (F1,), "F2": (FILE, CUT), "F3": (FILE, CUT, F3)}[fidelity]:
                self.left.answered(one)
            self.tell()
            return

        def evaluate(plan: CompressionPlan, fidelity: Fidelity) -> Outcome:
            if kind == F1:
                self.do(F1)
                return Measured(plan.digest, fidelity, 0.1, None, 1, 1)
            with self.left.step(FILE):
                self.once()
                self.do(CUT)
                for _ in range(SIZES.steps if fidelity == "F3" else 0):
                    self.do(TRAINING_STEP)
                self.now += EXPORT + JUDGE + TIME
            seconds = {"export": EXPORT, "judge": JUDGE, "time": TIME}
            return Measured(plan.digest, fidelity, 0.1, None, 1, 1, ratio=0.5, seconds=seconds)

        self.run.evaluate_once(plan, fidelity, evaluate, "" if kind == F1 else "here")
        self.tell()

    def once(self) -> None:
        for stage in agenda.ONCE:
            if not self.left.is_measured(stage):
                self.do(stage)

    def search(self, finalists: int) -> Iterator[None]:
        """Walk the steps of a search for a drop in the order of `finalists.Search`; yields between them."""
        plans = (CompressionPlan({"a": width}) for width in range(1, 10_000))
        self.do(agenda.FORWARD)
        book = Agenda(self.left, self.run, "here", SIZES)
        book.search(finalists, files=3, judged=5, depth=True, singles=SINGLES)
        if self.left.seconds_of(TRAINING_STEP) is None:  # a rehearsal
            self.once()
            for kind in (CUT, *4 * (TRAINING_STEP,)):
                self.do(kind)
            book.search(finalists, files=3, judged=5, depth=True, singles=SINGLES)
        for _ in range(3):
            self.outcome(next(plans), "F2")
            yield
        book.search(finalists, judged=5, depth=True, singles=SINGLES)
        for _ in range(SINGLES + 5):
            self.outcome(next(plans), "F1")
            yield
        for finalist in range(finalists):
            book.search(finalists - finalist, depth=finalist == 0)
            for again in range(2 if finalist == 0 else 1):
                for _ in range(SIZES.f1_evaluations):
                    self.outcome(next(plans), "F1")
                    yield
                self.outcome(next(plans), "F2")
                if finalist == 0 and not again:
                    with self.left.step(agenda.DEPTH):
                        for trial in range(9):
                            self.run.remember(f"loss of {trial} after 1 epochs of recovery", self.trial)
                        self.now += SECONDS[agenda.DEPTH]
                    book.search(finalists - finalist, depth=False)
            self.outcome(next(plans), "F3")
            yield
        book.search(0)
        for stage in (agenda.GUARD, agenda.RACE, agenda.TEST, agenda.BUNDLE):
            self.do(stage)

    def trial(self) -> float:
        self.do(CUT)
        for _ in range(SIZES.trial_steps):
            self.do(TRAINING_STEP)
        return 0.1


def wrong(simulated: Simulated, start: float, of_whole: float = 0.0) -> float:
    """Return by which share of the time left what was said was wrong at worst, from `start` to the last tenth.

    Args:
        of_whole: Share of the whole time that is left out of the error.
    """
    end = simulated.now
    said = [(time, left) for time, left in simulated.said if start <= time <= 0.9 * end]
    assert said
    errors = [(abs((0.0 if left is None else left) - (end - time)), end - time) for time, left in said]
    return max(max(0.0, error - of_whole * end) / left for error, left in errors)


def test_the_time_left_is_right_within_a_fifth_after_the_first_tenth(tmp_path: Path) -> None:
    for finalists in (1, 3):
        with Run.open(tmp_path / f"{finalists}", "seed = 0", {}) as run:
            simulated = Simulated(run)
            for _ in simulated.search(finalists):
                pass
            assert wrong(simulated, 0.1 * simulated.now) < 0.2
            assert simulated.left.seconds() == 0.0


@pytest.mark.parametrize("killed_at", [40, 170, 214])
def test_a_resumed_search_tells_the_time_left_from_its_journal(tmp_path: Path, killed_at: int) -> None:
    with Run.open(tmp_path / "run", "seed = 0", {}) as run:
        first = Simulated(run)
        for _, _ in zip(range(killed_at), first.search(3), strict=False):
            pass
    with Run.open(tmp_path / "run", "seed = 0", {}) as run:
        second = Simulated(run, first.left)
        for _ in second.search(3):
            pass
    assert wrong(second, 0.1 * second.now, of_whole=0.02) < 0.2


def test_nothing_is_said_before_it_is_known_what_a_step_takes() -> None:
    left = TimeLeft()
    assert left.seconds() is None
    left.expect("a", 2)
    assert left.seconds() is None
    left.guess("a", 3.0)
    assert left.seconds() == 6.0
    left.took("a", 5.0)
    assert left.seconds() == 5.0


def test_the_seconds_of_a_step_are_its_own_and_a_failed_one_counts_for_nothing() -> None:
    now = 0.0
    left = TimeLeft(lambda: now)
    with left.step("outer"):
        now += 1
        with left.step("inner"):
            now += 10
        now += 2
    now += 100
    with pytest.raises(ZeroDivisionError), left.step("inner"):
        _ = 1 / 0
    assert (left.seconds_of("outer"), left.seconds_of("inner")) == (3.0, 10.0)


def test_what_was_measured_in_a_command_before_counts_until_it_is_measured_anew() -> None:
    before, left = TimeLeft(), TimeLeft()
    before.took("a", 4.0)
    left.take_up({**before.record(), "b": {"count": 0, "seconds": 1.0}, "c": "damaged", "d": {"count": 1}})
    assert [left.seconds_of(kind) for kind in "abcd"] == [4.0, None, None, None]
    left.took("a", 2.0)
    assert left.seconds_of("a") == 2.0
    assert left.record() == {"a": {"count": 1, "seconds": 2.0}}
