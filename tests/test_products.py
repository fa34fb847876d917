"""In: linear layers, heads and attention. Out: proof that their fast forms change no bit, and come where they pay."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from hirelc_deploy.compress.integer import calibration, products, qat, quantize, signed
from hirelc_deploy.compress.onnx_file.export import layer_of_node
from hirelc_deploy.inputs import models  # noqa: F401  (makes timm importable beside a CPU torch)
from hirelc_deploy.measure.backend import Precision
from tests.test_quantize import images, kernels, run, write

U8S8 = Precision("int8", "uint8", "int8", 8)
SEVEN_BITS = Precision("int8", "uint8", "int8", 7)


def transformer(side):
    """One with side * side + 1 tokens of two heads with 8 features each."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=16, patch_size=16 // side, num_classes=5, embed_dim=16, depth=1, num_heads=2)


@pytest.fixture(scope="module")
def many_tokens(tmp_path_factory):
    torch.manual_seed(0)
    return write(transformer(16), tmp_path_factory.mktemp("many"))


@pytest.fixture(scope="module")
def few_tokens(tmp_path_factory):
    torch.manual_seed(0)
    return write(transformer(4), tmp_path_factory.mktemp("few"))


def built(files, out, target=U8S8, pattern="all-softmax-add"):
    ranges = calibration.calibrate(files[0], [images(16)], "minmax")
    quantize.quantize(files[1], out, ranges, lambda _: "int8", target=target, pattern=pattern)
    return onnx.load(str(out))


def without(monkeypatch, *steps):
    """Switch some of the rewritings off."""
    for module, name in steps:
        monkeypatch.setattr(module, name, lambda *_: 0)


EVERY_STEP = (
    (products, "use_convolutions"),
    (products, "use_two_turns"),
    (signed, "use_signed_operands"),
)


@pytest.mark.parametrize("which", ["many_tokens", "few_tokens"])
def test_no_bit_of_an_answer_changes(request, tmp_path, monkeypatch, which):
    files = request.getfixturevalue(which)
    new = built(files, tmp_path / "new.onnx")
    without(monkeypatch, *EVERY_STEP)
    old = built(files, tmp_path / "old.onnx")
    assert new != old
    np.testing.assert_array_equal(run(tmp_path / "new.onnx", images(5)), run(tmp_path / "old.onnx", images(5)))


def test_layers_that_write_bytes_run_as_convolutions_and_others_as_gemm(many_tokens, tmp_path):
    built(many_tokens, tmp_path / "new.onnx")
    ran = kernels(tmp_path / "new.onnx", tmp_path)
    assert ran["QLinearConv"] == 2  # the patches, and queries, keys and values
    assert ran["QGemm"] == 4  # into sums, into Gelu, and the logits


def test_layers_keep_their_names(many_tokens, tmp_path, monkeypatch):
    new = built(many_tokens, tmp_path / "new.onnx")
    without(monkeypatch, *EVERY_STEP)
    old = built(many_tokens, tmp_path / "old.onnx")
    assert sorted(layer_of_node(new).values()) == sorted(layer_of_node(old).values())


def test_an_attention_of_many_tokens_multiplies_by_signed_bytes(many_tokens, few_tokens, tmp_path):
    for files, count in ((many_tokens, 2), (few_tokens, 0)):
        proto = built(files, tmp_path / "one.onnx")
        assert sum(node.name.endswith(":signed/Cast") for node in proto.graph.node) == count
        ran = kernels(tmp_path / "one.onnx", tmp_path)
        assert ran["MatMulIntegerToFloat"] + ran["QLinearMatMul"] == 2  # still integer
        assert ran["Cast"] == count


def test_without_vnni_nothing_is_signed(many_tokens, tmp_path):
    proto = built(many_tokens, tmp_path / "one.onnx", SEVEN_BITS)
    assert not any("signed" in node.name for node in proto.graph.node)


def test_quantisation_aware_training_sees_no_rounding_in_the_turn_to_signed_bytes(many_tokens, tmp_path):
    proto = built(many_tokens, tmp_path / "one.onnx")
    assert any("signed" in node.name for node in proto.graph.node)
    assert not any("signed" in tensor for tensor in qat.grids_of(proto))


def turned(shape, perm):
    """Return a file with one Transpose, and how many it has after `use_two_turns`."""
    after = [shape[axis] for axis in perm]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", shape), ("y", after))]
    node = helper.make_node("Transpose", ["x"], ["y"], "turn", perm=perm)
    proto = helper.make_model(
        helper.make_graph([node], "g", ends[:1], ends[1:]), opset_imports=[helper.make_opsetid("", 20)]
    )
    products.use_two_turns(proto, lambda node: True)
    onnx.checker.check_model(proto, full_check=True)
    return proto, sum(node.op_type == "Transpose" for node in proto.graph.node)


@pytest.mark.parametrize(
    ("shape", "perm", "count"),
    [
        ((2, 49, 3, 32), (0, 2, 1, 3), 2),  # heads apart
        ((2, 3, 49, 32), (0, 2, 1, 3), 2),  # heads together
        ((2, 49, 3, 4, 16), (2, 0, 3, 1, 4), 2),  # queries, keys and values at once
        ((5, 7, 9), (1, 0, 2), 2),
        ((2, 49, 3, 64), (0, 2, 1, 3), 1),  # long enough to be moved as they are
        ((2, 49, 3, 32), (0, 2, 3, 1), 1),  # rows and columns already
        ((2, 49, 3, 32), (1, 0, 2, 3), 1),  # all but the outermost stays together
    ],
)
def test_two_turns_are_one(shape, perm, count):
    proto, found = turned(shape, perm)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    np.testing.assert_array_equal(ReferenceEvaluator(proto).run(None, {"x": x})[0], x.transpose(perm))
    assert found == count


def test_a_layer_of_few_rows_or_of_unknown_weights_stays_a_gemm(tmp_path):
    torch.manual_seed(0)
    _, static = write(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8)), tmp_path)
    proto = onnx.load(str(static))
    products.use_convolutions(proto, lambda node: True)
    assert [node.op_type for node in proto.graph.node] == ["Flatten", "Gemm"]
