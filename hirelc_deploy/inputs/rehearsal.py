"""In: data, a task, and the model's answers to a few images. Out: one sentence where targets would fail later.

Targets that nobody looks at before the last hour, such as those of the test split, are looked at here first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.answers import Answers
from hirelc_deploy.inputs.data.images import Images
from hirelc_deploy.inputs.data.splits import MINIMUM_CALIBRATION, Data, check_labels, spread_order
from hirelc_deploy.inputs.data.targets import WHAT_COUNTS, counts
from hirelc_deploy.tasks.contract import Task
from hirelc_deploy.tasks.embedding import Embedding

LOOKED_AT = 256
"""Images of each split whose targets are looked at, spread over it: a second or two where they must be decoded."""

TEACH_BY_ABSENCE = ("boxes", "multilabel")
"""Kinds whose empty target says that nothing is there. Those of the other kinds say nothing, and train nothing."""


def check_targets(data: Data, task: Task, answers: Answers) -> None:
    """Raise InputError for a target that is not of the task, or where a split has none by which it could be judged.

    Args:
        answers: Of the model to a few images; only their form matters.
    """
    if data.kind == "classes" and data.labelled and data.train.labels is not None:
        check_labels({"train": data.train.labels}, data.classes or None, data.name)
    for split, images in data.splits().items():
        rows = spread_order(len(images)).tolist()
        looked = rows[:LOOKED_AT]
        if data.kind == "classes" and split != "test" and images.labels is not None:  # a run reads all of them anyway
            looked += [int(images.labels.argmin()), int(images.labels.argmax())]
        found = [_checked(images, row, task, answers) for row in looked]
        _check_shapes(images, looked, found)
        if split != "calibration" and data.kind in WHAT_COUNTS:
            rest = (images.targets([row])[0] for row in rows[LOOKED_AT:])
            needed = split != "train" or data.kind in TEACH_BY_ABSENCE
            if needed and not any(counts(data.kind, target) for targets in (found, rest) for target in targets):
                raise InputError(
                    f"{data.name}: no image of the {split} split has {WHAT_COUNTS[data.kind]}, so nothing can be "
                    "judged by it; correct its targets, or give others."
                )
        if task.metric is Embedding.metric and split in ("selection", "test") and len(rows) <= LOOKED_AT:
            _check_neighbours(np.array(found[: len(rows)]), data.name, split)


def check_functions(model: nn.Module, data: Data, task: Task) -> None:
    """Raise InputError where the user's metric or loss fails on a few images."""
    rows = np.arange(min(MINIMUM_CALIBRATION, len(data.calibration)))
    targets = task.collate(data.calibration.targets(rows))
    with torch.enable_grad():
        answers = task.answers(model(data.calibration.batch(rows)))
        task.loss(answers, targets)
    task.parts({name: value.detach().float().numpy() for name, value in answers.items()}, targets)


def _checked(images: Images, row: int, task: Task, answers: Answers) -> Any:
    """Return the target of one image, seen to fit the answers."""
    (target,) = images.targets([row])
    if images.labelled:
        try:
            task.check(answers, task.collate([target] * len(next(iter(answers.values())))))
        except InputError as error:
            raise InputError(f"{images.name_of(row)}: {error}") from None
    return target


def _check_shapes(images: Images, rows: list[int], targets: list[Any]) -> None:
    for row, target in zip(rows, targets, strict=True):
        if isinstance(target, Tensor) and target.shape != targets[0].shape:
            raise InputError(
                f"{images.name_of(row)}: a target of shape {tuple(target.shape)}, but that of "
                f"{images.name_of(rows[0])} has {tuple(targets[0].shape)}; give all images targets of one shape."
            )


def _check_neighbours(labels: np.ndarray[Any, Any], name: str, split: str) -> None:
    kinds = len(np.unique(labels))
    if kinds == 1 or kinds == len(labels):
        every = "is of one class" if kinds == 1 else "is alone in its class"
        raise InputError(
            f"{name}: every image of the {split} split {every}, so recall@1 says nothing; give several images of "
            "several classes."
        )
