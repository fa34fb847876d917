"""In: an outcome and what was asked for. Out: one number to learn from, with each of its terms by name."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hirelc_deploy.outcome import Failed, Outcome

FAILED_REWARD = -5.0
"""A plan that cannot be built. log1p(x) = 5 at 147 times the scale: worse than any plan that still works."""

MS_WEIGHT = 10.0
"""1 % over the budget costs 0.1: about as much as a tenth more loss, so that missing the limit never pays."""


@dataclass(frozen=True)
class Goal:
    """What a reward is measured against.

    Attributes:
        budget_ms: Limit on the time of one inference.
        loss_scale: The loss (nats) that counts as one: what the solver's answer is predicted to lose.
        target_loss: A loss at or below this is as good as none.
        target_params: So many parameters, or fewer, are as good as none; None where size does not matter.
        size_weight: Of the size's term against the others; members of an ensemble differ in it.
    """

    budget_ms: float
    loss_scale: float
    target_loss: float = 0.0
    target_params: int | None = None
    size_weight: float = 0.0


@dataclass(frozen=True)
class Reward:
    """Terms of a reward, each 0 at best. Nothing is earned by beating a target."""

    loss: float = 0.0
    ms: float = 0.0
    size: float = 0.0
    failed: float = 0.0

    @property
    def total(self) -> float:
        """Return the sum of the terms."""
        return self.loss + self.ms + self.size + self.failed


def reward_of(outcome: Outcome, goal: Goal) -> Reward:
    """Return the reward of an outcome.

    The loss term is -log1p(excess / scale): equal steps for equal ratios once the loss is large, so that one collapsed
    plan in a batch does not drown the differences between the good ones. The ms term is 0 within the budget, the size
    term -weight * log(params / target) above the target and 0 below.
    """
    if isinstance(outcome, Failed) or not math.isfinite(outcome.loss):
        return Reward(failed=FAILED_REWARD)
    excess = max(0.0, outcome.loss - goal.target_loss)
    ms = outcome.median_ms if outcome.median_ms is not None else outcome.predicted_ms
    over = 0.0 if ms is None else max(0.0, ms / goal.budget_ms - 1.0)
    larger = 0.0 if goal.target_params is None else max(0.0, math.log(outcome.params / goal.target_params))
    return Reward(-math.log1p(excess / goal.loss_scale), ms=-MS_WEIGHT * over, size=-goal.size_weight * larger)
