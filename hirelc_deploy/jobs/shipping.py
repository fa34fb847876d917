"""In: a workplace and the chosen plan. Out: the last race, the bundle, the result record and the report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hirelc_deploy.deliver.agenda import BUNDLE
from hirelc_deploy.deliver.bundle import BundleContents, write_bundle
from hirelc_deploy.deliver.limits import too_few_images
from hirelc_deploy.deliver.race import (
    Contender,
    Delivery,
    final_accuracy,
    layer_records,
    race,
    result_record,
    shipped_model,
    unpruned,
)
from hirelc_deploy.deliver.samples import write_samples
from hirelc_deploy.evaluate.files import Files
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.evaluate.selection import parts_of
from hirelc_deploy.jobs.workplace import PRINTED, Workplace
from hirelc_deploy.measure import accuracy
from hirelc_deploy.measure.backend import Configured, Runner
from hirelc_deploy.measure.batch import filled
from hirelc_deploy.measure.machine import describe
from hirelc_deploy.measure.protocol import Timing
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.results.report import read_run, write_report
from hirelc_deploy.runs import RESULT, Run, json_text, write_atomic

SAMPLES = 8
UNKNOWN = (
    "accuracy is unknown: the data has no labels, so the accuracy guard counted nothing and no limit on a drop was "
    "looked at; give labelled data with --data"
)


def deliver(
    workplace: Workplace,
    plan: CompressionPlan | None,
    facts: Mapping[str, Any],
    started: float,
    *,
    always: bool = False,
    max_drop: float | None = None,
    keeps: Callable[[Contender, Timing], bool] = lambda contender, timing: True,
) -> dict[str, Any]:
    """Race the chosen plan against the unpruned files, write bundle, result and report, and return the result."""
    pipeline, run = workplace.pipeline, workplace.run
    candidate = Contender("ours", pipeline.files.file_of(plan, "F3"), plan) if plan is not None else None
    delivery = race(pipeline, candidate, always=always, max_drop=max_drop, keeps=keeps)
    shipped = delivery.shipped
    warnings = [*workplace.notes, *filter(None, (pipeline.uncut.doubt, too_few_images(pipeline, max_drop)))]
    warnings += [f"{name}: {timing.note}" for name, timing in delivery.timings.items() if timing.note]
    if not pipeline.data.labelled:
        warnings.append(UNKNOWN)
    if candidate is not None and shipped not in delivery.ours:
        warnings.append(
            f"compression did not help: {shipped.name} is at least as fast as the best plan, so it is shipped."
        )
    if candidate is None and not pipeline.graph.units:
        warnings.append(f"nothing can be cut: {shipped.name}, the fastest file that keeps the limits, is shipped.")
    elif candidate is None:
        warnings.append(f"no plan kept the limits: {shipped.name}, the fastest unpruned file that does, is shipped.")
    ends = end_records(shipped.home(pipeline), shipped.plan)
    warnings += end_warnings(shipped.home(pipeline), ends)
    scores = final_accuracy(pipeline, delivery)
    with pipeline.progress.stage(BUNDLE):
        record = result_record(pipeline, delivery, scores)
        home = shipped.home(pipeline)
        runner = home.backend.build(shipped.path, pipeline.threads)
        labels = pipeline.data.selection.labels
        samples = pipeline.data.selection.batch(np.arange(min(SAMPLES, len(pipeline.data.selection)))).numpy()
        batch = filled(samples, pipeline.batch)
        answers = runner.infer(samples)
        operators = operator_records(runner, shipped.path, batch)
        bundle = write_bundle(
            run.directory / "bundle",
            BundleContents(
                model_onnx=shipped.path,
                model=shipped_model(pipeline, shipped),
                source=workplace.source.describe(),
                plan=home.writer.by_layer.stated(shipped.plan, pipeline.graph),
                preprocess=pipeline.data.preprocess,
                classes=pipeline.task.classes or pipeline.data.classes,
                task=pipeline.task,
                task_record=workplace.task,
                sample_inputs=samples,
                sample_outputs=answers,
                sample_labels=None if labels is None else labels[:SAMPLES],
                test=scores.images,
                measurements=record,
                operators=accuracy.operators(runner, batch),
                batch=pipeline.batch,
                machine=run.machine if shipped.files is None else describe(home.backend),
                versions=home.backend.versions(),
                options=runner.options() if isinstance(runner, Configured) else {},
                command=workplace.command,
            ),
            overwrite=True,
        )
        result = {
            "bundle": str(bundle),
            **record,
            "layers": layer_records(pipeline.graph, shipped.plan, home.precision_of(shipped.plan)),
            "peak_memory_bytes": home.peak_memory_bytes(shipped.path),
            "energy_mj": None if workplace.config.limits.max_energy_mj is None else home.energy_mj(shipped.path),
            "candidates": candidates(pipeline, delivery, run),
            "stages": {**stage_seconds(run), **pipeline.progress.seconds, "whole command": time.monotonic() - started},
            "exports": {
                "filled in": pipeline.files.writer.exporter.filled,
                "exported": dict(pipeline.files.writer.exporter.exported),
            },
            "kept_whole": [{"layer": kept.layer, "reason": kept.reason} for kept in pipeline.graph.kept_whole],
            "operators": operators,
            "placement": pipeline.files.placement.candidates,
            "ends": ends,
            "guard": delivery.guard.to_dict() if delivery.guard else None,
            "by_class": scores.by_class,
            "samples": write_samples(run.directory, pipeline.task, pipeline.data.preprocess, samples, answers),
            "warnings": warnings,
            **facts,
        }
        write_atomic(run.directory / RESULT, json_text(result, indent=1) + "\n")
        write_report(read_run(run.directory), run.directory / "report.html")
    return {key: result[key] for key in PRINTED}


def end_records(files: Files, plan: CompressionPlan) -> list[dict[str, Any]]:
    """Return what decodes the answers, its precision in the file of a plan, and what the placement saw of it."""
    precision_of = files.precision_of(plan)
    return [{"name": name, "precision": precision_of(name), **told} for name, told in files.placement.ends.items()]


def end_warnings(files: Files, ends: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each end that a plan makes integer and the placement does not."""
    return [
        f"{end['name']} is integer in the shipped file, as the plan says; precision auto keeps it float: {end['why']}."
        for end in ends
        if end["precision"] == "int8" and end["name"] in files.placement.float_layers
    ]


def operator_records(runner: Runner, path: Path, images: NDArray[np.float32]) -> list[dict[str, Any]]:
    """Return every operator that ran with its time; those that compute a layer carry the layer's name.

    The shipped file names its nodes by numbers, and the runtime appends to them what it fused.
    """
    layers = json.loads(path.with_suffix(".layers.json").read_text("utf-8"))
    records = []
    for operator in runner.profile(images, runs=50):
        layer = layers.get(operator.name.partition("_token_")[0])
        records.append({**vars(operator), "name": f"{layer}/{operator.operator}" if layer else operator.name})
    return records


def candidates(pipeline: Pipeline, delivery: Delivery, run: Run) -> list[dict[str, Any]]:
    """Return every file of the last race, with its metric on the selection split."""
    selection, task, found = pipeline.uncut.selection, pipeline.task, []
    ours = delivery.ours if pipeline.others else ()
    for contender in {c.path: c for c in (*unpruned(pipeline), *ours, delivery.shipped)}.values():
        timing = delivery.timings[contender.name]
        answer = contender.home(pipeline).answers_of(contender.path)
        is_known = selection.parts is not None
        found.append(
            {
                "name": contender.name,
                "ratio": timing.ratio,
                "ratio_low": timing.ratio_low,
                "ratio_high": timing.ratio_high,
                "median_ms": timing.median_ms,
                "size_bytes": contender.path.stat().st_size,
                "accuracy_selection": task.value(parts_of(task, selection.shown(), answer)) if is_known else None,
            }
        )
    return found


def stage_seconds(run: Run) -> dict[str, float]:
    """Return the seconds that each kind of step took, over all trials of the run and all times it was resumed."""
    total: dict[str, float] = {}
    for trial in run.trials:
        for stage, seconds in trial.outcome.seconds.items():
            total[f"{trial.fidelity} {stage}"] = total.get(f"{trial.fidelity} {stage}", 0.0) + seconds
    return total
