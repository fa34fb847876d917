"""In: a model's graph and a device's layer table. Out: milliseconds against width, per precision, of every unit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hirelc_deploy.graph.costs import kept_features
from hirelc_deploy.graph.model_graph import ModelGraph, Unit
from hirelc_deploy.measure.table import LatencyTable, LayerKey


@dataclass(frozen=True)
class Stairs:
    """How the time of the layers around a unit falls as the unit gets narrower.

    Attributes:
        units: All units that these stairs hold for: their layers have equal shapes.
        widths: Ascending; the last is the uncut one.
        ms: Precision to one time per width: the sum over the layers that read or write the unit, all else uncut.
    """

    units: tuple[str, ...]
    kind: str
    widths: tuple[int, ...]
    ms: dict[str, tuple[float, ...]]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return dataclasses.asdict(self)


def wanted_keys(graph: ModelGraph, precisions: Sequence[str], steps: int) -> list[LayerKey]:
    """Return the distinct layers whose times the stairs of a model are made of."""
    wanted = {
        key
        for unit in graph.units
        for width in thinned(unit, steps)
        for precision in precisions
        for key in keys_of(graph, unit, width, precision)
    }
    return sorted(wanted, key=str)


def stairs_of(graph: ModelGraph, table: LatencyTable, precisions: Sequence[str], steps: int) -> list[Stairs]:
    """Return the stairs of every unit, equal units once; the table measures what it does not know yet.

    Args:
        steps: Widths per unit at most, evenly spaced up to the uncut one.
    """
    groups: dict[tuple[Any, ...], tuple[Unit, list[str]]] = {}
    for unit in graph.units:
        keys = tuple(keys_of(graph, unit, width, "float") for width in thinned(unit, steps))
        groups.setdefault((unit.kind, thinned(unit, steps), keys), (unit, []))[1].append(unit.name)

    def ms(unit: Unit, width: int, precision: str) -> float:
        return sum(table.measure_many(keys_of(graph, unit, width, precision)))

    return [
        Stairs(
            tuple(names),
            unit.kind,
            thinned(unit, steps),
            {
                precision: tuple(ms(unit, width, precision) for width in thinned(unit, steps))
                for precision in precisions
            },
        )
        for unit, names in groups.values()
    ]


def thinned(unit: Unit, steps: int) -> tuple[int, ...]:
    """Return the legal widths nearest to `steps` even ones, ascending; the uncut one is among them."""
    nearest = {min(unit.widths, key=lambda w: abs(w - ratio * unit.size)) for ratio in np.arange(1, steps + 1) / steps}
    return tuple(sorted(nearest | {unit.size}))


def keys_of(graph: ModelGraph, unit: Unit, width: int, precision: str) -> tuple[LayerKey, ...]:
    """Return the table's keys of the layers around a unit at one width."""
    layers = [layer for layer in graph.layers if unit.name in layer.units]
    keep = {} if width == unit.size else {unit.name: width}
    return tuple(LayerKey(layer.shape, *kept_features(layer, graph, keep), precision) for layer in layers)
