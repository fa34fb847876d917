"""In: a folder of WebDataset shards. Out: their pictures and classes in four splits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.images import FolderImages
from hirelc_deploy.inputs.data.native import native_input
from hirelc_deploy.inputs.data.pictures import files_in, no_pictures
from hirelc_deploy.inputs.data.repeated import repeated_files
from hirelc_deploy.inputs.data.shards import ShardPictures, indexed
from hirelc_deploy.inputs.data.splits import Data, SplitSizes, check_labels, data_of, share_out
from hirelc_deploy.inputs.data.text_files import class_names, shared_words, split_called

COMPRESSED_NAMES = re.compile(r".*\.(tar\.(gz|bz2|xz|zst|lz4)|tgz|tbz2?|txz|tzst)", re.IGNORECASE)


def read_webdataset(folder: Path, sizes: SplitSizes, seed: int, options: Mapping[str, str] | None = None) -> Data:
    """Read DIR/train*.tar with DIR/val*.tar or DIR/test*.tar (or DIR/train/*.tar and so on), or any shards in DIR.

    Of shards without val and test a fifth becomes the test. A sample is what has one name up to the first dot:
    `0007.jpg` and `0007.cls`, the class as a whole number. Samples are in the order of the shards, sorted by name.

    Options:
        classes: Names of the classes, which are numbers otherwise.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; webdataset: names a folder with shards (.tar) in it.")
    shards, notes = _shards(folder)
    files = [file for found in shards.values() for file in found]
    index = indexed(files)
    split_of = np.repeat(np.arange(len(shards)), [len(found) for found in shards.values()])[index.places["shard"]]
    rows_of = {split: np.flatnonzero(split_of == number) for number, split in enumerate(shards)}
    labels = {split: index.labels[rows] for split, rows in rows_of.items()}
    given = (options or {}).get("classes")
    names = check_labels(labels, class_names(given, folder) if given else None, str(folder))
    chosen = share_out({split: len(rows) for split, rows in rows_of.items()}, labels, sizes, str(folder))
    pictures = ShardPictures(files, index.places)
    native, found = native_input(pictures)
    pictures_of = {split: pictures.at(rows_of[source][rows]) for split, (source, rows) in chosen.items()}
    splits = {
        split: FolderImages(pictures_of[split], labels[source][rows], native, seed)
        for split, (source, rows) in chosen.items()
    }
    notes += found + repeated_files(pictures_of) + no_pictures(index.others)
    return data_of(folder.name or str(folder), names, splits, native, notes=notes)


def _shards(folder: Path) -> tuple[dict[str, list[Path]], tuple[str, ...]]:
    """Return the shards of each split, sorted, and a sentence on those that name none beside others that do."""
    files = files_in(folder)
    if compressed := [file for file in files if COMPRESSED_NAMES.fullmatch(file.name)]:
        raise InputError(
            f"{compressed[0]}: is compressed; unpack it to .tar, as pictures are read out of order, and remove it."
        )
    files = [file for file in files if file.suffix.lower() == ".tar"]
    if not files:
        raise InputError(f"{folder}: no shards in it; put plain .tar files there, such as train-000000.tar.")
    beside = shared_words([file.stem for file in files])
    beside |= shared_words({file.parent.name for file in files if file.parent != folder})
    found: dict[str | None, list[Path]] = {}
    for file in files:
        place = file.relative_to(folder)
        called = (split_called(name, beside) for name in (*place.parent.parts, place.stem))
        found.setdefault(next(filter(None, called), None), []).append(file)
    unnamed = found.pop(None, [])
    if not found:
        return {"train": unnamed}, ()
    if "train" not in found:
        raise InputError(f"{folder}: its shards are of {' and '.join(map(str, found))}, and none is train; add it.")
    notes = (f"{len(unnamed)} shards are left out, as they name no split, such as {unnamed[0]}",) if unnamed else ()
    return {split: shards for split, shards in found.items() if split}, notes
