"""In: nothing. Out: the slice of CIFAR-10 that ships with the package."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hirelc_deploy.inputs.data.cifar10 import CIFAR10_CLASSES
from hirelc_deploy.inputs.data.images import Labels
from hirelc_deploy.inputs.data.pictures import read_image
from hirelc_deploy.inputs.data.splits import Data, SplitSizes, array_data


def read_demo(seed: int) -> Data:
    """Read the slice of CIFAR-10 that ships with the package; see demo/DATA.md."""
    folder = Path(__file__).parents[2] / "demo"
    arrays: dict[str, tuple[NDArray[np.generic], Labels]] = {}
    for split, labels in json.loads((folder / "labels.json").read_text("utf-8")).items():
        sheet = np.asarray(read_image(next(folder.glob(f"{split}.[wj]*"))))
        arrays[split] = _tiles(sheet)[: len(labels)], np.array(labels, np.int64)
    return array_data("demo", arrays, CIFAR10_CLASSES, SplitSizes(), seed)


def _tiles(sheet: NDArray[np.uint8], side: int = 32) -> NDArray[np.uint8]:
    """Cut (rows * side, columns * side, 3) into (rows * columns, 3, side, side), row by row."""
    rows, columns = sheet.shape[0] // side, sheet.shape[1] // side
    return np.ascontiguousarray(
        sheet.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, side, side)
    )
