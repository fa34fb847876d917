"""In: an ONNX file. Out: a function from a batch to the outputs by name. For Python 3.8, numpy and openvino."""

import sys
from collections.abc import Callable
from importlib import import_module

import numpy as np

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # an import would tell its makers of it
openvino = import_module("openvino")

# What the file was timed with. INFERENCE_NUM_THREADS may be raised.
OPTIONS: "dict[str, object]" = {}


def open_model(path: str) -> "tuple[Callable[[np.ndarray], dict[str, np.ndarray]], int]":
    """Return a function from float32 (batch, channels, height, width) to output name and array, and its batch."""
    core = openvino.Core()
    model = core.read_model(path)
    names = [result.get_friendly_name().partition("/sink_port_")[0] for result in model.get_results()]
    compiled = core.compile_model(model, "CPU", OPTIONS)
    batch = model.input().get_partial_shape()[0]
    run = lambda images: dict(zip(names, compiled([images]).values()))  # noqa: B905, E731
    return run, batch.get_length() if batch.is_static else 1
