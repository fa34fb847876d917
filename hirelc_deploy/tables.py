"""In: a pipeline and a table of layer times. Out: the `Problem` of a search, every loss and time measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hirelc_deploy.errors import ExportError
from hirelc_deploy.graph.model_graph import Layer, ModelGraph, Unit
from hirelc_deploy.measure.table import LatencyTable, LayerKey, calibrate
from hirelc_deploy.outcome import Failed, Measured
from hirelc_deploy.pipeline import Pipeline, kept_features
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.search.problem import Choices, Decision, Problem

KEEP_RATIOS = (0.125, 0.1875, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
"""Widths that are considered per unit, before the staircase drops those that buy no time."""

MIN_STEP = 0.02
"""A width is offered only if it makes the unit's layers at least this share faster than the next wider one."""

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
            self._known[key] = self.table.layer_ms(layer.shape, narrow, wide, precision)
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
    keeps = [uniform_keep(graph, ratio) for ratio in np.linspace(0.25, 1.0, samples + 1)]

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


def offered_widths(unit: Unit, network: NetworkTime) -> tuple[int, ...]:
    """Return the widths of a unit that buy time, ascending, the uncut one last (the timed staircase, filtered)."""
    layers = [layer for layer in network.graph.layers if unit.name in layer.units]
    candidates = sorted({min(unit.widths, key=lambda w: abs(w - ratio * unit.size)) for ratio in KEEP_RATIOS})
    offered = [unit.size]
    next_ms = sum(network.layer_ms(layer, {}, "int8") for layer in layers)
    for width in reversed(candidates[:-1]):
        ms = sum(network.layer_ms(layer, {unit.name: width}, "int8") for layer in layers)
        if ms <= next_ms * (1 - MIN_STEP):
            offered.append(width)
            next_ms = ms
    return tuple(reversed(offered))


def build_problem(pipeline: Pipeline, network: NetworkTime, *, options: int = 6) -> Problem:
    """Measure the loss of every (unit, width) alone, and return what a strategy may know.

    Args:
        options: Widths offered per unit at most, the uncut one included; the ends are kept and the rest thinned evenly.
    """
    graph = pipeline.graph
    offered = {unit.name: _thin(offered_widths(unit, network), options) for unit in graph.units}
    units = [unit for unit in graph.units if len(offered[unit.name]) > 1]
    singles = [(unit, width) for unit in units for width in offered[unit.name][:-1]]

    losses = {}
    for unit, width in pipeline.progress.track(singles, "loss of each option alone", len(singles)):
        outcome = pipeline.outcome(CompressionPlan({unit.name: width}, default_precision="auto"), "F1")
        losses[unit.name, width] = outcome.loss if isinstance(outcome, Measured) else FAILED_LOSS
    uncut_ms = network.predict({}, lambda _: "int8")
    fisher = {name: float(score.sum()) for name, score in pipeline.scores.items()}
    largest_fisher = max(fisher.values(), default=1.0) or 1.0
    decisions = []
    for unit in units:
        widths = offered[unit.name]
        loss = np.array([losses[unit.name, width] for width in widths[:-1]] + [0.0])
        loss = np.maximum.accumulate(loss[::-1])[::-1]  # noise aside, a narrower unit never loses less
        ms = np.array([network.predict({unit.name: width}, lambda _: "int8") - uncut_ms for width in widths])
        saved = np.array([_weight_bytes(graph, {unit.name: width}) for width in widths], dtype=np.float64)
        decisions.append(
            Decision(
                unit.name,
                "width",
                unit.block,
                widths,
                loss,
                ms,
                saved - saved[-1],
                _features(unit, graph, fisher[unit.name] / largest_fisher, loss, ms, uncut_ms),
            )
        )

    def keep_of(choices: Choices) -> dict[str, int]:
        return {d.name: int(d.options[c]) for d, c in zip(decisions, choices, strict=True) if c < len(d.options) - 1}

    cache: dict[bytes, float] = {}

    def predict_ms(choices: Choices) -> float:
        key = np.asarray(choices, np.int64).tobytes()
        if key not in cache:
            cache[key] = network.predict(keep_of(choices), lambda _: "int8")
        return cache[key]

    return Problem(
        graph.blocks,
        tuple(decisions),
        uncut_ms,
        predict_ms,
        lambda choices: CompressionPlan(keep_of(choices), default_precision="auto"),
    )


def smallest_ms(network: NetworkTime) -> float:
    """Return the predicted time of the network with every unit at its narrowest legal width."""
    return network.predict({unit.name: unit.widths[0] for unit in network.graph.units}, lambda _: "int8")


def smallest_bytes(graph: ModelGraph) -> int:
    """Return the bytes that the weights of the layers take as 8-bit integers, with every unit at its narrowest."""
    return _weight_bytes(graph, {unit.name: unit.widths[0] for unit in graph.units})


def measure_table(pipeline: Pipeline, network: NetworkTime, options: int = 6) -> int:
    """Fill the layer table with every pair of widths the search can meet; returns how many entries it needed."""
    graph = pipeline.graph
    offered = {unit.name: _thin(offered_widths(unit, network), options) for unit in graph.units}
    keys = set()
    for layer in graph.layers:
        ins = offered.get(layer.in_unit or "", (None,))
        outs = offered.get(layer.out_unit or "", (None,)) if layer.out_unit != layer.in_unit else (None,)
        for narrow, wide in product(ins, outs):
            keep = {
                u: w for u, w in ((layer.in_unit, narrow), (layer.out_unit, wide)) if u is not None and w is not None
            }
            keys.add(LayerKey(layer.shape, *kept_features(layer, graph, keep), "int8"))
    for key in pipeline.progress.track(sorted(keys, key=str), "layer times", len(keys)):
        network.table.layer_ms(key.shape, key.in_features, key.out_features, key.precision)
    return len(keys)


def _thin(widths: Sequence[int], most: int) -> tuple[int, ...]:
    if len(widths) <= most:
        return tuple(widths)
    return tuple(widths[i] for i in np.unique(np.linspace(0, len(widths) - 1, most).round().astype(int)))


def _weight_bytes(graph: ModelGraph, keep: dict[str, int]) -> int:
    total = 0
    for layer in graph.layers:
        narrow, wide = kept_features(layer, graph, keep)
        total += round(layer.params * narrow * wide / (layer.in_features * layer.out_features))
    return total


def _features(
    unit: Unit, graph: ModelGraph, fisher: float, loss: NDArray[np.float64], ms: NDArray[np.float64], uncut_ms: float
) -> NDArray[np.float64]:
    """(10,) kind one-hot of 4, depth, log size, share of MACs, Fisher, largest loss, largest saving."""
    kinds = ("channels", "residual channels", "mlp units", "attention heads")
    macs = sum(layer.macs for layer in graph.layers if unit.name in layer.units)
    depth = graph.blocks.index(unit.block) / max(1, len(graph.blocks) - 1) if unit.block in graph.blocks else 0.5
    return np.array(
        [
            *(float(unit.kind == kind) for kind in kinds),
            depth,
            np.log2(unit.size) / 10,
            macs / graph.macs,
            fisher,
            np.log1p(loss.max()),
            -ms.min() / uncut_ms,
        ]
    )
