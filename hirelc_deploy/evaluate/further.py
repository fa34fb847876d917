"""In: an uncut model and a plan that was recovered. Out: what plans within it are cut of, so that its training is kept.

Most of what a recovery mends it mends for every plan of a like size. Small networks, divergence after a whole recovery
from the uncut model, and after a third of one that begins at a plan which takes 1.25 times as long: 0.0355 and 0.0356
nats, 0.0599 and 0.0689. From a plan that takes twice as long nothing is gained: 0.0722 and 0.0679 after a third.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from hirelc_deploy.compress import norms, slicing
from hirelc_deploy.compress.devices import CPU, at, half_precision, sent
from hirelc_deploy.compress.features import kept_inputs
from hirelc_deploy.evaluate.cutting import Cuttable
from hirelc_deploy.evaluate.effort import BATCH
from hirelc_deploy.evaluate.uncut import UncutModel
from hirelc_deploy.graph.model_graph import ModelGraph
from hirelc_deploy.graph.sensitivity import Gram, input_grams
from hirelc_deploy.inputs.data.batches import batches
from hirelc_deploy.plan import CompressionPlan


def recovered(uncut: UncutModel, plan: CompressionPlan, weights: Mapping[str, Tensor]) -> Cuttable:
    """Return a plan with its recovered weights in the sizes of the uncut model; what was cut is zero.

    Only plans within it mean anything.

    Raises:
        RuntimeError: The weights are not of this plan.
    """
    graph, kept = uncut.graph, slicing.keep_indices(uncut.graph, plan, uncut.scores)
    small = slicing.slice_model(uncut.model, graph, kept)
    small.load_state_dict(dict(weights))
    again = at(copy.deepcopy(small.eval()), uncut.device)
    with half_precision(uncut.device):
        norms.reestimate_norms(again, uncut.norm_batches)
    model, restated = (at(_grown(uncut.model, graph, kept, at(one, CPU)), uncut.device) for one in (small, again))
    return Cuttable(model, graph, uncut.scores, _grams(uncut, kept, small), restated, uncut.norm_batches)


def lies_within(graph: ModelGraph, small: CompressionPlan, large: CompressionPlan) -> bool:
    """Return whether a plan keeps no element of any unit that another one cuts; equal plans do."""
    widths = [(small.keep.get(unit.name, unit.size), large.keep.get(unit.name, unit.size)) for unit in graph.units]
    return all(narrow <= wide for narrow, wide in widths)


@torch.no_grad()
def _grown(model: nn.Module, graph: ModelGraph, kept: slicing.Kept, small: nn.Module) -> nn.Module:
    """Return a copy of the full-size model with the values of the small one in their places, and zeros elsewhere.

    The places are those of numbers that are cut as weights are.
    """
    numbered = copy.deepcopy(model).double()
    for tensor in numbered.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.arange(tensor.numel(), dtype=torch.float64).reshape(tensor.shape))
    places, values = slicing.slice_model(numbered, graph, kept).state_dict(), small.state_dict()
    full = copy.deepcopy(model)
    for name, tensor in full.state_dict().items():
        if tensor.is_floating_point():
            flat = torch.zeros(tensor.numel(), dtype=tensor.dtype)
            if name in values:
                flat[places[name].long().flatten()] = values[name].flatten().to(tensor.dtype)
            tensor.copy_(flat.reshape(tensor.shape))
    return full


def _grams(uncut: UncutModel, kept: slicing.Kept, small: nn.Module) -> dict[str, Gram]:
    """Return the moments of what the small model's layers read, in the sizes of the uncut one."""
    there = {name for name, _ in small.named_modules()}
    units = (
        replace(unit, readers=tuple(reader for reader in unit.readers if reader.layer in there))
        for unit in uncut.graph.units
    )
    images = sent(batches(uncut.sensitivity_split, BATCH, uncut.effort.sensitivity_images), uncut.device)
    found = {}
    places = kept_inputs(uncut.graph, kept)
    for name, gram in input_grams(at(small, uncut.device), replace(uncut.graph, units=tuple(units)), images).items():
        features = len(uncut.grams[name].mean)
        mean, moment = np.zeros(features), np.zeros((features, features))
        mean[places[name]], moment[np.ix_(places[name], places[name])] = gram.mean, gram.second_moment
        found[name] = Gram(gram.count, mean, moment)
    return found
