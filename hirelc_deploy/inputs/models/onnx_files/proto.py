"""In: an ONNX file of anybody's. Out: its graph, checked, and its tensors; nothing outside of its folder is opened."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, inliner, numpy_helper

from hirelc_deploy.errors import InputError
from hirelc_deploy.user_code import first_line

Array = NDArray[np.generic]

OLDEST_OPSET = 9
LARGEST_FILE = 2**31 - 1
"""Bytes of one protobuf message; larger networks keep their tensors in files beside it."""

MOST_NODES = 100_000
"""After local functions are written out: a file of a few lines can call its functions a billion times."""

DEEPEST = 32
"""Graphs within graphs (branches of If), and functions that call functions."""

STANDARD = ("", "ai.onnx")

QUANTIZED = {
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger",
    "MatMulInteger", "MatMulNBits", "QGemm", "QLinearAdd", "QAttention",
}  # fmt: skip

READABLE = {
    TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.BOOL,
    TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64, TensorProto.UINT8, TensorProto.UINT16,
    TensorProto.UINT32, TensorProto.UINT64,
}  # fmt: skip

TYPED_FIELDS = ("float_data", "double_data", "int32_data", "int64_data", "uint64_data", "string_data")


@dataclass(frozen=True)
class OnnxFile:
    """What an ONNX file holds.

    Attributes:
        model: Sorted; local functions are written out.
        tensors: Initializers by name, floats as float32.
        has_external: Whether tensors came from files beside it.
        half: Whether any of its tensors is a 16-bit float.
        foreign: The first operator that neither the standard nor the file defines, `` for none.
        changed: It is not what lies at `path` any more: inputs that were told beforehand are tensors now, or the images
            are floats in place of bytes.
    """

    path: Path
    model: ModelProto
    opset: int
    tensors: Mapping[str, Array]
    has_external: bool
    half: bool
    foreign: str = ""
    changed: bool = False

    @property
    def source(self) -> Path | bytes:
        """What ONNX Runtime is given: the path only where tensors lie beside it."""
        if self.changed:
            whole: bytes = self_contained(self).SerializeToString()
            return whole
        return self.path if self.has_external else self.path.read_bytes()

    @property
    def graph(self) -> GraphProto:
        """The graph of the model."""
        return self.model.graph


def read_file(path: Path) -> OnnxFile:
    """Read a file as data of a stranger's: sizes are compared with what is there before anything is allocated.

    Raises:
        InputError: It is no ONNX file, broken, or quantized already.
    """
    model = _parsed(path)
    foreign = _foreign(path, model)
    model = _without_functions(path, model)
    if not model.graph.node or not model.graph.output:
        raise InputError(f"{path}: its graph has no {'nodes' if model.graph.output else 'outputs'}; export it again.")
    opset = max((o.version for o in model.opset_import if o.domain in STANDARD), default=0)
    if not OLDEST_OPSET <= opset <= onnx.defs.onnx_opset_version():
        raise InputError(
            f"{path}: opset {opset}; {OLDEST_OPSET} to {onnx.defs.onnx_opset_version()} are read; export it with one."
        )
    for tensor in tensors_of(model.graph):
        _check_tensor(path, tensor)
    if len(found := {tensor.name for tensor in model.graph.initializer}) < len(model.graph.initializer):
        raise InputError(f"{path}: {len(model.graph.initializer) - len(found)} names of tensors are there twice.")
    _check_structure(path, model)
    tensors = {tensor.name: _read(path, tensor) for tensor in model.graph.initializer}
    external = any(_is_external(tensor) for tensor in model.graph.initializer)
    halves = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    half = any(tensor.data_type in halves for tensor in model.graph.initializer)
    return OnnxFile(path, model, opset, tensors, external, half, foreign)


def with_told(file: OnnxFile, told: Mapping[str, Any]) -> OnnxFile:
    """Return a file some of whose inputs are constants.

    Args:
        told: Name of an input to its value: a number, or lists of numbers.

    Raises:
        InputError: There is no such input, or it takes no such value.
    """
    if not told:
        return file
    model, tensors = ModelProto(), dict(file.tensors)
    model.CopyFrom(file.model)
    for name, value in told.items():
        given = {one.name: one for one in model.graph.input if one.name not in tensors}
        if name not in given:
            raise InputError(f"{file.path}: it takes no argument {name!r}, only input_size and {', '.join(given)}.")
        kind = given[name].type.tensor_type
        try:
            array = np.array(value, helper.tensor_dtype_to_np_dtype(kind.elem_type))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{file.path}: input {name} cannot be {value!r:.60} ({first_line(error)}).") from None
        sizes = [dim.dim_value for dim in kind.shape.dim]
        if array.ndim != len(sizes) or any(
            want not in (0, size) for want, size in zip(sizes, array.shape, strict=True)
        ):
            raise InputError(f"{file.path}: input {name} has the shape {sizes}, the value given {list(array.shape)}.")
        model.graph.initializer.append(numpy_helper.from_array(array, name))
        model.graph.input.remove(given[name])
        tensors[name] = _as_float32(array)
    return replace(file, model=model, tensors=tensors, changed=True)


def with_float_input(file: OnnxFile) -> OnnxFile:
    """Return a file that takes floats in place of the bytes of its images; the same file where it takes none.

    What follows the input takes floats as well, most often because a Cast to floats comes first.
    """
    inputs = [value for value in file.graph.input if value.name not in file.tensors]
    if len(inputs) != 1 or inputs[0].type.tensor_type.elem_type != TensorProto.UINT8:
        return file
    model = ModelProto()
    model.CopyFrom(file.model)
    for value in model.graph.input:
        if value.name == inputs[0].name:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    del model.graph.value_info[:]
    return replace(file, model=model, changed=True)


def _as_float32(array: Array) -> Array:
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def self_contained(file: OnnxFile) -> ModelProto:
    """Return the model of a file with the tensors that lie beside it in it."""
    if sum(math.prod(tensor.dims) * 4 for tensor in tensors_of(file.graph)) > LARGEST_FILE:
        raise InputError(f"{file.path}: its tensors take more than {LARGEST_FILE} bytes; such files are not placed.")
    model = ModelProto()
    model.CopyFrom(file.model)
    for tensor in tensors_of(model.graph):
        if _is_external(tensor):
            tensor.CopyFrom(_within(file.path, tensor))
    return model


def array_of(path: Path, tensor: TensorProto) -> Array:
    """Return the values of a tensor within a node, floats as float32."""
    return _read(path, tensor)


def _parsed(path: Path) -> ModelProto:
    if not path.is_file():
        raise InputError(f"{path}: no such ONNX file.")
    if not 0 < path.stat().st_size <= LARGEST_FILE:
        size = path.stat().st_size
        raise InputError(f"{path}: {size} bytes; an ONNX file has some, and at most {LARGEST_FILE}.")
    model = ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except (DecodeError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a whole ONNX file ({first_line(error)}); export or copy it again.") from None
    if not model.HasField("graph"):
        raise InputError(f"{path}: there is no graph in it, so it is no ONNX model; export or copy it again.")
    return model


def nodes_of(graph: GraphProto, depth: int = 0) -> Iterator[NodeProto]:
    """Yield the nodes of a graph and of the graphs within it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if depth < DEEPEST else ():
                yield from nodes_of(inner, depth + 1)


def names_within(proto: NodeProto) -> set[str]:
    """Return the names that graphs within a node read."""
    found: set[str] = set()
    waiting = [item.g for item in proto.attribute if item.type == AttributeProto.GRAPH]
    while waiting:
        graph = waiting.pop()
        for node in graph.node:
            found.update(node.input)
            waiting += [item.g for item in node.attribute if item.type == AttributeProto.GRAPH]
        found.update(value.name for value in graph.output)
    return found


def _foreign(path: Path, model: ModelProto) -> str:
    """Return an operator that neither the standard nor the file defines; raises InputError for quantized networks."""
    foreign = ""
    local = {(function.domain, function.name) for function in model.functions}
    bodies = [node for function in model.functions for node in function.node]
    for node in (*nodes_of(model.graph), *bodies):
        if node.op_type in QUANTIZED:
            raise InputError(
                f"{path}: it is quantized already ({node.op_type}); give the float file that it was made from, for "
                "rounding is done here."
            )
        if (node.domain, node.op_type) not in local and node.domain not in STANDARD:
            foreign = foreign or f"{node.domain}.{node.op_type}"
    return foreign


def _without_functions(path: Path, model: ModelProto) -> ModelProto:
    """Return the model with its local functions written out, where that is finite and not too long."""
    if not model.functions:
        return model
    bodies = {(function.domain, function.name): function for function in model.functions}
    sizes: dict[tuple[str, str], int] = {}

    def size(key: tuple[str, str], above: tuple[tuple[str, str], ...]) -> int:
        if key in above or len(above) > DEEPEST:
            raise InputError(f"{path}: function {key[1]} calls itself, or too many others in a row; export it again.")
        if key not in sizes:
            sizes[key] = count(bodies[key].node, (*above, key))
        return sizes[key]

    def count(nodes: Iterator[NodeProto], above: tuple[tuple[str, str], ...]) -> int:
        keys = [(node.domain, node.op_type) for node in nodes]
        return sum(size(key, above) if key in bodies else 1 for key in keys)

    if count(nodes_of(model.graph), ()) > MOST_NODES:
        raise InputError(f"{path}: more than {MOST_NODES} nodes with its functions written out; export it without.")
    try:
        return inliner.inline_local_functions(model)
    except Exception as error:  # the library's exception classes share no base below Exception
        raise InputError(
            f"{path}: its functions cannot be written out ({first_line(error)}); export it again."
        ) from None


def tensors_of(graph: GraphProto) -> Iterator[TensorProto]:
    """Yield the constants of a graph and of the graphs within it."""
    yield from graph.initializer
    for node in nodes_of(graph):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in (attribute.g, *attribute.graphs):
                yield from inner.initializer


def _is_external(tensor: TensorProto) -> bool:
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def _check_tensor(path: Path, tensor: TensorProto) -> None:
    """Raise InputError unless a tensor has as many values as its shape says."""
    where = f"{path}: tensor {tensor.name or 'without a name'}"
    if tensor.data_type not in READABLE:
        known = TensorProto.DataType.keys()
        kind = known[tensor.data_type] if tensor.data_type < len(known) else str(tensor.data_type)
        raise InputError(f"{where} is of type {kind}, which is not read; give the float file that it was made from.")
    if any(size < 0 for size in tensor.dims):
        raise InputError(f"{where} has the shape {list(tensor.dims)}; export it again.")
    expected = math.prod(tensor.dims)
    if _is_external(tensor):
        _place(path, tensor)
        return
    itemsize = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    if tensor.HasField("raw_data"):
        found, expected = len(tensor.raw_data), expected * itemsize
    else:
        found = sum(len(getattr(tensor, field)) for field in TYPED_FIELDS)
    if found != expected:
        what = "bytes" if tensor.HasField("raw_data") else "values"
        raise InputError(f"{where} has {found} {what}, but its shape {list(tensor.dims)} needs {expected}.")


def _place(path: Path, tensor: TensorProto) -> tuple[Path, int, int]:
    """Return file, offset and length of an external tensor; raises InputError for a place outside of the folder."""
    where = f"{path}: tensor {tensor.name}"
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    parts = (*PurePosixPath(location).parts, *PureWindowsPath(location).parts)
    leads_out = not location or location[0] in "/\\" or ".." in parts or PureWindowsPath(location).drive
    file = path.parent / location
    try:
        leads_out = leads_out or not file.resolve().is_relative_to(path.parent.resolve()) or file.is_symlink()
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", -1))
        size = -1 if leads_out else file.stat().st_size if file.is_file() else -2
    except (OSError, ValueError) as error:
        raise InputError(f"{where} is in {location[:80]!r}, which cannot be read ({first_line(error)}).") from None
    if size == -1:
        raise InputError(f"{where} is in {location[:80]!r}, outside of the file's folder; it is not opened.")
    if size == -2:
        raise InputError(f"{where} is in {location[:80]!r}, which is not beside the file; copy it there.")
    needed = math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    if offset < 0 or length not in (-1, needed) or offset + needed > size:
        raise InputError(
            f"{where} needs {needed} bytes at {offset} of {location[:80]}, which has {size}; copy it again."
        )
    return file, offset, needed


def _within(path: Path, tensor: TensorProto) -> TensorProto:
    """Return an external tensor with its values in it."""
    file, offset, length = _place(path, tensor)
    with file.open("rb") as stream:
        stream.seek(offset)
        values = stream.read(length)
    return TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type, raw_data=values)


def _read(path: Path, tensor: TensorProto) -> Array:
    array = numpy_helper.to_array(_within(path, tensor) if _is_external(tensor) else tensor)
    is_float = tensor.data_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
    return np.array(array, np.float32 if is_float else None)


def _check_structure(path: Path, model: ModelProto) -> None:
    """Raise InputError unless the standard's own checker accepts the graph; large tensors are left out of it."""
    if len(list(nodes_of(model.graph))) > MOST_NODES:
        raise InputError(f"{path}: more than {MOST_NODES} nodes; no network of pictures has so many.")
    light = ModelProto()
    light.CopyFrom(model)
    given = {value.name for value in light.graph.input}
    for tensor in light.graph.initializer:
        if tensor.name not in given:
            light.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    del light.graph.initializer[:]
    for value in light.graph.output:  # exporters leave shapes of outputs out, which the checker wants and nobody reads
        if not value.type.WhichOneof("value") or value.type.HasField("tensor_type"):
            value.type.tensor_type.shape.SetInParent()
            value.type.tensor_type.elem_type = value.type.tensor_type.elem_type or TensorProto.FLOAT
    if light.graph.sparse_initializer:
        raise InputError(f"{path}: it has sparse tensors, which are not read; export it with dense ones.")
    try:
        onnx.checker.check_model(light)
    except Exception as error:  # the library's exception classes share no base below Exception
        text = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: not a valid ONNX graph ({text}); export it again.") from None
