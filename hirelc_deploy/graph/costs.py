"""In: a model's graph and the widths of a plan. Out: parameters and multiply-accumulates that are left."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from hirelc_deploy.graph.model_graph import Layer, ModelGraph, Share


@dataclass(frozen=True)
class Cost:
    """Parameters, and multiply-accumulates of one image."""

    params: int
    macs: int


def cost_of(model: nn.Module, graph: ModelGraph, keep: Mapping[str, int]) -> Cost:
    """Return what is left of a model when units keep `keep` elements, those not named all of theirs."""
    gone = tuple(f"{u.branch.module}." for u in graph.units if u.branch and keep.get(u.name) == 0)
    left = {name: list(tensor.shape) for name, tensor in model.named_parameters() if not name.startswith(gone)}
    for name, width in keep.items():
        unit = graph.unit(name)
        for part in unit.slices:
            if part.tensor in left:
                left[part.tensor][part.dim] -= (unit.size - width) * part.index.shape[1]
    gone_macs = sum(layer.macs - round(layer.macs * kept_share(layer, graph, keep)) for layer in graph.layers)
    return Cost(sum(math.prod(shape) for shape in left.values()), graph.macs - gone_macs)


def kept_features(layer: Layer, graph: ModelGraph, keep: Mapping[str, int]) -> tuple[int, int]:
    """Return (input, output) features of a layer when units keep `keep` elements; units not named stay whole.

    (0, 0) where the layer is left out.
    """
    if graph.leaves_out(layer.name, keep):
        return 0, 0

    def features(count: int, shares: tuple[Share, ...]) -> int:
        cut = (share for share in shares if share.unit in keep)
        return count - sum((graph.unit(s.unit).size - keep[s.unit]) * s.per_element for s in cut)

    return features(layer.in_features, layer.reads), features(layer.out_features, layer.writes)


def kept_share(layer: Layer, graph: ModelGraph, keep: Mapping[str, int]) -> float:
    """Return the share of a layer's multiply-accumulates that stays; both ends of a depthwise layer move together."""
    narrow, wide = kept_features(layer, graph, keep)
    if layer.shape.depthwise or layer.shape.kind == "attention":
        return wide / layer.out_features
    return narrow * wide / (layer.in_features * layer.out_features)
