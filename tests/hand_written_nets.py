"""In: nothing. Out: small networks written by hand, each with couplings that a slicer gets wrong easily."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn


class MixedNet(nn.Module):
    """Depthwise, concat, residual, grouped convolution, gate, chunk and a flattened read, in one forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.left = nn.Conv2d(16, 24, 1)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.right = nn.Conv2d(16, 16, 3, padding=1)
        self.joined = nn.Conv2d(40, 16, 1)
        self.wide = nn.Conv2d(16, 64, 1)
        self.grouped = nn.Conv2d(64, 32, 3, padding=1, groups=2)
        self.gate = nn.Conv2d(32, 32, 1)
        self.halves = nn.Conv2d(32, 48, 1)
        self.fc1 = nn.Linear(24 * 16, 40)
        self.fc2 = nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        left = F.relu6(self.norm(self.depthwise(self.left(x))))
        y = torch.cat([left, F.silu(self.right(x))], 1)
        x = x + self.joined(y)
        y = F.relu(self.grouped(F.relu(self.wide(x))))
        y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        a, b = self.halves(y).chunk(2, dim=1)
        y = F.adaptive_avg_pool2d(F.gelu(a) * b, 4).flatten(1)
        return self.fc2(F.relu(self.fc1(y)))


class HandAttention(nn.Module):
    """Attention with separate projections and written-out softmax."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, heads * head_dim)
        self.k = nn.Linear(dim, heads * head_dim, bias=False)
        self.v = nn.Linear(dim, heads * head_dim)
        self.out = nn.Linear(heads * head_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class HandTransformer(nn.Module):
    """Patches, one attention, one gated MLP, an average and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 4, 4)
        self.norm = nn.LayerNorm(24)
        self.attention = HandAttention(24, heads=4, head_dim=6)
        self.gate = nn.Linear(24, 32)
        self.value = nn.Linear(24, 32)
        self.back = nn.Linear(32, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.attention(self.norm(x))
        x = x + self.back(F.silu(self.gate(x)) * self.value(x))
        return self.head(x.mean(1))


class Assembled(nn.Module):
    """A concat, a residual, a grouped convolution and an attention layer written by hand, in one network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.left = nn.Conv2d(16, 16, 1)
        self.right = nn.Conv2d(16, 32, 3, padding=1, groups=4)
        self.norm = nn.BatchNorm2d(48)
        self.joined = nn.Conv2d(48, 16, 1)
        self.patches = nn.Conv2d(16, 24, 4, 4)
        self.attention = HandAttention(24, heads=4, head_dim=8)
        self.hidden = nn.Linear(24, 32)
        self.head = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + self.joined(F.relu(self.norm(torch.cat([self.left(x), self.right(x)], 1))))
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.attention(x)
        return self.head(F.gelu(self.hidden(x.mean(1))))


class FlatBlock(nn.Module):
    """A transformer block whose attention and MLP layers are children of one module, with a fused projection."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.patches = nn.Conv2d(3, 24, 4, 4)
        self.norm = nn.LayerNorm(24)
        self.fc1 = nn.Linear(24, 32)
        self.fc2 = nn.Linear(32, 24)
        self.qkv = nn.Linear(24, 3 * 32)
        self.proj = nn.Linear(32, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.patches(x).flatten(2).mT)
        q, k, v = self.qkv(x).reshape(len(x), -1, 3, self.num_heads, 8).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head((x + self.fc2(F.gelu(self.fc1(x)))).mean(1))


class FixedSizes(nn.Module):
    """A forward pass that has the number of channels written into its code, beside a part that can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.free = nn.Conv2d(3, 16, 3)
        self.middle = nn.Conv2d(16, 16, 3)
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(F.relu(self.free(x)))
        x = x.reshape(len(x), 16, -1).reshape(len(x), 16, 12, 12)
        return self.last(x).mean((2, 3))


class HiddenNumber(nn.Module):
    """A forward pass that divides by the number of its channels, which leaves no trace, beside a part without."""

    def __init__(self) -> None:
        super().__init__()
        self.free = nn.Conv2d(3, 16, 3)
        self.middle = nn.Conv2d(16, 16, 3)
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(F.relu(self.free(x)))
        return self.last(x / float(x.shape[1])).mean((2, 3))


class Divided(nn.Module):
    """Channels divided at numbers that modules keep: equal parts, parts of a list, half of a number, a prefix."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.parts, self.expanded, self.first = 16, (24, 16, 16), 32, 24
        self.stem = nn.Conv2d(3, 48, 3, padding=1)
        self.steps = nn.ModuleList([nn.Conv2d(16, 16, 3, padding=1) for _ in range(2)])
        self.mixed = nn.Conv2d(48, 56, 1)
        self.middle = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.expand = nn.Conv2d(56, 32, 1)
        self.halved = nn.Conv2d(16, 16, 1)
        self.short = nn.Conv2d(32, 24, 1)
        self.long = nn.Conv2d(32, 40, 1)
        self.fc = nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = torch.split(F.relu(self.stem(x)), self.width, 1)
        second = F.relu(self.steps[0](second))
        x = self.mixed(torch.cat([first, second, F.relu(self.steps[1](third + second))], 1))
        left, middle, right = x.split(self.parts, dim=1)
        x = F.relu(self.expand(torch.cat([left, self.middle(middle), right], 1)))
        a, b = x.split(self.expanded // 2, dim=1)
        x = torch.cat([self.halved(a), b], 1)
        long = self.long(x)
        x = torch.cat([long[:, : self.first] + self.short(x), long[:, self.first :]], 1)
        return self.fc(F.relu(x).mean((2, 3)))


class WithResponseNorm(nn.Module):
    """Two blocks with the norm of ConvNeXt V2, one with channels last, one with channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 2, 2)
        self.wide = nn.Linear(24, 48)
        self.last = GlobalResponseNorm(48)
        self.narrow = nn.Linear(48, 24)
        self.conv = nn.Conv2d(24, 32, 3, padding=1)
        self.first = GlobalResponseNorm(32, channels_last=False)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        x = x + self.narrow(self.last(F.gelu(self.wide(x))))
        x = self.first(F.gelu(self.conv(x.permute(0, 3, 1, 2))))
        return self.head(x.mean((2, 3)))
