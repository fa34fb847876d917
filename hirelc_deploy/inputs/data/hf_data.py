"""In: a data set of Hugging Face on disk. Out: its pictures and targets in four splits."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.hf_tables import Table, hf_tables
from hirelc_deploy.inputs.data.masks import MaskFile
from hirelc_deploy.inputs.data.native import checked
from hirelc_deploy.inputs.data.pictures import Embedded, Picture, stated_size
from hirelc_deploy.inputs.data.placed import Sample
from hirelc_deploy.inputs.data.samples import samples_data
from hirelc_deploy.inputs.data.splits import Data, SplitSizes
from hirelc_deploy.inputs.data.targets import VOID, Boxes, checked_boxes, checked_numbers
from hirelc_deploy.inputs.data.text_files import class_names, numbered

IMAGE_COLUMNS = ("image", "img", "picture")
TARGET_COLUMNS = ("objects", "label", "labels", "target", "fine_label", "annotation", "mask", "value")
BOX_KEYS, CLASS_KEYS = ("bbox", "boxes"), ("category", "category_id", "categories", "label", "labels")
Row = tuple[Table, int, str]
"""A table, a row of it, and what to call the row in errors."""


@dataclass(frozen=True)
class _BoxCell:
    """Boxes of one row, checked when the size of their picture is known."""

    corners: tuple[tuple[float, ...], ...]
    labels: tuple[int, ...]
    where: str
    classes: int

    def read(self, size: tuple[int, int]) -> Boxes:
        """Return the boxes within a picture of this (height, width)."""
        return checked_boxes(self.corners, self.labels, self.where, size, classes=self.classes)


def read_hf_data(folder: Path, sizes: SplitSizes, seed: int, options: Mapping[str, str] | None = None) -> Data:
    """Read what `save_to_disk` wrote, or a folder of Parquet files named after their splits (train-00000.parquet).

    Pictures are in a column `image`. What is true of them is in `label` (a number, a name, several of them, a mask), or
    in `objects`: `bbox`, in pixels as x, y, width, height, with `category`.

    Options:
        image, label: Columns that are called otherwise.
        boxes: `xyxy` where boxes are corners.
        void: Number of a mask that counts nowhere (255).
        classes: Names, where the data set does not say them.
    """
    options = options or {}
    tables = hf_tables(folder)
    columns, features = next(iter(tables.values()))[0].columns, next(iter(tables.values()))[0].features
    image = _chosen(columns, options, "image", IMAGE_COLUMNS, folder)
    target = _chosen([name for name in columns if name != image], options, "label", TARGET_COLUMNS, folder)
    rows = {split: list(_rows(split, found, folder)) for split, found in tables.items()}
    everything = [row for found in rows.values() for row in found]
    if not everything:
        raise InputError(f"{folder}: no images in it; save a data set that has rows.")
    names = (
        class_names(options["classes"], folder) if options.get("classes") else _described_names(features.get(target))
    )
    first = _cell(everything[0], target)
    truths: Sequence[Any]
    if _is_picture(first):
        masks = [_mask(row, target, names, options) for row in everything]
        kind, truths, names = "masks", masks, names or tuple(map(str, range(_most(masks, folder) + 1)))
    else:
        kind, names, truths = _truths([_cell(row, target) for row in everything], everything, names, options)
    inside = isinstance(_cell(everything[0], image), Mapping) and _cell(everything[0], image).get("bytes") is not None
    inside = inside or isinstance(_cell(everything[0], image), bytes)
    pictures = [_picture(row, image, folder, inside) for row in everything]
    samples = [Sample(picture, truth) for picture, truth in zip(pictures, truths, strict=True)]
    for sample in checked(samples) if kind in ("masks", "boxes") else []:
        sample.truth.read(stated_size(sample.picture))
    lists, start = {}, 0
    for split, found in rows.items():
        lists[split], start = samples[start : start + len(found)], start + len(found)
    return samples_data(folder.name, str(folder), kind, names, lists, sizes, seed)


def _rows(split: str, tables: Sequence[Table], folder: Path) -> Iterator[Row]:
    number = 0
    for table in tables:
        for row in range(len(table)):
            yield table, row, f"{folder}, row {number} of {split}"
            number += 1


def _cell(row: Row, column: str) -> Any:
    value = row[0].cell(column, row[1])
    if value is None:
        raise InputError(f"{row[2]}: {column} is empty; fill it, or remove the row.")
    return value


def _chosen(columns: Sequence[str], options: Mapping[str, str], option: str, usual: Sequence[str], folder: Path) -> str:
    if option in options:
        if options[option] not in columns:
            raise InputError(
                f"{folder}: has no column {options[option]!r}, only {', '.join(columns)}; correct {option}=."
            )
        return options[option]
    found = next((name for name in usual if name in columns), None)
    if found is None:
        raise InputError(
            f"{folder}: its columns are {', '.join(columns)}; say which is the {option} with ,{option}=COLUMN."
        )
    return found


# Pictures


def _is_picture(value: Any) -> bool:
    return isinstance(value, bytes) or (isinstance(value, Mapping) and value.keys() == {"bytes", "path"})


def _picture(row: Row, column: str, folder: Path, inside: bool) -> Picture:
    """Return a picture: in the table, whose bytes are read when they are needed, or in a file that the table names."""
    if inside:
        return Embedded(row[2], functools.partial(_bytes, row, column))
    value = _cell(row, column)
    path = value.get("path") if isinstance(value, Mapping) else value
    if not isinstance(path, str):
        raise InputError(f"{row[2]}: {column} is a {type(value).__name__}; give encoded pictures or their paths.")
    return folder / path


def _bytes(row: Row, column: str) -> bytes:
    value = _cell(row, column)
    content = value.get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(content, bytes):
        raise InputError(f"{row[2]}: {column} holds no picture; fill it, or remove the row.")
    return content


def _mask(row: Row, column: str, names: Sequence[str], options: Mapping[str, str]) -> MaskFile:
    void = options.get("void", str(VOID))
    if not void.isdecimal():
        raise InputError(f"void={void}: no whole number; give the number of void pixels.")
    file = Embedded(f"{row[2]}, {column}", functools.partial(_bytes, row, column))
    return MaskFile(file, "masks", int(void), len(names) or None)


def _most(masks: Sequence[MaskFile], folder: Path) -> int:
    """Return the highest class number in masks spread over all."""
    most = 0
    for mask in checked(masks):
        values = mask.read(None)
        counted = values[values != VOID]
        most = max(most, int(counted.max()) if counted.numel() else 0)
    if not most:
        raise InputError(f"{folder}: all pixels of the masks are of class 0 or void; check which column holds them.")
    return most


# Other targets


def _truths(
    values: Sequence[Any], rows: Sequence[Row], names: tuple[str, ...], options: Mapping[str, str]
) -> tuple[str, tuple[str, ...], Sequence[Any]]:
    """Return the kind of the values, class names and the targets."""
    first, where = values[0], rows[0][2]
    if isinstance(first, Mapping) or (isinstance(first, list) and first and isinstance(first[0], Mapping)):
        found = [_objects(value, row[2]) for value, row in zip(values, rows, strict=True)]
        names = names or _names_of({word for _, words in found for word in words}, where)
        corner = [_corners(boxes, options, row[2]) for (boxes, _), row in zip(found, rows, strict=True)]
        return (
            "boxes",
            names,
            [
                _BoxCell(corners, tuple(_number(word, names, row[2]) for word in words), row[2], len(names))
                for corners, (_, words), row in zip(corner, found, rows, strict=True)
            ],
        )
    if isinstance(first, int | str):
        names = names or _names_of(set(values), where)
        return "classes", names, [_number(value, names, row[2]) for value, row in zip(values, rows, strict=True)]
    if isinstance(first, float):
        return "numbers", (), [checked_numbers(value, row[2]) for value, row in zip(values, rows, strict=True)]
    if not isinstance(first, list):
        raise InputError(
            f"{where}: a target of type {type(first).__name__}; say which column it is with ,label=COLUMN."
        )
    for value, row in zip(values, rows, strict=True):
        if wrong := [word for word in value if not isinstance(word, int | float | str)]:
            raise InputError(f"{row[2]}: {wrong[0]!r:.40} is no class and no number; say which column is the label.")
    words = {word for value in values for word in value}
    if any(isinstance(word, float) for word in words):
        return "numbers", (), [checked_numbers(value, row[2]) for value, row in zip(values, rows, strict=True)]
    if words <= {0, 1} and len({len(value) for value in values}) == 1 and len(first) > 1:
        return (
            "multilabel",
            names or tuple(map(str, range(len(first)))),
            [torch.tensor(value).float() for value in values],
        )
    names = names or _names_of(words, where)
    return "multilabel", names, [_hot(value, names, row[2]) for value, row in zip(values, rows, strict=True)]


def _hot(words: Sequence[Any], names: Sequence[str], where: str) -> torch.Tensor:
    row = torch.zeros(len(names))
    row[[_number(word, names, where) for word in words]] = 1.0
    return row


def _objects(value: Any, where: str) -> tuple[list[Any], list[Any]]:
    """Return boxes and classes of a row, which are lists of a mapping, or mappings in a list."""
    rows = value if isinstance(value, list) else None
    keys = value.keys() if rows is None else (rows[0].keys() if rows else set[str]())
    box, label = (next((key for key in usual if key in keys), None) for usual in (BOX_KEYS, CLASS_KEYS))
    if rows == []:
        return [], []
    if box is None or label is None:
        raise InputError(f"{where}: its objects have {', '.join(keys)}; give bbox and category.")
    if rows is not None:
        return [entry[box] for entry in rows], [entry[label] for entry in rows]
    return list(value[box] or []), list(value[label] or [])


def _corners(boxes: Sequence[Any], options: Mapping[str, str], where: str) -> tuple[tuple[float, ...], ...]:
    form = options.get("boxes", "xywh")
    if form not in ("xywh", "xyxy"):
        raise InputError(f"boxes={form} is unknown; use boxes=xywh or boxes=xyxy.")
    for index, box in enumerate(boxes):
        if not isinstance(box, list | tuple) or len(box) != 4 or not all(isinstance(v, int | float) for v in box):
            raise InputError(f"{where}: box {index} is {box!r:.60}; give four numbers.")
    if form == "xyxy":
        return tuple(tuple(map(float, box)) for box in boxes)
    return tuple((float(x), float(y), float(x + width), float(y + height)) for x, y, width, height in boxes)


def _number(word: Any, names: Sequence[str], where: str) -> int:
    if isinstance(word, str) and word in names:
        return names.index(word)
    if isinstance(word, int) and 0 <= word < len(names):
        return int(word)
    raise InputError(f"{where}: {word!r:.40} is not one of the {len(names)} classes; name all classes, or correct it.")


def _names_of(words: set[Any], where: str) -> tuple[str, ...]:
    if words and all(isinstance(word, int) for word in words):
        return numbered(max(0, *words), where)
    return tuple(sorted(word for word in words if isinstance(word, str)))


def _described_names(feature: Any) -> tuple[str, ...]:
    """Return the class names anywhere in what the data set's description says of a column."""
    if isinstance(feature, Mapping):
        names = feature.get("names")
        if feature.get("_type") == "ClassLabel" and isinstance(names, list):
            return tuple(map(str, names))
        return next((found for value in feature.values() if (found := _described_names(value))), ())
    if isinstance(feature, list):
        return next((found for value in feature if (found := _described_names(value))), ())
    return ()
