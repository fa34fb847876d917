"""In: pictures with YOLO's text files. Out: boxes with their pictures in four splits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.pictures import left_out, none_in, passed_by, pictures_in
from hirelc_deploy.inputs.data.placed import Sample
from hirelc_deploy.inputs.data.samples import samples_data
from hirelc_deploy.inputs.data.splits import Data, SplitSizes
from hirelc_deploy.inputs.data.targets import Boxes, checked_boxes
from hirelc_deploy.inputs.data.text_files import class_names, names_of, read_lines, read_text, read_yaml, split_called

NAME_FILES = ("classes.txt", "obj.names")


def read_yolo(path: Path, sizes: SplitSizes, seed: int, options: Mapping[str, str] | None = None) -> Data:
    """Read data.yaml, or DIR with it, or DIR with images/SPLIT and labels/SPLIT and the names in classes.txt.

    A picture without a text file has no objects. A line is `class x y width height`, centre and sides as shares of the
    picture's; of a polygon, `class x1 y1 x2 y2 ...`, the box around it is taken.
    """
    if path.is_dir():
        description, folder = _description(path), path
    elif path.is_file():
        description, folder = path, path.parent
    else:
        raise InputError(f"{path}: no such file or folder; yolo: names a data.yaml, or the folder that holds it.")
    content: Mapping[str, Any] = read_yaml(description) if description is not None else {}
    names = _names(content, description, folder, (options or {}).get("classes"))
    with_points = "kpt_shape" in content
    sources: dict[str, list[Path]] = {}
    for key, value in content.items():
        split = split_called(str(key))
        if split and value:
            values = value if isinstance(value, list) else [value]
            assert description is not None
            sources[split] = [_resolved(str(entry), content, description) for entry in values]
    if not sources:
        sources = _folders(folder)
    lists, bare = {}, 0
    for split, places in sources.items():
        pictures = [picture for place in places for picture in _pictures(place)]
        if not pictures:
            raise none_in(places[0])
        label_files = [_label_file(picture, folder) for picture in pictures]
        if not any(file.is_file() for file in label_files):
            raise InputError(
                f"{label_files[0]}: no such file, nor one for any other picture of {split}; put the text files into "
                "labels/, in folders as those of images/."
            )
        bare += sum(not file.is_file() for file in label_files)
        lists[split] = [
            Sample(picture, _boxes(file, len(names), with_points))
            for picture, file in zip(pictures, label_files, strict=True)
        ]
    notes = left_out([place for places in sources.values() for place in places if place.is_dir()], (".txt",))
    taken = [place for places in sources.values() for place in places]
    if {place.parent for place in taken} == {folder / "images"}:
        notes += passed_by(folder / "images", taken)
    if bare:
        notes += (f"{bare} pictures have no text file (.txt) and count as pictures without objects",)
    name = path.stem if path.is_file() else path.name
    return samples_data(name, str(path), "boxes", names, lists, sizes, seed, notes=notes)


def _description(folder: Path) -> Path | None:
    usual = [folder / "data.yaml", folder / "object_detection" / "config.yaml"]
    others = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    return next((file for file in (*usual, *others) if file.is_file()), None)


def _names(content: Mapping[str, Any], description: Path | None, folder: Path, option: str | None) -> tuple[str, ...]:
    if option:
        return class_names(option, folder)
    if description is not None:
        return names_of(content.get("names"), str(description))
    for name in NAME_FILES:
        if (folder / name).is_file():
            return tuple(read_lines(folder / name))
    raise InputError(f"{folder}: class names are missing; add data.yaml with `names: [cat, dog]`, or classes.txt.")


def _resolved(entry: str, content: Mapping[str, Any], description: Path) -> Path:
    """Return the folder or list of pictures that a description names, from where it lies or from one folder above."""
    here = description.parent
    roots = [here / str(content.get("path", "") or ""), here, here.parent]
    # Exports of Roboflow say ../train/images for what lies in train/images.
    for name in (entry, entry.removeprefix("../")):
        for root in roots:
            if (root / name).exists():
                return root / name
    raise InputError(f"{description}: names {entry}, which is not in {roots[0]}; correct the path.")


def _folders(folder: Path) -> dict[str, list[Path]]:
    """Find images/SPLIT, or SPLIT/images, or images/ alone."""
    images = folder / "images"
    found: dict[str, list[Path]] = {}
    for place in sorted([*images.glob("*/"), *folder.glob("*/images/")]):
        named = place.name if place.parent == images else place.parent.name
        if split := split_called(named):
            found.setdefault(split, []).append(place)
    if not found and images.is_dir():
        found["train"] = [images]
    if not found:
        raise InputError(
            f"{folder}: neither images/train nor train/images is in it; a YOLO folder has images and labels."
        )
    return found


def _pictures(place: Path) -> list[Path]:
    if place.is_dir():
        return pictures_in(place)
    if place.suffix.lower() == ".txt":
        return [file if (file := Path(line)).is_absolute() else place.parent / file for line in read_lines(place)]
    raise InputError(f"{place}: neither a folder nor a text file that lists pictures; correct the path.")


def _label_file(picture: Path, folder: Path) -> Path:
    """Return where the boxes of a picture are: labels/ in place of the last images/ of its path."""
    parts = picture.with_suffix(".txt").parts
    last = max((index for index, part in enumerate(parts) if part == "images"), default=None)
    if last is None:
        return picture.with_suffix(".txt")
    usual = Path(*parts[:last], "labels", *parts[last + 1 :])
    other = Path(*parts[:last], "object_detection", "labels", *parts[last + 1 :])
    beside = folder / "labels" / Path(*parts[last + 1 :])
    return next((file for file in (usual, other, beside) if file.is_file()), usual)


def _boxes(file: Path, classes: int, with_points: bool) -> Boxes:
    if not file.is_file():
        return Boxes(np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0, bool), in_shares=True)
    corners, labels, names = [], [], []
    for number, values in _lines(file):
        label, numbers = values[0], values[1:]
        if label != int(label):
            raise InputError(f"{file}, line {number}: class {label:g}; give a whole number from 0.")
        if with_points or len(numbers) == 4:
            x, y, width, height = numbers[:4]
            corners.append((x - width / 2, y - height / 2, x + width / 2, y + height / 2))
        else:
            xs, ys = numbers[::2], numbers[1::2]
            corners.append((min(xs), min(ys), max(xs), max(ys)))
        labels.append(int(label))
        names.append(f"line {number}")
    return checked_boxes(corners, np.array(labels, np.int64), str(file), None, classes=classes, names=names)


def _lines(file: Path) -> Iterator[tuple[int, Sequence[float]]]:
    """Yield the number of a line, from 1, and its numbers."""
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            values = [float(word) for word in line.split()]
        except ValueError:
            raise InputError(f"{file}, line {number}: {line.strip()!r:.60} are not all numbers; correct it.") from None
        if len(values) < 5 or (len(values) > 5 and len(values) % 2 == 0):
            raise InputError(f"{file}, line {number}: {len(values)} numbers; give `class x y width height`.")
        if not np.isfinite(values).all():
            raise InputError(f"{file}, line {number}: holds NaN or infinity; correct it.")
        yield number, values
