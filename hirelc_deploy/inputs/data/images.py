"""In: stored pixels. Out: preprocessed batches of them, as they are or as repeatable augmented views."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.pictures import read_image
from hirelc_deploy.inputs.data.preprocess import INTERPOLATIONS, Preprocess
from hirelc_deploy.inputs.data.views import Indices, as_rows, normalised, random_window

Labels = NDArray[np.int64]
"""(n,) class numbers from 0."""
FOLDER_CACHE_BYTES = 512 * 2**20  # decoded images that a folder keeps in memory: 3,500 of 224 x 224 after timm's resize


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
        return normalised(canvas[:, :, top : top + height, left : left + width], self._preprocess)

    def views(self, indices: Indices, view: int) -> Tensor:
        """Return randomly cropped and flipped images; see `Images.views`."""
        rows = as_rows(indices)
        return normalised(random_window(self._canvas(rows), self._preprocess, self._seed, view, rows), self._preprocess)

    def preprocessed(self, preprocess: Preprocess) -> ArrayImages:
        """Return the same images for another model's input."""
        return ArrayImages(self._pixels, self._all_labels, self._rows.numpy(), preprocess, self._seed)

    def _canvas(self, indices: Indices) -> Tensor:
        pixels = self._pixels[self._rows[as_rows(indices)]]
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
        for row in as_rows(indices).tolist():
            canvas = self._canvas(row)
            top, left = (canvas.shape[1] - height) // 2, (canvas.shape[2] - width) // 2
            crops.append(canvas[:, top : top + height, left : left + width])
        return normalised(torch.stack(crops), self._preprocess)

    def views(self, indices: Indices, view: int) -> Tensor:
        """Return randomly cropped and flipped images; see `Images.views`."""
        rows = as_rows(indices)
        crops = [
            random_window(self._canvas(int(row))[None], self._preprocess, self._seed, view, row[None])[0]
            for row in rows
        ]
        return normalised(torch.stack(crops), self._preprocess)

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
