"""In: a float ONNX file and calibration images. Out: the integer file that NNCF writes of it, if NNCF is installed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from hirelc_deploy.errors import ExportError, InputError

TRANSFORMER_OPERATORS = frozenset({"LayerNormalization", "Softmax"})
"""A network that has these is told to NNCF as a transformer: norms and softmax then stay float."""


def quantize_with_nncf(
    float_model: Path, out: Path, images: Iterable[NDArray[np.float32]], *, for_onnxruntime: bool = True
) -> None:
    """Write NNCF's post-training quantization of a float file.

    Args:
        float_model: A file with a batch of one.
        images: (1, channels, height, width) each; NNCF sees at most 300.
        for_onnxruntime: One scale for each activation tensor, unsigned activations, no smoothing. NNCF by itself gives
            the input of a depthwise convolution one scale per channel, which ONNX Runtime loads and then refuses to
            run, and puts a float multiplication in front of every linear layer. False leaves every choice to NNCF.

    Raises:
        InputError: NNCF is not installed.
        ExportError: NNCF refuses the file.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # NNCF would tell its makers of it
    try:
        import nncf
        from nncf.quantization.advanced_parameters import (
            AdvancedQuantizationParameters,
            AdvancedSmoothQuantParameters,
            QuantizationParameters,
        )
    except ImportError as error:
        raise InputError(
            f"NNCF cannot be imported ({error}); install it with `pip install hirelc-deploy[nncf]`."
        ) from None
    nncf.set_log_level(logging.ERROR)
    proto = onnx.load(str(float_model))
    name = proto.graph.input[0].name
    transformer = TRANSFORMER_OPERATORS.issubset(node.op_type for node in proto.graph.node)
    parameters = None
    if for_onnxruntime:
        parameters = AdvancedQuantizationParameters(
            activations_quantization_params=QuantizationParameters(per_channel=False),
            smooth_quant_alphas=AdvancedSmoothQuantParameters(matmul=-1),
        )
    try:
        quantized = nncf.quantize(
            proto,
            nncf.Dataset([{name: image} for image in images]),
            preset=nncf.QuantizationPreset.MIXED if for_onnxruntime else None,
            model_type=nncf.ModelType.TRANSFORMER if transformer and for_onnxruntime else None,
            advanced_parameters=parameters,
        )
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:
        raise ExportError(f"{float_model.name}: NNCF cannot quantize it ({str(error).splitlines()[0]}).") from None
    out.write_bytes(quantized.SerializeToString())
