"""In: the precisions of a device. Out: the form in which its runtime wants files, and the functions that write it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from hirelc_deploy.compress.integer import quantize
from hirelc_deploy.compress.integer.calibration import Ranges
from hirelc_deploy.compress.onnx_file import export_tensorrt
from hirelc_deploy.errors import InputError
from hirelc_deploy.measure.backend import BFLOAT_FORM, FLOAT_AS, ONNX_FORM, TENSORRT_FORM, Precision

PrecisionOf = Callable[[str], str]

BFLOAT = "+bf16"
"""Ends the name of a pattern in which bfloat16 does what is not integer."""
WHOLLY_BFLOAT = f"float{BFLOAT}"
"""The pattern without integers; bfloat16 has float32's range and 8 bits of precision."""
BFLOAT_PATTERNS = (WHOLLY_BFLOAT, *(f"{name}{BFLOAT}" for name in quantize.PATTERNS))


@dataclass(frozen=True)
class Form:
    """How files are written for one kind of runtime.

    Attributes:
        float_name: What the fastest file without 8-bit numbers is called: the one that no other may be slower than.
        patterns: Which operators around the layers can become integer, to be timed against each other.
        write_float: Writes that file from (float file as exported, the same equalised, ranges of the latter, out).
        write_integer: Writes a file from (equalised float file, ranges, precision of each layer, the device's integer
            precision, pattern, out).
        half_pattern: Given to `write_integer`, it makes a file without 8-bit numbers that has 16 bits where
            `write_float` has 32; `` where the runtime has none, or where `write_float` does that already.
    """

    float_name: str
    patterns: tuple[str, ...]
    write_float: Callable[[Path, Path, Ranges, Path], None]
    write_integer: Callable[[Path, Ranges, PrecisionOf, Precision, str, Path], None]
    half_pattern: str = ""


def form_of(precisions: Sequence[Precision]) -> Form:
    """Return the form that all precisions of a device share; raises InputError for one that nobody writes."""
    names = {precision.form for precision in precisions}
    if len(names) != 1 or not names <= FORMS.keys():
        raise InputError(f"precisions of form {', '.join(sorted(names))}: a device takes one of {', '.join(FORMS)}.")
    return FORMS[names.pop()]


def _copy(plain: Path, equalised: Path, ranges: Ranges, out: Path) -> None:
    shutil.copyfile(plain, out)


def _write_pairs(
    static: Path, ranges: Ranges, precision_of: PrecisionOf, target: Precision, pattern: str, out: Path
) -> None:
    quantize.quantize(static, out, ranges, precision_of, target=target, pattern=pattern)


def _write_bfloat_pairs(
    static: Path, ranges: Ranges, precision_of: PrecisionOf, target: Precision, pattern: str, out: Path
) -> None:
    if pattern == WHOLLY_BFLOAT:
        shutil.copyfile(static, out)
    else:
        quantize.quantize(static, out, ranges, precision_of, target=target, pattern=pattern.removesuffix(BFLOAT))
    if pattern.endswith(BFLOAT):
        proto = onnx.load(str(out))
        onnx.helper.set_model_props(proto, {FLOAT_AS: "bf16"})
        out.write_bytes(proto.SerializeToString())


def _write_half(plain: Path, equalised: Path, ranges: Ranges, out: Path) -> None:
    # The equalised one, because the ranges are of its tensors, and say which of them FP16 cannot hold.
    export_tensorrt.write_tensorrt(equalised, out, ranges, lambda layer: "float", pattern=quantize.BLANKET)


def _write_typed(
    static: Path, ranges: Ranges, precision_of: PrecisionOf, target: Precision, pattern: str, out: Path
) -> None:
    export_tensorrt.write_tensorrt(static, out, ranges, precision_of, pattern=pattern)


FORMS = {
    ONNX_FORM: Form("fp32", tuple(quantize.PATTERNS), _copy, _write_pairs),
    TENSORRT_FORM: Form("fp16", tuple(export_tensorrt.PATTERNS), _write_half, _write_typed),
    BFLOAT_FORM: Form(
        "fp32", (*quantize.PATTERNS, *BFLOAT_PATTERNS[1:]), _copy, _write_bfloat_pairs, half_pattern=WHOLLY_BFLOAT
    ),
}
