"""In: pixels and the number of a view. Out: the same random window, flipped or not, in every run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hirelc_deploy.inputs.data.preprocess import Preprocess

Indices = Sequence[int] | NDArray[np.int64] | Tensor


def as_rows(indices: Indices) -> Tensor:
    """Return (b,) int64 row numbers."""
    return torch.as_tensor(indices, dtype=torch.int64)


def normalised(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    """Return float32 model inputs; float pixels are inputs already."""
    if pixels.is_floating_point():
        return pixels.contiguous()
    std = torch.tensor(preprocess.std).view(-1, 1, 1)
    mean = torch.tensor(preprocess.mean).view(-1, 1, 1)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / 255 / std).sub_(mean / std)


def normalised_each(windows: Sequence[Tensor], preprocess: Preprocess) -> Tensor:
    """Return (b, channels, height, width) model inputs of as many windows, one by one: each stays in the cache."""
    inputs = torch.empty(len(windows), *preprocess.input_size)
    for place, window in zip(inputs, windows, strict=True):
        place.copy_(normalised(window, preprocess))
    return inputs


def random_window(
    canvas: Tensor, preprocess: Preprocess, seed: int, view: int, rows: Tensor, flips: bool = True
) -> Tensor:
    """Cut the view's random window out of (b, channels, height, width) and, with `flips`, mirror every second one.

    Where the canvas is no larger than the window, the window may reach over the border by an eighth of its size (4
    pixels of 32, as usual on CIFAR-10), and pixels are reflected there.
    """
    words = draws(seed, view, rows)
    sides = []
    for axis in (0, 1):
        window, size = preprocess.input_size[1 + axis], canvas.shape[2 + axis]
        slack = size - window
        low, high = (0, slack) if slack else (-(window // 8), window // 8)
        start = torch.from_numpy(low + (words[axis] % np.uint64(high - low + 1)).astype(np.int64))
        position = (start[:, None] + torch.arange(window)).abs()
        sides.append(torch.where(position >= size, 2 * (size - 1) - position, position))
    flipped = torch.from_numpy(words[2] % np.uint64(2) == 1) & flips
    row, column = sides[0], torch.where(flipped[:, None], sides[1].flip(1), sides[1])
    count, channels, height, width = canvas.shape
    if count == 1:
        return canvas.index_select(2, row[0]).index_select(3, column[0])
    # Whole rows first, then columns: twice as fast as indexing with both at once.
    line = torch.arange(count * channels).view(count, channels, 1) * height + row[:, None, :]
    lines = canvas.reshape(-1, width)[line.view(-1)].view(count, channels, -1, width)
    return lines.gather(3, column[:, None, None, :].expand(-1, channels, lines.shape[2], -1))


def draws(seed: int, view: int, rows: Tensor) -> NDArray[np.uint64]:
    """Return (4, b) random words that depend on seed, view and row alone (SplitMix64, Steele et al. 2014)."""
    keys = rows.numpy().astype(np.uint64)
    for number in (seed % 2**63, view):
        keys = _mix(keys + np.uint64(number))
    return np.stack([_mix(keys + np.uint64(index)) for index in range(4)])


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = (words + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
