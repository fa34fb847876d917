"""In: the images of a split. Out: preprocessed batches of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from hirelc_deploy.inputs.data.images import Images
from hirelc_deploy.inputs.data.loader import JUDGED, Wanted, loaded
from hirelc_deploy.inputs.data.splits import Data


def batches(images: Images, size: int, limit: int | None = None) -> Iterator[Tensor]:
    """Return preprocessed images, in order, at most `size` at a time and `limit` in all."""
    count = len(images) if limit is None else min(limit, len(images))
    wanted = (Wanted(np.arange(start, min(start + size, count)), JUDGED) for start in range(0, count, size))
    return (batch.pictures for batch in loaded(images, wanted))


def two_images(data: Data) -> Tensor:
    """Return (2, channels, height, width): two calibration images."""
    return data.calibration.batch(np.arange(2) % len(data.calibration))
