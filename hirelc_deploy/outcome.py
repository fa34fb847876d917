"""In: what was learned about a plan. Out: frozen records that go back to the search and into the trial journal."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Fidelity = Literal["F1", "F2", "F3"]
"""F1: sliced and compensated, judged in torch. F2: its integer file, run and timed. F3: F2 after recovery training."""


@dataclass(frozen=True)
class Measured:
    """What one evaluation found. Fields that a fidelity does not measure are None.

    Attributes:
        loss: Mean KL divergence (nats per image) of the model's outputs from the uncut model's, on the selection split.
        accuracy: Share of the selection split answered right, in [0, 1]; None when the data has no labels.
        median_ms: Median time of one inference on the target; F2 and F3 only.
        ratio: Time of this file over the time of the uncut FP32 file, from interleaved runs.
        size_bytes: Bytes of the exported file.
        seconds: Stage name to the seconds it took.
    """

    plan_digest: str
    fidelity: Fidelity
    loss: float
    accuracy: float | None
    params: int
    macs: int
    predicted_ms: float | None = None
    median_ms: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    size_bytes: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """A plan that could not be built or run: an ordinary result that is written down while the search goes on."""

    plan_digest: str
    fidelity: Fidelity
    stage: str
    reason: str
    seconds: Mapping[str, float] = field(default_factory=dict)


Outcome = Measured | Failed


def outcome_to_dict(outcome: Outcome) -> dict[str, Any]:
    """Return the outcome as JSON values, with its kind."""
    value = {f.name: getattr(outcome, f.name) for f in dataclasses.fields(outcome)}
    value["seconds"] = dict(outcome.seconds)
    return {"kind": "measured" if isinstance(outcome, Measured) else "failed", **value}


def outcome_from_dict(value: Mapping[str, Any]) -> Outcome:
    """Rebuild an outcome written by `outcome_to_dict`; keys of a newer version are ignored.

    Raises:
        KeyError, TypeError: It was not written by `outcome_to_dict`.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"an outcome is an object, found {type(value).__name__}")
    kind: type[Measured] | type[Failed] = Measured if value["kind"] == "measured" else Failed
    fields = {f.name: f for f in dataclasses.fields(kind)}
    given = {name: item for name, item in value.items() if name in fields}
    for name, item in given.items():
        if name == "seconds":
            good = isinstance(item, Mapping) and all(map(_is_number, item.values()))
        elif name in TEXTS:
            good = isinstance(item, str)
        else:
            good = _is_number(item) or (item is None and fields[name].default is None) or (name, item) == UNLABELLED
        if not good:
            raise TypeError(f"{name} is {item!r:.60}")
    return kind(**given)


TEXTS = ("plan_digest", "fidelity", "stage", "reason")
UNLABELLED = ("accuracy", None)


def _is_number(value: Any) -> bool:
    """Return whether a JSON value is a number of the kind that is measured; whole ones of at most 64 bits."""
    return isinstance(value, float) or (type(value) is int and -(2**63) <= value < 2**63)
