"""In: CIFAR-10 as torchvision keeps it, or in the official binary form. Out: its images in four splits."""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.images import Labels
from hirelc_deploy.inputs.data.splits import Data, SplitSizes, array_data

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


# CIFAR-10 as torchvision keeps it, or in the official binary form


def read_cifar10(data_dir: Path | None, sizes: SplitSizes, seed: int) -> Data:
    """Read CIFAR-10 from the folder that holds it; raises InputError where it is not there or broken."""
    if data_dir is None:
        raise InputError("--data torch/cifar10: say with --data-dir which folder holds cifar-10-batches-py.")
    read: Callable[[Path], tuple[NDArray[np.uint8], Labels]]
    for name, suffix, read in (
        ("cifar-10-batches-py", "", _python_batch),
        ("cifar-10-batches-bin", ".bin", _binary_batch),
    ):
        for folder in (data_dir / name, data_dir):
            if (folder / f"test_batch{suffix}").is_file():
                batches = [read(folder / f"data_batch_{index}{suffix}") for index in range(1, 6)]
                train = np.concatenate([pixels for pixels, _ in batches]), np.concatenate([y for _, y in batches])
                arrays = {"train": train, "test": read(folder / f"test_batch{suffix}")}
                return array_data("cifar10", arrays, CIFAR10_CLASSES, sizes, seed)
    raise InputError(
        f"{data_dir}: neither cifar-10-batches-py nor cifar-10-batches-bin is in it; unpack the official archive "
        "there, or make an npz file with benchmarks/import_cifar10.py."
    )


def _binary_batch(file: Path) -> tuple[NDArray[np.uint8], Labels]:
    """Read records of one label byte and 3,072 pixel bytes (channel, row, column)."""
    try:
        raw = np.fromfile(file, np.uint8)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}).") from None
    if not len(raw) or len(raw) % 3073:
        raise InputError(f"{file}: {len(raw)} bytes are not whole records of 3,073; fetch the archive again.")
    records = raw.reshape(-1, 3073)
    return np.ascontiguousarray(records[:, 1:]).reshape(-1, 3, 32, 32), records[:, 0].astype(np.int64)


def _python_batch(file: Path) -> tuple[NDArray[np.uint8], Labels]:
    """Read a batch of the Python archive without running it.

    Such a file is a program that builds a dict. Only its constants are looked at: the pixels are its one long byte
    string, the labels the whole numbers behind the string `labels`.
    """
    pixels, labels, in_labels = b"", list[int](), False
    try:
        for opcode, constant, _ in pickletools.genops(file.read_bytes()):
            if isinstance(constant, str | bytes) and opcode.name != "GLOBAL":
                text = constant if isinstance(constant, bytes) else constant.encode("latin-1", "replace")
                in_labels = text == b"labels"
                pixels = max(pixels, text, key=len)
            elif in_labels and "INT" in opcode.name and isinstance(constant, int):
                labels.append(constant)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}).") from None
    except ValueError:
        pixels = b""
    if not labels or len(pixels) != 3072 * len(labels):
        raise InputError(f"{file}: not a batch of CIFAR-10; fetch the official archive again.")
    return np.frombuffer(pixels, np.uint8).reshape(-1, 3, 32, 32).copy(), np.array(labels, np.int64)
