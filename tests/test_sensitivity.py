"""Importance and input moments, against numbers worked out by hand and a slow twin."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hirelc_deploy.compress.slicing import mask_model
from hirelc_deploy.demo.model import DemoNet
from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.model_graph import ModelGraph
from hirelc_deploy.graph.sensitivity import Losses, importance, input_grams
from hirelc_deploy.graph.units import build_graph
from hirelc_deploy.inputs import models  # noqa: F401  (makes timm importable beside a CPU torch)


def against(labels: Tensor) -> Losses:
    return lambda answers: F.cross_entropy(answers["output"], labels, reduction="none")


def two_pixel_net() -> nn.Module:
    """A 1x1 convolution to 8 channels, the mean over pixels, and a linear answer."""
    model = nn.Sequential(nn.Conv2d(1, 8, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(8.0).reshape(8, 1, 1, 1))
        model[3].weight.zero_()
        model[3].weight[0] = 1.0
        model[3].weight[0, 7] = 0.0
        model[3].bias.zero_()
        model[3].weight[1] = model[3].weight[0]
        model[3].weight[1, :4] = -1.0
        model[3].weight *= 0.1
    return model.double()


def test_importance_is_the_mean_square_of_per_image_sums():
    model = two_pixel_net()
    images = torch.tensor([[1.0, 3.0], [-2.0, 0.0]], dtype=torch.float64).reshape(2, 1, 1, 2)
    labels = torch.tensor([0, 1])
    graph = build_graph(model, images)
    found = importance(model, graph, [(images, against(labels))])["0"]
    # The pixels' means are 2 and -1, so channel c holds 2c and -c. Only channels 0 to 3 tell the classes apart: the
    # first logit leads by 0.2 (0 + 1 + 2 + 3) = 1.2 times the mean, and class 0 has p = sigmoid(2.4), sigmoid(-1.2).
    # dL/dx is 0.1 (-(1 - p) * 1 + (1 - p) * -1) = -0.2 (1 - p) for label 0 and 0.2 p for label 1, in these channels.
    p = 1 / (1 + np.exp([-2.4, 1.2]))
    square = np.mean([(2 * 0.2 * (1 - p[0])) ** 2, (-1 * 0.2 * p[1]) ** 2])
    np.testing.assert_allclose(found, [0, square, 4 * square, 9 * square, 0, 0, 0, 0], atol=1e-15)
    assert found[7] == 0, "nothing reads channel 7"


def test_images_are_squared_one_by_one_whatever_the_batches():
    torch.manual_seed(0)
    model = DemoNet((8, 16), 1)
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([1, 2, 3, 4])
    graph = build_graph(model, images)
    together = importance(model, graph, [(images, against(labels))])
    apart = importance(model, graph, [(images[i : i + 1], against(labels[i : i + 1])) for i in range(4)])
    for name, values in together.items():
        np.testing.assert_allclose(values, apart[name], rtol=1e-4)


def test_importance_predicts_the_loss_of_shrinking_an_element_a_little():
    # x * dL/dx summed over readers and positions is the derivative of the loss with respect to the element's scale.
    torch.manual_seed(0)
    model = DemoNet((8, 16), 1).double().eval()
    images, labels = torch.randn(1, 3, 16, 16, dtype=torch.float64), torch.tensor([3])
    graph = build_graph(model, images)
    found = importance(model, graph, [(images, against(labels))])
    unit = graph.unit("stages.0.residual")
    readers = [model.get_submodule(reader.layer) for reader in unit.readers]
    step = 1e-6

    def loss(scale: float, element: int) -> float:
        factor = torch.ones(unit.size, dtype=torch.float64)
        factor[element] = scale
        handles = [r.register_forward_pre_hook(lambda _, x: (x[0] * factor[:, None, None],)) for r in readers]
        with torch.no_grad():
            value = float(F.cross_entropy(model(images), labels))
        for handle in handles:
            handle.remove()
        return value

    for element in (0, 5):
        slope = (loss(1 + step, element) - loss(1 - step, element)) / (2 * step)
        np.testing.assert_allclose(found[unit.name][element], slope**2, rtol=1e-4)


def test_an_element_that_is_already_zero_has_no_importance():
    torch.manual_seed(0)
    model = DemoNet((8, 16), 1)
    images, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 1])
    graph = build_graph(model, images)
    masked = mask_model(model, graph, {"stages.1.0.conv1": np.array([0, 1, 2, 3, 4, 5, 6, 15])})
    found = importance(masked, graph, [(images, against(labels))])["stages.1.0.conv1"]
    assert (found[7:15] == 0).all()
    assert found[:7].any()


def test_weights_flags_and_gradients_are_as_before():
    model = DemoNet((8, 16), 1).train()
    model.fc.bias.requires_grad_(False)
    images, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 1])
    graph = build_graph(model, images)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    importance(model, graph, [(images, against(labels))])
    input_grams(model, graph, [images])
    assert model.training
    assert model.fc.weight.requires_grad
    assert not model.fc.bias.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_was_seen_of_a_batch_is_freed_with_it() -> None:
    model = DemoNet((8, 16), 1, num_classes=3).eval()
    images = torch.rand((4, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    graph = build_graph(model, images[:2])

    def tensors() -> int:
        return sum(isinstance(one, Tensor) for one in gc.get_objects())

    gc.collect()
    gc.disable()  # which would find cycles after a while: until then gigabytes of large images were kept
    try:
        before = tensors()
        importance(model, graph, [(images, lambda answers: answers["output"].square().sum(1))] * 3)
        assert tensors() - before < 3
    finally:
        gc.enable()


def test_input_moments_equal_hand_counts_over_images_and_pixels():
    model = nn.Sequential(nn.Conv2d(1, 8, 1, bias=False), nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(8.0).reshape(8, 1, 1, 1))
    images = torch.tensor([[1.0, 3.0], [-2.0, 0.0]]).reshape(2, 1, 1, 2)
    graph = build_graph(model, images)
    gram = input_grams(model, graph, [images[:1], images[1:]])["1"]
    assert gram.count == 4
    np.testing.assert_allclose(gram.mean, 0.5 * np.arange(8))
    np.testing.assert_allclose(gram.second_moment, 3.5 * np.outer(np.arange(8), np.arange(8)))
    every_other = input_grams(model, graph, [images], stride=2)["1"]
    assert every_other.count == 2
    np.testing.assert_allclose(every_other.mean, -0.5 * np.arange(8))


def test_moments_of_flattened_and_token_inputs_have_the_layers_features():
    model = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 2))
    images = torch.randn(3, 3, 16, 16)
    grams = input_grams(model, build_graph(model, images), [images])
    assert {name: (gram.count, gram.mean.shape) for name, gram in grams.items()} == {"2": (3, (32,)), "4": (3, (16,))}


def test_no_images_is_an_input_error():
    model = DemoNet((8, 16), 1)
    graph = build_graph(model, torch.zeros(1, 3, 16, 16))
    with pytest.raises(InputError, match="no images were given"):
        importance(model, graph, [])
    with pytest.raises(InputError, match="no images were given"):
        input_grams(model, graph, [])


# Inputs whose leading dimension is not the batch


class TokensFirst(nn.Module):
    """(tokens, images, features)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.up, self.down, self.out = (
            nn.Conv2d(3, 16, 4, 4),
            nn.Linear(16, 32),
            nn.Linear(32, 16),
            nn.Linear(16, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).permute(2, 0, 1)
        return self.out((x + self.down(self.up(x).relu())).mean(0))


class Windows(TokensFirst):
    """(images x windows, tokens, features), or with `windows_first` windows before images."""

    def __init__(self, *, windows_first: bool) -> None:
        super().__init__()
        self.windows_first = windows_first

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        count, _, features = x.shape
        x = x.reshape(count, 2, -1, features)
        x = x.transpose(0, 1) if self.windows_first else x
        x = x.reshape(2 * count, -1, features)
        x = x + self.down(self.up(x).relu())
        x = x.reshape(2, count, -1, features).transpose(0, 1) if self.windows_first else x
        return self.out(x.reshape(count, -1, features).mean(1))


class ImagesTimesTokens(TokensFirst):
    """(images x tokens, features)."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        rows = x.reshape(-1, x.shape[-1])
        return self.out((rows + self.down(self.up(rows).relu())).reshape(x.shape).mean(1))


class Shared(TokensFirst):
    """A table of positions that no image has a part in runs through layers of its own, as in Swin V2."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        table = torch.linspace(-1, 1, x.shape[1] * 16).reshape(x.shape[1], 16)
        return self.out((x + self.down(self.up(table).relu())).mean(1))


class Frames(nn.Module):
    """(images x halves, channels, height, width) through a convolution."""

    def __init__(self, *, halves_first: bool) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 4)
        self.halves_first = halves_first

    def forward(self, x: Tensor) -> Tensor:
        count = len(x)
        halves = torch.stack(x.chunk(2, 3), 0 if self.halves_first else 1).flatten(0, 1)
        y = self.second(self.first(halves).relu()).relu().mean((2, 3))
        y = y.reshape(2, count, -1).mean(0) if self.halves_first else y.reshape(count, 2, -1).mean(1)
        return self.out(y)


class Lines(nn.Module):
    """Convolutions of one dim whose rows are lines of the images, images first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Conv1d(3, 16, 3), nn.Conv1d(16, 16, 3), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        lines = x.permute(0, 2, 1, 3).flatten(0, 1)
        y = self.second(self.first(lines).relu()).relu().mean(2)
        return self.out(y.reshape(len(x), -1, 16).mean(1))


LAYOUTS = {
    "tokens first": TokensFirst,
    "windows": lambda: Windows(windows_first=False),
    "windows first": lambda: Windows(windows_first=True),
    "images times tokens": ImagesTimesTokens,
    "shared positions": Shared,
    "frames": lambda: Frames(halves_first=False),
    "frames first": lambda: Frames(halves_first=True),
    "lines": Lines,
}


def slow_importance(model: nn.Module, graph: ModelGraph, images: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
    """Return what `importance` does, by one image and one reader at a time: the slope of a factor on its features."""
    found = {unit.name: np.zeros(unit.size) for unit in graph.units}
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        for unit in graph.units:
            total = np.zeros(unit.size)
            for reader in unit.readers:
                layer = model.get_submodule(reader.layer)
                dim = -1 if isinstance(layer, nn.Linear) else 1
                size = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
                factor = torch.ones(size, requires_grad=True)

                def scaled(_: nn.Module, given: tuple[Tensor, ...], factor: Tensor = factor, dim: int = dim) -> Tensor:
                    shape = [1] * given[0].ndim
                    shape[dim] = -1
                    return given[0] * factor.reshape(shape)

                handle = layer.register_forward_pre_hook(scaled)
                F.cross_entropy(model(image), label).backward()
                handle.remove()
                assert factor.grad is not None
                total += factor.grad[torch.from_numpy(reader.index)].sum(1).numpy()
            found[unit.name] += total**2 / len(images)
    return found


@pytest.mark.parametrize("kind", LAYOUTS)
def test_sums_are_over_what_belongs_to_an_image_in_every_layout(kind: str) -> None:
    torch.manual_seed(0)
    model = LAYOUTS[kind]().eval()
    images, labels = torch.randn(5, 3, 16, 16), torch.tensor([0, 1, 2, 3, 0])
    graph = build_graph(model, images)
    parts = [(images[:3], against(labels[:3])), (images[3:], against(labels[3:]))]
    found, wanted = importance(model, graph, parts), slow_importance(model, graph, images, labels)
    if graph.units:
        assert max(value.max() for value in wanted.values()) > 0
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-3, atol=1e-4 * values.max())


@pytest.mark.parametrize(
    "name", ["levit_128s", "swin_tiny_patch4_window7_224", "maxvit_rmlp_pico_rw_256", "coat_lite_tiny"]
)
def test_window_and_convolutional_attention_of_timm_at_a_small_size(name: str) -> None:
    size = {"levit_128s": 224, "coat_lite_tiny": 64}.get(name, 64)
    options = {"img_size": size} if name.startswith(("swin", "coat", "maxvit")) else {}
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, **options).double().eval()
    images, labels = torch.randn(2, 3, size, size, dtype=torch.float64), torch.tensor([0, 1])
    graph = build_graph(model, images)
    assert graph.units
    together = importance(model, graph, [(images, against(labels))])
    twice = [[i, i] for i in range(2)]  # for a batch of one torch 2.13 gives levit wrong slopes
    apart = [importance(model, graph, [(images[rows], against(labels[rows]))]) for rows in twice]
    largest = max(values.max() for values in together.values())
    for unit, values in together.items():
        np.testing.assert_allclose(values, (apart[0][unit] + apart[1][unit]) / 2, rtol=1e-6, atol=1e-9 * largest)
