"""In: images and targets, as they were given. Out: four disjoint splits of them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.geometry import Pairs
from hirelc_deploy.inputs.data.images import ArrayImages, Images, Labels
from hirelc_deploy.inputs.data.preprocess import Preprocess
from hirelc_deploy.inputs.data.repeated import repeated_rows
from hirelc_deploy.inputs.data.text_files import numbered

MINIMUM_CALIBRATION = 8  # fewer images give ranges of single pictures, not of the data
HELD_OUT = 0.1  # of the training images, from their end; CIFAR-10: the last 5,000, which the usual recipes leave out
TEST_SHARE = 0.2  # of the images, where the data has no test split of its own
FINGERPRINTED = 64  # targets of each split in the fingerprint of data without class numbers
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
        kind: Of the targets, from which the task follows; see `targets.KINDS`.
        options: What else the format says, as options of the task: `flip_pairs` of keypoints.
        notes: Sentences for the user, as of files that were left out.
        floats: Its images are inputs of the model already, made by code that is not here.
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
    kind: str = "classes"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    floats: bool = False

    def take_test(self) -> Images:
        """Return the test images. They can be had once, for the final report; a second call is a bug."""
        if self._seal.broken:
            raise RuntimeError("the test split was handed out before: nothing may be chosen by it.")
        self._seal.broken = True
        return self._test

    def for_another_result(self) -> Data:
        """Return the same splits, whose test images can be had once for a result on which no other one has a say."""
        return dataclasses.replace(self, _seal=_Seal())

    def splits(self) -> Mapping[str, Images]:
        """Return all splits by name, the test's too: to see that they can be read. Nothing may be chosen by it."""
        return {
            "train": self.train,
            "calibration": self.calibration,
            "selection": self.selection,
            "test": self._test,
        }

    def fingerprint(self) -> str:
        """Return a hash of the labels of what a search may see, and of the first images of each split.

        Of other targets, which may be large and in files of their own, some from the whole split stand for all.
        """
        digest = hashlib.sha256()
        for split in (self.train, self.calibration, self.selection):
            if self.kind == "classes" and split.labels is not None:
                digest.update(np.ascontiguousarray(split.labels, "<i8").tobytes())
            elif split.labelled:
                for target in split.targets(spread_order(len(split))[:FINGERPRINTED]):
                    for values in target.values() if isinstance(target, Mapping) else [target]:
                        digest.update(np.asarray(values).tobytes())
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

    def flipping(self, flips: bool, pairs: Pairs = ()) -> Data:
        """Return the same splits, whose training views are mirrored at random or not; see `Images.flipping`."""
        return dataclasses.replace(self, train=self.train.flipping(flips, pairs))


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
    if not want:
        return {"train": np.arange(len(labels))}
    count = _held_count(len(labels), sizes, want, where, share)
    rows = np.arange(len(labels))
    tail = rows[-count:]
    if len(np.unique(labels[tail])) < len(np.unique(labels)):
        rank_from_end = rank_within_class(labels[::-1])[::-1]
        tail = np.sort(np.lexsort((rows, rank_from_end))[:count])
    tail = tail[np.lexsort((labels[tail], rank_within_class(labels[tail])))]
    return _divided(len(labels), tail, sizes, want)


def hold_out_spread(
    total: int, sizes: SplitSizes, want: Sequence[str], where: str, share: float = HELD_OUT
) -> dict[str, NDArray[np.int64]]:
    """Set images aside as `hold_out` does, where they have no classes: evenly spread over the list of all."""
    if not want:
        return {"train": np.arange(total)}
    return _divided(total, spread_order(total)[: _held_count(total, sizes, want, where, share)], sizes, want)


def spread_order(total: int) -> NDArray[np.int64]:
    """Return (total,) rows, ordered so that the first k of them are spread evenly over all (van der Corput 1935)."""
    bits = max(total - 1, 0).bit_length()
    places, numbers = np.zeros(2**bits, np.int64), np.arange(2**bits)
    for bit in range(bits):
        places = places << 1 | numbers >> bit & 1  # the bits of a number in the opposite order
    rows: NDArray[np.int64] = places * total >> bits
    _, first = np.unique(rows, return_index=True)
    return rows[np.sort(first)]


def _held_count(total: int, sizes: SplitSizes, want: Sequence[str], where: str, share: float) -> int:
    asked = {"calibration": sizes.calibration, "selection": sizes.selection}
    count = max(round(share * total), sum(asked[name] or MINIMUM_CALIBRATION for name in want))
    if count > (total // 2 if share < 1 else total):
        raise InputError(
            f"{where}: {total} images are too few to set {count} of them aside for {' and '.join(want)}; "
            "give more images, or set fewer aside with --calibration-images and --selection-images."
        )
    return count


def _divided(
    total: int, tail: NDArray[np.int64], sizes: SplitSizes, want: Sequence[str]
) -> dict[str, NDArray[np.int64]]:
    parts = {"train": np.setdiff1d(np.arange(total), tail)}
    if "calibration" in want:
        left = len(tail) - sizes.selection if "selection" in want and sizes.selection else len(tail) // len(want)
        size = sizes.calibration or min(256, left)
        parts["calibration"], tail = tail[:size], tail[size:]
    if "selection" in want:
        parts["selection"] = tail[: sizes.selection or 2000]
    return parts


def share_out(
    counts: Mapping[str, int], labels: Mapping[str, Labels], sizes: SplitSizes, where: str
) -> dict[str, tuple[str, NDArray[np.int64]]]:
    """Make train, calibration, selection and test of the lists that a data set has.

    With val and test, calibration and selection come from val; with one of the two, that is the test and they come from
    train; with neither, a fifth of train is the test.

    Args:
        counts: Number of images of each list: train, and of val, test, calibration and selection what there is.
        labels: (n,) class numbers of each list, by which classes are balanced; empty for other targets.

    Returns:
        Split to the list that it comes from and its (k,) rows there.
    """
    if "train" not in counts:
        raise InputError(f"{where}: has {' and '.join(sorted(counts))}, but no train; add it.")
    rest = np.arange(counts["train"])
    splits: dict[str, tuple[str, NDArray[np.int64]]] = {}
    if test := "test" if "test" in counts else "val" if "val" in counts else None:
        splits["test"] = test, np.arange(counts[test])
    else:
        is_test = _a_fifth(counts["train"], labels.get("train"))
        splits["test"], rest = ("train", np.flatnonzero(is_test)), np.flatnonzero(~is_test)
    want = [split for split in ("calibration", "selection") if split not in counts]
    source, share, pool = "train", HELD_OUT, rest
    if test == "test" and "val" in counts:
        source, share, pool = "val", 1.0, np.arange(counts["val"])
        splits["train"] = "train", rest
    if source in labels:
        held = hold_out(labels[source][pool], sizes, want, where, share)
    else:
        held = hold_out_spread(len(pool), sizes, want, where, share)
    for split, rows in held.items():
        if split != "train" or source == "train":
            splits[split] = source, pool[rows]
    for split in {"calibration", "selection"} & set(counts):
        splits[split] = split, np.arange(counts[split])
    return splits


def _a_fifth(total: int, labels: Labels | None) -> NDArray[np.bool_]:
    if labels is not None:  # of each class, from its end
        counts = np.bincount(labels)[labels]
        from_end: NDArray[np.bool_] = rank_within_class(labels) >= counts - np.ceil(TEST_SHARE * counts)
        return from_end
    chosen = np.zeros(total, bool)
    chosen[spread_order(total)[: round(TEST_SHARE * total)]] = True
    return chosen


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
    classes = tuple(names) if names is not None else numbered(int(found[-1]), where)
    for split, values in labels.items():
        if values.max() >= len(classes):
            raise InputError(
                f"{where}: the {split} labels hold {values.max()}, but the classes are 0 to {len(classes) - 1}."
            )
    return classes


def empty_classes(data: Data) -> tuple[str, ...]:
    """Return the classes without a name of their own that no image of any split has."""
    labels = [_numbers_seen(split, data.kind) for split in data.splits().values()]
    if not data.labelled or data.classes != tuple(map(str, range(len(data.classes)))):
        return ()
    found = {str(label) for part in labels if part is not None for label in np.unique(part).tolist()}
    return tuple(name for name in data.classes if name not in found) if found else ()


def _numbers_seen(images: Images, kind: str) -> NDArray[np.int64] | None:
    """Return the class numbers of a split; of masks, which must be decoded, those of some."""
    if kind == "masks":
        rows = spread_order(len(images))[:FINGERPRINTED]
        return np.unique(np.concatenate([np.asarray(target).reshape(-1) for target in images.targets(rows)]))
    return images.labels if kind == "classes" else None


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
    check_types({split: pixels for split, (pixels, _) in arrays.items()}, name)
    preprocess = identity(shapes["train"])
    want = [split for split in ("calibration", "selection") if split not in arrays]
    splits = {}
    for split, rows in hold_out(arrays["train"][1], sizes, want, name).items():
        splits[split] = ArrayImages(torch.from_numpy(arrays["train"][0]), arrays["train"][1], rows, preprocess, seed)
    for split in set(arrays) - {"train"}:
        pixels, labels = arrays[split]
        splits[split] = ArrayImages(torch.from_numpy(pixels), labels, np.arange(len(labels)), preprocess, seed)
    floats = arrays["train"][0].dtype.kind == "f"
    notes = repeated_rows({split: pixels for split, (pixels, _) in arrays.items()})
    return data_of(name, classes, splits, preprocess, floats=floats, notes=notes)


def check_types(arrays: Mapping[str, NDArray[np.generic]], where: str) -> None:
    """Raise InputError where some arrays are pixels and others inputs of the model."""
    for split, pixels in arrays.items():
        if pixels.dtype != arrays["train"].dtype:
            raise InputError(
                f"{where}: the {split} images are {pixels.dtype}, the training images {arrays['train'].dtype}; give "
                "both as uint8 pixels, or both as floats that were prepared alike."
            )


def data_of(
    name: str,
    classes: tuple[str, ...],
    splits: Mapping[str, Images],
    preprocess: Preprocess,
    kind: str = "classes",
    options: Mapping[str, Any] | None = None,
    notes: tuple[str, ...] = (),
    floats: bool = False,
) -> Data:
    """Return the data set of four splits; raises InputError where too few images are there for calibration."""
    for label in classes:
        if label != label.encode("utf-8", "replace").decode():
            raise InputError(f"{name}: the class name {label!a} is not UTF-8; rename its folder or correct the table.")
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
        labelled=kind != "none",
        test_count=len(test),
        _test=test,
        kind=kind,
        options=dict(options or {}),
        notes=notes,
        floats=floats,
    )


def identity(shape: Sequence[int]) -> Preprocess:
    """Return the preprocessing of a model that takes pixels in [0, 1] of this (channels, height, width)."""
    channels, height, width = shape
    return Preprocess((channels, height, width), (0.0,) * channels, (1.0,) * channels)
