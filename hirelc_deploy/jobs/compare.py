"""In: a finished search. Out: strategies on its problem at equal evaluations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hirelc_deploy.config import JobConfig
from hirelc_deploy.deliver.finalists import Search
from hirelc_deploy.errors import InputError
from hirelc_deploy.jobs.after_training import check_trainable, compared
from hirelc_deploy.jobs.workplace import Workplace, table_path
from hirelc_deploy.measure.table import LatencyTable
from hirelc_deploy.results import comparison
from hirelc_deploy.strategies.baselines import ABLATIONS, STRATEGIES
from hirelc_deploy.time_left import CUT, F1, FILE

COMPARISON, COMPARISON_PAGE = "compare.json", "compare.html"


def check_comparison(config: JobConfig, strategies: Sequence[str], speedups: Sequence[float]) -> None:
    """Raise InputError for what a comparison cannot use, before anything is loaded."""
    if config.plan is not None:
        raise InputError("compare: this run was made by `apply`; give the folder of a search.")
    for name in strategies:
        if name not in STRATEGIES | ABLATIONS:
            raise InputError(f"--strategies {name!r} is unknown; use {', '.join(STRATEGIES | ABLATIONS)}.")
    if len(set(strategies)) < len(strategies):
        raise InputError("--strategies: a name is there twice; give each once.")
    for speedup in speedups:
        if not (math.isfinite(speedup) and speedup > 0):
            raise InputError(f"--speedups {speedup:g}: give finite numbers above 0.")


def run_compare(
    workplace: Workplace,
    strategies: Sequence[str],
    seeds: Sequence[int],
    speedups: Sequence[float],
    f1_evaluations: int,
    f2_evaluations: int,
    out: Path,
    *,
    trains: bool = False,
) -> dict[str, Any]:
    """Compare strategies on the problem of a run, write page and JSON to `out` and return the summary.

    Every evaluation goes through the run's journal, so an interrupted comparison resumes where it was.

    Args:
        trains: Their plans are trained too, at equal seconds of search and training together.
    """
    pipeline, config = workplace.pipeline, workplace.config
    if not pipeline.graph.units:
        raise InputError(f"compare: nothing of {workplace.source.spec} can be cut, so strategies have no choice.")
    search = Search(
        pipeline,
        workplace.run,
        LatencyTable(pipeline.backend, table_path(), pipeline.threads, pipeline.batch),
        config.limits,
        config.search,
    )
    problem = search.problem
    if trains:
        check_trainable(pipeline)
    searches, left = len(strategies) * len(seeds) * len(speedups), pipeline.progress.left
    left.expect_nothing()
    left.expect(F1, searches * f1_evaluations)
    left.expect(CUT, searches * f2_evaluations)
    left.expect(FILE, searches * f2_evaluations)
    budgets = [problem.uncut_ms / speedup for speedup in speedups]
    found = comparison.run_all(
        problem,
        budgets,
        strategies,
        seeds,
        pipeline.outcome,
        f1_evaluations=f1_evaluations,
        f2_evaluations=f2_evaluations,
        progress=pipeline.progress.say,
    )
    summary = comparison.summarise(found, problem.uncut_ms, strategies[0])
    summary |= {"command": workplace.command, "machine": workplace.run.machine, "model": workplace.source.spec}
    if trains:
        summary["after_training"] = compared(pipeline, problem, found, strategies[0])
    try:
        out.mkdir(parents=True, exist_ok=True)
        comparison.write_json(summary, out / COMPARISON)
        comparison.write_page(summary, f"Strategies on {workplace.source.spec}", out / COMPARISON_PAGE)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); give another --out.") from None
    return summary
