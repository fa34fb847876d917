"""In: a task's name, class names and options. Out: the task, of those installed by entry points."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from hirelc_deploy.errors import InputError
from hirelc_deploy.tasks.contract import Task, TaskFactory

GROUP = "hirelc_deploy.tasks"

BUILT_IN = {
    "classification": "classification:Classification",
    "multilabel": "multilabel:MultiLabel",
    "detection": "detection:Detection",
    "segmentation": "segmentation:Segmentation",
    "regression": "regression:Regression",
    "keypoints": "keypoints:Keypoints",
    "embedding": "embedding:Embedding",
    "none": "none:NoTask",
}
"""Name to module and factory. Listed here too: an editable installation keeps the entry points of its first day."""

TASKS = tuple(BUILT_IN)
"""Names of the tasks that this project brings; `task_names` has those of others too."""


def task_names() -> tuple[str, ...]:
    """Return the names of all tasks, those of this project first."""
    return tuple(_entries())


def make_task(name: str, classes: tuple[str, ...] = (), options: Mapping[str, Any] | None = None) -> Task:
    """Return the task called `name`.

    Args:
        classes: Names, in the order of the model's outputs; empty where there are none.
        options: Of this task; its class says which it knows.

    Raises:
        InputError: No task of this name is installed, it does not load, or an option is not one of its own.
    """
    entries = _entries()
    if name not in entries:
        near = difflib.get_close_matches(name, entries, n=2)
        hint = f"did you mean {' or '.join(near)}? Known tasks" if near else "known tasks"
        raise InputError(f"task {name!r} is not installed; {hint}: {', '.join(entries)}.")
    entry = entries[name]
    try:
        factory: TaskFactory = entry.load()
    except Exception as error:  # third-party code at import: anything can come out of it
        reason = f"{type(error).__name__}: {error}".rstrip(".")
        raise InputError(f"task {name!r} ({entry.value}) does not load: {reason}; install it again.") from None
    if name in BUILT_IN:
        return factory(tuple(classes), dict(options or {}))
    try:
        task = factory(tuple(classes), dict(options or {}))
    except InputError:
        raise
    except Exception as error:  # third-party code again
        reason = f"{type(error).__name__}: {error}".rstrip(".")
        raise InputError(f"task {name!r} ({entry.value}) cannot be made: {reason}; ask its authors.") from None
    wanted = (*Task.__annotations__, *(member for member in vars(Task) if not member.startswith("_")))
    if missing := [member for member in wanted if not hasattr(task, member)]:
        raise InputError(f"task {name!r} ({entry.value}) has no {missing[0]}; see hirelc_deploy.tasks.contract.Task.")
    return task


def _entries() -> dict[str, EntryPoint]:
    ours = {name: EntryPoint(name, f"hirelc_deploy.tasks.{place}", GROUP) for name, place in BUILT_IN.items()}
    others = {entry.name: entry for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name)}
    return {**ours, **{name: entry for name, entry in others.items() if name not in ours}}
