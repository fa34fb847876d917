"""In: a float ONNX file of fixed batch. Out: the same with linear layers and heads in the orders of the fast kernels.

For layers that will read and write bytes, in ONNX Runtime:

- Its integer convolution writes bytes while their sums are still in the cache; its integer Gemm adds up all rows first.
  197 rows of 192 features to 576 bytes each take 139 us as Gemm and 111 us as a convolution of 1x1, 3,136 rows of 96
  features to 288 bytes each 674 and 457 us.
- It moves what stays together by one call each. Heads of 32 bytes from (64, 49, 3, 32) to (64, 3, 49, 32) take 105 us,
  but rows and columns, from (64, 49, 96) to (64, 96, 49), 28 us, and a second such step puts the heads in order.

The values are the same to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from hirelc_deploy.compress.onnx_file.links import replace_nodes, shapes_of

LEAST_ROWS = 16
"""With fewer a Gemm keeps its sums in the cache too."""

MOST_FEATURES = 32
"""Bytes at the end of a tensor up to which a Transpose that leaves them in place is slower than two turns."""

STEP = ":step"
"""Ends, with a number, the name of a tensor on the way; it holds the values of the tensor that the name begins with."""

Shape = tuple[int, ...]
Step = tuple[str, Any, Shape]
"""Operator, what it is told, and the shape of what it makes."""


def use_convolutions(proto: ModelProto, wanted: Callable[[NodeProto], bool]) -> None:
    """Turn Gemm of constant weights and many rows into convolutions of 1x1, in place.

    Args:
        proto: With the shapes of its tensors; those of new ones are added.
        wanted: Which Gemm nodes may be turned.
    """
    constants = {initializer.name: initializer for initializer in proto.graph.initializer}
    shapes = shapes_of(proto.graph)
    nodes: list[NodeProto] = []
    for node in proto.graph.node:
        rows = shapes.get(node.input[0], (0,))[0] if node.op_type == "Gemm" else 0
        of = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        plain = not of.get("transA") and of.get("alpha", 1) == of.get("beta", 1) == 1
        known = all(name in constants for name in node.input[1:])
        if rows < LEAST_ROWS or not plain or not known or not wanted(node):
            nodes.append(node)
            continue
        weight = numpy_helper.to_array(constants[node.input[1]])
        weight = weight if of.get("transB") else weight.T
        outputs, inputs = weight.shape
        kernel, result = f"{node.input[1]}:kernel", node.output[0]
        values = np.ascontiguousarray(weight.reshape(outputs, inputs, 1, 1))
        proto.graph.initializer.append(numpy_helper.from_array(values, kernel))
        pixels = (1, rows, 1, inputs)
        before: list[Step] = [("Reshape", pixels, pixels), ("Transpose", (0, 3, 1, 2), (1, inputs, rows, 1))]
        nodes += _steps(proto, before, node.input[0], f"{node.input[0]}{STEP}:{node.name}:image")
        made = f"{result}{STEP}:image"
        nodes.append(helper.make_node("Conv", [nodes[-1].output[0], kernel, *node.input[2:]], [made], node.name))
        _know(proto, made, (1, outputs, rows, 1))
        after: list[Step] = [
            ("Transpose", (0, 2, 3, 1), (1, rows, 1, outputs)),
            ("Reshape", (rows, outputs), (rows, outputs)),
        ]
        nodes += _steps(proto, after, made, result)
    replace_nodes(proto, nodes)


def use_two_turns(proto: ModelProto, wanted: Callable[[NodeProto], bool]) -> None:
    """Let Transpose of tokens with few features each work in two steps of rows and columns, in place.

    Args:
        proto: With the shapes of its tensors; those of new ones are added.
        wanted: Which Transpose nodes may be turned.
    """
    shapes = shapes_of(proto.graph)
    nodes: list[NodeProto] = []
    for node in proto.graph.node:
        perm = _perm(node) if wanted(node) else ()
        shape = shapes.get(node.input[0], ())
        steps = _two_turns(shape, perm) if len(perm) == len(shape) > 2 else []
        nodes += _steps(proto, steps, node.input[0], node.output[0]) if steps else [node]
    replace_nodes(proto, nodes)


def _two_turns(shape: Shape, perm: Shape) -> list[Step]:
    """Return the steps that take the place of a Transpose; none where it is as fast.

    The axis of the tokens is turned with the features, as columns, and all else stands still: to the end when it leaves
    its place before the heads, and from the end when it comes to that place.
    """
    last = len(perm) - 1
    if perm[last] != last or shape[last] > MOST_FEATURES or perm[last - 1] == last - 1:
        return []
    after = tuple(shape[axis] for axis in perm)
    inverse = tuple(perm.index(axis) for axis in range(len(perm)))
    if shape[perm[last - 1]] >= after[inverse[last - 1]]:
        view, middle, second = _to_end(shape, perm)
        turned = view[0], view[2], view[1]
        # Flatten, because the runtime moves a Transpose across a Reshape and makes one of the two.
        return [
            ("Reshape", view, view),
            ("Transpose", (0, 2, 1), turned),
            ("Flatten", 2, (turned[0] * turned[1], turned[2])),
            ("Reshape", middle, middle),
            ("Transpose", second, after),
        ]
    view, middle, second = _to_end(after, inverse)
    back = tuple(second.index(axis) for axis in range(len(second)))
    turned = view[0], view[2], view[1]
    return [
        ("Transpose", back, middle),
        ("Reshape", turned, turned),
        ("Transpose", (0, 2, 1), view),
        ("Reshape", after, after),
    ]


def _to_end(shape: Shape, perm: Shape) -> tuple[Shape, Shape, Shape]:
    """Return how to move the axis to the end that a Transpose puts last but one.

    Returns:
        The tensor as (what is before it, that axis, what is behind it); the shape with that axis at the end; and the
        order that leads from there to the result.
    """
    moved, end = perm[-2], len(shape) - 1
    view = math.prod(shape[:moved]), shape[moved], math.prod(shape[moved + 1 :])
    middle = (*shape[:moved], *shape[moved + 1 :], shape[moved])
    place = [end if axis == moved else axis - (axis > moved) for axis in range(len(shape))]
    return view, middle, tuple(place[axis] for axis in perm)


def _steps(proto: ModelProto, steps: Sequence[Step], source: str, result: str) -> list[NodeProto]:
    """Return the nodes of steps that lead from one tensor to another."""
    nodes = []
    for index, (operator, told, shape) in enumerate(steps):
        made = result if index == len(steps) - 1 else f"{result}{STEP}{index}"
        inputs, attributes = [source], {}
        if operator == "Reshape":
            inputs.append(f"{made}:shape of step")
            proto.graph.initializer.append(numpy_helper.from_array(np.array(told, np.int64), inputs[1]))
        else:
            attributes = {"perm": told} if operator == "Transpose" else {"axis": told}
        nodes.append(helper.make_node(operator, inputs, [made], f"{made}/{operator}", **attributes))
        _know(proto, made, shape)
        source = made
    return nodes


def _know(proto: ModelProto, tensor: str, shape: Shape) -> None:
    if STEP in tensor:
        proto.graph.value_info.append(helper.make_tensor_value_info(tensor, TensorProto.FLOAT, shape))


def _perm(node: NodeProto) -> Shape:
    """Return the new order of dimensions that a Transpose makes; empty for another operator."""
    if node.op_type != "Transpose":
        return ()
    return next((tuple(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), ())
