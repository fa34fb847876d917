"""In: answers of any shape, of which nobody said what they mean. Out: how far two are apart; a user's metric judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.answers import Answers, named
from hirelc_deploy.tasks.classification import captioned, check_options
from hirelc_deploy.tasks.contract import Arrays, Metric, Targets
from hirelc_deploy.tasks.decoders import none as decoder
from hirelc_deploy.tasks.regression import drawn_error

UNJUDGED = (
    "task none judges nothing; name the task of these labels with --task, give a metric of your own with --metric, or "
    "leave the labels out."
)


class NoTask:
    """Any number of outputs of any shape, without labels for structure and speed alone.

    With labels it needs a metric of the user's own, which is given all outputs and the targets as they are. Training
    follows the uncut model alone, unless there is a loss of the user's own too. Where sizes of answers depend on the
    image, a shorter one counts as if it ended in zeros.
    """

    name = "none"
    metric = Metric("none", 1.0, "")
    mean_of_images = True
    flips = False
    decoder = Path(decoder.__file__)

    def __init__(self, classes: tuple[str, ...], options: Mapping[str, Any]) -> None:
        check_options(self.name, options, known=())
        self.classes = tuple(classes)
        self.decoder_options: Mapping[str, Any] = {}
        self.decoder_arrays: Mapping[str, NDArray[Any]] = {}

    def answers(self, answer: Any) -> Answers:
        """Return all outputs by name."""
        return named(answer)

    def check(self, answers: Answers, targets: Targets | None) -> None:
        """Raise InputError for answers that are not finite; nobody knows what targets must be like."""
        for name, values in answers.items():
            if not values.isfinite().all():
                raise InputError(f"the model answers {name} with NaN or infinity; check its weights and preprocessing.")

    def collate(self, targets: Sequence[Any]) -> Any:
        """Return one tensor of targets that are tensors of one shape or numbers, else the targets in a list."""
        if all(isinstance(target, int | float | np.number) for target in targets):
            return torch.tensor(targets)
        if all(isinstance(target, Tensor) for target in targets) and len({target.shape for target in targets}) == 1:
            return torch.stack(list(targets))
        return list(targets)

    def divergence(self, wanted: Answers, found: Answers, temperature: float = 1.0) -> Tensor:
        """Return (n,) mean squared differences relative to the variance of what is wanted, the mean over outputs.

        The variance is that of all values of an output in this batch.
        """
        each = []
        for name, values in wanted.items():
            target, ours = _same_size(values.detach(), found[name])
            each.append(((ours - target).square() / _variance(target)).flatten(1).mean(1))
        return torch.stack(each).mean(0)

    def surprise(self, answers: Answers, generator: torch.Generator) -> Tensor:
        """Return (n,) squared errors against values drawn around the answers, as far as `divergence` sees."""
        scales = {name: _variance(values.detach()) * values[0].numel() for name, values in answers.items()}
        each = [drawn_error(values, scales[name], generator) for name, values in answers.items()]
        return torch.stack(each).mean(0)

    def loss(self, answers: Answers, targets: Targets) -> Tensor:
        """Return (n,) zeros: nothing says how the outputs learn from targets, so training follows the uncut model."""
        return torch.stack([answer.flatten(1).sum(1) * 0.0 for answer in answers.values()]).sum(0)

    def parts(self, answers: Arrays, targets: Targets) -> NoReturn:
        """Raise InputError: there is no metric."""
        _unjudged()

    def value(self, parts: Sequence[Any]) -> NoReturn:
        """Raise InputError: there is no metric."""
        _unjudged()

    def by_class(self, parts: Sequence[Any]) -> Mapping[str, float]:
        """Return nothing."""
        return {}

    def draw(self, picture: Image.Image, result: Mapping[str, Any]) -> Image.Image:
        """Return the picture with the sizes of the answers on it."""
        return captioned(picture, decoder.line(dict(result)))


def _unjudged() -> NoReturn:
    raise InputError(UNJUDGED)


def _same_size(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return both with zeros behind their ends up to the larger of the two, in every dimension."""
    sizes = [max(pair) for pair in zip(first.shape, second.shape, strict=True)]

    def filled(values: Tensor) -> Tensor:
        missing = [size - there for size, there in zip(sizes, values.shape, strict=True)]
        return functional.pad(values, [edge for size in reversed(missing) for edge in (0, size)])

    return filled(first), filled(second)


def _variance(values: Tensor) -> Tensor:
    """Return the variance of all values; where there is none the mean square, and where that is 0 too, 1."""
    for found in (values.var(correction=0), values.square().mean()):
        if found > 0:
            return found
    return torch.ones((), dtype=values.dtype, device=values.device)
