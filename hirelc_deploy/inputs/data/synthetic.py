"""In: a number. Out: so many random inputs, or random pictures, in each split, without labels."""

from __future__ import annotations

from typing import Any

import torch

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.geometry import Pairs
from hirelc_deploy.inputs.data.preprocess import Preprocess
from hirelc_deploy.inputs.data.splits import NATIVE_SPLITS, Data, identity
from hirelc_deploy.inputs.data.views import Indices, normalised

MOST_SYNTHETIC = 4096  # a split is kept in memory: 2.5 GB of 3 x 224 x 224


# Random inputs, and the data that ships with the package


def synthetic(count_text: str, seed: int, *, pixels: bool = False) -> Data:
    """Make random inputs; the model's input size is not known yet, so that they are made again by `preprocessed`.

    Args:
        pixels: They are random pixels, normalised as the model's input is; else inputs are standard normal.
    """
    spec = "pixels" if pixels else "synthetic"
    if not count_text.isdecimal() or not 1 <= int(count_text) <= MOST_SYNTHETIC:
        raise InputError(
            f"--data {spec}:{count_text}: give the number of random inputs in each split, 1 to {MOST_SYNTHETIC}."
        )
    count, native = int(count_text), identity((3, 224, 224))
    parts = {split: RandomImages(count, native, seed * 4 + index, pixels) for index, split in enumerate(NATIVE_SPLITS)}
    return Data(
        f"{spec}:{count}",
        (),
        parts["train"],
        parts["calibration"],
        parts["selection"],
        native,
        labelled=False,
        test_count=count,
        _test=parts["test"],
        kind="none",
    )


class RandomImages:
    """Standard normal inputs, or normalised random pixels, without labels; made when asked for and equal each time."""

    labels = None
    labelled = False
    decodes = False
    canvases = None

    def __init__(self, count: int, preprocess: Preprocess, seed: int, pixels: bool = False) -> None:
        self._count, self._preprocess, self._seed, self._pixels = count, preprocess, seed, pixels

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: Indices) -> torch.Tensor:
        """Return (b, channels, height, width) inputs."""
        return self.views(indices, 0)

    def views(self, indices: Indices, view: int) -> torch.Tensor:
        """Return other inputs for another view: noise has no crops."""
        generator, inputs = torch.Generator(), []
        for row in torch.as_tensor(indices, dtype=torch.int64).tolist():
            generator.manual_seed(((self._seed * 1_000_003 + view) * 1_000_003 + row) % 2**63)
            size = self._preprocess.input_size
            if self._pixels:
                inputs.append(torch.randint(0, 256, size, generator=generator, dtype=torch.uint8))
            else:
                inputs.append(torch.randn(size, generator=generator))
        return normalised(torch.stack(inputs), self._preprocess)

    def targets(self, indices: Indices, view: int | None = None) -> list[Any]:
        """Return None for each: nothing is known to be true of noise."""
        return [None] * len(indices)

    def name_of(self, row: int) -> str:
        """Return its number."""
        return f"random image {row}"

    def flipping(self, flips: bool, pairs: Pairs = ()) -> RandomImages:
        """Return the same inputs: noise has no sides."""
        return self

    def preprocessed(self, preprocess: Preprocess) -> RandomImages:
        """Return inputs of another size."""
        return RandomImages(self._count, preprocess, self._seed, self._pixels)
