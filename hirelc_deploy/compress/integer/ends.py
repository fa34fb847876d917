"""In: a float ONNX file and the ranges of its tensors. Out: its ends: what decodes the answers, and why it stays float.

INT8 detectors fail by structure: boxes from 0 to 640 and scores from 0 to 1 meet in one Concat with one scale of 2.5,
and every score rounds to 0. So an end is found on the graph, never by names: everything behind which no convolution and
no product comes any more, if something in it suffers from rounding. A classifier's last layer is a product, and what
follows the last convolution of a segmentation network is a Resize: neither is an end.

Products belong to an end in two places. An expectation over a Softmax (the distances of a YOLO; Li et al., Generalized
Focal Loss, 2020) is arithmetic although it looks like a convolution. And what follows TopK, GridSample and their like
is the decoder of a detector: its learned layers go by their own precision, and what is between them is the end's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from onnx import GraphProto, ModelProto, NodeProto, numpy_helper

from hirelc_deploy.compress.onnx_file.export import WEIGHT_OPERATORS, layer_of_node
from hirelc_deploy.compress.onnx_file.links import shapes_of
from hirelc_deploy.compress.onnx_file.rewrite import source_of
from hirelc_deploy.plan import END_OF

APART = 8.0
"""Ranges further apart than this leave the narrower one fewer than 5 of its 8 bits when they share a scale."""

MOST_WORK = 0.5
"""Where more than this share of the multiplications follows, it is the network that follows and not its end."""

MOST_COORDINATES = 3
"""An expectation gives a number or a place; a product with more columns is a layer."""

_PRODUCTS = frozenset({*WEIGHT_OPERATORS, "Einsum", "DeformConv", "LSTM", "GRU", "RNN"})
_MOVES = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Slice", "Split"})
_SELECTORS: Mapping[str, str] = {
    "TopK": "TopK ranks values that rounding makes equal",
    "NonMaxSuppression": "NonMaxSuppression ranks scores and compares boxes",
    "GridSample": "GridSample reads between pixels, at rounded places",
    "Loop": "Loop adds its rounding up",
    "Scan": "Scan adds its rounding up",
    "If": "If decides by rounded values",
}
_GATHERS = frozenset({"Gather", "GatherElements", "GatherND", "ScatterElements", "ScatterND"})
_FOLDED = frozenset({"Relu", "Clip"})
_SHAPES = frozenset({"Shape", "Size"})


@dataclass(frozen=True)
class End:
    """What decodes some outputs.

    Attributes:
        outputs: Names of the outputs that it makes, in their order.
        nodes: Names of its nodes; of products only expectations.
        why: What in it suffers from rounding, each in a few words.
        layers: The layers that compute its expectations.
    """

    outputs: tuple[str, ...]
    nodes: frozenset[str]
    why: tuple[str, ...]
    layers: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """What precisions call it: it is asked for among the layers."""
        return f"{END_OF}{', '.join(self.outputs)}"

    @property
    def parts(self) -> frozenset[str]:
        """Everything in it that has a precision."""
        return self.layers | {self.name}


def find(proto: ModelProto, ranges: Mapping[str, tuple[float, float]]) -> tuple[End, ...]:
    """Return the ends of a float file, in the order of its outputs.

    Args:
        proto: With the shapes of its tensors, where they are known; its nodes have names of their own.
        ranges: Tensor name to (lowest, highest). A join of tensors without a range is taken for harmless.
    """
    flow = _Flow(proto)
    expectations = frozenset(flow.expectations())
    starts = [*expectations, *flow.selectors()]
    behind = frozenset[int]().union(*(flow.behind(start) for start in starts))
    inside = (flow.products - expectations) & behind
    tail = flow.without_behind(flow.products - expectations - inside) - inside
    layers, found = layer_of_node(proto), []
    for group in flow.connected(tail | inside):
        outputs = tuple(value.name for value in proto.graph.output if flow.maker.get(value.name) in group)
        members = sorted(index for index in group & tail if not flow.is_folded(index))
        why = tuple(dict.fromkeys(flow.reasons(members, expectations, ranges)))
        if why and outputs:
            nodes = frozenset(flow.nodes[index].name for index in members)
            found.append(End(outputs, nodes, why, frozenset(layers[node] for node in nodes & layers.keys())))
    order = {value.name: index for index, value in enumerate(proto.graph.output)}
    return tuple(sorted(found, key=lambda end: order[end.outputs[0]]))


class _Flow:
    """Which nodes values that depend on the image pass, by their index; arithmetic on shapes is left out.

    Attributes:
        maker: Tensor to the node that makes it.
        carriers: These nodes, from the image to the outputs.
        data: Tensors that depend on the image.
        products: Convolutions and products, of weights or of two tensors.
    """

    def __init__(self, proto: ModelProto) -> None:
        graph = proto.graph
        self.nodes: Sequence[NodeProto] = list(graph.node)
        self.shapes = shapes_of(graph)
        self.constants = {initializer.name: initializer for initializer in graph.initializer}
        self.data = {value.name for value in graph.input} - self.constants.keys()
        self.outputs = {value.name for value in graph.output}
        self.maker: dict[str, int] = {}
        self.readers: defaultdict[str, list[int]] = defaultdict(list)
        products = set()
        for index, node in enumerate(self.nodes):
            reads = [tensor for tensor in _reads(node) if tensor in self.data]
            if not reads or node.op_type in _SHAPES:
                continue
            for tensor in reads:
                self.readers[tensor].append(index)
            self.data.update(filter(None, node.output))
            self.maker |= dict.fromkeys(filter(None, node.output), index)
            if node.op_type in _PRODUCTS:
                products.add(index)
        self.products = frozenset(products)
        self.carriers = tuple(dict.fromkeys(self.maker.values()))

    def following(self, index: int) -> Iterator[int]:
        """Yield the nodes that read what a node makes."""
        for tensor in self.nodes[index].output:
            yield from self.readers.get(tensor, ())

    def behind(self, start: int) -> set[int]:
        """Return a node and all that depends on it."""
        found, waiting = {start}, [start]
        while waiting:
            new = {index for index in self.following(waiting.pop()) if index not in found}
            found |= new
            waiting += new
        return found

    def without_behind(self, barriers: Collection[int]) -> frozenset[int]:
        """Return the nodes behind which none of these comes, and which are none of them."""
        reach = set(barriers)
        for index in reversed(self.carriers):
            if any(following in reach for following in self.following(index)):
                reach.add(index)
        return frozenset(self.carriers) - reach

    def is_folded(self, index: int) -> bool:
        """Return whether a node is a ReLU that the layer before it does without a step of its own."""
        node = self.nodes[index]
        return node.op_type in _FOLDED and self.maker.get(node.input[0]) in self.products

    def connected(self, indices: Collection[int]) -> Iterator[set[int]]:
        """Yield these nodes in groups that no tensor joins."""
        left = set(indices)
        while left:
            waiting = [min(left)]
            group = set[int]()
            while waiting:
                index = waiting.pop()
                if index not in left:
                    continue
                left.remove(index)
                group.add(index)
                waiting += self.following(index)
                waiting += (self.maker[tensor] for tensor in _reads(self.nodes[index]) if tensor in self.maker)
            yield group

    def expectations(self) -> Iterator[int]:
        """Yield the products and the sums that weigh numbers by a Softmax."""
        for index in self.carriers:
            if self.nodes[index].op_type != "Softmax":
                continue
            for reader in self._behind_moves(index):
                node = self.nodes[reader]
                weights = [tensor for tensor in node.input[:2] if tensor in self.constants]
                if reader in self.products and weights and 0 < self._columns(node) <= MOST_COORDINATES:
                    yield reader
                elif node.op_type == "Mul" and weights:
                    following = {self.nodes[after].op_type for after in self.following(reader)}
                    if following & {"ReduceSum", "ReduceMean"}:
                        yield reader

    def selectors(self) -> Iterator[int]:
        """Yield what ranks, decides or reads at places that the network computes, with little of the work behind it."""
        work = {index: self._work(self.nodes[index]) for index in self.products}
        most = MOST_WORK * sum(work.values())
        for index in self.carriers:
            selects = self.nodes[index].op_type in _SELECTORS or self._reads_anywhere(self.nodes[index])
            if selects and sum(work.get(after, 0) for after in self.behind(index)) <= most:
                yield index

    def reasons(
        self, members: Iterable[int], expectations: Collection[int], ranges: Mapping[str, tuple[float, float]]
    ) -> Iterator[str]:
        """Yield what of some nodes suffers from rounding, in words; of joins only that of the unlikest tensors."""
        nodes = {index: self.nodes[index] for index in members}
        joins = [self._join(node, ranges) for node in nodes.values() if node.op_type in ("Concat", "Add")]
        apart, says = max(joins, default=(0.0, ""))
        if apart > APART:
            yield says
        for index, node in nodes.items():
            if index in expectations:
                yield "an expectation over a Softmax adds up the rounding of its bins"
            elif node.op_type in _SELECTORS:
                yield _SELECTORS[node.op_type]
            elif self._reads_anywhere(node):
                yield f"{node.op_type} reads at places that the network computes"
            elif node.op_type == "Sigmoid" and not self._is_gate(node):
                yield "Sigmoid gives values that are less than a step of their scale"
            elif node.op_type == "Exp":
                yield "Exp turns a step of rounding into a factor"

    def _join(self, node: NodeProto, ranges: Mapping[str, tuple[float, float]]) -> tuple[float, str]:
        """Return how much larger than all of a tensor's numbers those are that it meets, and the same in words."""
        sizes = {}
        for tensor in node.input:
            if tensor in self.constants:
                values = numpy_helper.to_array(self.constants[tensor])
                sizes[tensor] = float(abs(values).max()) if values.size else 0.0
            elif source_of(tensor) in ranges:
                sizes[tensor] = max(map(abs, ranges[source_of(tensor)]))
        narrow = min((sizes[tensor] for tensor in sizes.keys() & self.data if sizes[tensor] > 0), default=0.0)
        if not narrow:
            return 0.0, ""
        wide = max(sizes.values())
        return wide / narrow, f"{node.op_type} joins values up to {narrow:.3g} with values up to {wide:.3g}"

    def _is_gate(self, sigmoid: NodeProto) -> bool:
        """Return whether a Sigmoid only weighs features, as in a swish or a squeeze-and-excitation block."""
        readers = [self.nodes[index] for index in self.readers[sigmoid.output[0]]]
        others = [tensor for node in readers for tensor in node.input if tensor != sigmoid.output[0]]
        makers = [self.nodes[self.maker[tensor]].op_type for tensor in others if tensor in self.maker]
        return (
            bool(readers)
            and sigmoid.output[0] not in self.outputs
            and all(node.op_type == "Mul" for node in readers)
            and all(tensor in self.data for tensor in others)
            and not {"Sigmoid", "Softmax"} & {*makers}
        )

    def _reads_anywhere(self, node: NodeProto) -> bool:
        return node.op_type in _GATHERS and node.input[1] in self.data

    def _behind_moves(self, index: int) -> Iterator[int]:
        for reader in self.following(index):
            if self.nodes[reader].op_type in _MOVES:
                yield from self._behind_moves(reader)
            else:
                yield reader

    def _columns(self, node: NodeProto) -> int:
        """Return how many numbers a product with weights gives for each row; 0 where it has none."""
        if node.op_type not in WEIGHT_OPERATORS or node.input[1] not in self.constants:
            return 0
        dims = self.constants[node.input[1]].dims
        if node.op_type == "MatMul":
            return int(dims[-1]) if len(dims) > 1 else 1
        by_row = node.op_type == "Conv" or any(a.name == "transB" and a.i for a in node.attribute)
        return int(dims[0] if by_row else dims[1])

    def _work(self, node: NodeProto) -> int:
        """Return the multiplications of a product for one image; unknown sizes count as 1."""
        size = prod(max(size, 1) for size in self.shapes.get(node.output[0], ()))
        if len(node.input) > 1 and node.input[1] in self.constants:
            weights = int(prod(self.constants[node.input[1]].dims))
            return size * weights // max(self._columns(node), 1)
        return size * max((self.shapes.get(node.input[0], ()) or (1,))[-1], 1)


def _reads(node: NodeProto) -> Iterator[str]:
    """Yield what a node reads, and what the graphs of its branches or its loop read from outside."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            yield from _reads_of(inner)


def _reads_of(graph: GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield from _reads(node)
    yield from (value.name for value in graph.output)
