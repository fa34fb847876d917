"""In: ONNX files. Out: their outputs and times from ONNX Runtime on an ARM CPU, in what its features allow."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

from hirelc_backends.onnxruntime_cpu import ARM, OnnxRuntimeCpu
from hirelc_deploy.measure.backend import Precision

DOT_PRODUCTS, MATRIX_PRODUCTS, HALF = "asimddp", "i8mm", "asimdhp"

NO_DOT_PRODUCTS = (
    "This CPU has no 8-bit dot products (asimddp), as a Raspberry Pi 4 or a Jetson Nano: INT8 needs about 0.8 of the "
    "instructions of float there, not a third. It shrinks files; expect time from cutting."
)
"""Counted under emulation, ONNX Runtime 1.31.1, a convolutional network of 168 million multiply-accumulates, one
thread: Cortex-A72 68.8 million instructions in float and 55.7 in INT8; Cortex-A76 69.2 and 20.8."""


class OnnxRuntimeArm(OnnxRuntimeCpu):
    """ONNX Runtime's CPU provider on an ARM board, mostly reached over SSH.

    ONNX Runtime picks its kernels by the same features of the CPU; what is chosen here is what the files should hold.
    Activations are signed: its ARM kernels multiply signed by signed with the fewest instructions (Cortex-A76: 20.8
    million for S8S8, 22.6 for U8S8, 24.0 for U8U8), while x86 is the other way around. Nothing saturates in 16 bits, so
    weights use all 8.
    """

    name = "onnxruntime_arm"

    def availability(self) -> str | None:
        """Return None on an ARM machine with ONNX Runtime."""
        if platform.machine().lower() not in ARM:
            return f"this machine is {platform.machine()}, not ARM; name a board with `hirelc-deploy targets add`."
        return super().availability()

    def precisions_on(self, facts: Mapping[str, Any]) -> tuple[Precision, ...]:
        """Return float and int8, with a remark for CPUs on which INT8 brings little."""
        features = facts["features"] or ()
        if MATRIX_PRODUCTS in features:
            remark = "8-bit matrix products (i8mm)."
        elif DOT_PRODUCTS in features:
            remark = "8-bit dot products (asimddp)."
        else:
            remark = NO_DOT_PRODUCTS
        half = (
            "Half-precision arithmetic (asimdhp) is there, but no file of this tool uses it."
            if HALF in features
            else ""
        )
        return (
            Precision("float", "float32", "float32", 32, half),
            Precision("int8", "int8", "int8", 8, remark),
        )
