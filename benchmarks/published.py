"""Question: what does the method give beside published figures, counted as those are and measured as those are not?

    python benchmarks/published.py vgg16 vgg16.toml --run runs/published-vgg16 --epochs 20 --train-only
    python benchmarks/published.py vgg16 vgg16.toml --run runs/published-vgg16 --epochs 20
    python benchmarks/published.py resnet56 resnet56.toml --run runs/published-resnet56 --epochs 20
    python benchmarks/published.py vgg16 vgg16.toml --run runs/further --strategies hirelc --epochs 12 \\
        --start runs/published-vgg16/files/DIGEST-F3.safetensors --recovery soft_weight=0.5 feature_weight=0

`vgg16`: a ninth of the parameters (Zhan, Lin and Cao; Network Slimming), and the file for storage at a limit on its
bytes: decoded again, it answers the test images too. `resnet56`: half of the multiply-accumulates (Torch-Pruning, AMC).

A plan is chosen as in any search, by the loss of cut models, but the layer table is one that counts: its "milliseconds"
are parameters or multiply-accumulates, and so is the budget. Milliseconds are measured afterwards, beside FP32 and the
uncut integer file. Every plan is trained for --epochs (with its accuracy on the selection split after each of them),
made an integer file by the pipeline (F3), and answers all test images once.

Everything is journaled in --run, trainings after every epoch: the same command goes on. --train-only ends before the
timing and the test split, which want a quiet machine. --start goes on from weights that another run of this study
recovered, which must be those of the same plan. The result goes to benchmarks/results/published-STUDY.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import onnx
import torch
from answers import drop, on_test_split, timings
from effort import set_effort
from record import RESULTS, provenance
from torch import nn

from hirelc_deploy.compress import recovery
from hirelc_deploy.compress.storage import codec, restore
from hirelc_deploy.config import JobConfig
from hirelc_deploy.evaluate import network_time, tables
from hirelc_deploy.evaluate.cutting import forward_half
from hirelc_deploy.evaluate.network_time import NetworkTime
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.evaluate.selection import parts_of
from hirelc_deploy.graph.costs import Cost
from hirelc_deploy.graph.model_graph import LayerShape
from hirelc_deploy.jobs.export import STORED, Storage, best_bits
from hirelc_deploy.jobs.workplace import open_workplace
from hirelc_deploy.measure.protocol import FULL
from hirelc_deploy.measure.table import LatencyTable
from hirelc_deploy.outcome import Failed
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.progress import Progress
from hirelc_deploy.results import comparison
from hirelc_deploy.runs import Run, atomic_path
from hirelc_deploy.strategies.problem import Problem

Currency = Literal["params", "macs"]


@dataclass(frozen=True)
class Study:
    """What is counted, how many times fewer of it are to stay, who looks for the plan, and what others published.

    Attributes:
        least_kept: Share of a unit below which no width is offered: VGG's last stages are cut to less than a quarter.
        stored_times: How many times smaller than the FP32 file the files for storage are; none where empty.
        published: Figures of others, as published: not measured here.
    """

    currency: Currency
    times: float
    strategies: tuple[str, ...]
    least_kept: float
    stored_times: tuple[float, ...]
    published: tuple[Mapping[str, Any], ...]


STUDIES = {
    "vgg16": Study(
        "params",
        9.1,
        ("hirelc", "two-stage"),
        1 / 16,
        (36.0, 64.0),
        (
            {
                "who": "two-stage RL (Zhan, Lin and Cao, arXiv 1912.02254), their VGGNet of 20.04 M parameters",
                **{"params_before": 20.04e6, "params": 2.20e6, "times": 9.1, "accuracy": "a slight gain"},
            },
            {
                "who": "Network Slimming (Liu et al. 2017) on the same network, a public port",
                **{"params_before": 20.04e6, "params": 2.42e6, "times": 8.3, "drop_points": 0.06},
            },
        ),
    ),
    "resnet56": Study(
        "macs",
        2.1,
        ("hirelc", "uniform"),
        network_time.LEAST_KEPT,
        (),
        (
            {
                "who": "Torch-Pruning (Fang et al. 2023)",
                **{"times": 2.13, "accuracy_before": 0.9353, "accuracy": 0.9377, "drop_points": -0.24},
            },
            {"who": "AMC (He et al. 2018)", **{"times": 2.0, "accuracy": 0.9190}},
        ),
    ),
}


@dataclass(frozen=True)
class CountingTable:
    """A layer table whose milliseconds are a count: of weights, or of multiply-accumulates for one image."""

    currency: Currency

    def layer_ms(self, shape: LayerShape, in_features: int, out_features: int, precision: str) -> float:
        """Return the count of one layer at these widths, whatever its precision."""
        if shape.kind == "attention" or shape.depthwise:
            raise SystemExit(f"published.py counts plain convolutions and linear layers only, found {shape}.")
        weights = in_features * out_features * math.prod(shape.kernel) / shape.groups
        return weights if self.currency == "params" else weights * shape.positions


def counted_problem(pipeline: Pipeline, study: Study, options: int) -> tuple[Problem, float]:
    """Return the search's problem in the currency of the study, and the budget."""
    table = cast(LatencyTable, CountingTable(study.currency))
    network = NetworkTime(pipeline.graph, table, 0.0, 1.0)
    problem = tables.build_problem(pipeline, network, options=options, least_kept=study.least_kept)
    whole = getattr(pipeline.cost(CompressionPlan()), study.currency)
    # Biases and norms are not in the table. They shrink with a cut; as if they did not, the budget is surely met.
    beside = whole - problem.uncut_ms
    return problem, whole / study.times - beside


def check_budget(cost: Cost, whole: Cost, study: Study) -> None:
    """Raise RuntimeError where a plan keeps more than it may."""
    kept, full = getattr(cost, study.currency), getattr(whole, study.currency)
    if kept * study.times > full * (1 + 1e-9):
        raise RuntimeError(f"{kept:,} {study.currency} of {full:,} are left, {full / kept:.3f} times fewer.")


def watch_epochs(pipeline: Pipeline) -> None:
    """Have the accuracy on the selection split journaled and said after every epoch of a recovery."""
    selection, task = pipeline.uncut.selection, pipeline.task

    def after_epoch(plan: CompressionPlan, epoch: int, model: nn.Module) -> None:
        accuracy = task.value(parts_of(task, selection.shown(), partial(forward_half, model)))
        pipeline.run.remember(epoch_key(plan, epoch), lambda: accuracy)
        pipeline.progress.say(f"{plan.digest} after epoch {epoch}: {100 * accuracy:.2f} % of the selection split")

    pipeline.training.after_epoch = after_epoch


def epoch_key(plan: CompressionPlan, epoch: int) -> str:
    """Return the key of an accuracy in the journal."""
    return f"selection accuracy of {plan.digest} after epoch {epoch}"


def curve(pipeline: Pipeline, plan: CompressionPlan, epochs: float) -> list[float | None]:
    """Return the accuracy on the selection split after each epoch of a plan's recovery."""
    return [pipeline.run.fact(epoch_key(plan, epoch)) for epoch in range(1, math.floor(epochs) + 1)]


def stored_file(pipeline: Pipeline, model: Path, times: float, strategy: str, scheme: str) -> dict[str, Any]:
    """Store an integer file at a limit on bytes and decode it again.

    Returns:
        `stored` and `restored` paths, bytes, bits by tensor, and the loss on selection images that chose them (nats).
    """
    folder = pipeline.files.folder / f"{model.stem}-stored-{times:g}"
    folder.mkdir(exist_ok=True)
    max_bytes = int(pipeline.files.reference.stat().st_size / times)
    storage = Storage(scheme=scheme, max_bytes=max_bytes, strategy=strategy)

    def choose() -> dict[str, Any]:
        with pipeline.progress.stage(f"bits of {model.stem} within {max_bytes:,} bytes"):
            found = best_bits(pipeline, model, storage, max_bytes)
        return {"bits": dict(found.bits), "loss": found.loss, "evaluations": found.evaluations}

    chosen = pipeline.run.remember(f"bits of {model.name} within {max_bytes} bytes, {scheme}, {strategy}", choose)
    stored, restored = folder / STORED, folder / "model.onnx"
    with tempfile.TemporaryDirectory() as scratch, atomic_path(stored) as one, atomic_path(restored) as other:
        codec.store(model, one, storage.bits, scheme, bits_of=chosen["bits"])
        decoded = restore.restore(str(one), scratch)
        onnx.save(onnx.load(decoded), str(other))  # one file: its digest then covers the weights
    return {"stored": stored, "restored": restored, "size_bytes": stored.stat().st_size, "scheme": scheme, **chosen}


@dataclass
class Trained:
    """What a study made: files by name with what is known of each, and files for storage (`stored_file`)."""

    files: dict[str, Path]
    facts: dict[str, dict[str, Any]]
    stored: dict[str, dict[str, Any]]


def train(pipeline: Pipeline, study: Study, options: argparse.Namespace) -> Trained:
    """Search, recover and write the files of every strategy, as far as the journal does not know them."""
    problem, budget = counted_problem(pipeline, study, options.options)
    searches = comparison.run_all(
        problem,
        [budget],
        study.strategies,
        [pipeline.seed],
        pipeline.outcome,
        f1_evaluations=options.trials,
        progress=lambda text: pipeline.progress.say(text.replace(" ms:", f" {study.currency}:")),
    )
    watch_epochs(pipeline)
    whole = pipeline.cost(CompressionPlan())
    files = {"FP32": pipeline.files.reference, "uncut INT8": pipeline.files.placed}
    made = Trained(files, {name: asdict(whole) for name in files}, {})
    for search in searches:
        plan = CompressionPlan.from_dict(search.best_plan)
        cost = pipeline.cost(plan)
        check_budget(cost, whole, study)
        pipeline.progress.say(f"{search.strategy}: {cost}, loss {search.best_loss:.4g} before training")
        outcome = pipeline.outcome(plan, "F3")
        if isinstance(outcome, Failed):
            raise SystemExit(f"{search.strategy}: {outcome.stage} says: {outcome.reason}")
        made.files[search.strategy] = path = pipeline.files.file_of(plan, "F3")
        made.facts[search.strategy] = {
            **asdict(cost),
            "params_times_fewer": whole.params / cost.params,
            "macs_times_fewer": whole.macs / cost.macs,
            "keep": {unit.name: [unit.size, plan.keep.get(unit.name, unit.size)] for unit in pipeline.graph.units},
            "loss_before_training": search.best_loss,
            "selection_accuracy_after_each_epoch": curve(pipeline, plan, options.epochs),
            "seconds": dict(outcome.seconds),
        }
        for times in study.stored_times:
            name = f"{search.strategy}, stored {times:g} times smaller"
            made.stored[name] = stored_file(pipeline, path, times, search.strategy, options.scheme)
    return made


def measure(pipeline: Pipeline, made: Trained, seconds: float) -> dict[str, dict[str, Any]]:
    """Time the files side by side, answer the test split with all, and return everything by name."""
    times = timings(pipeline, made.files, replace(FULL, seconds=seconds))
    right = on_test_split(pipeline, made.files | {name: one["restored"] for name, one in made.stored.items()})
    found = {}
    for name, path in made.files.items():
        timing = {key: times[name][key] for key in ("median_ms", "ratio", "ratio_low", "ratio_high", "note")}
        found[name] = made.facts[name] | timing | {"size_bytes": path.stat().st_size}
    for name, one in made.stored.items():
        found[name] = {key: one[key] for key in ("size_bytes", "scheme", "bits", "loss", "evaluations")}
    full_bytes = pipeline.files.reference.stat().st_size
    return {
        name: one | {"times_smaller": full_bytes / one["size_bytes"]} | drop(right["FP32"], right[name])
        for name, one in found.items()
    }


def show(found: Mapping[str, Mapping[str, Any]], study: Study) -> None:
    """Print a line for each file, and the figures of others."""
    for name, one in found.items():
        counts = f"{one['params']:,} parameters, {one['macs']:,} MACs, " if "params" in one else ""
        speed = f"{1 / one['ratio']:.2f} times faster than FP32, " if "ratio" in one else ""
        print(
            f"{name}: {counts}{speed}{one['size_bytes']:,} bytes ({one['times_smaller']:.1f} times fewer), "
            f"{100 * one['accuracy']:.2f} %, drop {one['drop_points']:+.2f} ({one['drop_low']:+.2f} to "
            f"{one['drop_high']:+.2f})"
        )
    for figures in study.published:
        print("published:", json.dumps(figures))


def keep_to(run: Run, name: str, now: Mapping[str, Any]) -> None:
    """Raise SystemExit where a run was begun with other options."""
    if (before := run.remember(name, lambda: now)) != now:
        raise SystemExit(f"{run.directory}: begun with {before}, now {now}; give another --run.")


def settings(given: Sequence[str]) -> dict[str, Any]:
    """Return what NAME=VALUE says of `Recovery`; its whole numbers stay whole."""
    defaults = asdict(recovery.Recovery())
    found = {}
    for text in given:
        name, _, value = text.partition("=")
        if name not in defaults:
            raise SystemExit(f"--recovery {text}: give NAME=VALUE with a name of {', '.join(defaults)}.")
        found[name] = type(defaults[name])(value)
    return found


def options_of_the_command() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("job", type=Path)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--name", help="of the record; published-STUDY")
    parser.add_argument("--strategies", nargs="+")
    parser.add_argument("--times", type=float, help="fewer parameters or multiply-accumulates")
    parser.add_argument("--trials", type=int, default=48, help="F1 evaluations of each search")
    parser.add_argument("--options", type=int, default=12, help="widths per unit")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--recovery", nargs="*", default=[], metavar="NAME=VALUE", help="other settings of `Recovery`")
    parser.add_argument("--start", type=Path, help="weights of the one strategy's plan, recovered before")
    parser.add_argument("--images", type=int, default=256, help="selection images that judge an F1 evaluation")
    parser.add_argument("--scheme", default="linear", help="of the codec for storage")
    parser.add_argument("--timing-seconds", type=float, default=120.0)
    parser.add_argument("--train-only", action="store_true", help="stop before the timing and the test split")
    return parser.parse_args()


def main() -> int:
    """Train what is missing, measure, and write the record."""
    options = options_of_the_command()
    torch.set_num_threads(1)
    study = STUDIES[options.study]
    strategies = tuple(options.strategies or study.strategies)
    if options.start and len(strategies) != 1:
        raise SystemExit("--start: weights belong to one plan; name one strategy with --strategies.")
    study = replace(study, times=options.times or study.times, strategies=strategies)
    config = replace(JobConfig.read(options.job), recovery_epochs=options.epochs, learning_rate=options.learning_rate)
    command = " ".join(["python", "benchmarks/published.py", *sys.argv[1:]])
    workplace = open_workplace(config, options.run, command, Progress())
    pipeline = workplace.pipeline
    recovered = replace(pipeline.effort.recovery or recovery.Recovery(), **settings(options.recovery))
    set_effort(pipeline, search_images=options.images, norm_images=options.images // 2, recovery=recovered)
    pipeline.training.start = options.start
    with workplace.run as run:
        fixed = {"images": options.images, "options": options.options}
        keep_to(run, "options of the study", fixed)
        training = {
            "recovery": asdict(recovered),
            "started_from_sha256": hashlib.sha256(options.start.read_bytes()).hexdigest() if options.start else None,
        }
        keep_to(run, "training of the study", training)
        made = train(pipeline, study, options)
        if options.train_only:
            print(f"{len(made.files) + len(made.stored)} files are ready; without --train-only they are measured.")
            return 0
        found = measure(pipeline, made, options.timing_seconds)
        assert pipeline.uncut.selection.parts is not None
        record = {
            "name": options.name or f"published-{options.study}",
            **provenance(command),
            "training_versions": {"torch": torch.__version__},
            "counted": study.currency,
            "times_fewer_asked_for": study.times,
            "trials": options.trials,
            **fixed,
            **training,
            "training_images": len(pipeline.data.train),
            "selection_accuracy_of_the_uncut_model": pipeline.task.value(pipeline.uncut.selection.parts),
            "files": found,
            "published_by_others": list(study.published),
        }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{record['name']}.json").write_text(json.dumps(record, indent=1, default=float) + "\n", "utf-8")
    show(found, study)
    return 0


if __name__ == "__main__":
    sys.exit(main())
