"""Ranges and outliers of layers, pinned to numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto
from onnx_nets import model_of, node

from hirelc_deploy.compress.integer.calibration import Ranges, with_other
from hirelc_deploy.compress.integer.spread import ends_of, spread_of

WEIGHT = np.array([[1, 2, 30], [0, 0, 5]], np.float32).reshape(2, 3, 1, 1)


def net(side: int) -> ModelProto:
    nodes = [
        node("Conv", ["x", "weight"], ["a"], name="stem/Conv"),
        node("Relu", ["a"], ["b"], name="/Relu"),
        node("GlobalAveragePool", ["b"], ["c"], name="/Pool"),
        node("Flatten", ["c"], ["d"], name="/Flatten"),
        node("MatMul", ["d", "matrix"], ["e"], name="head/MatMul"),
        node("Add", ["e", "bias"], ["y"], name="head/Add"),
    ]
    tensors = {"weight": WEIGHT, "matrix": np.array([[1, 8], [2, 2]], np.float32), "bias": np.zeros(2, np.float32)}
    return model_of(nodes, tensors, image=("n", 3, side, side), opset=20)


def ranges(**ends: tuple[float, float]) -> Ranges:
    low, high = ({name: float(pair[end]) for name, pair in ends.items()} for end in (0, 1))
    return Ranges(low, high, "minmax", 1)


def test_a_layer_ends_behind_its_bias_and_its_relu() -> None:
    ends = ends_of(net(2))
    assert (ends["stem"].reads, ends["stem"].writes) == ("x", ("a", "b"))
    assert (ends["head"].reads, ends["head"].writes) == ("d", ("e", "y"))
    assert ends["stem"].weight.tolist() == [[1, 2, 30], [0, 0, 5]]
    assert ends["head"].weight.tolist() == [[1, 2], [8, 2]]


def test_wide_channels_clipped_values_and_wide_weights_are_counted() -> None:
    image = np.ones((1, 3, 2, 2), np.float32) * np.array([1, -2, 100], np.float32).reshape(3, 1, 1)
    found = spread_of(net(2), ranges(x=(0, 50), b=(0, 4000)), [image, image])
    reads, writes = found["stem"].reads, found["stem"].writes
    assert reads is not None
    assert writes is not None
    assert (reads.low, reads.high, reads.least, reads.largest) == (0, 50, -2, 100)
    assert reads.widest_channel == pytest.approx(50)
    assert reads.clipped == pytest.approx(2 / 3)  # channels 1 and 2
    assert (writes.least, writes.largest) == (500, 2997)
    assert (writes.clipped, writes.widest_channel) == (0, pytest.approx(2997 / ((2997 + 500) / 2)))
    assert found["stem"].widest_weight == 15  # 30 over 2; the other row has one weight that is not 0
    assert found["head"].reads is None, "calibration has no range of it"
    assert found["head"].widest_weight == pytest.approx(8 / 5)


def test_one_value_far_from_all_others_takes_most_of_the_range() -> None:
    rng = np.random.default_rng(0)
    image = rng.random((1, 3, 64, 64)).astype(np.float32)
    image[0, 1, 5, 7] = 10.0
    reads = spread_of(net(64), ranges(x=(0, 10)), [image])["stem"].reads
    assert reads is not None
    assert reads.tail_share == pytest.approx(0.9, abs=0.01)
    even = spread_of(net(64), ranges(x=(0, 10)), [np.minimum(image, 1)])["stem"].reads
    assert even is not None
    assert even.tail_share < 0.01


def test_ranges_of_another_method_are_taken_for_the_tensors_that_are_named() -> None:
    mixed = with_other(ranges(x=(0, 1), a=(-1, 1)), ranges(x=(0, 9), a=(-9, 9)), ["a", "unknown"])
    assert (mixed.low, mixed.high) == ({"x": 0.0, "a": -9.0}, {"x": 1.0, "a": 9.0})
