"""In: COCO's JSON and its pictures. Out: boxes or keypoints with their pictures in four splits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.native import checked
from hirelc_deploy.inputs.data.pictures import Region, stated_size
from hirelc_deploy.inputs.data.placed import Sample
from hirelc_deploy.inputs.data.samples import samples_data
from hirelc_deploy.inputs.data.splits import Data, SplitSizes
from hirelc_deploy.inputs.data.targets import checked_boxes, checked_points
from hirelc_deploy.inputs.data.text_files import read_json, split_called

MARGIN = 1.25
"""Sides of what is cut out around a person, over those of the box (Xiao et al. 2018)."""


@dataclass(frozen=True)
class _Annotated:
    """One JSON file, in the form that is read here."""

    file: Path
    images: Mapping[Any, Mapping[str, Any]]
    categories: Mapping[int, Mapping[str, Any]]
    annotations: Mapping[Any, Sequence[Mapping[str, Any]]]
    """Id of an image to its annotations."""


def read_coco(
    path: Path, data_dir: Path | None, sizes: SplitSizes, seed: int, options: Mapping[str, str] | None = None
) -> Data:
    """Read FILE.json, or DIR with train.json and val.json, with them in annotations/, or one in each split's folder.

    Pictures are looked for in `data_dir`, or else beside the file, in images/, and in a folder named after the split.
    Classes are numbered in the order of their category ids.

    With the option `kind=keypoints` the points of the annotations are read instead of the boxes. If a picture has
    several annotations with points, each is cut out of its picture, a quarter larger than its box; else a picture is
    taken whole. Points whose names begin with left_ and right_ change places in mirrored pictures.
    """
    kind = (options or {}).get("kind", "boxes")
    if kind not in ("boxes", "keypoints"):
        raise InputError(f"{path}: kind={kind} is not read from COCO files; use kind=boxes or kind=keypoints.")
    files = _files(path, kind)
    read = {split: _read(file) for split, file in files.items()}
    first = next(iter(read.values()))
    for other in read.values():
        if {key: value.get("name") for key, value in other.categories.items()} != {
            key: value.get("name") for key, value in first.categories.items()
        }:
            raise InputError(f"{other.file}: its categories are not those of {first.file}; give both the same ones.")
    lists: dict[str, list[Sample]] = {}
    if kind == "boxes":
        for split, content in read.items():
            lists[split] = _boxes(content, _pictures(content, split, data_dir))
        names = tuple(str(value.get("name", key)) for key, value in first.categories.items())
        return samples_data(path.stem, str(path), kind, names, lists, sizes, seed)
    names, category = _points_category(first)
    several = any(_most_annotations(content, category) > 1 for content in read.values())
    for split, content in read.items():
        lists[split] = _keypoints(content, _pictures(content, split, data_dir), category, len(names), several)
    pairs = _flip_pairs(names)
    return samples_data(path.stem, str(path), kind, names, lists, sizes, seed, {"flip_pairs": pairs} if pairs else None)


def _files(path: Path, kind: str) -> dict[str, Path]:
    if path.is_file():
        return {"train": path}
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder; coco: names a JSON file, or a folder with train.json.")
    prefixes = ("instances_", "person_keypoints_") if kind == "boxes" else ("person_keypoints_", "instances_")
    found: dict[str, Path] = {}
    for prefix in ("", *prefixes):
        for file in sorted([*path.glob("*.json"), *path.glob("annotations/*.json")]):
            split = split_called(file.stem.removeprefix(prefix)) if file.stem.startswith(prefix) else None
            if split:
                found.setdefault(split, file)
    for file in sorted(path.glob("*/_annotations.coco.json")):
        if split := split_called(file.parent.name):
            found.setdefault(split, file)
    if not found:
        raise InputError(
            f"{path}: neither train.json nor annotations/instances_train*.json is in it; name the JSON file itself."
        )
    return found


def _read(file: Path) -> _Annotated:
    content = read_json(file)
    if not isinstance(content, dict):
        raise InputError(f"{file}: a list, as of detections; give the file of annotations, with images and categories.")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list) or not all(isinstance(entry, dict) for entry in content[key]):
            raise InputError(f"{file}: has no list {key!r}; a COCO file has images, annotations and categories.")
    images, categories = (_by_id(content[key], file, key) for key in ("images", "categories"))
    if not categories:
        raise InputError(f"{file}: its categories are empty; name the classes there.")
    if not images:
        raise InputError(f"{file}: its images are empty; list the pictures there.")
    annotations: dict[Any, list[dict[str, Any]]] = {key: [] for key in images}
    for index, entry in enumerate(content["annotations"]):
        where = f"{file}: annotation {entry.get('id', index)}"
        if not isinstance(entry.get("image_id"), int | str) or entry["image_id"] not in images:
            raise InputError(
                f"{where} is of image {entry.get('image_id')!r}, which is not listed; list it, or remove it."
            )
        if not isinstance(entry.get("category_id"), int | str) or entry["category_id"] not in categories:
            raise InputError(f"{where} has category {entry.get('category_id')!r}, which is not listed; list it.")
        annotations[entry["image_id"]].append(entry)
    return _Annotated(file, images, dict(sorted(categories.items())), annotations)


def _by_id(entries: Sequence[dict[str, Any]], file: Path, key: str) -> dict[Any, dict[str, Any]]:
    found: dict[Any, dict[str, Any]] = {}
    needed = ("id", "file_name") if key == "images" else ("id",)
    for index, entry in enumerate(entries):
        if missing := [name for name in needed if not isinstance(entry.get(name), int | str)]:
            raise InputError(f"{file}: entry {index} of {key} has no {missing[0]}; add it.")
        if entry["id"] in found:
            raise InputError(f"{file}: the id {entry['id']} is in {key} twice; give each its own.")
        found[entry["id"]] = entry
    return found


def _pictures(content: _Annotated, split: str, data_dir: Path | None) -> dict[Any, Path]:
    """Return image id to picture; the first folder that has the first one is taken for all."""
    here = content.file.parent
    bases = [data_dir] if data_dir is not None else [here, here.parent]
    names = dict.fromkeys((content.file.stem.removeprefix("instances_").removeprefix("person_keypoints_"), split))
    roots = [root for base in bases for root in (base, base / "images")]
    roots += [root / name for root in roots for name in names]
    first = str(next(iter(content.images.values()))["file_name"])
    for root in roots:
        if (root / first).is_file():
            return {key: root / str(entry["file_name"]) for key, entry in content.images.items()}
    raise InputError(
        f"{content.file}: its first picture {first} is not in {' or '.join(map(str, bases))}; "
        "say with --data-dir which folder holds the pictures."
    )


def _sizes(content: _Annotated, pictures: Mapping[Any, Path]) -> dict[Any, tuple[int, int]]:
    """Return image id to (height, width), as the file says it; some are held against the pictures."""
    found, told = {}, []
    for key, entry in content.images.items():
        if isinstance(entry.get("height"), int) and isinstance(entry.get("width"), int):
            found[key] = entry["height"], entry["width"]
            told.append(key)
        else:
            found[key] = _existing_size(content, pictures[key])
    for key in checked(told):
        height, width = _existing_size(content, pictures[key])
        if (height, width) != found[key]:
            raise InputError(
                f"{content.file}: {pictures[key].name} is said to be {found[key][1]} x {found[key][0]}, but has "
                f"{width} x {height} pixels; give the pictures that were annotated."
            )
    return found


def _existing_size(content: _Annotated, picture: Path) -> tuple[int, int]:
    if not picture.is_file():
        raise InputError(f"{content.file}: names {picture}, which is not there; add the picture, or remove its entry.")
    return stated_size(picture)


def _boxes(content: _Annotated, pictures: Mapping[Any, Path]) -> list[Sample]:
    number = {key: index for index, key in enumerate(content.categories)}
    sizes, samples = _sizes(content, pictures), []
    for key, picture in pictures.items():
        entries = content.annotations[key]
        names = [f"annotation {entry.get('id', index)}" for index, entry in enumerate(entries)]
        corners = [_corners(entry, f"{content.file}, {name}") for entry, name in zip(entries, names, strict=True)]
        labels = np.array([number[entry["category_id"]] for entry in entries], np.int64)
        crowd = [bool(entry.get("iscrowd", 0)) for entry in entries]
        where = f"{content.file}: {picture.name}"
        samples.append(Sample(picture, checked_boxes(corners, labels, where, sizes[key], crowd=crowd, names=names)))
    return samples


def _corners(entry: Mapping[str, Any], where: str) -> tuple[float, float, float, float]:
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(value, int | float) for value in box):
        raise InputError(f"{where}: bbox is {box!r:.60}; give [x, y, width, height] in pixels.")
    return box[0], box[1], box[0] + box[2], box[1] + box[3]


# Keypoints


def _points_category(content: _Annotated) -> tuple[tuple[str, ...], int]:
    """Return the names of the points and the category that has them."""
    used = Counter(
        entry["category_id"] for entries in content.annotations.values() for entry in entries if entry.get("keypoints")
    )
    if not used:
        raise InputError(f"{content.file}: no annotation has keypoints; leave kind=keypoints away to read the boxes.")
    category = used.most_common(1)[0][0]
    if len(used) > 1:
        raise InputError(f"{content.file}: {len(used)} categories have keypoints; keep the annotations of one of them.")
    count = len(next(e["keypoints"] for es in content.annotations.values() for e in es if e.get("keypoints"))) // 3
    names = content.categories[category].get("keypoints") or [str(index) for index in range(count)]
    return tuple(str(name) for name in names), category


def _with_points(entries: Sequence[Mapping[str, Any]], category: int) -> list[Mapping[str, Any]]:
    return [
        entry
        for entry in entries
        if entry["category_id"] == category
        and not entry.get("iscrowd")
        and isinstance(entry.get("keypoints"), list)
        and any(entry["keypoints"][2::3])
    ]


def _most_annotations(content: _Annotated, category: int) -> int:
    return max((len(_with_points(entries, category)) for entries in content.annotations.values()), default=0)


def _keypoints(
    content: _Annotated, pictures: Mapping[Any, Path], category: int, count: int, several: bool
) -> list[Sample]:
    sizes, samples = _sizes(content, pictures), []
    for key, picture in pictures.items():
        for index, entry in enumerate(_with_points(content.annotations[key], category)):
            where = f"{content.file}: {picture.name}, annotation {entry.get('id', index)}"
            if len(entry["keypoints"]) != 3 * count:
                raise InputError(
                    f"{where} has {len(entry['keypoints'])} numbers for {count} points; give x, y, v of each."
                )
            try:
                points = np.array(entry["keypoints"], np.float32).reshape(count, 3)
            except (TypeError, ValueError):
                raise InputError(f"{where}: its keypoints are not all numbers; give x, y, v of each.") from None
            truth = checked_points(points, where, sizes[key])
            if not several:
                samples.append(Sample(picture, truth))
                continue
            region = _around(_corners(entry, where), sizes[key])
            offset = torch.tensor([region[0], region[1], 0.0])
            samples.append(Sample(Region(picture, region), torch.where(truth[:, 2:] > 0, truth - offset, 0.0)))
    return samples


def _around(corners: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    x, y = (corners[0] + corners[2]) / 2, (corners[1] + corners[3]) / 2
    half_width, half_height = MARGIN * (corners[2] - corners[0]) / 2, MARGIN * (corners[3] - corners[1]) / 2
    left, top = max(0, math.floor(x - half_width)), max(0, math.floor(y - half_height))
    right, bottom = min(size[1], math.ceil(x + half_width)), min(size[0], math.ceil(y + half_height))
    return left, top, max(right, left + 1), max(bottom, top + 1)


def _flip_pairs(names: Sequence[str]) -> list[tuple[int, int]]:
    number = {name.lower(): index for index, name in enumerate(names)}
    return [
        (index, number[name.replace("left", "right", 1)])
        for name, index in number.items()
        if name.startswith("left") and name.replace("left", "right", 1) in number
    ]
