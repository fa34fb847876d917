"""In: an integer file that loses too much, and ways to build and judge others. Out: the layers to turn back to float.

Sensitivity comes from exported files, not from a model of rounding: each layer in turn is float in an otherwise integer
file, and what that takes off the divergence from the float answers is what the layer's rounding costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hirelc_deploy.errors import ConstraintError

Build = Callable[[frozenset[str]], Path]
"""Writes the integer file in which these layers are float."""


@dataclass(frozen=True)
class Reverted:
    """One layer that went back to float.

    Attributes:
        divergence: What its rounding alone adds to the file's divergence from the float answers, in nats.
        drop_points: Accuracy lost by the file in which it and all layers before it in the list are float.
        ms: By how much that file is slower than the one before it; below 0 where the layer was slower as an integer.
    """

    layer: str
    divergence: float
    drop_points: float
    ms: float


def sensitivity(layers: Sequence[str], build: Build, divergence: Callable[[Path], float]) -> dict[str, float]:
    """Return layer name to the divergence (nats) that its rounding adds, worst first; below 0 where rounding helps."""
    everything = divergence(build(frozenset()))
    found = {layer: everything - divergence(build(frozenset({layer}))) for layer in layers}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def guard(
    layers: Sequence[str],
    build: Build,
    divergence: Callable[[Path], float],
    drop: Callable[[Path], float],
    milliseconds: Callable[[Sequence[Path]], Sequence[float]],
    max_drop: float,
) -> list[Reverted]:
    """Return the worst layers, as many as have to be float for the drop to hold; none where it holds already.

    The number is found by halving, so that few files are judged; it is the least for which the drop was seen to hold.

    Args:
        layers: Those that may go back.
        build: Writes the file in which given layers are float.
        divergence: Of a file from the float answers, in nats; a few hundred images do.
        drop: Accuracy lost by a file, in points, on the split that decides.
        milliseconds: Of files, timed side by side.
        max_drop: Points that may be lost.

    Raises:
        ConstraintError: Even with all these layers float the drop is larger.
    """
    lost = {0: drop(build(frozenset()))}
    if lost[0] <= max_drop:
        return []
    worst = sensitivity(layers, build, divergence)
    order = list(worst)
    low, high = 0, len(order)
    lost[high] = drop(build(frozenset(order)))
    if lost[high] > max_drop:
        raise ConstraintError(
            f"with all {len(order)} layers float the drop is still {lost[high]:.2f} points, allowed are {max_drop:g}; "
            "what is left of it comes from the operators between the layers. Allow more, or use precision float."
        )
    while high - low > 1:
        middle = (low + high) // 2
        lost[middle] = drop(build(frozenset(order[:middle])))
        low, high = (low, middle) if lost[middle] <= max_drop else (middle, high)
    for count in range(1, high):
        if count not in lost:
            lost[count] = drop(build(frozenset(order[:count])))
    ms = milliseconds([build(frozenset(order[:count])) for count in range(high + 1)])
    return [
        Reverted(layer, worst[layer], lost[count], ms[count] - ms[count - 1])
        for count, layer in enumerate(order[:high], start=1)
    ]
