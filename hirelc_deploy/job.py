"""In: a JobConfig and a folder. Out: a bundle, a report and the result record of that job, resumed where it stood."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn

from hirelc_deploy import comparison
from hirelc_deploy.agreement import agreement
from hirelc_deploy.ahead import Ahead, Evaluators
from hirelc_deploy.bundle import BundleContents, read_manifest, write_bundle
from hirelc_deploy.bundle import load as load_bundle
from hirelc_deploy.compress import codec, restore, slicing
from hirelc_deploy.compress.quantize import PATTERNS
from hirelc_deploy.compress.recovery import Recovery
from hirelc_deploy.config import JobConfig, Limits
from hirelc_deploy.data import Data, configured_data
from hirelc_deploy.delivery import Contender, Delivery, final_accuracy, layer_records, race, result_record, unpruned
from hirelc_deploy.errors import ConstraintError, ExportError, InputError
from hirelc_deploy.finalists import Finalist, Search, drop_error, keeps_limits
from hirelc_deploy.graph.model_graph import ModelGraph
from hirelc_deploy.measure import accuracy
from hirelc_deploy.measure.backend import Backend, Runner
from hirelc_deploy.measure.machine import describe
from hirelc_deploy.measure.protocol import Timing
from hirelc_deploy.measure.table import LatencyTable
from hirelc_deploy.measure.targets import find_target, open_target
from hirelc_deploy.models import ModelSource, factory_modules, load_for
from hirelc_deploy.outcome import Failed, Measured
from hirelc_deploy.pipeline import Effort, Pipeline, proven_graph
from hirelc_deploy.plan import CompressionPlan, parse_uniform
from hirelc_deploy.progress import Progress
from hirelc_deploy.ray_ahead import RayAhead, default_evaluators
from hirelc_deploy.ray_cluster import connect
from hirelc_deploy.report import read_run, write_report
from hirelc_deploy.runs import Run, write_atomic
from hirelc_deploy.search.baselines import ABLATIONS, STRATEGIES
from hirelc_deploy.staircase import stairs_of, wanted_keys
from hirelc_deploy.staircase_page import staircase_page
from hirelc_deploy.stored_bits import Chosen, StoredBits
from hirelc_deploy.tensorrt_folder import write_folder

RESULT = "result.json"
COMPARISON, COMPARISON_PAGE = "compare.json", "compare.html"
SAMPLES = 8


@dataclass(frozen=True)
class Workplace:
    """What every job needs, opened from its configuration."""

    config: JobConfig
    pipeline: Pipeline
    run: Run
    source: ModelSource
    command: str


def open_workplace(
    config: JobConfig,
    directory: Path,
    command: str,
    progress: Progress,
    *,
    jobs: int | None = None,
    ray: str | None = None,
) -> Workplace:
    """Load model and data, open the target and the run directory; every problem with them is one sentence.

    Args:
        jobs: Processes that judge cut models side by side. It changes no result, so it is no part of the configuration.
        ray: Address of the Ray cluster on whose hosts they are; None for this machine.
    """
    evaluators, jobs = evaluators_of(ray, jobs, config.model.spec, progress.say)
    target = find_target(config.target)
    backend = open_target(target)
    data = configured_data(config)
    weights = Path(config.model.weights) if config.model.weights else None
    source = ModelSource(config.model.spec, weights, dict(config.model.arguments), config.model.pretrained)
    model, data, source = load_for(source, data, config.preprocess.overrides())
    if source.is_untrained and data.labelled:
        raise InputError(
            f"--model {source.spec}: its weights are random; give trained ones with --weights FILE, or --pretrained "
            "for timm's own (for structural work without accuracy: --data synthetic:64)."
        )
    # Whatever can be wrong with the options is found before the run directory is made.
    graph = proven_graph(model, data, config.exclude, config.include)
    if not config.search.depth:
        graph = graph.without_branches()
    options = config
    if config.plan is not None:
        plan = read_plan(config.plan, graph)
        if not config.plan.startswith("uniform:"):  # a file may be edited between two runs
            options = replace(config, plan=f"{config.plan} ({plan.digest})")
    run = Run.open(directory, options.to_toml(), describe(backend))
    check_contents(run, source, data)
    effort = Effort(recovery=recovery_of(config))
    pipeline = Pipeline(
        model,
        data,
        backend,
        run,
        effort=effort,
        seed=config.seed,
        threads=config.threads or target.threads,
        progress=progress,
        graph=graph,
        start=earlier if config.plan and (earlier := Path(config.plan) / "weights.safetensors").is_file() else None,
        jobs=jobs,
        evaluators=evaluators,
        rounds=config.search.precisions,
    )
    return Workplace(config, pipeline, run, source, command)


def evaluators_of(
    address: str | None, jobs: int | None, spec: str, say: Callable[[str], None]
) -> tuple[Callable[[Callable[[str], str], int], Evaluators], int]:
    """Return what makes the processes that judge cut models side by side, and how many they are.

    Args:
        address: Of the Ray cluster; None for copies of this process.
        spec: Of the model: what its factory defines is sent to the hosts, where nobody may have it.
    """
    if address is None:
        return Ahead, jobs or 1
    if jobs == 1:
        raise InputError("--jobs 1 with --ray: one process is this one; give at least 2, or leave --jobs out.")
    ray = connect(address, "--ray")
    count = jobs or default_evaluators(ray)
    if count == 1:
        say("--ray: the cluster has one free CPU, so this process judges alone")
    return lambda answer, jobs: RayAhead(answer, jobs, ray, say, factory_modules(spec)), count


def check_contents(run: Run, source: ModelSource, data: Data) -> None:
    """Raise InputError where a run that is resumed was made with other weights, factory or images of the same name."""
    described = source.describe()
    contents = {
        "weights": described.get("weights", {}).get("sha256"),
        "factory": described.get("spec_sha256"),
        "images": data.fingerprint(),
    }
    if not run.trials and not (run.directory / RESULT).exists():
        run.remember("contents", lambda: contents)
    before = run.fact("contents") or contents  # an older run did not say
    if changed := [name for name, value in contents.items() if before.get(name) != value]:
        raise InputError(
            f"{run.directory}: this run was made with other {changed[0]} under the same name; "
            "give another --out, or put back what was there."
        )


def recovery_of(config: JobConfig) -> Recovery | None:
    """Return the fine-tuning that a configuration asks for, or None."""
    if not config.recovery_epochs:
        return None
    return Recovery(config.recovery_epochs, learning_rate=config.learning_rate)


def table_path() -> Path:
    """Return where layer times are kept: they belong to a machine and a runtime, not to a run."""
    base = os.environ.get("HIRELC_DEPLOY_CACHE") or os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "hirelc-deploy" / "layer-times.jsonl"


def profile_model(
    graph: ModelGraph,
    backend: Backend,
    out: Path,
    title: str,
    *,
    threads: int,
    steps: int,
    fresh: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Measure the stairs of every unit into the table that searches read; write them to `out` as JSON and as a page."""
    started = time.monotonic()
    table = LatencyTable(backend, table_path(), threads)
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
        write_atomic(out / "staircase.json", json.dumps(record, indent=1))
        write_atomic(out / "staircase.html", staircase_page(title, stairs, facts))
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); choose another folder with --out.") from None
    return record


def run_search(workplace: Workplace) -> dict[str, Any]:
    """Search, deliver and return the result record; a finished run only returns what it found."""
    pipeline, run, config = workplace.pipeline, workplace.run, workplace.config
    if (run.directory / RESULT).exists():
        return finished(run.directory)
    started = time.monotonic()
    path = table_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{path.parent}: this folder for layer times cannot be made ({error.strerror}); "
            "set HIRELC_DEPLOY_CACHE to a folder that can be written."
        ) from None
    table = LatencyTable(pipeline.backend, path, pipeline.threads)
    search = Search(pipeline, run, table, config.limits, config.search)
    finalists = search.finalists()
    fit = [f for f in finalists if f.keeps_limits]
    chosen = min(fit, key=lambda f: f.outcome.ratio or 1.0) if fit else None
    facts = {
        "search": {
            "strategy": config.search.strategy,
            **{name: sum(t.fidelity == name.upper() for t in run.trials) for name in ("f1", "f2", "f3")},
            "overhead_seconds": sum(s.seconds - s.seconds_evaluating for s in search.searches),
            "seconds": sum(s.seconds for s in search.searches),
        },
        "latency_model": search.fit,
        "agents": search.records,
        "agreement": agreement(search.problem, run.trials, pipeline.reference_ms),
        "finalists": [finalist_record(f) for f in finalists],
    }
    keeps = unpruned_limits(pipeline, config.limits)
    try:
        plan = chosen.plan if chosen else None
        return deliver(workplace, plan, facts, started, keeps=keeps, max_drop=config.limits.max_drop)
    except ConstraintError as error:
        closest = min(finalists, key=lambda f: f.drop_points, default=None)
        found = closest and (
            f" The closest plan is {1 / (closest.outcome.ratio or 1.0):.2f} times faster than the float file at a drop "
            f"of {closest.drop_points:.2f} points on the selection split; its file, of {closest.outcome.size_bytes:,} "
            f"bytes, is {pipeline.file_of(closest.plan, 'F3')}."
        )
        raise ConstraintError(
            f"search: {error}{found or ''} Allow a larger drop, more time, more bytes or more recovery epochs."
        ) from None


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
) -> dict[str, Any]:
    """Compare strategies on the problem of a run, write page and JSON to `out` and return the summary.

    Every evaluation goes through the run's journal, so an interrupted comparison resumes where it was.
    """
    pipeline, config = workplace.pipeline, workplace.config
    search = Search(
        pipeline,
        workplace.run,
        LatencyTable(pipeline.backend, table_path(), pipeline.threads),
        config.limits,
        config.search,
    )
    problem = search.problem
    budgets = [problem.uncut_ms / speedup for speedup in speedups]
    searches = comparison.run_all(
        problem,
        budgets,
        strategies,
        seeds,
        pipeline.outcome,
        f1_evaluations=f1_evaluations,
        f2_evaluations=f2_evaluations,
        progress=pipeline.progress.say,
    )
    summary = comparison.summarise(searches, problem.uncut_ms, strategies[0])
    summary |= {"command": workplace.command, "machine": workplace.run.machine, "model": workplace.source.spec}
    try:
        out.mkdir(parents=True, exist_ok=True)
        comparison.write_json(summary, out / COMPARISON)
        comparison.write_page(summary, f"Strategies on {workplace.source.spec}", out / COMPARISON_PAGE)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); give another --out.") from None
    return summary


def unpruned_limits(pipeline: Pipeline, limits: Limits) -> Callable[[Contender, Timing], bool]:
    """Return what tells whether an unpruned file keeps the limits of a search."""

    def keeps(file: Contender, timing: Timing) -> bool:
        size = file.path.stat().st_size
        outcome = Measured(file.plan.digest, "F2", 0.0, None, 0, 0, ratio=timing.ratio, size_bytes=size)
        points = error = 0.0
        if file.path != pipeline.reference:  # which is what a drop is counted from
            drop = pipeline.file_drop(file.path)
            points, error = drop.points, drop_error(drop)
        return keeps_limits(limits, outcome, points, error, pipeline.reference_ms)

    return keeps


def run_apply(workplace: Workplace, plan_text: str) -> dict[str, Any]:
    """Build the one plan that was asked for, deliver it and return the result record."""
    pipeline, run = workplace.pipeline, workplace.run
    if (run.directory / RESULT).exists():
        return finished(run.directory)
    started = time.monotonic()
    plan = read_plan(plan_text, pipeline.graph)
    outcome = pipeline.outcome(plan, "F3")
    if isinstance(outcome, Failed):
        raise ExportError(f"apply: the plan could not be built; {outcome.stage} says: {outcome.reason}")
    return deliver(workplace, plan, {}, started, always=True)


def read_plan(text: str, graph: ModelGraph) -> CompressionPlan:
    """Return the plan of `uniform:...`, a file or a bundle; raises InputError where this model cannot take it."""
    if text.startswith("uniform:"):
        plan = slicing.uniform_plan(graph, *parse_uniform(text))
    elif Path(text).is_dir():
        plan = CompressionPlan.from_dict(read_manifest(Path(text))["plan"], f"{text}: plan")
    else:
        plan = CompressionPlan.read(Path(text))
    try:
        slicing.check_plan(graph, plan)
        if plan.pattern and plan.pattern not in PATTERNS:
            raise InputError(f"plan: pattern {plan.pattern!r} is unknown; use {', '.join(PATTERNS)}.")
    except InputError as error:
        raise InputError(str(error).replace("plan:", f"plan {text}:", 1)) from None
    return plan


def finished(directory: Path) -> dict[str, Any]:
    """Return the printed part of a finished run's result."""
    path = directory / RESULT
    try:
        result: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return {key: result[key] for key in PRINTED}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: damaged ({error!r}); delete it, and the same command delivers again from what is journaled."
        ) from None


PRINTED = ("bundle", "params", "macs", "size_bytes", "size_ratio", "accuracy", "latency", "best_unpruned")
"""Keys of the result that `apply`, `search` and `demo` print with --json; other programs rely on them."""


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
    candidate = Contender("ours", pipeline.file_of(plan, "F3"), plan) if plan is not None else None
    delivery = race(pipeline, candidate, always=always, max_drop=max_drop, keeps=keeps)
    shipped = delivery.shipped
    warnings = [f"{name}: {timing.note}" for name, timing in delivery.timings.items() if timing.note]
    if candidate is not None and shipped is not candidate:
        warnings.append(
            f"compression did not help: {shipped.name} is at least as fast as the best plan, so it is shipped."
        )
    if candidate is None:
        warnings.append(f"no plan kept the limits: {shipped.name}, the fastest unpruned file that does, is shipped.")
    found_accuracy, test_labels = final_accuracy(pipeline, delivery)
    record = result_record(pipeline, delivery, found_accuracy)
    runner = pipeline.backend.build(shipped.path, pipeline.threads)
    images, labels = pipeline.selection
    samples = images[:SAMPLES].numpy()
    operators = operator_records(runner, shipped.path, samples[:1])
    bundle = write_bundle(
        run.directory / "bundle",
        BundleContents(
            model_onnx=shipped.path,
            model=shipped_model(pipeline, shipped),
            source=workplace.source.describe(),
            plan=shipped.plan,
            preprocess=pipeline.data.preprocess,
            classes=pipeline.data.classes,
            sample_inputs=samples,
            sample_logits=runner.infer(samples),
            sample_labels=None if labels is None else labels[:SAMPLES],
            test_labels=test_labels,
            measurements=record,
            operators=accuracy.operators(runner, samples[:1]),
            machine=run.machine,
            versions=pipeline.backend.versions(),
            command=workplace.command,
        ),
        overwrite=True,
    )
    result = {
        "bundle": str(bundle),
        **record,
        "layers": layer_records(pipeline.graph, shipped.plan, pipeline.precision_of(shipped.plan)),
        "candidates": candidates(pipeline, delivery, run),
        "stages": {**stage_seconds(run), **pipeline.progress.seconds, "whole command": time.monotonic() - started},
        "exports": {"filled in": pipeline.exporter.filled, "exported": dict(pipeline.exporter.exported)},
        "kept_whole": [{"layer": kept.layer, "reason": kept.reason} for kept in pipeline.graph.kept_whole],
        "operators": operators,
        "placement": pipeline.placement.candidates,
        "guard": delivery.guard.to_dict() if delivery.guard else None,
        "warnings": warnings,
        **facts,
    }
    write_atomic(run.directory / RESULT, json.dumps(result, indent=1, default=float) + "\n")
    write_report(read_run(run.directory), run.directory / "report.html")
    return {key: result[key] for key in PRINTED}


def shipped_model(pipeline: Pipeline, shipped: Contender) -> nn.Module:
    """Return the float model of which the shipped file is the export."""
    model = pipeline.cut(shipped.plan)
    weights = pipeline.weights_of(shipped.plan)
    if weights.exists():
        model.load_state_dict(load_file(str(weights)))
    return model.eval()


def operator_records(runner: Runner, path: Path, image: NDArray[np.float32]) -> list[dict[str, Any]]:
    """Return every operator that ran with its time; those that compute a layer carry the layer's name.

    The shipped file names its nodes by numbers, and the runtime appends to them what it fused.
    """
    layers = json.loads(path.with_suffix(".layers.json").read_text("utf-8"))
    records = []
    for operator in runner.profile(image, runs=50):
        layer = layers.get(operator.name.partition("_token_")[0])
        records.append({**vars(operator), "name": f"{layer}/{operator.operator}" if layer else operator.name})
    return records


def finalist_record(finalist: Finalist) -> dict[str, Any]:
    """Return a finalist as JSON values."""
    return {
        "plan": finalist.plan.digest,
        "ratio": finalist.outcome.ratio,
        "drop_points": finalist.drop_points,
        "drop_error": finalist.drop_error,
        "keeps_limits": finalist.keeps_limits,
    }


def candidates(pipeline: Pipeline, delivery: Delivery, run: Run) -> list[dict[str, Any]]:
    """Return every file of the last race, with its accuracy on the selection split."""
    images, labels = pipeline.selection
    found = []
    for contender in {c.path: c for c in (*unpruned(pipeline), delivery.shipped)}.values():
        timing = delivery.timings[contender.name]
        logits = pipeline.backend.build(contender.path, pipeline.threads).infer(images.numpy())
        found.append(
            {
                "name": contender.name,
                "ratio": timing.ratio,
                "ratio_low": timing.ratio_low,
                "ratio_high": timing.ratio_high,
                "median_ms": timing.median_ms,
                "size_bytes": contender.path.stat().st_size,
                "accuracy_selection": None if labels is None else accuracy.top1(logits, labels),
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


EXPORTED = {
    "onnx": ("model.onnx", "preprocess.json", "labels.json", "samples.npz", "run.py"),
    "torch": ("weights.safetensors", "shapes.json", "preprocess.json", "labels.json", "manifest.json"),
}
"""Files of a bundle that each export format takes along."""

SAME_ANSWERS = 0.01
"""Nats between the file for one image and that for many: there a bias is added behind a product, and rounded again."""

STORED = "model.stored"


@dataclass(frozen=True)
class Storage:
    """How the form `stored` is written; see `codec.store`.

    Attributes:
        bits: Of every weight, where there is no limit.
        sparsity: Share of each layer's weights that is left out, the smallest.
        max_bytes: Of the stored file; the bits of each layer are then chosen by `strategy` in `trials` judged files.
    """

    bits: int = 4
    scheme: str = "linear"
    sparsity: float = 0.0
    max_bytes: int | None = None
    strategy: str = "knapsack"
    trials: int = 48

    def check(self) -> None:
        """Raise InputError for what the codec or the search of bits cannot use."""
        codec.check(self.bits, self.scheme, self.sparsity)
        if self.strategy not in STRATEGIES:
            raise InputError(f"--strategy {self.strategy!r} is unknown; use {', '.join(STRATEGIES)}.")


def export_files(
    run: Path, form: str, out: Path, storage: Storage | None = None, *, dynamic_batch: bool = False
) -> list[Path]:
    """Write the shipped model of a finished run into a new folder, in one of its forms; return the files.

    `storage` is for the form `stored`; `dynamic_batch` is for the form `onnx`.
    """
    storage = storage or Storage()
    forms = (*EXPORTED, "tensorrt", "stored")
    if form not in forms:
        raise InputError(f"--format {form!r} is unknown; use {', '.join(forms[:-1])} or {forms[-1]}.")
    if dynamic_batch and form != "onnx":
        raise InputError(f"--dynamic-batch is for --format onnx, not {form}; leave it out.")
    if form == "stored":
        storage.check()
    bundle = run / "bundle"
    if not bundle.is_dir():
        raise InputError(f"{run}: holds no bundle; give the folder of a finished search or apply.")
    if missing := [
        name
        for name in EXPORTED.get(form, EXPORTED["onnx" if form == "stored" else "torch"])
        if not (bundle / name).is_file()
    ]:
        raise InputError(
            f"{bundle}: {missing[0]} is not there; `hirelc-deploy verify {bundle}` says what else is wrong."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists and is not empty; give another --out.")
    if form == "tensorrt":
        return write_folder(run, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if dynamic_batch:
            return export_batched(run, out)
        if form == "stored":
            model = bundle / EXPORTED["onnx"][0]
            chosen = {} if storage.max_bytes is None else chosen_bits(run, model, storage, storage.max_bytes)
            codec.store(model, out / STORED, storage.bits, storage.scheme, sparsity=storage.sparsity, bits_of=chosen)
            beside = [Path(restore.__file__), *(bundle / name for name in ("run.py", "preprocess.json", "labels.json"))]
            return [out / STORED, *(Path(shutil.copy2(file, out / file.name)) for file in beside)]
        return [Path(shutil.copy2(bundle / name, out / name)) for name in EXPORTED[form]]
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}).") from None


def chosen_bits(run: Path, model: Path, storage: Storage, max_bytes: int) -> Mapping[str, int]:
    """Return tensor name to bits for the shipped file of a run; see `best_bits`."""
    pipeline = open_workplace(JobConfig.read(run / "config.toml"), run, "", Progress(quiet=True)).pipeline
    return best_bits(pipeline, model, storage, max_bytes).bits


def best_bits(pipeline: Pipeline, model: Path, storage: Storage, max_bytes: int) -> Chosen:
    """Return bits of each tensor, chosen by what the answers of a file lose on the selection images."""
    images = pipeline.selection[0][: pipeline.effort.search_images].numpy()
    whole = pipeline.backend.build(model, pipeline.threads).infer(images)

    def judge(path: Path) -> float:
        return accuracy.kl_divergence(whole, pipeline.backend.build(path, pipeline.threads).infer(images))

    choice = StoredBits(model, judge, storage.scheme, storage.sparsity)
    return choice.choose(max_bytes, storage.strategy, storage.trials, pipeline.seed)


def export_batched(run: Path, out: Path) -> list[Path]:
    """Write the shipped model of a run as a file for any number of images, beside what describes its input.

    Raises:
        ExportError: its answers are not those of the shipped file, but for single roundings.
    """
    bundle, path = run / "bundle", out / EXPORTED["onnx"][0]
    workplace = open_workplace(JobConfig.read(run / "config.toml"), run, "", Progress(quiet=True))
    pipeline = workplace.pipeline
    plan = CompressionPlan.from_dict(read_manifest(bundle).get("plan"), f"{bundle}: plan")
    model = load_bundle(bundle, None if workplace.source.is_timm else workplace.source.build)
    pipeline.write_batched(model, plan, path)
    images = pipeline.selection[0][: pipeline.effort.search_images].numpy()
    shipped, batched = (
        pipeline.backend.build(file, pipeline.threads).infer(images) for file in (bundle / path.name, path)
    )
    divergence = accuracy.kl_divergence(shipped, batched)
    if not divergence <= SAME_ANSWERS:
        path.unlink()
        raise ExportError(
            f"{path}: differs from the shipped file by {divergence:.2g} nats, allowed is {SAME_ANSWERS:g}."
        )
    return [path, *(Path(shutil.copy2(bundle / name, out / name)) for name in ("preprocess.json", "labels.json"))]
