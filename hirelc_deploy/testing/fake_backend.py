"""In: ONNX files. Out: a staircase of simulated times, with noise and faults on request; never a measurement."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hirelc_deploy.errors import ExportError, InputError, TargetUnavailable
from hirelc_deploy.measure.backend import DeviceState, OperatorTime, Outputs, Precision, Runner, TimingProcess
from hirelc_deploy.measure.registry import get_backend

STEPS = {"float": (16, 8, 1.0), "int8": (32, 8, 0.25)}
"""Precision to (output channels per step, input channels per step, time of a step relative to float)."""
MACS_PER_MICROSECOND = 20_000.0
ELEMENTS_PER_MICROSECOND = 4_000.0
NODE_MICROSECONDS = 1.0
WATTS = 4
"""That the simulated device draws while it works."""
PROCESS_BYTES = 40_000_000
"""Of a simulated process that has opened no file."""


@dataclass(frozen=True)
class Noise:
    """How simulated runs scatter; the defaults are what a crowded machine of two cores was seen to do.

    Attributes:
        process: Relative deviation of a process's speed, common to its files.
        session: Relative deviation of one file's session within a process: what pairing cannot remove.
        run: Relative deviation of a single run by CPU time.
        burst_share: Share of runs that another program interrupts.
        burst_scale: Such a run takes (1 + this * a Pareto variable of exponent 1.5) times as long by the wall clock.
        burst_cpu: Part of the extra time that also shows in CPU time (cold caches).
        drift: Relative change of speed from the first to the last of 400 rounds, common to all files.
    """

    process: float = 0.03
    session: float = 0.0018
    run: float = 0.02
    burst_share: float = 0.3
    burst_scale: float = 3.0
    burst_cpu: float = 0.05
    drift: float = 0.05


NO_NOISE = Noise(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Heat:
    """How the simulated device warms up while it works, and slows itself down when it is hot.

    Attributes:
        per_round_c: Degrees that one round adds; a pause of a second takes `per_second_c` off again.
        limit_c: From here on it is throttled, and every run takes `slowdown` times as long.
    """

    start_c: float = 45.0
    per_round_c: float = 0.0
    per_second_c: float = 1.0
    limit_c: float = 80.0
    slowdown: float = 1.5


@dataclass(frozen=True)
class Faults:
    """What shall go wrong: files whose name contains `refuse` are not loaded; a timing process ends early.

    A `silent` device says nothing about itself between timed runs.
    """

    refuse: str = ""
    silent: bool = False
    end_after_rounds: int | None = None
    unavailable: str = ""


class FakeBackend:
    """A device that does not exist. Its outputs are real, computed by ONNX Runtime; its times are simulated."""

    name = "fake"

    def __init__(self, noise: Noise = NO_NOISE, faults: Faults = Faults(), heat: Heat = Heat()) -> None:
        self._noise, self._faults, self._heat = noise, faults, heat
        self.celsius = heat.start_c

    def pause(self, seconds: float) -> None:
        """Let simulated time pass, in which the device cools; hand it to `compare`."""
        self.celsius = max(self._heat.start_c, self.celsius - seconds * self._heat.per_second_c)

    def work(self, rounds: int) -> float:
        """Warm up by some rounds and return how many times as long they take."""
        self.celsius += rounds * self._heat.per_round_c
        return self._heat.slowdown if self.is_throttled else 1.0

    @property
    def is_throttled(self) -> bool:
        """Whether the device slows itself down."""
        return self.celsius > self._heat.limit_c

    def state(self) -> DeviceState:
        """Return what the device says about itself."""
        return DeviceState(temperature_c=self.celsius, throttled=("simulated heat",) if self.is_throttled else ())

    @property
    def is_silent(self) -> bool:
        """Whether the device says nothing about itself."""
        return self._faults.silent

    def availability(self) -> str | None:
        """Return None, or the fault that was asked for."""
        return self._faults.unavailable or None

    def precisions(self) -> tuple[Precision, ...]:
        """Return float and int8."""
        return (
            Precision("float", "float32", "float32", 32, "simulated"),
            Precision("int8", "uint8", "int8", 8, "simulated"),
        )

    def versions(self) -> dict[str, str]:
        """Return versions that nobody can take for a measurement's."""
        return {"fake": "simulated"}

    def build(self, model: Path, threads: int = 1) -> Runner:
        """Load a file; raises ExportError as a real runtime would, or because it was asked to."""
        self._refuse(model)
        return FakeRunner(model, threads)

    def open_timing(self, files: Sequence[Path], threads: int, seed: int) -> AbstractContextManager[TimingProcess]:
        """Return a simulated process; equal seeds give equal nanoseconds."""
        return self._timing(files, threads, seed)

    @contextmanager
    def _timing(self, files: Sequence[Path], threads: int, seed: int) -> Iterator[TimingProcess]:
        for file in files:
            self._refuse(file)
        microseconds = [sum(operator.microseconds for operator in operator_times(file, threads)) for file in files]
        memory = PROCESS_BYTES + sum(memory_bytes(file) for file in files)
        yield FakeTiming(microseconds, self._noise, seed, self._faults.end_after_rounds, self, memory)

    def _refuse(self, model: Path) -> None:
        if self._faults.refuse and self._faults.refuse in model.name:
            raise ExportError(f"{model}: the fake device was asked to refuse this file.")


class FakeRunner:
    """One file on the fake device."""

    def __init__(self, model: Path, threads: int) -> None:
        self._real = get_backend("onnxruntime_cpu").build(model, threads)
        self._times = operator_times(model, threads)

    def infer(self, images: NDArray[np.float32]) -> Outputs:
        """Return the real outputs."""
        return self._real.infer(images)

    def profile(self, image: NDArray[np.float32], runs: int) -> list[OperatorTime]:
        """Return the simulated operator times; the number of runs changes nothing."""
        return list(self._times)


class FakeTiming:
    """A timing process that reads no clock."""

    def __init__(
        self,
        microseconds: Sequence[float],
        noise: Noise,
        seed: int,
        end_after_rounds: int | None = None,
        device: FakeBackend | None = None,
        memory: int = PROCESS_BYTES,
    ) -> None:
        self._noise, self._left, self._device, self._memory = noise, end_after_rounds, device, memory
        self._rng = np.random.default_rng(seed)
        speed = 1.0 + noise.process * self._rng.standard_normal()
        sessions = 1.0 + noise.session * self._rng.standard_normal(len(microseconds))
        self._nanoseconds = 1000.0 * np.asarray(microseconds) * speed * sessions
        self._round = 0
        self.states: tuple[DeviceState, DeviceState] | None = None
        self.restarts = 0
        self.place = None

    def rounds(self, count: int) -> NDArray[np.int64]:
        """Return (count, files, 2) simulated nanoseconds."""
        if self._left is not None:
            if count > self._left:
                raise TargetUnavailable("The fake device was asked to end its timing process here.")
            self._left -= count
        noise, shape = self._noise, (count, len(self._nanoseconds))
        drift = 1.0 + noise.drift * (self._round + np.arange(count)) / 400.0
        self._round += count
        slowdown = 1.0
        if self._device is not None:
            before = self._device.state()
            slowdown = self._device.work(count)
            before, after = (
                replace(before, energy_uj=0, clock_ns=0),
                replace(self._device.state(), peak_memory_bytes=self._memory, energy_uj=WATTS * 10**6, clock_ns=10**9),
            )
            self.states = None if self._device.is_silent else (before, after)
        cpu = slowdown * self._nanoseconds * drift[:, None] * np.abs(1.0 + noise.run * self._rng.standard_normal(shape))
        burst = (self._rng.random(shape) < noise.burst_share) * noise.burst_scale * self._rng.pareto(1.5, shape)
        wall = cpu * (1.0 + burst)
        return np.stack([wall, cpu * (1.0 + noise.burst_cpu * np.minimum(burst, 10.0))], axis=2).astype(np.int64)


def operator_times(model: Path, threads: int = 1) -> list[OperatorTime]:
    """Return the simulated time of each node: a staircase in the channels, more for float than for integer weights.

    Steps are what real kernels show: a vector register is filled or it is not.
    """
    nodes, shapes, constants, quantized = _read(model)
    speed = threads**0.9
    times = []
    for node in nodes:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Constant", "Identity"):
            continue
        output = shapes.get(node.output[0], (1,))
        weight = constants.get(node.input[1]) if len(node.input) > 1 else None
        if node.op_type in ("Conv", "Gemm", "MatMul") and weight is not None:
            precision = "int8" if node.input[1] in quantized else "float"
            transposed = any(a.name == "transB" and a.i for a in node.attribute)
            macs = _stepped_macs(node.op_type, weight, output, transposed, precision)
            integer = precision == "int8"
            name = {"Conv": "QLinearConv", "Gemm": "QGemm", "MatMul": "QLinearMatMul"}[node.op_type]
            microseconds = NODE_MICROSECONDS + macs / MACS_PER_MICROSECOND / speed
            times.append(OperatorTime(node.name, name if integer else node.op_type, integer, microseconds))
        else:
            microseconds = NODE_MICROSECONDS + math.prod(output) / ELEMENTS_PER_MICROSECOND / speed
            times.append(OperatorTime(node.name, node.op_type, False, microseconds))
    return times


def memory_bytes(model: Path) -> int:
    """Return the simulated memory of an open file: what it holds, and its largest tensor, of all images at once."""
    nodes, shapes, _, _ = _read(model)
    largest = max((math.prod(shapes.get(name, ())) for node in nodes for name in node.output), default=0)
    return model.stat().st_size + 4 * largest


def _stepped_macs(
    kind: str, weight: tuple[int, ...], output: tuple[int, ...], transposed: bool, precision: str
) -> float:
    out_step, in_step, relative = STEPS[precision]
    if kind == "Conv":
        outputs, inputs = weight[0], weight[1]
        positions = output[0] * math.prod(output[2:]) * math.prod(weight[2:])
    else:
        outputs, inputs = (weight[0], weight[1]) if transposed else (weight[-1], weight[-2])
        positions = math.prod(output[:-1])
    steps = math.ceil(outputs / out_step) * out_step * math.ceil(inputs / in_step) * in_step
    return steps * positions * relative


def _read(model: Path) -> tuple[list[Any], dict[str, tuple[int, ...]], dict[str, tuple[int, ...]], set[str]]:
    """Return (nodes, shape of each tensor, shape of each weight, names of weights stored as integers)."""
    import onnx

    try:
        loaded = onnx.shape_inference.infer_shapes(onnx.load(model))
    except FileNotFoundError:
        raise InputError(f"{model}: no such file; give an ONNX file.") from None
    except Exception as error:  # protobuf's exception types differ by its implementation
        raise ExportError(f"{model}: not an ONNX file ({error}).") from None
    graph = loaded.graph
    if not graph.output:
        raise ExportError(f"{model}: an empty ONNX file.")
    shapes = {
        value.name: tuple(d.dim_value if d.dim_value > 0 else 1 for d in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    constants = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    quantized = set()
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]
            quantized.add(node.output[0])
    return list(graph.node), shapes, constants, quantized
