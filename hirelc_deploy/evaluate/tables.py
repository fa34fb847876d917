"""In: a pipeline and a table of layer times. Out: the `Problem` of a search, every loss and time measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hirelc_deploy.evaluate.layer_times import NO_GATE, LayerTimes, PlacedTimes, there
from hirelc_deploy.evaluate.network_time import LEAST_KEPT, PRECISIONS, NetworkTime, offered_widths
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.graph.costs import kept_features
from hirelc_deploy.graph.model_graph import Layer, ModelGraph, Share
from hirelc_deploy.outcome import Measured
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.strategies.knapsack import smallest, solve
from hirelc_deploy.strategies.problem import Choices, Decision, Problem

MEASURED_SINGLES = 120
"""Up to so many (unit, width) pairs each one's loss is measured; beyond, only those that a solution comes near."""

PROBED_BUDGETS = (0.2, 0.4, 0.6, 0.8)
"""Where between the shortest and the uncut time the solutions lie whose neighbourhood is measured."""

PROBED_SINGLES = 3
"""Options of a unit that are measured where not all are: two at first, and about one near the solutions."""

FAILED_LOSS = 10.0
"""Loss in nats charged to an option that could not be built: worse than guessing among thousands of classes."""


def build_problem(
    pipeline: Pipeline,
    network: NetworkTime,
    *,
    options: int = 8,
    least_kept: float = LEAST_KEPT,
    go_on: Callable[[], bool] | None = None,
) -> Problem:
    """Return what a strategy may know: the time of every width, and the loss of each (unit, width) alone.

    Where the pipeline rounds, every block that its fastest file makes integer may also stay float. Losses are then over
    the uncut model in float: of a width with nothing rounded, of integer layers with nothing else rounded.

    Args:
        options: Widths offered per unit at most, the uncut one included.
        least_kept: Share of a unit below which no width is offered, where wider ones are legal.
        go_on: As of `single_losses`.
    """
    graph = pipeline.graph
    offered = {unit.name: offered_widths(unit, network, options, least_kept) for unit in graph.units}
    units = [unit for unit in graph.units if len(offered[unit.name]) > 1]
    uncut_ms = network.predict({}, lambda _: "int8")
    removed = {unit.name: removed_fisher(pipeline.uncut.scores[unit.name], offered[unit.name]) for unit in units}
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
            worth = least_worth(pipeline.uncut.scores[unit.name], widths)
            decisions.append(
                Decision(unit.name, "width", unit.block, widths, loss, ms, left - left[-1], features, worth=worth)
            )
        decisions += placed

        def plan_of(choices: Choices) -> CompressionPlan:
            taken = [(d, d.options[c]) for d, c in zip(decisions, choices, strict=True) if c < len(d.options) - 1]
            keep = {d.name: int(option) for d, option in taken if d.kind == "width"}
            asked = {layer: str(option) for d, option in taken for layer in d.layers}
            precision = {layer: option for layer, option in asked.items() if not graph.leaves_out(layer, keep)}
            return CompressionPlan(keep, precision, default_precision="auto")

        return Problem(graph.blocks, tuple(decisions), uncut_ms, times.predict, plan_of)

    precision = "float" if integer else "auto"
    there_are = {unit.name: offered[unit.name] for unit in units}
    return problem_of(single_losses(pipeline, removed, there_are, problem_of, precision, go_on))


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


def singles_of(graph: ModelGraph, options: int) -> int:
    """Return about how many options will be judged alone, before it is known which widths are offered."""
    pairs = sum(min(options, len(unit.widths)) - 1 for unit in graph.units)
    return pairs if pairs <= MEASURED_SINGLES else PROBED_SINGLES * len(graph.units)


def _loss_alone(pipeline: Pipeline, plan: CompressionPlan) -> float:
    outcome = pipeline.outcome(plan, "F1")
    return outcome.loss if isinstance(outcome, Measured) else FAILED_LOSS


def single_losses(
    pipeline: Pipeline,
    removed: Mapping[str, NDArray[np.float64]],
    offered: Mapping[str, tuple[int, ...]],
    problem_of: Callable[[Mapping[str, NDArray[np.float64]]], Problem],
    precision: str = "auto",
    go_on: Callable[[], bool] | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Return unit to the (widths,) rise of the loss when only it is cut, measured where it matters.

    With few pairs all are measured. With many, the narrowest and the middle width of each unit come first, the rest is
    interpolated (`interpolated_losses`); then the problem is solved at PROBED_BUDGETS, and what the solutions take or
    have beside them is measured too, until they stand on measured losses alone.

    Args:
        precision: Of all layers.
        go_on: Asked where time is limited, after the narrowest width of every unit: whether to measure another one.
            Others are interpolated.
    """
    measured: dict[str, dict[int, float]] = {unit: {} for unit in offered}

    def measure(pairs: Sequence[tuple[str, int]]) -> None:
        new = [(unit, index) for unit, index in pairs if index not in measured[unit]]
        plans = [CompressionPlan({unit: offered[unit][index]}, default_precision=precision) for unit, index in new]
        pipeline.begin(plans)
        planned = zip(new, plans, strict=True)
        for (unit, index), plan in pipeline.progress.track(planned, "loss of each option alone", len(new)):
            if go_on is not None and index and not pipeline.run.knows(plan, "F1") and not go_on():
                break
            measured[unit][index] = _loss_alone(pipeline, plan)

    def losses() -> dict[str, NDArray[np.float64]]:
        return {unit: interpolated_losses(removed[unit], known) for unit, known in measured.items()}

    pairs = [(unit, index) for unit, widths in offered.items() for index in range(len(widths) - 1)]
    if len(pairs) <= MEASURED_SINGLES:
        measure(pairs if go_on is None else sorted(pairs, key=lambda pair: pair[1]))
        return losses()
    first = [(unit, index) for unit, widths in offered.items() for index in {0, (len(widths) - 1) // 2}]
    measure(first if go_on is None else sorted(first, key=lambda pair: pair[1]))
    while True:
        problem, near = problem_of(losses()), set[tuple[str, int]]()
        shortest_ms = smallest(problem)[1]
        for share in PROBED_BUDGETS:
            answer = solve(problem, shortest_ms + share * (problem.uncut_ms - shortest_ms))
            for decision, choice in zip(problem.decisions, answer, strict=True):
                beside = range(max(0, choice - 1), min(len(decision.options) - 1, choice + 2))
                near |= {(decision.name, index) for index in beside if decision.kind == "width"}
        if all(index in measured[unit] for unit, index in near) or not (go_on is None or go_on()):
            return losses()
        measure(sorted(near))


def removed_fisher(scores: NDArray[np.float64], widths: Sequence[int]) -> NDArray[np.float64]:
    """Return (widths,) the summed Fisher importance of what each width removes: the least important elements."""
    removed = np.append(0.0, np.cumsum(np.sort(scores)))
    return np.asarray(removed[[len(scores) - width for width in widths]])


def least_worth(scores: NDArray[np.float64], widths: Sequence[int]) -> NDArray[np.float64]:
    """Return (widths,) the importance of the last element that each width keeps, over the mean; inf for no width."""
    falling = np.sort(scores / max(float(scores.mean()), np.finfo(np.float64).tiny))[::-1]
    return np.array([falling[width - 1] if width else np.inf for width in widths])


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


def smallest_bytes(graph: ModelGraph) -> int:
    """Return the bytes that the weights of the layers take as 8-bit integers, with every unit at its narrowest."""
    return _weight_bytes(graph, {unit.name: unit.least for unit in graph.units})


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
        present = there(choices, position.get(graph.gates.get(layer.name, ""), NO_GATE))
        left = present * layer.params * narrow * wide / (layer.in_features * layer.out_features)
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
