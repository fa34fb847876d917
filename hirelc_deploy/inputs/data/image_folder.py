"""In: a folder with one folder per class. Out: its images in four splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.images import FolderImages, Labels
from hirelc_deploy.inputs.data.native import native_input
from hirelc_deploy.inputs.data.pictures import (
    folders_in,
    is_junk,
    left_out,
    none_in,
    passed_by,
    picture_suffixes,
    pictures_in,
)
from hirelc_deploy.inputs.data.repeated import repeated_files
from hirelc_deploy.inputs.data.splits import Data, SplitSizes, check_labels, data_of, share_out
from hirelc_deploy.inputs.data.text_files import shared_words, split_called


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
            raise InputError(
                f"{folder}: has train, but neither val nor test with a folder per class; add one of them, or name "
                f"{places['train']}, of which a fifth becomes the test."
            )
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
        _check_order(folder, classes)
        parts["train"] = _listed(folder, classes)
    labels_of = {split: labels for split, (_, labels) in parts.items()}
    names = check_labels(labels_of, classes, where)
    chosen = share_out({split: len(labels) for split, labels in labels_of.items()}, labels_of, sizes, where)
    native, notes = native_input([file for files, _ in parts.values() for file in files])
    files_of = {split: [parts[source][0][row] for row in rows] for split, (source, rows) in chosen.items()}
    splits = {
        split: FolderImages(files_of[split], parts[source][1][rows], native, seed)
        for split, (source, rows) in chosen.items()
    }
    notes += repeated_files(files_of)
    notes += left_out([place / name for place in (places.values() or [folder]) for name in classes])
    notes += _passed_by(folder, places) if places else _taken_for_classes(folder, classes)
    return data_of(folder.name or where, names, splits, native, notes=notes)


def _split_folders(folder: Path) -> dict[str, Path]:
    """Return split to its folder. A class may be called `train` too: its folder holds pictures, a split's folders."""
    found: dict[str, Path] = {}
    layered = [place for place in folders_in(folder) if folders_in(place)]
    shared = shared_words([place.name for place in layered])
    for place in layered:
        split = split_called(place.name, shared)
        if split is None:
            continue
        if split in found:
            raise InputError(f"{folder}: {found[split].name} and {place.name} are both {split}; keep one of them.")
        found[split] = place
    return found


def _check_order(folder: Path, classes: Sequence[str]) -> None:
    """Raise InputError where the splits lie in the classes instead of the classes in the splits."""
    for name in classes:
        splits = {place.name: split_called(place.name) for place in folders_in(folder / name)}
        if len({split for split in splits.values() if split}) > 1:
            raise InputError(
                f"{folder / name}: its folders {', '.join(splits)} are named like splits; put the classes into the "
                f"splits, as in {folder / 'train' / name}, or only pictures of one class into each folder."
            )


def _passed_by(folder: Path, places: Mapping[str, Path]) -> tuple[str, ...]:
    """Return sentences on folders beside the splits, and on pictures beside the folders of classes."""
    return passed_by(folder, places.values()) + _strays([folder, *places.values()])


def _taken_for_classes(folder: Path, classes: Sequence[str]) -> tuple[str, ...]:
    """Return sentences on what else a folder without splits may be, and on pictures beside its classes."""
    below = [tuple(place.name for place in folders_in(folder / name)) for name in classes]
    notes: tuple[str, ...] = ()
    if len(below[0]) > 1 and len(set(below)) == 1:
        notes = (
            f"{folder}: {', '.join(classes)} are taken for the classes, and each holds {', '.join(below[0])}; if those "
            "are the classes, call the others train and test",
        )
    return notes + _strays([folder])


def _strays(folders: Sequence[Path]) -> tuple[str, ...]:
    suffixes = picture_suffixes()
    found = [
        entry
        for folder in folders
        for entry in sorted(folder.iterdir())
        if entry.suffix.lower() in suffixes and not entry.is_dir() and not is_junk(entry.name)
    ]
    return (f"{len(found)} pictures in no folder of a class are left out, such as {found[0]}",) if found else ()


def _class_folders(folder: Path) -> list[str]:
    names = [place.name for place in folders_in(folder)]
    if not names:
        raise InputError(f"{folder}: no class folders in it; put the images of each class into a folder of its own.")
    if len(names) == 1:
        inside = [place.name for place in folders_in(folder / names[0])]
        hint = f"; if {', '.join(inside[:4])} in it are classes or splits, name {folder / names[0]}" if inside else ""
        raise InputError(f"{folder}: only one class ({names[0]}); a classifier needs at least two{hint}.")
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
