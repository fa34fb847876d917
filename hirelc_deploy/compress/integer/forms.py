"""In: the precisions of a device. Out: the form in which its runtime wants files, and the functions that write it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx

from hirelc_deploy.compress.integer import quantize
from hirelc_deploy.compress.integer.calibration import Ranges
from hirelc_deploy.compress.onnx_file import export_tensorrt
from hirelc_deploy.errors import InputError
from hirelc_deploy.measure.backend import BFLOAT_FORM, FLOAT_AS, HALF_FORM, ONNX_FORM, TENSORRT_FORM, Precision

PrecisionOf = Callable[[str], str]

FLOAT = "float"
"""Begins the names of patterns without integers."""
BFLOAT, HALF = "+bf16", "+f16"
"""End the name of a pattern in which bfloat16, or FP16, does what is not integer. bfloat16 has float32's range and 8
bits of precision; FP16 has 11 bits of it, and nothing above 65504."""
SIXTEEN_BITS = (BFLOAT, HALF)
WHOLLY_SIXTEEN_BITS = {f"{FLOAT}{end}": end.removeprefix("+") for end in SIXTEEN_BITS}
"""The patterns without integers, and what they are called."""
SIXTEEN_BIT_PATTERNS = tuple(f"{name}{end}" for end in SIXTEEN_BITS for name in (FLOAT, *quantize.PATTERNS))


@dataclass(frozen=True)
class Form:
    """How files are written for one kind of runtime.

    Attributes:
        float_name: What the fastest file without 8-bit numbers is called: the one that no other may be slower than.
        patterns: Which operators around the layers can become integer, to be timed against each other.
        write_float: Writes that file from (float file as exported, the same equalised, ranges of the latter, out).
        write_integer: Writes a file from (equalised float file, ranges, precision of each layer, the device's integer
            precision, pattern, out).
        half: BFLOAT or HALF, which behind a pattern lets 16 bits do what is not integer; `` where the runtime has
            none, or where `write_float` does that already.
    """

    float_name: str
    patterns: tuple[str, ...]
    write_float: Callable[[Path, Path, Ranges, Path], None]
    write_integer: Callable[[Path, Ranges, PrecisionOf, Precision, str, Path], None]
    half: str = ""

    @property
    def half_pattern(self) -> str:
        """The pattern of a file without 8-bit numbers and with 16 bits where `write_float` has 32, or ``."""
        return f"{FLOAT}{self.half}" if self.half else ""


def with_whole_floats(pattern: str) -> str:
    """Return the pattern that differs from this one in having 32 bits in what is not integer."""
    for end in SIXTEEN_BITS:
        pattern = pattern.removesuffix(end)
    return pattern


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


def _write_half_pairs(
    half: str,
    static: Path,
    ranges: Ranges,
    precision_of: PrecisionOf,
    target: Precision,
    pattern: str,
    out: Path,
) -> None:
    exact = pattern.removesuffix(half)
    if exact == FLOAT:
        shutil.copyfile(static, out)
    else:
        quantize.quantize(static, out, ranges, precision_of, target=target, pattern=exact)
    if pattern != exact:
        proto = onnx.load(str(out))
        onnx.helper.set_model_props(proto, {FLOAT_AS: half.removeprefix("+")})
        out.write_bytes(proto.SerializeToString())


def _write_half(plain: Path, equalised: Path, ranges: Ranges, out: Path) -> None:
    # The equalised one, because the ranges are of its tensors, and say which of them FP16 cannot hold.
    export_tensorrt.write_tensorrt(equalised, out, ranges, lambda layer: "float", pattern=quantize.BLANKET)


def _write_typed(
    static: Path, ranges: Ranges, precision_of: PrecisionOf, target: Precision, pattern: str, out: Path
) -> None:
    export_tensorrt.write_tensorrt(static, out, ranges, precision_of, pattern=pattern)


def _form_with(half: str) -> Form:
    patterns = (*quantize.PATTERNS, *(f"{name}{half}" for name in quantize.PATTERNS))
    return Form("fp32", patterns, _copy, partial(_write_half_pairs, half), half)


FORMS = {
    ONNX_FORM: Form("fp32", tuple(quantize.PATTERNS), _copy, _write_pairs),
    TENSORRT_FORM: Form("fp16", tuple(export_tensorrt.PATTERNS), _write_half, _write_typed),
    BFLOAT_FORM: _form_with(BFLOAT),
    HALF_FORM: _form_with(HALF),
}
