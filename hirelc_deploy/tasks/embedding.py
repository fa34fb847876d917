"""In: (n, d) vectors and class numbers. Out: embedding, judged by cosine, by the task contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.answers import Answers
from hirelc_deploy.tasks.classification import (
    captioned,
    check_count,
    check_rows,
    labels_of,
    one_output,
    only,
    output_option,
)
from hirelc_deploy.tasks.contract import Arrays, Metric, Targets
from hirelc_deploy.tasks.decoders import embedding as decoder

TEMPERATURE = 0.1
"""Of the contrastive loss: the value that Khosla et al. (2020) use in all their results."""

TIE = 1e-6
"""Cosines that differ by less are equal: float32 sums of another order differ by about 1e-7."""

ROWS = 1024  # of the table of cosines that are in memory at once


@dataclass(frozen=True, eq=False)
class Embedded:
    """One image's vector at length 1 with its label. The object itself is the identity: copies of it are one image."""

    vector: NDArray[np.float32]
    label: int


class Embedding:
    """A vector an image, so that images of a class lie near each other: answers (n, d), targets (n,) class numbers.

    Option `outputs`: name of the output that holds the vectors, in a list of one.
    """

    name = "embedding"
    metric = Metric("recall@1")
    mean_of_images = False
    flips = True
    decoder = Path(decoder.__file__)

    def __init__(self, classes: tuple[str, ...], options: Mapping[str, Any]) -> None:
        self.classes = tuple(classes)
        self.output = output_option(self.name, options, known=("outputs",))
        self.decoder_options: Mapping[str, Any] = {}
        self.decoder_arrays: Mapping[str, NDArray[Any]] = {}

    def answers(self, answer: Any) -> Answers:
        """Return the vectors by the name of their output."""
        return one_output(answer, self.output, "(batch, numbers)")

    def check(self, answers: Answers, targets: Targets | None) -> None:
        """Raise InputError unless answers are finite (n, d) vectors, and targets numbers of the classes."""
        check_rows(only(answers), targets, 2, "an embedding returns (batch, numbers)")
        if targets is not None and self.classes and len(targets):
            low, high = int(targets.min()), int(targets.max())
            if low < 0 or high >= len(self.classes):
                raise InputError(
                    f"labels run from {low} to {high}, but the data has {len(self.classes)} classes; "
                    f"give labels from 0 to {len(self.classes) - 1}."
                )

    def collate(self, targets: Sequence[Any]) -> Tensor:
        """Return (n,) int64 labels."""
        return labels_of(targets)

    def divergence(self, wanted: Answers, found: Answers, temperature: float = 1.0) -> Tensor:
        """Return (n,) 1 - cosine, in [0, 2]; as half the squared distance at length 1, which is 0 for equal answers."""
        return (F.normalize(only(found)) - F.normalize(only(wanted))).square().sum(1) / 2

    def surprise(self, answers: Answers, generator: torch.Generator) -> Tensor:
        """Return (n,) half squared distances, at length 1, from points drawn around the answers with variance 1.

        The curvature of half a squared distance is 1, and so is the expected squared gradient of this.
        """
        found = F.normalize(only(answers))
        noise = torch.randn(found.shape, generator=generator, device=generator.device).to(found)
        return (found - (found.detach() + noise)).square().sum(1) / 2

    def loss(self, answers: Answers, targets: Targets) -> Tensor:
        """Return (n,) supervised contrastive losses among the images of the batch (Khosla et al. 2020, equation 2).

        An image whose class no other image of the batch has brings 0.
        """
        found = F.normalize(only(answers))
        labels = targets.to(found.device)
        itself = torch.eye(len(found), dtype=torch.bool, device=found.device)
        near = (found @ found.T / TEMPERATURE).masked_fill(itself, -1e4)  # finite: an image alone has a gradient
        alike = (labels[:, None] == labels) & ~itself
        log_share = near - near.logsumexp(1, keepdim=True)
        mean: Tensor = torch.where(alike, log_share, 0.0).sum(1) / alike.sum(1).clamp(min=1)
        return -mean

    def parts(self, answers: Arrays, targets: Targets) -> list[Embedded]:
        """Return the vector of each image at length 1 with its label."""
        vectors, labels = only(answers), np.asarray(targets)
        check_count(len(vectors), len(labels))
        return [Embedded(vector, int(label)) for vector, label in zip(decoder.unit(vectors), labels, strict=True)]

    def value(self, parts: Sequence[Any]) -> float:
        """Return recall@1: the share of images whose nearest other image, by cosine, is of the same class, in [0, 1].

        A part that comes twice, as under a bootstrap, counts twice but is no neighbour of itself. Of several nearest
        ones (see TIE) the share of those of the same class counts. An image alone in its class is a miss.
        """
        hits, counts, _ = _nearest(parts)
        return float(hits @ counts / counts.sum())

    def by_class(self, parts: Sequence[Any]) -> Mapping[str, float]:
        """Return recall@1 of the images of each class, among the images of all classes."""
        hits, counts, labels = _nearest(parts)
        ours = {name: labels == k for k, name in enumerate(self.classes)}
        return {name: float(hits[own] @ counts[own] / counts[own].sum()) for name, own in ours.items() if own.any()}

    def draw(self, picture: Image.Image, result: Mapping[str, Any]) -> Image.Image:
        """Return the picture with the first numbers of its vector on it."""
        return captioned(picture, decoder.line(dict(result)))


def _nearest(parts: Sequence[Embedded]) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Return of each image that is there: whether its nearest other is of its class, how often it comes, its label."""
    images = {id(part): part for part in parts}
    if len(images) < 2:
        raise InputError(f"recall@1: {len(images)} image has no other to be near to; give at least 2.")
    places = {key: place for place, key in enumerate(images)}
    counts = np.bincount([places[id(part)] for part in parts])
    vectors = np.stack([part.vector for part in images.values()])
    labels = np.array([part.label for part in images.values()])
    hits = np.empty(len(images))
    for start in range(0, len(images), ROWS):
        rows = np.arange(start, min(start + ROWS, len(images)))
        cosines = vectors[rows] @ vectors.T
        cosines[rows - start, rows] = -np.inf
        nearest = cosines >= cosines.max(1, keepdims=True) - TIE
        hits[rows] = (nearest & (labels[rows, None] == labels)).sum(1) / nearest.sum(1)
    return hits, counts, labels
