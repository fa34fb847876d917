"""In: what went wrong. Out: exceptions whose text is a sentence for the user, with the exit code of the command."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

COMMAND = "\n  "
"""What stands in a message before a command that helps; the command line shows it on a line of its own."""


class HirelcError(Exception):
    """A problem the user can act on: the message says where, what was found, and what to do."""

    exit_code = 2


class InputError(HirelcError):
    """A model, data set, plan, option or file that cannot be used as given."""


class WidthError(InputError):
    """A model has another number of outputs than the data has classes."""


class SliceError(HirelcError):
    """A plan asks for a cut that this model cannot take."""


class ExportError(HirelcError):
    """A model could not be written as a file that computes what the model computes."""


class TargetUnavailable(HirelcError):  # noqa: N818  # said as one says it: the target is unavailable
    """The device, or the runtime on it, cannot be reached."""

    exit_code = 3


class ConstraintError(HirelcError):
    """No file can meet the limits the user set."""

    exit_code = 4


def printable(text: str) -> str:
    """Return a text of strangers (a board, a file) for a terminal: nothing in it can move the cursor or hide words."""
    return "".join(one if one.isprintable() or one in "\n\t" else "?" for one in text)


def home() -> Path:
    """Return the home folder, or the current one for a user who has none, as in a container with a bare number."""
    try:
        return Path.home()
    except RuntimeError:
        return Path.cwd()


def fullest(folders: Iterable[Path]) -> tuple[Path, int]:
    """Return the folder on whose disk least is free, and how many bytes; one that is not there yet may be given.

    A disk that takes no more files, however small, has nothing free.
    """
    free = {}
    for folder in folders:
        there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        files = os.statvfs(there)
        free[folder] = 0 if files.f_files and not files.f_favail else shutil.disk_usage(there).free
    folder = min(free, key=lambda one: free[one])
    return folder, free[folder]


def check_room(folder: Path, size: int) -> None:
    """Raise OSError where a file of so many bytes cannot be written in a folder, for libraries that do not say so."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(size))
