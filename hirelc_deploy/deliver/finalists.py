"""In: a pipeline, a layer table and the limits the user set. Out: the plans worth shipping, recovered and timed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from hirelc_deploy.config import Limits, SearchConfig
from hirelc_deploy.deliver.agenda import Agenda, Sizes
from hirelc_deploy.deliver.budget import Budget
from hirelc_deploy.deliver.limits import (
    TOLERANCE,
    appetite,
    check_energy,
    check_memory,
    drop_error,
    keeps_energy,
    keeps_limits,
    keeps_memory,
    latency_budget_ms,
)
from hirelc_deploy.errors import ConstraintError, InputError
from hirelc_deploy.evaluate.network_time import (
    SAMPLES,
    fit_network_time,
    measure_table,
    smallest_ms,
    uniform_keep,
)
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.evaluate.tables import build_problem, singles_of, smallest_bytes, weight_bytes
from hirelc_deploy.measure.protocol import FULL
from hirelc_deploy.measure.table import LatencyTable
from hirelc_deploy.outcome import Fidelity, Measured, Outcome
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.runs import BRANCHES, FINALIST, Run, atomic_path
from hirelc_deploy.strategies.baselines import make_strategy
from hirelc_deploy.strategies.depth import Gone, branches_of, choose_depth, gone_from, with_depth
from hirelc_deploy.strategies.hierarchy import Hierarchy
from hirelc_deploy.strategies.knapsack import smallest, solve
from hirelc_deploy.strategies.loop import SearchResult, Trial, extended_front, run_search
from hirelc_deploy.strategies.priced import within_bytes
from hirelc_deploy.strategies.problem import Choices, Problem
from hirelc_deploy.strategies.rungs import raced, shares_of_a_race
from hirelc_deploy.strategies.transfer import shared_weights

MOST_SPEEDUP, BISECTIONS = 6.0, 5
"""A search without a latency limit enters between the best unpruned file and this many times faster, within 6 %."""

STEP = 1.1
"""Ratio of the speed-ups of one finalist and the next."""

ENTRY_LOSS = 0.07
"""Nats. The first finalist is the fastest solver plan that loses less than this before any training."""

CORRECTIONS = 2
"""How often a budget is corrected by the measured file when prediction and measurement disagree."""

UNUSED = 0.05
"""A file that leaves more than this share of its latency budget unused could have kept more of the network."""

SECOND_CHANCES = 1
"""Finalists beyond those asked for, where none keeps the limits: a search that found nothing has been for nothing."""

BYTES_AIM = 0.99
"""Share of the allowed bytes that plans aim at: a cut file's graph and scales are not known to the byte beforehand."""

AGENTS = "agents.safetensors"
"""In a run's folder: what the agents of its last search learned that means something elsewhere."""

REHEARSED_KEEP = 0.7
"""Share of every unit that is left in the network on which a recovery is rehearsed."""

TRIAL_SHARE, TRIAL_STEPS = 0.05, 20
"""Of the epochs of a recovery, and steps at least, in a trial of which branches go."""

NO_CHOICES: Choices = np.empty(0, np.int64)
"""Stands in for the choices of a trial that is known by its plan alone."""


@dataclass(frozen=True)
class Finalist:
    """A plan that was recovered, exported and timed, and whether it keeps the limits on the selection split.

    `drop_points` and `drop_error` are the paired loss of accuracy against the uncut model and its standard error.
    `peak_memory_bytes` is that of its process, `energy_mj` that of one inference; None where nothing limits it.
    """

    plan: CompressionPlan
    outcome: Measured
    drop_points: float
    drop_error: float
    keeps_limits: bool
    peak_memory_bytes: int | None = None
    energy_mj: float | None = None


class Search:
    """Looks for the fastest plan that keeps the limits.

    With a latency limit it works at that budget, and a finalist that breaks another limit is followed by one without
    other branches: two plans that lose alike after a little training may end two points apart. Without a latency limit
    it enters where plans begin to lose, and a finalist that keeps the limits is followed by a faster one, one that does
    not by a slower one.
    """

    def __init__(self, pipeline: Pipeline, run: Run, table: LatencyTable, limits: Limits, config: SearchConfig) -> None:
        self.pipeline, self.run, self.limits, self.config = pipeline, run, limits, config
        self.searches: list[SearchResult] = []
        pipeline.training.further = config.further_recovery or 1.0
        self._gone: Gone | None = None
        self._share: float | None = None
        self._other_depths: list[Gone] = []  # best first
        self.records: list[dict[str, Any]] = []
        self.agenda, self.budget = planned(pipeline, limits, config)
        asked_for = limits.max_latency_ms is not None or limits.speedup is not None
        self._to_find, judged = (1, 0) if asked_for else (config.finalists, BISECTIONS)
        _ = self._elsewhere  # what cannot be read is said before anything is measured
        least = smallest_bytes(pipeline.graph)
        if limits.max_bytes is not None and least > limits.max_bytes:
            raise ConstraintError(
                f"search: {limits.max_bytes:,} bytes cannot be met: with every unit at its narrowest {least:,} weights "
                "of at least one byte are left. Allow more bytes."
            )
        singles = singles_of(pipeline.graph, config.options)
        self.agenda.search(self._to_find, files=SAMPLES, judged=judged, depth=config.depth, singles=singles)
        rehearsed = CompressionPlan(uniform_keep(pipeline.graph, REHEARSED_KEEP))
        pipeline.training.rehearse(rehearsed, short=config.budget_seconds is not None)
        self.agenda.search(self._to_find, files=SAMPLES, judged=judged, depth=config.depth, singles=singles)
        network, self.fit = fit_network_time(pipeline, table)
        self.agenda.search(self._to_find, judged=judged, depth=config.depth, singles=singles)
        self.fit["table_entries"] = measure_table(pipeline, network, config.options)
        wanted_ms = latency_budget_ms(limits, pipeline.files.reference_ms)
        floor_ms = smallest_ms(network)
        if wanted_ms is not None and wanted_ms < floor_ms:
            raise ConstraintError(
                f"search: {wanted_ms:.3g} ms cannot be met: with every unit at its narrowest the network still takes "
                f"about {floor_ms:.3g} ms on this target, and the uncut float file "
                f"{pipeline.files.reference_ms:.3g} ms. Allow more time."
            )
        if limits.max_memory_bytes is not None:
            check_memory(pipeline, limits.max_memory_bytes)
        if limits.max_energy_mj is not None:
            check_energy(pipeline)
        go_on = None if config.budget_seconds is None else self.budget.measures_more
        self.problem = build_problem(pipeline, network, options=config.options, go_on=go_on)
        self._settles_depth = config.depth and bool(branches_of(self.problem))
        self.agenda.search(self._to_find, judged=judged, depth=self._settles_depth)
        # Where no width of any unit buys time there is nothing to search, and no budget is within reach.
        self.floor_ms = smallest(self.problem)[1] if self.problem.decisions else math.inf

    @cached_property
    def _elsewhere(self) -> dict[str, Tensor] | None:
        """What the agents of the run that was given as `warm_start` learned."""
        if self.config.warm_start is None:
            return None
        path = Path(self.config.warm_start) / AGENTS
        try:
            found: dict[str, Tensor] = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path}: no agents of a search could be read ({error}); give the folder of a finished search with the "
                "strategy hirelc as --warm-start."
            ) from None
        return found

    def finalists(self) -> list[Finalist]:
        """Return recovered and timed plans, in the order they were tried."""
        wanted_ms = latency_budget_ms(self.limits, self.pipeline.files.reference_ms)
        found = self._finalists_around_entry() if wanted_ms is None else self._finalists_at(wanted_ms)
        no_more_finalists(self.pipeline, self.agenda, self.budget)
        return found

    def _finalists_around_entry(self) -> list[Finalist]:
        """Return finalists of budgets a step apart; where none keeps the limits, SECOND_CHANCES slower ones follow."""
        found: list[Finalist] = []
        entry_ms, step, tried = self._entry_ms(), 0, set[int]()
        while self._wants_another(found) and step not in tried:
            if found and not self._has_time_for_finalist(len(tried) + 1):
                break
            tried.add(step)
            budget_ms = entry_ms / STEP**step
            if budget_ms > self._unpruned_ms:
                break
            self._to_find = max(1, self.config.finalists - len(found))
            self._expect()
            finalist = self._finalist(budget_ms)
            if finalist is not None:
                found.append(finalist)
            step += 1 if finalist is not None and (finalist.keeps_limits or self._is_too_large(finalist)) else -1
        return found

    def _finalists_at(self, budget_ms: float) -> list[Finalist]:
        """Return finalists of one budget until one keeps the limits: without other branches, or smaller ones."""
        found: list[Finalist] = []
        for number in range(1, self.config.finalists + 1):
            self._expect()
            finalist = self._finalist(budget_ms)
            if finalist is not None:
                found.append(finalist)
                if finalist.keeps_limits:
                    break
            too_large = finalist is not None and self._is_too_large(finalist)
            if number == self.config.finalists or not (too_large or self._other_depths):
                break
            if not self._has_time_for_finalist(number + 1):
                break
            if finalist is not None and too_large:  # a smaller one is faster, which every latency limit allows
                budget_ms = min(1.0, self._used(finalist.outcome, budget_ms)) * budget_ms / STEP
            else:
                self._gone = self._other_depths.pop(0)
        return found

    def _has_time_for_finalist(self, number: int) -> bool:
        if self.budget.decides(f"finalist {number}", self.agenda.finalist_seconds()):
            return True
        self.pipeline.progress.say("the time budget is used: no further finalist is trained.")
        return False

    def _is_too_large(self, finalist: Finalist) -> bool:
        """Return whether it exceeds a limit on memory or energy, which a slower plan would exceed by more."""
        return not keeps_memory(self.limits, finalist.peak_memory_bytes) or not keeps_energy(
            self.limits, finalist.energy_mj
        )

    def _expect(self, searched: int = 0) -> None:
        """Say what is still to come, from the finalist at hand on."""
        self.agenda.search(self._to_find, searched=searched, depth=self._settles_depth and self._gone is None)

    def _wants_another(self, found: list[Finalist]) -> bool:
        wanted = self.config.finalists + (0 if any(f.keeps_limits for f in found) else SECOND_CHANCES)
        return len(found) < wanted

    @property
    def _unpruned_ms(self) -> float:
        return self.pipeline.files.reference_ms * min(1.0, self.pipeline.files.placement.ratio)

    def _entry_ms(self) -> float:
        """Return the shortest budget whose solver plan loses less than ENTRY_LOSS, or where none does a long one."""
        low, high, entry = 1.0, MOST_SPEEDUP, self._unpruned_ms / STEP
        for _ in range(BISECTIONS):
            middle = math.sqrt(low * high)
            budget_ms = self._unpruned_ms / middle
            if self._loses_little(budget_ms):
                low, entry = middle, budget_ms
            else:
                high = middle
        return entry

    def _loses_little(self, budget_ms: float) -> bool:
        if budget_ms < self.floor_ms:
            return False
        problem, budget = self._with_bytes(budget_ms)
        if smallest(problem)[1] > budget:
            return False
        outcome = self._evaluate(problem.plan_of(solve(problem, budget)), "F1")
        return isinstance(outcome, Measured) and outcome.loss < ENTRY_LOSS

    def _evaluate(self, plan: CompressionPlan, fidelity: Fidelity) -> Outcome:
        """Evaluate once, and keep the Pareto front of each fidelity up to date with what files measured."""
        outcome = self.pipeline.outcome(plan, fidelity)
        if fidelity != "F1":
            fronts: dict[str, list[Trial]] = {}
            for record in self.run.trials:
                trial = Trial(NO_CHOICES, record.plan, record.fidelity, record.outcome)
                fronts[record.fidelity] = extended_front(fronts.get(record.fidelity, []), trial)
            self.run.write_pareto({name: [(t.plan, t.outcome) for t in front] for name, front in fronts.items()})
        return outcome

    def _finalist(self, budget_ms: float) -> Finalist | None:
        plan = self._best_plan(budget_ms)
        if plan is None:
            return None
        self._fit_recovery()
        outcome = self._evaluate(plan, "F3")
        if not isinstance(outcome, Measured):
            self.pipeline.progress.say(f"{plan.digest} failed: {outcome.reason}")
            return None
        outcome = self._decided(plan, outcome)
        drop = self.pipeline.selection_drop(plan, "F3")
        error = drop_error(drop)
        files = self.pipeline.files
        memory, energy = appetite(self.limits, files, files.file_of(plan, "F3"))
        kept = keeps_limits(self.limits, outcome, drop.points, error, files.reference_ms, memory, energy)
        points = (None if math.isnan(value) else value for value in (drop.points, error))  # without labels
        judged = dict(
            zip(("plan", "drop_points", "drop_error", "keeps_limits"), (plan.digest, *points, kept), strict=True)
        )
        self.run.remember(f"{FINALIST}{plan.digest} on {files.machine}", lambda: judged)
        unit = self.pipeline.task.metric.unit or self.pipeline.task.metric.name
        self.pipeline.progress.say(
            f"finalist {plan.digest}: {1 / (outcome.ratio or math.nan):.2f} times faster than the float file, "
            f"drop {drop.points:+.2f} {unit} (standard error {error:.2f}) on the selection split"
        )
        return Finalist(plan, outcome, drop.points, error, kept, memory, energy)

    def _fit_recovery(self) -> None:
        """Shorten recoveries where the time budget does not allow whole ones; settled with the first finalist."""
        if self._share is None:
            self._share = self.budget.recovery_share()
            self.pipeline.training.shorten(self._share)
            self.agenda.sizes = replace(self.agenda.sizes, steps=self.pipeline.training.steps())

    def _decided(self, plan: CompressionPlan, outcome: Measured) -> Measured:
        """Return what a longer timing says of a file where a brief one leaves open whether it meets its budget."""
        reference_ms, low, high = self.pipeline.files.reference_ms, outcome.ratio_low, outcome.ratio_high
        budget_ms = latency_budget_ms(self.limits, reference_ms)
        if budget_ms is None or low is None or high is None:
            return outcome
        if not low <= budget_ms * (1 + TOLERANCE) / reference_ms <= high:
            return outcome
        files = self.pipeline.files
        found = self.pipeline.run.remember(
            f"longer timing of {plan.digest} on {files.machine}",
            lambda: files.time([files.reference, files.file_of(plan, "F3")], FULL)[1].ratios,
        )
        return replace(outcome, **found)

    def _best_plan(self, budget_ms: float) -> CompressionPlan | None:
        """Search at one budget; where a file misses one that was asked for, search again at a corrected one.

        Where there is no time for that, the solver says what keeps the corrected one: a plan that is known to break its
        limit is not worth a training. Too slow breaks the limit; too fast gives accuracy away. Of files that meet the
        budget that which loses least, or where several may enter a race, that which loses least as its training goes
        on.
        """
        aim_ms, tried = budget_ms, list[tuple[CompressionPlan, Measured]]()
        asked_for = latency_budget_ms(self.limits, self.pipeline.files.reference_ms) is not None
        for attempt in range(CORRECTIONS + 1 if asked_for else 1):
            if attempt and not self._has_time_to_correct():
                tried += self._solved_at(aim_ms)
                break
            found = self._best_at(aim_ms)
            if found is None:
                break
            again = any(found[0] == plan for plan, _ in tried)
            tried.append(found)
            used = self._used(found[1], budget_ms)
            all_kept = used < 1 and aim_ms >= self.problem.uncut_ms
            if again or all_kept or 1 - UNUSED <= used <= 1 + TOLERANCE:
                break
            aim_ms /= used
        if not tried:
            return None
        met = [found for found in tried if self._used(found[1], budget_ms) <= 1 + TOLERANCE]
        best = min(met, key=lambda found: found[1].loss) if met else tried[-1]
        return self._raced(best, aim_ms, budget_ms if asked_for else None)

    def _raced(self, best: tuple[CompressionPlan, Measured], aim_ms: float, budget_ms: float | None) -> CompressionPlan:
        """Return that of the best plan and others of its time which loses least as its training goes on.

        Args:
            aim_ms: Predicted time of the others.
            budget_ms: What their files may take; None for hardly longer than the best plan's.
        """
        plan, outcome = best
        if self.config.race < 2 or self.pipeline.effort.recovery is None or not self._has_time_to_race():
            return plan
        self._fit_recovery()
        entrants = {plan.digest: plan}
        most = (1 + TOLERANCE) * budget_ms / self.pipeline.files.reference_ms if budget_ms else math.inf
        if budget_ms is None and outcome.ratio is not None:
            most = (1 + UNUSED) * outcome.ratio
        for other in self._others(aim_ms):
            if len(entrants) == self.config.race:
                break
            found = self._evaluate(other, "F2") if other.digest not in entrants else None
            if isinstance(found, Measured) and (found.ratio or 0.0) <= most:
                entrants[other.digest] = other
        with self.pipeline.progress.stage("race"):
            winner, *losers = raced(list(entrants.values()), self.pipeline.training.loss_at)
        for loser in losers:
            self.pipeline.training.give_up(loser)
        return winner

    def _others(self, aim_ms: float) -> Iterator[CompressionPlan]:
        """Yield plans of a predicted time from unlike proposers, those first that training may do most for."""
        problem, budget = self._with_bytes(aim_ms)
        yield problem.plan_of(solve(problem, budget))
        yield from (problem.plan_of(choices) for choices in make_strategy("taylor", problem, budget, 0).propose(1))
        yield from (trial.plan for trial in self.searches[-1].ranked("F1")[1:])

    def _has_time_to_race(self) -> bool:
        shares = shares_of_a_race(self.config.race)
        return self.budget.decides(f"race {len(self.searches)}", self.agenda.race_seconds(self.config.race, shares))

    def _used(self, outcome: Measured, budget_ms: float) -> float:
        """Return the share of a latency budget that a file takes; all of it where it was not timed."""
        return 1.0 if outcome.ratio is None else outcome.ratio * self.pipeline.files.reference_ms / budget_ms

    def _best_at(self, aim_ms: float) -> tuple[CompressionPlan, Measured] | None:
        """Search at one budget, and once, after the first search, settle which branches go; None where nothing fits."""
        if aim_ms < self.floor_ms:
            return None
        problem, budget = self._with_bytes(aim_ms)
        if not problem.decisions or smallest(problem)[1] > budget:
            return None
        result = self._searched(problem, budget, aim_ms)
        to_settle = result.best is not None and self._gone is None and self._settles_depth
        if to_settle and not self._has_time_for_depth():
            to_settle = self._settles_depth = False
        if result.best is not None and to_settle:
            key = f"{BRANCHES}{aim_ms:.6g} ms on {self.pipeline.files.machine}"
            elsewhere = nearest_depth(self.run.facts, aim_ms, key)
            if depths := settled_depth(self.pipeline, problem, budget, result.rivals(), elsewhere):
                self._gone, *self._other_depths = depths
                self.run.remember(key, lambda: {"budget_ms": aim_ms, "gone": sorted(depths[0])})
            if self._gone is not None and self._gone != gone_from(result.best[0]):
                self._expect()
                problem, budget = self._with_bytes(aim_ms)
                result = self._searched(problem, budget, aim_ms)
        self._expect(searched=1)
        return result.best

    def _solved_at(self, aim_ms: float) -> list[tuple[CompressionPlan, Measured]]:
        """Return the solver's plan of a predicted time, where it can be had: one more file in place of a search."""
        problem, budget = self._with_bytes(aim_ms)
        if smallest(problem)[1] > budget:
            return []
        plan = problem.plan_of(solve(problem, budget))
        outcome = self._evaluate(plan, "F2")
        return [(plan, outcome)] if isinstance(outcome, Measured) else []

    def _has_time_to_correct(self) -> bool:
        """Return whether the time budget allows a further search for the same finalist, and if so expect it."""
        if not self.budget.decides(f"search {len(self.searches) + 1}", self.agenda.finalist_seconds()):
            return False
        self._expect()
        return True

    def _has_time_for_depth(self) -> bool:
        trials, recovered = self.agenda.depth_seconds(), self.agenda.finalist_seconds(search=False)
        return self.budget.decides("which branches go", (trials or 0.0) + (recovered or 0.0))

    def _searched(self, problem: Problem, budget: float, aim_ms: float) -> SearchResult:
        """Let the strategy search, and keep what it and its agents learned."""
        strategy = make_strategy(self.config.strategy, problem, budget, self.pipeline.seed)
        if isinstance(strategy, Hierarchy):
            strategy.elsewhere = self._elsewhere
        result = run_search(
            problem,
            strategy,
            self._evaluate,
            f1_evaluations=self.config.f1_evaluations,
            f2_evaluations=1,
            begin=self.pipeline.begin,
            deadline=self.budget.search_deadline(),
            clock=self.pipeline.progress.clock,
            known=lambda plan: self.run.knows(plan, "F1"),
        )
        self.searches.append(result)
        if isinstance(strategy, Hierarchy):
            self.records.append({"budget_ms": aim_ms, **strategy.record()})
            if strategy.verdict is not None:
                self.pipeline.progress.say(strategy.verdict.says)
            with atomic_path(self.run.directory / AGENTS) as partial:
                partial.write_bytes(save(shared_weights(strategy.agents)))
        return result

    def _with_bytes(self, budget_ms: float) -> tuple[Problem, float]:
        """Return the problem and the budget that stand for the limits on time and bytes.

        Once it is settled which branches go, the problem is without them.
        """
        problem, budget = self._with_both_limits(budget_ms)
        return (problem if self._gone is None else with_depth(problem, self._gone)), budget

    def _with_both_limits(self, budget_ms: float) -> tuple[Problem, float]:
        if self.limits.max_bytes is None:
            return self.problem, budget_ms
        graph, decisions = self.pipeline.graph, self.problem.decisions
        uncut = np.array([[len(d.options) - 1 for d in decisions]], dtype=np.int64)
        # What a file holds beside the weights (biases, scales, the graph) hardly shrinks with a cut.
        beside = self.pipeline.files.placed.stat().st_size - float(weight_bytes(graph, decisions, uncut)[0])
        return within_bytes(
            self.problem, budget_ms, BYTES_AIM * self.limits.max_bytes - beside, partial(weight_bytes, graph, decisions)
        )


def nearest_depth(facts: Mapping[str, Any], budget_ms: float, own: str) -> Gone | None:
    """Return which branches go at the nearest journaled budget, the fact `own` not counted; None without any."""
    found = [value for key, value in facts.items() if key.startswith(BRANCHES) and key != own]
    near = min(found, key=lambda one: abs(math.log(one["budget_ms"] / budget_ms)), default=None)
    return None if near is None else frozenset(near["gone"])


def settled_depth(
    pipeline: Pipeline,
    problem: Problem,
    budget_ms: float,
    known: Sequence[CompressionPlan],
    elsewhere: Gone | None = None,
) -> list[Gone]:
    """Return which branches may be left out, the best set first by trial recoveries.

    Nothing is returned where there is nothing to decide or no training.

    Args:
        known: The best plan found so far for each set of branches, best first.
        elsewhere: Those that go at another budget.
    """
    recovery = pipeline.effort.recovery
    if recovery is None or not branches_of(problem):
        return []
    epochs = trial_epochs(pipeline)
    best_first = {gone_from(plan): plan for plan in known}
    with pipeline.progress.stage("which branches go"):
        loss_after = lambda plan: pipeline.training.loss_after(plan, epochs)  # noqa: E731
        return choose_depth(problem, budget_ms, best_first, loss_after, elsewhere)


def trial_epochs(pipeline: Pipeline) -> float:
    """Return the epochs of a trial recovery; 0 without a recovery."""
    recovery = pipeline.effort.recovery
    if recovery is None:
        return 0.0
    per_epoch = max(1, len(pipeline.uncut.sensitivity_split) // recovery.batch_size)
    return min(recovery.epochs, max(TRIAL_SHARE * recovery.epochs, TRIAL_STEPS / per_epoch))


def planned(pipeline: Pipeline, limits: Limits, config: SearchConfig) -> tuple[Agenda, Budget]:
    """Return what a search has before it and the time that it may take; nothing is expected yet."""
    left = pipeline.progress.left
    sizes = sizes_of(pipeline, limits, config.f1_evaluations)
    agenda = Agenda(left, pipeline.run, pipeline.files.machine, sizes)
    return agenda, Budget(config.budget_seconds, agenda, spent=left.spent, clock=pipeline.progress.clock)


def no_more_finalists(pipeline: Pipeline, agenda: Agenda, budget: Budget) -> None:
    """Say that no finalist follows, and whether the accuracy guard may train."""
    agenda.search(0)
    needs = agenda.finalist_seconds(search=False)
    pipeline.trains_placed = budget.decides("training of the uncut integer file", needs)


def sizes_of(pipeline: Pipeline, limits: Limits, f1_evaluations: int) -> Sizes:
    """Return how large the steps of a job are."""
    data, branches = pipeline.data, any(unit.branch for unit in pipeline.graph.units)
    return Sizes(
        steps=pipeline.training.steps(),
        trial_steps=pipeline.training.steps(trial_epochs(pipeline)) if branches else 0,
        judged_share=pipeline.uncut.judged_images / len(data.selection),
        test_share=data.test_count / len(data.selection) if data.labelled else 0.0,
        f1_evaluations=f1_evaluations,
        limits_drop=limits.max_drop is not None,
    )
