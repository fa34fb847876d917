"""In: a shipped file with its weights and proof. Out: a folder that works anywhere, checks itself, and loads again."""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import save
from torch import nn

from hirelc_deploy import __version__
from hirelc_deploy.compress.slicing import shapes
from hirelc_deploy.deliver.read import (
    FILES,
    LABELS,
    MANIFEST,
    MODEL,
    PREPROCESS,
    SAMPLES,
    SCHEMA_VERSION,
    SCRIPT,
    SHAPES,
    WEIGHTS,
    sha256_of,
)
from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.preprocess import Preprocess
from hirelc_deploy.measure.accuracy import OperatorCount
from hirelc_deploy.plan import CompressionPlan


@dataclass(frozen=True)
class BundleContents:
    """What goes into a bundle.

    Attributes:
        model: The sliced FP32 model of which `model_onnx` is the export.
        source: `ModelSource.describe()` of the uncut model.
        classes: Class names in the order of the outputs; empty where the data has none.
        sample_inputs: (n, channels, height, width) model inputs, 8 to 16 test images.
        sample_logits: (n, classes) what `model_onnx` answers to them on the target.
        measurements: Keys `accuracy, latency, best_unpruned, params, macs, size_bytes, size_ratio` of the result.
        operators: What the target ran, counted by `measure.accuracy.operators`.
        sample_labels: (n,) classes of the samples, or None.
        test_labels: (images,) of the test split behind `measurements["accuracy"]`, or None: lets `verify` tell whether
            it was given the same images.
    """

    model_onnx: Path
    model: nn.Module
    source: Mapping[str, Any]
    plan: CompressionPlan
    preprocess: Preprocess
    classes: tuple[str, ...]
    sample_inputs: NDArray[np.float32]
    sample_logits: NDArray[np.float32]
    measurements: Mapping[str, Any]
    operators: OperatorCount
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    command: str
    sample_labels: NDArray[np.int64] | None = None
    test_labels: NDArray[np.int64] | None = None
    created: datetime.datetime = field(default_factory=lambda: datetime.datetime.now(datetime.UTC))


# Writing


def write_bundle(directory: Path, contents: BundleContents, *, overwrite: bool = False) -> Path:
    """Write a bundle to `directory` and return it. It appears whole, by one renaming, or not at all.

    Raises:
        InputError: Something is there already (with `overwrite`: something that is no bundle), or cannot be written.
    """
    if directory.exists() and not (overwrite and (directory / MANIFEST).is_file()):
        reason = (
            "is there and is no bundle" if overwrite else "is there already; give a new folder or allow overwriting"
        )
        raise InputError(f"{directory}: {reason}.")
    partial = directory.with_name(f".{directory.name}.part")
    try:
        if partial.exists():
            shutil.rmtree(partial)  # what a killed process left
        partial.mkdir(parents=True)
        _write_files(partial, contents)
        if directory.exists():
            replaced = directory.with_name(f".{directory.name}.old")
            directory.rename(replaced)
            partial.rename(directory)
            shutil.rmtree(replaced)
        else:
            partial.rename(directory)
    except OSError as error:
        raise InputError(f"{directory}: the bundle cannot be written ({error.strerror}).") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def _write_files(folder: Path, contents: BundleContents) -> None:
    shutil.copyfile(contents.model_onnx, folder / MODEL)
    # Clones, because safetensors refuses tensors that share memory, as tied weights do. `save_file` would write a file
    # that only its owner can read.
    state = {name: tensor.clone().contiguous() for name, tensor in contents.model.state_dict().items()}
    (folder / WEIGHTS).write_bytes(save(state))
    _write_json(folder / SHAPES, shapes(contents.model))
    _write_json(folder / PREPROCESS, contents.preprocess.to_dict())
    _write_json(folder / LABELS, list(contents.classes))
    samples: dict[str, NDArray[Any]] = {
        "images": stored_images(contents.sample_inputs, contents.preprocess),
        "logits": contents.sample_logits,
    }
    if contents.sample_labels is not None:
        samples["labels"] = contents.sample_labels
    np.savez_compressed(folder / SAMPLES, allow_pickle=False, **samples)
    script = resources.files("hirelc_deploy.deliver") / "bundle_template" / SCRIPT
    (folder / SCRIPT).write_bytes(script.read_bytes())
    test = contents.test_labels
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "created": contents.created.isoformat(timespec="seconds"),
        "tool": {"name": "hirelc-deploy", "version": __version__},
        "command": contents.command,
        "source": dict(contents.source),
        "plan": contents.plan.to_dict(),
        "measurements": {
            **contents.measurements,
            "operators": contents.operators._asdict(),
            "test": None if test is None else {"images": len(test), "labels_sha256": labels_digest(test)},
        },
        "machine": dict(contents.machine),
        "versions": dict(contents.versions),
        "files": {
            name: {"sha256": sha256_of(folder / name), "bytes": (folder / name).stat().st_size} for name in FILES
        },
    }
    _write_json(folder / MANIFEST, manifest)


def stored_images(inputs: NDArray[np.float32], preprocess: Preprocess) -> NDArray[Any]:
    """Return (n, height, width, channels) uint8 pixels as they were after resize and crop, or float32 model inputs.

    Undoing the normalisation is exact for images; random inputs were never pixels and stay as they are.
    """
    mean, std = (np.array(values).reshape(-1, 1, 1) for values in (preprocess.mean, preprocess.std))
    pixels = 255 * (inputs * std + mean)
    whole = np.clip(np.rint(pixels), 0, 255)
    images: NDArray[Any] = whole.astype(np.uint8) if np.abs(pixels - whole).max() < 0.01 else inputs.astype(np.float32)
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")


def labels_digest(labels: NDArray[np.int64]) -> str:
    """Return a hash of (n,) labels in their order."""
    return hashlib.sha256(np.ascontiguousarray(labels, "<i8").tobytes()).hexdigest()
