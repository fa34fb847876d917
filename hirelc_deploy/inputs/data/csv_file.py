"""In: a CSV file with paths of pictures and what is true of them. Out: them in four splits."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.placed import Sample
from hirelc_deploy.inputs.data.samples import samples_data
from hirelc_deploy.inputs.data.splits import Data, SplitSizes
from hirelc_deploy.inputs.data.text_files import class_names, numbered, read_text, split_called

Row = Mapping[str, str]
WANTED = "give a header with path, and label, or labels (with ; between), or columns of numbers; and split, if wanted"


def read_csv(file: Path, sizes: SplitSizes, seed: int, options: Mapping[str, str] | None = None) -> Data:
    """Read a table: `path`, and `label`, or `labels` (`cat;dog`), or columns of numbers; `split` if wanted.

    Paths are relative to the file. Classes are in the order of their names, or of their numbers where all are whole
    numbers, or as the option `classes` gives them.
    """
    columns, rows = _table(file)
    targets = [name for name in columns if name not in ("path", "split")]
    given = (options or {}).get("classes")
    known = class_names(given, file.parent) if given else None
    truths: Sequence[Any]
    if targets in (["label"], ["labels"]):
        several = targets == ["labels"]
        words = [_words(row[targets[0]], f"{file}, line {line}", several) for line, row in rows]
        names = known or _sorted_names({word for found in words for word in found}, str(file))
        kind = "multilabel" if several else "classes"
        numbers = [_numbers(found, names, f"{file}, line {line}") for found, (line, _) in zip(words, rows, strict=True)]
        truths = [_hot(found, len(names)) for found in numbers] if several else [found[0] for found in numbers]
    else:
        kind, names = "numbers", tuple(targets)
        truths = [_values(row, targets, f"{file}, line {line}") for line, row in rows]
    lists: dict[str, list[Sample]] = {}
    for (line, row), truth in zip(rows, truths, strict=True):
        if not row["path"]:
            raise InputError(f"{file}, line {line}: the path is empty; name the picture, or remove the line.")
        lists.setdefault(_split(row, f"{file}, line {line}"), []).append(Sample(file.parent / row["path"], truth))
    return samples_data(file.stem, str(file), kind, names, lists, sizes, seed)


def _table(file: Path) -> tuple[list[str], list[tuple[int, Row]]]:
    """Return the names of the columns, and of each row its line and what it holds."""
    reader = csv.reader(read_text(file).splitlines())
    header = [name.strip().lower() for name in next(reader, [])]
    if "path" not in header:
        raise InputError(f"{file}: its columns are {', '.join(header)!r:.80}, without path; {WANTED}.")
    if len(set(header)) < len(header):
        raise InputError(f"{file}: two columns have the same name; {WANTED}.")
    targets = [name for name in header if name not in ("path", "split")]
    if not targets or ({"label", "labels"} & set(targets) and len(targets) > 1):
        raise InputError(f"{file}: its columns are {', '.join(header)!r:.80}; {WANTED}.")
    rows: list[tuple[int, Row]] = []
    for values in reader:
        if not values:
            continue
        if len(values) != len(header):
            raise InputError(
                f"{file}, line {reader.line_num}: {len(values)} values for {len(header)} columns; correct the line."
            )
        rows.append((reader.line_num, dict(zip(header, (value.strip() for value in values), strict=True))))
    if not rows:
        raise InputError(f"{file}: no rows below the header; add one for each picture.")
    return header, rows


def _words(text: str, where: str, several: bool) -> list[str]:
    words = [word.strip() for word in text.split(";") if word.strip()] if several else [text]
    if not several and not text:
        raise InputError(f"{where}: the label is empty; give a class, or remove the line.")
    return words


def _sorted_names(words: set[str], where: str) -> tuple[str, ...]:
    numbers = [_whole(word) for word in words]
    if numbers and None not in numbers:
        return numbered(max(number for number in numbers if number is not None), where)
    return tuple(sorted(words))


def _whole(word: str) -> int | None:
    """Return a class number, also one that a table program wrote as `3.0`; None for a name."""
    return int(word.partition(".")[0]) if re.fullmatch(r"\d+(\.0+)?", word) else None


def _numbers(words: Sequence[str], names: Sequence[str], where: str) -> list[int]:
    number, found = {name: index for index, name in enumerate(names)}, []
    for word in words:
        label = number.get(word, _whole(word))
        if label is None or label >= len(names):
            raise InputError(
                f"{where}: {word!r:.40} is not one of the {len(names)} classes; name it, or correct the line."
            )
        found.append(label)
    return found


def _hot(numbers: Sequence[int], count: int) -> torch.Tensor:
    row = torch.zeros(count)
    row[list(numbers)] = 1.0
    return row


def _values(row: Row, columns: Sequence[str], where: str) -> torch.Tensor:
    found = []
    for column in columns:
        try:
            found.append(float(row[column]))
        except ValueError:
            found.append(math.nan)
        if not math.isfinite(found[-1]):
            raise InputError(f"{where}: {column} is {row[column]!r:.40}; give a finite number, or remove the line.")
    return torch.tensor(found)


def _split(row: Row, where: str) -> str:
    if "split" not in row:
        return "train"
    split = split_called(row["split"])
    if split is None:
        raise InputError(
            f"{where}: the split {row['split']!r:.40} is unknown; use train, val, test, calibration or selection."
        )
    return split
