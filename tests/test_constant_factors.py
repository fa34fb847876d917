"""In: small Q/DQ files. Out: proof that a constant factor goes into a scale, and that nothing else does."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from hirelc_deploy.compress.onnx_file.constant_factors import absorb


def rounded_twice(factor):
    """x -> Q -> DQ -> * factor -> Q -> DQ -> Relu."""
    values = {"s": 0.1, "t": 0.1 * abs(float(np.max(factor)))}
    constants = [numpy_helper.from_array(np.float32(value), name) for name, value in values.items()]
    constants += [
        numpy_helper.from_array(np.uint8(100), "z"),
        numpy_helper.from_array(np.array(factor, np.float32), "c"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["a"]),
        helper.make_node("DequantizeLinear", ["a", "s", "z"], ["b"]),
        helper.make_node("Mul", ["b", "c"], ["d"], "product"),
        helper.make_node("QuantizeLinear", ["d", "t", "z"], ["e"]),
        helper.make_node("DequantizeLinear", ["e", "t", "z"], ["f"]),
        helper.make_node("Relu", ["f"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 8])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def run(proto):
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    return ReferenceEvaluator(proto).run(None, {"x": x})[0]


def test_a_constant_factor_becomes_part_of_a_scale():
    proto = rounded_twice(0.25)
    wanted = run(proto)
    assert absorb(proto) == 1
    onnx.checker.check_model(proto)
    assert [node.op_type for node in proto.graph.node] == ["QuantizeLinear", "DequantizeLinear", "Relu"]
    np.testing.assert_allclose(run(proto), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factor", [-0.25, 0.0, [0.25] * 8])
def test_factors_that_no_scale_can_take_stay(factor):
    proto = rounded_twice(factor)
    if not np.any(factor):
        proto.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.float32(1), "t"))
    before = proto.SerializeToString()
    assert absorb(proto) == 0
    assert proto.SerializeToString() == before
