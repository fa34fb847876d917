"""In: (n, labels) logits and which labels are true. Out: multi-label classification by the task contract."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
    check_width,
    choice_option,
    number_option,
    one_output,
    only,
    output_option,
)
from hirelc_deploy.tasks.contract import Arrays, Metric, Targets
from hirelc_deploy.tasks.decoders import multilabel as decoder
from hirelc_deploy.tasks.probabilities import LOGITS, PROBABILITIES, SCORES_ARE, are_chances, logit_of


class MultiLabel:
    """Any number of labels an image: answers are (n, labels) logits, each of which stands for its sigmoid.

    Targets are (n, labels): 1 where a label is true, 0 where not, NaN where it is not known. Of one image they may also
    be given as the numbers of its true labels, where there are class names.

    Options:
        outputs: Name of the output that holds the logits, in a list of one.
        scores: `probabilities` where the model ends in sigmoids; else `logits`.
        metric: `map`, the mean over labels of average precision, or `f1`, over all labels at `threshold`.
        threshold: Score in (0, 1) from which a label counts, 0.5 by default; also in the bundle.
    """

    name = "multilabel"
    mean_of_images = False
    flips = True
    decoder = Path(decoder.__file__)
    in_probabilities = SCORES_ARE

    def __init__(self, classes: tuple[str, ...], options: Mapping[str, Any]) -> None:
        self.classes = tuple(classes)
        self.output = output_option(self.name, options, known=("outputs", "scores", "metric", "threshold"))
        self.scores = choice_option(self.name, options, "scores", (LOGITS, PROBABILITIES))
        self.kind = choice_option(self.name, options, "metric", ("map", "f1"))
        self.threshold = number_option(self.name, options, "threshold", 0.5, high=1)
        self.metric = Metric("mAP" if self.kind == "map" else "F1")
        told = {} if self.scores == LOGITS else {"scores": self.scores}
        self.decoder_options: Mapping[str, Any] = {"threshold": self.threshold, **told}
        self.decoder_arrays: Mapping[str, NDArray[Any]] = {}

    def answers(self, answer: Any) -> Answers:
        """Return the logits by the name of their output."""
        return one_output(answer, self.output, "(batch, labels)")

    def _logits(self, answers: Answers) -> Tensor:
        """Return (n, labels) logits, also of probabilities."""
        return only(answers) if self.scores == LOGITS else logit_of(only(answers))

    def ends_in_probabilities(self, answers: Iterable[Answers]) -> bool:
        """Return whether all answers are what sigmoids make."""
        return are_chances(map(only, answers))

    def check(self, answers: Answers, targets: Targets | None) -> None:
        """Raise InputError unless answers are finite (n, labels) logits, and targets 0, 1 or NaN of the same shape."""
        logits = only(answers)
        check_rows(logits, targets, 2, "a multi-label classifier returns (batch, labels)")
        check_width(logits.shape[1], self.classes, "labels")
        if targets is None:
            return
        if targets.shape != logits.shape:
            raise InputError(
                f"the targets have shape {tuple(targets.shape)}, but the model answers {tuple(logits.shape)}; "
                "give 0 or 1 for each label of an image."
            )
        if not ((targets == 0) | (targets == 1) | targets.isnan()).all():
            raise InputError("the targets hold other values than 0, 1 and NaN (not known); give 0 or 1 for each label.")

    def collate(self, targets: Sequence[Any]) -> Tensor:
        """Return (n, labels) float32, from 0s and 1s or from the numbers of the true labels."""
        return torch.stack([self._row(target) for target in targets])

    def _row(self, target: Any) -> Tensor:
        row = torch.as_tensor(target).flatten()
        is_row = len(row) == len(self.classes) and bool(((row == 0) | (row == 1) | row.isnan()).all())
        if not self.classes or is_row:
            return row.float()
        hot = torch.zeros(len(self.classes))
        if not row.numel():
            return hot
        if row.is_floating_point() or int(row.min()) < 0 or int(row.max()) >= len(self.classes):
            raise InputError(
                f"labels: {row.tolist()!r:.60} are not numbers of {len(self.classes)} labels; "
                "give a 0 or 1 for each label, or the numbers of the true ones."
            )
        hot[row.long()] = 1
        return hot

    def divergence(self, wanted: Answers, found: Answers, temperature: float = 1.0) -> Tensor:
        """Return (n,) T^2 * KL(wanted || found at temperature T) in nats, of independent labels: a sum over them."""
        p, q = self._logits(wanted) / temperature, self._logits(found) / temperature
        yes = p.sigmoid() * (F.logsigmoid(p) - F.logsigmoid(q))
        no = (-p).sigmoid() * (F.logsigmoid(-p) - F.logsigmoid(-q))
        return temperature**2 * (yes + no).sum(1)

    def surprise(self, answers: Answers, generator: torch.Generator) -> Tensor:
        """Return (n,) cross-entropies against labels that are drawn from the answers."""
        logits = self._logits(answers)
        chance = torch.rand(logits.shape, generator=generator, device=generator.device).to(logits)
        drawn = (chance < logits.detach().sigmoid()).to(logits)
        return F.binary_cross_entropy_with_logits(logits, drawn, reduction="none").sum(1)

    def loss(self, answers: Answers, targets: Targets) -> Tensor:
        """Return (n,) cross-entropies in nats, summed over the labels that are known."""
        logits = self._logits(answers)
        truth = targets.to(logits)
        each = F.binary_cross_entropy_with_logits(logits, truth.nan_to_num(0.0), reduction="none")
        return torch.where(truth.isnan(), 0.0, each).sum(1)

    def parts(self, answers: Arrays, targets: Targets) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Return the scores of each image with its targets, both (labels,)."""
        logits, truth = only(answers), np.asarray(targets, np.float32)
        check_count(len(logits), len(truth))
        return list(zip(logits, truth, strict=True))

    def value(self, parts: Sequence[Any]) -> float:
        """Return mAP, over the labels that some image has, or F1 over all labels together; both in [0, 1]."""
        scores, truth = _columns(parts)
        if self.kind == "f1":
            return self._f1(scores, truth)
        each = [average_precision(*pair) for pair in zip(scores.T, truth.T, strict=True)]
        known = [precision for precision in each if precision is not None]
        if not known:
            raise InputError("mAP: no image has a label; give at least one image with one.")
        return float(np.mean(known))

    def by_class(self, parts: Sequence[Any]) -> Mapping[str, float]:
        """Return label to its average precision or F1; labels that no image has are left out."""
        scores, truth = _columns(parts)
        result: dict[str, float] = {}
        for index, label in enumerate(self.classes):
            precision = average_precision(scores[:, index], truth[:, index])
            if precision is not None:
                column = slice(index, index + 1)
                result[label] = self._f1(scores[:, column], truth[:, column]) if self.kind == "f1" else precision
        return result

    def _f1(self, scores: NDArray[np.float32], truth: NDArray[np.float32]) -> float:
        least = self.threshold if self.scores == PROBABILITIES else np.log(self.threshold / (1 - self.threshold))
        said = scores.astype(np.float64) >= least
        hits, wrong = int((said & (truth == 1)).sum()), int((said & (truth == 0)).sum())
        missed = int((~said & (truth == 1)).sum())
        return 2 * hits / (2 * hits + wrong + missed) if hits + wrong + missed else 1.0

    def draw(self, picture: Image.Image, result: Mapping[str, Any]) -> Image.Image:
        """Return the picture with its labels on it."""
        return captioned(picture, decoder.line(dict(result)))


def average_precision(scores: NDArray[np.float32], truth: NDArray[np.float32]) -> float | None:
    """Return the area under the steps of the precision-recall curve, of one label; None where no image has it.

    It is sum over thresholds of (recall gained) * precision, not interpolated, as in scikit-learn's
    `average_precision_score`. Images of equal score come in together, so their order is of no matter.

    Args:
        scores: (n,) in any unit.
        truth: (n,) 1, 0, or NaN for images that do not count.
    """
    counts = ~np.isnan(truth)
    order = np.argsort(-scores[counts], kind="stable")
    ranked, true = scores[counts][order], truth[counts][order]
    if not true.sum():
        return None
    last = np.append(ranked[1:] != ranked[:-1], True)  # of images with equal scores
    hits = np.cumsum(true)[last]
    precision = hits / (np.flatnonzero(last) + 1)
    return float((np.diff(hits, prepend=0) * precision).sum() / hits[-1])


def _columns(parts: Sequence[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    if not parts:
        raise InputError("no images to take the metric of.")
    return np.stack([scores for scores, _ in parts]), np.stack([truth for _, truth in parts])
