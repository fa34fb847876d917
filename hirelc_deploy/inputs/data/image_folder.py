"""In: a folder with one folder per class. Out: its images in four splits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.images import FolderImages, Labels
from hirelc_deploy.inputs.data.native import native_input
from hirelc_deploy.inputs.data.pictures import IMAGE_SUFFIXES, pictures_in
from hirelc_deploy.inputs.data.splits import Data, SplitSizes, check_labels, data_of, share_out


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
        parts["train"] = _listed(folder, classes)
    labels_of = {split: labels for split, (_, labels) in parts.items()}
    names = check_labels(labels_of, classes, where)
    chosen = share_out({split: len(labels) for split, labels in labels_of.items()}, labels_of, sizes, where)
    native = native_input([file for files, _ in parts.values() for file in files])
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
        images = pictures_in(folder / name)
        if not images:
            raise InputError(f"{folder / name}: no images in it ({', '.join(sorted(IMAGE_SUFFIXES))} are read).")
        files += images
        labels += [label] * len(images)
    return files, np.array(labels, np.int64)
