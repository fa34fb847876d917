"""In: the options of a job. Out: `search`, `apply`, `demo`: a bundle and a report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hirelc_deploy.errors import ConstraintError, InputError
from hirelc_deploy.progress import Progress

if TYPE_CHECKING:
    from hirelc_deploy.config import Limits
    from hirelc_deploy.options import JobOptions, SearchOptions
    from hirelc_deploy.returned import Result

from hirelc_deploy.cli.application import app, show
from hirelc_deploy.cli.options import (
    Batch,
    CalibrationImages,
    CropPct,
    DataDir,
    DataSpec,
    Equalise,
    Exclude,
    FloatLayers,
    Geometry,
    Include,
    InputSize,
    Interpolation,
    Jobs,
    Json,
    LearningRate,
    LossSpec,
    LowerIsBetter,
    Mean,
    MetricSpec,
    Model,
    ModelArg,
    Out,
    Pretrained,
    Quiet,
    RangesOf,
    Ray,
    RecoveryBatch,
    RecoveryEpochs,
    Seed,
    SelectionImages,
    Std,
    SyncNorms,
    Target,
    TaskArg,
    TaskName,
    Threads,
    Track,
    Weights,
    WeightsKey,
    arguments_of,
    methods,
    numbers,
)


def shown(result: Result, as_json: bool) -> None:
    """Print what a job gave."""
    from hirelc_deploy.jobs.workplace import PRINTED

    show({key: result.record[key] for key in PRINTED}, as_json, result.summary)


def command_line() -> str:
    """Return the command of this process, as a bundle keeps it."""
    return shlex.join(["hirelc-deploy", *sys.argv[1:]])


AS_THEY_ARE = (
    *(
        "weights",
        "weights_key",
        "pretrained",
        "data_dir",
        "calibration_images",
        "selection_images",
        "geometry",
        "interpolation",
        "crop_pct",
    ),
    *("recovery_epochs", "learning_rate", "recovery_batch", "sync_norms", "threads", "batch", "seed"),
)
"""Options of the command line that the Python calls take by the same name."""


def job_options(given: Mapping[str, Any]) -> JobOptions:
    """Return the options that jobs have in common, as the Python calls take them.

    Args:
        given: The parameters of the command, by name.
    """
    return {
        **{name: given[name] for name in AS_THEY_ARE},  # type: ignore[typeddict-item]
        "command": command_line(),
        "model_args": arguments_of("--model-arg", given["model_arg"]),
        "task_options": arguments_of("--task-arg", given["task_arg"]),
        "input_size": numbers("--input-size", given["input_size"], int),
        "mean": numbers("--mean", given["mean"], float),
        "std": numbers("--std", given["std"], float),
        "lower_is_better": given["lower_is_better"] or None,
        "exclude": given["exclude"] or (),
        "include": given["include"] or (),
        "float_layers": given["float_layers"] or (),
        "equalise": given["equalise"] or (),
        "ranges": methods("--ranges", given["ranges"]),
        "track": given["track"] or (),
        "progress": Progress(quiet=given["quiet"]),
    }


@app.command()
def search(
    context: typer.Context,
    model: Model,
    out: Out,
    data: DataSpec = None,
    target: Target = "cpu",
    model_arg: ModelArg = None,
    weights: Weights = None,
    weights_key: WeightsKey = None,
    pretrained: Pretrained = False,
    data_dir: DataDir = None,
    task: TaskName = None,
    task_arg: TaskArg = None,
    metric: MetricSpec = None,
    lower_is_better: LowerIsBetter = False,
    loss: LossSpec = None,
    max_drop: Annotated[
        str | None,
        typer.Option(
            metavar="POINTS[,...]",
            help="Points of the metric (or its own unit) that may be lost; 1.0 if nothing is limited.",
        ),
    ] = None,
    speedup: Annotated[
        str | None,
        typer.Option(
            metavar="TIMES[,...]",
            help="Times faster than the uncut float file. 2,4,8 makes a bundle for each, measured once, and one page.",
        ),
    ] = None,
    max_latency_ms: Annotated[
        str | None, typer.Option(metavar="MS[,...]", help="Milliseconds of one inference on the target.")
    ] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Size of the shipped file.")] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(help="Peak memory of the process that runs the file on the target, for example 200M."),
    ] = None,
    max_energy_mj: Annotated[
        float | None, typer.Option(help="Millijoules that the target draws during one inference, where it tells them.")
    ] = None,
    strategy: Annotated[
        str,
        typer.Option(help="hirelc, two-stage, knapsack, greedy, taylor, tpe, nsga2, flat, random, uniform, untrained."),
    ] = "hirelc",
    budget: Annotated[
        str | None,
        typer.Option(help="Wall time of a search, for example 30m; where it is short, recoveries are shortened."),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Cut models judged per latency budget (F1).")] = 24,
    finalists: Annotated[int, typer.Option(min=1, help="Plans recovered by training, at most (F3).")] = 3,
    race: Annotated[
        int, typer.Option(min=0, help="Plans of equal time that begin each recovery; half leave at a rung. 0: no race.")
    ] = 0,
    options: Annotated[int, typer.Option(min=2, help="Widths offered per unit, at most.")] = 8,
    warm_start: Annotated[
        Path | None,
        typer.Option(help="Folder of a finished search, of this or another model, whose agents begin here."),
    ] = None,
    library: Annotated[
        Path | None,
        typer.Option(help="Folder of another run of the same model and data, whose measurements are taken over."),
    ] = None,
    further_recovery: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Of a recovery, for a plan within one that is recovered already: it begins at its weights.",
        ),
    ] = None,
    depth: Annotated[
        bool, typer.Option("--depth/--widths-only", help="Whether residual branches may be left out.")
    ] = True,
    precisions: Annotated[
        bool,
        typer.Option("--precisions", help="Blocks may stay float where rounding costs more than cutting elsewhere."),
    ] = False,
    recovery_epochs: RecoveryEpochs = 1.0,
    learning_rate: LearningRate = 0.01,
    recovery_batch: RecoveryBatch = None,
    sync_norms: SyncNorms = False,
    calibration_images: CalibrationImages = None,
    selection_images: SelectionImages = None,
    input_size: InputSize = None,
    mean: Mean = None,
    std: Std = None,
    geometry: Geometry = None,
    interpolation: Interpolation = None,
    crop_pct: CropPct = None,
    exclude: Exclude = None,
    include: Include = None,
    float_layers: FloatLayers = None,
    equalise: Equalise = None,
    ranges: RangesOf = None,
    threads: Threads = None,
    batch: Batch = None,
    jobs: Jobs = None,
    ray: Ray = None,
    track: Track = None,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the fastest file this target can run within the limits.

    \b
    Example: hirelc-deploy search --model resnet18 --weights w.safetensors --data imagefolder:photos --out runs/a
    """
    from hirelc_deploy import api
    from hirelc_deploy.config import parse_bytes
    from hirelc_deploy.together import ranks

    ranks.join()
    memory = None if max_memory is None else parse_bytes(max_memory)
    if max_drop is None and speedup is None and max_latency_ms is None:
        max_drop = "1.0"
    limits = several_limits(
        {"max_drop": max_drop, "speedup": speedup, "max_latency_ms": max_latency_ms},
        {"max_bytes": max_bytes, "max_memory_bytes": memory, "max_energy_mj": max_energy_mj},
    )
    asked: SearchOptions = {
        "task": task,
        "target": target,
        "metric": metric,
        "loss": loss,
        "strategy": strategy,
        "budget": budget,
        "trials": trials,
        "finalists": finalists,
        "race": race,
        "options": options,
        "warm_start": warm_start,
        "library": library,
        "further_recovery": further_recovery,
        "depth": depth,
        "precisions": precisions,
        "jobs": jobs,
        "ray": ray,
        **job_options(context.params),
    }
    if len(limits) == 1:
        shown(api.search(model, data, out=out, limits=limits[0], **asked), as_json)
        return
    found = api.family(model, data, out=out, limits=limits, **asked)
    show(dict(found.record), as_json, str(found))
    if found.missed:
        raise typer.Exit(ConstraintError.exit_code)


def several_limits(several: Mapping[str, str | None], single: Mapping[str, float | None]) -> list[Limits]:
    """Return the limits that the options of a search mean: one of them may have several values.

    Args:
        several: Name of a limit to what was given, numbers with commas between them.
        single: Name of a limit to its value.
    """
    from hirelc_deploy.config import Limits

    values = {name: numbers(_option(name), text, float) or (None,) for name, text in several.items()}
    varied = [name for name, given in values.items() if len(given) > 1]
    if len(varied) > 1:
        first, second = map(_option, varied[:2])
        raise InputError(f"{first} and {second}: one of them may have several values; give the other one a single one.")
    one = {name: given[0] for name, given in values.items()}
    name = varied[0] if varied else next(iter(values))
    return [Limits(**{**one, **single, name: value}) for value in values[name]]


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@app.command()
def apply(
    context: typer.Context,
    model: Model,
    out: Out,
    plan: Annotated[
        str,
        typer.Option(
            help="A plan file, uniform:keep=0.5,precision=int8 (or float, auto), or a bundle: its recovery goes on.",
            show_default=False,
        ),
    ],
    data: DataSpec = None,
    target: Target = "cpu",
    model_arg: ModelArg = None,
    weights: Weights = None,
    weights_key: WeightsKey = None,
    pretrained: Pretrained = False,
    data_dir: DataDir = None,
    task: TaskName = None,
    task_arg: TaskArg = None,
    metric: MetricSpec = None,
    lower_is_better: LowerIsBetter = False,
    loss: LossSpec = None,
    recovery_epochs: RecoveryEpochs = 1.0,
    learning_rate: LearningRate = 0.01,
    recovery_batch: RecoveryBatch = None,
    sync_norms: SyncNorms = False,
    calibration_images: CalibrationImages = None,
    selection_images: SelectionImages = None,
    input_size: InputSize = None,
    mean: Mean = None,
    std: Std = None,
    geometry: Geometry = None,
    interpolation: Interpolation = None,
    crop_pct: CropPct = None,
    exclude: Exclude = None,
    include: Include = None,
    float_layers: FloatLayers = None,
    equalise: Equalise = None,
    ranges: RangesOf = None,
    threads: Threads = None,
    batch: Batch = None,
    track: Track = None,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Build one plan, without a search: cut, recover, quantize, time, bundle.

    \b
    Example: hirelc-deploy apply --model resnet18 --weights w.pth --data npz:d.npz --plan uniform:keep=0.5 --out half
    """
    from hirelc_deploy import api
    from hirelc_deploy.together import ranks

    ranks.join()
    result = api.apply(
        model,
        data,
        plan,
        out=out,
        task=task,
        target=target,
        metric=metric,
        loss=loss,
        **job_options(context.params),
    )
    shown(result, as_json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder that is made for the results.")] = Path("runs/demo"),
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compress the embedded CIFAR-10 network on this CPU: the real search with a small budget, without a network.

    \b
    Example: hirelc-deploy demo --out runs/demo
    """
    from hirelc_deploy import api
    from hirelc_deploy.demo import demo_config

    shown(api.run_config(demo_config(seed), out, Progress(quiet=quiet), command_line()), as_json)
