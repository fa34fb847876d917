"""In: a workplace. Out: the fastest file that keeps the limits, delivered."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from hirelc_deploy.config import Limits
from hirelc_deploy.deliver.finalists import Finalist, Search, no_more_finalists, planned
from hirelc_deploy.deliver.limits import appetite, drop_error, keeps_limits, too_few_images
from hirelc_deploy.deliver.race import Contender
from hirelc_deploy.errors import ConstraintError, InputError
from hirelc_deploy.evaluate.leading import choose_runtime
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.jobs.library import LIBRARY
from hirelc_deploy.jobs.shipping import deliver
from hirelc_deploy.jobs.workplace import Workplace, finished, table_path
from hirelc_deploy.measure.protocol import Timing
from hirelc_deploy.measure.table import LatencyTable
from hirelc_deploy.outcome import Measured
from hirelc_deploy.results.agreement import agreement
from hirelc_deploy.runs import RESULT


def run_search(workplace: Workplace) -> dict[str, Any]:
    """Search, deliver and return the result record; a finished run only returns what it found."""
    pipeline, run, config = workplace.pipeline, workplace.run, workplace.config
    if (run.directory / RESULT).exists():
        return finished(run.directory)
    started = time.monotonic()
    for doubt in filter(None, (pipeline.uncut.doubt, too_few_images(pipeline, config.limits.max_drop))):
        pipeline.progress.say(f"warning: {doubt}")
    keeps = unpruned_limits(pipeline, config.limits)
    if not pipeline.graph.units:
        no_more_finalists(pipeline, *planned(pipeline, config.limits, config.search))
        try:
            return deliver(workplace, None, {}, started, keeps=keeps, max_drop=config.limits.max_drop)
        except ConstraintError as error:
            raise ConstraintError(f"search: nothing can be cut; {error} Allow a larger drop, or more time.") from None
    path = table_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{path.parent}: this folder for layer times cannot be made ({error.strerror}); "
            "set HIRELC_DEPLOY_CACHE to a folder that can be written."
        ) from None
    runtimes = choose_runtime(pipeline)
    table = LatencyTable(pipeline.backend, path, pipeline.threads, pipeline.batch)
    search = Search(pipeline, run, table, config.limits, config.search)
    finalists = search.finalists()
    fit = [f for f in finalists if f.keeps_limits]
    chosen = min(fit, key=lambda f: f.outcome.ratio or 1.0) if fit else None
    taken = run.fact(LIBRARY)
    facts = {
        **({} if taken is None else {"library": taken}),
        "search": {
            "strategy": config.search.strategy,
            **{name: sum(t.fidelity == name.upper() for t in run.trials) for name in ("f1", "f2", "f3")},
            "overhead_seconds": sum(s.seconds - s.seconds_evaluating for s in search.searches),
            "seconds": sum(s.seconds for s in search.searches),
        },
        "latency_model": search.fit,
        "runtimes": runtimes,
        "agents": search.records,
        "agreement": agreement(search.problem, run.trials, pipeline.files.reference_ms),
        "finalists": [finalist_record(f) for f in finalists],
    }
    try:
        plan = chosen.plan if chosen else None
        return deliver(workplace, plan, facts, started, keeps=keeps, max_drop=config.limits.max_drop)
    except ConstraintError as error:
        raise ConstraintError(
            f"search: {error}{closest_plan(pipeline, finalists, config.limits.max_drop)} "
            "Allow a larger drop, more time, more bytes, memory or energy, or more recovery epochs."
        ) from None


def closest_plan(pipeline: Pipeline, finalists: Sequence[Finalist], max_drop: float | None) -> str:
    """Return the sentences about the finalist that lost least, where none keeps the limits; empty without any."""
    if not finalists:
        return ""
    closest, unit = min(finalists, key=lambda f: f.drop_points), pipeline.task.metric.unit
    says = (
        f" The closest plan is {1 / (closest.outcome.ratio or 1.0):.2f} times faster than the float file at a drop "
        f"of {closest.drop_points:.2f} {unit} (standard error {closest.drop_error:.2f}) on the selection split; "
        f"its file, of {closest.outcome.size_bytes:,} bytes, is {pipeline.files.file_of(closest.plan, 'F3')}."
    )
    if closest.peak_memory_bytes is not None:
        says += f" Its process takes {closest.peak_memory_bytes:,} bytes of memory at most."
    if closest.energy_mj is not None:
        says += f" One inference draws {closest.energy_mj:.3g} mJ."
    if max_drop is not None and closest.drop_points <= max_drop < closest.drop_points + closest.drop_error:
        says += (
            " A drop must keep its limit by one standard error, which more than these "
            f"{len(pipeline.data.selection)} selection images make smaller."
        )
    return says


def unpruned_limits(pipeline: Pipeline, limits: Limits) -> Callable[[Contender, Timing], bool]:
    """Return what tells whether an unpruned file keeps the limits of a search."""

    def keeps(file: Contender, timing: Timing) -> bool:
        size = file.path.stat().st_size
        outcome = Measured(file.plan.digest, "F2", 0.0, None, 0, 0, ratio=timing.ratio, size_bytes=size)
        points = error = 0.0
        if file.path != pipeline.files.reference:  # which is what a drop is counted from
            drop = file.home(pipeline).file_drop(file.path)
            points, error = drop.points, drop_error(drop)
        memory, energy = appetite(limits, file.home(pipeline), file.path)
        return keeps_limits(limits, outcome, points, error, pipeline.files.reference_ms, memory, energy)

    return keeps


def finalist_record(finalist: Finalist) -> dict[str, Any]:
    """Return a finalist as JSON values."""
    return {
        "plan": finalist.plan.digest,
        "ratio": finalist.outcome.ratio,
        "drop_points": finalist.drop_points,
        "drop_error": finalist.drop_error,
        "keeps_limits": finalist.keeps_limits,
        "peak_memory_bytes": finalist.peak_memory_bytes,
        "energy_mj": finalist.energy_mj,
    }
