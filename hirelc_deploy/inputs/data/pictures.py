"""In: a picture in a file or a table, or a part of one. Out: its pixels or size, or one sentence on what is wrong."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from hirelc_deploy.errors import InputError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # SyntaxError: a broken PNG chunk


@dataclass(frozen=True)
class Embedded:
    """An encoded picture in a table; `name` tells people which."""

    name: str
    read: Callable[[], bytes]

    def __str__(self) -> str:
        return self.name

    def open(self) -> io.BytesIO:
        """Return its bytes as a file."""
        return io.BytesIO(self.read())


@dataclass(frozen=True)
class Region:
    """A part of a picture: `box` is left, top, right, bottom in its pixels."""

    file: Path
    box: tuple[int, int, int, int]

    def __str__(self) -> str:
        return f"{self.file} at {self.box}"


Picture = Path | Embedded | Region


def read_image(picture: Picture, channels: int = 3) -> Image.Image:
    """Decode a picture as RGB (or grey for one channel); raises InputError naming one that is not readable."""
    try:
        with _opened(picture) as image:
            part = image.crop(picture.box) if isinstance(picture, Region) else image
            return part.convert("L" if channels == 1 else "RGB")
    except UNREADABLE as error:
        raise InputError(f"{picture}: not a readable image ({error}); replace or remove it.") from None


def image_size(picture: Picture) -> tuple[int, int]:
    """Return (height, width); raises InputError where a picture is broken as far as can be told without decoding it."""
    try:
        with _opened(picture) as image:
            image.verify()
            return _size(picture, image)
    except UNREADABLE as error:
        raise InputError(f"{picture}: not a readable image ({error}); replace or remove it.") from None


def stated_size(picture: Picture) -> tuple[int, int]:
    """Return (height, width) as the first bytes of a picture say it; much faster than `image_size`."""
    try:
        with _opened(picture) as image:
            return _size(picture, image)
    except UNREADABLE as error:
        raise InputError(f"{picture}: not a readable image ({error}); replace or remove it.") from None


def pictures_in(folder: Path) -> list[Path]:
    """Return the image files in a folder and in those below it, sorted."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())


def _opened(picture: Picture) -> Image.Image:
    if isinstance(picture, Embedded):
        return Image.open(picture.open())
    return Image.open(picture.file if isinstance(picture, Region) else picture)


def _size(picture: Picture, image: Image.Image) -> tuple[int, int]:
    if isinstance(picture, Region):
        left, top, right, bottom = picture.box
        return bottom - top, right - left
    return image.height, image.width
