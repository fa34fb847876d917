"""In: ONNX files. Out: their outputs, operator times and timings from ONNX Runtime on this machine's CPU."""

from __future__ import annotations

import json
import platform
import queue
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hirelc_backends import timing_worker
from hirelc_deploy.errors import ExportError, InputError, TargetUnavailable
from hirelc_deploy.measure.backend import OperatorTime, Precision, Runner, TimingProcess
from hirelc_deploy.measure.machine import cpu_features

if TYPE_CHECKING:
    import onnxruntime

INTEGER_OPERATORS = frozenset(
    {"QGemm", "QAttention", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"}
)
"""Kernels with integer arithmetic, beside everything called QLinear*. MaxPool on integers is judged by its tensors."""


PROFILE_WARM_UP_RUNS = 3
LEAST_MICROSECONDS = 0.1


class OnnxRuntimeCpu:
    """ONNX Runtime's CPU provider in this Python environment."""

    name = "onnxruntime_cpu"

    def __init__(self, load_deadline_s: float = 300.0) -> None:
        self._load_deadline_s = load_deadline_s

    def availability(self) -> str | None:
        """Return None where ONNX Runtime can be imported."""
        try:
            import onnxruntime
        except ImportError as error:
            return f"ONNX Runtime cannot be imported ({error}); install it with `pip install onnxruntime`."
        if "CPUExecutionProvider" not in onnxruntime.get_available_providers():
            return "this ONNX Runtime was built without its CPU provider; install it with `pip install onnxruntime`."
        return None

    def precisions(self) -> tuple[Precision, ...]:
        """Return float and int8; int8 weights use 7 bits where the CPU adds 8-bit products in 16 bits."""
        bits, remark = _weight_bits(cpu_features(), platform.machine())
        return (
            Precision("float", "float32", "float32", 32),
            Precision("int8", "uint8", "int8", bits, remark),
        )

    def versions(self) -> dict[str, str]:
        """Return the versions of onnxruntime and numpy."""
        import onnxruntime

        return {"onnxruntime": onnxruntime.__version__, "numpy": np.__version__}

    def build(self, model: Path, threads: int = 1) -> Runner:
        """Load a file; raises ExportError with ONNX Runtime's own words when it refuses."""
        return OnnxRunner(model, threads)

    def open_timing(self, files: Sequence[Path], threads: int, seed: int) -> AbstractContextManager[TimingProcess]:
        """Start a process with fresh sessions of `files`; see timing_worker for what is inside its clocks.

        Raises:
            ExportError: The runtime refused a file or ended while it loaded or warmed up.
            TargetUnavailable: The process stopped answering.
        """
        return _timing_process(files, threads, seed, self._load_deadline_s)


def _weight_bits(features: frozenset[str] | None, architecture: str) -> tuple[int, str]:
    """Return (bits of the weights, remark). x86 without VNNI adds pairs of 8-bit products in 16 bits and saturates."""
    if architecture.lower() in ("aarch64", "arm64"):
        return 8, ""
    if features is None:
        return 7, "Whether this CPU has VNNI cannot be read here, so weights use 7 of 8 bits to be safe."
    if features & {"avx512_vnni", "avx_vnni"}:
        return 8, ""
    return 7, "This CPU has no VNNI: weights use 7 of 8 bits, or 8-bit products would saturate."


class OnnxRunner:
    """One ONNX file in a session of this process."""

    def __init__(self, model: Path, threads: int) -> None:
        self._model, self._threads = model, threads
        self._session = _open(model, threads)
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            raise ExportError(f"{model}: has {len(inputs)} inputs; a vision model with one input is needed.")
        self._shape = inputs[0].shape

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return (n, ...) first outputs of (n, ...) images; a file of a fixed batch runs as often as it takes."""
        if len(images) == 0:
            return self.infer(np.zeros((1, *images.shape[1:]), np.float32))[:0]
        batch = self._shape[0]
        if not isinstance(batch, int):
            return self._run(images)
        missing = -len(images) % batch
        padded = np.concatenate([images, np.repeat(images[-1:], missing, axis=0)]) if missing else images
        outputs = [self._run(padded[start : start + batch]) for start in range(0, len(padded), batch)]
        return np.concatenate(outputs)[: len(images)]

    def profile(self, image: NDArray[np.float32], runs: int) -> list[OperatorTime]:
        """Return the time of each operator, the mean of its fastest half of `runs` inferences, in execution order.

        What the profiler itself adds to each operator is taken off, down to LEAST_MICROSECONDS.
        """
        return [
            replace(one, microseconds=max(one.microseconds - _profiler_microseconds(), LEAST_MICROSECONDS))
            for one in _profile(self._model, self._threads, np.ascontiguousarray(image, np.float32), runs)
        ]

    def _run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        return _checked_run(self._model, self._session, np.ascontiguousarray(images, np.float32))


def _open(model: Path, threads: int, profile_prefix: str | None = None) -> onnxruntime.InferenceSession:
    if not model.is_file():
        raise InputError(f"{model}: no such file; give an ONNX file.")
    try:
        return timing_worker.open_session(str(model), threads, profile_prefix)
    except Exception as error:  # the runtime's own exception types share no narrower base
        raise ExportError(f"{model}: ONNX Runtime refuses it ({error}).") from None


def _checked_run(
    model: Path, session: onnxruntime.InferenceSession, images: NDArray[np.float32]
) -> NDArray[np.float32]:
    from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

    wanted = session.get_inputs()[0]
    try:
        output: NDArray[np.float32] = session.run([session.get_outputs()[0].name], {wanted.name: images})[0]
    except InvalidArgument:
        raise InputError(f"{model}: takes input of shape {wanted.shape}, found {list(images.shape)}.") from None
    return output


def _profile(model: Path, threads: int, image: NDArray[np.float32], runs: int) -> list[OperatorTime]:
    """Return what ONNX Runtime's profiler says, its own time included."""
    with tempfile.TemporaryDirectory() as folder:
        session = _open(model, threads, str(Path(folder) / "profile"))
        for _ in range(PROFILE_WARM_UP_RUNS + runs):
            _checked_run(model, session, image)
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    described: dict[tuple[str, str], tuple[str, bool]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            arguments = event["args"]
            key = (arguments["node_index"], event["name"].removesuffix("_kernel_time"))
            times[key].append(event["dur"])
            described[key] = (arguments["op_name"], _is_integer(arguments))
    return [
        OperatorTime(key[1], *described[key], _mean_of_fastest_half(values[PROFILE_WARM_UP_RUNS:]))
        for key, values in times.items()
    ]


@cache
def _profiler_microseconds() -> float:
    """Return what the profiler adds to each operator here; that it cuts off parts of a microsecond is in both.

    Told from operators that do nearly nothing: Neg of one number was profiled at 1.1 us and took 0.2 us. Without this a
    vision transformer of 330 operators was profiled at 3.0 ms and took 2.1 ms.
    """
    import onnx
    from onnx import TensorProto, helper

    length = 20
    nodes = [helper.make_node("Neg", [f"t{index}"], [f"t{index + 1}"]) for index in range(length)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("t0", f"t{length}")]
    graph = helper.make_graph(nodes, "negations", ends[:1], ends[1:])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "negations.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(path))
        # The first operator of a run pays for more than itself.
        measured = _profile(path, 1, np.zeros(1, np.float32), 50)[1:]
    return sum(one.microseconds for one in measured) / len(measured)


def _is_integer(arguments: dict[str, Any]) -> bool:
    operator: str = arguments["op_name"]
    if operator == "MaxPool":
        return all("float" not in kind for tensor in arguments["input_type_shape"] for kind in tensor)
    return operator.startswith("QLinear") or operator in INTEGER_OPERATORS


def _mean_of_fastest_half(microseconds: list[float]) -> float:
    # Other programs can only add time; the mean of half of the runs still resolves parts of a microsecond.
    fastest = sorted(microseconds)[: (len(microseconds) + 1) // 2]
    return sum(fastest) / len(fastest)


class _Worker:
    """The parent's end of one timing process. Every read has a deadline."""

    def __init__(self, files: Sequence[Path], threads: int, seed: int, load_deadline_s: float) -> None:
        self._files = files
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        command = [sys.executable, "-P", timing_worker.__file__, str(threads), str(seed), *map(str, files)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, encoding="utf-8"
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()
        self._seconds_per_round = 0.0
        self._load_deadline_s = load_deadline_s

    def load(self) -> None:
        """Wait until every file is loaded and warmed up."""
        try:
            ready = self._answer(self._load_deadline_s)
        except _Ended as ended:
            names = ", ".join(str(file) for file in self._files)
            raise ExportError(f"ONNX Runtime ended while it loaded or warmed up {names} ({ended}).") from None
        if "refused" in ready:
            raise ExportError(f"{ready['refused']}: ONNX Runtime refuses it ({ready['reason']}).")
        self._seconds_per_round = ready["seconds_per_round"]

    def rounds(self, count: int) -> NDArray[np.int64]:
        """Return (count, files, 2) nanoseconds, see TimingProcess."""
        if count == 0:
            return np.zeros((0, len(self._files), 2), np.int64)
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(f"{count}\n")
            self._process.stdin.flush()
            # A run on a crowded machine was seen to take 24 times as long as an undisturbed one.
            answer = self._answer(60.0 + 50.0 * count * self._seconds_per_round)
        except (_Ended, BrokenPipeError) as ended:
            raise TargetUnavailable(f"The timing process on this machine ended in mid-measurement ({ended}).") from None
        return np.array(answer["nanoseconds"], np.int64)

    def close(self) -> None:
        """End the process and wait for it."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            for line in answers:
                self._lines.put(line)
        self._lines.put(None)

    def _answer(self, deadline_s: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=deadline_s)
        except queue.Empty:
            self._process.kill()
            raise TargetUnavailable(
                f"The timing process on this machine did not answer within {deadline_s:.0f} s and was ended."
            ) from None
        if line is None:
            code = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().decode("utf-8", "replace").strip().splitlines()
            raise _Ended(f"exit status {code}" + (f", {said[-1]}" if said else ""))
        answer: dict[str, Any] = json.loads(line)
        return answer


class _Ended(Exception):  # noqa: N818 - never leaves this module
    """The process closed its pipe."""


@contextmanager
def _timing_process(files: Sequence[Path], threads: int, seed: int, load_deadline_s: float) -> Iterator[_Worker]:
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: no such file; give an ONNX file.")
    worker = _Worker(files, threads, seed, load_deadline_s)
    try:
        worker.load()
        yield worker
    finally:
        worker.close()
