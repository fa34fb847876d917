"""In: a model, its graph and a plan. Out: a real smaller model, its masked twin, or the same from a shape manifest."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hirelc_deploy.errors import InputError, SliceError
from hirelc_deploy.graph.answers import answers
from hirelc_deploy.graph.model_graph import KeptWhole, ModelGraph, Unit
from hirelc_deploy.graph.rules import CONVOLUTIONS
from hirelc_deploy.graph.sizes import set_whole_number, whole_numbers
from hirelc_deploy.graph.trace import as_it_stands, drop_caches
from hirelc_deploy.plan import END_OF, CompressionPlan

Kept = Mapping[str, NDArray[np.int64]]
"""Unit name to the ascending element numbers it keeps; a unit not named keeps all."""


def check_plan(graph: ModelGraph, plan: CompressionPlan) -> None:
    """Raise InputError when the plan names a unit or layer the model lacks, or a width the unit cannot take.

    Which ends a file has is known with the file.
    """
    units = {unit.name: unit for unit in graph.units}
    layers = {layer.name: layer for layer in graph.layers}
    for name, width in plan.keep.items():
        if name not in units:
            raise InputError(f"plan: unit {name!r} does not exist.{_near(name, units)}")
        widths = units[name].widths
        if width not in widths and width != units[name].least:
            around = [w for w in widths if w < width][-1:] + [w for w in widths if w > width][:1]
            choice = " or ".join(str(w) for w in around)
            raise InputError(f"plan: unit {name!r} cannot keep {width} of {units[name].size} elements; use {choice}.")
    for name in plan.precision:
        if name not in layers and not name.startswith(END_OF):
            raise InputError(f"plan: layer {name!r} does not exist.{_near(name, layers)}")
        if plan.precision[name] == "int4" and (name not in layers or layers[name].shape.kind != "linear"):
            raise InputError(f"plan: layer {name!r} is no Linear layer and cannot have int4; use int8 or float.")


def uniform_plan(graph: ModelGraph, keep_ratio: float, precision: str) -> CompressionPlan:
    """Return the plan that keeps the legal width nearest to `keep_ratio` of every unit (the larger of two as near)."""
    keep = {
        unit.name: min(unit.widths, key=lambda width: (abs(width - keep_ratio * unit.size), -width))
        for unit in graph.units
    }
    if precision == "int4":
        return CompressionPlan(keep, {x.name: "int4" for x in graph.layers if x.shape.kind == "linear"}, "auto")
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
    not cut are copied too, so nothing is shared. A branch without elements is a `LeftOut`.

    Raises:
        SliceError: An unknown unit, no element left and no branch that goes with them, or numbers that are not
            ascending elements of the unit.
    """
    stays = _staying(model, graph, kept)
    counts = _counts_left(model, graph, kept)
    memo: dict[int, object] = {}
    for name, tensor in _tensors(model):
        new = tensor.detach()
        # The largest cut first, so that later ones move less.
        for dim, index in sorted(stays.get(name, {}).items(), key=lambda item: len(item[1]) / tensor.shape[item[0]]):
            new = new.index_select(dim, torch.from_numpy(index).to(tensor.device))
        memo[id(tensor)] = _like(tensor, new if name in stays else new.clone())
    # deepcopy takes tensors from the memo: it copies the structure only.
    small = copy.deepcopy(model, memo)
    drop_caches(small)
    for path, number in counts.items():
        set_whole_number(small, path, number)
    _fix_attributes(small)
    leave_out(small, graph, kept)
    return small


class LeftOut(nn.Module):
    """Stands where a residual branch was: an identity where the shortcut was in it, else a zero that is added.

    `forward` returns its first argument, or one zero of as many dimensions; in a tuple, with None for each of the
    `more` results that the branch had behind it.
    """

    def __init__(self, passes: bool, more: int = 0) -> None:
        super().__init__()
        self.passes = passes
        self.more = more

    def forward(self, *given: Any, **named: Any) -> Any:
        """Ignore whatever else the branch was told."""
        x = given[0] if given else next(iter(named.values()))
        result = x if self.passes else x.new_zeros((1,) * x.ndim)
        return (result, *[None] * self.more) if self.more else result


def leave_out(model: nn.Module, graph: ModelGraph, kept: Kept) -> None:
    """Replace, in place, the branches of units of which nothing stays."""
    for name, elements in kept.items():
        branch = graph.unit(name).branch
        if branch is not None and not len(elements):
            _replace(model, branch.module, LeftOut(branch.passes, branch.more))


def _replace(model: nn.Module, path: str, stands: LeftOut) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, stands.train(model.training))


def mask_model(model: nn.Module, graph: ModelGraph, kept: Kept) -> nn.Module:
    """Return a copy of full size in which everything that `slice_model` would remove is zero.

    A layer, group or response norm of some features takes its statistics over those that stay: over all of them it
    would see the zeros.
    """
    stays = _staying(model, graph, kept)
    masked = copy.deepcopy(model)
    drop_caches(masked)
    with torch.no_grad():
        for name, tensor in _tensors(masked):
            for dim, index in stays.get(name, {}).items():
                gone = np.setdiff1d(np.arange(tensor.shape[dim]), index)
                tensor.index_fill_(dim, torch.from_numpy(gone).to(tensor.device), 0)
                if name in graph.averaged:
                    # It stands over the mean of all, which is smaller by this than the mean of those that stay.
                    tensor.mul_(len(index) / tensor.shape[dim])
    leave_out(masked, graph, kept)
    norms = _NormsOverKept(masked, {name: index[0] for name, index in stays.items() if 0 in index})
    masked.register_forward_pre_hook(norms.begin)
    masked.register_forward_hook(norms.end, always_call=True)
    return masked


class _NormsOverKept(TorchFunctionMode):
    """While a masked model runs, its layer, RMS and group norms see the kept features and give zeros for the others.

    Args:
        kept: Name of a norm's weight to the features that it keeps.
    """

    def __init__(self, model: nn.Module, kept: Mapping[str, NDArray[np.int64]]) -> None:
        super().__init__()
        self.model = model
        self.kept = {name: torch.from_numpy(index) for name, index in kept.items()}
        self.by_weight: dict[int, Tensor] = {}

    def begin(self, *_: Any) -> None:
        """Start, as a forward pre-hook of the model."""
        self.by_weight = {id(p): self.kept[name] for name, p in self.model.named_parameters() if name in self.kept}
        self.__enter__()  # type: ignore[no-untyped-call]

    def end(self, *_: Any) -> None:
        """Stop, as a forward hook of the model."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in (F.layer_norm, F.rms_norm, F.group_norm):
            return func(*args, **kwargs)
        call = inspect.signature(func).bind(*args, **kwargs).arguments
        kept = self.by_weight.get(id(call.get("weight")))
        if kept is None:
            return func(*args, **kwargs)
        dim = 1 if func is F.group_norm else -1
        whole = call["input"]
        kept = kept.to(whole.device)
        for name in ("weight", "bias"):
            if call.get(name) is not None:
                call[name] = call[name][kept]
        if func is not F.group_norm:
            call["normalized_shape"] = (len(kept),)
        normed = func(**{**call, "input": whole.index_select(dim, kept)})
        return torch.zeros_like(whole).index_copy(dim, kept, normed)


def provable(model: nn.Module, graph: ModelGraph, example: Tensor) -> tuple[ModelGraph, float]:
    """Slice every unit to about half, compare with the masked twin, and keep units whole where the two differ.

    Tracing follows what it saw; a forward pass with sizes written into its code can still break when sliced. This
    finds the units at fault by halving. It runs in double precision where the model can: rounding alone has been seen
    to move the output of a deep network by more than a wrong cut of another.

    Args:
        example: (n, channels, height, width) images.

    Returns:
        The graph without such units (they are listed in `kept_whole`), and the largest difference left, as a share of
        the output's scale.
    """
    uniform = uniform_plan(graph, 0.5, "float").keep
    rng = np.random.default_rng(0)  # not the same places in every unit: two of them could agree by accident
    chosen = {u.name: np.sort(rng.choice(u.size, uniform[u.name], replace=False)) for u in graph.units}
    model, example, tolerance = in_double(model, example)

    def apart(units: tuple[Unit, ...]) -> float:
        return difference(model, replace(graph, units=units), {u.name: chosen[u.name] for u in units}, example)

    def faulty(units: tuple[Unit, ...]) -> list[Unit]:
        """Return the units at fault among `units`, which together differ."""
        if len(units) == 1:
            return list(units)
        middle = len(units) // 2
        return [bad for half in (units[:middle], units[middle:]) if apart(half) > tolerance for bad in faulty(half)]

    error = apart(graph.units)
    if error <= tolerance:
        return graph, error
    bad = faulty(graph.units)
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
    return graph, apart(graph.units)


def difference(model: nn.Module, graph: ModelGraph, kept: Kept, example: Tensor) -> float:
    """Return how far the outputs of the sliced and of the masked model are apart, each as a share of its own scale.

    Infinite where the sliced model cannot run or its outputs are not finite.
    """
    try:
        masked = answers(mask_model(model, graph, kept), example)
        sliced = answers(slice_model(model, graph, kept), example)
    except Exception:  # the model is the user's code and may raise anything once its sizes change
        return math.inf
    if {name: tensor.shape for name, tensor in sliced.items()} != {
        name: tensor.shape for name, tensor in masked.items()
    }:
        return math.inf
    errors = [_apart(sliced[name].double(), whole.double()) for name, whole in masked.items()]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def _apart(one: Tensor, whole: Tensor) -> float:
    return float((one - whole).abs().max() / whole.abs().max().clamp_min(1e-12))


def in_double(model: nn.Module, example: Tensor) -> tuple[nn.Module, Tensor, float]:
    """Return model and images in double precision and 1e-5, or as they are and 1e-4 where its code needs floats.

    Raises InputError where a copy of the model runs layers of the original.
    """
    double = copy.deepcopy(model).double()
    try:
        with as_it_stands(double):
            answers(double, example.double())
    except RuntimeError:  # torch's answer to operands of different types
        return model, example, 1e-4
    return double, example.double(), 1e-5


Shapes = Mapping[str, list[int] | int | str]
"""See `shapes`."""

IDENTITY, ZERO = "identity", "zero"


def shapes(model: nn.Module) -> Shapes:
    """Return the shape manifest, as JSON values: shapes of the state dict, and the numbers that modules keep.

    A tensor has a list, a number (`blocks.0.attn.num_heads`) is one, and a branch that was left out (`layer1.1`) is
    IDENTITY or ZERO. Numbers that follow from a weight are left out.
    """
    sized = [path for path, module in model.named_modules() if any(applies(module) for applies, _ in ATTRIBUTE_FIXES)]
    numbers = {
        path: number
        for path, number in whole_numbers(model).items()
        if not any(path.startswith(f"{owner}.") for owner in sized)
    }
    gone = {
        path: IDENTITY if module.passes else ZERO
        for path, module in model.named_modules()
        if isinstance(module, LeftOut)
    }
    return {**{name: list(tensor.shape) for name, tensor in model.state_dict().items()}, **numbers, **gone}


def rebuild(model_uncut: nn.Module, shapes: Shapes, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Turn a freshly built uncut model into the sliced one, in place, and return it.

    Raises:
        InputError: The manifest, the weights and the model do not belong together.
    """
    _leave_out_again(model_uncut, shapes)
    expected = set(model_uncut.state_dict())
    sizes = {name: shape for name, shape in shapes.items() if isinstance(shape, list)}
    for what, names in (("shape manifest", set(sizes)), ("weights", set(state_dict))):
        if names != expected:
            odd = sorted(names ^ expected)[0]
            state = "lacks" if odd in expected else "has an unknown tensor"
            raise InputError(f"{what}: {state} {odd!r}; it belongs to another model.")
    resized: dict[int, Tensor] = {}
    for path, module in model_uncut.named_modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                shape = sizes.get(f"{path}.{name}" if path else name)
                if tensor is None or shape is None or list(tensor.shape) == shape:
                    continue
                if len(shape) != tensor.ndim or any(n > full for n, full in zip(shape, tensor.shape, strict=True)):
                    raise InputError(
                        f"shape manifest: {path}.{name} has shape {shape}, which is not cut from {list(tensor.shape)}; "
                        "it belongs to another model."
                    )
                if id(tensor) not in resized:
                    resized[id(tensor)] = _like(tensor, tensor.detach().new_empty(tuple(shape)))
                table[name] = resized[id(tensor)]
    _fix_attributes(model_uncut)
    for name, number in shapes.items():
        if isinstance(number, int):
            try:
                set_whole_number(model_uncut, name, number)
            except KeyError:
                raise InputError(
                    f"shape manifest: has an unknown number {name!r}; it belongs to another model."
                ) from None
    try:
        model_uncut.load_state_dict(dict(state_dict))
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[-1].strip()
        raise InputError(f"weights: they do not have the shapes of the manifest ({reason}).") from error
    return model_uncut


def _leave_out_again(model: nn.Module, shapes: Shapes) -> None:
    modules = dict(model.named_modules())
    for path, stands in shapes.items():
        if isinstance(stands, str):
            if not path or path not in modules:
                raise InputError(f"shape manifest: leaves out an unknown module {path!r}; it belongs to another model.")
            _replace(model, path, LeftOut(stands == IDENTITY))  # its `more` is a number of the manifest


# ---- attributes that repeat what the shapes of weights say --------------------------------------------------------


def _fix_conv(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
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


ATTRIBUTE_FIXES: list[tuple[Callable[[nn.Module], bool], Callable[..., None]]] = [
    (lambda module: isinstance(module, CONVOLUTIONS), _fix_conv),
    (lambda module: isinstance(module, nn.Linear), _fix_linear),
    (lambda module: isinstance(module, nn.modules.batchnorm._BatchNorm), _fix_batch_norm),
]
"""Modules of torch whose sizes follow from their weights. What other modules count is in `Unit.counts`."""


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


def _counts_left(model: nn.Module, graph: ModelGraph, kept: Kept) -> dict[str, int]:
    """Return attribute to its new value, for every number that counts something removed."""
    gone: dict[str, list[NDArray[np.int64]]] = {}
    for name, elements in kept.items():
        unit = graph.unit(name)
        removed = np.setdiff1d(np.arange(unit.size), elements)
        for count in unit.counts if len(removed) else ():
            gone.setdefault(count.attribute, []).append(count.index[removed].ravel())
    numbers = whole_numbers(model)
    return {path: numbers[path] - len(np.unique(np.concatenate(parts))) for path, parts in gone.items()}


def _staying(model: nn.Module, graph: ModelGraph, kept: Kept) -> dict[str, dict[int, NDArray[np.int64]]]:
    """Return tensor name to dim to the ascending positions that stay, for every tensor that loses some."""
    units = {unit.name: unit for unit in graph.units}
    gone: dict[tuple[str, int], list[NDArray[np.int64]]] = {}
    for name, elements in kept.items():
        if name not in units:
            raise SliceError(f"unit {name!r} does not exist.{_near(name, units)}")
        unit = units[name]
        numbers = np.asarray(elements)
        if not len(numbers) and unit.branch is not None:
            continue  # see `leave_out`
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
