"""In: small float files. Out: proof that rewriting changes no answer, and that what it promises is what runs."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from hirelc_deploy.compress.integer import calibration, quantize
from hirelc_deploy.compress.onnx_file import export, rewrite
from hirelc_deploy.inputs import models  # noqa: F401  (makes timm importable beside a CPU torch)
from hirelc_deploy.measure.backend import Precision
from tests.test_quantize import images, kernels, run, write

U8S8 = Precision("int8", "uint8", "int8", 8)


class Silu(nn.Module):
    """Two convolutions with SiLU behind them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = nn.functional.silu(self.first(x))
        return self.fc(nn.functional.silu(self.second(x)).mean((2, 3)))


def tokens():
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=16, patch_size=8, num_classes=5, embed_dim=32, depth=2, num_heads=2)


@pytest.fixture(scope="module", params=[Silu, tokens], ids=["silu", "tokens"])
def files(request, tmp_path_factory):
    torch.manual_seed(0)
    return write(request.param(), tmp_path_factory.mktemp("files"))


def built(files, out, pattern="weights"):
    ranges = calibration.calibrate(files[0], [images(16)], "minmax")
    quantize.quantize(files[1], out, ranges, lambda _: "int8", target=U8S8, pattern=pattern)
    return out


@pytest.mark.parametrize("change", [rewrite.rewrite, rewrite.pad_stem], ids=["rewrite", "pad_stem"])
def test_a_rewritten_file_computes_the_same(files, tmp_path, change):
    proto = onnx.load(str(files[1]))
    change(proto)
    onnx.checker.check_model(proto, full_check=False)
    (tmp_path / "rewritten.onnx").write_bytes(proto.SerializeToString())
    wanted = run(files[1], images(3))
    np.testing.assert_allclose(run(tmp_path / "rewritten.onnx", images(3)), wanted, rtol=1e-4, atol=1e-5)


def test_layers_keep_their_names(files):
    proto = onnx.load(str(files[1]))
    before = list(export.layer_of_node(proto).values())
    rewrite.rewrite(proto)
    rewrite.pad_stem(proto)
    assert list(export.layer_of_node(proto).values()) == before


def test_a_channel_of_zeros_changes_no_bit(files, tmp_path, monkeypatch):
    padded = built(files, tmp_path / "padded.onnx")
    assert kernels(padded, tmp_path)["Pad"] == 1
    monkeypatch.setattr(rewrite, "pad_stem", lambda proto: None)
    plain = built(files, tmp_path / "plain.onnx")
    assert kernels(plain, tmp_path)["Pad"] == 0
    np.testing.assert_array_equal(run(padded, images(4)), run(plain, images(4)))


def test_the_image_is_rounded_before_it_is_padded(files, tmp_path):
    nodes = onnx.load(str(built(files, tmp_path / "q.onnx"))).graph.node
    moved = [node.op_type for node in nodes if node.op_type in ("QuantizeLinear", "Pad")]
    assert moved[:2] == ["QuantizeLinear", "Pad"]


@pytest.mark.parametrize("files", [Silu], ids=["silu"], indirect=True)
def test_silu_between_integer_layers_is_one_operator(files, tmp_path):
    found = kernels(built(files, tmp_path / "q.onnx"), tmp_path)
    assert found["QuickGelu"] == 2
    assert found["Sigmoid"] == found["Mul"] == 0


@pytest.mark.parametrize("files", [tokens], ids=["tokens"], indirect=True)
def test_tokens_pass_norms_and_additions_without_being_reshaped(files, tmp_path):
    found = kernels(built(files, tmp_path / "q.onnx"), tmp_path)
    plain = kernels(built(files, tmp_path / "all.onnx", "all"), tmp_path)
    assert found["SkipLayerNormalization"] == 0
    assert found["Reshape"] < plain["Reshape"] / 2
    assert found["QGemm"] == 9


def test_gelu_between_layers_may_be_a_sigmoid_with_its_slope_in_the_weights(tmp_path):
    torch.manual_seed(0)
    model = tokens()
    files = write(model, tmp_path)
    proto = onnx.load(str(files[1]))
    rewrite.rewrite(proto)
    export.give_each_layer_its_own_constants(proto)
    factors = rewrite.use_sigmoid_gelu(proto)
    assert list(factors.values()) == [rewrite.GELU_SLOPE] * 4  # before and behind, two blocks
    (tmp_path / "rewritten.onnx").write_bytes(proto.SerializeToString())
    found = kernels(tmp_path / "rewritten.onnx", tmp_path)
    assert (found["QuickGelu"], found["Gelu"]) == (2, 0)
    for block in model.blocks:
        block.mlp.act.forward = lambda x: x * torch.sigmoid(rewrite.GELU_SLOPE * x)
    wanted = model(torch.from_numpy(images(3))).detach().numpy()
    np.testing.assert_allclose(run(tmp_path / "rewritten.onnx", images(3)), wanted, rtol=1e-4, atol=1e-5)


def test_gelu_whose_input_something_else_reads_too_stays(tmp_path):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            x = self.first(x.mean(3).flatten(1)[:, :8])
            return self.fc(nn.functional.gelu(self.second(nn.functional.gelu(x) * x)))

    files = write(Gated(), tmp_path)
    proto = onnx.load(str(files[1]))
    export.give_each_layer_its_own_constants(proto)
    assert len(rewrite.use_sigmoid_gelu(proto)) == 2
    assert sum(node.op_type == "Gelu" for node in proto.graph.node) == 1


def test_an_integer_file_with_the_faster_gelu_knows_the_scaled_ranges(tmp_path):
    torch.manual_seed(0)
    files = write(tokens(), tmp_path)
    wanted = run(files[1], images(8))
    errors, steps = [], []
    for pattern, operator in (("weights", "Gelu"), ("weights+sigmoid-gelu", "QuickGelu")):
        path = built(files, tmp_path / "q.onnx", pattern)
        errors.append(np.abs(run(path, images(8)) - wanted).mean())
        proto = onnx.load(str(path))
        made = {node.output[0] for node in proto.graph.node if node.op_type == operator}
        scales = [n.input[1] for n in proto.graph.node if n.op_type == "QuantizeLinear" and n.input[0] in made]
        constants = {i.name: onnx.numpy_helper.to_array(i) for i in proto.graph.initializer}
        steps.append([float(constants[name]) for name in scales])
    assert errors[1] < 2 * errors[0]
    np.testing.assert_allclose(steps[1], rewrite.GELU_SLOPE * np.array(steps[0]), rtol=1e-5)
