"""In: pictures and how a model wants them. Out: them resized, kept while they fit into memory."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import get_worker_info

from hirelc_deploy.inputs.data.pictures import Picture, read_image, read_reduced, stated_size
from hirelc_deploy.inputs.data.preprocess import INTERPOLATIONS, Preprocess

KEPT_BYTES = 512 * 2**20
"""Of decoded pictures that this process keeps, of all splits together: 3,500 of 224 x 224 after timm's resize."""
BY_TORCH = ("bilinear", "bicubic")
"""Interpolations that torch has with antialiasing."""
LOOKED_AT = 16  # pictures by whose sizes it is told whether all of them fit


class Canvases:
    """Pictures of a split, decoded and resized when asked for; neither cropped nor padded.

    Where a view is wanted, torch resizes, in a quarter of Pillow's time, and a large JPEG file may be decoded at a
    reduced size, which moves pixels by 0.2 to 0.4 of 255 levels on average (24 pictures of ImageNet at 32 and 48
    pixels). What is judged is decoded whole and resized by Pillow, as the bundle's run.py does.
    """

    def __init__(self, pictures: Sequence[Picture], preprocess: Preprocess) -> None:
        self._pictures, self._preprocess = pictures, preprocess
        self._kept: dict[tuple[int, bool], Tensor] = {}
        self._kept_bytes = 0
        _all.add(self)
        self._sizes = np.zeros((len(self._pictures), 2), np.int32)

    def __len__(self) -> int:
        return len(self._pictures)

    def read(self, row: int, *, reduced: bool = False) -> Tensor:
        """Return (channels, height, width) uint8 pixels; raises InputError for a picture that cannot be read.

        Args:
            reduced: For a view: a large JPEG file may be decoded at a reduced size.
        """
        kept = self._kept.get((row, reduced))
        if kept is not None:
            return kept
        pixels = self._reduced(row) if reduced else self._whole(row)
        if get_worker_info() is None:  # a process that loads for another one ends with all that it keeps
            self.keep(row, pixels, reduced=reduced)
        return pixels

    def keep(self, row: int, pixels: Tensor, *, reduced: bool) -> None:
        """Keep what `read` returned, if there is room."""
        if pixels.nbytes > _room():
            return
        self._kept_bytes += pixels.nbytes
        self._kept[row, reduced] = pixels
        if self._preprocess.canvas_size(*self.size(row)) == self.size(row):  # nothing to resize: both are the same
            self._kept[row, not reduced] = pixels

    def keeps(self, rows: Iterable[int], *, reduced: bool) -> bool:
        """Return whether all these pictures are in memory."""
        return all((row, reduced) in self._kept for row in rows)

    def unread(self, *, reduced: bool) -> list[int]:
        """Return the rows that are not kept yet; none where all pictures together would not fit."""
        missing = [row for row in range(len(self)) if (row, reduced) not in self._kept]
        looked = missing[:: max(1, len(missing) // LOOKED_AT)]
        areas = [height * width for height, width in (self._preprocess.canvas_size(*self.size(row)) for row in looked)]
        mean_bytes = self._preprocess.input_size[0] * sum(areas) / max(1, len(areas))
        return missing if len(missing) * mean_bytes <= _room() else []

    def forget(self) -> None:
        """Keep nothing of what was kept: others need the room more."""
        self._kept, self._kept_bytes = {}, 0

    def scaled(self, row: int, canvas: tuple[int, int]) -> Tensor:
        """Return a view's picture resized to another (height, width); it is decoded anew and not kept."""
        return self._reduced(row, canvas)

    def size(self, row: int) -> tuple[int, int]:
        """Return (height, width) of the picture itself."""
        if not self._sizes[row, 0]:
            self._sizes[row] = stated_size(self._pictures[row])
        height, width = self._sizes[row].tolist()
        return height, width

    def _whole(self, row: int) -> Tensor:
        image = read_image(self._pictures[row], self._preprocess.input_size[0])
        self._sizes[row] = image.height, image.width
        return resized(image, self._preprocess)

    def _reduced(self, row: int, canvas: tuple[int, int] | None = None) -> Tensor:
        def wanted(height: int, width: int) -> tuple[int, int]:
            return canvas or self._preprocess.canvas_size(height, width)

        image, size = read_reduced(self._pictures[row], wanted, self._preprocess.input_size[0])
        self._sizes[row] = size
        return resized(image, self._preprocess, wanted(*size), size, exact=False)


_all: weakref.WeakSet[Canvases] = weakref.WeakSet()


def _room() -> int:
    """Return the bytes of pictures that may still be kept."""
    return KEPT_BYTES - sum(canvases._kept_bytes for canvases in _all)


def resized(
    image: Image.Image | np.ndarray,
    preprocess: Preprocess,
    canvas: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
    *,
    exact: bool = True,
) -> Tensor:
    """Return (channels, height, width) uint8 pixels of the canvas, or of one of another size.

    Args:
        image: A picture, or its (height, width[, channels]) uint8 pixels.
        size: (height, width) of the picture itself, where it was decoded at a reduced size: its last row and column may
            then stand for less than a whole pixel.
        exact: As Pillow resizes. Else torch does where it can: of 20 pictures of ImageNet 0.5 % of the values or fewer
            were others, by 2 of 255 levels at most.
    """
    given = image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)
    height, width = canvas or preprocess.canvas_size(*given)
    ratio = 1.0 if size is None else max(size[0] / given[0], size[1] / given[1])
    reduction = 2 ** math.ceil(math.log2(ratio))  # 1, 2, 4 or 8; what is left of a side is rounded up
    box = None if size is None or reduction == 1 else (0.0, 0.0, size[1] / reduction, size[0] / reduction)
    mode = preprocess.interpolation
    if given != (height, width):
        if not exact and box is None and mode in BY_TORCH:
            pixels = _as_tensor(image)[None]
            return functional.interpolate(pixels, (height, width), mode=mode, antialias=True)[0]
        picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        image = picture.resize((width, height), INTERPOLATIONS[mode], box)
    return _as_tensor(image).contiguous()


def _as_tensor(image: Image.Image | np.ndarray) -> Tensor:
    """Return (channels, height, width) pixels that may be written to; their channels lie side by side."""
    pixels = np.require(image, np.uint8, "W")
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)
