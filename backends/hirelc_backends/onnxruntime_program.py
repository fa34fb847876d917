"""In: ONNX files. Out: their outputs, operator times and single timed runs, from ONNX Runtime's CPU provider.

This is the part of the ONNX Runtime backends that runs on the device, so it is one file for Python 3.8 that needs numpy
and onnxruntime, and nothing else. measure/worker.py loads it there; on this machine the backend also imports it.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime
    from numpy.typing import NDArray

INTEGER_OPERATORS = frozenset(
    {"QGemm", "QAttention", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"}
)
"""Kernels with integer arithmetic, beside everything called QLinear*. MaxPool on integers is judged by its tensors."""

PROFILE_WARM_UP_RUNS = 3
LEAST_MICROSECONDS = 0.1


def availability() -> str | None:
    """Return None where ONNX Runtime can be imported, else the reason and the remedy."""
    try:
        import onnxruntime
    except ImportError as error:
        return f"ONNX Runtime cannot be imported ({error}); install it with `pip install onnxruntime`."
    if "CPUExecutionProvider" not in onnxruntime.get_available_providers():
        return "this ONNX Runtime was built without its CPU provider; install it with `pip install onnxruntime`."
    return None


def versions() -> dict[str, str]:
    """Return the versions of onnxruntime and numpy."""
    import numpy as np
    import onnxruntime

    return {"onnxruntime": onnxruntime.__version__, "numpy": np.__version__}


def facts() -> dict[str, Any]:
    """Return what the offered precisions depend on beside the CPU: nothing."""
    return {}


def open_session(path: str, threads: int, cache: str | None = None) -> Session:
    """Load a file; raises whatever ONNX Runtime raises, and ValueError for a file that has not one input."""
    return Session(path, threads)


def open_onnx(path: str, threads: int, profile_prefix: str | None = None) -> onnxruntime.InferenceSession:
    """Return a quiet CPU session that leaves the cores alone while it is idle."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    # A spinning pool of one session would eat the time of the other session in the same round.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile_prefix
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class Session:
    """One ONNX file in a session of this process."""

    def __init__(self, path: str, threads: int) -> None:
        self._path, self._threads = path, threads
        self._session = open_onnx(path, threads)
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            raise ValueError(f"has {len(inputs)} inputs; a vision model with one input is needed")
        self._input = inputs[0]
        self._outputs = [output.name for output in self._session.get_outputs()]
        # With one thread the calling thread does all the work; its own clock leaves out other processes and threads.
        self._cpu_clock = time.thread_time_ns if threads == 1 else time.process_time_ns
        self._feed: dict[str, Any] = {}

    def infer(self, images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Return all outputs for (n, ...) images; a file of a fixed batch runs as often as it takes."""
        import numpy as np

        if len(images) == 0:
            one = self.infer(np.zeros((1, *images.shape[1:]), np.float32))
            return {name: output[:0] for name, output in one.items()}
        batch = self._input.shape[0]
        if not isinstance(batch, int):
            return self._run(self._session, images)
        missing = -len(images) % batch
        padded = np.concatenate([images, np.repeat(images[-1:], missing, axis=0)]) if missing else images
        pieces = [padded[start : start + batch] for start in range(0, len(padded), batch)]
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // self._threads)) as every_core:
            outputs = list(every_core.map(lambda piece: self._run(self._session, piece), pieces))
        return {name: stacked([part[name] for part in outputs])[: len(images)] for name in self._outputs}

    def profile(self, image: NDArray[np.float32], runs: int) -> list[tuple[str, str, bool, float]]:
        """Return (name, operator, is integer, microseconds) of each operator in execution order.

        The mean of the fastest half of `runs` inferences; what the profiler itself adds to each operator is taken off,
        down to LEAST_MICROSECONDS.
        """
        profiled = self._profiled(self._path, self._threads, image, runs)
        own = profiler_microseconds()
        return [
            (name, operator, integer, max(microseconds - own, LEAST_MICROSECONDS))
            for name, operator, integer, microseconds in profiled
        ]

    def timed_run(self) -> tuple[int, int]:
        """Return nanoseconds of one inference of batch 1: wall time and CPU time."""
        if not self._feed:
            self._feed = random_input(self._session)
        cpu, wall = self._cpu_clock(), time.perf_counter_ns()
        self._session.run(None, self._feed)
        return time.perf_counter_ns() - wall, self._cpu_clock() - cpu

    def _profiled(
        self, path: str, threads: int, image: NDArray[np.float32], runs: int
    ) -> list[tuple[str, str, bool, float]]:
        with tempfile.TemporaryDirectory() as folder:
            session = open_onnx(path, threads, os.path.join(folder, "profile"))
            for _ in range(PROFILE_WARM_UP_RUNS + runs):
                self._run(session, image)
            return read_profile(session.end_profiling())

    def _run(self, session: onnxruntime.InferenceSession, images: NDArray[np.float32]) -> dict[str, Any]:
        import numpy as np
        from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

        try:
            feed = {self._input.name: np.ascontiguousarray(images, np.float32)}
            outputs = session.run(self._outputs, feed)
        except InvalidArgument:
            raise ValueError(f"takes input of shape {self._input.shape}, found {list(images.shape)}") from None
        return {name: np.asarray(output, np.float32) for name, output in zip(self._outputs, outputs)}  # noqa: B905


def stacked(parts: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return the answers to all images; where their sizes depend on the image, as of a loop, zeros fill the shorter."""
    import numpy as np

    size = np.max([part.shape[1:] for part in parts], axis=0)
    missing = [[(0, 0)] + [(0, int(n)) for n in size - np.array(part.shape[1:], int)] for part in parts]
    return np.concatenate([np.pad(part, pads) if np.any(pads) else part for part, pads in zip(parts, missing)])  # noqa: B905


def random_input(session: onnxruntime.InferenceSession, seed: int = 0) -> dict[str, Any]:
    """Return one input of batch 1 for `session`: standard normal, or all values of an integer type alike."""
    import numpy as np

    types = {
        "tensor(float)": np.float32,
        "tensor(float16)": np.float16,
        "tensor(uint8)": np.uint8,
        "tensor(int8)": np.int8,
    }
    rng = np.random.default_rng(seed)
    feed: dict[str, Any] = {}
    for wanted in session.get_inputs():
        shape = [size if isinstance(size, int) else 1 for size in wanted.shape]
        dtype = np.dtype(types[wanted.type])
        if np.issubdtype(dtype, np.integer):
            feed[wanted.name] = rng.integers(0, 128, shape).astype(dtype)
        else:
            feed[wanted.name] = rng.standard_normal(shape).astype(dtype)
    return feed


def read_profile(path: str, warm_up: int = PROFILE_WARM_UP_RUNS) -> list[tuple[str, str, bool, float]]:
    """Return what a profile file says of each operator, the profiler's own time included."""
    with open(path, encoding="utf-8") as file:
        events = json.load(file)
    times: dict[tuple[str, str], list[float]] = {}
    described: dict[tuple[str, str], tuple[str, bool]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            arguments = event["args"]
            key = (arguments["node_index"], event["name"][: -len("_kernel_time")])
            times.setdefault(key, []).append(event["dur"])
            described[key] = (arguments["op_name"], is_integer(arguments))
    return [(key[1], *described[key], mean_of_fastest_half(values[warm_up:])) for key, values in times.items()]


_profiler_microseconds: list[float] = []


def profiler_microseconds() -> float:
    """Return what the profiler adds to each operator here; that it cuts off parts of a microsecond is in both.

    Told from operators that do nearly nothing: Neg of one number was profiled at 1.1 us and took 0.2 us. Without this a
    vision transformer of 330 operators was profiled at 3.0 ms and took 2.1 ms.
    """
    import numpy as np

    if not _profiler_microseconds:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "negations.onnx")
            with open(path, "wb") as file:
                file.write(negations(20))
            session = open_onnx(path, 1, os.path.join(folder, "profile"))
            for _ in range(PROFILE_WARM_UP_RUNS + 50):
                session.run(None, {"t0": np.zeros(1, np.float32)})
            # The first operator of a run pays for more than itself.
            measured = read_profile(session.end_profiling())[1:]
        _profiler_microseconds.append(sum(one[3] for one in measured) / len(measured))
    return _profiler_microseconds[0]


def negations(length: int) -> bytes:
    """Return an ONNX model of `length` Neg operators on one number; written by hand, because a board has no onnx."""

    def field(number: int, value: bytes) -> bytes:
        # Wire type 2 of protocol buffers: bytes, text or a message; all of ours are shorter than 2 ** 14.
        size = struct.pack("<B", len(value)) if len(value) < 128 else bytes([len(value) & 127 | 128, len(value) >> 7])
        return bytes([number << 3 | 2]) + size + value

    def tensor(name: str) -> bytes:
        shape = field(1, b"\x08\x01")  # one dimension, of one value
        return field(1, name.encode()) + field(2, field(1, b"\x08\x01" + field(2, shape)))  # of float32

    nodes = [
        field(1, field(1, f"t{index}".encode()) + field(2, f"t{index + 1}".encode()) + field(4, b"Neg"))
        for index in range(length)
    ]
    graph = b"".join(nodes) + field(2, b"negations") + field(11, tensor("t0")) + field(12, tensor(f"t{length}"))
    return b"\x08\x08" + field(7, graph) + field(8, b"\x10\x0d")  # IR version 8, operator set 13


def is_integer(arguments: dict[str, Any]) -> bool:
    """Return whether a profiled operator computed on integers."""
    operator: str = arguments["op_name"]
    if operator == "MaxPool":
        return all("float" not in kind for tensor in arguments["input_type_shape"] for kind in tensor)
    return operator.startswith("QLinear") or operator in INTEGER_OPERATORS


def mean_of_fastest_half(microseconds: list[float]) -> float:
    """Other programs can only add time; the mean of half of the runs still resolves parts of a microsecond."""
    fastest = sorted(microseconds)[: (len(microseconds) + 1) // 2]
    return sum(fastest) / len(fastest)
