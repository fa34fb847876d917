"""In: integer forms of a network that lose too much, and ways to write, judge and time others. Out: the fastest found.

Where there are images to train on, the placed file is made again of weights that were trained while they were rounded
(`qat`); it is as fast as before. What else can be done is to give back to float: the operators between the layers
(another pattern), and layers. Layers go back together, and
every set of them is judged as a whole file, because pieces do not add up: on a MobileNetV3 one float layer in an
integer file moved the drop up as often as down. What a layer's rounding costs is therefore seen in a file where nothing
else is rounded; there, and not among the errors of all others, it is the layer's own (`alone`). What decodes the
answers (`ends`) goes back as one layer does; alone it would not be integer, because nothing integer feeds it, so it
counts with what it saves in the file where everything is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hirelc_deploy.errors import ConstraintError
from hirelc_deploy.plan import END_OF

LEAST_MS_SHARE = 0.005
"""A layer counts as costing at least this share of the file's time as float: less cannot be told from nothing."""

TOGETHER = 8
"""Files timed side by side with the one that they change."""

MOST_RETURNS = 24
"""Files judged at most while layers are tried as integers again."""

NONE: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Trials:
    """How files of one network are written, judged and timed.

    Attributes:
        build: Writes the integer file of a pattern in which these layers are float.
        divergence: Of a file from the float answers, in nats; a few hundred images do.
        drop: Accuracy lost by a file, in points, on the split that decides.
        milliseconds: Of files, timed side by side.
        trained: Makes the placed file after training it, or says that it cannot be made by None; None where there is
            nothing to train on.
    """

    build: Callable[[str, frozenset[str]], Path]
    divergence: Callable[[Path], float]
    drop: Callable[[Path], float]
    milliseconds: Callable[[Sequence[Path]], Sequence[float]]
    trained: Callable[[], Path | None] | None = None


@dataclass(frozen=True)
class Reverted:
    """One layer, or end, that went back to float.

    Attributes:
        divergence: From the float answers, in nats, of a file in which nothing but this layer is rounded; of an end,
            what it brings to the file in which everything is.
        ms: By how much the integer file gets slower when this layer alone is float; below 0 where it gets faster.
    """

    layer: str
    divergence: float
    ms: float


@dataclass(frozen=True)
class Other:
    """A file that was not taken.

    Attributes:
        trained: The placed file, trained; else one of `pattern` with some layers float.
        floats: Layers that went back.
        points: Accuracy lost.
        ms: Beside those of the file that was taken; 0 where the drop is too large, which is not timed.
    """

    trained: bool
    pattern: str
    floats: tuple[str, ...]
    points: float
    ms: float


@dataclass(frozen=True)
class Guarded:
    """The fastest file found that keeps the drop, and the placed file that it replaces.

    Attributes:
        pattern: Of `quantize.PATTERNS`.
        reverted: Layers that went back, those first that save most divergence per millisecond.
        points_before, points: Accuracy lost by the placed file and by this one.
        ms_before, ms: Times of the two, side by side; both 0 where the placed file keeps the drop and was not timed.
        trained: Its weights were trained while they were rounded.
        others: What else keeps the drop, and the trained file where it does not; slower where it does.
    """

    pattern: str
    reverted: tuple[Reverted, ...]
    points_before: float
    points: float
    ms_before: float
    ms: float
    trained: bool = False
    others: tuple[Other, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Guarded:
        """Rebuild what `to_dict` returned."""
        reverted = tuple(Reverted(**step) for step in value["reverted"])
        others = tuple(Other(**{**other, "floats": tuple(other["floats"])}) for other in value.get("others", ()))
        return cls(**{**value, "reverted": reverted, "others": others})


@dataclass(frozen=True)
class _Candidate:
    path: Path
    pattern: str
    reverted: tuple[Reverted, ...]
    points: float
    trained: bool = False

    def other(self, ms: float) -> Other:
        return Other(self.trained, self.pattern, tuple(step.layer for step in self.reverted), self.points, ms)


def guard(patterns: Sequence[str], layers: Sequence[str], trials: Trials, max_drop: float) -> Guarded:
    """Return the fastest file found whose drop is at most `max_drop` points.

    Candidates: the placed file, trained; the fastest pattern that keeps the drop with all its layers integer; the
    placed pattern, and the one that loses least, with as few layers float as do. All are timed side by side.

    Args:
        patterns: Fastest first; the first one is the placed one.
        layers: Layers and ends that are integer in the placed file and may go back.

    Raises:
        ConstraintError: Even with all these layers float the drop is larger.
    """
    placed = patterns[0]
    lost: dict[str, float] = {}
    for pattern in patterns:
        lost[pattern] = trials.drop(trials.build(pattern, NONE))
        if lost[pattern] <= max_drop:
            break
    before = lost[placed]
    if before <= max_drop:
        return Guarded(placed, (), before, before, 0.0, 0.0)
    path = trials.trained() if trials.trained else None
    trained = [_Candidate(path, placed, (), trials.drop(path), trained=True)] if path else []
    found = [candidate for candidate in trained if candidate.points <= max_drop]
    least = min(lost, key=lambda pattern: lost[pattern])
    if lost[least] <= max_drop:
        found.append(_Candidate(trials.build(least, NONE), least, (), lost[least]))
    remains = {}
    for pattern in dict.fromkeys((placed, least)):
        if lost[pattern] > max_drop:
            steps, remains[pattern] = turn_back(pattern, layers, trials, max_drop)
            if remains[pattern] <= max_drop:
                path = trials.build(pattern, frozenset(step.layer for step in steps))
                found.append(_Candidate(path, pattern, steps, remains[pattern]))
    if not found:
        raise ConstraintError(
            f"with all {len(layers)} layers float the drop, with one standard error, is still "
            f"{min(remains.values()):.2f} points, allowed are {max_drop:g}; what is left comes from the operators "
            "between the layers, or from too few selection images. Allow more, or use precision float."
        )
    first, *times = trials.milliseconds([trials.build(placed, NONE), *(candidate.path for candidate in found)])
    (ms, best), *rest = sorted(zip(times, found, strict=True), key=lambda pair: pair[0])
    others = [candidate.other(slower) for slower, candidate in rest]
    others += [candidate.other(0.0) for candidate in trained if candidate not in found]
    return Guarded(best.pattern, best.reverted, before, best.points, first, ms, best.trained, tuple(others))


def turn_back(
    pattern: str, layers: Sequence[str], trials: Trials, max_drop: float
) -> tuple[tuple[Reverted, ...], float]:
    """Return layers whose going back lets a pattern keep the drop, and what is lost then; all layers where none do.

    Layers are ordered by the divergence they save per millisecond; the number of them is found by halving; then
    parts of them are tried as integers again, larger parts first. Every step judges a whole file.
    """
    judged: dict[frozenset[str], float] = {}

    def lost(floats: Sequence[str]) -> float:
        key = frozenset(floats)
        if key not in judged:
            judged[key] = trials.drop(trials.build(pattern, key))
        return judged[key]

    if lost(layers) > max_drop:
        return (), lost(layers)
    steps = {step.layer: step for step in priced(pattern, layers, trials)}
    order = list(steps)
    low, high = 0, len(order)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if lost(order[:middle]) <= max_drop else (middle, high)
    kept = given_back(order[:high], lambda floats: lost(floats) <= max_drop)
    return tuple(steps[layer] for layer in kept), lost(kept)


def priced(pattern: str, layers: Sequence[str], trials: Trials) -> list[Reverted]:
    """Return what each layer's rounding costs and saves, those first that save most divergence per millisecond."""
    whole = frozenset(layers)
    everything = trials.build(pattern, NONE)
    alone = {
        layer: trials.divergence(everything) - trials.divergence(trials.build(pattern, frozenset({layer})))
        if layer.startswith(END_OF)
        else trials.divergence(trials.build(pattern, whole - {layer}))
        for layer in layers
    }
    ms: dict[str, float] = {}
    for start in range(0, len(layers), TOGETHER):
        group = layers[start : start + TOGETHER]
        times = trials.milliseconds([everything, *(trials.build(pattern, frozenset({layer})) for layer in group)])
        ms |= {layer: time - times[0] for layer, time in zip(group, times[1:], strict=True)}
        least = LEAST_MS_SHARE * times[0]
    steps = [Reverted(layer, alone[layer], ms[layer]) for layer in layers]
    return sorted(steps, key=lambda step: -step.divergence / max(step.ms, least))


def given_back(floats: Sequence[str], holds: Callable[[Sequence[str]], bool]) -> list[str]:
    """Return float layers without those that may be integers after all, tried in parts that halve, last ones first."""
    kept, tries = list(floats), 0
    size = len(kept) // 2
    while size and tries < MOST_RETURNS:
        end = len(kept)
        while end > 0 and tries < MOST_RETURNS:
            rest = kept[: max(end - size, 0)] + kept[end:]
            tries += 1
            if holds(rest):
                kept = rest
            end -= size
        size //= 2
    return kept
