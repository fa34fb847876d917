"""In: a cut model, the uncut one and images. Out: batch norms with statistics that fit."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

NORM = nn.modules.batchnorm._BatchNorm
"""Batch norms of all kinds; torch has no public name for what they share."""


@torch.no_grad()
def reestimate_norms(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace every batch norm's running statistics by plain averages over `batches`; nothing else changes."""
    norms = norms_of(model)
    if not norms:
        return
    was_training, momenta = model.training, [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for batch in batches:
        model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(was_training)


@torch.no_grad()
def correct_norms(model: nn.Module, restated: nn.Module, batches: Iterable[Tensor]) -> None:
    """Move a cut model's batch-norm statistics by as much as the cut moved them, seen on `batches`.

    Plain re-estimation also brings in how these few images differ from all that the statistics were trained on: on the
    demo network that alone cost a KL divergence of 0.035, as much as a mild cut. So the uncut model is re-estimated on
    the same images, and only the difference counts: means are shifted by it, variances scaled.

    Args:
        restated: The uncut model after `reestimate_norms` on the same batches, sliced as `model` is.
    """
    norms, expected = norms_of(model), norms_of(restated)
    before = [(_mean(norm).clone(), _variance(norm).clone()) for norm in norms]
    reestimate_norms(model, batches)
    for norm, uncut, (mean, variance) in zip(norms, expected, before, strict=True):
        _mean(norm).copy_(mean + _mean(norm) - _mean(uncut))
        _variance(norm).copy_(variance * _variance(norm) / _variance(uncut).clamp(min=1e-12))


def norms_of(model: nn.Module) -> list[NORM]:
    """Return the batch norms of a model that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, NORM) and m.track_running_stats]


def _mean(norm: NORM) -> Tensor:
    assert norm.running_mean is not None
    return norm.running_mean


def _variance(norm: NORM) -> Tensor:
    assert norm.running_var is not None
    return norm.running_var
