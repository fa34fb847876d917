"""In: tensors that belong to images under views. Out: the same again, from a file, while there is room for them.

A file, because they grow with the images: what a teacher answers to 1.28 million pictures of 1,000 classes are 5 GB a
view. Reading an answer back takes microseconds, asking again milliseconds. All is kept to the bit, so whether it was
kept changes no result; halves or the best classes alone would. The file has no name: a killed process leaves nothing.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SHARE_OF_DISK = 0.5
"""Of what is free in the folder when the first rows come; others need some too."""


class RowFile:
    """float32 tensors of so many images, each under any number of views.

    A view is kept whole or not at all: the first ones that come, as far as the room goes.
    """

    def __init__(self, images: int, folder: Path | None = None) -> None:
        """Args: `folder` holds the file; None is where temporary files are."""
        self._images, self._folder = images, folder
        self._shapes: dict[str, torch.Size] = {}
        self._known: dict[int, NDArray[np.bool_]] = {}
        self._views = 0
        self._file: IO[bytes] | None = None

    def knows(self, rows: NDArray[np.int64], view: int) -> bool:
        """Return whether all of these rows are kept."""
        return view in self._known and bool(self._known[view][rows].all())

    def get(self, rows: NDArray[np.int64], view: int) -> dict[str, Tensor] | None:
        """Return the tensors of the images at these rows, by name; None where one of them is not kept."""
        if self._file is None or not self.knows(rows, view):
            return None
        values = torch.empty(len(rows), self._row_bytes // 4)
        for place, row in zip(self._places(rows, view), values.numpy(), strict=True):
            os.preadv(self._file.fileno(), [row.data], place)
        parts = values.split([shape.numel() for shape in self._shapes.values()], 1)
        found = zip(self._shapes.items(), parts, strict=True)
        return {name: part.reshape(len(rows), *shape) for (name, shape), part in found}

    def keep(self, rows: NDArray[np.int64], view: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep (n, ...) float32 tensors of the images at these rows, if there is room."""
        shapes = {name: values.shape[1:] for name, values in tensors.items()}
        if self._file is None:
            self._begin(shapes)
        if self._file is None or shapes != self._shapes:  # as where an answer's size depends on the image
            return
        if view not in self._known:
            if len(self._known) == self._views:
                return
            self._known[view] = np.zeros(self._images, np.bool_)
        columns = [tensors[name].detach().cpu().reshape(len(rows), shape.numel()) for name, shape in shapes.items()]
        try:
            for place, *row in zip(self._places(rows, view), *(column.numpy() for column in columns), strict=True):
                os.pwritev(self._file.fileno(), [part.data for part in row], place)
        except OSError:  # others have filled the disk meanwhile
            self._views = len(self._known)
            return
        self._known[view][rows] = True

    def _begin(self, shapes: dict[str, torch.Size]) -> None:
        self._shapes = shapes
        try:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  # open for as long as rows are kept
            free = shutil.disk_usage(self._folder or tempfile.gettempdir()).free
        except OSError:
            return
        self._views = int(SHARE_OF_DISK * free / max(1, self._images * self._row_bytes))

    @property
    def _row_bytes(self) -> int:
        return 4 * sum(math.prod(shape) for shape in self._shapes.values())

    def _places(self, rows: NDArray[np.int64], view: int) -> list[int]:
        first = list(self._known).index(view) * self._images
        return [(first + row) * self._row_bytes for row in rows.tolist()]
