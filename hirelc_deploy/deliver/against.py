"""In: what `verify` found of a new bundle, and a baseline. Out: what became worse, and whether that is allowed.

A baseline is an older bundle, or what `verify --json` printed of one. With the older bundle both files run side by side
here, so any machine will do. From a record only numbers are there: they are compared where the test images, the machine
and the reference are the same, else not at all.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hirelc_deploy.deliver.read import MODEL, json_object, number, record
from hirelc_deploy.errors import InputError
from hirelc_deploy.measure.backend import Backend
from hirelc_deploy.measure.batch import at_batch
from hirelc_deploy.measure.machine import fingerprint
from hirelc_deploy.measure.protocol import FULL, TimingLimits, compare
from hirelc_deploy.measure.runtimes import SideBySide
from hirelc_deploy.tasks.contract import Metric

MAX_DROP = 1.0
"""Points (or the metric's unit) that may be lost where nothing is said, as for a search."""
MAX_SLOWDOWN = 10.0
"""Per cent of latency where nothing is said: two timings of one file on other days agree within this."""

FACTS = ("accuracy", "metric", "test", "latency", "machine", "reference_sha256")
"""Keys of what `verify --json` prints that a comparison needs."""


@dataclass(frozen=True)
class Change:
    """One figure of a new bundle beside the baseline's.

    Attributes:
        name: `accuracy` (whatever the metric is called) or `latency`.
        worse: Whether it is worse than allowed; None where the two cannot be compared.
        text: What was compared and what came of it, or why nothing could be, as a sentence.
        change: Points (or the metric's unit) lost, or per cent slower; below 0 where it is better.
        allowed: The limit of `change`.
    """

    name: str
    worse: bool | None
    text: str
    change: float | None
    allowed: float


def check_limits(against: Path | None, max_drop: float | None, max_slowdown: float | None) -> None:
    """Raise InputError for limits that say nothing: without a baseline, or no number from 0 on."""
    for option, value in (("max_drop", max_drop), ("max_slowdown", max_slowdown)):
        if value is None:
            continue
        if against is None:
            raise InputError(f"{option} limits a comparison with a baseline; give the baseline as `against`.")
        if not 0 <= value < math.inf:
            raise InputError(f"{option} is {value}; give a number from 0 on.")


def read_baseline(path: Path) -> dict[str, Any]:
    """Return what `verify --json` printed of an older bundle; raises InputError for anything else."""
    if not path.is_file():
        raise InputError(
            f"{path}: no such baseline; give an older bundle, or a file that `verify --json` wrote of one."
        )
    value = json_object(path)
    if missing := [key for key in FACTS if key not in value]:
        raise InputError(
            f"{path}: no baseline ({missing[0]!r} is missing); write one with `hirelc-deploy verify BUNDLE --json`."
        )
    wrong = {key: "an object" for key in ("metric", "test", "latency") if not _object_or_none(value[key])}
    if not isinstance(value["machine"], dict | None):
        wrong["machine"] = "an object"
    if value["accuracy"] is not None and number(value["accuracy"]) is None:
        wrong["accuracy"] = "a number"
    if isinstance(value["latency"], dict):
        ratios = [number(value["latency"].get(key)) for key in ("ratio", "ratio_low", "ratio_high")]
        if any(ratio is None or ratio <= 0 for ratio in ratios):
            wrong["latency"] = "an object with ratio, ratio_low and ratio_high above 0"
    if wrong:
        key, kind = next(iter(wrong.items()))
        raise InputError(f"{path}: {key} must be {kind}; write the baseline anew with `hirelc-deploy verify --json`.")
    if value.get("ok") is not True:
        raise InputError(f"{path}: the baseline's own bundle was not what it says; take one that is.")
    return value


def _object_or_none(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def accuracy_change(new: Mapping[str, Any], old: Mapping[str, Any], max_drop: float | None) -> Change:
    """Compare the metric of two results of `verify`, which must be of the same test images.

    Raises:
        InputError: `max_drop` was given, and there is nothing to hold against it.
    """
    allowed = MAX_DROP if max_drop is None else max_drop
    reason = None
    if new["accuracy"] is None:
        reason = "the accuracy of the new bundle was not taken; give --data"
    elif old["accuracy"] is None:
        reason = "the baseline has no accuracy; write it again with --data"
    elif record(new, "metric") != record(old, "metric"):
        reason = f"the baseline's metric is {record(old, 'metric').get('name')}, not {record(new, 'metric')['name']}"
    elif record(new, "test").get("labels_sha256") != record(old, "test").get("labels_sha256"):
        reason = "the baseline's accuracy is of other test images; write it again with this --data"
    if reason is not None:
        return _not_compared("accuracy", reason, allowed, max_drop is not None)
    metric = Metric(**new["metric"])
    lost = metric.drop(old["accuracy"], new["accuracy"])
    return Change(
        "accuracy",
        lost > allowed + 1e-9,
        f"{metric.name} {metric.text(new['accuracy'])}, the baseline's is {metric.text(old['accuracy'])}: "
        f"a drop of {lost:.2f}{_unit(metric)}, {allowed:g} allowed.",
        lost,
        allowed,
    )


def _unit(metric: Metric) -> str:
    return f" {metric.unit}" if metric.unit else ""


def latency_change(new: Mapping[str, Any], old: Mapping[str, Any], max_slowdown: float | None) -> Change:
    """Compare the time ratios of two results of `verify`: of one machine and one reference.

    Milliseconds are not compared, because they move with the load of the day; the ratio to the same reference does not.

    Raises:
        InputError: `max_slowdown` was given, and there is nothing to hold against it.
    """
    allowed = MAX_SLOWDOWN if max_slowdown is None else max_slowdown
    before, after = record(old, "latency"), record(new, "latency")
    reason = None
    if not after:
        reason = "the latency of the new bundle was not taken; give --reference"
    elif not before:
        reason = "the baseline has no latency; write it again with --reference"
    elif new["reference_sha256"] != old["reference_sha256"]:
        reason = "the baseline was timed against another reference"
    elif not _same_machine(record(new, "machine"), record(old, "machine")):
        reason = (
            "milliseconds of another machine or runtime cannot be compared; give the older bundle itself as the "
            "baseline, and both run side by side here"
        )
    if reason is not None:
        return _not_compared("latency", reason, allowed, max_slowdown is not None)
    ratio = after["ratio"] / before["ratio"]
    low, high = after["ratio_low"] / before["ratio_high"], after["ratio_high"] / before["ratio_low"]
    return _slowdown(ratio, low, high, allowed)


def latency_side_by_side(
    new: Path, old: Path, runtimes: Sequence[Backend], max_slowdown: float | None, limits: TimingLimits = FULL
) -> Change:
    """Time the files of two bundles in turns on this device, each in its runtime: that of the new one is first."""
    with tempfile.TemporaryDirectory() as folder:
        files, batch = at_batch([old / MODEL, new / MODEL], None, Path(folder))
        clock = SideBySide(dict(zip(files, reversed(runtimes), strict=True)))
        timing = compare(files, clock, batch=batch, limits=limits)[1]
    allowed = MAX_SLOWDOWN if max_slowdown is None else max_slowdown
    return _slowdown(timing.ratio, timing.ratio_low, timing.ratio_high, allowed)


def _slowdown(ratio: float, low: float, high: float, allowed: float) -> Change:
    """Worse only where the whole interval is beyond the limit: noise must not fail a build."""
    worse = low > 1 + allowed / 100
    doubt = " The interval reaches beyond what is allowed." if not worse and high > 1 + allowed / 100 else ""
    text = f"latency {ratio:.3f} of the baseline's ({low:.3f} to {high:.3f}), up to {1 + allowed / 100:.3f} allowed."
    return Change("latency", worse, text + doubt, 100 * (ratio - 1), allowed)


def _same_machine(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    try:
        return fingerprint(json.loads(json.dumps(one))) == fingerprint(other)
    except KeyError:
        return False


def _not_compared(name: str, reason: str, allowed: float, asked: bool) -> Change:
    if asked:
        raise InputError(f"the {name} cannot be held against the baseline: {reason}.")
    return Change(name, None, f"{name} not compared: {reason}.", None, allowed)
