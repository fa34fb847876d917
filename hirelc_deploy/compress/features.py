"""In: a model and one cut from it. Out: which features both have, and how far apart they are in a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from hirelc_deploy.compress.devices import device_of
from hirelc_deploy.graph.model_graph import ModelGraph
from hirelc_deploy.graph.sensitivity import features_dim
from hirelc_deploy.together import ranks

SMALLEST_POOLED_MAP = 8
"""Rows and columns of a feature map below which it is compared whole."""


def kept_inputs(graph: ModelGraph, kept: Mapping[str, NDArray[np.int64]]) -> dict[str, NDArray[np.int64]]:
    """Return, for every layer that reads a unit, the ascending positions among its uncut input features that stay.

    Layers that are left out read nothing.
    """
    widths = {name: len(elements) for name, elements in kept.items()}
    layers = {layer.name: layer for layer in graph.layers if not graph.leaves_out(layer.name, widths)}
    gone: dict[str, list[NDArray[np.int64]]] = {}
    for unit in graph.units:
        removed = np.setdiff1d(np.arange(unit.size), kept.get(unit.name, np.arange(unit.size)))
        for reader in unit.readers:
            if reader.layer in layers:
                gone.setdefault(reader.layer, []).append(reader.index[removed].ravel())
    return {
        name: np.setdiff1d(np.arange(layers[name].in_features), np.concatenate(parts)) for name, parts in gone.items()
    }


class FeatureMatch:
    """Watches what the same layers of student and teacher read, and says how far apart it is.

    Attributes:
        variances: Layer name to the variance of what the teacher's reads, in the first batch.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, reads: Mapping[str, NDArray[np.int64]]) -> None:
        self._device = device_of(teacher)
        self._reads = {name: torch.from_numpy(index).to(self._device) for name, index in reads.items()}
        self._layers = {name: teacher.get_submodule(name) for name in reads}
        self._student: dict[str, Tensor] = {}
        self._teacher: dict[str, Tensor] = {}
        self.variances: dict[str, Tensor] = {}
        self._hooks = [
            modules[name].register_forward_pre_hook(_keeper(seen, name))
            for seen, modules in (
                (self._student, dict(student.named_modules())),
                (self._teacher, dict(teacher.named_modules())),
            )
            for name in self._reads
        ]

    @property
    def watches(self) -> bool:
        """True when there is anything to compare."""
        return bool(self._reads)

    def distance(self) -> Tensor:
        """Return the mean over layers of squared differences, relative to the variance of the teacher's features.

        The variance is that of the first batch. Maps are compared as means over 2x2 squares: neighbours say nearly the
        same. (Every second row and column would do, but its gradient comes in another memory layout, which costs more.)
        A layer is left out whose rows are cut too, as where a mixer's Linear layer runs over tokens, a row a channel.
        """
        parts: list[Tensor] = []
        seen = set[int]()
        for name, index in self._reads.items():
            theirs, ours = self._teacher[name], self._student[name]
            if id(theirs) in seen:  # a shortcut reads what the block reads
                continue
            seen.add(id(theirs))
            dim = features_dim(self._layers[name])
            if dim == -3 and theirs.ndim == 4 and min(theirs.shape[2:]) >= SMALLEST_POOLED_MAP:
                theirs, ours = F.avg_pool2d(theirs, 2), F.avg_pool2d(ours, 2)
            theirs = theirs.index_select(dim, index)
            if ours.shape != theirs.shape:
                continue
            if name not in self.variances:
                self.variances[name] = ranks.variance(theirs.float()) + 1e-6
            parts.append((ours - theirs).float().square().mean() / self.variances[name])
        return torch.stack(parts).mean() if parts else torch.zeros((), device=self._device)

    def close(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()


def _keeper(seen: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[name] = inputs[0]

    return keep
