"""In: the name of a torchvision network. Out: that network, answering with plain tensors of a fixed input size."""

from __future__ import annotations

import copy
import difflib
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.models.plain import answering, marked
from hirelc_deploy.user_code import first_line

TWO_STAGE = ("fasterrcnn", "maskrcnn", "keypointrcnn")
ONE_STAGE = ("ssd", "retinanet", "fcos")
KINDS = {"segmentation", "detection"}
CLASSES = {"classification": 1000, "segmentation": 21, "detection": 91}
"""Outputs where `num_classes` is not given; those of segmentation and detection have a background among them."""

UNUSED_WEIGHTS = ("aux_classifier.",)
"""Prefixes of tensors in torchvision's own files of weights that only its training reads."""

BACKGROUND = "background"


def build(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Return a network of `torchvision.models` with random weights.

    Args:
        name: Of a classifier, a segmentation network or a one-stage detector.
        arguments: Of torchvision's function; for detectors also `input_size`, (channels, height, width): their anchors
            depend on it.
    """
    models: Any = importlib.import_module("torchvision.models")
    kind, known = _kind(models, name), dict(arguments)
    size = known.pop("input_size", None) if kind == "detection" else None
    without = {"weights": None, **({"weights_backbone": None} if kind in KINDS else {})}
    try:
        network: nn.Module = models.get_model(name, **without, **known)
    except Exception as error:  # whatever the function says to wrong arguments
        given = " ".join(f"{key}={value!r}" for key, value in known.items()) or "no arguments"
        raise InputError(f"--model torchvision:{name} with {given}: {first_line(error)}.") from None
    categories, count = _categories(models, name), known.get("num_classes", CLASSES[kind])
    if kind == "detection":
        return _detector(name, network.eval(), categories, count, size)
    names = categories if len(categories) == count else []
    options = {"task": kind, "outputs": ["out" if kind == "segmentation" else "output"]}
    if kind == "segmentation":
        network = answering(network, ("out",))
    return marked(network, options, names, _preprocessing(models, name))


class Heads(nn.Module):
    """A one-stage detector of torchvision between its transform and its choice of boxes.

    `forward` returns `cls_logits` (n, a, classes) and `bbox_regression` (n, a, 4) of all anchors. Its parameters have
    the names that they have in the whole detector.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Answer (n, 3, height, width) images."""
        answer = self._head(images)
        return {name: answer[name] for name in ("cls_logits", "bbox_regression")}

    def _head(self, images: Tensor) -> dict[str, Tensor]:
        features: Any = self.backbone(images)  # type: ignore[operator]
        maps = list(features.values()) if isinstance(features, Mapping) else [features]
        answer: dict[str, Tensor] = self.head(maps)  # type: ignore[operator]
        return answer


class CentredBoxes(Heads):
    """FCOS, whose boxes are distances to four edges (Tian et al. 2019), so that no anchors are needed to read them.

    `forward` returns (n, 4 + classes, a): centre x, centre y, width and height in pixels, and the geometric mean of a
    class's probability and the centre's, the background left out.
    """

    centres: Tensor
    sizes: Tensor

    def __init__(self, detector: nn.Module, anchors: Tensor) -> None:
        super().__init__(detector)
        self.register_buffer("centres", anchors[:, :2], persistent=False)
        self.register_buffer("sizes", anchors[:, 2:], persistent=False)

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """Answer (n, 3, height, width) images."""
        answer = self._head(images)
        before, after = answer["bbox_regression"].split(2, -1)  # left and top, right and bottom
        before, after = before * self.sizes, after * self.sizes
        scores = (answer["cls_logits"].sigmoid() * answer["bbox_ctrness"].sigmoid()).sqrt()[..., 1:]
        return torch.cat([self.centres + (after - before) / 2, before + after, scores], -1).transpose(1, 2)


def _detector(name: str, detector: Any, categories: Sequence[str], columns: int, size: Any) -> nn.Module:
    transform = detector.transform
    fixed = transform.fixed_size
    channels, height, width = _sizes(name, size or (3, *(fixed or (transform.min_size[0],) * 2)))
    anchors = _anchors(detector, channels, height, width)
    options: dict[str, Any] = {"task": "detection", "input_size": [channels, height, width]}
    pixels = torch.tensor([width, height, width, height])
    if name.startswith("fcos"):
        model: Heads = CentredBoxes(detector, anchors)
        options |= {"head": "yolo", "outputs": ["output"]}
    else:
        model = Heads(detector)
        options |= {
            "head": "ssd",
            "outputs": ["cls_logits", "bbox_regression"],
            "scores": "softmax" if name.startswith("ssd") else "sigmoid",
            "background": 0,
            "anchors": (anchors / pixels).numpy(),
            "variances": [1 / weight for weight in detector.box_coder.weights],
            "code_order": "xywh",
        }
    names = [text for text in categories if text != BACKGROUND] if columns == len(categories) else []
    config = {
        "input_size": (channels, height, width),
        "mean": tuple(transform.image_mean),
        "std": tuple(transform.image_std),
        "crop_pct": 1.0,
        "geometry": "stretch" if fixed else "letterbox",
        "interpolation": "bilinear",
    }
    return marked(model, options, names, config)


def _sizes(name: str, size: Any) -> tuple[int, int, int]:
    if (
        not isinstance(size, (tuple, list))
        or len(size) != 3
        or not all(type(edge) is int and edge > 0 for edge in size)
    ):
        raise InputError(f"--model torchvision:{name}: input_size is {size!r}; give [channels, height, width].")
    return size[0], size[1], size[2]


def _anchors(detector: Any, channels: int, height: int, width: int) -> Tensor:
    """Return (a, 4) centre x, centre y, width and height in pixels.

    The sizes of the feature maps come from a run without numbers (device meta), which takes no time at any size.
    """
    from torchvision.models.detection.image_list import ImageList

    with torch.no_grad():
        shadow = copy.deepcopy(detector.backbone).to("meta")
        features = shadow(torch.empty(1, channels, height, width, device="meta"))
    maps = features.values() if isinstance(features, Mapping) else [features]
    hollow = [torch.empty(1, 1, *one.shape[-2:]) for one in maps]
    corners = detector.anchor_generator(ImageList(torch.empty(1, 1, height, width), [(height, width)]), hollow)[0]
    return torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)


def _kind(models: Any, name: str) -> str:
    if name not in models.list_models():
        near = difflib.get_close_matches(name, models.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see torchvision.models.list_models()."
        raise InputError(f"--model torchvision:{name}: torchvision has no model of this name; {hint}")
    if name.startswith(TWO_STAGE):
        raise InputError(
            f"--model torchvision:{name}: its second stage runs on as many boxes as the first one finds, so its shapes "
            f"depend on the image; give a one-stage detector ({', '.join(ONE_STAGE)})."
        )
    place = models.get_model_builder(name).__module__.removeprefix("torchvision.models.").partition(".")[0]
    if place in KINDS:
        return str(place)
    if place in ("video", "optical_flow", "quantization"):
        raise InputError(f"--model torchvision:{name}: {place} is not supported; give a float model of single images.")
    return "classification"


def _categories(models: Any, name: str) -> list[str]:
    names = models.get_model_weights(name).DEFAULT.meta.get("categories", [])
    return [BACKGROUND if text == "__background__" else text for text in names]


def _preprocessing(models: Any, name: str) -> dict[str, Any]:
    """Return how torchvision prepares images for its own weights."""
    preset = models.get_model_weights(name).DEFAULT.transforms()
    edge = preset.resize_size[0]
    crop = getattr(preset, "crop_size", [edge])[0]
    return {
        "input_size": (3, crop, crop),
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
        "crop_pct": min(1.0, crop / edge),
        "interpolation": preset.interpolation.value,
    }
