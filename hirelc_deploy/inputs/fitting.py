"""In: a model, data, and what the user says of the task. Out: the three, made for each other and seen to work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hirelc_deploy.config import TaskConfig
from hirelc_deploy.errors import InputError, WidthError
from hirelc_deploy.graph.answers import Answers, named
from hirelc_deploy.inputs.data.batches import batches
from hirelc_deploy.inputs.data.images import Images
from hirelc_deploy.inputs.data.splits import Data, empty_classes, spread_order
from hirelc_deploy.inputs.models.checks import check_output
from hirelc_deploy.inputs.models.given import Source
from hirelc_deploy.inputs.models.ordinary import note
from hirelc_deploy.inputs.models.source import preprocess_of
from hirelc_deploy.inputs.rehearsal import check_functions, check_targets
from hirelc_deploy.tasks.contract import Scored, Task
from hirelc_deploy.tasks.custom import WithLoss, WithMetric, load_function, without_own
from hirelc_deploy.tasks.none import UNJUDGED, NoTask
from hirelc_deploy.tasks.probabilities import LOGITS
from hirelc_deploy.tasks.registry import make_task

TASK_OF_KIND = {
    "classes": "classification",
    "multilabel": "multilabel",
    "numbers": "regression",
    "map": "regression",
    "masks": "segmentation",
    "boxes": "detection",
    "keypoints": "keypoints",
}
"""What data say of the task, by `Data.kind`. Random inputs (`none`) say nothing."""

KINDS_OF_TASK = {"embedding": ("classes",)} | {
    task: tuple(kind for kind, other in TASK_OF_KIND.items() if other == task) for task in TASK_OF_KIND.values()
}
"""The labels that a built-in task can use."""

PIXEL_BATCH = 64
"""Images that are looked at together."""

LOOKED_AT = 8
"""Images whose answers say whether a model ends in probabilities; the first answer that is none ends it."""

SAYS_THE_TASK = "task"
"""Entry of a model's `task_options` that names the task; the others are options of that task."""


@dataclass(frozen=True)
class Fitted:
    """A model with its data and task.

    Attributes:
        data: In the form of the model's input.
        source: With the number of classes filled in.
        record: JSON values that make the task again: `name`, `classes`, `options`, `metric` and `loss` of the user's.
    """

    model: nn.Module
    data: Data
    source: Source
    task: Task
    record: Mapping[str, Any]


class TaskAnswers:
    """A forward hook: the model then answers with the outputs that its task wants, by name."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self, _module: nn.Module, _images: tuple[Tensor, ...], answer: Any) -> Answers:
        """Return the outputs by name."""
        return self.task.answers(answer)

    def __deepcopy__(self, memo: Any) -> TaskAnswers:
        """Return itself: copies of a model share the task."""
        return self


def fit(
    source: Source,
    data: Data,
    overrides: Mapping[str, Any] | None = None,
    wanted: TaskConfig | None = None,
    metric: Callable[..., Any] | None = None,
    loss: Callable[..., Any] | None = None,
) -> Fitted:
    """Load a model for data: classes from the data, preprocessing from the model, and a forward pass to check.

    Args:
        overrides: Entries of `Preprocess` that the user asked for; see `preprocess_of`.
        wanted: Task, metric and loss as the command line names them.
        metric, loss: The user's own functions, in place of those that `wanted` names.

    Raises:
        InputError: The task is in doubt, or model, data and task do not fit.
    """
    wanted = wanted or TaskConfig()
    source = source.with_classes(len(data.classes)).with_input_size((overrides or {}).get("input_size"))
    try:
        model = source.load()
    except InputError as error:
        raise _of_classes(error, data) from None
    data = stated(data.preprocessed(preprocess_of(model, data, overrides)), overrides or {})
    if source.kind == "onnx" and wanted.name is None and not data.labelled:
        wanted = replace(wanted, name=_task_of_answers(model, data))
    task, record = task_for(model, data, wanted, metric, loss)
    rows = np.arange(min(2, len(data.calibration)))
    targets = task.collate(data.calibration.targets(rows)) if data.calibration.labelled else None
    data = data.flipping(task.flips, tuple(data.options.get("flip_pairs", ())))
    try:
        answer = check_output(model, data.calibration.batch(rows), task, targets)
    except WidthError as error:
        raise _of_classes(error, data) from None
    if said := _of_probabilities(model, data, without_own(task), record["options"]):
        wanted = replace(wanted, options={**wanted.options, **said})
        option, value = next(iter(said.items()))
        task, record = task_for(model, data, wanted, metric, loss)
        note(
            model,
            "the model ends in a softmax or in sigmoids: its answers are compared as probabilities "
            f"(--task-arg {option}={'false' if value is True else LOGITS} if not)",
        )
    answering(model, task, answer)
    check_targets(data, task, task.answers(answer))
    if record["metric"] or record["loss"]:
        if not data.labelled:
            raise InputError(f"{data.name}: has no labels, which a metric or loss is taken against; leave it out.")
        check_functions(model, data, task)
    return Fitted(model, data, source, task, record)


def _task_of_answers(model: nn.Module, data: Data) -> str:
    """Return `classification` for a file that answers with one row of numbers an image, else `none`."""
    with torch.no_grad():
        found = list(named(model(data.calibration.batch(np.arange(min(2, len(data.calibration)))))).values())
    return "classification" if len(found) == 1 and found[0].ndim == 2 else "none"


def _of_probabilities(model: nn.Module, data: Data, task: Task, said: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the options that say so where answers to a few images are probabilities; nothing where that is said."""
    if not isinstance(task, Scored) or task.in_probabilities.keys() & said.keys():
        return {}
    rows = range(min(LOOKED_AT, len(data.calibration)))
    with torch.no_grad():
        answers = (task.answers(model(data.calibration.batch(np.array([row])))) for row in rows)
        return task.in_probabilities if task.ends_in_probabilities(answers) else {}


def _of_classes(error: InputError, data: Data) -> InputError:
    """Return an error on a number of classes with the classes that no image has, which may be why."""
    empty = empty_classes(data)
    if not empty:
        return error
    return InputError(f"{error} No image is of class {_some(empty)}: class numbers count from 0, without gaps.")


PIXELS = (-0.02, 1.02)
"""Where pixels lie that were scaled to [0, 1]; interpolation in floats reaches a little beyond."""

LEAST_CONTRAST = 0.5
"""Pixels of a calibration set reach over at least half of [0, 1]: less says that another normalisation was meant."""


ALIKE = 0.6
"""What the ranges of two splits share at least, in their extremes or in all but a hundredth. Pixels of [0, 1] share
half with those of [-1, 1], and a quarter with ImageNet's normalised ones; darker pictures share the extremes."""


def stated(data: Data, overrides: Mapping[str, Any]) -> Data:
    """Return data of floats with a preprocessing that says whether pictures can be made into such floats.

    They can where mean and std, undone, lead back to pixels in [0, 1]: those of the user's (`overrides`), the model's,
    or none at all.
    """
    if not data.floats:
        return data
    _check_alike(data)
    preprocess, parts = data.preprocess, list(batches(data.calibration, PIXEL_BATCH))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocess.mean, preprocess.std))
    undone = [part * std + mean for part in parts]
    low, high = float(min(part.min() for part in undone)), float(max(part.max() for part in undone))
    said = overrides.get("mean") is not None and overrides.get("std") is not None
    if PIXELS[0] <= low and high <= PIXELS[1] and (said or high - low >= LEAST_CONTRAST):
        return data
    least, most = float(min(part.min() for part in parts)), float(max(part.max() for part in parts))
    sentence = (
        f"{data.name} holds floats from {least:.3g} to {most:.3g}, prepared by code that is not here; the bundle's "
        "run.py takes such floats (.npy) and refuses pictures. If they are pixels in [0, 1] that were normalised, say "
        "how with --mean and --std"
    )
    return replace(data.preprocessed(replace(preprocess, from_pictures=False)), notes=(*data.notes, sentence))


def _check_alike(data: Data) -> None:
    """Raise InputError where the floats of two splits were surely prepared in different ways."""
    usual = _reach(data.calibration)
    for split, images in data.splits().items():
        found = _reach(images)
        if max(_overlap(one, other) for one, other in zip(found, usual, strict=True)) < ALIKE:
            (low, high), (least, most) = found[0], usual[0]
            raise InputError(
                f"{data.name}: the floats of {split} reach from {low:.3g} to {high:.3g}, those of calibration from "
                f"{least:.3g} to {most:.3g}; prepare all splits in the same way."
            )


def _reach(images: Images) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the extremes of a few images, and where all but a hundredth of their values lie on either side."""
    values = images.batch(spread_order(len(images))[:PIXEL_BATCH]).numpy()
    least, low, high, most = np.percentile(values, (0, 1, 99, 100)).tolist()
    return (least, most), (low, high)


def _overlap(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Return what two ranges share, as a part of what they cover together; 1 where both are one point."""
    covered = max(one[1], other[1]) - min(one[0], other[0])
    return (min(one[1], other[1]) - max(one[0], other[0])) / covered if covered else 1.0


def answering(model: nn.Module, task: Task, answer: Any) -> nn.Module:
    """Let a model answer with the outputs of its task, by name, where its own answer has others; return it.

    Args:
        answer: An answer of the model.
    """
    if list(named(answer)) != list(task.answers(answer)):
        model.register_forward_hook(TaskAnswers(task))
    return model


def task_for(
    model: nn.Module,
    data: Data,
    wanted: TaskConfig,
    metric: Callable[..., Any] | None = None,
    loss: Callable[..., Any] | None = None,
) -> tuple[Task, dict[str, Any]]:
    """Return the task that the user names, else the model, else the data; classification where nobody does.

    Returns:
        The task, and the record of it; see `Fitted`.
    """
    says = dict(getattr(model, "task_options", {}))
    named = says.pop(SAYS_THE_TASK, None)
    of_data = TASK_OF_KIND.get(data.kind)
    name = wanted.name or named or of_data or "classification"
    kinds = KINDS_OF_TASK.get(name)
    if data.labelled and kinds is not None and data.kind not in kinds:
        raise InputError(
            f"--task {name}: the labels of {data.name} are {data.kind}, but {name} needs {' or '.join(kinds)}; "
            f"give other data{f', or use --task {of_data}' if of_data else ''}."
        )
    options = {"input_size": list(data.preprocess.input_size)}
    options |= dict(data.options) if name in (of_data, "embedding") else {}
    options |= {**(says if name == (named or name) else {}), **wanted.options}
    _check_size(model, data, options.get("input_size"))
    own = tuple(getattr(model, "class_names", ()))
    if data.classes != own and sorted(data.classes) == sorted(own):
        raise InputError(
            f"{type(model).__name__}: its classes are {_some(own)}, but those of {data.name} are "
            f"{_some(data.classes)}; give both in the same order."
        )
    classes = data.classes or own
    task = make_task(name, classes, options)
    if isinstance(task, NoTask) and data.labelled and metric is None and wanted.metric is None:
        raise InputError(f"{data.name}: {UNJUDGED}")
    record = {"name": name, "classes": list(classes), "options": plain(options)}
    record |= {"metric": wanted.metric or name_of(metric), "loss": wanted.loss or name_of(loss)}
    if wanted.metric is not None and metric is None:
        metric = load_function(wanted.metric, "--metric")
    if wanted.loss is not None and loss is None:
        loss = load_function(wanted.loss, "--loss")
    if metric is not None:
        task = WithMetric(task, metric, higher_is_better=False if wanted.lower_is_better else None)
    if loss is not None:
        task = WithLoss(task, loss)
    return task, record


def _check_size(model: nn.Module, data: Data, made_for: Any) -> None:
    """Raise InputError where a model whose boxes or points hang on its input's size is given another."""
    size = data.preprocess.input_size
    if isinstance(made_for, list | tuple) and tuple(made_for) != size:
        raise InputError(
            f"{type(model).__name__}: it is made for inputs of {tuple(made_for)}, but they are {size}; give "
            f"--input-size {','.join(map(str, made_for))}, or build it for the other size."
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (" and so on" if len(names) > 4 else "")


def plain(value: Any) -> Any:
    """Return JSON values: arrays become lists, functions their names."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | Tensor):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return name_of(value) if callable(value) else value


def name_of(function: Any) -> str | None:
    """Return the name by which a report calls a function of the user's."""
    return None if function is None else str(getattr(function, "__qualname__", type(function).__qualname__))
