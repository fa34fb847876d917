"""In: a model and images. Out: one sentence where it is not a model that can be cut and exported."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.models.user_code import first_line

SAME_ANSWER = 1e-3  # of the largest output: batches of other sizes are summed in another order


def check_output(model: nn.Module, images: Tensor, classes: int = 0) -> int:
    """Run the model on (b, channels, height, width) images and return its number of outputs.

    Raises InputError unless it answers with one finite (b, outputs) tensor, of `classes` outputs where that is not 0,
    the same for an image alone as beside others, leaves the images as they are, and lets gradients through.
    """
    name, shape, given = type(model).__name__, tuple(images.shape), images.clone()
    with torch.no_grad():
        output = _answer(model, given)
    if not isinstance(output, Tensor):
        raise InputError(
            f"{name} returns a {type(output).__name__}; it must return one (batch, classes) tensor; "
            "wrap it in a module whose forward picks that tensor."
        )
    if output.ndim != 2 or output.shape[0] != shape[0]:
        raise InputError(
            f"{name} answers {shape[0]} images with shape {tuple(output.shape)}; a classifier returns (batch, classes)."
        )
    if not output.isfinite().all():
        raise InputError(f"{name} answers with NaN or infinity; check its weights and preprocessing.")
    if classes and output.shape[1] != classes:
        raise InputError(
            f"{name} has {output.shape[1]} outputs, but the data has {classes} classes; "
            f"use a model and weights for {classes} classes (timm: --model-arg num_classes={classes})."
        )
    if not torch.equal(given, images):
        raise InputError(
            f"{name} changes the images it is given; let its forward work on a copy (x - 1, not x.sub_(1))."
        )
    with torch.enable_grad():
        one = images[:1].clone().requires_grad_()
        alone = _answer(model, one)
        slope = torch.autograd.grad(alone.sum(), one, allow_unused=True)[0] if alone.requires_grad else None
    if alone.shape != output[:1].shape or (alone - output[:1]).abs().max() > SAME_ANSWER * output.abs().max():
        raise InputError(
            f"{name} answers an image alone otherwise than beside another, or otherwise each time; "
            "its forward must treat every image by itself, without chance."
        )
    if slope is None:
        raise InputError(
            f"{name} lets no gradient through to its input, by which channels are judged and recovered; "
            "remove no_grad, detach and numpy from its forward."
        )
    return output.shape[1]


def _answer(model: nn.Module, images: Tensor) -> Any:
    try:
        return model(images)
    except Exception as error:  # the user's forward may raise anything
        raise InputError(
            f"{type(model).__name__} fails on images of shape {tuple(images.shape)}: {first_line(error)}; "
            "check --input-size (channels, height, width)."
        ) from None


def check_finite(model: nn.Module, where: str) -> None:
    """Raise InputError naming the first parameter or norm statistic that holds NaN or infinity."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    tensors |= {name: value for name, value in model.named_buffers() if name.rpartition(".")[2].startswith("running_")}
    for name, value in tensors.items():
        if not value.isfinite().all():
            count = int((~value.isfinite()).sum())
            raise InputError(
                f"{where}: {name} holds {count} values that are NaN or infinite; train or export it again."
            )
