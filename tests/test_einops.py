"""In: attention written with einops. Out: proof that its heads are found and cut as those written without it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hirelc_deploy.compress.branches import proven
from hirelc_deploy.graph.units import build_graph

einops = pytest.importorskip("einops", reason="einops is not installed; pip install einops")


class Attention(nn.Module):
    """`way` is how queries, keys and values are split and joined."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.heads = way, 4
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96, bias=False), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.qkv(self.norm(x))
        if self.way == "in one":
            q, k, v = einops.rearrange(x, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        elif self.way == "by size":
            q, k, v = (einops.rearrange(t, "b n (h d) -> b h n d", d=8) for t in x.chunk(3, -1))
        elif self.way == "none":
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in x.chunk(3, -1))
        else:
            q, k, v = (einops.rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in x.chunk(3, -1))
        if self.way == "by products":
            scores = torch.einsum("b h i d, b h j d -> b h i j", q, k) * 8**-0.5
            mixed = torch.einsum("b h i j, b h j d -> b h i d", scores.softmax(-1), v)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        if self.way == "none":
            return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]
        return self.out(einops.rearrange(mixed, "b h n d -> b n (h d)"))  # type: ignore[no-any-return]


class Vit(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.patch, self.out = nn.Conv2d(3, 32, 4, 4), nn.Linear(32, 4)
        self.blocks = nn.ModuleList(Attention(way) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = einops.rearrange(self.patch(x), "b c h w -> b (h w) c")
        for block in self.blocks:
            x = x + block(x)
        return self.out(einops.reduce(x, "b n c -> b c", "mean"))  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", ["by heads", "by size", "in one", "by products"])
def test_heads_are_found_as_without_einops_and_are_cut_exactly(way: str) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16)
    model, plain = Vit(way).eval(), Vit("none").eval()
    model(images)  # fills the cache of shapes that einops keeps
    found = proven(model, build_graph(model, images), images)
    wanted = proven(plain, build_graph(plain, images), images)
    heads = [(unit.name, unit.size) for unit in found.units if unit.kind == "attention heads"]
    assert heads == [(unit.name, unit.size) for unit in wanted.units if unit.kind == "attention heads"]
    assert [size for _, size in heads] == [4, 4]
    assert [kept.layer for kept in found.kept_whole] == [kept.layer for kept in wanted.kept_whole]


def test_the_cache_of_einops_is_as_it_was() -> None:
    from einops import einops as inner

    before = inner._reconstruct_from_shape
    build_graph(Vit("by heads").eval(), torch.randn(2, 3, 16, 16))
    assert inner._reconstruct_from_shape is before
