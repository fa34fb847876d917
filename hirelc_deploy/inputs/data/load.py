"""In: what the user wrote behind --data. Out: four disjoint splits of it."""

from __future__ import annotations

from pathlib import Path

from hirelc_deploy.config import JobConfig
from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.cifar10 import read_cifar10
from hirelc_deploy.inputs.data.demo import read_demo
from hirelc_deploy.inputs.data.image_folder import read_image_folder
from hirelc_deploy.inputs.data.npz import read_npz
from hirelc_deploy.inputs.data.splits import Data, SplitSizes
from hirelc_deploy.inputs.data.synthetic import synthetic

SUPPORTED = "npz:FILE, imagefolder:DIR, torch/cifar10 with --data-dir, synthetic:N, demo"


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
        spec: `npz:FILE`, `imagefolder:DIR`, `torch/cifar10`, `synthetic:N` (N random inputs in each split), or `demo`.
        data_dir: Where `torch/cifar10` lies: the folder with cifar-10-batches-py (or -bin) in it, or that folder.
        seed: Of the random crops and flips, and of synthetic inputs.
    """
    sizes = SplitSizes(calibration_images, selection_images)
    kind, _, rest = spec.partition(":")
    if spec == "demo":
        return read_demo(seed)
    if spec == "torch/cifar10":
        return read_cifar10(data_dir, sizes, seed)
    if kind == "npz" and rest:
        return read_npz(Path(rest), sizes, seed)
    if kind == "imagefolder" and rest:
        return read_image_folder(Path(rest), sizes, seed)
    if kind == "synthetic":
        return synthetic(rest, seed)
    raise InputError(f"--data {spec!r} is not supported; use one of: {SUPPORTED}.")
