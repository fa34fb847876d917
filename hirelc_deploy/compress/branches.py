"""In: a model and its graph. Out: the graph, proven to cut exactly, whose units know the residual branch they hold."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hirelc_deploy.compress.slicing import LeftOut, difference, in_double, provable, uniform_plan
from hirelc_deploy.graph.answers import answers
from hirelc_deploy.graph.model_graph import Branch, ModelGraph, Unit


def proven(model: nn.Module, graph: ModelGraph, example: Tensor) -> ModelGraph:
    """Return the graph with units that cut exactly (`provable`), and with the branches that can be left out.

    A unit holds the largest module in which it is the only one, where that returns a tensor of the shape of the one it
    is given, alone or first in a tuple. It is offered where the model without it, the other units cut to about half,
    computes what the masked model without it does, and where its answer still depends on its images.

    Args:
        example: (n, channels, height, width) images.
    """
    graph, _ = provable(model, graph, example)
    paths = _paths(model, graph)
    given = _given(model, {path for chain in paths.values() for path in chain}, example)
    held = {unit: alike[-1] for unit, chain in paths.items() if (alike := [path for path in chain if path in given])}
    first = {path: unit for unit, path in reversed(held.items())}  # of two units of one module
    branches = {
        unit: Branch(path, _has_its_shortcut(model, graph.unit(unit), path, given[path][0]), given[path][1])
        for path, unit in first.items()
        if not any(path.startswith(f"{other}.") for other in first)
    }
    alive = _alive(model, branches, example)
    double, images, tolerance = in_double(model, example)

    def hold(units: Sequence[str]) -> ModelGraph:
        held = (replace(unit, branch=branches[unit.name] if unit.name in units else None) for unit in graph.units)
        return replace(graph, units=tuple(held))

    def exact(units: Sequence[str]) -> bool:
        held = hold(units)
        keep = uniform_plan(graph, 0.5, "float").keep
        kept = {unit.name: np.arange(0 if unit.branch else keep[unit.name]) for unit in held.units}
        return difference(double, held, kept, images) <= tolerance

    return hold(alive if not alive or exact(alive) else [unit for unit in alive if exact([unit])])


def _paths(model: nn.Module, graph: ModelGraph) -> dict[str, list[str]]:
    """Return unit to the modules that hold it, inner ones first: all its layers and no other unit as a whole.

    Where two units share their smallest module, as in a bottleneck, both have it.
    """
    modules = dict(model.named_modules())
    touched = {u.name: [layer.name for layer in graph.layers if u.name in layer.units] for u in graph.units}
    smallest = {unit: _common_path(layers) for unit, layers in touched.items()}
    found = {}
    for unit in graph.units:
        path, chain = smallest[unit.name], list[str]()
        parts = *(part.tensor for part in unit.slices), *(count.attribute for count in unit.counts)
        if len(touched[unit.name]) < 2 or unit.kind == "residual channels":
            continue
        inside = {name for name, other in smallest.items() if f"{other}.".startswith(f"{path}.")}
        while path and {n for n, other in smallest.items() if f"{other}.".startswith(f"{path}.")} == inside:
            if path in modules and all(part.startswith(f"{path}.") for part in parts):
                chain.append(path)
            path = path.rpartition(".")[0]
        found[unit.name] = chain
    return found


def _common_path(layers: Sequence[str]) -> str:
    """Return the path of the innermost module that has all these layers in it, or is one of them."""
    columns = zip(*(layer.split(".") for layer in layers), strict=False)
    return ".".join(steps[0] for steps in takewhile(lambda steps: len(set(steps)) == 1, columns))


@torch.no_grad()
def _given(model: nn.Module, paths: set[str], example: Tensor) -> dict[str, tuple[Tensor, int]]:
    """Return what each module is given, and how many results it has behind its first.

    Only of those that are called once and return a tensor of the same shape, alone or as the first of a tuple.
    """
    calls: dict[str, list[tuple[Tensor, int] | None]] = {path: [] for path in paths}

    def watch(path: str) -> torch.utils.hooks.RemovableHandle:
        def note(_module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], result: Any) -> None:
            first: Any = next(iter((*given, *named.values())), None)
            results = result if type(result) is tuple and result else (result,)
            alike = isinstance(first, Tensor) and isinstance(results[0], Tensor) and first.shape == results[0].shape
            calls[path].append((first.clone(), len(results) - 1) if alike else None)

        return model.get_submodule(path).register_forward_hook(note, with_kwargs=True)

    handles = [watch(path) for path in paths]
    try:
        answers(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return {path: seen[0] for path, seen in calls.items() if len(seen) == 1 and seen[0] is not None}


@torch.no_grad()
def _alive(model: nn.Module, branches: Mapping[str, Branch], example: Tensor) -> list[str]:
    """Return the units without whose branch the model runs, and answers other images otherwise."""
    model, found = copy.deepcopy(model), []
    two_images = torch.stack([example[0], torch.zeros_like(example[0])])
    for unit, branch in branches.items():
        owner, _, child = branch.module.rpartition(".")
        parent = model.get_submodule(owner)
        module = parent.get_submodule(child)
        setattr(parent, child, LeftOut(branch.passes, branch.more))
        try:
            if any(not torch.equal(output[0], output[1]) for output in answers(model, two_images).values()):
                found.append(unit)
        except Exception:  # the model is the user's code and may raise anything once a module is another
            pass
        setattr(parent, child, module)
    return found


@torch.no_grad()
def _has_its_shortcut(model: nn.Module, unit: Unit, path: str, given: Tensor) -> bool:
    """Return whether a module still depends on its input when nobody reads the unit."""
    module = copy.deepcopy(model.get_submodule(path)).eval()
    try:
        for reader in unit.readers:
            module.get_submodule(reader.layer.removeprefix(f"{path}.")).weight.zero_()  # type: ignore[operator]
        return not torch.equal(module(given), module(torch.zeros_like(given)))
    except Exception:  # it may want more than one argument, or name its weight otherwise; it is tried as a zero then
        return False
