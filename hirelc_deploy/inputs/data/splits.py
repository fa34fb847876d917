"""In: what the user wrote behind --data. Out: four disjoint splits of it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.images import ArrayImages, Images, Labels
from hirelc_deploy.inputs.data.preprocess import Preprocess

MINIMUM_CALIBRATION = 8  # fewer images give ranges of single pictures, not of the data
HELD_OUT = 0.1  # of the training images, from their end; CIFAR-10: the last 5,000, which the usual recipes leave out
NATIVE_SPLITS = ("train", "calibration", "selection", "test")


class _Seal:
    """Remembers, for all views of one data set, that the test images were handed out."""

    broken = False


@dataclass(frozen=True)
class Data:
    """Four disjoint splits of one data set.

    Attributes:
        name: Short name for reports.
        classes: Class names; their number is that of the model's outputs. Empty without labels.
        train: For recovery and importance.
        calibration: For activation ranges.
        selection: For choosing between candidates.
        labelled: False for random inputs, for which no accuracy is claimed.
        test_count: Number of test images.
    """

    name: str
    classes: tuple[str, ...]
    train: Images
    calibration: Images
    selection: Images
    preprocess: Preprocess
    labelled: bool
    test_count: int
    _test: Images
    _seal: _Seal = dataclasses.field(default_factory=_Seal)

    def take_test(self) -> Images:
        """Return the test images. They can be had once, for the final report; a second call is a bug."""
        if self._seal.broken:
            raise RuntimeError("the test split was handed out before: nothing may be chosen by it.")
        self._seal.broken = True
        return self._test

    def fingerprint(self) -> str:
        """Return a hash of the labels of what a search may see, and of the first images of each split."""
        digest = hashlib.sha256()
        for split in (self.train, self.calibration, self.selection):
            if split.labels is not None:
                digest.update(np.ascontiguousarray(split.labels, "<i8").tobytes())
            digest.update(split.batch(np.arange(min(8, len(split)))).numpy().tobytes())
        return digest.hexdigest()[:16]

    def preprocessed(self, preprocess: Preprocess) -> Data:
        """Return the same splits for another model's input; pixels and the seal of the test split are shared."""
        return dataclasses.replace(
            self,
            train=self.train.preprocessed(preprocess),
            calibration=self.calibration.preprocessed(preprocess),
            selection=self.selection.preprocessed(preprocess),
            preprocess=preprocess,
            _test=self._test.preprocessed(preprocess),
        )


@dataclass(frozen=True)
class SplitSizes:
    """How many training images are set aside; None takes 256 for calibration and up to 2,000 for selection."""

    calibration: int | None = None
    selection: int | None = None

    def __post_init__(self) -> None:
        if self.calibration is not None and self.calibration < MINIMUM_CALIBRATION:
            raise InputError(
                f"--calibration-images {self.calibration}: ranges taken from so few images do not hold for others; "
                f"give at least {MINIMUM_CALIBRATION} (256 is usual)."
            )
        if self.selection is not None and self.selection < 1:
            raise InputError(f"--selection-images {self.selection}: give at least 1 (2000 is usual).")


# From a training set to train, calibration and selection.


def hold_out(
    labels: Labels, sizes: SplitSizes, want: Sequence[str], where: str, share: float = HELD_OUT
) -> dict[str, NDArray[np.int64]]:
    """Set images aside for the splits in `want` (calibration, selection) and return the rows of each split.

    They come from the last `share` of the images, or of each class where the images are sorted by class. Within it
    classes take turns, so that the first k images of a split are as balanced as they can be.

    Returns:
        Name of the split, `train` for what is left, to its (k,) rows in `labels`.
    """
    rows = np.arange(len(labels))
    if not want:
        return {"train": rows}
    asked = {"calibration": sizes.calibration, "selection": sizes.selection}
    count = max(round(share * len(labels)), sum(asked[name] or MINIMUM_CALIBRATION for name in want))
    if count > (len(labels) // 2 if share < 1 else len(labels)):
        raise InputError(
            f"{where}: {len(labels)} images are too few to set {count} of them aside for {' and '.join(want)}; "
            "give more images, or set fewer aside with --calibration-images and --selection-images."
        )
    tail = rows[-count:]
    if len(np.unique(labels[tail])) < len(np.unique(labels)):
        rank_from_end = rank_within_class(labels[::-1])[::-1]
        tail = np.sort(np.lexsort((rows, rank_from_end))[:count])
    tail = tail[np.lexsort((labels[tail], rank_within_class(labels[tail])))]
    parts = {"train": np.setdiff1d(rows, tail)}
    if "calibration" in want:
        left = count - asked["selection"] if "selection" in want and asked["selection"] else count // len(want)
        size = asked["calibration"] or min(256, left)
        parts["calibration"], tail = tail[:size], tail[size:]
    if "selection" in want:
        parts["selection"] = tail[: asked["selection"] or 2000]
    return parts


def rank_within_class(labels: Labels) -> NDArray[np.int64]:
    """Return (n,): how many earlier images have the same label."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(labels) else np.zeros(0, np.int64)
    rank = np.empty(len(labels), np.int64)
    rank[order] = np.arange(len(labels)) - np.repeat(starts, np.diff(np.r_[starts, len(labels)]))
    return rank


def check_labels(labels: Mapping[str, Labels], names: Sequence[str] | None, where: str) -> tuple[str, ...]:
    """Return the class names; raises InputError for labels that no classifier could have."""
    for split, values in labels.items():
        if not len(values):
            raise InputError(f"{where}: the {split} split is empty.")
        if values.min() < 0:
            raise InputError(f"{where}: the {split} labels hold {values.min()}; classes count from 0.")
    found = np.unique(labels["train"])
    if len(found) < 2:
        raise InputError(
            f"{where}: every training image has label {found[0]}; a classifier needs at least two classes."
        )
    count = len(names) if names is not None else int(found[-1]) + 1
    for split, values in labels.items():
        if values.max() >= count:
            raise InputError(f"{where}: the {split} labels hold {values.max()}, but the classes are 0 to {count - 1}.")
    return tuple(names) if names is not None else tuple(str(index) for index in range(count))


def array_data(
    name: str,
    arrays: Mapping[str, tuple[NDArray[np.generic], Labels]],
    class_names: Sequence[str] | None,
    sizes: SplitSizes,
    seed: int,
) -> Data:
    """Make splits of (pixels (n, channels, height, width), labels) arrays: train and test, and what else there is."""
    classes = check_labels({split: labels for split, (_, labels) in arrays.items()}, class_names, name)
    shapes = {split: pixels.shape[1:] for split, (pixels, _) in arrays.items()}
    for split, shape in shapes.items():
        if shape != shapes["train"]:
            raise InputError(f"{name}: the {split} images are {shape}, the training images {shapes['train']}.")
    preprocess = identity(shapes["train"])
    want = [split for split in ("calibration", "selection") if split not in arrays]
    splits = {}
    for split, rows in hold_out(arrays["train"][1], sizes, want, name).items():
        splits[split] = ArrayImages(torch.from_numpy(arrays["train"][0]), arrays["train"][1], rows, preprocess, seed)
    for split in set(arrays) - {"train"}:
        pixels, labels = arrays[split]
        splits[split] = ArrayImages(torch.from_numpy(pixels), labels, np.arange(len(labels)), preprocess, seed)
    return data_of(name, classes, splits, preprocess)


def data_of(name: str, classes: tuple[str, ...], splits: Mapping[str, Images], preprocess: Preprocess) -> Data:
    if len(splits["calibration"]) < MINIMUM_CALIBRATION:
        raise InputError(
            f"{name}: {len(splits['calibration'])} calibration images; give at least {MINIMUM_CALIBRATION}, better 256."
        )
    test = splits["test"]
    return Data(
        name,
        classes,
        splits["train"],
        splits["calibration"],
        splits["selection"],
        preprocess,
        labelled=True,
        test_count=len(test),
        _test=test,
    )


def identity(shape: Sequence[int]) -> Preprocess:
    """Return the preprocessing of a model that takes pixels in [0, 1] of this (channels, height, width)."""
    channels, height, width = shape
    return Preprocess((channels, height, width), (0.0,) * channels, (1.0,) * channels)
