"""In: how a picture is resized, cut, padded and mirrored. Out: its pixels, boxes, masks, points in the model's input.

torchvision's v2 transforms do the same to pictures and boxes, and tests hold both against each other. Two things are
otherwise here. Masks are taken at the centres of pixels, as Pillow takes pictures, and keypoints are moved so too: v2
moves masks by half a pixel unless asked otherwise, and mirrors points by another convention than it resizes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hirelc_deploy.inputs.data.preprocess import Preprocess
from hirelc_deploy.inputs.data.targets import VOID, Boxes
from hirelc_deploy.inputs.data.views import draws

SCALES = (0.75, 1.5)
"""A view of a picture with a mask is so many times as large as the picture is judged, drawn evenly in logarithms."""

Pairs = Sequence[tuple[int, int]]
"""Numbers of keypoints that change places in a mirrored picture."""


@dataclass(frozen=True)
class Frame:
    """Where a picture lies in the model's input; everything is in pixels, as (height, width).

    Attributes:
        picture: Size of the picture itself.
        canvas: Size to which it is resized.
        start: Top and left of the window in the canvas; below 0 where it begins beside the picture.
        window: Size of the model's input.
        mirrored: The window is mirrored, left to right.
    """

    picture: tuple[int, int]
    canvas: tuple[int, int]
    start: tuple[int, int]
    window: tuple[int, int]
    mirrored: bool = False


def frame_of(preprocess: Preprocess, picture: tuple[int, int]) -> Frame:
    """Return the frame in which a picture of this (height, width) is judged: its centre."""
    canvas, window = preprocess.canvas_size(*picture), preprocess.input_size[1:]
    start = tuple(centred(size, side) for size, side in zip(canvas, window, strict=True))
    return Frame(picture, canvas, (start[0], start[1]), window)


def view_frame(
    preprocess: Preprocess,
    picture: tuple[int, int],
    seed: int,
    view: int,
    row: int,
    flips: bool = True,
    scaled: bool = False,
) -> Frame:
    """Return the frame of a view: the window and the flip that `views.random_window` draws for it.

    Args:
        scaled: The canvas is larger or smaller by a random factor of `SCALES`.
    """
    plain = frame_of(preprocess, picture)
    words = draws(seed, view, torch.tensor([row]))[:, 0]
    canvas = plain.canvas
    if scaled:
        low, high = np.log(SCALES)
        factor = float(np.exp(low + (high - low) * float(words[3]) / 2**64))
        canvas = (max(1, round(canvas[0] * factor)), max(1, round(canvas[1] * factor)))
    start = []
    for axis in (0, 1):
        window, slack = plain.window[axis], canvas[axis] - plain.window[axis]
        reach, middle = window // 8, centred(canvas[axis], window)
        low, high = (0, slack) if slack > 0 else (middle - reach, middle + reach)
        start.append(low + int(words[axis] % np.uint64(high - low + 1)))
    mirrored = flips and bool(words[2] % np.uint64(2) == 1)
    return Frame(picture, canvas, (start[0], start[1]), plain.window, mirrored)


def scales(kind: str) -> bool:
    """Return whether views of pictures with such a target are also larger and smaller: what is true there stays true.

    Not so a map (depths, heights change with the size). For boxes and keypoints it has not been tried.
    """
    return kind == "masks"


def centred(canvas: int, window: int) -> int:
    """Return where a window begins in the middle of a canvas; of an odd rest, the smaller half is cut or padded first.

    So do timm's centre crop and YOLO's letterbox.
    """
    return int((canvas - window) / 2)


def cut(canvas: Tensor, frame: Frame, fill: int) -> Tensor:
    """Return the (channels, height, width) pixels of the window; beside the canvas they are `fill`."""
    out = canvas.new_full((canvas.shape[0], *frame.window), fill)
    into, of = [], []
    for axis in (0, 1):
        start, window, size = frame.start[axis], frame.window[axis], frame.canvas[axis]
        first, last = max(0, -start), min(window, size - start)
        into.append(slice(first, max(first, last)))
        of.append(slice(first + start, max(first, last) + start))
    out[:, into[0], into[1]] = canvas[:, of[0], of[1]]
    return out.flip(2) if frame.mirrored else out


def moved(kind: str, truth: Any, frame: Frame, pairs: Pairs = ()) -> Any:
    """Return a target of the model's input from one of the picture; what has no place in it stays as it is."""
    if kind == "boxes":
        return moved_boxes(truth, frame)
    if kind == "masks":
        return moved_dense(truth, frame, VOID)
    if kind == "map":
        return moved_dense(truth, frame, float("nan"))
    if kind == "keypoints":
        return moved_points(truth, frame, pairs)
    return truth


def moved_boxes(boxes: Boxes, frame: Frame) -> dict[str, Tensor]:
    """Return boxes (k, 4) float32 corners, labels (k,) and crowd (k,); those whose centre is cut away are left out."""
    height, width = frame.window
    unit = (1.0, 1.0) if boxes.in_shares else frame.picture
    scale = np.array([frame.canvas[1] / unit[1], frame.canvas[0] / unit[0]])
    corners = boxes.corners.reshape(-1, 2, 2) * scale - np.array(frame.start[::-1])
    if frame.mirrored:
        corners[:, :, 0] = width - corners[:, ::-1, 0]
    limits = np.array([width, height])
    centres = corners.mean(1)
    corners = corners.clip(0, limits)
    kept = ((centres >= 0) & (centres < limits) & (corners[:, 1] > corners[:, 0])).all(1)
    return {
        "boxes": torch.from_numpy(corners[kept].reshape(-1, 4).astype(np.float32)),
        "labels": torch.from_numpy(boxes.labels[kept]),
        "crowd": torch.from_numpy(boxes.crowd[kept]),
    }


def moved_dense(values: Tensor, frame: Frame, fill: float) -> Tensor:
    """Return (..., height, width) of the window, each from the nearest pixel; `fill` beside the picture."""
    rows, columns = (_sources(frame, axis) for axis in (0, 1))
    if frame.mirrored:
        columns = columns.flip(0)
    out = values[..., rows.clamp(min=0)[:, None], columns.clamp(min=0)]
    return out.masked_fill((rows < 0)[:, None] | (columns < 0), fill)


def moved_points(points: Tensor, frame: Frame, pairs: Pairs = ()) -> Tensor:
    """Return (k, 3) x, y, visible; pixels have their centres at integers, and what is cut away is 0, 0, 0.

    A fourth column, the size of what is seen, is resized as the root of an area is.
    """
    x, y, seen = points[:, :3].double().unbind(1)
    across, down = frame.canvas[1] / frame.picture[1], frame.canvas[0] / frame.picture[0]
    x = (x + 0.5) * across - 0.5 - frame.start[1]
    y = (y + 0.5) * down - 0.5 - frame.start[0]
    height, width = frame.window
    inside = (seen > 0) & (x >= -0.5) & (x <= width - 0.5) & (y >= -0.5) & (y <= height - 0.5)
    order = list(range(len(points)))
    if frame.mirrored:
        x = width - 1 - x
        for one, other in pairs:
            order[one], order[other] = other, one
    placed = torch.where(inside[:, None], torch.stack([x, y, torch.ones_like(x)], 1), 0.0)
    return torch.cat([placed, points[:, 3:] * (across * down) ** 0.5], 1).float()[order]


def _sources(frame: Frame, axis: int) -> Tensor:
    """Return (side,) which row or column of the picture each of the window comes from; -1 beside it."""
    size, canvas = frame.picture[axis], frame.canvas[axis]
    place: NDArray[np.int64] = np.arange(frame.window[axis]) + frame.start[axis]
    found = (2 * place + 1) * size // (2 * canvas)
    return torch.from_numpy(np.where((place >= 0) & (place < canvas), found, -1))
