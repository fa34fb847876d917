"""Models from libraries and from memory: what comes out of them, and the sentence where nothing can."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn
from torchvision import models as torchvision_models

from hirelc_deploy.compress.branches import proven
from hirelc_deploy.compress.onnx_file.export import exported
from hirelc_deploy.compress.slicing import mask_model, rebuild, shapes, slice_model
from hirelc_deploy.demo.model import DemoNet
from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.answers import answers
from hirelc_deploy.graph.model_graph import Branch
from hirelc_deploy.graph.units import build_graph
from hirelc_deploy.inputs.models import hugging_face
from hirelc_deploy.inputs.models.given import GivenModel, source_of
from hirelc_deploy.inputs.models.source import ModelSource, preprocess_of
from hirelc_deploy.tasks.registry import make_task

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed (extra hf)"
)


def shaken(model: nn.Module) -> nn.Module:
    """Give norms and biases values that tell features apart."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 2)
                module.running_mean.normal_(0, 0.1)
    return model.eval()


# timm


def test_a_folder_and_a_hub_name_are_timms() -> None:
    for spec in ("hf-hub:timm/resnet18.a1_in1k", "hf_hub:me/mine", "local-dir:somewhere", "resnet18.a1_in1k"):
        assert ModelSource(spec).is_timm
    assert ModelSource("resnet18").is_installed
    assert not ModelSource("hf-hub:timm/resnet18.a1_in1k").is_installed
    assert ModelSource("hf-hub:me/mine").with_classes(4).arguments == {"num_classes": 4}


def test_a_tag_of_timm_is_taken_and_a_wrong_one_lists_the_right_ones() -> None:
    assert ModelSource("resnet10t.c3_in1k").load().num_classes == 1000
    with pytest.raises(InputError, match=r"no such weights of it; give resnet10t\.c3_in1k\.$"):
        ModelSource("resnet10t.best").load()


def test_the_hub_out_of_reach_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("An error happened.\nPlease check your connection.")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(InputError, match=r"^--model hf-hub:a/b: it could not be had \(OSError: An error happened\);"):
        ModelSource("hf-hub:a/b").load()


def test_a_folder_of_timm_loads(tmp_path: Path) -> None:
    model = timm.create_model("resnet10t", num_classes=3)
    config = {
        "architecture": "resnet10t",
        "num_classes": 3,
        "pretrained_cfg": {**model.pretrained_cfg, "num_classes": 3},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = ModelSource(f"local-dir:{tmp_path}", pretrained=True).load()
    image = torch.rand(2, 3, 64, 64)
    assert torch.equal(loaded(image), model.eval()(image))
    with pytest.raises(InputError, match="know 3 classes, not 4"):
        ModelSource(f"local-dir:{tmp_path}", pretrained=True, arguments={"num_classes": 4}).load()


# torchvision


def detector(name: str, side: int) -> tuple[Any, nn.Module]:
    """Return torchvision's own detector and ours with its weights."""
    torch.manual_seed(0)
    whole = shaken(torchvision_models.get_model(name, weights=None, weights_backbone=None, num_classes=4))
    ours = ModelSource(f"torchvision:{name}", arguments={"num_classes": 4, "input_size": [3, side, side]}).build()
    ours.load_state_dict(whole.state_dict())  # strictly: all names are torchvision's
    return whole, ours


@pytest.mark.parametrize(("name", "side"), [("ssdlite320_mobilenet_v3_large", 128), ("retinanet_resnet50_fpn", 64)])
def test_anchors_and_codes_of_a_detector_give_torchvisions_boxes(name: str, side: int) -> None:
    whole, ours = detector(name, side)
    task = make_task("detection", ("a", "b", "c"), {k: v for k, v in ours.task_options.items() if k != "task"})
    images = torch.rand(1, 3, side, side)
    found = task.answers(ours(images))
    task.check(found, None)
    candidates = task.head.candidates({"scores": found["cls_logits"], "boxes": found["bbox_regression"]})
    from torchvision.models.detection.image_list import ImageList

    features = list(whole.backbone(images).values())
    anchors = whole.anchor_generator(ImageList(images, [(side, side)]), features)[0]
    corners = whole.box_coder.decode_single(whole.head(features)["bbox_regression"][0], anchors)
    centre, size = candidates.boxes[0, :, :2] * side, candidates.boxes[0, :, 2:] * side
    assert torch.allclose(torch.cat([centre - size / 2, centre + size / 2], 1), corners, atol=1e-3)
    assert preprocess_of(ours).input_size == (3, side, side)


def test_boxes_and_scores_of_fcos_are_torchvisions() -> None:
    whole, ours = detector("fcos_resnet50_fpn", 64)
    images = torch.rand(1, 3, 64, 64)
    from torchvision.models.detection.image_list import ImageList

    features = list(whole.backbone(images).values())
    anchors = whole.anchor_generator(ImageList(images, [(64, 64)]), features)[0]
    heads = whole.head(features)
    corners = whole.box_coder.decode(heads["bbox_regression"][0], anchors)
    scores = (heads["cls_logits"].sigmoid() * heads["bbox_ctrness"].sigmoid()).sqrt()[0, :, 1:]
    found = answers(ours, images)["output"][0].T
    centre, size = found[:, :2], found[:, 2:4]
    assert torch.allclose(torch.cat([centre - size / 2, centre + size / 2], 1), corners, atol=1e-3)
    assert torch.allclose(found[:, 4:], scores, atol=1e-6)
    assert ours.task_options["head"] == "yolo"


def test_a_detector_of_torchvision_is_cut_under_its_own_names() -> None:
    model = shaken(
        ModelSource("torchvision:ssdlite320_mobilenet_v3_large", arguments={"input_size": [3, 64, 64]}).load()
    )
    image = torch.rand(1, 3, 64, 64)
    graph = build_graph(model, image)
    assert len(proven(model, graph, image).units) == len(graph.units) > 30
    assert "backbone.features.0.0.0" in {layer.name for layer in graph.layers}
    assert model.class_names[:2] == ("person", "bicycle")
    assert len(model.class_names) == 90


def test_torchvisions_segmentation_answers_with_out_alone_and_takes_weights_of_its_training(tmp_path: Path) -> None:
    name = "fcn_resnet50"
    trained = torchvision_models.get_model(name, weights=None, weights_backbone=None, num_classes=3, aux_loss=True)
    safetensors.torch.save_file(trained.state_dict(), tmp_path / "w.safetensors")
    source = ModelSource(f"torchvision:{name}", tmp_path / "w.safetensors", {"num_classes": 3})
    model, images = source.load(), torch.rand(1, 3, 32, 32)
    assert torch.equal(model(images), trained.eval()(images)["out"])
    assert model.task_options == {"task": "segmentation", "outputs": ["out"]}
    assert source.describe()["kind"] == "torchvision"


def test_classifiers_of_torchvision_know_their_preprocessing_and_classes() -> None:
    source = ModelSource("torchvision:squeezenet1_1")
    assert source.is_untrained
    model = source.load()
    assert (preprocess_of(model).crop_pct, model.class_names[0]) == (0.875, "tench")
    assert source.with_classes(5).arguments == {"num_classes": 5}
    assert not hasattr(source.with_classes(5).load(), "class_names")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("torchvision:fasterrcnn_resnet50_fpn", "second stage .* give a one-stage detector"),
        ("torchvision:resnet19", "no model of this name; did you mean"),
        ("torchvision:raft_small", "optical_flow is not supported"),
        ("hf:nowhere", "there is no nowhere/config.json"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(spec: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        ModelSource(spec).load()


def test_wrong_arguments_of_torchvision_are_one_sentence() -> None:
    with pytest.raises(InputError, match=r"torchvision:resnet18 with colour=1: TypeError"):
        ModelSource("torchvision:resnet18", arguments={"colour": 1}).load()
    with pytest.raises(InputError, match=r"input_size is 64; give \[channels, height, width\]"):
        ModelSource("torchvision:ssdlite320_mobilenet_v3_large", arguments={"input_size": 64}).load()


# ultralytics: its code is not ours, so a stand-in with the parts that are used


class FakeYolo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x).flatten(2)
        return y, [y * 2]


@pytest.fixture
def ultralytics(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("ultralytics")

    def yolo(name: str) -> Any:
        if not name.startswith("yolo"):
            raise FileNotFoundError(name)
        task = "segment" if name.endswith("-seg.yaml") else "detect"
        return SimpleNamespace(task=task, model=FakeYolo(), names={0: "cat", 1: "dog"})

    module.YOLO = yolo  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ultralytics", module)
    return module


@pytest.mark.usefixtures("ultralytics")
def test_a_network_of_ultralytics_answers_with_its_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {name: torch.full_like(value, 0.5) for name, value in FakeYolo().state_dict().items()}
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    source = ModelSource("ultralytics:yolov8n.yaml", tmp_path / "w.safetensors")
    model = source.load()
    assert answers(model, torch.zeros(2, 3, 4, 4))["output"].shape == (2, 6, 16)
    assert model.conv.bias[0].item() == 0.5
    assert (model.class_names, model.task_options["head"]) == (("cat", "dog"), "yolo")
    monkeypatch.chdir(tmp_path)
    torch.save(weights, "yolov8n.pt")  # plain tensors: read without running anything
    assert ModelSource("ultralytics:yolov8n.pt").load().conv.bias[0].item() == 0.5


@pytest.mark.usefixtures("ultralytics")
def test_what_ultralytics_pickles_is_read_as_tensors_averaged_ones_first(tmp_path: Path) -> None:
    raw, averaged = FakeYolo(), FakeYolo().half()
    nn.init.constant_(averaged.conv.bias, 0.5)
    torch.save({"model": raw, "ema": averaged, "train_args": Path("x")}, tmp_path / "yolov8n.pt")
    assert ModelSource(f"ultralytics:{tmp_path / 'yolov8n.pt'}").load().conv.bias[0].item() == 0.5


@pytest.mark.usefixtures("ultralytics")
def test_what_is_no_network_of_ultralytics_is_refused() -> None:
    for spec, said in {
        "ultralytics:yolov8n-seg.yaml": "its task is segment; give a network of detect or classify",
        "ultralytics:rocket.yaml": "rocket.yaml cannot be built",
        "ultralytics:yolov8n": "give NAME.yaml",
        "ultralytics:gone.pt": "no such weights file",
    }.items():
        with pytest.raises(InputError, match=said):
            ModelSource(spec).load()


def test_without_ultralytics_its_licence_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    with pytest.raises(InputError, match=r"AGPL-3\.0; .*'hirelc-deploy\[ultralytics\]'"):
        ModelSource("ultralytics:yolov8n.yaml").load()


# Several inputs


class Pair(nn.Module):
    def forward(self, left: Tensor, right: Tensor, *, scale: float = 1.0) -> Tensor:
        return left + right * scale


def test_a_model_of_two_inputs_is_refused_before_it_runs() -> None:
    with pytest.raises(InputError, match=r"^model Pair: its forward pass takes left, right; it must work with one"):
        build_graph(Pair(), torch.zeros(1, 3, 8, 8))
    with pytest.raises(InputError, match="takes left, right"):
        source_of(Pair())


# Models from memory


def test_a_given_model_is_copied_and_never_changed() -> None:
    theirs = DemoNet((8, 16), 1, 3).double().train().requires_grad_(False)
    source = source_of(theirs)
    model = source.load()
    with torch.no_grad():
        next(theirs.parameters()).fill_(7.0)
    assert theirs.training
    assert not model.training
    assert next(model.parameters()).dtype == torch.float32
    assert all(parameter.requires_grad for parameter in model.parameters())  # frozen as a whole: for inference
    assert next(source.build().parameters()).abs().max().item() < 7
    assert next(source.build().parameters()) is not next(model.parameters())
    described = source.describe()
    assert (described["kind"], described["spec"]) == ("module", "hirelc_deploy.demo.model.DemoNet")
    assert described["spec_sha256"] != source_of(theirs).describe()["spec_sha256"]
    assert described["spec_sha256"] == source.describe()["spec_sha256"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.scale = torch.full((4,), 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x * self.scale))


def test_shared_weights_stay_shared_and_inference_tensors_become_ordinary_ones() -> None:
    with torch.inference_mode():
        theirs = Tied()
    model = source_of(theirs).load()
    assert model.first.weight is model.second.weight
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), model.scale))
    model(torch.ones(1, 4)).sum().backward()


def test_wrappers_are_taken_off() -> None:
    plain = DemoNet((8, 16), 1, 3).eval()
    image = torch.rand(1, 3, 32, 32)
    for wrapped in (
        torch.compile(plain),
        nn.DataParallel(plain),
        torch.compile(nn.DataParallel(plain)),
        torch.optim.swa_utils.AveragedModel(plain),
    ):
        model = source_of(wrapped).load()
        assert type(model) is DemoNet
        assert torch.equal(model(image), plain(image))
    inner = nn.Sequential(torch.compile(nn.Conv2d(3, 4, 1)), nn.ReLU())
    assert list(source_of(inner).load().state_dict()) == ["0.weight", "0.bias"]


@pytest.mark.parametrize(
    "compiled",
    [
        lambda: torch.jit.script(nn.Linear(2, 2)),
        lambda: nn.Sequential(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))),
        lambda: torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)),
    ],
)
def test_compiled_models_are_refused_at_once(compiled: Callable[[], Any]) -> None:
    with pytest.raises(InputError, match=r"has no code that could be cut; give the torch\.nn\.Module"):
        source_of(compiled())


def test_functions_and_texts_become_sources() -> None:
    made = source_of(DemoNet, arguments={"widths": (8, 16), "blocks_per_stage": 1, "num_classes": 3})
    assert isinstance(made, GivenModel)
    assert made.load().fc.out_features == 3
    assert source_of("resnet18", "w.safetensors") == ModelSource("resnet18", Path("w.safetensors"))
    assert source_of(made) is made
    for wrong, said in {
        7: "give a torch.nn.Module, a function",
        int: "returns 0, which is not",
        json.loads: "TypeError: loads",
    }.items():
        with pytest.raises(InputError, match=said):
            source_of(wrong)  # type: ignore[call-overload]
    with pytest.raises(InputError, match="give no weights"):
        source_of(nn.ReLU(), "w.safetensors")
    with pytest.raises(InputError, match="arguments are for functions"):
        source_of(nn.ReLU(), arguments={"inplace": True})


def test_a_model_that_cannot_be_copied_is_one_sentence() -> None:
    model = nn.Linear(2, 2)
    model.cache = (x for x in ())
    with pytest.raises(InputError, match=r"cannot be copied \(TypeError: .*\); give a function that makes it"):
        source_of(model)


# transformers


def hugging_face_nets() -> dict[str, tuple[Callable[[], nn.Module], int, dict[str, Any]]]:
    """Return name to a small network with random weights, the side of its images, and its task."""
    import transformers as hf

    vit = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    resnet = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, layer_type="basic", out_features=["stage4"]
    )
    rt_resnet = hf.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1] * 4,
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    detection = {"task": "detection", "outputs": ["logits", "pred_boxes"], "head": "detr"}
    classification = {"task": "classification", "outputs": ["logits"]}
    return {
        "vit": (
            lambda: hf.ViTForImageClassification(hf.ViTConfig(image_size=32, patch_size=8, num_labels=5, **vit)),
            32,
            classification,
        ),
        "swin": (
            lambda: hf.SwinForImageClassification(
                hf.SwinConfig(image_size=64, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4, num_labels=5)
            ),
            64,
            classification,
        ),
        "segformer": (
            lambda: hf.SegformerForSemanticSegmentation(
                hf.SegformerConfig(
                    depths=[1] * 4,
                    hidden_sizes=[16, 32, 48, 64],
                    num_attention_heads=[1, 2, 3, 4],
                    mlp_ratios=[2] * 4,
                    decoder_hidden_size=32,
                    num_labels=5,
                )
            ),
            64,
            {"task": "segmentation", "outputs": ["logits"]},
        ),
        "detr": (
            lambda: hf.DetrForObjectDetection(
                hf.DetrConfig(
                    use_timm_backbone=False,
                    use_pretrained_backbone=False,
                    backbone=None,
                    backbone_config=resnet,
                    d_model=32,
                    encoder_layers=1,
                    decoder_layers=2,
                    encoder_attention_heads=4,
                    decoder_attention_heads=4,
                    encoder_ffn_dim=64,
                    decoder_ffn_dim=64,
                    num_queries=6,
                    num_labels=4,
                )
            ),
            64,
            {**detection, "scores": "softmax"},
        ),
        "rt_detr": (
            lambda: hf.RTDetrForObjectDetection(
                hf.RTDetrConfig(
                    backbone_config=rt_resnet,
                    use_timm_backbone=False,
                    encoder_hidden_dim=32,
                    encoder_in_channels=[16, 24, 32],
                    encoder_ffn_dim=64,
                    d_model=32,
                    num_queries=6,
                    decoder_in_channels=[32] * 3,
                    decoder_ffn_dim=64,
                    decoder_layers=1,
                    decoder_attention_heads=4,
                    encoder_attention_heads=4,
                    num_labels=4,
                    num_denoising=0,
                    anchor_image_size=[64, 64],
                )
            ),
            64,
            {**detection, "scores": "sigmoid"},
        ),
        "convnextv2": (
            lambda: hf.ConvNextV2ForImageClassification(
                hf.ConvNextV2Config(hidden_sizes=[16, 32, 48, 64], depths=[1] * 4, num_labels=5)
            ),
            64,
            classification,
        ),
        "depth": (
            lambda: hf.DPTForDepthEstimation(
                hf.DPTConfig(
                    image_size=32,
                    patch_size=8,
                    backbone_out_indices=[0, 1, 2, 3],
                    neck_hidden_sizes=[16, 16, 32, 32],
                    fusion_hidden_size=16,
                    is_hybrid=False,
                    backbone_config=None,
                    **{**vit, "num_hidden_layers": 4},
                )
            ),
            32,
            {"task": "regression", "outputs": ["predicted_depth"], "flips": True},
        ),
        "embedding": (
            lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(image_size=32, patch_size=8, **vit)),
            32,
            {"task": "embedding", "outputs": ["pooler_output"]},
        ),
    }


UNITS = {"vit": 5, "swin": 6, "segformer": 16, "detr": 19, "rt_detr": 40, "depth": 15, "embedding": 4, "convnextv2": 8}
"""The fewest units that were found in each network; all of them are proven to cut exactly."""


@needs_transformers
@pytest.mark.parametrize("name", UNITS)
def test_a_network_of_transformers_answers_its_task_alone_and_is_cut_exactly(name: str) -> None:
    make, side, options = hugging_face_nets()[name]
    theirs, images = shaken(make()), torch.rand(2, 3, side, side)
    model = source_of(theirs).load()
    assert model.task_options == options
    found = list(answers(model, images).values())
    whole = theirs(images)
    for wanted, mine in zip(options["outputs"], found, strict=True):
        assert torch.allclose(mine, getattr(whole, wanted), atol=1e-5)  # theirs has another form of attention
    graph = build_graph(model, images)
    assert len(graph.units) >= UNITS[name]
    assert len(proven(model, graph, images).units) == len(graph.units)
    assert not theirs._forward_hooks


@needs_transformers
def test_attentions_of_transformers_go_as_a_whole_and_come_back_from_a_fresh_model() -> None:
    make, side, _ = hugging_face_nets()["vit"]
    source, images = source_of(shaken(make())), torch.rand(2, 3, side, side)
    model = source.load()
    graph = proven(model, build_graph(model, images), images)
    branches = {unit.branch.module: unit for unit in graph.units if unit.branch}
    assert {"vit.layers.0.attention", "vit.layers.1.attention"} < set(branches)
    kept = {branches["vit.layers.0.attention"].name: np.arange(0)}
    small = slice_model(model, graph, kept)
    again = rebuild(source.build(), shapes(small), small.state_dict())
    assert torch.equal(again(images), small(images))
    assert torch.allclose(small(images), mask_model(model, graph, kept)(images), atol=1e-5)


@needs_transformers
def test_a_detector_of_transformers_is_exported_with_its_outputs_by_name() -> None:
    make, side, _ = hugging_face_nets()["detr"]
    proto = exported(source_of(shaken(make())).load(), torch.rand(1, 3, side, side)).proto
    assert [value.name for value in proto.graph.output] == ["logits", "pred_boxes"]


@needs_transformers
def test_the_pooled_channels_of_swin_are_cut() -> None:
    make, side, _ = hugging_face_nets()["swin"]
    model = source_of(shaken(make())).load()
    graph = build_graph(model, torch.rand(1, 3, side, side))
    assert [layer.layer for layer in graph.kept_whole] == ["classifier"]


@pytest.fixture
def vit_folder(tmp_path: Path) -> Path:
    import transformers as hf

    make, _, _ = hugging_face_nets()["vit"]
    model = shaken(make())
    model.config.id2label = dict(enumerate("abcde"))
    model.half().save_pretrained(tmp_path)
    hf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    return tmp_path


@needs_transformers
def test_a_folder_loads_with_its_weights_names_and_preprocessing(vit_folder: Path) -> None:
    import transformers as hf

    source = ModelSource(f"hf:{vit_folder}")
    model, images = source.load(), torch.rand(2, 3, 32, 32)
    theirs = hf.ViTForImageClassification.from_pretrained(vit_folder, dtype=torch.float32)
    assert torch.allclose(model(images), theirs(images).logits, atol=1e-5)
    assert model.class_names == tuple("abcde")
    chosen = preprocess_of(model)
    assert (chosen.input_size, chosen.mean) == ((3, 32, 32), (0.5,) * 3)
    assert (chosen.interpolation, chosen.geometry) == ("bilinear", "stretch")
    assert preprocess_of(model, None, {"geometry": "letterbox"}).geometry == "letterbox"
    assert not source.is_untrained
    assert source.build().state_dict().keys() == model.state_dict().keys() == theirs.state_dict().keys()
    described = source.describe()
    assert (described["kind"], described["transformers_version"]) == ("hf", hf.__version__)
    (vit_folder / "preprocessor_config.json").write_text("{}")
    assert source.describe()["spec_sha256"] != described["spec_sha256"]


OLDER_NAMES = {
    "vit.layers": "vit.encoder.layer",
    "q_proj": "attention.query",
    "k_proj": "attention.key",
    "v_proj": "attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
"""Under which transformers saved a ViT before its version 5; the files of the Hub have them."""


@needs_transformers
def test_weights_come_from_another_file_or_a_state_dict_too_and_nothing_is_unpickled(vit_folder: Path) -> None:
    images = torch.rand(1, 3, 32, 32)
    source = ModelSource(f"hf:{vit_folder}")
    model = source.load()
    own = {name: value * 2 for name, value in model.state_dict().items()}
    older = {}
    for name, tensor in own.items():
        for now, then in OLDER_NAMES.items():
            name = name.replace(now, then)  # noqa: PLW2901
        older[name] = tensor
    for number, tensors in enumerate((own, older)):
        file = vit_folder / f"{number}.safetensors"
        safetensors.torch.save_file(tensors, file)
        assert torch.equal(ModelSource(source.spec, file).load().classifier.weight, own["classifier.weight"])
    (vit_folder / "model.safetensors").unlink()
    torch.save(dict(model.state_dict()), vit_folder / "pytorch_model.bin")
    assert torch.equal(source.load()(images), model(images))
    torch.save({"model": SimpleNamespace(a=1)}, vit_folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin: refused, it holds more than plain tensors"):
        source.load()


@needs_transformers
def test_arguments_replace_entries_of_the_config(vit_folder: Path) -> None:
    source = ModelSource(f"hf:{vit_folder}", arguments={"num_labels": 7})
    assert source.build().classifier.out_features == 7
    with pytest.raises(InputError, match="not the weights of ViTForImageClassification"):
        source.load()
    with pytest.raises(InputError, match="ViTConfig has no entry 'colour'"):
        ModelSource(f"hf:{vit_folder}", arguments={"colour": 1}).build()


@needs_transformers
def test_folders_that_cannot_be_used_are_one_sentence(vit_folder: Path, tmp_path: Path) -> None:
    spec, config = f"hf:{vit_folder}", vit_folder / "config.json"
    whole = json.loads(config.read_text())
    tensors = safetensors.torch.load_file(vit_folder / "model.safetensors")

    def said(text: str) -> None:
        with pytest.raises(InputError, match=text):
            ModelSource(spec).load()

    headless = {name: value for name, value in tensors.items() if not name.startswith("classifier")}
    safetensors.torch.save_file(headless, vit_folder / "model.safetensors")
    said(r"lacks classifier\.bias and 1 more tensors of ViTForImageClassification, which would be random")
    safetensors.torch.save_file(tensors, vit_folder / "model.safetensors")
    (vit_folder / "preprocessor_config.json").rename(vit_folder / "kept.json")
    said(r"there is no preprocessor_config\.json, so nobody knows the mean and size")
    for change, text in (
        ({"architectures": ["ViTForMaskedImageModeling"]}, "is for none of classification, semantic segmentation"),
        ({"architectures": ["TheirOwnNet"]}, "has no architecture 'TheirOwnNet'; code that a folder brings is not run"),
        ({"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}}, "transformers cannot use it"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "BertModel is for none of"),
    ):
        config.write_text(json.dumps({**whole, **change}))
        with pytest.raises(InputError, match=text):
            ModelSource(spec).build()
    config.write_text(json.dumps({"architecture": "resnet18"}))
    said("it is a folder of timm; give --model local-dir:")
    config.write_text("{")
    said(r"config\.json: not JSON")


@needs_transformers
def test_channels_in_reverse_order_are_reversed_inside() -> None:
    import transformers as hf

    make, side, _ = hugging_face_nets()["vit"]
    theirs, images = shaken(make()), torch.rand(1, 3, side, side)
    model = hugging_face._as_plain(make().eval(), {"size": side, "image_mean": [0.0], "do_flip_channel_order": True})
    model.load_state_dict(theirs.state_dict())
    assert torch.allclose(model(images), theirs(images.flip(1)).logits, atol=1e-5)
    assert hf.__version__


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"install it with pip install 'hirelc-deploy\[hf\]'"):
        ModelSource(f"hf:{tmp_path}").load()


NORMALISED = {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}


@pytest.mark.parametrize(
    ("settings", "size", "geometry", "share"),
    [
        ({"size": {"height": 224, "width": 192}}, (224, 192), "stretch", 1.0),
        ({"size": 224}, (224, 224), "stretch", 1.0),
        ({"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": 224}, (224, 224), "crop", 0.875),
        ({"size": 256, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}}, (224, 224), "crop", 0.875),
        ({"size": {"height": 256, "width": 256}, "do_center_crop": True, "crop_size": 224}, (224, 224), "crop", 0.875),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.9}, (224, 224), "crop", 0.9),
        ({"size": {"shortest_edge": 384}, "crop_pct": 0.9}, (384, 384), "stretch", 1.0),
        ({"size": {"shortest_edge": 800, "longest_edge": 1333}}, (800, 800), "letterbox", 1.0),
        ({"size": {"height": 518, "width": 518}, "keep_aspect_ratio": True}, (518, 518), "crop", 1.0),
        ({"do_resize": False}, (96, 64), "crop", 1.0),
    ],
)
def test_settings_of_image_processors_in_timms_words(
    settings: dict[str, Any], size: tuple[int, int], geometry: str, share: float
) -> None:
    config = SimpleNamespace(num_channels=3, image_size=[96, 64])
    found = hugging_face.preprocessing({**NORMALISED, **settings}, config)
    assert found["input_size"] == (3, *size)
    assert (found["geometry"], found["crop_pct"]) == (geometry, share)
    assert found["mean"] == pytest.approx((0.5,) * 3)


@pytest.mark.parametrize(
    ("settings", "mean", "std"),
    [
        ({"do_normalize": False}, 0.0, 1.0),
        ({"do_rescale": False}, 0.5 / 255, 0.25 / 255),
        ({"rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False}, 0.5, 0.5),
    ],
)
def test_normalisation_is_of_pixels_in_zero_to_one(settings: dict[str, Any], mean: float, std: float) -> None:
    found = hugging_face.preprocessing({**NORMALISED, "size": 8, **settings}, SimpleNamespace())
    assert found["mean"] == pytest.approx((mean,) * 3)
    assert found["std"] == pytest.approx((std,) * 3)


def test_an_image_processor_without_a_size_is_one_sentence() -> None:
    with pytest.raises(InputError, match="no size of images follows from size None"):
        hugging_face.preprocessing(NORMALISED, SimpleNamespace())


class Pooled1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = nn.functional.max_pool1d(self.conv(x).flatten(2), 2)
        return self.head(nn.functional.adaptive_avg_pool1d(tokens, 1).flatten(1))


def test_channels_pass_pooling_over_tokens() -> None:
    model, image = Pooled1d(), torch.rand(1, 3, 16, 16)
    graph = build_graph(model, image)
    assert [unit.name for unit in graph.units] == ["conv"]
    assert len(proven(model, graph, image).units) == 1


class Told(nn.Module):
    """A branch as attentions are written: its tensor comes by name, its answer with a second one that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.narrow(self.wide(hidden).relu()), hidden.new_zeros(1)


class Teller(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.told, self.head = nn.Conv2d(3, 8, 4, 4), Told(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv(x).mean((2, 3))
        answer, _ = self.told(hidden=hidden)
        return self.head(hidden + answer)


def test_a_branch_that_answers_with_a_tuple_can_be_left_out() -> None:
    model, image = Teller().eval(), torch.rand(2, 3, 8, 8)
    graph = proven(model, build_graph(model, image), image)
    unit = graph.unit("told.wide")
    assert unit.branch == Branch("told", passes=False, more=1)
    small = slice_model(model, graph, {unit.name: np.arange(0)})
    assert torch.allclose(small(image), model.head(model.conv(image).mean((2, 3))))
    assert shapes(small)["told.more"] == 1
    assert torch.equal(rebuild(Teller().eval(), shapes(small), small.state_dict())(image), small(image))
