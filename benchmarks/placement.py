"""Question: how fast is what we make of an uncut model, beside FP32 and what ONNX Runtime and NNCF make of it?

    python benchmarks/placement.py --folder runs/placement files resnet18 deit_tiny_patch16_224
    python benchmarks/placement.py --folder runs/placement time resnet18 deit_tiny_patch16_224 --name placement

`files` writes each model's float file, the same rewritten (what FP32 gains by that alone), ONNX Runtime's own static
quantization (pattern `all`, which a test pins to `quantize_static`) and NNCF's, as it is and as we configure it
(`pip install nncf`; left out where it is not there). `time` places the precision by measurement and times all files of
a model in one interleaved run. Weights and images are random: nothing here is about accuracy, and no layer is cut.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from hirelc_backends.onnxruntime_cpu import OnnxRuntimeCpu
from numpy.typing import NDArray
from record import RESULTS, provenance

from hirelc_deploy.compress.integer import calibration, quantize
from hirelc_deploy.compress.integer.nncf_engine import quantize_with_nncf
from hirelc_deploy.compress.integer.placement import changes, place
from hirelc_deploy.compress.onnx_file import export, rewrite
from hirelc_deploy.errors import ExportError, InputError
from hirelc_deploy.evaluate.cutting import divergence, tensors
from hirelc_deploy.graph.answers import Answers
from hirelc_deploy.inputs.models.source import ModelSource
from hirelc_deploy.measure.backend import Precision
from hirelc_deploy.measure.protocol import QUICK, Timing, TimingLimits, compare
from hirelc_deploy.tasks.classification import CLASSIFICATION

MODELS = (
    *("resnet50", "resnet18", "efficientnet_lite0", "mobilenetv2_100", "deit_small_patch16_224"),
    *("swin_tiny_patch4_window7_224", "deit_tiny_patch16_224", "convnext_atto", "mobilevit_xxs"),
    "mobilenetv3_small_100",
)
IMAGES = 8
OTHERS = ("fp32", "fp32 rewritten", "onnxruntime static", "nncf", "nncf configured")


def integer_precision() -> Precision:
    """Return the integer precision of this machine."""
    return next(precision for precision in OnnxRuntimeCpu().precisions() if precision.name == "int8")


def make_files(name: str, folder: Path) -> None:
    """Write everything about a model that needs no clock; files that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    dynamic, static = folder / "dynamic.onnx", folder / "fp32.onnx"
    if not static.exists():
        torch.manual_seed(0)
        model = ModelSource(name).build()
        size = model.pretrained_cfg["input_size"]
        export.export_onnx(model, torch.randn((2, *size)), dynamic)
        export.set_static_batch(dynamic, static)
    images = random_images(static)
    if not (folder / "ranges.json").exists():
        calibration.calibrate(dynamic, [images]).write(folder / "ranges.json")
    ranges = calibration.Ranges.read(folder / "ranges.json")
    proto = onnx.load(str(static))
    rewrite.rewrite(proto)
    (folder / "fp32 rewritten.onnx").write_bytes(proto.SerializeToString())
    target = integer_precision()
    blanket = folder / "onnxruntime static.onnx"
    quantize.quantize(static, blanket, ranges, lambda _: "int8", target=target, pattern=quantize.BLANKET)
    for engine, configured in (("nncf", False), ("nncf configured", True)):
        out = folder / f"{engine}.onnx"
        if out.exists():
            continue
        try:
            quantize_with_nncf(static, out, list(images[:, None]), for_onnxruntime=configured)
            OnnxRuntimeCpu().build(out).infer(images[:1])
        except InputError as error:
            print(f"{name}: {error}", file=sys.stderr)
        except ExportError as error:
            refused(folder, engine, str(error))
        except Exception as error:  # what the runtime raises while it runs shares no base below Exception
            refused(folder, engine, f"ONNX Runtime does not run it ({str(error).splitlines()[0][-160:]})")


def refused(folder: Path, engine: str, reason: str) -> None:
    """Note that a file cannot be had or does not run, and why."""
    (folder / f"{engine}.onnx").unlink(missing_ok=True)
    (folder / f"{engine}.refused").write_text(reason, "utf-8")


def random_images(static: Path) -> NDArray[np.float32]:
    """Return (IMAGES, channels, height, width) standard normal values for a file of batch one."""
    shape = [d.dim_value for d in onnx.load(str(static)).graph.input[0].type.tensor_type.shape.dim]
    return np.random.default_rng(0).standard_normal((IMAGES, *shape[1:]), np.float32)


def time_model(folder: Path, limits: TimingLimits) -> dict[str, Any]:
    """Place the precision, then time all files of a model side by side; return the model's record."""
    backend, static = OnnxRuntimeCpu(), folder / "fp32.onnx"
    ranges, target = calibration.Ranges.read(folder / "ranges.json"), integer_precision()

    def build(pattern: str, floats: frozenset[str]) -> Path:
        path = folder / "trials" / f"{pattern}-{abs(hash(floats)):x}.onnx"
        path.parent.mkdir(exist_ok=True)
        quantize.quantize(
            static, path, ranges, lambda n: "float" if n in floats else "int8", target=target, pattern=pattern
        )
        return path

    def quick(files: Sequence[Path]) -> list[Timing]:
        return compare(files, backend, limits=QUICK)

    images = random_images(static)

    def answers(path: Path) -> Answers:
        return tensors(backend.build(path, 1).infer(images))

    exact = answers(static)
    started = time.monotonic()
    tried = changes(onnx.load(str(static)))
    placed = place(
        static, tried, build, quick, divergence=lambda path: divergence(CLASSIFICATION, exact, answers(path))
    )
    seconds = time.monotonic() - started
    (folder / "placed.onnx").write_bytes(build(placed.pattern, frozenset(placed.float_layers)).read_bytes())
    names = [name for name in (*OTHERS, "placed") if (folder / f"{name}.onnx").exists()]
    timings = dict(zip(names, compare([folder / f"{n}.onnx" for n in names], backend, limits=limits), strict=True))
    best = min((name for name in names if name != "placed"), key=lambda name: timings[name].ratio)
    # The interval of a ratio of two ratios, each taken round by round against the same FP32 runs.
    pair = compare([folder / f"{best}.onnx", folder / "placed.onnx"], backend, limits=limits)[1]
    return {
        "ms": {name: round(timing.median_ms, 3) for name, timing in timings.items()},
        "speedup_over_fp32": {name: round(1 / timing.ratio, 3) for name, timing in timings.items()},
        "refused": {path.stem: path.read_text("utf-8") for path in sorted(folder.glob("*.refused"))},
        "best_of_the_others": best,
        "ours_over_best": round(1 / pair.ratio, 3),
        "ours_over_best_interval": [round(1 / pair.ratio_high, 3), round(1 / pair.ratio_low, 3)],
        "verdict": pair.verdict,
        "contended": any(timing.contended for timing in timings.values()),
        "rounds": timings["placed"].rounds,
        "placement_seconds": round(seconds, 1),
        "placement": placed.to_dict(),
    }


def main() -> int:
    """Write files, or time them and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("files", "time"))
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument(
        "--name", help="of the record; models that it holds stay, with the commit and processor of theirs"
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="at most, for each of a model's two final timings")
    options = parser.parse_args()
    target = RESULTS / f"{options.name}.json"
    record: dict[str, Any] = json.loads(target.read_text("utf-8")) if options.name and target.exists() else {}
    for name in options.models:
        folder = options.folder / name
        if options.step == "files":
            make_files(name, folder)
            print(name, flush=True)
            continue
        taken = provenance("python " + " ".join(sys.argv))
        found = time_model(folder, TimingLimits(processes=3, min_rounds=60, max_rounds=300, seconds=options.seconds))
        found |= {"commit": taken["commit"], "date": taken["date"], "cpu": taken["machine"]["cpu_model"]}
        models = {**record.get("models", {}), name: found}
        gains = [model["ours_over_best"] for model in models.values()]
        record = {
            **taken,
            "versions": OnnxRuntimeCpu().versions(),
            "geometric_mean_over_best": round(math.exp(sum(map(math.log, gains)) / len(gains)), 3),
            "models": models,
        }
        if options.name:
            target.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        print(json.dumps({name: {k: v for k, v in found.items() if k != "placement"}}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
