"""In: lists of pictures with what is true of them. Out: the data set that they make, in four splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.images import FolderImages, Images
from hirelc_deploy.inputs.data.native import native_input
from hirelc_deploy.inputs.data.pictures import Picture, Region
from hirelc_deploy.inputs.data.placed import PlacedImages, Sample
from hirelc_deploy.inputs.data.repeated import repeated_files
from hirelc_deploy.inputs.data.splits import Data, SplitSizes, check_labels, data_of, share_out
from hirelc_deploy.inputs.data.targets import PLACED

GEOMETRY_OF = {"boxes": "letterbox", "keypoints": "letterbox", "masks": "stretch", "map": "stretch"}
"""How pictures of a kind become inputs where the model does not say it: a crop would cut off what is to be found."""


def samples_data(
    name: str,
    where: str,
    kind: str,
    classes: Sequence[str],
    lists: Mapping[str, Sequence[Sample]],
    sizes: SplitSizes,
    seed: int,
    options: Mapping[str, Any] | None = None,
    notes: tuple[str, ...] = (),
) -> Data:
    """Make a data set of the lists that were found: train, val, test, calibration, selection, or a single one.

    Args:
        where: What the user named, for errors.
        kind: Of the targets; see `targets.KINDS`.
        options: `flip_pairs` of keypoints, without which they are not mirrored, and whatever else the format says.
        notes: Sentences for the user.
    """
    if not lists or not any(lists.values()):
        raise InputError(f"{where}: no images in it; check that it is the right folder or file.")
    if len(lists) == 1:
        lists = {"train": next(iter(lists.values()))}
    for split, samples in lists.items():
        if not samples:
            raise InputError(f"{where}: the {split} split has no images; add some, or leave it out.")
    _check_pictures(lists, where)
    labels = {}
    if kind == "classes":
        labels = {split: np.array([s.truth for s in samples], np.int64) for split, samples in lists.items()}
        if "train" in labels:
            classes = check_labels(labels, classes, where)
    chosen = share_out({split: len(samples) for split, samples in lists.items()}, labels, sizes, where)
    pictures = [sample.picture for samples in lists.values() for sample in samples]
    native, found = native_input(pictures, GEOMETRY_OF.get(kind, "crop"))
    files = {split: [lists[source][row].picture for row in rows] for split, (source, rows) in chosen.items()}
    notes += found + repeated_files(files)
    pairs = tuple((options or {}).get("flip_pairs", ()))
    flips = kind != "numbers" and (kind != "keypoints" or bool(pairs))
    splits: dict[str, Images] = {}
    for split, (source, rows) in chosen.items():
        taken = [lists[source][row] for row in rows]
        if kind in PLACED:
            splits[split] = PlacedImages(taken, kind, native, seed, flips, pairs)
        else:
            known = labels[source][rows] if kind == "classes" else None
            truths = None if kind in ("classes", "none") else [sample.truth for sample in taken]
            splits[split] = FolderImages(
                [sample.picture for sample in taken], known, native, seed, targets=truths, flips=flips
            )
    return data_of(name, tuple(classes), splits, native, kind, options, notes)


def _check_pictures(lists: Mapping[str, Sequence[Sample]], where: str) -> None:
    """Raise InputError for a file that is not there, or that is listed twice or in two splits."""
    split_of: dict[Path, str] = {}
    for split, samples in lists.items():
        seen: set[Picture] = set()
        for picture in (sample.picture for sample in samples):
            file = picture.file if isinstance(picture, Region) else picture
            if not isinstance(file, Path):
                continue
            if picture in seen and not isinstance(picture, Region):  # two people may be in the same place
                raise InputError(f"{where}: {picture} is listed twice in {split}; remove one of them.")
            seen.add(picture)
            if split_of.setdefault(file, split) != split:
                raise InputError(f"{where}: {file} is in {split_of[file]} and in {split}; keep it in one of them.")
            if not file.is_file():
                raise InputError(f"{where}: names {file}, which is not there; add the picture, or remove its entry.")
