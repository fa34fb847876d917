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
LOOKED_INTO_AT_ONCE = 4096  # pictures that wait for a thread, each with 2 KB: 2.6 GB for all of ImageNet
DEEP_LOOKED_AT = 16  # pictures of 16 bits by which it is told how many of the bits they use
DARK = 2**14  # below a quarter of what 16 bits hold: as of cameras and X-rays of 12 or 14 bits


def native_input(pictures: Sequence[Picture], geometry: str = "crop") -> tuple[Preprocess, tuple[str, ...]]:
    """Look into all pictures before the work starts.

    Returns:
        Their common size, or 224 x 224, as a model's input, and sentences on what people should know of them.
    """
    # All of them, so that a broken one is named before hours of work.
    sizes, notable = set(), list[tuple[Picture, Look]]()
    for picture, look in _looked_into(pictures):
        sizes.add(look.size)
        if look.turned or look.several or look.deep:
            notable.append((picture, look))
    height, width = sizes.pop() if len(sizes) == 1 else (224, 224)
    return dataclasses.replace(identity((3, height, width)), geometry=geometry), tuple(_notes(notable))


def _looked_into(pictures: Sequence[Picture]) -> Iterator[tuple[Picture, Look]]:
    """Yield each picture with what its head says.

    Files are read in threads, as most of it is waiting for them; tables keep the part that they read last, and are read
    in order.
    """
    with ThreadPoolExecutor() as threads:
        for start in range(0, len(pictures), LOOKED_INTO_AT_ONCE):
            some = pictures[start : start + LOOKED_INTO_AT_ONCE]
            in_order = any(isinstance(picture, Embedded) for picture in some)
            yield from zip(some, map(look_into, some) if in_order else threads.map(look_into, some), strict=True)


def _notes(notable: Sequence[tuple[Picture, Look]]) -> Iterator[str]:
    turned, several, deep = (
        [picture for picture, look in notable if getattr(look, what)] for what in ("turned", "several", "deep")
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
