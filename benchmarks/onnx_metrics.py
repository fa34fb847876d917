"""In: what networks of text answer, and what is true. Out: metrics and losses of one's own, in each network's terms.

A metric returns one number an image, from 0 to 1; their mean is its value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

Metric = Callable[[Tensor, Tensor], Tensor]

BLANK = 0
"""What connectionist temporal classification calls nothing (Graves et al. 2006)."""
SAME_LINE = 0.5
"""Overlap from which a box that was found is that of a line."""


def right_lines(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return (n,) whether each line is read without a mistake, but for spaces at its ends.

    Args:
        outputs: (n, steps, characters) probabilities; the last character is the space.
        targets: (n, longest) numbers of the characters, NaN behind the end.
    """
    best, space = outputs.argmax(2), outputs.shape[2] - 1
    kept = (best != BLANK) & F.pad(best[:, 1:] != best[:, :-1], (1, 0), value=True)
    right = []
    for row, keep, true in zip(best, kept, targets, strict=True):
        read = row[keep]
        inside = (read != space).nonzero().flatten().tolist()
        read = read[inside[0] : inside[-1] + 1] if inside else read[:0]
        right.append(float(read.tolist() == true[~true.isnan()].tolist()))
    return torch.tensor(right)


def reading_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return (n,) losses of connectionist temporal classification, over the length of the text."""
    lengths = (~targets.isnan()).sum(1)
    steps = torch.full((len(outputs),), outputs.shape[1])
    told = outputs.clamp(min=1e-7).log().transpose(0, 1)
    each = F.ctc_loss(told, targets.nan_to_num(0).long(), steps, lengths, BLANK, "none", zero_infinity=True)
    return each / lengths


def lines_of_differentiable_binarization(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return (n,) F1 of the lines in (n, 1, h, w) maps of shrunken text (Liao et al. 2020); targets as `drawn_boxes`.

    A component of 0.3 and more, whose mean is 0.5 at least, is grown by area * 1.6 / circumference on each side.
    """

    def boxes(heat: NDArray[np.float32]) -> list[NDArray[np.float64]]:
        found = []
        for area, box in _components(heat > 0.3):
            wide, high = box[2] - box[0], box[3] - box[1]
            if heat[area].mean() >= 0.5 and min(wide, high) >= 3:
                found.append(_grown(box, wide * high * 1.6 / (2 * (wide + high))))
        return found

    return _f1([boxes(heat) for heat in outputs[:, 0].numpy()], targets)


def lines_of_craft(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return (n,) F1 of the lines in (n, 2, h / 2, w / 2) maps of characters and of what joins them (Baek et al. 2019).

    Components of either above 0.4, in which a character reaches 0.7, are grown as the authors' own code grows them.
    """

    def boxes(characters: NDArray[np.float32], joints: NDArray[np.float32]) -> list[NDArray[np.float64]]:
        found = []
        for area, box in _components((characters > 0.4) | (joints > 0.4)):
            wide, high, count = box[2] - box[0], box[3] - box[1], int(area[0].size)
            if count >= 10 and characters[area].max() >= 0.7:
                found.append(2 * _grown(box, math.sqrt(count * min(wide, high) / (wide * high))))
        return found

    return _f1([boxes(*maps) for maps in outputs.numpy()], targets)


def map_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return (n,) cross-entropies of (n, 1, h, w) maps with where lines are."""
    there = (targets > 0).float().reshape(outputs.shape)
    return F.binary_cross_entropy(outputs.clamp(1e-6, 1 - 1e-6), there, reduction="none").flatten(1).mean(1)


def table_tokens(tokens: Sequence[str]) -> Callable[[Mapping[str, Tensor], Tensor], Tensor]:
    """Return the metric of a network that answers a table's structure token by token.

    It is 1 minus the edit distance of the rows and cells that are answered from the true ones, over the longer of both.

    Args:
        tokens: What each column of the answer means; the first begins and the last ends.
    """
    counted = {"<tr>": "r", "</tr>": "e", "<td></td>": "c", "<td": "c"}
    letters = [counted.get(token, "") for token in tokens]

    def structure(outputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        (answer,) = (value for value in outputs.values() if value.shape[-1] == len(tokens))
        found = []
        for row, (rows, columns) in zip(answer.argmax(2).tolist(), targets.int().tolist(), strict=True):
            end = next((step for step, token in enumerate(row) if step and token in (0, len(tokens) - 1)), len(row))
            said = "".join(letters[token] for token in row[:end])
            wanted = ("r" + "c" * columns + "e") * rows
            found.append(1 - _edits(said, wanted) / max(len(said), len(wanted)))
        return torch.tensor(found)

    return structure


def _components(mask: NDArray[np.bool_]) -> list[tuple[tuple[NDArray[np.int64], ...], NDArray[np.float64]]]:
    """Return the pixels of each connected part, as an index, and the corners around it."""
    numbered, _ = ndimage.label(mask, np.ones((3, 3)))
    found = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(numbered), 1):
        inside = np.nonzero(numbered[rows, columns] == number)
        area = (inside[0] + rows.start, inside[1] + columns.start)
        found.append((area, np.array([columns.start, rows.start, columns.stop, rows.stop], np.float64)))
    return found


def _grown(box: NDArray[np.float64], by: float) -> NDArray[np.float64]:
    return box + by * np.array([-1, -1, 1, 1])


def _f1(found: Sequence[Sequence[NDArray[np.float64]]], targets: Tensor) -> Tensor:
    """Return (n,) F1 of boxes; each true line, the (n, h, w) numbers of which are from 1, is found by one box."""
    values = []
    for boxes, numbers in zip(found, targets.reshape(len(targets), *targets.shape[-2:]).int().numpy(), strict=True):
        true = [np.array([c.start, r.start, c.stop, r.stop], np.float64) for r, c in ndimage.find_objects(numbers)]
        left, hits = list(boxes), 0
        for line in true:
            over = [_overlap(line, box) for box in left]
            if over and max(over) >= SAME_LINE:
                left.pop(int(np.argmax(over)))
                hits += 1
        values.append(2 * hits / max(1, len(boxes) + len(true)))
    return torch.tensor(values)


def _overlap(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    both = (np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])).clip(0).prod()
    return float(both / ((one[2:] - one[:2]).prod() + (other[2:] - other[:2]).prod() - both))


def _edits(one: str, other: str) -> int:
    """Return the fewest letters to insert, delete or replace (Levenshtein 1966)."""
    row = list(range(len(other) + 1))
    for letter in one:
        before, row[0] = row[0], row[0] + 1
        for column, wanted in enumerate(other, 1):
            before, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, before + (letter != wanted))
    return row[-1]
