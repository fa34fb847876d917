"""Does NVIDIA's compiler take our TensorRT files, and run in integers what they ask for? Asked without a GPU.

    pip install hirelc-deploy[tensorrt-rtx]
    python benchmarks/tensorrt_kernels.py --files float --out benchmarks/results/tensorrt_kernels.json

Ten networks with random weights (a compiler does not look at values) are exported, written in each form, and compiled
ahead of time. Kernels are counted, not timed: what is fast on a GPU only a GPU can say. Float files and ranges are kept
in the folder of --files, and taken from there the next time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx
import torch
from hirelc_backends import tensorrt_ahead
from record import provenance

from hirelc_deploy.compress.integer.calibration import Ranges, calibrate
from hirelc_deploy.compress.onnx_file.export import export_onnx, layer_of_node, set_static_batch
from hirelc_deploy.compress.onnx_file.export_tensorrt import write_tensorrt
from hirelc_deploy.errors import HirelcError
from hirelc_deploy.inputs.models.source import ModelSource

MODELS = {
    "resnet18": 224,
    "resnet50": 224,
    "tf_efficientnet_lite0": 224,
    "mobilenetv2_100": 224,
    "mobilenetv3_small_100": 224,
    "convnext_atto": 224,
    "mobilevit_xxs": 256,
    "deit_tiny_patch16_224": 224,
    "deit_small_patch16_224": 224,
    "swin_tiny_patch4_window7_224": 224,
}
"""timm name to the side of its images: the ten of the precision placement benchmark."""
FORMS = (("fp16", "float", "all"), ("int8 all", "int8", "all"), ("int8 weights+add", "int8", "weights+add"))
OTHER_CHIPS = ("SM75", "SM80", "SM89", "SM120", "SM121")
EVERYWHERE = ("resnet18", "mobilenetv2_100", "deit_tiny_patch16_224")
"""Compiled for the other chips too, and in FP8 for those that have it."""


COMMAND = "python benchmarks/tensorrt_kernels.py --files float --out benchmarks/results/tensorrt_kernels.json"


def float_file(name: str, folder: Path) -> tuple[Path, Ranges]:
    """Return the static float file of a network and the ranges of four random images, made where they are missing."""
    static, ranges = folder / f"{name}.onnx", folder / f"{name}.ranges.json"
    if not (static.exists() and ranges.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        model, side = ModelSource(name).build().eval(), MODELS[name]
        images = torch.randn(4, 3, side, side)
        with tempfile.TemporaryDirectory() as scratch:
            batched = Path(scratch) / "batched.onnx"
            export_onnx(model, images[:2], batched)
            set_static_batch(batched, static)
            calibrate(batched, [images.numpy()], "minmax").write(ranges)
    return static, Ranges.read(ranges)


def blocks_of(model: Path) -> list[str]:
    """Return the repeated parts of a network, longest name first: what ends in a number and has layers below it."""
    layers = layer_of_node(onnx.load(str(model), load_external_data=False)).values()
    found = {match[1] for layer in layers if (match := re.match(r"(.*\.\d+)\.", layer))}
    return sorted(found, key=lambda block: (-len(block), block))


def compiled(static: Path, ranges: Ranges, precision: str, pattern: str, chip: str) -> dict[str, Any]:
    """Return what became of one form of a file, or the compiler's words where it refused."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "model.onnx"
        write_tensorrt(static, out, ranges, lambda layer: precision, pattern=pattern)
        started = time.process_time()
        try:
            kernels = tensorrt_ahead.compile_kernels(out, chip)
        except HirelcError as error:
            return {"accepted": False, "reason": str(error).replace(str(out), out.name)}
        seconds = time.process_time() - started
        found = tensorrt_ahead.examine(out, kernels, blocks_of(static))
        size = out.stat().st_size
    per_block = [count for count in found.per_block.values() if count]
    spread = {"least": min(per_block), "median": statistics.median(per_block), "most": max(per_block)}
    return {
        "accepted": True,
        **{key: value for key, value in dataclasses.asdict(found).items() if key != "per_block"},
        "integer_share_of_products": round(sum(k.is_integer for k in kernels) / sum(k.is_product for k in kernels), 4),
        "kernels_per_block": spread,
        "file_bytes": size,
        "compile_cpu_seconds": round(seconds, 1),
    }


def main() -> int:
    """Compile everything and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=Path, required=True, help="folder for float files, kept")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    options = parser.parse_args()
    reason = tensorrt_ahead.availability()
    if reason is not None:
        sys.exit(f"tensorrt_kernels: {reason}")
    results: dict[str, Any] = {}
    for name in options.models:
        static, ranges = float_file(name, options.files)
        chip = tensorrt_ahead.ORIN_CLASS
        rows = {f"{form}, {chip}": compiled(static, ranges, *how, chip) for form, *how in FORMS}
        if name in EVERYWHERE:
            rows |= {f"int8 all, {chip}": compiled(static, ranges, "int8", "all", chip) for chip in OTHER_CHIPS}
            rows |= {f"fp8 all, {chip}": compiled(static, ranges, "fp8", "all", chip) for chip in ("SM86", "SM89")}
        results[name] = rows
        for form, row in rows.items():
            print(name, form, json.dumps({key: value for key, value in row.items() if key != "left_float"}), flush=True)
    record = {
        "question": "which kernels TensorRT-RTX compiles from our files ahead of time; nothing was timed or run",
        **provenance(COMMAND),
        "compiler": tensorrt_ahead.version(),
        "models": results,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
