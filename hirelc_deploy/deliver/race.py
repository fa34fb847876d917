"""In: a chosen plan, recovered and exported. Out: the file that is shipped, and its final measurements.

Whatever the search chose is timed once more, with the full protocol, beside every unpruned file; the fastest ships.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file
from torch import nn

from hirelc_deploy.compress.integer.guard import Guarded
from hirelc_deploy.compress.integer.quantize import BLANKET
from hirelc_deploy.deliver.bundle import targets_record
from hirelc_deploy.errors import ConstraintError, ExportError, InputError
from hirelc_deploy.evaluate.effort import BATCH
from hirelc_deploy.evaluate.files import Files
from hirelc_deploy.evaluate.guarded import guarded, guarded_file
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.graph.costs import kept_features, kept_share
from hirelc_deploy.graph.model_graph import ModelGraph
from hirelc_deploy.inputs.data.batches import batches
from hirelc_deploy.inputs.data.images import Images
from hirelc_deploy.measure import accuracy
from hirelc_deploy.measure.backend import Runner
from hirelc_deploy.measure.protocol import FULL, Timing, TimingLimits, compare
from hirelc_deploy.measure.runtimes import SideBySide
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.tasks.contract import Task
from hirelc_deploy.tasks.paired import paired_drop


@dataclass(frozen=True)
class Contender:
    """A file that could be shipped. `plan` says how it was made; `name` is what the report calls it.

    Attributes:
        guard: What the accuracy guard turned back to float, where this is the file that it made.
        files: Of the runtime that it is for; None for that of the pipeline.
    """

    name: str
    path: Path
    plan: CompressionPlan
    guard: Guarded | None = None
    files: Files | None = None

    def home(self, pipeline: Pipeline) -> Files:
        """Return what runs this file."""
        return self.files or pipeline.files


@dataclass(frozen=True)
class Delivery:
    """What is shipped and how it measured against the files it had to beat.

    Attributes:
        timings: Contender name to its final timing; the reference is the uncut float file.
        best_unpruned: Name of the fastest unpruned contender.
        guard: What the accuracy guard turned back to float in the unpruned file that it made, if it made one.
        ours: The candidate in each runtime, the pipeline's own first; empty where there was none.
    """

    shipped: Contender
    reference: Contender
    timings: Mapping[str, Timing]
    best_unpruned: str
    guard: Guarded | None = None
    ours: tuple[Contender, ...] = ()


def unpruned(pipeline: Pipeline, max_drop: float | None = None) -> list[Contender]:
    """Return the files that can be had without cutting: float, its 16-bit form, blanket INT8, our placement, guarded.

    The last is there when the drop is limited and the placed file exceeds it: trained while it is rounded, or with its
    worst layers float again, whichever is faster.
    """
    files = [contender for each in (pipeline.files, *pipeline.others) for contender in uncut_files(pipeline, each)]
    if max_drop is not None and pipeline.data.labelled:
        try:
            plan, found = guarded(pipeline, max_drop)
        except ConstraintError as error:
            pipeline.progress.say(f"accuracy guard: {error}")
        else:
            if found.points_before > max_drop:
                unit = pipeline.task.metric.unit or f"of {pipeline.task.metric.name}"
                layers = ", ".join(step.layer for step in found.reverted) or "no layer"
                pipeline.progress.say(
                    f"accuracy guard: {found.points:.2f} {unit} lost instead of {found.points_before:.2f}, "
                    f"{found.ms:.3f} ms instead of {found.ms_before:.3f}; pattern {found.pattern}, "
                    f"back to float: {layers}{', trained while rounded' if found.trained else ''}"
                )
                files.append(Contender("int8 guarded", guarded_file(pipeline, plan), plan, found))
    return files


def uncut_files(pipeline: Pipeline, files: Files) -> list[Contender]:
    """Return what one runtime makes of the uncut model without any look at its accuracy; the float file comes first."""
    form, own = files.writer.form, None if files is pipeline.files else files
    plan = CompressionPlan
    found = [
        (form.float_name, files.reference, plan(default_precision="float")),
        ("int8 blanket", files.blanket, plan(default_precision="int8")),
    ]
    if files.half is not None:
        in_half = plan(default_precision="float", pattern=form.half_pattern)
        found.append((form.half.removeprefix("+"), files.half, in_half))
    if files.placement.pattern != BLANKET or files.placement.float_layers:
        found.append(("int8 placed", files.placed, plan(default_precision="auto")))
    return [Contender(named(name, own), path, made, files=own) for name, path, made in found]


def named(name: str, files: Files | None) -> str:
    """Return what the report calls a file; the pipeline's own runtime goes without saying."""
    return name if files is None else f"{name}, {files.backend.name}"


def in_every_runtime(pipeline: Pipeline, candidate: Contender) -> list[Contender]:
    """Return the candidate, and its network with its weights in the files of the other runtimes that take it."""
    found = [candidate]
    for files in pipeline.others:
        try:
            path = files.build(shipped_model(pipeline, candidate), candidate.plan, "F3")
            files.backend.build(path, files.threads)
        except (ExportError, InputError) as error:
            pipeline.progress.say(f"{files.backend.name} does not take the plan: {error}")
        else:
            found.append(Contender(named(candidate.name, files), path, candidate.plan, files=files))
    return found


def shipped_model(pipeline: Pipeline, shipped: Contender) -> nn.Module:
    """Return the float model of which the shipped file is the export."""
    model = pipeline.cut(shipped.plan)
    weights = pipeline.files.weights_of(shipped.plan)
    if weights.exists():
        model.load_state_dict(load_file(str(weights)))
    return model.eval()


def race(
    pipeline: Pipeline,
    candidate: Contender | None,
    *,
    always: bool = False,
    max_drop: float | None = None,
    keeps: Callable[[Contender, Timing], bool] = lambda contender, timing: True,
    limits: TimingLimits = FULL,
) -> Delivery:
    """Time the candidate and all unpruned files together and say which is shipped.

    Args:
        candidate: None when the search found nothing that keeps the limits.
        always: Ship the candidate, in the runtime where it is fastest, even if an unpruned file is faster (`apply`
            builds what it is told to).
        max_drop: Points that an unpruned file may lose; where the placed one loses more, a guarded one takes part.
        keeps: Whether a file may be shipped; the candidate was judged before, in the pipeline's own runtime.

    Raises:
        ConstraintError: There is no candidate, and no unpruned file may be shipped.
    """
    ours = in_every_runtime(pipeline, candidate) if candidate else []
    contenders = unpruned(pipeline, max_drop) + ours
    clock = SideBySide({c.path: c.home(pipeline).backend for c in contenders})
    with pipeline.progress.stage("final timing"):
        files = [c.path for c in contenders]
        found = compare(files, clock, threads=pipeline.threads, batch=pipeline.batch, limits=limits)
    timings = {c.name: timing for c, timing in zip(contenders, found, strict=True)}
    best = min((c for c in contenders if c not in ours), key=lambda c: timings[c.name].ratio)
    able = [c for c in contenders if c is candidate or keeps(c, timings[c.name])]
    if not able:
        raise ConstraintError("no plan keeps every limit, and no unpruned file does.")
    wanted = [c for c in able if c in ours] if always else []
    shipped = min(wanted or able, key=lambda c: timings[c.name].ratio)
    guard = next((c.guard for c in contenders if c.guard), None)
    return Delivery(shipped, contenders[0], timings, best.name, guard, tuple(ours))


@dataclass(frozen=True)
class SplitScores:
    """What the test split says, read once, of the file that is shipped and of the uncut float file.

    Attributes:
        record: `test`, `baseline_test`, `drop_points`, `drop_low`, `drop_high`; all None without labels.
        by_class: Class name to `test` and `baseline_test` of that class alone.
        images: The number of test images and a digest of their labels; None without labels.
    """

    record: Mapping[str, float | None]
    by_class: Mapping[str, Mapping[str, float]]
    images: Mapping[str, Any] | None


def final_accuracy(pipeline: Pipeline, delivery: Delivery) -> SplitScores:
    """Read the test split, once, and judge the shipped and the reference file on it by the metric of the task."""
    if not pipeline.data.labelled:
        names = ("test", "baseline_test", "drop_points", "drop_low", "drop_high")
        return SplitScores(dict.fromkeys(names), {}, None)
    images, task = pipeline.data.take_test(), pipeline.task
    with pipeline.progress.stage("test split"):
        before, after = (
            parts_of(contender.home(pipeline).backend.build(contender.path, pipeline.threads), task, images)
            for contender in (delivery.reference, delivery.shipped)
        )
        drop = paired_drop(task, before, after)
    record = {
        "test": task.value(after),
        "baseline_test": task.value(before),
        "drop_points": drop.points,
        "drop_low": drop.low,
        "drop_high": drop.high,
    }
    ours, theirs = task.by_class(after), task.by_class(before)
    by_class = {name: {"test": value, "baseline_test": theirs[name]} for name, value in ours.items() if name in theirs}
    return SplitScores(record, by_class, targets_record(images))


def parts_of(runner: Runner, task: Task, images: Images) -> list[Any]:
    """Return what each image brings to the metric of a file, batch by batch.

    Raises:
        ExportError: The file answers NaN or infinity.
    """
    parts: list[Any] = []
    for start, pictures in zip(range(0, len(images), BATCH), batches(images, BATCH), strict=True):
        outputs = accuracy.finite(runner.infer(pictures.numpy()), start)
        targets = task.collate(images.targets(np.arange(start, start + len(pictures))))
        parts += task.parts(outputs, targets)
    return parts


def layer_records(graph: ModelGraph, plan: CompressionPlan, precision_of: Callable[[str], str]) -> list[dict[str, Any]]:
    """Return name, block, kind, widths before and after, size and precision of every layer, in execution order."""
    records = []
    for layer in graph.layers:
        narrow, wide = kept_features(layer, graph, plan.keep)
        share = kept_share(layer, graph, plan.keep)
        records.append(
            {
                "name": layer.name,
                "block": layer.block,
                "kind": layer.shape.kind,
                "in_full": layer.in_features,
                "out_full": layer.out_features,
                "in_kept": narrow,
                "out_kept": wide,
                "params": round(layer.params * share),
                "macs": round(layer.macs * share),
                "precision": precision_of(layer.name),
            }
        )
    return records


def result_record(pipeline: Pipeline, delivery: Delivery, scores: SplitScores) -> dict[str, Any]:
    """Return the keys that `apply`, `search` and `demo` print with --json, but for `bundle`."""
    shipped, timing = delivery.shipped, delivery.timings[delivery.shipped.name]
    cost = pipeline.cost(shipped.plan)
    size, full = shipped.path.stat().st_size, delivery.reference.path.stat().st_size
    return {
        "params": cost.params,
        "macs": cost.macs,
        "size_bytes": size,
        "size_ratio": full / size,
        "accuracy": dict(scores.record),
        "metric": metric_record(pipeline.task),
        "latency": {
            "median_ms": timing.median_ms,
            "p99_ms": timing.p99_ms,
            "batch": pipeline.batch,
            "threads": pipeline.threads,
            "images_per_second": timing.images_per_second,
            "reference": delivery.reference.path.name,
            "ratio": timing.ratio,
            "ratio_low": timing.ratio_low,
            "ratio_high": timing.ratio_high,
            "verdict": timing.verdict,
        },
        "best_unpruned": {"name": delivery.best_unpruned, "ratio": delivery.timings[delivery.best_unpruned].ratio},
    }


def metric_record(task: Task) -> dict[str, Any]:
    """Return what the numbers under `accuracy` are, as JSON values."""
    return {"task": task.name, **asdict(task.metric)}
