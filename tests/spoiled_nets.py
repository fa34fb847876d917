"""A small network for pictures with and without a bright point, whole or with one layer that integers serve badly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

SIDE = 24
SPOILED = {"wide channel": "mixed", "range cut off": "points", "badly rounded weight": "joined"}
"""What is wrong with a network, to the layer in which it is."""


def pictures(count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return (count, SIDE, SIDE, 3) dim noise and (count,) labels; a picture of class 1 has one bright point."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    pixels = rng.integers(0, 90, (count, SIDE, SIDE, 3))
    rows, columns = rng.integers(0, SIDE, (2, count))
    pixels[np.flatnonzero(labels), rows[labels > 0], columns[labels > 0]] = rng.integers(150, 256, (count // 2, 1))
    return pixels.astype(np.uint8), labels


def write_pictures(path: Path, **counts: int) -> Path:
    """Write an .npz file with so many pictures in each split."""
    arrays = {}
    for seed, (split, count) in enumerate(counts.items()):
        arrays[f"x_{split}"], arrays[f"y_{split}"] = pictures(count, seed)
    np.savez(path, **arrays)
    return path


class Net(nn.Module):
    """Looks at single pixels, takes the largest of each area, mixes channels behind a gate, and judges."""

    def __init__(self) -> None:
        super().__init__()
        self.points, self.pool = nn.Conv2d(3, 32, 1), nn.MaxPool2d(4)
        self.mixed = nn.Conv2d(32, 33, 1)
        self.joined = nn.Conv2d(32, 16, 1)
        self.head = nn.Linear(16, 2)

    def features(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.points(x)))
        y = self.mixed(x)
        y = torch.relu(y[:, :32]) * torch.sigmoid(y[:, 32:])
        return torch.relu(self.joined(y)).amax((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


@torch.no_grad()
def net(spoiled: str = "") -> Net:
    """Return the network that tells the pictures apart, with what SPOILED names wrong with it."""
    torch.manual_seed(0)
    made = Net()
    points = made.points.weight[:, :, 0, 0]
    points[:] = torch.randn(32, 3)
    points -= points.mean(1, keepdim=True)  # of white they see nothing
    points *= 3
    points[: 1 if spoiled == "range cut off" else 8] = 3.0  # and these how bright a pixel is
    made.points.bias.zero_()
    mixed = made.mixed.weight[:, :, 0, 0]
    mixed[:] = torch.randn(33, 32) * 0.1
    mixed[:, 0] += 0.5
    mixed[31:] = 0.0  # nothing for the next layer to read, and a gate that is open
    made.mixed.bias.zero_()
    made.mixed.bias[32] = 400.0 if spoiled == "wide channel" else 5.0
    joined = made.joined.weight[:, :, 0, 0]
    joined[:] = torch.randn(16, 32) * 0.2
    joined[:, 31] = 100.0 if spoiled == "badly rounded weight" else 0.1
    made.joined.bias.zero_()
    pixels, labels = pictures(64, 99)
    found = made.features(torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float() / 255)
    seen = torch.cat([found, torch.ones(64, 1)], 1)
    wanted = torch.nn.functional.one_hot(torch.from_numpy(labels)).float() * 6 - 3
    answer = torch.linalg.lstsq(seen, wanted, driver="gelsd").solution
    made.head.weight[:], made.head.bias[:] = answer[:-1].T, answer[-1]
    return made.eval()


def plain() -> Net:
    return net()


def wide_channel() -> Net:
    return net("wide channel")


def range_cut_off() -> Net:
    return net("range cut off")


def badly_rounded_weight() -> Net:
    return net("badly rounded weight")
