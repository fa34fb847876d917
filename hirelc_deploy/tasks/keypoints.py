"""In: coordinates or heatmaps of points and where the points are. Out: keypoints by the task contract."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.answers import Answers
from hirelc_deploy.tasks.classification import (
    check_count,
    check_rows,
    choice_option,
    number_option,
    one_output,
    only,
    output_option,
)
from hirelc_deploy.tasks.contract import Arrays, Metric, Targets
from hirelc_deploy.tasks.decoders import keypoints as decoder
from hirelc_deploy.tasks.regression import drawn_error

COCO = (
    *(0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072),
    *(0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089, 0.089),
)
"""Sigmas of COCO's 17 points of a person, from its own evaluation code (pycocotools)."""

HEATMAP_SIGMA = 2.0
"""Cells: width of the Gaussian that a heatmap is trained towards, its top at 1 (Xiao et al. 2018)."""

KNOWN = ("outputs", "input_size", "metric", "pck", "sigmas", "flip_pairs")


class Keypoints:
    """Points of an image: answers are (n, k, 2) x, y in input pixels, or (n, k, h, w) heatmaps; class names the points.

    Pixels have their centres at integers. The target of an image is (k, 3): x, y in input pixels, and whether the point
    is visible, above 0; or a mapping of that as `points` and the size of what is seen as `scale`, in input pixels.
    Without a scale it is the longer side of the input. Of a batch they are (n, k, 4): x, y, visible, scale.

    Options:
        input_size: [channels, height, width] of the model's input; must be given.
        outputs: Name of the output that counts, in a list of one.
        metric: `pck`, the share of visible points that are nearer than `pck` times the scale (Yang and Ramanan 2013);
            or `oks`, the mean over images of COCO's object keypoint similarity, whose scale is the root of an area.
        pck: 0.05 by default. Also what divergence and loss count as 1.
        sigmas: For `oks`, one for each point, or `coco` for the 17 of a person.
        flip_pairs: Pairs of numbers of points that change places in a mirrored picture; [] where none do. Only with it
            pictures may be mirrored.
    """

    name = "keypoints"
    mean_of_images = False
    decoder = Path(decoder.__file__)

    def __init__(self, classes: tuple[str, ...], options: Mapping[str, Any]) -> None:
        self.classes = tuple(classes)
        self.output = output_option(self.name, options, known=KNOWN)
        self.height, self.width = _input_size(options.get("input_size"))
        self.pck = number_option(self.name, options, "pck", 0.05)
        self.kind = choice_option(self.name, options, "metric", ("pck", "oks"))
        self.sigmas = _sigmas(options.get("sigmas"), self.classes) if self.kind == "oks" else ()
        self.flips = options.get("flip_pairs") is not None
        self.flip_pairs = _pairs(options.get("flip_pairs") or (), self.classes)
        self.metric = Metric(f"PCK@{self.pck:g}" if self.kind == "pck" else "OKS")
        self.decoder_options: Mapping[str, Any] = {}
        self.decoder_arrays: Mapping[str, NDArray[Any]] = {}

    def answers(self, answer: Any) -> Answers:
        """Return the coordinates or heatmaps by the name of their output."""
        return one_output(answer, self.output, "(batch, points, 2) or (batch, points, height, width)")

    def check(self, answers: Answers, targets: Targets | None) -> None:
        """Raise InputError unless answers are finite coordinates or heatmaps, and targets of as many points."""
        found = only(answers)
        rule = "keypoints are (batch, points, 2) coordinates or (batch, points, height, width) heatmaps"
        check_rows(found, targets, (3, 4), rule)
        if found.ndim == 3 and found.shape[2] != 2:
            raise InputError(f"the model answers with shape {tuple(found.shape)}; {rule}.")
        for words, count in (("named", len(self.classes)), ("given sigmas", len(self.sigmas))):
            if count and count != found.shape[1]:
                raise InputError(f"the model answers {found.shape[1]} points, but {count} are {words}; let both agree.")
        if any(max(pair) >= found.shape[1] for pair in self.flip_pairs):
            raise InputError(f"flip_pairs names a point beyond the {found.shape[1]} of the model; count them from 0.")
        if targets is not None and tuple(targets.shape) != (len(found), found.shape[1], 4):
            raise InputError(
                f"the targets have {targets.shape[1]} points an image, but the model answers {found.shape[1]}; "
                "give x, y and visible for each."
            )

    def collate(self, targets: Sequence[Any]) -> Tensor:
        """Return (n, k, 4) float32 x, y, visible, scale; what is not visible has 0 for x and y."""
        rows = [self._row(target) for target in targets]
        if len({row.shape for row in rows}) > 1:
            raise InputError("targets of one batch have different numbers of points; give all images as many.")
        return torch.stack(rows)

    def _row(self, target: Any) -> Tensor:
        scale: Any = math.nan
        if isinstance(target, Mapping):
            if "points" not in target:
                raise InputError(f"a target has {', '.join(map(str, target))}; give points (k, 3), and scale if known.")
            target, scale = target["points"], target.get("scale", math.nan)
        points = torch.as_tensor(np.asarray(target, np.float32))
        if points.ndim != 2 or points.shape[1] not in (3, 4):
            raise InputError(f"a target has shape {tuple(points.shape)}; give (points, 3): x, y, visible.")
        scales = points[:, 3] if points.shape[1] == 4 else torch.full_like(points[:, 2], float(scale))
        scales = torch.where(scales > 0, scales, float(max(self.height, self.width)))
        seen = points[:, 2] > 0
        places = torch.where(seen[:, None], points[:, :2], 0.0)
        if not places.isfinite().all():
            raise InputError("a target has NaN or infinity for a visible point; mark points that are not known with 0.")
        return torch.cat([places, seen[:, None].float(), scales[:, None]], 1)

    def mirrored(self, targets: Tensor) -> Tensor:
        """Return the (n, k, 4) targets of the mirrored pictures."""
        order = list(range(targets.shape[1]))
        for one, other in self.flip_pairs:
            order[one], order[other] = other, one
        turned = targets[:, order].clone()
        turned[..., 0] = torch.where(turned[..., 2] > 0, self.width - 1 - turned[..., 0], 0.0)
        return turned

    def divergence(self, wanted: Answers, found: Answers, temperature: float = 1.0) -> Tensor:
        """Return (n,) mean squared distances of the points, or mean squared differences of heatmaps; see `_scale`."""
        target = only(wanted).detach()
        return ((only(found) - target).square() / self._scale(target)).flatten(1).sum(1)

    def surprise(self, answers: Answers, generator: torch.Generator) -> Tensor:
        """Return (n,) squared errors against answers drawn around these, as far off as `divergence` sees."""
        found = only(answers)
        return drawn_error(found, self._scale(found.detach()), generator)

    def _scale(self, values: Tensor) -> Tensor:
        """Return what a sum of squares is divided by, so that about 1 is where little is left.

        Points: their number times (pck * longer side)^2, so 1 is as far off as PCK just allows. Heatmaps: their number
        of cells times the variance of the cells of this batch, so 1 says as little as their mean.
        """
        if values.ndim == 3:
            return torch.tensor(values.shape[1] * (self.pck * max(self.height, self.width)) ** 2).to(values)
        variance = values.var(correction=0)
        return values[0].numel() * torch.where(variance > 0, variance, 1.0)

    def loss(self, answers: Answers, targets: Targets) -> Tensor:
        """Return (n,) means over the visible points of squared distance in units of `pck` times the scale of the image.

        Heatmaps: of squared differences from a Gaussian (see HEATMAP_SIGMA), relative to what a map of zeros differs.
        """
        found = only(answers)
        truth = targets.to(found)
        seen = truth[..., 2] > 0
        if found.ndim == 3:
            each = (found - truth[..., :2]).square().sum(2) / (self.pck * truth[..., 3]).square()
        else:
            energy = math.pi * HEATMAP_SIGMA**2  # the integral of a squared Gaussian
            each = (found - self._heatmaps(truth, *found.shape[2:])).square().flatten(2).sum(2) / energy
        mean: Tensor = torch.where(seen, each, 0.0).sum(1) / seen.sum(1).clamp(min=1)
        return mean

    def _heatmaps(self, truth: Tensor, rows: int, columns: int) -> Tensor:
        """Return (n, k, rows, columns) Gaussians of height 1 around the points."""
        x = (truth[..., 0] + 0.5) * columns / self.width - 0.5
        y = (truth[..., 1] + 0.5) * rows / self.height - 0.5
        across = (torch.arange(columns).to(truth) - x[..., None]).square()[..., None, :]
        down = (torch.arange(rows).to(truth) - y[..., None]).square()[..., None]
        distance: Tensor = across + down
        return torch.exp(-distance / (2 * HEATMAP_SIGMA**2))

    def parts(self, answers: Arrays, targets: Targets) -> list[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
        """Return of each image the score of each point (0 where it is not visible), and whether it is visible."""
        found = only(answers)
        truth = np.asarray(targets, np.float64)
        check_count(len(found), len(truth))
        points = decoder.located(found, self.height, self.width)[..., :2]
        distance = np.hypot(*np.moveaxis(points - truth[..., :2], 2, 0))
        if self.kind == "pck":
            scores = (distance <= self.pck * truth[..., 3]).astype(np.float64)
        else:  # exp(-d^2 / (2 s^2 k^2)) with k = 2 sigma, as COCO defines it
            scores = np.exp(-np.square(distance / (2 * np.array(self.sigmas) * truth[..., 3])) / 2)
        seen = truth[..., 2] > 0
        return list(zip(scores * seen, seen, strict=True))

    def value(self, parts: Sequence[Any]) -> float:
        """Return PCK over all visible points, or the mean OKS of the images with visible points; both in [0, 1]."""
        scores, seen = _columns(parts)
        if self.kind == "pck":
            return math.fsum(scores.ravel()) / int(seen.sum())
        shown = seen.any(1)
        return math.fsum(scores[shown].sum(1) / seen[shown].sum(1)) / int(shown.sum())

    def by_class(self, parts: Sequence[Any]) -> Mapping[str, float]:
        """Return name of a point to its share of hits, or its mean similarity, over the images where it is visible."""
        scores, seen = _columns(parts)
        names = {name: k for k, name in enumerate(self.classes) if seen[:, k].any()}
        return {name: math.fsum(scores[:, k]) / int(seen[:, k].sum()) for name, k in names.items()}

    def draw(self, picture: Image.Image, result: Mapping[str, Any]) -> Image.Image:
        """Return the picture with a red dot at each point."""
        drawn = picture.convert("RGB")
        pen, radius = ImageDraw.Draw(drawn), max(1.0, max(drawn.size) / 100)
        for point in result["points"]:
            x, y = point["x"], point["y"]
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(230, 30, 30))
        return drawn


def _columns(parts: Sequence[Any]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    seen = np.array([visible for _, visible in parts], dtype=bool)
    if not seen.any():
        raise InputError("keypoints: no point is visible in any image; give at least one that is.")
    return np.stack([scores for scores, _ in parts]), seen


def _input_size(given: Any) -> tuple[int, int]:
    if not isinstance(given, list | tuple) or len(given) != 3 or not all(isinstance(side, int) for side in given):
        raise InputError(
            f"task keypoints: input_size is {given!r}; give [channels, height, width] of the model's input, in whose "
            "pixels the points are."
        )
    return given[1], given[2]


def _sigmas(given: Any, classes: Sequence[str]) -> tuple[float, ...]:
    if given == "coco":
        given = COCO
    numbers = tuple(given) if isinstance(given, list | tuple) else ()
    if not numbers or not all(isinstance(number, int | float) and number > 0 for number in numbers):
        raise InputError(f"task keypoints: metric oks needs sigmas, found {given!r}; give one a point, or 'coco'.")
    if classes and len(numbers) != len(classes):
        raise InputError(f"task keypoints: {len(numbers)} sigmas for {len(classes)} points; give one for each.")
    return tuple(float(number) for number in numbers)


def _pairs(given: Any, classes: Sequence[str]) -> tuple[tuple[int, int], ...]:
    pairs = []
    for pair in given:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(k, int) and k >= 0 for k in pair):
            raise InputError(f"task keypoints: flip_pairs has {pair!r}; give pairs of numbers of points, from 0.")
        pairs.append((pair[0], pair[1]))
    numbers = [number for pair in pairs for number in pair]
    if len(set(numbers)) != len(numbers) or (classes and numbers and max(numbers) >= len(classes)):
        raise InputError("task keypoints: flip_pairs names a point twice, or one that is not there; use each once.")
    return tuple(pairs)
