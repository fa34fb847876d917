"""In: a model's graph and a target. Out: milliseconds against width of every unit, kept for later searches."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.model_graph import ModelGraph
from hirelc_deploy.jobs.workplace import table_path
from hirelc_deploy.measure.backend import Backend
from hirelc_deploy.measure.machine import describe
from hirelc_deploy.measure.table import LatencyTable
from hirelc_deploy.progress import Progress
from hirelc_deploy.results.staircase import stairs_of, wanted_keys
from hirelc_deploy.results.staircase_page import staircase_page
from hirelc_deploy.runs import json_text, write_atomic


def profile_model(
    graph: ModelGraph,
    backend: Backend,
    out: Path,
    title: str,
    *,
    threads: int,
    batch: int,
    steps: int,
    fresh: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Measure the stairs of every unit into the table that searches read; write them to `out` as JSON and as a page."""
    started = time.monotonic()
    table = LatencyTable(backend, table_path(), threads, batch)
    precisions = [precision.name for precision in backend.precisions() if precision.name in ("float", "int8")]
    wanted = wanted_keys(graph, precisions, steps)
    adoption = None if fresh else table.adopt(wanted)
    for _ in progress.track(table.measure_missing(wanted), "layer times", len(wanted)):
        pass
    stairs = stairs_of(graph, table, precisions, steps)
    machine = describe(backend)
    facts = {
        "device": machine["cpu_model"],
        "runtime": ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        "images at a time": batch,
        "units": f"{len(graph.units)}, of {len(stairs)} kinds",
        "layer times": f"{len(wanted)} distinct, {table.measured} measured now",
        "minutes": round((time.monotonic() - started) / 60, 2),
    }
    if adoption is not None:
        facts["another machine's times"] = (
            f"{adoption.checks} fresh measurements differ by {adoption.median_difference:.1%} in the median, "
            f"{adoption.largest_difference:.1%} at most: {adoption.adopted or 'none'} taken from {adoption.machine}"
        )
    record = {
        "schema_version": 1,
        "title": title,
        "facts": facts,
        "machine": machine,
        "adoption": None if adoption is None else vars(adoption),
        "stairs": [one.to_dict() for one in stairs],
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "staircase.json", json_text(record, indent=1))
        write_atomic(out / "staircase.html", staircase_page(title, stairs, facts))
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); choose another folder with --out.") from None
    return record
