"""In: a runtime on a device. Out: the contract by which the tool builds, runs and times files on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

ONNX_FORM, TENSORRT_FORM, BFLOAT_FORM, HALF_FORM = "onnx", "tensorrt", "onnx-bf16", "onnx-f16"
"""float32 where nothing is integer, Q/DQ pairs with any zero point; or strongly typed: FP16, and symmetric pairs; or as
the first, and a file may ask for bfloat16, or for FP16, in what is not integer."""

FLOAT_AS = "hirelc_deploy.float_as"
"""Key in the metadata of a file of BFLOAT_FORM or HALF_FORM; the value is `bf16` or `f16`."""


Outputs = dict[str, NDArray[np.float32]]
"""Name of an output, as the file has it, to its (n, ...) array."""


def only(outputs: Outputs) -> NDArray[np.float32]:
    """Return the array of a file that has one output."""
    (output,) = outputs.values()
    return output


@dataclass(frozen=True)
class Precision:
    """A precision this device really executes.

    Attributes:
        name: `float` or `int8`.
        activation_type: `uint8`, `int8` or `float32`; `float16` and `float8` on a GPU.
        weight_type: `int8` or `float32`; `float16` and `float8` on a GPU.
        weight_bits: Bits used of the weight type; 7 where 8-bit products would saturate (x86 without VNNI).
        remark: What the user should know, in one sentence, or ``.
        form: How the ONNX files must be written that run in it, the same for all precisions of a device: ONNX_FORM,
            TENSORRT_FORM, BFLOAT_FORM or HALF_FORM; compress/integer/forms.py writes them.
    """

    name: str
    activation_type: str
    weight_type: str
    weight_bits: int
    remark: str = ""
    form: str = ONNX_FORM


@dataclass(frozen=True)
class OperatorTime:
    """One operator of a profiled run: what ran, whether its arithmetic was integer, and its share of the time."""

    name: str
    operator: str
    is_integer: bool
    microseconds: float


@dataclass(frozen=True)
class DeviceState:
    """What a device says about itself between timed runs; None or empty where it does not say.

    Attributes:
        frequency_khz: Of the fastest core now.
        temperature_c: Of the hottest zone now.
        throttled: Reasons for which the device slows itself down now.
        power_w: Drawn by the whole board now.
        peak_memory_bytes: Of the timing process until now.
        energy_uj: Microjoules that the processors have drawn since some moment in the past; the count may start again.
        clock_ns: When that was read, on a clock of the device.
    """

    frequency_khz: int | None = None
    temperature_c: float | None = None
    throttled: tuple[str, ...] = ()
    power_w: float | None = None
    peak_memory_bytes: int | None = None
    energy_uj: int | None = None
    clock_ns: int | None = None

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> DeviceState:
        """Return the state that worker.state told; keys of a newer one are ignored.

        Raises:
            TypeError: What should be a number is none.
        """
        known: dict[str, Any] = {field.name: said.get(field.name) for field in fields(cls)}
        for name, value in known.items():
            if name != "throttled" and value is not None and type(value) not in (int, float):
                raise TypeError(f"{name} is a {type(value).__name__}")
        return cls(**{**known, "throttled": tuple(said.get("throttled") or ())})

    def mean_power_w(self, later: DeviceState) -> float | None:
        """Return the watts that were drawn from this state to a later one.

        By the counter of energy, else as the rail of the board says at the end; None where neither tells, and where the
        counter has started again in between.
        """
        if self.energy_uj is None or self.clock_ns is None or later.energy_uj is None or later.clock_ns is None:
            return later.power_w
        microjoules, nanoseconds = later.energy_uj - self.energy_uj, later.clock_ns - self.clock_ns
        return 1000.0 * microjoules / nanoseconds if microjoules > 0 and nanoseconds > 0 else None


class Runner(Protocol):
    """One built file, ready to run."""

    def infer(self, images: NDArray[np.float32]) -> Outputs:
        """Return all outputs for (n, channels, height, width) images, whatever batch the file was built for."""

    def profile(self, image: NDArray[np.float32], runs: int) -> list[OperatorTime]:
        """Return the time of each operator in execution order: the mean of the fastest half of `runs` inferences.

        `image` is (1, channels, height, width), or a batch of them for a file that takes so many.

        Other programs can only add time, so the slower half says more about them than about the file.
        """


class TimingProcess(Protocol):
    """A separate process on the device that holds fresh sessions of several files."""

    @property
    def states(self) -> tuple[DeviceState, DeviceState] | None:
        """Of the device, right before and right after the last `rounds`, outside of every clock; None if unknown."""

    @property
    def restarts(self) -> int:
        """How often the process was lost and started again."""

    @property
    def place(self) -> object:
        """Equal for processes that must not work at the same time; boards of a pool are different places."""

    def rounds(self, count: int) -> NDArray[np.int64]:
        """Return (count, files, 2) nanoseconds of one inference of each file: wall time, and the processor's own time.

        The processor's own time is CPU time on a CPU and the time between two events on a GPU.

        Files take turns in random order, a few timed runs in a row after untimed ones of the same file, so that none
        pays for caches that another has just emptied.

        Raises ExportError when the process ends or hangs again and again, TargetUnavailable when the device is gone.
        """


class Timer(Protocol):
    """What can time files."""

    def open_timing(self, files: Sequence[Path], threads: int, seed: int) -> AbstractContextManager[TimingProcess]:
        """Start one timing process, warmed up (20 runs of each file), garbage collection off."""


class Backend(Timer, Protocol):
    """A runtime on a device. One module, one entry point in the group `hirelc_deploy.backends`."""

    name: str

    def availability(self) -> str | None:
        """Return None where this backend can run, else the reason and the remedy in one sentence."""

    def precisions(self) -> tuple[Precision, ...]:
        """Return what the device executes, `float` first."""

    def versions(self) -> dict[str, str]:
        """Return name to version of the runtime and what it depends on."""

    def build(self, model: Path, threads: int = 1) -> Runner:
        """Load a file; raises `ExportError` with the runtime's own words when it refuses."""


@runtime_checkable
class Portable(Protocol):
    """What a backend has when the same code can run on a board over SSH.

    Attributes:
        program: One file for Python 3.8, numpy and the runtime, without imports of this project. Its functions are
            `availability()` and `versions()` as of a backend, `facts()` (JSON values that precisions depend on), and
            `open_session(path, threads, cache)`, which raises anything to refuse a file and else returns an object with
            `infer(images)` (output name to array), `profile(image, runs)` (tuples of the fields of OperatorTime) and
            `timed_run()`, one synchronised inference of the file's batch that returns nanoseconds: wall time, and the
            processor's own time. `cache` is a folder that lasts as long as the connection. Where files are opened with
            options, the object also has `options`, a dictionary of JSON values.
    """

    name: str
    program: Path

    def precisions_on(self, facts: Mapping[str, Any]) -> tuple[Precision, ...]:
        """Return what a device executes that says of itself `machine.describe`'s hardware and `facts()['runtime']`."""


@runtime_checkable
class Configured(Protocol):
    """What a Runner has whose runtime was told how to open the file."""

    def options(self) -> dict[str, Any]:
        """Return the names and values, as the runtime calls them; JSON values."""


@runtime_checkable
class Elsewhere(Protocol):
    """What a backend has whose device is another machine."""

    def hardware(self) -> dict[str, Any]:
        """Return what worker.hardware says on that machine."""


BackendFactory = Callable[[], Backend]
"""What an entry point of `hirelc_deploy.backends` names: called without arguments, it must not import the runtime."""
