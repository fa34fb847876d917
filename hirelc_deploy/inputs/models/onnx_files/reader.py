"""In: a checked ONNX file and the size of its images. Out: the torch network that computes the same.

The graph is walked once, in order. Each node becomes a module that runs at once, on random batches of two or three
sizes: what is the same for all of them and does not depend on the images is a constant and is computed here; a size
that differs is the number of images. So shape arithmetic is gone, and files that are written for one image take many.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx.reference
import torch
from onnx import AttributeProto, GraphProto, NodeProto, helper
from torch import Tensor, nn

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.models.onnx_files import elementwise, layers, norms, resampling, shapes  # noqa: F401  the tables
from hirelc_deploy.inputs.models.onnx_files.network import (
    OnnxNetwork,
    Step,
    attribute,
    constant,
    layer_of,
    place,
    scopes,
)
from hirelc_deploy.inputs.models.onnx_files.node import (
    BUILDERS,
    LARGEST_VALUE,
    Call,
    Function,
    Node,
    NotReadError,
    TooLargeError,
    UnreadError,
    Value,
    check_size,
)
from hirelc_deploy.inputs.models.onnx_files.proto import DEEPEST, OnnxFile, array_of, names_within
from hirelc_deploy.user_code import first_line

BATCHES = (2, 3)
"""Numbers of images in the walk's runs; neither is 1, which says nothing of the dimension that holds them."""

WEIGHTED = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1, "BatchNormalization": 1, "LayerNormalization": 1}
"""Operators to the input whose name may name the layer."""

GROWING = {"Expand", "Tile", "ConstantOfShape", "Range", "OneHot", "EyeLike"}
"""Operators whose results are larger than what they are given: their sizes are looked at before they are computed."""

RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}


def read_graph(file: OnnxFile, input_name: str, shape: Sequence[int], fixed_batch: int | None) -> OnnxNetwork:
    """Return the network of a file.

    Args:
        shape: Of one image, as the file takes it.
        fixed_batch: The number of images that the file is written for; None where any will do.

    Raises:
        UnreadError: An operator cannot become a module; the text names it.
        InputError: It makes more than any network of pictures, or its outputs are of no use.
    """
    batches = BATCHES if fixed_batch is None else (fixed_batch, *BATCHES)
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn((max(batches), *shape), generator=generator)
    images = tuple(whole[:batch].clone() for batch in batches)
    outputs = [value.name for value in file.graph.output]
    with torch.no_grad():
        return _Reader(file, batches, fixed_batch is not None).read(Value(input_name, images, live=True), outputs)


class _Reader:
    def __init__(self, file: OnnxFile, batches: tuple[int, ...], batch_is_fixed: bool) -> None:
        self.file = file
        self.batches = batches
        self.batch_is_fixed = batch_is_fixed
        self.values: dict[str, Value] = {}
        self.constants: dict[str, str] = {}
        self.steps: list[Step] = []
        self.done: set[int] = set()
        self.shared: dict[tuple[Any, ...], str] = {}
        self.used: Counter[str] = Counter()

    def read(self, images: Value, outputs: Sequence[str]) -> OnnxNetwork:
        self.network = OnnxNetwork(images.name, outputs)
        self.images = images
        self.values = {name: Value(name, (array,), source=name) for name, array in self.file.tensors.items()}
        self.values[images.name] = images
        self.walk(self.file.graph, outputs, 0)
        for name in outputs:
            if name not in self.values or not self.values[name].live:
                raise InputError(f"{self.file.path}: output {name} does not depend on the images; export it without.")
            if not self.values[name].runs[0].is_floating_point():
                raise InputError(
                    f"{self.file.path}: output {name} holds {self.values[name].runs[0].dtype}, whole numbers that "
                    "nothing can be trained by; export the network without its last step."
                )
            for run, batch in zip(self.values[name].runs, self.batches, strict=True):
                if run.ndim == 0 or len(run) != batch:
                    raise InputError(
                        f"{self.file.path}: output {name} has the shape {list(run.shape)} for {batch} images; the "
                        "first dimension must be the image."
                    )
        self.network.walk(self.constants, self.steps, outputs)
        return self.network

    def walk(self, graph: GraphProto, outputs: Sequence[str], depth: int) -> None:
        """Read the nodes of a graph, or of a branch of an If that is always taken."""
        nodes = [self.node_of(proto) for proto in graph.node]
        readers: dict[str, list[Node]] = {}
        for node in nodes:
            for name in set(node.input_names):
                readers.setdefault(name, []).append(node)
        inner = {name for proto in graph.node for name in names_within(proto)}
        for name in (*outputs, *inner):
            readers.pop(name, None)
        last = {name: number for number, node in enumerate(nodes) for name in node.input_names}
        for number, (node, proto) in enumerate(zip(nodes, graph.node, strict=True)):
            if id(node) not in self.done:
                node.readers = readers
                node.inputs = [self.values.get(name) if name else None for name in node.input_names]
                self.visit(node, proto, depth)
            for name in node.input_names:
                value = self.values.get(name)
                if last.get(name) == number and depth == 0 and value is not None and value.live:
                    self.forget(value, (*outputs, *inner))

    def forget(self, value: Value, needed: Sequence[str]) -> None:
        """Let go of what nobody reads any more, but for its shape."""
        if value.name not in needed and value is not self.images:
            value.runs = tuple(run.new_empty(0).as_strided((0,), (1,)) for run in value.runs)

    def node_of(self, proto: NodeProto) -> Node:
        """Return a node with its attributes read; graphs among them are left out."""
        attributes: dict[str, Any] = {}
        for item in proto.attribute:
            if item.type == AttributeProto.TENSOR:
                attributes[item.name] = array_of(self.file.path, item.t)
            elif item.type not in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
                found = helper.get_attribute_value(item)
                attributes[item.name] = found.decode("utf-8", "replace") if isinstance(found, bytes) else found
        return Node(
            proto.op_type,
            proto.name,
            self.file.opset,
            tuple(name for name in proto.output if name),
            tuple(proto.input),
            attributes,
            known=lambda name: found if (found := self.values.get(name)) is not None and found.fixed else None,
            batches=self.batches,
            batch_is_fixed=self.batch_is_fixed,
        )

    def visit(self, node: Node, proto: NodeProto, depth: int) -> None:
        """Compute a constant, or make the module of a node and run it; raises InputError with the operator's name."""
        try:
            if node.operator == "If":
                self.branch(node, proto, depth)
            elif node.operator == "Shape":
                self.shape_of(node)
            elif node.operator == "Size" or node.operator in RANDOM:
                raise NotReadError("networks that count or draw numbers are not read")
            elif not any(value is not None and value.live for value in node.inputs):
                self.fold(node, proto)
            elif node.operator not in BUILDERS:
                raise NotReadError("there is no module for it")
            else:
                self.call(node, BUILDERS[node.operator](node))
        except TooLargeError as error:
            raise InputError(f"{self.file.path}: {refusal(node, str(error))}; export the network without it.") from None
        except NotReadError as error:
            raise UnreadError(refusal(node, str(error))) from None
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, ZeroDivisionError) as error:
            raise UnreadError(refusal(node, first_line(error))) from None

    # Constants

    def shape_of(self, node: Node) -> None:
        x = node.value(0)
        runs = [np.array(run.shape, np.int64) for run in (x.runs if x.live or len(x.runs) > 1 else x.runs[:1])]
        start, end = node.attributes.get("start", 0), node.attributes.get("end")
        self.keep(node.outputs[0], [run[start:end] for run in runs])

    def keep(self, name: str, runs: Sequence[Any], source: str = "") -> None:
        """Keep a constant: once, where it is the same in all runs."""
        alike = all(run.shape == runs[0].shape and np.array_equal(run, runs[0]) for run in runs[1:])
        self.values[name] = Value(name, tuple(runs[:1] if alike else runs), source=source)

    def fold(self, node: Node, proto: NodeProto) -> None:
        """Compute a node that does not depend on the images."""
        if node.operator in ("Identity", "Cast") and node.inputs and node.inputs[0] is not None:
            first = node.inputs[0]
            to = node.attributes.get("to")
            if node.operator == "Identity" or (to in (1, 10, 11, 16) and first.runs[0].dtype == np.float32):
                self.keep(node.outputs[0], first.runs, first.source)
                return
        count = max((len(value.runs) for value in node.inputs if value is not None), default=1)
        results = []
        for run in range(count):
            feeds = {
                name: value.run(run)
                for name, value in zip(node.input_names, node.inputs, strict=True)
                if value is not None
            }
            _check_growth(node, [feeds[name] for name in node.input_names if name in feeds])
            results.append(_computed(proto, feeds, self.file.opset))
        for name, runs in zip((name for name in proto.output if name), zip(*results, strict=True), strict=True):
            self.keep(name, [np.asarray(run, np.float32) if run.dtype in WIDTHS else np.asarray(run) for run in runs])

    def branch(self, node: Node, proto: NodeProto, depth: int) -> None:
        """Read the branch of an If whose condition does not depend on the images."""
        condition = node.value(0)
        if not condition.fixed:
            raise NotReadError("which of its branches is taken depends on the images")
        if depth >= DEEPEST:
            raise NotReadError("it lies too deep in others")
        taken = "then_branch" if bool(condition.array.reshape(-1)[0]) else "else_branch"
        graph = next(item.g for item in proto.attribute if item.name == taken)
        for tensor in graph.initializer:
            self.values[tensor.name] = Value(tensor.name, (array_of(self.file.path, tensor),), source=tensor.name)
        outputs = [value.name for value in graph.output]
        self.walk(graph, outputs, depth + 1)
        for name, inner in zip(proto.output, outputs, strict=True):
            found = self.values[inner]
            if found.live:
                self.step(Function(elementwise.same), self.path_of(node), [inner], [name])
                self.values[name] = replace(found, name=name)
            else:
                self.values[name] = replace(found, name=name)

    # Modules

    def call(self, node: Node, call: Call) -> None:
        """Put a module into the tree, note its step and run it."""
        last = call.absorbed[-1] if call.absorbed else node
        self.done |= {id(one) for one in call.absorbed}
        given = [self.operand(node, value, call) for value in call.given]
        runs = [call.module(*(value.run(run) for value in given)) for run in range(len(self.batches))]
        several = isinstance(runs[0], tuple | list)
        path = self.path_of(node)
        names = [value.name for value in given]
        self.step(call.module, path, names, last.outputs, self.key_of(node, call))
        for number, name in enumerate(last.outputs if several else last.outputs[:1]):
            results = tuple(run[number] if several else run for run in runs)
            check_size(results[-1].shape)
            self.values[name] = Value(name, results, live=True)

    def key_of(self, node: Node, call: Call) -> tuple[Any, ...] | None:
        """Return what makes two layers one: the same tensors of the file, and the same settings."""
        place = WEIGHTED.get(node.operator)
        if place is None or not any(True for _ in call.module.parameters()):
            return None
        sources = tuple(value.source if value is not None else "" for value in node.inputs[place:])
        if not all(sources):
            return None
        added = tuple(
            name
            for one in call.absorbed
            for name in one.input_names
            if self.values.get(name) and self.values[name].source
        )
        return (node.operator, sources, added, repr(call.module))

    def step(
        self,
        module: nn.Module,
        path: str,
        given: Sequence[str],
        made: Sequence[str],
        key: tuple[Any, ...] | None = None,
    ) -> None:
        where = self.shared.get(key) if key is not None else None
        if where is None:
            where = place(self.network, path, module)
            if key is not None:
                self.shared[key] = where
        self.steps.append(Step(where, tuple(given), tuple(made)))

    def operand(self, node: Node, value: Value, call: Call) -> Value:
        """Return what a module is given: a live value, or a parameter or buffer that is made of a constant.

        A constant that depends on the number of images is one row for each of them.
        """
        if value.live:
            return value
        stretched = call.stretched and value.fixed and self.misses_rows(value, call)
        if len(value.runs) > 1 or stretched:
            rows = [value.run(run) for run in range(len(self.batches))]
            row = rows[0][:1]
            if any(
                run.ndim == 0 or len(run) != (1 if stretched else batch) or not (run == row).all()
                for run, batch in zip(rows, self.batches, strict=True)
            ):
                raise NotReadError("it reads numbers that depend on how many images there are")
            return self.repeated(node, replace(value, runs=(row,)))
        return replace(value, runs=(self.registered(node, value),))

    def misses_rows(self, value: Value, call: Call) -> bool:
        """Return whether a constant of one row is joined with values that have one for each image."""
        beside = next((other for other in call.given if other.live), None)
        return beside is not None and value.rank == beside.rank > 0 and value.shape[0] == 1 != beside.run(-1).shape[0]

    def registered(self, node: Node, value: Value) -> Tensor:
        """Return the parameter or buffer of a constant; made once for each."""
        if value.name not in self.constants:
            named = value.source and not set(":/") & set(value.source)
            path = value.source if named else f"{self.path_of(node)}_constant"
            self.constants[value.name] = place(self.network, path, constant(torch.from_numpy(np.array(value.array))))
        found: Tensor = attribute(self.network, self.constants[value.name])
        return found.detach()

    def repeated(self, node: Node, row: Value) -> Value:
        """Return a live value that holds a row as often as there are images."""
        name = f"{row.name} for each image"
        if name not in self.values:
            tensor = self.registered(node, replace(row, source=row.source or self.source_of(row)))
            module = ForEachImage()
            self.step(module, f"{self.path_of(node)}_rows", [row.name, self.images.name], [name])
            runs = tuple(module(tensor, images) for images in self.images.runs)
            self.values[name] = Value(name, runs, live=True)
        return self.values[name]

    def source_of(self, row: Value) -> str:
        """Return the initializer that a constant has the values of."""
        for name, array in self.file.tensors.items():
            if array.shape == row.array.shape and array.dtype == row.array.dtype and np.array_equal(array, row.array):
                return name
        return ""

    # Names

    def path_of(self, node: Node) -> str:
        """Return where in the tree the module of a node should lie: as its weight says, else its own name."""
        number = WEIGHTED.get(node.operator)
        if number is not None and number < len(node.input_names) and (path := layer_of(node.input_names[number])):
            return path
        scope = scopes(node.name, node.operator)
        if number is not None and scope:
            return scope
        kind = node.operator.lower()
        if scope:
            return f"{scope}.{kind}"
        self.used[kind] += 1
        return f"{kind}_{self.used[kind]}"


class ForEachImage(nn.Module):
    """Repeats one row as often as there are images."""

    def forward(self, row: Tensor, images: Tensor) -> Tensor:
        """Return (n, ...) of (1, ...)."""
        return row.expand(images.shape[0], *[-1] * (row.ndim - 1))


WIDTHS = (np.dtype(np.float64), np.dtype(np.float16))


def _check_growth(node: Node, given: Sequence[Any]) -> None:
    """Raise InputError where a constant would be larger than any network's."""
    sizes = [np.asarray(array).shape for array in given]
    match node.operator:
        case "ConstantOfShape":
            check_size([abs(int(size)) for size in given[0]])
        case "Expand":
            check_size(np.broadcast_shapes(sizes[0], tuple(int(size) for size in given[1])))
        case "Tile":
            check_size([size * int(times) for size, times in zip(sizes[0], given[1], strict=True)])
        case "Range":
            start, limit, step = (float(np.asarray(one).reshape(-1)[0]) for one in given)
            check_size([int(abs((limit - start) / step)) + 1])
        case "OneHot" | "EyeLike" | "Resize" | "Upsample" | "Pad" | "Loop" | "Scan" | "SequenceConstruct":
            raise NotReadError("it computes a constant of another size than what it reads")
        case "MatMul" | "Gemm" | "Einsum" | "Conv":
            check_size([max(1, sizes[0][0] if sizes[0] else 1), *sizes[-1]])
        case "Gather" | "GatherND" | "GatherElements":
            check_size([*sizes[0][1:], *sizes[1]])
        case "Constant" | "Concat" | "Shape":
            pass
        case _:
            if len(sizes) > 1 and all(np.prod(size, dtype=float) <= LARGEST_VALUE for size in sizes):
                with contextlib.suppress(ValueError):
                    check_size(np.broadcast_shapes(*sizes))


def _computed(proto: NodeProto, feeds: Mapping[str, Any], opset: int) -> list[Any]:
    """Return the results of one node, by ONNX's own reference."""
    if proto.op_type == "Constant" and proto.attribute and proto.attribute[0].name == "value":
        return [onnx.numpy_helper.to_array(proto.attribute[0].t)]
    if proto.op_type == "ConstantOfShape":
        value = next((onnx.numpy_helper.to_array(item.t) for item in proto.attribute), np.zeros(1, np.float32))
        return [np.full(tuple(feeds[proto.input[0]].tolist()), value.reshape(-1)[0])]
    graph = helper.make_graph(
        [proto],
        "constant",
        [helper.make_value_info(name, onnx.TypeProto()) for name in feeds],
        [helper.make_value_info(name, onnx.TypeProto()) for name in proto.output if name],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    return list(onnx.reference.ReferenceEvaluator(model).run(None, dict(feeds)))


def refusal(node: Node, reason: str) -> str:
    """Return what a user is told of an operator that cannot be read."""
    name = node.name or (node.outputs[0] if node.outputs else "without a name")
    return f"operator {node.operator} (node {name}) cannot be read: {reason}"
