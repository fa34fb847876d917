"""Question: which networks of `transformers` are cut exactly, what stays whole and why, and do their files run?

    pip install transformers
    python benchmarks/transformers_networks.py --mobilenet-weights weights/mobilenetv2_100.safetensors

MobileNetV2 has ImageNet weights, under the names that timm gives them, and must answer as timm's network does. The
others are built from a configuration with random weights and random norm statistics. Each is traced, every unit is
proven, half of every unit is cut at random places and compared with its masked twin (both in double precision where the
code can), exported, compared with torch, made an integer file, and run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hirelc_backends.onnxruntime_cpu import OnnxRuntimeCpu
from record import RESULTS, provenance
from safetensors.torch import load_file
from torch import Tensor, nn

from hirelc_deploy.compress import slicing
from hirelc_deploy.compress.branches import proven
from hirelc_deploy.compress.integer import calibration, quantize
from hirelc_deploy.compress.onnx_file import export
from hirelc_deploy.graph.answers import answers
from hirelc_deploy.graph.units import build_graph
from hirelc_deploy.inputs.models.given import source_of
from hirelc_deploy.measure.accuracy import finite, operators

Made = Callable[[], nn.Module]


def networks() -> dict[str, tuple[Made, int]]:
    """Return name to what makes the network, and the side of its input in pixels."""
    import transformers as hf

    small = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768}
    backbone = hf.RTDetrResNetConfig(layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512],
                                     out_features=["stage2", "stage3", "stage4"])  # fmt: skip
    detr = hf.DetrConfig(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, num_labels=20,
                         backbone_config=hf.ResNetConfig(out_features=["stage4"]),
                         encoder_layers=3, decoder_layers=3)  # fmt: skip
    rt_detr = hf.RTDetrConfig(backbone_config=backbone, encoder_in_channels=[128, 256, 512], num_labels=20,
                              decoder_layers=3, anchor_image_size=None)  # fmt: skip
    return {
        "ViTForImageClassification": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**small, num_labels=100)), 224),
        "SwinForImageClassification": (lambda: hf.SwinForImageClassification(hf.SwinConfig(num_labels=100)), 224),
        "SegformerForSemanticSegmentation": (
            lambda: hf.SegformerForSemanticSegmentation(hf.SegformerConfig(num_labels=19)),
            256,
        ),
        "DetrForObjectDetection": (lambda: hf.DetrForObjectDetection(detr), 256),
        "RTDetrForObjectDetection": (lambda: hf.RTDetrForObjectDetection(rt_detr), 256),
    }


def mobilenet(weights: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Return MobileNetV2 of transformers with timm's weights, and how far its logits are from timm's."""
    import timm
    import transformers as hf

    theirs = timm.create_model("mobilenetv2_100").eval()
    theirs.load_state_dict(load_file(weights))
    config = hf.MobileNetV2Config(num_labels=1000, tf_padding=False, layer_norm_eps=1e-5)
    ours = hf.MobileNetV2ForImageClassification(config).eval()
    # The same layers in the same order: tensors are paired by that.
    given = [tensor for tensor in theirs.state_dict().values() if tensor.ndim]
    wanted = [name for name, tensor in ours.state_dict().items() if tensor.ndim]
    ours.load_state_dict(dict(zip(wanted, given, strict=True)), strict=False)
    images = torch.randn((4, 3, 224, 224), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        apart = float((ours(images).logits - theirs(images)).abs().max())
    if apart > 1e-4:
        sys.exit(f"{weights}: transformers answers otherwise than timm with these weights, by {apart:.2g}")
    return ours, {"largest_difference_from_timm": apart}


@torch.no_grad()
def shaken(model: nn.Module) -> nn.Module:
    """Give norms statistics and weights of their own, so that nothing is removed without trace."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm) or hasattr(module, "running_mean"):
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if tensor.is_floating_point():
                    low = 0.5 if name in ("weight", "running_var") else -0.5
                    tensor.uniform_(low, low + 1.0, generator=generator)
    return model


def row(model: nn.Module, side: int) -> dict[str, Any]:
    """Return what becomes of one network."""
    model = source_of(model).load().eval()
    images = torch.randn((2, 3, side, side), generator=torch.Generator().manual_seed(0))
    started = time.monotonic()
    graph = proven(model, build_graph(model, images), images)
    keep = slicing.uniform_plan(graph, 0.5, "float").keep
    rng = np.random.default_rng(0)
    kept = {unit.name: np.sort(rng.choice(unit.size, keep[unit.name], replace=False)) for unit in graph.units}
    double, pictures, _ = slicing.in_double(model, images)
    difference = slicing.difference(double, graph, kept, pictures)
    small = slicing.slice_model(model, graph, kept)
    return {
        "input": side,
        "params": graph.params,
        "params_kept": sum(p.numel() for p in small.parameters()) / graph.params,
        "units": len(graph.units),
        "kinds": dict(Counter(unit.kind for unit in graph.units)),
        "branches": sum(unit.branch is not None for unit in graph.units),
        "difference": difference,
        "kept_whole": dict(Counter(one.reason for one in graph.kept_whole)),
        "seconds": round(time.monotonic() - started, 1),
        **files(small, images),
    }


def files(small: nn.Module, images: Tensor) -> dict[str, Any]:
    """Return whether the float file equals torch and the integer file runs, and how many operators are integer."""
    backend = OnnxRuntimeCpu()
    with tempfile.TemporaryDirectory() as folder:
        batched, static, integer = (Path(folder) / f"{name}.onnx" for name in ("batched", "static", "integer"))
        try:
            export.export_onnx(small, images, batched)  # raises where ONNX Runtime and torch differ
            export.set_static_batch(batched, static)
            ranges = calibration.calibrate(batched, [images.numpy()], "minmax")
            target = next(one for one in backend.precisions() if one.name == "int8")
            quantize.quantize(static, integer, ranges, lambda _: "int8", target=target, pattern="all")
            runner = backend.build(integer)
            outputs = finite(runner.infer(images.numpy()))
        except Exception as error:
            return {"exported": batched.exists(), "integer_runs": False, "reason": f"{type(error).__name__}: {error}"}
        count = operators(runner, images[:1].numpy())
        same = list(outputs) == list(answers(small, images))
        return {"exported": True, "integer_runs": True, "names_kept": same, **count._asdict()}


def main() -> int:
    """Print and store the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mobilenet-weights", type=Path)
    options = parser.parse_args()
    rows = {}
    if options.mobilenet_weights:
        model, facts = mobilenet(options.mobilenet_weights)
        rows["MobileNetV2ForImageClassification"] = {**row(model, 224), **facts}
    for name, (make, side) in networks().items():
        torch.manual_seed(0)
        rows[name] = row(shaken(make()), side)
    record = {**provenance("python " + " ".join(sys.argv)), "networks": rows}
    (RESULTS / "transformers_networks.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    for name, found in rows.items():
        print(
            f"{name:<36} {found['units']:>3} units, {found['branches']} branches, sliced against masked "
            f"{found['difference']:.1e}, integer file {'runs' if found['integer_runs'] else found['reason']}"
        )
        for reason, count in found["kept_whole"].items():
            print(f"    {count} layers whole: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
