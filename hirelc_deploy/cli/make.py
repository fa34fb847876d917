"""In: the options of a job. Out: `search`, `apply`, `demo`: a bundle and a report."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hirelc_deploy.progress import Progress

if TYPE_CHECKING:
    from hirelc_deploy.config import JobConfig

from hirelc_deploy.cli.application import app, show
from hirelc_deploy.cli.options import (
    CalibrationImages,
    DataDir,
    DataSpec,
    Exclude,
    Include,
    InputSize,
    Jobs,
    Json,
    LearningRate,
    Mean,
    Model,
    ModelArg,
    Out,
    Pretrained,
    Quiet,
    Ray,
    RecoveryEpochs,
    Seed,
    SelectionImages,
    Std,
    Target,
    Threads,
    Weights,
    model_source,
    preprocess_config,
)


def run_job(config: JobConfig, out: Path, plan: str | None, as_json: bool, quiet: bool, **side_by_side: Any) -> None:
    """Open the workplace, do the job and print what it gave; `side_by_side` as of `job.open_workplace`."""
    from hirelc_deploy.jobs.apply import run_apply
    from hirelc_deploy.jobs.search import run_search
    from hirelc_deploy.jobs.workplace import open_workplace

    progress = Progress(quiet=quiet)
    command = shlex.join(["hirelc-deploy", *sys.argv[1:]])
    workplace = open_workplace(config, out, command, progress, **side_by_side)
    with workplace.run:
        result = run_apply(workplace, plan) if plan is not None else run_search(workplace)
    show(result, as_json, summary(result, out))


def summary(result: dict[str, Any], out: Path) -> str:
    """Return what a person wants to know first about a finished job."""
    latency, unpruned, accuracy = result["latency"], result["best_unpruned"], result["accuracy"]
    faster = 1 / latency["ratio"]
    lines = [
        f"{faster:.2f} times faster than the uncut float file "
        f"({1 / latency['ratio_high']:.2f} to {1 / latency['ratio_low']:.2f}), verdict: {latency['verdict']}",
        f"{unpruned['ratio'] / latency['ratio']:.2f} times faster than the best unpruned file ({unpruned['name']})",
        f"{result['size_ratio']:.1f} times smaller: {result['size_bytes']:,} bytes, {result['params']:,} parameters, "
        f"{result['macs']:,} multiply-accumulates",
    ]
    if accuracy["test"] is None:
        lines.append("no accuracy is claimed: the data has no labels")
    else:
        lines.append(
            f"accuracy on the test split {100 * accuracy['test']:.2f} % (uncut {100 * accuracy['baseline_test']:.2f}), "
            f"drop {accuracy['drop_points']:+.2f} points ({accuracy['drop_low']:+.2f} to {accuracy['drop_high']:+.2f})"
        )
    lines += [f"bundle: {result['bundle']}", f"report: {out / 'report.html'}"]
    return "\n".join(lines)


@app.command()
def search(
    model: Model,
    data: DataSpec,
    out: Out,
    target: Target = "cpu",
    model_arg: ModelArg = None,
    weights: Weights = None,
    pretrained: Pretrained = False,
    data_dir: DataDir = None,
    max_drop: Annotated[
        float | None, typer.Option(help="Accuracy points that may be lost; 1.0 if nothing is limited.")
    ] = None,
    speedup: Annotated[float | None, typer.Option(help="Times faster than the uncut float file.")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(help="Milliseconds of one inference on the target.")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Size of the shipped file.")] = None,
    strategy: Annotated[
        str, typer.Option(help="hirelc, two-stage, knapsack, greedy, tpe, nsga2, flat, random, uniform or untrained.")
    ] = "hirelc",
    budget: Annotated[
        str | None, typer.Option(help="Wall time, for example 30m; the last training may end after it.")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Cut models judged per latency budget (F1).")] = 24,
    finalists: Annotated[int, typer.Option(min=1, help="Plans recovered by training, at most (F3).")] = 3,
    options: Annotated[int, typer.Option(min=2, help="Widths offered per unit, at most.")] = 8,
    warm_start: Annotated[
        Path | None,
        typer.Option(help="Folder of a finished search, of this or another model, whose agents begin here."),
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
    calibration_images: CalibrationImages = None,
    selection_images: SelectionImages = None,
    input_size: InputSize = None,
    mean: Mean = None,
    std: Std = None,
    exclude: Exclude = None,
    include: Include = None,
    threads: Threads = None,
    jobs: Jobs = None,
    ray: Ray = None,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the fastest file this target can run within the limits.

    \b
    Example: hirelc-deploy search --model resnet18 --weights w.safetensors --data imagefolder:photos --out runs/a
    """
    from hirelc_deploy.config import DataConfig, JobConfig, Limits, ModelConfig, SearchConfig, parse_duration

    if max_drop is None and speedup is None and max_latency_ms is None:
        max_drop = 1.0
    config = JobConfig(
        model=ModelConfig(**model_source(model, weights, model_arg, pretrained)),
        data=DataConfig(data, str(data_dir.resolve()) if data_dir else None, calibration_images, selection_images),
        target=target,
        seed=seed,
        threads=threads,
        recovery_epochs=recovery_epochs,
        learning_rate=learning_rate,
        exclude=tuple(exclude or ()),
        include=tuple(include or ()),
        preprocess=preprocess_config(input_size, mean, std),
        limits=Limits(max_drop, max_latency_ms, speedup, max_bytes),
        search=SearchConfig(
            strategy,
            parse_duration(budget) if budget else None,
            trials,
            finalists,
            options,
            str(warm_start.resolve()) if warm_start else None,
            depth,
            precisions,
        ),
    )
    run_job(config, out, None, as_json, quiet, jobs=jobs, ray=ray)


@app.command()
def apply(
    model: Model,
    data: DataSpec,
    out: Out,
    plan: Annotated[
        str,
        typer.Option(
            help="A plan file, uniform:keep=0.5,precision=int8 (or float, auto), or a bundle: its recovery goes on.",
            show_default=False,
        ),
    ],
    target: Target = "cpu",
    model_arg: ModelArg = None,
    weights: Weights = None,
    pretrained: Pretrained = False,
    data_dir: DataDir = None,
    recovery_epochs: RecoveryEpochs = 1.0,
    learning_rate: LearningRate = 0.01,
    calibration_images: CalibrationImages = None,
    selection_images: SelectionImages = None,
    input_size: InputSize = None,
    mean: Mean = None,
    std: Std = None,
    exclude: Exclude = None,
    include: Include = None,
    threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Build one plan, without a search: cut, recover, quantize, time, bundle.

    \b
    Example: hirelc-deploy apply --model resnet18 --weights w.pth --data npz:d.npz --plan uniform:keep=0.5 --out half
    """
    from hirelc_deploy.config import DataConfig, JobConfig, ModelConfig

    config = JobConfig(
        model=ModelConfig(**model_source(model, weights, model_arg, pretrained)),
        data=DataConfig(data, str(data_dir.resolve()) if data_dir else None, calibration_images, selection_images),
        target=target,
        plan=plan,
        seed=seed,
        threads=threads,
        recovery_epochs=recovery_epochs,
        learning_rate=learning_rate,
        exclude=tuple(exclude or ()),
        include=tuple(include or ()),
        preprocess=preprocess_config(input_size, mean, std),
    )
    run_job(config, out, plan, as_json, quiet)


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
    from hirelc_deploy.demo import demo_config

    run_job(demo_config(seed), out, None, as_json, quiet)
