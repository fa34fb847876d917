"""In: pictures and targets that lie in them. Out: preprocessed batches, and the targets moved along."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from hirelc_deploy.inputs.data.canvas import Canvases
from hirelc_deploy.inputs.data.geometry import Frame, Pairs, cut, frame_of, moved, scales, view_frame
from hirelc_deploy.inputs.data.images import Windowed
from hirelc_deploy.inputs.data.pictures import Picture
from hirelc_deploy.inputs.data.preprocess import Preprocess
from hirelc_deploy.inputs.data.views import Indices, as_rows, stacked_windows


class Stored(Protocol):
    """A target that is read when it is needed, such as a mask."""

    def read(self, size: tuple[int, int]) -> Any:
        """Return the target of a picture of this (height, width); raises InputError where it cannot be one."""


@dataclass(frozen=True)
class Sample:
    """A picture and what is true of it, in its own pixels; `Stored` where that is in a file."""

    picture: Picture
    truth: Any


class PlacedImages(Windowed):
    """Pictures with boxes, masks, maps or keypoints.

    Where a view reaches over the border of its picture there is nothing to see, and nothing true: pixels of the pad
    value, void and unknown. (Pictures with a class are reflected there.)
    """

    labels = None
    labelled = True
    decodes = True

    def __init__(
        self,
        samples: Sequence[Sample],
        kind: str,
        preprocess: Preprocess,
        seed: int = 0,
        flips: bool = True,
        pairs: Pairs = (),
    ) -> None:
        self._samples, self._kind = list(samples), kind
        self._preprocess, self._seed, self._flips, self._pairs = preprocess, seed, flips, tuple(pairs)
        self._canvases = Canvases([sample.picture for sample in self._samples], preprocess)

    @property
    def canvases(self) -> Canvases | None:
        """The decoded pictures; None where every view has a size of its own."""
        return None if scales(self._kind) else self._canvases

    def __len__(self) -> int:
        return len(self._samples)

    def windows(self, indices: Indices, view: int | None) -> Tensor:
        """Return the pictures, cut to the model's size; see `images.Windowed`."""
        rows = as_rows(indices).tolist()
        return stacked_windows((self._window(row, view) for row in rows), len(rows), self._preprocess)

    def targets(self, indices: Indices, view: int | None = None) -> list[Any]:
        """Return the targets as they lie in what `batch` or `views` return; see `targets.KINDS`."""
        found = []
        for row in as_rows(indices).tolist():
            size, truth = self._canvases.size(row), self._samples[row].truth
            if hasattr(truth, "read"):
                truth = truth.read(size)
            found.append(moved(self._kind, truth, self._frame(row, view), self._pairs))
        return found

    def name_of(self, row: int) -> str:
        """Return the file."""
        return str(self._samples[row].picture)

    def preprocessed(self, preprocess: Preprocess) -> PlacedImages:
        """Return the same pictures for another model's input."""
        return PlacedImages(self._samples, self._kind, preprocess, self._seed, self._flips, self._pairs)

    def flipping(self, flips: bool, pairs: Pairs = ()) -> PlacedImages:
        """Return the same pictures, whose views are mirrored at random or not; see `Images.flipping`."""
        return PlacedImages(self._samples, self._kind, self._preprocess, self._seed, flips, pairs)

    def _window(self, row: int, view: int | None) -> Tensor:
        if view is None or not scales(self._kind):
            canvas = self._canvases.read(row, reduced=view is not None)  # decoded first: then its size is known
            frame = self._frame(row, view)
        else:
            frame = self._frame(row, view)
            canvas = self._canvases.scaled(row, frame.canvas)
        return cut(canvas, frame, self._preprocess.pad_value)

    def _frame(self, row: int, view: int | None) -> Frame:
        size = self._canvases.size(row)
        if view is None:
            return frame_of(self._preprocess, size)
        return view_frame(self._preprocess, size, self._seed, view, row, self._flips, scales(self._kind))
