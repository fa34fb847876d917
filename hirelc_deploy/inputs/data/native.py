"""In: the pictures of a data set. Out: the model input that suits them all, once it is known that they can be read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from hirelc_deploy.inputs.data.pictures import Embedded, Look, Picture, brightest, look_into
from hirelc_deploy.inputs.data.preprocess import Preprocess
from hirelc_deploy.inputs.data.splits import identity

_Item = TypeVar("_Item")
CHECKED_FILES = 5000  # image files whose headers are read before the work starts
DEEP_LOOKED_AT = 16  # pictures of 16 bits by which it is told how many of the bits they use
DARK = 2**14  # below a quarter of what 16 bits hold: as of cameras and X-rays of 12 or 14 bits


def native_input(pictures: Sequence[Picture], geometry: str = "crop") -> tuple[Preprocess, tuple[str, ...]]:
    """Look into all pictures before the work starts.

    Returns:
        Their common size, or 224 x 224, as a model's input, and sentences on what people should know of them.
    """
    # All of them, so that a broken one is named before hours of work. Files in threads, as most of it is waiting for
    # them; tables keep the part that they read last, and are read in order.
    if any(isinstance(picture, Embedded) for picture in pictures):
        looks = list(map(look_into, pictures))
    else:
        with ThreadPoolExecutor() as threads:
            looks = list(threads.map(look_into, pictures))
    sizes = {look.size for look in looks}
    height, width = sizes.pop() if len(sizes) == 1 else (224, 224)
    return dataclasses.replace(identity((3, height, width)), geometry=geometry), tuple(_notes(pictures, looks))


def _notes(pictures: Sequence[Picture], looks: Sequence[Look]) -> Iterator[str]:
    turned, several, deep = (
        [picture for picture, look in zip(pictures, looks, strict=True) if getattr(look, what)]
        for what in ("turned", "several", "deep")
    )
    if turned:
        yield f"{len(turned)} pictures are turned upright, as their EXIF data say, such as {turned[0]}"
    if several:
        yield f"{len(several)} files hold several pictures, of which the first is read, such as {several[0]}"
    if deep and (most := max(map(brightest, deep[:: max(1, len(deep) // DEEP_LOOKED_AT)]))) < DARK:
        yield (
            f"pictures of 16 bits reach {most} of 65535 and are read as dark, such as {deep[0]}; if their full "
            "range is smaller, save them with 8 bits"
        )


def checked(items: Sequence[_Item]) -> Sequence[_Item]:
    """Return at most twice `CHECKED_FILES` of them, spread over all."""
    return items[:: max(1, len(items) // CHECKED_FILES)]
