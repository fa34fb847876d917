"""In: stored pixels and targets that do not move. Out: preprocessed batches, as they are or as repeatable views."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.canvas import Canvases
from hirelc_deploy.inputs.data.geometry import Pairs, centred, cut, frame_of
from hirelc_deploy.inputs.data.pictures import Picture
from hirelc_deploy.inputs.data.preprocess import Preprocess
from hirelc_deploy.inputs.data.views import (
    Indices,
    as_rows,
    draws,
    normalised,
    one_window,
    random_window,
    stacked_windows,
)

Labels = NDArray[np.int64]
"""(n,) class numbers from 0."""


class Images(Protocol):
    """The images of one split, ready for a model. Batches are contiguous (b, channels, height, width) float32.

    Those that are decoded are `Windowed`.
    """

    @property
    def labels(self) -> Labels | None:
        """(n,) class of each image; None where what is true of an image is not one class number."""

    @property
    def labelled(self) -> bool:
        """Whether anything is known to be true of the images."""

    @property
    def decodes(self) -> bool:
        """Whether images are decoded when asked for, so that it can pay to have other processes do it."""

    @property
    def canvases(self) -> Canvases | None:
        """The decoded pictures from which views are cut, where they may be kept."""

    def __len__(self) -> int: ...

    def batch(self, indices: Indices) -> Tensor:
        """Return the preprocessed images."""

    def views(self, indices: Indices, view: int) -> Tensor:
        """Return the same images under a random crop and a random flip.

        Image i under view v is the same picture in every call, batch and run with the same seed, so that what a teacher
        says about it can be kept.
        """

    def targets(self, indices: Indices, view: int | None = None) -> list[Any]:
        """Return what is true of the images as `batch` shows them, or `views` with the number of a view.

        `targets.KINDS` says what a target of each kind of data is; all pixels are those of the model's input.
        """

    def name_of(self, row: int) -> str:
        """Return what to call an image in errors."""

    def preprocessed(self, preprocess: Preprocess) -> Images:
        """Return the same images for another model's input; the pixels are shared."""

    def flipping(self, flips: bool, pairs: Pairs = ()) -> Images:
        """Return the same images, whose views are mirrored at random or not.

        Args:
            pairs: Numbers of keypoints that change places in a mirrored picture.
        """


class ArrayImages:
    """Images of one size that live in memory: uint8 pixels, or floats that are model inputs already."""

    decodes = False
    canvases = None

    def __init__(
        self,
        pixels: Tensor,
        labels: Labels | None,
        rows: NDArray[np.int64],
        preprocess: Preprocess,
        seed: int = 0,
        flips: bool = True,
    ) -> None:
        """Take (n, channels, height, width) pixels and (n,) labels; `rows` are those that belong to this split."""
        self._pixels, self._all_labels, self._rows = pixels, labels, torch.from_numpy(rows)
        self._labels = None if labels is None else labels[rows]
        self._preprocess, self._seed, self._flips = preprocess, seed, flips
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

    @property
    def labelled(self) -> bool:
        """Whether there are labels."""
        return self._labels is not None

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Indices) -> Tensor:
        """Return the preprocessed images, contiguous."""
        canvas = self._canvas(indices)
        _, height, width = self._preprocess.input_size
        top, left = (canvas.shape[2] - height) // 2, (canvas.shape[3] - width) // 2
        return normalised(canvas[:, :, top : top + height, left : left + width], self._preprocess)

    def views(self, indices: Indices, view: int) -> Tensor:
        """Return randomly cropped and flipped images; see `Images.views`."""
        rows = as_rows(indices)
        windows = random_window(self._canvas(rows), self._preprocess, self._seed, view, rows, self._flips)
        return normalised(windows, self._preprocess)

    def targets(self, indices: Indices, view: int | None = None) -> list[Any]:
        """Return the class numbers, which are the same in every view."""
        rows = as_rows(indices).numpy()
        return [None] * len(rows) if self._labels is None else self._labels[rows].tolist()

    def name_of(self, row: int) -> str:
        """Return the number of the image in its array."""
        return f"image {int(self._rows[row])}"

    def preprocessed(self, preprocess: Preprocess) -> ArrayImages:
        """Return the same images for another model's input."""
        return ArrayImages(self._pixels, self._all_labels, self._rows.numpy(), preprocess, self._seed, self._flips)

    def flipping(self, flips: bool, pairs: Pairs = ()) -> ArrayImages:
        """Return the same images, whose views are mirrored at random or not."""
        return ArrayImages(self._pixels, self._all_labels, self._rows.numpy(), self._preprocess, self._seed, flips)

    def _canvas(self, indices: Indices) -> Tensor:
        pixels = self._pixels[self._rows[as_rows(indices)]]
        size = self._preprocess.canvas_size(pixels.shape[2], pixels.shape[3])
        if size == tuple(pixels.shape[2:]) or not len(pixels):
            return pixels
        mode = self._preprocess.interpolation
        if mode == "box":  # which torch has for floats only
            return torch.stack([_boxed(one, size) for one in pixels])
        # On uint8 with antialiasing torch follows Pillow, on which the weights of pretrained models rely.
        pixels = functional.interpolate(pixels, size, mode=mode, antialias=mode != "nearest")
        if self._preprocess.geometry != "letterbox":
            return pixels
        _, height, width = self._preprocess.input_size
        top, left = centred(height, size[0]), centred(width, size[1])
        border = (left, width - size[1] - left, top, height - size[0] - top)
        return functional.pad(pixels, border, value=self._preprocess.pad_value)


def _boxed(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Return (channels, height, width) uint8 pixels at another size, each the mean of what it covers."""
    channels = [Image.fromarray(channel.numpy()).resize(size[::-1], Image.Resampling.BOX) for channel in pixels]
    return torch.stack([torch.from_numpy(np.array(channel)) for channel in channels])


class Windowed(ABC):
    """Images that are made in two steps: other processes, and GPUs, are sent what the first one makes."""

    _preprocess: Preprocess

    @abstractmethod
    def windows(self, indices: Indices, view: int | None) -> Tensor:
        """Return (b, channels, height, width) uint8 pixels of `batch` (None), or of a view; floats that are inputs.

        Raises:
            InputError: An image cannot be read.
        """

    def inputs(self, windows: Tensor) -> Tensor:
        """Return the model's inputs of windows, on their device."""
        return normalised(windows, self._preprocess)

    def batch(self, indices: Indices) -> Tensor:
        """Return the preprocessed images, contiguous."""
        return self.inputs(self.windows(indices, None))

    def views(self, indices: Indices, view: int) -> Tensor:
        """Return the images under what is drawn for a view; see `Images.views`."""
        return self.inputs(self.windows(indices, view))


class FolderImages(Windowed):
    """Pictures whose targets are the same wherever their objects lie, decoded when asked for."""

    decodes = True

    def __init__(
        self,
        files: Sequence[Picture],
        labels: Labels | None,
        preprocess: Preprocess,
        seed: int = 0,
        *,
        targets: Sequence[Any] | None = None,
        flips: bool = True,
    ) -> None:
        """Take pictures and (n,) labels, or other targets."""
        self._files, self._labels, self._targets = files, labels, targets
        self._preprocess, self._seed, self._flips = preprocess, seed, flips
        self.canvases = Canvases(self._files, preprocess)

    @property
    def labels(self) -> Labels | None:
        """(n,) class of each image; None where the targets are others."""
        return self._labels

    @property
    def labelled(self) -> bool:
        """Whether there are labels or other targets."""
        return self._labels is not None or self._targets is not None

    def __len__(self) -> int:
        return len(self._files)

    def windows(self, indices: Indices, view: int | None) -> Tensor:
        """Return the pictures, cut to the model's size; see `Windowed`."""
        rows = as_rows(indices)
        if view is None:
            return stacked_windows(map(self._middle, rows.tolist()), len(rows), self._preprocess)
        windows = (
            one_window(self._canvas(row, reduced=True), self._preprocess, words, self._flips)
            for row, words in zip(rows.tolist(), draws(self._seed, view, rows).T, strict=True)
        )
        return stacked_windows(windows, len(rows), self._preprocess)

    def targets(self, indices: Indices, view: int | None = None) -> list[Any]:
        """Return the targets, which are the same in every view."""
        rows = as_rows(indices).tolist()
        if self._labels is not None:
            return list(self._labels[rows].tolist())
        return [None if self._targets is None else self._targets[row] for row in rows]

    def name_of(self, row: int) -> str:
        """Return the file."""
        return str(self._files[row])

    def preprocessed(self, preprocess: Preprocess) -> FolderImages:
        """Return the same files for another model's input."""
        return FolderImages(self._files, self._labels, preprocess, self._seed, targets=self._targets, flips=self._flips)

    def flipping(self, flips: bool, pairs: Pairs = ()) -> FolderImages:
        """Return the same files, whose views are mirrored at random or not."""
        return FolderImages(self._files, self._labels, self._preprocess, self._seed, targets=self._targets, flips=flips)

    def _middle(self, row: int) -> Tensor:
        canvas, (_, height, width) = self._canvas(row, reduced=False), self._preprocess.input_size
        top, left = (canvas.shape[1] - height) // 2, (canvas.shape[2] - width) // 2
        return canvas[:, top : top + height, left : left + width]

    def _canvas(self, row: int, *, reduced: bool) -> Tensor:
        canvas = self.canvases.read(row, reduced=reduced)
        if self._preprocess.geometry != "letterbox":
            return canvas
        return cut(canvas, frame_of(self._preprocess, self.canvases.size(row)), self._preprocess.pad_value)
