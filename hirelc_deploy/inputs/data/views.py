"""In: pixels and the number of a view. Out: the same random window, flipped or not, in every run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from hirelc_deploy.inputs.data.preprocess import Preprocess

Indices = Sequence[int] | NDArray[np.int64] | Tensor


def as_rows(indices: Indices) -> Tensor:
    """Return (b,) int64 row numbers."""
    return torch.as_tensor(indices, dtype=torch.int64)


def normalised(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    """Return contiguous float32 model inputs of (..., channels, height, width) pixels; floats are inputs already."""
    if pixels.is_floating_point():
        return pixels.contiguous()
    std = torch.tensor(preprocess.std, device=pixels.device).view(-1, 1, 1)
    mean = torch.tensor(preprocess.mean, device=pixels.device).view(-1, 1, 1)
    if pixels.device.type == "cpu":
        # NumPy asks Linux for huge pages: touching new memory page by page takes three times as long as the arithmetic.
        inputs = torch.from_numpy(np.empty(pixels.shape, np.float32))
    else:
        inputs = torch.empty(pixels.shape, device=pixels.device)
    # One by one on a CPU, where each stays in the cache.
    parts = zip(inputs, pixels, strict=True) if pixels.ndim == 4 and not pixels.is_cuda else [(inputs, pixels)]
    for place, part in parts:
        place.copy_(part).mul_(1 / 255 / std).sub_(mean / std)
    return inputs


def stacked_windows(windows: Iterable[Tensor], count: int, preprocess: Preprocess) -> Tensor:
    """Return (count, channels, height, width) uint8 windows; in memory that processes share where others want them."""
    stacked = torch.from_numpy(np.empty((count, *preprocess.input_size), np.uint8))
    if get_worker_info() is not None:
        stacked.share_memory_()  # while nothing is in it that would be copied
    for place, window in zip(stacked, windows, strict=True):
        place.copy_(window)
    return stacked


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
        sides.append(_positions(torch.from_numpy(_starts(words[axis], window, size))[:, None], window, size))
    flipped = torch.from_numpy(words[2] % np.uint64(2) == 1) & flips
    row, column = sides[0], torch.where(flipped[:, None], sides[1].flip(1), sides[1])
    count, channels, height, width = canvas.shape
    # Whole rows first, then columns: twice as fast as indexing with both at once.
    line = torch.arange(count * channels).view(count, channels, 1) * height + row[:, None, :]
    lines = canvas.reshape(-1, width)[line.view(-1)].view(count, channels, -1, width)
    return lines.gather(3, column[:, None, None, :].expand(-1, channels, lines.shape[2], -1))


def one_window(canvas: Tensor, preprocess: Preprocess, words: NDArray[np.uint64], flips: bool = True) -> Tensor:
    """Return the (channels, height, width) window that `random_window` cuts out of one such canvas.

    Args:
        words: (4,) of its `draws`.
    """
    for axis in (0, 1):
        window, size = preprocess.input_size[1 + axis], canvas.shape[1 + axis]
        start = int(_starts(words[axis], window, size))
        if 0 <= start <= size - window:
            canvas = canvas.narrow(1 + axis, start, window)
        else:
            canvas = canvas.index_select(1 + axis, _positions(torch.tensor(start), window, size))
    return canvas.flip(2) if flips and words[2] % np.uint64(2) == 1 else canvas


def _starts(words: Any, window: int, size: int) -> Any:
    slack = size - window
    low, high = (0, slack) if slack else (-(window // 8), window // 8)
    return low + (words % np.uint64(high - low + 1)).astype(np.int64)


def _positions(start: Tensor, window: int, size: int) -> Tensor:
    """Return (..., window) rows or columns from starts on, reflected at the borders."""
    position = (start + torch.arange(window)).abs()
    return torch.where(position >= size, 2 * (size - 1) - position, position)


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
