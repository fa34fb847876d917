"""In: the sizes of a job, and what its run has measured. Out: the steps still to come, told to `progress.left`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from hirelc_deploy.evaluate.selection import FORWARD
from hirelc_deploy.measure.protocol import FULL
from hirelc_deploy.outcome import Measured
from hirelc_deploy.runs import TRIAL_LOSS, Run
from hirelc_deploy.strategies.depth import TRIALS
from hirelc_deploy.time_left import CUT, F1, F3, FILE, TRAINING_STEP, TimeLeft

DEPTH = "which branches go"
GUARD, RACE, TEST, BUNDLE = "accuracy guard", "final timing", "test split", "bundle and report"
ONCE = ("importance", "input moments", "export and calibrate the uncut model", "precision placement")
"""Stages that a process does at most once, when something first asks for them."""

FILE_SECONDS = 10.0
"""A guess at a file before the first: the demo takes 4, CamVid's road scenes 10, blood cells 16."""
RACE_TIMINGS = 10.0
"""Brief timings of a file that the last race takes as long as: 11, 5 and 13 for the same three."""
INFERENCES = 5.0
"""Times that the selection images are inferred for the bundle and the report: the files of the last race."""
DEPTH_TRIALS = 1 + 2 * TRIALS
"""Trial recoveries of which branches go: one, and mostly two steps of single changes."""


@dataclass(frozen=True)
class Sizes:
    """How large the steps of a job are.

    Attributes:
        steps: Of a recovery; 0 without one.
        trial_steps: Of a trial recovery of which branches go; 0 where there is nothing to decide about them.
        judged_share: Of the selection images, those that judge a cut model (F1).
        test_share: Test images for each selection image; 0 without labels.
        f1_evaluations: Of a search at one budget.
        limits_drop: Whether the accuracy guard looks at the uncut integer file.
    """

    steps: int
    trial_steps: int = 0
    judged_share: float = 1.0
    test_share: float = 0.0
    f1_evaluations: int = 0
    limits_drop: bool = False


class Agenda:
    """Knows what a job has still before it, as far as that can be told, and what an unmeasured step may take."""

    def __init__(self, left: TimeLeft, run: Run, machine: str, sizes: Sizes) -> None:
        """Args: `machine` is the context of the trials whose files count here."""
        self.left, self.run, self.sizes = left, run, sizes
        files = sum(t.fidelity != "F1" and t.context == machine for t in run.trials)
        recovered = sum(t.fidelity == "F3" and t.context == machine for t in run.trials)
        judged = sum(t.fidelity == "F1" for t in run.trials)
        for kind, count in ((F1, judged), (FILE, files), (CUT, files), (F3, recovered)):
            left.journal_answers(kind, count)

    def search(
        self,
        finalists: int,
        *,
        searched: int = 0,
        files: int = 0,
        judged: int = 0,
        depth: bool = False,
        singles: int = 0,
    ) -> None:
        """Say what a search has before it.

        Args:
            finalists: Still to be found, each by a search and a recovery.
            searched: Of these, whose search is done.
            files: To be timed before.
            singles, judged: Options to be judged alone, and other plans, before the first finalist.
            depth: Which branches go is still to be settled, after which the first search is done again.
        """
        self._once()
        again = int(depth and self.sizes.trial_steps > 0)
        tried = sum(key.startswith(TRIAL_LOSS) for key in self.run.facts)
        trials = again * max(0, DEPTH_TRIALS - tried)
        recoveries = max(0, finalists - self.left.unasked(F3))
        self._expect(
            {
                F1: singles + judged + (finalists - searched + again) * self.sizes.f1_evaluations,
                CUT: files + 2 * finalists - searched + again + trials,
                FILE: files + 2 * finalists - searched + again,
                TRAINING_STEP: recoveries * self.sizes.steps + trials * self.sizes.trial_steps,
                DEPTH: again,
            }
        )

    def apply(self) -> None:
        """Say what the building of one plan has before it."""
        self._once()
        self.left.guess(CUT, 0.0)
        self._expect({CUT: 1, FILE: 1, TRAINING_STEP: self.sizes.steps})

    def finalist_seconds(self, *, search: bool = True) -> float | None:
        """Return what one more finalist takes: its search, if it is still to come, its recovery and its files."""
        searched = {F1: self.sizes.f1_evaluations, CUT: 1, FILE: 1} if search else {}
        recovered = {CUT: 1, FILE: 1, TRAINING_STEP: self.sizes.steps}
        self._guess()
        return self.left.seconds_for({k: searched.get(k, 0) + recovered.get(k, 0) for k in {**searched, **recovered}})

    def depth_seconds(self) -> float | None:
        """Return what it takes to settle which branches go."""
        self._guess()
        trials = {CUT: DEPTH_TRIALS + 1, TRAINING_STEP: DEPTH_TRIALS * self.sizes.trial_steps, DEPTH: 1}
        return self.left.seconds_for({**trials, F1: self.sizes.f1_evaluations, FILE: 1})

    def race_seconds(self, plans: int, shares: float) -> float | None:
        """Return what a race of so many plans takes, in which so many recoveries are trained, and the winner's rest."""
        self._guess()
        files = plans - 1
        steps = (1 + shares) * self.sizes.steps
        return self.left.seconds_for({CUT: files + 1, FILE: files + 1, TRAINING_STEP: steps})

    def delivery_seconds(self) -> float | None:
        """Return what comes after the last finalist."""
        self._guess()
        return self.left.seconds_for(self._delivery())

    def _once(self) -> None:
        for stage in ONCE:
            self.left.guess(stage, 0.0)
            self.left.expect(stage, int(not self.left.is_measured(stage)))

    def _delivery(self) -> Mapping[str, float]:
        return {GUARD: int(self.sizes.limits_drop), RACE: 1, TEST: int(self.sizes.test_share > 0), BUNDLE: 1}

    def _expect(self, counts: Mapping[str, float]) -> None:
        self._guess()
        for kind, count in {**counts, **self._delivery()}.items():
            self.left.expect(kind, count)

    def _guess(self) -> None:
        """Say what steps may take of which none was measured, from those that were."""
        forward, cut = self.left.seconds_of(FORWARD), self.left.seconds_of(CUT)
        judge, timing = self._stage_seconds("judge", 0.0), self._stage_seconds("time", FILE_SECONDS / 2)
        guesses = {
            FILE: FILE_SECONDS,
            F1: None if cut is None or forward is None else cut + forward * self.sizes.judged_share,
            DEPTH: DEPTH_TRIALS * (forward or 0.0),
            GUARD: judge,
            RACE: min(FULL.seconds, RACE_TIMINGS * timing),
            TEST: 2 * judge * self.sizes.test_share,
            BUNDLE: INFERENCES * judge,
        }
        for kind, seconds in guesses.items():
            if seconds is not None:
                self.left.guess(kind, seconds)

    def _stage_seconds(self, stage: str, unknown: float) -> float:
        """Return what a stage of a file took, by the journal."""
        outcomes = (t.outcome for t in self.run.trials if t.fidelity != "F1")
        found = [o.seconds[stage] for o in outcomes if isinstance(o, Measured) and stage in o.seconds]
        return median(found) if found else unknown
