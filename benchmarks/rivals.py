"""What others' tools make of an uncut network, each in its own runtime, as a careful person would ask for it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from hirelc_backends.onnxruntime_cpu import OnnxRuntimeCpu
from hirelc_backends.openvino_cpu import OpenvinoCpu
from numpy.typing import NDArray

from hirelc_deploy.compress.integer.nncf_engine import TRANSFORMER_OPERATORS, quantize_with_nncf
from hirelc_deploy.errors import HirelcError, InputError
from hirelc_deploy.measure.backend import FLOAT_AS, Backend

Rivals = dict[str, tuple[Path, Backend]]
"""Name to a file and what runs it."""


def in_onnxruntime(static: Path, images: Sequence[NDArray[np.float32]], folder: Path) -> tuple[Rivals, dict[str, str]]:
    """Return NNCF's file for ONNX Runtime, and what was refused and why.

    Args:
        static: The float file, for a batch of one.
        images: (1, channels, height, width) each, for calibration.
        folder: Receives the files.
    """
    backend, path = OnnxRuntimeCpu(), folder / "nncf.onnx"
    try:
        if not path.exists():
            quantize_with_nncf(static, path, images)
        backend.build(path).infer(images[0])
    except HirelcError as error:
        return {}, {"nncf in onnxruntime": str(error)}
    return {"nncf in onnxruntime": (path, backend)}, {}


def in_openvino(static: Path, images: Sequence[NDArray[np.float32]], folder: Path) -> tuple[Rivals, dict[str, str]]:
    """Return OpenVINO's files of a float file, with float32 and with bfloat16 in what is not integer; else why not.

    NNCF quantizes with both of its presets, and is told of a transformer where the network is one. Arguments are those
    of `in_onnxruntime`.
    """
    backend = OpenvinoCpu()
    reason = backend.availability()
    if reason is not None:
        return {}, {"openvino": reason}
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # an import would tell its makers
    import openvino

    made: dict[str, Any] = {"openvino": openvino.Core().read_model(static)}
    refused: dict[str, str] = {}
    for preset in ("performance", "mixed"):
        try:
            made[f"nncf {preset} in openvino"] = _by_nncf(openvino.Core().read_model(static), static, images, preset)
        except InputError as error:
            refused["nncf in openvino"] = str(error)
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:
            refused[f"nncf {preset} in openvino"] = str(error).splitlines()[0]
    found: Rivals = {}
    for name, model in made.items():
        for hint in ("f32", "bf16"):
            path = folder / f"{name}, {hint}.xml"
            if hint != "f32":
                model.set_rt_info(hint, ["framework", FLOAT_AS])
            openvino.save_model(model, path, compress_to_fp16=False)
            found[f"{name}, {hint}"] = path, backend
    return found, refused


def _by_nncf(model: Any, static: Path, images: Sequence[NDArray[np.float32]], preset: str) -> Any:
    try:
        import nncf
    except ImportError as error:
        raise InputError(f"NNCF cannot be imported ({error}); install it with `pip install nncf`.") from None
    nncf.set_log_level(logging.ERROR)
    operators = {node.op_type for node in onnx.load(str(static), load_external_data=False).graph.node}
    return nncf.quantize(
        model,
        nncf.Dataset(list(images)),
        preset=nncf.QuantizationPreset(preset),
        model_type=nncf.ModelType.TRANSFORMER if operators >= TRANSFORMER_OPERATORS else None,
    )
