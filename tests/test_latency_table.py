"""The latency table on the fake device, and its one-layer files on ONNX Runtime. No test looks at a duration."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hirelc_backends.onnxruntime_cpu import OnnxRuntimeCpu

from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.model_graph import LayerShape
from hirelc_deploy.measure.backend import OperatorTime, only
from hirelc_deploy.measure.table import LatencyTable, LayerKey, _counts, calibrate, layer_model
from hirelc_deploy.testing.fake_backend import FakeBackend

CONV = LayerShape("conv", 64, (8, 8), (3, 3), (1, 1), (1, 1), activation="relu")
DEPTHWISE = LayerShape("conv", 16, (8, 8), (3, 3), (2, 2), (1, 1), depthwise=True, activation="relu6")
LINEAR = LayerShape("linear", 17, (1, 17), activation="gelu")
ATTENTION = LayerShape("attention", 17, (1, 17), head_dim=8)
PRECISIONS = {precision.name: precision for precision in OnnxRuntimeCpu().precisions()}


def operators(shape: LayerShape, inputs: int, outputs: int, precision: str, folder: Path) -> list[OperatorTime]:
    model, image_shape, _ = layer_model(LayerKey(shape, inputs, outputs, precision), PRECISIONS[precision])
    onnx.checker.check_model(model)
    path = folder / "layer.onnx"
    path.write_bytes(model.SerializeToString())
    return OnnxRuntimeCpu().build(path).profile(np.zeros(image_shape, np.float32), 2)


def counted(shape: LayerShape, inputs: int, outputs: int, precision: str, folder: Path) -> list[str]:
    found = operators(shape, inputs, outputs, precision, folder)
    return [operator.operator for operator in found if _counts(operator, shape.kind)]


@pytest.mark.parametrize("activation", ["", "relu", "relu6"])
@pytest.mark.parametrize("shape", [CONV, DEPTHWISE])
def test_an_integer_convolution_is_timed_as_one_integer_kernel(
    shape: LayerShape, activation: str, tmp_path: Path
) -> None:
    assert counted(replace(shape, activation=activation), 16, 16, "int8", tmp_path) == ["QLinearConv"]


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize(("precision", "kernel"), [("int8", "QLinearConv"), ("float", "Conv")])
def test_convolutions_of_one_and_three_dims_are_timed_too(
    dims: int, precision: str, kernel: str, tmp_path: Path
) -> None:
    shape = LayerShape("conv", 4**dims, (4,) * dims, (3,) * dims, (1,) * dims, (1,) * dims, (1,) * dims)
    assert counted(shape, 8, 8, precision, tmp_path) == [kernel]


def test_layout_conversions_at_the_ends_of_a_float_convolution_do_not_count(tmp_path: Path) -> None:
    ran = [operator.operator for operator in operators(CONV, 32, 32, "float", tmp_path)]
    (kernel,) = counted(CONV, 32, 32, "float", tmp_path)
    assert kernel in ("Conv", "FusedConv")
    assert len(ran) == 2 or {"ReorderInput", "ReorderOutput"} <= set(ran)


def test_an_integer_linear_layer_pays_for_rounding_its_input_and_for_a_float_activation(tmp_path: Path) -> None:
    assert counted(LINEAR, 32, 64, "int8", tmp_path) == ["QuantizeLinear", "QGemm", "Gelu"]


def test_an_activation_without_an_integer_kernel_is_paid_with_its_conversions(tmp_path: Path) -> None:
    found = counted(replace(CONV, activation="silu"), 16, 16, "int8", tmp_path)
    assert found[0] == "QLinearConv"
    assert found[-1] == "QuantizeLinear"
    assert "DequantizeLinear" in found
    assert {"Sigmoid", "Mul"} <= set(found) or "QuickGelu" in found


@pytest.mark.parametrize("activation", ["relu", "relu6", "gelu", "silu", "hardswish", ""])
@pytest.mark.parametrize("precision", ["float", "int8"])
def test_every_activation_can_be_timed(activation: str, precision: str, tmp_path: Path) -> None:
    for shape in (CONV, LINEAR):
        assert counted(replace(shape, activation=activation), 8, 8, precision, tmp_path)


def test_a_layer_model_computes_the_layer(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    model, image_shape, macs = layer_model(LayerKey(ATTENTION, 2, 2, "float"), PRECISIONS["float"])
    path = tmp_path / "attention.onnx"
    path.write_bytes(model.SerializeToString())
    qkv = rng.standard_normal(image_shape).astype(np.float32)  # the file's first node turns the sign
    assert image_shape == (17, 3 * 2 * 8)
    assert macs == 2 * 2 * 17 * 17 * 8
    query, keys, value = qkv.reshape(17, 3, 2, 8).transpose(1, 2, 0, 3)
    scores = np.exp(query @ keys.transpose(0, 2, 1) / np.sqrt(8))
    mixed = (scores / scores.sum(-1, keepdims=True)) @ value
    expected = mixed.transpose(1, 0, 2).reshape(17, 16)
    # A file of fixed size 17 takes these 17 rows at once.
    np.testing.assert_allclose(only(OnnxRuntimeCpu().build(path).infer(-qkv)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "inputs", "outputs", "macs"),
    [
        (CONV, 8, 16, 64 * 16 * 8 * 9),
        (DEPTHWISE, 16, 16, 16 * 16 * 9),
        (replace(CONV, groups=2), 8, 16, 64 * 16 * 4 * 9),
        (LINEAR, 8, 16, 17 * 8 * 16),
    ],
)
def test_output_sizes_and_macs_are_those_of_the_shape(shape: LayerShape, inputs: int, outputs: int, macs: int) -> None:
    model, image_shape, counted_macs = layer_model(LayerKey(shape, inputs, outputs, "float"), PRECISIONS["float"])
    assert counted_macs == macs
    inferred = onnx.shape_inference.infer_shapes(model)
    output = [d.dim_value for d in inferred.graph.output[0].type.tensor_type.shape.dim]
    if shape.kind == "conv":
        assert image_shape == (1, inputs, *shape.input_size)
        assert output[:2] == [1, outputs]
        assert output[2] * output[3] == shape.positions
    else:
        assert output == [shape.positions, outputs]


def test_equal_layers_are_measured_once_ever(tmp_path: Path) -> None:
    path = tmp_path / "tables" / "fake.jsonl"
    first = LatencyTable(FakeBackend(), path)
    times = [first.layer_ms(CONV, 16, 16, "float") for _ in range(3)]
    assert len(set(times)) == 1
    assert first.measured == 1
    again = LatencyTable(FakeBackend(), path)
    assert again.layer_ms(CONV, 16, 16, "float") == times[0]
    assert again.measured == 0
    assert again.layer_ms(CONV, 16, 32, "float") > times[0]
    assert again.measured == 1
    assert len(path.read_text().splitlines()) == 2


def test_attention_is_the_same_float_work_in_every_precision() -> None:
    table = LatencyTable(FakeBackend(), None)
    assert table.layer_ms(ATTENTION, 2, 2, "int8") == table.layer_ms(ATTENTION, 2, 2, "float")
    assert table.measured == 1


def test_other_machines_and_thread_counts_have_their_own_entries(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    LatencyTable(FakeBackend(), path).layer_ms(CONV, 16, 16, "float")
    other = json.loads(path.read_text())
    other.update(machine="ffffffffffff", ms=123.0)
    path.write_text(json.dumps(other) + "\n")
    table = LatencyTable(FakeBackend(), path)
    assert table.layer_ms(CONV, 16, 16, "float") != 123.0
    threaded = LatencyTable(FakeBackend(), path, threads=2)
    threaded.layer_ms(CONV, 16, 16, "float")
    assert (table.measured, threaded.measured) == (1, 1)


def test_a_table_cut_off_while_writing_is_read_and_continued(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    LatencyTable(FakeBackend(), path).layer_ms(CONV, 16, 16, "float")
    whole = path.read_text()
    path.write_text(whole + whole[: len(whole) // 2])
    table = LatencyTable(FakeBackend(), path)
    table.layer_ms(CONV, 16, 16, "float")
    assert table.measured == 0
    table.layer_ms(CONV, 32, 32, "float")
    again = LatencyTable(FakeBackend(), path)
    again.layer_ms(CONV, 32, 32, "float")
    assert again.measured == 0


def test_many_layers_are_measured_with_progress() -> None:
    table, seen = LatencyTable(FakeBackend(), None), []
    keys = [LayerKey(CONV, 16, width, "int8") for width in (16, 32, 64)]
    times = table.measure_many(keys, lambda done, most: seen.append((done, most)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert times == [table.layer_ms(CONV, 16, width, "int8") for width in (16, 32, 64)]


def test_what_cannot_be_timed_is_refused_in_words(tmp_path: Path) -> None:
    table = LatencyTable(FakeBackend(), None)
    with pytest.raises(InputError, match=r"int4.*float, int8"):
        table.layer_ms(CONV, 16, 16, "int4")
    with pytest.raises(InputError, match="'pool'"):
        table.layer_ms(LayerShape("pool", 4), 16, 16, "float")
    with pytest.raises(InputError, match="at least 1"):
        table.layer_ms(CONV, 0, 16, "float")
    with pytest.raises(InputError, match="do not divide into 4 groups"):
        table.layer_ms(replace(CONV, groups=4), 18, 16, "float")
    with pytest.raises(InputError, match="head_dim"):
        table.layer_ms(replace(ATTENTION, head_dim=0), 2, 2, "float")
    with pytest.raises(InputError, match="'swiglu'"):
        table.layer_ms(replace(LINEAR, activation="swiglu"), 16, 16, "float")
    with pytest.raises(InputError, match="cannot be read"):
        LatencyTable(FakeBackend(), tmp_path)


def test_calibration_finds_the_line_the_points_lie_on() -> None:
    assert calibrate([1.0, 2.0, 5.0], [2.5, 4.5, 10.5]) == pytest.approx((0.5, 2.0))


def test_calibration_is_never_negative() -> None:
    fixed, scale = calibrate([1.0, 2.0], [1.0, 3.0])  # the line through them starts at -1
    assert fixed == 0.0
    assert 1.0 < scale < 1.5
    fixed, scale = calibrate([1.0, 2.0], [3.0, 1.0])
    assert scale == 0.0
    assert 1.0 < fixed < 3.0


def test_calibration_with_one_pair_or_equal_predictions_is_a_factor() -> None:
    assert calibrate([2.0], [3.0]) == pytest.approx((0.0, 1.5))
    assert calibrate([2.0, 2.0], [3.0, 3.0]) == pytest.approx((0.0, 1.5))


def test_calibration_equals_a_fine_grid_search() -> None:
    rng = np.random.default_rng(0)
    predicted = rng.uniform(0.5, 5.0, 6)
    measured = (0.4 + 1.3 * predicted) * rng.uniform(0.9, 1.1, 6)
    fixed, scale = calibrate(predicted.tolist(), measured.tolist())

    def error(a: float, c: float) -> float:
        return float((((a + c * predicted) / measured - 1) ** 2).sum())

    grid = min(error(a, c) for a in np.linspace(0, 1, 101) for c in np.linspace(0.8, 1.8, 101))
    assert error(fixed, scale) <= grid + 1e-12


@pytest.mark.parametrize(("predicted", "measured"), [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0]), ([1.0], [-1.0])])
def test_calibration_refuses_what_is_not_a_pair_of_times(predicted: list[float], measured: list[float]) -> None:
    with pytest.raises(InputError, match="calibrate"):
        calibrate(predicted, measured)
