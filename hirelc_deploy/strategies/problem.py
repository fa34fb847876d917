"""In: tables taken on the device. Out: the choices a search makes and what it may know about them before it tries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hirelc_deploy.outcome import Fidelity, Outcome
from hirelc_deploy.plan import CompressionPlan

Choices = NDArray[np.int64]
"""(decisions,) or (n, decisions) index of the option taken for each decision; the last option of each is `uncut`."""


FISHER = 7
"""Column of `Decision.features` with the Fisher sensitivity, where the problem knows it."""


@dataclass(frozen=True)
class Decision:
    """One thing to decide: the width of a unit (ordered), or the precision of a block's layers (nominal).

    Attributes:
        name: Unit name; for a precision `precision of` its block.
        kind: `width` or `precision`.
        options: Widths ascending, or precision names; the last is the uncut model's own.
        loss: (options,) measured rise of the loss (nats) over the uncut float model when only this decision leaves it.
            The last is 0 for a width, and for a precision what the rounding of its layers costs.
        ms: (options,) change of the predicted whole-network time when only this decision leaves uncut; last 0.
        size_bytes: (options,) change of the weights' bytes, likewise.
        features: (k,) what a policy may see: equal length and meaning over all decisions of a problem.
        layers: Those whose precision it decides; none for a width.
        worth: (options,) Fisher importance of the least important element that a width keeps, relative to the mean of
            its unit; empty for a precision.
    """

    name: str
    kind: str
    block: str
    options: tuple[int | str, ...]
    loss: NDArray[np.float64]
    ms: NDArray[np.float64]
    size_bytes: NDArray[np.float64]
    features: NDArray[np.float64]
    layers: tuple[str, ...] = ()
    worth: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))

    def option_of(self, plan: CompressionPlan) -> int | None:
        """Return the index of the option that a plan takes, or None where it takes what is not offered."""
        if self.kind == "width":
            taken: set[int | str] = {plan.keep.get(self.name, self.options[-1])}
        else:
            asked = {plan.precision_of(layer) for layer in self.layers}
            taken = {self.options[-1] if precision == "auto" else precision for precision in asked}
        option = taken.pop()
        return self.options.index(option) if not taken and option in self.options else None


@dataclass(frozen=True)
class Problem:
    """Everything a strategy may use. Torch, devices and files stay outside.

    Attributes:
        predict_batch: (n, decisions) choices to (n,) predicted whole-network milliseconds, from the device's table with
            real layer shapes (not sums of `Decision.ms`: a layer's time depends on the widths at both of its ends).
        uncut_ms: Prediction for the uncut model in its best precision.
        plan_of: Choices to the plan they mean.
    """

    blocks: tuple[str, ...]
    decisions: tuple[Decision, ...]
    uncut_ms: float
    predict_batch: Callable[[Choices], NDArray[np.float64]]
    plan_of: Callable[[Choices], CompressionPlan]

    def predict_ms(self, choices: Choices) -> float:
        """Return the predicted milliseconds of one plan."""
        return float(self.predict_batch(choices[None])[0])

    def choices_of(self, plan: CompressionPlan) -> Choices | None:
        """Return the choices that a plan means, or None where it takes what is not offered."""
        choices = [decision.option_of(plan) for decision in self.decisions]
        known = {decision.name for decision in self.decisions}
        if None in choices or not plan.keep.keys() <= known:
            return None
        return np.array(choices, dtype=np.int64)


Evaluate = Callable[[CompressionPlan, Fidelity], Outcome]
"""The one path from a plan to an outcome. It answers repeats from the journal, and such answers are not counted."""


class Strategy(Protocol):
    """Proposes choices within a time budget and learns from what came of them. Deterministic for a given seed."""

    name: str

    def propose(self, count: int) -> list[Choices]:
        """Return up to `count` feasible choices (predicted time within budget); fewer when it has no new ones."""

    def observe(self, tried: Sequence[tuple[Choices, Outcome]]) -> None:
        """Learn from outcomes, failures too."""
