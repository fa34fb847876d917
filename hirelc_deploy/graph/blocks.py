"""In: module paths and layers in execution order. Out: the architectural block each layer belongs to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from torch import nn


def block_of_layers(model: nn.Module, layers: Sequence[tuple[str, int]]) -> dict[str, str]:
    """Return layer name to block name.

    A block is an element of a sequence of modules (a residual block, a transformer block) that holds at least two
    layers. Layers outside of such elements (a stem, a head, a plain VGG) form one block per run of equal resolution,
    named after its first and last layer.

    Args:
        model: The traced model.
        layers: (layer name, output positions) in execution order.
    """
    elements = _repeated_elements(model, [name for name, _ in layers])
    inside = {name: next((path for path in _ancestors(name) if path in elements), "") for name, _ in layers}
    blocks: dict[str, str] = {}
    for (block, _), run in groupby(layers, key=lambda layer: (inside[layer[0]], inside[layer[0]] or layer[1])):
        names = [name for name, _ in run]
        ends = names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}"
        blocks.update(dict.fromkeys(names, block or ends))
    return blocks


def stage_of(layers: Iterable[str], block_of: Mapping[str, str]) -> str | None:
    """Return the sequence of blocks that holds most of the blocks of these layers, or None if they are in none."""
    blocks = list(dict.fromkeys(block_of[layer] for layer in layers))
    stages = Counter(block.rpartition(".")[0] for block in blocks if ".." not in block and "." in block)
    return stages.most_common(1)[0][0] if stages else None


def _ancestors(path: str) -> Iterable[str]:
    """Yield the paths above `path`, the nearest first."""
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def _repeated_elements(model: nn.Module, layers: Sequence[str]) -> set[str]:
    held = Counter(path for layer in layers for path in _ancestors(layer))
    containers = {path for path, module in model.named_modules() if isinstance(module, (nn.Sequential, nn.ModuleList))}
    return {path for path, count in held.items() if count >= 2 and path.rpartition(".")[0] in containers}
