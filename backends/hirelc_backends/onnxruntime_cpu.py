"""In: ONNX files. Out: their outputs and times from ONNX Runtime on a CPU, this machine's or a board's."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hirelc_backends import onnxruntime_program
from hirelc_deploy.errors import ExportError, InputError
from hirelc_deploy.measure.backend import OperatorTime, Outputs, Precision, Runner, TimingProcess
from hirelc_deploy.measure.device import LocalDevice
from hirelc_deploy.measure.machine import cpu_features
from hirelc_deploy.measure.program import ProgramBackend, check_file

WITH_VNNI = frozenset({"avx512_vnni", "avx_vnni"})
ARM = frozenset({"aarch64", "arm64"})


class OnnxRuntimeCpu:
    """ONNX Runtime's CPU provider in this Python environment; the same on a board by way of `program`."""

    name = "onnxruntime_cpu"
    program = Path(onnxruntime_program.__file__)

    def __init__(self, load_deadline_s: float = 300.0) -> None:
        self._timed = ProgramBackend(self.name, self.program, self.precisions_on, LocalDevice(ahead=2), load_deadline_s)

    def availability(self) -> str | None:
        """Return None where ONNX Runtime can be imported."""
        return onnxruntime_program.availability()

    def precisions(self) -> tuple[Precision, ...]:
        """Return float and int8; int8 weights use 7 bits where the CPU adds 8-bit products in 16 bits."""
        return self.precisions_on({"features": cpu_features(), "architecture": platform.machine()})

    def precisions_on(self, facts: Mapping[str, Any]) -> tuple[Precision, ...]:
        """Return float and int8 for a CPU that has these `features` and this `architecture`."""
        features = facts["features"]
        bits, remark = weight_bits(None if features is None else frozenset(features), facts["architecture"])
        return (
            Precision("float", "float32", "float32", 32),
            Precision("int8", "uint8", "int8", bits, remark),
        )

    def versions(self) -> dict[str, str]:
        """Return the versions of onnxruntime and numpy."""
        return onnxruntime_program.versions()

    def build(self, model: Path, threads: int = 1) -> Runner:
        """Load a file; raises ExportError with ONNX Runtime's own words when it refuses."""
        return OnnxRunner(model, threads)

    def open_timing(self, files: Sequence[Path], threads: int, seed: int) -> AbstractContextManager[TimingProcess]:
        """Start a process with fresh sessions of `files`; raises as ProgramBackend.open_timing does."""
        return self._timed.open_timing(files, threads, seed)


def weight_bits(features: frozenset[str] | None, architecture: str) -> tuple[int, str]:
    """Return (bits of the weights, remark). x86 without VNNI adds pairs of 8-bit products in 16 bits and saturates."""
    if architecture.lower() in ARM:
        return 8, ""
    if features is None:
        return 7, "Whether this CPU has VNNI cannot be read here, so weights use 7 of 8 bits to be safe."
    if features & WITH_VNNI:
        return 8, ""
    return 7, "This CPU has no VNNI: weights use 7 of 8 bits, or 8-bit products would saturate."


class OnnxRunner:
    """One ONNX file in a session of this process."""

    def __init__(self, model: Path, threads: int) -> None:
        check_file(model)
        self._model = model
        try:
            self._session = onnxruntime_program.open_session(str(model), threads)
        except Exception as error:  # the runtime's own exception types share no narrower base
            raise ExportError(f"{model}: ONNX Runtime refuses it ({error}).") from None

    def infer(self, images: NDArray[np.float32]) -> Outputs:
        """Return all outputs for (n, ...) images; a file of a fixed batch runs as often as it takes."""
        try:
            return self._session.infer(images)
        except ValueError as error:
            raise InputError(f"{self._model}: {error}.") from None

    def profile(self, image: NDArray[np.float32], runs: int) -> list[OperatorTime]:
        """Return the time of each operator, the mean of its fastest half of `runs` inferences, in execution order."""
        return [OperatorTime(*operator) for operator in self._session.profile(image, runs)]
