"""In: what a call of Python was given. Out: the configuration of the job, and the objects that it can only name."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from hirelc_deploy.config import (
    DataConfig,
    JobConfig,
    Limits,
    ModelConfig,
    PreprocessConfig,
    SearchConfig,
    TaskConfig,
    parse_duration,
)
from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.datasets import data_from_datasets
from hirelc_deploy.inputs.data.load import NO_DATA, load_data
from hirelc_deploy.inputs.data.splits import Data, SplitSizes
from hirelc_deploy.inputs.fitting import plain
from hirelc_deploy.inputs.models.given import source_of
from hirelc_deploy.jobs.workplace import Given
from hirelc_deploy.options import JobOptions, SearchOptions

Model = str | nn.Module | Callable[[], nn.Module]
"""A timm name or another spec of the command line, a module (which is copied), or a function that makes one."""

Splits = str | Mapping[str, Dataset[Any]] | Data
"""A spec of the command line, or split names (train, and test or val) to torch data sets of (image, target)."""


def search_config(model: Model, data: Splits | None, limits: Limits, options: SearchOptions) -> tuple[JobConfig, Given]:
    """Return the configuration of a search, and the objects that it can only name."""
    budget = options.get("budget")
    found = SearchConfig(
        strategy=options.get("strategy", "hirelc"),
        budget_seconds=parse_duration(budget) if isinstance(budget, str) else budget,
        f1_evaluations=options.get("trials", 24),
        finalists=options.get("finalists", 3),
        options=options.get("options", 8),
        warm_start=_place(options.get("warm_start")),
        depth=options.get("depth", True),
        precisions=options.get("precisions", False),
        race=options.get("race", 0),
        library=_place(options.get("library")),
        further_recovery=None if (share := options.get("further_recovery")) == 1 else share,
    )
    task, target = options.get("task"), options.get("target", "cpu")
    metric, loss = options.get("metric"), options.get("loss")
    return job_config(model, data, task, target, metric, loss, options, limits=limits, search=found)


def job_config(
    model: Model,
    data: Splits | None,
    task: str | None,
    target: str,
    metric: Callable[..., Any] | str | None,
    loss: Callable[..., Any] | str | None,
    job: JobOptions,
    **more: Any,
) -> tuple[JobConfig, Given]:
    """Return the configuration of a job, and the objects that it can only name."""
    known = SearchOptions if "search" in more else JobOptions
    if unknown := sorted(set(job) - known.__annotations__.keys()):
        raise TypeError(f"unexpected keyword argument {unknown[0]!r}")
    if job.get("lower_is_better") is not None and metric is None:
        raise InputError("lower_is_better: it is said of a metric of your own; name one with --metric.")
    weights, folder = job.get("weights"), job.get("data_dir")
    if data is None:
        if not (isinstance(model, str) and model.lower().endswith(".onnx")):
            raise InputError("--data is missing: name what judges the model; only an ONNX file can do without it.")
        data = NO_DATA
    by_name = isinstance(model, str)
    source = None if by_name else source_of(model, weights, job.get("model_args"), job.get("pretrained", False))
    splits = None if isinstance(data, str) else data_of(data, job)
    config = JobConfig(
        model=ModelConfig(
            source.spec if source else str(model),
            str(Path(weights).resolve()) if weights else None,
            named("model_args", job.get("model_args")),
            job.get("pretrained", False),
            job.get("weights_key"),
        ),
        data=DataConfig(
            data if isinstance(data, str) else f"datasets:{splits.name if splits else ''}",
            str(Path(folder).resolve()) if folder else None,
            job.get("calibration_images"),
            job.get("selection_images"),
        ),
        target=target,
        seed=job.get("seed", 0),
        threads=job.get("threads"),
        batch=job.get("batch") if job.get("batch") != 1 else None,  # the same job, said in two ways
        recovery_epochs=job.get("recovery_epochs", 1.0),
        learning_rate=job.get("learning_rate", 0.01),
        recovery_batch=job.get("recovery_batch"),
        sync_norms=job.get("sync_norms", False),
        exclude=several("exclude", job.get("exclude")) or (),
        include=several("include", job.get("include")) or (),
        float_layers=several("float_layers", job.get("float_layers")) or (),
        equalise=several("equalise", job.get("equalise")) or (),
        ranges=named("ranges", job.get("ranges")),
        preprocess=PreprocessConfig(
            several("input_size", job.get("input_size")),
            several("mean", job.get("mean")),
            several("std", job.get("std")),
            geometry=job.get("geometry"),
            interpolation=job.get("interpolation"),
            crop_pct=job.get("crop_pct"),
        ),
        task=TaskConfig(
            task,
            metric if isinstance(metric, str) else None,
            loss if isinstance(loss, str) else None,
            job.get("lower_is_better"),
            plain(named("task_options", job.get("task_options"))),
        ),
        **more,
    )
    own_metric, own_loss = (None if isinstance(one, str) else one for one in (metric, loss))
    return config, Given(source, splits, own_metric, own_loss, job.get("task_options"))


def limits_of(given: Limits | Mapping[str, float] | None) -> Limits:
    """Return what a search must keep; a drop of 1 point where nothing is said."""
    if isinstance(given, Limits):
        return given
    fields = [field.name for field in dataclasses.fields(Limits)]
    for name in (limits := named("limits", given)):
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"did you mean {near[0]}? There are" if near else "there are"
            raise InputError(f"limits: {name!r} is unknown; {hint} {', '.join(fields)}.")
    return Limits(**(limits or {"max_drop": 1.0}))


def data_of(data: Splits, job: JobOptions) -> Data:
    """Return the splits that a spec or data sets of torch make."""
    if isinstance(data, Data):
        return data
    folder, seed = job.get("data_dir"), job.get("seed", 0)
    if isinstance(data, str):
        return load_data(
            data,
            data_dir=Path(folder) if folder else None,
            calibration_images=job.get("calibration_images"),
            selection_images=job.get("selection_images"),
            seed=seed,
        )
    sizes = SplitSizes(job.get("calibration_images"), job.get("selection_images"))
    return data_from_datasets(data, sizes, seed, job.get("collate_fn"), classes=job.get("classes"))


def _place(given: str | Path | None) -> str | None:
    return str(Path(given).resolve()) if given else None


def named(name: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the names and values of an option that takes them."""
    if given is not None and not isinstance(given, Mapping):
        raise InputError(f"{name} = {given!r:.60}: give a dict of names and values.")
    return dict(given or {})


def several(name: str, given: Any) -> tuple[Any, ...] | None:
    """Return the values of an option that takes several; None where there are none."""
    if given is not None and (isinstance(given, str | Path) or not isinstance(given, Iterable)):
        raise InputError(f"{name} = {str(given)!r:.60}: give several values, in a list.")
    return tuple(given) or None if given is not None else None
