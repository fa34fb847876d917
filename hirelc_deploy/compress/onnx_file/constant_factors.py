"""In: a Q/DQ file. Out: the same without multiplications by a constant between two roundings: a scale does them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, numpy_helper

from hirelc_deploy.compress.onnx_file.links import makers_of, readers_of, reads


def absorb(proto: ModelProto) -> int:
    """Let x -> Q -> DQ -> * c -> Q -> DQ be x -> Q -> DQ with c times the scale, in place; return how often.

    Attention multiplies queries and keys by a constant each. The values are the same but for one rounding less.
    """
    graph = proto.graph
    constants = {initializer.name: initializer for initializer in graph.initializer}
    makers, readers = makers_of(graph), readers_of(graph)
    ends = {value.name for value in graph.output}

    def factor(tensor: str) -> float | None:
        """Return the value of a constant of one element, rounded or not; None for anything else."""
        maker = makers.get(tensor)
        names = [tensor] if maker is None else list(maker.input)
        if not all(name in constants for name in names) or (maker is not None and maker.op_type != "DequantizeLinear"):
            return None
        value, *step = (numpy_helper.to_array(constants[name]).astype(np.float64) for name in names)
        if value.size != 1:
            return None
        zero = step[1].item() if len(step) > 1 else 0.0
        return float((value.item() - zero) * (step[0].item() if step else 1.0))

    gone: list[NodeProto] = []
    for node in [node for node in graph.node if node.op_type == "Mul"]:
        rounding = readers[node.output[0]]
        if node.output[0] in ends or len(rounding) != 1 or rounding[0].op_type != "QuantizeLinear":
            continue
        back = readers[rounding[0].output[0]]
        for tensor, other in (tuple(node.input), tuple(reversed(node.input))):
            before, c = makers.get(tensor), factor(other)
            if before is None or before.op_type != "DequantizeLinear" or c is None or c <= 0:
                continue
            if before.input[0] in constants or not all(reader.op_type == "DequantizeLinear" for reader in back):
                continue
            scale: NDArray[np.float32] = numpy_helper.to_array(constants[before.input[1]]) * np.float32(c)
            name = f"{before.input[1]}:{node.name}"
            graph.initializer.append(numpy_helper.from_array(scale.astype(np.float32), name))
            for reader in back:
                reader.input[:] = [before.input[0], name, *before.input[2:]]
            gone += [node, rounding[0]]
            break
    for node in gone:
        graph.node.remove(node)
    read = {tensor for node in graph.node for tensor in reads(node)} | ends
    for node in [node for node in graph.node if node.op_type == "DequantizeLinear" and node.output[0] not in read]:
        graph.node.remove(node)  # ONNX Runtime would run them
    return len(gone) // 2
