"""Question: how much accuracy does each integer form of an uncut model lose, and how fast is it?

    python benchmarks/integer_accuracy.py --model benchmarks/pretrained.py:cifar_resnet56 \
        --weights weights/cifar_resnet56.safetensors --data npz:cifar10.npz --name resnet56

Forms: the float file; ONNX Runtime's static quantization, as it comes (one scale for the whole weight of a layer) and
with a scale per channel (plain ranges, everything integer); NNCF's as we configure it (`pip install nncf`; its row says
where it is not there); ours, placed by measurement; and with --guard POINTS ours with the layers turned back to float
that the accuracy guard finds. Forms are calibrated on the same images, answer all test images, and are timed side by
side. Records of several models are kept in one file.

The guard trains the placed file for --recovery-epochs while it is rounded (0: not at all) and takes the faster of that
and of float layers; the others get rows of their own. With --run a killed command goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from forms import judged, opened
from hirelc_backends.onnxruntime_cpu import OnnxRuntimeCpu
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from record import RESULTS, provenance

from hirelc_deploy.compress.integer import calibration, quantize
from hirelc_deploy.compress.integer.nncf_engine import quantize_with_nncf
from hirelc_deploy.config import DataConfig, JobConfig, ModelConfig, PreprocessConfig
from hirelc_deploy.evaluate.guarded import guarded, guarded_file
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.plan import CompressionPlan


class Reader(CalibrationDataReader):  # type: ignore[misc]  # ONNX Runtime has no types
    """Gives ONNX Runtime's quantizer its images."""

    def __init__(self, images: Sequence[NDArray[np.float32]]) -> None:
        self._images = iter(images)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """Return the next input of the model."""
        image = next(self._images, None)
        return None if image is None else {"input": image}


def peers(pipeline: Pipeline, folder: Path) -> dict[str, Path | str]:
    """Return name to the file that another tool makes of the uncut model, or to the reason why there is none."""
    batched, static = folder / "batched.onnx", folder / "static.onnx"
    pipeline.files.writer.exporter.write(pipeline.model, batched, static)
    images = [batch.numpy() for batch in pipeline.uncut.calibration_batches()]
    singles = [image[None] for batch in images for image in batch]

    def blanket(path: Path) -> None:
        ranges = dataclasses.replace(calibration.calibrate(batched, images, "minmax"), means={})
        integer = pipeline.files.writer.integer
        quantize.quantize(static, path, ranges, lambda _: "int8", target=integer, pattern=quantize.BLANKET)

    makers: dict[str, tuple[str, Callable[[Path], None]]] = {
        "onnxruntime static, its defaults": ("defaults", lambda path: _defaults(static, path, singles)),
        "onnxruntime static": ("blanket", blanket),
        "nncf configured": ("nncf", lambda path: quantize_with_nncf(static, path, singles)),
    }
    return {name: _made(folder / f"{file}.onnx", make) for name, (file, make) in makers.items()}


def _defaults(static: Path, path: Path, images: Sequence[NDArray[np.float32]]) -> None:
    quantize_static(str(static), str(path), Reader(images))


def _made(path: Path, make: Callable[[Path], None]) -> Path | str:
    """Return a file that ONNX Runtime opens, or the first line of why there is none."""
    try:
        make(path)
        OnnxRuntimeCpu().build(path)
    except Exception as error:  # other people's tools: anything can come out of them
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return path


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Return the record of one model."""
    arguments = {"num_classes": options.classes} if options.classes else {}
    size = tuple(map(int, options.input_size.split(","))) if options.input_size else None
    config = JobConfig(
        ModelConfig(options.model, options.weights, arguments),
        DataConfig(options.data, calibration_images=options.calibration_images),
        preprocess=PreprocessConfig(input_size=size),
        recovery_epochs=options.recovery_epochs,
        learning_rate=options.learning_rate,
    )
    guard: dict[str, Any] = {}
    with opened(config, options.run) as (pipeline, folder):
        files: dict[str, Path | str] = {
            "fp32": pipeline.files.reference,
            **peers(pipeline, folder),
            "ours": pipeline.files.placed,
        }
        if options.guard is not None:
            plan, found = guarded(pipeline, options.guard)
            files["ours, guarded"] = guarded_file(pipeline, plan)
            for other in found.others:
                plan = CompressionPlan({}, dict.fromkeys(other.floats, "float"), "auto", other.pattern, other.trained)
                what = "trained" if other.trained else f"{len(other.floats)} layers float, pattern {other.pattern}"
                files[f"ours, {what}"] = guarded_file(pipeline, plan)
            training = {"epochs": options.recovery_epochs, "learning_rate": options.learning_rate}
            guard = {"max_drop_points": options.guard, "training": training, **found.to_dict()}
        test = pipeline.data.take_test()
        made = {form: path for form, path in files.items() if isinstance(path, Path)}
        refused = {form: {"refused": path} for form, path in files.items() if isinstance(path, str)}
        return {
            **provenance("python " + " ".join(sys.argv)),
            "test_images": len(test),
            "calibration_images": len(pipeline.data.calibration),
            "placement": {
                "pattern": pipeline.files.placement.pattern,
                "float_layers": pipeline.files.placement.float_layers,
            },
            "guard": guard,
            "forms": {**judged(pipeline, made, test), **refused},
        }


def main() -> int:
    """Print and store one model's table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--classes", type=int)
    parser.add_argument("--input-size")
    parser.add_argument("--calibration-images", type=int)
    parser.add_argument("--guard", type=float, metavar="POINTS")
    parser.add_argument("--recovery-epochs", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--run", type=Path, help="folder of the run, kept; else it is gone afterwards")
    parser.add_argument("--name", required=True, help="of the model in the record")
    options = parser.parse_args()
    record = measured(options)
    path = RESULTS / "integer_accuracy.json"
    models = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**models, options.name: record}, indent=1) + "\n", "utf-8")
    for form, row in record["forms"].items():
        print(options.name, form, json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
