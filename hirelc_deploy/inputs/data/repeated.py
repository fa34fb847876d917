"""In: the images of each split. Out: one sentence on those of the test that another split has too, byte for byte."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from hirelc_deploy.inputs.data.pictures import Picture
from hirelc_deploy.inputs.data.tar_member import Member

_Item = TypeVar("_Item")
END_BYTES = 64  # different pictures of one size rarely end alike, as their compressed pixels are there


def repeated_files(splits: Mapping[str, Sequence[Picture]]) -> tuple[str, ...]:
    """Compare files; only those that have the size and the end of another one are read whole."""
    alike = {split: [file for file in found if isinstance(file, Path | Member)] for split, found in splits.items()}
    for key in (_size, _end, _digest):
        alike = _shared(alike, key)
    return _said(alike, "")


def repeated_rows(splits: Mapping[str, NDArray[np.generic]]) -> tuple[str, ...]:
    """Compare the images of arrays."""
    places = {split: [(split, row) for row in range(len(pixels))] for split, pixels in splits.items()}
    alike = _shared(places, lambda place: hashlib.sha256(splits[place[0]][place[1]].tobytes()).digest())
    return _said({split: [row for _, row in found] for split, found in alike.items()}, "image ")


def _size(file: Path | Member) -> int:
    return file.size if isinstance(file, Member) else file.stat().st_size


def _end(file: Path | Member) -> bytes:
    with _opened(file) as content:
        content.seek(max(0, _size(file) - END_BYTES))
        return content.read()


def _digest(file: Path | Member) -> bytes:
    with _opened(file) as content:
        return hashlib.sha256(content.read()).digest()


def _opened(file: Path | Member) -> BinaryIO:
    return file.open() if isinstance(file, Member) else file.open("rb")


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
