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
        # An alias has a gradient of its own: what flows back through this reader, not through others of the same x.
        seen = x.view_as(x)

        def add(gradient: Tensor) -> None:
            per_feature = _per_image(layer, seen.detach() * gradient)
            for unit, index in rows_of[name]:
                part = per_feature[:, torch.from_numpy(index).to(x.device)].sum(2)
                taylor[unit] = taylor[unit] + part if unit in taylor else part

        seen.register_hook(add)
        return seen

    images_seen = 0
    with _weights_frozen(model), _observed(model, list(rows_of), observe), torch.enable_grad():
        for images, losses in batches:
            taylor.clear()
            losses(named(model(images.detach().clone().requires_grad_()))).sum().backward()
            images_seen += len(images)
            for name, values in taylor.items():
                totals[name] += values.double().square().sum(0).cpu().numpy()
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


def _per_image(layer: nn.Module, values: Tensor) -> Tensor:
    """Return (images, features): sums over positions of a convolution's or linear layer's input."""
    if isinstance(layer, nn.Conv2d):
        return values.sum((2, 3))
    return values.reshape(len(values), -1, values.shape[-1]).sum(1)


def _feature_rows(layer: nn.Module, x: Tensor, stride: int) -> Tensor:
    """Return (rows, features) of a convolution's or linear layer's input."""
    if isinstance(layer, nn.Conv2d):
        return x[:, :, ::stride, ::stride].movedim(1, -1).reshape(-1, x.shape[1])
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
