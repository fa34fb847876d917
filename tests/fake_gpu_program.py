"""In: ONNX files in TensorRT's form. Out: what `tensorrt_program.py` gives worker.py, from a GPU that is not there.

Loaded in place of tensorrt_program.py, which it drives with the fake TensorRT of fake_tensorrt.py. ONNX Runtime
computes what the engine would; the GPU's time is made up from the sizes of the weight layers and measures nothing.
"""

# ruff: noqa: E402 - the worker loads this file by its path, without the folders that its imports are in

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "backends"), str(TESTS.parent)]

import numpy as np
import onnx
import onnxruntime
from fake_tensorrt import SURFACES, FakeDriver, FakeTensorrt, Network
from hirelc_backends import tensorrt_program
from onnx import TensorProto, numpy_helper

PRODUCTS = ("Conv", "Gemm", "MatMul")
MACS_PER_MS = {"Half": 1e6, "Int8": 3e6}
LAUNCH_MS = 0.002
TYPES = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16, TensorProto.INT8: np.int8}


class FileTensorrt(FakeTensorrt):
    """A TensorRT that reads files as the real one does: strictly typed, zero points of 0, no QLinear operators."""

    def understood(self, model: bytes) -> Network:
        try:
            proto = onnx.shape_inference.infer_shapes(onnx.load_from_string(model), strict_mode=True)
            onnx.checker.check_model(proto, full_check=True)
        except Exception as error:  # whatever protobuf and the checker say of bytes that are no model
            raise ValueError(" ".join(str(error).split())) from None
        graph = proto.graph
        constants = {constant.name: numpy_helper.to_array(constant) for constant in graph.initializer}
        refuse_what_tensorrt_refuses(proto, constants)
        values = {value.name: value for value in (*graph.input, *graph.value_info, *graph.output)}
        shapes = {
            name: tuple(max(1, size.dim_value) for size in values[name].type.tensor_type.shape.dim)
            for name in (graph.input[0].name, *(output.name for output in graph.output))
        }
        kinds = {name: TYPES[values[name].type.tensor_type.elem_type] for name in shapes}
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        layers, times = layers_of(proto, values, constants)
        return Network(
            shapes,
            kinds,
            lambda image: session.run(None, {graph.input[0].name: image}),
            sum(times.values()),
            {"Layers": layers},
            times,
        )


def refuse_what_tensorrt_refuses(proto: onnx.ModelProto, constants: dict[str, Any]) -> None:
    """Raise ValueError for what NVIDIA's parser was seen to refuse."""
    for node in proto.graph.node:
        if node.op_type.startswith("QLinear") or node.domain:
            raise ValueError(f"no importer for {node.domain}{node.op_type}")
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            if len(node.input) < 3 or constants[node.input[2]].dtype != np.int8:
                raise ValueError(f"{node.op_type}: only int8")
            if constants[node.input[2]].any():
                raise ValueError(f"{node.op_type}: zero point must be 0")


def layers_of(proto: onnx.ModelProto, values: dict[str, Any], constants: dict[str, Any]) -> tuple[list[Any], Any]:
    """Return the inspector's layers, one per product, and the made-up milliseconds of each."""
    makers = {tensor: node.op_type for node in proto.graph.node for tensor in node.output}
    restored = {node.output[0]: node.input[0] for node in proto.graph.node if node.op_type == "DequantizeLinear"}
    layers: list[Any] = [{"Name": "Reformat", "LayerType": "Reformat", "Inputs": [{"Format/Datatype": "Half"}]}]
    times = {"Reformat": LAUNCH_MS}
    for index, node in enumerate(proto.graph.node):
        if node.op_type not in PRODUCTS:
            continue
        kind = "Int8" if {makers.get(tensor) for tensor in node.input[:2]} == {"DequantizeLinear"} else "Half"
        sizes = [dimension.dim_value for dimension in values[node.output[0]].type.tensor_type.shape.dim]
        weight = constants.get(restored.get(node.input[1], node.input[1]))
        inner = 8 if weight is None else weight[0].size if node.op_type == "Conv" else weight.shape[0]
        name = f"{node.name or index} + what is fused"
        layers.append({"Name": name, "LayerType": "CaskConvolution", "Inputs": [{"Format/Datatype": kind}]})
        times[name] = LAUNCH_MS + math.prod(sizes) * inner / MACS_PER_MS[kind]
    return layers, times


driver = FakeDriver()
trt = FileTensorrt(next(one for one in SURFACES if one["version"].startswith("10.3")), driver)
tensorrt_program._driver = lambda: driver
tensorrt_program.load_tensorrt = lambda: trt
availability, versions, facts = tensorrt_program.availability, tensorrt_program.versions, tensorrt_program.facts
open_session = tensorrt_program.open_session
