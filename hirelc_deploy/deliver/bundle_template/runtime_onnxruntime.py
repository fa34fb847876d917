"""In: an ONNX file. Out: a function from one input to the outputs by name. For Python 3.8, numpy and onnxruntime."""

from collections.abc import Callable

import numpy as np
import onnxruntime


def open_model(path: str) -> "Callable[[np.ndarray], dict[str, np.ndarray]]":
    """Return a function from a float32 (1, channels, height, width) to output name and array."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda image: dict(zip(names, session.run(names, {"input": image})))  # noqa: B905
