"""Whole residual branches go where nothing of a unit stays: in the model, its cost, its predicted time and its file."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from test_slicing import outputs, randomised, relative_difference, small_vit
from torch import Tensor, nn

from hirelc_deploy.compress.branches import proven
from hirelc_deploy.compress.features import kept_inputs
from hirelc_deploy.compress.onnx_file.export import export_onnx, set_static_batch
from hirelc_deploy.compress.slicing import check_plan, mask_model, rebuild, shapes, slice_model, uniform_plan
from hirelc_deploy.demo.model import DemoNet
from hirelc_deploy.errors import InputError, SliceError
from hirelc_deploy.evaluate import layer_times, network_time, tables
from hirelc_deploy.graph.costs import cost_of
from hirelc_deploy.graph.model_graph import LayerShape, ModelGraph
from hirelc_deploy.graph.units import build_graph
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.strategies.problem import Decision


class Chain(nn.Module):
    """Convolutions without any shortcut: nothing of it can be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 3, padding=1))
        self.head = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Twice(nn.Module):
    """A residual body that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU(), nn.Conv2d(32, 16, 1))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.body(x)
        x = x + self.body(x)
        return self.head(x.mean((2, 3)))


MODELS = {
    "demo": lambda: DemoNet((16, 32), blocks_per_stage=2),
    "vit": small_vit,
    "vit with layer scale": lambda: small_vit(init_values=0.5),
    "chain": Chain,
    "twice": Twice,
    **{
        name: functools.partial(timm.create_model, name, num_classes=10)
        for name in ("resnet50", "mobilenetv2_100", "efficientnet_b0", "convnext_atto", "regnety_002")
    },
}


@functools.cache
def known(name: str) -> tuple[nn.Module, ModelGraph, Tensor]:
    model = randomised(MODELS[name]())
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return model, proven(model, build_graph(model, images), images), images


def branches(graph: ModelGraph) -> dict[str, tuple[str, bool]]:
    return {unit.name: (unit.branch.module, unit.branch.passes) for unit in graph.units if unit.branch}


def half_without(graph: ModelGraph) -> dict[str, np.ndarray]:
    """Return the first half of every unit, nothing of every second one that holds a branch."""
    keep = uniform_plan(graph, 0.5, "float").keep
    gone = [unit.name for unit in graph.units if unit.branch][::2]
    return {unit.name: np.arange(0 if unit.name in gone else keep[unit.name]) for unit in graph.units}


def test_blocks_with_their_shortcut_pass_and_branches_beside_one_are_zero():
    assert branches(known("demo")[1]) == {
        "stages.0.0.conv1": ("stages.0.0", True),
        "stages.0.1.conv1": ("stages.0.1", True),
        "stages.1.1.conv1": ("stages.1.1", True),  # stages.1.0 halves the picture
    }
    found = branches(known("vit")[1])
    assert found["blocks.1.attn.heads"] == ("blocks.1.attn", False)
    assert found["blocks.2.mlp.fc1"] == ("blocks.2.mlp", False)
    assert len(found) == 6
    of_bottlenecks = branches(known("resnet50")[1])
    assert of_bottlenecks["layer3.5.conv1"] == ("layer3.5", True)
    assert "layer3.5.conv2" not in of_bottlenecks  # one unit of a block holds it
    assert branches(known("mobilenetv2_100")[1])["blocks.2.1.conv_pw"] == ("blocks.2.1", True)
    assert branches(known("convnext_atto")[1])["stages.2.blocks.3.mlp.fc1"] == (
        "stages.2.blocks.3",
        True,
    )


@pytest.mark.parametrize("name", ["chain", "twice"])
def test_what_has_no_shortcut_or_is_called_twice_stays(name):
    assert branches(known(name)[1]) == {}


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("chain", "twice")])
def test_without_branches_the_sliced_model_equals_the_masked_one_and_costs_what_is_counted(name):
    model, graph, images = known(name)
    kept = half_without(graph)
    sliced, masked = slice_model(model, graph, kept), mask_model(model, graph, kept)
    assert relative_difference(outputs(sliced, images), outputs(masked, images)) <= 1e-5
    cost = cost_of(model, graph, {unit: len(elements) for unit, elements in kept.items()})
    counted = build_graph(sliced, images)
    assert cost.params == counted.params == sum(p.numel() for p in sliced.parameters())
    assert cost.macs == counted.macs


def test_a_block_becomes_an_identity_and_a_branch_a_zero():
    model, graph, images = known("demo")
    by_hand = slice_model(model, graph, {})
    by_hand.stages[0][1] = nn.Identity()
    assert torch.equal(
        outputs(slice_model(model, graph, {"stages.0.1.conv1": np.arange(0)}), images), outputs(by_hand, images)
    )
    model, graph, images = known("vit")
    by_hand = slice_model(model, graph, {})
    by_hand.blocks[1].attn.register_forward_hook(lambda _m, _given, result: torch.zeros_like(result))
    without = slice_model(model, graph, {"blocks.1.attn.heads": np.arange(0)})
    assert torch.allclose(outputs(without, images), outputs(by_hand, images), atol=1e-6)


@pytest.mark.parametrize("name", ["demo", "vit"])
def test_the_file_has_nothing_of_a_branch_that_is_left_out(name, tmp_path):
    model, graph, images = known(name)
    gone = [unit for unit in graph.units if unit.branch][-1]
    sliced = slice_model(model, graph, {gone.name: np.arange(0)})
    export_onnx(sliced, images, tmp_path / "batched.onnx")  # compared with torch
    set_static_batch(tmp_path / "batched.onnx", tmp_path / "static.onnx")
    export_onnx(model, images, tmp_path / "whole.onnx")
    set_static_batch(tmp_path / "whole.onnx", tmp_path / "whole-static.onnx")
    nodes = onnx.load(str(tmp_path / "static.onnx")).graph.node
    whole = onnx.load(str(tmp_path / "whole-static.onnx")).graph.node
    assert not [node.name for node in nodes if node.name.startswith(f"{gone.branch.module}/Conv")]
    assert not [node.name for node in nodes if node.name.startswith(f"{gone.branch.module}.")]
    adds = [sum(node.op_type == "Add" for node in graph) for graph in (nodes, whole)]
    assert adds[0] < adds[1]  # the sum is gone too


def test_a_shape_manifest_tells_what_was_left_out():
    model, graph, images = known("vit")
    sliced = slice_model(model, graph, half_without(graph))
    manifest = shapes(sliced)
    assert manifest["blocks.0.attn"] == "zero"
    again = rebuild(MODELS["vit"](), manifest, sliced.state_dict()).eval()
    assert torch.equal(outputs(again, images), outputs(sliced, images))
    with pytest.raises(InputError, match=r"unknown module 'blocks\.9'"):
        rebuild(MODELS["vit"](), {**manifest, "blocks.9": "identity"}, sliced.state_dict())


def test_nothing_may_stay_only_where_a_branch_goes_with_it():
    model, graph, _ = known("demo")
    check_plan(graph, CompressionPlan({"stages.0.0.conv1": 0}))
    with pytest.raises(InputError, match=r"'stages.1.0.conv1' cannot keep 0 of 32 elements; use 8"):
        check_plan(graph, CompressionPlan({"stages.1.0.conv1": 0}))
    with pytest.raises(SliceError, match="at least one element"):
        slice_model(model, graph, {"stages.1.0.conv1": np.arange(0)})
    with pytest.raises(InputError, match="cannot keep 0"):
        check_plan(graph.without_branches(), CompressionPlan({"stages.0.0.conv1": 0}))


def test_layers_that_are_left_out_are_not_matched_while_the_rest_recovers():
    _, graph, _ = known("demo")
    kept = {"stages.0.1.conv1": np.arange(0), "stages.0.residual": np.arange(8), "stages.0.0.conv1": np.arange(8)}
    reads = kept_inputs(graph, kept)
    assert "stages.0.0.conv2" in reads
    assert not [name for name in reads if name.startswith("stages.0.1")]


class CountedTable:
    """Milliseconds that follow both widths of a layer, and are not a product of theirs."""

    def layer_ms(self, shape: LayerShape, in_features: int, out_features: int, precision: str) -> float:
        return shape.positions * (3.0 + in_features) * (1.0 + out_features) * 1e-6


@pytest.mark.parametrize("name", ["demo", "vit", "resnet50", "efficientnet_b0", "regnety_002"])
def test_predicted_times_and_bytes_are_those_of_what_is_left(name):
    _, graph, _ = known(name)
    table: Any = CountedTable()
    network = network_time.NetworkTime(graph, table, 0.5, 2.0)
    offered = {unit.name: (unit.least, unit.widths[0], unit.size) for unit in graph.units}
    offered = {name: tuple(sorted(set(widths))) for name, widths in offered.items()}
    times = layer_times.LayerTimes.of(network, offered, graph.layers, fixed=network.fixed)
    assert not times.others or name in ("efficientnet_b0", "regnety_002")
    rng = np.random.default_rng(0)
    for _ in range(20):
        choices = np.array([rng.integers(len(widths)) for widths in offered.values()])
        keep = {unit: widths[choice] for (unit, widths), choice in zip(offered.items(), choices, strict=True)}
        assert times.predict(choices[None])[0] == pytest.approx(network.predict(keep, lambda _: "int8"), rel=0.02)
        some: list[Decision | Any] = [
            SimpleNamespace(name=unit, kind="width", options=widths) for unit, widths in offered.items()
        ]
        assert tables.weight_bytes(graph, some, choices[None])[0] == pytest.approx(
            sum(
                layer.params
                * np.prod(tables.kept_features(layer, graph, keep))
                / (layer.in_features * layer.out_features)
                for layer in graph.layers
            )
        )
    without = {unit.name: unit.least for unit in graph.units if unit.branch}
    left = {layer.name for layer in graph.layers if not graph.leaves_out(layer.name, without)}
    assert network.predict(without, lambda _: "int8") == pytest.approx(
        0.5 + 2.0 * sum(network.layer_ms(layer, {}, "int8") for layer in graph.layers if layer.name in left)
    )
