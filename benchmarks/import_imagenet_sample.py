"""Makes an .npz of 1,000 ImageNet images, one of each class, with splits for calibration, selection and test.

    python benchmarks/import_imagenet_sample.py imagenet-sample-1000.zip --out imagenet.npz
    hirelc-deploy apply --model mobilenetv2_100 --data npz:imagenet.npz ...

The archive holds WNID/CLASS.jpg with a short side of 256 (the public images of EliSchwartz/imagenet-sample-images). The
middle 256 x 256 of each is kept, out of which a model takes its middle 224: the usual evaluation. 200 classes, picked
at random, are for calibration and importance, 200 for selection, 600 for the test; --turn 1 to 4 moves on by 200, so
that over five turns every image is in the test three times. The images are almost certainly training images: drops and
agreement mean something here, accuracies do not. ImageNet's terms apply.
"""

from __future__ import annotations

import argparse
import io
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 256
CLASSES = 1000
SPLITS = {"train": (0, 200), "calibration": (0, 200), "selection": (200, 400), "test": (400, 1000)}
"""Rows of a random order that make a split. Nothing is trained: `train` is there for importance alone."""


def main() -> None:
    """Read the archive and write the .npz."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--out", type=Path, default=Path("imagenet.npz"))
    parser.add_argument("--turn", type=int, default=0, help="which 200 images come first")
    options = parser.parse_args()
    try:
        with zipfile.ZipFile(options.archive) as archive:
            files = {int(Path(name).stem): archive.read(name) for name in archive.namelist() if name.endswith(".jpg")}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        sys.exit(f"{options.archive}: not an archive of WNID/CLASS.jpg ({error}).")
    if sorted(files) != list(range(CLASSES)):
        sys.exit(f"{options.archive}: {len(files)} images, expected one of each of {CLASSES} classes.")
    images = np.stack([middle(files[label]) for label in range(CLASSES)])
    order = np.roll(np.random.default_rng(0).permutation(CLASSES), -SPLITS["calibration"][1] * options.turn)
    arrays = {"classes": np.array([str(label) for label in range(CLASSES)])}
    for split, (start, end) in SPLITS.items():
        arrays |= {f"x_{split}": images[order[start:end]], f"y_{split}": order[start:end].astype(np.int64)}
    np.savez_compressed(options.out, **arrays)
    print(f"{options.out}: {options.out.stat().st_size} bytes")


def middle(data: bytes) -> np.ndarray:
    """Return the middle (256, 256, 3) of a picture."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    left, top = (picture.width - SIDE) // 2, (picture.height - SIDE) // 2
    return np.asarray(picture.crop((left, top, left + SIDE, top + SIDE)))


if __name__ == "__main__":
    main()
