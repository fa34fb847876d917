"""What build_graph says about a model: units, layers, blocks, reasons, counts."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from hand_written_nets import FixedSizes, HandTransformer, HiddenNumber, MixedNet
from torch import nn

from hirelc_deploy.compress.slicing import provable
from hirelc_deploy.demo.model import DemoNet
from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.model_graph import Share
from hirelc_deploy.graph.trace import refs, trace
from hirelc_deploy.graph.units import build_graph, legal_widths

IMAGE = torch.zeros(1, 3, 32, 32)
SMALL_IMAGE = torch.zeros(1, 3, 16, 16)


def test_trace_names_functions_parameters_and_modules():
    traced = trace(DemoNet((32, 64, 128, 256)), IMAGE)
    first = traced.ops[0]
    assert (first.function, first.module, first.arg(1, "weight").name) == ("conv2d", "conv1", "conv1.weight")
    assert next(refs(traced.output)).shape == (2, 10)
    assert {op.function for op in traced.ops} == {"conv2d", "batch_norm", "relu", "add", "mean", "linear"}


def test_trace_leaves_train_flags_and_norm_statistics_alone():
    model = DemoNet((32, 64, 128, 256)).train()
    model.bn1.eval()
    trace(model, torch.randn(1, 3, 32, 32))
    assert model.training
    assert not model.bn1.training
    assert model.fc.training
    assert float(model.bn1.running_mean.abs().sum()) == 0


def test_a_model_that_cannot_run_on_the_image_is_an_input_error():
    with pytest.raises(InputError, match=r"forward pass fails on a 1x32x32 image"):
        build_graph(DemoNet((32, 64, 128, 256)), torch.zeros(1, 1, 32, 32))


def test_parameters_and_macs_equal_hand_counts():
    graph = build_graph(DemoNet(widths=(8, 16), blocks_per_stage=1, num_classes=3), SMALL_IMAGE)
    by_name = {layer.name: layer for layer in graph.layers}
    assert by_name["conv1"].macs == 3 * 8 * 9 * 16 * 16
    assert by_name["stages.1.0.conv1"].macs == 8 * 16 * 9 * 8 * 8
    assert by_name["fc"].macs == 16 * 3
    assert by_name["fc"].params == 16 * 3 + 3
    assert graph.macs == sum(layer.macs for layer in graph.layers)
    assert graph.params == sum(p.numel() for p in DemoNet((8, 16), 1, 3).parameters())


def test_attention_macs_are_scores_and_mix():
    graph = build_graph(HandTransformer(), SMALL_IMAGE)
    core = next(layer for layer in graph.layers if layer.shape.kind == "attention")
    assert core.macs == 2 * 4 * 16 * 16 * 6
    assert (core.in_features, core.shape.head_dim, core.shape.positions) == (4, 6, 16)


def test_a_residual_stage_is_one_unit_and_inner_channels_are_their_own():
    graph = build_graph(DemoNet((32, 64, 128, 256)), IMAGE)
    kinds = {unit.name: (unit.kind, unit.size, unit.block) for unit in graph.units}
    assert kinds["stages.1.residual"] == ("residual channels", 64, "stages.1")
    assert kinds["stages.1.0.conv1"] == ("channels", 64, "stages.1.0")
    touched = {(part.tensor, part.dim) for part in graph.unit("stages.1.residual").slices}
    assert ("stages.1.0.shortcut.1.running_var", 0) in touched
    assert ("stages.1.1.bn2.bias", 0) in touched
    assert ("stages.2.0.conv1.weight", 1) in touched
    assert ("stages.1.1.conv1.weight", 0) not in touched
    assert {reader.layer for reader in graph.unit("stages.3.residual").readers} == {"stages.3.1.conv1", "fc"}


def test_blocks_are_in_execution_order_with_each_stage_before_its_blocks():
    blocks = build_graph(DemoNet((8, 16), 1), IMAGE).blocks
    assert blocks == ("conv1", "stages.0", "stages.0.0", "stages.1", "stages.1.0", "fc")


def test_plain_sequences_of_layers_are_divided_where_the_resolution_changes():
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(16, 16, 1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 49, 4))
    assert build_graph(model, SMALL_IMAGE).blocks == ("0..2", "4", "6")


def test_fused_qkv_gives_heads_and_each_head_has_its_rows_of_q_k_and_v():
    model = timm.models.VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=3, num_classes=4)
    graph = build_graph(model, SMALL_IMAGE)
    unit = graph.unit("blocks.0.attn.heads")
    rows = next(part.index for part in unit.slices if part.tensor == "blocks.0.attn.qkv.weight")
    assert unit.widths == (1, 2, 3)
    assert rows[1].tolist() == [*range(8, 16), *range(32, 40), *range(56, 64)]
    assert unit.readers[0].index[2].tolist() == list(range(16, 24))
    by_name = {layer.name: layer for layer in graph.layers}
    assert by_name["blocks.0.attn.qkv"].writes == (Share(unit.name, 24),)
    assert by_name["blocks.0.attn.proj"].reads == (Share(unit.name, 8),)
    assert by_name["blocks.0.attn"].reads == by_name["blocks.0.attn"].writes == (Share(unit.name, 1),)
    assert by_name["blocks.0.mlp.fc1"].shape.activation == "gelu"


def test_what_stays_whole_has_a_reason_in_words():
    graph = build_graph(HandTransformer(), SMALL_IMAGE)
    reasons = {kept.layer: kept.reason for kept in graph.kept_whole}
    assert reasons == {"head": "its outputs are the model's answer"}
    reasons = {kept.layer: kept.reason for kept in build_graph(FixedSizes(), SMALL_IMAGE).kept_whole}
    assert reasons["middle"] == "its size is written as 16 in the model's own forward"


def test_hand_written_couplings_are_seen():
    graph = build_graph(MixedNet(), SMALL_IMAGE)
    units = {unit.name: unit for unit in graph.units}
    assert {reader.layer for reader in units["left"].readers} == {"joined"}
    assert units["right"].readers[0].index[:, 0].tolist() == list(range(24, 40))
    assert units["stem.residual"].kind == "residual channels"
    assert units["wide"].size == 32, "an element is one channel of each of the two groups"
    assert units["halves"].size == 24, "an element is one channel of each half"
    assert units["halves"].readers[0].index.shape == (24, 16), "sixteen pixels of one channel are flattened"
    assert units["fc1"].kind == "mlp units"


def test_depthwise_layers_move_both_widths_with_one_unit():
    layer = next(layer for layer in build_graph(MixedNet(), SMALL_IMAGE).layers if layer.name == "depthwise")
    assert layer.shape.depthwise
    assert layer.reads == layer.writes == (Share("left", 1),)
    assert layer.macs == 24 * 9 * 16 * 16
    assert layer.shape.activation == "relu6"


def test_an_operation_nobody_taught_us_keeps_what_it_reads_whole_and_says_so():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)

        def forward(self, x):
            return self.last(torch.fft.fft(self.first(x), dim=1).real).mean((2, 3))

    graph = build_graph(Odd(), SMALL_IMAGE)
    assert graph.units == ()
    reason = "read by fft_fft in the model's own forward, an operation that this program does not follow"
    assert graph.kept_whole[0].reason == reason


def test_a_constant_that_meets_channels_keeps_them_whole():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)

        def forward(self, x):
            return self.last(self.first(x) * torch.ones(16)[:, None, None]).mean((2, 3))

    assert build_graph(Constant(), SMALL_IMAGE).units == ()


def test_an_image_map_broadcast_over_channels_does_not_couple_them():
    class Map(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.map, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 1, 3), nn.Conv2d(16, 4, 1)

        def forward(self, x):
            return self.last(self.first(x) * torch.sigmoid(self.map(x))).mean((2, 3))

    assert [unit.size for unit in build_graph(Map(), SMALL_IMAGE).units] == [16]


def test_a_weight_used_twice_is_one_unit():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.shared, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1)

        def forward(self, x):
            return self.last(F.relu(self.shared(F.relu(self.shared(self.a(x)))))).mean((2, 3))

    graph = build_graph(Shared(), SMALL_IMAGE)
    assert len(graph.units) == 1
    assert next(layer.macs for layer in graph.layers if layer.name == "shared") == 2 * 16 * 16 * 256


def test_exclude_and_include_patterns_choose_units_and_give_the_reason():
    graph = build_graph(DemoNet((16, 16), 1), IMAGE, exclude=["stages.1.*"])
    assert [unit.name for unit in graph.units] == ["stages.0.0.conv1"]
    reasons = {kept.layer: kept.reason for kept in graph.kept_whole}
    assert reasons["stages.1.0.conv1"] == "excluded by the pattern 'stages.1.*'"
    only = build_graph(DemoNet((16, 16), 1), IMAGE, include=["stages.1.0.conv1"])
    assert "stages.1.0.conv1" in [unit.name for unit in only.units]
    with pytest.raises(InputError, match=r"pattern 'stages.7.0' matches no unit and no layer. Near names: stages"):
        build_graph(DemoNet((16, 16), 1), IMAGE, exclude=["stages.7.0"])


@pytest.mark.parametrize(
    ("size", "positions", "kind", "widths"),
    [
        (24, 1, "channels", (8, 16, 24)),
        (20, 1, "channels", (8, 16, 20)),
        (12, 1, "channels", (4, 8, 12)),
        (3, 64, "attention heads", (1, 2, 3)),
        (16, 2, "channels", (4, 8, 12, 16)),
        (4, 19, "channels", (1, 2, 3, 4)),
        (3, 1, "channels", (3,)),
        (8, 3, "channels", (4, 8)),
    ],
)
def test_legal_widths_follow_the_devices_step(size, positions, kind, widths):
    assert legal_widths(size, positions, kind) == widths


def test_a_model_with_nothing_to_cut_is_an_empty_graph_not_an_error():
    assert build_graph(nn.Sequential(nn.Flatten(), nn.Linear(768, 3)), SMALL_IMAGE).units == ()
    assert build_graph(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), SMALL_IMAGE).layers == ()


def test_numbers_written_into_code_are_seen_and_computed_ones_are_not():
    # `compress.slicing.provable` is what catches the others; the graph alone believes that they can be cut.
    assert [unit.name for unit in build_graph(FixedSizes(), SMALL_IMAGE).units] == ["free"]
    assert [unit.name for unit in build_graph(HiddenNumber(), SMALL_IMAGE).units] == ["free", "middle"]


ODD_WAYS = {
    "tensor index": lambda x: x[:, torch.arange(x.shape[1] - 1, -1, -1)],
    "boolean index": lambda x: x[:, torch.ones(16, dtype=torch.bool)],
    "one channel": lambda x: x[:, 3:4] + x,
    "ellipsis and none": lambda x: x[..., None, :, :].squeeze(2),
    "reversed step": lambda x: x[:, ::2].repeat(1, 2, 1, 1),
    "uneven split": lambda x: torch.cat(x.split([4, 12], 1), 1),
    "even split": lambda x: torch.cat(x.split(8, dim=1)[::-1], 1),
    "stack and sum": lambda x: torch.stack([x, x.flip(1)], 0).sum(0),
    "einsum": lambda x: torch.einsum("bchw,bchw->bchw", x, x),
    "group norm": lambda x: F.group_norm(x, 4),
    "local norm": F.normalize,
    "softmax": lambda x: x.softmax(1) * x,
    "mean over channels": lambda x: x - x.mean(1, keepdim=True),
    "channels last and back": lambda x: x.movedim(1, -1).contiguous().permute(0, 3, 1, 2),
    "shuffle": lambda x: x.reshape(len(x), 4, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape),
    "channels times batch": lambda x: x.flatten(0, 1).unsqueeze(1).reshape(x.shape),
    "gram": lambda x: (x.flatten(2) @ x.flatten(2).mT).softmax(-1) @ x.flatten(2).unflatten(1, (-1,)).relu(),
    "padding channels": lambda x: F.pad(x, (0, 0, 0, 0, 0, 16))[:, :16],
    "padding pixels": lambda x: F.interpolate(F.pad(x, (1, 1, 1, 1)), scale_factor=2.0),
    "in place": lambda x: x.clone().mul_(2).add_(x).relu_(),
    "written part": lambda x: x.clone().index_fill_(1, torch.tensor([0]), 0),
    "max with index": lambda x: x.max(1, keepdim=True)[0] + x,
    "pixel shuffle": lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2),
    "where": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "reversed operands": lambda x: 1 - (2.0 / (1 + x.abs())),
    "rolled": lambda x: torch.roll(x, (1, 1), dims=(2, 3)),
    "number of channels as a float": lambda x: x / float(x.shape[1]),
    "numbers from shapes": lambda x: x * x.size(1) + x.shape[-1],
}


class Odd(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way, self.first, self.last = way, nn.Conv2d(3, 16, 3), nn.LazyConv2d(4, 1)

    def forward(self, x):
        x = self.way(self.first(x))
        return self.last(x if x.ndim == 4 else x.unsqueeze(-1)).mean((2, 3))


@pytest.mark.parametrize("way", ODD_WAYS)
def test_whatever_happens_between_two_layers_is_followed_exactly_or_kept_whole(way):
    torch.manual_seed(0)
    model = Odd(ODD_WAYS[way]).eval()
    images = torch.randn(2, 3, 16, 16)
    model(images)
    graph = build_graph(model, images)
    followed = {unit.name for unit in graph.units}
    assert followed or graph.kept_whole[0].reason
    proven, difference = provable(model, graph, images)
    assert difference <= 1e-5
    # What only the proof finds: code whose numbers depend on the width in ways that leave no trace.
    expected = {"first"} if way in ("shuffle", "number of channels as a float") else set()
    assert followed - {unit.name for unit in proven.units} <= expected
