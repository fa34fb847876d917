"""In: an ONNX file. Out: a function from one input to the outputs by name. For Python 3.8, numpy and openvino."""

import sys
from collections.abc import Callable
from importlib import import_module

import numpy as np

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # an import would tell its makers of it
openvino = import_module("openvino")

# What the file was timed with. INFERENCE_NUM_THREADS may be raised.
OPTIONS: "dict[str, object]" = {}


def open_model(path: str) -> "Callable[[np.ndarray], dict[str, np.ndarray]]":
    """Return a function from a float32 (1, channels, height, width) to output name and array."""
    core = openvino.Core()
    model = core.read_model(path)
    names = [result.get_friendly_name().partition("/sink_port_")[0] for result in model.get_results()]
    compiled = core.compile_model(model, "CPU", OPTIONS)
    return lambda image: dict(zip(names, compiled([image]).values()))  # noqa: B905
