"""In: a pipeline and a table of layer times. Out: the `Problem` of a search, every loss and time measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hirelc_deploy.errors import ExportError
from hirelc_deploy.graph.model_graph import Layer, ModelGraph, Share, Unit
from hirelc_deploy.measure.table import LatencyTable, LayerKey, calibrate
from hirelc_deploy.outcome import Failed, Measured
from hirelc_deploy.pipeline import Pipeline, kept_features
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.search.knapsack import smallest, solve
from hirelc_deploy.search.problem import Choices, Decision, Problem

CONSIDERED = 16
"""Widths that are timed per unit at most, before the staircase drops those that buy no time."""

LEAST_KEPT = 0.25
"""Narrower than this share of a unit is not measured: a few steps must span the widths that plans will use."""

KERNEL_STEPS = (32, 16, 8, 4, 2, 1)
"""Vector kernels work on so many channels at a time: of widths that are as fast, multiples of these keep the most."""

LEVELS = 5
"""Joint widths at which a layer between more than two decisions is timed at each of its ends."""

MEASURED_SINGLES = 120
"""Up to so many (unit, width) pairs each one's loss is measured; beyond, only those that a solution comes near."""

PROBED_BUDGETS = (0.2, 0.4, 0.6, 0.8)
"""Where between the shortest and the uncut time the solutions lie whose neighbourhood is measured."""

MIN_STEP = 0.02
"""A width is offered only if it makes the unit's layers at least this share faster than the next wider one."""

NO_GATE = -1
"""Where the position of a decision would stand: no choice leaves the layer out."""

PRECISIONS = ("float", "int8")
"""Options of a block that the fastest uncut file makes integer."""

FAILED_LOSS = 10.0
"""Loss in nats charged to an option that could not be built: worse than guessing among thousands of classes."""


@dataclass(frozen=True)
class NetworkTime:
    """Whole-network time from a device's layer table: milliseconds = fixed + scale * sum of layer times.

    `fixed` and `scale` are fitted to whole files that were timed on the device (pieces do not add up by themselves).
    """

    graph: ModelGraph
    table: LatencyTable
    fixed: float
    scale: float
    _known: dict[tuple[str, int, int, str], float] = field(default_factory=dict)

    def layer_ms(self, layer: Layer, keep: Mapping[str, int], precision: str) -> float:
        """Return the table's time of one layer at the widths that `keep` leaves it."""
        narrow, wide = kept_features(layer, self.graph, keep)
        key = (layer.name, narrow, wide, precision)
        if key not in self._known:
            there = narrow and wide  # else its branch is left out
            self._known[key] = self.table.layer_ms(layer.shape, narrow, wide, precision) if there else 0.0
        return self._known[key]

    def predict(self, keep: Mapping[str, int], precision_of: Callable[[str], str]) -> float:
        """Return predicted milliseconds of the network at these widths and precisions."""
        total = sum(self.layer_ms(layer, keep, precision_of(layer.name)) for layer in self.graph.layers)
        return self.fixed + self.scale * total


def fit_network_time(pipeline: Pipeline, table: LatencyTable, samples: int = 3) -> tuple[NetworkTime, dict[str, Any]]:
    """Time a few uniformly cut integer files and fit the table to them; returns the fit and how far off it stays.

    The files carry untrained weights: time does not depend on them.
    """
    graph = pipeline.graph
    raw = NetworkTime(graph, table, 0.0, 1.0)
    keeps = [uniform_keep(graph, ratio) for ratio in np.linspace(0.375, 1.0, samples)]

    measured = np.full(len(keeps), np.nan)
    failed = None
    for index, keep in enumerate(pipeline.progress.track(keeps, "whole-network times", len(keeps))):
        outcome = pipeline.outcome(CompressionPlan(keep, default_precision="auto"), "F2")
        if isinstance(outcome, Measured) and outcome.ratio is not None:
            measured[index] = outcome.ratio * pipeline.reference_ms
        elif isinstance(outcome, Failed):
            failed = outcome
    predicted = np.array([raw.predict(keep, lambda _: "int8") for keep in keeps])
    good = np.isfinite(measured)
    if failed is not None and not good.any():
        raise ExportError(
            f"search: no file of this model could be built and timed; {failed.stage} says: {failed.reason}"
        )
    fixed, scale = calibrate(predicted[good].tolist(), measured[good].tolist())
    error = np.abs(fixed + scale * predicted[good] - measured[good]) / measured[good]
    facts = {
        "fixed_ms": fixed,
        "scale": scale,
        "largest_relative_error": float(error.max()),
        "samples": int(good.sum()),
    }
    return NetworkTime(graph, table, fixed, scale), facts


def uniform_keep(graph: ModelGraph, ratio: float) -> dict[str, int]:
    """Return the legal width nearest to `ratio` for every unit."""
    return {unit.name: min(unit.widths, key=lambda width: abs(width - ratio * unit.size)) for unit in graph.units}


def offered_widths(unit: Unit, network: NetworkTime, most: int, least_kept: float = LEAST_KEPT) -> tuple[int, ...]:
    """Return at most `most` widths of a unit that buy time, ascending, the uncut one last; before them 0 for a branch.

    Of the timed staircase the widest width of each step stays; of these, those that divide the time most evenly.
    """
    layers = [layer for layer in network.graph.layers if unit.name in layer.units]

    def ms_at(width: int) -> float:
        return sum(network.layer_ms(layer, {unit.name: width}, "int8") for layer in layers)

    offered, times = [unit.size], [ms_at(unit.size)]
    for width in reversed(considered_widths(unit, least_kept)):
        if (ms := ms_at(width)) <= times[-1] * (1 - MIN_STEP):
            offered.append(width)
            times.append(ms)
    widths = reversed([offered[index] for index in evenly_spaced(np.array(times), most)])
    return (0, *widths) if unit.branch else tuple(widths)


def considered_widths(unit: Unit, least_kept: float = LEAST_KEPT) -> list[int]:
    """Return at most CONSIDERED legal widths below the uncut one, ascending: multiples of the largest kernel step."""
    legal = [width for width in unit.widths if least_kept * unit.size <= width < unit.size] or list(unit.widths[:-1])
    for step in KERNEL_STEPS:
        friendly = [width for width in legal if width % step == 0]
        # Half of what may be timed, or all there is: a coarser step would throw choices away.
        if len(friendly) >= min(len(legal), CONSIDERED // 2):
            return [friendly[index] for index in evenly_spaced(np.array(friendly, np.float64), CONSIDERED)]
    return legal


def evenly_spaced(positions: NDArray[np.float64], most: int) -> list[int]:
    """Return at most `most` indices into monotone `positions`, both ends among them, as evenly spaced as there are."""
    if len(positions) <= most:
        return list(range(len(positions)))
    aims = np.linspace(positions[0], positions[-1], most)
    nearest = np.abs(positions[None] - aims[:, None]).argmin(axis=1)
    return [int(index) for index in np.unique(nearest)]


@dataclass(frozen=True)
class Between:
    """A layer whose widths more than two decisions set: its time between those at a few joint widths.

    Attributes:
        inputs, outputs: Decision to the (options,) features that each option takes away at this end.
        narrow, wide: (LEVELS,) features kept when all these decisions are at the same level, ascending.
        ms: (LEVELS, LEVELS) milliseconds.
        gate: Decision with whose first option the layer is left out, or NO_GATE.
    """

    inputs: Mapping[int, NDArray[np.float64]]
    outputs: Mapping[int, NDArray[np.float64]]
    narrow: NDArray[np.float64]
    wide: NDArray[np.float64]
    ms: NDArray[np.float64]
    gate: int

    def at(self, choices: Choices) -> NDArray[np.float64]:
        """Return (n,) milliseconds at (n, decisions) choices, by bilinear interpolation."""
        levels = np.arange(LEVELS)
        row = np.interp(self._kept(self.inputs, self.narrow, choices), self.narrow, levels)
        column = np.interp(self._kept(self.outputs, self.wide, choices), self.wide, levels)
        i, j = (np.minimum(place.astype(np.int64), LEVELS - 2) for place in (row, column))
        u, v = row - i, column - j
        left = (1 - u) * self.ms[i, j] + u * self.ms[i + 1, j]
        ms = (1 - v) * left + v * ((1 - u) * self.ms[i, j + 1] + u * self.ms[i + 1, j + 1])
        return np.asarray(ms * _there(choices, self.gate))

    @staticmethod
    def _kept(ends: Mapping[int, NDArray[np.float64]], counts: NDArray[np.float64], choices: Choices) -> Any:
        return counts[-1] - sum(gone[choices[:, index]] for index, gone in ends.items())


@dataclass(frozen=True)
class LayerTimes:
    """The layer table as arrays over option indices: a few look-ups predict any number of choices.

    Attributes:
        fixed: Milliseconds that no choice changes.
        pairs: Two decisions, or one twice, and a gate (see `Between`), to the (options, options) milliseconds of all
            layers between them.
        others: The layers between more than two.
    """

    fixed: float
    pairs: Mapping[tuple[int, int, int], NDArray[np.float64]]
    others: tuple[Between, ...]

    @classmethod
    def of(
        cls,
        network: NetworkTime,
        offered: Mapping[str, tuple[int, ...]],
        layers: Sequence[Layer],
        precision: str = "int8",
        fixed: float = 0.0,
    ) -> LayerTimes:
        """Look up these layers at every pair of offered widths of their two ends, and add `fixed`."""
        position = {unit: index for index, unit in enumerate(offered)}
        pairs, others = dict[tuple[int, int, int], NDArray[np.float64]](), []
        for layer in layers:
            gate = network.graph.gates.get(layer.name)
            units = {unit for unit in layer.units if unit in position}
            if gate in position and len(units | {gate}) <= 2:
                units, gate = units | {gate}, None  # what goes at its first option is seen in the pair
            ends = sorted(units, key=position.__getitem__)
            if not ends:
                fixed += network.scale * network.layer_ms(layer, {}, precision)
                continue
            gated = NO_GATE if gate is None else position[gate]
            if len(ends) > 2:
                others.append(_between(network, layer, offered, gated, precision))
                continue
            first, last = ends[0], ends[-1]
            ms = np.zeros((len(offered[first]), len(offered[last])))
            for (i, a), (j, b) in product(enumerate(offered[first]), enumerate(offered[last])):
                if first != last or i == j:
                    ms[i, j] = network.scale * network.layer_ms(layer, {first: a, last: b}, precision)
            pair = (position[first], position[last], gated)
            pairs[pair] = pairs[pair] + ms if pair in pairs else ms
        return cls(fixed, pairs, tuple(others))

    def predict(self, choices: Choices) -> NDArray[np.float64]:
        """Return (n,) predicted milliseconds of (n, decisions) choices."""
        total = np.full(len(choices), self.fixed)
        for (first, last, gate), ms in self.pairs.items():
            total += ms[choices[:, first], choices[:, last]] * _there(choices, gate)
        for layer in self.others:
            total += layer.at(choices)
        return total


@dataclass(frozen=True)
class PlacedTimes:
    """Times of a network in which some blocks choose their precision.

    What conversions cost between float and integer blocks is in no table, nor that float weights leave the caches; the
    search sees it in files (F2) only. Nine mixed files of the demo network took up to 1.27 times what was predicted
    relative to the integer file, 1.06 in the median of the errors.

    Attributes:
        always: The layers of all other blocks, and what no choice changes.
        blocks: Position of a block's decision to the times of its layers with each of PRECISIONS.
    """

    always: LayerTimes
    blocks: Mapping[int, tuple[LayerTimes, ...]]

    def predict(self, choices: Choices) -> NDArray[np.float64]:
        """Return (n,) predicted milliseconds of (n, decisions) choices, those of widths first."""
        total = self.always.predict(choices)
        for index, options in self.blocks.items():
            total += np.choose(choices[:, index], [times.predict(choices) for times in options])
        return total


def _there(choices: Choices, gate: int) -> NDArray[np.bool_] | bool:
    """Return (n,) whether the layers behind a gate are there."""
    return True if gate == NO_GATE else choices[:, gate] > 0


def _between(
    network: NetworkTime, layer: Layer, offered: Mapping[str, tuple[int, ...]], gate: int, precision: str
) -> Between:
    position = {unit: index for index, unit in enumerate(offered)}

    def at_level(shares: tuple[Share, ...], level: int) -> dict[str, int]:
        widths = {s.unit: [w for w in offered[s.unit] if w] for s in shares if s.unit in position}
        return {unit: w[round(level * (len(w) - 1) / (LEVELS - 1))] for unit, w in widths.items()}

    def gone(shares: tuple[Share, ...]) -> dict[int, NDArray[np.float64]]:
        taken: dict[int, NDArray[np.float64]] = {}
        for share in shares:
            if share.unit in position:
                widths = np.array(offered[share.unit], np.float64)
                taken[position[share.unit]] = (widths[-1] - widths) * share.per_element
        return taken

    kept = [kept_features(layer, network.graph, at_level((*layer.reads, *layer.writes), n)) for n in range(LEVELS)]
    narrow, wide = zip(*kept, strict=True)
    paired = layer.shape.depthwise  # both its ends are the same features
    ms = [[network.table.layer_ms(layer.shape, b if paired else a, b, precision) for b in wide] for a in narrow]
    ends = np.array(narrow, np.float64), np.array(wide, np.float64)
    return Between(gone(layer.reads), gone(layer.writes), *ends, network.scale * np.array(ms), gate)


def build_problem(
    pipeline: Pipeline, network: NetworkTime, *, options: int = 8, least_kept: float = LEAST_KEPT
) -> Problem:
    """Return what a strategy may know: the time of every width, and the loss of each (unit, width) alone.

    Where the pipeline rounds, every block that its fastest file makes integer may also stay float. Losses are then over
    the uncut model in float: of a width with nothing rounded, of integer layers with nothing else rounded.

    Args:
        options: Widths offered per unit at most, the uncut one included.
        least_kept: Share of a unit below which no width is offered, where wider ones are legal.
    """
    graph = pipeline.graph
    offered = {unit.name: offered_widths(unit, network, options, least_kept) for unit in graph.units}
    units = [unit for unit in graph.units if len(offered[unit.name]) > 1]
    uncut_ms = network.predict({}, lambda _: "int8")
    removed = {unit.name: removed_fisher(pipeline.scores[unit.name], offered[unit.name]) for unit in units}
    largest_fisher = max((float(values[0]) for values in removed.values()), default=1.0) or 1.0
    integer = {block: tuple(rounding.weights) for block, rounding in pipeline.roundings.items()}
    decided = {layer: block for block, layers in integer.items() for layer in layers}

    def times_of(layers: Iterable[str], precision: str = "int8", fixed: float = 0.0) -> LayerTimes:
        wanted = set(layers)
        chosen = [layer for layer in graph.layers if layer.name in wanted]
        return LayerTimes.of(network, {unit.name: offered[unit.name] for unit in units}, chosen, precision, fixed)

    always = times_of({layer.name for layer in graph.layers} - decided.keys(), fixed=network.fixed)
    blocks = {
        len(units) + index: tuple(times_of(layers, precision) for precision in PRECISIONS)
        for index, layers in enumerate(integer.values())
    }
    times = PlacedTimes(always, blocks)
    float_bytes = next(p.weight_bits for p in pipeline.backend.precisions() if p.name == "float") / 8
    placed = [
        _precision_decision(network, block, layers, loss, uncut_ms, float_bytes)
        for (block, layers), loss in zip(integer.items(), rounding_losses(pipeline, integer), strict=True)
    ]

    def problem_of(losses: Mapping[str, NDArray[np.float64]]) -> Problem:
        decisions = []
        for unit in units:
            widths, loss = offered[unit.name], losses[unit.name]
            ms = np.array([network.predict({unit.name: width}, lambda _: "int8") - uncut_ms for width in widths])
            left = np.array([_weight_bytes(graph, {unit.name: width}) for width in widths], dtype=np.float64)
            fisher = float(removed[unit.name][0]) / largest_fisher
            layers = [layer for layer in graph.layers if unit.name in layer.units]
            features = _features(graph, unit.kind, unit.block, unit.size, layers, fisher, loss, ms, uncut_ms)
            decisions.append(Decision(unit.name, "width", unit.block, widths, loss, ms, left - left[-1], features))
        decisions += placed

        def plan_of(choices: Choices) -> CompressionPlan:
            taken = [(d, d.options[c]) for d, c in zip(decisions, choices, strict=True) if c < len(d.options) - 1]
            keep = {d.name: int(option) for d, option in taken if d.kind == "width"}
            asked = {layer: str(option) for d, option in taken for layer in d.layers}
            precision = {layer: option for layer, option in asked.items() if not graph.leaves_out(layer, keep)}
            return CompressionPlan(keep, precision, default_precision="auto")

        return Problem(graph.blocks, tuple(decisions), uncut_ms, times.predict, plan_of)

    precision = "float" if integer else "auto"
    return problem_of(single_losses(pipeline, removed, {u.name: offered[u.name] for u in units}, problem_of, precision))


def _precision_decision(
    network: NetworkTime, block: str, layers: tuple[str, ...], loss: float, uncut_ms: float, float_bytes: float
) -> Decision:
    """Return whether a block's integer layers stay so; `loss` is what their rounding costs, `float_bytes` a weight."""
    graph = network.graph
    members = [layer for layer in graph.layers if layer.name in layers]
    float_ms = network.predict({}, lambda layer: "float" if layer in layers else "int8")
    losses, ms = np.array([0.0, loss]), np.array([float_ms - uncut_ms, 0.0])
    size = np.array([(float_bytes - 1.0) * sum(layer.params for layer in members), 0.0])
    widest = max(layer.out_features for layer in members)
    features = _features(graph, "precision", block, widest, members, 0.0, losses, ms, uncut_ms)
    return Decision(f"precision of {block}", "precision", block, PRECISIONS, losses, ms, size, features, layers)


def rounding_losses(pipeline: Pipeline, integer: Mapping[str, Sequence[str]]) -> list[float]:
    """Return for each block what it loses when its layers are integer and all else is float.

    Less what the float model loses when it is judged in half precision.
    """
    if not integer:
        return []
    plans = [
        CompressionPlan({}, dict.fromkeys(layers, "int8"), default_precision="float")
        for layers in ((), *integer.values())
    ]
    pipeline.begin(plans)
    tracked = pipeline.progress.track(plans, "loss of each block's rounding", len(plans))
    floor, *alone = [_loss_alone(pipeline, plan) for plan in tracked]
    return [max(loss - floor, 0.0) for loss in alone]


def _loss_alone(pipeline: Pipeline, plan: CompressionPlan) -> float:
    outcome = pipeline.outcome(plan, "F1")
    return outcome.loss if isinstance(outcome, Measured) else FAILED_LOSS


def single_losses(
    pipeline: Pipeline,
    removed: Mapping[str, NDArray[np.float64]],
    offered: Mapping[str, tuple[int, ...]],
    problem_of: Callable[[Mapping[str, NDArray[np.float64]]], Problem],
    precision: str = "auto",
) -> dict[str, NDArray[np.float64]]:
    """Return unit to the (widths,) rise of the loss when only it is cut, measured where it matters.

    With few pairs all are measured. With many, the narrowest and the middle width of each unit come first, the rest is
    interpolated (`interpolated_losses`); then the problem is solved at PROBED_BUDGETS, and what the solutions take or
    have beside them is measured too, until they stand on measured losses alone.

    Args:
        precision: Of all layers.
    """
    measured: dict[str, dict[int, float]] = {unit: {} for unit in offered}

    def measure(pairs: Sequence[tuple[str, int]]) -> None:
        new = [(unit, index) for unit, index in pairs if index not in measured[unit]]
        plans = [CompressionPlan({unit: offered[unit][index]}, default_precision=precision) for unit, index in new]
        pipeline.begin(plans)
        planned = zip(new, plans, strict=True)
        for (unit, index), plan in pipeline.progress.track(planned, "loss of each option alone", len(new)):
            measured[unit][index] = _loss_alone(pipeline, plan)

    def losses() -> dict[str, NDArray[np.float64]]:
        return {unit: interpolated_losses(removed[unit], known) for unit, known in measured.items()}

    pairs = [(unit, index) for unit, widths in offered.items() for index in range(len(widths) - 1)]
    if len(pairs) <= MEASURED_SINGLES:
        measure(pairs)
        return losses()
    measure([(unit, index) for unit, widths in offered.items() for index in {0, (len(widths) - 1) // 2}])
    while True:
        problem, near = problem_of(losses()), set[tuple[str, int]]()
        shortest_ms = smallest(problem)[1]
        for share in PROBED_BUDGETS:
            answer = solve(problem, shortest_ms + share * (problem.uncut_ms - shortest_ms))
            for decision, choice in zip(problem.decisions, answer, strict=True):
                beside = range(max(0, choice - 1), min(len(decision.options) - 1, choice + 2))
                near |= {(decision.name, index) for index in beside if decision.kind == "width"}
        if all(index in measured[unit] for unit, index in near):
            return losses()
        measure(sorted(near))


def removed_fisher(scores: NDArray[np.float64], widths: Sequence[int]) -> NDArray[np.float64]:
    """Return (widths,) the summed Fisher importance of what each width removes: the least important elements."""
    removed = np.append(0.0, np.cumsum(np.sort(scores)))
    return np.asarray(removed[[len(scores) - width for width in widths]])


def interpolated_losses(removed: NDArray[np.float64], measured: Mapping[int, float]) -> NDArray[np.float64]:
    """Return (widths,) losses: measured where they are, else interpolated against the Fisher sum, both as logarithms.

    Noise aside a narrower unit never loses less, so losses never rise with the width; the uncut width loses nothing.

    Args:
        removed: (widths,) Fisher sum of what each width removes; the last is 0.
        measured: Index of a width, the uncut one not among them, to its loss.
    """
    known = sorted(measured, reverse=True)
    least = 1e-9
    x = np.log(np.maximum(removed, least))
    y = np.log(np.maximum([measured[index] for index in known], least))
    # One slope of 1 beyond the widest measured width: the loss of a small cut is proportional to its Fisher sum.
    beyond = np.minimum(x - x[known[0]], 0.0)
    loss = np.exp(np.interp(x, x[known], y) + beyond)
    loss[known], loss[-1] = [measured[index] for index in known], 0.0
    return np.asarray(np.maximum.accumulate(loss[::-1])[::-1])


def smallest_ms(network: NetworkTime) -> float:
    """Return the predicted time of the network with every unit at its narrowest legal width."""
    return network.predict({unit.name: unit.least for unit in network.graph.units}, lambda _: "int8")


def smallest_bytes(graph: ModelGraph) -> int:
    """Return the bytes that the weights of the layers take as 8-bit integers, with every unit at its narrowest."""
    return _weight_bytes(graph, {unit.name: unit.least for unit in graph.units})


def measure_table(pipeline: Pipeline, network: NetworkTime, options: int = 8) -> int:
    """Fill the layer table with every pair of widths the search can meet; returns how many entries it needed.

    In float too, where a precision is to be decided.
    """
    graph = pipeline.graph
    decided = {layer for rounding in pipeline.roundings.values() for layer in rounding.weights}
    offered = {unit.name: offered_widths(unit, network, options) for unit in graph.units}
    keys = set()
    for layer in graph.layers:
        if len(layer.units) > 2:
            continue  # timed at a few joint widths only, when they are looked up
        ins = offered.get(layer.in_unit or "", (None,))
        outs = offered.get(layer.out_unit or "", (None,)) if layer.out_unit != layer.in_unit else (None,)
        for narrow, wide in product(ins, outs):
            keep = {
                u: w for u, w in ((layer.in_unit, narrow), (layer.out_unit, wide)) if u is not None and w is not None
            }
            if all(features := kept_features(layer, graph, keep)):
                precisions = PRECISIONS if layer.name in decided else ("int8",)
                keys |= {LayerKey(layer.shape, *features, precision) for precision in precisions}
    missing = network.table.measure_missing(sorted(keys, key=str))
    return sum(1 for _ in pipeline.progress.track(missing, "layer times", len(keys)))


def weight_bytes(graph: ModelGraph, decisions: Sequence[Decision], choices: Choices) -> NDArray[np.float64]:
    """Return (n,) bytes that the weights of the layers take at (n, decisions) choices, one each where none is float."""
    gone, more = {}, dict[str, NDArray[np.float64]]()
    for index, decision in enumerate(decisions):
        if decision.kind != "width":
            params = sum(layer.params for layer in graph.layers if layer.name in decision.layers)
            more |= dict.fromkeys(decision.layers, 1.0 + decision.size_bytes[choices[:, index]] / params)
            continue
        widths = np.array(decision.options, dtype=np.float64)
        gone[decision.name] = (widths[-1] - widths)[choices[:, index]]

    def kept(features: int, shares: Sequence[Share]) -> Any:
        return features - sum(gone[share.unit] * share.per_element for share in shares if share.unit in gone)

    total = np.zeros(len(choices))
    position = {decision.name: index for index, decision in enumerate(decisions)}
    for layer in graph.layers:
        narrow, wide = kept(layer.in_features, layer.reads), kept(layer.out_features, layer.writes)
        there = _there(choices, position.get(graph.gates.get(layer.name, ""), NO_GATE))
        left = there * layer.params * narrow * wide / (layer.in_features * layer.out_features)
        total += left * more[layer.name] if layer.name in more else left
    return total


def _weight_bytes(graph: ModelGraph, keep: dict[str, int]) -> int:
    total = 0
    for layer in graph.layers:
        narrow, wide = kept_features(layer, graph, keep)
        total += round(layer.params * narrow * wide / (layer.in_features * layer.out_features))
    return total


def _features(
    graph: ModelGraph,
    kind: str,
    block: str,
    size: int,
    layers: Sequence[Layer],
    fisher: float,
    loss: NDArray[np.float64],
    ms: NDArray[np.float64],
    uncut_ms: float,
) -> NDArray[np.float64]:
    """(10,) kind one-hot of 4, depth, log size, share of MACs, Fisher, largest loss, largest saving."""
    kinds = ("channels", "residual channels", "mlp units", "attention heads")
    macs = sum(layer.macs for layer in layers)
    depth = graph.blocks.index(block) / max(1, len(graph.blocks) - 1) if block in graph.blocks else 0.5
    return np.array(
        [
            *(float(kind == known) for known in kinds),
            depth,
            np.log2(size) / 10,
            macs / graph.macs,
            fisher,
            np.log1p(loss.max()),
            -ms.min() / uncut_ms,
        ]
    )
