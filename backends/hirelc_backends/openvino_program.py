"""In: ONNX files. Out: their outputs, operator times and single timed runs, from OpenVINO's CPU plugin.

This is the part of the OpenVINO backend that runs on the device, so it is one file for Python 3.8 that needs numpy and
openvino, and nothing else. measure/worker.py loads it there.
"""

from __future__ import annotations

import os
import re
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import openvino
    from numpy.typing import NDArray

OPTIONS: dict[str, Any] = {
    "PERFORMANCE_HINT": "LATENCY",
    "NUM_STREAMS": 1,
    "INFERENCE_PRECISION_HINT": "f32",
    "ENABLE_CPU_PINNING": False,
}
"""What every file is compiled with, beside the number of threads.

OpenVINO's own default rounds float layers to bf16 where the CPU multiplies it; here only a file that asks for it
(FLOAT_AS) gets that, and `float` means float32. A pinned thread could not leave a core on which another program works;
on an idle one pinning was not faster (3.04 ms with it and 3.03 ms without, two convolutions of 64 channels at 64x64).
"""

FLOAT_AS = "hirelc_deploy.float_as"
"""Key in the metadata of a file; the value is what its float layers are computed in, in OpenVINO's words."""

INTEGER_LAYERS = frozenset({"Convolution", "Deconvolution", "FullyConnected", "MatMul", "Pooling"})
"""Kinds of nodes whose kernels multiply, add or compare the integers that they read. What else reads integers (sums,
means, fused element-wise code) turns them into float first."""

MOVES = frozenset(
    {"Reorder", "Convert", "FakeQuantize", "Transpose", "Reshape", "Concatenation", "Split", "StridedSlice", "Pad"}
)
"""Kinds of nodes that move or convert numbers; they are called by their kind alone, without the kernel's name."""

PROFILE_WARM_UP_RUNS = 3
PROFILES = 3
"""Other programs can only add time, so of this many profiles the one with the least time in all counts."""
HALF = 0.5
"""Microseconds: OpenVINO's counters are whole ones, cut off, so that half of one is missing in the mean."""


def imported() -> Any:
    """Return the package openvino, imported without its telemetry.

    With it an import forks this process, to tell the makers of the import; without a network the child never ends.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def availability() -> str | None:
    """Return None where OpenVINO can be imported and has its CPU plugin, else the reason and the remedy."""
    try:
        ov = imported()
    except ImportError as error:
        return (
            f"OpenVINO cannot be imported ({error}); install it with `pip install openvino`. It may be faster than "
            "ONNX Runtime on this CPU: then the last race of --target cpu has its files, and --target openvino "
            "searches in it."
        )
    if "CPU" not in ov.Core().available_devices:
        return "this OpenVINO has no CPU plugin; install it with `pip install openvino`."
    return None


def versions() -> dict[str, str]:
    """Return the versions of openvino and numpy."""
    import numpy as np

    return {"openvino": imported().__version__, "numpy": np.__version__}


def facts() -> dict[str, Any]:
    """Return what the CPU plugin says that this CPU multiplies."""
    return {"capabilities": list(imported().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))}


def open_session(path: str, threads: int, cache: str | None = None) -> Session:
    """Compile a file; raises ValueError in OpenVINO's own words, or for a file that has not one input."""
    return Session(path, threads)


class Session:
    """One ONNX file, compiled in this process."""

    def __init__(self, path: str, threads: int) -> None:
        self._core, self._threads = imported().Core(), threads
        self.options = {**OPTIONS, "INFERENCE_NUM_THREADS": threads}
        try:
            self._model = self._core.read_model(path)
            if self._model.has_rt_info(["framework", FLOAT_AS]):
                self.options["INFERENCE_PRECISION_HINT"] = self._model.get_rt_info(["framework", FLOAT_AS]).value
            if len(self._model.inputs) != 1:
                raise ValueError(f"has {len(self._model.inputs)} inputs; a vision model with one input is needed")
            self._compiled = self._compile()
        except RuntimeError as error:
            raise ValueError(in_one_line(str(error))) from None
        self._request = self._compiled.create_infer_request()
        self._shape = self._model.input().get_partial_shape()
        # An output's tensor may have several names; its result is called after the one that the file gives it.
        self._outputs = [one.get_friendly_name().partition("/sink_port_")[0] for one in self._model.get_results()]
        # With one thread the calling thread does all the work; its own clock leaves out other processes and threads.
        self._cpu_clock = time.thread_time_ns if threads == 1 else time.process_time_ns
        self._feed: Any = None

    def infer(self, images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Return all outputs for (n, ...) images; a file of a fixed batch runs as often as it takes."""
        import numpy as np

        if len(images) == 0:
            one = self.infer(np.zeros((1, *images.shape[1:]), np.float32))
            return {name: output[:0] for name, output in one.items()}
        batch = self._shape[0].get_length() if self._shape[0].is_static else len(images)
        piece = [batch, *images.shape[1:]]
        if not self._shape.compatible(imported().PartialShape(piece)) or self._type() != np.float32:
            wanted = [size.get_length() if size.is_static else "any" for size in self._shape]
            raise ValueError(f"takes {self._type()} input of shape {wanted}, found float32 {list(images.shape)}")
        missing = -len(images) % batch
        padded = np.concatenate([images, np.repeat(images[-1:], missing, axis=0)]) if missing else images
        pieces = [np.ascontiguousarray(padded[n : n + batch], np.float32) for n in range(0, len(padded), batch)]
        answers = self._on_every_core(pieces) if len(pieces) > 1 else [self._answer(self._request, pieces[0])]
        return {name: np.concatenate(parts)[: len(images)] for name, parts in zip(self._outputs, zip(*answers))}  # noqa: B905

    def profile(self, image: NDArray[np.float32], runs: int) -> list[tuple[str, str, bool, float]]:
        """Return (name, kind and kernel, is integer, microseconds) of each node that ran, in execution order.

        The mean over `runs` inferences. A name is that of the first node of the file that is part of the kernel.
        """
        profiles = [self._profiled(image, max(1, runs // PROFILES)) for _ in range(min(runs, PROFILES))]
        return min(profiles, key=lambda nodes: sum(node[3] for node in nodes))

    def timed_run(self) -> tuple[int, int]:
        """Return nanoseconds of one inference of batch 1: wall time and CPU time."""
        if self._feed is None:
            self._feed = [self._random_input()]
        cpu, wall = self._cpu_clock(), time.perf_counter_ns()
        self._request.infer(self._feed, share_inputs=True, share_outputs=True)
        return time.perf_counter_ns() - wall, self._cpu_clock() - cpu

    def _compile(self, **others: Any) -> openvino.CompiledModel:
        return self._core.compile_model(self._model, "CPU", {**self.options, **others})

    def _type(self) -> Any:
        return self._model.input().get_element_type().to_dtype()

    def _answer(self, request: openvino.InferRequest, images: NDArray[np.float32]) -> list[Any]:
        import numpy as np

        found = request.infer([images], share_inputs=True)
        return [np.asarray(found[index], np.float32) for index in range(len(self._outputs))]

    def _on_every_core(self, pieces: list[NDArray[np.float32]]) -> list[list[Any]]:
        """Return the answers to several inputs, side by side: one stream for each group of `threads` cores."""
        import numpy as np

        streams = max(1, (os.cpu_count() or 1) // self._threads)
        wide = self._compile(NUM_STREAMS=streams, INFERENCE_NUM_THREADS=streams * self._threads)
        answers: list[list[Any]] = [[] for _ in pieces]

        def keep(request: openvino.InferRequest, index: int) -> None:
            answers[index] = [np.array(tensor.data, np.float32) for tensor in request.output_tensors]

        queue = imported().AsyncInferQueue(wide, streams)
        queue.set_callback(keep)
        for index, images in enumerate(pieces):
            queue.start_async([images], index)
        queue.wait_all()
        return answers

    def _profiled(self, image: NDArray[np.float32], runs: int) -> list[tuple[str, str, bool, float]]:
        compiled = self._compile(PERF_COUNT=True)
        request = compiled.create_infer_request()
        self._answer(request, image)
        ran = mean_microseconds(request)  # a node that later takes less than 1 us in the mean counts as not run there
        for _ in range(PROFILE_WARM_UP_RUNS - 1):
            self._answer(request, image)
        before = mean_microseconds(request)
        for _ in range(runs):
            self._answer(request, image)
        after, nodes = mean_microseconds(request), []
        for node in compiled.get_runtime_model().get_ordered_ops():
            name = node.get_friendly_name()
            if name in ran or name in after:  # means are over all runs, those of warming up included
                cold = before.get(name, 0.0) * PROFILE_WARM_UP_RUNS
                total = after.get(name, 0.0) * (PROFILE_WARM_UP_RUNS + runs) - cold
                nodes.append((*described(node), max(total / runs, 0.0) + HALF))
        return nodes

    def _random_input(self, seed: int = 0) -> Any:
        """Return one input of batch 1: standard normal, or all values of an integer type alike."""
        import numpy as np

        shape = [size.get_length() if size.is_static else 1 for size in self._shape]
        rng, dtype = np.random.default_rng(seed), np.dtype(self._type())
        if np.issubdtype(dtype, np.integer):
            return rng.integers(0, 128, shape).astype(dtype)
        return rng.standard_normal(shape).astype(dtype)


def mean_microseconds(request: openvino.InferRequest) -> dict[str, float]:
    """Return node name to the mean of all inferences so far, for nodes that were executed."""
    executed = [one for one in request.profiling_info if one.status.name == "EXECUTED"]
    return {one.node_name: one.real_time.total_seconds() * 1e6 for one in executed}


def described(node: Any) -> tuple[str, str, bool]:
    """Return name, kind and kernel of a node of the runtime model, and whether it computed on integers."""
    said = {key: str(getattr(value, "value", value)) for key, value in node.get_rt_info().items()}
    kind, kernel = said.get("layerType", node.get_type_name()), said.get("primitiveType", "")
    is_integer = kind in INTEGER_LAYERS and said.get("runtimePrecision") in ("u8", "i8")
    return own_name(node.get_friendly_name(), said), kind if kind in MOVES else f"{kind} {kernel}".strip(), is_integer


def own_name(friendly: str, said: dict[str, str]) -> str:
    """Return the file's name of the first of its nodes that a kernel holds; OpenVINO's own name where none is told."""
    # OpenVINO appends to a node's name what it split off, and calls nodes of its own by type and number.
    names = [name.partition("/WithoutBiases")[0] for name in said.get("originalLayersNames", "").split(",")]
    own = [name for name in names if name and not re.fullmatch(r"[A-Z]\w*_\d+", name)]
    return own[0] if own else friendly


def in_one_line(said: str) -> str:
    """Return the words of OpenVINO's exception without where in its source it was thrown."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("Exception from ", "Check '"))] or lines
    return " ".join(kept).rstrip(".")
