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
    try:
        inputs = onnx.load(str(file), load_external_data=False).graph.input
    except Exception:  # protobuf's exception types differ by its implementation
        return None
    dimensions = inputs[0].type.tensor_type.shape.dim if inputs else ()
    return int(dimensions[0].dim_value) or None if dimensions else None


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
        file if takes or not _is_readable(file) else _written(file, wanted, folder / str(number))
        for number, (file, takes) in enumerate(zip(files, own, strict=True))
    ], wanted


def filled(images: NDArray[np.float32], batch: int) -> NDArray[np.float32]:
    """Return (batch, ...) images: the first of these, and again from the first one where they are too few."""
    chosen: NDArray[np.float32] = images[np.arange(batch) % len(images)]
    return chosen


def _is_readable(file: Path) -> bool:
    try:
        return bool(onnx.load(str(file), load_external_data=False).graph.input)
    except Exception:  # protobuf's exception types differ by its implementation
        return False


def _written(file: Path, batch: int, folder: Path) -> Path:
    proto = onnx.load(str(file))
    for value in proto.graph.input:
        _first_dimension(value).dim_value = batch
    for value in proto.graph.output:
        _first_dimension(value).Clear()  # the runtime finds it from the input
    del proto.graph.value_info[:]
    folder.mkdir(parents=True)
    path = folder / file.name
    path.write_bytes(proto.SerializeToString())
    return path


def _first_dimension(value: Any) -> Any:
    return value.type.tensor_type.shape.dim[0]
