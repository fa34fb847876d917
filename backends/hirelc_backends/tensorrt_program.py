"""In: ONNX files in TensorRT's form. Out: engines built on this GPU, their answers, layers and times.

Runs where the GPU is: Python 3.8, numpy, the driver's libcuda, and `tensorrt` (10.3 to 11) or `tensorrt_rtx`, or else
an ONNX Runtime with one of their providers. CUDA is called through the driver library, because every machine that can
run an engine has it, whatever its CUDA version; its streams, events and graphs work on TensorRT's own context.

It is also the `engine.py` of `hirelc-deploy export --format tensorrt`, a program with the commands that `--help` lists.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy as np
    from numpy.typing import NDArray

MODULES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
"""In order of preference; the last is what TensorRT-RTX's wheel on PyPI is called when its front end is missing."""
OLDEST = (10, 3)
PROVIDERS = ("NvTensorRTRTXExecutionProvider", "TensorrtExecutionProvider")
LIBRARIES = ("libcuda.so.1", "/usr/lib/aarch64-linux-gnu/nvidia/libcuda.so.1", "nvcuda.dll")
"""The driver: where the loader finds it, on a Jetson whose loader does not, and on Windows."""
DEVICE_ATTRIBUTES = {"multiprocessors": 16, "l2_bytes": 38, "integrated": 18}
"""CUdevice_attribute numbers of cuda.h."""
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76
SPIN, NON_BLOCKING, THREAD_LOCAL = 1, 1, 1
"""CU_CTX_SCHED_SPIN: waking up is not part of a latency. CU_STREAM_NON_BLOCKING: TensorRT would synchronise the default
stream. CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads of this process may go on."""
ENGINE, RECORD, INPUTS = "model.engine", "engine.json", "inputs.npz"
SAMPLE_TOLERANCE = 0.05
"""Of the range of an image's outputs, as in bundle.py: devices round a few integers differently."""
WARM_UP_RUNS = 3
ROUNDS = 100
"""Of runs of each form of a model in turn, by which the fastest is chosen."""
BENCH_SECONDS, BENCH_RUNS, BENCH_WARM_UP_SECONDS = 3.0, 50, 0.5
"""At least, as trtexec does: its 3 s, but more than its 10 runs and 200 ms of warming up."""


class Unusable(Exception):  # noqa: N818 - said as one says it
    """Something cannot be built or run; the text says what and what to do."""


# The runtime


def load_tensorrt(find: Callable[[str], Any] = importlib.import_module) -> Any:
    """Return the first TensorRT module that can be imported and is new enough; raises Unusable with the reasons."""
    reasons = []
    for name in MODULES:
        try:
            module = find(name)
        except (ImportError, OSError) as error:
            reasons.append(f"{name}: {error}")
            continue
        version = module.__version__
        if is_rtx(module) or tuple(int(part) for part in version.split(".")[:2]) >= OLDEST:
            return module
        reasons.append(f"{name}: version {version} is older than {OLDEST[0]}.{OLDEST[1]}")
    raise Unusable(f"no TensorRT can be imported ({'; '.join(reasons)})")


def is_rtx(trt: Any) -> bool:
    """Return whether a module is TensorRT-RTX, which compiles for a named chip and has no timing cache."""
    return hasattr(trt, "ComputeCapability")


def provider() -> str | None:
    """Return the provider by which an ONNX Runtime here reaches TensorRT, if there is one."""
    try:
        import onnxruntime
    except ImportError:
        return None
    return next((name for name in PROVIDERS if name in onnxruntime.get_available_providers()), None)


def availability() -> str | None:
    """Return None where a GPU and something that runs engines are, else the reason and the remedy in one sentence."""
    try:
        Cuda()
    except Unusable as error:
        return f"{error}; a TensorRT engine is built and run on the machine that has the GPU."
    try:
        load_tensorrt()
    except Unusable as error:
        if provider() is None:
            return f"{error}; install it with `pip install tensorrt` (on a Jetson it comes with JetPack)."
    return None


def versions() -> dict[str, str]:
    """Return what timings depend on: the runtime's version, the driver's, and the GPU."""
    import numpy

    gpu = Cuda().describe()
    try:
        trt = load_tensorrt()
        runtime = {trt.__name__: trt.__version__}
    except Unusable:
        import onnxruntime

        runtime = {"onnxruntime": onnxruntime.__version__, "provider": provider() or ""}
    return dict(runtime, gpu=gpu["gpu"], cuda_driver=gpu["cuda_driver"], numpy=numpy.__version__)


def facts() -> dict[str, Any]:
    """Return what is known about the GPU; `precisions` of the backend follows from `compute_capability`."""
    known = Cuda().describe()
    mode = _said("nvpmodel", "-q")
    return dict(known, power_mode=mode) if mode else known


def _said(*command: str) -> str | None:
    """Return what a program prints, in one line, or None where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return " ".join(done.stdout.split()) if done.returncode == 0 else None


# CUDA


class Cuda:
    """The driver's functions that are needed, in the primary context that TensorRT uses too."""

    def __init__(self, library: Any = None, device: int = 0) -> None:
        self._library = _driver() if library is None else library
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        wide: dict[str, Sequence[Any]] = {  # those whose arguments are wider than the int that ctypes assumes
            "cuMemAlloc_v2": (ctypes.POINTER(ctypes.c_uint64), size),
            "cuMemHostAlloc": (ctypes.POINTER(pointer), size, ctypes.c_uint),
            "cuMemFree_v2": (ctypes.c_uint64,),
            "cuMemFreeHost": (pointer,),
            "cuMemcpyHtoDAsync_v2": (ctypes.c_uint64, pointer, size, pointer),
            "cuMemcpyDtoHAsync_v2": (pointer, ctypes.c_uint64, size, pointer),
            "cuGraphInstantiateWithFlags": (ctypes.POINTER(pointer), pointer, ctypes.c_ulonglong),
        }
        for name, types in wide.items():
            getattr(self._library, name).argtypes = types
        self.call("cuInit", 0)
        count = ctypes.c_int()
        self.call("cuDeviceGetCount", ctypes.byref(count))
        if count.value <= device:
            raise Unusable(f"the NVIDIA driver sees {count.value} GPUs, number {device} was asked for")
        self._device = ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(self._device), device)
        self._library.cuDevicePrimaryCtxSetFlags_v2(self._device, SPIN)  # refused where the context is in use: harmless
        context = pointer()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self.call("cuCtxSetCurrent", context)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function; raises Unusable with CUDA's own name for what went wrong."""
        status = getattr(self._library, name)(*arguments)
        if status != 0:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(status, ctypes.byref(text))
            raise Unusable(f"CUDA: {name} says {text.value.decode() if text.value else status}")

    def describe(self) -> dict[str, Any]:
        """Return name, compute capability, multiprocessors, L2 bytes, memory and driver of the GPU."""
        name, value, size = ctypes.create_string_buffer(256), ctypes.c_int(), ctypes.c_size_t()
        self.call("cuDeviceGetName", name, 256, self._device)
        self.call("cuDriverGetVersion", ctypes.byref(value))
        known: dict[str, Any] = {
            "gpu": name.value.decode(),
            "cuda_driver": f"{value.value // 1000}.{value.value % 1000 // 10}",
        }
        self.call("cuDeviceTotalMem_v2", ctypes.byref(size), self._device)
        known["memory_bytes"] = size.value

        def attribute(number: int) -> int:
            self.call("cuDeviceGetAttribute", ctypes.byref(value), number, self._device)
            return value.value

        known["compute_capability"] = f"{attribute(CAPABILITY_MAJOR)}.{attribute(CAPABILITY_MINOR)}"
        return dict(known, **{key: attribute(number) for key, number in DEVICE_ATTRIBUTES.items()})

    def memory(self, size: int) -> int:
        """Return the address of `size` bytes on the GPU."""
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), size)
        return address.value

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Return an array in page-locked host memory, from which copies need no detour."""
        import numpy as np

        pointer, kind = ctypes.c_void_p(), np.dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        self.call("cuMemHostAlloc", ctypes.byref(pointer), size, 0)
        assert pointer.value is not None
        raw = (ctypes.c_ubyte * size).from_address(pointer.value)
        return np.frombuffer(raw, kind).reshape(shape)

    def release(self, address: int, array: NDArray[Any]) -> None:
        """Free what `memory` and `pinned` gave."""
        self.call("cuMemFree_v2", address)
        self.call("cuMemFreeHost", array.ctypes.data)

    def stream(self) -> ctypes.c_void_p:
        """Return a new stream."""
        made = ctypes.c_void_p()
        self.call("cuStreamCreate", ctypes.byref(made), NON_BLOCKING)
        return made

    def event(self) -> ctypes.c_void_p:
        """Return a new event that keeps its time."""
        made = ctypes.c_void_p()
        self.call("cuEventCreate", ctypes.byref(made), 0)
        return made

    def milliseconds(self, start: ctypes.c_void_p, end: ctypes.c_void_p) -> float:
        """Return the GPU's time between two events, to about half a microsecond."""
        elapsed = ctypes.c_float()
        self.call("cuEventElapsedTime", ctypes.byref(elapsed), start, end)
        return elapsed.value


def _driver() -> Any:
    for name in LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise Unusable(f"no NVIDIA driver is here ({LIBRARIES[0]} cannot be loaded)")


# Building


def build_plan(
    trt: Any, model: bytes, *, timing_cache: str | None = None, chip: str | None = None, tf32: bool = False
) -> tuple[bytes, str]:
    """Return (serialized engine, `strong` or `weak` typing) of an ONNX file's bytes.

    Args:
        timing_cache: A file that remembers how long kernels took here; a second build takes a fraction of the time.
        chip: For TensorRT-RTX, such as `SM86`, which it compiles without a GPU; the one that is here if not given.
        tf32: Let float32 products be rounded to 10 bits, as TensorRT does if not told otherwise. FP16 is not touched.

    Raises:
        Unusable: with TensorRT's own words.
    """
    log = _log(trt)
    plan = _serialized(trt, log, model, timing_cache, chip, tf32, strong=True)
    if plan is not None:
        return plan, "strong"
    reason = log.last()
    if hasattr(trt.BuilderFlag, "INT8"):  # 10.x: the compiler may place types by itself, as its first releases prefer
        plan = _serialized(trt, log, model, timing_cache, chip, tf32, strong=False)
        if plan is not None:
            return plan, "weak"
    raise Unusable(f"{trt.__name__} {trt.__version__} refuses it ({reason})")


def _serialized(
    trt: Any, log: Any, model: bytes, timing_cache: str | None, chip: str | None, tf32: bool, *, strong: bool
) -> bytes | None:
    builder = trt.Builder(log)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if strong else 0
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model):
        log.say("; ".join(parser.get_error(index).desc() for index in range(parser.num_errors)))
        return None
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if not tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if not strong:
        config.set_flag(trt.BuilderFlag.FP16)
        config.set_flag(trt.BuilderFlag.INT8)
    source = network.get_input(0)
    shape = tuple(source.shape)
    if min(shape) < 0:  # a file of any batch is built for one image at a time
        fixed = tuple(max(size, 1) for size in shape)
        profile = builder.create_optimization_profile()
        profile.set_shape(source.name, fixed, fixed, fixed)
        config.add_optimization_profile(profile)
    cache = None
    if is_rtx(trt):
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, chip or "CURRENT"), 0)
    elif timing_cache is not None:
        cache = config.create_timing_cache(_read(timing_cache))
        config.set_timing_cache(cache, ignore_mismatch=False)
    plan = builder.build_serialized_network(network, config)
    if cache is not None and plan is not None and timing_cache is not None:
        _write(timing_cache, bytes(config.get_timing_cache().serialize()))
    return None if plan is None else bytes(plan)


def _log(trt: Any) -> Any:
    """Return a logger that keeps errors instead of printing them."""
    worst = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    class Log(trt.ILogger):  # type: ignore[misc]  # the module is known at run time only
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in worst:
                self.errors.append(message)

        def say(self, message: str) -> None:
            self.errors.append(message)

        def last(self) -> str:
            return " ".join((self.errors or ["it does not say why"])[-1].split())[:400]

    return Log()


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return b""


def _write(path: str, content: bytes) -> None:
    """Write a file that appears whole or not at all."""
    partial = f"{path}.{os.getpid()}.part"
    with open(partial, "wb") as file:
        file.write(content)
    os.replace(partial, path)


# Running


class Engine:
    """An engine with its buffers, its stream and the graph of one inference."""

    def __init__(self, trt: Any, plan: bytes, cuda: Any = None) -> None:
        self._trt, self.cuda, log = trt, Cuda() if cuda is None else cuda, _log(trt)
        self._runtime = trt.Runtime(log)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise Unusable(f"{trt.__name__} {trt.__version__} does not load this engine on this GPU ({log.last()})")
        self._context = self._engine.create_execution_context()
        self._stream = self.cuda.stream()
        self._events = self.cuda.event(), self.cuda.event()
        self.inputs, self.outputs = self._buffers(trt.TensorIOMode.INPUT), self._buffers(trt.TensorIOMode.OUTPUT)
        named = map(self._engine.get_tensor_name, range(self._engine.num_io_tensors))
        self.names = [name for name in named if self._engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]
        if len(self.inputs) != 1:
            raise Unusable(f"has {len(self.inputs)} inputs; a vision model with one input is needed")
        self.graph: ctypes.c_void_p | None = None
        self._fill(0)

    def _buffers(self, mode: Any) -> list[tuple[int, NDArray[Any]]]:
        """Return (GPU address, page-locked array) of each input or output, and tell the context the addresses."""
        made = []
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            if self._engine.get_tensor_mode(name) != mode:
                continue
            shape = tuple(self._engine.get_tensor_shape(name))
            if mode == self._trt.TensorIOMode.INPUT and min(shape) < 0:
                shape = tuple(max(size, 1) for size in shape)
                self._context.set_input_shape(name, shape)
            shape = tuple(self._context.get_tensor_shape(name))
            array = self.cuda.pinned(shape, self._trt.nptype(self._engine.get_tensor_dtype(name)))
            made.append((self.cuda.memory(array.nbytes), array))
            self._context.set_tensor_address(name, made[-1][0])
        return made

    def _fill(self, seed: int) -> None:
        """Put random numbers into the input: zeros take less power, and with it less time."""
        import numpy as np

        for address, array in self.inputs:
            array[...] = np.random.default_rng(seed).standard_normal(array.shape).astype(array.dtype)
            self._copy_in(address, array)
        self.synchronise()

    def _copy_in(self, address: int, array: NDArray[Any]) -> None:
        self.cuda.call("cuMemcpyHtoDAsync_v2", address, array.ctypes.data, array.nbytes, self._stream)

    def _copy_out(self, address: int, array: NDArray[Any]) -> None:
        self.cuda.call("cuMemcpyDtoHAsync_v2", array.ctypes.data, address, array.nbytes, self._stream)

    def synchronise(self) -> None:
        """Wait until the GPU has done everything that was asked."""
        self.cuda.call("cuStreamSynchronize", self._stream)

    def enqueue(self) -> None:
        """Ask for one inference, kernel by kernel."""
        if not self._context.execute_async_v3(self._stream.value):
            raise Unusable("the engine could not be started; it may need more GPU memory than is free")

    def capture(self) -> bool:
        """Record one inference as a CUDA graph, which is then launched as one; return whether it could be recorded."""
        self.enqueue()  # the first run allocates, which may not be recorded
        self.synchronise()
        graph, made = ctypes.c_void_p(), ctypes.c_void_p()
        self.cuda.call("cuStreamBeginCapture_v2", self._stream, THREAD_LOCAL)
        started = self._context.execute_async_v3(self._stream.value)
        try:
            self.cuda.call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        except Unusable:  # something in this engine cannot be recorded; kernel by kernel it still runs
            return False
        if not started or not graph.value:
            return False
        self.cuda.call("cuGraphInstantiateWithFlags", ctypes.byref(made), graph, 0)
        self.graph = made
        return True

    def launch(self) -> None:
        """Ask for one inference, as a graph where one was captured."""
        if self.graph is None:
            self.enqueue()
        else:
            self.cuda.call("cuGraphLaunch", self.graph, self._stream)

    def run(self, images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Return the outputs for exactly as many images as the engine was built for."""
        import numpy as np

        address, source = self.inputs[0]
        source[...] = images
        self._copy_in(address, source)
        self.launch()
        for output, result in self.outputs:
            self._copy_out(output, result)
        self.synchronise()
        return {name: np.array(result, np.float32) for name, (_, result) in zip(self.names, self.outputs)}  # noqa: B905

    def timed(self, *, copies: bool = True) -> tuple[int, int, int]:
        """Return nanoseconds of one inference: wall time, GPU time without copies, and the host's part of starting it.

        Wall time is from before the input's copy to the GPU (with `copies`) until the output is back.
        """
        start, end = self._events
        begun = time.perf_counter_ns()
        if copies:
            self._copy_in(*self.inputs[0])
        self.cuda.call("cuEventRecord", start, self._stream)
        asked = time.perf_counter_ns()
        self.launch()
        started = time.perf_counter_ns()
        self.cuda.call("cuEventRecord", end, self._stream)
        if copies:
            for output in self.outputs:
                self._copy_out(*output)
        self.synchronise()
        done = time.perf_counter_ns()
        return done - begun, round(self.cuda.milliseconds(start, end) * 1e6), started - asked

    def layers(self) -> list[dict[str, Any]]:
        """Return what the engine consists of, as `read_layers` puts it."""
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        return read_layers(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def layer_times(self, runs: int) -> dict[str, list[float]]:
        """Return layer name to its milliseconds in each run; the profiler slows them, and no graph is used."""
        trt: Any = self._trt
        times: dict[str, list[float]] = {}

        class Profiler(trt.IProfiler):  # type: ignore[misc]  # the module is known at run time only
            def __init__(self) -> None:
                trt.IProfiler.__init__(self)

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                times.setdefault(layer_name, []).append(ms)

        profiler = Profiler()
        self._context.profiler = profiler
        self._context.enqueue_emits_profile = False
        for _ in range(runs):
            self.enqueue()
            self.synchronise()
            self._context.report_to_profiler()
        return times

    def close(self) -> None:
        """Free the buffers."""
        for address, array in (*self.inputs, *self.outputs):
            self.cuda.release(address, array)
        self.inputs, self.outputs = [], []


ARITHMETIC = ("conv", "gemm", "matmul", "matrixmultiply", "matrix_multiply", "fullyconnected", "mha", "pool", "corrltn")
"""Parts of layer types and kernel names that multiply and add; what only moves or converts numbers has none of them."""


def read_layers(text: str) -> list[dict[str, Any]]:
    """Return `name, type, inputs, outputs, is_integer` of each layer of the engine inspector's JSON.

    Releases differ: 10 has `Format/Datatype` in one text, 11 has two keys; without detailed verbosity a layer is just
    its name. `inputs` and `outputs` are lists of data types as the inspector names them.
    """
    found = []
    for layer in json.loads(text).get("Layers", []):
        if isinstance(layer, str):
            found.append({"name": layer, "type": "", "inputs": [], "outputs": [], "is_integer": False})
            continue
        name, kind = str(layer.get("Name", "")), str(layer.get("LayerType", ""))
        inputs, outputs = (_data_types(layer.get(side, [])) for side in ("Inputs", "Outputs"))
        integer = any("int8" in one.lower() for one in inputs) and _is_arithmetic(f"{kind} {name}")
        found.append({"name": name, "type": kind, "inputs": inputs, "outputs": outputs, "is_integer": integer})
    return found


def _is_arithmetic(text: str) -> bool:
    lower = text.lower()
    return any(part in lower for part in ARITHMETIC)


def _data_types(tensors: Iterable[Any]) -> list[str]:
    return [
        str(tensor.get("DataType") or tensor.get("Datatype") or tensor.get("Format/Datatype", ""))
        for tensor in tensors
        if isinstance(tensor, dict)
    ]


# What the tool's worker asks for


def open_session(path: str, threads: int, cache: str) -> Session | ProviderSession:
    """Return a session of an ONNX file; `threads` says nothing to a GPU. Raises Unusable to refuse the file."""
    with open(path, "rb") as file:
        model = file.read()
    try:
        trt = load_tensorrt()
    except Unusable:
        if provider() is None:
            raise
        return ProviderSession(path, cache, provider() or "")
    return Session(trt, model, cache)


class Session:
    """One ONNX file as an engine of this GPU; engines are kept in `cache` by file, runtime and GPU."""

    def __init__(self, trt: Any, model: bytes, cache: str, cuda: Any = None) -> None:
        self._cuda = Cuda() if cuda is None else cuda
        gpu = self._cuda.describe()["gpu"]
        key = hashlib.sha256(model + f"{trt.__name__} {trt.__version__} {gpu}".encode()).hexdigest()[:24]
        path = os.path.join(cache, f"{key}.engine")
        plan = _read(path)
        if not plan:
            plan, _ = build_plan(trt, model, timing_cache=os.path.join(cache, "timing.cache"))
            _write(path, plan)
        self._engine = Engine(trt, plan, self._cuda)
        self._engine.capture()

    def infer(self, images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Return all outputs for (n, ...) images; the engine runs as often as its batch takes."""
        import numpy as np

        wanted = self._engine.inputs[0][1].shape
        if images.shape[1:] != wanted[1:]:
            raise ValueError(f"takes input of shape {list(wanted)}, found {list(images.shape)}")
        batch = wanted[0]
        if len(images) == 0:
            return {name: output[:0] for name, output in self.infer(np.zeros(wanted, np.float32)).items()}
        missing = -len(images) % batch
        padded = np.concatenate([images, np.repeat(images[-1:], missing, axis=0)]) if missing else images
        parts = [self._engine.run(padded[start : start + batch]) for start in range(0, len(padded), batch)]
        return {name: np.concatenate([part[name] for part in parts])[: len(images)] for name in self._engine.names}

    def profile(self, image: NDArray[np.float32], runs: int) -> list[tuple[str, str, bool, float]]:
        """Return (name, operator, is integer, microseconds) of each layer, the mean of its fastest half of the runs."""
        self.infer(image)
        rows = profile(self._engine, runs)
        return [(row["name"], row["type"] or "layer", row["is_integer"], row["microseconds"]) for row in rows]

    def timed_run(self) -> tuple[int, int]:
        """Return nanoseconds of one inference without copies: wall time until it is done, and the GPU's own time.

        What copies cost is the same for every candidate of a search; `bench` tells it.
        """
        wall, gpu, _ = self._engine.timed(copies=False)
        return wall, gpu


class ProviderSession:
    """One ONNX file in ONNX Runtime, which builds the engine by itself. It tells neither GPU time nor layers."""

    def __init__(self, path: str, cache: str, name: str) -> None:
        import numpy as np
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        settings = {"trt_engine_cache_enable": True, "trt_engine_cache_path": cache, "trt_cuda_graph_enable": True}
        if name == "TensorrtExecutionProvider":  # weakly typed up to TensorRT 10; later versions ignore both
            settings = dict(settings, trt_fp16_enable=True, trt_int8_enable=True)
        providers = [(name, settings if name == "TensorrtExecutionProvider" else {}), "CPUExecutionProvider"]
        self._session = onnxruntime.InferenceSession(path, options, providers=providers)
        if name not in self._session.get_providers():
            raise Unusable(f"ONNX Runtime could not start its {name}")
        self._input = self._session.get_inputs()[0]
        self._outputs = [output.name for output in self._session.get_outputs()]
        shape = [size if isinstance(size, int) else 1 for size in self._input.shape]
        known = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
        self._type = known[self._input.type]  # layers that are timed alone take what their neighbours leave
        self._name, self._image = name, np.random.default_rng(0).standard_normal(shape).astype(np.float32)

    def infer(self, images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Return all outputs for (n, ...) images."""
        import numpy as np

        wanted = self._input.shape
        if list(images.shape[1:]) != list(wanted[1:]):
            raise ValueError(f"takes input of shape {wanted}, found {list(images.shape)}")
        batch = wanted[0] if isinstance(wanted[0], int) else 1
        if len(images) == 0:
            one = self.infer(np.zeros((batch, *images.shape[1:]), np.float32))
            return {name: output[:0] for name, output in one.items()}
        missing = -len(images) % batch
        padded = np.concatenate([images, np.repeat(images[-1:], missing, axis=0)]) if missing else images
        parts = [self._run(padded[start : start + batch]) for start in range(0, len(padded), batch)]
        return {name: np.concatenate([part[name] for part in parts])[: len(images)] for name in self._outputs}

    def _run(self, images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        import numpy as np

        found = self._session.run(self._outputs, {self._input.name: images.astype(self._type)})
        return {name: np.asarray(output, np.float32) for name, output in zip(self._outputs, found)}  # noqa: B905

    def profile(self, image: NDArray[np.float32], runs: int) -> list[tuple[str, str, bool, float]]:
        """Return the whole file as one operator, not counted as integer: the provider does not say what ran inside."""
        seconds = []
        for _ in range(WARM_UP_RUNS + runs):
            started = time.perf_counter()
            self.infer(image)
            seconds.append(time.perf_counter() - started)
        return [("whole file", self._name, False, 1e6 * mean_of_fastest_half(seconds[WARM_UP_RUNS:]))]

    def timed_run(self) -> tuple[int, int]:
        """Return nanoseconds of one inference: wall time, twice, as the GPU's own time is out of reach here."""
        started = time.perf_counter_ns()
        self._run(self._image)
        elapsed = time.perf_counter_ns() - started
        return elapsed, elapsed


def mean_of_fastest_half(values: Sequence[float]) -> float:
    """Other programs can only add time, so the slower half says more about them."""
    fastest = sorted(values)[: (len(values) + 1) // 2]
    return sum(fastest) / len(fastest)


# The program: what the owner of a GPU types beside an exported file


def fingerprint(trt: Any, gpu: dict[str, Any]) -> dict[str, str]:
    """Return what an engine is bound to: it runs with this runtime on this GPU, and nowhere else."""
    return {
        "runtime": f"{trt.__name__} {trt.__version__}",
        "gpu": str(gpu["gpu"]),
        "compute_capability": str(gpu["compute_capability"]),
    }


def build(folder: str, *, tf32: bool = False, cuda: Any = None) -> dict[str, Any]:
    """Build every form of the model in a folder, time them in turn, keep the fastest; return what `engine.json` says.

    The forms are the files `model.NAME.onnx`. FP16 is one of them, so that what is kept is never slower than it.

    Raises:
        Unusable: there is no form, or TensorRT refuses all of them.
    """
    driver, trt = Cuda() if cuda is None else cuda, load_tensorrt()
    files = sorted(name for name in os.listdir(folder) if name.startswith("model.") and name.endswith(".onnx"))
    if not files:
        raise Unusable(f"{folder}: holds no model.NAME.onnx; run this beside the files it was exported with")
    found: dict[str, dict[str, Any]] = {}
    engines: dict[str, Engine] = {}
    for name in files:
        started = time.monotonic()
        try:
            model, timings = _read(os.path.join(folder, name)), os.path.join(folder, "timing.cache")
            plan, typing = build_plan(trt, model, timing_cache=timings, tf32=tf32)
            engines[name] = Engine(trt, plan, driver)
        except Unusable as error:
            found[name] = {"refused": str(error)}
            continue
        engines[name].capture()
        seconds = round(time.monotonic() - started, 1)
        found[name] = {"plan": plan, "typing": typing, "model_sha256": _sha256(model), "build_seconds": seconds}
    if not engines:
        raise Unusable(f"every form was refused: {'; '.join(one['refused'] for one in found.values())}")
    for name, times in _in_turn(engines).items():
        found[name]["gpu_ms"] = summary(times)
        engines[name].close()
    chosen = min(engines, key=lambda name: found[name]["gpu_ms"]["median"])
    plans = {name: found[name].pop("plan") for name in engines}
    gpu = driver.describe()
    record = {
        "model": chosen,
        "built_for": fingerprint(trt, gpu),
        "engine_sha256": _sha256(plans[chosen]),
        "forms": found,
        "tf32": tf32,
        "cuda_driver": gpu["cuda_driver"],
        "power_mode": _said("nvpmodel", "-q"),
    }
    _write(os.path.join(folder, ENGINE), plans[chosen])
    _write(os.path.join(folder, RECORD), (json.dumps(record, indent=1) + "\n").encode())
    return record


def _in_turn(engines: dict[str, Engine]) -> dict[str, list[int]]:
    """Return the GPU nanoseconds of ROUNDS runs of each engine, one after the other, after as many to warm up."""
    times: dict[str, list[int]] = {name: [] for name in engines}
    for turn in range(2 * ROUNDS):
        for name, engine in engines.items():
            nanoseconds = engine.timed(copies=False)[1]
            if turn >= ROUNDS:
                times[name].append(nanoseconds)
    return times


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def load(folder: str, cuda: Any = None) -> Engine:
    """Return the engine of a folder, ready to run; raises Unusable where it was built for something else."""
    driver, trt = Cuda() if cuda is None else cuda, load_tensorrt()
    plan, record = _read(os.path.join(folder, ENGINE)), _record(folder)
    here = fingerprint(trt, driver.describe())
    for key, wanted in record["built_for"].items():
        if here.get(key) != wanted:
            raise Unusable(
                f"{ENGINE} was built for {key} {wanted}, but here is {here.get(key)}; an engine runs only where it was "
                "built: python3 engine.py build"
            )
    name = record["model"]
    if _sha256(plan) != record["engine_sha256"]:
        raise Unusable(f"{ENGINE} is not the file that {RECORD} describes; build it again: python3 engine.py build")
    if _sha256(_read(os.path.join(folder, name))) != record["forms"][name]["model_sha256"]:
        raise Unusable(f"{name} has changed since {ENGINE} was built; build it again: python3 engine.py build")
    engine = Engine(trt, plan, driver)
    engine.capture()
    return engine


def _record(folder: str) -> dict[str, Any]:
    text = _read(os.path.join(folder, RECORD))
    if not text:
        raise Unusable(f"{folder}: holds no {ENGINE} with its {RECORD}; build it here: python3 engine.py build")
    record: dict[str, Any] = json.loads(text)
    return record


def check(folder: str, cuda: Any = None) -> dict[str, Any]:
    """Run the stored inputs and return how far the engine's answers are from those of the file on a CPU."""
    import numpy as np

    engine, name = load(folder, cuda), _record(folder)["model"]
    with np.load(os.path.join(folder, INPUTS), allow_pickle=False) as samples:
        inputs = samples["inputs"]
        keys = [key for key in samples.files if key.partition("/")[0] == name]  # without a slash: one output, no name
        expected = {key.partition("/")[2] or engine.names[0]: samples[key] for key in keys}
    answers = [engine.run(one[None]) for one in inputs]
    found = {key: np.concatenate([answer[key] for answer in answers]) for key in expected}
    furthest, agree, finite = 0.0, 1.0, True
    for key, wanted in expected.items():
        ours, theirs = found[key].reshape(len(inputs), -1), wanted.reshape(len(inputs), -1)
        furthest = max(furthest, float((np.abs(ours - theirs).max(axis=1) / np.ptp(theirs, axis=1)).max()))
        agree = min(agree, float((ours.argmax(1) == theirs.argmax(1)).mean()))
        finite = finite and bool(np.isfinite(ours).all())
    reproduced = finite and furthest <= SAMPLE_TOLERANCE
    return {
        "model": name,
        "reproduced": reproduced,
        "furthest_share_of_range": furthest,
        "same_class": agree,
        "samples": len(inputs),
    }


def bench(engine: Engine, seconds: float = BENCH_SECONDS) -> dict[str, Any]:
    """Return three times of one inference, each as median, 99th percentile and count, with and without a graph.

    gpu_ms lies between two events around the launch, without copies; host_ms is the wall time of copy, launch, copy
    and wait (host_without_copies_ms leaves the copies out); launch_ms is the host's part of starting it: near gpu_ms,
    the run is bound by launches, and a graph is what helps.
    """
    found: dict[str, Any] = {}
    for regime, copies in (("graph", True), ("graph", False), ("kernels", True), ("kernels", False)):
        graph, engine_graph = regime == "graph", engine.graph
        if graph and engine_graph is None:
            continue
        engine.graph = engine_graph if graph else None
        rows = _timed_rows(engine, copies, seconds)
        engine.graph = engine_graph
        one = found.setdefault(regime, {})
        if copies:
            one["host_ms"], one["gpu_ms"], one["launch_ms"] = (summary([row[at] for row in rows]) for at in range(3))
        else:
            one["host_without_copies_ms"] = summary([row[0] for row in rows])
    return found


def _timed_rows(engine: Engine, copies: bool, seconds: float) -> list[tuple[int, int, int]]:
    warm = time.monotonic() + BENCH_WARM_UP_SECONDS * min(1.0, seconds)
    while time.monotonic() < warm:
        engine.timed(copies=copies)
    rows: list[tuple[int, int, int]] = []
    end = time.monotonic() + seconds
    while len(rows) < BENCH_RUNS or time.monotonic() < end:
        rows.append(engine.timed(copies=copies))
    return rows


def summary(nanoseconds: Sequence[int]) -> dict[str, float]:
    """Return median and 99th percentile in milliseconds, and how many runs they are of."""
    ordered = sorted(nanoseconds)
    last = len(ordered) - 1
    middle = (ordered[last // 2] + ordered[(last + 1) // 2]) / 2
    return {"median": middle / 1e6, "p99": ordered[round(0.99 * last)] / 1e6, "runs": len(ordered)}


def profile(engine: Engine, runs: int = 50) -> list[dict[str, Any]]:
    """Return the layers as `read_layers` puts them, each with the `microseconds` of its fastest half of the runs."""
    times = engine.layer_times(WARM_UP_RUNS + runs)
    rows = [dict(layer, microseconds=0.0) for layer in engine.layers()]
    for row in rows:
        values = times.get(row["name"], [])[WARM_UP_RUNS:]
        row["microseconds"] = round(1e3 * mean_of_fastest_half(values), 3) if values else 0.0
    return rows


def main(arguments: Sequence[str]) -> int:
    """Do one command in the folder of this file and print its answer as JSON."""
    what = "Build, check and time the TensorRT engine of the model beside this file."
    parser = argparse.ArgumentParser(prog="engine.py", description=what)
    commands = parser.add_subparsers(dest="command", required=True)
    builder = commands.add_parser("build", help="build every form on this GPU and keep the fastest")
    builder.add_argument("--tf32", action="store_true", help="let float32 products be rounded to TF32")
    commands.add_parser("check", help="compare the engine's answers with the stored ones")
    timer = commands.add_parser("bench", help="time one inference, with and without CUDA graph and copies")
    timer.add_argument("--seconds", type=float, default=BENCH_SECONDS, help="of each regime (default %(default)s)")
    commands.add_parser("layers", help="list the layers, their types and times")
    options = parser.parse_args(arguments)
    folder = os.path.dirname(os.path.abspath(__file__))
    try:
        answer: Any
        if options.command == "build":
            answer = build(folder, tf32=options.tf32)
        elif options.command == "check":
            answer = check(folder)
        elif options.command == "bench":
            answer = {"machine": versions(), "before": facts(), "times": bench(load(folder), options.seconds)}
            answer["after"] = facts()
        else:
            answer = profile(load(folder))
    except (Unusable, OSError) as error:
        print(f"engine.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps(answer, indent=1))
    return 1 if options.command == "check" and not answer["reproduced"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
