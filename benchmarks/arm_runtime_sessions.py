"""Runs one file in one of several runtimes, for arm_runtimes.py: here, and on an emulated ARM CPU.

    python arm_runtime_sessions.py answers RUNTIME FILE images.npy answers.npy
    python arm_runtime_sessions.py count RUNTIME FILE images.npy RUNS

`answers` writes what the file answers to every image. `count` marks RUNS inferences for the counting emulator
(arm_instructions.c). One file for Python 3.9 that needs numpy and the runtime; every runtime works with one thread and
through its own Python package, whose few thousand instructions a call are part of the count.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

Infer = Callable[[Any], Any]
"""Takes (1, channels, height, width) float32 and returns a flat array of the first output."""
WARM_UP_RUNS = 1


def onnxruntime(path: str) -> Infer:
    """Return ONNX Runtime's answers; options as the project's own program has them."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: session.run(None, {name: image})[0].ravel()


def openvino(path: str, hint: str = "") -> Infer:
    """Return OpenVINO's answers; without a hint it takes half precision where the CPU multiplies it."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # it would tell its makers
    import openvino as ov

    options = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False}
    core = ov.Core()
    compiled = core.compile_model(path, "CPU", {**options, **({"INFERENCE_PRECISION_HINT": hint} if hint else {})})
    request = compiled.create_infer_request()
    return lambda image: np.array(request.infer([image], share_inputs=True)[0]).ravel()


def ncnn(path: str, half: bool = True) -> Infer:
    """Return ncnn's answers; `path` is that of the .param file, its weights lie beside it as .bin."""
    import ncnn as library

    net = library.Net()
    net.opt.num_threads = 1
    if not half:
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    if net.load_param(path) or net.load_model(path.removesuffix(".param") + ".bin"):
        raise SystemExit(f"{path}: ncnn refuses it")

    def infer(image: Any) -> Any:
        with net.create_extractor() as extractor:
            extractor.input("in0", library.Mat(image[0]))
            return np.array(extractor.extract("out0")[1]).ravel()

    return infer


def mnn(path: str, precision: str = "low") -> Infer:
    """Return MNN's answers; "low" is half precision where the CPU multiplies it, "high" float32."""
    import MNN

    interpreter = MNN.Interpreter(path)
    session = interpreter.createSession({"backend": "CPU", "numThread": 1, "precision": precision})
    tensor, answer = interpreter.getSessionInput(session), interpreter.getSessionOutput(session)

    def infer(image: Any) -> Any:
        kind = MNN.Tensor_DimensionType_Caffe
        tensor.copyFrom(MNN.Tensor(image.shape, MNN.Halide_Type_Float, image, kind))
        interpreter.runSession(session)
        shape = answer.getShape()
        into = MNN.Tensor(shape, MNN.Halide_Type_Float, np.zeros(shape, np.float32), kind)
        answer.copyToHostTensor(into)
        return np.array(into.getNumpyData(), np.float32).ravel()

    return infer


def litert(path: str) -> Infer:
    """Return LiteRT's answers, from XNNPACK as far as that takes the file."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=path, num_threads=1)
    interpreter.allocate_tensors()
    entry, answer = interpreter.get_input_details()[0], interpreter.get_output_details()[0]

    def infer(image: Any) -> Any:
        interpreter.set_tensor(entry["index"], image)
        interpreter.invoke()
        return interpreter.get_tensor(answer["index"]).ravel()

    return infer


def executorch(path: str) -> Infer:
    """Return ExecuTorch's answers; its Python package needs torch on the device too."""
    import torch
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")
    return lambda image: method.execute([torch.from_numpy(image)])[0].numpy().ravel()


RUNTIMES: dict[str, Infer | Callable[[str], Infer]] = {
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "openvino f32": lambda path: openvino(path, "f32"),
    "ncnn": ncnn,
    "ncnn f32": lambda path: ncnn(path, half=False),
    "mnn": mnn,
    "mnn f32": lambda path: mnn(path, "high"),
    "litert": litert,
    "executorch": executorch,
}


def mark() -> None:
    """Tell the counting emulator that a region ends here; without it nothing happens."""
    with contextlib.suppress(OSError):
        os.lseek(-77, 0, 0)


def main() -> int:
    """Answer or count."""
    warnings.simplefilter("ignore")
    what, runtime, path, images = sys.argv[1:5]
    infer, pictures = RUNTIMES[runtime](path), np.load(images)
    if what == "answers":
        np.save(sys.argv[5], np.stack([infer(np.ascontiguousarray(one[None])) for one in pictures]))
        return 0
    image = np.ascontiguousarray(pictures[:1])
    for _ in range(WARM_UP_RUNS):
        infer(image)
    gc.disable()
    mark()
    for _ in range(int(sys.argv[5])):
        infer(image)
        mark()
    return 0


if __name__ == "__main__":
    sys.exit(main())
