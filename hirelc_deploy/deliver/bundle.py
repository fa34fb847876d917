"""In: a shipped file with its weights and proof. Out: a folder that works anywhere, checks itself, and loads again."""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from hirelc_deploy.compress.slicing import shapes
from hirelc_deploy.deliver.read import (
    ARRAYS,
    DECODER,
    INPUTS,
    LABELS,
    MANIFEST,
    MODEL,
    OUTPUT_KEY,
    PREPROCESS,
    RUNTIME,
    SAMPLES,
    SCHEMA_VERSION,
    SCRIPT,
    SHAPES,
    STORED,
    TASK,
    WEIGHTS,
    files_of,
    sha256_of,
)
from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.images import Images
from hirelc_deploy.inputs.data.preprocess import Preprocess
from hirelc_deploy.measure.accuracy import OperatorCount
from hirelc_deploy.measure.backend import Outputs
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.tasks.classification import CLASSIFICATION
from hirelc_deploy.tasks.contract import Task
from hirelc_deploy.tasks.decoding import decoder_options
from hirelc_deploy.version import __version__

NO_OPTIONS = 'OPTIONS: "dict[str, object]" = {}'
"""The line of a runtime's file that becomes the options of the bundle."""


@dataclass(frozen=True)
class BundleContents:
    """What goes into a bundle.

    Attributes:
        model: The sliced FP32 model of which `model_onnx` is the export.
        source: `ModelSource.describe()` of the uncut model.
        classes: Class names in the order of the outputs; empty where the data has none.
        task: What the answers are for.
        task_record: JSON values that make it again; see `inputs.fitting.Fitted`.
        sample_inputs: (n, channels, height, width) model inputs, 8 to 16 of them.
        sample_outputs: What `model_onnx` answers to them on the target.
        measurements: Keys `accuracy, latency, best_unpruned, params, macs, size_bytes, size_ratio` of the result.
        operators: What the target ran, counted by `measure.accuracy.operators`.
        sample_labels: (n,) classes of the samples, or None.
        test: Number and digest of the test images behind `measurements["accuracy"]`, or None: lets `verify` tell
            whether it was given the same images.
        options: What the runtime was told when the file was timed; see `measure.backend.Configured`.
        batch: Images that `model_onnx` takes at a time.
    """

    model_onnx: Path
    model: nn.Module
    source: Mapping[str, Any]
    plan: CompressionPlan
    preprocess: Preprocess
    classes: tuple[str, ...]
    sample_inputs: NDArray[np.float32]
    sample_outputs: Outputs
    measurements: Mapping[str, Any]
    operators: OperatorCount
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    command: str
    sample_labels: NDArray[np.int64] | None = None
    test: Mapping[str, Any] | None = None
    task: Task = CLASSIFICATION
    task_record: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 1
    created: datetime.datetime = field(default_factory=lambda: datetime.datetime.now(datetime.UTC))


def runtime_of(versions: Mapping[str, str]) -> str:
    """Return the package that a bundle needs beside numpy, by what a backend says of its versions.

    It is the one for which bundle_template has a file, else ONNX Runtime, which runs the file on any CPU.
    """
    return next((package for package in versions if _program_of(package).is_file()), "onnxruntime")


def _program_of(package: str) -> Traversable:
    return resources.files("hirelc_deploy.deliver") / "bundle_template" / f"runtime_{package}.py"


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
        **{f"{OUTPUT_KEY}{name}": values for name, values in contents.sample_outputs.items()},
    }
    if contents.sample_labels is not None:
        samples["labels"] = contents.sample_labels
    np.savez_compressed(folder / SAMPLES, **samples)  # type: ignore[arg-type]  # a name may be `allow_pickle` to NumPy
    programs = resources.files("hirelc_deploy.deliver") / "bundle_template"
    for name in (SCRIPT, INPUTS):
        (folder / name).write_bytes((programs / name).read_bytes())
    package = runtime_of(contents.versions)
    runtime = _program_of(package).read_text("utf-8")
    (folder / RUNTIME).write_text(runtime.replace(NO_OPTIONS, f"OPTIONS = {dict(contents.options)!r}"), "utf-8")
    files = _write_task(folder, contents)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "created": contents.created.isoformat(timespec="seconds"),
        "tool": {"name": "hirelc-deploy", "version": __version__},
        "command": contents.command,
        "source": {**contents.source, STORED: True},
        "plan": contents.plan.to_dict(),
        "measurements": {
            **contents.measurements,
            "operators": contents.operators._asdict(),
            "test": None if contents.test is None else dict(contents.test),
        },
        "machine": dict(contents.machine),
        "versions": dict(contents.versions),
        "runtime": {"name": package, "options": dict(contents.options)},
        "batch": contents.batch,
        "files": {
            name: {"sha256": sha256_of(folder / name), "bytes": (folder / name).stat().st_size} for name in files
        },
    }
    _write_json(folder / MANIFEST, manifest)


def _write_task(folder: Path, contents: BundleContents) -> tuple[str, ...]:
    """Write what the answers are for and how they are read; return all files of the bundle but the manifest."""
    task, record = contents.task, dict(contents.task_record)
    value = {
        "task": task.name,
        "metric": asdict(task.metric),
        "own_metric": record.pop("metric", None),
        "own_loss": record.pop("loss", None),
        "decoder": {**decoder_options(task, contents.preprocess.input_size), "classes": list(contents.classes)},
        "made_of": record or {"name": task.name, "classes": list(contents.classes), "options": {}},
    }
    _write_json(folder / TASK, value)
    shutil.copyfile(task.decoder, folder / DECODER)
    files = (*files_of(SCHEMA_VERSION), RUNTIME)
    if not task.decoder_arrays:
        return files
    np.savez_compressed(folder / ARRAYS, **dict(task.decoder_arrays))  # type: ignore[arg-type]
    return (*files, ARRAYS)


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


def targets_record(images: Images) -> dict[str, Any]:
    """Return the number of labelled images and a hash of what is true of them, in their order."""
    digest = hashlib.sha256()
    if images.labels is not None:
        digest.update(np.ascontiguousarray(images.labels, "<i8").tobytes())
    else:
        for row in range(len(images)):
            for tensor in _tensors(images.targets([row])):
                digest.update(tensor.contiguous().numpy().tobytes())
    return {"images": len(images), "labels_sha256": digest.hexdigest()}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Mapping):
        value = [value[key] for key in sorted(value)]
    if isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif value is not None:
        yield torch.as_tensor(value)
