"""In: a folder with one folder per class. Out: its images in four splits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.images import FolderImages, Labels
from hirelc_deploy.inputs.data.native import native_input
from hirelc_deploy.inputs.data.pictures import left_out, none_in, pictures_in
from hirelc_deploy.inputs.data.splits import Data, SplitSizes, check_labels, data_of, share_out
from hirelc_deploy.inputs.data.text_files import split_called


def read_image_folder(folder: Path, sizes: SplitSizes, seed: int) -> Data:
    """Read DIR/train/CLASS/* with DIR/val or DIR/test (or both), or DIR/CLASS/*, of which a fifth becomes the test.

    Splits may be called as people call them, in any case: see `text_files.SPLITS`.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; imagefolder: names a folder with one folder per class.")
    where = str(folder)
    parts: dict[str, tuple[list[Path], Labels]] = {}
    places = _split_folders(folder)
    if "train" in places:
        classes = _class_folders(places["train"])
        if not {"val", "test"} & places.keys():
            raise InputError(f"{folder}: has train, but neither val nor test; add one of them.")
        parts = {split: _listed(place, classes) for split, place in places.items()}
        if "test" not in parts:
            parts["test"] = parts.pop("val")
    else:
        classes = _class_folders(folder)
        if all(split_called(name) for name in classes):
            raise InputError(
                f"{folder}: its folders {', '.join(classes)} are named like splits, and none is train; name one train, "
                "with a folder per class in it, or give the classes other names."
            )
        parts["train"] = _listed(folder, classes)
    labels_of = {split: labels for split, (_, labels) in parts.items()}
    names = check_labels(labels_of, classes, where)
    chosen = share_out({split: len(labels) for split, labels in labels_of.items()}, labels_of, sizes, where)
    native = native_input([file for files, _ in parts.values() for file in files])
    splits = {}
    for split, (source, rows) in chosen.items():
        files, labels = parts[source]
        splits[split] = FolderImages([files[row] for row in rows], labels[rows], native, seed)
    notes = left_out([place / name for place in (places.values() or [folder]) for name in classes])
    return data_of(folder.name or where, names, splits, native, notes=notes)


def _split_folders(folder: Path) -> dict[str, Path]:
    """Return split to its folder. A class may be called `train` too: its folder holds pictures, a split's folders."""
    found: dict[str, Path] = {}
    for place in sorted(folder.iterdir()):
        split = split_called(place.name) if place.is_dir() else None
        if split is None or not any(entry.is_dir() for entry in place.iterdir()):
            continue
        if split in found:
            raise InputError(f"{folder}: {found[split].name} and {place.name} are both {split}; keep one of them.")
        found[split] = place
    return found


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
            raise none_in(folder / name)
        files += images
        labels += [label] * len(images)
    return files, np.array(labels, np.int64)
