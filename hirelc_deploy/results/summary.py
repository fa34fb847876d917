"""In: the record of a finished job. Out: what a person wants to know first, as text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def summary(record: Mapping[str, Any], out: Path) -> str:
    """Return what a person wants to know first about a finished job."""
    latency, unpruned, found = record["latency"], record["best_unpruned"], record["accuracy"]
    lines = [
        f"{1 / latency['ratio']:.2f} times faster than the uncut float file "
        f"({1 / latency['ratio_high']:.2f} to {1 / latency['ratio_low']:.2f}), verdict: {latency['verdict']}",
        f"{unpruned['ratio'] / latency['ratio']:.2f} times faster than the best unpruned file ({unpruned['name']})",
        f"{record['size_ratio']:.1f} times smaller: {record['size_bytes']:,} bytes, {record['params']:,} parameters, "
        f"{record['macs']:,} multiply-accumulates",
    ]
    metric = record.get("metric", {"name": "accuracy", "scale": 100.0, "unit": "points"})  # older runs: classifiers
    scale, unit = metric["scale"], metric["unit"]
    if found["test"] is None:
        lines.append("no accuracy is claimed: the data has no labels, so the accuracy guard could not count")
    else:
        sign = " %" if scale == 100 else f" {unit}".rstrip()
        drop = f"{found['drop_points']:+.2f} {unit}".rstrip()
        lines.append(
            f"{metric['name']} on the test split {scale * found['test']:.2f}{sign} "
            f"(uncut {scale * found['baseline_test']:.2f}), drop {drop} "
            f"({found['drop_low']:+.2f} to {found['drop_high']:+.2f})"
        )
    lines += [f"bundle: {record['bundle']}", f"report: {out / 'report.html'}"]
    return "\n".join(lines)
