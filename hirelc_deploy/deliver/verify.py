"""In: a bundle, and images. Out: whether it is what its manifest says."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import Message

from hirelc_deploy.config import LARGEST_INPUT
from hirelc_deploy.deliver.against import (
    Change,
    accuracy_change,
    check_limits,
    latency_change,
    latency_side_by_side,
    read_baseline,
)
from hirelc_deploy.deliver.bundle import runtime_of, targets_record
from hirelc_deploy.deliver.race import parts_of
from hirelc_deploy.deliver.read import (
    MANIFEST,
    MODEL,
    SAMPLES,
    SCHEMA_VERSION,
    SHAPES,
    TASK,
    WEIGHTS,
    check_file,
    files_of,
    json_object,
    number,
    read_manifest,
    read_preprocess,
    read_samples,
    read_shapes,
    read_task,
    read_weights,
    record,
    sha256_of,
)
from hirelc_deploy.errors import ExportError, InputError
from hirelc_deploy.evaluate.cutting import tensors
from hirelc_deploy.inputs.data.splits import Data
from hirelc_deploy.measure.accuracy import OperatorCount, operators
from hirelc_deploy.measure.backend import Backend, Outputs, Runner
from hirelc_deploy.measure.batch import at_batch, filled, fixed_batch
from hirelc_deploy.measure.machine import describe
from hirelc_deploy.measure.protocol import FULL, TimingLimits, compare
from hirelc_deploy.measure.runtimes import SideBySide
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.tasks.contract import Metric

SAMPLE_TOLERANCE = 0.05
"""Of the range of an image's outputs. Processors round a few integers differently; a saturating one is far outside."""
REPEAT_TOLERANCE = 0.002
"""Share of the same test images that two processors may answer differently; run.py's samples bound what that can be."""
LATENCY_TOLERANCE = 1.1
"""Two timings on one machine, of other days, agree when their intervals are within this factor."""
BATCH = 128


ACCURACY = Metric("accuracy")


@dataclass(frozen=True)
class VerifyResult:
    """What a check of a bundle found.

    Attributes:
        problems: One sentence each; the bundle is what it says when there is none.
        remarks: What a reader should know and what is no problem.
        integer_ops, float_ops: Operators with integer and with float arithmetic as this runtime ran them; None where
            the file was not run.
        accuracy: `metric` of this file on the data given; None without data.
        latency: `median_ms, ratio, ratio_low, ratio_high, verdict` against the reference given; None without one.
        test: Number of test images, and a hash of what is true of them; None where no accuracy was taken.
        machine: Where this was run, see `measure.machine.describe`; None where the file was not run.
        reference_sha256: Of the reference given; None without one.
        changes: Each figure beside the baseline's; empty without a baseline.
    """

    problems: tuple[str, ...]
    remarks: tuple[str, ...]
    integer_ops: int | None
    float_ops: int | None
    accuracy: float | None
    claimed_accuracy: float | None
    latency: Mapping[str, Any] | None
    metric: Metric = ACCURACY
    test: Mapping[str, Any] | None = None
    machine: Mapping[str, Any] | None = None
    reference_sha256: str | None = None
    changes: tuple[Change, ...] = ()

    @property
    def ok(self) -> bool:
        """True when there is no problem; a bundle that is worse than a baseline may still be what it says."""
        return not self.problems

    @property
    def worse(self) -> bool:
        """True when a figure is worse than the baseline allows."""
        return any(change.worse for change in self.changes)

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
            "metric": asdict(self.metric),
            "latency": None if self.latency is None else dict(self.latency),
            "test": None if self.test is None else dict(self.test),
            "machine": None if self.machine is None else dict(self.machine),
            "reference_sha256": self.reference_sha256,
            "worse": self.worse,
            "changes": [asdict(change) for change in self.changes],
        }


# Verifying


@dataclass
class _Findings:
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    count: OperatorCount | None = None
    accuracy: float | None = None
    claimed_accuracy: float | None = None
    latency: dict[str, Any] | None = None
    metric: Metric = ACCURACY
    test: dict[str, Any] | None = None
    machine: dict[str, Any] | None = None
    reference_sha256: str | None = None

    def result(self) -> VerifyResult:
        return VerifyResult(
            tuple(self.problems),
            tuple(self.remarks),
            self.count.integer_ops if self.count else None,
            self.count.float_ops if self.count else None,
            self.accuracy,
            self.claimed_accuracy,
            self.latency,
            self.metric,
            self.test,
            self.machine,
            self.reference_sha256,
        )


def verify(
    bundle: Path,
    data: Data | None,
    backend: Backend,
    *,
    others: Sequence[Backend] = (),
    reference: Path | None = None,
    limits: TimingLimits = FULL,
) -> VerifyResult:
    """Check that a bundle is what its manifest says: files, integer operators, outputs, accuracy and latency.

    Args:
        data: Its test split is taken for the accuracy; None leaves that out.
        backend: Runs the reference, and the bundle where no other runtime is the one that it is made for.
        others: Further runtimes of the device.
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
        findings.claimed_accuracy = number(record(measurements, "accuracy").get("test"))
        findings.problems += _check_all_files(bundle, manifest["files"])
        CompressionPlan.from_dict(manifest["plan"], f"{MANIFEST}: plan")
        if findings.problems:
            findings.remarks.append("Nothing was run, because the files are not those that were written.")
            return findings.result()
        preprocess = read_preprocess(bundle)
        inputs, expected = read_samples(bundle, preprocess)
        _check_weights(bundle)
        _check_self_contained(bundle / MODEL)
        batch = _batch_of(bundle, manifest, math.prod(preprocess.input_size))
        own = runtime_for(manifest, backend, others)
        if (name := record(manifest, "runtime").get("name")) not in (None, here := runtime_of(own.versions())):
            findings.remarks.append(f"The bundle is for {name!r:.60}; it was run in {here}.")
        runner = own.build(bundle / MODEL)
        findings.machine = describe(own)
        findings.problems += _check_samples(runner.infer(inputs), expected)
        findings.count = operators(runner, filled(inputs, batch))
        findings.problems += _check_operators(findings.count, record(measurements, "operators"))
    except (InputError, ExportError) as error:
        findings.problems.append(str(error))
        return findings.result()
    if data is not None:
        _accuracy_again(findings, runner, data.preprocessed(preprocess), bundle, measurements)
    if reference is not None:
        runtimes = {bundle / MODEL: own, reference: backend}
        _latency_again(findings, bundle / MODEL, reference, runtimes, manifest, limits=limits)
    return findings.result()


def runtime_for(manifest: Mapping[str, Any], backend: Backend, others: Sequence[Backend]) -> Backend:
    """Return which of a device's runtimes a bundle is made for; the first where it is none of them, or tells none."""
    name = record(manifest, "runtime").get("name")
    return next((one for one in (backend, *others) if runtime_of(one.versions()) == name), backend)


def verify_against(
    bundle: Path,
    baseline: Path,
    data: Data | None,
    backend: Backend,
    *,
    others: Sequence[Backend] = (),
    max_drop: float | None = None,
    max_slowdown: float | None = None,
    reference: Path | None = None,
    limits: TimingLimits = FULL,
) -> VerifyResult:
    """Verify a bundle and hold it against a baseline: an older bundle, or a file that `verify --json` wrote of one.

    An older bundle is verified too and timed side by side with the new one, so `reference` is not needed.

    Args:
        backend, others: As for `verify`: each of the two bundles is run in the runtime that it is made for.
        max_drop: Points of the metric (or its unit) that may be lost; None allows 1.0 where both are known.
        max_slowdown: Per cent that it may be slower; None allows 10 where both are known.

    Raises:
        InputError: As `verify`; no baseline; or a limit that was given cannot be judged.
    """
    check_limits(baseline, max_drop, max_slowdown)
    old = None if baseline.is_dir() else read_baseline(baseline)
    new = verify(bundle, data, backend, others=others, reference=reference, limits=limits)
    if not new.ok:
        return new
    if old is not None:
        latency = latency_change(new.to_dict(), old, max_slowdown)
    else:
        older = verify(baseline, data, backend, others=others)
        if not older.ok:
            raise InputError(f"{baseline}: the baseline is not what it says: {older.problems[0]}")
        old = older.to_dict()
        runtimes = [runtime_for(read_manifest(one), backend, others) for one in (bundle, baseline)]
        latency = latency_side_by_side(bundle, baseline, runtimes, max_slowdown, limits)
    return replace(new, changes=(accuracy_change(new.to_dict(), old, max_drop), latency))


def _check_all_files(folder: Path, files: Mapping[str, Any]) -> list[str]:
    version = 1 if TASK not in files else SCHEMA_VERSION
    problems = [f"{name}: the manifest does not list it." for name in files_of(version) if name not in files]
    for name, claim in files.items():
        problems += check_file(folder, name, claim)
    extra = sorted(path.name for path in folder.iterdir() if path.name not in files and path.name != MANIFEST)
    return problems + [f"{name}: the manifest does not know it." for name in extra]


def _check_weights(folder: Path) -> None:
    """Raise InputError unless the weights are readable and have the shapes of the shape manifest."""
    wanted = {name: shape for name, shape in read_shapes(folder).items() if isinstance(shape, list)}
    found = {name: list(tensor.shape) for name, tensor in read_weights(folder).items()}
    if odd := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        raise InputError(
            f"{WEIGHTS}: {odd[0]} has shape {found.get(odd[0])}, {SHAPES} says {wanted.get(odd[0])}: they do not "
            "belong together."
        )


def _check_self_contained(model: Path) -> None:
    """Raise InputError for a model that reads other files: they would not be covered by the manifest's hashes."""
    try:
        model_proto = onnx.load(str(model), load_external_data=False)
    except Exception as error:  # protobuf's errors share no narrower base that it exports
        raise InputError(f"{MODEL}: not readable as ONNX ({error}).") from None
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in _tensors_in(model_proto)):
        raise InputError(f"{MODEL}: keeps weights in other files, which nothing vouches for.")


def _batch_of(bundle: Path, manifest: Mapping[str, Any], values: int) -> int:
    """Return how many images of so many values the file takes at a time.

    Raises:
        InputError: The manifest says another number, or it is more than any search asks for.
    """
    claimed = manifest.get("batch", 1)  # older bundles have files of one image
    takes = fixed_batch(bundle / MODEL) or 1
    if type(claimed) is not int or claimed != takes:
        raise InputError(f"{MODEL}: takes {takes} images at a time, {MANIFEST} says {claimed!r:.60}.")
    if takes * values > LARGEST_INPUT:
        raise InputError(f"{MODEL}: takes {takes:,} images at a time, of {values:,} values each; that is too much.")
    return takes


def _tensors_in(message: Any) -> Iterator[onnx.TensorProto]:
    """Yield every tensor of an ONNX model, those of attributes, subgraphs and functions too."""
    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for kind, value in message.ListFields():
        if kind.message_type is not None:
            for inner in (value,) if isinstance(value, Message) else value:
                yield from _tensors_in(inner)


def _check_samples(found: Outputs, expected: Outputs) -> list[str]:
    """Return what is wrong with the outputs; those of version 1 have no name, and there is one."""
    if len(found) == len(expected) == 1:
        expected = dict(zip(found, expected.values(), strict=True))
    problems = []
    for name, wanted in expected.items():
        if name not in found or found[name].shape != wanted.shape:
            shape = found[name].shape if name in found else "nothing"
            problems.append(f"{SAMPLES}: the file answers {shape}, the stored outputs have shape {wanted.shape}.")
            continue
        flat, stored = (values.reshape(len(wanted), -1) for values in (found[name], wanted))
        span = np.ptp(stored, axis=1, keepdims=True)
        good = (np.abs(flat - stored) <= SAMPLE_TOLERANCE * span).all(axis=1)  # NaN is not good
        if not good.all():
            problems.append(
                f"{SAMPLES}: {int((~good).sum())} of {len(good)} stored outputs are not reproduced within "
                f"{SAMPLE_TOLERANCE:.0%} of their range: this device computes other numbers."
            )
    return problems


def _check_operators(count: OperatorCount, claim: Mapping[str, Any]) -> list[str]:
    claimed = number(claim.get("integer_ops"))
    if claimed is None:
        return [f"{MANIFEST}: measurements.operators.integer_ops is missing or no number."]
    if count.integer_ops >= claimed:
        return []
    return [f"{MODEL}: {count.integer_ops} operators run in integers here, the manifest says {claimed:.0f}."]


def _accuracy_again(
    findings: _Findings, runner: Runner, data: Data, bundle: Path, measurements: Mapping[str, Any]
) -> None:
    """Read the test split and compare: exactly where it is the one of the manifest, else within its sampling error."""
    images = data.take_test()
    if not images.labelled:
        findings.remarks.append(f"{data.name} has no labels: the accuracy was not checked.")
        return
    told = json_object(bundle / TASK) if (bundle / TASK).is_file() else {}
    if (own := told.get("own_metric")) is not None:
        findings.remarks.append(f"The accuracy is by the user's own metric {own}, which is not in the bundle.")
        return
    if record(record(told, "made_of"), "options").get("decode") is not None:
        findings.remarks.append("The accuracy needs the user's own decoder, which is not run unasked.")
        return
    task, claimed, test = read_task(bundle), findings.claimed_accuracy, record(measurements, "test")
    targets = task.collate(images.targets([0]))
    task.check(tensors(runner.infer(images.batch([0]).numpy())), targets)
    if data.classes and task.classes and len(data.classes) != len(task.classes):
        raise InputError(
            f"{data.name} has {len(data.classes)} classes, but the bundle's file knows {len(task.classes)}."
        )
    parts = parts_of(runner, task, images)
    findings.accuracy = accuracy = task.value(parts)
    count, findings.metric, findings.test = len(images), task.metric, targets_record(images)
    if claimed is None:
        findings.remarks.append("The manifest claims no accuracy.")
        return
    if test.get("labels_sha256") == findings.test["labels_sha256"]:
        allowed = max(REPEAT_TOLERANCE, 3 / count)
        basis = f"on the same {count} test images"
    else:
        # 3.3 standard errors of a difference of two shares: one in a thousand honest bundles would be called wrong.
        before = max(1.0, number(test.get("images")) or count)
        allowed = 3.3 * math.sqrt(max(claimed * (1 - claimed), 0.01) * (1 / count + 1 / before))
        basis = f"on {count} other test images than the manifest's"
        chance = f"{100 * allowed:.1f} {'points' if task.metric.scale == 100 else 'per cent'}"
        findings.remarks.append(f"The {task.metric.name} was taken {basis}; it may differ by {chance} by chance.")
    if not abs(accuracy - claimed) <= (allowed if task.metric.scale == 100 else allowed * abs(claimed)):
        said = f"{task.metric.text(accuracy)} {basis}, the manifest claims {task.metric.text(claimed)}"
        findings.problems.append(f"{task.metric.name}: {said}.")


def _latency_again(
    findings: _Findings,
    model: Path,
    reference: Path,
    runtimes: Mapping[Path, Backend],
    manifest: Mapping[str, Any],
    *,
    limits: TimingLimits,
) -> None:
    """Time the file against the reference; another machine's ratio may differ, this machine's may not."""
    with tempfile.TemporaryDirectory() as folder:
        files, batch = at_batch([model, reference], None, Path(folder))
        clock = SideBySide(dict(zip(files, (runtimes[model], runtimes[reference]), strict=True)))
        timing = compare(files[::-1], clock, batch=batch, limits=limits)[1]
    findings.reference_sha256 = sha256_of(reference)
    keys = ("median_ms", "ratio", "ratio_low", "ratio_high", "verdict")
    findings.latency = {key: getattr(timing, key) for key in keys}
    if timing.note:
        findings.remarks.append(timing.note)
    claim = record(manifest["measurements"], "latency")
    low, high = number(claim.get("ratio_low")), number(claim.get("ratio_high"))
    if low is None or high is None:
        findings.remarks.append("The manifest claims no interval of the latency.")
        return
    here = findings.machine or describe(runtimes[model])
    if runtimes[model] is not runtimes[reference]:
        findings.remarks.append("The reference ran in another runtime than the file; the claim may be of its own.")
    elif any(here[key] != manifest["machine"].get(key) for key in ("cpu_model", "versions")):
        findings.remarks.append("The latency was claimed on another machine or runtime; its ratio may differ here.")
    elif timing.ratio_low > high * LATENCY_TOLERANCE:
        findings.problems.append(
            f"latency: {timing.ratio:.3f} of the reference's time ({timing.ratio_low:.3f} to {timing.ratio_high:.3f}), "
            f"the manifest claims {low:.3f} to {high:.3f} on this machine."
        )
