"""In: a folder with one folder per class. Out: its images in four splits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.images import FolderImages, Labels
from hirelc_deploy.inputs.data.pictures import image_size
from hirelc_deploy.inputs.data.preprocess import Preprocess
from hirelc_deploy.inputs.data.splits import (
    HELD_OUT,
    Data,
    SplitSizes,
    check_labels,
    data_of,
    hold_out,
    identity,
    rank_within_class,
)

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}
FOLDER_TEST = 0.2  # of each class, from its end, where a folder has no test split of its own
CHECKED_FILES = 5000  # image files whose headers are read before the work starts


# imagefolder


def read_image_folder(folder: Path, sizes: SplitSizes, seed: int) -> Data:
    """Read DIR/train/CLASS/* with DIR/val or DIR/test (or both), or DIR/CLASS/*, of which a fifth becomes the test."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; imagefolder: names a folder with one folder per class.")
    where = str(folder)
    parts: dict[str, tuple[list[Path], Labels]] = {}
    if (folder / "train").is_dir():
        classes = _class_folders(folder / "train")
        parts["train"] = _listed(folder / "train", classes)
        held = [name for name in ("val", "test") if (folder / name).is_dir()]
        if not held:
            raise InputError(f"{folder}: has train, but neither val nor test; add one of them.")
        parts["test"] = _listed(folder / held[-1], classes)
        if len(held) == 2:
            parts["val"] = _listed(folder / "val", classes)
    else:
        classes = _class_folders(folder)
        files, labels = _listed(folder, classes)
        rank, counts = rank_within_class(labels), np.bincount(labels, minlength=len(classes))
        is_test = rank >= counts[labels] - np.ceil(FOLDER_TEST * counts[labels])
        for split, rows in (("train", np.flatnonzero(~is_test)), ("test", np.flatnonzero(is_test))):
            parts[split] = [files[row] for row in rows], labels[rows]
    names = check_labels({split: labels for split, (_, labels) in parts.items()}, classes, where)
    source = "val" if "val" in parts else "train"
    share = 1.0 if source == "val" else HELD_OUT
    rows_of = hold_out(parts[source][1], sizes, ["calibration", "selection"], where, share)
    if source == "val":
        del rows_of["train"]
    chosen = {split: (source, rows) for split, rows in rows_of.items()}
    for split in {"train", "test"} - set(chosen):
        chosen[split] = split, np.arange(len(parts[split][1]))
    native = _checked_files([file for files, _ in parts.values() for file in files])
    splits = {}
    for split, (source, rows) in chosen.items():
        files, labels = parts[source]
        splits[split] = FolderImages([files[row] for row in rows], labels[rows], native, seed)
    return data_of(folder.name or where, names, splits, native)


def _class_folders(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise InputError(f"{folder}: no class folders in it; put the images of each class into a folder of its own.")
    if len(names) == 1:
        raise InputError(f"{folder}: only one class ({names[0]}); a classifier needs at least two.")
    return names


def _listed(folder: Path, classes: Sequence[str]) -> tuple[list[Path], Labels]:
    found = set(_class_folders(folder))
    if unknown := sorted(found - set(classes)):
        raise InputError(f"{folder / unknown[0]}: this class has no training images.")
    if missing := sorted(set(classes) - found):
        raise InputError(
            f"{folder}: no class {missing[0]}, which has training images; add it here, or remove it there."
        )
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        images = sorted((folder / name).rglob("*"))
        images = [file for file in images if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]
        if not images:
            raise InputError(f"{folder / name}: no images in it ({', '.join(sorted(IMAGE_SUFFIXES))} are read).")
        files += images
        labels += [label] * len(images)
    return files, np.array(labels, np.int64)


def _checked_files(files: Sequence[Path]) -> Preprocess:
    """Look into files spread over the whole set before the work starts; return their common size, or 224 x 224."""
    sizes = {image_size(file) for file in files[:: max(1, len(files) // CHECKED_FILES)]}
    height, width = sizes.pop() if len(sizes) == 1 else (224, 224)
    return identity((3, height, width))
