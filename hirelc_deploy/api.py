"""In: a model, data and limits, as Python objects or as the command line names them. Out: typed results.

The command line is written on these calls. Errors are exceptions (`hirelc_deploy.errors`) with the sentences that it
prints.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from hirelc_deploy.arguments import Model, Splits, data_of, job_config, limits_of, search_config, several
from hirelc_deploy.compress import recovery
from hirelc_deploy.config import (
    JobConfig,
    Limits,
    PreprocessConfig,
)
from hirelc_deploy.deliver.against import check_limits
from hirelc_deploy.deliver.read import load
from hirelc_deploy.deliver.verify import VerifyResult, verify_against
from hirelc_deploy.deliver.verify import verify as verify_bundle
from hirelc_deploy.errors import HirelcError, InputError
from hirelc_deploy.inputs.data.splits import Data
from hirelc_deploy.inputs.models.given import source_of
from hirelc_deploy.jobs.apply import run_apply
from hirelc_deploy.jobs.assist import assist, check_others
from hirelc_deploy.jobs.family import run_family
from hirelc_deploy.jobs.inspect import inspected
from hirelc_deploy.jobs.recording import recorded
from hirelc_deploy.jobs.search import run_search
from hirelc_deploy.jobs.verdict import SECONDS, Commands, place_of, verdict_of
from hirelc_deploy.jobs.why import explain, run_of
from hirelc_deploy.jobs.workplace import Given, Workplace, open_workplace
from hirelc_deploy.measure.batch import at_batch
from hirelc_deploy.measure.machine import describe
from hirelc_deploy.measure.protocol import FULL, Timing, compare
from hirelc_deploy.measure.targets import find_target, open_others, open_target
from hirelc_deploy.options import JobOptions, SearchOptions
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.progress import Listener, Progress
from hirelc_deploy.returned import Family, Inspection, Result, Why
from hirelc_deploy.runs import CONFIG, RESULT
from hirelc_deploy.together import ranks
from hirelc_deploy.user_code import usual_torch

__all__ = [
    "Family",
    "Inspection",
    "Result",
    "Why",
    "apply",
    "benchmark",
    "family",
    "inspect",
    "load",
    "search",
    "verify",
    "why",
]


@usual_torch()
def search(
    model: Model,
    data: Splits | None = None,
    *,
    out: str | Path,
    task: str | None = None,
    target: str = "cpu",
    limits: Limits | Mapping[str, float] | None = None,
    metric: Callable[..., Any] | str | None = None,
    loss: Callable[..., Any] | str | None = None,
    strategy: str = "hirelc",
    budget: str | float | None = None,
    trials: int = 24,
    finalists: int = 3,
    race: int = 0,
    options: int = 8,
    warm_start: str | Path | None = None,
    library: str | Path | None = None,
    further_recovery: float | None = None,
    depth: bool = True,
    precisions: bool = False,
    jobs: int | None = None,
    ray: str | None = None,
    **job: Unpack[JobOptions],
) -> Result:
    """Find the fastest file that the target can run within the limits; a killed or finished search is taken up again.

    Args:
        data: None, for an ONNX file: random pictures, for structure and speed alone; accuracy stays unknown.
        out: Folder of the run, which is made.
        task: Of an installed task, where model and data leave a doubt.
        limits: Fields of `config.Limits`; {"max_drop": 1.0} where nothing is said.
        metric: `metric(outputs, targets)`, one number or one an image; or `file.py:function`.
        loss: `loss(outputs, targets)`, joined to the distillation; or `file.py:function`.
        budget: Seconds, or text such as `30m`.
        strategy: A name; this and the next nine as in `config.SearchConfig`.
        trials: Cut models judged per latency budget.
        finalists: Plans recovered by training, at most.
        race: Plans of equal time that begin a finalist's recovery; 0 for no race.
        options: Widths offered per unit, at most.
        warm_start: Folder of a finished search whose agents begin here.
        library: Folder of another run of the same model and data, whose measurements are taken over.
        further_recovery: Share of a recovery for plans within a recovered one, which begin at its weights.
        depth: Whether residual branches may be left out.
        precisions: Whether blocks may stay float.
        jobs: Processes that judge cut models side by side.
        ray: Address of a Ray cluster that does.

    Raises:
        HirelcError: With the sentence that the command line would print.
    """
    asked = SearchOptions(
        task=task,
        target=target,
        metric=metric,
        loss=loss,
        strategy=strategy,
        budget=budget,
        trials=trials,
        finalists=finalists,
        race=race,
        options=options,
        warm_start=warm_start,
        library=library,
        further_recovery=further_recovery,
        depth=depth,
        precisions=precisions,
        jobs=jobs,
        ray=ray,
        **job,
    )
    config, given = search_config(model, data, limits_of(limits), asked)
    return _done(config, given, _folder(out), job, jobs=jobs, ray=ray)


@usual_torch()
def family(
    model: Model,
    data: Splits | None = None,
    *,
    out: str | Path,
    limits: Sequence[Limits | Mapping[str, float]],
    **options: Unpack[SearchOptions],
) -> Family:
    """Do a search for each of several limits; model and data are measured once. It is taken up again as `search` is.

    The search that allows most time comes first, and each further one begins with all that was measured before it.

    Args:
        data: As in `search`, and so are all options.
        out: Folder that is made for a run of each of the limits, and one page with all of them.
        limits: Each as in `search`.

    Returns:
        What was found for each; its `missed` names limits that nothing keeps.

    Raises:
        HirelcError: With the sentence that the command line would print.
    """
    if ranks.count() > 1:
        raise InputError("several limits: processes of torchrun share one search; give one limit, or leave it out.")
    members = [limits_of(one) for one in several("limits", limits) or ()]
    config, given = search_config(model, data, members[0] if members else Limits(), options)
    command = options.get("command") or "hirelc_deploy.family(...)"
    job: SearchOptions = {**options, "command": command}

    def opened(config: JobConfig, folder: Path) -> Workplace:
        return _opened(config, given, folder, job, jobs=options.get("jobs"), ray=options.get("ray"))

    return Family(Path(out), run_family(members, config, _folder(out), opened, _finished, command))


@usual_torch()
def apply(
    model: Model,
    data: Splits | None,
    plan: str | Path | CompressionPlan,
    *,
    out: str | Path,
    task: str | None = None,
    target: str = "cpu",
    metric: Callable[..., Any] | str | None = None,
    loss: Callable[..., Any] | str | None = None,
    **job: Unpack[JobOptions],
) -> Result:
    """Build one plan, without a search: cut, recover, quantize, time, bundle.

    Args:
        plan: A plan, its file, `uniform:keep=0.5,precision=int8`, or a bundle whose recovery goes on.
        out: As in `search`, and so are `task`, `target`, `metric` and `loss`.

    Raises:
        HirelcError: With the sentence that the command line would print.
    """
    file = None
    if isinstance(plan, CompressionPlan):
        file = _folder(out).with_name(f"{Path(out).name}-plan.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(plan.to_dict(), indent=1) + "\n", "utf-8")
        plan = file
    try:
        config, given = job_config(model, data, task, target, metric, loss, job, plan=str(plan))
        return _done(config, given, _folder(out), job)
    except HirelcError:
        if file is not None and not Path(out).exists():
            file.unlink()
        raise


@usual_torch()
def inspect(
    model: Model,
    *,
    weights: str | Path | None = None,
    weights_key: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    pretrained: bool = False,
    input_size: Sequence[int] | None = None,
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    verdict: bool = False,
    target: str | None = None,
    threads: int | None = None,
    seconds: float | None = None,
    progress: Listener | Progress | None = None,
) -> Inspection:
    """Say what a model consists of, what can be cut, and what is kept whole and why; every unit is proven exact.

    Args:
        verdict: Foretell what INT8, bf16, cutting and other runtimes can bring on a target, from timed pieces.
        target: Of the verdict; `cpu` where nothing is said.
        threads: Of the verdict; those of the target where nothing is said.
        seconds: That the verdict may take; 60 where nothing is said.
        progress: As in `JobOptions`.

    Raises:
        InputError: The model cannot be had, or cannot run on such an input.
        HirelcError: A verdict is wanted, and the target cannot be reached or refuses the uncut model.
    """
    told = _told(progress)
    started = told.clock()
    source = source_of(model, weights, model_args, pretrained, weights_key)
    overrides = PreprocessConfig(several("input_size", input_size)).overrides()
    excluded, included = several("exclude", exclude) or (), several("include", include) or ()
    if not verdict:
        for name, value in (("target", target), ("threads", threads), ("seconds", seconds)):
            if value is not None:
                raise InputError(f"--{name} {value}: a device is asked for a verdict only; add --verdict.")
        return Inspection(inspected(source, overrides, excluded, included))
    limit = SECONDS if seconds is None else seconds
    if not 0 < limit < math.inf:
        raise InputError(f"--seconds {limit:g}: give a finite number above 0.")
    profile = find_target(target or "cpu")
    place = place_of(profile, threads, open_target(profile))
    options = {
        "--input-size": [",".join(map(str, input_size))] if input_size else [],
        "--exclude": excluded,
        "--include": included,
        "--threads": [str(threads)] if threads else [],
    }
    given = [part for name, values in options.items() for value in values for part in (name, value)]
    command = Commands(source, given, profile)
    foretold = partial(verdict_of, place=place, command=command, seconds=limit, started=started, progress=told)
    return Inspection(inspected(source, overrides, excluded, included, foretold))


def benchmark(
    files: Sequence[str | Path],
    *,
    target: str = "cpu",
    threads: int | None = None,
    batch: int | None = None,
    seconds: float = 300.0,
) -> list[Timing]:
    """Time ONNX files against the first of them: interleaved, with intervals and verdicts.

    Args:
        batch: Images of one inference, for files that take any number; None for what the files take, else one.

    Raises:
        HirelcError: A file is not there, is refused or takes another batch, or the target cannot be reached.
    """
    return timed(files, target, threads, batch, seconds)[1]


def timed(
    files: Sequence[str | Path], target: str, threads: int | None, batch: int | None, seconds: float
) -> tuple[dict[str, Any], list[Timing]]:
    """Return the machine, and what `benchmark` returns."""
    if not 0 < seconds < math.inf:
        raise InputError(f"--seconds {seconds:g}: give a finite number above 0.")
    if batch is not None and batch < 1:
        raise InputError(f"batch = {batch}: give a whole number of at least 1.")
    paths = [Path(file) for file in several("files", files) or ()]
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path}: no such file; give ONNX files, the reference first.")
    profile = find_target(target)
    backend = open_target(profile)
    limits = dataclasses.replace(FULL, seconds=seconds)
    with tempfile.TemporaryDirectory() as folder:
        ready, images = at_batch(paths, batch, Path(folder))
        found = compare(ready, backend, threads=threads or profile.threads, batch=images, limits=limits)
    return describe(backend), [dataclasses.replace(one, file=path) for one, path in zip(found, paths, strict=True)]


@usual_torch()
def verify(
    bundle: str | Path,
    data: Splits | None = None,
    *,
    target: str = "cpu",
    reference: str | Path | None = None,
    data_dir: str | Path | None = None,
    against: str | Path | None = None,
    max_drop: float | None = None,
    max_slowdown: float | None = None,
) -> VerifyResult:
    """Check a bundle: hashes, integer operators, sample outputs, and with data the metric again on its test split.

    Of a target's runtimes the one is taken that the bundle is made for.

    Args:
        reference: The uncut float file, to time the bundle against.
        against: A baseline: an older bundle, timed side by side, or a file that `verify --json` wrote of one.
        max_drop: Points of the metric (or its unit) that may be lost against the baseline; 1.0 where it is None.
        max_slowdown: Per cent that the bundle may be slower than the baseline; 10 where it is None.

    Returns:
        Its `worse` says whether the bundle is worse than the baseline allows, `changes` by how much.

    Raises:
        HirelcError: There is no bundle or baseline, data or reference do not fit, or a limit that was given cannot be
            judged.
    """
    given = data_of(data, JobOptions(data_dir=data_dir)) if data is not None else None
    path, profile = Path(reference) if reference else None, find_target(target)
    backend, others = open_target(profile), open_others(profile)
    check_limits(None if against is None else Path(against), max_drop, max_slowdown)
    if against is None:
        return verify_bundle(Path(bundle), data=given, backend=backend, others=others, reference=path)
    return verify_against(
        Path(bundle),
        Path(against),
        given,
        backend,
        others=others,
        max_drop=max_drop,
        max_slowdown=max_slowdown,
        reference=path,
    )


@usual_torch()
def why(
    run: str | Path,
    *,
    model: Model | None = None,
    data: Splits | None = None,
    metric: Callable[..., Any] | None = None,
    loss: Callable[..., Any] | None = None,
    data_dir: str | Path | None = None,
    fixes: int = 3,
    progress: Listener | Progress | None = None,
    command: str = "hirelc_deploy.why(...)",
) -> Why:
    """Say which layers of a run's integer file lost what, and try what would help; nothing is trained.

    It is also written to `why.json` of the run, and to its report.

    Args:
        run: The folder of a search or apply, or the bundle in it.
        model: The same again, where the run was given an object.
        data: The same again, where the run was given objects, or where its data lie elsewhere now.
        metric: The same again, where the run was given a function.
        loss: As `metric`.
        data_dir: Beside data that are a text.
        fixes: Layers, those that lost most, for which changes are tried.
        progress: As in `JobOptions`.
        command: What the record says it was made by.

    Raises:
        HirelcError: No run, its model or data are not at hand, or the target has no integers.
    """
    splits = None if data is None else _splits_again(Path(run), data, data_dir)
    source = None if model is None else source_of(model)
    given = Given(source, splits, metric, loss)
    found = explain(Path(run), fixes=fixes, given=given, progress=_told(progress), command=command)
    return Why(found)


def _splits_again(run: Path, data: Splits, data_dir: str | Path | None) -> Data:
    """Return the data of a run from where they are now, in the splits that it had."""
    config = JobConfig.read(run_of(run) / CONFIG)
    job = JobOptions(
        data_dir=data_dir or config.data.directory,
        calibration_images=config.data.calibration_images,
        selection_images=config.data.selection_images,
        seed=config.seed,
    )
    return data_of(data, job)


def run_config(config: JobConfig, out: Path, progress: Progress, command: str) -> Result:
    """Do the job of a configuration."""
    return _finished(open_workplace(config, out, command, progress))


def _finished(workplace: Workplace) -> Result:
    plan, directory = workplace.config.plan, workplace.run.directory
    done = (directory / RESULT).exists()  # then it is only read
    keeping: AbstractContextManager[Any] = workplace.run if done else recorded(workplace)
    with keeping:
        printed = run_apply(workplace, plan) if plan is not None else run_search(workplace)
    return Result(directory, {**json.loads((directory / RESULT).read_text("utf-8")), **printed})


def _done(config: JobConfig, given: Given, out: Path, job: JobOptions, **side_by_side: Any) -> Result:
    if ranks.number():
        assist(config, given)
        ranks.leave()
        raise SystemExit(0)
    workplace = _opened(config, given, out, job, **side_by_side)
    check_others(workplace.source, workplace.pipeline.data)
    result = _finished(workplace)
    recovery.dismiss()
    ranks.leave()
    return result


def _opened(config: JobConfig, given: Given, out: Path, job: JobOptions, **side_by_side: Any) -> Workplace:
    progress = _told(job.get("progress"))
    command = job.get("command") or f"hirelc_deploy.{'apply' if config.plan else 'search'}(...)"
    track = several("track", job.get("track")) or ()
    return open_workplace(config, out, command, progress, given=given, track=track, **side_by_side)


def _told(progress: Listener | Progress | None) -> Progress:
    """Return what says how far a call is."""
    if progress is not None and not isinstance(progress, Progress) and not callable(progress):
        raise InputError(f"progress = {progress!r:.60}: give a function of one line of text.")
    return progress if isinstance(progress, Progress) else Progress(quiet=progress is None, listener=progress)


def _folder(given: str | Path) -> Path:
    if not isinstance(given, str | Path) or not str(given):
        raise InputError(f"out = {given!r}: name the folder that is made for the results.")
    return Path(given)
