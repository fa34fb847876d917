"""In: the pictures of a data set. Out: the model input that suits them all, once it is known that they can be read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

from hirelc_deploy.inputs.data.pictures import Picture, image_size
from hirelc_deploy.inputs.data.preprocess import Preprocess
from hirelc_deploy.inputs.data.splits import identity

_Item = TypeVar("_Item")
CHECKED_FILES = 5000  # image files whose headers are read before the work starts


def native_input(pictures: Sequence[Picture], geometry: str = "crop") -> Preprocess:
    """Look into pictures spread over the whole set before the work starts; return their common size, or 224 x 224."""
    sizes = {image_size(picture) for picture in checked(pictures)}
    height, width = sizes.pop() if len(sizes) == 1 else (224, 224)
    return dataclasses.replace(identity((3, height, width)), geometry=geometry)


def checked(items: Sequence[_Item]) -> Sequence[_Item]:
    """Return at most twice `CHECKED_FILES` of them, spread over all."""
    return items[:: max(1, len(items) // CHECKED_FILES)]
