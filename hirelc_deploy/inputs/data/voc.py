"""In: a folder as Pascal VOC has it. Out: boxes with their pictures in four splits."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.native import checked
from hirelc_deploy.inputs.data.pictures import by_name, files_in, none_in, pictures_in, stated_size
from hirelc_deploy.inputs.data.placed import Sample
from hirelc_deploy.inputs.data.samples import samples_data
from hirelc_deploy.inputs.data.splits import Data, SplitSizes
from hirelc_deploy.inputs.data.targets import checked_boxes
from hirelc_deploy.inputs.data.text_files import class_names, read_lines

LISTS = ("train", "val", "test", "trainval")
CORNERS = ("xmin", "ymin", "xmax", "ymax")


class _Objects(NamedTuple):
    """What one file says: the picture's size where it is told, and name, corners and difficulty of each object."""

    size: tuple[int, int] | None
    names: list[str]
    corners: NDArray[np.float64]
    difficult: list[bool]


def read_voc(folder: Path, sizes: SplitSizes, seed: int, options: Mapping[str, str] | None = None) -> Data:
    """Read DIR with Annotations, JPEGImages and, where there are splits, ImageSets/Main.

    Classes are in the order of their names, or as the option `classes` gives them. VOC counts pixels from 1 and both
    ends belong to a box, so that x0 = xmin - 1 and x1 = xmax. An object that is difficult becomes a crowd: neither
    finding it nor missing it counts.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; voc: names a folder with Annotations and JPEGImages.")
    root = next((place for place in (folder, *sorted(folder.glob("VOC*"))) if (place / "Annotations").is_dir()), None)
    if root is None:
        raise InputError(f"{folder}: has no folder Annotations; voc: names a folder with Annotations and JPEGImages.")
    pictures = by_name(pictures_in(root / "JPEGImages"), _stem)
    if not pictures:
        raise none_in(root / "JPEGImages")
    written = by_name((file for file in files_in(root / "Annotations") if file.suffix.lower() == ".xml"), _stem)
    stems = _lists(root, pictures)
    notes = () if stems else _without(root, pictures.keys() - written.keys())
    stems = stems or {"train": sorted(written)}
    read = {
        stem: _objects(written.get(stem, root / "Annotations" / f"{stem}.xml"))
        for stem in dict.fromkeys(stem for split in stems.values() for stem in split)
    }
    found = sorted({name for objects in read.values() for name in objects.names})
    given = (options or {}).get("classes")
    names = class_names(given, folder) if given else tuple(found)
    if not names:
        raise InputError(f"{root / 'Annotations'}: no object in any file; annotate some, or name the right folder.")
    number = {name: index for index, name in enumerate(names)}
    for stem, objects in read.items():
        if unknown := [name for name in objects.names if name not in number]:
            raise InputError(
                f"{root / 'Annotations' / stem}.xml: an object {unknown[0]!r} is of no class in classes={given}; "
                "add it there."
            )
    for stem in checked([stem for stem, objects in read.items() if objects.size and stem in pictures]):
        height, width = stated_size(pictures[stem])
        said = read[stem].size
        if said is not None and said != (height, width):
            raise InputError(
                f"{root / 'Annotations' / stem}.xml: says {said[1]} x {said[0]}, but {pictures[stem].name} has "
                f"{width} x {height} pixels; give the picture that was annotated."
            )
    lists = {
        split: [_sample(root, stem, pictures, read[stem], number) for stem in listed] for split, listed in stems.items()
    }
    return samples_data(folder.name, str(folder), "boxes", names, lists, sizes, seed, notes=notes)


def _stem(file: Path) -> str:
    return file.stem


def _without(root: Path, stems: Collection[str]) -> tuple[str, ...]:
    """Return one sentence on pictures that have no file of objects."""
    if not stems:
        return ()
    return (f"{len(stems)} pictures have no file in {root / 'Annotations'} and are left out, such as {min(stems)}",)


def _lists(root: Path, pictures: Mapping[str, Path]) -> dict[str, list[str]]:
    """Return split to the names of its pictures; nothing where there are no lists."""
    main = root / "ImageSets" / "Main"
    found = {
        split: [line if line in pictures else line.split()[0] for line in read_lines(main / f"{split}.txt")]
        for split in LISTS
        if (main / f"{split}.txt").is_file()
    }
    both = found.pop("trainval", [])
    if both and "train" not in found:
        found["train"] = both
    for split, stems in found.items():
        if missing := [stem for stem in stems if stem not in pictures]:
            raise InputError(
                f"{main / split}.txt: names {missing[0]}, which is not in JPEGImages; add the picture, or remove the "
                "line."
            )
    return found


def _objects(file: Path) -> _Objects:
    try:
        tree = ElementTree.parse(file).getroot()
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; add it, or remove its picture from the lists.") from None
    except (ElementTree.ParseError, OSError, ValueError) as error:
        raise InputError(f"{file}: not readable as XML ({error}); write it again.") from None
    names, corners, difficult = [], [], []
    for index, entry in enumerate(tree.iter("object")):
        name = (entry.findtext("name") or "").strip()
        if not name:
            raise InputError(f"{file}: object {index} has no name; give its class.")
        try:
            corners.append([float(entry.findtext(f"bndbox/{corner}") or "") for corner in CORNERS])
        except ValueError:
            raise InputError(
                f"{file}: object {index} has no bndbox of {', '.join(CORNERS)}; give four numbers."
            ) from None
        names.append(name)
        difficult.append((entry.findtext("difficult") or "0").strip() == "1")
    try:
        size = int(tree.findtext("size/height") or 0), int(tree.findtext("size/width") or 0)
    except ValueError:
        raise InputError(f"{file}: the size is not in whole numbers; give width and height in pixels.") from None
    return _Objects(size if min(size) > 0 else None, names, np.array(corners, np.float64).reshape(-1, 4), difficult)


def _sample(
    root: Path, stem: str, pictures: Mapping[str, Path], objects: _Objects, number: Mapping[str, int]
) -> Sample:
    file = root / "Annotations" / f"{stem}.xml"
    if stem not in pictures:
        raise InputError(f"{file}: there is no picture {stem} in JPEGImages; add it, or remove the file.")
    corners = objects.corners.copy()
    # Only a box that is not reversed gets wider, so that one that is can be told.
    corners[:, :2] -= np.all(objects.corners[:, :2] <= objects.corners[:, 2:], axis=1, keepdims=True)
    labels = np.array([number[name] for name in objects.names], np.int64)
    size = objects.size or stated_size(pictures[stem])
    names = [f"object {index}" for index in range(len(labels))]
    return Sample(pictures[stem], checked_boxes(corners, labels, str(file), size, crowd=objects.difficult, names=names))
