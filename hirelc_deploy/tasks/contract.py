"""In: what models answer and what is true. Out: the contract by which any task is judged, trained, and shown.

The divergence of two answers steers everything and needs no labels: F1, importance, placement, guard, distillation. The
metric is what the user asked for. It is taken from the exported file on the device, and decides about limits only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hirelc_deploy.graph.answers import Answers

Arrays = Mapping[str, NDArray[np.float32]]
"""Name of an output to its (n, ...) array: what a file answers."""

Targets = Any
"""Of a batch, as `Task.collate` makes them: a tensor whose first dimension is the image, or a list of one per image."""


@dataclass(frozen=True)
class Metric:
    """What the user's metric is called and how it counts.

    Attributes:
        name: In the words of the field: `accuracy`, `mIoU`, `AP`, `RMSE`.
        scale: A value times this is what limits and reports count: 100 (points) for a share in [0, 1], 1 for others.
        unit: Of the scaled value: `points`, or that of the numbers themselves (`px`, `m`, or ``).
        higher_is_better: False for errors.
    """

    name: str
    scale: float = 100.0
    unit: str = "points"
    higher_is_better: bool = True

    def drop(self, before: float, after: float) -> float:
        """Return by how much `after` is worse than `before`, in `unit`; below 0 where it is better."""
        return self.scale * ((before - after) if self.higher_is_better else (after - before))

    def text(self, value: float) -> str:
        """Return a value as a person reads it: `93.60 %`, or `2.25 px`."""
        return f"{100 * value:.2f} %" if self.scale == 100 else f"{self.scale * value:.4g} {self.unit}".rstrip()


class Task(Protocol):
    """What a model is for.

    All answers have the image as first dimension and are float32 (float64 where files are compared). Everything here is
    deterministic. Methods raise InputError with one sentence for what they cannot use.

    Attributes:
        name: Of the entry point.
        classes: Names, in the order of the model's outputs; empty where there are none.
        metric: What `value` returns.
        mean_of_images: `parts` returns one number an image, and the metric is their mean.
        flips: Pictures may be mirrored in training: a mirrored picture has the mirrored (or the same) target.
        decoder: A file for Python 3.8 and numpy alone, copied into bundles; see `decoders/`.
        decoder_options: JSON values that its `decode` needs, beside `classes`.
        decoder_arrays: Arrays that it needs, such as anchors.
    """

    name: str
    classes: tuple[str, ...]
    metric: Metric
    mean_of_images: bool
    flips: bool
    decoder: Path
    decoder_options: Mapping[str, Any]
    decoder_arrays: Mapping[str, NDArray[Any]]

    def answers(self, answer: Any) -> Answers:
        """Return the outputs of the model that matter, by name; `graph.answers` has what most tasks need."""

    def check(self, answers: Answers, targets: Targets | None) -> None:
        """Raise InputError where a batch of answers, or the targets of the same images, cannot be of this task."""

    def collate(self, targets: Sequence[Any]) -> Targets:
        """Return the targets of a batch from those of its images."""

    def divergence(self, wanted: Answers, found: Answers, temperature: float = 1.0) -> Tensor:
        """Return (n,) how far found answers are from the uncut model's: 0 for equal ones, differentiable in `found`.

        About 0.01 where nobody would see a difference, about 1 where little is left, so that limits and loss weights
        serve all tasks. For answers that are distributions it is the Kullback-Leibler divergence in nats at that
        temperature (times its square, Hinton et al. 2015); others ignore the temperature.
        """

    def surprise(self, answers: Answers, generator: torch.Generator) -> Tensor:
        """Return (n,) losses against targets that are drawn from the answers themselves.

        Their squared gradients are, in expectation, the Fisher information (Martens 2020, section 5): the curvature of
        `divergence` at 0. So importance needs no labels.
        """

    def loss(self, answers: Answers, targets: Targets) -> Tensor:
        """Return (n,) losses against the targets."""

    def parts(self, answers: Arrays, targets: Targets) -> list[Any]:
        """Return what each image of a batch brings to the metric."""

    def value(self, parts: Sequence[Any]) -> float:
        """Return the metric over images, from their parts in any number and order, some more than once."""

    def by_class(self, parts: Sequence[Any]) -> Mapping[str, float]:
        """Return class name to the metric of that class alone; empty where there is no such thing."""

    def draw(self, picture: Image.Image, result: Mapping[str, Any]) -> Image.Image:
        """Return a picture of the model's input size with what the decoder said of it on it."""


@runtime_checkable
class Resampling(Protocol):
    """A task that answers many resamples of the same images faster than `value` would; not every task needs this."""

    def resamples(self, parts: Sequence[Any]) -> Callable[[NDArray[np.int64]], float]:
        """Return a function from (n,) indices of the parts to what `value` returns of those parts."""


@runtime_checkable
class Scored(Protocol):
    """A task whose networks may end in probabilities, where others answer logits; not every task knows of this.

    Attributes:
        in_probabilities: The options that say so.
    """

    in_probabilities: Mapping[str, Any]

    def ends_in_probabilities(self, answers: Iterable[Answers]) -> bool:
        """Return whether the answers to several batches look so."""


TaskFactory = Callable[[tuple[str, ...], Mapping[str, Any]], Task]
"""What an entry point of `hirelc_deploy.tasks` names: called with class names and options of the task.

`input_size` ([channels, height, width] of the model's input) is always among the options.
"""


def on_device(targets: Targets, device: torch.device) -> Targets:
    """Return targets with all their tensors on a device."""
    if isinstance(targets, Tensor):
        return targets.to(device)
    if isinstance(targets, Mapping):
        return {name: on_device(value, device) for name, value in targets.items()}
    if isinstance(targets, list | tuple):
        return [on_device(value, device) for value in targets]
    return targets
