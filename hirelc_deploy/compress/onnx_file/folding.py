"""In: an exported graph, its module's tensors. Out: the graph with constants for all that rests on tensors, and how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

Arrays = Mapping[str, NDArray[np.generic]]

COMPUTED_APART = frozenset(
    {"Add", "Cast", "Concat", "Div", "Exp", "Expand", "Flatten", "Gather", "Mul", "Neg", "Pow", "Reciprocal"}
    | {"Reshape", "Shape", "Slice", "Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze"}
)
"""Operators that are computed here when they depend on tensors alone; ONNX Runtime folds any other into the file."""


@dataclass(frozen=True)
class Recipe:
    """How the constants of a graph come from the tensors of its module: transposed, or scaled by a batch norm.

    Attributes:
        made: Constant of the graph to the name that the arithmetic gives it, for every float constant that rests on a
            tensor of the module. Tensors that the graph reads as they are stand for themselves.
        uses: How many inputs of nodes read each of them.
        settings: Constants of the arithmetic itself, such as the axes of a transposition.
    """

    arithmetic: ModelProto
    made: Mapping[str, str]
    uses: Mapping[str, int]
    settings: Arrays

    def constants(self, tensors: Arrays, settings: Arrays) -> dict[str, NDArray[np.generic]]:
        """Return the value of each constant in `made` for these tensors of a module."""
        given = {**tensors, **settings}
        inputs = {value.name: given[value.name] for value in self.arithmetic.graph.input}
        outputs = [value.name for value in self.arithmetic.graph.output]
        computed = dict(zip(outputs, self._evaluator.run(None, inputs), strict=True))
        return {name: computed[source] if source in computed else tensors[source] for name, source in self.made.items()}

    @cached_property
    def _evaluator(self) -> ReferenceEvaluator:
        return ReferenceEvaluator(self.arithmetic)


def tensors_of(model: nn.Module) -> dict[str, NDArray[np.generic]]:
    """Return every parameter and buffer of a module under each of its names, without copying."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tensor.detach().cpu().numpy() for name, tensor in named}


def fold(proto: ModelProto, tensors: Arrays, layers: Collection[str]) -> Recipe:
    """Replace, in place, everything in a graph that depends on tensors of the module alone by constants.

    A BatchNormalization behind a convolution becomes part of its weight and bias. Weights and biases of a layer are
    called `layer.weight` and `layer.bias`, as nodes are called `layer/Operator` already.

    Args:
        proto: Has the module's tensors as initializers, by their names in the module.
        layers: The operators that have a weight, and perhaps a bias.
    """
    graph = proto.graph
    _own_copies(graph, tensors)
    _fold_norms(graph)
    constants = {initializer.name: initializer for initializer in graph.initializer}
    derived = {name for name in constants if name in tensors}
    fixed = set(constants) - derived | {node.output[0] for node in graph.node if node.op_type == "Constant"}
    rest, arithmetic = [], []
    for node in graph.node:
        known = node.op_type in COMPUTED_APART and all(tensor in derived or tensor in fixed for tensor in node.input)
        if known:
            arithmetic.append(node)
            (derived if any(tensor in derived for tensor in node.input) else fixed).update(node.output)
        if not known or node.output[0] in fixed:
            rest.append(node)
    read = {tensor for node in rest for tensor in node.input} | {value.name for value in graph.output}
    outputs = [node.output[0] for node in arithmetic if node.output[0] in derived & read]
    settings = _settings(graph, fixed)
    model = _model(arithmetic, outputs, proto)
    settings = {value.name: settings[value.name] for value in model.graph.input if value.name in settings}
    values = Recipe(model, {name: name for name in sorted(derived & read)}, {}, settings).constants(tensors, settings)
    names = _names([node for node in rest if node.op_type in layers], set(outputs), read)
    for node in rest:
        node.input[:] = [names.get(tensor, tensor) for tensor in node.input]
    kept = [constant for name, constant in constants.items() if name in read and name not in derived]
    made = [numpy_helper.from_array(np.ascontiguousarray(v), names.get(name, name)) for name, v in values.items()]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(rest)
    graph.initializer.extend([*kept, *made])
    floats = {names.get(name, name): name for name, value in values.items() if value.dtype == np.float32}
    return Recipe(model, floats, uses(graph, floats), settings)


def uses(graph: GraphProto, names: Collection[str]) -> dict[str, int]:
    """Return how many inputs of nodes, and outputs of the graph, are each of `names`."""
    found = Counter([*(t for node in graph.node for t in node.input), *(value.name for value in graph.output)])
    return {name: found[name] for name in names}


def _names(nodes: list[NodeProto], made: Collection[str], read: Collection[str]) -> dict[str, str]:
    """Return constant to `layer.weight` or `layer.bias` for those that were computed and that one of `nodes` reads."""
    names: dict[str, str] = {}
    for node in nodes:
        for tensor, kind in zip(node.input[1:], ("weight", "bias"), strict=False):
            name = f"{node.name.partition('/')[0]}.{kind}"
            if tensor in made and tensor not in names and name not in {*read, *names.values()}:
                names[tensor] = name
    return names


def _own_copies(graph: GraphProto, tensors: Arrays) -> None:
    """Give each tensor of the module its own constant; the exporter keeps equal ones once and adds an Identity."""
    nodes = []
    present = {initializer.name for initializer in graph.initializer}
    for node in graph.node:
        if node.op_type == "Identity" and node.output[0] in tensors and node.input[0] in present:
            graph.initializer.append(numpy_helper.from_array(tensors[node.output[0]].copy(), node.output[0]))
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _fold_norms(graph: GraphProto) -> None:
    """Write each BatchNormalization that alone reads a convolution as arithmetic on that convolution's weight and bias.

    y = (conv(x) + bias - mean) * scale + shift with scale = gamma / sqrt(variance + epsilon).
    """
    constants = {initializer.name: len(initializer.dims) for initializer in graph.initializer}
    readers = uses(graph, {node.output[0] for node in graph.node})
    norms = {node.input[0]: node for node in graph.node if node.op_type == "BatchNormalization"}
    nodes: list[NodeProto] = []
    folded = set()
    for node in graph.node:
        norm = norms.get(node.output[0]) if node.op_type == "Conv" else None
        fixed = norm is not None and all(name in constants for name in (node.input[1], *norm.input[1:]))
        if norm is None or not fixed or readers[node.output[0]] > 1:
            nodes.append(node)
            continue
        folded.add(norm.name)
        weight = node.input[1]
        gamma, shift, mean, variance = norm.input[1:]
        epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
        at = f"{norm.name}:"
        shape = np.array([-1] + [1] * (constants[weight] - 1), np.int64)
        graph.initializer.append(numpy_helper.from_array(np.array(epsilon, np.float32), f"{at}epsilon"))
        graph.initializer.append(numpy_helper.from_array(shape, f"{at}shape"))
        steps = [("Add", [variance, f"{at}epsilon"], "spread"), ("Sqrt", [f"{at}spread"], "deviation")]
        steps += [("Div", [gamma, f"{at}deviation"], "scale"), ("Reshape", [f"{at}scale", f"{at}shape"], "column")]
        steps += [("Mul", [weight, f"{at}column"], "weight")]
        if len(node.input) > 2:
            steps += [("Sub", [node.input[2], mean], "moved")]
        else:
            steps += [("Neg", [mean], "moved")]
        steps += [("Mul", [f"{at}moved", f"{at}scale"], "scaled"), ("Add", [f"{at}scaled", shift], "bias")]
        nodes += [helper.make_node(op, inputs, [f"{at}{name}"], f"{at}{name}") for op, inputs, name in steps]
        node.input[:] = [node.input[0], f"{at}weight", f"{at}bias"]
        node.output[0] = norm.output[0]
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(node for node in nodes if node.name not in folded)


def _settings(graph: GraphProto, fixed: set[str]) -> dict[str, NDArray[np.generic]]:
    found = {i.name: numpy_helper.to_array(i) for i in graph.initializer if i.name in fixed}
    for node in graph.node:
        if node.op_type == "Constant":
            (attribute,) = node.attribute
            value = attribute.t if attribute.name == "value" else None
            found[node.output[0]] = (
                numpy_helper.to_array(value) if value is not None else np.array(helper.get_attribute_value(attribute))
            )
    return found


def _model(nodes: list[NodeProto], outputs: list[str], source: ModelProto) -> ModelProto:
    """Return the part of `nodes` that `outputs` rest on as a model that takes tensors and settings."""
    needed = set(outputs)
    kept: list[NodeProto] = []
    for node in reversed(nodes):
        if node.output[0] in needed:
            kept.append(node)
            needed.update(node.input)
    inputs = sorted(needed - {node.output[0] for node in kept})
    values = [[helper.make_tensor_value_info(n, TensorProto.UNDEFINED, None) for n in ns] for ns in (inputs, outputs)]
    graph = helper.make_graph(list(reversed(kept)), "constants", *values)
    return helper.make_model(graph, opset_imports=source.opset_import)
