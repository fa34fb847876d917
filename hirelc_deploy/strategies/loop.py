"""In: a strategy and a way to evaluate plans. Out: what was tried, within a fixed number of evaluations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hirelc_deploy.outcome import Fidelity, Measured, Outcome
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.strategies.depth import gone_from
from hirelc_deploy.strategies.problem import Choices, Evaluate, Problem, Strategy

FRUITLESS_BATCHES = 10
"""Batches in a row with nothing but known plans, after which the search ends before its evaluations are used."""


@dataclass(frozen=True)
class Trial:
    """One plan at one fidelity, and what came of it."""

    choices: Choices
    plan: CompressionPlan
    fidelity: Fidelity
    outcome: Outcome


@dataclass
class SearchResult:
    """Everything a search has found so far; the loop keeps it up to date and hands it to `progress`.

    Attributes:
        strategy: Its name.
        trials: In the order they were asked for; a plan appears once per fidelity.
        fronts: Fidelity to the trials that no other trial of that fidelity beats; see `objectives`.
        seconds: Wall time of the search.
        seconds_evaluating: The part of it inside `evaluate`; the rest is overhead.
        stopped: Why it ended: `evaluations used`, `no new plans`, `deadline`; empty while it runs.
    """

    strategy: str
    trials: list[Trial] = field(default_factory=list)
    fronts: dict[Fidelity, list[Trial]] = field(default_factory=dict)
    seconds: float = 0.0
    seconds_evaluating: float = 0.0
    stopped: str = ""

    @property
    def overhead(self) -> float:
        """Return the share of the wall time spent outside evaluation, in [0, 1]."""
        return 1.0 - self.seconds_evaluating / self.seconds if self.seconds > 0 else 0.0

    def count(self, fidelity: Fidelity) -> int:
        """Return the evaluations made at this fidelity, failures included."""
        return sum(trial.fidelity == fidelity for trial in self.trials)

    def ranked(self, fidelity: Fidelity) -> list[Trial]:
        """Return the trials that were measured at this fidelity, least loss first, the earlier one where equal."""
        measured = [t for t in self.trials if t.fidelity == fidelity and objectives(t.outcome) is not None]
        return sorted(measured, key=lambda trial: trial.outcome.loss if isinstance(trial.outcome, Measured) else 0.0)

    def rivals(self) -> list[CompressionPlan]:
        """Return the best plan (F1) of each set of branches that are left out, best first."""
        found: dict[frozenset[str], CompressionPlan] = {}
        for trial in self.ranked("F1"):
            found.setdefault(gone_from(trial.plan), trial.plan)
        return list(found.values())

    @property
    def best(self) -> tuple[CompressionPlan, Measured] | None:
        """Return the plan of least loss at the highest fidelity that measured anything, with its outcome there."""
        fidelities: tuple[Fidelity, ...] = ("F3", "F2", "F1")
        for fidelity in fidelities:
            for trial in self.ranked(fidelity)[:1]:
                assert isinstance(trial.outcome, Measured)
                return trial.plan, trial.outcome
        return None

    def add(self, trial: Trial) -> None:
        """Record a trial and keep the front of its fidelity."""
        self.trials.append(trial)
        self.fronts[trial.fidelity] = extended_front(self.fronts.get(trial.fidelity, []), trial)


def objectives(outcome: Outcome) -> tuple[float, ...] | None:
    """Return (loss, error rate, time, bytes), less is better in each; None for a failure or a loss that is no number.

    The time is that of the fidelity: the ratio to the uncut file where files were timed together, else the median,
    else the prediction. What was not measured is 0 for every trial of that fidelity.
    """
    if not isinstance(outcome, Measured) or not math.isfinite(outcome.loss):
        return None
    error = 0.0 if outcome.accuracy is None else 1.0 - outcome.accuracy
    times = (time for time in (outcome.ratio, outcome.median_ms, outcome.predicted_ms) if time is not None)
    size = outcome.params if outcome.size_bytes is None else outcome.size_bytes
    return (outcome.loss, error, next(times, 0.0), float(size))


def extended_front(front: Sequence[Trial], trial: Trial) -> list[Trial]:
    """Return the front with the trial, less what it beats; the same front when something in it beats the trial."""
    new = objectives(trial.outcome)
    if new is None:
        return list(front)
    values = [objectives(member.outcome) or () for member in front]
    if any(_no_worse(value, new) for value in values):
        return list(front)
    return [member for member, value in zip(front, values, strict=True) if not _no_worse(new, value)] + [trial]


def _no_worse(first: tuple[float, ...], second: tuple[float, ...]) -> bool:
    return all(a <= b for a, b in zip(first, second, strict=True))


def run_search(
    problem: Problem,
    strategy: Strategy,
    evaluate: Evaluate,
    *,
    f1_evaluations: int,
    f2_evaluations: int,
    batch: int = 4,
    begin: Callable[[Sequence[CompressionPlan]], None] = lambda plans: None,
    progress: Callable[[SearchResult], None] = lambda result: None,
    deadline: float = math.inf,
    f2_reserve_s: float = 0.0,
    clock: Callable[[], float] = time.monotonic,
    known: Callable[[CompressionPlan], bool] = lambda plan: False,
) -> SearchResult:
    """Let the strategy learn on cheap evaluations, then evaluate its best plans as files.

    A plan counts once per fidelity, however often it is proposed and whether its outcome comes from the journal or not:
    so every strategy gets the same number of evaluations, and a resumed search ends where an undisturbed one would. To
    resume, call this again with a fresh strategy of the same seed and an `evaluate` that answers from the journal.

    Args:
        problem: What the strategy searches.
        strategy: Freshly made.
        evaluate: Plan and fidelity to an outcome; a plan that cannot be built is a `Failed`. It journals.
        f1_evaluations: Different plans judged at F1.
        f2_evaluations: Of these, how many of the best are judged at F2.
        batch: Plans between two calls of `observe`. With 4 instead of 8, hirelc's 24 evaluations of the small ViT at
            2.6 times its integer speed ended at 0.161 nats for each of three seeds, not at 0.162, 0.167 and 0.169.
        begin: Told the plans of a batch before they are evaluated at F1 one after the other, so that it may have them
            evaluated side by side.
        progress: Called after each new trial, with the result so far.
        deadline: On `clock`. No further F1 evaluation but the first begins within `f2_evaluations * f2_reserve_s` of
            it, and after it no F2 evaluation but the first.
        f2_reserve_s: About how long one F2 evaluation takes.
        clock: Seconds.
        known: Whether a plan's outcome at F1 is journaled; it is taken after the deadline too.

    Raises:
        KeyboardInterrupt: As it came; all that was finished has been journaled and shown to `progress`.
    """
    result = SearchResult(strategy.name)
    started = clock()
    done: dict[tuple[str, Fidelity], Outcome] = {}

    def outcome_of(choices: Choices, fidelity: Fidelity) -> Outcome:
        plan = problem.plan_of(choices)
        key = (plan.digest, fidelity)
        if key not in done:
            before = clock()
            try:
                done[key] = evaluate(plan, fidelity)
            finally:
                result.seconds_evaluating += clock() - before
                result.seconds = clock() - started
            result.add(Trial(choices, plan, fidelity, done[key]))
            progress(result)
        return done[key]

    last_f1_start = deadline - f2_evaluations * f2_reserve_s
    fruitless = 0
    while not result.stopped:
        left = f1_evaluations - result.count("F1")
        if left <= 0:
            result.stopped = "evaluations used"
            break
        before = result.count("F1")
        tried: list[tuple[Choices, Outcome]] = []
        proposed = strategy.propose(min(batch, left))
        begin([plan for plan in map(problem.plan_of, proposed) if (plan.digest, "F1") not in done])
        for choices in proposed:
            if result.count("F1") and clock() >= last_f1_start and not known(problem.plan_of(choices)):
                result.stopped = "deadline"
                break
            tried.append((choices, outcome_of(choices, "F1")))
        fruitless = 0 if result.count("F1") > before else fruitless + 1
        if not result.stopped and (not tried or fruitless >= FRUITLESS_BATCHES):
            result.stopped = "no new plans"
        strategy.observe(tried)
    for trial in result.ranked("F1")[:f2_evaluations]:
        if result.count("F2") and clock() >= deadline:
            result.stopped = "deadline"
            break
        outcome_of(trial.choices, "F2")
    result.seconds = clock() - started
    return result
