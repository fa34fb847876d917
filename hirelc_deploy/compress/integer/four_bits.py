"""In: an ONNX file and names of Linear layers. Out: the file with their weights in four bits, as runtimes execute them.

ONNX Runtime's MatMulNBits keeps weights in four bits, in blocks with a scale each, and multiplies them with activations
that it rounds to eight bits as it goes: large Linear layers take an eighth of their float bytes. Whether that is faster
is the device's to say.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper

from hirelc_deploy.compress.onnx_file.export import layer_of_node
from hirelc_deploy.compress.onnx_file.links import reads
from hirelc_deploy.errors import InputError

BLOCK = 32
"""Weights that share a scale: the finest block with which the kernels of all CPUs can work."""

INTEGER_ARITHMETIC = 4
"""MatMulNBits' accuracy level at which it multiplies integers."""


def use_four_bits(proto: ModelProto, layers: Collection[str]) -> ModelProto:
    """Return the file in which the weights of the named layers have four bits; `proto` is used up.

    Raises:
        InputError: a layer that is no product with one constant matrix of floats.
    """
    names = layer_of_node(proto)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    nodes: list[NodeProto] = []
    chosen, left = [], set(layers)
    for node in proto.graph.node:
        if names.get(node.name) not in layers or node.op_type not in ("Gemm", "MatMul"):
            nodes.append(node)
            continue
        matrix = constants.get(node.input[1])
        if matrix is None or matrix.dtype != np.float32 or matrix.ndim != 2:
            nodes.append(node)
            continue
        left.discard(names[node.name])
        chosen.append(node.name)
        nodes += _as_matmul(proto, node, matrix)
    if left:
        raise InputError(f"{sorted(left)[0]}: precision 'int4' is for Linear layers; use int8 or float.")
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    quantizer = _quantizer_class()(
        proto, block_size=BLOCK, is_symmetric=True, accuracy_level=INTEGER_ARITHMETIC, nodes_to_include=chosen
    )
    quantizer.process()
    result: ModelProto = quantizer.model.model
    read = {tensor for node in result.graph.node for tensor in reads(node)}
    kept = [tensor for tensor in result.graph.initializer if tensor.name in read]
    del result.graph.initializer[:]
    result.graph.initializer.extend(kept)
    return result


def _quantizer_class() -> Any:
    """Return ONNX Runtime's class; its module sets the logging of the whole program to INFO, which is put back."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    root.setLevel(level)
    root.handlers[:] = handlers
    return MatMulNBitsQuantizer


def _as_matmul(proto: ModelProto, node: NodeProto, matrix: NDArray[np.float32]) -> list[NodeProto]:
    """Return a Gemm as MatMul and Add with the same outputs; a MatMul as it is."""
    if node.op_type == "MatMul":
        return [node]
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    turned = f"{node.input[1]}:four-bits"
    values = matrix.T if attributes.get("transB", 0) else matrix
    proto.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), turned))
    product = helper.make_node("MatMul", [node.input[0], turned], list(node.output), node.name)
    if len(node.input) < 3:
        return [product]
    product.output[0] = f"{node.output[0]}:product"
    return [
        product,
        helper.make_node("Add", [product.output[0], node.input[2]], list(node.output), f"{node.name}:bias"),
    ]
