"""In: JSON values that may be anything. Out: what they must be, and how people read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LARGEST = 1e30
"""No figure of a run is larger: what is, is damage, and would overflow the arithmetic below."""

Record = Mapping[str, Any]


def record(value: Any) -> Record:
    """Return an object, or an empty one for anything else."""
    return value if isinstance(value, Mapping) else {}


def list_of(value: Any) -> list[Any]:
    """Return a list, or an empty one for anything else."""
    return value if isinstance(value, list) else []


def records(value: Any) -> list[Record]:
    """Return the objects of a list."""
    return [item for item in list_of(value) if isinstance(item, Mapping)]


def number(value: Any) -> float | None:
    """Return a number that is finite, as a time, a count or an accuracy must be; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < LARGEST else None


def positive(value: Any) -> float | None:
    """Return a finite number above 0; None for anything else."""
    found = number(value)
    return found if found is not None and found > 1 / LARGEST else None


def text_of(value: Any) -> str:
    """Return a text, or the texts of a list with spaces between; empty for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return " ".join(value)
    return ""


def flat(value: Record, prefix: str = "") -> list[tuple[str, str]]:
    """Return nested JSON as (dotted key, text) rows."""
    rows: list[tuple[str, str]] = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            rows += flat(item, f"{prefix}{key}.")
        elif isinstance(item, list):
            rows.append((f"{prefix}{key}", ", ".join(str(part) for part in item)))
        elif item is not None and item != "":
            rows.append((f"{prefix}{key}", str(item)))
    return rows


def count_text(value: float | None) -> str:
    """Return a whole number in four digits or less: 940, 2.8 k, 140 M."""
    if value is None:
        return "–"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}\u00a0{unit}"
    return f"{value:.0f}"


def bytes_text(value: float | None) -> str:
    """Return bytes: 940 B, 2.8 kB."""
    return "–" if value is None else f"{count_text(value)}B" if abs(value) >= 1000 else f"{value:.0f}\u00a0B"


def ms_text(value: float | None) -> str:
    """Return milliseconds."""
    return "–" if value is None else f"{value:.3g}\u00a0ms"


def seconds_text(value: float | None) -> str:
    """Return seconds, minutes or hours."""
    if value is None:
        return "–"
    if value < 100:
        return f"{value:.1f}\u00a0s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}\u00a0h {minutes}\u00a0min" if hours else f"{minutes}\u00a0min {seconds}\u00a0s"


def times_text(factor: float) -> str:
    """Return a factor."""
    return f"{factor:.2f}\u00a0×" if factor < 10 else f"{factor:.1f}\u00a0×"


def percent_text(share: float | None, digits: int = 1) -> str:
    """Return a share as per cent."""
    return "–" if share is None else f"{100 * share:.{digits}f}\u00a0%"


def signed(value: float) -> str:
    """Return a number with its sign."""
    return f"{value:+.2f}".replace("-", "−")


@dataclass(frozen=True)
class MetricWords:
    """How a page speaks of the metric of a run; see `tasks.contract.Metric`. Runs that do not say were classifiers."""

    name: str = "accuracy"
    scale: float = 100.0
    unit: str = "points"
    higher_is_better: bool = True

    @classmethod
    def of(cls, result: Record) -> MetricWords:
        """Return the words for the metric of a result."""
        told = record(result.get("metric"))
        scale = positive(told.get("scale")) or 100.0
        better = told.get("higher_is_better")
        unit = text_of(told.get("unit")) if "unit" in told else "points"
        return cls(text_of(told.get("name")) or "accuracy", scale, unit, better if isinstance(better, bool) else True)

    @property
    def title(self) -> str:
        """The name at the start of a sentence."""
        return self.name[:1].upper() + self.name[1:]

    @property
    def axis(self) -> str:
        """What stands behind the name on an axis."""
        return " (%)" if self.scale == 100 else f" ({self.unit})" if self.unit else ""

    def value(self, value: float | None, digits: int = 2) -> str:
        """Return a value of the metric as a person reads it."""
        if value is None:
            return "–"
        return percent_text(value, digits) if self.scale == 100 else f"{self.scale * value:.4g} {self.unit}".rstrip()
