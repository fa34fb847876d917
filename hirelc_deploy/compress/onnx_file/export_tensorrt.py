"""In: a float ONNX file, calibration ranges, a precision per layer. Out: the strongly typed FP16 file TensorRT builds.

One form for TensorRT 10.3 to 11 and TensorRT-RTX. Types come from the file alone, because from 11.0 on there is no
other way: FP16 constants and tensors, a Cast where the float32 input and output meet them, and Q/DQ pairs around what
runs in integers. The rules for the pairs are what NVIDIA's parser and graph compiler were seen to want (the tests ask
them again where they are installed):

- signed and symmetric, zero points written out as 0: any other zero point is a parse error, and one left out would be
  uint8 for every other runtime;
- one pair per tensor, shared by all its readers, so that the three projections of an attention stay one product;
- weights int8 with one scale per output channel and only a DequantizeLinear; biases stay FP16;
- of an attention either queries, keys, values and the output of Softmax are integer, or nothing: in between, beyond
  512 keys, and with heads whose size is no multiple of 16, the compiler gives up its fused kernel;
- queries, keys and values are rounded where their projection writes them, before they are split and turned: rounded
  right before the products, a fused projection was taken apart, and its weights were restored to FP16 at every run;
- the pair of a residual sum behind a convolution is on its other input, so that the sum becomes part of the kernel.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from hirelc_deploy.compress.integer import ends
from hirelc_deploy.compress.integer.calibration import Ranges
from hirelc_deploy.compress.onnx_file.export import layer_of_node
from hirelc_deploy.errors import ExportError, InputError

HALF_LARGEST = float(np.finfo(np.float16).max)
HEADROOM = 2.0
"""A tensor that came within this factor of FP16's largest number during calibration is computed in FP32."""

FUSED_ATTENTION_KEYS, FUSED_HEAD_MULTIPLE = 512, 16
"""What TensorRT's fused INT8 attention takes (TensorRT-RTX 1.7): rows of Softmax up to 512, not 513; heads of size 16,
32 and 64, not 8, 20 and 24."""

QUANTIZED = ("Conv", "Gemm", "MatMul")
"""Weight layers that may be integer. Transposed convolutions stay FP16."""


@dataclass(frozen=True)
class Grid:
    """The numbers a tensor is rounded to: multiples of a scale, up to `largest` of them on either side."""

    onnx_type: int
    largest: float

    def rounded(self, multiples: NDArray[np.float64]) -> NDArray[Any]:
        """Return the nearest numbers of the grid, saturated at its ends."""
        inside = np.clip(multiples, -self.largest, self.largest)
        if self.onnx_type == TensorProto.INT8:
            return np.rint(inside).astype(np.int8)
        return inside.astype(ml_dtypes.float8_e4m3fn)


GRIDS: Mapping[str, Grid] = MappingProxyType(
    {"int8": Grid(TensorProto.INT8, 127.0), "fp8": Grid(TensorProto.FLOAT8E4M3FN, 448.0)}
)
"""Precision of a layer to its numbers; -128 is left out, so that a product of two extremes cannot stand alone."""


@dataclass(frozen=True)
class Pattern:
    """Which parts of the network beside the weight layers become integer.

    Attributes:
        residuals: Sums behind convolutions, and pooling.
        attention: Both products of an attention, where TensorRT has a fused kernel for it.
        depthwise: Depthwise convolutions.
    """

    description: str
    residuals: bool
    attention: bool
    depthwise: bool


PATTERNS: Mapping[str, Pattern] = MappingProxyType(
    {
        "all": Pattern("everything that has an integer kernel, attention included", True, True, True),
        "all-depthwise": Pattern("as `all`, but depthwise convolutions stay FP16", True, True, False),
        "weights+add": Pattern("weight layers, residual sums, pooling; attention stays FP16", True, False, True),
        "weights": Pattern("convolutions and linear layers alone; sums and attention stay FP16", False, False, True),
        "weights-depthwise": Pattern("as `weights`, but depthwise convolutions stay FP16", False, False, False),
    }
)


def write_tensorrt(
    float_model: Path, out: Path, ranges: Ranges, precision_of: Callable[[str], str], *, pattern: str
) -> dict[str, str]:
    """Write the TensorRT form of a float file and return node name to layer name of its weight layers.

    Input and output stay float32, so that the file takes and gives what every other file of the model does. Weights are
    rounded to int8 (or FP8) per output channel, activations per tensor; the rest is FP16, but for what calibration saw
    beyond FP16's range.

    Args:
        float_model: A file of `set_static_batch`.
        ranges: Of `calibration.calibrate` on the dynamic file; only their larger end counts, as the grid is symmetric.
        precision_of: Layer name to `int8`, `fp8` or `float`; name of an end (`ends.find`) likewise.
        pattern: A key of PATTERNS.

    Raises:
        InputError: an unknown pattern or precision.
        ExportError: a tensor that must be rounded has no range.
    """
    if pattern not in PATTERNS:
        raise InputError(f"pattern {pattern!r} is unknown; use {', '.join(PATTERNS)}.")
    proto = onnx.shape_inference.infer_shapes(onnx.load(str(float_model)))
    graph = _Graph(proto)
    largest = _largest_values(graph, ranges)
    chosen = _rounded_inputs(graph, precision_of, PATTERNS[pattern])
    wide = _wide_nodes(graph, largest)
    both = {tensor: (ranges.low[tensor], ranges.high[tensor]) for tensor in ranges.low}
    decoding = (end.nodes for end in ends.find(proto, both) if precision_of(end.name) == "float")
    apart = wide.union(*decoding)
    grids = {name: grid for name, (grid, _) in chosen.items() if name not in apart}
    inputs = {name: positions for name, (_, positions) in chosen.items() if name not in apart}
    _insert_pairs(graph, largest, grids, inputs)
    _to_half(graph, wide)
    written = graph.finished()
    onnx.checker.check_model(written)
    out.write_bytes(written.SerializeToString())
    return layer_of_node(written)


class _Graph:
    """A model whose nodes are being replaced, with the look-ups that the rules ask for."""

    def __init__(self, proto: ModelProto) -> None:
        self.proto = proto
        self.nodes: list[NodeProto] = list(proto.graph.node)
        self.constants: dict[str, NDArray[Any]] = {
            initializer.name: numpy_helper.to_array(initializer) for initializer in proto.graph.initializer
        }
        self.makers = {tensor: node for node in self.nodes for tensor in node.output}
        self.order = {node.name: index for index, node in enumerate(self.nodes)}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for tensor in node.input:
                self.readers[tensor].append(node)
        values = (*proto.graph.value_info, *proto.graph.input, *proto.graph.output)
        self.types = {value.name: value.type.tensor_type for value in values}

    def is_float(self, tensor: str) -> bool:
        """Return whether a tensor or constant is floating point."""
        if tensor in self.constants:
            return self.constants[tensor].dtype.kind == "f"
        return tensor in self.types and self.types[tensor].elem_type == TensorProto.FLOAT

    def last_dimension(self, tensor: str) -> int:
        """Return the size of the last axis; 0 where it is not known."""
        dimensions = self.types[tensor].shape.dim if tensor in self.types else ()
        return int(dimensions[-1].dim_value) if dimensions else 0

    def activations(self, node: NodeProto) -> list[str]:
        """Return the inputs of a node that are no constants."""
        return [tensor for tensor in node.input if tensor and tensor not in self.constants]

    def finished(self) -> ModelProto:
        """Return the model in its new form, without constants that nobody reads and without old type notes."""
        used = {tensor for node in self.nodes for tensor in node.input}
        old = self.proto.graph
        constants = [
            numpy_helper.from_array(np.asarray(value, order="C"), name)  # ascontiguousarray would give a scalar an axis
            for name, value in self.constants.items()
            if name in used
        ]
        return helper.make_model(
            helper.make_graph(self.nodes, old.name, old.input, old.output, constants),
            opset_imports=[opset for opset in self.proto.opset_import if opset.domain == ""],
            ir_version=self.proto.ir_version,
        )


_SAME_VALUES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Slice", "Gather", "Split")
_SCORES = frozenset({"Mul", "Div", "Add", "Where", "Cast", *_SAME_VALUES})
"""What lies between the first product of an attention and its Softmax: scale, bias, mask, changes of shape."""
_FOLDED = frozenset({"Relu", "Clip", "Identity"})


def _largest_values(graph: _Graph, ranges: Ranges) -> dict[str, float]:
    """Return tensor name to the largest absolute value seen; a tensor that was only moved has its source's."""
    largest = {name: max(abs(ranges.low[name]), abs(ranges.high[name])) for name in ranges.low}
    moved = [(node.input[0], tensor) for node in graph.nodes if node.op_type in _SAME_VALUES for tensor in node.output]
    for source, result in (*moved, *((result, source) for source, result in reversed(moved))):
        if source in largest:
            largest.setdefault(result, largest[source])
    return largest


def _rounded_inputs(
    graph: _Graph, precision_of: Callable[[str], str], pattern: Pattern
) -> dict[str, tuple[Grid, tuple[int, ...]]]:
    """Return node name to its grid and the positions of the inputs that are rounded."""
    layers = layer_of_node(graph.proto)
    chosen: dict[str, tuple[Grid, tuple[int, ...]]] = {}
    for node in graph.nodes:
        if node.name not in layers or node.op_type not in QUANTIZED:
            continue
        precision = precision_of(layers[node.name])
        if precision not in (*GRIDS, "float"):
            raise InputError(f"{layers[node.name]}: precision {precision!r}; use {', '.join(GRIDS)} or float.")
        if precision != "float" and (pattern.depthwise or not _is_depthwise(node, graph)):
            chosen[node.name] = (GRIDS[precision], (0, 1))
    if not chosen:
        return chosen
    grid = next(iter(chosen.values()))[0]
    if pattern.attention:
        for name, positions in _attentions(graph):
            _, before = chosen.get(name, (grid, ()))
            chosen[name] = grid, (*before, *(position for position in positions if position not in before))
    if pattern.residuals:
        chosen |= {name: (grid, (position,)) for name, position in _residuals(graph, chosen)}
        chosen |= dict.fromkeys(_pools(graph, chosen), (grid, (0,)))
    return chosen


def _is_depthwise(node: NodeProto, graph: _Graph) -> bool:
    groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
    return node.op_type == "Conv" and groups > 1 and graph.constants[node.input[1]].shape[1] == 1


def _attentions(graph: _Graph) -> Iterable[tuple[str, tuple[int, ...]]]:
    """Yield the nodes, and which of their inputs, that make each attention integer which has a fused kernel."""
    for node in graph.nodes:
        if node.op_type != "Softmax" or not 0 < graph.last_dimension(node.output[0]) <= FUSED_ATTENTION_KEYS:
            continue
        scores = _product_before(graph, node.input[0])
        mixes = [reader for reader in _readers_behind(graph, node.output[0]) if _is_product(graph, reader)]
        if scores is None or len(mixes) != 1 or graph.last_dimension(scores.input[0]) % FUSED_HEAD_MULTIPLE:
            continue
        yield mixes[0].name, (0,)
        for reader, position in ((scores, 0), (scores, 1), (mixes[0], 1)):
            source, at = _where_written(graph, reader, position)
            yield source.name, (at,)


def _where_written(graph: _Graph, node: NodeProto, position: int) -> tuple[NodeProto, int]:
    """Follow an input back through moves and constant factors; return the last node on the way, and its input."""
    maker = graph.makers.get(node.input[position])
    if maker is None or maker.op_type not in (*_SAME_VALUES, "Mul", "Div"):
        return node, position
    sources = [at for at, tensor in enumerate(maker.input) if tensor and tensor not in graph.constants]
    return _where_written(graph, maker, sources[0]) if len(sources) == 1 else (node, position)


def _is_product(graph: _Graph, node: NodeProto) -> bool:
    return node.op_type == "MatMul" and len(graph.activations(node)) == 2


def _product_before(graph: _Graph, tensor: str) -> NodeProto | None:
    """Return the product of two activations that a Softmax's input comes from."""
    waiting, seen = [tensor], set[str]()
    while waiting:
        maker = graph.makers.get(waiting.pop())
        if maker is None or maker.name in seen:
            continue
        seen.add(maker.name)
        if _is_product(graph, maker):
            return maker
        if maker.op_type in _SCORES:
            waiting.extend(graph.activations(maker))
    return None


def _readers_behind(graph: _Graph, tensor: str) -> list[NodeProto]:
    """Return the nodes that read a tensor, also through nodes that only change its shape."""
    found: list[NodeProto] = []
    for reader in graph.readers[tensor]:
        found += _readers_behind(graph, reader.output[0]) if reader.op_type in _SAME_VALUES else [reader]
    return found


def _residuals(graph: _Graph, chosen: Mapping[str, Any]) -> Iterable[tuple[str, int]]:
    """Yield each sum of two activations that an integer convolution feeds, and the input that is rounded.

    The later of its two inputs is the convolution that takes the sum into its kernel; the earlier one is rounded. Only
    sums that end in integers again gain by it.
    """
    for node in graph.nodes:
        if node.op_type != "Add" or len(graph.activations(node)) != 2 or len(set(node.input)) != 2:
            continue
        makers = [graph.makers.get(tensor) for tensor in node.input]
        at = [-1 if maker is None else graph.order[maker.name] for maker in makers]
        late = makers[0 if at[0] > at[1] else 1]
        if late is not None and late.op_type == "Conv" and late.name in chosen and _ends_in(graph, node, chosen):
            yield node.name, 1 if at[0] > at[1] else 0


def _ends_in(graph: _Graph, node: NodeProto, chosen: Mapping[str, Any]) -> bool:
    """Return whether something integer, another such sum, or a pool reads a sum, perhaps behind its ReLU."""
    for reader in graph.readers[node.output[0]]:
        if reader.name in chosen or reader.op_type in ("Add", "GlobalAveragePool"):
            return True
        if reader.op_type in _FOLDED and _ends_in(graph, reader, chosen):
            return True
    return False


def _pools(graph: _Graph, chosen: Mapping[str, Any]) -> Iterable[str]:
    """Yield average pools behind an integer layer or sum; a MaxPool needs no pair, rounding passes through it."""
    for node in graph.nodes:
        if node.op_type not in ("GlobalAveragePool", "AveragePool"):
            continue
        maker = graph.makers.get(node.input[0])
        while maker is not None and maker.op_type in _FOLDED:
            maker = graph.makers.get(maker.input[0])
        if maker is not None and maker.name in chosen:
            yield node.name


def _wide_nodes(graph: _Graph, largest: Mapping[str, float]) -> frozenset[str]:
    """Return the nodes that are computed in FP32, because FP16 cannot hold what they read or write."""
    limit = HALF_LARGEST / HEADROOM
    return frozenset(
        node.name
        for node in graph.nodes
        if any(largest.get(tensor, 0.0) > limit for tensor in (*node.input, *node.output))
    )


def _insert_pairs(
    graph: _Graph,
    largest: Mapping[str, float],
    grids: Mapping[str, Grid],
    inputs: Mapping[str, tuple[int, ...]],
) -> None:
    """Put Q/DQ in front of activations and DQ behind rounded weights; each tensor is rounded once."""
    nodes: list[NodeProto] = []
    pairs: dict[tuple[str, int], str] = {}
    for node in graph.nodes:
        for position in inputs.get(node.name, ()):
            tensor, grid = node.input[position], grids[node.name]
            if tensor in graph.constants:
                nodes.append(_rounded_weight(graph, node, position, grid))
                node.input[position] = nodes[-1].output[0]
                continue
            if (tensor, grid.onnx_type) not in pairs:
                if tensor not in largest:
                    raise ExportError(f"{node.name}: no range of its input {tensor}; calibrate on this very model.")
                pairs[tensor, grid.onnx_type] = f"{tensor}:dequantized"
                nodes += _pair(graph, tensor, largest[tensor], grid)
            node.input[position] = pairs[tensor, grid.onnx_type]
        nodes.append(node)
    graph.nodes = nodes


def _scales(largest: NDArray[np.float64], grid: Grid) -> NDArray[np.float16]:
    """Return FP16 scales whose grids reach `largest`: rounded up, so that nothing is clipped by FP16's own rounding."""
    exact = np.maximum(largest / grid.largest, float(np.finfo(np.float16).smallest_subnormal))
    near = exact.astype(np.float16)
    scales = np.where(near.astype(np.float64) < exact, np.nextafter(near, np.float16(np.inf)), near)
    return np.asarray(scales, np.float16)


def _zero(grid: Grid, shape: tuple[int, ...]) -> NDArray[Any]:
    return grid.rounded(np.zeros(shape))


def _pair(graph: _Graph, tensor: str, largest: float, grid: Grid) -> list[NodeProto]:
    scale, zero, rounded = f"{tensor}:scale", f"{tensor}:zero", f"{tensor}:quantized"
    graph.constants[scale] = _scales(np.array(largest, np.float64), grid)
    graph.constants[zero] = _zero(grid, ())
    back = f"{tensor}:dequantized"
    return [
        helper.make_node("QuantizeLinear", [tensor, scale, zero], [rounded], f"{tensor}/QuantizeLinear"),
        helper.make_node("DequantizeLinear", [rounded, scale, zero], [back], f"{tensor}/DequantizeLinear"),
    ]


def _rounded_weight(graph: _Graph, node: NodeProto, position: int, grid: Grid) -> NodeProto:
    """Round a weight per output channel and return the DequantizeLinear that gives it back."""
    name = node.input[position]
    weight = graph.constants[name].astype(np.float64)
    axis = weight.ndim - 1 if node.op_type == "MatMul" else 0
    if node.op_type == "Gemm" and not next((a.i for a in node.attribute if a.name == "transB"), 0):
        axis = 1
    others = tuple(index for index in range(weight.ndim) if index != axis)
    scales = _scales(np.abs(weight).max(axis=others), grid)
    shape = [-1 if index == axis else 1 for index in range(weight.ndim)]
    own = f"{name}:{node.name}"  # two layers of unequal precision may share one constant
    graph.constants[f"{own}:quantized"] = grid.rounded(weight / scales.astype(np.float64).reshape(shape))
    graph.constants[f"{own}:scale"] = scales
    graph.constants[f"{own}:zero"] = _zero(grid, scales.shape)
    parts = [f"{own}:{part}" for part in ("quantized", "scale", "zero")]
    return helper.make_node("DequantizeLinear", parts, [f"{own}:dequantized"], f"{own}/DequantizeLinear", axis=axis)


_FLOAT32_INPUTS = {"Resize": (1, 2)}
"""Operators that want some constants as float32 whatever they compute in."""


def _to_half(graph: _Graph, wide: frozenset[str]) -> None:
    """Turn every float32 tensor into FP16, with casts at the ends of the file and around FP32 nodes."""
    proto, nodes = graph.proto.graph, list[NodeProto]()
    (source,), (result,) = proto.input, proto.output
    renamed = {source.name: f"{source.name}:half"}
    nodes.append(_cast(source.name, renamed[source.name], TensorProto.FLOAT16))
    for node in graph.nodes:
        is_wide = node.name in wide
        for position, tensor in enumerate(node.input):
            if tensor in graph.constants:
                stays = is_wide or position in _FLOAT32_INPUTS.get(node.op_type, ())
                if graph.constants[tensor].dtype == np.float32 and not stays:
                    node.input[position] = _half_constant(graph, tensor)
            elif is_wide and graph.is_float(tensor):
                widened = f"{tensor}:{node.name}:float32"
                nodes.append(_cast(renamed.get(tensor, tensor), widened, TensorProto.FLOAT))
                node.input[position] = widened
            else:
                node.input[position] = renamed.get(tensor, tensor)
        nodes.append(node)
        if is_wide:
            for position, tensor in enumerate(node.output):
                if graph.is_float(tensor):
                    node.output[position] = f"{tensor}:float32"
                    nodes.append(_cast(node.output[position], tensor, TensorProto.FLOAT16))
        else:
            _make_half(node)
    for node in nodes:
        node.input[:] = [f"{result.name}:half" if tensor == result.name else tensor for tensor in node.input]
        node.output[:] = [f"{result.name}:half" if tensor == result.name else tensor for tensor in node.output]
    nodes.append(_cast(f"{result.name}:half", result.name, TensorProto.FLOAT))
    graph.nodes = nodes


def _cast(tensor: str, result: str, to: int) -> NodeProto:
    return helper.make_node("Cast", [tensor], [result], f"{result}/Cast", to=to)


def _half_constant(graph: _Graph, name: str) -> str:
    """Add the FP16 form of a constant and return its name; finite numbers stay finite, as a mask of -1e9 must."""
    value = graph.constants[name]
    finite = np.where(np.isfinite(value), np.clip(value, -HALF_LARGEST, HALF_LARGEST), value)
    graph.constants[f"{name}:half"] = finite.astype(np.float16)
    return f"{name}:half"


def _make_half(node: NodeProto) -> None:
    """Turn the float32 types that a node's attributes name into FP16."""
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16
        elif attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT:
            attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype(np.float16)))
