"""In: a configuration and a folder. Out: everything a job needs, opened; every problem with it is one sentence."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from hirelc_deploy.compress import slicing
from hirelc_deploy.compress.integer.forms import SIXTEEN_BIT_PATTERNS
from hirelc_deploy.compress.integer.quantize import PATTERNS
from hirelc_deploy.compress.recovery import Recovery
from hirelc_deploy.config import LARGEST_INPUT, JobConfig
from hirelc_deploy.deliver.race import metric_record
from hirelc_deploy.deliver.read import load as load_bundle
from hirelc_deploy.deliver.read import read_manifest
from hirelc_deploy.errors import HirelcError, InputError, home
from hirelc_deploy.evaluate.by_layer import ByLayer
from hirelc_deploy.evaluate.effort import GRADIENT_VALUES, LEAST_BATCH, Effort
from hirelc_deploy.evaluate.leading import take_up
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.evaluate.uncut import proven_graph
from hirelc_deploy.graph.model_graph import ModelGraph
from hirelc_deploy.inputs.data.load import configured_data
from hirelc_deploy.inputs.data.splits import Data
from hirelc_deploy.inputs.fitting import Fitted, answering, fit
from hirelc_deploy.inputs.models.given import Source
from hirelc_deploy.inputs.models.onnx_files.whole import FileNetwork
from hirelc_deploy.inputs.models.ordinary import notes_of
from hirelc_deploy.inputs.models.source import ModelSource
from hirelc_deploy.jobs.library import take_over
from hirelc_deploy.measure.backend import TENSORRT_FORM
from hirelc_deploy.measure.machine import describe
from hirelc_deploy.measure.targets import find_target, open_others, open_target
from hirelc_deploy.plan import CompressionPlan, parse_uniform
from hirelc_deploy.progress import Progress
from hirelc_deploy.runs import CONFIG, CONTENTS, RESULT, Run
from hirelc_deploy.tasks.classification import CLASSIFICATION
from hirelc_deploy.together.processes import Ahead, Evaluators
from hirelc_deploy.together.ray_cluster import connect
from hirelc_deploy.together.ray_evaluators import RayAhead, default_evaluators
from hirelc_deploy.trackers.contract import check_trackers
from hirelc_deploy.user_code import factory_modules


@dataclass(frozen=True)
class Workplace:
    """What every job needs, opened from its configuration.

    Attributes:
        task: What makes the task again; see `fitting.Fitted`.
        notes: Sentences about how model and data were taken.
        track: Names of the trackers that are told what is measured.
        contents: Hashes that tell this model and these data from others of the same names.
    """

    config: JobConfig
    pipeline: Pipeline
    run: Run
    source: Source
    task: Mapping[str, Any]
    command: str
    notes: tuple[str, ...] = ()
    track: tuple[str, ...] = ()
    contents: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Given:
    """What a Python call hands over as it is, in place of what a configuration can only name; None where it does not.

    Attributes:
        metric, loss: The user's own functions.
        task_options: As they are: arrays and functions, where the configuration has lists and names.
    """

    source: Source | None = None
    data: Data | None = None
    metric: Callable[..., Any] | None = None
    loss: Callable[..., Any] | None = None
    task_options: Mapping[str, Any] | None = None


def open_workplace(
    config: JobConfig,
    directory: Path,
    command: str,
    progress: Progress,
    *,
    jobs: int | None = None,
    ray: str | None = None,
    given: Given | None = None,
    track: Sequence[str] = (),
    again: bool = False,
) -> Workplace:
    """Load model and data, open the target and the run directory; every problem with them is one sentence.

    Args:
        jobs: Processes that judge cut models side by side. It changes no result, so it is no part of the configuration.
        ray: Address of the Ray cluster on whose hosts they are; None for this machine.
        given: Objects in place of what the configuration names.
        track: Trackers that are told what is measured; no part of the configuration either.
        again: The configuration is that of a run which is there: the file of its plan is not read once more.
    """
    check_trackers(track)
    given = given or Given()
    evaluators, jobs = evaluators_of(ray, jobs, config.model.spec, progress.say)
    target = find_target(config.target)
    backend = open_target(target)
    fitted = fitted_of(config, given)
    model, data, source, task = fitted.model, fitted.data, fitted.source, fitted.task
    notes = (*data.notes, *notes_of(model))
    for text in notes:
        progress.say(f"note: {text}")
    config.limits.check_against(task.metric.scale)
    if source.is_untrained and data.labelled:
        raise InputError(
            f"--model {source.spec}: its weights are random; give trained ones with --weights FILE, or --pretrained "
            "for timm's own (for structural work without accuracy: --data synthetic:64)."
        )
    # Whatever can be wrong with the options is found before the run directory is made.
    values = math.prod(data.preprocess.input_size)
    if (config.batch or 1) * values > LARGEST_INPUT:
        raise InputError(
            f"batch = {config.batch}: {config.batch or 1:,} images of {values:,} values each; at most "
            f"{LARGEST_INPUT:,} values go into one inference."
        )
    graph = proven_graph(model, data, config.exclude, config.include)
    is_file = isinstance(model, FileNetwork)
    if is_file and backend.precisions()[0].form == TENSORRT_FORM:
        raise InputError(
            f"--model {source.spec}: {graph.kept_whole[0].reason}, so it is placed as it is, which is for ONNX Runtime "
            f"alone; use --target cpu, or give its torch code."
        )
    if not config.search.depth:
        graph = graph.without_branches()
    by_layer = ByLayer.of(
        [layer.name for layer in graph.layers if layer.shape.kind != "attention"],
        config.float_layers,
        config.ranges,
        config.equalise,
    )
    options = config
    if config.plan is not None and not again:
        plan = read_plan(config.plan, graph)
        if is_file and config.plan.startswith("uniform:") and parse_uniform(config.plan)[0] < 1:
            raise InputError(
                f"--plan {config.plan}: nothing of {source.spec} can be cut: {graph.kept_whole[0].reason}; use "
                "--plan uniform:precision=auto, which places its precision."
            )
        if not config.plan.startswith("uniform:"):  # a file may be edited between two runs
            options = replace(config, plan=f"{config.plan} ({plan.digest})")
    contents = contents_of(source, data, given.metric or config.task.metric, given.loss or config.task.loss)
    run = Run.open(directory, options.to_toml(), describe(backend))
    with closed_where_refused(run):
        check_contents(run, contents)
    trains = not is_file and not config.data.spec.startswith("pixels:")  # random pictures teach nothing
    effort = Effort(recovery=recovery_of(config, values) if trains else None).for_inputs(values)
    earlier = Path(config.plan) / "weights.safetensors" if config.plan and not is_file else None
    pipeline = Pipeline(
        model,
        data,
        backend,
        run,
        effort=effort,
        task=task,
        seed=config.seed,
        threads=config.threads or target.threads,
        batch=config.batch or 1,
        progress=progress,
        graph=graph,
        start=earlier if earlier is not None and earlier.is_file() else None,
        jobs=jobs,
        evaluators=evaluators,
        rounds=config.search.precisions,
        others=() if is_file else open_others(target),
        by_layer=by_layer,
    )
    with closed_where_refused(run):
        if config.search.library is not None:
            take_over(pipeline, config, Path(config.search.library))
        take_up(pipeline)
    return Workplace(config, pipeline, run, source, fitted.record, command, notes, tuple(track), contents)


def beside(former: Workplace, config: JobConfig, directory: Path) -> Workplace:
    """Open the workplace of a search at other limits, which begins with all that a former one measured.

    Model, data and target are those that are open; what is known of the uncut model is not found anew.

    Args:
        config: That of the former one but for the limits.
    """
    run = Run.open(directory, config.to_toml(), describe(former.pipeline.backend))
    with closed_where_refused(run):
        check_contents(run, former.contents)
        pipeline = former.pipeline.in_run(run)
        pipeline.progress.seconds.clear()  # those of its stages are in the former one's result
        pipeline.progress.left.expect_nothing()
        take_over(pipeline, config, former.run.directory)
        take_up(pipeline)
    return replace(former, config=config, pipeline=pipeline, run=run)


@contextmanager
def closed_where_refused(run: Run) -> Iterator[None]:
    """Close a run, and remove it where it is new, when something with it is refused."""
    try:
        yield
    except HirelcError as error:
        run.__exit__(type(error), error, error.__traceback__)
        raise


def fitted_of(config: JobConfig, given: Given) -> Fitted:
    """Return model, data and task of a configuration, made for each other."""
    data = given.data or configured_data(config)
    weights = Path(config.model.weights) if config.model.weights else None
    source = given.source or ModelSource(
        config.model.spec, weights, dict(config.model.arguments), config.model.pretrained, config.model.weights_key
    )
    wanted = replace(config.task, options={**config.task.options, **(given.task_options or {})})
    return fit(source, data, config.preprocess.overrides(), wanted, given.metric, given.loss)


def reopened(directory: Path, progress: Progress, *, command: str = "", given: Given | None = None) -> Workplace:
    """Open the workplace of a run that is there; see `open_workplace`."""
    config = JobConfig.read(directory / CONFIG)
    return open_workplace(config, directory, command, progress, given=given, again=True)


def shipped_of(workplace: Workplace) -> tuple[nn.Module, CompressionPlan]:
    """Return the float model in a run's bundle, answering as its task wants, and its plan."""
    bundle, pipeline = workplace.run.directory / "bundle", workplace.pipeline
    plan = CompressionPlan.from_dict(read_manifest(bundle)["plan"], f"{bundle}: plan")
    model = load_bundle(bundle, None if workplace.source.is_timm else workplace.source.build)
    return answering(model, pipeline.task, model(pipeline.uncut.example)), plan


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


def contents_of(source: Source, data: Data, *functions: Callable[..., Any] | str | None) -> dict[str, str | None]:
    """Return hashes that tell a model and its data from others of the same names.

    Args:
        functions: The user's metric and loss: a name, or the function itself.
    """
    described = source.describe()
    return {
        "weights": described.get("weights", {}).get("sha256"),
        "factory": described.get("spec_sha256"),
        "images": data.fingerprint(),
        **{
            name: digest
            for name, one in zip(("metric", "loss"), functions, strict=False)
            if (digest := code_digest(one))
        },
    }


def check_contents(run: Run, contents: Mapping[str, str | None]) -> None:
    """Raise InputError where a run that is resumed was made with other weights, code or images of the same name."""
    if not run.trials and not (run.directory / RESULT).exists():
        run.remember(CONTENTS, lambda: dict(contents))
    before = run.fact(CONTENTS) or contents  # an older run did not say
    if changed := [name for name, value in contents.items() if before.get(name, value) != value]:
        raise InputError(
            f"{run.directory}: this run was made with other {changed[0]} under the same name; "
            "give another --out, or put back what was there."
        )


def code_digest(function: Callable[..., Any] | str | None) -> str | None:
    """Return a hash of the code of a user's function, or of the file that one is named in; None where it is unknown."""
    if isinstance(function, str):
        file = Path(function.rpartition(":")[0])
        return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else None
    try:
        return None if function is None else hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]
    except (OSError, TypeError):  # written in a console, or an object of a class
        return None


def recovery_of(config: JobConfig, values: int) -> Recovery | None:
    """Return the fine-tuning that a configuration asks for, or None.

    Args:
        values: Of one image: a step keeps the activations of its whole batch, so large images come in smaller ones.
    """
    if not config.recovery_epochs:
        return None
    batch = max(LEAST_BATCH, min(Recovery.batch_size, GRADIENT_VALUES // values))
    asked, norms = config.recovery_batch, config.sync_norms
    return Recovery(config.recovery_epochs, batch, config.learning_rate, asked_batch=asked, sync_norms=norms)


def table_path() -> Path:
    """Return where layer times are kept: they belong to a machine and a runtime, not to a run."""
    base = os.environ.get("HIRELC_DEPLOY_CACHE") or os.environ.get("XDG_CACHE_HOME") or str(home() / ".cache")
    return Path(base) / "hirelc-deploy" / "layer-times.jsonl"


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
        if plan.pattern and plan.pattern not in (*PATTERNS, *SIXTEEN_BIT_PATTERNS):
            raise InputError(f"plan: pattern {plan.pattern!r} is unknown; use {', '.join(PATTERNS)}.")
    except InputError as error:
        raise InputError(str(error).replace("plan:", f"plan {text}:", 1)) from None
    return plan


def finished(directory: Path) -> dict[str, Any]:
    """Return the printed part of a finished run's result."""
    path = directory / RESULT
    try:
        result: dict[str, Any] = json.loads(path.read_text("utf-8"))
        result.setdefault("metric", metric_record(CLASSIFICATION))  # runs from before other tasks
        return {key: result[key] for key in PRINTED}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: damaged ({error!r}); delete it, and the same command delivers again from what is journaled."
        ) from None


PRINTED = ("bundle", "params", "macs", "size_bytes", "size_ratio", "metric", "accuracy", "latency", "best_unpruned")
"""Keys of the result that `apply`, `search` and `demo` print with --json; other programs rely on them."""
