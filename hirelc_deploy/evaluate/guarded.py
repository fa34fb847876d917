"""In: a pipeline and the points that may be lost. Out: the uncut model's fastest integer file that keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hirelc_deploy.compress.integer import guard
from hirelc_deploy.compress.integer.guard import Guarded
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.outcome import Measured
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.tasks.paired import Z_95, PairedDrop


def guarded(pipeline: Pipeline, max_drop: float) -> tuple[CompressionPlan, Guarded]:
    """Return the uncut model's plan whose integer file loses at most `max_drop` points, and its price.

    Judged on the selection split, one standard error included, as finalists are; see `guard.guard`. Where there is
    a training split, and recovery is wanted, it is also the recovery of the placed file that may keep the drop.

    Raises:
        ConstraintError: Neither training nor turning layers back helps enough.
    """
    files = pipeline.files
    placed = files.placement
    always = frozenset(placed.float_layers) | files.writer.by_layer.in_float
    timed = {name: found["ratio"] for name, found in placed.candidates.items() if name in files.writer.form.patterns}
    patterns = sorted(timed, key=lambda name: (name != placed.pattern, timed[name]))
    parts = [*(layer.name for layer in pipeline.graph.layers), *placed.ends]
    layers = [part for part in parts if part not in always]
    trains = pipeline.effort.recovery and len(pipeline.data.train) > 1 and pipeline.trains_placed
    trials = guard.Trials(
        lambda pattern, floats: files.trial(pattern, floats | always),
        files.divergence,
        lambda path: drop_with_error(files.file_drop(path)),
        files.milliseconds,
        (lambda: placed_trained(pipeline)) if trains else None,
    )

    def measure() -> dict[str, Any]:
        with pipeline.progress.stage("accuracy guard"):
            return guard.guard(patterns, layers, trials, max_drop).to_dict()

    found = Guarded.from_dict(pipeline.run.remember(guard_key(pipeline, max_drop), measure))
    floats = [step.layer for step in found.reverted]
    pattern = "" if found.pattern == placed.pattern else found.pattern
    precision = dict.fromkeys(floats, "float")
    return CompressionPlan({}, precision, "auto", pattern, trained_rounding=found.trained), found


def guard_key(pipeline: Pipeline, max_drop: float) -> str:
    """Return the name under which a run remembers what its guard found."""
    return f"accuracy guard at {max_drop:g} on {pipeline.files.machine}"


def guarded_file(pipeline: Pipeline, plan: CompressionPlan) -> Path:
    """Return the file of a plan that `guarded` returned."""
    if plan.trained_rounding:
        return pipeline.files.file_of(plan, "F3")
    return pipeline.files.build(pipeline.cut(plan), plan, "F2")


def placed_trained(pipeline: Pipeline) -> Path | None:
    """Return the placed file of weights that were trained while they were rounded; None where it cannot be made."""
    plan = CompressionPlan(default_precision="auto", trained_rounding=True)
    outcome = pipeline.outcome(plan, "F3")
    if isinstance(outcome, Measured):
        return pipeline.files.file_of(plan, "F3")
    pipeline.progress.say(f"accuracy guard: training the placed file failed: {outcome.reason}")
    return None


def drop_with_error(found: PairedDrop) -> float:
    """Return the points lost and one standard error, from the 95 % interval."""
    return found.points + (found.high - found.low) / (2 * Z_95)
