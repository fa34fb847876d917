"""In: a device's layer table and a few timed files. Out: the time of a whole network at any widths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hirelc_deploy.errors import ExportError
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.graph.costs import kept_features
from hirelc_deploy.graph.model_graph import Layer, ModelGraph, Unit
from hirelc_deploy.measure.table import LatencyTable, LayerKey, calibrate
from hirelc_deploy.outcome import Failed, Measured
from hirelc_deploy.plan import CompressionPlan

SAMPLES = 3
"""Files that the table is fitted to."""

CONSIDERED = 16
"""Widths that are timed per unit at most, before the staircase drops those that buy no time."""

LEAST_KEPT = 0.25
"""Narrower than this share of a unit is not measured: a few steps must span the widths that plans will use."""

KERNEL_STEPS = (32, 16, 8, 4, 2, 1)
"""Vector kernels work on so many channels at a time: of widths that are as fast, multiples of these keep the most."""

MIN_STEP = 0.02
"""A width is offered only if it makes the unit's layers at least this share faster than the next wider one."""

PRECISIONS = ("float", "int8")
"""Options of a block that the fastest uncut file makes integer."""


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


def fit_network_time(
    pipeline: Pipeline, table: LatencyTable, samples: int = SAMPLES
) -> tuple[NetworkTime, dict[str, Any]]:
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
            measured[index] = outcome.ratio * pipeline.files.reference_ms
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


def smallest_ms(network: NetworkTime) -> float:
    """Return the predicted time of the network with every unit at its narrowest legal width."""
    return network.predict({unit.name: unit.least for unit in network.graph.units}, lambda _: "int8")


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
