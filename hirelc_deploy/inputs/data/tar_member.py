"""In: where the bytes of a member lie in a tar file. Out: them, as a file of its own, and its name."""

from __future__ import annotations

import io
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hirelc_deploy.errors import printable

MOST_CHARACTERS = 120
"""Of the name of a member in errors: one of a stranger may be of any length."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an uncompressed tar file: `size` bytes from `offset` on.

    It names itself as errors do, by what its header says: names are not kept in memory.
    """

    file: Path
    offset: int
    size: int

    def __str__(self) -> str:
        try:
            with open(self.file, "rb") as shard:
                shard.seek(self.offset - tarfile.BLOCKSIZE)
                header = shard.read(tarfile.BLOCKSIZE)
            name = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except (OSError, tarfile.TarError):
            name = f"the member at byte {self.offset}"
        return f"{self.file}, {shown(name)}"

    def open(self) -> io.BufferedReader:
        """Open it for reading, with a handle of its own, which no other thread or process shares."""
        return io.BufferedReader(_Part(self))


def shown(name: str) -> str:
    """Return the name of a member for one line of text; strangers may have given it."""
    return printable(name).replace("\n", "?").replace("\t", "?")[:MOST_CHARACTERS]


class _Part(io.RawIOBase):
    """The bytes of a member, read from its tar file when they are wanted."""

    def __init__(self, member: Member) -> None:
        self._shard = open(member.file, "rb", buffering=0)  # noqa: SIM115  # closed by close()
        self._start, self._size, self._place = member.offset, member.size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = max(0, self._size - self._place)
        self._shard.seek(self._start + self._place)
        count = self._shard.readinto(memoryview(buffer)[:left])
        self._place += count
        return count

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        self._place = place + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        if self._place < 0:
            raise ValueError("a place before the beginning of the file")
        return self._place

    def close(self) -> None:
        self._shard.close()
        super().close()
