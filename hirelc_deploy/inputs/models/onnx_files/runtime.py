"""In: an ONNX file and images. Out: what ONNX Runtime answers, first tried where it can do no harm."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import GraphProto

from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.answers import stacked
from hirelc_deploy.inputs.data.archives import memory_bytes
from hirelc_deploy.user_code import first_line

SECONDS = 120
"""Computing that one image may take at the first try; the networks of this project's benchmarks take less than five."""

PATIENCE = 20
"""Times as long it may take by the clock, on a machine that is busy otherwise."""

KINDS = {"tensor(float16)": np.float16, "tensor(double)": np.float64, "tensor(uint8)": np.uint8}
"""Of inputs that are not float32."""

SMALLEST = 1e-12
SIGMOID_SCALE = 5e-3
"""ONNX Runtime's sigmoid was seen to be off by 1e-7, however small it is; so smaller ones are compared as of this."""

TRIAL = """
import json, resource, sys
path, most_bytes, seconds, *shape = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_AS, (int(most_bytes),) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (int(seconds),) * 2)
import numpy as np
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = 1, 4
options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
try:
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    image = np.random.default_rng(0).standard_normal([int(size) for size in shape], np.float32)
    answers = session.run(None, {session.get_inputs()[0].name: image})
    print(json.dumps({"shapes": [list(np.shape(answer)) for answer in answers]}))
except Exception as error:
    print(json.dumps({"error": (str(error).strip().splitlines() or ["no message"])[0][:200]}))
"""
"""A process of its own: a Loop may run without end, and any operator may ask for all memory."""


def shapes_of_answers(model: bytes, shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the shapes of what a file of anybody's answers to one input, found in a process of its own.

    Raises:
        InputError: ONNX Runtime does not run it, or not within SECONDS and the memory of this machine; the text ends a
            sentence.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        path.write_bytes(model)
        command = [sys.executable, "-c", TRIAL, str(path), str(memory_bytes()), str(SECONDS), *map(str, shape)]
        endless = InputError(f"ONNX Runtime did not answer one image within {SECONDS} seconds")
        try:
            done = subprocess.run(command, capture_output=True, timeout=PATIENCE * SECONDS, check=False, text=True)
        except subprocess.TimeoutExpired:
            raise endless from None
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise endless
    try:
        said = json.loads(done.stdout)
    except ValueError:
        raise InputError(f"ONNX Runtime ended with code {done.returncode} and no answer") from None
    if "error" in said:
        raise InputError(f"ONNX Runtime does not run it ({said['error']})")
    return [tuple(one) for one in said["shapes"]]


def open_plain(source: Path | bytes, threads: int = 1) -> onnxruntime.InferenceSession:
    """Return a session that runs a file as it is written; raises whatever ONNX Runtime raises."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    given = str(source) if isinstance(source, Path) else source
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def run(
    source: Path | bytes,
    where: Path,
    names: Sequence[str],
    images: NDArray[np.float32],
    batch: int | None,
    channels_last: bool = False,
) -> dict[str, NDArray[np.float32]]:
    """Return what ONNX Runtime answers; a file for one batch alone is given as many images as it takes.

    Args:
        source: The file, or its bytes.
        where: For messages.
        names: Of the outputs.
        images: (n, channels, height, width).
    """
    if channels_last:
        images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    rows = batch or len(images)
    whole = np.concatenate([images] * rows)[: max(rows, -(-len(images) // rows) * rows)]
    try:
        session = open_plain(source)
        given = session.get_inputs()[0]
        kind: Any = KINDS.get(given.type, np.float32)
        parts = [
            session.run(list(names), {given.name: whole[start : start + rows].astype(kind)})
            for start in range(0, len(whole), rows)
        ]
    except Exception as error:  # the runtime's exception classes share no base below Exception
        raise InputError(f"{where}: ONNX Runtime does not run it ({first_line(error)}).") from None
    columns = zip(*parts, strict=True)
    return {
        name: stacked(column)[: len(images)].astype(np.float32) for name, column in zip(names, columns, strict=True)
    }


def least_scales(graph: GraphProto) -> dict[str, float]:
    """Return the name of each output to the `least_scale` that its differences are taken of."""
    sigmoids = {name for node in graph.node if node.op_type == "Sigmoid" for name in node.output}
    return {value.name: SIGMOID_SCALE if value.name in sigmoids else SMALLEST for value in graph.output}


def difference(
    first: NDArray[np.floating[Any]], second: NDArray[np.floating[Any]], least_scale: float = SMALLEST
) -> float:
    """Return the largest difference as a share of the second's largest value; infinite where shapes differ."""
    if first.shape != second.shape:
        return float("inf")
    return float(np.abs(first - second).max(initial=0.0) / max(float(np.abs(second).max(initial=0.0)), least_scale))
