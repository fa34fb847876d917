"""In: a float ONNX file, calibration images, a precision per layer. Out: the Q/DQ file that runs on integers."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import TensorData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import add_infer_metadata
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

from hirelc_deploy.compress import rewrite
from hirelc_deploy.compress.export import WEIGHT_OPERATORS, layer_of_node, open_session
from hirelc_deploy.compress.four_bits import use_four_bits
from hirelc_deploy.errors import ExportError, InputError
from hirelc_deploy.measure.backend import Precision
from hirelc_deploy.plan import LAYER_PRECISIONS

SCHEMA_VERSION = 1
METHODS = ("minmax", "percentile", "mse")
PERCENTILE = 99.99
"""Share of values inside the range, in percent, for the method `percentile`."""

BINS_PER_SIDE = 2048
"""Histogram bins on either side of zero: 16 or more inside each of the 128 integer steps of that side."""

SAMPLES_PER_BATCH = 65_536
"""Values of one tensor that enter its histogram per batch; the range of `minmax` is that of all values."""

FEW_IMAGES = 32
"""Below this many calibration images the ranges are reported as doubtful."""


@dataclass(frozen=True)
class Pattern:
    """Which operators become integer around the layers that the plan makes integer.

    Attributes:
        operators: Operator types beside the weight layers; None stands for everything ONNX Runtime can quantize.
        depthwise: Depthwise convolutions too.
        float_outputs: A Gemm or MatMul whose readers all run in float writes float directly, without rounding.
    """

    description: str
    operators: frozenset[str] | None
    depthwise: bool
    float_outputs: bool


BLANKET = "all"
"""The pattern of a blanket INT8 file: everything the runtime's own quantizer would make integer, nothing rewritten."""

_SAME_VALUES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity")
_ACTIVATIONS = frozenset({"Relu", "Clip"})  # folded into the layer before them, so they go where it goes
_POOLS = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "Flatten"})

PATTERNS: Mapping[str, Pattern] = MappingProxyType(
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


@dataclass(frozen=True)
class Ranges:
    """What calibration saw: the least and the largest value of each float tensor of a float file.

    Attributes:
        low, high: Tensor name to the end of its range, after clipping by `method`.
        images: Number of images seen.
        warning: A sentence for the user, or ``.
    """

    low: Mapping[str, float]
    high: Mapping[str, float]
    method: str
    images: int
    warning: str = ""

    def write(self, path: Path) -> None:
        """Write the ranges as JSON."""
        path.write_text(json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}), "utf-8")

    @classmethod
    def read(cls, path: Path) -> Ranges:
        """Read a file written by `write`; raises InputError for a missing, broken or newer file."""
        try:
            value = json.loads(path.read_text("utf-8"))
            if value["schema_version"] != SCHEMA_VERSION:
                raise InputError(
                    f"{path}: schema version {value['schema_version']}, this program reads {SCHEMA_VERSION}."
                )
            return cls(value["low"], value["high"], value["method"], value["images"], value["warning"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not a file of calibration ranges ({error}); calibrate again.") from None


class Histogram:
    """Counts of values in equal bins around zero; the bins grow by doubling, so a stream needs no second pass."""

    def __init__(self) -> None:
        self.bin_width = 0.0
        self.counts = np.zeros(2 * BINS_PER_SIDE, dtype=np.int64)

    def add(self, values: NDArray[np.float32]) -> None:
        """Count (n,) finite values."""
        largest = float(np.abs(values).max(initial=0.0))
        if largest == 0.0 and self.bin_width == 0.0:
            return
        if self.bin_width == 0.0:
            self.bin_width = largest / (BINS_PER_SIDE - 1)
        while largest >= self.bin_width * BINS_PER_SIDE:
            self.bin_width *= 2
            half = BINS_PER_SIDE // 2
            self.counts = np.pad(self.counts.reshape(-1, 2).sum(1), half)
        bins = np.floor(values * (1.0 / self.bin_width)).astype(np.int32) + BINS_PER_SIDE
        self.counts += np.bincount(bins, minlength=2 * BINS_PER_SIDE)

    def percentile_range(self, percent: float) -> tuple[float, float]:
        """Return the range that leaves out at most 100 - `percent` percent of the values, half of it on each side."""
        total = int(self.counts.sum())
        if total == 0:
            return 0.0, 0.0
        below = np.cumsum(self.counts)
        tail = (1 - percent / 100) / 2 * total
        first = int(np.searchsorted(below, tail, "right"))
        last = int(np.searchsorted(below, total - tail, "left"))
        return (first - BINS_PER_SIDE) * self.bin_width, (last + 1 - BINS_PER_SIDE) * self.bin_width

    def least_error_range(self, low: float, high: float) -> tuple[float, float]:
        """Return the range inside (low, high) with the least squared error of 256 integer steps.

        Error of a range = what clipping costs, from the histogram, + step**2 / 12 for every value that is not clipped.
        Both ends shrink by the same factor, down to 30 %.
        """
        centres = (np.arange(2 * BINS_PER_SIDE) - BINS_PER_SIDE + 0.5) * self.bin_width
        best, best_error = (low, high), np.inf
        for factor in np.linspace(1.0, 0.3, 71):
            ends = low * factor, high * factor
            beyond = centres - np.clip(centres, *ends)
            inside = self.counts[beyond == 0].sum()
            step = (max(ends[1], 0.0) - min(ends[0], 0.0)) / 255
            error = float((self.counts * beyond**2).sum() + inside * step**2 / 12)
            if error < best_error:
                best, best_error = (float(ends[0]), float(ends[1])), error
        return best


DEFAULT_METHOD = "percentile"
"""Divergence from the float file, in 1e-4 nats, of minmax / percentile / mse with 256 images: 7.3 / 5.8 / 3.4 on a
CIFAR-10 ResNet-18, 17.5 / 13.4 / 18.8 on a ViT with everything integer, 6.0 / 3.8 / 7.1 with its weight layers integer.
Better than the plain range on all three; accuracy could not tell the methods apart."""


def calibrate(
    float_model: Path, images: Iterable[NDArray[np.float32]], method: str = DEFAULT_METHOD, *, threads: int = 1
) -> Ranges:
    """Run the float file on calibration images and return the range of every float tensor.

    One pass; memory depends on the size of a batch and not on how many there are.

    Args:
        float_model: A file whose batch is dynamic.
        images: Batches of (n, channels, height, width); 32 to 64 images each are fastest.
        method: `minmax`, `percentile` (see PERCENTILE) or `mse` (least squared rounding error).

    Raises:
        InputError: no image, an unknown method, or a file with a fixed batch.
        ExportError: a tensor holds NaN or infinity.
    """
    if method not in METHODS:
        raise InputError(f"calibration method {method!r} is unknown; use {', '.join(METHODS)}.")
    proto = onnx.load(str(float_model))
    if proto.graph.input[0].type.tensor_type.shape.dim[0].HasField("dim_value"):
        raise InputError(f"{float_model}: fixed batch; calibrate on the file with a dynamic batch.")
    tensors = _observe(proto, sample=method != "minmax")
    session = open_session(proto, threads)
    name = session.get_inputs()[0].name
    wanted = [output.name for output in session.get_outputs()[-(3 if method != "minmax" else 2) * len(tensors) :]]
    low, high = np.full(len(tensors), np.inf), np.full(len(tensors), -np.inf)
    histograms = [Histogram() for _ in tensors]
    seen = 0
    for batch in images:
        if len(batch) == 0:
            continue
        values = session.run(wanted, {name: np.ascontiguousarray(batch, dtype=np.float32)})
        seen += len(batch)
        ends = np.array(values[: 2 * len(tensors)]).reshape(-1, 2)
        for tensor, pair in zip(tensors, ends, strict=True):
            if not np.isfinite(pair).all():
                raise ExportError(f"tensor {tensor}: NaN or infinity during calibration; check weights and images.")
        low, high = np.minimum(low, ends[:, 0]), np.maximum(high, ends[:, 1])
        for histogram, sampled in zip(histograms, values[2 * len(tensors) :], strict=False):
            histogram.add(sampled)
    if seen == 0:
        raise InputError("no calibration image; the calibration split must hold at least one.")
    for index, histogram in enumerate(histograms):
        if method == "percentile":
            clipped = histogram.percentile_range(PERCENTILE)
            low[index], high[index] = max(low[index], clipped[0]), min(high[index], clipped[1])
        elif method == "mse":
            low[index], high[index] = histogram.least_error_range(low[index], high[index])
    warning = ""
    if seen < FEW_IMAGES:
        warning = f"calibrated on {seen} image{'s' * (seen > 1)}; with fewer than {FEW_IMAGES} the ranges are doubtful."
    as_dict = [dict(zip(tensors, map(float, ends), strict=True)) for ends in (low, high)]
    return Ranges(as_dict[0], as_dict[1], method, seen, warning)


def _observe(proto: ModelProto, *, sample: bool) -> list[str]:
    """Add outputs to the graph: minimum and maximum of each float tensor in turn, then a sample of each."""
    inferred = onnx.shape_inference.infer_shapes(proto).graph
    graph = proto.graph
    values: dict[str, ValueInfoProto] = {v.name: v for v in (*inferred.value_info, *inferred.output, *inferred.input)}
    made = [graph.input[0].name, *(tensor for node in graph.node for tensor in node.output)]
    tensors = [t for t in made if t in values and values[t].type.tensor_type.elem_type == TensorProto.FLOAT]
    samples = []
    graph.initializer.extend(
        numpy_helper.from_array(np.array([value], dtype=np.int64), f"observe:{value}") for value in (-1, 0, 2**62)
    )
    for index, tensor in enumerate(tensors):
        for operator in ("ReduceMin", "ReduceMax"):
            output = f"observe:{operator}:{index}"
            graph.node.append(helper.make_node(operator, [tensor], [output], keepdims=0))
            graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, []))
        if sample:
            sizes = [dimension.dim_value for dimension in values[tensor].type.tensor_type.shape.dim]
            # An odd step walks through all columns of an even-sized image; 64 images are taken for a batch.
            step = (64 * int(np.prod([size for size in sizes if size > 0])) // SAMPLES_PER_BATCH) | 1
            flat, output = f"observe:flat:{index}", f"observe:sample:{index}"
            graph.initializer.append(numpy_helper.from_array(np.array([step], dtype=np.int64), f"{output}:step"))
            slice_inputs = [flat, "observe:0", f"observe:{2**62}", "observe:0", f"{output}:step"]
            samples += [
                helper.make_node("Reshape", [tensor, "observe:-1"], [flat]),
                helper.make_node("Slice", slice_inputs, [output]),
            ]
    graph.node.extend(samples)
    graph.output.extend(
        helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, [None])
        for node in samples
        if node.op_type == "Slice"
    )
    return tensors


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
    activations of the target's type with static ranges. The outputs are those of ONNX Runtime's `quantize_static`
    when `pattern` is `all` and every layer is int8.

    Args:
        float_model: A file of `export_onnx` or `set_static_batch`; ONNX Runtime is fastest on the static one.
        ranges: Of `calibrate` on the dynamic file; shape operators that only the static file has borrow theirs.
        precision_of: Layer name to `int8`, `int4` (see `use_four_bits`) or `float`.
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
    proto = onnx.shape_inference.infer_shapes(onnx.load(str(float_model)))
    known = _known_ranges(proto, ranges)
    if pattern != BLANKET:
        rewrite.rewrite(proto)
        layers = layer_of_node(proto)
        first = next((node for node in proto.graph.node if proto.graph.input[0].name in node.input), None)
        if first is not None and first.name in layers and precision_of(layers[first.name]) == "int8":
            rewrite.pad_stem(proto)
        proto = onnx.shape_inference.infer_shapes(proto)
    _give_each_layer_its_own_constants(proto)
    integer = _integer_nodes(proto, precision_of, PATTERNS[pattern])
    four = {layer for layer in layer_of_node(proto).values() if precision_of(layer) == "int4"}
    if not integer:
        out.write_bytes(use_four_bits(proto, four).SerializeToString() if four else float_model.read_bytes())
        return
    add_infer_metadata(proto)  # else the quantizer writes the model to disk to infer shapes again
    quantizer = _Quantizer(
        proto,
        per_channel=True,
        reduce_range=target.weight_bits == 7,
        weight_qType=QuantType.QInt8,
        activation_qType=types[target.activation_type],
        tensors_range=_tensor_ranges(proto, known),
        nodes_to_quantize=integer,
        nodes_to_exclude=[],
        op_types_to_quantize=[*QLinearOpsRegistry, *QDQRegistry],
        extra_options={},
    )
    image = proto.graph.input[0].name
    padded = [node for node in proto.graph.node if node.output[0] == f"{image}{rewrite.PADDED}"]
    if PATTERNS[pattern].float_outputs:
        quantizer.float_tensors = _float_outputs(proto, set(integer))
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        result = quantizer.quantize_model()
    except ValueError as error:
        raise ExportError(f"{float_model.name}: cannot be quantized ({error}); calibrate on this very model.") from None
    finally:
        logger.setLevel(level)
    _keep_float(result, set(integer))
    if padded:
        _round_before_padding(result, padded[0].output[0])
    quantizer.model.topological_sort()
    out.write_bytes((use_four_bits(result, four) if four else result).SerializeToString())


def _give_each_layer_its_own_constants(proto: ModelProto) -> None:
    """Copy weights and biases that several nodes read, as equal biases are after export.

    The quantizer replaces a constant for all its readers, so a float layer would read what was rounded for another.
    """
    constants = {initializer.name: initializer for initializer in proto.graph.initializer}
    readers = Counter(tensor for node in proto.graph.node for tensor in node.input)
    for node in proto.graph.node:
        if node.op_type in WEIGHT_OPERATORS:
            for position, tensor in enumerate(node.input):
                if tensor in constants and readers[tensor] > 1:
                    copy = TensorProto()
                    copy.CopyFrom(constants[tensor])
                    copy.name = node.input[position] = f"{tensor}:{node.name}"
                    proto.graph.initializer.append(copy)


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
    makers = {tensor: node for node in graph.node for tensor in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for tensor in node.input:
            readers.setdefault(tensor, []).append(node)
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


def _integer_nodes(proto: ModelProto, precision_of: Callable[[str], str], pattern: Pattern) -> list[str]:
    """Return the names of the nodes that become integer.

    A weight layer goes by its precision. Another operator goes by the pattern, and only when something integer feeds it
    (the image counts as integer), so that a float part of the network is not rounded for nothing.
    """
    layers = layer_of_node(proto)
    shapes = {initializer.name: initializer.dims for initializer in proto.graph.initializer}
    fed = {value.name for value in proto.graph.input}
    supported = {*QLinearOpsRegistry, *QDQRegistry}
    names = []
    for node in proto.graph.node:
        if node.name in layers:
            precision = precision_of(layers[node.name])
            if precision not in LAYER_PRECISIONS:
                raise InputError(f"{layers[node.name]}: precision {precision!r}; use int8, int4 or float.")
            is_integer = precision == "int8" and (pattern.depthwise or not _is_depthwise(node, shapes))
        elif pattern.operators is None:
            is_integer = node.op_type in supported and any(tensor in fed for tensor in node.input)
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


def _is_depthwise(node: NodeProto, shapes: Mapping[str, list[int]]) -> bool:
    groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
    return node.op_type == "Conv" and groups > 1 and shapes[node.input[1]][1] == 1


def _float_outputs(proto: ModelProto, integer: set[str]) -> frozenset[str]:
    """Return outputs of integer Gemm and MatMul nodes that no integer node reads."""
    read = {tensor for node in proto.graph.node if node.name in integer for tensor in node.input}
    return frozenset(
        node.output[0]
        for node in proto.graph.node
        if node.name in integer and node.op_type in ("Gemm", "MatMul") and node.output[0] not in read
    )


def _known_ranges(proto: ModelProto, ranges: Ranges) -> dict[str, tuple[float, float]]:
    """Return tensor name to range; a reshaped tensor that calibration did not see has its source's range."""
    known = {name: (ranges.low[name], ranges.high[name]) for name in ranges.low}
    same_values = [(node.input[0], node.output[0]) for node in proto.graph.node if node.op_type in _SAME_VALUES]
    for source, result in (*same_values, *((b, a) for a, b in reversed(same_values))):
        if source in known and result not in known:
            known[result] = known[source]
    return known


def _tensor_ranges(proto: ModelProto, known: Mapping[str, tuple[float, float]]) -> dict[str, TensorData]:
    """Return the ranges of all tensors of a rewritten file in the quantizer's form."""
    tensors = [proto.graph.input[0].name, *(tensor for node in proto.graph.node for tensor in node.output)]
    found = {tensor: known[rewrite.source_of(tensor)] for tensor in tensors if rewrite.source_of(tensor) in known}
    return {name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in found.items()}


def strip_for_shipping(path: Path) -> dict[str, str]:
    """Rewrite a file without the bytes that no runtime needs and return node name to layer name for its manifest.

    Names become numbers, equal constants are kept once, zero points of biases (zero, as ONNX assumes) go,
    and so do doc strings, metadata, inferred shapes and unused operator sets. Outputs do not change by a bit.
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
    path.write_bytes(slim.SerializeToString())
    return node_layers


def overhead_bytes(path: Path) -> int:
    """Return the bytes of a file beyond those of its weights (constants of more than one dimension)."""
    weights = (i for i in onnx.load(str(path)).graph.initializer if len(i.dims) > 1)
    return path.stat().st_size - sum(int(numpy_helper.to_array(weight).nbytes) for weight in weights)
