"""In: the record of a finished job, or of several. Out: what a person wants to know first, as text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def summary(record: Mapping[str, Any], out: Path) -> str:
    """Return what a person wants to know first about a finished job."""
    latency, unpruned = record["latency"], record["best_unpruned"]
    lines = [
        f"{1 / latency['ratio']:.2f} times faster than the uncut float file "
        f"({1 / latency['ratio_high']:.2f} to {1 / latency['ratio_low']:.2f}), verdict: {latency['verdict']}",
        f"{unpruned['ratio'] / latency['ratio']:.2f} times faster than the best unpruned file ({unpruned['name']})",
        f"{record['size_ratio']:.1f} times smaller: {record['size_bytes']:,} bytes, {record['params']:,} parameters, "
        f"{record['macs']:,} multiply-accumulates",
    ]
    lines.append(_accuracy(record))
    lines += [f"bundle: {record['bundle']}", f"report: {out / 'report.html'}"]
    return "\n".join(lines)


def family_summary(record: Mapping[str, Any], page: Path) -> str:
    """Return what a person wants to know first about searches at several limits."""
    lines = []
    for member in record["members"]:
        result = member["result"]
        if result is None:
            lines.append(f"{member['name']}: missed; {member['missed']}")
            continue
        gained = f"{1 / result['latency']['ratio']:.2f} times faster, {result['size_ratio']:.1f} times smaller"
        lines.append(f"{member['name']}: {gained}; {_accuracy(result)}; bundle: {result['bundle']}")
    return "\n".join([*lines, f"page: {page}"])


def _accuracy(record: Mapping[str, Any]) -> str:
    found = record["accuracy"]
    metric = record.get("metric", {"name": "accuracy", "scale": 100.0, "unit": "points"})  # older runs: classifiers
    scale, unit = metric["scale"], metric["unit"]
    if found["test"] is None:
        return "no accuracy is claimed: the data has no labels, so the accuracy guard could not count"
    sign = " %" if scale == 100 else f" {unit}".rstrip()
    drop = f"{found['drop_points']:+.2f} {unit}".rstrip()
    return (
        f"{metric['name']} on the test split {scale * found['test']:.2f}{sign} "
        f"(uncut {scale * found['baseline_test']:.2f}), drop {drop} "
        f"({found['drop_low']:+.2f} to {found['drop_high']:+.2f})"
    )
