"""In: a pipeline of a device with several runtimes. Out: it works in that one where a cut network is fastest.

The fastest runtime for an uncut network need not be so for what is left of it: narrow layers meet other kernels. So
both are timed, and the cut one decides.
"""

from __future__ import annotations

from typing import Any

from hirelc_deploy.errors import ExportError, InputError
from hirelc_deploy.evaluate.files import Files
from hirelc_deploy.evaluate.network_time import uniform_keep
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.measure.protocol import QUICK, compare
from hirelc_deploy.measure.runtimes import SideBySide
from hirelc_deploy.plan import CompressionPlan

RUNTIMES = "runtimes of the device"
"""Name of the fact that says how fast each is; the first is the one that leads."""

LEFT = 0.625
"""Share of every unit that is left in the cut network."""


def choose_runtime(pipeline: Pipeline) -> list[dict[str, Any]]:
    """Let the fastest of the device's runtimes lead, as it was decided when it was asked first on this run.

    Returns:
        For each runtime, the fastest first, its name and the times of its uncut and its cut integer file, relative to
        the float file of the target's own runtime; nothing where there is one runtime, or nothing can be cut.
    """
    if not pipeline.others or not pipeline.graph.units:
        return []
    found: list[dict[str, Any]] = pipeline.run.remember(RUNTIMES, lambda: timed_runtimes(pipeline))
    take_up(pipeline)
    return found


def take_up(pipeline: Pipeline) -> None:
    """Let the runtime lead that a run is journaled to have been searched in; nothing is done where none is.

    Raises:
        InputError: It is not installed here.
    """
    found = pipeline.run.fact(RUNTIMES)
    if not found:
        return
    leading = found[0]["runtime"]
    if leading not in {files.backend.name for files in (pipeline.files, *pipeline.others)}:
        raise InputError(
            f"{pipeline.run.directory}: this run was searched in {leading}, which is not installed here; install it, "
            "or give another --out."
        )
    pipeline.search_in(leading)


def timed_runtimes(pipeline: Pipeline) -> list[dict[str, Any]]:
    """Return what `choose_runtime` does, timed side by side."""
    plan = CompressionPlan(uniform_keep(pipeline.graph, LEFT), default_precision="auto")
    model = pipeline.cut(plan)
    able: list[Files] = []
    for files in (pipeline.files, *pipeline.others):
        try:
            files.backend.build(files.build(model, plan, "F2"), files.threads)
        except (ExportError, InputError) as error:
            pipeline.progress.say(f"{files.backend.name} does not take a cut network: {error}")
        else:
            able.append(files)
    if not able:
        return []
    with pipeline.progress.stage("which runtime leads"):
        paths = {pipeline.files.reference: pipeline.files.backend}
        paths |= {path: files.backend for files in able for path in (files.placed, files.file_of(plan, "F2"))}
        timings = compare(list(paths), SideBySide(paths), threads=pipeline.threads, batch=pipeline.batch, limits=QUICK)
    ratio = {timing.file: timing.ratio for timing in timings}
    rows: list[dict[str, Any]] = [
        {"runtime": files.backend.name, "uncut": ratio[files.placed], "cut": ratio[files.file_of(plan, "F2")]}
        for files in able
    ]
    rows.sort(key=lambda row: row["cut"])
    told = ", ".join(f"{row['runtime']} {1 / row['cut']:.2f} (uncut {1 / row['uncut']:.2f})" for row in rows)
    pipeline.progress.say(f"times faster than the float file, cut to {LEFT:g} of its widths: {told}")
    return rows
