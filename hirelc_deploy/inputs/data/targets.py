"""In: what a data set says of an image. Out: the same in the project's form and in the picture's pixels, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from hirelc_deploy.errors import InputError

KINDS = ("classes", "multilabel", "numbers", "map", "masks", "boxes", "keypoints", "none")
"""What is true of an image, from which the task follows.

`classes`: a class number (int). `multilabel`: (classes,) float32 of 0 and 1. `numbers`: (k,) float32. `map`: (h, w) or
(k, h, w) float32, NaN where unknown. `masks`: (h, w) int64 class numbers, 255 where void. `boxes`: a dict of `boxes`
(k, 4) float32 corners x0, y0, x1, y1, `labels` (k,) int64 from 0 and `crowd` (k,) bool. `keypoints`: (k, 3) float32
x, y, visible, or (k, 4) with the size of what is seen. `none`: nothing. All pixels are those of the model's input.
"""

PLACED = ("map", "masks", "boxes", "keypoints")
"""Kinds that move with the picture."""

VOID = 255
"""Number of pixels of a mask that count nowhere."""


WHAT_COUNTS = {
    "boxes": "a box that counts (crowds and difficult ones do not)",
    "masks": "a pixel that is not void",
    "map": "a value that is not NaN",
    "numbers": "a value that is not NaN",
    "keypoints": "a visible point",
    "multilabel": "a true label",
}
"""Kind to what at least one image must have, or there is nothing to judge by."""


class Boxes(NamedTuple):
    """Boxes of one picture: (k, 4) corners x0, y0, x1, y1, in its pixels or in shares of its sides."""

    corners: NDArray[np.float64]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    in_shares: bool = False


def counts(kind: str, target: Any) -> bool:
    """Return whether a target of the model's input has anything to judge by; see `WHAT_COUNTS`."""
    if kind == "boxes":
        return bool((~target["crowd"]).any())
    if kind == "keypoints":
        return bool((target[:, 2] > 0).any())
    found = target != VOID if kind == "masks" else target == 1 if kind == "multilabel" else ~target.isnan()
    return bool(found.any())


def checked_boxes(
    corners: ArrayLike,
    labels: ArrayLike,
    where: str,
    size: tuple[int, int] | None,
    *,
    crowd: ArrayLike | None = None,
    classes: int | None = None,
    names: Sequence[str] = (),
) -> Boxes:
    """Return boxes within their picture; those without area are left out (COCO has such).

    A box may reach over the border by a pixel or by a hundredth of the side, as rounding makes them.

    Args:
        corners: (k, 4) x0, y0, x1, y1.
        where: Of what the boxes were read from, for errors.
        size: (height, width) of the picture; None where the corners are shares of it.
        crowd: (k,) whether a box is around many objects, and neither found nor missed counts.
        classes: Number of classes, where it is known.
        names: What to call each box in errors, such as `annotation 17`; else by its number from 0.
    """
    found = np.asarray(corners, np.float64).reshape(-1, 4)
    numbers = np.asarray(labels).reshape(-1)
    crowds = np.zeros(len(found), bool) if crowd is None else np.asarray(crowd, bool).reshape(-1)

    def called(wrong: NDArray[np.bool_]) -> str:
        index = int(np.flatnonzero(wrong)[0])
        return f"{where}, {names[index] if names else f'box {index}'}"

    if len(numbers) != len(found) or len(crowds) != len(found):
        raise InputError(f"{where}: {len(found)} boxes have {len(numbers)} labels; give a class number for each.")
    if len(numbers) and numbers.dtype.kind not in "iub":
        raise InputError(f"{where}: the labels of boxes are {numbers.dtype}; give whole numbers from 0.")
    wrong: NDArray[np.bool_] = np.any(~np.isfinite(found), axis=1)
    if wrong.any():
        raise InputError(f"{called(wrong)}: {_shown(found[wrong][0])} holds NaN or infinity; give four numbers.")
    wrong = np.any(found[:, 2:] < found[:, :2], axis=1)
    if wrong.any():
        raise InputError(f"{called(wrong)}: {_shown(found[wrong][0])} ends before it begins; give x0 < x1 and y0 < y1.")
    wrong = (numbers < 0) | (numbers >= classes) if classes is not None else numbers < 0
    if wrong.any():
        last = (
            f"the classes are 0 to {classes - 1}; name all classes" if classes is not None else "classes count from 0"
        )
        raise InputError(f"{called(wrong)}: class number {numbers[wrong][0]}, but {last}, or correct the number.")
    sides = np.array([1.0, 1.0] if size is None else [size[1], size[0]])
    slack = 0.01 * sides if size is None else np.maximum(1.0, 0.01 * sides)
    outside = ((found.reshape(-1, 2, 2) < -slack) | (found.reshape(-1, 2, 2) > sides + slack)).any((1, 2))
    if outside.any():
        limits = "shares of the sides must lie in 0 to 1" if size is None else f"the picture is {size[1]} x {size[0]}"
        raise InputError(
            f"{called(outside)}: {_shown(found[outside][0])} lies outside the picture ({limits}); correct it."
        )
    clipped = found.reshape(-1, 2, 2).clip(0, sides)
    kept = (clipped[:, 1] > clipped[:, 0]).all(1)
    return Boxes(clipped.reshape(-1, 4)[kept], numbers[kept].astype(np.int64), crowds[kept], size is None)


def checked_points(points: ArrayLike, where: str, size: tuple[int, int] | None = None) -> Tensor:
    """Return (k, 3) float32 x, y, visible; raises InputError for points that are not finite or outside the picture."""
    found = np.array(points, np.float32)
    if found.ndim != 2 or found.shape[1] != 3:
        raise InputError(f"{where}: keypoints of shape {found.shape}; give (points, 3): x, y, visible.")
    seen = found[:, 2] > 0
    if not np.isfinite(found[seen]).all() or np.isnan(found[:, 2]).any():
        raise InputError(f"{where}: a visible keypoint holds NaN or infinity; mark points that are not known with 0.")
    found = np.where(seen[:, None], np.c_[found[:, :2], seen], 0).astype(np.float32)
    if size is not None:
        sides = np.array([size[1], size[0]], np.float32)
        slack = np.maximum(1.0, 0.01 * sides)
        outside = seen & ((found[:, :2] < -slack) | (found[:, :2] > sides + slack)).any(1)
        if outside.any():
            index = int(np.flatnonzero(outside)[0])
            raise InputError(
                f"{where}: keypoint {index} at {_shown(found[index, :2])} lies outside the picture "
                f"({size[1]} x {size[0]}); correct it, or mark it with 0."
            )
        found[:, :2] = np.where(seen[:, None], found[:, :2].clip(0, sides - 1), 0)
    return torch.from_numpy(found)


def checked_mask(values: NDArray[Any], where: str, size: tuple[int, int] | None, classes: int | None = None) -> Tensor:
    """Return the (h, w) class numbers as int64, 255 where void; raises InputError for what is no mask."""
    if values.ndim == 3:
        values = values[0] if values.shape[0] == 1 else values[..., 0] if values.shape[2] == 1 else values
    if values.ndim != 2 or values.dtype.kind not in "iub":
        raise InputError(
            f"{where}: a mask of {values.dtype} and shape {values.shape}; give (height, width) whole class numbers."
        )
    _same_size(values.shape, where, size)
    numbers = values.astype(np.int64)
    counted = numbers[numbers != VOID]
    limit = VOID if classes is None else classes
    if counted.size and not 0 <= counted.min() <= counted.max() < limit:
        wrong = counted.min() if counted.min() < 0 else counted.max()
        raise InputError(
            f"{where}: the mask holds the number {wrong}, but classes are 0 to {limit - 1} and {VOID} is void; "
            f"name all classes, or say which number is void."
        )
    return torch.from_numpy(numbers)


def checked_map(values: NDArray[Any], where: str, size: tuple[int, int] | None) -> Tensor:
    """Return the (h, w) or (k, h, w) map as float32; NaN is what is not known, infinity is refused."""
    if values.ndim not in (2, 3) or values.dtype.kind not in "fiu":
        raise InputError(
            f"{where}: a map of {values.dtype} and shape {values.shape}; give (h, w) or (k, h, w) numbers."
        )
    _same_size(values.shape[-2:], where, size)
    if np.isinf(values).any():
        raise InputError(f"{where}: the map holds infinity; write NaN where nothing is known.")
    return torch.from_numpy(values.astype(np.float32))


def checked_numbers(values: ArrayLike, where: str) -> Tensor:
    """Return (k,) float32; NaN is what is not known, infinity is refused."""
    found = np.atleast_1d(np.asarray(values, np.float32))
    if found.ndim != 1 or not len(found) or np.isinf(found).any():
        raise InputError(f"{where}: {found.tolist()!r:.60} are not (k,) finite numbers; correct them.")
    return torch.from_numpy(found.copy())


# Targets of somebody's Python data set


def kind_of(targets: Sequence[Any], where: str) -> str:
    """Return the kind of a few first targets of a data set; see `KINDS`.

    Numbers 0 and 1, two or more in each, are `multilabel`; other rows of numbers are `numbers`. An array of three
    columns is `keypoints`, other whole numbers of two dimensions are `masks`, and floats are a `map`.
    """
    first = targets[0]
    if first is None:
        return "none"
    if isinstance(first, Mapping):
        for key, kind in (("boxes", "boxes"), ("keypoints", "keypoints"), ("points", "keypoints")):
            if key in first:
                return kind
        raise InputError(
            f"{where}: a target has {', '.join(map(str, first))}; give boxes and labels, or points, or a collate_fn."
        )
    if isinstance(first, Image.Image):
        return "masks"
    arrays = [_array(target, where) for target in targets]
    shape, floats = arrays[0].shape, arrays[0].dtype.kind == "f"
    if len(shape) > 3:
        raise InputError(f"{where}: a target of shape {shape} is of no known kind; give one of {', '.join(KINDS)}.")
    if len(shape) < 2:
        rows = bool(shape) and all(len(array) > 1 and np.isin(array, (0, 1)).all() for array in arrays)
        return "multilabel" if rows else "numbers" if floats or shape else "classes"
    if len(shape) == 2 and shape[1] == 3:
        return "keypoints"
    return "map" if floats else "masks"


def truth_of(kind: str, target: Any, where: str, size: tuple[int, int] | None, classes: int | None) -> Any:
    """Return a target of somebody's data set in the project's form, in the pixels of its own picture.

    Args:
        size: (height, width) of the picture; None where a mask may be of another size.
        classes: Number of classes where it is known.
    """
    if kind in ("none", "boxes"):
        return None if kind == "none" else _boxes(target, where, size, classes)
    if kind == "keypoints" and isinstance(target, Mapping):
        points = _array(target.get("points", target.get("keypoints")), where)
        return _scaled(checked_points(points, where, size), target.get("scale"), where)
    array = _array(target, where)
    placed: dict[str, Callable[[], Tensor]] = {
        "keypoints": lambda: checked_points(array, where, size),
        "masks": lambda: checked_mask(array, where, size, classes),
        "map": lambda: checked_map(array, where, size),
    }
    if kind in placed:
        return placed[kind]()
    if kind == "classes":
        if array.size != 1 or array.dtype.kind not in "iub":
            raise InputError(
                f"{where}: the target {array.tolist()!r:.40} is no class number; give a whole number from 0."
            )
        number = int(array.reshape(-1)[0])
        if number < 0 or (classes is not None and number >= classes):
            last = f"0 to {classes - 1}" if classes is not None else "from 0"
            raise InputError(f"{where}: class number {number}, but the classes are {last}; name all, or correct it.")
        return number
    if kind == "multilabel" and classes is not None and array.shape != (classes,):
        raise InputError(f"{where}: a target of shape {array.shape} for {classes} classes; give a 0 or 1 for each.")
    if kind == "multilabel" and not (np.isin(array, (0, 1)) | np.isnan(array)).all():
        raise InputError(
            f"{where}: the labels {array.tolist()!r:.60} are not all 0, 1 or NaN (not known); correct them."
        )
    return checked_numbers(array, where)


def _scaled(points: Tensor, scale: Any, where: str) -> Tensor:
    """Return (k, 4) points with the size of what is seen, in pixels; (k, 3) where it is not known."""
    if scale is None:
        return points
    size = _array(scale, where)
    if size.size != 1 or not 0 < size.item() < np.inf:
        raise InputError(f"{where}: the scale of keypoints is {size.tolist()!r:.40}; give a number of pixels above 0.")
    return torch.cat([points, torch.full_like(points[:, :1], size.item())], 1)


def _boxes(target: Any, where: str, size: tuple[int, int] | None, classes: int | None) -> Boxes:
    if not isinstance(target, Mapping) or not {"boxes", "labels"} <= target.keys():
        raise InputError(f"{where}: a target without boxes and labels; give a dict of boxes (k, 4) and labels (k,).")
    corners = _array(target["boxes"], where).astype(np.float64)
    if corners.size == 0:
        corners = np.zeros((0, 4))
    if corners.ndim != 2 or corners.shape[1] != 4:
        raise InputError(f"{where}: boxes of shape {corners.shape}; give (k, 4): x0, y0, x1, y1.")
    form = str(getattr(getattr(target["boxes"], "format", None), "value", "XYXY"))  # of torchvision's BoundingBoxes
    if form == "CXCYWH":
        corners[:, :2] -= corners[:, 2:] / 2
    if form in ("CXCYWH", "XYWH"):
        corners[:, 2:] += corners[:, :2]
    elif form != "XYXY":
        raise InputError(f"{where}: boxes of the form {form}; give corners x0, y0, x1, y1.")
    labels = _array(target["labels"], where)
    crowd = target.get("crowd", target.get("iscrowd"))
    crowd = None if crowd is None else _array(crowd, where)
    labels = labels if labels.size else np.zeros(0, np.int64)
    return checked_boxes(corners, labels, where, size, crowd=crowd, classes=classes)


def _array(value: Any, where: str) -> NDArray[Any]:
    try:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: the target cannot be an array ({error}); give numbers, or a collate_fn.") from None
    if array.dtype.kind not in "biuf":
        raise InputError(
            f"{where}: the target is a {type(value).__name__}, not numbers; give numbers, or a collate_fn."
        )
    return array


def _same_size(found: Sequence[int], where: str, size: tuple[int, int] | None) -> None:
    if size is not None and tuple(found) != tuple(size):
        raise InputError(
            f"{where}: {found[1]} x {found[0]} pixels, but its picture has {size[1]} x {size[0]}; make both one size."
        )


def _shown(values: NDArray[Any]) -> str:
    return f"({', '.join(f'{value:g}' for value in values)})"
