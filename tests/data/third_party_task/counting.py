"""In: a density for each place of a picture and how many objects are in it. Out: counting, by the task contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import counting_decoder
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.answers import Answers, named
from hirelc_deploy.tasks.contract import Arrays, Metric


class Counting:
    """Count objects: answers are (n, 1, h, w) densities whose sum is the count; the target is that number.

    Options: `noun`, what is counted, for people.
    """

    name = "counting"
    metric = Metric("MAE", 1.0, "objects", higher_is_better=False)
    mean_of_images = True
    flips = True
    decoder = Path(counting_decoder.__file__)
    decoder_arrays: Mapping[str, NDArray[Any]] = {}

    def __init__(self, classes: tuple[str, ...], options: Mapping[str, Any]) -> None:
        if unknown := sorted(set(options) - {"input_size", "noun"}):
            raise InputError(f"task counting: there is no option {unknown[0]!r}; give noun.")
        self.classes = ()
        self.decoder_options: Mapping[str, Any] = {"noun": str(options.get("noun", "objects"))}

    def answers(self, answer: Any) -> Answers:
        """Return the density by its name."""
        return named(answer)

    def check(self, answers: Answers, targets: Tensor | None) -> None:
        """Raise InputError unless answers are finite densities, one for each target."""
        density = _only(answers)
        if density.ndim != 4 or density.shape[1] != 1:
            raise InputError(f"task counting: the model answers {tuple(density.shape)}; give (images, 1, h, w).")
        if not density.isfinite().all():
            raise InputError("task counting: the density is not finite everywhere; check the model.")
        if targets is not None and len(targets) != len(density):
            raise InputError(f"task counting: {len(targets)} counts for {len(density)} images; give one for each.")

    def collate(self, targets: Sequence[Any]) -> Tensor:
        """Return (n,) float32 counts."""
        return torch.tensor([float(np.asarray(target).reshape(())) for target in targets])

    def divergence(self, wanted: Answers, found: Answers, temperature: float = 1.0) -> Tensor:
        """Return (n,) squared differences of the places, relative to the mean square of this image's own density."""
        target = _only(wanted).detach()
        size = target.square().flatten(1).mean(1).clamp(min=1e-6)
        return (_only(found) - target).square().flatten(1).mean(1) / size

    def surprise(self, answers: Answers, generator: torch.Generator) -> Tensor:
        """Return (n,) squared errors against densities drawn around these, as far off as `divergence` sees."""
        found = _only(answers)
        scale = found[0].numel() * found.detach().square().flatten(1).mean(1).clamp(min=1e-6).view(-1, 1, 1, 1)
        noise = torch.randn(found.shape, generator=generator, device=generator.device).to(found)
        target = found.detach() + noise * (scale / 2).sqrt()
        return ((found - target).square() / scale).flatten(1).sum(1)

    def loss(self, answers: Answers, targets: Tensor) -> Tensor:
        """Return (n,) squared errors of the counts."""
        return (_only(answers).flatten(1).sum(1) - targets.to(_only(answers).device)).square()

    def parts(self, answers: Arrays, targets: Tensor) -> list[float]:
        """Return by how many objects each image is off."""
        results = counting_decoder.decode(dict(answers), dict(self.decoder_options), {})
        return [abs(result["count"] - float(target)) for result, target in zip(results, targets, strict=True)]

    def value(self, parts: Sequence[float]) -> float:
        """Return the mean absolute error."""
        return sum(parts) / len(parts)

    def by_class(self, parts: Sequence[float]) -> Mapping[str, float]:
        """Return nothing: there are no classes."""
        return {}

    def draw(self, picture: Image.Image, result: Mapping[str, Any]) -> Image.Image:
        """Return the picture with the count in its corner."""
        drawn = picture.convert("RGB")
        ImageDraw.Draw(drawn).text((1, 1), str(result["count"]), fill="white")
        return drawn


def _only(answers: Answers) -> Tensor:
    return next(iter(answers.values()))
