"""In: WebDataset shards. Out: where in them the picture of each sample lies, and its class; nothing is unpacked."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, overload

import numpy as np
from numpy.typing import NDArray

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.images import Labels
from hirelc_deploy.inputs.data.pictures import is_junk, picture_suffixes
from hirelc_deploy.inputs.data.tar_member import Member, shown

PLACE = np.dtype([("shard", np.int32), ("offset", np.int64), ("size", np.int64)])
"""Where a picture lies: the number of its shard, and the bytes in it. 20 bytes, and 8 of its class."""

COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")
"""How files of gzip, bzip2, xz, zstd and lz4 begin."""

LABEL = ".cls"
LABEL_DIGITS = 18  # what an int64 holds
LABEL_BYTES = 64  # a label, with white space around it
END_BYTES = 2**20  # what is looked at behind the last member: tar fills up with zeros, to 10,240 bytes as a rule


class ShardPictures(Sequence[Member]):
    """Pictures in shards. Only their places are in memory: one is made a `Member` when it is asked for."""

    def __init__(self, files: Sequence[Path], places: NDArray[np.void]) -> None:
        """Take the shards and (n,) `PLACE`."""
        self._files, self._places = files, places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, rows: int) -> Member: ...

    @overload
    def __getitem__(self, rows: slice) -> ShardPictures: ...

    def __getitem__(self, rows: int | slice) -> Member | ShardPictures:
        if isinstance(rows, slice):
            return ShardPictures(self._files, self._places[rows])
        shard, offset, size = self._places[rows].item()
        return Member(self._files[shard], offset, size)

    def at(self, rows: NDArray[np.int64]) -> ShardPictures:
        """Return the pictures in (k,) rows."""
        return ShardPictures(self._files, self._places[rows])


@dataclass(frozen=True)
class Index:
    """What shards hold: (n,) `PLACE` of pictures in the order of the shards, (n,) classes, and what else there is."""

    places: NDArray[np.void]
    labels: Labels
    others: Mapping[str, int]
    """Suffixes of files that are neither, to how many there are."""


def indexed(files: Sequence[Path]) -> Index:
    """Read the index of shards, which are plain tar files.

    Files that have one name up to the first dot are a sample, in the order of their first ones. Of each the picture and
    `.cls` are taken, the class as text.

    Raises:
        InputError: A shard is no plain tar file, or cut short, or a sample has not one picture and one class.
    """
    places, labels, others = [np.zeros(0, PLACE)], [np.zeros(0, np.int64)], Counter[str]()
    for number, file in enumerate(files):
        found = _samples(file, others)
        shard = np.zeros(len(found), PLACE)
        shard["shard"] = number
        shard["offset"], shard["size"] = [one.offset for one in found], [one.size for one in found]
        places.append(shard)
        labels.append(np.array([one.label for one in found], np.int64))
    return Index(np.concatenate(places), np.concatenate(labels), others)


@dataclass(slots=True)
class _Sample:
    """What was found of a sample so far; -1 stands for what is missing."""

    offset: int = -1
    size: int = 0
    label: int = -1


def _samples(file: Path, others: Counter[str]) -> list[_Sample]:
    """Return the samples of a shard, and count its other files."""
    samples: dict[str, _Sample] = {}
    suffixes = picture_suffixes()
    try:
        with open(file, "rb") as content:
            for member, key, suffix in _members(file, content):
                is_label = suffix == LABEL
                if not is_label and suffix not in suffixes:
                    others[shown(suffix)] += 1
                    continue
                if not member.isreg() or member.issparse():
                    raise InputError(
                        f"{_called(file, key)}: its {suffix} is stored as a link, sparse or no file at all; make the "
                        "shard again with tar --dereference --hard-dereference."
                    )
                sample = samples.setdefault(key, _Sample())
                if (sample.label if is_label else sample.offset) >= 0:
                    raise InputError(
                        f"{_called(file, key)}: has two {'classes' if is_label else 'pictures'}, the second one "
                        f"{suffix}; files are one sample up to the first dot of their names, so remove or rename one."
                    )
                if is_label:
                    content.seek(member.offset_data)
                    sample.label = _label(content.read(min(member.size, LABEL_BYTES)), file, key)
                else:
                    sample.offset, sample.size = member.offset_data, member.size
    except InputError:
        raise
    except Exception as error:  # tarfile has no base for what a broken or hostile file makes it raise
        reason = shown(" ".join(f"{error}".split())) or type(error).__name__
        raise InputError(f"{file}: not readable as a tar file ({reason}); fetch or make it again.") from None
    _check_complete(file, samples)
    return list(samples.values())


def _check_complete(file: Path, samples: Mapping[str, _Sample]) -> None:
    for key, sample in samples.items():
        if sample.label < 0:
            raise InputError(f"{_called(file, key)}: has no {LABEL} beside its picture; add its class as text.")
        if sample.offset < 0:
            raise InputError(
                f"{_called(file, key)}: has a {LABEL}, but no picture; add one that Pillow reads, such as .jpg."
            )


def _members(file: Path, content: BinaryIO) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """Yield each file of a shard with its name up to the first dot, and its suffix in lower case; junk is passed by."""
    if content.read(8).startswith(COMPRESSED):
        raise InputError(f"{file}: is compressed; unpack it (gunzip, unxz, unzstd), as pictures are read out of order.")
    content.seek(0)
    with tarfile.open(fileobj=content, mode="r:") as shard:
        while (member := shard.next()) is not None:
            shard.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
            if shard.offset <= member.offset or member.size < 0:
                raise tarfile.ReadError("a member ends before it begins")
            if member.isdir() or any(is_junk(part) for part in member.name.split("/") if part.strip(".")):
                continue
            folder, slash, name = member.name.rpartition("/")
            stem, dot, suffix = name.partition(".")
            yield member, folder + slash + stem, dot + suffix.lower()
        content.seek(shard.offset)
        end = content.read(END_BYTES)
        if len(end) < tarfile.BLOCKSIZE or end.strip(b"\0"):
            raise InputError(
                f"{file}: from byte {shard.offset} on it is cut short or damaged, or another tar file follows; fetch "
                "or make it again."
            )


def _label(content: bytes, file: Path, key: str) -> int:
    text = content.strip()
    if not text.isdigit() or len(text) > LABEL_DIGITS:
        words = shown(text.decode("utf-8", "replace"))
        raise InputError(
            f"{_called(file, key)}: its {LABEL} holds {words!r:.40}; give the class as a whole number from 0, as text."
        )
    return int(text)


def _called(file: Path, key: str) -> str:
    return f"{file}, sample {shown(key)}"
