"""In: a runtime's program file and a device. Out: a backend that runs there, whether here or on a board."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hirelc_deploy.errors import ExportError, HirelcError, InputError, TargetUnavailable, printable
from hirelc_deploy.graph.answers import stacked
from hirelc_deploy.measure import worker
from hirelc_deploy.measure.backend import DeviceState, OperatorTime, Outputs, Precision, TimingProcess
from hirelc_deploy.measure.device import (
    MOST_WORDS,
    Device,
    Process,
    ProcessEnded,
    ProcessHung,
    Refused,
    SessionLost,
    understood,
)

PIECE_BYTES = 32 << 20
"""Images travel in pieces of at most this, so that a dropped line costs little and a small board keeps its memory."""
ANSWER_SECONDS = 600.0
"""One piece of images may take this long."""
ATTEMPTS = 3
"""A device that forgets its sessions more often in one measurement is not worth another try."""


class ProgramBackend:
    """A backend whose runtime is only met in processes of a device."""

    def __init__(
        self,
        name: str,
        program: Path,
        precisions_on: Callable[[Mapping[str, Any]], tuple[Precision, ...]],
        device: Device,
        load_deadline_s: float = 300.0,
    ) -> None:
        """Args: `program` is a file as worker.py loads it; `precisions_on` gets `facts()` of the device."""
        self.name = name
        self._program, self._precisions_on, self._device = program, precisions_on, device
        self._load_deadline_s = load_deadline_s
        self._bench = _Bench(device, program, load_deadline_s)
        self._known: dict[str, Any] | None = None
        self.device_name = device.name

    def availability(self) -> str | None:
        """Return None where the device can be reached and has the runtime, else the reason and the remedy."""
        try:
            self.connect()
        except HirelcError as error:
            return " ".join(str(error).split())
        return None

    def connect(self) -> None:
        """Meet the device and its runtime; raises TargetUnavailable with the commands that would help."""
        reason = self._described()["availability"]
        if reason is not None:
            raise TargetUnavailable(f"on {self._device.name}, {printable(str(reason)[:MOST_WORDS])}")

    def precisions(self) -> tuple[Precision, ...]:
        """Return what the device executes."""
        with understood(self._device.name):
            return self._precisions_on(self.facts())

    def versions(self) -> dict[str, str]:
        """Return the versions of the runtime there."""
        return dict(self._described()["versions"])

    def hardware(self) -> dict[str, Any]:
        """Return what the device says about itself; see machine.describe."""
        return self._device.hardware()

    def facts(self) -> dict[str, Any]:
        """Return the hardware, and under `runtime` what the program found out."""
        return {**self.hardware(), "runtime": self._described()["runtime"]}

    def build(self, model: Path, threads: int = 1) -> ProgramRunner:
        """Load a file there; raises ExportError with the runtime's own words when it refuses."""
        runner = ProgramRunner(self._bench, model, threads)
        self._bench.ask(model, threads, None)
        return runner

    def open_timing(self, files: Sequence[Path], threads: int, seed: int) -> AbstractContextManager[TimingProcess]:
        """Start a process with fresh sessions of `files`; see worker.py for what is inside its clocks.

        Raises:
            InputError: A file is not there.
            ExportError: The runtime refused a file, or ended or hung while it loaded or warmed up.
            TargetUnavailable: The device cannot be reached.
        """
        return self._timing(files, threads, seed)

    @contextmanager
    def _timing(self, files: Sequence[Path], threads: int, seed: int) -> Iterator[TimingProcess]:
        for file in files:
            check_file(file)
        with self._device.measuring():
            timing = ProgramTiming(self._device, self._program, files, threads, seed, self._load_deadline_s)
            try:
                timing.open()
                yield timing
            finally:
                timing.close()

    def _described(self) -> dict[str, Any]:
        if self._known is None:
            with self._device.open(self._program) as process:
                try:
                    known = process.ask("describe", limit_s=self._load_deadline_s)[0]
                except (Refused, ProcessEnded, ProcessHung, SessionLost) as error:
                    raise TargetUnavailable(
                        f"the runtime on {self._device.name} cannot be asked what it is ({error})."
                    ) from None
            with understood(self._device.name):
                if known["availability"] is None:
                    known["runtime"].items()
                    known["versions"] = {str(name): printable(str(one)) for name, one in known["versions"].items()}
            self._known = known
        return self._known


class _Bench:
    """The one process of a device that builds, runs and profiles; it holds the file that was used last."""

    def __init__(self, device: Device, program: Path, load_deadline_s: float) -> None:
        self.device = device
        self._program, self._load_deadline_s = program, load_deadline_s
        self._one_at_a_time = threading.Lock()
        self._stack = ExitStack()
        self._process: Process | None = None
        self._built: tuple[Any, ...] | None = None

    def ask(
        self, model: Path, threads: int, do: str | None, images: NDArray[np.float32] | None = None, **values: Any
    ) -> tuple[dict[str, Any], bytes]:
        """Return the answer of the process with `model` built in it; with `do` None it is only built.

        Raises:
            InputError: There is no such file, or it does not take these images.
            ExportError: The runtime refuses it, ends or hangs.
            TargetUnavailable: The device cannot be reached, or loses its memory again and again.
        """
        check_file(model)
        with self._one_at_a_time, self.device.measuring():
            for _ in range(ATTEMPTS):
                try:
                    process = self._ready(model, threads)
                    if do is None:
                        return {}, b""
                    return process.ask(do, images=images, limit_s=ANSWER_SECONDS, **values)
                except Refused as refused:
                    kind = InputError if refused.code == "input" else ExportError
                    raise kind(f"{model}: {refusal_sentence(self.device, refused)}") from None
                except (ProcessEnded, ProcessHung) as ended:
                    self._leave()
                    raise ExportError(f"{model}: the runtime on {self.device.name} {ending_words(ended)}.") from None
                except SessionLost as lost:
                    self._leave()
                    reason = str(lost)
        raise TargetUnavailable(f"{self.device.name}: {reason}, {ATTEMPTS} times in one measurement.")

    def _ready(self, model: Path, threads: int) -> Process:
        if self._process is None:
            self._process = self._stack.enter_context(self.device.open(self._program))
        status = model.stat()
        wanted = (model.resolve(), status.st_mtime_ns, status.st_size, threads)
        if self._built != wanted:
            self._built = None
            self._process.ask("build", file=model, threads=threads, limit_s=self._load_deadline_s)
            self._built = wanted
        return self._process

    def _leave(self) -> None:
        self._stack.close()
        self._process = self._built = None


class ProgramRunner:
    """One file on a device, ready to run."""

    def __init__(self, bench: _Bench, model: Path, threads: int) -> None:
        self._bench, self._model, self._threads = bench, model, threads

    def infer(self, images: NDArray[np.float32]) -> Outputs:
        """Return all outputs for (n, ...) images."""
        size = max(1, PIECE_BYTES // max(1, images[:1].nbytes))
        pieces = [images[start : start + size] for start in range(0, len(images), size)] or [images]
        return joined([self._infer(piece) for piece in pieces])

    def profile(self, image: NDArray[np.float32], runs: int) -> list[OperatorTime]:
        """Return the time of each operator in execution order."""
        answer, _ = self._bench.ask(self._model, self._threads, "profile", image, runs=runs)
        with understood(self._bench.device.name):
            return [operator_time(*operator) for operator in answer["operators"]]

    def options(self) -> dict[str, Any]:
        """Return what the runtime was told when it opened the file; see Configured."""
        with understood(self._bench.device.name):
            return dict(self._bench.ask(self._model, self._threads, "options")[0]["options"])

    def _infer(self, images: NDArray[np.float32]) -> Outputs:
        answer, data = self._bench.ask(self._model, self._threads, "infer", images)
        with understood(self._bench.device.name):
            values, outputs, start = np.frombuffer(data, "<f4"), Outputs(), 0
            for name, shape in answer["outputs"]:
                if not isinstance(name, str) or any(type(size) is not int or size < 0 for size in shape):
                    raise ValueError(f"an output {name!r:.60} of shape {shape!r:.60}")
                end = start + math.prod(shape)
                outputs[name] = values[start:end].reshape(shape).astype(np.float32)
                start = end
            return outputs


def operator_time(name: Any, operator: Any, is_integer: Any, microseconds: Any) -> OperatorTime:
    """Return what a device says about one operator; raises TypeError or ValueError for what it cannot say."""
    time_us = float(microseconds)
    if not isinstance(name, str) or not isinstance(operator, str) or not 0 <= time_us < math.inf:
        raise ValueError(f"an operator {name!r:.60}, {operator!r:.60} of {microseconds!r:.60} us")
    return OperatorTime(name, operator, bool(is_integer), microseconds)


def joined(parts: Sequence[Outputs]) -> Outputs:
    """Return the outputs for all images from those for parts of them, in order."""
    return {name: stacked([part[name] for part in parts]) for name in parts[0]}


class ProgramTiming:
    """One timing process of a device. When it is lost it is opened again, because its finished rounds are safe here."""

    def __init__(
        self, device: Device, program: Path, files: Sequence[Path], threads: int, seed: int, load_deadline_s: float
    ) -> None:
        self._device, self._program, self._files, self._threads = device, program, files, threads
        self._seed, self._load_deadline_s = seed, load_deadline_s
        self._stack = ExitStack()
        self._process: Process | None = None
        self._seconds_per_round = 0.0
        self.states: tuple[DeviceState, DeviceState] | None = None
        self.restarts = 0
        self.place = device

    def open(self) -> None:
        """Start the process, load and warm up every file; raises as `ProgramBackend.open_timing` says."""
        names = ", ".join(str(file) for file in self._files)
        try:
            process = self._stack.enter_context(self._device.open(self._program))
            answer, _ = process.ask(
                "load", files=self._files, threads=self._threads, seed=self._seed, limit_s=self._load_deadline_s
            )
        except Refused as refused:
            index = refused.code.partition(" ")[2]
            with understood(self._device.name):
                name = self._files[int(index)] if index else names
            raise ExportError(f"{name}: {refusal_sentence(self._device, refused)}") from None
        except (ProcessEnded, ProcessHung) as ended:
            raise ExportError(
                f"the runtime on {self._device.name} {ending_words(ended)} while it loaded or warmed up {names}."
            ) from None
        except SessionLost as lost:
            raise TargetUnavailable(f"{self._device.name}: {lost}.") from None
        with understood(self._device.name):
            seconds = float(answer["seconds_per_round"])
            if not 0 <= seconds < worker.LONGEST_SECONDS:
                raise ValueError(f"{seconds} seconds a round")
        self._process = process
        self._seconds_per_round = seconds

    def rounds(self, count: int) -> NDArray[np.int64]:
        """Return (count, files, 2) nanoseconds, see TimingProcess."""
        if count == 0:
            return np.zeros((0, len(self._files), 2), np.int64)
        # A run on a crowded machine was seen to take 24 times as long as an undisturbed one.
        limit_s = 60.0 + 50.0 * count * self._seconds_per_round
        for _ in range(ATTEMPTS):
            try:
                if self._process is None:
                    self.open()
                assert self._process is not None
                answer, data = self._process.ask("rounds", count=count, limit_s=limit_s)
            except (ProcessEnded, ProcessHung, SessionLost) as lost:
                reason = ending_words(lost)
                self.close()
                self.restarts += 1
                continue
            except Refused as refused:
                raise ExportError(f"{self._files[0]}: {refusal_sentence(self._device, refused)}") from None
            with understood(self._device.name):
                self.states = DeviceState.of(answer["before"]), DeviceState.of(answer["after"])
                samples = np.frombuffer(data, "<i8").reshape(count, len(self._files), 2).astype(np.int64)
                if (samples < 0).any() or not samples[..., 0].all():
                    raise ValueError("a run that took no time")
                return samples
        names = ", ".join(str(file) for file in self._files)
        raise ExportError(
            f"{names}: the timing process on {self._device.name} was lost {ATTEMPTS} times; the last one {reason}."
        )

    def close(self) -> None:
        """End the process."""
        self._process = None
        self._stack.close()


def check_file(file: Path) -> None:
    """Raise InputError where there is no such file."""
    if not file.is_file():
        raise InputError(f"{file}: no such file; give an ONNX file.")


def refusal_sentence(device: Device, refused: Refused) -> str:
    """Return what follows the file's name when a device says no."""
    if refused.code == "input":
        return f"{refused}."
    return f"the runtime on {device.name} refuses it ({refused})."


def ending_words(ended: Exception) -> str:
    """Return a predicate for how a process was lost."""
    text = str(ended)
    if isinstance(ended, ProcessEnded):
        meanings = {
            "signal 9": "; mostly that means that memory ran out",
            "signal 4": "; this runtime uses instructions that the CPU lacks, install another version of it",
        }
        meaning = next((words for name, words in meanings.items() if re.match(rf"{name}\b", text)), "")
        return f"ended ({text}{meaning})"
    return text
