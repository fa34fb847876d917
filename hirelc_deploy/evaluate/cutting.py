"""In: an uncut model and a plan. Out: the cut model before any training, and what a model answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hirelc_deploy.compress import recovery, slicing
from hirelc_deploy.compress.integer import qat
from hirelc_deploy.evaluate.effort import SMALL_BATCH
from hirelc_deploy.graph.model_graph import ModelGraph
from hirelc_deploy.graph.sensitivity import Gram
from hirelc_deploy.measure import accuracy
from hirelc_deploy.plan import CompressionPlan

FLOAT = "float"


class Uncut(Protocol):
    """What a cut is made of: an `UncutModel`, which computes it when asked, or a `Judge`, which has it."""

    @property
    def model(self) -> nn.Module:
        """The uncut model."""

    @property
    def graph(self) -> ModelGraph:
        """Its blocks, units and layers."""

    @property
    def scores(self) -> Mapping[str, NDArray[np.float64]]:
        """Unit name to the importance of each of its elements."""

    @property
    def grams(self) -> Mapping[str, Gram]:
        """Reader layer name to the moments of its input features."""

    @property
    def restated(self) -> nn.Module:
        """The uncut model with batch-norm statistics from `norm_batches`."""

    @property
    def norm_batches(self) -> Sequence[Tensor]:
        """Images for batch-norm statistics, preprocessed."""


def cut(uncut: Uncut, plan: CompressionPlan) -> nn.Module:
    """Return the sliced model, compensated, with batch-norm statistics of its own; not trained."""
    slicing.check_plan(uncut.graph, plan)
    if all(plan.keep.get(unit.name, unit.size) == unit.size for unit in uncut.graph.units):
        return slicing.slice_model(uncut.model, uncut.graph, {})
    kept = slicing.keep_indices(uncut.graph, plan, uncut.scores)
    model = slicing.slice_model(recovery.compensate(uncut.model, uncut.graph, kept, uncut.grams), uncut.graph, kept)
    with recovery.half_precision(torch.device("cpu")):
        recovery.correct_norms(model, slicing.slice_model(uncut.restated, uncut.graph, kept), uncut.norm_batches)
    return model


def round_as_asked(model: nn.Module, roundings: Sequence[qat.Rounding], plan: CompressionPlan) -> None:
    """Let a model round, in place, for the sake of each block that is there and is not float by the plan."""
    integer = {name for name, _ in model.named_modules() if plan.precision_of(name) != FLOAT}
    qat.install(model, qat.joined(each for each in roundings if integer & each.weights.keys()))


def judged(
    logits: NDArray[np.float32], answers: Tensor, labels: NDArray[np.int64] | None
) -> tuple[float, float | None]:
    """Return the divergence of (n, classes) logits from the uncut model's answers, and how many are right."""
    loss = accuracy.kl_divergence(answers.numpy(), logits)
    return loss, None if labels is None else float(np.mean(logits.argmax(1) == labels))


def forward(model: nn.Module, pictures: Tensor) -> Tensor:
    """Return (n, classes) float32 logits of (n, channels, height, width) pictures, in batches."""
    with torch.no_grad():
        return torch.cat([model(batch).float() for batch in pictures.split(SMALL_BATCH)])
