"""Attention of every kind that timm and torch have: heads go, sliced equals masked, a bundle brings the model back."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from test_slicing import outputs, random_choice, randomised, relative_difference
from timm.layers import SwiGLU
from timm.models import (
    beit,
    cait,
    crossvit,
    davit,
    edgenext,
    efficientvit_mit,
    efficientvit_msra,
    eva,
    focalnet,
    hiera,
    levit,
    maxxvit,
    metaformer,
    mlp_mixer,
    nest,
    pit,
    swin_transformer,
    tiny_vit,
    twins,
    visformer,
    xcit,
)
from torch import Tensor, nn

from hirelc_deploy.compress.slicing import mask_model, provable, rebuild, shapes, slice_model
from hirelc_deploy.graph.model_graph import ModelGraph
from hirelc_deploy.graph.sizes import set_whole_number, whole_numbers
from hirelc_deploy.graph.units import build_graph

vit = functools.partial(
    timm.models.VisionTransformer, img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5
)


def small_maxxvit(block_types: tuple[str, ...], bias: str) -> nn.Module:
    attention = maxxvit.MaxxVitTransformerCfg(dim_head=8, window_size=(4, 4), grid_size=(4, 4), rel_pos_type=bias)
    config = maxxvit.MaxxVitCfg((16, 32), (1, 1), block_types, stem_width=16, transformer_cfg=attention)
    return maxxvit.MaxxVit(config, img_size=64, num_classes=5)


# Name: (builder, image size). Each is its family's own code with two or three narrow blocks.
FAMILIES = {
    "vit, q/k norm and swiglu": (lambda: vit(qk_norm=True, init_values=0.5, mlp_layer=SwiGLU), 32),
    "vit, pooling by attention": (lambda: vit(global_pool="map", class_token=False), 32),
    "swin": (
        lambda: swin_transformer.SwinTransformer(
            32, 4, embed_dim=24, depths=(2, 2), num_heads=(3, 6), window_size=4, num_classes=5
        ),
        32,
    ),
    "cait": (lambda: cait.Cait(32, 8, embed_dim=64, depth=2, num_heads=4, num_classes=5), 32),
    "xcit": (lambda: xcit.Xcit(32, 8, embed_dim=48, depth=2, num_heads=4, num_classes=5), 32),
    "levit": (
        lambda: levit.Levit(64, embed_dim=(32, 48), key_dim=8, num_heads=(2, 4), depth=(1, 1), num_classes=5),
        64,
    ),
    "twins": (
        lambda: twins.Twins(
            64, embed_dims=(32, 48), num_heads=(2, 4), depths=(2, 2), sr_ratios=(4, 2), wss=(4, 4), num_classes=5
        ),
        64,
    ),
    "nest": (
        lambda: nest.Nest(
            img_size=32, patch_size=2, num_levels=2, embed_dims=(32, 48), num_heads=(2, 4), depths=(1, 1), num_classes=5
        ),
        32,
    ),
    "hiera": (
        lambda: hiera.Hiera(img_size=(64, 64), embed_dim=32, num_heads=1, stages=(1, 1, 1, 1), num_classes=5),
        64,
    ),
    "eva": (
        lambda: eva.Eva(
            32, 8, embed_dim=48, depth=2, num_heads=3, num_classes=5, swiglu_mlp=True, use_rot_pos_emb=True
        ),
        32,
    ),
    "beit": (lambda: beit.Beit(32, 8, embed_dim=48, depth=2, num_heads=3, num_classes=5, use_rel_pos_bias=True), 32),
    "gmlp": (
        lambda: mlp_mixer.MlpMixer(
            img_size=32,
            patch_size=8,
            embed_dim=48,
            num_blocks=2,
            mlp_ratio=4,
            block_layer=mlp_mixer.SpatialGatingBlock,
            mlp_layer=timm.layers.GatedMlp,
            num_classes=5,
        ),
        32,
    ),
    "mixer": (lambda: mlp_mixer.MlpMixer(img_size=32, patch_size=8, embed_dim=48, num_blocks=2, num_classes=5), 32),
    "pit": (
        lambda: pit.PoolingVisionTransformer(
            64, 16, 8, stem_type="overlap", base_dims=(24, 24), depth=(1, 1), heads=(2, 4), mlp_ratio=2, num_classes=5
        ),
        64,
    ),
    "crossvit": (
        lambda: crossvit.CrossVit(
            32,
            (1.0, 1.0),
            (8, 16),
            embed_dim=(32, 48),
            num_heads=(2, 4),
            depth=((1, 1, 0),),
            mlp_ratio=(2, 2, 1),
            num_classes=5,
        ),
        32,
    ),
    "davit": (lambda: davit.DaVit(embed_dims=(24, 48), num_heads=(3, 6), depths=(1, 1), num_classes=5), 56),
    "focalnet": (lambda: focalnet.FocalNet(embed_dim=24, depths=(1, 1), num_classes=5), 32),
    "poolformer": (
        lambda: metaformer.MetaFormer(
            depths=(1, 1),
            dims=(24, 48),
            token_mixers=metaformer.Pooling,
            norm_layers=metaformer.GroupNorm1,
            layer_scale_init_values=0.5,  # its modules keep a tuple called shape
            num_classes=5,
        ),
        32,
    ),
    "tiny_vit": (
        lambda: tiny_vit.TinyVit(
            embed_dims=(16, 32, 48), depths=(1, 1, 1), num_heads=(1, 2, 3), window_sizes=(4, 4, 2), num_classes=5
        ),
        64,
    ),
    "maxvit": (lambda: small_maxxvit(("M", "M"), "bias_tf"), 64),
    "coatnet": (lambda: small_maxxvit(("C", "T"), "mlp"), 64),
    "visformer": (
        lambda: visformer.Visformer(
            64, 16, embed_dim=48, depth=(1, 1, 1), num_heads=3, attn_stage="011", spatial_conv="100", num_classes=5
        ),
        64,
    ),
    "edgenext": (lambda: edgenext.EdgeNeXt(dims=(16, 24, 48, 64), depths=(1, 2, 2, 2), num_classes=5), 64),
    "efficientvit_b": (
        lambda: efficientvit_mit.EfficientVit(
            widths=(8, 16, 32, 32), depths=(1, 1, 1, 1), head_dim=16, head_widths=(48, 48), num_classes=5
        ),
        64,
    ),
    "efficientvit_m": (
        lambda: efficientvit_msra.EfficientVitMsra(
            64, embed_dim=(32, 48), key_dim=(8, 8), depth=(1, 1), num_heads=(2, 3), window_size=(4, 2), num_classes=5
        ),
        64,
    ),
}


class TorchEncoder(nn.Module):
    """torch's own transformer layers, tokens first or images first."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)
        self.tokens_first = not batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).permute((2, 0, 1) if self.tokens_first else (0, 2, 1))
        return self.head(self.encoder(x).mean(0 if self.tokens_first else 1))


class SharedKeys(nn.Module):
    """Four heads of queries and fewer of keys and values, and a packed gated MLP."""

    def __init__(self, way: str, key_heads: int = 2) -> None:
        super().__init__()
        self.way, self.heads, self.key_heads = way, 4, key_heads
        self.patches, self.norm = nn.Conv2d(3, 32, 4, 4), nn.RMSNorm(32)
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, key_heads * 8), nn.Linear(32, key_heads * 8)
        self.out, self.up, self.down, self.head = (nn.Linear(*ends) for ends in ((32, 32), (32, 96), (48, 32), (32, 5)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        y, each = self.norm(x), self.heads // self.key_heads
        q = self.q(y).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = (layer(y).unflatten(2, (self.key_heads, -1)).transpose(1, 2) for layer in (self.k, self.v))
        if self.way == "repeated":
            k, v = k.repeat_interleave(each, dim=1), v.repeat_interleave(each, dim=1)
        elif self.way != "told to torch":
            k, v = (t[:, :, None].expand(-1, -1, each, -1, -1).flatten(1, 2) for t in (k, v))
        if self.way == "einsum":
            weights = (torch.einsum("bhid,bhjd->bhij", q, k) / 8**0.5).softmax(-1)
            y = torch.einsum("...ij, ...jd -> ...id", weights, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.way == "told to torch")
        x = x + self.out(y.transpose(1, 2).flatten(2))
        gate, value = self.up(x).chunk(2, -1)
        return self.head((x + self.down(F.silu(gate) * value)).mean(1))


class MergedHeads(nn.Module):
    """Heads and images in one dim, as older code has them."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.heads = way, 4
        self.patches, self.norm = nn.Conv2d(3, 32, 4, 4), nn.LayerNorm(32)
        self.qkv, self.out, self.head = nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        b, n, _ = x.shape
        parts = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2).flatten(0, 1) for t in parts)
        if self.way == "in one":
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.way == "baddbmm":
            scores = torch.baddbmm(q.new_zeros(b * self.heads, n, n), q, k.mT, beta=0, alpha=8**-0.5)
            y = torch.bmm(scores.softmax(-1), v)
        else:
            scores = torch.einsum("bid,bjd->bij", q, k) * 8**-0.5
            y = torch.einsum("bij,bjd->bid", scores.softmax(-1), v)
        y = y.view(b, self.heads, n, -1).transpose(1, 2).flatten(2)
        return self.head((x + self.out(y)).mean(1))


HAND_WRITTEN = {
    "torch's encoder": (TorchEncoder, 16),
    "torch's encoder, tokens first": (lambda: TorchEncoder(batch_first=False), 16),
    "shared keys, told to torch": (lambda: SharedKeys("told to torch"), 16),
    "shared keys, repeated": (lambda: SharedKeys("repeated"), 16),
    "shared keys, expanded": (lambda: SharedKeys("expanded"), 16),
    "shared keys, einsum": (lambda: SharedKeys("einsum"), 16),
    "one head of keys": (lambda: SharedKeys("told to torch", 1), 16),
    "heads beside images": (lambda: MergedHeads("in one"), 16),
    "heads beside images, baddbmm": (lambda: MergedHeads("baddbmm"), 16),
    "heads beside images, einsum": (lambda: MergedHeads("einsum"), 16),
}
ALL = FAMILIES | HAND_WRITTEN


@functools.cache
def known(name: str) -> tuple[nn.Module, ModelGraph, Tensor]:
    build, size = ALL[name]
    torch.manual_seed(0)
    model, images = randomised(build()).double(), torch.randn(2, 3, size, size, dtype=torch.float64)
    return model, build_graph(model, images), images


@pytest.mark.parametrize("name", ALL)
def test_random_plans_are_exact_and_the_proof_drops_nothing(name):
    model, graph, images = known(name)
    for seed in range(3):
        kept = random_choice(graph, seed)
        expected = outputs(mask_model(model, graph, kept), images)
        assert relative_difference(outputs(slice_model(model, graph, kept), images), expected) <= 1e-9
    proven, difference = provable(model, graph, images)
    assert proven.units == graph.units
    assert difference <= 1e-9


@pytest.mark.parametrize("name", ALL)
def test_a_cut_model_comes_back_from_its_manifest_and_can_be_cut_and_trained_again(name):
    model, graph, images = known(name)
    small = slice_model(model, graph, random_choice(graph, 5))
    again = rebuild(ALL[name][0]().double(), json.loads(json.dumps(shapes(small))), small.state_dict()).eval()
    assert torch.equal(outputs(again, images), outputs(small, images))
    twice = build_graph(again, images)
    kept = random_choice(twice, 6)
    narrower = slice_model(again, twice, kept)
    expected = outputs(mask_model(again, twice, kept), images)
    assert relative_difference(outputs(narrower, images), expected) <= 1e-9
    answer = narrower.train()(images)
    (answer[0] if isinstance(answer, tuple) else answer).square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in narrower.parameters())


@pytest.mark.parametrize("name", ["swin", "levit", "maxvit", "coatnet", "one head of keys", "vit, q/k norm and swiglu"])
def test_heads_and_mlp_units_go_in_one_plan(name):
    model, graph, _ = known(name)
    kinds = {unit.name: unit.kind for unit in graph.units}
    assert {"attention heads", "mlp units"} <= set(kinds.values()) | ({"mlp units"} if name == "levit" else set())
    heads = {name: np.arange(1) for name, kind in kinds.items() if kind == "attention heads"}
    small = slice_model(model, graph, heads)
    numbers = whole_numbers(small)
    counts = [count.attribute for name in heads for count in graph.unit(name).counts if "head" in count.attribute]
    assert counts
    assert {numbers[path] for path in counts} == {1}


@pytest.mark.parametrize("name", ["heads beside images", "heads beside images, baddbmm", "heads beside images, einsum"])
def test_heads_that_share_a_dim_with_the_images_are_found_and_counted(name):
    graph = known(name)[1]
    assert [unit.size for unit in graph.units if unit.kind == "attention heads"] == [4]
    core = next(layer for layer in graph.layers if layer.shape.kind == "attention")
    assert (core.in_features, core.shape.positions, core.macs) == (4, 16, 2 * 4 * 16 * 16 * 8)


def test_window_attention_loses_heads_rows_and_columns_of_its_bias_table():
    model, graph, _ = known("swin")
    small = slice_model(model, graph, {"layers.1.blocks.1.attn.heads": np.array([0, 5])})
    before, after = (m.layers[1].blocks[1].attn for m in (model, small))
    assert (before.num_heads, after.num_heads) == (6, 2)
    assert (tuple(before.qkv.weight.shape), tuple(after.qkv.weight.shape)) == ((144, 48), (48, 48))
    assert torch.equal(after.relative_position_bias_table, before.relative_position_bias_table[:, [0, 5]])


def test_where_the_code_takes_the_width_from_its_input_heads_go_with_the_features_they_fill():
    _, graph, _ = known("cait")
    unit = graph.unit("blocks.residual")
    assert (unit.kind, unit.size) == ("residual channels", 4), "four heads of sixteen features"
    assert unit.slices[0].index.shape == (4, 16)
    assert {c.attribute for c in unit.counts} >= {"blocks.1.attn.num_heads", "blocks_token_only.0.attn.num_heads"}


def test_a_norm_of_kept_features_is_what_the_masked_twin_computes():
    # By hand: features 1 and 3 stay of (4, 2, 9, 6, 0, 0, 0, 0): mean 4, deviation 2 up to eps; the others are zero.
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(8, 8), nn.LayerNorm(8, eps=0), nn.Linear(8, 8)

        def forward(self, x):
            return self.last(self.norm(self.first(x.flatten(1)[:, :8])))

    model = Norm()
    with torch.no_grad():
        model.first.weight.zero_()
        model.first.bias.copy_(torch.tensor([4.0, 2.0, 9.0, 6.0, 0.0, 0.0, 0.0, 0.0]))
        model.last.weight.copy_(torch.eye(8))
        model.last.bias.zero_()
    graph = build_graph(model, torch.zeros(1, 3, 2, 2))
    masked = mask_model(model, graph, {"first": np.array([1, 3])})
    assert outputs(masked, torch.zeros(1, 3, 2, 2)).tolist() == [[0, -1, 0, 1, 0, 0, 0, 0]]


def test_numbers_of_modules_are_listed_by_path_and_set_by_it():
    model = vit(qk_norm=True)
    numbers = whole_numbers(model)
    assert numbers["blocks.0.attn.num_heads"] == 3
    assert numbers["blocks.1.norm1.normalized_shape.0"] == 48
    set_whole_number(model, "blocks.0.attn.num_heads", 2)
    set_whole_number(model, "blocks.1.norm1.normalized_shape.0", 40)
    assert model.blocks[0].attn.num_heads == 2
    assert model.blocks[1].norm1.normalized_shape == (40,)
    for path in ("blocks.0.attn.odd", "blocks.9.attn.num_heads", "blocks.1.norm1.normalized_shape.1"):
        with pytest.raises(KeyError):
            set_whole_number(model, path, 1)
    assert all(type(number) is int for number in whole_numbers(model).values())


def test_a_trace_leaves_no_numbers_behind_that_remember_it():
    model, _, _ = known("swin")
    assert all(type(number) is int for number in whole_numbers(model).values())
    assert type(model.layers[0].blocks[0].attn.num_heads) is int


def test_layers_bound_to_the_answer_are_told_apart_from_those_that_give_it():
    model = eva.Eva(32, 8, embed_dim=48, depth=1, num_heads=3, num_classes=0, use_rot_pos_emb=True).eval()
    reasons = {kept.layer: kept.reason for kept in build_graph(model, torch.randn(2, 3, 32, 32)).kept_whole}
    assert reasons["blocks.0.attn.qkv"].startswith("its width and that of the model's answer must be equal")
