"""In: selection images, and what answers them. Out: them in parts that fit into memory; how other answers compare."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hirelc_deploy.compress.row_file import RowFile
from hirelc_deploy.evaluate.cutting import arrays, divergence_by_batch, mean_divergence
from hirelc_deploy.evaluate.effort import BATCH, KEPT_BYTES, SMALL_BATCH
from hirelc_deploy.graph.answers import Answers
from hirelc_deploy.inputs.data.batches import batches
from hirelc_deploy.inputs.data.images import Images
from hirelc_deploy.inputs.data.loader import JUDGED
from hirelc_deploy.progress import Progress
from hirelc_deploy.tasks.contract import Targets, Task

FORWARD = "uncut model on the selection split"

Answering = Callable[[Tensor], Answers]
"""From (n, channels, height, width) pictures to answers by name."""


@dataclass(frozen=True)
class Shown:
    """Some of the images.

    Attributes:
        pictures: (n, channels, height, width), preprocessed.
        targets: What is true of them; None without labels.
        answers: What others are compared with.
    """

    pictures: Tensor
    targets: Targets | None
    answers: Answers

    def __len__(self) -> int:
        return len(self.pictures)

    def first(self, count: int) -> Shown:
        """Return the first images of these; memory is shared."""
        targets = None if self.targets is None else self.targets[:count]
        return Shown(self.pictures[:count], targets, {name: values[:count] for name, values in self.answers.items()})


class Selection:
    """The images by which choices are made, with what the uncut model answers to them.

    All of it is kept in memory where that takes up to KEPT_BYTES. More of it comes in parts, pictures and answers from
    files where there is room for them; else pictures are decoded, and the uncut model is asked, each time.
    """

    def __init__(
        self, images: Images, task: Task, answer: Answering, progress: Progress, folder: Path | None = None
    ) -> None:
        """Args: `answer` is that of the uncut model; `folder` holds what memory does not, see `RowFile`."""
        self.images, self.task = images, task
        self._answer, self._progress = answer, progress
        self._answers, self._pictures = RowFile(len(images), folder), RowFile(len(images), folder)

    def __len__(self) -> int:
        return len(self.images)

    def shown(self, count: int | None = None) -> Iterator[Shown]:
        """Yield the images in order, or so many of the first, some at a time."""
        left = len(self) if count is None else min(count, len(self))
        parts = self._read(left) if self._kept is None else iter(self._kept)
        while left > 0:
            part = next(parts)
            yield part if len(part) <= left else part.first(left)
            left -= len(part)

    @cached_property
    def parts(self) -> list[Any] | None:
        """What each image brings to the metric of the uncut model; None without labels."""
        if not self.images.labelled:
            return None
        return [one for part in self.shown() for one in self.task.parts(arrays(part.answers), part.targets)]

    @cached_property
    def answer_bytes(self) -> int:
        """Of the answer to one image."""
        answers = self._answer(self.images.batch(np.arange(min(2, len(self)))))
        return sum(values[:1].nbytes for values in answers.values())

    @cached_property
    def _bytes(self) -> int:
        """Of one image with all that belongs to it, but for boxes and the like."""
        first = np.arange(1)
        targets = self._targets(first)
        target_bytes = targets.nbytes if isinstance(targets, Tensor) else 0
        return self.images.batch(first).nbytes + self.answer_bytes + target_bytes

    @property
    def _all_fit(self) -> bool:
        return self._bytes * len(self) <= KEPT_BYTES

    @cached_property
    def _kept(self) -> list[Shown] | None:
        """All images where they fit, else None; each has then been decoded and answered to."""
        with self._progress.stage(FORWARD):
            kept = [part for part in self._read(len(self)) if self._all_fit]
        if self.images.canvases is not None and (kept or self._pictures.knows(np.arange(len(self)), JUDGED)):
            self.images.canvases.forget()
        return kept or None

    def _read(self, count: int) -> Iterator[Shown]:
        """Yield the first images; all at once where they are kept."""
        if self._all_fit:
            pictures = torch.cat(list(batches(self.images, BATCH, count)))
            yield Shown(pictures, self._targets(np.arange(count)), self._answer(pictures))
            return
        # Whole small batches, by which models answer.
        size = max(SMALL_BATCH, min(BATCH, KEPT_BYTES // self._bytes // SMALL_BATCH * SMALL_BATCH))
        parts = [np.arange(start, min(start + size, count)) for start in range(0, count, size)]
        for rows, pictures in zip(parts, self._pictures_of(parts), strict=True):
            answers = self._answers.get(rows, JUDGED)
            if answers is None:
                answers = self._answer(pictures)
                self._answers.keep(rows, JUDGED, answers)
            yield Shown(pictures, self._targets(rows), answers)

    def _pictures_of(self, parts: Sequence[NDArray[np.int64]]) -> Iterator[Tensor]:
        if all(self._pictures.knows(rows, JUDGED) for rows in parts):
            for rows in parts:
                yield from (self._pictures.get(rows, JUDGED) or {}).values()
            return
        arriving = batches(self.images, len(parts[0]), int(parts[-1][-1]) + 1)
        for rows, pictures in zip(parts, arriving, strict=True):
            self._pictures.keep(rows, JUDGED, {"pictures": pictures})
            yield pictures

    def _targets(self, rows: NDArray[np.int64]) -> Targets | None:
        return self.task.collate(self.images.targets(rows)) if self.images.labelled else None


@dataclass(frozen=True)
class First:
    """The first images of a selection, as often as they are asked for."""

    selection: Selection
    count: int

    def __iter__(self) -> Iterator[Shown]:
        return self.selection.shown(self.count)

    def copied(self) -> list[Shown]:
        """Return them in memory of their own: a slice would be sent to others with all that it is a slice of."""
        return [
            Shown(
                part.pictures.clone(),
                copy.deepcopy(part.targets),
                {name: values.clone() for name, values in part.answers.items()},
            )
            for part in self
        ]


def loss_of(task: Task, shown: Iterable[Shown], answer: Answering) -> float:
    """Return the mean divergence of answers from those that the images come with."""
    return mean_divergence(
        divergence for part in shown for divergence in divergence_by_batch(task, part.answers, answer(part.pictures))
    )


def parts_of(task: Task, shown: Iterable[Shown], answer: Answering) -> list[Any]:
    """Return what each image, whose target is known, brings to the metric."""
    return [one for part in shown for one in task.parts(arrays(answer(part.pictures)), part.targets)]


def judged(task: Task, shown: Iterable[Shown], answer: Answering) -> tuple[float, float | None]:
    """Return the mean divergence of answers from those that the images come with, and their metric.

    The metric is None without targets.
    """
    each, parts = list[Tensor](), list[Any]()
    for part in shown:
        found = answer(part.pictures)
        each += divergence_by_batch(task, part.answers, found)
        if part.targets is not None:
            parts += task.parts(arrays(found), part.targets)
    return mean_divergence(each), task.value(parts) if parts else None
