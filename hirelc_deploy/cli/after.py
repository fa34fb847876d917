"""In: a run's folder, or a bundle. Out: `compare`, `verify`, `why`, `report`, `status`, `export`: what follows."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hirelc_deploy.errors import InputError
from hirelc_deploy.progress import Progress

if TYPE_CHECKING:
    pass

from hirelc_deploy.cli.application import WORSE, app, show
from hirelc_deploy.cli.options import DataDir, Json, Out, Quiet, Target

STRATEGIES = "hirelc,knapsack,greedy,tpe,nsga2,flat,two-stage,random,untrained,uniform"
TRAINED = "hirelc,knapsack,taylor,uniform,random,untrained"
"""What is compared where nothing is said."""


@app.command()
def compare(
    run: Annotated[Path, typer.Argument(help="The folder of a search: its model, data, target, tables and journal.")],
    strategies: Annotated[
        str | None,
        typer.Option(
            help=f"Names with commas between them; the first is ours. {STRATEGIES}; with --after-training {TRAINED}.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Searches per strategy and budget.")] = 5,
    speedups: Annotated[str, typer.Option(help="Budgets: times faster than the best unpruned file.")] = "1.3,1.8",
    trials: Annotated[int, typer.Option(min=1, help="Cut models judged per search (F1).")] = 24,
    files: Annotated[int, typer.Option(min=0, help="Of these, the best ones built and timed (F2).")] = 0,
    after_training: Annotated[
        bool,
        typer.Option(
            "--after-training",
            help="Train the plan of every search, at equal seconds of search and training together, and judge their "
            "files on all test images.",
        ),
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the results; RUN if not given.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Let strategies search for the same budgets with equally many evaluations: one page, one JSON file.

    \b
    Example: hirelc-deploy compare runs/a --strategies hirelc,knapsack,random --seeds 5
    Example: hirelc-deploy compare runs/a --after-training --seeds 3 --speedups 2,4
    """
    from hirelc_deploy.config import JobConfig
    from hirelc_deploy.jobs.compare import COMPARISON_PAGE, check_comparison, run_compare
    from hirelc_deploy.jobs.recording import recorded
    from hirelc_deploy.jobs.workplace import open_workplace
    from hirelc_deploy.results.trained import trained_lines

    try:
        factors = [float(part) for part in speedups.split(",")]
    except ValueError:
        raise InputError(
            f"--speedups {speedups!r}: give numbers with commas between them, for example 1.3,1.8."
        ) from None
    config = JobConfig.read(run / "config.toml")
    strategies = strategies or (TRAINED if after_training else STRATEGIES)
    names = [name.strip() for name in strategies.split(",")]
    check_comparison(config, names, factors)
    command = shlex.join(["hirelc-deploy", *sys.argv[1:]])
    workplace = open_workplace(config, run, command, Progress(quiet=quiet))
    with recorded(workplace):
        summary = run_compare(workplace, names, range(seeds), factors, trials, files, out or run, trains=after_training)
    lines = [f"{'strategy':<28} best loss  {names[0]} / it      p"]
    for name, found in sorted(summary["strategies"].items(), key=lambda item: item[1]["best_loss_mean"]):
        test = found.get("against_ours")
        against = f"{math.exp(test['log_ratio']):10.3f}  {test['p']:10.4f}" if test else ""
        lines.append(f"{name:<28} {found['best_loss_mean']:9.4f}  {against}")
    lines += trained_lines(summary["after_training"], names[0]) if after_training else []
    lines.append(f"page: {(out or run) / COMPARISON_PAGE}")
    show(summary, as_json, "\n".join(lines))


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder.")],
    data: Annotated[
        str | None, typer.Option(help="The data set, to read the accuracy again on its test split.")
    ] = None,
    data_dir: DataDir = None,
    target: Target = "cpu",
    reference: Annotated[Path | None, typer.Option(help="The uncut float file, to time the bundle against.")] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="A baseline: an older bundle, or what `verify --json` printed of one; exit 5 if worse."),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(help="Points of the metric (or its own unit) that may be lost against the baseline; 1.0."),
    ] = None,
    max_slowdown: Annotated[
        float | None, typer.Option(help="Per cent that the bundle may be slower than the baseline; 10.")
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="A JUnit file to write, for a CI server.")] = None,
    as_json: Json = False,
) -> None:
    """Check a bundle: hashes, integer operators, sample outputs, and with --data the accuracy again.

    With --against it must also be no worse than a baseline.

    \b
    Example: hirelc-deploy verify runs/b/bundle --data npz:data.npz --against runs/a/bundle --junit verify.xml
    """
    from hirelc_deploy import api
    from hirelc_deploy.deliver.junit import write_junit

    result = api.verify(
        bundle,
        data or None,
        target=target,
        reference=reference,
        data_dir=data_dir,
        against=against,
        max_drop=max_drop,
        max_slowdown=max_slowdown,
    )
    if junit is not None:
        write_junit(result, bundle, junit)
    lines = [*result.problems, *result.remarks, *(change.text for change in result.changes)]
    lines.append(f"operators: {result.integer_ops} integer, {result.float_ops} float")
    if result.accuracy is not None:
        claimed = "nothing" if result.claimed_accuracy is None else result.metric.text(result.claimed_accuracy)
        lines.append(f"{result.metric.name} {result.metric.text(result.accuracy)}, claimed {claimed}")
    if against is not None and result.ok:
        lines.append("the bundle is WORSE than allowed" if result.worse else "the bundle is no worse than allowed")
    lines.append("the bundle is what it says" if result.ok else "the bundle is NOT what it says")
    show(result.to_dict(), as_json, "\n".join(lines))
    if not result.ok:
        raise typer.Exit(1)
    if result.worse:
        raise typer.Exit(WORSE)


@app.command()
def why(
    run: Annotated[Path, typer.Argument(help="The folder a search or apply wrote, or the bundle in it.")],
    data: Annotated[str | None, typer.Option(help="Where the run's data set is now, if it was moved.")] = None,
    data_dir: DataDir = None,
    fixes: Annotated[int, typer.Option(min=0, help="Layers, those that lost most, for which changes are tried.")] = 3,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say which layers of a run's integer file lost what, and try what would help: ranges, equalising, float.

    \b
    Example: hirelc-deploy why runs/a
    """
    from hirelc_deploy import api

    command = shlex.join(["hirelc-deploy", *sys.argv[1:]])
    progress = Progress(quiet=quiet)
    found = api.why(run, data=data, data_dir=data_dir, fixes=fixes, progress=progress, command=command)
    show(dict(found.record), as_json, str(found))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="The folder a search or apply wrote.")],
    out: Annotated[Path | None, typer.Option(help="The page; RUN/report.html if not given.")] = None,
) -> None:
    """Write the report of a run as one self-contained HTML file.

    \b
    Example: hirelc-deploy report runs/a
    """
    from hirelc_deploy.results.report import read_run, write_report

    print(write_report(read_run(run), out or run / "report.html"))


@app.command()
def status(
    run: Annotated[Path, typer.Argument(help="The folder a search, apply or demo writes, or wrote.")],
    lines: Annotated[int, typer.Option(min=0, help="Of its log, the last ones.")] = 5,
    as_json: Json = False,
) -> None:
    """Say how a run stands, also while another process is at work on it; it is only looked at.

    \b
    Example: hirelc-deploy status runs/a
    """
    from hirelc_deploy.results.status import status_of, status_text

    found = status_of(run, lines)
    show(found, as_json, status_text(found))


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
    from hirelc_deploy.jobs.export import Storage, export_files

    storage = Storage(bits, scheme, sparsity, max_bytes, strategy, trials)
    for path in export_files(run, form, out, storage, dynamic_batch=dynamic_batch):
        print(path)
