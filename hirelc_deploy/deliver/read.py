"""In: a bundle's folder, which may hold anything. Out: its parts, checked, and its model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn

from hirelc_deploy.compress.slicing import IDENTITY, ZERO, Shapes, rebuild
from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.answers import OUTPUT
from hirelc_deploy.inputs.data.archives import read_arrays
from hirelc_deploy.inputs.data.images import ArrayImages
from hirelc_deploy.inputs.data.preprocess import Preprocess
from hirelc_deploy.inputs.models.given import source_of
from hirelc_deploy.inputs.models.source import ModelSource
from hirelc_deploy.measure.backend import Outputs
from hirelc_deploy.tasks.classification import CLASSIFICATION
from hirelc_deploy.tasks.contract import Task
from hirelc_deploy.tasks.registry import make_task
from hirelc_deploy.user_code import usual_torch

SCHEMA_VERSION = 2
"""1 knew classifiers only: one output called `logits` in the samples, no task."""
READABLE = (1, 2)
MANIFEST = "manifest.json"
MODEL, WEIGHTS, SHAPES, PREPROCESS, LABELS, SAMPLES, SCRIPT = FILES = (
    "model.onnx",
    "weights.safetensors",
    "shapes.json",
    "preprocess.json",
    "labels.json",
    "samples.npz",
    "run.py",
)
TASK, INPUTS, DECODER, ARRAYS = "task.json", "inputs.py", "decode.py", "decode.npz"
"""Since version 2: what the answers are for; how a picture becomes an input; what an answer means to people; the arrays
that this needs, where it needs any."""
STORED = "stored_weights"
"""Entry of a source: the weights are those that are used. In older bundles they are as the model's code keeps them."""
RUNTIME = "runtime.py"
"""How the runtime opens the file with the options that it was timed with; the first bundles of version 2 have none."""
MOST_SAMPLE_BYTES = 1 << 32
"""What the samples may unpack to; those of the largest input that is taken need half of it."""
OUTPUT_KEY = "output."
"""Starts the names of outputs in the samples."""


def files_of(version: int) -> tuple[str, ...]:
    """Return the files that every bundle of a schema version has."""
    return FILES if version == 1 else (*FILES, TASK, INPUTS, DECODER)


MANIFEST_KEYS: Mapping[str, type] = {
    "created": str,
    "tool": dict,
    "command": str,
    "source": dict,
    "plan": dict,
    "measurements": dict,
    "machine": dict,
    "versions": dict,
    "files": dict,
}
EXECUTING_ARGUMENTS = frozenset({"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"})
"""Arguments of `timm.create_model` that make it fetch or unpickle a file; a manifest may not ask for that."""


def sha256_of(path: Path) -> str:
    """Return the hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Loading


@usual_torch()
def load(bundle: Path | str, factory: Callable[[], nn.Module] | None = None) -> nn.Module:
    """Rebuild the sliced FP32 model of a bundle, in eval mode: it can be run, trained and exported.

    No pickle is read, and no code is run that the bundle names: a model that is neither timm's nor this package's
    needs its `factory`.

    Args:
        factory: Builds the uncut model, in whatever precision or wrapper; not needed for timm names.

    Raises:
        InputError: No bundle, altered files, or a source that does not build this model.
    """
    folder = Path(bundle)
    manifest = read_manifest(folder)
    if problems := [
        text for name in (WEIGHTS, SHAPES) for text in check_file(folder, name, manifest["files"].get(name))
    ]:
        raise InputError(f"{folder}: {problems[0]}")
    stored = manifest["source"].get(STORED) is True
    if factory is None:
        uncut = _uncut(folder, manifest["source"], stored)
    else:
        uncut = source_of(factory).build() if stored else factory().float()
    return rebuild(uncut, read_shapes(folder), read_weights(folder)).eval()


def _uncut(folder: Path, source: Mapping[str, Any], stored: bool) -> nn.Module:
    spec, arguments = source.get("spec"), source.get("arguments", {})
    if not isinstance(spec, str) or not isinstance(arguments, dict):
        raise InputError(f"{folder / MANIFEST}: the source needs a spec (text) and arguments (an object).")
    if source.get("kind") == "module":
        raise InputError(
            f"{folder}: its model was made in Python ({spec}); give a function that makes the uncut one as factory."
        )
    model = ModelSource(spec, arguments=arguments)
    if model.is_timm and (banned := sorted(EXECUTING_ARGUMENTS & set(arguments))):
        raise InputError(
            f"{folder / MANIFEST}: argument {banned[0]!r} reads other files and is not taken from a bundle."
        )
    if not model.is_installed and spec != "hirelc_deploy.demo.model:demo_net":
        raise InputError(
            f"{folder}: its model comes from {spec}, which is not run unasked; give that function to load as factory."
        )
    return model.build() if stored else model.made()


def check_file(folder: Path, name: str, claim: Any) -> list[str]:
    """Return what is wrong with one file. A name that leads out of the bundle is not followed."""
    if name != Path(name).name or "\\" in name or name in ("", ".", "..", MANIFEST):
        return [f"{MANIFEST}: {name!r} is no plain file name; it is not followed."]
    if not isinstance(claim, dict) or not isinstance(claim.get("sha256"), str):
        return [f"{name}: the manifest gives no sha256."]
    path = folder / name
    try:
        if path.is_symlink() or not path.is_file():
            return [f"{name}: {'a link or folder' if path.is_symlink() or path.exists() else 'missing'}."]
        size, digest = path.stat().st_size, sha256_of(path)
    except OSError as error:
        return [f"{name}: cannot be read ({error.strerror})."]
    if size != claim.get("bytes"):
        return [f"{name}: {size} bytes, the manifest says {claim.get('bytes')}."]
    return [] if digest == claim["sha256"] else [f"{name}: altered (its sha256 is not the manifest's)."]


# Reading what may be anything


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest with all its keys, each of its type; raises InputError for anything else."""
    where = folder / MANIFEST
    value = json_object(where)
    version = value.get("schema_version")
    if version not in READABLE:
        raise InputError(
            f"{where}: schema version {version!r}, this program reads version {SCHEMA_VERSION}; update it."
        )
    for key, kind in MANIFEST_KEYS.items():
        if not isinstance(value.get(key), kind):
            raise InputError(f"{where}: {key!r} is missing or no {kind.__name__}; it must be as this tool wrote it.")
    return value


def json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raises InputError for anything else."""
    try:
        if not path.is_file():  # a pipe would keep us waiting
            raise InputError(f"{path}: no such file; is {path.parent} a bundle?")
        value = json.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: a {type(value).__name__} where an object belongs.")
    return value


def read_preprocess(folder: Path) -> Preprocess:
    """Return the preprocessing of a bundle."""
    return Preprocess.from_dict(json_object(folder / PREPROCESS))


def read_shapes(folder: Path) -> Shapes:
    """Return the shape manifest of a bundle."""
    value = json_object(folder / SHAPES)
    for name, shape in value.items():
        if type(shape) is int or shape in (IDENTITY, ZERO):
            continue
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise InputError(f"{folder / SHAPES}: {name} has shape {shape!r}; give a list of whole numbers.")
    return value


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the float weights of a bundle."""
    try:
        weights: dict[str, torch.Tensor] = load_file(folder / WEIGHTS)
    except Exception as error:  # beside its own error the library raises Python's and torch's, as the header has it
        raise InputError(f"{folder / WEIGHTS}: not readable as safetensors ({error}).") from None
    return weights


def read_samples(folder: Path, preprocess: Preprocess) -> tuple[NDArray[np.float32], Outputs]:
    """Return model inputs and the outputs stored for them."""
    arrays = read_arrays(folder / SAMPLES, MOST_SAMPLE_BYTES)
    if "images" not in arrays:
        raise InputError(f"{folder / SAMPLES}: not readable as samples (there are no images).")
    images = arrays["images"]
    named = {key.removeprefix(OUTPUT_KEY): key for key in arrays if key.startswith(OUTPUT_KEY)}
    if not named and "logits" not in arrays:
        raise InputError(f"{folder / SAMPLES}: not readable as samples (there are no outputs).")
    outputs = {name: arrays[key] for name, key in (named or {OUTPUT: "logits"}).items()}
    channels, height, width = preprocess.input_size
    if (
        images.ndim != 4
        or images.shape[1:] != (height, width, channels)
        or images.dtype not in (np.uint8, np.float32)
        or not len(images)
    ):
        raise InputError(f"{folder / SAMPLES}: {images.dtype} images {images.shape} do not fit {PREPROCESS}.")
    for name, values in outputs.items():
        floats = values.dtype.kind == "f"
        if values.ndim < 1 or len(values) != len(images) or not floats or not np.isfinite(values).all():
            raise InputError(f"{folder / SAMPLES}: outputs {name} {values.shape} do not fit {len(images)} images.")
    rows = np.arange(len(images))
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return ArrayImages(pixels, None, rows, preprocess).batch(rows).numpy(), {
        name: values.astype(np.float32) for name, values in outputs.items()
    }


def read_task(folder: Path, decode: object = None) -> Task:
    """Return the task of a bundle, made again; the user's own metric and loss are not in it.

    Args:
        decode: The decoder that the user named, the only one of `file.py:function` that is run.
    """
    if not (folder / TASK).is_file():  # version 1
        return CLASSIFICATION
    told = record(json_object(folder / TASK), "made_of")
    name, classes, options = told.get("name"), told.get("classes"), told.get("options")
    if not isinstance(name, str) or not isinstance(classes, list) or not isinstance(options, dict):
        raise InputError(f"{folder / TASK}: made_of needs name (text), classes (a list) and options (an object).")
    if isinstance(own := options.get("decode"), str) and own != decode:
        raise InputError(f"{folder / TASK}: its answers are decoded by {own:.200}, which is not run unasked.")
    try:
        return make_task(name, tuple(map(str, classes)), options)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:  # options of another type
        raise InputError(f"{folder / TASK}: task {name} cannot be made of these options ({error}).") from None


def record(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the object under a key, or an empty one."""
    inner = value.get(key)
    return inner if isinstance(inner, dict) else {}


def number(value: Any) -> float | None:
    """Return a finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number of hundreds of digits
        return None
