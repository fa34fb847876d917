"""In: a model, files or a target. Out: `inspect`, `profile`, `benchmark`, `targets`, `doctor`: what they are."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from hirelc_deploy.cli.application import app, show, targets_app
from hirelc_deploy.cli.options import (
    Batch,
    Exclude,
    Include,
    InputSize,
    Json,
    Model,
    ModelArg,
    Out,
    Pretrained,
    Quiet,
    Target,
    Threads,
    Weights,
    WeightsKey,
    arguments_of,
    numbers,
)
from hirelc_deploy.errors import InputError
from hirelc_deploy.progress import Progress


@app.command()
def inspect(
    model: Model,
    model_arg: ModelArg = None,
    weights: Weights = None,
    weights_key: WeightsKey = None,
    pretrained: Pretrained = False,
    input_size: InputSize = None,
    exclude: Exclude = None,
    include: Include = None,
    verdict: Annotated[
        bool, typer.Option("--verdict", help="Foretell what INT8, bf16, cutting and other runtimes can bring.")
    ] = False,
    target: Annotated[
        str | None,
        typer.Option("--target", help="Of the verdict, a target profile; cpu if not given."),
    ] = None,
    threads: Threads = None,
    seconds: Annotated[float | None, typer.Option(help="Of the verdict; 60 if not given.", show_default=False)] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what a model consists of, what can be cut, and what is kept whole and why.

    With --exclude or --include also what each pattern matches, before anything is cut. With --verdict also what can be
    gained on a target: foretold from timed pieces of the network, in under a minute, without training.

    \b
    Example: hirelc-deploy inspect --model resnet18 --verdict --target cpu
    """
    from hirelc_deploy import api

    found = api.inspect(
        model,
        weights=weights,
        weights_key=weights_key,
        model_args=arguments_of("--model-arg", model_arg),
        pretrained=pretrained,
        input_size=numbers("--input-size", input_size, int),
        exclude=exclude or (),
        include=include or (),
        verdict=verdict,
        target=target,
        threads=threads,
        seconds=seconds,
        progress=Progress(quiet=quiet or not verdict),
    )
    show(dict(found.record), as_json, str(found))


@app.command()
def benchmark(
    files: Annotated[list[Path], typer.Argument(help="ONNX files; the first is the reference.")],
    target: Target = "cpu",
    threads: Threads = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1, help="Images of one inference, for files that take any number; what they take if not given."
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Wall-clock limit.")] = 300.0,
    as_json: Json = False,
) -> None:
    """Time files against the first of them: interleaved, with intervals and verdicts.

    \b
    Example: hirelc-deploy benchmark reference.onnx candidate.onnx
    """
    from hirelc_deploy import api

    machine, timings = api.timed(files, target, threads, batch, seconds)
    times = ("median_ms", "p90_ms", "p99_ms", "ratio", "ratio_low", "ratio_high")
    keys = ("file", *times, "batch", "images_per_second", "verdict", "rounds", "contended", "note")
    results = [{key: timing.to_dict()[key] for key in keys} for timing in timings]
    lines = [
        f"{'file':<44} {'median ms':>10} {'p90 ms':>9} {'p99 ms':>9} {'images/s':>9} {'ratio':>7}  "
        f"{'95 % interval':<16} verdict"
    ]
    for r in results:
        lines.append(
            f"{r['file']:<44} {r['median_ms']:>10.4f} {r['p90_ms']:>9.4f} {r['p99_ms']:>9.4f} "
            f"{r['images_per_second']:>9.1f} {r['ratio']:>7.3f}  "
            f"{r['ratio_low']:.3f} to {r['ratio_high']:.3f}   {r['verdict']}"
        )
        if r["note"]:
            lines.append(f"  {r['note']}")
    show({"machine": machine, "results": results}, as_json, "\n".join(lines))


@app.command()
def profile(
    model: Model,
    out: Out,
    target: Target = "cpu",
    model_arg: ModelArg = None,
    weights: Weights = None,
    weights_key: WeightsKey = None,
    pretrained: Pretrained = False,
    input_size: InputSize = None,
    exclude: Exclude = None,
    threads: Threads = None,
    batch: Batch = None,
    steps: Annotated[int, typer.Option(min=2, help="Widths per unit, at most.")] = 12,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Believe no other machine's times, even if checks agree.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure milliseconds against width, per unit and precision, on a target; kept for every later search there.

    \b
    Example: hirelc-deploy profile --model resnet18 --target raspberrypi5 --out profiles/resnet18-pi5
    """
    import torch

    from hirelc_deploy.compress.branches import proven
    from hirelc_deploy.evaluate.uncut import seen_graph
    from hirelc_deploy.inputs.models.source import ModelSource, preprocess_of
    from hirelc_deploy.jobs.profile import profile_model
    from hirelc_deploy.measure.targets import find_target, open_target

    device = find_target(target)
    backend = open_target(device)
    source = ModelSource(model, weights, arguments_of("--model-arg", model_arg), pretrained, weights_key)
    wanted = numbers("--input-size", input_size, int)
    network = source.with_input_size(wanted).load().eval()
    size = preprocess_of(network, None, {"input_size": wanted}).input_size
    images = torch.rand((2, *size), generator=torch.Generator().manual_seed(0))
    graph = seen_graph(network, images, tuple(exclude or ()))
    if not graph.units:
        why = f" ({graph.kept_whole[0].reason})" if graph.kept_whole else ""
        raise InputError(f"profile: nothing of {model} can be cut{why}, so there are no widths to time.")
    graph = proven(network, graph, images)
    found = profile_model(
        graph,
        backend,
        out,
        f"{model} at {'x'.join(map(str, size))} on {target}",
        threads=threads or device.threads,
        batch=batch or 1,
        steps=steps,
        fresh=fresh,
        progress=Progress(quiet=quiet),
    )
    lines = [f"{name}: {value}" for name, value in found["facts"].items()]
    show(found, as_json, "\n".join([*lines, f"drawn in {out / 'staircase.html'}"]))


@targets_app.callback(invoke_without_command=True)
def targets(context: typer.Context, as_json: Json = False) -> None:
    """List target profiles, built in and from your targets.toml; `targets add` adds a board.

    \b
    Example: hirelc-deploy targets
    """
    from hirelc_deploy.measure.targets import known_targets

    if context.invoked_subcommand is not None:
        return
    known = known_targets().values()
    lines = [
        f"{t.name:<14} {t.backend:<16} {', '.join(t.hosts) or '-':<16} {t.source:<10} {t.description}" for t in known
    ]
    show({"targets": [dataclasses.asdict(target) for target in known]}, as_json, "\n".join(lines))


@targets_app.command("add")
def add_target(
    name: Annotated[str, typer.Argument(help="A profile such as jetson or raspberrypi5, or a name of your own.")],
    host: Annotated[list[str], typer.Option(help="me@board, as `ssh` takes it; several for a pool of equal boards.")],
    via: Annotated[
        list[str] | None,
        typer.Option(help="Ray node that the board hangs on: one for all, or one for each --host ('' for none)."),
    ] = None,
    like: Annotated[str | None, typer.Option(help="The profile that a name of your own begins from.")] = None,
    python: Annotated[str, typer.Option(help="Command of the Python on the board that has the runtime.")] = "python3",
    folder: Annotated[str | None, typer.Option(help="Folder on the board for files while they are needed.")] = None,
    threads: Threads = None,
    replace: Annotated[bool, typer.Option("--replace", help="Write a target anew that is already there.")] = False,
    as_json: Json = False,
) -> None:
    """Check a board and write it to your targets.toml.

    \b
    Example: hirelc-deploy targets add jetson --host me@orin
    """
    from hirelc_deploy.measure import targets as profiles

    found = profiles.check_boards(profiles.new_target(name, host, like or name, python, folder, threads, via or ()))
    path = profiles.targets_file()
    profiles.add_target(path, found.target, replace=replace)
    show(found.to_dict(), as_json, "\n".join([*found.lines(), f"written to {path}; use it with --target {name}"]))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what can run here, what is missing, and how to get it.

    \b
    Example: hirelc-deploy doctor
    """
    from hirelc_deploy.jobs.doctor import examine

    findings = examine()
    show(
        {"findings": findings},
        as_json,
        "\n".join(f"{'ok ' if f['ok'] else 'NO '} {f['what']}: {f['says']}" for f in findings),
    )


@app.command()
def schema(
    name: Annotated[str | None, typer.Argument(help="Of a JSON file or a command; all are listed without it.")] = None,
) -> None:
    """Print the JSON schema of a file that this tool writes, or of what a command prints with --json.

    \b
    Example: hirelc-deploy schema result
    """
    from hirelc_deploy import schemas

    if name is None:
        print("\n".join(f"{one:<12} {schemas.schema(one)['description']}" for one in schemas.NAMES))
    else:
        print(json.dumps(schemas.schema(name), indent=2))


@app.command()
def skill() -> None:
    """Print one page for coding agents: when to use which command, exit codes, and what to check.

    \b
    Example: hirelc-deploy skill
    """
    from hirelc_deploy.schemas import skill as page

    print(page(), end="")
