"""In: a shipped file with its weights and proof. Out: a folder that works anywhere, checks itself, and loads again."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import safetensors
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import nn

from hirelc_deploy import __version__
from hirelc_deploy.compress.slicing import IDENTITY, ZERO, Shapes, rebuild, shapes
from hirelc_deploy.data import Data
from hirelc_deploy.errors import ExportError, InputError
from hirelc_deploy.images import ArrayImages, Preprocess
from hirelc_deploy.measure.accuracy import OperatorCount, correct, operators, predict
from hirelc_deploy.measure.backend import Backend, Runner
from hirelc_deploy.measure.machine import describe
from hirelc_deploy.measure.protocol import FULL, TimingLimits, compare
from hirelc_deploy.models import ModelSource
from hirelc_deploy.plan import CompressionPlan

SCHEMA_VERSION = 1
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
SAMPLE_TOLERANCE = 0.05
"""Of the range of an image's outputs. Processors round a few integers differently; a saturating one is far outside."""
REPEAT_TOLERANCE = 0.002
"""Share of the same test images that two processors may answer differently; run.py's samples bound what that can be."""
LATENCY_TOLERANCE = 1.1
"""Two timings on one machine, of other days, agree when their intervals are within this factor."""
BATCH = 128
EXECUTING_ARGUMENTS = frozenset({"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"})
"""Arguments of `timm.create_model` that make it fetch or unpickle a file; a manifest may not ask for that."""


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


@dataclass(frozen=True)
class VerifyResult:
    """What a check of a bundle found.

    Attributes:
        problems: One sentence each; the bundle is what it says when there is none.
        remarks: What a reader should know and what is no problem.
        integer_ops, float_ops: Operators with integer and with float arithmetic as this runtime ran them; None where
            the file was not run.
        accuracy: Of this file on the data given, in [0, 1]; None without data.
        latency: `median_ms, ratio, ratio_low, ratio_high, verdict` against the reference given; None without one.
    """

    problems: tuple[str, ...]
    remarks: tuple[str, ...]
    integer_ops: int | None
    float_ops: int | None
    accuracy: float | None
    claimed_accuracy: float | None
    latency: Mapping[str, Any] | None

    @property
    def ok(self) -> bool:
        """True when there is no problem."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "ok": self.ok,
            "problems": list(self.problems),
            "remarks": list(self.remarks),
            "integer_ops": self.integer_ops,
            "float_ops": self.float_ops,
            "accuracy": self.accuracy,
            "claimed_accuracy": self.claimed_accuracy,
            "latency": None if self.latency is None else dict(self.latency),
        }


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
    script = resources.files("hirelc_deploy") / "bundle_template" / SCRIPT
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
            "test": None if test is None else {"images": len(test), "labels_sha256": _labels_digest(test)},
        },
        "machine": dict(contents.machine),
        "versions": dict(contents.versions),
        "files": {name: {"sha256": _sha256(folder / name), "bytes": (folder / name).stat().st_size} for name in FILES},
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _labels_digest(labels: NDArray[np.int64]) -> str:
    return hashlib.sha256(np.ascontiguousarray(labels, "<i8").tobytes()).hexdigest()


# Loading


def load(bundle: Path | str, factory: Callable[[], nn.Module] | None = None) -> nn.Module:
    """Rebuild the sliced FP32 model of a bundle, in eval mode: it can be run, trained and exported.

    No pickle is read, and no code is run that the bundle names: a model that is neither timm's nor this package's
    needs its `factory`.

    Args:
        factory: Builds the uncut model; not needed for timm names.

    Raises:
        InputError: No bundle, altered files, or a source that does not build this model.
    """
    folder = Path(bundle)
    manifest = read_manifest(folder)
    if problems := [
        text for name in (WEIGHTS, SHAPES) for text in _check_file(folder, name, manifest["files"].get(name))
    ]:
        raise InputError(f"{folder}: {problems[0]}")
    uncut = factory() if factory is not None else _uncut(folder, manifest["source"])
    return rebuild(uncut, _shapes(folder), _weights(folder)).eval()


def _uncut(folder: Path, source: Mapping[str, Any]) -> nn.Module:
    spec, arguments = source.get("spec"), source.get("arguments", {})
    if not isinstance(spec, str) or not isinstance(arguments, dict):
        raise InputError(f"{folder / MANIFEST}: the source needs a spec (text) and arguments (an object).")
    model = ModelSource(spec, arguments=arguments)
    if model.is_timm and (banned := sorted(EXECUTING_ARGUMENTS & set(arguments))):
        raise InputError(
            f"{folder / MANIFEST}: argument {banned[0]!r} reads other files and is not taken from a bundle."
        )
    if not model.is_timm and spec != "hirelc_deploy.demo.model:demo_net":
        raise InputError(
            f"{folder}: its model comes from {spec}, which is not run unasked; give that function to load as factory."
        )
    return model.build()


# Verifying


@dataclass
class _Findings:
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    count: OperatorCount | None = None
    accuracy: float | None = None
    claimed_accuracy: float | None = None
    latency: dict[str, Any] | None = None

    def result(self) -> VerifyResult:
        return VerifyResult(
            tuple(self.problems),
            tuple(self.remarks),
            self.count.integer_ops if self.count else None,
            self.count.float_ops if self.count else None,
            self.accuracy,
            self.claimed_accuracy,
            self.latency,
        )


def verify(
    bundle: Path,
    data: Data | None,
    backend: Backend,
    *,
    reference: Path | None = None,
    limits: TimingLimits = FULL,
) -> VerifyResult:
    """Check that a bundle is what its manifest says: files, integer operators, outputs, accuracy and latency.

    Args:
        data: Its test split is taken for the accuracy; None leaves that out.
        reference: The uncut FP32 file, to time the bundle's file against; without it nothing is timed.

    Raises:
        InputError: There is no bundle, or `data` or `reference` do not fit it.
        ExportError: The runtime refuses `reference`.
        TargetUnavailable: The device cannot be reached.
    """
    if not bundle.is_dir() or not (bundle / MANIFEST).is_file():
        raise InputError(f"{bundle}: not a bundle (no {MANIFEST} in it); give a folder that search or apply wrote.")
    findings = _Findings()
    try:
        manifest = read_manifest(bundle)
        measurements = manifest["measurements"]
        findings.claimed_accuracy = _number(_record(measurements, "accuracy").get("test"))
        findings.problems += _check_all_files(bundle, manifest["files"])
        CompressionPlan.from_dict(manifest["plan"], f"{MANIFEST}: plan")
        if findings.problems:
            findings.remarks.append("Nothing was run, because the files are not those that were written.")
            return findings.result()
        preprocess = _preprocess(bundle)
        inputs, expected = _samples(bundle, preprocess)
        _check_weights(bundle)
        _check_self_contained(bundle / MODEL)
        runner = backend.build(bundle / MODEL)
        findings.problems += _check_samples(runner.infer(inputs), expected)
        findings.count = operators(runner, inputs[:1])
        findings.problems += _check_operators(findings.count, _record(measurements, "operators"))
    except (InputError, ExportError) as error:
        findings.problems.append(str(error))
        return findings.result()
    if data is not None:
        _accuracy_again(findings, runner, data.preprocessed(preprocess), expected.shape[1], measurements)
    if reference is not None:
        _latency_again(findings, bundle / MODEL, backend, reference, manifest, limits=limits)
    return findings.result()


def _check_all_files(folder: Path, files: Mapping[str, Any]) -> list[str]:
    problems = [f"{name}: the manifest does not list it." for name in FILES if name not in files]
    for name, claim in files.items():
        problems += _check_file(folder, name, claim)
    extra = sorted(path.name for path in folder.iterdir() if path.name not in files and path.name != MANIFEST)
    return problems + [f"{name}: the manifest does not know it." for name in extra]


def _check_file(folder: Path, name: str, claim: Any) -> list[str]:
    """Return what is wrong with one file. A name that leads out of the bundle is not followed."""
    if name != Path(name).name or "\\" in name or name in ("", ".", "..", MANIFEST):
        return [f"{MANIFEST}: {name!r} is no plain file name; it is not followed."]
    if not isinstance(claim, dict) or not isinstance(claim.get("sha256"), str):
        return [f"{name}: the manifest gives no sha256."]
    path = folder / name
    if path.is_symlink() or not path.is_file():
        return [f"{name}: {'a link or folder' if path.is_symlink() or path.exists() else 'missing'}."]
    try:
        size, digest = path.stat().st_size, _sha256(path)
    except OSError as error:
        return [f"{name}: cannot be read ({error.strerror})."]
    if size != claim.get("bytes"):
        return [f"{name}: {size} bytes, the manifest says {claim.get('bytes')}."]
    return [] if digest == claim["sha256"] else [f"{name}: altered (its sha256 is not the manifest's)."]


def _check_weights(folder: Path) -> None:
    """Raise InputError unless the weights are readable and have the shapes of the shape manifest."""
    wanted = {name: shape for name, shape in _shapes(folder).items() if isinstance(shape, list)}
    found = {name: list(tensor.shape) for name, tensor in _weights(folder).items()}
    if odd := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        raise InputError(
            f"{WEIGHTS}: {odd[0]} has shape {found.get(odd[0])}, {SHAPES} says {wanted.get(odd[0])}: they do not "
            "belong together."
        )


def _check_self_contained(model: Path) -> None:
    """Raise InputError for a model that reads other files: they would not be covered by the manifest's hashes."""
    try:
        graph = onnx.load(str(model), load_external_data=False).graph
    except Exception as error:  # protobuf's errors share no narrower base that it exports
        raise InputError(f"{MODEL}: not readable as ONNX ({error}).") from None
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in graph.initializer):
        raise InputError(f"{MODEL}: keeps weights in other files, which nothing vouches for.")


def _check_samples(logits: NDArray[np.float32], expected: NDArray[np.float32]) -> list[str]:
    if logits.shape != expected.shape:
        return [f"{SAMPLES}: the file answers {logits.shape}, the stored outputs have shape {expected.shape}."]
    span = np.ptp(expected, axis=1, keepdims=True)
    good = (np.abs(logits - expected) <= SAMPLE_TOLERANCE * span).all(axis=1)  # NaN is not good
    if good.all():
        return []
    return [
        f"{SAMPLES}: {int((~good).sum())} of {len(good)} stored outputs are not reproduced within "
        f"{SAMPLE_TOLERANCE:.0%} of their range: this device computes other numbers."
    ]


def _check_operators(count: OperatorCount, claim: Mapping[str, Any]) -> list[str]:
    claimed = _number(claim.get("integer_ops"))
    if claimed is None:
        return [f"{MANIFEST}: measurements.operators.integer_ops is missing or no number."]
    if count.integer_ops >= claimed:
        return []
    return [f"{MODEL}: {count.integer_ops} operators run in integers here, the manifest says {claimed:.0f}."]


def _accuracy_again(
    findings: _Findings, runner: Runner, data: Data, outputs: int, measurements: Mapping[str, Any]
) -> None:
    """Read the test split and compare: exactly where it is the one of the manifest, else within its sampling error."""
    images = data.take_test()
    if images.labels is None:
        findings.remarks.append(f"{data.name} has no labels: the accuracy was not checked.")
        return
    if len(data.classes) != outputs:
        raise InputError(f"{data.name} has {len(data.classes)} classes, but the bundle's file answers {outputs}.")
    count = len(images)
    starts = range(0, count, BATCH)
    logits = predict(runner, (images.batch(range(at, min(at + BATCH, count))).numpy() for at in starts))
    findings.accuracy = accuracy = float(correct(logits, images.labels).mean())
    claimed, test = findings.claimed_accuracy, _record(measurements, "test")
    if claimed is None:
        findings.remarks.append("The manifest claims no accuracy.")
        return
    if test.get("labels_sha256") == _labels_digest(images.labels):
        allowed = max(REPEAT_TOLERANCE, 3 / count)
        basis = f"on the same {count} test images"
    else:
        # 3.3 standard errors of a difference of two shares: one in a thousand honest bundles would be called wrong.
        before = _number(test.get("images")) or count
        allowed = 3.3 * math.sqrt(max(claimed * (1 - claimed), 0.01) * (1 / count + 1 / before))
        basis = f"on {count} other test images than the manifest's"
        findings.remarks.append(
            f"The accuracy was taken {basis}; it may differ by {100 * allowed:.1f} points by chance."
        )
    if not abs(accuracy - claimed) <= allowed:
        findings.problems.append(f"accuracy: {accuracy:.2%} {basis}, the manifest claims {claimed:.2%}.")


def _latency_again(
    findings: _Findings,
    model: Path,
    backend: Backend,
    reference: Path,
    manifest: Mapping[str, Any],
    *,
    limits: TimingLimits,
) -> None:
    """Time the file against the reference; another machine's ratio may differ, this machine's may not."""
    timing = compare([reference, model], backend, limits=limits)[1]
    keys = ("median_ms", "ratio", "ratio_low", "ratio_high", "verdict")
    findings.latency = {key: getattr(timing, key) for key in keys}
    if timing.note:
        findings.remarks.append(timing.note)
    claim = _record(manifest["measurements"], "latency")
    low, high = _number(claim.get("ratio_low")), _number(claim.get("ratio_high"))
    if low is None or high is None:
        findings.remarks.append("The manifest claims no interval of the latency.")
        return
    here = describe(backend)
    if any(here[key] != manifest["machine"].get(key) for key in ("cpu_model", "versions")):
        findings.remarks.append("The latency was claimed on another machine or runtime; its ratio may differ here.")
    elif timing.ratio_low > high * LATENCY_TOLERANCE:
        findings.problems.append(
            f"latency: {timing.ratio:.3f} of the reference's time ({timing.ratio_low:.3f} to {timing.ratio_high:.3f}), "
            f"the manifest claims {low:.3f} to {high:.3f} on this machine."
        )


# Reading what may be anything


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest with all its keys, each of its type; raises InputError for anything else."""
    where = folder / MANIFEST
    value = _json_object(where)
    version = value.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{where}: schema version {version!r}, this program reads version {SCHEMA_VERSION}; update it."
        )
    for key, kind in MANIFEST_KEYS.items():
        if not isinstance(value.get(key), kind):
            raise InputError(f"{where}: {key!r} is missing or no {kind.__name__}; it must be as this tool wrote it.")
    return value


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; is {path.parent} a bundle?") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: a {type(value).__name__} where an object belongs.")
    return value


def _preprocess(folder: Path) -> Preprocess:
    return Preprocess.from_dict(_json_object(folder / PREPROCESS))


def _shapes(folder: Path) -> Shapes:
    value = _json_object(folder / SHAPES)
    for name, shape in value.items():
        if type(shape) is int or shape in (IDENTITY, ZERO):
            continue
        if not isinstance(shape, list) or not all(isinstance(size, int) and size >= 0 for size in shape):
            raise InputError(f"{folder / SHAPES}: {name} has shape {shape!r}; give a list of whole numbers.")
    return value


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    try:
        weights: dict[str, torch.Tensor] = load_file(folder / WEIGHTS)
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{folder / WEIGHTS}: not readable as safetensors ({error}).") from None
    return weights


def _samples(folder: Path, preprocess: Preprocess) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return model inputs and the outputs stored for them."""
    try:
        with np.load(folder / SAMPLES, allow_pickle=False) as archive:
            images, logits = archive["images"], archive["logits"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{folder / SAMPLES}: not readable as samples ({error}).") from None
    channels, height, width = preprocess.input_size
    if images.shape[1:] != (height, width, channels) or images.dtype not in (np.uint8, np.float32) or not len(images):
        raise InputError(f"{folder / SAMPLES}: {images.dtype} images {images.shape} do not fit {PREPROCESS}.")
    if logits.ndim != 2 or len(logits) != len(images) or not np.isfinite(logits).all():
        raise InputError(f"{folder / SAMPLES}: outputs {logits.shape} do not fit {len(images)} images.")
    rows = np.arange(len(images))
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return ArrayImages(pixels, None, rows, preprocess).batch(rows).numpy(), logits.astype(np.float32)


def _record(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    inner = value.get(key)
    return inner if isinstance(inner, dict) else {}


def _number(value: Any) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None
