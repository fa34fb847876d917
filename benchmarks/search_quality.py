"""Question: which strategy finds the best plans with equally many evaluations, and what is each part of ours worth?

    python benchmarks/search_quality.py demo --run runs/quality-demo --name search_quality-demo
    python benchmarks/search_quality.py job.toml --run runs/quality-vit --name search_quality-vit

MODEL is `demo` or the config.toml of a search. Every evaluation is kept in the journal of --run and shared: a study
that was interrupted, or stopped after --seconds (exit code 75), goes on with the same command. To make it affordable F1
uses --images selection images and half as many for batch-norm statistics; all strategies see the same ones.

--files N also writes, runs and times the best N plans of every search as integer files (F2; give it a quiet machine).
Settings of hirelc were chosen on seeds 0 to 7, so a comparison should begin at another one, with --first-seed.
--finals trains the first seed's best plan of hirelc, knapsack and uniform at each budget for the epochs of the job (F3)
and answers the test split with the files: what the search is for, read once, after everything was chosen.

The result, with machine, versions, command and date, goes to benchmarks/results/NAME.json, the page to the folder of
the run as compare.html.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from answers import drop, on_test_split
from effort import set_effort

from hirelc_deploy.config import JobConfig
from hirelc_deploy.demo import demo_config
from hirelc_deploy.evaluate import network_time, tables
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.jobs.workplace import open_workplace, table_path
from hirelc_deploy.measure.machine import describe
from hirelc_deploy.measure.table import LatencyTable
from hirelc_deploy.outcome import Fidelity, Measured, Outcome
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.progress import Progress
from hirelc_deploy.results import comparison
from hirelc_deploy.results.agreement import agreement
from hirelc_deploy.strategies.baselines import ABLATIONS, STRATEGIES
from hirelc_deploy.strategies.problem import Problem
from hirelc_deploy.strategies.surrogate import rank_correlation

FINALISTS = ("hirelc", "knapsack", "uniform")
RESULTS = Path(__file__).resolve().parent / "results"
TO_BE_CONTINUED = 75


class OutOfTimeError(Exception):
    """The seconds of this call are used; the journal holds what was done."""


def sensitivity(pipeline: Pipeline, problem: Problem) -> dict[str, Any]:
    """Return how well the Fisher sum of what a width removes ranks the measured losses of single options."""
    fisher, measured, units = [], [], []
    for decision in problem.decisions:
        widths = [int(option) for option in decision.options]
        removed = tables.removed_fisher(pipeline.uncut.scores[decision.name], widths)
        for width, predicted in zip(widths[:-1], removed[:-1], strict=True):
            plan = CompressionPlan({decision.name: width}, default_precision="auto")
            known = [t.outcome for t in pipeline.run.trials if t.plan.digest == plan.digest and t.fidelity == "F1"]
            if known and isinstance(known[0], Measured):
                fisher.append(float(predicted))
                measured.append(known[0].loss)
                units.append(decision.name)
    own = [
        rank_correlation(np.array(fisher)[rows], np.array(measured)[rows])
        for name in dict.fromkeys(units)
        if (rows := np.flatnonzero(np.array(units) == name)).size > 2
    ]
    return {
        "options": len(measured),
        "spearman_over_all": rank_correlation(np.array(fisher), np.array(measured)),
        "spearman_within_units_median": float(np.median(own)) if own else None,
    }


def surrogate(searches: Sequence[comparison.Search]) -> dict[str, Any]:
    """Return how well the surrogate foresaw, batch by batch, what was measured afterwards, and when it was trusted."""
    by_round: dict[int, list[dict[str, Any]]] = {}
    for search in searches:
        if search.strategy == "hirelc":
            for index, one in enumerate(search.record["rounds"]):
                by_round.setdefault(index, []).append(one)
    return {
        f"batch {index + 1}": {
            "searches": len(rounds),
            "trusted_after": sum(one["trusted"] for one in rounds),
            "held_out_spearman": float(np.mean([one["correlation"] for one in rounds])),
            "held_out_error_log": float(np.mean([one["error"] for one in rounds])),
            "foreseen_error_log": float(
                np.nanmean([abs(a - b) for one in rounds for a, b in zip(one["foreseen"], one["found"], strict=True)])
            ),
        }
        for index, rounds in sorted(by_round.items())
    }


def budgets(searches: Sequence[comparison.Search]) -> dict[str, Any]:
    """Return how the HLA's prices and budgets moved in searches of hirelc, and whether feedback explains it.

    Per budget the mean over seeds, block by block: expected octaves above the common price after the last batch (0
    before the first), milliseconds handed out by the solver's answer's batch and by the best plan at the end, and the
    log loss that the block was found to cost more than the tables said. The rank correlations are over all blocks.
    """
    found: dict[str, Any] = {}
    ours = [search for search in searches if search.strategy == "hirelc"]
    for budget_ms in sorted({search.budget_ms for search in ours}, reverse=True):
        rounds = [search.record["rounds"] for search in ours if search.budget_ms == budget_ms]
        octaves, feedback = (np.mean([one[-1][key] for one in rounds], axis=0) for key in ("octaves", "feedback"))
        before, after = (np.mean([one[at]["budgets_ms"] for one in rounds], axis=0) for at in (0, -1))
        found[f"{budget_ms:.4g} ms"] = {
            "blocks": {
                block: {"octaves": o, "ms_before": b, "ms_after": a, "costs_more": f}
                for block, o, b, a, f in zip(ours[0].record["blocks"], octaves, before, after, feedback, strict=True)
            },
            "spearman_price_and_costs_more": rank_correlation(octaves, feedback),
            "spearman_moved_ms_and_costs_more": rank_correlation(after - before, feedback),
        }
    return found


def finals(pipeline: Pipeline, searches: Sequence[comparison.Search]) -> list[dict[str, Any]]:
    """Return what the first seed's plans of FINALISTS are after recovery: ratio, bytes, and drop on the test split."""
    first = min(s.seed for s in searches)
    chosen = [s for s in searches if s.seed == first and s.strategy in FINALISTS]
    outcomes = [(s, pipeline.outcome(CompressionPlan.from_dict(s.best_plan), "F3")) for s in chosen]
    plans = [CompressionPlan.from_dict(search.best_plan) for search, _ in outcomes]
    files = {
        plan.digest: pipeline.files.file_of(plan, "F3") for plan in plans if pipeline.files.file_of(plan, "F3").exists()
    }
    right = on_test_split(pipeline, {"uncut": pipeline.files.reference, **files})
    found = []
    for plan, (search, outcome) in zip(plans, outcomes, strict=True):
        one: dict[str, Any] = {"strategy": search.strategy, "budget_ms": search.budget_ms, "plan": plan.to_dict()}
        if isinstance(outcome, Measured):
            one |= drop(right["uncut"], right[plan.digest])
            one |= {key: getattr(outcome, key) for key in ("ratio", "ratio_low", "ratio_high", "size_bytes", "params")}
        found.append(one)
    return [{"strategy": "uncut", "accuracy": float(right["uncut"].mean())}, *found]


def main() -> int:
    """Run, or go on with, the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--strategies", nargs="*", default=[*STRATEGIES, *ABLATIONS])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0, help="settings were chosen on seeds 0 to 7")
    parser.add_argument("--speedups", type=float, nargs="*", default=[1.4, 2.0], help="over the uncut integer file")
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--options", type=int, default=8, help="widths per unit")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--files", type=int, default=0, metavar="N", help="plans of each search that become files")
    parser.add_argument("--finals", action="store_true")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    options = parser.parse_args()
    started = time.monotonic()
    torch.set_num_threads(1)
    config = demo_config(0) if options.model == "demo" else JobConfig.read(Path(options.model))
    command = " ".join(["python", "benchmarks/search_quality.py", *sys.argv[1:]])
    workplace = open_workplace(config, options.run, command, Progress(quiet=False))
    pipeline = workplace.pipeline
    set_effort(pipeline, search_images=options.images, norm_images=options.images // 2)

    def evaluate(plan: CompressionPlan, fidelity: Fidelity) -> Outcome:
        if time.monotonic() - started > options.seconds:
            raise OutOfTimeError
        return pipeline.outcome(plan, fidelity)

    with workplace.run:
        table = LatencyTable(pipeline.backend, table_path(), pipeline.threads)
        network, fit = network_time.fit_network_time(pipeline, table)
        network_time.measure_table(pipeline, network, options.options)
        problem = tables.build_problem(pipeline, network, options=options.options)
        try:
            searches = comparison.run_all(
                problem,
                [problem.uncut_ms / speedup for speedup in options.speedups],
                options.strategies,
                range(options.first_seed, options.first_seed + options.seeds),
                evaluate,
                f1_evaluations=options.trials,
                f2_evaluations=options.files,
                progress=lambda text: print(text, flush=True),
            )
        except OutOfTimeError:
            print(f"{len(pipeline.run.trials)} evaluations in the journal; the same command goes on.")
            return TO_BE_CONTINUED
        summary = comparison.summarise(searches, problem.uncut_ms, "hirelc")
        seconds = sum(sum(t.outcome.seconds.values()) for t in pipeline.run.trials if t.fidelity == "F1")
        facts = {
            "model": options.model,
            "images": options.images,
            "trials": options.trials,
            "decisions": {d.name: [int(option) for option in d.options] for d in problem.decisions},
            "f1_evaluations_made": sum(t.fidelity == "F1" for t in pipeline.run.trials),
            "f1_seconds_each": seconds / max(1, sum(t.fidelity == "F1" for t in pipeline.run.trials)),
            "latency_model": fit,
            "sensitivity": sensitivity(pipeline, problem),
            "agreement": agreement(problem, pipeline.run.trials, pipeline.files.reference_ms),
            "surrogate": surrogate(searches),
            "budgets": budgets(searches),
            "finals": finals(pipeline, searches) if options.finals else [],
        }
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    record = {
        "name": options.name,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit.stdout.strip(),
        "command": command,
        "machine": describe(pipeline.backend),
        **facts,
        **{key: value for key, value in summary.items() if key != "searches"},
        "best_losses": [
            {"strategy": s.strategy, "seed": s.seed, "budget_ms": s.budget_ms, "loss": s.best_loss} for s in searches
        ],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{options.name}.json").write_text(json.dumps(record, indent=1, default=float) + "\n", "utf-8")
    comparison.write_page(summary, f"Strategies on {options.model}", options.run / "compare.html")
    for name, found in sorted(summary["strategies"].items(), key=lambda item: item[1]["best_loss_mean"]):
        test = found.get("against_ours", {"log_ratio": 0.0, "p": float("nan"), "better": 0, "worse": 0})
        print(
            f"{name:<28} {found['best_loss_mean']:.4f}  ours/it {np.exp(test['log_ratio']):.3f}  p {test['p']:.4f}  "
            f"better {test['better']} worse {test['worse']}  volume {found['hypervolume']:.3f}  "
            f"thinking {found['thinking_seconds_per_search']:.2f} s"
        )
    for key in ("sensitivity", "agreement", "surrogate", "budgets"):
        print(key, json.dumps(facts[key], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
