"""In: a float ONNX file, calibration images, a precision per layer. Out: the Q/DQ file that runs on integers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import TensorData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import add_infer_metadata
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

from hirelc_deploy.compress.integer import ends, products, signed
from hirelc_deploy.compress.integer.bias_correction import correct_biases
from hirelc_deploy.compress.integer.calibration import Ranges
from hirelc_deploy.compress.integer.four_bits import use_four_bits
from hirelc_deploy.compress.integer.sums import align_sums
from hirelc_deploy.compress.onnx_file import constant_factors, rewrite
from hirelc_deploy.compress.onnx_file.export import WEIGHT_OPERATORS, give_each_layer_its_own_constants, layer_of_node
from hirelc_deploy.compress.onnx_file.links import makers_of, put_in_order, readers_of
from hirelc_deploy.errors import ExportError, InputError
from hirelc_deploy.measure.backend import FLOAT_AS, Precision
from hirelc_deploy.plan import LAYER_PRECISIONS


@dataclass(frozen=True)
class Pattern:
    """Which operators become integer around the layers that the plan makes integer.

    Attributes:
        operators: Operator types beside the weight layers; None stands for everything ONNX Runtime can quantize.
        floats: Operator types that stay float although `operators` would have them.
        depthwise: Depthwise convolutions too.
        float_outputs: A Gemm or MatMul whose readers all run in float writes float directly, without rounding.
        sigmoid_gelu: Gelu between layers becomes x * sigmoid(x); see `rewrite.use_sigmoid_gelu`.
    """

    description: str
    operators: frozenset[str] | None
    depthwise: bool
    float_outputs: bool
    floats: frozenset[str] = frozenset()
    sigmoid_gelu: bool = False


BLANKET = "all"
"""The pattern of a blanket INT8 file: everything the runtime's own quantizer would make integer, nothing rewritten, its
own ranges."""

_SAME_VALUES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity")
_PARTS = ("Gather", "Slice", "Split", "Expand", "MaxPool")
"""What hands on some of its values, or each of them several times."""
_ACTIVATIONS = frozenset({"Relu", "Clip"})  # folded into the layer before them, so they go where it goes
_POOLS = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "Flatten"})

_EXACT = MappingProxyType(
    {
        "all": Pattern(
            "everything ONNX Runtime can, attention and layer norm included: its own static quantization",
            None,
            depthwise=True,
            float_outputs=False,
        ),
        "all-depthwise": Pattern(
            "as `all`, but depthwise convolutions stay float", None, depthwise=False, float_outputs=False
        ),
        "all-softmax-add": Pattern(
            "as `all`, but Softmax, sums and layer norms stay float; products of attention and moves of tokens do not",
            None,
            depthwise=True,
            float_outputs=True,
            floats=frozenset({"Softmax", "Add", "LayerNormalization"}),
        ),
        "weights+add": Pattern(
            "convolutions and linear layers, residual additions, pooling; attention, norms and the logits stay float",
            _ACTIVATIONS | _POOLS | {"Add"},
            depthwise=True,
            float_outputs=True,
        ),
        "weights": Pattern(
            "convolutions and linear layers alone, with the ReLU behind them; all else stays float",
            _ACTIVATIONS,
            depthwise=True,
            float_outputs=True,
        ),
        "weights-depthwise": Pattern(
            "as `weights`, but depthwise convolutions stay float", _ACTIVATIONS, depthwise=False, float_outputs=True
        ),
    }
)
SIGMOID_GELU = "+sigmoid-gelu"
"""Ends the name of a pattern that has the faster Gelu."""

PATTERNS: Mapping[str, Pattern] = MappingProxyType(
    {
        **_EXACT,
        **{
            f"{name}{SIGMOID_GELU}": replace(pattern, description=f"as `{name}`, Gelu approximated", sigmoid_gelu=True)
            for name, pattern in _EXACT.items()
            if pattern.float_outputs
        },
    }
)
"""Patterns that only approximate the float network, before any rounding, come last."""


class _Quantizer(QDQQuantizer):  # type: ignore[misc]  # untyped library
    """ONNX Runtime's quantizer, told of single tensors that stay float."""

    float_tensors: frozenset[str] = frozenset()

    def quantize_activation_tensor(self, tensor_name: str) -> None:
        if tensor_name not in self.float_tensors:
            super().quantize_activation_tensor(tensor_name)


def quantize(
    float_model: Path,
    out: Path,
    ranges: Ranges,
    precision_of: Callable[[str], str],
    *,
    target: Precision,
    pattern: str,
) -> None:
    """Write the integer form of a float file: Q/DQ around the layers that `precision_of` calls int8.

    Weights are int8, symmetric and per output channel (7 bits of it where `target` says so), biases int32,
    activations of the target's type with static ranges, aligned so that x86 and ARM round sums alike. When `pattern` is
    `all` and every layer is int8 the file is that of ONNX Runtime's `quantize_static`, ranges unaligned, but for the
    corrected biases (`ranges.means`).

    Args:
        float_model: A file of `export_onnx` or `set_static_batch`; ONNX Runtime is fastest on the static one.
        ranges: Of `calibrate` on the dynamic file; shape operators that only the static file has borrow theirs.
        precision_of: Layer name to `int8`, `int4` (see `use_four_bits`) or `float`; name of an end (`ends.find`) to
            `int8` or `float`.
        pattern: A key of PATTERNS.

    Raises:
        InputError: an unknown pattern or precision, or a target without integer arithmetic.
        ExportError: a tensor without a range.
    """
    if pattern not in PATTERNS:
        raise InputError(f"pattern {pattern!r} is unknown; use {', '.join(PATTERNS)}.")
    types = {"uint8": QuantType.QUInt8, "int8": QuantType.QInt8}
    if target.activation_type not in types or target.weight_type != "int8":
        raise InputError(f"precision {target.name!r} of this target has no integer arithmetic; use int8.")
    proto = onnx.load(str(float_model))
    known = known_ranges(proto, ranges)
    proto, integer, factors, decoding = _in_fast_forms(proto, precision_of, pattern, known)
    four = {layer for layer in layer_of_node(proto).values() if precision_of(layer) == "int4"}
    if not integer:
        out.write_bytes(use_four_bits(proto, four).SerializeToString() if four else float_model.read_bytes())
        return
    add_infer_metadata(proto)  # else the quantizer writes the model to disk to infer shapes again
    constants = {initializer.name: initializer for initializer in proto.graph.initializer}
    shapes = {value.name: value.type.tensor_type.shape.dim for value in (*proto.graph.value_info, *proto.graph.input)}
    sizes = {
        node.name: [dimension.dim_value for dimension in shapes[node.input[0]][2:]]
        for node in proto.graph.node
        if node.op_type == "Conv" and node.input[0] in shapes
    }
    weights = {
        node.name: numpy_helper.to_array(constants[node.input[1]])
        for node in proto.graph.node
        if node.name in integer and node.op_type in WEIGHT_OPERATORS and node.input[1] in constants
    }
    quantizer = _Quantizer(
        proto,
        per_channel=True,
        reduce_range=target.weight_bits == 7,
        weight_qType=QuantType.QInt8,
        activation_qType=types[target.activation_type],
        tensors_range=_tensor_ranges(proto, known, factors, integer if pattern != BLANKET else []),
        nodes_to_quantize=integer,
        nodes_to_exclude=[],
        op_types_to_quantize=[*QLinearOpsRegistry, *QDQRegistry],
        extra_options={},
    )
    for tensor in _moved_as_bytes(proto, set(integer)):
        quantizer.quantize_activation_tensor(tensor)
    image = proto.graph.input[0].name
    padded = [node for node in proto.graph.node if node.output[0] == f"{image}{rewrite.PADDED}"]
    if PATTERNS[pattern].float_outputs:
        quantizer.float_tensors = _float_outputs(proto, set(integer))
    elif decoding:  # what only a float end reads need not be rounded
        read = {tensor for node in proto.graph.node if node.name in decoding for tensor in node.input}
        quantizer.float_tensors = _float_outputs(proto, set(integer)) & read
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        result = quantizer.quantize_model()
    except ValueError as error:
        raise ExportError(f"{float_model.name}: cannot be quantized ({error}); calibrate on this very model.") from None
    finally:
        logger.setLevel(level)
    correct_biases(result, weights, _means(proto, ranges, factors), sizes)
    _keep_float(result, set(integer))
    if pattern != BLANKET:
        constant_factors.absorb(result)
        if target.weight_bits == 8:  # else the kernel for unsigned times signed bytes saturates
            signed.use_signed_operands(result)
    if padded:
        _round_before_padding(result, padded[0].output[0])
    quantizer.model.topological_sort()
    put_in_order(result.graph)
    out.write_bytes((use_four_bits(result, four) if four else result).SerializeToString())


def ends_of(float_model: Path, ranges: Ranges) -> tuple[ends.End, ...]:
    """Return what `quantize` asks `precision_of` for besides the layers of a file."""
    proto = onnx.load(str(float_model))
    return ends.find(onnx.shape_inference.infer_shapes(proto), known_ranges(proto, ranges))


def _in_fast_forms(
    proto: ModelProto,
    precision_of: Callable[[str], str],
    pattern: str,
    known: Mapping[str, tuple[float, float]],
) -> tuple[ModelProto, list[str], dict[str, float], frozenset[str]]:
    """Return a float file rewritten for a pattern, the nodes that will be integer, tensors' factors, and float ends.

    The factors are those of `rewrite.use_sigmoid_gelu`; of the ends it is the nodes.
    """
    if pattern != BLANKET:
        rewrite.rewrite(proto)
        layers = layer_of_node(proto)
        first = next((node for node in proto.graph.node if proto.graph.input[0].name in node.input), None)
        if first is not None and first.name in layers and precision_of(layers[first.name]) == "int8":
            rewrite.pad_stem(proto)
    proto = onnx.shape_inference.infer_shapes(proto)
    give_each_layer_its_own_constants(proto)
    factors = rewrite.use_sigmoid_gelu(proto) if PATTERNS[pattern].sigmoid_gelu else {}
    floats = (end.nodes for end in ends.find(proto, known) if precision_of(end.name) != "int8")
    decoding = frozenset[str]().union(*floats)
    integer = _integer_nodes(proto, precision_of, PATTERNS[pattern], decoding)
    if PATTERNS[pattern].float_outputs and rewrite.is_static(proto):
        written = _float_outputs(proto, set(integer))
        products.use_two_turns(proto, lambda node: node.name in integer)
        products.use_convolutions(proto, lambda node: node.name in integer and node.output[0] not in written)
        integer = _integer_nodes(proto, precision_of, PATTERNS[pattern], decoding)
    return proto, integer, factors, decoding


def _round_before_padding(proto: ModelProto, padded: str) -> None:
    """Let the image be rounded first, so that Pad moves bytes and not floats."""
    (pad,) = (node for node in proto.graph.node if padded in node.output)
    (rounding,) = (node for node in proto.graph.node if padded in node.input)
    made = rounding.output[0]
    rounding.input[0], rounding.output[0] = pad.input[0], f"{made}:image"
    pad.input[:] = [rounding.output[0], pad.input[1], rounding.input[2]]
    pad.output[0] = made


def _keep_float(proto: ModelProto, integer: set[str]) -> None:
    """Keep ONNX Runtime from quantizing a float layer that lies between integer ones.

    From 1.21 on it rewrites such a layer at load, with one scale for all of its weights (WeightBiasQuantization), which
    undoes the plan with a worse quantization than ours. It does so only behind a DequantizeLinear with one scale:
    therefore the layer gets its own, with the same scale once per channel.
    """
    graph = proto.graph
    constants = {initializer.name: initializer for initializer in graph.initializer}
    makers, readers = makers_of(graph), readers_of(graph)
    for node in list(graph.node):
        maker = makers.get(node.input[0]) if len(node.input) > 0 else None
        if (
            node.op_type not in ("Conv", "ConvTranspose", "Gemm")
            or node.name in integer
            or node.input[1] not in constants
        ):
            continue
        if maker is None or maker.op_type != "DequantizeLinear" or not _ends_in_quantize(node, readers):
            continue
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        dims = constants[node.input[1]].dims
        by_row = node.op_type == "ConvTranspose" or (node.op_type == "Gemm" and not attributes.get("transB", 0))
        channels = dims[0] if by_row else dims[1] * (attributes.get("group", 1) if node.op_type == "Conv" else 1)
        inputs = [maker.input[0]]
        for tensor in maker.input[1:]:
            inputs.append(f"{tensor}:{node.name}")
            values = np.full(channels, numpy_helper.to_array(constants[tensor]))
            graph.initializer.append(numpy_helper.from_array(values, inputs[-1]))
        node.input[0] = f"{maker.output[0]}:{node.name}"
        graph.node.append(helper.make_node("DequantizeLinear", inputs, [node.input[0]], node.input[0], axis=1))


def _ends_in_quantize(node: NodeProto, readers: Mapping[str, list[NodeProto]]) -> bool:
    """Return whether nothing but ReLU and Clip lies between a node and the one QuantizeLinear that reads it."""
    following = readers.get(node.output[0], [])
    while len(following) == 1 and following[0].op_type in _ACTIVATIONS:
        following = readers.get(following[0].output[0], [])
    return len(following) == 1 and following[0].op_type == "QuantizeLinear"


def _integer_nodes(
    proto: ModelProto, precision_of: Callable[[str], str], pattern: Pattern, decoding: Collection[str] = ()
) -> list[str]:
    """Return the names of the nodes that become integer.

    A weight layer goes by its precision. Another operator goes by the pattern, and only when something integer feeds it
    (the image counts as integer), so that a float part of the network is not rounded for nothing. The nodes of float
    ends, `decoding`, stay float.
    """
    layers = layer_of_node(proto)
    shapes = {initializer.name: initializer.dims for initializer in proto.graph.initializer}
    fed = {value.name for value in proto.graph.input}
    supported = {*QLinearOpsRegistry, *QDQRegistry}
    names = []
    for node in proto.graph.node:
        if node.name in decoding:
            is_integer = False
        elif node.name in layers:
            precision = precision_of(layers[node.name])
            if precision not in LAYER_PRECISIONS:
                raise InputError(f"{layers[node.name]}: precision {precision!r}; use int8, int4 or float.")
            is_integer = precision == "int8" and (pattern.depthwise or not _is_depthwise(node, shapes))
            is_integer = is_integer and not _is_grouped_transposed(node)
        elif pattern.operators is None:
            wanted = node.op_type in supported and node.op_type not in pattern.floats
            is_integer = wanted and any(tensor in fed for tensor in node.input)
        else:
            # Sums of tokens stay float: rounded, the residual stream of a transformer loses more than it gains in time.
            tokens = any(tensor.endswith(rewrite.ROWS) for tensor in node.output)
            is_integer = node.op_type in pattern.operators and not tokens and any(t in fed for t in node.input)
        if is_integer:
            names.append(node.name)
            fed.update(node.output)
        elif pattern.operators is None and node.op_type not in WEIGHT_OPERATORS:
            # A norm or Gelu that stays float hands on what its own inputs are.
            fed.update(node.output if any(tensor in fed for tensor in node.input) else ())
    return names


def _moved_as_bytes(proto: ModelProto, integer: set[str]) -> list[str]:
    """Return what is put in another order on its way into an integer layer: it had better be rounded before.

    The quantizer lets such an operator move bytes only where bytes come in.
    """
    readers = readers_of(proto.graph)
    found = []
    for node in proto.graph.node:
        after = node
        while after.op_type in ("Gather", *_SAME_VALUES) and len(readers[after.output[0]]) == 1:
            (after,) = readers[after.output[0]]
        if node.op_type == "Gather" and after.op_type in WEIGHT_OPERATORS and {node.name, after.name} <= integer:
            found.append(node.input[0])
    return found


def _is_depthwise(node: NodeProto, shapes: Mapping[str, list[int]]) -> bool:
    groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
    return node.op_type == "Conv" and groups > 1 and shapes[node.input[1]][1] == 1


def _is_grouped_transposed(node: NodeProto) -> bool:
    """Return whether a node has weights (inputs, outputs of a group, ...), which no scale per output fits.

    ONNX Runtime on CPUs has no integer kernel of it, so that nothing is lost by float.
    """
    return node.op_type == "ConvTranspose" and any(a.name == "group" and a.i > 1 for a in node.attribute)


def _float_outputs(proto: ModelProto, integer: set[str]) -> frozenset[str]:
    """Return outputs of integer Gemm and MatMul nodes that no integer node reads."""
    read = {tensor for node in proto.graph.node if node.name in integer for tensor in node.input}
    return frozenset(
        node.output[0]
        for node in proto.graph.node
        if node.name in integer and node.op_type in ("Gemm", "MatMul") and node.output[0] not in read
    )


def known_ranges(proto: ModelProto, ranges: Ranges) -> dict[str, tuple[float, float]]:
    """Return tensor name to range; a tensor that calibration did not see has what follows from those it is made of.

    The static file moves transpositions about, which gives moved, joined and summed values other names.
    """
    known = {name: (ranges.low[name], ranges.high[name]) for name in ranges.low}
    same_values = [(node.input[0], node.output[0]) for node in proto.graph.node if node.op_type in _SAME_VALUES]
    for source, result in (*same_values, *((b, a) for a, b in reversed(same_values))):
        if source in known and result not in known:
            known[result] = known[source]
    ends = dict(known)
    for constant in proto.graph.initializer:
        values = numpy_helper.to_array(constant)
        if values.dtype == np.float32 and values.size:
            ends[constant.name] = float(values.min()), float(values.max())
    for node in proto.graph.node:
        parts = [node.input[0]] if node.op_type in (*_SAME_VALUES, *_PARTS) else list(node.input)
        if not all(tensor in ends for tensor in parts):
            continue
        lows, highs = zip(*(ends[tensor] for tensor in parts), strict=True)
        for result in node.output:
            if result in known:
                continue
            if node.op_type in ("Concat", *_SAME_VALUES, *_PARTS):
                known[result] = ends[result] = min(lows), max(highs)
            elif node.op_type == "Add":
                known[result] = ends[result] = sum(lows), sum(highs)
    return known


def _means(proto: ModelProto, ranges: Ranges, factors: Mapping[str, float]) -> dict[str, Sequence[float]]:
    """Return the mean inputs of the layers, those that a rewriting multiplied too."""
    layers = layer_of_node(proto)
    scaled = {
        layers[node.name]: factors[node.input[0]]
        for node in proto.graph.node
        if node.input[0] in factors and node.name in layers
    }
    return {
        layer: [scaled[layer] * mean for mean in means] if layer in scaled else means
        for layer, means in ranges.means.items()
    }


def _tensor_ranges(
    proto: ModelProto,
    known: Mapping[str, tuple[float, float]],
    factors: Mapping[str, float],
    integer: Sequence[str],
) -> dict[str, TensorData]:
    """Return the ranges of all tensors of a rewritten file in the quantizer's form, those of integer sums aligned."""
    tensors = [proto.graph.input[0].name, *(tensor for node in proto.graph.node for tensor in node.output)]
    found = {}
    for tensor in tensors:
        if (source := rewrite.source_of(tensor)) in known:
            factor, (low, high) = factors.get(tensor, 1.0), known[source]
            found[tensor] = (factor * low, factor * high)
    aligned = align_sums(proto, found, frozenset(integer))
    return {name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in aligned.items()}


def strip_for_shipping(path: Path) -> dict[str, str]:
    """Rewrite a file without the bytes that no runtime needs and return node name to layer name for its manifest.

    Names become numbers, equal constants are kept once, zero points of biases (zero, as ONNX assumes) go, and so do
    doc strings, metadata other than FLOAT_AS, inferred shapes and unused operator sets. Outputs do not change by a bit.
    """
    proto = onnx.load(str(path))
    graph = proto.graph
    layers = layer_of_node(proto)
    if any(
        attribute.type in (attribute.GRAPH, attribute.GRAPHS) for node in graph.node for attribute in node.attribute
    ):
        return layers  # names inside a loop's or a branch's body refer to names outside
    renamed = {value.name: value.name for value in (*graph.input, *graph.output)}
    first_with: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    zeros: set[str] = set()
    kept: list[TensorProto] = []
    for initializer in graph.initializer:
        array = numpy_helper.to_array(initializer)
        key = (initializer.data_type, tuple(initializer.dims), array.tobytes())
        if not array.any() and initializer.data_type == TensorProto.INT32:  # QGemm insists on its weight's zero point
            zeros.add(initializer.name)
        if key in first_with:
            renamed[initializer.name] = first_with[key]
            continue
        first_with[key] = renamed[initializer.name] = str(len(kept))
        kept.append(numpy_helper.from_array(array, str(len(kept))))
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and len(node.input) == 3 and node.input[2] in zeros:
            del node.input[2]
        for tensor in filter(None, node.output):
            renamed.setdefault(tensor, f"t{len(renamed)}")
    node_layers = {}
    for index, node in enumerate(graph.node):
        if node.name in layers:
            node_layers[str(index)] = layers[node.name]
        node.name = str(index)
        node.input[:] = [renamed.get(tensor, tensor) for tensor in node.input]
        node.output[:] = [renamed.get(tensor, tensor) for tensor in node.output]
        del node.metadata_props[:]
        node.ClearField("doc_string")
    used = {tensor for node in graph.node for tensor in node.input} | {value.name for value in graph.output}
    domains = {node.domain for node in graph.node}
    slim = helper.make_model(
        helper.make_graph(graph.node, "g", graph.input, graph.output, [i for i in kept if i.name in used]),
        opset_imports=[opset for opset in proto.opset_import if opset.domain in domains],
        ir_version=proto.ir_version,
    )
    slim.metadata_props.extend(entry for entry in proto.metadata_props if entry.key == FLOAT_AS)
    path.write_bytes(slim.SerializeToString())
    return node_layers


def overhead_bytes(path: Path) -> int:
    """Return the bytes of a file beyond those of its weights (constants of more than one dimension)."""
    weights = (i for i in onnx.load(str(path)).graph.initializer if len(i.dims) > 1)
    return path.stat().st_size - sum(int(numpy_helper.to_array(weight).nbytes) for weight in weights)
