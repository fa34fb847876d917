"""In: what strategies found at equal budgets. Out: their plans, each trained with the seconds that its search left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hirelc_deploy.deliver.race import metric_record, parts_of
from hirelc_deploy.errors import InputError
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.evaluate.training import Training
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.results.comparison import Search
from hirelc_deploy.results.trained import Trained, side_by_side
from hirelc_deploy.strategies.knapsack import solve
from hirelc_deploy.strategies.problem import Problem

FOLDER = "after-training"
"""In the run's folder: weights and files of every plan that was trained for a comparison."""

WITHOUT_LOSSES = ("random", "taylor", "uniform")
"""Strategies that ask for no loss of single widths, so that these seconds are not theirs."""

CONTROL = "solver, all else training"
"""The solver's first answer, tried by nobody, whose training has all seconds but those of the table of losses."""


def check_trainable(pipeline: Pipeline) -> None:
    """Raise InputError where nothing can be trained, or nothing says what came of it."""
    if pipeline.effort.recovery is None:
        raise InputError("--after-training: this run trains nothing; give one with --recovery-epochs above 0.")
    if not pipeline.data.labelled:
        raise InputError("--after-training: these data have no labels, so nothing says what training gives back.")


def compared(pipeline: Pipeline, problem: Problem, searches: Sequence[Search], ours: str) -> dict[str, Any]:
    """Return what the plan of each search is after training, on all test images, beside those of `ours`.

    At each budget and seed every strategy has the seconds of `ours`: those of its search and of one whole recovery of
    its plan. What another search leaves of them goes into the training of its plan, so a shorter search trains longer.
    A search takes what evaluating its plans took whoever asked first, and the losses of single widths, if it uses them.
    """
    entrants = list(_entrants(pipeline, problem, searches, ours))
    files = [_file(pipeline, entrant, plan) for entrant, plan in entrants]
    ratios = [_ratio(pipeline, file) for file in files]
    images, task, backend = pipeline.data.take_test(), pipeline.task, pipeline.backend
    with pipeline.progress.stage("test split"):
        uncut = parts_of(backend.build(pipeline.files.reference, pipeline.threads), task, images)
        trained = [
            replace(entrant, ratio=ratio, parts=parts_of(backend.build(file, pipeline.threads), task, images))
            for (entrant, _), file, ratio in zip(entrants, files, ratios, strict=True)
        ]
    return {
        "metric": metric_record(task),
        "test_images": len(images),
        "uncut": task.value(uncut),
        "budgets": side_by_side(task, trained, ours),
    }


def _entrants(
    pipeline: Pipeline, problem: Problem, searches: Sequence[Search], ours: str
) -> Iterator[tuple[Trained, CompressionPlan]]:
    """Yield every plan with the epochs that the seconds allow, those of `ours` first at each budget and seed."""
    assert pipeline.effort.recovery is not None
    whole, tables = pipeline.effort.recovery.epochs, table_seconds(pipeline)
    found = {(search.seed, search.budget_ms, search.strategy): search for search in searches if search.best_plan}
    for seed, budget_ms in dict.fromkeys((search.seed, search.budget_ms) for search in searches):
        first = found.get((seed, budget_ms, ours))
        if first is None:
            raise InputError(f"--after-training: {ours} found no plan at {budget_ms:.3g} ms; allow more time.")
        plan, searching = CompressionPlan.from_dict(first.best_plan), _search_seconds(pipeline, first, tables)
        seconds = searching + whole * epoch_seconds(pipeline, plan)
        yield Trained(ours, seed, budget_ms, searching, whole), plan
        others = {name: search for (s, ms, name), search in found.items() if (s, ms) == (seed, budget_ms)}
        spent = {name: (_search_seconds(pipeline, one, tables), one.best_plan) for name, one in others.items()}
        spent[CONTROL] = tables, problem.plan_of(solve(problem, budget_ms)).to_dict()
        for name, (searching, text) in spent.items():
            if name == ours:
                continue
            other = CompressionPlan.from_dict(text)
            epochs = max(0.0, seconds - searching) / epoch_seconds(pipeline, other)
            yield Trained(name, seed, budget_ms, searching, float(f"{epochs:.3g}")), other


def _search_seconds(pipeline: Pipeline, search: Search, tables: float) -> float:
    """Return what a search took, as it was when it was first done; see `compared`."""
    key = f"seconds of {search.strategy}, seed {search.seed}, at {search.budget_ms:.6g} ms"
    thinking = float(pipeline.run.remember(key, lambda: search.thinking_seconds))
    return thinking + search.charged_seconds + (0.0 if search.strategy in WITHOUT_LOSSES else tables)


def table_seconds(pipeline: Pipeline) -> float:
    """Return what it took to judge single widths alone."""
    whole = {unit.name: unit.size for unit in pipeline.graph.units}
    alone = (
        trial.outcome
        for trial in pipeline.run.trials
        if trial.fidelity == "F1" and sum(width < whole.get(name, 0) for name, width in trial.plan.keep.items()) == 1
    )
    return sum(sum(outcome.seconds.values()) for outcome in alone)


def epoch_seconds(pipeline: Pipeline, plan: CompressionPlan) -> float:
    """Return what an epoch of a plan's recovery takes, from a few steps; journaled."""
    training = pipeline.training
    key = f"seconds of a training step of {plan.digest} on {pipeline.files.machine}"
    return training.steps(1.0) * float(pipeline.run.remember(key, lambda: training.step_seconds(plan)))


def _file(pipeline: Pipeline, entrant: Trained, plan: CompressionPlan) -> Path:
    """Return the file of a plan after its training; what is there is taken, and a training that stopped goes on."""
    assert pipeline.effort.recovery is not None
    place = f"{entrant.strategy}, seed {entrant.seed}, {entrant.budget_ms:.6g} ms, {entrant.epochs:.6g} epochs"
    files = pipeline.files.in_run(pipeline.run, f"{FOLDER}/{place}")
    path = files.file_of(plan, "F3")
    if path.exists():
        return path
    model = pipeline.cut(plan)
    if entrant.epochs > 0:
        effort = replace(pipeline.effort, recovery=replace(pipeline.effort.recovery, epochs=entrant.epochs))
        roundings = pipeline.training.roundings
        training = Training(pipeline.uncut, files, effort, entrant.seed, pipeline.progress, None, roundings)
        model = training.recovered(model, plan)
    return files.build(model, plan, "F3")


def _ratio(pipeline: Pipeline, path: Path) -> float:
    """Return the time of a file over that of the uncut float file; journaled."""
    files = pipeline.files
    key = f"time of {path.parent.name} on {files.machine}"
    return float(pipeline.run.remember(key, lambda: files.time([files.reference, path])[1].ratio))
