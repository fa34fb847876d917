"""In: a Q/DQ file. Out: the same with the second operand of every product of two tensors as signed bytes.

Activations are unsigned bytes, weights signed ones, and x86 has an instruction for just that pair (VNNI). For a product
of two activations, as attention has two of, ONNX Runtime uses a slower kernel: for three heads of 197 tokens, 64
features each, 116 us, and 61 us where the second operand comes as signed bytes. To turn 38,000 bytes takes 9 us.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from hirelc_deploy.compress.onnx_file.links import makers_of, shapes_of

LEAST_ROWS = 128
"""Of the first operand: the second one is turned once and read for each of them."""

LOWEST = -128
"""The signed byte that stands for the unsigned byte 0."""


def use_signed_operands(proto: ModelProto) -> int:
    """Let MatMul read its second operand as signed bytes where it is unsigned ones, in place; return how many do.

    Bytes and zero point go down by 128, so the numbers are the same to the last bit. ONNX Runtime has a fast kernel
    neither for x - 128 nor for x ^ 128 (20 us), and takes a pair of DequantizeLinear and QuantizeLinear out again; Cast
    to float and QuantizeLinear of scale 1 stay.
    """
    graph = proto.graph
    shapes = shapes_of(graph)
    constants = {initializer.name: initializer for initializer in graph.initializer}
    makers = makers_of(graph)
    steps = {"step": np.float32(1), "lowest": np.int8(LOWEST)}
    names = {key: f"signed:{key}" for key in steps}
    found = 0
    for node in [node for node in graph.node if node.op_type == "MatMul"]:
        first, second = (makers.get(tensor) for tensor in node.input)
        if first is None or second is None or second.input[0] in constants:
            continue
        if any(maker.op_type != "DequantizeLinear" or len(maker.input) < 3 for maker in (first, second)):
            continue
        if shapes.get(node.output[0], ())[-2:-1] < (LEAST_ROWS,):  # also where they are not known
            continue
        zero = numpy_helper.to_array(constants[second.input[2]])
        if zero.dtype != np.uint8 or zero.size != 1:
            continue
        name = f"{node.name}:signed"
        lower = (zero.astype(np.int16) + LOWEST).astype(np.int8)
        graph.initializer.append(numpy_helper.from_array(lower, f"{name}:zero"))
        for operator, inputs, output, attributes in (
            ("Cast", [second.input[0]], f"{name}:number", {"to": TensorProto.FLOAT}),
            ("QuantizeLinear", [f"{name}:number", *names.values()], f"{name}:bytes", {}),
            ("DequantizeLinear", [f"{name}:bytes", second.input[1], f"{name}:zero"], name, {}),
        ):
            graph.node.append(helper.make_node(operator, inputs, [output], f"{name}/{operator}", **attributes))
        node.input[1] = name
        found += 1
    if found:
        for key, value in steps.items():
            graph.initializer.append(numpy_helper.from_array(np.array(value), names[key]))
    return found
