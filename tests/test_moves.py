"""In: small networks that put tokens in another order. Out: proof that one Gather does it, and only what it may do."""

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from hirelc_deploy.compress.integer import calibration, quantize
from hirelc_deploy.compress.onnx_file import rewrite
from hirelc_deploy.inputs import models  # noqa: F401  (makes timm importable beside a CPU torch)
from hirelc_deploy.measure.backend import Precision
from tests.test_quantize import images, kernels, run, write

U8S8 = Precision("int8", "uint8", "int8", 8)
SIDE, FEATURES = 16, 8


class Windows(nn.Module):
    """Norm, a roll, windows of 4 x 4, a linear layer, and all the way back to be added: a block of Swin.

    Args:
        pad: Rows and columns by which the picture is padded before it is cut into windows.
    """

    def __init__(self, roll=1, pad=0):
        super().__init__()
        self.roll, self.pad = roll, pad
        self.stem = nn.Conv2d(3, FEATURES, 1)
        self.norm, self.linear = nn.LayerNorm(FEATURES), nn.Linear(FEATURES, FEATURES)
        self.fc = nn.Linear(FEATURES, 4)

    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        y = torch.roll(self.norm(x), (-self.roll, -self.roll), (1, 2)) if self.roll else self.norm(x)
        y = nn.functional.pad(y, (0, 0, 0, self.pad, 0, self.pad))
        side = SIDE + self.pad
        y = y.reshape(-1, side // 4, 4, side // 4, 4, FEATURES).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, FEATURES)
        y = self.linear(y).reshape(-1, side // 4, side // 4, 4, 4, FEATURES).permute(0, 1, 3, 2, 4, 5)
        y = y.reshape(-1, side, side, FEATURES)[:, :SIDE, :SIDE]
        y = torch.roll(y, (self.roll, self.roll), (1, 2)) if self.roll else y
        return self.fc((x + y).mean((1, 2)))


class Unfolded(nn.Module):
    """A convolution, a linear layer on every fourth pixel at a time, a convolution: what MobileViT does."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, FEATURES, 3, padding=1), nn.Conv2d(FEATURES, FEATURES, 1)
        self.norm, self.linear = nn.LayerNorm(FEATURES), nn.Linear(FEATURES, FEATURES)
        self.fc = nn.Linear(FEATURES, 4)

    def forward(self, x):
        half = SIDE // 2
        x = self.stem(x).reshape(-1, 2, half, 2).transpose(1, 2)
        x = x.reshape(-1, FEATURES, half * half, 4).transpose(1, 3).reshape(-1, half * half, FEATURES)
        x = self.linear(self.norm(x)).reshape(-1, 4, half * half, FEATURES)
        x = x.transpose(1, 3).reshape(-1, half, 2, 2).transpose(1, 2).reshape(-1, FEATURES, SIDE, SIDE)
        return self.fc(self.last(x).mean((2, 3)))


class Shuffled(nn.Module):
    """Two convolutions with a shuffle of channels between: whole rows of pixels move, but no token."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, FEATURES, 1), nn.Conv2d(FEATURES, FEATURES, 1, groups=2)
        self.fc = nn.Linear(FEATURES, 4)

    def forward(self, x):
        x = self.first(x).reshape(-1, 2, FEATURES // 2, SIDE, SIDE).transpose(1, 2).reshape(-1, FEATURES, SIDE, SIDE)
        return self.fc(self.second(x).mean((2, 3)))


def operators(proto):
    return Counter(node.op_type for node in proto.graph.node)


def rewritten(model, folder):
    """Return the static file, the rewritten one and its graph."""
    torch.manual_seed(0)
    _, static = write(model, folder)
    proto = onnx.load(str(static))
    rewrite.rewrite(proto)
    onnx.checker.check_model(proto)
    (folder / "rewritten.onnx").write_bytes(proto.SerializeToString())
    return static, folder / "rewritten.onnx", proto


@pytest.mark.parametrize("model", [Windows(roll=1), Windows(roll=0), Windows(roll=1, pad=4), Unfolded(), Shuffled()])
def test_answers_stay_as_they_are(tmp_path, model):
    static, new, _ = rewritten(model, tmp_path)
    np.testing.assert_allclose(run(new, images(3)), run(static, images(3)), rtol=1e-5, atol=1e-6)


def test_rolling_and_cutting_into_windows_is_one_gather_each_way(tmp_path):
    static, _, proto = rewritten(Windows(roll=1), tmp_path)
    before, after = operators(onnx.load(str(static))), operators(proto)
    assert (before["Slice"], before["Concat"]) == (10, 4)
    assert (after["Gather"], after["Slice"], after["Concat"]) == (2, 0, 0)


def test_a_padding_by_nothing_and_a_slice_of_everything_go(tmp_path):
    _, _, proto = rewritten(Windows(roll=0), tmp_path)
    assert operators(proto)["Pad"] == operators(proto)["Slice"] == 0


def test_values_that_a_padding_adds_are_no_tokens(tmp_path):
    _, _, proto = rewritten(Windows(roll=1, pad=4), tmp_path)
    assert operators(proto)["Pad"] == 1


def test_a_picture_becomes_tokens_and_a_picture_again(tmp_path):
    _, _, proto = rewritten(Unfolded(), tmp_path)
    perms = [
        onnx.helper.get_attribute_value(node.attribute[0]) for node in proto.graph.node if node.op_type == "Transpose"
    ]
    assert (operators(proto)["Gather"], perms) == (2, [[0, 2, 3, 1], [0, 3, 1, 2]])


def test_between_convolutions_nothing_changes(tmp_path):
    static, _, proto = rewritten(Shuffled(), tmp_path)
    assert operators(proto) == operators(onnx.load(str(static)))


@pytest.mark.parametrize("pattern", ["all-softmax-add", "weights+add"])
def test_an_integer_file_gathers_what_is_rounded_already(tmp_path, pattern):
    torch.manual_seed(0)
    dynamic, static = write(Windows(roll=1), tmp_path)
    ranges = calibration.calibrate(dynamic, [images(16)], "minmax")
    out = tmp_path / "integer.onnx"
    quantize.quantize(static, out, ranges, lambda _: "int8", target=U8S8, pattern=pattern)
    ran = kernels(out, tmp_path)
    assert ran["Gather"] == 2
    # The logits, and the layer between; that one as a convolution where it hands on bytes.
    assert (ran["QGemm"], ran["QLinearConv"]) == ((1, 2) if pattern == "all-softmax-add" else (2, 1))
    graph = onnx.load(str(tmp_path / "rewritten.onnx")).graph
    makers = {tensor: node.op_type for node in graph.node for tensor in node.output}
    first = next(node for node in graph.node if node.op_type == "Gather")
    rounded = "QuantizeLinear" if pattern == "all-softmax-add" else "LayerNormalization"
    assert makers[first.input[0]] == rounded
    np.testing.assert_allclose(run(out, images(8)), run(static, images(8)), atol=0.05)
