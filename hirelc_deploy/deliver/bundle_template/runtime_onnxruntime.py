"""In: an ONNX file. Out: a function from a batch to the outputs by name. For Python 3.8, numpy and onnxruntime."""

import os
from collections.abc import Callable

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # it would tell its maker of model and machine
import onnxruntime


def open_model(path: str) -> "tuple[Callable[[np.ndarray], dict[str, np.ndarray]], int]":
    """Return a function from float32 (batch, channels, height, width) to output name and array, and its batch."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    batch = session.get_inputs()[0].shape[0]
    model = lambda images: dict(zip(names, session.run(names, {"input": images})))  # noqa: B905, E731
    return model, batch if isinstance(batch, int) else 1
