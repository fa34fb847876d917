"""In: a picture in a file or a table, or a part of one. Out: its pixels or size, or one sentence on what is wrong."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from hirelc_deploy.errors import InputError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}
JPEG_END = b"\xff\xd9"
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
    """Return (height, width); raises InputError where a picture is broken or cut short."""
    try:
        with _opened(picture) as image:
            _check_whole(image)
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


def _check_whole(image: Image.Image) -> None:
    """Raise one of UNREADABLE where a picture is not all there.

    Decoding would tell, but takes milliseconds. A PNG has sums over its parts, and a JPEG ends with a mark of its own;
    only where that is not at the end, and for other formats, is the picture decoded.
    """
    if image.format == "PNG":
        image.verify()
        return
    stream: Any = getattr(image, "fp", None)
    if image.format == "JPEG" and stream is not None:
        place = stream.tell()
        stream.seek(0, io.SEEK_END)
        stream.seek(max(0, stream.tell() - 2))
        is_whole = stream.read() == JPEG_END
        stream.seek(place)
        if is_whole:
            return
    image.load()


def _size(picture: Picture, image: Image.Image) -> tuple[int, int]:
    if isinstance(picture, Region):
        left, top, right, bottom = picture.box
        return bottom - top, right - left
    return image.height, image.width
