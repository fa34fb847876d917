"""In: pictures and how a model wants them. Out: them resized, kept while they fit into memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hirelc_deploy.inputs.data.pictures import Picture, read_image, stated_size
from hirelc_deploy.inputs.data.preprocess import INTERPOLATIONS, Preprocess

FOLDER_CACHE_BYTES = 512 * 2**20  # decoded images that a folder keeps in memory: 3,500 of 224 x 224 after timm's resize


class Canvases:
    """Pictures of a split, decoded and resized when asked for; neither cropped nor padded."""

    def __init__(self, pictures: Sequence[Picture], preprocess: Preprocess) -> None:
        self._pictures, self._preprocess = list(pictures), preprocess
        self._kept: dict[int, Tensor] = {}
        self._kept_bytes = 0
        self._sizes: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, row: int) -> Tensor:
        """Return (channels, height, width) uint8 pixels; raises InputError for a picture that cannot be read."""
        kept = self._kept.get(row)
        if kept is not None:
            return kept
        image = read_image(self._pictures[row], channels=self._preprocess.input_size[0])
        self._sizes[row] = image.height, image.width
        pixels = resized(image, self._preprocess)
        if self._kept_bytes + pixels.nbytes <= FOLDER_CACHE_BYTES:
            self._kept[row] = pixels
            self._kept_bytes += pixels.nbytes
        return pixels

    def scaled(self, row: int, canvas: tuple[int, int]) -> Tensor:
        """Return a picture resized to another (height, width); it is decoded anew and not kept."""
        return resized(
            read_image(self._pictures[row], channels=self._preprocess.input_size[0]), self._preprocess, canvas
        )

    def size(self, row: int) -> tuple[int, int]:
        """Return (height, width) of the picture itself."""
        if row not in self._sizes:
            self._sizes[row] = stated_size(self._pictures[row])
        return self._sizes[row]


def resized(image: Image.Image, preprocess: Preprocess, canvas: tuple[int, int] | None = None) -> Tensor:
    """Return (channels, height, width) uint8 pixels of the canvas, or of one of another size, resized by Pillow."""
    height, width = canvas or preprocess.canvas_size(image.height, image.width)
    if (image.height, image.width) != (height, width):
        image = image.resize((width, height), INTERPOLATIONS[preprocess.interpolation])
    return torch.from_numpy(np.array(image, np.uint8).reshape(height, width, -1).transpose(2, 0, 1).copy())
