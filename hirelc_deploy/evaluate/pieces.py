"""In: a float ONNX file for one image. Out: the pieces that it consists of, each kind once as a file of its own.

A piece is a residual block, or a layer with the activation behind it: it ends where a single tensor goes on. A network
has few kinds of them: ViT-Tiny has 26 pieces of 5 kinds, MobileNetV3-Small 24 of 22.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from hirelc_deploy.compress.onnx_file.export import layer_of_node
from hirelc_deploy.compress.onnx_file.links import shapes_of
from hirelc_deploy.measure.table import BORDER

OUTSIDE = -1
"""Stands for the kind of what lies before the image and behind the outputs."""

MOST_LAYERS = 8
"""A piece of so many layers ends before the next one, even amid open branches, as in a U-Net."""

ELEMENT_WORK = 5
"""Moving an element through memory costs about what so many multiply-accumulates do."""

BEHIND = frozenset(
    (
        *("Relu", "LeakyRelu", "PRelu", "Clip", "Elu", "Selu", "Sigmoid", "HardSigmoid", "HardSwish", "Softplus"),
        *("Mish", "Tanh", "Gelu", "Erf", "Add", "Sub", "Mul", "Div", "Pow", "BatchNormalization"),
        *("MaxPool", "AveragePool", "GlobalAveragePool"),
    )
)
"""Operators that belong to what is before them: runtimes make one kernel of both, or keep its layout."""


@dataclass(frozen=True)
class Part:
    """One piece of a network where it stands.

    Attributes:
        kind: Position in `Pieces.files`.
        before, after: Kinds of the pieces that make what it reads and that read what it makes; OUTSIDE at the ends.
    """

    kind: int
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class Pieces:
    """A network in pieces: every node is in exactly one part.

    Attributes:
        files: One piece of each kind, with all its inputs.
        work: Of one piece of each kind, in multiply-accumulates, memory counted by ELEMENT_WORK.
        parts: In the order of the file.
    """

    files: tuple[ModelProto, ...]
    work: tuple[float, ...]
    parts: tuple[Part, ...]

    def by_work(self) -> list[int]:
        """Return the kinds, first those that all their parts together make the most work."""
        totals = np.zeros(len(self.files))
        for part in self.parts:
            totals[part.kind] += self.work[part.kind]
        return [int(kind) for kind in np.argsort(-totals, kind="stable")]

    def covered(self, kinds: Iterable[int]) -> float:
        """Return the share of the network's work that is in parts of these kinds."""
        known = frozenset(kinds)
        works = [(part.kind in known, self.work[part.kind]) for part in self.parts]
        return sum(work for there, work in works if there) / sum(work for _, work in works)


def pieces_of(proto: ModelProto) -> Pieces:
    """Take a file apart. Kinds are equal in operators, attributes, shapes and how tensors go, not in weights."""
    proto = onnx.shape_inference.infer_shapes(proto)
    graph, layers = proto.graph, layer_of_node(proto)
    shapes, constants = shapes_of(graph), {constant.name: constant for constant in graph.initializer}
    ends = _ends(graph, layers, constants)
    spans = [list(graph.node[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    piece_of = {tensor: index for index, nodes in enumerate(spans) for node in nodes for tensor in node.output}
    readers: dict[str, set[int]] = {value.name: {OUTSIDE} for value in graph.output}
    for index, nodes in enumerate(spans):
        for node in nodes:
            for tensor in node.input:
                readers.setdefault(tensor, set()).add(index)
    kinds: dict[Any, int] = {}
    files: list[ModelProto] = []
    work, kind_of, ins, outs = [], [], [], []
    for index, nodes in enumerate(spans):
        made = [tensor for node in nodes for tensor in node.output]
        read = dict.fromkeys(tensor for node in nodes for tensor in node.input if tensor and tensor not in constants)
        ins.append([tensor for tensor in read if piece_of.get(tensor) != index])
        outs.append([tensor for tensor in made if readers.get(tensor, {index}) - {index}])
        key = _key(nodes, ins[-1], outs[-1], constants, shapes)
        if key not in kinds:
            kinds[key] = len(files)
            files.append(_file(proto, nodes, ins[-1], outs[-1], constants, shapes))
            work.append(sum(_work(node, constants, shapes) for node in nodes))
        kind_of.append(kinds[key])

    def kinds_of(pieces: Iterable[int]) -> tuple[int, ...]:
        return tuple(sorted({OUTSIDE if index == OUTSIDE else kind_of[index] for index in pieces}))

    parts = tuple(
        Part(
            kind_of[index],
            kinds_of(piece_of.get(tensor, OUTSIDE) for tensor in ins[index]),
            kinds_of(reader for tensor in outs[index] for reader in readers[tensor] if reader != index),
        )
        for index in range(len(spans))
    )
    return Pieces(tuple(files), tuple(work), parts)


def inside_a_network(proto: ModelProto, swept: int = 0) -> tuple[ModelProto, tuple[int, ...]]:
    """Return a piece as a file to be profiled, in which it fares as in the network, and the shape of its one input.

    Operators of borders, which do not count, stand around it. The first ones read the whole input, so that the piece
    finds its weights no nearer than the rest of the network would leave them (the classifier of MobileNetV3-Small
    took 0.05 ms where nothing else was read, 0.25 ms in the network), and then write what the piece reads. The last
    ones read what it makes: a runtime fuses less into what is an output of the file.

    Args:
        swept: Bytes of memory that are read before.
    """
    wrapped = ModelProto()
    wrapped.CopyFrom(proto)
    graph, inner = wrapped.graph, list(proto.graph.node)
    given = {value.name: shapes_of(graph)[value.name] for value in graph.input}
    sizes = [math.prod(shape) for shape in given.values()]
    length = max(sum(sizes), swept // 4)
    source = f"{BORDER}input"
    nodes: list[NodeProto] = []

    def add(operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], f"{BORDER}{len(nodes)}/{operator}", **attributes))
        return output

    def integers(*values: int) -> str:
        name = f"{BORDER}constant{len(graph.initializer)}"
        graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    largest = add("ReduceMax", [source], f"{BORDER}largest", keepdims=1)
    starts = np.cumsum([0, *sizes])
    for number, (name, shape) in enumerate(given.items()):
        bounds = integers(int(starts[number])), integers(int(starts[number + 1]))
        part = add("Slice", [source, *bounds], f"{BORDER}{number}/part")
        sum_ = add("Sub", [largest, part], f"{BORDER}{number}/read")
        add("Reshape", [sum_, integers(*shape)], name)
    nodes += inner
    known = {value.name for value in graph.value_info}
    graph.value_info.extend(v for v in (*proto.graph.input, *proto.graph.output) if v.name not in known)
    for value in graph.output:
        value.name = add("Neg", [value.name], f"{BORDER}{value.name}")
    del graph.node[:], graph.input[:]
    graph.node.extend(nodes)
    graph.input.append(helper.make_tensor_value_info(source, TensorProto.FLOAT, [length]))
    return wrapped, (length,)


def _ends(graph: GraphProto, layers: Mapping[str, str], constants: Mapping[str, TensorProto]) -> list[int]:
    """Return the positions behind the last node of each piece."""
    nodes = list(graph.node)
    if any(attribute.type in (attribute.GRAPH, attribute.GRAPHS) for node in nodes for attribute in node.attribute):
        return [len(nodes)]  # the bodies of loops read tensors that their nodes do not name
    typed = (*graph.value_info, *graph.input, *graph.output)
    passable = {
        value.name
        for value in typed
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
        and all(dimension.dim_value > 0 for dimension in value.type.tensor_type.shape.dim)
    }
    last = {tensor: index for index, node in enumerate(nodes) for tensor in node.input}
    last |= {value.name: len(nodes) for value in graph.output}
    ends: list[int] = []
    made, read, weights = set[str](), set[str](), 0
    for index, node in enumerate(nodes[:-1]):
        read.update(tensor for tensor in node.input if tensor and tensor not in constants and tensor not in made)
        made.update(node.output)
        weights += node.name in layers
        left = [tensor for tensor in made if last.get(tensor, 0) > index]
        is_block = len(left) == 1 and not any(last[tensor] > index for tensor in read)
        following = nodes[index + 1]
        ends_here = is_block and weights > 0 and following.op_type not in BEHIND
        is_full = weights >= MOST_LAYERS and following.name in layers
        if (ends_here or is_full) and passable.issuperset(left):
            ends.append(index + 1)
            made, read, weights = set(), set(), 0
    return [*ends, len(nodes)]


def _key(
    nodes: Sequence[NodeProto],
    ins: Sequence[str],
    outs: Sequence[str],
    constants: Mapping[str, TensorProto],
    shapes: Mapping[str, tuple[int, ...]],
) -> Any:
    """Return what pieces of one kind have in common."""
    numbers = {tensor: index for index, tensor in enumerate(ins)}

    def described(tensor: str) -> Any:
        if tensor not in constants:
            return numbers.setdefault(tensor, len(numbers)) if tensor else None
        constant = constants[tensor]
        # Weights take as long whatever they are; integers are shapes and axes.
        is_weight = constant.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16)
        return constant.data_type, tuple(constant.dims), b"" if is_weight else numpy_helper.to_array(constant).tobytes()

    listed = []
    for node in nodes:
        attributes = sorted((attribute.name, attribute.SerializeToString()) for attribute in node.attribute)
        ends = tuple(described(tensor) for tensor in (*node.input, *node.output))
        listed.append((node.op_type, node.domain, tuple(attributes), len(node.input), ends))
    return tuple(listed), tuple(shapes[tensor] for tensor in ins), tuple(described(tensor) for tensor in outs)


def _file(
    proto: ModelProto,
    nodes: Sequence[NodeProto],
    ins: Sequence[str],
    outs: Sequence[str],
    constants: Mapping[str, TensorProto],
    shapes: Mapping[str, tuple[int, ...]],
) -> ModelProto:
    used = dict.fromkeys(tensor for node in nodes for tensor in node.input if tensor in constants)
    known = {value.name: value for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output)}
    inside = dict.fromkeys(tensor for node in nodes for tensor in node.output if tensor not in outs)
    graph = helper.make_graph(
        nodes,
        "piece",
        [helper.make_tensor_value_info(tensor, TensorProto.FLOAT, shapes[tensor]) for tensor in ins],
        [known[tensor] for tensor in outs],
        [constants[tensor] for tensor in used],
        value_info=[known[tensor] for tensor in inside if tensor in known],
    )
    return helper.make_model(graph, opset_imports=list(proto.opset_import), ir_version=proto.ir_version)


def _work(node: NodeProto, constants: Mapping[str, TensorProto], shapes: Mapping[str, tuple[int, ...]]) -> float:
    elements = math.prod(shapes.get(node.output[0], ()))
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return float(ELEMENT_WORK * elements)
    if node.op_type == "MatMul" and node.input[1] not in constants:
        return float(elements * (shapes.get(node.input[0]) or (1,))[-1])
    weight = math.prod(constants[node.input[1]].dims) if node.input[1] in constants else 1
    outputs = shapes.get(node.output[0]) or (1,)
    channels = outputs[1] if node.op_type.startswith("Conv") and len(outputs) > 1 else outputs[-1]
    return float(elements * weight / max(channels, 1))
