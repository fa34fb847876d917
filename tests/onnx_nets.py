"""Small ONNX files that tests make, whole ones and spoiled ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT
IMAGE = ("n", 3, 16, 16)


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.3, shape).astype(np.float32)


def model_of(
    nodes: Sequence[NodeProto],
    tensors: dict[str, np.ndarray] | Sequence[TensorProto] = (),
    outputs: Sequence[str] = ("y",),
    *,
    image: Sequence[Any] = IMAGE,
    opset: int = 17,
    kind: int = FLOAT,
) -> ModelProto:
    """Return the model of some nodes that reads `x`."""
    if isinstance(tensors, dict):
        tensors = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(
        list(nodes),
        "net",
        [helper.make_tensor_value_info("x", kind, list(image))],
        [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs],
        list(tensors),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 8
    return model


def node(operator: str, inputs: Sequence[str], outputs: Sequence[str] = ("y",), **attributes: Any) -> NodeProto:
    return helper.make_node(operator, list(inputs), list(outputs), **attributes)


def small_net(opset: int = 17, image: Sequence[Any] = IMAGE, channels: int = 16) -> ModelProto:
    """Two convolutions, a residual sum, a classifier of five classes."""
    nodes = [
        node("Conv", ["x", "stem.weight", "stem.bias"], ["a"], pads=[1, 1, 1, 1]),
        node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "body.0.weight"], ["c"], pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["d"]),
        node("Conv", ["d", "body.1.weight"], ["e"], pads=[1, 1, 1, 1]),
        node("Add", ["e", "b"], ["f"]),
        node("GlobalAveragePool", ["f"], ["g"]),
        node("Flatten", ["g"], ["h"]),
        node("Gemm", ["h", "head.weight", "head.bias"], ["y"], transB=1),
    ]
    tensors = {
        "stem.weight": values(channels, 3, 3, 3, seed=1),
        "stem.bias": values(channels, seed=2),
        "body.0.weight": values(2 * channels, channels, 3, 3, seed=3),
        "body.1.weight": values(channels, 2 * channels, 3, 3, seed=4),
        "head.weight": values(5, channels, seed=5),
        "head.bias": values(5, seed=6),
    }
    return model_of(nodes, tensors, opset=opset, image=image)


def graph_of(nodes: Sequence[NodeProto], outputs: Sequence[str]) -> GraphProto:
    """Return a graph for a branch or a loop."""
    return helper.make_graph(list(nodes), "inner", [], [helper.make_tensor_value_info(o, FLOAT, None) for o in outputs])


def saved(model: ModelProto | bytes, path: Path) -> Path:
    """Write a model; bytes as they are."""
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return path


def external(model: ModelProto, location: str, **entries: int) -> ModelProto:
    """Return the model with its first tensor in another file."""
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.append(onnx.StringStringEntryProto(key=key, value=str(value)))
    return model


def looped_net(opset: int = 17, image: Sequence[Any] = IMAGE, turns: int = 2) -> ModelProto:
    """Return `small_net` with a Loop before its pooling, whose body has a convolution and reads a tensor outside."""
    inputs = (("i", TensorProto.INT64, []), ("go", TensorProto.BOOL, []), ("v", FLOAT, None))
    outputs = (("on", TensorProto.BOOL, []), ("w", FLOAT, None))
    body = helper.make_graph(
        [
            node("Identity", ["go"], ["on"]),
            node("Conv", ["v", "smooth"], ["u"], pads=[1, 1, 1, 1]),
            node("Add", ["u", "b"], ["s"]),
            node("Relu", ["s"], ["w"]),
        ],
        "body",
        [helper.make_tensor_value_info(*one) for one in inputs],
        [helper.make_tensor_value_info(*one) for one in outputs],
    )
    model = small_net(opset, image)
    nodes = list(model.graph.node)
    place = [one.op_type for one in nodes].index("GlobalAveragePool")
    nodes[place].input[0] = "looped"
    nodes.insert(place, node("Loop", ["turns", "", "f"], ["looped"], body=body))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    tensors = {"turns": np.array(turns, np.int64), "smooth": values(16, 16, 3, 3, seed=9)}
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in tensors.items())
    return model


def branched_net(opset: int = 17, image: Sequence[Any] = IMAGE) -> ModelProto:
    """Return a network of two outputs in which the image decides between two branches of an If."""
    branches = {
        "then_branch": graph_of([node("Relu", ["c"], ["t"])], ["t"]),
        "else_branch": graph_of([node("Neg", ["c"], ["e"])], ["e"]),
    }
    nodes = [
        node("Conv", ["x", "stem.weight"], ["c"], pads=[1, 1, 1, 1]),
        node("GlobalAveragePool", ["c"], ["m"]),
        node("Slice", ["m", "zero", "one", "axis"], ["first"])
        if opset > 9
        else node("Slice", ["m"], ["first"], starts=[0], ends=[1], axes=[1]),
        node("Reshape", ["first", "flat"], ["number"]),
        node("Greater", ["number", "nothing"], ["is_bright"]),
        node("If", ["is_bright"], ["d"], **branches),
        node("Conv", ["d", "body.weight"], ["y"]),
        node("Flatten", ["m"], ["z"]),
    ]
    tensors = {
        "stem.weight": values(8, 3, 3, 3),
        "body.weight": values(4, 8, 1, 1, seed=1),
        "nothing": np.zeros(1, np.float32),
        "flat": np.array([1], np.int64),
    }
    if opset > 9:
        tensors |= {name: np.array([n], np.int64) for name, n in (("zero", 0), ("one", 1), ("axis", 1))}
    return model_of(nodes, tensors, ("y", "z"), opset=opset, image=image)
