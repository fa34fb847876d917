"""What benchmarks conclude: which answers must be equal, how far ahead a file could be, which verdicts were right."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hirelc_deploy.measure.backend import OperatorTime

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import arm_apply
import verdict
from products import bound, fastest, largest_others, share_of_products


def row(**changes):
    return {
        **{"file": "a.onnx", "runtime_own": False, "integer_ops": 9, "float_ops": 0, "bit_exact": False},
        **{"runtime": "onnxruntime", "largest_difference": 0.001, "largest_output": 0.2, **changes},
    }


def test_an_integer_file_of_ours_must_answer_alike_to_the_bit_and_the_runtimes_own_need_not():
    assert not arm_apply.agrees(row())
    assert arm_apply.agrees(row(bit_exact=True))
    assert arm_apply.agrees(row(runtime_own=True))
    assert arm_apply.agrees(row(float_ops=2))  # softmax and norms differ in their last bits


def test_a_float_file_may_differ_in_its_last_bits_only():
    assert not arm_apply.agrees(row(integer_ops=0, float_ops=9))
    assert arm_apply.agrees(row(integer_ops=0, float_ops=9, largest_difference=1e-6))


def test_openvinos_own_forms_may_differ_by_a_few_steps():
    openvino = {"runtime": "openvino", "float_as": None}
    assert arm_apply.agrees(row(**openvino))
    assert not arm_apply.agrees(row(**openvino, largest_difference=0.1))
    assert not arm_apply.agrees(row(**openvino, integer_ops=0))
    assert arm_apply.agrees(row(**openvino | {"float_as": "f16"}, integer_ops=0))


def operators(**microseconds):
    return [OperatorTime(name, name.rstrip("_"), False, time) for name, time in microseconds.items()]


def test_where_products_take_half_the_time_a_file_can_at_most_be_twice_as_fast():
    ours = operators(QLinearConv=40.0, QGemm=10.0, QLinearAdd=30.0, QLinearAdd_=10.0, Softmax=10.0)
    assert share_of_products(ours) == pytest.approx(0.5)
    assert largest_others(ours, 1) == {"QLinearAdd": pytest.approx(0.4)}
    # 1.2 times faster already, half of the rest for nothing; the other file's products are 40 % of its time.
    assert bound(1.2, 0.5, 0.4) == pytest.approx(2.5)
    assert bound(1.4, 0.5, 0.4) == pytest.approx(2.8)


def test_each_operator_counts_with_its_fastest_turn():
    turns = [operators(Conv=5.0, Add=1.0), operators(Conv=4.0, Add=2.0)]
    assert [one.microseconds for one in fastest(turns)] == [4.0, 1.0]


def answer(speedup, low, high):
    return {"speedup": speedup, "speedup_low": low, "speedup_high": high}


def test_a_verdict_is_right_on_the_measured_side_or_around_1_where_no_side_was_measured():
    assert verdict.is_right(answer(1.1, 0.9, 1.3), "faster")
    assert not verdict.is_right(answer(1.1, 0.9, 1.3), "slower")
    assert verdict.is_right(answer(1.1, 0.9, 1.3), "same")
    assert not verdict.is_right(answer(1.5, 1.2, 1.8), "not told apart")
    assert not verdict.is_right(answer(None, None, None), "faster")


def test_errors_of_verdicts_are_over_those_that_were_known():
    known = {"foretold": 2.0, "right": True, "error": 0.25, "inside": True}
    unknown = {"foretold": None, "right": False, "error": None, "inside": None}
    found = verdict.summary([{"seconds": 9.0, "int8": known}, {"seconds": 30.0, "int8": unknown}])
    assert (found["networks"], found["int8_right"], found["longest_seconds"]) == (2, 1, 30.0)
    assert found["int8"] == {"known": 1, "median_error": 0.25, "largest_error": 0.25, "inside": 1}
