"""In: what files of trained plans answered on the same images. Out: who is ahead at equal seconds, with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hirelc_deploy.tasks.contract import Task
from hirelc_deploy.tasks.paired import Z_95, PairedDrop, paired_drop


@dataclass(frozen=True)
class Trained:
    """The plan of one search, and what became of it.

    Attributes:
        search_seconds: What finding the plan took.
        epochs: Of its training.
        ratio: Time of its file over that of the uncut float file.
        parts: What each test image brings to the metric of its file.
    """

    strategy: str
    seed: int
    budget_ms: float
    search_seconds: float
    epochs: float
    ratio: float = math.nan
    parts: Sequence[Any] = field(default=(), repr=False)


def side_by_side(task: Task, trained: Sequence[Trained], ours: str) -> list[dict[str, Any]]:
    """Return for each budget, the longest first, what every strategy ends at, and how far ours is ahead of it."""
    found = []
    for budget_ms in sorted({one.budget_ms for one in trained}, reverse=True):
        here = [one for one in trained if one.budget_ms == budget_ms]
        own = {one.seed: one for one in here if one.strategy == ours}
        rows = []
        for name in dict.fromkeys(one.strategy for one in here):
            theirs = [one for one in here if one.strategy == name]
            row: dict[str, Any] = {
                "strategy": name,
                "seeds": [one.seed for one in theirs],
                "values": [task.value(one.parts) for one in theirs],
                **{key: [getattr(one, key) for one in theirs] for key in ("ratio", "search_seconds", "epochs")},
            }
            if name != ours:
                leads = [paired_drop(task, own[one.seed].parts, one.parts) for one in theirs]
                row["lead"] = dict(zip(("points", "low", "high"), over_seeds(leads), strict=True))
            rows.append(row)
        found.append({"budget_ms": budget_ms, "strategies": rows})
    return found


def over_seeds(leads: Sequence[PairedDrop]) -> tuple[float, float, float]:
    """Return the mean of what one side is ahead by over several trainings, and its 95 % interval.

    All trainings are judged on the same images, so these images' part of the error is not divided by their number; what
    differs between trainings is. One training says nothing of that part.
    """
    points = np.array([lead.points for lead in leads])
    images = np.mean([((lead.high - lead.low) / (2 * Z_95)) ** 2 for lead in leads])
    trainings = points.var(ddof=1) / len(points) if len(points) > 1 else 0.0
    half_width = Z_95 * math.sqrt(images + trainings)
    mean = float(points.mean())
    return mean, mean - half_width, mean + half_width


def trained_lines(record: Mapping[str, Any], ours: str) -> list[str]:
    """Return what `side_by_side` found as text, one table for each budget."""
    scale, unit = record["metric"]["scale"], record["metric"]["unit"] or record["metric"]["name"]
    lines = []
    for budget in record["budgets"]:
        name = record["metric"]["name"]
        lines.append(
            f"after training, {budget['budget_ms']:.4g} ms: {name:>12}  times  epochs  {ours} ahead by ({unit})"
        )
        for row in sorted(budget["strategies"], key=lambda row: -float(np.mean(row["values"]))):
            value, times, epochs = (float(np.mean(row[key])) for key in ("values", "ratio", "epochs"))
            lead = row.get("lead")
            ahead = "" if lead is None else f"{lead['points']:+.2f} ({lead['low']:+.2f} to {lead['high']:+.2f})"
            lines.append(f"{row['strategy']:<28} {scale * value:9.2f}  {1 / times:5.2f}  {epochs:6.3g}  {ahead}")
    return lines
