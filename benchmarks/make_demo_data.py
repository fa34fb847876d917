"""Cut the demo's slice out of CIFAR-10 and write it as image sheets beside the demo's model.

    python benchmarks/make_demo_data.py cifar10.npz

`cifar10.npz` comes from benchmarks/import_cifar10.py. The slice is chosen by rule, never by looking at a model:

    test         the first 2,000 images of the test split
    selection    the last 2,000 images of the test split: the network from which the demo's was made has seen every
                 training image, so only others can tell what a cut costs on images nobody has seen
    calibration  256 of the last 5,000 training images: classes in turn, earliest image first
    train        the first 800 images of each class among the first 45,000 training images

A sheet holds 32 x 32 tiles, row by row. Test, selection and calibration are lossless WebP (1,680 bytes an image, a
third less than PNG). Training images are JPEG of quality 85 without chroma subsampling (480 bytes an image, 5 grey
levels off in the mean square): the network only has to answer to them as its uncut twin does, and more pictures teach
more.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

TEST, CALIBRATION, SELECTION, TRAIN_PER_CLASS = 2000, 256, 2000, 800
COLUMNS = {"test": 40, "calibration": 16, "selection": 40, "train": 50}
FOLDER = Path(__file__).resolve().parent.parent / "hirelc_deploy" / "demo"


def main() -> None:
    """Write four sheets and their labels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="cifar10.npz")
    with np.load(parser.parse_args().images) as cifar10:
        x, y = cifar10["x_train"], cifar10["y_train"].astype(np.int64)
        test = cifar10["x_test"][:TEST], cifar10["y_test"][:TEST]
        selection = cifar10["x_test"][-SELECTION:], cifar10["y_test"][-SELECTION:]
    held = 45000 + np.lexsort((y[45000:], rank_within_class(y[45000:])))[:CALIBRATION]
    train = np.flatnonzero(rank_within_class(y[:45000]) < TRAIN_PER_CLASS)
    parts = {"train": (x[train], y[train]), "calibration": (x[held], y[held]), "selection": selection, "test": test}
    for name, (images, _) in parts.items():
        picture = Image.fromarray(sheet(images, COLUMNS[name]))
        if name == "train":
            file = FOLDER / "train.jpg"
            picture.save(file, "JPEG", quality=85, subsampling=0, optimize=True)
        else:
            file = FOLDER / f"{name}.webp"
            picture.save(file, "WEBP", lossless=True, quality=100, method=6)
        print(f"{file}: {len(images)} images, {file.stat().st_size} bytes")
    labels = {name: labels.tolist() for name, (_, labels) in parts.items()}
    (FOLDER / "labels.json").write_text(json.dumps(labels, separators=(",", ":")) + "\n", "utf-8")


def rank_within_class(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return (n,): how many earlier images have the same label."""
    rank = np.empty_like(labels)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        rank[rows] = np.arange(len(rows))
    return rank


def sheet(images: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """Tile (n, 32, 32, 3) images, `columns` a row."""
    rows = len(images) // columns
    return images.reshape(rows, columns, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(rows * 32, columns * 32, 3)


if __name__ == "__main__":
    main()
