"""In: the pictures of a data set. Out: the model input that suits them all, once it is known that they can be read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from hirelc_deploy.inputs.data.pictures import Embedded, Picture, image_size
from hirelc_deploy.inputs.data.preprocess import Preprocess
from hirelc_deploy.inputs.data.splits import identity

_Item = TypeVar("_Item")
CHECKED_FILES = 5000  # image files whose headers are read before the work starts


def native_input(pictures: Sequence[Picture], geometry: str = "crop") -> Preprocess:
    """Look into all pictures before the work starts; return their common size, or 224 x 224."""
    # All of them, so that a broken one is named before hours of work. Files in threads, as most of it is waiting for
    # them; tables keep the part that they read last, and are read in order.
    if any(isinstance(picture, Embedded) for picture in pictures):
        sizes = set(map(image_size, pictures))
    else:
        with ThreadPoolExecutor() as threads:
            sizes = set(threads.map(image_size, pictures))
    height, width = sizes.pop() if len(sizes) == 1 else (224, 224)
    return dataclasses.replace(identity((3, height, width)), geometry=geometry)


def checked(items: Sequence[_Item]) -> Sequence[_Item]:
    """Return at most twice `CHECKED_FILES` of them, spread over all."""
    return items[:: max(1, len(items) // CHECKED_FILES)]
