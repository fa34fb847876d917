"""Question: do agents that have searched one model, or budget, find better plans on another than agents that have not?

    python benchmarks/transfer.py there.toml there-run here.toml here-run --seeds 5 --trials 24 > transfer.json

The runs are those of search_quality.py (or new folders): tables and evaluations are answered from their journals, or
measured. Agents search `there` with --first-speedup; their shared networks are kept. Then every seed searches `here`
with --speedup twice, with equally many evaluations: cold, and with what was learned, taken over after ten plans where
it ranks those well. Losses are F1: sliced and compensated, before any training.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from effort import set_effort
from record import provenance

from hirelc_deploy.config import JobConfig
from hirelc_deploy.evaluate import network_time, tables
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.jobs.workplace import open_workplace, table_path
from hirelc_deploy.measure.table import LatencyTable
from hirelc_deploy.outcome import Measured
from hirelc_deploy.progress import Progress
from hirelc_deploy.results.comparison import paired_test
from hirelc_deploy.strategies.hierarchy import Hierarchy
from hirelc_deploy.strategies.loop import run_search
from hirelc_deploy.strategies.problem import Problem
from hirelc_deploy.strategies.transfer import Weights, shared_weights


def opened(config: Path, run: Path, images: int) -> tuple[Pipeline, Problem]:
    """Return a model's pipeline and problem, as search_quality.py makes them."""
    pipeline = open_workplace(JobConfig.read(config), run, "", Progress()).pipeline
    set_effort(pipeline, search_images=images, norm_images=images // 2)
    table = LatencyTable(pipeline.backend, table_path(), pipeline.threads)
    network, _ = network_time.fit_network_time(pipeline, table)
    network_time.measure_table(pipeline, network, 8)
    return pipeline, tables.build_problem(pipeline, network, options=8)


def searched(
    pipeline: Pipeline, problem: Problem, speedup: float, trials: int, seed: int, elsewhere: Weights | None = None
) -> tuple[Hierarchy, list[float]]:
    """Return the agents after a search, and the least loss after each evaluation."""
    strategy = Hierarchy(problem, problem.uncut_ms / speedup, seed)
    strategy.elsewhere = elsewhere
    result = run_search(problem, strategy, pipeline.outcome, f1_evaluations=trials, f2_evaluations=0)
    losses = [t.outcome.loss if isinstance(t.outcome, Measured) else np.inf for t in result.trials]
    return strategy, np.minimum.accumulate(losses).tolist()


def main() -> int:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("there", "there_run", "here", "here_run"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--first-speedup", type=float, default=1.4)
    parser.add_argument("--speedup", type=float, default=2.0)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--images", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipeline, problem = opened(options.there, options.there_run, options.images)
    teacher, curve = searched(pipeline, problem, options.first_speedup, options.trials, 0)
    learned = shared_weights(teacher.agents)
    print("there", curve[0], curve[-1], file=sys.stderr, flush=True)
    if options.here_run != options.there_run:
        pipeline.run.close()
        pipeline, problem = opened(options.here, options.here_run, options.images)
    runs: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        for name, elsewhere in (("cold", None), ("warm", learned)):
            strategy, curve = searched(pipeline, problem, options.speedup, options.trials, seed, elsewhere)
            verdict = None if strategy.verdict is None else vars(strategy.verdict)
            runs.append({"start": name, "seed": seed, "curve": curve, "verdict": verdict})
            print(name, seed, curve[-1], verdict, file=sys.stderr, flush=True)
    best = {
        name: {r["seed"]: float(np.log(r["curve"][-1])) for r in runs if r["start"] == name}
        for name in ("cold", "warm")
    }
    record = {
        **provenance(shlex.join(["python", *sys.argv])),
        "best_loss_cold": float(np.exp(np.mean([*best["cold"].values()]))),
        "best_loss_warm": float(np.exp(np.mean([*best["warm"].values()]))),
        "warm_against_cold": paired_test(best["warm"], best["cold"]),
        "runs": runs,
    }
    print(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
