"""In: a text file of a known form. Out: its content, or one sentence on what is wrong with it."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hirelc_deploy.errors import InputError


def read_text(file: Path) -> str:
    """Return the text of a UTF-8 file, with or without a byte order mark."""
    try:
        return file.read_text("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; check the path.") from None
    except UnicodeDecodeError:
        raise InputError(f"{file}: not a text file (UTF-8); save it as one.") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); check the path.") from None


def read_json(file: Path) -> Any:
    """Return what a JSON file holds."""
    try:
        return json.loads(read_text(file))
    except ValueError as error:
        raise InputError(f"{file}: not valid JSON ({error}); export it again.") from None


def read_yaml(file: Path) -> Mapping[str, Any]:
    """Return the mapping that a YAML file holds."""
    yaml = importlib.import_module("yaml")  # comes with timm
    try:
        content = yaml.safe_load(read_text(file))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file}: not valid YAML ({reason}); correct it.") from None
    if not isinstance(content, Mapping):
        raise InputError(f"{file}: holds no `name: value` lines; write at least train, val and names.")
    return content


def read_lines(file: Path) -> list[str]:
    """Return the lines of a text file that are not empty."""
    return [line.strip() for line in read_text(file).splitlines() if line.strip()]


def class_names(text: str, base: Path) -> tuple[str, ...]:
    """Return the names that the option `classes` gives: a text file with one name a line, or `cat;dog`."""
    file = base / text
    names = read_lines(file) if file.is_file() else [name.strip() for name in text.split(";") if name.strip()]
    if ";" not in text and not file.is_file():
        raise InputError(f"classes={text}: no such file in {base}; give a text file with one name a line, or cat;dog.")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"classes={text}: the name {twice!r} is there twice; give each class one name.")
    return tuple(names)


MOST_CLASSES = 100_000
"""Above it a number is that of something else, such as of an article in a shop."""


def numbered(most: int, where: str) -> tuple[str, ...]:
    """Return the names of classes that have only numbers, 0 to `most`."""
    if most >= MOST_CLASSES:
        raise InputError(
            f"{where}: a label is {most}, so that there would be {most + 1} classes; number them from 0, without gaps."
        )
    return tuple(str(number) for number in range(most + 1))


def names_of(value: Any, where: str) -> tuple[str, ...]:
    """Return class names from a list, or from a mapping of numbers to names; a number without a name is its name."""
    if isinstance(value, Mapping):
        try:
            by_number = {int(number): str(name) for number, name in value.items()}
        except (TypeError, ValueError):
            raise InputError(f"{where}: names are not under whole numbers; write `0: cat` and so on.") from None
        if not by_number or min(by_number) < 0 or max(by_number) > MOST_CLASSES:
            raise InputError(f"{where}: there are no usable class names; write `0: cat` and so on.")
        return tuple(by_number.get(number, str(number)) for number in range(max(by_number) + 1))
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: class names are missing; add `names: [cat, dog]` or `names:` with `0: cat` below.")
    return tuple(str(name) for name in value)


SPLITS = {
    "train": "train",
    "training": "train",
    "trn": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "validate": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
    "tst": "test",
    "holdout": "test",
    "eval": "val",
    "evaluation": "val",
    "calibration": "calibration",
    "selection": "selection",
}
"""What people call a split, to what it is called here."""

BESIDE_SPLITS = {"set", "data", "dataset", "split", "images", "image", "imgs", "img", "pictures", "photos", "seg"}
"""Words that stand beside the name of a split: training_set, val-images, seg_test."""


def split_called(name: str, beside: Collection[str] = ()) -> str | None:
    """Return the split that a folder, file or key is named after, such as `train2017`; None where it is none.

    Args:
        beside: Words that say nothing, beside those that never do; see `shared_words`.
    """
    words = [word for word in _words(name) if word not in BESIDE_SPLITS and word not in beside]
    joined = re.fullmatch(r"(train|training|val|valid|validation|test|testing)(set|data|images|imgs)", "".join(words))
    return SPLITS.get(joined[1] if joined else words[0]) if len(words) == 1 else None


def shared_words(names: Collection[str]) -> set[str]:
    """Return the words that are in all of several names, as `flowers` in flowers_train and flowers_test."""
    return set.intersection(*(set(_words(name)) for name in names)) - SPLITS.keys() if len(names) > 1 else set()


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^a-z]+", name.lower()) if word]
