"""Aligned ranges: float32 and ARM's fixed point round every sum of two bytes alike; all of them are tried."""

from __future__ import annotations

import math
import platform

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from hirelc_deploy.compress.integer.sums import GRID, MOST_RATIO, align_sums

BYTES = np.arange(256, dtype=np.int64)
RESNET56 = (0.000554415222723037, 132, 0.0024033254012465477, 0, 0.002353743417188525, 0)
"""Scales and zero points of a sum in a ResNet-56 of which 173 and 40 make 50.4999990: 50 on x86, 51 on ARM."""


def fixed_point(a: float, za: int, b: float, zb: int, c: float, zc: int) -> NDArray[np.int64]:
    """Return (256, 256) sums as MLAS computes them with NEON: multipliers of 22 bits, halves away from zero."""
    ratios = np.float32(a) / np.float32(c), np.float32(b) / np.float32(c)
    shift = 21 - math.floor(math.log2(max(ratios)))
    multipliers = [round(float(ratio) * 2**shift) for ratio in ratios]
    total = (BYTES - za)[:, None] * multipliers[0] + (BYTES - zb)[None] * multipliers[1]
    rounded = np.sign(total) * ((np.abs(total) + (1 << (shift - 1))) >> shift)
    return np.clip(rounded + zc, 0, 255)


def in_runtime(a: float, za: int, b: float, zb: int, c: float, zc: int) -> NDArray[np.int64]:
    """Return (256, 256) sums as ONNX Runtime computes them on this machine."""
    names = ("as", "az", "bs", "bz", "cs", "cz")
    values = [kind(value) for value, kind in zip((a, za, b, zb, c, zc), 3 * (np.float32, np.uint8), strict=True)]
    node = helper.make_node("QLinearAdd", ["a", "as", "az", "b", "bs", "bz", "cs", "cz"], ["y"], domain="com.microsoft")
    ends = [helper.make_tensor_value_info(name, TensorProto.UINT8, [256, 256]) for name in ("a", "b", "y")]
    constants = [numpy_helper.from_array(np.asarray(v), n) for n, v in zip(names, values, strict=True)]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "sum", ends[:2], ends[2:], constants)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    rows, columns = np.meshgrid(BYTES, BYTES, indexing="ij")
    found = session.run(None, {"a": rows.astype(np.uint8), "b": columns.astype(np.uint8)})[0]
    return np.asarray(found, np.int64)


def network(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    return helper.make_model(helper.make_graph(list(nodes), "net", [], []))


def node(operator: str, inputs: str, output: str) -> onnx.NodeProto:
    return helper.make_node(operator, inputs.split(), [output], output)


def scale(ends: tuple[float, float]) -> float:
    return (max(ends[1], 0.0) - min(ends[0], 0.0)) / 255


@pytest.mark.skipif(platform.machine() != "x86_64", reason="on ARM both are the same arithmetic")
def test_unaligned_scales_round_some_sums_in_two_ways() -> None:
    here, arm = in_runtime(*RESNET56), fixed_point(*RESNET56)
    assert (here[173, 40], arm[173, 40]) == (50, 51)
    assert np.abs(here - arm).max() == 1
    assert 0 < (here != arm).sum() < 10  # of 65,536


@pytest.mark.parametrize("seed", range(12))
def test_aligned_scales_round_every_sum_alike(seed: int) -> None:
    rng = np.random.default_rng(seed)
    low, high = -rng.uniform(0, 3, 3), rng.uniform(0.5, 3, 3)
    ranges = {name: (low[at], high[at]) for at, name in enumerate("xyz")}
    aligned = align_sums(network(node("Add", "x y", "z")), ranges, {"z"})
    parts = []
    for name in "xyz":
        step = float(np.float32(scale(aligned[name])))
        parts += [step, round(-aligned[name][0] / step)]
    assert max(parts[0], parts[2]) <= MOST_RATIO * parts[4]
    np.testing.assert_array_equal(in_runtime(*parts), fixed_point(*parts))


def test_a_chain_of_sums_is_on_the_grid_and_hardly_wider() -> None:
    rng = np.random.default_rng(0)
    nodes, ranges = [], {"s0": (0.0, 2.0)}
    for at in range(27):  # as in ResNet-56: each block's result is read by the next block's sum
        nodes += [
            node("Conv", f"s{at}", f"c{at}"),
            node("Add", f"c{at} s{at}", f"a{at}"),
            node("Relu", f"a{at}", f"s{at + 1}"),
        ]
        ranges |= {
            f"c{at}": (-rng.uniform(0.5, 2), rng.uniform(0.5, 2)),
            f"a{at}": (-1.0, 9.0),
            f"s{at + 1}": (0.0, rng.uniform(1, 4)),
        }
    found = align_sums(network(*nodes), ranges, {one.name for one in nodes})
    for at in range(27):
        for name in (f"c{at}", f"s{at}"):
            multiple = GRID * scale(found[name]) / scale(found[f"s{at + 1}"])
            assert multiple == pytest.approx(round(multiple), abs=1e-6)
            assert (
                1
                <= scale(found[name]) / scale(ranges[name])
                <= 1 + 1.01 / (GRID * scale(ranges[name]) / scale(found[f"s{at + 1}"]))
            )
    assert found["s27"] == ranges["s27"]


def test_a_range_is_widened_where_its_scale_is_made() -> None:
    nodes = (node("MaxPool", "x", "p"), node("Add", "p y", "z"))
    ranges = {"x": (-1.0, 1.0), "p": (-1.0, 1.0), "y": (-1.0, 1.3), "z": (-2.0, 2.2)}
    found = align_sums(network(*nodes), ranges, {"p", "z"})
    assert found["p"] == ranges["p"]
    assert found["x"] != ranges["x"]
    assert align_sums(network(*nodes), ranges, {"z"})["x"] == ranges["x"]


def test_what_a_clip_writes_and_float_sums_stay() -> None:
    nodes = (node("Clip", "x", "k"), node("Add", "k k", "z"))
    ranges = {"x": (-1.0, 7.0), "k": (0.0, 6.0), "z": (0.0, 11.0)}
    assert align_sums(network(*nodes), ranges, {"k", "z"}) == ranges
    assert align_sums(network(node("Add", "x k", "z")), ranges, set()) == ranges
