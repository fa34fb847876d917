"""In: a model and an example image. Out: its `ModelGraph`: what can be cut, in which widths, and what stays whole."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

import numpy as np
from torch import Tensor, nn

import hirelc_deploy.graph.attention  # noqa: F401  registers the rules of all operations
from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.blocks import block_of_layers, stage_of
from hirelc_deploy.graph.labels import ANSWER, AttentionUse, Labelled, Labels, WeightUse, label
from hirelc_deploy.graph.model_graph import (
    Count,
    IndexRows,
    KeptWhole,
    Layer,
    LayerShape,
    ModelGraph,
    Reader,
    Share,
    TensorSlice,
    Unit,
)
from hirelc_deploy.graph.trace import BATCH, Trace, refs, trace


def build_graph(
    model: nn.Module, example: Tensor, *, exclude: Sequence[str] = (), include: Sequence[str] = ()
) -> ModelGraph:
    """Trace the model once and return its blocks, units and layers.

    Args:
        model: Any module that turns (n, channels, height, width) images into (n, classes) logits.
        example: (n, channels, height, width) images of the size the model will run on.
        exclude: Patterns (`layer1.*`) of unit or layer names; units that match, or touch a layer that does, stay whole.
        include: Likewise; when given, only these units may be cut.

    Raises:
        InputError: The model cannot run on the example, or a pattern matches nothing.
    """
    traced = trace(model, example)
    found = label(model, traced)
    layers = _merged_uses(found)
    block_of = block_of_layers(model, [(use.name, _positions(use)) for use in layers])
    groups = _groups(found, layers)
    units, why = _units(groups, found, layers, block_of)
    units = _chosen(units, why, layers, exclude, include)
    table = _layer_table(model, traced, found, block_of, units)
    blocks = list(dict.fromkeys(block_of[use.name] for use in layers))
    for unit in units:
        if unit.block not in blocks:
            inside = [i for i, block in enumerate(blocks) if block.startswith(f"{unit.block}.")]
            blocks.insert(inside[0] if inside else len(blocks), unit.block)
    return ModelGraph(
        input_shape=(int(example.shape[1]), int(example.shape[2]), int(example.shape[3])),
        blocks=tuple(blocks),
        units=tuple(units),
        layers=table,
        kept_whole=_kept_whole(units, why, layers),
        params=sum(parameter.numel() for parameter in model.parameters()),
        macs=sum(layer.macs for layer in table) + found.macs_apart,
        averaged=frozenset(found.averaged),
    )


def matches(unit: Unit, pattern: str) -> bool:
    """Return whether a pattern (`layer1.*`) is the unit's name or that of a layer it touches."""
    return any(fnmatchcase(name, pattern) for name in (unit.name, *_layers_touched(unit)))


def legal_widths(size: int, positions: int, kind: str) -> tuple[int, ...]:
    """Return the widths a unit may take, ascending, `size` last.

    Any number of heads; otherwise multiples of 8 channels, which is what integer kernels fill their registers with
    (of 4 where that leaves no choice or there are fewer than 16 channels); any number where one element is 8 channels
    or more.

    Args:
        size: Elements of the unit.
        positions: Channels of its first layer that each element stands for.
        kind: The unit's kind.
    """
    if kind == "attention heads" or positions >= 8:
        return tuple(range(1, size + 1))
    for step in (8, 4) if size * positions >= 16 else (4,):
        if narrower := [width for width in range(1, size) if width * positions % step == 0]:
            return (*narrower, size)
    return (size,)


def _merged_uses(found: Labelled) -> list[WeightUse | AttentionUse]:
    """Return one use per layer name, the first, in execution order."""
    first: dict[str, WeightUse | AttentionUse] = {}
    for use in found.uses:
        first.setdefault(use.name, use)
    return list(first.values())


def _positions(use: WeightUse | AttentionUse) -> int:
    """Return output positions per image: pixels or tokens."""
    if isinstance(use, AttentionUse):
        return use.queries
    size = int(np.prod(use.output.shape)) // use.output.shape[1 if use.kind == "conv" else -1]
    return size // BATCH


@dataclass(frozen=True)
class _Group:
    """Classes of labels that touch the same dims of the same tensors equally often, in the order of their indices."""

    roots: Labels
    slices: tuple[TensorSlice, ...]
    counts: tuple[Count, ...]


def _groups(found: Labelled, layers: Sequence[WeightUse | AttentionUse]) -> list[_Group]:
    """Group the classes of labels by what they touch, in execution order of the layers that make them."""
    couplings = found.couplings
    keys = list(found.parameters)
    if not keys:
        return []
    roots = [couplings.roots(labels) for labels in (*found.parameters.values(), *found.attributes.values())]
    top = max(int(array.max()) for array in roots) + 1
    # Each (tensor, dim) and number gets a random 64-bit weight: classes whose sums agree touch the same ones equally
    # often.
    weights = np.random.default_rng(0).integers(1, 2**63, len(roots), dtype=np.uint64)
    sums = np.zeros(top, np.uint64)
    for array, weight in zip(roots, weights, strict=True):
        np.add.at(sums, array, weight)
    makers = {f"{use.name}.weight": place for place, use in enumerate(layers)}
    order = sorted(range(len(keys)), key=lambda i: (keys[i][1] != 0, makers.get(keys[i][0], len(makers)), i))
    members: dict[int, list[int]] = {}
    for i in order:
        for signature in np.unique(sums[roots[i]]):
            members.setdefault(int(signature), []).append(i)
    groups = []
    for signature, touched in members.items():
        first = roots[touched[0]]
        mine = first[sums[first] == np.uint64(signature)]
        elements = mine[np.sort(np.unique(mine, return_index=True)[1])]
        slices = [TensorSlice(*keys[i], _rows(roots[i], elements)) for i in touched]
        counts = [
            Count(path, _rows(array, elements))
            for path, array in zip(found.attributes, roots[len(keys) :], strict=True)
            if np.isin(elements[0], array)
        ]
        groups.append(_Group(elements, tuple(slices), tuple(counts)))
    return groups


def _rows(roots: Labels, elements: Labels) -> IndexRows:
    """Return (elements, k): where each element's class occurs in `roots`, ascending."""
    order = np.argsort(elements)
    place = np.minimum(np.searchsorted(elements[order], roots), len(elements) - 1)
    element = order[place]
    hits = np.flatnonzero(elements[element] == roots)
    return hits[np.argsort(element[hits], kind="stable")].reshape(len(elements), -1)


def _units(
    groups: Sequence[_Group],
    found: Labelled,
    layers: Sequence[WeightUse | AttentionUse],
    block_of: Mapping[str, str],
) -> tuple[list[Unit], dict[str, str]]:
    """Return the units, and for every layer whose outputs are in none the reason."""
    couplings = found.couplings
    pinned: dict[int, str] = {}
    for labels, reason in reversed(couplings.pins):
        pinned.update(dict.fromkeys(np.unique(couplings.roots(labels)).tolist(), reason))
    marks: dict[int, set[str]] = {}
    for labels, kind in couplings.marks:
        for root in np.unique(couplings.roots(labels)).tolist():
            marks.setdefault(root, set()).add(kind)
    weights = {use.weight: use for use in layers if isinstance(use, WeightUse) and use.weight}
    read = {
        use.name: couplings.roots(use.in_labels)
        for use in weights.values()
        if use.in_labels is not None and use.called and not use.depthwise
    }
    readers_of: dict[int, list[str]] = {}
    for name, roots in read.items():
        for root in np.unique(roots).tolist():
            readers_of.setdefault(root, []).append(name)
    units: list[Unit] = []
    why: dict[str, str] = {}
    for group in groups:
        makers = [weights[s.tensor] for s in group.slices if s.dim == 0 and s.tensor in weights]
        main = [use for use in makers if not use.depthwise]
        if not main:
            continue
        reason = _pin_of(group, pinned, main)
        readers = [Reader(name, _rows(read[name], group.roots)) for name in readers_of.get(int(group.roots[0]), ())]
        kind = _kind(marks.get(int(group.roots[0]), set()), main, block_of)
        size, positions = len(group.roots), group.slices[0].index.shape[1]
        widths = legal_widths(size, positions, kind)
        if not reason and not readers:
            reason = "no layer that could be narrowed reads it"
        if not reason and size == 1:
            reason = "all its outputs are bound together, none can go alone"
        if not reason and len(widths) == 1:
            reason = f"has only {size * positions} channels, too few to cut in steps that save time"
        if reason:
            for use in makers:
                why.setdefault(use.name, reason)
            continue
        name, block = _name_and_block(kind, [use.name for use in main], block_of)
        taken = sum(unit.name == name or unit.name.startswith(f"{name}#") for unit in units)
        units.append(
            Unit(
                f"{name}#{taken + 1}" if taken else name,
                kind,
                size,
                block,
                widths,
                group.slices,
                tuple(readers),
                group.counts,
            )
        )
    return units, why


def _pin_of(group: _Group, pinned: Mapping[int, str], makers: Sequence[WeightUse]) -> str:
    """Return why a group stays whole, or nothing."""
    reason = pinned.get(int(group.roots[0]), "")
    if reason == ANSWER and len(makers) > 1:
        return "its width and that of the model's answer must be equal in the model's own code"
    return reason


def _kind(marks: set[str], makers: Sequence[WeightUse], block_of: Mapping[str, str]) -> str:
    # Scores are added to position biases too: channels of a residual path are made in more than one block.
    if "attention heads" in marks and len({block_of[use.name] for use in makers}) == 1:
        return "attention heads"
    if "residual channels" in marks and len(makers) > 1:
        return "residual channels"
    if "attention heads" in marks:
        return "attention heads"
    return "mlp units" if all(use.kind == "linear" for use in makers) else "channels"


def _name_and_block(kind: str, makers: Sequence[str], block_of: Mapping[str, str]) -> tuple[str, str]:
    first = makers[0]
    if kind == "residual channels":
        stage = stage_of(makers, block_of)
        return f"{stage or first}.residual", stage or block_of[first]
    if kind == "attention heads":
        return f"{first.rpartition('.')[0] or first}.heads", block_of[first]
    return first, block_of[first]


def _layers_touched(unit: Unit) -> set[str]:
    return {s.tensor.rpartition(".")[0] for s in unit.slices} | {reader.layer for reader in unit.readers}


def _chosen(
    units: list[Unit],
    why: dict[str, str],
    layers: Sequence[WeightUse | AttentionUse],
    exclude: Sequence[str],
    include: Sequence[str],
) -> list[Unit]:
    """Drop the units that the user's patterns keep whole, noting the pattern as the reason."""
    names = [unit.name for unit in units] + [use.name for use in layers]
    for pattern in (*exclude, *include):
        if not any(fnmatchcase(name, pattern) for name in names):
            near = get_close_matches(pattern, names, 3, 0.4)
            hint = f"Near names: {', '.join(near)}." if near else "See the names that inspect lists."
            raise InputError(f"pattern {pattern!r} matches no unit and no layer. {hint}")

    def matching(unit: Unit, patterns: Sequence[str]) -> str | None:
        return next((pattern for pattern in patterns if matches(unit, pattern)), None)

    kept = []
    for unit in units:
        excluded = matching(unit, exclude)
        if excluded is None and (not include or matching(unit, include) is not None):
            kept.append(unit)
            continue
        reason = f"excluded by the pattern {excluded!r}" if excluded else "not among the patterns to include"
        for part in unit.slices:
            why.setdefault(part.tensor.rpartition(".")[0], reason)
    return kept


def _kept_whole(
    units: Sequence[Unit], why: Mapping[str, str], layers: Sequence[WeightUse | AttentionUse]
) -> tuple[KeptWhole, ...]:
    cut = {s.tensor for unit in units for s in unit.slices if s.dim == 0}
    return tuple(
        KeptWhole(use.name, why.get(use.name, "its outputs are not a list of channels that could be shortened"))
        for use in layers
        if isinstance(use, WeightUse) and use.weight not in cut
    )


def _layer_table(
    model: nn.Module, traced: Trace, found: Labelled, block_of: Mapping[str, str], units: Sequence[Unit]
) -> tuple[Layer, ...]:
    roots = found.couplings.roots
    unit_of = {
        root: unit.name
        for unit in units
        for root in roots(found.parameters[unit.slices[0].tensor, unit.slices[0].dim])[
            unit.slices[0].index[:, 0]
        ].tolist()
    }

    sizes = {unit.name: unit.size for unit in units}

    def shares(labels: Labels | None) -> tuple[Share, ...]:
        """Return the units that features belong to."""
        of_each = [] if labels is None else [unit_of.get(root) for root in roots(labels).tolist()]
        counted = Counter(name for name in of_each if name is not None).most_common()
        return tuple(Share(name, count // sizes[name]) for name, count in counted)

    def made(use: WeightUse | AttentionUse, shape: LayerShape, params: int) -> Layer:
        if isinstance(use, AttentionUse):
            features, ends = (use.heads, use.heads), (shares(use.labels), shares(use.labels))
        else:
            features, ends = (use.in_features, use.out_features), (shares(use.in_labels), shares(use.out_labels))
        return Layer(use.name, shape, block_of[use.name], *features, *ends, params, macs[use.name])

    macs: dict[str, int] = {}
    for use in found.uses:
        macs[use.name] = macs.get(use.name, 0) + _macs(use)
    parameters = dict(model.named_parameters())
    activation_after = _activations(traced)
    table = []
    for use in _merged_uses(found):
        if isinstance(use, AttentionUse):
            shape = LayerShape("attention", use.queries, (1, use.keys), head_dim=use.head_dim)
            table.append(made(use, shape, 0))
            continue
        shape = LayerShape(
            use.kind,
            _positions(use),
            use.input.shape[2:] if use.kind == "conv" else (1, _positions(use)),
            use.kernel,
            use.stride,
            use.padding,
            use.dilation,
            use.depthwise,
            1 if use.depthwise else use.groups,
            activation=activation_after(use.output.uid),
        )
        params = sum(parameters[n].numel() for n in (use.weight, f"{use.name}.bias") if n in parameters)
        table.append(made(use, shape, params))
    return tuple(table)


def _macs(use: WeightUse | AttentionUse) -> int:
    """Return multiply-accumulates per image."""
    if isinstance(use, AttentionUse):
        return use.products * use.heads * use.queries * use.keys * use.head_dim
    return _positions(use) * use.out_features * (use.in_features // use.groups) * math.prod(use.kernel)


_ACTIVATIONS = {
    "relu": "relu", "relu6": "relu6", "hardtanh": "relu6", "gelu": "gelu", "silu": "silu", "hardswish": "hardswish",
}  # fmt: skip
_TRANSPARENT = ("batch_norm", "dropout", "contiguous")


def _activations(traced: Trace) -> Callable[[int], str]:
    """Return a function from a tensor to the activation that directly follows it, or ``."""
    users: dict[int, list[int]] = {}
    for place, op in enumerate(traced.ops):
        for ref in refs((op.args, op.kwargs)):
            users.setdefault(ref.uid, []).append(place)

    def after(uid: int) -> str:
        while len(places := users.get(uid, [])) == 1:
            op = traced.ops[places[0]]
            if op.function == "hardtanh" and (op.arg(1, "min_val", -1), op.arg(2, "max_val", 1)) != (0, 6):
                return ""
            if op.function not in _TRANSPARENT:
                return _ACTIVATIONS.get(op.function, "")
            uid = op.result.uid
        return ""

    return after
