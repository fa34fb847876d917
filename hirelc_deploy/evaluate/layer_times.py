"""In: the layer table. Out: arrays that predict the time of any number of choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hirelc_deploy.evaluate.network_time import NetworkTime
from hirelc_deploy.graph.costs import kept_features
from hirelc_deploy.graph.model_graph import Layer, Share
from hirelc_deploy.strategies.problem import Choices

LEVELS = 5
"""Joint widths at which a layer between more than two decisions is timed at each of its ends."""

NO_GATE = -1
"""Where the position of a decision would stand: no choice leaves the layer out."""


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
        return np.asarray(ms * there(choices, self.gate))

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
                others.append(between(network, layer, offered, gated, precision))
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
            total += ms[choices[:, first], choices[:, last]] * there(choices, gate)
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


def there(choices: Choices, gate: int) -> NDArray[np.bool_] | bool:
    """Return (n,) whether the layers behind a gate are there."""
    return True if gate == NO_GATE else choices[:, gate] > 0


def between(
    network: NetworkTime, layer: Layer, offered: Mapping[str, tuple[int, ...]], gate: int, precision: str
) -> Between:
    """Return the times of a layer at LEVELS joint widths of each of its ends."""
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
