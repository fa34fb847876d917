"""In: a float file, its ranges, images. Out: how the values of each layer are spread: outliers, and what is clipped.

Integers have one step for a whole tensor of activations, and one for all weights of an output channel. A few values far
from all others make it coarse for these; a range that leaves them out clips them. Both can be read off before anything
is rounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, numpy_helper

from hirelc_deploy.compress.integer.calibration import Histogram, Ranges
from hirelc_deploy.compress.onnx_file.export import layer_of_node
from hirelc_deploy.compress.onnx_file.links import readers_of
from hirelc_deploy.compress.onnx_file.watch import Watch

TAIL_PERCENT = 0.1
"""The outermost values, in percent, whose share of the range is told."""

SAMPLES_PER_IMAGE = 4096
"""Values of one tensor that are looked at per image; least, largest and width of channels are those of all values."""


@dataclass(frozen=True)
class Spread:
    """The values of one tensor of activations in some images.

    Attributes:
        low, high: The range that integers have.
        least, largest: Of the values.
        tail_share: Share of the distance between least and largest that the outermost 0.1 % of the values take.
        widest_channel: Largest magnitude of the widest channel over that of the middle one; None without channels.
        clipped: Share of the values outside the range.
    """

    low: float
    high: float
    least: float
    largest: float
    tail_share: float
    widest_channel: float | None
    clipped: float


@dataclass(frozen=True)
class LayerSpread:
    """What one layer reads, writes and multiplies by.

    Attributes:
        reads, writes: None where calibration has no range of it.
        widest_weight: Of the output channel where it is largest: the largest weight over the middle one that is not 0.
    """

    reads: Spread | None
    writes: Spread | None
    widest_weight: float

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Ends:
    """The tensors at the ends of one layer.

    Attributes:
        reads: What it reads.
        writes: What it writes, and that after the bias and the ReLU or Clip that are folded into it.
        weight: (outputs, inputs of one output).
        is_convolution: Channels are then the second dimension of its tensors, else the last.
    """

    reads: str
    writes: tuple[str, ...]
    weight: NDArray[np.float32]
    is_convolution: bool

    @property
    def tensors(self) -> tuple[str, ...]:
        """All of them."""
        return (self.reads, *self.writes)


def ends_of(proto: ModelProto) -> dict[str, Ends]:
    """Return layer name to its ends, in execution order; of a layer that runs several times, those of the first."""
    layers, readers = layer_of_node(proto), readers_of(proto.graph)
    constants = {initializer.name: initializer for initializer in proto.graph.initializer}
    outputs = {value.name for value in proto.graph.output}

    def is_folded(node: NodeProto) -> bool:
        bias = node.op_type == "Add" and any(tensor in constants for tensor in node.input)
        return bias or node.op_type in ("Relu", "Clip")

    found: dict[str, Ends] = {}
    for node in proto.graph.node:
        if not (layer := layers.get(node.name, "")) or layer in found:
            continue
        writes = [node.output[0]]
        after = readers[writes[-1]]
        while len(after) == 1 and is_folded(after[0]) and writes[-1] not in outputs:
            writes.append(after[0].output[0])
            after = readers[writes[-1]]
        weight = numpy_helper.to_array(constants[node.input[1]])
        found[layer] = Ends(node.input[0], tuple(writes), _by_output(node, weight), node.op_type.startswith("Conv"))
    return found


def spread_of(
    proto: ModelProto, ranges: Ranges, images: Iterable[NDArray[np.float32]], threads: int = 1
) -> dict[str, LayerSpread]:
    """Return layer name to how its values are spread in these images.

    Args:
        proto: A float file of any batch, of which `ranges` are.
        images: Batches of (n, channels, height, width).
    """
    ends = ends_of(proto)
    wanted: dict[str, bool] = {}
    for end in ends.values():
        for tensor in (end.reads, end.writes[-1]):
            if tensor in ranges.low:
                wanted[tensor] = wanted.get(tensor, False) or end.is_convolution
    tensors = _spreads(proto, ranges, wanted, images, threads)
    return {
        layer: LayerSpread(tensors.get(end.reads), tensors.get(end.writes[-1]), _widest_weight(end.weight))
        for layer, end in ends.items()
    }


def _spreads(
    proto: ModelProto, ranges: Ranges, tensors: Mapping[str, bool], images: Iterable[NDArray[np.float32]], threads: int
) -> dict[str, Spread]:
    """Return tensor to its spread; `tensors` says of each whether its channels come second, else they are last."""
    graph = onnx.shape_inference.infer_shapes(proto).graph
    sizes: Mapping[str, list[int]] = {
        value.name: [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        for value in (*graph.value_info, *graph.output, *graph.input)
    }
    watch = Watch(proto)
    for tensor, second in tensors.items():
        size = sizes.get(tensor, [])
        channels = 1 if second else len(size) - 1
        axes = [axis for axis in range(len(size)) if axis != channels]
        watch.reduce("ReduceMin", tensor, axes)
        watch.reduce("ReduceMax", tensor, axes)
        # An odd step walks through all columns of an even-sized image.
        watch.sample(tensor, (int(np.prod([one for one in size if one > 0])) // SAMPLES_PER_IMAGE) | 1)
    values_of = watch.open(threads)
    low, high = dict[str, NDArray[np.float32]](), dict[str, NDArray[np.float32]]()
    histograms = {tensor: Histogram() for tensor in tensors}
    outside, seen = dict.fromkeys(tensors, 0), dict.fromkeys(tensors, 0)
    for batch in images:
        values = iter(values_of(batch))
        for tensor in tensors:
            least, largest, sample = next(values), next(values), next(values)
            low[tensor] = np.minimum(low.get(tensor, least), least)
            high[tensor] = np.maximum(high.get(tensor, largest), largest)
            histograms[tensor].add(sample)
            outside[tensor] += int(((sample < ranges.low[tensor]) | (sample > ranges.high[tensor])).sum())
            seen[tensor] += sample.size
    found = {}
    for tensor in tensors:
        bottom, top = float(np.min(low[tensor])), float(np.max(high[tensor]))
        first, last = histograms[tensor].percentile_range(100 - TAIL_PERCENT)
        inner = min(last, top) - max(first, bottom)
        width = np.maximum(np.abs(low[tensor]), np.abs(high[tensor])).ravel()
        middle = float(np.median(width))
        found[tensor] = Spread(
            ranges.low[tensor],
            ranges.high[tensor],
            bottom,
            top,
            max(0.0, 1 - inner / (top - bottom)) if top > bottom else 0.0,
            float(width.max()) / middle if middle > 0 and width.size > 1 else None,
            outside[tensor] / max(1, seen[tensor]),
        )
    return found


def _widest_weight(weight: NDArray[np.float32]) -> float:
    """Return the largest ratio of an output channel's largest weight to its middle one that is not 0; 1 without any."""
    ratios = [1.0]
    for row in np.abs(weight):
        if (row := row[row > 0]).size:
            ratios.append(float(row.max() / np.median(row)))
    return max(ratios)


def _by_output(node: NodeProto, weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return (outputs, ...) weights of a layer as rows."""
    if node.op_type == "MatMul":
        weight = weight.reshape(-1, weight.shape[-1]).T
    elif node.op_type == "Gemm" and not any(a.name == "transB" and a.i for a in node.attribute):
        weight = weight.T
    elif node.op_type == "ConvTranspose":
        weight = weight.swapaxes(0, 1)
    return weight.reshape(len(weight), -1)
