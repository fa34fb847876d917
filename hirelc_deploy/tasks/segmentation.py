"""In: a class for every pixel, as logits, and the true masks. Out: segmentation, judged by mIoU."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hirelc_deploy.errors import InputError, WidthError
from hirelc_deploy.graph.answers import Answers, named, selected
from hirelc_deploy.tasks.classification import check_names, choice_option, only, output_option, switch_option
from hirelc_deploy.tasks.colours import colour
from hirelc_deploy.tasks.contract import Arrays, Metric, Targets
from hirelc_deploy.tasks.decoders import segmentation as decoder
from hirelc_deploy.tasks.probabilities import (
    LOGITS,
    PROBABILITIES,
    SCORES_ARE,
    are_chances,
    are_shares,
    log_of,
    logit_of,
)

USUAL_NAMES = ("out", "logits")
"""Of the answer that counts where a model has several: torchvision's (beside `aux`), and that of transformers."""

BACKGROUND = "background"
OPTIONS = ("outputs", "scores", "ignore_index", "flips")


class Segmentation:
    """Find the class of every pixel.

    The answer is (n, classes, h, w) logits, of which softmax makes probabilities; or (n, 1, h, w) for two classes, and
    sigmoid makes the probability of the second. Targets are (H, W) int64 class numbers, one mask an image, in the
    model's input frame. The answer may be smaller, such as a quarter: it is resized to the mask (bilinear) first.

    Args:
        classes: Names in the order of the channels. A single name is the foreground; `background` comes before it.
        options: `outputs`, the name of the answer that counts, where the model has several and it is not `out` or
            `logits`; `scores`, `probabilities` where the model ends in a softmax, or of one channel in a sigmoid, else
            `logits`; `ignore_index`, the mask's number of void pixels, which count nowhere (255); `flips`, whether
            pictures may be mirrored in training (true).

    Raises:
        InputError: An option is unknown or of the wrong kind, or there are no classes, or more than 256.
    """

    name = "segmentation"
    metric = Metric("mIoU")
    mean_of_images = False
    decoder = Path(decoder.__file__)
    in_probabilities = SCORES_ARE

    def __init__(self, classes: tuple[str, ...], options: Mapping[str, Any]) -> None:
        chosen = list(output_option(self.name, options, known=OPTIONS))
        check_names(self.name, classes)
        if not 1 <= len(classes) <= 256:
            raise InputError(
                f"task segmentation: {len(classes)} class names were given; name the 1 to 256 channels in their order."
            )
        void = options.get("ignore_index", 255)
        if not isinstance(void, int) or isinstance(void, bool):
            raise InputError(f"task segmentation: ignore_index is {void!r}; give the whole number of void pixels.")
        self.classes = tuple(classes) if len(classes) > 1 else (BACKGROUND, *classes)
        self.flips = switch_option(self.name, options, "flips", True)
        self.ignore_index = void
        self.scores = choice_option(self.name, options, "scores", (LOGITS, PROBABILITIES))
        told = {} if self.scores == LOGITS else {"scores": self.scores}
        self.decoder_options: Mapping[str, Any] = {"outputs": chosen or list(USUAL_NAMES), **told}
        self.decoder_arrays: Mapping[str, NDArray[Any]] = {}
        self._chosen = chosen

    def answers(self, answer: Any) -> Answers:
        """Return the logits alone, by the name that the model gives them."""
        if self._chosen:
            return selected(answer, self._chosen)
        found = named(answer)
        if len(found) == 1:
            return found
        for name in USUAL_NAMES:
            if name in found:
                return {name: found[name]}
        raise InputError(
            f"task segmentation: the model returns {', '.join(found)}; name the one with the logits in outputs."
        )

    def _logits(self, answers: Answers) -> Tensor:
        """Return (n, channels, h, w) logits, also of probabilities."""
        found = only(answers)
        if self.scores == LOGITS:
            return found
        return logit_of(found) if found.shape[1] == 1 else log_of(found)

    def ends_in_probabilities(self, answers: Iterable[Answers]) -> bool:
        """Return whether all answers are what a softmax makes, or a sigmoid of one channel."""
        maps = map(only, answers)
        first = next(maps)
        return (are_chances if first.shape[1] == 1 else are_shares)(chain([first], maps))

    def check(self, answers: Answers, targets: Targets | None) -> None:
        """Raise InputError where the answer is not (n, classes, h, w), or the masks hold other numbers than classes."""
        logits = only(answers)
        channels = {len(self.classes)} | ({1} if len(self.classes) == 2 else set())
        if logits.ndim != 4 or logits.shape[1] not in channels or not logits.is_floating_point():
            raise WidthError(
                f"task segmentation: the answer is {_described(logits)}; logits (n, {len(self.classes)}, h, w) are "
                "needed, one channel for each class name."
            )
        if not logits.isfinite().all():
            raise InputError("task segmentation: the logits are not finite; check the model and its input range.")
        if targets is None:
            return
        if not isinstance(targets, Tensor) or targets.ndim != 3 or len(targets) != len(logits):
            raise InputError(
                f"task segmentation: the masks are {_described(targets)} for {len(logits)} images; "
                "give one (height, width) mask for each."
            )
        numbers = targets[targets != self.ignore_index]
        if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < len(self.classes):
            wrong = int(numbers.min()) if numbers.min() < 0 else int(numbers.max())
            raise InputError(
                f"task segmentation: a mask holds the number {wrong}, but classes are 0 to {len(self.classes) - 1}; "
                f"name all classes, or set ignore_index = {wrong} if these pixels are void."
            )

    def collate(self, targets: Sequence[Any]) -> Tensor:
        """Return (n, height, width) int64 masks."""
        masks = [torch.from_numpy(np.array(mask)) for mask in targets]
        shapes = sorted({tuple(mask.shape) for mask in masks})
        if len(shapes) != 1 or len(shapes[0]) != 2:
            raise InputError(
                f"task segmentation: the masks of one batch are {', '.join(map(str, shapes))}; "
                "give (height, width) masks of the model's input size."
            )
        return torch.stack(masks).long()

    def mirrored(self, targets: Tensor) -> Tensor:
        """Return the targets of the mirrored pictures."""
        return targets.flip(-1)

    def divergence(self, wanted: Answers, found: Answers, temperature: float = 1.0) -> Tensor:
        """Return (n,) Kullback-Leibler divergences in nats, mean over pixels, times the temperature squared."""
        wanted_logits, found_logits = (self._logits(each) / temperature for each in (wanted, found))
        wanted_log, found_log = _log_probabilities(wanted_logits), _log_probabilities(found_logits)
        per_pixel = (wanted_log.exp() * (wanted_log - found_log)).sum(1)
        return per_pixel.flatten(1).mean(1) * temperature**2

    def surprise(self, answers: Answers, generator: torch.Generator) -> Tensor:
        """Return (n,) losses against a mask of which every pixel is drawn from its own probabilities.

        The loss is the sum of the P pixels' cross-entropies over the root of P. Their gradients g_p are independent and
        of mean zero, so that the expected square of their sum is the sum of E[g_p g_p^T], the Fisher informations of
        the pixels. Over P it is their mean, which is the curvature of `divergence`, the mean over pixels, at 0.
        """
        log = _log_probabilities(self._logits(answers))
        chance = torch.rand(log[:, :1].shape, generator=generator, device=generator.device, dtype=torch.float64)
        reached = log.detach().double().exp().cumsum(1) <= chance.to(log.device)
        drawn = reached[:, :-1].sum(1, keepdim=True)  # how many of the first classes the chance has passed
        return -log.gather(1, drawn).flatten(1).sum(1) / math.sqrt(drawn[0].numel())

    def loss(self, answers: Answers, targets: Tensor) -> Tensor:
        """Return (n,) cross-entropies, mean over labelled pixels; 0 where an image has none."""
        logits = self._logits(answers)
        if logits.shape[-2:] != targets.shape[-2:]:
            logits = F.interpolate(logits, size=targets.shape[-2:], mode="bilinear", align_corners=False)
        targets = targets.to(logits.device)
        labelled = targets != self.ignore_index
        log = _log_probabilities(logits)
        per_pixel = -log.gather(1, torch.where(labelled, targets, 0)[:, None])[:, 0] * labelled
        return per_pixel.flatten(1).sum(1) / labelled.flatten(1).sum(1).clamp(min=1)

    def parts(self, answers: Arrays, targets: Tensor) -> list[NDArray[np.int64]]:
        """Return per image the (classes, classes) counts of labelled pixels: rows are true classes, columns found."""
        size, truths = len(self.classes), np.asarray(targets.cpu())
        options = {"classes": self.classes, "input_size": (0, *truths.shape[1:]), **self.decoder_options}
        matrices = []
        for truth, result in zip(truths, decoder.decode(dict(answers), options, {}), strict=True):
            labelled = truth != self.ignore_index
            pairs = truth[labelled] * size + result["mask"][labelled]
            matrices.append(np.bincount(pairs, minlength=size * size).reshape(size, size).astype(np.int64))
        return matrices

    def value(self, parts: Sequence[NDArray[np.int64]]) -> float:
        """Return the mean intersection over union of the classes that occur in truth or prediction; 0 without any."""
        ious = list(self.by_class(parts).values())
        return float(np.mean(ious)) if ious else 0.0

    def by_class(self, parts: Sequence[NDArray[np.int64]]) -> dict[str, float]:
        """Return class name to intersection over union over all images; without classes that occur nowhere."""
        matrix = np.sum(np.stack(parts), 0)
        shared = np.diagonal(matrix)
        either = matrix.sum(0) + matrix.sum(1) - shared
        return {name: float(shared[k] / either[k]) for k, name in enumerate(self.classes) if either[k]}

    def draw(self, picture: Image.Image, result: Mapping[str, Any]) -> Image.Image:
        """Return the picture half covered by the colours of the classes; a class named `background` stays clear."""
        mask = np.asarray(result["mask"], dtype=np.uint8)
        palette = np.array([colour(k) for k in range(len(self.classes))], dtype=np.uint8)
        shown = np.array([name != BACKGROUND for name in self.classes])
        base = picture.convert("RGB")
        colours = Image.fromarray(palette[mask]).resize(base.size, Image.Resampling.NEAREST)
        cover = Image.fromarray((shown[mask] * 128).astype(np.uint8)).resize(base.size, Image.Resampling.NEAREST)
        return Image.composite(colours, base, cover)


def _log_probabilities(logits: Tensor) -> Tensor:
    """Return (n, classes, h, w) log probabilities; of one channel, those of two classes."""
    if logits.shape[1] == 1:
        return torch.cat([F.logsigmoid(-logits), F.logsigmoid(logits)], 1)
    return logits.log_softmax(1)


def _described(value: Any) -> str:
    return str(tuple(value.shape)) if hasattr(value, "shape") else type(value).__name__
