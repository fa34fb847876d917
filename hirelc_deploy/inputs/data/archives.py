"""In: an .npz archive, which may come from a stranger. Out: its arrays; never more memory than was allowed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hirelc_deploy.errors import InputError


def memory_bytes() -> int:
    """Return the memory of this machine: what unpacks to more cannot be worked with here."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not told here
        return 1 << 40


def read_arrays(file: Path, most_bytes: int) -> dict[str, NDArray[Any]]:
    """Return the arrays of an archive by name.

    Args:
        most_bytes: What they may take together; the archive's own directory is asked before anything is unpacked, and
            nothing unpacks to more than it says.

    Raises:
        InputError: The file is missing, no archive of plain arrays, damaged, or larger than allowed when unpacked.
    """
    if not file.exists():
        raise InputError(f"{file}: no such file.")
    if not file.is_file():
        raise InputError(f"{file}: not readable as an .npz archive: it is a folder or a device; name a file.")
    try:
        with np.load(file, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise InputError(f"{file}: a single array, not an .npz archive.")
            assert archive.zip is not None
            size = sum(int(entry.file_size) for entry in archive.zip.infolist())
            if size > most_bytes:
                raise InputError(
                    f"{file}: unpacks to {size / 1e9:.1f} GB, of which at most {most_bytes / 1e9:.1f} GB can be taken."
                )
            return {name: _plain(archive[name]) for name in archive.files}
    except InputError:
        raise
    except Exception as error:  # zip, zlib and numpy share no base for what a broken or hostile file makes them raise
        reason = "it holds Python objects" if "allow_pickle" in str(error) else f"{error}" or type(error).__name__
        raise InputError(f"{file}: not readable as an .npz archive of plain arrays ({reason:.200}).") from None


def _plain(value: Any) -> NDArray[Any]:
    """Return a member that is an array; numpy hands out others as bytes."""
    if not isinstance(value, np.ndarray):
        raise ValueError("a member is no array")  # noqa: TRY004 - the caller turns it into a sentence
    return value
