"""In: a model, its graph and images. Out: importance of every element of every unit, and moments of layer inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.answers import Answers, named
from hirelc_deploy.graph.model_graph import IndexRows, ModelGraph
from hirelc_deploy.graph.trace import eval_mode

Losses = Callable[[Answers], Tensor]
"""The (n,) losses of images, from a model's answers to them."""


UNMOVED = 1e-3
"""What may change in the rows of one image when another one changes, as a share of the change in that one's own."""


@dataclass(frozen=True)
class Gram:
    """First and second moments of a layer's inputs over images and positions.

    Attributes:
        count: Rows (images times positions) that were averaged.
        mean: (f,) float64 mean of each input feature.
        second_moment: (f, f) float64 mean of x x^T, not centred.
    """

    count: int
    mean: NDArray[np.float64]
    second_moment: NDArray[np.float64]


def importance(
    model: nn.Module, graph: ModelGraph, batches: Iterable[tuple[Tensor, Losses]]
) -> dict[str, NDArray[np.float64]]:
    """Return unit name to (size,) importance of its elements: how much the loss would change without them.

    Per element the mean over images of (sum over readers and positions of x * dL/dx)^2, x being the readers' inputs
    and L the loss of one image in eval mode. It is the per-sample Fisher of Theis et al. (2018), 'Faster
    gaze prediction with dense networks and Fisher pruning', without their factor of 1/2.

    Sums are over all that belongs to an image, wherever a layer's input keeps it. Where that is not image after image
    (tokens first, rows that images share) images run one by one.

    Args:
        batches: Pairs of (n, channels, height, width) images and their losses.

    Raises:
        InputError: `batches` is empty.
    """
    rows_of: dict[str, list[tuple[str, IndexRows]]] = {}
    for unit in graph.units:
        for reader in unit.readers:
            rows_of.setdefault(reader.layer, []).append((unit.name, reader.index))
    totals = {unit.name: np.zeros(unit.size) for unit in graph.units}
    taylor: dict[str, Tensor] = {}

    def observe(layer: nn.Module, name: str, x: Tensor) -> Tensor:
        # A copy has a gradient of its own: what flows back through this reader, not through others of the same x. And
        # it keeps its values where the model writes into x later.
        seen = x.clone()
        if not seen.requires_grad:  # no image has a part in it, as in a table of positions
            seen.requires_grad_()
        values = seen.detach()  # `seen` in its own hook would live until Python looks for cycles

        def add(gradient: Tensor) -> None:
            per_feature = _per_image(layer, values * gradient, at_once)
            for unit, index in rows_of[name]:
                part = per_feature[:, torch.from_numpy(index).to(x.device)].sum(2)
                taylor[unit] = taylor[unit] + part if unit in taylor else part

        seen.register_hook(add)
        return seen

    images_seen, at_once, together = 0, 1, False
    with _weights_frozen(model), torch.enable_grad():
        for images, losses in batches:
            if not images_seen:
                together = _image_after_image(model, list(rows_of), images)
            at_once = len(images) if together else 1
            slopes = None if together else _slopes(model, images, losses)
            with _observed(model, list(rows_of), observe):
                for start in range(0, len(images), at_once):
                    taylor.clear()
                    part = images[start : start + at_once]
                    if slopes is None:
                        losses(named(model(part.detach().clone().requires_grad_()))).sum().backward()
                    else:
                        _one_backward(model, part, {name: slope[start : start + 1] for name, slope in slopes.items()})
                    for name, values in taylor.items():
                        totals[name] += values.double().square().sum(0).cpu().numpy()
            images_seen += len(images)
    if not images_seen:
        raise InputError("importance: no images were given; at least one is needed.")
    return {unit: total / images_seen for unit, total in totals.items()}


def input_grams(model: nn.Module, graph: ModelGraph, batches: Iterable[Tensor], *, stride: int = 1) -> dict[str, Gram]:
    """Return layer name to the moments of its inputs, for every layer that reads a unit.

    For a convolution the features are input channels and every pixel is a row (its padding is not).

    Args:
        batches: (n, channels, height, width) images; the model runs in eval mode, without gradients.
        stride: Take every `stride`-th pixel in both directions, or token; 1 takes all.

    Raises:
        InputError: `batches` is empty.
    """
    names = list(dict.fromkeys(reader.layer for unit in graph.units for reader in unit.readers))
    counts = dict.fromkeys(names, 0)
    sums: dict[str, Tensor] = {}
    products: dict[str, Tensor] = {}

    def observe(layer: nn.Module, name: str, x: Tensor) -> Tensor:
        rows = _feature_rows(layer, x, stride)
        product = rows.T @ rows  # in the model's precision over one batch, added up in double
        if name in sums:
            sums[name] += rows.double().sum(0)
            products[name] += product.double()
        else:
            sums[name], products[name] = rows.double().sum(0), product.double()
        counts[name] += len(rows)
        return x

    with eval_mode(model), _observed(model, names, observe), torch.no_grad():
        for images in batches:
            model(images)
    if names and not sums:
        raise InputError("input statistics: no images were given; at least one is needed.")
    return {
        name: Gram(
            counts[name], (sums[name] / counts[name]).cpu().numpy(), (products[name] / counts[name]).cpu().numpy()
        )
        for name in names
    }


def _image_after_image(model: nn.Module, names: Sequence[str], images: Tensor) -> bool:
    """Return whether every layer keeps the rows of its input by image: those of the first, then those of the second.

    Seen by running three copies of an image and three of which the second is another: the second third of the rows
    changes, and nothing else. What the image does not touch (positions) is no image's own.
    """
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}

    def observe(layer: nn.Module, name: str, x: Tensor) -> Tensor:
        inputs[name].append(_features_last(layer, x.detach()))
        return x

    alike = images[:1].expand(3, *images.shape[1:]).clone()
    other = alike.clone()
    noise = torch.randn(other.shape[1:], generator=torch.Generator().manual_seed(0))
    other[1] = other[1].flip(-1, -2) * 0.5 + noise.to(other)
    with _observed(model, names, observe), torch.no_grad():
        model(alike)
        model(other)
    for seen in inputs.values():
        for before, after in zip(seen[: len(seen) // 2], seen[len(seen) // 2 :], strict=True):
            rows = before.shape[:-1].numel()
            if before.shape != after.shape or rows % 3:
                return False
            first, second, third = (before - after).reshape(3, -1).abs().amax(1).tolist()
            if not max(first, third) <= UNMOVED * second or not second:
                return False
    return True


def _slopes(model: nn.Module, images: Tensor, losses: Losses) -> dict[str, Tensor]:
    """Return output to the slope of its images' losses, for outputs that the losses depend on."""
    with torch.no_grad():
        parts = [named(model(image)) for image in images.split(1)]
    answers = {name: torch.cat([part[name] for part in parts]).requires_grad_() for name in parts[0]}
    losses(answers).sum().backward()
    return {name: answer.grad for name, answer in answers.items() if answer.grad is not None}


def _one_backward(model: nn.Module, image: Tensor, slopes: Answers) -> None:
    """Run one image forward and back from the slopes of its outputs.

    It runs twice at half the slope, which sums to the same: for a batch of one torch 2.13 gives other slopes, which
    finite differences deny (timm's levit_128s, in double precision).
    """
    answers = named(model(image.detach().repeat(2, *[1] * (image.ndim - 1)).requires_grad_()))
    trained = [name for name in slopes if answers[name].requires_grad]
    halves = [slopes[name].expand_as(answers[name]) / 2 for name in trained]
    torch.autograd.backward([answers[name] for name in trained], halves)


def _features_last(layer: nn.Module, x: Tensor) -> Tensor:
    """Return (..., features) of the input of a convolution of any number of dims, or of a linear layer."""
    return x.movedim(features_dim(layer), -1)


def features_dim(layer: nn.Module) -> int:
    """Return the dim, counted from the last, of the features in a convolution's or linear layer's input."""
    return -1 - len(layer.kernel_size) if isinstance(layer, nn.modules.conv._ConvNd) else -1


def _per_image(layer: nn.Module, values: Tensor, images: int) -> Tensor:
    """Return (images, features): sums over all rows of each image in an input that has them image after image."""
    values = _features_last(layer, values)
    return values.reshape(images, -1, values.shape[-1]).sum(1)


def _feature_rows(layer: nn.Module, x: Tensor, stride: int) -> Tensor:
    """Return (rows, features) of a convolution's or linear layer's input."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        for dim in range(-len(layer.kernel_size), 0):
            x = x.index_select(dim, torch.arange(0, x.shape[dim], stride, device=x.device)) if stride > 1 else x
        x = _features_last(layer, x)
        return x.reshape(-1, x.shape[-1])
    return x.reshape(len(x), -1, x.shape[-1])[:, ::stride].reshape(-1, x.shape[-1])


@contextmanager
def _observed(
    model: nn.Module, names: Sequence[str], observe: Callable[[nn.Module, str, Tensor], Tensor]
) -> Iterator[None]:
    """Pass the input of each named layer through `observe` while the model runs."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        return lambda layer, inputs: (observe(layer, name, inputs[0]), *inputs[1:])

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _weights_frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients of weights: only those of activations are wanted."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with eval_mode(model):
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
