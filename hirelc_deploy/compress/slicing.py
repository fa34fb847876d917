"""In: a model, its graph and a plan. Out: a real smaller model, its masked twin, or the same from a shape manifest."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hirelc_deploy.errors import InputError, SliceError
from hirelc_deploy.graph.model_graph import KeptWhole, ModelGraph, Unit
from hirelc_deploy.plan import CompressionPlan

Kept = Mapping[str, NDArray[np.int64]]
"""Unit name to the ascending element numbers it keeps; a unit not named keeps all."""


def check_plan(graph: ModelGraph, plan: CompressionPlan) -> None:
    """Raise InputError when the plan names a unit or layer the model lacks, or a width the unit cannot take."""
    units = {unit.name: unit for unit in graph.units}
    layers = {layer.name for layer in graph.layers}
    for name, width in plan.keep.items():
        if name not in units:
            raise InputError(f"plan: unit {name!r} does not exist.{_near(name, units)}")
        widths = units[name].widths
        if width not in widths:
            around = [w for w in widths if w < width][-1:] + [w for w in widths if w > width][:1]
            choice = " or ".join(str(w) for w in around)
            raise InputError(f"plan: unit {name!r} cannot keep {width} of {units[name].size} elements; use {choice}.")
    for name in plan.precision:
        if name not in layers:
            raise InputError(f"plan: layer {name!r} does not exist.{_near(name, layers)}")


def uniform_plan(graph: ModelGraph, keep_ratio: float, precision: str) -> CompressionPlan:
    """Return the plan that keeps the legal width nearest to `keep_ratio` of every unit (the larger of two as near)."""
    keep = {
        unit.name: min(unit.widths, key=lambda width: (abs(width - keep_ratio * unit.size), -width))
        for unit in graph.units
    }
    return CompressionPlan(keep, {}, precision)


def keep_indices(
    graph: ModelGraph, plan: CompressionPlan, importance: Mapping[str, NDArray[np.float64]]
) -> dict[str, NDArray[np.int64]]:
    """Return for every unit the elements of highest importance, as many as the plan keeps, in ascending order."""
    kept = {}
    for unit in graph.units:
        width = plan.keep.get(unit.name, unit.size)
        by_importance = np.arange(unit.size)
        if width < unit.size:
            by_importance = np.argsort(-importance[unit.name], kind="stable")
        kept[unit.name] = np.sort(by_importance[:width])
    return kept


def slice_model(model: nn.Module, graph: ModelGraph, kept: Kept) -> nn.Module:
    """Return a smaller copy of the model in which only the kept elements exist; the model itself is not touched.

    The copy is an ordinary module of the same classes: it can be trained, exported and sliced again. Weights that are
    not cut are copied too, so nothing is shared.

    Raises:
        SliceError: An unknown unit, no element left, or numbers that are not ascending elements of the unit.
    """
    stays = _staying(model, graph, kept)
    memo: dict[int, object] = {}
    for name, tensor in _tensors(model):
        new = tensor.detach()
        # The largest cut first, so that later ones move less.
        for dim, index in sorted(stays.get(name, {}).items(), key=lambda item: len(item[1]) / tensor.shape[item[0]]):
            new = new.index_select(dim, torch.from_numpy(index).to(tensor.device))
        memo[id(tensor)] = _like(tensor, new if name in stays else new.clone())
    # deepcopy takes tensors from the memo: it copies the structure only.
    small = copy.deepcopy(model, memo)
    _fix_attributes(small)
    return small


def mask_model(model: nn.Module, graph: ModelGraph, kept: Kept) -> nn.Module:
    """Return a copy of full size in which everything that `slice_model` would remove is zero."""
    stays = _staying(model, graph, kept)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in _tensors(masked):
            for dim, index in stays.get(name, {}).items():
                gone = np.setdiff1d(np.arange(tensor.shape[dim]), index)
                tensor.index_fill_(dim, torch.from_numpy(gone).to(tensor.device), 0)
    return masked


def provable(model: nn.Module, graph: ModelGraph, example: Tensor) -> tuple[ModelGraph, float]:
    """Slice every unit to about half, compare with the masked twin, and keep units whole where the two differ.

    Tracing follows what it saw; a forward pass with sizes written into its code can still break when sliced. This
    finds the units at fault by halving.

    Args:
        example: (n, channels, height, width) images.

    Returns:
        The graph without such units (they are listed in `kept_whole`), and the largest difference left, as a share of
        the output's scale.
    """

    uniform = uniform_plan(graph, 0.5, "float").keep

    def difference(units: tuple[Unit, ...]) -> float:
        half = {u.name: np.arange(u.size - uniform[u.name], u.size, dtype=np.int64) for u in units}
        part = replace(graph, units=units)
        masked = _outputs(mask_model(model, part, half), example)
        try:
            sliced = _outputs(slice_model(model, part, half), example)
        except Exception:  # the model is the user's code and may raise anything once its sizes change
            return math.inf
        if sliced.shape != masked.shape:
            return math.inf
        error = float((sliced - masked).abs().max() / masked.abs().max().clamp_min(1e-12))
        return error if math.isfinite(error) else math.inf

    def faulty(units: tuple[Unit, ...]) -> list[Unit]:
        if not units or difference(units) <= 1e-4:
            return []
        if len(units) == 1:
            return list(units)
        middle = len(units) // 2
        return faulty(units[:middle]) + faulty(units[middle:])

    bad = faulty(graph.units)
    if bad:
        reasons = tuple(
            KeptWhole(unit.slices[0].tensor.rpartition(".")[0], "its width is fixed in the model's own code")
            for unit in bad
        )
        names = {unit.name for unit in bad}
        layers = tuple(
            replace(
                layer,
                reads=tuple(share for share in layer.reads if share.unit not in names),
                writes=tuple(share for share in layer.writes if share.unit not in names),
            )
            for layer in graph.layers
        )
        units = tuple(unit for unit in graph.units if unit not in bad)
        graph = replace(graph, units=units, layers=layers, kept_whole=(*graph.kept_whole, *reasons))
    return graph, difference(graph.units)


def shapes(model: nn.Module) -> dict[str, list[int]]:
    """Return the shape manifest: every tensor of the state dict with its shape, as JSON values."""
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def rebuild(model_uncut: nn.Module, shapes: Mapping[str, list[int]], state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Turn a freshly built uncut model into the sliced one, in place, and return it.

    Raises:
        InputError: The manifest, the weights and the model do not belong together.
    """
    expected = set(model_uncut.state_dict())
    for what, names in (("shape manifest", set(shapes)), ("weights", set(state_dict))):
        if names != expected:
            odd = sorted(names ^ expected)[0]
            state = "lacks" if odd in expected else "has an unknown tensor"
            raise InputError(f"{what}: {state} {odd!r}; it belongs to another model.")
    resized: dict[int, Tensor] = {}
    for path, module in model_uncut.named_modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                shape = shapes.get(f"{path}.{name}" if path else name)
                if tensor is None or shape is None or list(tensor.shape) == list(shape):
                    continue
                if id(tensor) not in resized:
                    resized[id(tensor)] = _like(tensor, tensor.detach().new_empty(tuple(shape)))
                table[name] = resized[id(tensor)]
    _fix_attributes(model_uncut)
    try:
        model_uncut.load_state_dict(dict(state_dict))
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[-1].strip()
        raise InputError(f"weights: they do not have the shapes of the manifest ({reason}).") from error
    return model_uncut


# ---- attributes that repeat what the shapes of weights say --------------------------------------------------------


def _fix_conv(conv: nn.Conv2d) -> None:
    filters, columns = conv.weight.shape[:2]
    if 1 < conv.groups == conv.in_channels:
        conv.groups = filters // (conv.out_channels // conv.groups)
    conv.in_channels, conv.out_channels = columns * conv.groups, filters


def _fix_linear(linear: nn.Linear) -> None:
    linear.out_features, linear.in_features = linear.weight.shape


def _fix_batch_norm(norm: nn.modules.batchnorm._BatchNorm) -> None:
    sized = norm.running_mean if norm.running_mean is not None else norm.weight
    if sized is not None:
        norm.num_features = len(sized)


_HEAD_COUNTS = ("num_heads", "heads", "n_heads", "nhead", "num_attention_heads")
_QUERY_KEY_VALUE = re.compile(r"(to_|w_?|in_)?(q|k|v|qkv|kv|qk|query|key|value)(_?proj|_?linear)?|in_proj")
_INNER_WIDTHS = ("attn_dim", "inner_dim", "attention_dim", "all_head_size", "dim_attn")


def _fix_heads(attention: nn.Module) -> None:
    """Scale the head count of an attention module by how far its query, key and value projections shrank.

    Runs before its layers are fixed: their attributes still tell the old width, their weights the new one.
    """
    linears = {name: child for name, child in attention.named_children() if isinstance(child, nn.Linear)}
    named = [linear for name, linear in linears.items() if _QUERY_KEY_VALUE.fullmatch(name)]
    shrunk = [linear for linear in named or linears.values() if len(linear.weight) < linear.out_features]
    for name in (*_HEAD_COUNTS, *_INNER_WIDTHS) if shrunk else ():
        old = getattr(attention, name, None)
        if type(old) is int:
            setattr(attention, name, old * len(shrunk[0].weight) // shrunk[0].out_features)


def _has_heads(module: nn.Module) -> bool:
    return any(type(getattr(module, name, None)) is int for name in _HEAD_COUNTS)


ATTRIBUTE_FIXES: list[tuple[Callable[[nn.Module], bool], Callable[..., None]]] = [
    (_has_heads, _fix_heads),
    (lambda module: isinstance(module, nn.Conv2d), _fix_conv),
    (lambda module: isinstance(module, nn.Linear), _fix_linear),
    (lambda module: isinstance(module, nn.modules.batchnorm._BatchNorm), _fix_batch_norm),
]
"""Which modules keep sizes in attributes, and how to set these from sliced weights. Parents come before children."""


def _fix_attributes(model: nn.Module) -> None:
    for module in model.modules():
        for applies, fix in ATTRIBUTE_FIXES:
            if applies(module):
                fix(module)


# ---- tensors ----------------------------------------------------------------------------------------------------


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    """Return `values` as the same kind of tensor: a parameter with the same requires_grad, or a plain tensor."""
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


def _staying(model: nn.Module, graph: ModelGraph, kept: Kept) -> dict[str, dict[int, NDArray[np.int64]]]:
    """Return tensor name to dim to the ascending positions that stay, for every tensor that loses some."""
    units = {unit.name: unit for unit in graph.units}
    gone: dict[tuple[str, int], list[NDArray[np.int64]]] = {}
    for name, elements in kept.items():
        if name not in units:
            raise SliceError(f"unit {name!r} does not exist.{_near(name, units)}")
        unit = units[name]
        numbers = np.asarray(elements)
        if not len(numbers) or (np.diff(numbers) <= 0).any() or numbers[0] < 0 or numbers[-1] >= unit.size:
            raise SliceError(f"{name}: keep at least one element, in ascending numbers from 0 to {unit.size - 1}.")
        if len(numbers) == unit.size:
            continue
        removed = np.setdiff1d(np.arange(unit.size), numbers)
        for part in unit.slices:
            gone.setdefault((part.tensor, part.dim), []).append(part.index[removed].ravel())
    shape_of = {name: tensor.shape for name, tensor in _tensors(model)}
    stays: dict[str, dict[int, NDArray[np.int64]]] = {}
    for (tensor, dim), positions in gone.items():
        mask = np.ones(shape_of[tensor][dim], bool)
        mask[np.concatenate(positions)] = False
        stays.setdefault(tensor, {})[dim] = np.flatnonzero(mask)
    return stays


def _near(name: str, names: Iterable[str]) -> str:
    near = get_close_matches(name, list(names), 3, 0.4)
    return f" Near names: {', '.join(near)}." if near else " `inspect` lists the names of this model."


@torch.no_grad()
def _outputs(model: nn.Module, images: Tensor) -> Tensor:
    output = model.eval()(images)
    return output if isinstance(output, Tensor) else output[0]
