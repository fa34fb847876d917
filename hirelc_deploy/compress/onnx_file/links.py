"""In: an ONNX graph. Out: which node makes each tensor, which nodes read it, and the graph with other nodes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from graphlib import TopologicalSorter

from onnx import GraphProto, ModelProto, NodeProto

from hirelc_deploy.inputs.models.onnx_files.proto import names_within


def reads(node: NodeProto) -> tuple[str, ...]:
    """Return what a node reads, in their order, with what the graphs within it (a loop's, a branch's) read."""
    return (*node.input, *sorted(names_within(node)))


def makers_of(graph: GraphProto) -> dict[str, NodeProto]:
    """Return tensor to the node that makes it; inputs and constants of the graph have none."""
    return {tensor: node for node in graph.node for tensor in node.output}


def readers_of(graph: GraphProto) -> defaultdict[str, list[NodeProto]]:
    """Return tensor to the nodes that read it, in their order, once for each input that it is; see `reads`."""
    readers: defaultdict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        for tensor in reads(node):
            readers[tensor].append(node)
    return readers


def shapes_of(graph: GraphProto) -> dict[str, tuple[int, ...]]:
    """Return tensor to its shape, of those that the graph has written down; 0 stands for an unknown size."""
    return {
        value.name: tuple(dimension.dim_value for dimension in value.type.tensor_type.shape.dim)
        for value in (*graph.value_info, *graph.input, *graph.output)
        if value.type.tensor_type.HasField("shape")
    }


def replace_nodes(proto: ModelProto, nodes: Sequence[NodeProto]) -> None:
    """Give the graph these nodes, without those that nothing reads, and without constants that nothing reads."""
    graph = proto.graph
    wanted = {value.name for value in graph.output}
    kept: list[NodeProto] = []
    for node in reversed(nodes):
        if any(output in wanted for output in node.output):
            wanted.update(reads(node))
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    used = [initializer for initializer in graph.initializer if initializer.name in wanted]
    del graph.initializer[:]
    graph.initializer.extend(used)
    known = {value.name: value for value in graph.value_info if value.name in wanted}
    del graph.value_info[:]
    graph.value_info.extend(known.values())


def put_in_order(graph: GraphProto) -> None:
    """Put nodes with graphs within them behind those whose results these read; ONNX Runtime's own tool forgets them."""
    if not any(names_within(node) for node in graph.node):
        return
    maker = {tensor: number for number, node in enumerate(graph.node) for tensor in node.output}
    before = {number: [maker[name] for name in reads(node) if name in maker] for number, node in enumerate(graph.node)}
    nodes = [graph.node[number] for number in TopologicalSorter(before).static_order()]
    del graph.node[:]
    graph.node.extend(nodes)
