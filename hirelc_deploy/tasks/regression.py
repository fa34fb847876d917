"""In: numbers or dense maps and their true values. Out: regression by the task contract."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.answers import Answers
from hirelc_deploy.tasks.classification import (
    captioned,
    check_count,
    check_rows,
    choice_option,
    one_output,
    only,
    output_option,
    switch_option,
)
from hirelc_deploy.tasks.contract import Arrays, Metric, Targets
from hirelc_deploy.tasks.decoders import regression as decoder

FLAT = 1e-10
"""A variance below this share of the mean square is rounding: float32 has steps of 6e-8 of a value."""


class Regression:
    """Numbers (n, k), or maps (n, k, h, w) or (n, h, w), such as depth; class names are those of the k outputs.

    Targets have the shape of the answers; NaN in them is a value that is not known, and does not count.

    Options:
        outputs: Name of the output that counts, in a list of one.
        metric: `rmse` or `mae`, over all known values of all images together.
        unit: Of the numbers, such as `m`; for reports.
        spread: Standard deviation of what is answered, one number or one for each output. An error of that size is a
            divergence of 1. Without it each batch gives its own, and then it says a little which images it was made of.
        flips: True where a mirrored picture has the same numbers (maps: mirrored ones). Not by default: the steering
            angle of a mirrored road is another one.
    """

    name = "regression"
    mean_of_images = False
    decoder = Path(decoder.__file__)

    def __init__(self, classes: tuple[str, ...], options: Mapping[str, Any]) -> None:
        self.classes = tuple(classes)
        self.output = output_option(self.name, options, known=("outputs", "metric", "unit", "spread", "flips"))
        self.kind = choice_option(self.name, options, "metric", ("rmse", "mae"))
        self.spread = _spread(options.get("spread", ()))
        self.flips = switch_option(self.name, options, "flips", False)
        self.metric = Metric(self.kind.upper(), 1.0, str(options.get("unit", "")), higher_is_better=False)
        self.decoder_options: Mapping[str, Any] = {"unit": self.metric.unit}
        self.decoder_arrays: Mapping[str, NDArray[Any]] = {}

    def answers(self, answer: Any) -> Answers:
        """Return the numbers or maps by the name of their output."""
        return one_output(answer, self.output, "(batch, numbers) or (batch, numbers, height, width)")

    def check(self, answers: Answers, targets: Targets | None) -> None:
        """Raise InputError unless answers are finite numbers or maps, and targets of the same shape."""
        found = only(answers)
        rule = "a regression returns (batch, numbers) or (batch, numbers, height, width)"
        check_rows(found, targets, (2, 3, 4), rule)
        outputs = found.shape[1] if found.ndim != 3 else 1
        if self.classes and outputs != len(self.classes):
            raise InputError(
                f"the model has {outputs} outputs, but {len(self.classes)} are named; give a name for each, or none."
            )
        if len(self.spread) > 1 and outputs != len(self.spread):
            raise InputError(f"spread has {len(self.spread)} numbers for {outputs} outputs; give one for each, or one.")
        if targets is not None:
            fitted = _fitted(targets, found)
            if fitted.isinf().any():
                raise InputError("the targets hold infinity; give finite numbers, and NaN where a value is not known.")

    def collate(self, targets: Sequence[Any]) -> Tensor:
        """Return (n, ...) float32 of one number, row or map an image."""
        rows = [torch.as_tensor(np.asarray(target, np.float32)) for target in targets]
        if len({row.shape for row in rows}) > 1:
            shapes = ", ".join(str(shape) for shape in sorted({tuple(row.shape) for row in rows})[:3])
            raise InputError(f"targets of one batch have shapes {shapes}; give all images targets of one shape.")
        batch = torch.stack(rows)
        return batch[:, None] if batch.ndim == 1 else batch

    def divergence(self, wanted: Answers, found: Answers, temperature: float = 1.0) -> Tensor:
        """Return (n,) mean squared differences relative to the variance of what is wanted; its mean alone would be 1.

        The variance is that of `spread`, or of each output over images and positions of this batch.
        """
        target = only(wanted).detach()
        return ((only(found) - target).square() / self._variance(target)).flatten(1).mean(1)

    def surprise(self, answers: Answers, generator: torch.Generator) -> Tensor:
        """Return (n,) squared errors against values drawn around the answers, as far as `divergence` sees."""
        found = only(answers)
        return drawn_error(found, self._variance(found.detach()) * found[0].numel(), generator)

    def loss(self, answers: Answers, targets: Targets) -> Tensor:
        """Return (n,) mean squared errors over what is known, relative to the variance of the targets or `spread`."""
        found = only(answers)
        truth = _fitted(targets.to(found), found)
        known = ~truth.isnan()
        errors = torch.where(known, found - truth.nan_to_num(0.0), 0.0).square() / self._variance(truth)
        return errors.flatten(1).sum(1) / known.flatten(1).sum(1).clamp(min=1)

    def _variance(self, values: Tensor) -> Tensor:
        """Return (k, 1, 1), (k,) or (1, 1): the variance of each output, in the shape that divides `values`."""
        shape = [1] if values.ndim == 3 else [values.shape[1]] + [1] * (values.ndim - 2)
        if self.spread:
            return torch.tensor(self.spread).to(values).square().expand(shape[0]).view(shape)
        over = (0, 1, 2) if values.ndim == 3 else (0, *range(2, values.ndim))
        known = ~values.isnan()
        count = known.sum(over).clamp(min=1)
        mean = values.nan_to_num(0.0).sum(over) / count
        second = values.nan_to_num(0.0).square().sum(over) / count
        centred = torch.where(known, values.nan_to_num(0.0) - mean.view(shape), 0.0)
        variance = centred.square().sum(over) / count
        # One image of numbers has no variance; its size takes the place, and 1 that of a size of 0.
        variance = torch.where(variance > FLAT * second, variance, second)
        return torch.where(variance > 0, variance, 1.0).view(shape)

    def parts(self, answers: Arrays, targets: Targets) -> list[tuple[NDArray[np.float64], NDArray[np.int64]]]:
        """Return of each image the sum of squared or absolute errors of each output, and how many were known."""
        found = torch.from_numpy(np.asarray(only(answers), np.float64))
        check_count(len(found), len(targets))
        truth = _fitted(targets.double(), found)
        rows = found.shape[:2] if found.ndim != 3 else (len(found), 1)
        errors, known = (found - truth).nan_to_num(0.0).reshape(*rows, -1), ~truth.isnan().reshape(*rows, -1)
        sums = errors.square().sum(2) if self.kind == "rmse" else errors.abs().sum(2)
        return list(zip(sums.numpy(), known.sum(2).numpy(), strict=True))

    def value(self, parts: Sequence[Any]) -> float:
        """Return the root of the mean squared error, or the mean absolute error, in the unit of the numbers."""
        sums, known = _columns(parts)
        return self._error(sums, known)

    def by_class(self, parts: Sequence[Any]) -> Mapping[str, float]:
        """Return the error of each output that has a name and known values."""
        sums, known = _columns(parts)
        names = {name: k for k, name in enumerate(self.classes) if known[:, k].any()}
        return {name: self._error(sums[:, k], known[:, k]) for name, k in names.items()}

    def _error(self, sums: NDArray[np.float64], known: NDArray[np.int64]) -> float:
        if not known.any():
            raise InputError(f"{self.metric.name}: no value of the targets is known; give one that is not NaN.")
        mean = float(sums.sum() / known.sum())
        return math.sqrt(mean) if self.kind == "rmse" else mean

    def draw(self, picture: Image.Image, result: Mapping[str, Any]) -> Image.Image:
        """Return the picture with its numbers on it; a map lies over it, white where it is highest."""
        if "mask" in result:
            values = np.asarray(result["mask"], np.float64)
            share = (values - values.min()) / (np.ptp(values) or 1.0)
            heat = Image.fromarray((255 * share).astype(np.uint8)).resize(picture.size, Image.Resampling.BILINEAR)
            picture = Image.blend(picture.convert("RGB"), heat.convert("RGB"), 0.7)
        return captioned(picture, decoder.line(dict(result)))


def drawn_error(found: Tensor, scale: Tensor, generator: torch.Generator) -> Tensor:
    """Return (n,) sums of (found - target)^2 / scale, the targets drawn so that squared gradients are the curvature.

    The curvature of sum d^2 / scale is 2 / scale. Noise of variance scale / 2 makes the expected squared gradient
    4 / scale^2 * scale / 2, which is the same.

    Args:
        found: (n, ...) answers.
        scale: What divides the square of each, in a shape that fits `found`.
    """
    noise = torch.randn(found.shape, generator=generator, device=generator.device).to(found)
    target = found.detach() + noise * (scale / 2).sqrt()
    return ((found - target).square() / scale).flatten(1).sum(1)


def _columns(parts: Sequence[Any]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    if not parts:
        raise InputError("no images to take the metric of.")
    return np.stack([sums for sums, _ in parts]), np.stack([known for _, known in parts])


def _fitted(targets: Tensor, found: Tensor) -> Tensor:
    """Return targets in the shape of the answers; only dimensions of 1 may differ."""
    long, wanted = ([side for side in tensor.shape[1:] if side > 1] for tensor in (targets, found))
    if long != wanted or len(targets) != len(found):
        raise InputError(
            f"the targets have shape {tuple(targets.shape)}, but the model answers {tuple(found.shape)}; "
            "give one value for each answer, NaN where it is not known."
        )
    return targets.reshape(found.shape)


def _spread(given: Any) -> tuple[float, ...]:
    numbers = tuple(given) if isinstance(given, list | tuple) else (given,)
    if not all(isinstance(number, int | float) and 0 < number < math.inf for number in numbers):
        raise InputError(f"task regression: spread is {given!r}; give a number above 0, or one for each output.")
    return tuple(float(number) for number in numbers)
