"""In: (n, d) vectors and class numbers. Out: embedding, judged by cosine, by the task contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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

TOO_FEW = "recall@1: 1 image has no other to be near to; give at least 2."

ROWS = 1024  # of the table of cosines that are in memory at once

LISTED = 32
"""Nearest images that are listed for resamples: a share of exp(-32) of the images finds none of its list in one."""


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
        images = _Images(parts)
        return float(images.all_hits() @ images.counts / images.counts.sum())

    def resamples(self, parts: Sequence[Any]) -> Callable[[NDArray[np.int64]], float]:
        """Return a function from (n,) indices of the parts to the recall@1 of those parts.

        Cosines are computed once, and each image's nearest others listed. A resample asks for the first of the list
        that it holds; where ties may reach beyond the list, cosines are computed again.
        """
        images = _Images(parts)
        order, cosines = images.nearest(min(LISTED, len(images.labels) - 1))
        alike = images.labels[order] == images.labels[:, None]

        def recall(drawn: NDArray[np.int64]) -> float:
            counts = np.bincount(images.places[drawn], minlength=len(images.labels))
            rows = np.flatnonzero(counts)
            if len(rows) < 2:
                raise InputError(TOO_FEW)
            near = np.where(counts[order[rows]] > 0, cosines[rows], -np.inf)
            first = near.max(1, keepdims=True)
            nearest = near >= first - TIE
            hits = (nearest & alike[rows]).sum(1) / nearest.sum(1)
            unsure = cosines[rows, -1] >= first[:, 0] - TIE
            hits[unsure] = images.hits(rows[unsure], rows)
            return float(hits @ counts[rows] / counts.sum())

        return recall

    def by_class(self, parts: Sequence[Any]) -> Mapping[str, float]:
        """Return recall@1 of the images of each class, among the images of all classes."""
        images = _Images(parts)
        ours = {name: images.labels == k for k, name in enumerate(self.classes)}
        hits, counts = images.all_hits(), images.counts
        return {name: float(hits[own] @ counts[own] / counts[own].sum()) for name, own in ours.items() if own.any()}

    def draw(self, picture: Image.Image, result: Mapping[str, Any]) -> Image.Image:
        """Return the picture with the first numbers of its vector on it."""
        return captioned(picture, decoder.line(dict(result)))


class _Images:
    """The n images behind parts, each once.

    Attributes:
        places: (number of parts,) which image each part is of.
        counts: (n,) parts of each image.
        vectors: (n, d) of length 1.
        labels: (n,).
    """

    def __init__(self, parts: Sequence[Embedded]) -> None:
        images = {id(part): part for part in parts}
        if len(images) < 2:
            raise InputError(TOO_FEW)
        numbers = {key: number for number, key in enumerate(images)}
        self.places = np.array([numbers[id(part)] for part in parts])
        self.counts = np.bincount(self.places)
        self.vectors = np.stack([part.vector for part in images.values()])
        self.labels = np.array([part.label for part in images.values()])

    def all_hits(self) -> NDArray[np.float64]:
        """Return (n,) the share of each image's nearest others that are of its class; 1 or 0 where there is no tie."""
        everything = np.arange(len(self.labels))
        return self.hits(everything, everything)

    def hits(self, rows: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the same for some images, among some."""
        found = np.empty(len(rows))
        for start, own, cosines in self._cosines(rows, others):
            nearest = cosines >= cosines.max(1, keepdims=True) - TIE
            alike = self.labels[own, None] == self.labels[others]
            found[start : start + len(own)] = (nearest & alike).sum(1) / nearest.sum(1)
        return found

    def nearest(self, count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return (n, count) the nearest others of each image, nearest first, and their cosines."""
        everything = np.arange(len(self.labels))
        order = np.empty((len(everything), count), np.int64)
        found = np.empty((len(everything), count), np.float32)
        for start, own, cosines in self._cosines(everything, everything):
            top = np.argpartition(-cosines, count - 1)[:, :count]
            near = np.take_along_axis(cosines, top, 1)
            by_cosine = np.argsort(-near)
            order[start : start + len(own)] = np.take_along_axis(top, by_cosine, 1)
            found[start : start + len(own)] = np.take_along_axis(near, by_cosine, 1)
        return order, found

    def _cosines(
        self, rows: NDArray[np.int64], others: NDArray[np.int64]
    ) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.float32]]]:
        """Yield first place in rows, the next rows, and their cosines with the others; -inf with themselves."""
        theirs = self.vectors[others].T
        for start in range(0, len(rows), ROWS):
            own = rows[start : start + ROWS]
            cosines = self.vectors[own] @ theirs
            cosines[own[:, None] == others] = -np.inf
            yield start, own, cosines
