"""In: an uncut model and a plan. Out: the cut model before any training, and what a model answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hirelc_deploy.compress import norms, recovery, slicing
from hirelc_deploy.compress.devices import at, device_of, half_precision, sent
from hirelc_deploy.compress.integer import qat
from hirelc_deploy.evaluate.effort import SMALL_BATCH
from hirelc_deploy.graph.answers import Answers, named, stacked
from hirelc_deploy.graph.model_graph import ModelGraph
from hirelc_deploy.graph.sensitivity import Gram
from hirelc_deploy.measure.backend import Outputs
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.tasks.contract import Task

FLOAT = "float"


@dataclass(frozen=True)
class Cuttable:
    """What a cut is made of. Models and images are on one device, and so is what is cut.

    Attributes:
        model: The uncut model.
        graph: Its blocks, units and layers.
        scores: Unit name to the importance of each of its elements.
        grams: Reader layer name to the moments of its input features.
        restated: The uncut model with batch-norm statistics from `norm_batches`.
        norm_batches: Images for batch-norm statistics, preprocessed.
    """

    model: nn.Module
    graph: ModelGraph
    scores: Mapping[str, NDArray[np.float64]]
    grams: Mapping[str, Gram]
    restated: nn.Module
    norm_batches: Sequence[Tensor]

    def at(self, device: torch.device) -> Cuttable:
        """Return the same on another device."""
        model, restated = at(self.model, device), at(self.restated, device)
        return replace(self, model=model, restated=restated, norm_batches=list(sent(self.norm_batches, device)))


def is_whole(graph: ModelGraph, plan: CompressionPlan) -> bool:
    """Return whether a plan, whose names and widths are checked, keeps every element of every unit."""
    slicing.check_plan(graph, plan)
    return all(plan.keep.get(unit.name, unit.size) == unit.size for unit in graph.units)


def cut(uncut: Cuttable, plan: CompressionPlan) -> nn.Module:
    """Return the sliced model, compensated, with batch-norm statistics of its own; not trained."""
    if is_whole(uncut.graph, plan):
        return slicing.slice_model(uncut.model, uncut.graph, {})
    kept = slicing.keep_indices(uncut.graph, plan, uncut.scores)
    model = slicing.slice_model(recovery.compensate(uncut.model, uncut.graph, kept, uncut.grams), uncut.graph, kept)
    with half_precision(device_of(model)):
        norms.correct_norms(model, slicing.slice_model(uncut.restated, uncut.graph, kept), uncut.norm_batches)
    return model


def round_as_asked(model: nn.Module, roundings: Sequence[qat.Rounding], plan: CompressionPlan) -> None:
    """Let a model round, in place, for the sake of each block that is there and is not float by the plan."""
    integer = {name for name, _ in model.named_modules() if plan.precision_of(name) != FLOAT}
    qat.install(model, qat.joined(each for each in roundings if integer & each.weights.keys()))


def divergence(task: Task, wanted: Answers, found: Answers) -> float:
    """Return the mean divergence over images, in double precision."""
    return mean_divergence(divergence_by_batch(task, wanted, found))


def mean_divergence(each: Iterable[Tensor]) -> float:
    """Return the mean of what `divergence_by_batch` yields."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for part in each:
        total += part.sum()
        count += len(part)
    return float(total / count)


def divergences(task: Task, wanted: Answers, found: Answers) -> NDArray[np.float64]:
    """Return the (n,) divergence of each image."""
    each: NDArray[np.float64] = torch.cat(list(divergence_by_batch(task, wanted, found))).numpy()
    return each


def divergence_by_batch(task: Task, wanted: Answers, found: Answers) -> Iterator[Tensor]:
    """Yield the divergences of a few images at a time, in double precision."""
    for start in range(0, len(next(iter(wanted.values()))), SMALL_BATCH):
        uncut, ours = (
            {name: values[start : start + SMALL_BATCH].double() for name, values in each.items()}
            for each in (wanted, found)
        )
        yield task.divergence(uncut, ours)


def forward(model: nn.Module, pictures: Tensor) -> Answers:
    """Return the float32 answers to (n, channels, height, width) pictures, in batches."""
    batches = sent(pictures.split(SMALL_BATCH), device_of(model))
    with torch.no_grad():
        parts = [{name: values.float().cpu() for name, values in named(model(batch)).items()} for batch in batches]
    return {name: torch.from_numpy(stacked([part[name].numpy() for part in parts])) for name in parts[0]}


def forward_half(model: nn.Module, pictures: Tensor) -> Answers:
    """Return the same, computed in half precision where that is faster here."""
    with half_precision(device_of(model)):
        return forward(model, pictures)


def tensors(outputs: Outputs) -> Answers:
    """Return what a file answered as tensors."""
    return {name: torch.from_numpy(values) for name, values in outputs.items()}


def arrays(answers: Answers) -> Outputs:
    """Return what a model answered as arrays."""
    return {name: values.numpy() for name, values in answers.items()}
