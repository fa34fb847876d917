"""In: a run that begins, and another of the same model and data. Out: the run, with what the other one has measured."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from hirelc_deploy.config import JobConfig
from hirelc_deploy.errors import InputError
from hirelc_deploy.evaluate.files import Files
from hirelc_deploy.evaluate.leading import RUNTIMES
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.outcome import Fidelity
from hirelc_deploy.runs import BRANCHES, CONFIG, CONTENTS, SHORTENED, TRIAL_LOSS, Run, TrialRecord

LIBRARY = "library"
"""Name of the fact that says what a run took from another one."""

TOLD_APART = {
    "weights": "model: its weights are not these",
    "factory": "model: its code is not this",
    "images": "data set: its images or labels are not these",
    "metric": "metric",
    "loss": "loss",
}
"""Part of what a run's contents are to what is said where it differs."""

OF_FILES = ("target", "threads", "batch", "float_layers", "equalise", "ranges")
OF_RECOVERY = ("recovery_epochs", "learning_rate", "seed")
"""Options on which a file and its time depend, and those on which a recovery depends beside them."""

FIDELITIES: tuple[Fidelity, ...] = ("F1", "F2", "F3")
OF_UNCUT = ("precision placement on ", "channels alike across activations on ", "reference ms on ")
OF_RECOVERED = (BRANCHES, "accuracy guard at ", "longer timing of ", "peak memory of ", "energy of ")
"""How facts begin that hold for every budget: those of the uncut model's files, and those of recovered ones."""


def take_over(pipeline: Pipeline, config: JobConfig, folder: Path) -> None:
    """Journal in the pipeline's run what another run measured, once; a run that was killed meanwhile takes the rest.

    Losses of cut models belong to model and data alone. Files and times come along where they are for the same target
    and were written in the same way, recovered plans where the recovery was the same too.

    Args:
        config: Of the pipeline's run.

    Raises:
        InputError: The folder holds no run, or one of another model, other data or another task.
    """
    run = pipeline.run
    if run.fact(LIBRARY) is not None:
        return
    if folder.resolve() == run.directory.resolve():
        raise InputError(f"--library {folder}: that is this run itself; give the folder of another one.")
    other, told = Run.read(folder), JobConfig.read(folder / CONFIG)
    _check_same(run, other, config, told, folder)
    same_files = all(getattr(config, name) == getattr(told, name) for name in OF_FILES)
    same_recovery = same_files and all(getattr(config, name) == getattr(told, name) for name in OF_RECOVERY)
    whole = config.search.budget_seconds is None and float(other.fact(SHORTENED) or 1.0) == 1.0
    whole &= config.search.further_recovery == told.search.further_recovery
    recovered = same_recovery and whole and told.plan is None  # that of `apply` may have gone on from a bundle
    machines = {files.machine for files in (pipeline.files, *pipeline.others)} if same_files else set[str]()

    def comes_along(trial: TrialRecord) -> bool:
        if trial.fidelity == "F1":
            return config.search.precisions == told.search.precisions
        return trial.context in machines and (trial.fidelity == "F2" or recovered)

    for files in (pipeline.files, *pipeline.others) if same_files else ():
        _take_files(folder / files.folder.name, files, recovered)
    trials = list(filter(comes_along, other.trials))
    run.take_over(trials, {key: one for key, one in other.facts.items() if _comes_along(key, machines, recovered)})
    taken = Counter(trial.fidelity for trial in trials)
    run.remember(LIBRARY, lambda: {"run": str(folder), **{name: taken[name] for name in FIDELITIES}})
    pipeline.progress.say(
        f"library {folder}: {taken['F1']} losses before training, {taken['F2']} timed files and {taken['F3']} "
        f"recovered plans are taken over{'' if recovered else _why_not(config, told, same_files)}"
    )


def _check_same(run: Run, other: Run, config: JobConfig, told: JobConfig, folder: Path) -> None:
    """Raise InputError where another run is of another model, other data or another task."""
    ours, theirs = run.fact(CONTENTS) or {}, other.fact(CONTENTS)
    if theirs is None:
        raise InputError(f"--library {folder}: this run does not say of which model and data it is; leave it out.")
    different = [what for name, what in TOLD_APART.items() if ours.get(name) != theirs.get(name)]
    if _model(config) != _model(told):
        different.insert(0, "model")
    if _task(config) != _task(told):
        different.append("task")
    if different:
        raise InputError(
            f"--library {folder}: a run of another {different[0]}; what it measured means nothing here. Give a run of "
            "the same model and data, or leave it out."
        )


def _model(config: JobConfig) -> tuple[Any, ...]:
    """Return what names a model; its file and its weights may lie elsewhere, they are known by their contents."""
    model = config.model
    return model.spec.rpartition("/")[2], dict(model.arguments), model.pretrained, model.weights_key


def _task(config: JobConfig) -> tuple[Any, ...]:
    return config.task.name, config.task.lower_is_better, dict(config.task.options)


def _comes_along(key: str, machines: set[str], recovered: bool) -> bool:
    """Return whether a fact of another run holds here; decisions about its own limits do not."""
    if key.startswith(TRIAL_LOSS):
        return recovered
    if key == RUNTIMES:
        return bool(machines)
    begins = OF_UNCUT + OF_RECOVERED if recovered else OF_UNCUT
    return key.startswith(begins) and key.rpartition(" on ")[2] in machines


def _take_files(source: Path, files: Files, recovered: bool) -> None:
    """Have another run's files here: as further names of the same bytes where the disk allows it, else as copies.

    Files are never changed, only replaced, so neither run can spoil them for the other one.
    """
    for path in sorted(source.iterdir()) if source.is_dir() else ():
        new = files.folder / path.name
        is_recovered = "-F3." in path.name
        if not path.is_file() or path.name.startswith(".") or path.suffix == ".training" or new.exists():
            continue
        if is_recovered and not recovered:
            continue
        try:
            os.link(path, new)
        except OSError:
            partial = new.with_name(f".{new.name}.partial")
            shutil.copyfile(path, partial)
            partial.replace(new)


def _why_not(config: JobConfig, told: JobConfig, same_files: bool) -> str:
    """Return a half sentence on why files or recoveries stay behind."""
    names = OF_RECOVERY if same_files else OF_FILES
    changed = [name for name in names if getattr(config, name) != getattr(told, name)]
    return f" ({changed[0]} is another one)" if changed else " (its recoveries were of another length)"
