"""In: a picture in a file or a table, or a part of one. Out: its pixels or size, or one sentence on what is wrong."""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import simplejpeg
from PIL import Image

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.tar_member import Member

NO_PICTURES = {".bufr", ".eps", ".grib", ".h5", ".hdf", ".mpeg", ".mpg", ".ps", ".emf", ".wmf"}
"""Pillow names these, but reads them not at all, or only with other programs beside it."""

JUNK = {
    "thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found",
}  # fmt: skip
"""What file managers and archives put into folders of pictures, beside hidden files and folders. Nobody misses it."""

MOST_KINDS = 12
"""Suffixes that a sentence names: a stranger's archive may have any number of them."""

DEEP_FORMATS = {"PNG", "PPM"}
"""Formats whose whole numbers (mode I) are of 16 bits."""

ORIENTED = {"JPEG", "MPO", "WEBP", "AVIF"}
"""Formats that say before their pixels how they are held upright. Pillow turns TIFF files itself."""

ORIENTATION, SIDEWAYS = 0x0112, 5
"""EXIF's number for how a picture is held; from 5 on, rows are its columns."""

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How a picture is held, to what turns it upright."""

JPEG_END = b"\xff\xd9"
FINER = 2
"""A picture decoded at a reduced size is still so many times as large as it is wanted, as are Pillow's thumbnails."""

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


class Look(NamedTuple):
    """What the head of a picture says: its (height, width) upright, and what people should know of it."""

    size: tuple[int, int]
    turned: bool
    several: bool
    """It has more pages or frames than one."""
    deep: bool
    """Its pixels have 16 bits."""


Picture = Path | Embedded | Member | Region
_Name = TypeVar("_Name", bound=Hashable)


def read_image(picture: Picture, channels: int = 3) -> Image.Image:
    """Decode a picture, upright, as RGB (or grey for one channel); raises InputError for one that is not readable."""
    try:
        with _opened(picture) as image:
            upright = _upright(image)
            part = upright.crop(picture.box) if isinstance(picture, Region) else upright
            return eight_bits(part, channels, str(picture), image.format)
    except UNREADABLE as error:
        raise InputError(f"{picture}: not a readable image ({error}); replace or remove it.") from None


def read_reduced(
    picture: Picture, wanted: Callable[[int, int], tuple[int, int]], channels: int = 3
) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode a picture as `read_image` does, but a JPEG file at a half, a quarter or an eighth where that is enough.

    Args:
        wanted: From the picture's height and width to those that it will be resized to.

    Returns:
        (height, width, channels) or, of one channel, (height, width) uint8 pixels, at least `FINER` times as large as
        wanted where they were reduced, and the picture's own (height, width).
    """
    try:
        with _opened(picture) as image:
            size = _size(picture, image)
            if isinstance(picture, Region):  # its box is in the pixels of the whole picture
                part = _upright(image).crop(picture.box)
                return np.asarray(eight_bits(part, channels, str(picture), image.format)), size
            height, width = wanted(*size)
            held = _held(image)
            stored = (height, width) if held >= SIDEWAYS else (width, height)
            image.draft(None, (FINER * stored[0], FINER * stored[1]))  # None: the colours stay
            pixels = _jpeg_pixels(image) if channels == 3 and held not in UPRIGHT else None
            if pixels is None:
                pixels = np.asarray(eight_bits(_upright(image), channels, str(picture), image.format))
            return pixels, size
    except UNREADABLE as error:
        raise InputError(f"{picture}: not a readable image ({error}); replace or remove it.") from None


def eight_bits(image: Image.Image, channels: int, where: str, kind: str | None = None) -> Image.Image:
    """Return a picture as 8-bit RGB, or grey for one channel; one of 16 bits is scaled.

    Args:
        where: What to call it in errors.
        kind: Its format, as Pillow calls it.

    Raises:
        InputError: The model takes another number of channels, or nobody knows what its numbers mean.
    """
    if channels not in (1, 3):
        raise InputError(
            f"{where}: a picture has 1 or 3 channels, but the model's input has {channels}; give such inputs as floats "
            "(data sets of Python, or .npz), or --input-size with 1 or 3 channels."
        )
    if _is_deep(image, kind):
        values = np.asarray(image) / 257  # Pillow's `convert` would cut 16 bits off at 255
        image = Image.fromarray(np.rint(values).clip(0, 255).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise InputError(
            f"{where}: its pixels are {'32-bit whole numbers' if image.mode == 'I' else 'floats'}, whose range nobody "
            "knows; save it with 8 or 16 bits, or give the data as .npz."
        )
    mode = "L" if channels == 1 else "RGB"
    if image.mode == mode:  # for which `convert` would copy all pixels
        image.load()
        return image
    return image.convert(mode)


def look_into(picture: Picture) -> Look:
    """Return what the head of a picture says; raises InputError where a picture is broken or cut short."""
    try:
        with _opened(picture) as image:
            several = image.format != "MPO" and bool(getattr(image, "is_animated", False))  # MPO: a photo and previews
            found = Look(_size(picture, image), _held(image) in UPRIGHT, several, _is_deep(image, image.format))
            _check_whole(image)
            return found
    except UNREADABLE as error:
        raise InputError(f"{picture}: not a readable image ({error}); replace or remove it.") from None


def stated_size(picture: Picture) -> tuple[int, int]:
    """Return (height, width) as the first bytes of a picture say it; much faster than `look_into`."""
    try:
        with _opened(picture) as image:
            return _size(picture, image)
    except UNREADABLE as error:
        raise InputError(f"{picture}: not a readable image ({error}); replace or remove it.") from None


def brightest(picture: Picture) -> int:
    """Return the highest number of a picture of 16 bits, as it is stored."""
    with _opened(picture) as image:
        return int(np.asarray(image).max())


def pictures_in(folder: Path) -> list[Path]:
    """Return the files in a folder and in those below it that Pillow reads by their names, sorted."""
    suffixes = picture_suffixes()
    return [file for file in files_in(folder) if file.suffix.lower() in suffixes]


def left_out(folders: Sequence[Path], labels: Sequence[str] = ()) -> tuple[str, ...]:
    """Return one sentence on the files in folders that are no pictures by their names; none where all are.

    Args:
        labels: Suffixes of files beside pictures that are read otherwise.
    """
    suffixes = picture_suffixes()
    others = Counter(
        file.suffix.lower()
        for folder in folders
        for file in files_in(folder)
        if file.suffix.lower() not in suffixes and file.suffix.lower() not in labels
    )
    return no_pictures(others)


def no_pictures(others: Mapping[str, int]) -> tuple[str, ...]:
    """Return one sentence on files that were left out, from their suffixes to how many there are; none without any."""
    if not others:
        return ()
    most = Counter(others).most_common(MOST_KINDS)
    kinds = ", ".join(f"{count} {kind or 'without a suffix'}" for kind, count in most)
    kinds += ", and others" if len(others) > len(most) else ""
    return (f"{sum(others.values())} files are left out, as Pillow reads no pictures by these names: {kinds}",)


def none_in(folder: Path) -> InputError:
    """Return the error for a folder without pictures."""
    text = "".join(f" ({sentence})" for sentence in left_out([folder]))
    return InputError(f"{folder}: no images in it{text}; add pictures of a format that Pillow reads, such as .png.")


@functools.cache
def picture_suffixes() -> frozenset[str]:
    """Return the suffixes of all files that the installed Pillow decodes, in lower case."""
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, kind in known.items() if kind in Image.OPEN) - NO_PICTURES


def is_junk(name: str) -> bool:
    """Return whether a file or folder of this name is hidden, or was left by a file manager."""
    return name.startswith(".") or name.lower() in JUNK


def files_in(folder: Path) -> list[Path]:
    """Return the files in a folder and in those below it, sorted; links are followed, and junk is passed by.

    A link that leads nowhere is among them, so that whoever reads it names it.
    """
    found, seen = list[Path](), set[str]()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_cannot_look):
        real = os.path.realpath(place)
        folders[:] = [name for name in folders if not is_junk(name) and real not in seen]
        files = [Path(place, name) for name in names if not is_junk(name) and real not in seen]
        found += [file for file in files if file.is_file() or file.is_symlink()]
        seen.add(real)  # a link may lead to a folder around it
    return sorted(found)


def by_name(files: Iterable[Path], name: Callable[[Path], _Name]) -> dict[_Name, Path]:
    """Return files by a name that others call them by; raises InputError where two have the same."""
    found: dict[_Name, Path] = {}
    for file in files:
        if found.setdefault(name(file), file) != file:
            raise InputError(f"{found[name(file)]} and {file}: both are called {name(file)}; remove or rename one.")
    return found


def folders_in(folder: Path) -> list[Path]:
    """Return the folders right in a folder, sorted; junk is passed by."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not is_junk(entry.name))


def passed_by(folder: Path, taken: Collection[Path]) -> tuple[str, ...]:
    """Return one sentence on the folders in a folder that are not among those that were taken for splits."""
    others = [place.name for place in folders_in(folder) if place not in taken]
    return (f"{folder}: {', '.join(others)} is left out, as it names no split",) if others else ()


def _cannot_look(error: OSError) -> None:
    if isinstance(error, FileNotFoundError):  # nothing in it
        return
    raise InputError(f"{error.filename}: this folder cannot be read ({error.strerror}); allow it, or remove it.")


@contextlib.contextmanager
def _opened(picture: Picture) -> Iterator[Image.Image]:
    with contextlib.ExitStack() as opened:
        source: Any = picture.file if isinstance(picture, Region) else picture
        if isinstance(picture, Embedded | Member):
            source = opened.enter_context(picture.open())  # Pillow closes only what it opened itself
        yield opened.enter_context(Image.open(source))


def _jpeg_pixels(image: Image.Image) -> np.ndarray | None:
    """Return the pixels that Pillow would decode from a JPEG file, sooner; None where that is not sure.

    Both use libjpeg-turbo, and agree in every bit. A file that is broken or cut short is left to Pillow, whose errors
    people know.
    """
    stream: Any = getattr(image, "fp", None)
    if image.format != "JPEG" or image.mode != "RGB" or stream is None:
        return None
    stream.seek(0)
    try:
        pixels = simplejpeg.decode_jpeg(stream.read(), min_height=image.height, min_width=image.width)
    except ValueError:
        return None
    return pixels if pixels.shape == (image.height, image.width, 3) else None


def _is_deep(image: Image.Image, kind: str | None) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and kind in DEEP_FORMATS)


def _held(image: Image.Image) -> int:
    """Return EXIF's number for how a picture is held; 1 is upright."""
    if image.format not in ORIENTED:
        return 1
    try:
        held = image.getexif().get(ORIENTATION)
    except Exception:  # broken EXIF data raise anything; the pixels are good
        return 1
    return held if isinstance(held, int) and held in UPRIGHT else 1


def _upright(image: Image.Image) -> Image.Image:
    turn = UPRIGHT.get(_held(image))
    return image if turn is None else image.transpose(turn)


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
    return (image.width, image.height) if _held(image) >= SIDEWAYS else (image.height, image.width)
