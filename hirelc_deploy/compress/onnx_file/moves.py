"""In: a float ONNX file of fixed batch. Out: the same with every reordering of tokens done by one operator.

Window attention and MobileViT cut, roll and regroup the picture between their layers: five to twelve operators that
copy all values each time, and behind an integer layer some that convert them twice. All they do is put whole tokens in
another order, so one Gather of rows does it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from hirelc_deploy.compress.onnx_file.links import makers_of, readers_of, replace_nodes, shapes_of

Indices = NDArray[np.int64]

PICKED = ":picked"
MOVED = (":turned", ":listed", PICKED, ":regrouped")
"""End the names of tensors on the way from the old order of tokens to the new one."""

_MOVES = frozenset({"Reshape", "Transpose", "Slice", "Concat", "Pad"})
_ON_TOKENS = frozenset({"Gemm", "LayerNormalization"})


def use_row_gathers(proto: ModelProto) -> None:
    """Let one Gather take the place of operators that only put tokens in another order, in place.

    Tokens lie as (..., features), or as (images, features, height, width). Nothing changes unless a linear layer or a
    layer norm is at one of the ends: convolutions of the runtime have orders of their own, through which it moves
    transposes but no Gather.

    Args:
        proto: With the shapes of its tensors; those of new ones are added.
    """
    graph = proto.graph
    shapes, batch = shapes_of(graph), graph.input[0].type.tensor_type.shape.dim[0].dim_value
    constants = {initializer.name: initializer for initializer in graph.initializer}
    makers, readers = makers_of(graph), readers_of(graph)
    new: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        result = node.output[0]
        behind = {reader.op_type for reader in readers[result]}
        if node.op_type not in _MOVES or not behind or behind <= _MOVES:
            continue
        chain, source = _chain(node, makers, constants)
        if source is None or not any(each.op_type not in ("Reshape", "Pad") for each in chain):
            continue
        ends = behind | ({makers[source].op_type} if source in makers else set())
        if not ends & _ON_TOKENS or not _known(shapes, (source, result)):
            continue
        found = _row_order(_order(chain, source, shapes[source], result, constants), shapes[source], batch)
        if found is None:
            continue
        turned, rows = found
        tokens = math.prod(shapes[source]) // _features(shapes[source], turned[0])
        in_order = np.array_equal(rows, np.arange(tokens))
        if in_order and any(turned):
            continue
        new[result] = _regrouped(
            proto, (source, shapes[source]), (result, shapes[result]), turned, None if in_order else rows
        )
    if new:
        replace_nodes(proto, [each for node in graph.node for each in new.get(node.output[0], [node])])


def _chain(
    last: NodeProto, makers: dict[str, NodeProto], constants: dict[str, TensorProto]
) -> tuple[list[NodeProto], str | None]:
    """Return the moves that end in a node, in their order, and the one tensor that they move; None for more."""
    chain: list[NodeProto] = []
    sources: set[str] = set()
    waiting, seen = [last], set[str]()
    while waiting:
        node = waiting.pop()
        if node.output[0] in seen:
            continue
        seen.add(node.output[0])
        chain.append(node)
        data = list(node.input) if node.op_type == "Concat" else node.input[:1]
        if any(name and name not in constants for name in node.input[len(data) :]):
            return [], None
        for tensor in data:
            maker = makers.get(tensor)
            if maker is not None and maker.op_type in _MOVES and not _adds_values(maker, constants):
                waiting.append(maker)
            else:
                sources.add(tensor)
    if len(sources) != 1 or _adds_values(last, constants) or sources & constants.keys():
        return [], None
    position = {name: index for index, name in enumerate(makers)}
    return sorted(chain, key=lambda node: position[node.output[0]]), sources.pop()


def _adds_values(node: NodeProto, constants: dict[str, TensorProto]) -> bool:
    """Return whether a node pads by anything but nothing; timm's Swin pads by zero rows where its windows fit."""
    if node.op_type != "Pad":
        return False
    return node.input[1] not in constants or bool(numpy_helper.to_array(constants[node.input[1]]).any())


def _known(shapes: dict[str, tuple[int, ...]], tensors: Iterable[str]) -> bool:
    return all(len(shapes.get(tensor, ())) > 1 and all(shapes[tensor]) for tensor in tensors)


def _order(
    chain: list[NodeProto], source: str, shape: tuple[int, ...], result: str, constants: dict[str, TensorProto]
) -> Indices:
    """Return for each value of the result its place among the values of the source."""
    nodes = [
        helper.make_node("Identity", node.input[:1], node.output) if node.op_type == "Pad" else node for node in chain
    ]
    read = {name for node in nodes for name in node.input} & constants.keys()
    body = helper.make_graph(
        nodes,
        "moves",
        [helper.make_tensor_value_info(source, TensorProto.INT64, shape)],
        [helper.make_tensor_value_info(result, TensorProto.INT64, None)],
        [constants[name] for name in read],
    )
    places = np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
    found = ReferenceEvaluator(helper.make_model(body)).run(None, {source: places})[0]
    return np.asarray(found, np.int64)


def _row_order(order: Indices, shape: tuple[int, ...], batch: int) -> tuple[tuple[bool, bool], Indices] | None:
    """Return how tokens lie in source and result, and for each token of the result its number in the source.

    Args:
        order: Of `_order`, in the result's shape.
        shape: The source's.
        batch: Images of the file.

    Returns:
        Whether features come before the picture's height and width in source and result, and (tokens,) numbers; None
        where more than whole tokens is moved.
    """
    for turned in ((False, False), (True, False), (False, True)):
        pictures = [of for first, of in zip(turned, (shape, order.shape), strict=True) if first]
        if any(len(of) != 4 or of[0] != batch for of in pictures):
            continue
        tokens = _as_rows(np.arange(math.prod(shape)).reshape(shape), turned[0])
        wanted = _as_rows(order, turned[1])
        if tokens.shape[1] != wanted.shape[1]:
            continue
        token_of = np.empty(tokens.size, np.int64)
        token_of[tokens] = np.arange(len(tokens))[:, None]
        rows = token_of[wanted[:, 0]]
        if np.array_equal(tokens[rows], wanted):
            return turned, rows
    return None


def _as_rows(values: Indices, features_first: bool) -> Indices:
    turned = np.moveaxis(values, 1, -1) if features_first else values
    return turned.reshape(-1, turned.shape[-1])


def _features(shape: tuple[int, ...], first: bool) -> int:
    return shape[1] if first else shape[-1]


def _regrouped(
    proto: ModelProto,
    source: tuple[str, tuple[int, ...]],
    result: tuple[str, tuple[int, ...]],
    turned: tuple[bool, bool],
    rows: Indices | None,
) -> list[NodeProto]:
    """Return the nodes that make one tensor from another (name, shape); without `rows` the tokens stay in order."""
    (tensor, shape), (name, wanted) = source, result
    features = _features(wanted, turned[1])
    steps: list[tuple[str, str, Sequence[int], tuple[int, ...]]] = []
    if turned[0]:
        steps.append(("Transpose", ":turned", (0, 2, 3, 1), (shape[0], *shape[2:], features)))
    if rows is not None:
        steps.append(("Reshape", ":listed", (-1, features), (math.prod(shape) // features, features)))
        steps.append(("Gather", PICKED, rows.tolist(), (len(rows), features)))
    if turned[1]:
        pixels = (wanted[0], *wanted[2:], features)
        steps += [("Reshape", ":regrouped", pixels, pixels), ("Transpose", "", (0, 3, 1, 2), wanted)]
    else:
        steps.append(("Reshape", "", wanted, wanted))
    nodes = []
    for operator, ending, how, size in steps:
        made = f"{name}{ending}"
        if operator == "Transpose":
            nodes.append(helper.make_node(operator, [tensor], [made], f"{made}/{operator}", perm=how))
        else:
            proto.graph.initializer.append(numpy_helper.from_array(np.array(how, np.int64), f"{made}:by"))
            nodes.append(helper.make_node(operator, [tensor, f"{made}:by"], [made], f"{made}/{operator}"))
        if ending:
            proto.graph.value_info.append(helper.make_tensor_value_info(made, TensorProto.FLOAT, size))
        tensor = made
    return nodes
