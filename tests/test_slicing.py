"""Sliced equals masked, for every architecture that is said to be supported, and slicing keeps an ordinary module."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import timm
import torch
from hand_written_nets import Divided, FlatBlock, HandTransformer, HiddenNumber, MixedNet, WithResponseNorm
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn

from hirelc_deploy.compress.slicing import (
    check_plan,
    keep_indices,
    mask_model,
    provable,
    rebuild,
    shapes,
    slice_model,
    uniform_plan,
)
from hirelc_deploy.demo.model import DemoNet
from hirelc_deploy.errors import InputError, SliceError
from hirelc_deploy.graph.costs import cost_of, kept_features
from hirelc_deploy.graph.model_graph import ModelGraph, Share
from hirelc_deploy.graph.units import build_graph
from hirelc_deploy.plan import CompressionPlan


def small_vit(**options: object) -> nn.Module:
    return timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=10, **options
    )


MODELS = {
    "demo": lambda: DemoNet((32, 64, 128, 256)),
    "mixed": MixedNet,
    "hand-written transformer": HandTransformer,
    "flat block": FlatBlock,
    "divided": Divided,
    "response norm": WithResponseNorm,
    "vit": small_vit,
    "vit with q/k norm and layer scale": lambda: small_vit(qk_norm=True, init_values=0.5),
    "deit distilled": lambda: timm.models.deit.VisionTransformerDistilled(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10
    ),
    **{
        name: functools.partial(timm.create_model, name, num_classes=10)
        for name in ("resnet18", "resnet50", "mobilenetv2_100", "efficientnet_lite0", "efficientnet_b0")
    },
}


HAND_WRITTEN = ("mixed", "hand-written transformer", "flat block", "divided", "response norm")


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every weight, norm parameter and running statistic a random value that keeps activations in range."""
    generator = torch.Generator().manual_seed(seed)
    saved = model.state_dict()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name not in saved or not tensor.is_floating_point():
                continue
            if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith(("weight", "gamma"))):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.ndim == 1:
                tensor.normal_(0, 0.3, generator=generator)
            else:
                tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
    return model.eval()


@functools.cache
def known(name: str) -> tuple[nn.Module, ModelGraph, Tensor]:
    model = randomised(MODELS[name]())
    images = torch.randn(2, 3, *((16, 16) if name in HAND_WRITTEN else (32, 32)))
    return model, build_graph(model, images), images


def random_choice(graph: ModelGraph, seed: int) -> dict[str, np.ndarray]:
    """Return random elements at random legal widths, not sorted by anything."""
    rng = np.random.default_rng(seed)
    return {u.name: np.sort(rng.choice(u.size, rng.choice(u.widths), replace=False)) for u in graph.units}


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)


def relative_difference(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max() / second.abs().max())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", MODELS)
def test_sliced_equals_masked(name, seed):
    model, graph, images = known(name)
    kept = random_choice(graph, seed)
    sliced, masked = slice_model(model, graph, kept), mask_model(model, graph, kept)
    assert sum(p.numel() for p in sliced.parameters()) < graph.params
    assert relative_difference(outputs(sliced, images), outputs(masked, images)) <= 1e-5


@pytest.mark.parametrize("name", ["demo", "mixed", "vit", "mobilenetv2_100"])
def test_a_sliced_model_can_be_traced_trained_and_sliced_again(name):
    model, graph, images = known(name)
    once = slice_model(model, graph, random_choice(graph, 3))
    again = build_graph(once, images)
    assert again.params == sum(p.numel() for p in once.parameters())
    assert {unit.name for unit in again.units} <= {unit.name for unit in graph.units}
    kept = random_choice(again, 4)
    twice = slice_model(once, again, kept)
    masked = mask_model(once, again, kept)
    assert relative_difference(outputs(twice, images), outputs(masked, images)) <= 1e-5
    twice.train()(images).square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in twice.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_the_cost_of_a_plan_is_what_is_counted_on_the_sliced_model(name):
    model, graph, images = known(name)
    kept = random_choice(graph, 5)
    counted = build_graph(slice_model(model, graph, kept), images)
    cost = cost_of(model, graph, {unit: len(elements) for unit, elements in kept.items()})
    assert (cost.params, cost.macs) == (counted.params, counted.macs)


def test_a_layer_behind_a_concatenation_follows_all_units_that_it_reads():
    _, graph, _ = known("mixed")
    joined = next(layer for layer in graph.layers if layer.name == "joined")
    assert joined.reads == (Share("left", 1), Share("right", 1))
    assert kept_features(joined, graph, {"left": 16, "right": 8}) == (24, 16)
    assert kept_features(joined, graph, {"right": 8}) == (32, 16)


def test_a_removed_channel_is_the_same_as_a_channel_that_is_never_written():
    # An independent twin: no tensor is masked; a hook silences the activations between writer and reader.
    model, graph, images = known("demo")
    kept = np.arange(5, 64, 2)
    silent = torch.ones(64)
    silent[np.setdiff1d(np.arange(64), kept)] = 0
    handle = model.stages[1][0].bn1.register_forward_hook(lambda *args: args[2] * silent[:, None, None])
    try:
        expected = outputs(model, images)
    finally:
        handle.remove()
    sliced = slice_model(model, graph, {"stages.1.0.conv1": kept})
    assert sliced.stages[1][0].conv1.out_channels == 30
    assert relative_difference(outputs(sliced, images), expected) <= 1e-5


def test_a_removed_head_is_the_same_as_a_head_that_is_never_heard():
    model, graph, images = known("vit")
    heard = torch.ones(48)
    heard[16:32] = 0
    handle = model.blocks[1].attn.proj.register_forward_pre_hook(lambda _, args: (args[0] * heard,))
    try:
        expected = outputs(model, images)
    finally:
        handle.remove()
    sliced = slice_model(model, graph, {"blocks.1.attn.heads": np.array([0, 2])})
    attention = sliced.blocks[1].attn
    assert (attention.num_heads, attention.head_dim, attention.attn_dim) == (2, 16, 32)
    assert tuple(attention.qkv.weight.shape) == (96, 48)
    assert attention.qkv.out_features == 96
    assert attention.proj.in_features == 32
    assert relative_difference(outputs(sliced, images), expected) <= 1e-5


def test_cutting_only_the_mlp_of_a_flat_block_leaves_its_head_count_alone():
    model, graph, images = known("flat block")
    kept = {"fc1": np.arange(8)}
    sliced = slice_model(model, graph, kept)
    assert sliced.num_heads == 4
    assert relative_difference(outputs(sliced, images), outputs(mask_model(model, graph, kept), images)) <= 1e-5


def test_slicing_leaves_the_model_alone_and_shares_nothing_with_it():
    model = randomised(DemoNet((16, 16), 1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.randn(1, 3, 16, 16)
    graph = build_graph(model, images)
    sliced = slice_model(model, graph, {"stages.0.0.conv1": np.arange(8)})
    with torch.no_grad():
        for tensor in sliced.state_dict().values():
            tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_flags_dtype_and_frozen_weights_are_kept():
    model = DemoNet((16, 16), 1).double().train()
    model.bn1.eval()
    model.conv1.weight.requires_grad_(False)
    graph = build_graph(model, torch.zeros(1, 3, 16, 16, dtype=torch.float64))
    sliced = slice_model(model, graph, random_choice(graph, 0))
    assert sliced.training
    assert not sliced.bn1.training
    assert not sliced.conv1.weight.requires_grad
    assert sliced.fc.weight.requires_grad
    assert {p.dtype for p in sliced.parameters()} == {torch.float64}


def test_attributes_of_depthwise_and_grouped_convolutions_follow_their_weights():
    model, graph, _ = known("mixed")
    sliced = slice_model(model, graph, {"left": np.arange(8), "wide": np.arange(12)})
    depthwise, grouped = sliced.depthwise, sliced.grouped
    assert (depthwise.groups, depthwise.in_channels, depthwise.out_channels) == (8, 8, 8)
    assert (grouped.groups, grouped.in_channels, grouped.out_channels) == (2, 24, 32)
    assert sliced.norm.num_features == 8
    assert sliced.joined.in_channels == 24


@pytest.mark.parametrize("name", ["demo", "mixed", "vit", "efficientnet_lite0", "divided", "response norm"])
def test_a_sliced_model_is_rebuilt_from_uncut_builder_shapes_and_weights(name):
    model, graph, images = known(name)
    sliced = slice_model(model, graph, random_choice(graph, 7))
    again = rebuild(MODELS[name](), shapes(sliced), sliced.state_dict()).eval()
    assert torch.equal(outputs(again, images), outputs(sliced, images))


def test_rebuild_refuses_what_does_not_belong_together():
    model = DemoNet((16, 16), 1)
    manifest, weights = shapes(model), model.state_dict()
    with pytest.raises(InputError, match=r"weights: .*lacks 'fc.bias'"):
        rebuild(DemoNet((16, 16), 1), manifest, {k: v for k, v in weights.items() if k != "fc.bias"})
    with pytest.raises(InputError, match=r"shape manifest: .*unknown tensor 'odd'"):
        rebuild(DemoNet((16, 16), 1), {**manifest, "odd": [1]}, weights)
    with pytest.raises(InputError, match=r"they do not have the shapes of the manifest"):
        rebuild(DemoNet((16, 16), 1), {**manifest, "fc.weight": [10, 8]}, weights)


def test_the_most_important_elements_stay_in_their_order():
    _, graph, _ = known("demo")
    unit = graph.unit("stages.0.0.conv1")
    importance = {u.name: np.zeros(u.size) for u in graph.units}
    importance[unit.name][[30, 2, 7, 9, 11, 20, 25, 1]] = [8, 7, 6, 5, 4, 3, 2, 1]
    kept = keep_indices(graph, CompressionPlan({unit.name: 8}), importance)
    assert kept[unit.name].tolist() == [1, 2, 7, 9, 11, 20, 25, 30]
    assert kept["stages.3.residual"].tolist() == list(range(256))


def test_a_uniform_plan_takes_the_nearest_legal_width():
    _, graph, _ = known("vit")
    plan = uniform_plan(graph, 0.5, "float")
    assert plan.keep["blocks.0.attn.heads"] == 2, "1 and 2 of 3 heads are as near: the larger"
    assert plan.keep["blocks.0.mlp.fc1"] == 96
    assert uniform_plan(graph, 0.001, "int8").keep["blocks.0.mlp.fc1"] == 8
    assert uniform_plan(graph, 1.0, "int8").keep == {unit.name: unit.size for unit in graph.units}


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (
            CompressionPlan({"stages.1.0.conv2": 8}),
            r"unit 'stages.1.0.conv2' does not exist. Near names: stages.1.0.conv1",
        ),
        (CompressionPlan({"stages.1.0.conv1": 33}), r"cannot keep 33 of 64 elements; use 32 or 40"),
        (CompressionPlan({"stages.1.0.conv1": 65}), r"cannot keep 65 of 64 elements; use 64"),
        (CompressionPlan({}, {"fcc": "int8"}), r"layer 'fcc' does not exist. Near names: fc"),
    ],
)
def test_a_plan_that_does_not_fit_the_model_is_refused(plan, sentence):
    with pytest.raises(InputError, match=sentence):
        check_plan(known("demo")[1], plan)


@pytest.mark.parametrize("numbers", [[], [3, 1], [0, 64], [2, 2]])
def test_keeping_no_or_impossible_elements_is_refused(numbers):
    model, graph, _ = known("demo")
    with pytest.raises(SliceError, match=r"keep at least one element, in ascending numbers from 0 to 63"):
        slice_model(model, graph, {"stages.1.0.conv1": np.array(numbers, np.int64)})


def test_numbers_that_modules_keep_follow_what_they_count():
    model, graph, _ = known("divided")
    assert not [kept for kept in graph.kept_whole if kept.layer != "fc"]
    stem = graph.unit("stem.residual")
    assert stem.size == 16, "an element is one channel of each of the three equal parts"
    kept = {u.name: np.arange(u.widths[0]) for u in graph.units}
    sliced = slice_model(model, graph, kept)
    assert (sliced.width, sliced.steps[0].in_channels) == (8, 8)
    assert sliced.parts == (8, 8, 8)
    assert sliced.expanded == sliced.expand.out_channels == 8
    assert sliced.first == sliced.short.out_channels == 8
    assert (model.width, model.parts, model.expanded, model.first) == (16, (24, 16, 16), 32, 24)


def test_a_response_norm_takes_its_mean_over_the_channels_that_stay():
    norm = GlobalResponseNorm(8)
    model = nn.Sequential(nn.Linear(2, 8), norm, nn.Linear(8, 1))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].weight[:4] = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
        model[0].bias.zero_()
        norm.weight.fill_(1.0)
        model[2].weight.fill_(1.0)
        model[2].bias.zero_()
    images = torch.tensor([[[[3.0, 4.0]]]])
    graph = build_graph(model, images)
    kept = {"0": np.arange(4)}
    # Of (3, 4, 0, 0) the norms are 3, 4, 0 and 0, their mean 1.75: 3 + 3 * 3 / 1.75 + 4 + 4 * 4 / 1.75.
    for small in (slice_model(model, graph, kept), mask_model(model, graph, kept)):
        assert outputs(small, images).item() == pytest.approx(7 + 25 / 1.75, abs=1e-4)


def test_units_with_sizes_written_into_code_are_found_and_kept_whole():
    model, images = randomised(HiddenNumber()), torch.randn(2, 3, 16, 16)
    graph, difference = provable(model, build_graph(model, images), images)
    assert [unit.name for unit in graph.units] == ["free"]
    assert {kept.layer for kept in graph.kept_whole} == {"middle", "last"}
    assert next(layer.in_unit for layer in graph.layers if layer.name == "last") is None
    assert difference <= 1e-5


def test_a_graph_without_faults_is_proven_as_it_is():
    model, graph, images = known("mixed")
    same, difference = provable(model, graph, images)
    assert same == graph
    assert difference <= 1e-5
