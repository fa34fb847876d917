"""In: an image file. Out: its pixels or its size, or one sentence on what is wrong with it."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from hirelc_deploy.errors import InputError

_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # SyntaxError: a broken PNG chunk


def read_image(file: Path, channels: int = 3) -> Image.Image:
    """Decode an image file as RGB (or grey for one channel); raises InputError naming a file that is not readable."""
    try:
        with Image.open(file) as image:
            return image.convert("L" if channels == 1 else "RGB")
    except _UNREADABLE as error:
        raise InputError(f"{file}: not a readable image ({error}); replace or remove it.") from None


def image_size(file: Path) -> tuple[int, int]:
    """Return (height, width); raises InputError where a file is broken as far as can be told without decoding it."""
    try:
        with Image.open(file) as image:
            image.verify()
            return image.height, image.width
    except _UNREADABLE as error:
        raise InputError(f"{file}: not a readable image ({error}); replace or remove it.") from None
