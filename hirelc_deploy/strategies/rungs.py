"""In: plans that take equally long, and what each loses as its training goes on. Out: the plans, the best first.

Successive halving (Jamieson and Talwalkar 2016): all train to the first rung, the better half of them to the next.
What a plan loses before training foretells nothing among the best ones: of four ResNet-18s of one predicted time that
lost 0.21 to 0.33 nats before training, accuracies after it are in no order. Nothing is trained twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hirelc_deploy.plan import CompressionPlan

RUNGS = (0.05, 0.15)
"""Shares of a recovery after which its plans are compared."""

STAY = 0.5
"""Share of the plans that go on after a rung."""


def raced(
    plans: Sequence[CompressionPlan],
    loss_at: Callable[[CompressionPlan, float], float],
    rungs: Sequence[float] = RUNGS,
) -> list[CompressionPlan]:
    """Return the plans, those that went on longest first, of equally long ones that which lost least there.

    Args:
        loss_at: Of a plan when a share of its recovery is done; asked with rising shares.
    """
    running, out = list(plans), list[CompressionPlan]()
    for share in rungs:
        if len(running) < 2:
            break
        losses = {plan.digest: loss_at(plan, share) for plan in running}
        running.sort(key=lambda plan: losses[plan.digest])
        stay = max(1, round(STAY * len(running)))
        running, out = running[:stay], running[stay:] + out
    return running + out


def shares_of_a_race(count: int, rungs: Sequence[float] = RUNGS) -> float:
    """Return the recoveries that a race of so many plans trains, its winner's part not counted."""
    total, before = 0.0, 0.0
    for share in rungs:
        if count < 2:
            break
        total += count * (share - before)
        before, count = share, max(1, round(STAY * count))
    return total - before
