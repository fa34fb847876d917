"""In: the images of each split. Out: one sentence on those of the test that another split has too, byte for byte."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from hirelc_deploy.inputs.data.pictures import Picture

_Item = TypeVar("_Item")


def repeated_files(splits: Mapping[str, Sequence[Picture]]) -> tuple[str, ...]:
    """Compare files; only those that have the size of another one are read."""
    files = {split: [file for file in found if isinstance(file, Path)] for split, found in splits.items()}
    of_one_size = _shared(files, _size)
    alike = _shared(of_one_size, _digest)
    return _said(alike, "")


def repeated_rows(splits: Mapping[str, NDArray[np.generic]]) -> tuple[str, ...]:
    """Compare the images of arrays."""
    places = {split: [(split, row) for row in range(len(pixels))] for split, pixels in splits.items()}
    alike = _shared(places, lambda place: hashlib.sha256(splits[place[0]][place[1]].tobytes()).digest())
    return _said({split: [row for _, row in found] for split, found in alike.items()}, "image ")


def _size(file: Path) -> int:
    return file.stat().st_size


def _digest(file: Path) -> bytes:
    return hashlib.sha256(file.read_bytes()).digest()


def _shared(splits: Mapping[str, Sequence[_Item]], key: Callable[[_Item], Hashable]) -> dict[str, list[_Item]]:
    """Return the items of each split whose key the test has and another split too."""
    keys = {split: list(map(key, found)) for split, found in splits.items()}
    both = set(keys["test"]) & {one for split, found in keys.items() if split != "test" for one in found}
    return {
        split: [item for item, one in zip(found, keys[split], strict=True) if one in both]
        for split, found in splits.items()
    }


def _said(alike: Mapping[str, Sequence[object]], word: str) -> tuple[str, ...]:
    test = alike["test"]
    if not test:
        return ()
    others = " and ".join(split for split, found in alike.items() if found and split != "test")
    return (
        f"{len(test)} images of the test are in {others} too, byte for byte, such as {word}{test[0]}; what was learned "
        "by heart counts as right there",
    )
