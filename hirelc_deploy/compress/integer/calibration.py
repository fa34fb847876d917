"""In: a float ONNX file and calibration images. Out: the range of every tensor and the mean inputs of every layer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

from hirelc_deploy.compress.integer.bias_correction import observed_inputs
from hirelc_deploy.compress.onnx_file.links import makers_of
from hirelc_deploy.compress.onnx_file.watch import Watch, as_taken
from hirelc_deploy.errors import ExportError, InputError

SCHEMA_VERSION = 2
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
class Ranges:
    """What calibration saw: the least and the largest value of each float tensor of a float file.

    Attributes:
        low, high: Tensor name to the end of its range, after clipping by `method`.
        images: Number of images seen.
        warning: A sentence for the user, or ``.
        means: Layer name to the mean of each of its input channels or features, for `correct_biases`.
    """

    low: Mapping[str, float]
    high: Mapping[str, float]
    method: str
    images: int
    warning: str = ""
    means: Mapping[str, Sequence[float]] = field(default_factory=dict)

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
            del value["schema_version"]
            return cls(**value)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not a file of calibration ranges ({error}); calibrate again.") from None


def with_other(ranges: Ranges, other: Ranges, tensors: Iterable[str]) -> Ranges:
    """Return ranges that are those of `other` for these tensors; tensors without a range are passed by."""
    known = [tensor for tensor in tensors if tensor in other.low]
    return replace(
        ranges,
        low={**ranges.low, **{tensor: other.low[tensor] for tensor in known}},
        high={**ranges.high, **{tensor: other.high[tensor] for tensor in known}},
    )


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

    def clipped_range(self, method: str, low: float, high: float) -> tuple[float, float]:
        """Return what a method of METHODS makes of the plain range."""
        if method == "percentile":
            ends = self.percentile_range(PERCENTILE)
            return max(low, ends[0]), min(high, ends[1])
        return self.least_error_range(low, high)

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
Accuracy could not tell the methods apart. Measured again with 500 selection images and everything integer, before and
after biases were corrected: ResNet-18 0.3 and 0.6 for minmax, 0.8 and 1.1 for percentile; MobileNetV2 with ImageNet
weights 551 and 559 for minmax, 368 and 310 for percentile (600 images). So percentile is the safer one, not always the
better one."""


def calibrate(
    float_model: Path, images: Iterable[NDArray[np.float32]], method: str = DEFAULT_METHOD, *, threads: int = 1
) -> Ranges:
    """Run the float file on calibration images and return the range of every float tensor.

    One pass; memory depends on the size of a batch and not on how many there are.

    Args:
        float_model: A file for any number of images, or for one.
        images: Batches of (n, channels, height, width); 32 to 64 images each are fastest.
        method: `minmax`, `percentile` (see PERCENTILE) or `mse` (least squared rounding error).

    Raises:
        InputError: no image, an unknown method, or a file for another fixed number of images.
        ExportError: a tensor holds NaN or infinity.
    """
    if method not in METHODS:
        raise InputError(f"calibration method {method!r} is unknown; use {', '.join(METHODS)}.")
    proto = onnx.load(str(float_model))
    if proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value > 1:
        raise InputError(f"{float_model}: fixed batch; calibrate on the file with a dynamic batch.")
    watch, tensors, layers = _watch(proto, sample=method != "minmax")
    values_of = watch.open(threads)
    sums = [np.zeros(1)] * len(layers)
    low, high = np.full(len(tensors), np.inf), np.full(len(tensors), -np.inf)
    histograms = [Histogram() for _ in tensors]
    seen = 0
    for batch in as_taken(proto, images):
        if len(batch) == 0:
            continue
        values = values_of(batch)
        sums = [sum_ + mean * len(batch) for sum_, mean in zip(sums, values[: len(layers)], strict=True)]
        values = values[len(layers) :]
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
    whole = _feeding_maxima(proto)
    for index, histogram in enumerate(histograms):
        if tensors[index] in whole:
            continue
        low[index], high[index] = histogram.clipped_range(method, low[index], high[index])
    warning = ""
    if seen < FEW_IMAGES:
        warning = f"calibrated on {seen} image{'s' * (seen > 1)}; with fewer than {FEW_IMAGES} the ranges are doubtful."
    as_dict = [dict(zip(tensors, map(float, ends), strict=True)) for ends in (low, high)]
    means = {layer: (total / seen).tolist() for layer, total in zip(layers, sums, strict=True)}
    return Ranges(as_dict[0], as_dict[1], method, seen, warning, means)


def _watch(proto: ModelProto, *, sample: bool) -> tuple[Watch, list[str], list[str]]:
    """Return what is watched of a file, and the tensors and the layers that it tells of.

    It tells the mean input of each layer, then minimum and maximum of each float tensor in turn, then samples of each.
    """
    graph = onnx.shape_inference.infer_shapes(proto).graph
    shapes: dict[str, ValueInfoProto] = {v.name: v for v in (*graph.value_info, *graph.output, *graph.input)}
    made = [graph.input[0].name, *(tensor for node in graph.node for tensor in node.output)]
    tensors = [t for t in made if t in shapes and shapes[t].type.tensor_type.elem_type == TensorProto.FLOAT]
    watch, layers = Watch(proto), _of_known_rank(observed_inputs(proto), shapes)
    for tensor, operator in layers.values():
        rank = len(shapes[tensor].type.tensor_type.shape.dim)
        channels = 1 if operator == "Conv" else rank - 1
        watch.reduce("ReduceMean", tensor, [axis for axis in range(rank) if axis != channels])
    for tensor in tensors:
        watch.reduce("ReduceMin", tensor)
        watch.reduce("ReduceMax", tensor)
    for tensor in tensors if sample else ():
        sizes = [dimension.dim_value for dimension in shapes[tensor].type.tensor_type.shape.dim]
        # An odd step walks through all columns of an even-sized image; 64 images are taken for a batch.
        watch.sample(tensor, (64 * int(np.prod([size for size in sizes if size > 0])) // SAMPLES_PER_BATCH) | 1)
    return watch, tensors, list(layers)


_MAXIMA = ("ReduceMax", "ReduceMin", "GlobalMaxPool")
_BY_POSITION = frozenset(
    {"Add", "BatchNormalization", "Clip", "Concat", "Div", "Flatten", "Gelu", "Gemm", "HardSwish", "Identity"}
    | {"LayerNormalization", "LeakyRelu", "MatMul", "Mul", "PRelu", "Relu", "Reshape", "Sigmoid", "Squeeze", "Sub"}
    | {"Tanh", "Transpose", "Unsqueeze"}
)


def _feeding_maxima(proto: ModelProto) -> set[str]:
    """Return the tensors of which a maximum over positions picks values, back to where positions are mixed.

    Their ranges are not clipped: the rarest values are just those that are picked (PointNet: Qi et al. 2017; a small
    one was off by 0.16 of its largest output with clipped ranges, and by 0.02 with whole ones).
    """
    makers = makers_of(proto.graph)
    constants = {initializer.name: initializer for initializer in proto.graph.initializer}

    def passes(node: NodeProto) -> bool:
        kernel = constants[node.input[1]].dims[2:] if node.op_type == "Conv" and node.input[1] in constants else [0]
        return node.op_type in _BY_POSITION or all(size == 1 for size in kernel)

    left = [node.input[0] for node in proto.graph.node if node.op_type in _MAXIMA]
    found = set[str]()
    while left:
        tensor = left.pop()
        if tensor in found or tensor in constants:
            continue
        found.add(tensor)
        maker = makers.get(tensor)
        left += [*maker.input] if maker is not None and passes(maker) else []
    return found


def _of_known_rank(
    layers: Mapping[str, tuple[str, str]], shapes: Mapping[str, ValueInfoProto]
) -> dict[str, tuple[str, str]]:
    """Return the layers of which it is known which dimension holds the channels: behind a loop it may not be."""
    return {
        layer: (tensor, operator)
        for layer, (tensor, operator) in layers.items()
        if tensor in shapes and len(shapes[tensor].type.tensor_type.shape.dim) > 1
    }
