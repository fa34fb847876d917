"""In: a finished run. Out: a folder that builds its TensorRT engine where the GPU is, in the form fastest there."""

from __future__ import annotations

import json
import shutil
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hirelc_deploy.compress.integer.calibration import calibrate
from hirelc_deploy.compress.onnx_file import export_tensorrt
from hirelc_deploy.compress.onnx_file.export import export_onnx, set_static_batch
from hirelc_deploy.config import JobConfig
from hirelc_deploy.deliver.read import LABELS, MANIFEST, PREPROCESS, read_manifest, read_preprocess, read_task
from hirelc_deploy.deliver.read import load as load_bundle
from hirelc_deploy.errors import InputError
from hirelc_deploy.evaluate.cutting import divergence, tensors
from hirelc_deploy.evaluate.effort import BATCH
from hirelc_deploy.inputs.data.batches import batches, two_images
from hirelc_deploy.inputs.data.images import Images
from hirelc_deploy.inputs.data.load import configured_data
from hirelc_deploy.inputs.fitting import answering
from hirelc_deploy.inputs.models.onnx_files.whole import FileNetwork
from hirelc_deploy.inputs.models.source import ModelSource
from hirelc_deploy.measure.accuracy import finite
from hirelc_deploy.measure.registry import get_backend
from hirelc_deploy.plan import END_OF, CompressionPlan
from hirelc_deploy.tasks.contract import Task
from hirelc_deploy.tasks.paired import paired_drop

FP16 = "fp16"
SAMPLES = 8
CPU = "onnxruntime_cpu"
"""Computes the answers that the engine is checked against, and the accuracy of each form, from the very files."""


def write_folder(run: Path, out: Path) -> list[Path]:
    """Write every form of a run's shipped model for TensorRT, sample inputs with answers, and `engine.py`.

    The forms are FP16 and each pattern of export_tensorrt; those that lose more accuracy on the selection split than
    the run allowed are left out. Which form is fastest only the GPU can say: `engine.py build` asks it.

    Args:
        run: The folder of a finished search or apply; its model, data and weights are found again by its config.toml.
        out: An empty or new folder.

    Raises:
        InputError: the run's bundle or data are not there, or the folder cannot be written.
        ExportError: the model cannot be exported.
    """
    config, bundle = JobConfig.read(run / "config.toml"), run / "bundle"
    try:
        manifest, preprocess = read_manifest(bundle), read_preprocess(bundle)
    except InputError as error:
        raise InputError(f"{bundle}: cannot be read ({error}); `hirelc-deploy verify {bundle}` says more.") from None
    plan = CompressionPlan.from_dict(manifest.get("plan"), f"{bundle / MANIFEST}: plan")
    source = ModelSource(config.model.spec, arguments=dict(config.model.arguments))
    source = source.with_input_size(config.preprocess.input_size)
    model = load_bundle(bundle, None if source.is_timm else source.build)
    if isinstance(model, FileNetwork):
        raise InputError(
            f"{run}: {model.file.name} is placed as it is, which is for ONNX Runtime alone; use --format onnx."
        )
    data = configured_data(config).preprocessed(preprocess)
    task = read_task(bundle, config.task.options.get("decode"))
    answering(model, task, model(two_images(data)))
    dynamic, static = out / ".dynamic.onnx", out / ".static.onnx"
    try:
        out.mkdir(parents=True, exist_ok=True)
        export_onnx(model, data.calibration.batch(np.arange(2) % len(data.calibration)), dynamic)
        set_static_batch(dynamic, static, config.batch or 1)
        ranges = calibrate(dynamic, (images.numpy() for images in batches(data.calibration, BATCH)))
        for name, (precision, pattern) in forms(plan).items():
            export_tensorrt.write_tensorrt(
                static,
                out / f"model.{name}.onnx",
                ranges,
                partial(precision_of, plan, precision),
                pattern=pattern,
            )
        records = _judge(out, static, data.selection, task, config.limits.max_drop)
        for name in (PREPROCESS, LABELS):
            shutil.copyfile(bundle / name, out / name)
        program = resources.files("hirelc_backends") / "tensorrt_program.py"
        (out / "engine.py").write_bytes(program.read_bytes())
        (out / "forms.json").write_text(json.dumps(records, indent=1) + "\n", "utf-8")
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}).") from None
    finally:
        dynamic.unlink(missing_ok=True)
        static.unlink(missing_ok=True)
    return sorted(out.iterdir())


def forms(plan: CompressionPlan) -> dict[str, tuple[str, str]]:
    """Return name to (default precision, pattern) of the files to write; a plan in float has one form only."""
    found = {FP16: ("float", "all")}
    if plan.default_precision != "float" or "int8" in plan.precision.values():
        found |= {f"int8-{pattern}": ("int8", pattern) for pattern in export_tensorrt.PATTERNS}
    return found


def precision_of(plan: CompressionPlan, precision: str, layer: str) -> str:
    """Return what a layer runs in: what the plan says of it, or nothing but FP16 in the form of that name.

    What decodes the answers is FP16 unless the plan says otherwise: no clock was asked.
    """
    if precision == "float" or (layer.startswith(END_OF) and layer not in plan.precision):
        return "float"
    return plan.precision.get(layer, "float" if plan.default_precision == "float" else precision)


def _judge(out: Path, static: Path, images: Images, task: Task, max_drop: float | None) -> dict[str, Any]:
    """Run each form on a CPU, remove equal ones and those that lose too much, and keep answers to check engines by."""
    backend = get_backend(CPU)
    first = images.batch(np.arange(min(SAMPLES, len(images))))
    pictures = torch.cat(list(batches(images, BATCH))).numpy()
    targets = task.collate(images.targets(np.arange(len(images)))) if images.labelled else None
    expected = backend.build(static).infer(pictures)
    samples: dict[str, Any] = {"inputs": first.numpy()}
    records: dict[str, Any] = {}
    seen: dict[bytes, str] = {}
    for path in sorted(out.glob("model.*.onnx")):
        content = path.read_bytes()
        if content in seen:
            records[path.name] = {"equal_to": seen[content]}
            path.unlink()
            continue
        seen[content] = path.name
        outputs = finite(backend.build(path).infer(pictures))
        record: dict[str, Any] = {"bytes": len(content), "images": len(images)}
        record["divergence"] = divergence(task, tensors(expected), tensors(outputs))
        kept = True
        if targets is not None:
            parts = task.parts(outputs, targets)
            drop = paired_drop(task, task.parts(expected, targets), parts)
            kept = max_drop is None or drop.points <= max_drop or path.name == f"model.{FP16}.onnx"
            record |= {"accuracy": task.value(parts), "drop_points": drop.points}
            record |= {"drop_low": drop.low, "drop_high": drop.high}
        records[path.name] = {**record, "kept": kept}
        if kept:
            samples |= {f"{path.name}/{name}": values[:SAMPLES] for name, values in outputs.items()}
        else:
            path.unlink()
    np.savez_compressed(out / "inputs.npz", **samples)
    return records
