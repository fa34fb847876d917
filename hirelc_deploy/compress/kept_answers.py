"""In: a model's answers to images under views. Out: the same answers again, from a file, while there is room for them.

A file, because answers grow with the images: 1.28 million pictures of 1,000 classes are 5 GB a view. Reading one back
takes microseconds, asking the model again milliseconds. They are kept to the bit, so whether they were kept changes no
training; halves or the best classes alone would. The file has no name, so a killed process leaves nothing.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hirelc_deploy.graph.answers import Answers

SHARE_OF_DISK = 0.5
"""Of what is free in the folder when the first answers come; others need some too."""


class KeptAnswers:
    """Answers to so many images, each under any number of views.

    A view is kept whole or not at all: the first ones that are asked for, as far as the room goes.
    """

    def __init__(self, images: int, folder: Path | None = None) -> None:
        """Args: `folder` holds the file; None is where temporary files are."""
        self._images, self._folder = images, folder
        self._shapes: dict[str, torch.Size] = {}
        self._known: dict[int, NDArray[np.bool_]] = {}
        self._views = 0
        self._file: IO[bytes] | None = None

    def get(self, rows: NDArray[np.int64], view: int) -> Answers | None:
        """Return the float32 answers to the images at these rows; None where one of them is not kept."""
        known = self._known.get(view)
        if known is None or self._file is None or not known[rows].all():
            return None
        file, size = self._file.fileno(), self._row_bytes
        read = b"".join(os.pread(file, size, place) for place in self._places(rows, view))
        values = torch.frombuffer(bytearray(read), dtype=torch.float32).view(len(rows), -1)
        parts = values.split([shape.numel() for shape in self._shapes.values()], 1)
        return {name: part.reshape(-1, *self._shapes[name]) for name, part in zip(self._shapes, parts, strict=True)}

    def keep(self, rows: NDArray[np.int64], view: int, answers: Answers) -> None:
        """Keep float32 answers to the images at these rows, if there is room."""
        shapes = {name: values.shape[1:] for name, values in answers.items()}
        if self._file is None:
            self._begin(shapes)
        if self._file is None or shapes != self._shapes:  # as where the answer's size depends on the image
            return
        if view not in self._known:
            if len(self._known) == self._views:
                return
            self._known[view] = np.zeros(self._images, np.bool_)
        values = torch.cat([_flat(values) for values in answers.values()], 1).numpy()
        try:
            for place, row in zip(self._places(rows, view), values, strict=True):
                os.pwrite(self._file.fileno(), row.tobytes(), place)
        except OSError:  # others have filled the disk meanwhile
            self._views = len(self._known)
            return
        self._known[view][rows] = True

    def _begin(self, shapes: dict[str, torch.Size]) -> None:
        self._shapes = shapes
        try:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  # open for as long as answers are kept
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


def _flat(values: Tensor) -> Tensor:
    return values.detach().cpu().float().reshape(len(values), -1)
