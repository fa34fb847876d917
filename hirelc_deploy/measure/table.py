"""In: a layer's shape, widths and precision. Out: its milliseconds on one device, measured once and kept on disk."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.model_graph import LayerShape
from hirelc_deploy.measure.backend import TENSORRT_FORM, Backend, OperatorTime, Precision
from hirelc_deploy.measure.machine import describe, fingerprint

SCHEMA_VERSION = 1
OPSET, IR_VERSION = 20, 10

SECONDS_PER_LAYER = 0.01
"""Time spent running one layer, beside loading it: a search asks for hundreds."""
LEAST_RUNS, MOST_RUNS = 10, 100
MACS_PER_SECOND = 2e10
"""Only to choose the number of runs: about what one core does in float."""

CHECKS = 10
"""Fresh measurements that must agree before another machine's times are believed."""
AGREEMENT = 0.05
"""Median relative difference up to which they do: what times of single layers scatter by on one machine."""

LAYER, BORDER = "layer/", "border/"
"""Prefixes of the names of nodes that count, and of conversions between float and integer at the file's two ends, which
do not: inside a network the neighbours speak the same format."""
CONVERSIONS = frozenset({"Transpose", "ReorderInput", "ReorderOutput", "Reorder"})
"""What a runtime itself adds at the ends to turn images into the layout of its convolutions, and back; OpenVINO says
Reorder."""
REFORMAT = "Reformat"
"""The same in TensorRT, which has an operator of its own for it, so that no layer's own moves are meant."""

_ACTIVATIONS = {"relu": "Relu", "gelu": "Gelu", "hardswish": "HardSwish"}


@dataclass(frozen=True)
class LayerKey:
    """One entry of the table. `in_features` of attention counts its heads; a depthwise layer has equal widths."""

    shape: LayerShape
    in_features: int
    out_features: int
    precision: str


@dataclass(frozen=True)
class Adoption:
    """Whether another machine's times hold here.

    Attributes:
        machine: Fingerprint of the other one.
        checks: Fresh measurements that were compared.
        median_difference, largest_difference: Of the checks, relative.
        adopted: Entries taken over; 0 where the checks disagree.
    """

    machine: str
    checks: int
    median_difference: float
    largest_difference: float
    adopted: int


class LatencyTable:
    """Times of single layers on one device.

    A layer's time is that of its own kernels inside a one-layer file, from the runtime's own profile: conversions at
    the file's ends do not count, nor does the call from Python. Entries are kept in an append-only file of JSON lines,
    per machine and runtime version, so equal layers are measured once, ever.
    """

    def __init__(self, backend: Backend, path: Path | None, threads: int = 1, batch: int = 1) -> None:
        """Open a table; `path` need not exist yet, and None keeps nothing on disk. Broken lines are skipped."""
        self._backend, self._path, self._threads, self._batch = backend, path, threads, batch
        self._precisions = {precision.name: precision for precision in backend.precisions()}
        self._machine = fingerprint(describe(backend))
        self._ms: dict[str, float] = {}
        self._elsewhere: dict[str, dict[str, float]] = {}
        self._ends_mid_line = False
        self.measured = 0
        """Number of layers that this object has measured itself."""
        if path is not None and path.exists():
            self._read(path)

    def layer_ms(self, shape: LayerShape, in_features: int, out_features: int, precision: str) -> float:
        """Return milliseconds of one layer for the whole batch; measures it if this machine has not done so before.

        Raises:
            InputError: a precision that the device does not execute, or widths that the shape cannot take.
        """
        key = LayerKey(shape, in_features, out_features, precision)
        text = self._key_text(key)
        if text not in self._ms:
            self._keep(text, self._measure(key))
        return self._ms[text]

    def _keep(self, text: str, ms: float) -> None:
        self._ms[text] = ms
        self.measured += 1
        self._append(text)

    def measure_many(self, keys: Sequence[LayerKey], progress: Callable[[int, int], None] | None = None) -> list[float]:
        """Return milliseconds of many layers; `progress` hears (done, all)."""
        for done, _ in enumerate(self.measure_missing(keys), 1):
            if progress is not None:
                progress(done, len(keys))
        return [self._ms[self._key_text(key)] for key in keys]

    def measure_missing(self, keys: Sequence[LayerKey]) -> Iterator[LayerKey]:
        """Measure what is not known yet and yield each key when its time is; boards of a pool share them out."""
        texts = [self._key_text(key) for key in keys]
        missing = {text: key for text, key in zip(texts, keys, strict=True) if text not in self._ms}
        with ThreadPoolExecutor(getattr(self._backend, "side_by_side", 1)) as executor:
            measured = executor.map(self._measure, missing.values())
            for text, key in zip(texts, keys, strict=True):
                if missing.pop(text, None) is not None:
                    self._keep(text, next(measured))
                yield key

    def adopt(self, keys: Sequence[LayerKey]) -> Adoption | None:
        """Take over what another machine has measured of `keys`, if CHECKS fresh measurements here agree with it.

        The fresh ones are spread over the other's times, so that a board that is equal but for its memory or its clock
        is told from an equal one. They are kept either way.

        Returns:
            What was found about the machine that has measured the most of what is missing here; None where no machine
            has enough for a check.
        """
        texts = {self._key_text(key): key for key in keys if self._key_text(key) not in self._ms}
        known = {machine: texts.keys() & times.keys() for machine, times in self._elsewhere.items()}
        machine = max(known, key=lambda name: len(known[name]), default=None)
        if machine is None or len(known[machine]) < CHECKS:
            return None
        theirs = self._elsewhere[machine]
        by_time = sorted(known[machine], key=lambda text: theirs[text])
        chosen = [by_time[index] for index in np.linspace(0, len(by_time) - 1, CHECKS).round().astype(int)]
        ours = self.measure_many([texts[text] for text in chosen])
        differences = [abs(ms / theirs[text] - 1) for text, ms in zip(chosen, ours, strict=True)]
        # Half of the checks may be layers of microseconds, whose times scatter; none may be far off.
        agrees = float(np.median(differences)) <= AGREEMENT and max(differences) <= 3 * AGREEMENT
        taken = [text for text in by_time if text not in self._ms] if agrees else []
        for text in taken:
            self._ms[text] = theirs[text]  # in memory only: on disk, an entry belongs to the machine that measured it
        return Adoption(machine, CHECKS, float(np.median(differences)), max(differences), len(taken))

    def _measure(self, key: LayerKey) -> float:
        model, image_shape, macs = layer_model(key, self._precisions[self._execution(key)], self._batch)
        runs = int(min(max(SECONDS_PER_LAYER * MACS_PER_SECOND / macs, LEAST_RUNS), MOST_RUNS))
        image = np.random.default_rng(0).standard_normal(image_shape).astype(np.float32)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "layer.onnx"
            path.write_bytes(model.SerializeToString())
            operators = self._backend.build(path, self._threads).profile(image, runs)
        return sum(operator.microseconds for operator in operators if _counts(operator, key.shape.kind)) / 1000.0

    def _execution(self, key: LayerKey) -> str:
        """Return the precision the layer runs in: attention between its projections is float in every plan."""
        if key.precision not in self._precisions:
            known = ", ".join(self._precisions)
            raise InputError(f"precision {key.precision!r} is not one that {self._backend.name} executes: {known}.")
        return "float" if key.shape.kind == "attention" else key.precision

    def _key_text(self, key: LayerKey) -> str:
        shape = dataclasses.asdict(key.shape)
        features = [key.in_features, key.out_features]
        # A batch of one goes without saying: tables from before there were others stay true.
        several = [self._batch] if self._batch > 1 else []
        return json.dumps([shape, *features, self._execution(key), self._threads, *several], sort_keys=True)

    def _read(self, path: Path) -> None:
        try:
            text = path.read_text("utf-8", "replace")
        except OSError as error:
            raise InputError(f"{path}: cannot be read as a latency table ({error}).") from None
        self._ends_mid_line = bool(text) and not text.endswith("\n")
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                if entry["schema_version"] == SCHEMA_VERSION:
                    ours = entry["machine"] == self._machine
                    times = self._ms if ours else self._elsewhere.setdefault(str(entry["machine"]), {})
                    times[json.dumps(entry["layer"], sort_keys=True)] = float(entry["ms"])
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                continue  # the line that was being written when the machine stopped; its layer is measured again

    def _append(self, text: str) -> None:
        if self._path is None:
            return
        entry = {"schema_version": SCHEMA_VERSION, "machine": self._machine, "layer": json.loads(text)}
        line = json.dumps({**entry, "ms": self._ms[text]}) + "\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write("\n" + line if self._ends_mid_line else line)
        except OSError as error:
            raise InputError(
                f"{self._path}: cannot be written ({error}); choose another place for the table."
            ) from None
        self._ends_mid_line = False


def calibrate(predicted: Sequence[float], measured: Sequence[float]) -> tuple[float, float]:
    """Return (a, c) >= 0 that fit measured = a + c * predicted best by least squares of relative errors.

    `a` is what no layer's kernel shows (calls, pooling, additions), `c` what neighbours do to each other in caches.
    Relative, because a network ten times smaller matters as much. With one pair, or equal predictions, a is 0.
    """
    sums, times = np.asarray(predicted, np.float64), np.asarray(measured, np.float64)
    if sums.shape != times.shape or sums.size == 0 or not (sums > 0).all() or not (times > 0).all():
        raise InputError("calibrate: needs equally many predicted and measured times, at least one, all above 0.")
    only_scale = 0.0, float((sums / times).sum() / ((sums / times) ** 2).sum())
    if np.ptp(sums) <= 1e-9 * sums.max():
        return only_scale
    # Two unknowns: the least squares optimum is the free one, or lies on an edge.
    (a, c), *_ = np.linalg.lstsq(np.stack([1 / times, sums / times], axis=1), np.ones(len(times)), rcond=None)
    if a < 0:
        return only_scale
    if c < 0:
        return float((1 / times).sum() / ((1 / times) ** 2).sum()), 0.0
    return float(a), float(c)


def layer_model(key: LayerKey, precision: Precision, batch: int = 1) -> tuple[onnx.ModelProto, tuple[int, ...], int]:
    """Return (one-layer ONNX model of this batch, shape of its float32 input, multiply-accumulates).

    An integer convolution gets its input as integers and leaves integers, as between two convolutions. An integer
    linear layer rounds its own input and leaves floats, as behind a layer norm, a GELU or attention; in TensorRT's form
    it gets integers, because there whatever comes before it rounds. What an activation costs is part of the layer: ReLU
    nothing where the runtime folds it, SiLU in float between two conversions.
    """
    builders = {"conv": _conv, "linear": _linear, "attention": _attention}
    if key.shape.kind not in builders:
        raise InputError(f"layer kind {key.shape.kind!r} has no timing; known: {', '.join(builders)}.")
    if min(key.in_features, key.out_features) < 1:
        raise InputError(f"layer: widths {key.in_features} -> {key.out_features}; both must be at least 1.")
    of_form = _TypedGraph if precision.form == TENSORRT_FORM else _Graph
    graph = of_form(None if precision.name == "float" else precision)
    image_shape, output_shape, output, macs = builders[key.shape.kind](graph, key, batch)
    return graph.model(image_shape, output_shape, output), image_shape, batch * macs


_Built = tuple[tuple[int, ...], tuple[int | None, ...], str, int]
"""Input shape, output shape (None: not worth computing), name of the output, multiply-accumulates of one image."""


def _counts(operator: OperatorTime, kind: str) -> bool:
    if operator.name.startswith(BORDER) or operator.operator == REFORMAT:
        return False
    # A runtime turns layouts around a convolution once per network, but those of attention are its own work.
    return kind != "conv" or operator.operator not in CONVERSIONS


class _Graph:
    """Nodes and constants of a model in the making; `integer` is None for a float layer."""

    def __init__(self, integer: Precision | None) -> None:
        self.integer = integer
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.first = self.entrance()

    def entrance(self) -> str:
        """Return the tensor that the layer gets in float."""
        # The first operator of a run pays for more than itself, so it is one that does not count.
        return self.add("Neg", "input", prefix=BORDER)

    def rounded_input(self, prefix: str) -> str:
        """Return the tensor that the layer reads, rounded if it is integer; `prefix` says whether that counts."""
        return self.first if self.integer is None else self.quantized(self.first, prefix)

    def activated_and_rounded(self, kind: str, tensor: str) -> str:
        """Return what an integer convolution leaves for the next one."""
        if kind in ("", "relu", "relu6"):
            # A range that starts at 0, and ends at 6 for ReLU6, makes rounding do what the activation did.
            return self.quantized(tensor, BORDER, top=6.0, signed=not kind)
        tensor = self.quantized(self.activation(kind, self.quantized(tensor, LAYER)), LAYER)
        # The last conversion back to float belongs to the file's end, not to the layer.
        return self.add("DequantizeLinear", *self.nodes.pop().input, prefix=BORDER)

    def add(self, operator: str, *inputs: str, prefix: str = LAYER, outputs: int = 1, **attributes: Any) -> str:
        """Append a node and return its first output; further ones end in `.1`, `.2`."""
        name = f"{prefix}{len(self.nodes)}/{operator}"
        results = [name, *(f"{name}.{index}" for index in range(1, outputs))]
        self.nodes.append(helper.make_node(operator, list(inputs), results, name, **attributes))
        return name

    def constant(self, value: NDArray[Any] | np.generic) -> str:
        """Append a constant and return its name."""
        self.constants.append(numpy_helper.from_array(np.asarray(value, order="C"), f"constant{len(self.constants)}"))
        return str(self.constants[-1].name)

    def quantized(self, tensor: str, prefix: str, top: float = 4.0, signed: bool = True) -> str:
        """Return `tensor` after rounding to 256 steps over [-top, top], or [0, top] if not signed, and back."""
        assert self.integer is not None
        dtype = np.dtype(self.integer.activation_type)
        lowest = int(np.iinfo(dtype).min)
        scale = self.constant(np.float32(top * (2 if signed else 1) / 255))
        zero = self.constant(np.array(lowest + (128 if signed else 0), dtype))
        integers = self.add("QuantizeLinear", tensor, scale, zero, prefix=prefix)
        return self.add("DequantizeLinear", integers, scale, zero, prefix=prefix)

    def weight(self, shape: tuple[int, ...], channel_axis: int, input_scale: float = 8 / 255) -> tuple[str, str]:
        """Return names of a weight and a bias of `shape[channel_axis]`, dequantized per channel if integer."""
        # A short tile repeated: no timing depends on the values, and drawing millions of them would.
        fan_in = math.prod(shape) // shape[channel_axis]
        rng = np.random.default_rng(0)
        channels = shape[channel_axis]
        if self.integer is None:
            tile = rng.standard_normal(4099).astype(np.float32) / np.float32(math.sqrt(fan_in))
            return self.constant(np.resize(tile, shape)), self.constant(np.full(channels, 0.1, np.float32))
        tile = rng.integers(-63, 64, 4099).astype(np.int8)
        scales = np.full(channels, 1 / 64 / math.sqrt(fan_in), np.float32)
        scale, bias_scale = self.constant(scales), self.constant(scales * np.float32(input_scale))
        weight = self.constant(np.resize(tile, shape))
        bias = self.constant(np.full(channels, 9, np.int32))
        # ONNX means zero where no zero point is given, but ONNX Runtime 1.31 then computes a Gemm in float.
        zero, bias_zero = self.constant(np.zeros(channels, np.int8)), self.constant(np.zeros(channels, np.int32))
        return (
            self.add("DequantizeLinear", weight, scale, zero, axis=channel_axis),
            self.add("DequantizeLinear", bias, bias_scale, bias_zero, axis=0),
        )

    def activation(self, kind: str, tensor: str) -> str:
        """Return `tensor` after an activation function; `` changes nothing."""
        if not kind:
            return tensor
        if kind == "relu6":
            return self.add("Clip", tensor, self.constant(np.float32(0)), self.constant(np.float32(6)))
        if kind == "silu":
            return self.add("Mul", tensor, self.add("Sigmoid", tensor))
        if kind not in _ACTIVATIONS:
            raise InputError(f"activation {kind!r} has no timing; known: relu6, silu, {', '.join(_ACTIVATIONS)}.")
        return self.add(_ACTIVATIONS[kind], tensor)

    def model(self, input_shape: tuple[int, ...], output_shape: tuple[int | None, ...], output: str) -> onnx.ModelProto:
        """Return the model from `input` to `output`, both float32."""
        return self.typed_model(input_shape, output_shape, output, TensorProto.FLOAT, TensorProto.FLOAT)

    def typed_model(
        self, input_shape: tuple[int, ...], output_shape: tuple[int | None, ...], output: str, taken: int, left: int
    ) -> onnx.ModelProto:
        """Return the model that takes and leaves these ONNX types."""
        used = {name for node in self.nodes for name in node.input}
        graph = helper.make_graph(
            self.nodes,
            "layer",
            [helper.make_tensor_value_info("input", taken, input_shape)],
            [helper.make_tensor_value_info(output, left, output_shape)],
            [constant for constant in self.constants if constant.name in used],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


class _TypedGraph(_Graph):
    """A layer as TensorRT gets it, by the rules of compress/onnx_file/export_tensorrt.py.

    It takes what its neighbour leaves, FP16 or integers, and leaves what its neighbour takes: conversions at the ends
    would be kernels of their own, or become part of the layer's, and a profile could not tell them apart.
    """

    leaves_integers = False

    def entrance(self) -> str:
        return "input"

    def constant(self, value: NDArray[Any] | np.generic) -> str:
        return super().constant(value.astype(np.float16) if value.dtype == np.float32 else value)

    def rounded_input(self, prefix: str) -> str:
        if self.integer is None:
            return self.first
        return self.add("DequantizeLinear", self.first, *self._grid())

    def activated_and_rounded(self, kind: str, tensor: str) -> str:
        self.leaves_integers = True
        return self.add("QuantizeLinear", self.activation(kind, tensor), *self._grid())

    def _grid(self) -> tuple[str, str]:
        return self.constant(np.float32(6 / 127)), self.constant(np.int8(0))

    def weight(self, shape: tuple[int, ...], channel_axis: int, input_scale: float = 8 / 255) -> tuple[str, str]:
        if self.integer is None:
            return super().weight(shape, channel_axis)
        rounded, _ = super().weight(shape, channel_axis)
        self.nodes.pop()  # the bias stays FP16
        return rounded, self.constant(np.full(shape[channel_axis], 0.1, np.float32))

    def model(self, input_shape: tuple[int, ...], output_shape: tuple[int | None, ...], output: str) -> onnx.ModelProto:
        taken = TensorProto.FLOAT16 if self.integer is None else TensorProto.INT8
        left = TensorProto.INT8 if self.leaves_integers else TensorProto.FLOAT16
        return self.typed_model(input_shape, output_shape, output, taken, left)


def _conv(graph: _Graph, key: LayerKey, batch: int) -> _Built:
    shape, inputs, outputs = key.shape, key.in_features, key.out_features
    groups = inputs if shape.depthwise else shape.groups
    if inputs % groups or outputs % groups:
        raise InputError(f"convolution: {inputs} -> {outputs} channels do not divide into {groups} groups.")
    image_shape = (batch, inputs, *shape.input_size)
    weight_shape = (outputs, inputs // groups, *shape.kernel)
    tensor = graph.add(
        "Conv",
        graph.rounded_input(BORDER),
        *graph.weight(weight_shape, 0),
        kernel_shape=shape.kernel,
        strides=shape.stride,
        pads=(*shape.padding, *shape.padding),
        dilations=shape.dilation,
        group=groups,
    )
    finish = graph.activation if graph.integer is None else graph.activated_and_rounded
    tensor = finish(shape.activation, tensor)
    return image_shape, (batch, outputs, *[None] * len(shape.kernel)), tensor, shape.positions * math.prod(weight_shape)


def _linear(graph: _Graph, key: LayerKey, batch: int) -> _Built:
    positions, inputs, outputs = key.shape.positions, key.in_features, key.out_features
    tensor = graph.add("Gemm", graph.rounded_input(LAYER), *graph.weight((inputs, outputs), 1))
    tensor = graph.activation(key.shape.activation, tensor)
    return (batch * positions, inputs), (batch * positions, outputs), tensor, positions * inputs * outputs


def _attention(graph: _Graph, key: LayerKey, batch: int) -> _Built:
    tokens, heads, size = key.shape.positions, key.in_features, key.shape.head_dim
    rows = batch * tokens
    if size < 1:
        raise InputError(f"attention: head_dim is {size}; it must be at least 1.")

    def integers(*values: int) -> str:
        return graph.constant(np.array(values, np.int64))

    split = graph.add("Reshape", graph.first, integers(batch, tokens, 3, heads, size))
    turned = graph.add("Transpose", split, perm=(2, 0, 3, 1, 4))
    parts = graph.add("Split", turned, outputs=3, axis=0, num_outputs=3)
    query, keys, value = (graph.add("Squeeze", f"{parts}{end}", integers(0)) for end in ("", ".1", ".2"))
    query = graph.add("Mul", query, graph.constant(np.float32(size**-0.5)))
    scores = graph.add("MatMul", query, graph.add("Transpose", keys, perm=(0, 1, 3, 2)))
    mixed = graph.add("MatMul", graph.add("Softmax", scores, axis=-1), value)
    output = graph.add("Reshape", graph.add("Transpose", mixed, perm=(0, 2, 1, 3)), integers(rows, heads * size))
    return (rows, 3 * heads * size), (rows, heads * size), output, 2 * heads * tokens * tokens * size
