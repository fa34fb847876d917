"""In: pictures with a mask or a map for each. Out: them in four splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.native import checked
from hirelc_deploy.inputs.data.pictures import (
    UNREADABLE,
    Embedded,
    by_name,
    files_in,
    none_in,
    passed_by,
    pictures_in,
    stated_size,
)
from hirelc_deploy.inputs.data.placed import Sample
from hirelc_deploy.inputs.data.samples import samples_data
from hirelc_deploy.inputs.data.splits import Data, SplitSizes
from hirelc_deploy.inputs.data.targets import VOID, checked_map, checked_mask
from hirelc_deploy.inputs.data.text_files import class_names, names_of, read_yaml, split_called

MASK_FOLDERS = ("masks", "annotations", "labels", "depth", "maps")
MASK_SUFFIXES = (".png", ".npy", ".tif", ".tiff", ".bmp", ".gif")
NAME_FILES = ("classes.txt", "names.txt", "labels.txt")
DESCRIPTIONS = ("config.yaml", "data.yaml")
KINDS = ("masks", "binary", "map")
LOOKED_AT = 16  # masks of 16 bits by whose numbers it is told whether they are maps
DEEP = {"I;16", "I;16B", "I;16L", "I", "F"}
"""Pillow's modes of pictures with 16 or 32 bits a pixel."""


@dataclass(frozen=True)
class MaskFile:
    """A mask or map in a file, read when it is needed.

    Attributes:
        form: `masks`, `binary` (what is not 0 is class 1) or `map`.
        void: Number in the file that becomes 255, or of a map's whole numbers the one that becomes NaN.
        classes: Number of classes where it is known.
        scale: What the numbers of a map are multiplied by.
    """

    file: Path | Embedded
    form: str
    void: int | None
    classes: int | None
    scale: float = 1.0

    def read(self, size: tuple[int, int] | None) -> Tensor:
        """Return (h, w) int64 class numbers, or the (h, w) or (k, h, w) float32 map."""
        values, where = stored_array(self.file), str(self.file)
        if self.form == "map":
            unknown = values == self.void if values.dtype.kind in "iu" and self.void is not None else None
            found = values * np.float32(self.scale) if self.scale != 1 else values.astype(np.float32)
            return checked_map(found if unknown is None else np.where(unknown, np.nan, found), where, size)
        if self.void is not None and self.void != VOID:
            values = np.where(values == self.void, VOID, values.astype(np.int64))
        if self.form == "binary":
            values = np.where((values == 0) | ((values == VOID) & (self.void is not None)), values, 1)
        return checked_mask(values, where, size, self.classes)


def read_masks(folder: Path, sizes: SplitSizes, seed: int, options: Mapping[str, str] | None = None) -> Data:
    """Read DIR/SPLIT with DIR/SPLITannot, DIR/images/SPLIT with DIR/masks/SPLIT, or DIR/SPLIT/images with .../masks.

    A picture and its mask have the same name. DIR may have a config.yaml, with images and masks of each split and
    `classes`; then pictures without a mask are left out. Masks are png files of class numbers, in which 255 is void.
    Maps are .npy files of floats, NaN where unknown, or png files of 16 bits, 0 where unknown.

    Options:
        void: Number in the files that counts nowhere (255; of a 16-bit map 0).
        kind: `masks`, `binary` (whatever is not 0 is class 1), or `map`; else as the first file suggests.
        scale: What the numbers of a map are multiplied by, such as 0.001 for metres from millimetres.
        classes: A file of names, one a line, or names with ; between. Without it classes.txt, or numbers.
    """
    options = options or {}
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; masks: names a folder with pictures and their masks.")
    description = next((folder / name for name in DESCRIPTIONS if (folder / name).is_file()), None)
    content: Mapping[str, Any] = read_yaml(description) if description is not None else {}
    places = _described(content, description) if description is not None else _folders(folder)
    pairs = {split: _pairs(images, masks, lenient=description is not None) for split, (images, masks) in places.items()}
    everything = [mask for found in pairs.values() for _, mask in found]
    form = options.get("kind") or _form(everything)
    if form not in KINDS:
        raise InputError(
            f"{folder}: kind={form} is not read from masks; use {', '.join(f'kind={kind}' for kind in KINDS)}."
        )
    void = _number(options, content, "void", folder)
    names: tuple[str, ...] = ()
    if form != "map":
        names = _names(folder, options, content, description) or (
            ("background", "foreground") if form == "binary" else ()
        )
        void = VOID if void is None and form == "masks" else void
    elif void is None:
        void = 0
    scale = _scale(options, folder)
    kind = "map" if form == "map" else "masks"
    known = len(names) or None
    most = _look_into(
        [pair for found in pairs.values() for pair in found], MaskFile(everything[0], form, void, known, scale)
    )
    if kind == "masks" and not names:
        names = tuple(str(index) for index in range(most + 1))
    if kind == "masks" and len(names) < 2:
        raise InputError(
            f"{folder}: all pixels of the masks are of one class or void; if 255 is an object, add ,kind=binary."
        )
    lists = {
        split: [Sample(picture, MaskFile(mask, form, void, len(names) or None, scale)) for picture, mask in found]
        for split, found in pairs.items()
    }
    images = {place for place, _ in places.values()}
    notes = passed_by(folder / "images", images) if {place.parent for place in images} == {folder / "images"} else ()
    return samples_data(folder.name, str(folder), kind, names, lists, sizes, seed, notes=notes)


def stored_array(file: Path | Embedded) -> NDArray[Any]:
    """Return the numbers of a .npy file or of the pixels of a picture with one channel; colours are refused."""
    try:
        if isinstance(file, Path) and file.suffix.lower() == ".npy":
            return np.asarray(np.load(file, allow_pickle=False))
        with Image.open(file if isinstance(file, Path) else file.open()) as image:
            if image.mode not in {"1", "L", "P", *DEEP}:
                raise InputError(f"{file}: a picture in colours ({image.mode}); save the class numbers as 8-bit grey.")
            return np.array(image)
    except UNREADABLE as error:
        raise InputError(f"{file}: not readable as a mask or map ({error}); replace or remove it.") from None


# Where masks lie


def _folders(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Return split to the folders of its pictures and masks."""
    found: dict[str, tuple[Path, Path]] = {}
    for place in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        split = split_called(place.name)
        if split and (folder / f"{place.name}annot").is_dir():
            found[split] = place, folder / f"{place.name}annot"
        elif split and (place / "images").is_dir() and (masks := _mask_folder(place)):
            found[split] = place / "images", masks
        elif split and not (folder / "images").is_dir():
            raise InputError(
                f"{folder}: {place.name} has no masks; put them into {place.name}annot, or {place.name}/masks."
            )
    if found:
        return found
    images, masks = folder / "images", _mask_folder(folder)
    if not images.is_dir() or masks is None:
        raise InputError(
            f"{folder}: neither train and trainannot nor images and masks are in it; name the folder of both."
        )
    for place in sorted(entry for entry in images.iterdir() if entry.is_dir()):
        if split := split_called(place.name):
            if not (masks / place.name).is_dir():
                raise InputError(f"{masks}: has no folder {place.name}, as {images} has; add the masks.")
            found[split] = place, masks / place.name
    return found or {"train": (images, masks)}


def _mask_folder(folder: Path) -> Path | None:
    return next((folder / name for name in MASK_FOLDERS if (folder / name).is_dir()), None)


def _described(content: Mapping[str, Any], file: Path) -> dict[str, tuple[Path, Path]]:
    found: dict[str, tuple[Path, Path]] = {}
    for key, value in content.items():
        split = split_called(str(key))
        if split and isinstance(value, Mapping) and {"images", "masks"} <= value.keys():
            images, masks = (file.parent / str(value[name]) for name in ("images", "masks"))
            if missing := [place for place in (images, masks) if not place.is_dir()]:
                raise InputError(f"{file}: names {missing[0]}, which is no folder; correct the path.")
            found[split] = images, masks
    return found or _folders(file.parent)


def _pairs(images: Path, masks: Path, *, lenient: bool) -> list[tuple[Path, Path]]:
    """Return pictures with their masks.

    Args:
        lenient: A picture may be without a mask.
    """
    pictures = pictures_in(images)
    if not pictures:
        raise none_in(images)
    found = (file for file in files_in(masks) if file.suffix.lower() in MASK_SUFFIXES)
    mask_of = by_name(found, lambda file: file.relative_to(masks).with_suffix(""))
    names = by_name(pictures, lambda file: file.relative_to(images).with_suffix(""))
    if alone := sorted(set(mask_of) - set(names)):
        raise InputError(
            f"{mask_of[alone[0]]}: there is no picture {alone[0]} in {images}; add it, or remove the mask."
        )
    if (missing := sorted(set(names) - set(mask_of))) and (not lenient or not mask_of):
        raise InputError(
            f"{names[missing[0]]}: has no mask in {masks} ({', '.join(MASK_SUFFIXES)} are read); add it, or remove "
            "the picture."
        )
    return [(picture, mask_of[name]) for name, picture in names.items() if name in mask_of]


# What they hold


def _form(masks: Sequence[Path]) -> str:
    """Return `map` for floats, and for pictures of 16 bits unless all their numbers could be those of classes."""
    values = stored_array(masks[0])
    if values.dtype.kind == "f":
        return "map"
    if masks[0].suffix.lower() == ".npy" or values.dtype.kind == "b" or values.dtype.itemsize == 1:
        return "masks"
    looked = masks[:: max(1, len(masks) // LOOKED_AT)]
    return "masks" if max(int(stored_array(mask).max()) for mask in looked) <= VOID else "map"


def _look_into(pairs: Sequence[tuple[Path, Path]], like: MaskFile) -> int:
    """Read masks spread over all, held against the sizes of their pictures; return the highest class number."""
    most = -1
    for picture, mask in checked(pairs):
        values = MaskFile(mask, like.form, like.void, like.classes, like.scale).read(stated_size(picture))
        if like.form != "map" and bool((counted := values[values != VOID]).numel()):
            most = max(most, int(counted.max()))
    return most


def _names(
    folder: Path, options: Mapping[str, str], content: Mapping[str, Any], description: Path | None
) -> tuple[str, ...]:
    if given := options.get("classes"):
        return class_names(given, folder)
    for key in ("names", "classes"):
        if key in content:
            return names_of(content[key], str(description))
    return next((class_names(name, folder) for name in NAME_FILES if (folder / name).is_file()), ())


def _number(options: Mapping[str, str], content: Mapping[str, Any], name: str, folder: Path) -> int | None:
    value = options.get(name, content.get(name))
    if value is None:
        return None
    try:
        return int(value)
    except (TypeError, ValueError):
        raise InputError(f"{folder}: {name}={value} is no whole number; give the number of void pixels.") from None


def _scale(options: Mapping[str, str], folder: Path) -> float:
    try:
        scale = float(options.get("scale", 1))
    except ValueError:
        scale = 0.0
    if not 0 < scale < float("inf"):
        raise InputError(f"{folder}: scale={options['scale']} is no number above 0; give such as 0.001.")
    return scale
