"""In: a cut form of a model. Out: its ONNX files, from what earlier exports of other cut forms have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, numpy_helper
from torch import Tensor, nn

from hirelc_deploy.compress.onnx_file import export
from hirelc_deploy.compress.onnx_file.folding import Arrays, Recipe, tensors_of, uses
from hirelc_deploy.errors import ExportError

Integers = NDArray[np.int64]


class Exporter:
    """Writes the files of one model's cut forms: the first few by exporting, the others by filling in.

    Two exports of a model at different widths differ in their weights, which come from the module's tensors, and in
    integers, such as the shapes that Reshape is given. Both are certain or not used: a weight by how it was computed
    in the first export, an integer when every width that could explain it in all exports so far says the same about
    the next. What cannot be told is exported, and learned from. Every file is compared with torch either way. Cut forms
    that lack other branches have nothing in common here.

    Attributes:
        batch: Images of the static files.
        filled: Number of models written without exporting.
        exported: Number of models that were exported, by reason.
    """

    def __init__(self, example: Tensor, batch: int = 1) -> None:
        self.batch = batch
        self.filled = 0
        self.exported: Counter[str] = Counter()
        self._example = example
        self._templates: dict[tuple[str, ...], Template] = {}
        self._why_none: dict[tuple[str, ...], str] = {}

    def write(self, model: nn.Module, batched: Path, static: Path) -> None:
        """Write a model for any number of images, and for `batch`; see `export_onnx` for what is checked and raised."""
        try:
            files = self._fill(model)
        except _NotCertain as reason:
            self.exported[str(reason)] += 1
            files = self._export(model)
        else:
            self.filled += 1
        batched.write_bytes(files[0])
        static.write_bytes(files[1])

    def _fill(self, model: nn.Module) -> tuple[bytes, bytes]:
        template = self._templates.get(names := tuple(tensors_of(model)))
        if template is None:
            raise _NotCertain(self._why_none.get(names, "first"))
        with export.evaluating(model):
            batched, static = (proto.SerializeToString() for proto in template.fill(model))
            exactly, several = export.probe(model, self._example, (self.batch, len(self._example) + 2))
        try:
            export.check_parity(batched, [several])
            export.check_parity(static, [exactly])
        except ExportError as error:
            raise _NotCertain(f"filled in, it fails: {error}") from None
        return batched, static

    def _export(self, model: nn.Module) -> tuple[bytes, bytes]:
        exported = export.exported(model, self._example)
        static = export.static_batch(exported.proto, self.batch)
        names = tuple(tensors_of(model))
        try:
            if exported.recipe is None:
                raise _NotCertain("the exporter does not tell where weights come from")
            if names in self._templates:
                self._templates[names].learn(exported.recipe, exported.proto, static, model)
            else:
                self._templates[names] = Template(exported.recipe, exported.proto, static, model)
        except _NotCertain as reason:
            self._why_none[names] = str(reason)
        return exported.proto.SerializeToString(), static.SerializeToString()


class Template:
    """What exports of one model at several widths have in common, and how their integers follow the widths."""

    def __init__(self, recipe: Recipe, batched: ModelProto, static: ModelProto, model: nn.Module) -> None:
        self._recipe = recipe
        self._first = _take_apart(recipe, (batched, static), tensors_of(model))
        self._integers = [self._first.integers]
        self._widths = [_widths(model)]

    def learn(self, recipe: Recipe, batched: ModelProto, static: ModelProto, model: nn.Module) -> None:
        """Take in an export at other widths; raises _NotCertain, and learns nothing, when its graph is another."""
        parts = _take_apart(recipe, (batched, static), tensors_of(model))
        if parts.signature != self._first.signature:
            raise _NotCertain("its graph is another one")
        self._integers.append(parts.integers)
        self._widths.append(_widths(model))

    def fill(self, model: nn.Module) -> list[ModelProto]:
        """Return the files of a model for any number of images and for a fixed batch.

        Raises:
            _NotCertain: What the exports so far say leaves a choice.
            ExportError: A constant that is not finite.
        """
        integers = predicted(np.stack(self._integers), np.stack(self._widths), _widths(model))
        source = iter(np.split(integers, self._first.ends))
        settings = {name: _next_like(value, source) for name, value in self._recipe.settings.items()}
        constants = self._recipe.constants(tensors_of(model), settings)
        export.check_finite(constants)
        filled = []
        for skeleton, origins in zip(self._first.skeletons, self._first.origins, strict=True):
            proto = ModelProto.FromString(skeleton)
            _replace_integers(proto, lambda _old: next(source))
            for initializer in proto.graph.initializer:
                if initializer.name in origins:
                    value = np.ascontiguousarray(constants[origins[initializer.name]])
                    initializer.CopyFrom(numpy_helper.from_array(value, initializer.name))
            filled.append(proto)
        return filled


class _NotCertain(Exception):  # noqa: N818 - never leaves this module
    """Why a model has to be exported."""


def predicted(integers: Integers, widths: Integers, asked: Integers) -> Integers:
    """Return the integers of an export at the widths `asked`, from those of earlier exports.

    Each integer follows one width linearly, or none: number = first + slope * (width - first width).

    Args:
        integers: (exports, m).
        widths: (exports, n): the dimensions of the module's tensors.
        asked: (n,).

    Raises:
        _NotCertain: A width that has never changed does now, or the widths that explain an integer disagree.
    """
    moved, wanted = widths - widths[0], asked - widths[0]
    columns = np.unique(np.concatenate([moved, wanted[None]]), axis=1)
    moved, wanted = columns[:-1], columns[-1]
    if ((wanted != 0) & ~moved.any(axis=0)).any():
        raise _NotCertain("a width that no earlier export had cut")
    result: Integers = integers[0].copy()
    changes = integers - integers[0]
    for index in np.flatnonzero(changes.any(axis=0)):
        change = changes[:, index]
        most = int(np.abs(change).argmax())
        explains = (moved[most] != 0) & (np.outer(change, moved[most]) == change[most] * moved).all(axis=0)
        if not explains.any():
            raise _NotCertain("a number in its graph follows no single width")
        says = np.unique(change[most] * wanted[explains] / moved[most][explains])
        if len(says) > 1 or says[0] != round(says[0]):
            raise _NotCertain("several widths explain a number in its graph")
        result[index] += round(says[0])
    return result


@dataclass(frozen=True)
class _Parts:
    """Exported files without their weights and integers.

    Attributes:
        origins: For each file, initializer to the constant of the recipe that it is.
        integers: Those of the settings of the recipe, then of the files; `ends` says where to split them.
        signature: Equal for two exports that differ in nothing but weights, integers and chosen names.
    """

    skeletons: tuple[bytes, ...]
    origins: tuple[dict[str, str], ...]
    integers: Integers
    ends: Integers
    signature: tuple[bytes, ...]


def _take_apart(recipe: Recipe, files: tuple[ModelProto, ...], tensors: Arrays) -> _Parts:
    """Raises _NotCertain when the files have changed a constant of the recipe: then it is not known how."""
    constants = recipe.constants(tensors, recipe.settings)
    found = [_flat(value) for value in recipe.settings.values() if value.dtype == np.int64]
    signature = [recipe.arithmetic.SerializeToString(deterministic=True)]
    signature += [value.tobytes() for value in recipe.settings.values() if value.dtype != np.int64]
    skeletons, origins = [], []

    def take(old: Integers) -> Integers:
        found.append(old)
        return np.zeros_like(old)

    for file in files:
        proto = ModelProto()
        proto.CopyFrom(file)
        origins.append(_origins(proto, recipe, constants))
        _own_constants(proto, origins[-1])
        _replace_integers(proto, take)
        skeletons.append(proto.SerializeToString())
        signature.append(_signature(proto, origins[-1]))
    lengths = np.array([len(part) for part in found], np.int64)
    return _Parts(tuple(skeletons), tuple(origins), np.concatenate(found), np.cumsum(lengths)[:-1], tuple(signature))


def _own_constants(proto: ModelProto, origins: Mapping[str, str]) -> None:
    """Drop the values of weights, and give each reader of another constant its own: equal numbers are kept once.

    Known shapes come in the order of the nodes, as constants do.
    """
    graph = proto.graph
    values = {initializer.name: initializer for initializer in graph.initializer}
    constants = {name: TensorProto(name=name) for name in origins}
    for number, node in enumerate(graph.node):
        for position, tensor in enumerate(node.input):
            if tensor in values and tensor not in origins:
                node.input[position] = name = f"{tensor}:{number}:{position}"
                constants[name] = TensorProto()
                constants[name].CopyFrom(values[tensor])
                constants[name].name = name
    del graph.initializer[:]
    graph.initializer.extend(constants.values())
    shapes = {value.name: value for value in graph.value_info}
    ordered = [shapes[tensor] for node in graph.node for tensor in node.output if tensor in shapes]
    del graph.value_info[:]
    graph.value_info.extend(ordered)


def _signature(proto: ModelProto, origins: Mapping[str, str]) -> bytes:
    """Return the graph with names that say where things are; weights are called as in the recipe."""
    numbered = ModelProto()
    numbered.CopyFrom(proto)
    graph = numbered.graph
    names = {value.name: value.name for value in (*graph.input, *graph.output)} | dict(origins)
    for index, node in enumerate(graph.node):
        for position, tensor in enumerate(node.input):
            names.setdefault(tensor, f"{index}<{position}")
        for position, tensor in enumerate(node.output):
            names.setdefault(tensor, f"{index}>{position}")
        node.name = node.name.partition("/")[0] if "/" in node.name else ""
        node.input[:] = [names[tensor] for tensor in node.input]
        node.output[:] = [names[tensor] for tensor in node.output]
    for named in (*graph.initializer, *graph.value_info):
        named.name = names[named.name]
    signature: bytes = numbered.SerializeToString(deterministic=True)
    return signature


def _origins(proto: ModelProto, recipe: Recipe, constants: Arrays) -> dict[str, str]:
    """Return initializer to constant; a constant under another name is known by its values."""
    values = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer if i.data_type == TensorProto.FLOAT}
    origins = {}
    for name, constant in constants.items():
        others = (other for other in values if other not in constants and np.array_equal(values[other], constant))
        same = [name] if name in values and np.array_equal(values[name], constant) else list(others)
        if len(same) != 1 or uses(proto.graph, same)[same[0]] != recipe.uses[name]:
            raise _NotCertain(f"what became of {name} is not known")
        origins[same[0]] = name
    if len(origins) < len(constants):
        raise _NotCertain("two constants have become one")
    return origins


def _next_like(value: NDArray[np.generic], source: Iterator[Integers]) -> NDArray[np.generic]:
    if value.dtype != np.int64:
        return value
    following: NDArray[np.generic] = next(source).reshape(value.shape)
    return following


def _flat(value: NDArray[np.generic]) -> Integers:
    flat: Integers = np.asarray(value, np.int64).ravel()
    return flat


def _replace_integers(proto: ModelProto, replace: Callable[[Integers], Integers]) -> None:
    """Replace every integer of a graph that could depend on a width: attributes, integer constants, known shapes."""
    graph = proto.graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == attribute.INT:
                attribute.i = int(replace(np.array([attribute.i], np.int64))[0])
            elif attribute.type == attribute.INTS:
                attribute.ints[:] = replace(np.array(attribute.ints, np.int64)).tolist()
    for initializer in graph.initializer:
        if initializer.data_type == TensorProto.INT64:
            value = numpy_helper.to_array(initializer)
            new = replace(value.ravel()).reshape(value.shape)
            initializer.CopyFrom(numpy_helper.from_array(new, initializer.name))
    for tensor in (*graph.value_info, *graph.output):
        for dimension in tensor.type.tensor_type.shape.dim:
            if dimension.HasField("dim_value"):
                dimension.dim_value = int(replace(np.array([dimension.dim_value], np.int64))[0])


def _widths(model: nn.Module) -> Integers:
    """Return (n,): all dimensions of a module's tensors."""
    return np.array([size for tensor in tensors_of(model).values() for size in tensor.shape], np.int64)
