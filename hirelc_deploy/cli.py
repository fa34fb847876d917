"""In: a command line. Out: an exit code, and on standard output what a person or a program asked for.

Everything heavy is imported inside the commands, so that --help and a typing error answer at once.
Exit codes: 0 done, 2 bad input, 3 target not available, 4 constraint cannot be met, 130 interrupted with results kept.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hirelc_deploy import __version__
from hirelc_deploy.errors import COMMAND, HirelcError, InputError
from hirelc_deploy.progress import Progress

if TYPE_CHECKING:
    from torch import nn

    from hirelc_deploy.config import JobConfig, PreprocessConfig
    from hirelc_deploy.graph.model_graph import ModelGraph, Unit

app = typer.Typer(
    name="hirelc-deploy",
    help="A trained vision model in, the fastest file its device can run within an allowed accuracy drop out.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

targets_app = typer.Typer(rich_markup_mode=None)
app.add_typer(targets_app, name="targets")

Model = Annotated[
    str, typer.Option("--model", help="A timm name, file.py:factory or package.module:factory.", show_default=False)
]
ModelArg = Annotated[
    list[str] | None, typer.Option("--model-arg", help="Argument of the factory, as key=value; may be repeated.")
]
Weights = Annotated[Path | None, typer.Option("--weights", help="Trained weights: .safetensors, or .pth read safely.")]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Let timm fetch its own trained weights.")]
DataSpec = Annotated[
    str,
    typer.Option("--data", help="npz:FILE, imagefolder:DIR, torch/cifar10, or synthetic:N.", show_default=False),
]
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Folder of a torchvision data set (torch/...).")]
Target = Annotated[str, typer.Option("--target", help="A target profile; `hirelc-deploy targets` lists them.")]
RecoveryEpochs = Annotated[
    float,
    typer.Option(
        help="Passes over the training split per finalist, and for the uncut integer file where it loses more than is "
        "allowed; 0 for no training."
    ),
]
LearningRate = Annotated[float, typer.Option(help="Peak learning rate of the recovery; smaller for few images.")]
CalibrationImages = Annotated[int | None, typer.Option(help="Training images set aside for activation ranges.")]
SelectionImages = Annotated[int | None, typer.Option(help="Training images set aside for choosing.")]
InputSize = Annotated[str | None, typer.Option(help="channels,height,width of the model's input.")]
Mean = Annotated[str | None, typer.Option(help="Per-channel mean of the normalisation, as 0.49,0.48,0.45.")]
Std = Annotated[str | None, typer.Option(help="Per-channel standard deviation of the normalisation.")]
Exclude = Annotated[list[str] | None, typer.Option(help="Pattern of units or layers that stay whole; may be repeated.")]
Include = Annotated[
    list[str] | None, typer.Option(help="Pattern of units or layers; when given, only these are cut. May be repeated.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of one inference; the target's own if not given.")]
Out = Annotated[Path, typer.Option("--out", help="Folder that is made for the results.", show_default=False)]
Jobs = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Processes that judge cut models side by side, one thread each; same results. 1 if not given, "
        "with --ray one per free CPU, at most 8.",
        show_default=False,
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Have them on the hosts of a Ray cluster that this machine is a node of: HOST:PORT, auto, "
        "or local (this machine alone).",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of every random choice.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing while working.")]


INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended."""


DISK_TROUBLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})
"""What any write may meet at any time, and no check beforehand can rule out."""


def main() -> None:
    """Run the command line of this process."""
    try:
        sys.exit(run(sys.argv[1:]))
    except BrokenPipeError:
        # Whoever read our output has seen enough; the interpreter must not complain while it flushes the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; the one place where errors become a sentence on standard error."""
    try:
        code = app(list(arguments), prog_name=app.info.name, standalone_mode=False)
    except HirelcError as error:
        return fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except typer.TyperException as error:  # an option or command that does not exist, or a value it cannot take
        context = getattr(error, "ctx", None)
        command = context.command_path if context else app.info.name
        return fail(f"{error.format_message().rstrip('.')}; `{command} --help` says what it takes.", 2)
    except OSError as error:
        if error.errno not in DISK_TROUBLE:
            raise
        where = error.filename or "the disk"
        return fail(f"{where}: {error.strerror}; what was finished is kept: make room, and run the same again.", 2)
    if code == INTERRUPTED:
        return fail("interrupted; what was finished is kept, and the same command resumes.", INTERRUPTED)
    return code if isinstance(code, int) else 0


def fail(sentence: str, code: int) -> int:
    """Print one sentence on standard error, and below it the commands it ends in, if any; return `code`."""
    plain = re.sub("\x1b\\[[0-9;]*m", "", sentence)  # libraries colour their messages
    first, *commands = (" ".join(part.split()) for part in plain.split(COMMAND))
    print("\n  ".join([f"hirelc-deploy: {first}", *commands]), file=sys.stderr)
    return code


def _show(value: dict[str, Any], as_json: bool, text: str) -> None:
    print(json.dumps(value, indent=2, default=float) if as_json else text)


def _model_source(model: str, weights: Path | None, arguments: list[str] | None, pretrained: bool) -> dict[str, Any]:
    from hirelc_deploy.models import parse_arguments

    return {
        "spec": model,
        "weights": str(weights.resolve()) if weights else None,
        "arguments": parse_arguments(arguments or []),
        "pretrained": pretrained,
    }


def _path_weights(source: dict[str, Any]) -> dict[str, Any]:
    return {**source, "weights": Path(source["weights"]) if source["weights"] else None}


def _preprocess(input_size: str | None, mean: str | None, std: str | None) -> PreprocessConfig:
    from hirelc_deploy.config import PreprocessConfig

    def numbers(name: str, text: str | None, kind: type[int] | type[float]) -> tuple[Any, ...] | None:
        try:
            return None if text is None else tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise InputError(f"{name} {text!r}: give numbers with commas between them.") from None

    return PreprocessConfig(
        numbers("--input-size", input_size, int), numbers("--mean", mean, float), numbers("--std", std, float)
    )


def _run(config: JobConfig, out: Path, plan: str | None, as_json: bool, quiet: bool, **side_by_side: Any) -> None:
    """Open the workplace, do the job and print what it gave; `side_by_side` as of `job.open_workplace`."""
    from hirelc_deploy import job

    progress = Progress(quiet=quiet)
    command = shlex.join(["hirelc-deploy", *sys.argv[1:]])
    workplace = job.open_workplace(config, out, command, progress, **side_by_side)
    with workplace.run:
        result = job.run_apply(workplace, plan) if plan is not None else job.run_search(workplace)
    _show(result, as_json, summary(result, out))


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


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


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
        model=ModelConfig(**_model_source(model, weights, model_arg, pretrained)),
        data=DataConfig(data, str(data_dir.resolve()) if data_dir else None, calibration_images, selection_images),
        target=target,
        seed=seed,
        threads=threads,
        recovery_epochs=recovery_epochs,
        learning_rate=learning_rate,
        exclude=tuple(exclude or ()),
        include=tuple(include or ()),
        preprocess=_preprocess(input_size, mean, std),
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
    _run(config, out, None, as_json, quiet, jobs=jobs, ray=ray)


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
        model=ModelConfig(**_model_source(model, weights, model_arg, pretrained)),
        data=DataConfig(data, str(data_dir.resolve()) if data_dir else None, calibration_images, selection_images),
        target=target,
        plan=plan,
        seed=seed,
        threads=threads,
        recovery_epochs=recovery_epochs,
        learning_rate=learning_rate,
        exclude=tuple(exclude or ()),
        include=tuple(include or ()),
        preprocess=_preprocess(input_size, mean, std),
    )
    _run(config, out, plan, as_json, quiet)


@app.command()
def compare(
    run: Annotated[Path, typer.Argument(help="The folder of a search: its model, data, target, tables and journal.")],
    strategies: Annotated[str, typer.Option(help="Names with commas between them; the first is ours.")] = (
        "hirelc,knapsack,greedy,tpe,nsga2,flat,two-stage,random,untrained,uniform"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Searches per strategy and budget.")] = 5,
    speedups: Annotated[str, typer.Option(help="Budgets: times faster than the best unpruned file.")] = "1.3,1.8",
    trials: Annotated[int, typer.Option(min=1, help="Cut models judged per search (F1).")] = 24,
    files: Annotated[int, typer.Option(min=0, help="Of these, the best ones built and timed (F2).")] = 0,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the results; RUN if not given.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Let strategies search for the same budgets with equally many evaluations: one page, one JSON file.

    \b
    Example: hirelc-deploy compare runs/a --strategies hirelc,knapsack,random --seeds 5
    """
    from hirelc_deploy import job
    from hirelc_deploy.config import JobConfig

    try:
        factors = [float(part) for part in speedups.split(",")]
    except ValueError:
        raise InputError(
            f"--speedups {speedups!r}: give numbers with commas between them, for example 1.3,1.8."
        ) from None
    config = JobConfig.read(run / "config.toml")
    names = [name.strip() for name in strategies.split(",")]
    job.check_comparison(config, names, factors)
    command = shlex.join(["hirelc-deploy", *sys.argv[1:]])
    workplace = job.open_workplace(config, run, command, Progress(quiet=quiet))
    with workplace.run:
        summary = job.run_compare(workplace, names, range(seeds), factors, trials, files, out or run)
    lines = [f"{'strategy':<28} best loss  {names[0]} / it      p"]
    for name, found in sorted(summary["strategies"].items(), key=lambda item: item[1]["best_loss_mean"]):
        test = found.get("against_ours")
        against = f"{math.exp(test['log_ratio']):10.3f}  {test['p']:10.4f}" if test else ""
        lines.append(f"{name:<28} {found['best_loss_mean']:9.4f}  {against}")
    lines.append(f"page: {(out or run) / job.COMPARISON_PAGE}")
    _show(summary, as_json, "\n".join(lines))


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

    _run(demo_config(seed), out, None, as_json, quiet)


def _unit_record(network: nn.Module, graph: ModelGraph, unit: Unit) -> dict[str, Any]:
    """Return what `inspect` says of a unit; parameters and multiply-accumulates are those that it takes part in."""
    from hirelc_deploy.pipeline import cost_of

    without = cost_of(network, graph, {unit.name: 0})
    params = graph.params - without.params
    return {
        "name": unit.name,
        "kind": unit.kind,
        "size": unit.size,
        "block": unit.block,
        "widths": list(unit.widths),
        "branch": unit.branch.module if unit.branch else None,
        "params": params,
        "macs": graph.macs - without.macs,
        "bytes": 4 * params,
    }


@app.command()
def inspect(
    model: Model,
    model_arg: ModelArg = None,
    weights: Weights = None,
    pretrained: Pretrained = False,
    input_size: InputSize = None,
    exclude: Exclude = None,
    include: Include = None,
    as_json: Json = False,
) -> None:
    """Say what a model consists of, what can be cut, and what is kept whole and why.

    With --exclude or --include also what each pattern matches, before anything is cut.

    \b
    Example: hirelc-deploy inspect --model resnet18 --exclude 'layer1.*'
    """
    import torch

    from hirelc_deploy.compress.branches import proven
    from hirelc_deploy.graph.units import build_graph, matches
    from hirelc_deploy.models import ModelSource, preprocess_of

    source = ModelSource(**_path_weights(_model_source(model, weights, model_arg, pretrained)))
    network = source.load().eval()
    size = preprocess_of(network, None, _preprocess(input_size, None, None).overrides()).input_size
    images = torch.rand((2, *size), generator=torch.Generator().manual_seed(0))
    everything = graph = build_graph(network, images)
    if patterns := [*(exclude or ()), *(include or ())]:
        graph = build_graph(network, images, exclude=tuple(exclude or ()), include=tuple(include or ()))
    graph = proven(network, graph, images)
    matched = {pattern: [u.name for u in everything.units if matches(u, pattern)] for pattern in patterns}
    record: dict[str, Any] = {
        "model": model,
        "params": graph.params,
        "macs": graph.macs,
        "blocks": list(graph.blocks),
        "units": [_unit_record(network, graph, unit) for unit in graph.units],
        "kept_whole": [{"layer": k.layer, "reason": k.reason} for k in graph.kept_whole],
        "matched": matched,
    }
    lines = [
        f"{model}: {graph.params:,} parameters, {graph.macs:,} multiply-accumulates at {'x'.join(map(str, size))}",
        f"{len(graph.blocks)} blocks, {len(graph.units)} units that can be cut (size, parameters, operations):",
        *(
            f"  {u['name']:<40} {u['kind']:<18} {u['size']:>5} {u['params']:>11,} {u['macs']:>14,}  in {u['block']}"
            + (f", may go with all of {u['branch']}" if u["branch"] else "")
            for u in record["units"]
        ),
        f"{len(graph.kept_whole)} layers kept whole:" if graph.kept_whole else "nothing is kept whole",
        *(f"  {k.layer:<40} {k.reason}" for k in graph.kept_whole),
        *(f"pattern {p!r} matches {', '.join(names) or 'layers in no unit'}" for p, names in matched.items()),
    ]
    _show(record, as_json, "\n".join(lines))


@app.command()
def benchmark(
    files: Annotated[list[Path], typer.Argument(help="ONNX files; the first is the reference.")],
    target: Target = "cpu",
    threads: Threads = None,
    seconds: Annotated[float, typer.Option(help="Wall-clock limit.")] = 300.0,
    as_json: Json = False,
) -> None:
    """Time files against the first of them: interleaved, with intervals and verdicts.

    \b
    Example: hirelc-deploy benchmark reference.onnx candidate.onnx
    """
    from hirelc_deploy.measure.machine import describe
    from hirelc_deploy.measure.protocol import FULL, compare
    from hirelc_deploy.measure.targets import find_target, open_target

    if not 0 < seconds < math.inf:
        raise InputError(f"--seconds {seconds:g}: give a finite number above 0.")
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: no such file; give ONNX files, the reference first.")
    profile = find_target(target)
    backend = open_target(profile)
    timings = compare(
        files, backend, threads=threads or profile.threads, limits=dataclasses.replace(FULL, seconds=seconds)
    )
    keys = ("file", "median_ms", "p90_ms", "ratio", "ratio_low", "ratio_high", "verdict", "rounds", "contended", "note")
    results = [{key: timing.to_dict()[key] for key in keys} for timing in timings]
    lines = [f"{'file':<44} {'median ms':>10} {'p90 ms':>9} {'ratio':>7}  {'95 % interval':<16} verdict"]
    for r in results:
        lines.append(
            f"{r['file']:<44} {r['median_ms']:>10.4f} {r['p90_ms']:>9.4f} {r['ratio']:>7.3f}  "
            f"{r['ratio_low']:.3f} to {r['ratio_high']:.3f}   {r['verdict']}"
        )
        if r["note"]:
            lines.append(f"  {r['note']}")
    _show({"machine": describe(backend), "results": results}, as_json, "\n".join(lines))


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder.")],
    data: Annotated[
        str | None, typer.Option(help="The data set, to read the accuracy again on its test split.")
    ] = None,
    data_dir: DataDir = None,
    target: Target = "cpu",
    reference: Annotated[Path | None, typer.Option(help="The uncut float file, to time the bundle against.")] = None,
    as_json: Json = False,
) -> None:
    """Check a bundle: hashes, integer operators, sample outputs, and with --data the accuracy again.

    \b
    Example: hirelc-deploy verify runs/a/bundle --data npz:data.npz
    """
    from hirelc_deploy.bundle import verify as verify_bundle
    from hirelc_deploy.data import load_data
    from hirelc_deploy.measure.targets import find_target, open_target

    given = load_data(data, data_dir=data_dir) if data else None
    result = verify_bundle(bundle, data=given, backend=open_target(find_target(target)), reference=reference)
    lines = [*result.problems, *result.remarks]
    lines.append(f"operators: {result.integer_ops} integer, {result.float_ops} float")
    if result.accuracy is not None:
        lines.append(f"accuracy {100 * result.accuracy:.2f} %, claimed {100 * (result.claimed_accuracy or 0):.2f} %")
    lines.append("the bundle is what it says" if result.ok else "the bundle is NOT what it says")
    _show(result.to_dict(), as_json, "\n".join(lines))
    if not result.ok:
        raise typer.Exit(1)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="The folder a search or apply wrote.")],
    out: Annotated[Path | None, typer.Option(help="The page; RUN/report.html if not given.")] = None,
) -> None:
    """Write the report of a run as one self-contained HTML file.

    \b
    Example: hirelc-deploy report runs/a
    """
    from hirelc_deploy.report import read_run, write_report

    print(write_report(read_run(run), out or run / "report.html"))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The folder a search or apply wrote.")],
    out: Out,
    form: Annotated[
        str, typer.Option("--format", help="onnx, torch (safetensors), tensorrt, or stored (small, decoded at load).")
    ] = "onnx",
    bits: Annotated[int, typer.Option(help="Of a weight in the form `stored`: 2 to 7.")] = 4,
    scheme: Annotated[str, typer.Option(help="Of the form `stored`: linear, log or codebook.")] = "linear",
    sparsity: Annotated[
        float, typer.Option(help="`stored`: share of each layer's weights, the smallest, that is left out; not faster.")
    ] = 0.0,
    max_bytes: Annotated[
        int | None, typer.Option(min=1, help="`stored`: size of the file; the bits of each layer are then searched.")
    ] = None,
    strategy: Annotated[str, typer.Option(help="Of that search, as for `search`.")] = "knapsack",
    trials: Annotated[int, typer.Option(min=1, help="Files judged in that search.")] = 48,
    dynamic_batch: Annotated[
        bool, typer.Option("--dynamic-batch", help="onnx for any number of images; one at a time it is slower.")
    ] = False,
) -> None:
    """Write the shipped model of a run in one of its forms.

    `stored` is for disk and wire only: restore.py (numpy) turns it back into a file that a runtime executes.

    \b
    Example: hirelc-deploy export runs/a --format onnx --out deploy
    """
    from hirelc_deploy.job import Storage, export_files

    storage = Storage(bits, scheme, sparsity, max_bytes, strategy, trials)
    for path in export_files(run, form, out, storage, dynamic_batch=dynamic_batch):
        print(path)


@app.command()
def profile(
    model: Model,
    out: Out,
    target: Target = "cpu",
    model_arg: ModelArg = None,
    weights: Weights = None,
    pretrained: Pretrained = False,
    input_size: InputSize = None,
    exclude: Exclude = None,
    threads: Threads = None,
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
    from hirelc_deploy.graph.units import build_graph
    from hirelc_deploy.job import profile_model
    from hirelc_deploy.measure.targets import find_target, open_target
    from hirelc_deploy.models import ModelSource, preprocess_of

    device = find_target(target)
    backend = open_target(device)
    source = ModelSource(**_path_weights(_model_source(model, weights, model_arg, pretrained)))
    network = source.load().eval()
    size = preprocess_of(network, None, _preprocess(input_size, None, None).overrides()).input_size
    images = torch.rand((2, *size), generator=torch.Generator().manual_seed(0))
    graph = proven(network, build_graph(network, images, exclude=tuple(exclude or ())), images)
    found = profile_model(
        graph,
        backend,
        out,
        f"{model} at {'x'.join(map(str, size))} on {target}",
        threads=threads or device.threads,
        steps=steps,
        fresh=fresh,
        progress=Progress(quiet=quiet),
    )
    lines = [f"{name}: {value}" for name, value in found["facts"].items()]
    _show(found, as_json, "\n".join([*lines, f"drawn in {out / 'staircase.html'}"]))


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
    _show({"targets": [dataclasses.asdict(target) for target in known]}, as_json, "\n".join(lines))


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
    _show(found.to_dict(), as_json, "\n".join([*found.lines(), f"written to {path}; use it with --target {name}"]))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what can run here, what is missing, and how to get it.

    \b
    Example: hirelc-deploy doctor
    """
    from hirelc_deploy.doctor import examine

    findings = examine()
    _show(
        {"findings": findings},
        as_json,
        "\n".join(f"{'ok ' if f['ok'] else 'NO '} {f['what']}: {f['says']}" for f in findings),
    )
