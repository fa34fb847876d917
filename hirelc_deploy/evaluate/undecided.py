"""In: changes of precision that a placement may try, and times of single layers. Out: those that a clock must decide.

Whole files are timed because pieces do not add up. But a layer that takes several times as long in float will not make
a file faster there: two conversions come on top. So whole files are timed only where single layers leave a doubt, and
layers that take next to no time are changed together with others of their kind: no clock would tell one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hirelc_deploy.errors import ExportError, InputError
from hirelc_deploy.graph.model_graph import Layer
from hirelc_deploy.measure.table import LatencyTable

SURELY_SLOWER = 2.0
"""Layers whose float time is at least this multiple of the integer one stay integer."""

FREE = 0.01
"""A change that adds less than this share of the layers' time may be as fast, and its answers nearer to float. One
whose layers take less than that in either precision is small."""


def undecided(
    tried: Mapping[str, frozenset[str]], layers: Sequence[Layer], table: LatencyTable
) -> dict[str, frozenset[str]]:
    """Return the changes to float of which single layers do not say that they make the file slower, the fastest first.

    So those that are timed side by side are alike, and where all of them are too slow it is seen early. Small changes
    to layers of one kind, of which float is faster in all or in none, are one change.

    Args:
        tried: Name of a change to its layers; one with a part that `layers` does not know is undecided.
        layers: Of the network; those that cannot be timed alone leave a doubt.
        table: Measures what it does not know yet.
    """
    known = {layer.name: layer for layer in layers}
    ms = {layer.name: times for layer in layers if (times := _times(layer, table)) is not None}
    whole = sum(integer for _, integer in ms.values())

    left: list[tuple[float, str, frozenset[str]]] = []
    small: dict[tuple[object, ...], list[tuple[float, str]]] = {}
    for name, change in tried.items():
        in_float, integer = (sum(ms[layer][index] for layer in change & ms.keys()) for index in range(2))
        surely_slower = in_float >= SURELY_SLOWER * integer and in_float - integer >= FREE * whole
        kinds = {_kind(known[layer]) for layer in change & ms.keys()}
        if not change <= ms.keys() or len(kinds) > 1 or max(in_float, integer) >= FREE * whole:
            if not (surely_slower and change <= ms.keys()):
                left.append((in_float - integer, name, change))
        else:
            small.setdefault((*kinds, in_float < integer), []).append((in_float - integer, name))
    for members in small.values():
        name = members[0][1] if len(members) == 1 else f"{members[0][1]} and {len(members) - 1} small of its kind"
        together = frozenset[str]().union(*(tried[member] for _, member in members))
        left.append((sum(added for added, _ in members), name, together))
    return {name: change for _, name, change in sorted(left, key=lambda each: each[:2])}


def _kind(layer: Layer) -> tuple[object, ...]:
    return layer.shape.kind, layer.shape.depthwise, layer.shape.kernel, layer.shape.positions == 1


def _times(layer: Layer, table: LatencyTable) -> tuple[float, float] | None:
    """Return milliseconds of a layer in float and as integers; None where it cannot be timed alone."""
    if layer.shape.kind == "attention":
        return None
    try:
        in_float, integer = (
            table.layer_ms(layer.shape, layer.in_features, layer.out_features, precision)
            for precision in ("float", "int8")
        )
    except (ExportError, InputError):
        return None
    return in_float, integer
