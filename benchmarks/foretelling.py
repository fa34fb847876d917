"""Question: of plans that take equally long, what foretells before or early in training how they stand after it?

    python benchmarks/foretelling.py job.toml --run runs/foretelling --name foretelling-resnet18 --speedups 1.8 3.6
    python benchmarks/foretelling.py job.toml --run runs/foretelling-2 --name foretelling-resnet18-long \\
        --speedups 1.8 3.6 --epochs 2 --plans-of foretelling-resnet18 --best 4

JOB is the TOML of a search. At each of --speedups, over the uncut integer file by the layer table, there are plans of
one predicted time from several proposers: hirelc, knapsack and greedy with --trials F1 evaluations each, the solver's
first answer, group Taylor, uniform widths, random ones, and mutants of the solver's answer. Each is recovered for
--epochs. On the way, after --rungs epochs of that same training, its averaged weights are judged on the selection
split, and so is a short training of its own that ends there. At the end its integer file answers the whole test split.

For every score that could choose among the plans (F1's loss; the sum of the table's losses; the loss at each rung) the
record has Spearman's correlation within one budget with the accuracy at the end, with the interval of resampled plans.
With --singles EPOCHS there is also the sum of a table in which the network of each single option was recovered for so
long: dear, but it belongs to model and data and would serve every budget. Nothing is selected on
the test split: it only says afterwards which score was right. --plans-of trains the best plans of a record for longer,
to see whether their order stays.

Everything is journaled in --run: an interrupted study goes on with the same command. Training of another length belongs
in another --run. The result goes to benchmarks/results/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from answers import on_test_split
from effort import set_effort
from numpy.typing import NDArray
from record import RESULTS, provenance

from hirelc_deploy.config import JobConfig
from hirelc_deploy.evaluate import network_time, tables
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.jobs.workplace import open_workplace, table_path
from hirelc_deploy.measure.table import LatencyTable
from hirelc_deploy.outcome import Measured
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.progress import Progress
from hirelc_deploy.results import comparison
from hirelc_deploy.strategies.baselines import RandomChoices, Taylor, Uniform
from hirelc_deploy.strategies.hierarchy import neighbours
from hirelc_deploy.strategies.knapsack import solve, tables_of
from hirelc_deploy.strategies.problem import Problem
from hirelc_deploy.strategies.surrogate import rank_correlation

SEARCHED = ("hirelc", "knapsack", "greedy")
RANDOM, MUTANTS = 2, 3
RESAMPLES = 2000


@dataclass(frozen=True)
class Row:
    """One plan of one budget, and all that was learned of it.

    Attributes:
        scores: Name of a score to the loss it gives, in nats; less is better.
        loss: Of the file on the selection split after the whole recovery.
        accuracy: Of the file on the test split, likewise.
    """

    proposer: str
    speedup: float
    plan: Mapping[str, Any]
    predicted_ms: float
    scores: Mapping[str, float]
    loss: float
    accuracy: float


def proposals(pipeline: Pipeline, problem: Problem, budget_ms: float, trials: int) -> dict[str, CompressionPlan]:
    """Return plans of one budget by proposer, each plan once."""
    rng = np.random.default_rng(pipeline.seed)
    searches = comparison.run_all(
        problem,
        [budget_ms],
        SEARCHED,
        [pipeline.seed],
        pipeline.outcome,
        f1_evaluations=trials,
        progress=pipeline.progress.say,
    )
    answer = solve(problem, budget_ms)
    near = neighbours(problem, answer, budget_ms)
    fast = problem.predict_batch(near)
    same_time = near[np.argsort(budget_ms - fast, kind="stable")[: 10 * MUTANTS]]  # the nearest below the budget
    mutants = same_time[rng.permutation(len(same_time))[:MUTANTS]]
    found = {search.strategy: CompressionPlan.from_dict(search.best_plan) for search in searches}
    found |= {
        f"{search.strategy}, other branches": CompressionPlan.from_dict(search.rivals[1])
        for search in searches
        if search.strategy == SEARCHED[0] and len(search.rivals) > 1
    }
    drawn = RandomChoices(problem, budget_ms, pipeline.seed).propose(RANDOM)
    chosen = {
        "solver": answer,
        "group Taylor": Taylor(problem, budget_ms).propose(1)[0],
        "uniform": Uniform(problem, budget_ms).propose(1)[0],
        **{f"random {number}": choices for number, choices in enumerate(drawn, 1)},
        **{f"mutant {number}": choices for number, choices in enumerate(mutants, 1)},
    }
    found |= {name: problem.plan_of(choices) for name, choices in chosen.items()}
    first = {plan.digest: name for name, plan in reversed(found.items())}
    return {name: plan for name, plan in found.items() if first[plan.digest] == name}


def recovered_singles(pipeline: Pipeline, problem: Problem, epochs: float) -> Problem:
    """Return the problem with losses after a recovery of so many epochs of each option alone; journaled."""
    decisions = []
    for decision in problem.decisions:
        plans = [
            CompressionPlan({decision.name: int(width)}, default_precision="auto") for width in decision.options[:-1]
        ]
        losses = [pipeline.training.loss_after(plan, epochs) for plan in plans]
        decisions.append(replace(decision, loss=np.array([*losses, 0.0])))
    return replace(problem, decisions=tuple(decisions))


def summed(problem: Problem, plan: CompressionPlan) -> float:
    """Return the sum of the losses of a plan's options, each alone."""
    choices = problem.choices_of(plan)
    return float("inf") if choices is None else tables_of(problem).additive_loss(choices)


def scores_of(
    pipeline: Pipeline, plan: CompressionPlan, rungs: Sequence[float], problems: Mapping[str, Problem]
) -> dict[str, float]:
    """Return what each score says of a plan: F1 before training, sums of tables, then the loss at every rung.

    At a rung both ways are judged: the whole recovery's averaged weights there, and a short recovery that ends there.
    """
    outcome = pipeline.outcome(plan, "F1")
    recovery = pipeline.effort.recovery
    assert recovery is not None
    found = {"F1": outcome.loss if isinstance(outcome, Measured) else float("inf")}
    found |= {name: summed(problem, plan) for name, problem in problems.items()}
    for epochs in sorted(rungs):
        found[f"{epochs:g} epochs, goes on"] = pipeline.training.loss_at(plan, epochs / recovery.epochs)
        found[f"{epochs:g} epochs, ends"] = pipeline.training.loss_after(plan, epochs)
    return found


def foretold(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Return for every score its rank correlation with the accuracy at the end, with a 95 % interval.

    Signs are such that 1 is a perfect score. The interval is of resampled plans.
    """
    final = np.array([row.accuracy for row in rows])
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(rows), (RESAMPLES, len(rows)))
    found = {}
    for name in rows[0].scores:
        score = -np.array([row.scores[name] for row in rows])
        spread = [rank_correlation(score[sample], final[sample]) for sample in drawn]
        low, high = np.percentile(spread, [2.5, 97.5])
        chosen = int(score.argmax())
        found[name] = {
            "correlation": rank_correlation(score, final),
            "low": float(low),
            "high": float(high),
            "regret_points": float(100 * (final.max() - final[chosen])),
        }
    return found


def plans_of(name: str, speedup: float, best: int) -> dict[str, CompressionPlan]:
    """Return the plans of a record that ended best on the selection split, by proposer."""
    record = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    rows = sorted((row for row in record["rows"] if row["speedup"] == speedup), key=lambda row: row["loss"])
    return {row["proposer"]: CompressionPlan.from_dict(row["plan"]) for row in rows[:best]}


def accuracies(pipeline: Pipeline, files: Mapping[str, Path]) -> dict[str, float]:
    """Return the accuracy of each file on the whole test split."""
    right: dict[str, NDArray[np.bool_]] = on_test_split(pipeline, files)
    return {name: float(values.mean()) for name, values in right.items()}


def main() -> int:
    """Train what is missing, judge, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--speedups", type=float, nargs="+", required=True, help="over the uncut integer file")
    parser.add_argument("--trials", type=int, default=24, help="F1 evaluations of each search")
    parser.add_argument("--epochs", type=float, default=0.5)
    parser.add_argument("--rungs", type=float, nargs="+", default=[0.05, 0.15], help="epochs")
    parser.add_argument("--images", type=int, default=256, help="selection images that judge an F1 evaluation")
    parser.add_argument("--singles", type=float, help="epochs of a recovery of each option alone")
    parser.add_argument("--plans-of", metavar="NAME", help="take the plans of this record")
    parser.add_argument("--best", type=int, default=4, help="so many of them")
    options = parser.parse_args()
    config = replace(JobConfig.read(options.job), recovery_epochs=options.epochs)
    command = " ".join(["python", "benchmarks/foretelling.py", *sys.argv[1:]])
    workplace = open_workplace(config, options.run, command, Progress())
    pipeline = workplace.pipeline
    set_effort(pipeline, search_images=options.images, norm_images=options.images // 2)
    with workplace.run:
        table = LatencyTable(pipeline.backend, table_path(), pipeline.threads)
        network, fit = network_time.fit_network_time(pipeline, table)
        network_time.measure_table(pipeline, network)
        problem = tables.build_problem(pipeline, network)
        problems = {"sum of the table": problem}
        if options.singles:
            name = f"sum of singles after {options.singles:g} epochs"
            problems[name] = recovered_singles(pipeline, problem, options.singles)
        found: list[tuple[str, float, CompressionPlan, dict[str, float], float]] = []
        for speedup in options.speedups:
            if options.plans_of:
                plans = plans_of(options.plans_of, speedup, options.best)
            else:
                plans = proposals(pipeline, problem, problem.uncut_ms / speedup, options.trials)
            for name, plan in plans.items():
                scores = scores_of(pipeline, plan, options.rungs, problems)
                outcome = pipeline.outcome(plan, "F3")
                if not isinstance(outcome, Measured):
                    raise SystemExit(f"{name}: {outcome.stage} says: {outcome.reason}")
                found.append((name, speedup, plan, scores, outcome.loss))
        files = {f"{name} at {speedup:g}": pipeline.files.file_of(plan, "F3") for name, speedup, plan, *_ in found}
        accuracy = accuracies(pipeline, {"FP32": pipeline.files.reference, **files})
        rows = [
            Row(
                name,
                speedup,
                plan.to_dict(),
                network.predict(plan.keep, lambda _: "int8"),
                scores,
                loss,
                accuracy[f"{name} at {speedup:g}"],
            )
            for name, speedup, plan, scores, loss in found
        ]
        record = {
            "name": options.name,
            **provenance(command),
            "recovery": asdict(pipeline.effort.recovery) if pipeline.effort.recovery else None,
            "training_images": len(pipeline.data.train),
            "selection_images": len(pipeline.data.selection),
            "test_accuracy_uncut": accuracy["FP32"],
            "latency_model": fit,
            "uncut_ms_predicted": problem.uncut_ms,
            "foretold": {
                f"{speedup:g}": foretold([row for row in rows if row.speedup == speedup])
                for speedup in options.speedups
            },
            "rows": [asdict(row) for row in rows],
        }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{options.name}.json").write_text(json.dumps(record, indent=1, default=float) + "\n", "utf-8")
    for row in sorted(rows, key=lambda row: (row.speedup, -row.accuracy)):
        scores = "  ".join(f"{name} {loss:.4f}" for name, loss in row.scores.items())
        print(f"{row.speedup:4g}  {100 * row.accuracy:6.2f} %  {row.loss:.4f}  {scores}  {row.proposer}")
    print(json.dumps(record["foretold"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
