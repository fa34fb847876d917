"""Question: on ResNet-18 / CIFAR-10, what accuracy does whom how many milliseconds cost, after the same recovery?

    pip install torch-pruning==1.6.1
    python benchmarks/frontier.py job.toml --run runs/frontier --epochs 1 --train-only
    python benchmarks/frontier.py job.toml --run runs/frontier --epochs 1

JOB is the TOML of a search on a ResNet-18 (its `fc` is the classifier). At each of --speedups, over the uncut integer
file, there are plans of --strategies, each found with --trials F1 evaluations, and Torch-Pruning's global cut by group
Taylor importance, whose ratio of channels is the least at which the layer table predicts the same time. All of them are
trained by the same function: same epochs, learning rate, distillation of answers and of features, images and seed.
Integer files are ours (F3) for our plans; for Torch-Pruning's ONNX Runtime's static quantizer, as in
peers_resnet18.py, and ours as well. Torch-Pruning's cut is also trained as it usually is, by distilling answers alone.
Ours, the first strategy, settles by trial recoveries which branches go, and then searches again, as `search` does. Then
FP32, both uncut integer files and all others are timed side by side in one protocol run and answer all test images.

Everything is journaled in --run: an interrupted run goes on with the same command. --train-only ends before the timing
of all files and the test split, which want a quiet machine. Files of another number of epochs belong in another --run.

"Speed at equal accuracy": between its files and the uncut one a method's log time is linear in its accuracy (files that
another of its own beats are left out); at the accuracy of every cut file of both methods that lies between files of
both, the ratio of times is taken, and the geometric mean over them. Intervals are from resampled test images. Where the
other's file is less accurate than all of ours, the time of our fastest is a bound: `at_most`.

The result goes to benchmarks/results/NAME.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from answers import drop, on_test_split, timings
from effort import set_effort
from equal_accuracy import speed_at_equal_accuracy
from numpy.typing import NDArray
from peers_resnet18 import cut_globally, gradients, write_files
from record import RESULTS, provenance
from torch import Tensor, nn

from hirelc_deploy.compress.features import kept_inputs
from hirelc_deploy.config import JobConfig
from hirelc_deploy.deliver.finalists import settled_depth
from hirelc_deploy.evaluate import network_time, tables
from hirelc_deploy.evaluate.network_time import NetworkTime
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.jobs.workplace import open_workplace, table_path
from hirelc_deploy.measure.protocol import FULL
from hirelc_deploy.measure.table import LatencyTable
from hirelc_deploy.outcome import Failed
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.progress import Progress
from hirelc_deploy.results import comparison
from hirelc_deploy.runs import atomic_path
from hirelc_deploy.strategies.depth import gone_from, with_depth
from hirelc_deploy.strategies.problem import Problem

UNCUT, UNCUT_RUNTIME = "uncut INT8", "uncut ONNX Runtime INT8"
PEER_RUNTIME, PEER_OURS = "Torch-Pruning + ONNX Runtime INT8", "Torch-Pruning + our INT8"
PEER_ANSWERS = "Torch-Pruning, answers alone distilled + ONNX Runtime INT8"


@dataclass(frozen=True)
class File:
    """One file of the study: which method made it for which speed-up (over the uncut integer file), and what is left.

    Attributes:
        predicted_ms: By the layer table; None for uncut files.
    """

    method: str
    path: Path
    params: int
    macs: int
    speedup: float | None = None
    predicted_ms: float | None = None
    ratio_of_channels: float | None = None

    @property
    def name(self) -> str:
        """Return the name of the file in the record."""
        return self.method if self.speedup is None else f"{self.method} at {self.speedup:g}"


class Peer:
    """Torch-Pruning's cuts of the uncut model."""

    def __init__(self, pipeline: Pipeline, network: NetworkTime) -> None:
        self.pipeline, self.network = pipeline, network

    @cached_property
    def slopes(self) -> dict[str, Tensor]:
        """Gradients that the importance is made of."""
        with self.pipeline.progress.stage("gradients for Torch-Pruning"):
            return gradients(self.pipeline.model, self.pipeline.data)

    def cut(self, percent: int) -> tuple[nn.Module, dict[str, NDArray[np.int64]]]:
        """Return the model without this share of its channels, and what its layers still read."""
        return cut_globally(self.pipeline.model, self.pipeline.data, percent / 100, self.slopes)

    def predicted_ms(self, model: nn.Module) -> float:
        """Return the time of a cut model by the table that our own plans are predicted with."""
        network, modules = self.network, dict(model.named_modules())
        total = sum(
            network.table.layer_ms(layer.shape, *_features(modules[layer.name]), "int8")
            for layer in network.graph.layers
        )
        return network.fixed + network.scale * total

    def percent_for(self, budget_ms: float) -> int:
        """Return the least percentage of channels without which the predicted time is within the budget."""

        def bisect() -> int:
            low, high = 0, 88
            while high - low > 1:
                middle = (low + high) // 2
                if self.predicted_ms(self.cut(middle)[0]) <= budget_ms:
                    high = middle
                else:
                    low = middle
            return high

        return int(self.pipeline.run.remember(f"Torch-Pruning's percentage for {budget_ms:.6g} ms", bisect))

    def plan_of(self, model: nn.Module) -> CompressionPlan:
        """Return the widths of a cut model as a plan. It names the pattern, so that no plan of ours is the same."""
        modules, keep = dict(model.named_modules()), dict[str, int]()
        for layer in self.pipeline.graph.layers:
            for share in layer.writes:
                keep[share.unit] = _features(modules[layer.name])[1] // share.per_element
        plan = CompressionPlan(keep, default_precision="auto", pattern=self.pipeline.files.placement.pattern)
        params = sum(parameter.numel() for parameter in model.parameters())
        if self.pipeline.cost(plan).params != params:
            raise RuntimeError(f"{plan}: {self.pipeline.cost(plan).params} parameters by its widths, it has {params}.")
        return plan

    def files(self, speedup: float, budget_ms: float) -> list[File]:
        """Return the cut for a time budget, trained as ours and as is usual, as three integer files."""
        pipeline, percent = self.pipeline, self.percent_for(budget_ms)
        model, lost = self.cut(percent)
        plan, predicted_ms = self.plan_of(model), self.predicted_ms(model)
        usual, usual_plan = copy.deepcopy(model), replace(plan, default_precision="int8")  # another name on the disk
        if pipeline.effort.recovery is not None:
            model = pipeline.training.trained(model, plan, {**kept_inputs(pipeline.graph, {}), **lost})
            usual = pipeline.training.trained(usual, usual_plan, {})
        answers = pipeline.files.folder / f"{usual_plan.digest}-runtime-int8.onnx"
        write_runtime_file(pipeline, usual, answers)
        ours, runtime = pipeline.files.file_of(plan, "F3"), pipeline.files.folder / f"{plan.digest}-runtime-int8.onnx"
        if not ours.exists():
            pipeline.files.build(model, plan, "F3")
        write_runtime_file(pipeline, model, runtime)
        cost = asdict(pipeline.cost(plan))
        about = {"speedup": speedup, "predicted_ms": predicted_ms, "ratio_of_channels": percent / 100, **cost}
        named = {PEER_RUNTIME: runtime, PEER_OURS: ours, PEER_ANSWERS: answers}
        return [File(name, path, **about) for name, path in named.items()]


def _features(layer: nn.Module) -> tuple[int, int]:
    """Return (input, output) features of a convolution or linear layer."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    assert isinstance(layer, nn.Conv2d)
    return layer.in_channels, layer.out_channels


def write_runtime_file(pipeline: Pipeline, model: nn.Module, path: Path) -> None:
    """Write the INT8 file that ONNX Runtime's static quantizer makes of a model, unless it is there."""
    if path.exists():
        return
    with tempfile.TemporaryDirectory() as folder, atomic_path(path) as partial:
        partial.write_bytes(write_files(model, pipeline.data, Path(folder), "model")[1].read_bytes())


def our_files(
    pipeline: Pipeline, network: NetworkTime, speedups: Sequence[float], strategies: Sequence[str], trials: int
) -> tuple[list[File], dict[str, Any]]:
    """Return the trained file of each strategy at each speed-up, and what the searches were."""
    problem = tables.build_problem(pipeline, network)
    searches = comparison.run_all(
        problem,
        [problem.uncut_ms / speedup for speedup in speedups],
        strategies,
        [pipeline.seed],
        pipeline.outcome,
        f1_evaluations=trials,
        progress=pipeline.progress.say,
    )
    files = []
    for search in searches:
        plan = CompressionPlan.from_dict(search.best_plan)
        if search.strategy == strategies[0]:
            plan = without_branches(pipeline, problem, search, trials)
        outcome = pipeline.outcome(plan, "F3")
        if isinstance(outcome, Failed):
            raise SystemExit(f"{search.strategy}: {outcome.stage} says: {outcome.reason}")
        speedup = problem.uncut_ms / search.budget_ms
        predicted_ms = network.predict(plan.keep, lambda _: "int8")
        cost = asdict(pipeline.cost(plan))
        files.append(
            File(
                search.strategy, pipeline.files.file_of(plan, "F3"), **cost, speedup=speedup, predicted_ms=predicted_ms
            )
        )
    losses = {f"{s.strategy} at {problem.uncut_ms / s.budget_ms:g}": s.best_loss for s in searches}
    return files, {"uncut_ms_predicted": problem.uncut_ms, "losses_before_training": losses}


def without_branches(pipeline: Pipeline, problem: Problem, search: comparison.Search, trials: int) -> CompressionPlan:
    """Return what the whole of our search ends with: the best plan once trial recoveries settled which branches go."""
    rivals = [CompressionPlan.from_dict(plan) for plan in search.rivals]
    depths = settled_depth(pipeline, problem, search.budget_ms, rivals)
    if not depths or depths[0] == gone_from(rivals[0]):
        return rivals[0]
    (again,) = comparison.run_all(
        with_depth(problem, depths[0]),
        [search.budget_ms],
        [search.strategy],
        [search.seed],
        pipeline.outcome,
        f1_evaluations=trials,
        progress=pipeline.progress.say,
    )
    return CompressionPlan.from_dict(again.best_plan)


def compared_methods(
    files: Sequence[File], right: Mapping[str, NDArray[np.bool_]], log_times: Mapping[str, float]
) -> dict[str, Any]:
    """Return the speed at equal accuracy of the first method, over each other one."""

    def names_of(method: str) -> list[str]:
        uncut = UNCUT_RUNTIME if method in (PEER_RUNTIME, PEER_ANSWERS) else UNCUT
        return [uncut, *(file.name for file in files if file.method == method)]

    methods = list(dict.fromkeys(file.method for file in files if file.speedup is not None))
    return {
        f"{methods[0]} over {other}": speed_at_equal_accuracy(right, log_times, names_of(methods[0]), names_of(other))
        for other in methods[1:]
    }


def main() -> int:
    """Train what is missing, measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--name", default="frontier-resnet18")
    parser.add_argument(
        "--speedups", type=float, nargs="+", default=[1.5, 2.5, 3.6], help="over the uncut integer file"
    )
    parser.add_argument("--strategies", nargs="+", default=["hirelc", "knapsack", "uniform"], help="ours first")
    parser.add_argument("--trials", type=int, default=24, help="F1 evaluations of each search")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--images", type=int, default=256, help="selection images that judge an F1 evaluation")
    parser.add_argument("--timing-seconds", type=float, default=300.0)
    parser.add_argument("--train-only", action="store_true", help="stop before the timing and the test split")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = replace(JobConfig.read(options.job), recovery_epochs=options.epochs, learning_rate=options.learning_rate)
    command = " ".join(["python", "benchmarks/frontier.py", *sys.argv[1:]])
    workplace = open_workplace(config, options.run, command, Progress())
    pipeline = workplace.pipeline
    set_effort(pipeline, search_images=options.images, norm_images=options.images // 2)
    with workplace.run:
        if (before := workplace.run.remember("images of F1", lambda: options.images)) != options.images:
            raise SystemExit(f"--images {options.images}: {options.run} was begun with {before}; give another --run.")
        table = LatencyTable(pipeline.backend, table_path(), pipeline.threads)
        network, fit = network_time.fit_network_time(pipeline, table)
        network_time.measure_table(pipeline, network)
        files, search = our_files(pipeline, network, options.speedups, options.strategies, options.trials)
        peer = Peer(pipeline, network)
        for speedup in options.speedups:
            files += peer.files(speedup, search["uncut_ms_predicted"] / speedup)
        runtime = pipeline.files.folder / "uncut-runtime-int8.onnx"
        write_runtime_file(pipeline, pipeline.model, runtime)
        whole = asdict(pipeline.cost(CompressionPlan()))
        uncut = [("FP32", pipeline.files.reference), (UNCUT, pipeline.files.placed), (UNCUT_RUNTIME, runtime)]
        files = [File(name, path, **whole) for name, path in uncut] + files
        if options.train_only:
            print(f"{len(files)} files are ready; the same command without --train-only measures them.")
            return 0
        paths = {file.name: file.path for file in files}
        distinct = {path: name for name, path in reversed(paths.items())}  # two searches may end with the same plan
        first = {name: distinct[path] for name, path in paths.items()}
        named = {name: path for name, path in paths.items() if first[name] == name}
        times = timings(pipeline, named, replace(FULL, seconds=options.timing_seconds))
        right = on_test_split(pipeline, named)
        record = {
            "name": options.name,
            **provenance(command),
            "training_versions": {name: metadata.version(name) for name in ("torch", "torch-pruning")},
            "recovery": asdict(pipeline.effort.recovery) if pipeline.effort.recovery else None,
            "training_images": len(pipeline.data.train),
            "trials": options.trials,
            "f1_images": options.images,
            "latency_model": fit,
            **search,
            "files": [
                {**asdict(file), "path": file.path.name, "size_bytes": file.path.stat().st_size}
                | drop(right["FP32"], right[first[file.name]])
                | {
                    key: times[first[file.name]][key]
                    for key in ("median_ms", "ratio", "ratio_low", "ratio_high", "note")
                }
                for file in files
            ],
            "speed_at_equal_accuracy": compared_methods(
                files,
                {name: right[one] for name, one in first.items()},
                {name: float(np.log(times[one]["ratio"])) for name, one in first.items()},
            ),
        }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{options.name}.json").write_text(json.dumps(record, indent=1, default=float) + "\n", "utf-8")
    print("accuracy   drop (interval)            times faster than FP32   bytes        params      MACs   file")
    for one in record["files"]:
        print(
            f"{100 * one['accuracy']:6.2f} %  {one['drop_points']:+5.2f} ({one['drop_low']:+.2f} to "
            f"{one['drop_high']:+.2f})  {1 / one['ratio']:7.2f} ({1 / one['ratio_high']:.2f} to "
            f"{1 / one['ratio_low']:.2f})  {one['size_bytes']:>10,}  {one['params']:>10,}  {one['macs']:>11,}  "
            + one["method"]
            + ("" if one["speedup"] is None else f" at {one['speedup']:g}")
        )
    print(json.dumps(record["speed_at_equal_accuracy"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
