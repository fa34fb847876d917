"""In: small networks and their integer files. Out: proof that training sees the rounding that the file does."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from hirelc_deploy.compress.integer import calibration, qat, quantize
from hirelc_deploy.compress.onnx_file.export import export_onnx, open_session, set_static_batch
from hirelc_deploy.measure.backend import Precision

INT8 = Precision("int8", "uint8", "int8", 8)
IMAGES = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Normed and plain convolutions, a depthwise one, a module that is called twice, and a sum."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.narrow, self.act, self.gate = nn.Conv2d(8, 8, 1), nn.ReLU(inplace=True), nn.SiLU()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.act(self.norm(self.stem(x)))
        y = self.act(self.norm2(self.depthwise(x)))
        x = x + self.narrow(y)
        return self.fc(self.pool(self.gate(x)).flatten(1))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net().eval()
    for norm in (model.norm, model.norm2):  # an untrained norm changes nothing
        nn.init.uniform_(norm.weight, -2.0, 2.0)
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.2, 2.0)
    return model


def files(model: nn.Module, folder: Path, pattern: str, target: Precision = INT8, *, corrected: bool = False):
    """Return the float and the integer file of a model."""
    batched, static, integer = (folder / f"{name}.onnx" for name in ("batched", "static", "integer"))
    export_onnx(model, IMAGES, batched)
    set_static_batch(batched, static)
    ranges = calibration.calibrate(batched, [IMAGES.numpy()], "minmax")
    ranges = ranges if corrected else replace(ranges, means={})
    quantize.quantize(static, integer, ranges, lambda _: "int8", target=target, pattern=pattern)
    return onnx.load(str(batched)), onnx.load(str(integer))


def answers(proto: onnx.ModelProto) -> np.ndarray:
    session = open_session(proto)
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: image[None]})[0] for image in IMAGES.numpy()])


@pytest.mark.parametrize("pattern", ["all-softmax-add", "weights+add", "weights"])
@pytest.mark.parametrize("target", [INT8, Precision("int8", "int8", "int8", 7)], ids=["uint8", "7 bits"])
def test_a_rounding_model_answers_as_the_integer_file_does(net, tmp_path, pattern, target):
    proto, integer = files(net, tmp_path, pattern, target)
    rounding = qat.rounding_of(net, proto, integer, IMAGES[:2], target.weight_bits)
    assert set(rounding.weights) == {"stem", "depthwise", "narrow", "fc"}
    assert not rounding.unseen
    wanted, plain = answers(integer), net(IMAGES).detach().numpy()
    qat.install(net, rounding)
    found = net(IMAGES).detach().numpy()
    # What is left: biases rounded to 32 bits, and sums on the other side of a half.
    assert np.abs(found - wanted).mean() < 0.1 * np.abs(plain - wanted).mean()


def test_a_layer_that_stays_float_is_not_rounded(net, tmp_path):
    proto, _ = files(net, tmp_path, "weights")
    ranges = calibration.calibrate(tmp_path / "batched.onnx", [IMAGES.numpy()])
    quantize.quantize(
        tmp_path / "static.onnx",
        tmp_path / "part.onnx",
        ranges,
        lambda layer: "float" if layer == "narrow" else "int8",
        target=INT8,
        pattern="weights",
    )
    rounding = qat.rounding_of(net, proto, onnx.load(str(tmp_path / "part.onnx")), IMAGES[:2], 8)
    assert set(rounding.weights) == {"stem", "depthwise", "fc"}


def test_the_gradient_passes_a_rounding_and_stops_where_it_clips():
    values = torch.tensor([-3.0, -0.26, 0.24, 0.25, 0.75, 9.0], requires_grad=True)
    rounded = qat.Rounded.apply(values, qat.Grid(0.5, -2, 4))
    assert rounded.tolist() == [-1.0, -0.5, 0.0, 0.0, 1.0, 2.0]  # halves of a step to the even one
    rounded.backward(torch.arange(1.0, 7.0))
    assert values.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 5.0, 0.0]


def test_a_weight_is_rounded_by_output_channel_and_its_gradient_passes():
    weight = torch.tensor([[127.0, 1.4, -0.6], [0.0, 0.0, 0.0], [-1.27, 0.018, 0.002]], requires_grad=True)
    rounded = qat.RoundedWeight(127)(weight)
    expected = torch.tensor([[127.0, 1.0, -1.0], [0.0, 0.0, 0.0], [-1.27, 0.02, 0.0]])
    assert torch.allclose(rounded, expected, atol=1e-6)
    assert torch.allclose(qat.RoundedWeight(127)(rounded), rounded, atol=1e-7)
    rounded.backward(torch.full((3, 3), 2.0))
    assert torch.equal(weight.grad, torch.full((3, 3), 2.0))


def test_a_settled_model_is_an_ordinary_one_whose_file_holds_its_weights_exactly(net, tmp_path):
    names = list(net.state_dict())
    qat.install(net, qat.rounding_of(net, *files(net, tmp_path, "all-softmax-add"), IMAGES[:2], 8))
    rounded = {name: dict(net.named_modules())[name].weight.detach().clone() for name in ("stem", "fc")}
    assert qat.settle(net) is net
    assert sorted(net.state_dict()) == sorted(names)
    assert all(torch.equal(dict(net.named_modules())[name].weight, weight) for name, weight in rounded.items())
    _, plain = files(net, tmp_path, "all-softmax-add")
    _, corrected = files(net, tmp_path, "all-softmax-add", corrected=True)
    assert np.array_equal(answers(plain), answers(corrected))  # no bias to correct: rounding moved no weight
    assert not np.allclose(net(IMAGES).detach().numpy(), answers(plain), atol=1e-6)  # activations are rounded still
