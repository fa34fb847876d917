"""In: an ONNX graph. Out: which node makes each tensor, and which nodes read it."""

from __future__ import annotations

from collections import defaultdict

from onnx import GraphProto, NodeProto


def makers_of(graph: GraphProto) -> dict[str, NodeProto]:
    """Return tensor to the node that makes it; inputs and constants of the graph have none."""
    return {tensor: node for node in graph.node for tensor in node.output}


def readers_of(graph: GraphProto) -> defaultdict[str, list[NodeProto]]:
    """Return tensor to the nodes that read it, in their order, once for each input that it is."""
    readers: defaultdict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        for tensor in node.input:
            readers[tensor].append(node)
    return readers
