"""In: an .npz archive. Out: its images, and labels where it has them, in four splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.archives import memory_bytes, read_arrays
from hirelc_deploy.inputs.data.images import ArrayImages, Labels
from hirelc_deploy.inputs.data.splits import (
    NATIVE_SPLITS,
    Data,
    SplitSizes,
    array_data,
    check_types,
    data_of,
    identity,
    share_out,
)

# npz


def read_npz(file: Path, sizes: SplitSizes, seed: int) -> Data:
    """Read an archive with x_train, y_train, x_test, y_test, or with images alone (x, or x_train and x_test).

    Raises:
        InputError: It is anything else.
    """
    arrays = read_arrays(file, memory_bytes())
    if "x" in arrays and len(arrays) == 1:
        arrays = {"x_train": arrays["x"]}
    if arrays and all(name in ("x_train", "x_test") for name in arrays):
        return _unlabelled(file, arrays, sizes, seed)
    names = arrays.pop("classes", None)
    allowed = {f"{part}_{split}" for part in "xy" for split in NATIVE_SPLITS}
    if unknown := sorted(set(arrays) - allowed):
        raise InputError(f"{file}: unknown array {unknown[0]!r}; use {', '.join(sorted(allowed))} and classes.")
    splits = {}
    for split in NATIVE_SPLITS:
        if f"x_{split}" in arrays or f"y_{split}" in arrays:
            if missing := {f"x_{split}", f"y_{split}"} - set(arrays):
                raise InputError(f"{file}: array {missing.pop()} is missing.")
            splits[split] = _checked_arrays(arrays[f"x_{split}"], arrays[f"y_{split}"], f"{file}: x_{split}")
        elif split in ("train", "test"):
            raise InputError(f"{file}: arrays x_{split} and y_{split} are missing; it has {', '.join(sorted(arrays))}.")
    class_names = None if names is None else [str(name) for name in names.ravel().tolist()]
    return array_data(file.name, splits, class_names, sizes, seed)


def _unlabelled(file: Path, arrays: Mapping[str, NDArray[np.generic]], sizes: SplitSizes, seed: int) -> Data:
    """Return the splits of images of which nothing is known to be true."""
    lists = {name[2:]: _checked_pixels(pixels, f"{file}: {name}") for name, pixels in arrays.items()}
    if "train" not in lists:
        raise InputError(f"{file}: array x_train is missing; call images without labels x, or x_train and x_test.")
    shapes = {pixels.shape[1:] for pixels in lists.values()}
    if len(shapes) > 1:
        raise InputError(f"{file}: its images have shapes {' and '.join(map(str, shapes))}; give all the same.")
    check_types(lists, str(file))
    preprocess = identity(shapes.pop())
    shared = share_out({name: len(pixels) for name, pixels in lists.items()}, {}, sizes, str(file))
    splits = {
        split: ArrayImages(torch.from_numpy(lists[source]), None, rows, preprocess, seed)
        for split, (source, rows) in shared.items()
    }
    return data_of(file.name, (), splits, preprocess, "none", floats=lists["train"].dtype.kind == "f")


def _checked_arrays(
    pixels: NDArray[np.generic], labels: NDArray[np.generic], where: str
) -> tuple[NDArray[np.generic], Labels]:
    """Return (n, channels, height, width) uint8 or float32 pixels and (n,) int64 labels."""
    pixels = _checked_pixels(pixels, where)
    labels = labels.reshape(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise InputError(f"{where}: its labels are {labels.dtype} of shape {labels.shape}; give whole numbers (n,).")
    if len(labels) != len(pixels):
        raise InputError(f"{where} has {len(pixels)} images, but there are {len(labels)} labels.")
    return pixels, labels.astype(np.int64)


def _checked_pixels(pixels: NDArray[np.generic], where: str) -> NDArray[np.generic]:
    """Return (n, channels, height, width) uint8 or float32 pixels."""
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels  # grey
    if pixels.ndim != 4:
        raise InputError(f"{where} has shape {pixels.shape}; images are (n, height, width, channels).")
    if pixels.dtype.kind == "f":
        if not np.isfinite(pixels).all():
            bad = int(np.flatnonzero(~np.isfinite(pixels).all((1, 2, 3)))[0])
            raise InputError(f"{where}: image {bad} holds NaN or infinity.")
        pixels = pixels.astype(np.float32, copy=False)
    elif pixels.dtype != np.uint8:
        raise InputError(f"{where} has type {pixels.dtype}; give uint8 images, or float model inputs.")
    axis = _channel_axis(pixels.shape[1:])
    if axis is None:
        raise InputError(
            f"{where} has shape {pixels.shape}; images are (n, height, width, channels), with fewer channels than rows."
        )
    return np.ascontiguousarray(np.moveaxis(pixels, axis + 1, 1))


def _channel_axis(shape: Sequence[int]) -> int | None:
    """Return which axis of an image has the channels: one of 1 or 3, else the shortest; the last comes first."""
    usual = [axis for axis in (2, 0) if shape[axis] in (1, 3)]
    fewest = [axis for axis in (2, 0) if shape[axis] < min(shape[1], shape[2 - axis])]
    return next(iter((*usual, *fewest)), None)
