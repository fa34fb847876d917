"""In: ONNX files. Out: their outputs and times from OpenVINO on a CPU, this machine's or a board's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hirelc_backends import openvino_program
from hirelc_backends.onnxruntime_cpu import weight_bits
from hirelc_deploy.measure.backend import BFLOAT_FORM, HALF_FORM, ONNX_FORM, Precision
from hirelc_deploy.measure.device import LocalDevice
from hirelc_deploy.measure.program import ProgramBackend

SIXTEEN_BITS = {
    BFLOAT_FORM: "Files may ask for bfloat16 in what stays float, where that is faster.",
    HALF_FORM: "Files may ask for FP16 in what stays float, where that is faster.",
    ONNX_FORM: "",
}
NO_INTEGERS = "OpenVINO does not name INT8 among what this CPU multiplies, so integer files may not be faster."


class OpenvinoCpu(ProgramBackend):
    """OpenVINO's CPU plugin. It reads the same Q/DQ files as ONNX Runtime.

    It runs in a process of its own: its threads are not torch's, and what ends it does not end the search.
    """

    program = Path(openvino_program.__file__)

    def __init__(self, load_deadline_s: float = 300.0) -> None:
        super().__init__("openvino_cpu", self.program, self.precisions_on, LocalDevice(ahead=2), load_deadline_s)

    @staticmethod
    def precisions_on(facts: Mapping[str, Any]) -> tuple[Precision, ...]:
        """Return float and int8, in a form with bfloat16, else FP16, where the CPU multiplies that.

        Weights of int8 use 7 bits where the CPU adds 8-bit products in 16 bits.
        """
        capabilities = facts["runtime"]["capabilities"]
        form = BFLOAT_FORM if "BF16" in capabilities else HALF_FORM if "FP16" in capabilities else ONNX_FORM
        features = facts["features"]
        bits, remark = weight_bits(None if features is None else frozenset(features), facts["architecture"])
        if "INT8" not in capabilities:
            remark = f"{remark} {NO_INTEGERS}".strip()
        return (
            Precision("float", "float32", "float32", 32, SIXTEEN_BITS[form], form),
            Precision("int8", "uint8", "int8", bits, remark, form),
        )
