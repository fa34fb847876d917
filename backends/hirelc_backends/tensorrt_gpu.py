"""In: ONNX files in TensorRT's form. Out: their outputs and times on an NVIDIA GPU, this machine's or a board's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hirelc_backends import tensorrt_program
from hirelc_deploy.measure.backend import TENSORRT_FORM, Precision
from hirelc_deploy.measure.device import LocalDevice
from hirelc_deploy.measure.program import ProgramBackend

FIRST_INT8, FIRST_FP8 = (7, 5), (8, 9)
"""Compute capabilities: Turing brought INT8 to tensor cores, Ada and Hopper FP8. A Jetson Orin is (8, 7): no FP8."""


class TensorrtGpu(ProgramBackend):
    """TensorRT 10.3 to 11, TensorRT-RTX, or ONNX Runtime with either, on an NVIDIA GPU.

    An engine is built where it runs, from the file that compress/export_tensorrt.py writes. Everything that touches the
    GPU runs in a process of its own, so that a fault of the driver ends that process and not the search.
    """

    program = Path(tensorrt_program.__file__)

    def __init__(self, load_deadline_s: float = 1800.0) -> None:
        """Args: `load_deadline_s` is long because an Orin Nano takes minutes to build the engine of a large network."""
        super().__init__("tensorrt_gpu", self.program, self.precisions_on, LocalDevice(), load_deadline_s)

    @staticmethod
    def precisions_on(facts: Mapping[str, Any]) -> tuple[Precision, ...]:
        """Return what a GPU of this compute capability multiplies: FP16 in place of float, INT8, and FP8 from 8.9 on.

        FP16 is what `float` means here, because it is the fastest that an uncut network can be without rounding to
        8 bits; a comparison with FP32 would flatter whatever is compared.
        """
        capability = tuple(int(part) for part in str(facts["runtime"]["compute_capability"]).split("."))
        remark = "FP16, with FP32 where calibration saw larger numbers."
        found = [Precision("float", "float16", "float16", 16, remark, TENSORRT_FORM)]
        if capability >= FIRST_INT8:
            found.append(Precision("int8", "int8", "int8", 8, "Symmetric, in tensor cores.", TENSORRT_FORM))
        if capability >= FIRST_FP8:
            found.append(Precision("fp8", "float8", "float8", 8, "E4M3, in tensor cores.", TENSORRT_FORM))
        return tuple(found)
