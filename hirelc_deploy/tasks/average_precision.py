"""In: found and true boxes of images. Out: COCO's average precision, from parts of which each image has one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""Overlaps that count as found; the first alone makes AP50."""

RECALLS = np.linspace(0.0, 1.0, 101)
"""Where the precision is read (COCO's `recThrs`)."""

MOST = 100
"""Boxes of one class in one image that count (COCO's `maxDets`), the surest."""

AREAS = (0.0, 1e10)
"""Found boxes that match nothing and are of another size, such as those that end before they begin, count not."""

TRUE, FALSE, IGNORED = 1, 0, -1


@dataclass(frozen=True)
class Matches:
    """What one image brings to the average precision.

    Attributes:
        labels: (d,) classes of the found boxes, each class by falling score.
        scores: (d,) their scores, float64.
        outcomes: (thresholds, d) int8: 1 for a true box, 0 for a false one, -1 where it lies on a crowd and counts not.
        truths: (classes,) how many boxes were to be found, without crowds.
    """

    labels: NDArray[np.int64]
    scores: NDArray[np.float64]
    outcomes: NDArray[np.int8]
    truths: NDArray[np.int64]


def matches(
    found: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]],
    true: tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.bool_]],
    classes: int,
) -> Matches:
    """Match the boxes of one image as COCOeval.evaluateImg does, for all sizes of boxes.

    The surest box takes the free true box that it overlaps most (the last of equal ones). One that finds none but lies
    on a crowd is ignored; there its overlap is the share of its own area, and a crowd takes any number.

    Args:
        found: (d, 4) corners x0, y0, x1, y1, (d,) scores and (d,) classes.
        true: (g, 4) corners, (g,) classes and (g,) whether each is a crowd.
        classes: How many there are.
    """
    boxes, scores, labels = found
    true_boxes, true_labels, crowd = true
    order = np.lexsort((-scores, labels))
    starts = np.searchsorted(labels[order], labels[order])
    order = order[np.arange(len(order)) - starts < MOST]  # a place within its class
    boxes, scores, labels = boxes[order], scores[order], labels[order]
    ious = _ious(boxes, true_boxes, crowd)
    ious[labels[:, None] != true_labels] = 0.0
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    none = np.where((area < AREAS[0]) | (area > AREAS[1]), IGNORED, FALSE).astype(np.int8)
    outcomes = np.tile(none, (len(THRESHOLDS), 1))
    free = np.repeat(~crowd[None], len(THRESHOLDS), 0)
    limits = np.minimum(THRESHOLDS, 1 - 1e-10)[:, None]
    rows = np.arange(len(THRESHOLDS))
    for place in np.flatnonzero((ious >= THRESHOLDS[0]).any(1)):
        over = ious[place] >= limits
        last_best = len(crowd) - 1 - np.argmax(np.where(over & free, ious[place], -1.0)[:, ::-1], 1)
        true_here = (over & free)[rows, last_best]
        outcomes[:, place] = np.where(true_here, TRUE, np.where((over & crowd).any(1), IGNORED, none[place]))
        free[rows[true_here], last_best[true_here]] = False
    return Matches(labels, scores, outcomes, np.bincount(true_labels[~crowd], minlength=classes))


def average_precisions(parts: Sequence[Matches]) -> NDArray[np.float64]:
    """Return (classes, thresholds) average precision over images; nan for a class of which there is no true box.

    As COCOeval.accumulate: precision, made to fall with recall, at 101 recalls. Recall reaches each at some true box,
    so that the precision is needed at true boxes alone. Boxes of equal score count in the order of their images.
    """
    return resampled_precisions(parts)(np.ones(len(parts), np.int64))


def resampled_precisions(
    parts: Sequence[Matches], thresholds: int = len(THRESHOLDS)
) -> Callable[[NDArray[np.int64]], NDArray[np.float64]]:
    """Return a function from (images,) how often each image counts to `average_precisions` of that many copies.

    Boxes are sorted once. The copies of a true box follow each other, and each raises the precision: made to fall with
    recall, it is that of the last copy for all of them. Boxes of equal score, whose order COCO leaves to that of the
    images, stand together by image.

    Args:
        thresholds: The first so many of THRESHOLDS.
    """
    truths_of = np.stack([part.truths for part in parts])
    classes = np.arange(truths_of.shape[1])
    all_labels = np.concatenate([part.labels for part in parts])
    order = np.lexsort((-np.concatenate([part.scores for part in parts]), all_labels))
    all_labels = all_labels[order]
    images = np.repeat(np.arange(len(parts)), [len(part.labels) for part in parts])[order]
    all_outcomes = np.concatenate([part.outcomes[:thresholds] for part in parts], 1)[:, order]
    is_false, ever_true = all_outcomes == FALSE, (all_outcomes == TRUE).any(0)
    starts = np.searchsorted(all_labels, classes)

    def precisions(counts: NDArray[np.int64]) -> NDArray[np.float64]:
        all_misses = _summed(is_false * counts[images])
        places = np.flatnonzero(ever_true & (counts[images] > 0))
        labels, copies = all_labels[places], counts[images[places]]
        is_true = all_outcomes[:, places] == TRUE
        bounds = np.searchsorted(labels, [*classes, len(classes)])
        all_hits = _summed(is_true * copies)
        hits = all_hits[:, 1:] - all_hits[:, bounds[labels]]
        misses = all_misses[:, places + 1] - all_misses[:, starts[labels]]
        precision = hits / (hits + misses + np.spacing(1))
        truths: NDArray[np.int64] = counts @ truths_of
        result = np.full((len(classes), len(is_true)), np.nan)
        for k in np.flatnonzero(truths):
            mine = slice(bounds[k], bounds[k + 1])
            reached = _reached(int(truths[k]))
            worth = (reached[hits[:, mine]] - reached[np.maximum(hits[:, mine] - copies[mine], 0)]) * is_true[:, mine]
            falling = np.maximum.accumulate(precision[:, mine][:, ::-1], 1)[:, ::-1]
            result[k] = (falling * worth).sum(1)
        return result

    return precisions


def _summed(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return (thresholds, d + 1) sums of the first 0, 1, ... d counts."""
    sums = np.zeros((len(counts), counts.shape[1] + 1), dtype=np.int64)
    np.cumsum(counts, 1, out=sums[:, 1:])
    return sums


@functools.lru_cache(512)
def _reached(truths: int) -> NDArray[np.float64]:
    """Return (truths + 1,) the share of the recalls that is reached when 0, 1, 2, ... true boxes are found.

    Recall 0 is reached by any box, but the precision there is that of the first true one.
    """
    needed = np.searchsorted(np.arange(truths + 1) / truths, RECALLS)
    return np.cumsum(np.bincount(np.maximum(needed, 1), minlength=truths + 1)) / len(RECALLS)


def _ious(boxes: NDArray[np.float64], true: NDArray[np.float64], crowd: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return (d, g) overlaps over unions; over the found box's own area where the true one is a crowd."""
    edges = np.minimum(boxes[:, None, 2:], true[:, 2:]) - np.maximum(boxes[:, None, :2], true[:, :2])
    shared = np.where((edges > 0).all(-1), edges.prod(-1), 0.0)
    area, true_area = ((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (boxes, true))
    whole = np.where(crowd, area[:, None], area[:, None] + true_area - shared)
    return np.divide(shared, whole, out=np.zeros_like(shared), where=shared > 0)
