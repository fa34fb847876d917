"""In: what the user wrote behind --data. Out: four disjoint splits of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from hirelc_deploy.config import JobConfig
from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.cifar10 import read_cifar10
from hirelc_deploy.inputs.data.coco import read_coco
from hirelc_deploy.inputs.data.csv_file import read_csv
from hirelc_deploy.inputs.data.datasets import read_factory
from hirelc_deploy.inputs.data.demo import read_demo
from hirelc_deploy.inputs.data.hf_data import read_hf_data
from hirelc_deploy.inputs.data.image_folder import read_image_folder
from hirelc_deploy.inputs.data.masks import read_masks
from hirelc_deploy.inputs.data.npz import read_npz
from hirelc_deploy.inputs.data.splits import Data, SplitSizes
from hirelc_deploy.inputs.data.synthetic import synthetic
from hirelc_deploy.inputs.data.voc import read_voc
from hirelc_deploy.inputs.data.webdataset import read_webdataset
from hirelc_deploy.inputs.data.yolo import read_yolo

SUPPORTED = (
    "npz:FILE, imagefolder:DIR, webdataset:DIR, coco:FILE.json, yolo:DIR, voc:DIR, masks:DIR, csv:FILE, hfdata:DIR, "
    "FILE.py:FACTORY, torch/cifar10 with --data-dir, synthetic:N, pixels:N, demo"
)
NO_DATA = "pixels:64"
"""What stands in where nobody gives data: ranges of 64 pictures are no longer doubtful, and they take little time."""

Reader = Callable[[Path, SplitSizes, int, Mapping[str, str], Path | None], Data]
READERS: dict[str, tuple[Reader, tuple[str, ...]]] = {
    "npz": (lambda path, sizes, seed, _, __: read_npz(path, sizes, seed), ()),
    "imagefolder": (lambda path, sizes, seed, _, __: read_image_folder(path, sizes, seed), ()),
    "webdataset": (lambda path, sizes, seed, options, _: read_webdataset(path, sizes, seed, options), ("classes",)),
    "coco": (lambda path, sizes, seed, options, folder: read_coco(path, folder, sizes, seed, options), ("kind",)),
    "yolo": (lambda path, sizes, seed, options, _: read_yolo(path, sizes, seed, options), ("classes",)),
    "voc": (lambda path, sizes, seed, options, _: read_voc(path, sizes, seed, options), ("classes",)),
    "masks": (
        lambda path, sizes, seed, options, _: read_masks(path, sizes, seed, options),
        ("classes", "kind", "void", "scale"),
    ),
    "csv": (lambda path, sizes, seed, options, _: read_csv(path, sizes, seed, options), ("classes",)),
    "hfdata": (
        lambda path, sizes, seed, options, _: read_hf_data(path, sizes, seed, options),
        ("classes", "image", "label", "boxes", "void"),
    ),
}
"""Format to its reader and the options that may follow the path."""


def configured_data(config: JobConfig) -> Data:
    """Load the data set that a job names, in its splits; see `load_data`."""
    return load_data(
        config.data.spec,
        data_dir=Path(config.data.directory) if config.data.directory else None,
        calibration_images=config.data.calibration_images,
        selection_images=config.data.selection_images,
        seed=config.seed,
    )


def load_data(
    spec: str,
    *,
    data_dir: Path | None = None,
    calibration_images: int | None = None,
    selection_images: int | None = None,
    seed: int = 0,
) -> Data:
    """Open the data set that `spec` names; every problem with it is an InputError of one sentence.

    The images come in their own size, scaled to [0, 1]; `Data.preprocessed` adapts them to a model.

    Args:
        spec: `npz:FILE`, `imagefolder:DIR`, `webdataset:DIR`, `coco:FILE.json` or `coco:DIR`, `yolo:DIR` or
            `yolo:data.yaml`, `voc:DIR`, `masks:DIR`, `csv:FILE`, `hfdata:DIR`, `FILE.py:FACTORY` (returns data sets of
            Python), `torch/cifar10`, `synthetic:N` (N random inputs in each split), `pixels:N` (N random pictures), or
            `demo`. From `webdataset` to `hfdata`, options may follow, each after a comma, as in `masks:camvid,void=11`;
            the reader of a format says which there are.
        data_dir: Where `torch/cifar10` lies: the folder with cifar-10-batches-py (or -bin) in it, or that folder; and
            where the pictures of a COCO file are.
        seed: Of the random crops and flips, and of synthetic inputs.
    """
    sizes = SplitSizes(calibration_images, selection_images)
    kind, _, rest = spec.partition(":")
    if kind in READERS and rest:
        reader, known = READERS[kind]
        path, options = _path_and_options(spec, rest, known)
        return reader(path, sizes, seed, options, data_dir)
    if spec == "demo":
        return read_demo(seed)
    if spec == "torch/cifar10":
        return read_cifar10(data_dir, sizes, seed)
    if kind in ("synthetic", "pixels"):
        return synthetic(rest, seed, pixels=kind == "pixels")
    if spec.rpartition(":")[0].endswith(".py"):
        return read_factory(spec, sizes, seed)
    raise InputError(f"--data {spec!r} is not supported; use one of: {SUPPORTED}.")


def _path_and_options(spec: str, rest: str, known: tuple[str, ...]) -> tuple[Path, dict[str, str]]:
    """Split `DIR,void=11` into the path and its options; a path that is there may have commas."""
    path, options = rest, dict[str, str]()
    while known and not Path(path).exists() and (found := re.fullmatch(r"(.+),([a-z]+)=([^,]*)", path)):
        path, name, value = found.groups()
        if name not in known:
            raise InputError(f"--data {spec}: there is no option {name!r}; use {', '.join(known)}.")
        options[name] = value
    return Path(path), options
