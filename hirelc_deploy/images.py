"""In: stored pixels. Out: preprocessed batches of them, as they are or as repeatable augmented views."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from hirelc_deploy.errors import InputError

Labels = NDArray[np.int64]
"""(n,) class numbers from 0."""
Indices = Sequence[int] | NDArray[np.int64] | Tensor
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
FOLDER_CACHE_BYTES = 512 * 2**20  # decoded images that a folder keeps in memory: 3,500 of 224 x 224 after timm's resize


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the model's input: resize, centre crop, scale to [0, 1], normalise.

    Attributes:
        input_size: (channels, height, width) of the model's input.
        mean, std: Per channel, of pixels in [0, 1].
        crop_pct: Share of the resized image that the centre crop keeps, in (0, 1] (timm's name and meaning).
        interpolation: `nearest`, `bilinear` or `bicubic`.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 1.0
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if len(self.input_size) != 3 or min(self.input_size) < 1:
            raise InputError(f"input size {self.input_size}: give channels, height and width, each at least 1.")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.input_size[0] or not all(math.isfinite(value) for value in values):
                raise InputError(f"{name} {values}: give one finite number for each of {self.input_size[0]} channels.")
        if min(self.std) <= 0:
            raise InputError(f"std {self.std}: every value must be above 0.")
        if not 0 < self.crop_pct <= 1:
            raise InputError(f"crop_pct {self.crop_pct}: give a share in (0, 1].")
        if self.interpolation not in INTERPOLATIONS:
            raise InputError(f"interpolation {self.interpolation!r} is unknown; use {', '.join(INTERPOLATIONS)}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {
            "input_size": list(self.input_size),
            "mean": list(self.mean),
            "std": list(self.std),
            "crop_pct": self.crop_pct,
            "interpolation": self.interpolation,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Preprocess:
        """Rebuild what `to_dict` wrote; raises InputError for a missing or wrong entry."""
        try:
            channels, height, width = (int(size) for size in value["input_size"])
            mean, std = tuple(map(float, value["mean"])), tuple(map(float, value["std"]))
            crop_pct = float(value["crop_pct"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"preprocess: {error!r} in {dict(value)!r}; it must be as this tool wrote it.") from None
        return cls((channels, height, width), mean, std, crop_pct, str(value.get("interpolation", "bicubic")))

    def canvas_size(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) to which an image is resized before the crop: its shape kept, the crop covered.

        An image of exactly the input's size is taken whole.
        """
        if (height, width) == self.input_size[1:]:
            return height, width
        want_height, want_width = (math.floor(size / self.crop_pct) for size in self.input_size[1:])
        ratio = max(want_height / height, want_width / width)
        return max(want_height, round(height * ratio)), max(want_width, round(width * ratio))


class Images(Protocol):
    """The images of one split, ready for a model. Batches are contiguous (b, channels, height, width) float32."""

    @property
    def labels(self) -> Labels | None:
        """(n,) class of each image; None when the data has no labels."""

    def __len__(self) -> int: ...

    def batch(self, indices: Indices) -> Tensor:
        """Return the preprocessed images."""

    def views(self, indices: Indices, view: int) -> Tensor:
        """Return the same images under a random crop and a random flip.

        Image i under view v is the same picture in every call, batch and run with the same seed, so that what a teacher
        says about it can be kept.
        """

    def preprocessed(self, preprocess: Preprocess) -> Images:
        """Return the same images for another model's input; the pixels are shared."""


class ArrayImages:
    """Images of one size that live in memory: uint8 pixels, or floats that are model inputs already."""

    def __init__(
        self,
        pixels: Tensor,
        labels: Labels | None,
        rows: NDArray[np.int64],
        preprocess: Preprocess,
        seed: int = 0,
    ) -> None:
        """Take (n, channels, height, width) pixels and (n,) labels; `rows` are those that belong to this split."""
        self._pixels, self._all_labels, self._rows = pixels, labels, torch.from_numpy(rows)
        self._labels = None if labels is None else labels[rows]
        self._preprocess, self._seed = preprocess, seed
        if pixels.shape[1] != preprocess.input_size[0]:
            raise InputError(
                f"the images have {pixels.shape[1]} channels, but the model's input has {preprocess.input_size[0]}; "
                f"build the model for them (timm: --model-arg in_chans={pixels.shape[1]})."
            )
        if pixels.is_floating_point() and tuple(pixels.shape[1:]) != preprocess.input_size:
            raise InputError(
                f"the data holds model inputs (floats) of shape {tuple(pixels.shape[1:])}, but the model takes "
                f"{preprocess.input_size}; store uint8 images, which are resized, or inputs of the model's size."
            )

    @property
    def labels(self) -> Labels | None:
        """(n,) class of each image; None when the data has no labels."""
        return self._labels

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Indices) -> Tensor:
        """Return the preprocessed images, contiguous."""
        canvas = self._canvas(indices)
        _, height, width = self._preprocess.input_size
        top, left = (canvas.shape[2] - height) // 2, (canvas.shape[3] - width) // 2
        return _normalise(canvas[:, :, top : top + height, left : left + width], self._preprocess)

    def views(self, indices: Indices, view: int) -> Tensor:
        """Return randomly cropped and flipped images; see `Images.views`."""
        rows = _as_rows(indices)
        return _normalise(_crop(self._canvas(rows), self._preprocess, self._seed, view, rows), self._preprocess)

    def preprocessed(self, preprocess: Preprocess) -> ArrayImages:
        """Return the same images for another model's input."""
        return ArrayImages(self._pixels, self._all_labels, self._rows.numpy(), preprocess, self._seed)

    def _canvas(self, indices: Indices) -> Tensor:
        pixels = self._pixels[self._rows[_as_rows(indices)]]
        size = self._preprocess.canvas_size(pixels.shape[2], pixels.shape[3])
        if size == tuple(pixels.shape[2:]) or not len(pixels):
            return pixels
        mode = self._preprocess.interpolation
        # On uint8 with antialiasing torch follows Pillow, on which the weights of pretrained models rely.
        return functional.interpolate(pixels, size, mode=mode, antialias=mode != "nearest")


class FolderImages:
    """Image files, decoded when asked for and kept while they fit into `FOLDER_CACHE_BYTES`."""

    def __init__(self, files: Sequence[Path], labels: Labels, preprocess: Preprocess, seed: int = 0) -> None:
        self._files, self._labels = list(files), labels
        self._preprocess, self._seed = preprocess, seed
        self._kept: dict[int, Tensor] = {}
        self._kept_bytes = 0

    @property
    def labels(self) -> Labels | None:
        """(n,) class of each image; None when the data has no labels."""
        return self._labels

    def __len__(self) -> int:
        return len(self._files)

    def batch(self, indices: Indices) -> Tensor:
        """Return the preprocessed images, contiguous; raises InputError for a file that cannot be read."""
        _, height, width = self._preprocess.input_size
        crops = []
        for row in _as_rows(indices).tolist():
            canvas = self._canvas(row)
            top, left = (canvas.shape[1] - height) // 2, (canvas.shape[2] - width) // 2
            crops.append(canvas[:, top : top + height, left : left + width])
        return _normalise(torch.stack(crops), self._preprocess)

    def views(self, indices: Indices, view: int) -> Tensor:
        """Return randomly cropped and flipped images; see `Images.views`."""
        rows = _as_rows(indices)
        crops = [_crop(self._canvas(int(row))[None], self._preprocess, self._seed, view, row[None])[0] for row in rows]
        return _normalise(torch.stack(crops), self._preprocess)

    def preprocessed(self, preprocess: Preprocess) -> FolderImages:
        """Return the same files for another model's input."""
        return FolderImages(self._files, self._labels, preprocess, self._seed)

    def _canvas(self, row: int) -> Tensor:
        kept = self._kept.get(row)
        if kept is not None:
            return kept
        image = read_image(self._files[row], channels=self._preprocess.input_size[0])
        height, width = self._preprocess.canvas_size(image.height, image.width)
        if (image.height, image.width) != (height, width):
            image = image.resize((width, height), INTERPOLATIONS[self._preprocess.interpolation])
        pixels = torch.from_numpy(np.array(image, np.uint8).reshape(height, width, -1).transpose(2, 0, 1).copy())
        if self._kept_bytes + pixels.nbytes <= FOLDER_CACHE_BYTES:
            self._kept[row] = pixels
            self._kept_bytes += pixels.nbytes
        return pixels


_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # SyntaxError: a broken PNG chunk


def read_image(file: Path, channels: int = 3) -> Image.Image:
    """Decode an image file as RGB (or grey for one channel); raises InputError naming a file that is not readable."""
    try:
        with Image.open(file) as image:
            return image.convert("L" if channels == 1 else "RGB")
    except _UNREADABLE as error:
        raise InputError(f"{file}: not a readable image ({error}); replace or remove it.") from None


def image_size(file: Path) -> tuple[int, int]:
    """Return (height, width); raises InputError where a file is broken as far as can be told without decoding it."""
    try:
        with Image.open(file) as image:
            image.verify()
            return image.height, image.width
    except _UNREADABLE as error:
        raise InputError(f"{file}: not a readable image ({error}); replace or remove it.") from None


def _as_rows(indices: Indices) -> Tensor:
    return torch.as_tensor(indices, dtype=torch.int64)


def _normalise(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    """Return float32 model inputs; float pixels are inputs already."""
    if pixels.is_floating_point():
        return pixels.contiguous()
    std = torch.tensor(preprocess.std).view(-1, 1, 1)
    mean = torch.tensor(preprocess.mean).view(-1, 1, 1)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / 255 / std).sub_(mean / std)


def _crop(canvas: Tensor, preprocess: Preprocess, seed: int, view: int, rows: Tensor) -> Tensor:
    """Cut the view's random window out of (b, channels, height, width) and flip every second one.

    Where the canvas is no larger than the window, the window may reach over the border by an eighth of its size (4
    pixels of 32, as usual on CIFAR-10), and pixels are reflected there.
    """
    draws = _draws(seed, view, rows)
    sides = []
    for axis in (0, 1):
        window, size = preprocess.input_size[1 + axis], canvas.shape[2 + axis]
        slack = size - window
        low, high = (0, slack) if slack else (-(window // 8), window // 8)
        start = torch.from_numpy(low + (draws[axis] % np.uint64(high - low + 1)).astype(np.int64))
        position = (start[:, None] + torch.arange(window)).abs()
        sides.append(torch.where(position >= size, 2 * (size - 1) - position, position))
    flipped = torch.from_numpy(draws[2] % np.uint64(2) == 1)
    row, column = sides[0], torch.where(flipped[:, None], sides[1].flip(1), sides[1])
    count, channels, height, width = canvas.shape
    # Whole rows first, then columns: twice as fast as indexing with both at once.
    line = torch.arange(count * channels).view(count, channels, 1) * height + row[:, None, :]
    lines = canvas.reshape(-1, width)[line.view(-1)].view(count, channels, -1, width)
    return lines.gather(3, column[:, None, None, :].expand(-1, channels, lines.shape[2], -1))


def _draws(seed: int, view: int, rows: Tensor) -> NDArray[np.uint64]:
    """Return (3, b) random words that depend on seed, view and row alone (SplitMix64, Steele et al. 2014)."""
    keys = rows.numpy().astype(np.uint64)
    for number in (seed % 2**63, view):
        keys = _mix(keys + np.uint64(number))
    return np.stack([_mix(keys + np.uint64(index)) for index in range(3)])


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = (words + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
