"""In: files, pictures and a batch. Out: files that take exactly so many images, and as many pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from hirelc_deploy.errors import InputError


def fixed_batch(file: Path) -> int | None:
    """Return how many images an ONNX file takes at a time.

    None where it takes any number, and where it cannot be read: what runs it says why.
    """
    dimensions = _input_dimensions(file)
    size = int(dimensions[0].dim_value) if dimensions else 0
    return size if size > 0 else None


def at_batch(files: Sequence[Path], batch: int | None, folder: Path) -> tuple[list[Path], int]:
    """Return the files at one batch, in their order, and how many images that is.

    Args:
        batch: None for what the files take; 1 where all of them take any number.
        folder: Receives the files that take any number, written for this one.

    Raises:
        InputError: A file takes another number: its times would not compare.
    """
    own = [fixed_batch(file) for file in files]
    wanted = batch or next(filter(None, own), 1)
    for file, takes in zip(files, own, strict=True):
        if takes not in (None, wanted):
            raise InputError(
                f"{file}: takes {takes} images at a time, not {wanted}; times of different batches do not compare. "
                "Give files of one batch, or of any."
            )
    if wanted == 1:  # of a file of any batch one image is what every runtime takes
        return list(files), 1
    return [
        file if takes or not _input_dimensions(file) else _written(file, wanted, folder / str(number))
        for number, (file, takes) in enumerate(zip(files, own, strict=True))
    ], wanted


def filled(images: NDArray[np.float32], batch: int) -> NDArray[np.float32]:
    """Return (batch, ...) images: the first of these, and again from the first one where they are too few."""
    chosen: NDArray[np.float32] = images[np.arange(batch) % len(images)]
    return chosen


def _input_dimensions(file: Path) -> Sequence[Any]:
    """Return the dimensions of a file's first input; none where it has none or cannot be read."""
    try:
        inputs = onnx.load(str(file), load_external_data=False).graph.input
    except Exception:  # protobuf's exception types differ by its implementation
        return ()
    dimensions: Sequence[Any] = inputs[0].type.tensor_type.shape.dim if inputs else ()
    return dimensions


def _written(file: Path, batch: int, folder: Path) -> Path:
    proto = onnx.load(str(file))
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")  # the runtime finds it from the input
    del proto.graph.value_info[:]
    folder.mkdir(parents=True)
    path = folder / file.name
    path.write_bytes(proto.SerializeToString())
    return path
