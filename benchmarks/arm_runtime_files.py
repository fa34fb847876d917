"""Writes one network's files for one runtime, for arm_runtimes.py: float and int8, each by the runtime's own converter.

    PYTHONPATH=TOOLS/litert python benchmarks/arm_runtime_files.py litert cifar_vit WEIGHTS DATA FOLDER

Each step prints a line of JSON: the form, its file, its bytes, the seconds it took; or why there is no file. The
onnxruntime step comes first: others read its float.onnx and its images.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pretrained import cifar_resnet18, cifar_vit
from torch import nn

from hirelc_deploy.compress.integer import calibration, quantize
from hirelc_deploy.inputs.models.source import ModelSource
from hirelc_deploy.measure.backend import Precision

CALIBRATION_IMAGES, TEST_IMAGES = 64, 300
NETWORKS: dict[str, tuple[str, int, str]] = {
    "mobilenetv2_100": ("mobilenetv2_100.safetensors", 128, "imagenet.npz"),
    "cifar_resnet18": ("cifar_resnet18.safetensors", 32, "cifar10.npz"),
    "cifar_vit": ("vit_cifar10.safetensors", 32, "cifar10.npz"),
    "mobilenetv3_small_100": ("", 128, "imagenet.npz"),
}
"""Network to its weights (none: random ones, which say nothing about accuracy), pixels a side, and images."""
INPUT = "input"
CORTEX_A76 = {
    "features": ["asimddp", "asimdhp"],
    "architecture": "aarch64",
    "runtime": {"capabilities": ["FP32", "FP16", "INT8"]},
}
"""What a board with that CPU says of itself, to a backend's `precisions_on`."""

Form = tuple[str, Path | str]
"""The form's name, and its file or why there is none."""


def network(name: str, weights: Path) -> nn.Module:
    """Return the network with its published weights, or with random ones."""
    torch.manual_seed(0)
    makers: dict[str, Callable[[], nn.Module]] = {"cifar_resnet18": cifar_resnet18, "cifar_vit": cifar_vit}
    made = makers.get(name, lambda: ModelSource(name).build())()
    if file := NETWORKS[name][0]:
        made.load_state_dict(safetensors.torch.load_file(weights / file))
    return made.eval()


def normalisation(model: nn.Module) -> tuple[Any, Any]:
    """Return mean and deviation per channel of pixels in [0, 1]."""
    return model.pretrained_cfg["mean"], model.pretrained_cfg["std"]


def write_images(name: str, model: nn.Module, data: Path, folder: Path) -> None:
    """Write calibration.npy and test.npy as the network takes them, and labels.npy."""
    _, size, file = NETWORKS[name]
    with np.load(data / file) as sets:
        for kind, count in (("train", CALIBRATION_IMAGES), ("test", TEST_IMAGES)):
            pixels = torch.from_numpy(sets[f"x_{kind}"][:count]).permute(0, 3, 1, 2) / 255
            if pixels.shape[-1] != size:
                pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
            mean, std = (torch.tensor(value).reshape(1, 3, 1, 1) for value in normalisation(model))
            np.save(folder / f"{'calibration' if kind == 'train' else kind}.npy", ((pixels - mean) / std).numpy())
        np.save(folder / "labels.npy", sets["y_test"][:TEST_IMAGES])


def calibration_images(folder: Path) -> NDArray[np.float32]:
    """Return (CALIBRATION_IMAGES, 3, size, size)."""
    return np.load(folder / "calibration.npy")  # type: ignore[no-any-return]


def for_onnxruntime(name: str, model: nn.Module, folder: Path) -> Iterator[Form]:
    """Write the float file, ONNX Runtime's static quantization with signed activations, and ours."""
    from hirelc_backends.onnxruntime_arm import OnnxRuntimeArm

    from hirelc_deploy.compress.onnx_file import export

    images, batched, static = calibration_images(folder), folder / "batched.onnx", folder / "float.onnx"
    export.export_onnx(model, torch.from_numpy(images[:2]), batched)
    export.set_static_batch(batched, static)
    yield "float", static
    yield from ours(OnnxRuntimeArm().precisions_on(CORTEX_A76), folder, "signed")


def ours(precisions: Sequence[Precision], folder: Path, name: str) -> Iterator[Form]:
    """Write the float file with everything integer, and with layers and sums, in a device's integer precision."""
    ranges = calibration.calibrate(folder / "batched.onnx", [calibration_images(folder)])
    (target,) = (one for one in precisions if one.name == "int8")
    for form, pattern in (("int8 static", quantize.BLANKET), ("int8 ours", "weights+add")):
        file = folder / f"{name}_{form.replace(' ', '_')}.onnx"
        quantize.quantize(folder / "float.onnx", file, ranges, lambda _: "int8", target=target, pattern=pattern)
        yield form, file


def for_openvino(name: str, model: nn.Module, folder: Path) -> Iterator[Form]:
    """Write ours with unsigned activations, and NNCF's as OpenVINO reads it; the float file needs no converter."""
    from hirelc_backends.openvino_cpu import OpenvinoCpu

    yield from ours(OpenvinoCpu.precisions_on(CORTEX_A76), folder, "unsigned")
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # it would tell its makers
    import nncf
    import openvino as ov

    read = ov.Core().read_model(folder / "float.onnx")
    kind = nncf.ModelType.TRANSFORMER if "vit" in name else None
    dataset = nncf.Dataset([{INPUT: image[None]} for image in calibration_images(folder)])
    file = folder / "nncf.xml"
    ov.save_model(nncf.quantize(read, dataset, model_type=kind), file, compress_to_fp16=False)
    yield "int8 nncf", file


def for_ncnn(name: str, model: nn.Module, folder: Path) -> Iterator[Form]:
    """Write ncnn's two files by pnnx. What makes integers (ncnn2table, ncnn2int8) is in no package of a registry."""
    import pnnx

    size = NETWORKS[name][1]
    traced = folder / "ncnn" / "traced.pt"
    traced.parent.mkdir(exist_ok=True)
    torch.jit.trace(model, torch.zeros(1, 3, size, size)).save(str(traced))
    binary = Path(pnnx.EXEC_PATH)
    command = [str(binary), str(traced), f"inputshape=[1,3,{size},{size}]", "fp16=0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=traced.parent, check=False)
    file = traced.with_name("traced.ncnn.param")
    yield "float", file if file.exists() else f"pnnx: {done.stderr[-200:]}"
    yield "int8", "ncnn2table and ncnn2int8 are in no package; they must be compiled from source"


def for_mnn(name: str, model: nn.Module, folder: Path) -> Iterator[Form]:
    """Write MNN's float file, and its offline quantization from pictures on disk.

    MNN's tools install a package by pip without asking, to report their use to their makers; the module that does it is
    hidden from them.
    """
    sys.modules["MNN.tools.utils.log"] = None  # type: ignore[assignment]
    from MNN.tools import mnnconvert, mnnquant
    from PIL import Image

    size, (mean, std) = NETWORKS[name][1], normalisation(model)
    float_file, integer_file, pictures = folder / "float.mnn", folder / "int8.mnn", folder / "pictures"
    sys.argv = [
        *("mnnconvert", "-f", "ONNX", "--modelFile", str(folder / "float.onnx"), "--MNNModel", str(float_file)),
        *("--bizCode", "none"),
    ]
    mnnconvert.main()
    yield "float", float_file
    pictures.mkdir(exist_ok=True)
    for index, image in enumerate(calibration_images(folder)):
        pixels = image.transpose(1, 2, 0) * np.array(std, np.float32) + np.array(mean, np.float32)
        Image.fromarray((255 * pixels).round().clip(0, 255).astype(np.uint8)).save(pictures / f"{index:03}.png")
    settings = {
        "format": "RGB",
        "mean": [255 * value for value in mean],
        "normal": [1 / (255 * value) for value in std],
        "width": size,
        "height": size,
        "path": f"{pictures}/",
        "used_image_num": CALIBRATION_IMAGES,
        "feature_quantize_method": "KL",
        "weight_quantize_method": "MAX_ABS",
        "model": str(float_file),
    }
    (folder / "mnnquant.json").write_text(json.dumps(settings), "utf-8")
    sys.argv = ["mnnquant", str(float_file), str(integer_file), str(folder / "mnnquant.json")]
    mnnquant.main()
    yield "int8", integer_file


def for_litert(name: str, model: nn.Module, folder: Path) -> Iterator[Form]:
    """Write LiteRT's float file from torch, and AI Edge Quantizer's static int8 of it."""
    import litert_torch
    from ai_edge_quantizer import quantizer, recipe

    images, float_file, integer_file = calibration_images(folder), folder / "float.tflite", folder / "int8.tflite"
    litert_torch.convert(model, (torch.from_numpy(images[:1]),)).export(str(float_file))
    yield "float", float_file
    engine = quantizer.Quantizer(str(float_file))
    engine.load_quantization_recipe(recipe.static_wi8_ai8())
    from ai_edge_litert.interpreter import Interpreter

    signature = Interpreter(str(float_file)).get_signature_list()
    (key,), (entry,) = signature.keys(), next(iter(signature.values()))["inputs"]
    seen = engine.calibrate({key: [{entry: image[None]} for image in images]})
    integer_file.unlink(missing_ok=True)
    engine.quantize(seen).export_model(str(integer_file))
    yield "int8", integer_file


def for_executorch(name: str, model: nn.Module, folder: Path) -> Iterator[Form]:
    """Write ExecuTorch's float program for XNNPACK, and that of XNNPACKQuantizer's static int8."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    images = torch.from_numpy(calibration_images(folder))

    def write(module: nn.Module, file: Path) -> Path:
        program = to_edge_transform_and_lower(
            torch.export.export(module, (images[:1],)), partitioner=[XnnpackPartitioner()]
        )
        file.write_bytes(program.to_executorch().buffer)
        return file

    yield "float", write(model, folder / "float.pte")
    engine = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(torch.export.export(model, (images[:1],)).module(), engine)
    for image in images:
        prepared(image[None])
    yield "int8", write(convert_pt2e(prepared), folder / "int8.pte")


MAKERS = {
    "onnxruntime": for_onnxruntime,
    "openvino": for_openvino,
    "ncnn": for_ncnn,
    "mnn": for_mnn,
    "litert": for_litert,
    "executorch": for_executorch,
}


def main() -> int:
    """Write the files and print a line for each."""
    runtime, name = sys.argv[1:3]
    weights, data, folder = map(Path, sys.argv[3:6])
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    model = network(name, weights)
    if runtime == "onnxruntime":
        write_images(name, model, data, folder)
    started = time.process_time()
    for form, file in MAKERS[runtime](name, model, folder):
        row: dict[str, Any] = {"form": form}
        if isinstance(file, Path):
            beside = file.with_suffix(".bin")
            row |= {"file": str(file), "bytes": file.stat().st_size + (beside.stat().st_size if beside.exists() else 0)}
        else:
            row["refused"] = file
        print(json.dumps({**row, "cpu_seconds": round(time.process_time() - started, 2)}), flush=True)
        started = time.process_time()
    return 0


if __name__ == "__main__":
    sys.exit(main())
