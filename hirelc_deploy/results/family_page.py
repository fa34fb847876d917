"""In: the record of searches at several limits. Out: one self-contained HTML page with the curve that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from hirelc_deploy.results.scatter import Drawing, Point, draw, frame
from hirelc_deploy.results.values import MetricWords, bytes_text, seconds_text, signed, times_text
from hirelc_deploy.runs import write_atomic

SIZES = (860, 420), (360, 340)
"""(width, height) in pixels of the curve on a desktop and on a phone."""


def write_page(record: Mapping[str, Any], path: Path) -> Path:
    """Write the page of a `family.json`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hirelc_deploy.results", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    words = MetricWords.of(next((m["result"] for m in record["members"] if m["result"]), {}))
    page = environment.get_template("family.html.j2").render(
        title=f"{record['model']} at {len(record['members'])} limits",
        record=record,
        words=words,
        rows=[_row(member, words) for member in record["members"]],
        common=_common(record["members"]),
        drawings=_drawings(record["members"], words),
        seconds=seconds_text(record["seconds"]),
    )
    write_atomic(path, page)
    return path


def _common(members: Sequence[Mapping[str, Any]]) -> str:
    """Return the limits that all have, as text; empty without any."""
    first, *others = (member["limits"] for member in members)
    return ", ".join(
        f"{name.replace('_', ' ')} {value:g}"
        for name, value in first.items()
        if all(limits.get(name) == value for limits in others)
    )


def _row(member: Mapping[str, Any], words: MetricWords) -> dict[str, Any]:
    """Return the cells of one of the limits as a person reads them."""
    row = {"name": member["name"], "missed": member["missed"], "cells": []}
    result = member["result"]
    if result is None:
        return row
    latency, found = result["latency"], result["accuracy"]
    times, low, high = (1 / latency[name] for name in ("ratio", "ratio_high", "ratio_low"))
    drop = "–"
    if found["drop_points"] is not None:
        drop = f"{signed(found['drop_points'])} ({signed(found['drop_low'])} to {signed(found['drop_high'])})"
    cells = [
        f"{times_text(times)} ({low:.2f} to {high:.2f})",
        f"{latency['median_ms']:.3g}\u00a0ms",
        words.value(found["test"]),
        drop,
        bytes_text(result["size_bytes"]),
        seconds_text(member["seconds"]),
    ]
    return {**row, "cells": cells}


def _drawings(members: Sequence[Mapping[str, Any]], words: MetricWords) -> list[Drawing]:
    """Return the curve for a desktop and for a phone; nothing without labels."""
    results = {member["name"]: member["result"] for member in members if member["result"]}
    judged = {name: one for name, one in results.items() if one["accuracy"]["test"] is not None}
    if not judged:
        return []
    points = [
        Point(one["latency"]["ratio"], words.scale * one["accuracy"]["test"], "shipped", name)
        for name, one in judged.items()
    ]
    uncut = next(iter(judged.values()))["accuracy"]["baseline_test"]
    points.append(Point(1.0, words.scale * uncut, "unpruned", "uncut float"))
    y_range = frame(points, 1.0 if words.scale == 100 else 1e-3 * max(abs(point.y) for point in points) + 1e-12)
    return [draw(points, y_range, size, higher_is_better=words.higher_is_better) for size in SIZES]
