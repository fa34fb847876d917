"""In: a float file, a way to make integer files of it and a way to time them. Out: what becomes integer, by the clock.

Blanket INT8 is a gamble, because a float layer between integer ones costs conversions and an integer layer may have no
fast kernel. So whole files are timed: first the exact patterns of `quantize`, then the fastest of them with the faster
Gelu, where the network has one, and with 16 bits in what is float, where the device multiplies them, then the first few
layers and every class of equal layers the other way round. Pieces do not add up; what is chosen was timed as a whole.
Where the clock does not tell files apart, their answers do. What decodes the answers (`ends`) stays float unless
integers are faster there and answer no worse.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto

from hirelc_deploy.compress.integer.ends import End
from hirelc_deploy.compress.integer.forms import SIXTEEN_BITS
from hirelc_deploy.compress.integer.quantize import PATTERNS, SIGMOID_GELU
from hirelc_deploy.compress.onnx_file.export import layer_of_node
from hirelc_deploy.errors import ExportError
from hirelc_deploy.measure.protocol import MARGIN, Timing

LOG = logging.getLogger(__name__)

FIRST_LAYERS = 4
"""So many layers at the image's end are also tried together: there few channels meet many pixels."""

LEAST_GAIN = 0.005
"""A change is taken only when the whole interval of its time is below the time without it by this share."""

COARSER = (SIGMOID_GELU, *SIXTEEN_BITS)
"""Ends of the names of patterns whose float part is approximated: tried, in this order, on the fastest exact one."""

IN_FLOAT = " in a float file"
"""Ends the name of a change to a float file, where the fastest pattern is slower than that."""

AS_FAST = math.exp(MARGIN)
"""Files surely below this multiple of the fastest one's time count as equally fast: their answers tell them apart."""

NEARER = 0.05
"""A file is nearer to the float answers when its divergence is smaller by this share."""

TOGETHER = 8
"""Files timed side by side: each costs a warm-up in every process, and the comparison is with the first of them."""


@dataclass(frozen=True)
class Placement:
    """What becomes integer in the fastest file.

    Attributes:
        pattern: Of the patterns of the target's form.
        float_layers: Weight layers and ends that stay float although the pattern would make them integer.
        ratio: Time of that file / time of the float file.
        candidates: What else was timed: its name to `ratio`, `ratio_low`, `ratio_high` against the float file for
            patterns, against the file it would change for single changes.
        ends: Name of each end to `why` it is one and how many `operators` it has. Where the pattern would make some of
            them integer, also `divergence` and `float_divergence` of the files with and without that, in nats; and
            where the first is no larger, its time against the second as in `candidates`.
    """

    pattern: str
    float_layers: tuple[str, ...]
    ratio: float
    candidates: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    ends: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the placement as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Placement:
        """Rebuild what `to_dict` returned."""
        floats = tuple(value["float_layers"])
        return cls(value["pattern"], floats, value["ratio"], value["candidates"], value.get("ends", {}))


def changes(proto: ModelProto, *, wholly_integer: bool = False) -> dict[str, frozenset[str]]:
    """Return a name for each change that is tried, and the layers that it turns to the other precision.

    Where a blanket file is wholly integer, but for what decodes the answers, only the image's end is tried: amid
    integer layers a float one is slower itself and costs two conversions more.

    Layers are equal, and decided together, when operator, weight shape, groups, strides and input size agree.
    """
    inferred = onnx.shape_inference.infer_shapes(proto).graph
    sizes = {
        value.name: tuple(dimension.dim_value for dimension in value.type.tensor_type.shape.dim)
        for value in (*inferred.value_info, *inferred.input)
    }
    weights = {initializer.name: tuple(initializer.dims) for initializer in proto.graph.initializer}
    layers = layer_of_node(proto)
    order: list[str] = []
    classes: dict[tuple[Any, ...], list[str]] = {}
    for node in proto.graph.node:
        if node.name not in layers:
            continue
        layer = layers[node.name]
        order.append(layer)
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.name != "pads"}
        key = (node.op_type, weights[node.input[1]], str(sorted(attributes.items())), sizes.get(node.input[0]))
        classes.setdefault(key, []).append(layer)
    found = {f"first {count} layers": frozenset(order[:count]) for count in range(2, min(FIRST_LAYERS, len(order)) + 1)}
    for members in () if wholly_integer else classes.values():
        name = members[0] if len(members) == 1 else f"{members[0]} and {len(members) - 1} like it"
        found[name] = frozenset(members)
    return found


def only_in_ends(proto: ModelProto, ends: Sequence[End]) -> set[str]:
    """Return the kinds of operators that decode the answers and are nowhere else in a float file."""
    decoding = frozenset[str]().union(*(end.nodes for end in ends))
    kinds: tuple[set[str], set[str]] = (set(), set())
    for node in proto.graph.node:
        kinds[node.name in decoding].add(node.op_type)
    return kinds[True] - kinds[False]


def place(
    reference: Path,
    tried: Mapping[str, frozenset[str]],
    build: Callable[[str, frozenset[str]], Path],
    time: Callable[[Sequence[Path]], Sequence[Timing]],
    patterns: Sequence[str] = tuple(PATTERNS),
    divergence: Callable[[Path], float] | None = None,
    ends: Sequence[End] = (),
    undecided: Callable[[Mapping[str, frozenset[str]]], Mapping[str, frozenset[str]]] = lambda tried: tried,
    screen: Callable[[Sequence[Path]], Sequence[Timing]] | None = None,
) -> Placement:
    """Return the fastest placement that was found, and among those that are as fast the one nearest to float.

    MobileNetV2 with ImageNet weights: with its first two layers float the divergence is 30 % smaller and the time 0 to
    1 % longer.

    A file that the device refuses is passed over, as OpenVINO's for ARM refuses some of a transformer in FP16.

    Args:
        reference: The float file.
        tried: Of `changes`.
        build: Writes the file of a pattern and the layers and ends that stay float, and returns its path.
        time: Times files side by side against the first of them.
        patterns: Those of the form that the target takes.
        divergence: Of a file's answers from the float ones, in nats; without it the clock alone decides, and ends stay
            float.
        ends: What decodes the answers.
        undecided: Of the changes to float those that may make a file faster, or cost it nothing; the fastest first.
        screen: As `time`, but rough: only a file that it calls perhaps faster is timed more exactly before its answers
            are looked at, and where all of a group are surely slower than `AS_FAST`, what `undecided` names after them
            is not timed at all.
    """
    decoding = frozenset[str]().union(*(end.parts for end in ends))
    tried = {name: layers - decoding for name, layers in tried.items() if layers - decoding}
    best, candidates = _fastest_pattern(reference, patterns, lambda pattern: build(pattern, decoding), time)
    starts = {"": (decoding, dict(undecided(tried)))}
    if candidates[best]["ratio"] > 1:  # then single layers are tried as integer in a float file too
        starts = {IN_FLOAT: (decoding.union(*tried.values()), tried), **starts}
    ends_of_starts = []
    for where, (floats, changes) in starts.items():
        ordered = screen is not None and where != IN_FLOAT
        changed, more, seen = _changed(floats, changes, best, build, time, screen, ordered=ordered)
        ends_of_starts.append((candidates[best]["ratio"] * more, changed))
        candidates |= {f"{name}{where}": summary for name, summary in seen.items()}
    if len(ends_of_starts) > 1:
        final = time([reference, *(build(best, floats) for _, floats in ends_of_starts)])[1:]
        ends_of_starts = [(timing.ratio, floats) for timing, (_, floats) in zip(final, ends_of_starts, strict=True)]
    ratio, floats = min(ends_of_starts, key=lambda end: end[0])
    if divergence is not None:
        timed = {name: layers for name, layers in starts[""][1].items() if name in candidates}
        free = (layers for name, layers in timed.items() if _may_be_as_fast(candidates[name], 1.0))
        others = [(best, floats | layers) for layers in free]
        if floats == decoding:  # as the patterns were timed
            exact = (name for name in candidates.keys() & set(patterns) if not name.endswith(COARSER))
            limit = candidates[best]["ratio"]
            others += [(name, floats) for name in sorted(exact) if _may_be_as_fast(candidates[name], limit)]
        best, floats, more = _nearest((best, floats), others, build, time, divergence)
        ratio *= more
    told: dict[str, dict[str, Any]] = {}
    for decoder in ends:
        told[decoder.name] = {"why": "; ".join(decoder.why), "operators": len(decoder.nodes)}
        if divergence is not None:
            floats, more, summary = _with_end(decoder, best, floats, build, time, divergence)
            ratio *= more
            told[decoder.name] |= summary
    return Placement(best, tuple(sorted(floats)), ratio, candidates, told)


def _with_end(
    end: End,
    pattern: str,
    floats: frozenset[str],
    build: Callable[[str, frozenset[str]], Path],
    time: Callable[[Sequence[Path]], Sequence[Timing]],
    divergence: Callable[[Path], float],
) -> tuple[frozenset[str], float, dict[str, float]]:
    """Return the float layers without an end where it may be integer, its time by that before, and what was seen."""
    current, changed = build(pattern, floats), build(pattern, floats - end.parts)
    if current.read_bytes() == changed.read_bytes():
        return floats, 1.0, {}
    seen = {"divergence": divergence(changed), "float_divergence": divergence(current)}
    if not seen["divergence"] <= seen["float_divergence"]:
        return floats, 1.0, seen
    timing = time([current, changed])[1]
    seen |= _summary(timing)
    if timing.ratio_high < 1 - LEAST_GAIN:
        return floats - end.parts, timing.ratio, seen
    return floats, 1.0, seen


def _fastest_pattern(
    reference: Path,
    patterns: Sequence[str],
    build: Callable[[str], Path],
    time: Callable[[Sequence[Path]], Sequence[Timing]],
) -> tuple[str, dict[str, dict[str, float]]]:
    """Return the fastest pattern, coarser floats among them, and the time of each against the float file."""
    files: dict[bytes, tuple[str, Path]] = {}
    for pattern in (name for name in patterns if not name.endswith(COARSER)):
        path = build(pattern)
        files.setdefault(path.read_bytes(), (pattern, path))
    found = zip(files.values(), _times(reference, [path for _, path in files.values()], time), strict=True)
    candidates = {pattern: _summary(timing) for (pattern, _), timing in found if timing is not None}
    if not candidates:
        raise ExportError("the device refuses the integer files of every pattern; name precisions = ['float'].")
    best = min(candidates, key=lambda name: candidates[name]["ratio"])
    for end in COARSER:
        faster = f"{best}{end}"
        if faster in patterns and (path := build(faster)).read_bytes() not in files:
            (timing,) = _times(build(best), [path], time)
            if timing is not None:
                by_float = candidates[best]["ratio"]
                candidates[faster] = {name: by_float * ratio for name, ratio in _summary(timing).items()}
                best = faster if timing.ratio_high < 1 - LEAST_GAIN else best
    return best, candidates


def _times(
    first: Path, files: Sequence[Path], time: Callable[[Sequence[Path]], Sequence[Timing]]
) -> list[Timing | None]:
    """Return the time of each file against the first one; None for a file that the device refuses."""
    try:
        return list(time([first, *files])[1:])
    except ExportError as error:
        if len(files) == 1:
            LOG.warning("not placed so: %s", error)
            return [None]
        return [timing for file in files for timing in _times(first, [file], time)]


def _may_be_as_fast(summary: Mapping[str, float], fastest: float) -> bool:
    return summary["ratio"] <= fastest * AS_FAST


def _nearest(
    fastest: tuple[str, frozenset[str]],
    others: Sequence[tuple[str, frozenset[str]]],
    build: Callable[[str, frozenset[str]], Path],
    time: Callable[[Sequence[Path]], Sequence[Timing]],
    divergence: Callable[[Path], float],
) -> tuple[str, frozenset[str], float]:
    """Return pattern and float layers of the file nearest to float that is as fast, and its time by the fastest's."""
    file = build(*fastest)
    limit = divergence(file) * (1 - NEARER)
    different = {path.read_bytes(): (path, one) for one in others if (path := build(*one)) != file}
    nearer = sorted(
        ((found, path, one) for path, one in different.values() if (found := divergence(path)) < limit),
        key=lambda each: each[0],
    )[: TOGETHER - 1]
    if nearer:
        timings = time([file, *(path for _, path, _ in nearer)])[1:]
        for timing, (_, _, one) in zip(timings, nearer, strict=True):
            if timing.ratio_high <= AS_FAST:
                return *one, timing.ratio
    return *fastest, 1.0


def _changed(
    floats: frozenset[str],
    tried: Mapping[str, frozenset[str]],
    pattern: str,
    build: Callable[[str, frozenset[str]], Path],
    time: Callable[[Sequence[Path]], Sequence[Timing]],
    screen: Callable[[Sequence[Path]], Sequence[Timing]] | None,
    *,
    ordered: bool,
) -> tuple[frozenset[str], float, dict[str, dict[str, float]]]:
    """Return float layers after the changes that pay, their time by that before, and the time of each single change."""
    current = build(pattern, floats)
    candidates: dict[str, dict[str, float]] = {}
    left = list(tried.items())
    if screen is not None:
        left = []
        for group in _groups(tried.items()):
            looked = _times(current, [build(pattern, floats ^ layers) for _, layers in group], screen)
            seen = {name: _summary(timing) for (name, _), timing in zip(group, looked, strict=True) if timing}
            candidates |= seen
            left += [change for change in group if change[0] in seen and seen[change[0]]["ratio_low"] < 1 - LEAST_GAIN]
            if ordered and all(one["ratio_low"] > AS_FAST for one in seen.values()):
                break
    gains: list[tuple[float, frozenset[str]]] = []
    for group in _groups(left):
        exact = _times(current, [build(pattern, floats ^ layers) for _, layers in group], time)
        for (name, layers), timing in zip(group, exact, strict=True):
            if timing is not None:
                candidates[name] = _summary(timing)
                if timing.ratio_high < 1 - LEAST_GAIN:
                    gains.append((timing.ratio, layers))
    if not gains:
        return floats, 1.0, candidates
    gains.sort(key=lambda gain: gain[0])
    return *_fastest_together(current, gains, floats, pattern, build, time), candidates


def _groups(changes: Iterable[tuple[str, frozenset[str]]]) -> Iterator[list[tuple[str, frozenset[str]]]]:
    waiting = iter(changes)
    while group := list(islice(waiting, TOGETHER)):
        yield group


def _fastest_together(
    current: Path,
    gains: list[tuple[float, frozenset[str]]],
    floats: frozenset[str],
    pattern: str,
    build: Callable[[str, frozenset[str]], Path],
    time: Callable[[Sequence[Path]], Sequence[Timing]],
) -> tuple[frozenset[str], float]:
    """Add up changes, the greatest gain first, none that overlaps another; return the fastest sum and its time."""
    sums: list[frozenset[str]] = []
    turned = frozenset[str]()
    for _, layers in gains:
        if not layers & turned:
            turned |= layers
            sums.append(floats ^ turned)
    sums = sums[-1 : -TOGETHER - 1 : -1]
    timings = time([current, *(build(pattern, each) for each in sums)])[1:]
    ratio, fastest = min(((t.ratio, s) for t, s in zip(timings, sums, strict=True)), key=lambda pair: pair[0])
    return (fastest, ratio) if ratio < 1 else (floats, 1.0)


def _summary(timing: Timing) -> dict[str, float]:
    return {"ratio": timing.ratio, "ratio_low": timing.ratio_low, "ratio_high": timing.ratio_high}
