"""In: layers whose weights were rounded. Out: proof that their biases take back what that shifts on average."""

import dataclasses

import numpy as np
import pytest
import torch
from onnx import helper
from torch import nn

from hirelc_deploy.compress.integer import quantize
from hirelc_deploy.compress.integer.bias_correction import mean_shift, observed_inputs
from hirelc_deploy.compress.integer.calibration import calibrate
from hirelc_deploy.compress.onnx_file import export
from hirelc_deploy.measure.backend import Precision

U8S8 = Precision("int8", "uint8", "int8", 8)
RNG = np.random.default_rng(0)


def images(count, seed=0):
    return np.random.default_rng(seed).random((count, 3, 12, 12)).astype(np.float32)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("options", [{}, {"padding": 1}, {"padding": (2, 1), "stride": 2, "dilation": (1, 2)}])
def test_the_shift_of_a_convolution_is_what_its_mean_output_moves(groups, options):
    conv = nn.Conv2d(6, 12, 3, groups=groups, bias=False, **options)
    weight = conv.weight.detach().numpy().copy()
    scale = np.abs(weight).max((1, 2, 3)) / 7  # three bits, so that there is something to see
    rounded = np.rint(weight / scale[:, None, None, None])
    mean = torch.rand(6) + torch.arange(6)
    x = mean[None, :, None, None].expand(1, 6, 7, 8)  # every pixel is the mean; beyond the border there is zero
    with torch.no_grad():
        before = conv(x)
        conv.weight.copy_(torch.from_numpy(rounded * scale[:, None, None, None]))
        moved = (conv(x) - before).mean((0, 2, 3)).numpy()
    pads = [*conv.padding, *conv.padding]
    node = helper.make_node(
        "Conv", ["x", "w"], ["y"], group=groups, pads=pads, strides=conv.stride, dilations=conv.dilation
    )
    found = mean_shift(node, weight, (rounded, scale), mean.numpy(), (7, 8))
    np.testing.assert_allclose(found, moved, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("transposed", [0, 1])
def test_the_shift_of_a_linear_layer_is_what_its_mean_output_moves(transposed):
    weight, mean = RNG.normal(size=(5, 8)).astype(np.float32), RNG.normal(size=8)
    scale = np.abs(weight).max(1) / 7
    rounded = np.rint(weight / scale[:, None])
    wanted = (rounded * scale[:, None] - weight) @ mean
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=transposed)
    turn = (lambda matrix: matrix) if transposed else np.transpose
    np.testing.assert_allclose(mean_shift(node, turn(weight), (turn(rounded), scale), mean), wanted, rtol=1e-6)


def test_means_of_other_features_than_the_weight_reads_are_not_used():
    weight = RNG.normal(size=(5, 8, 1, 1)).astype(np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    assert mean_shift(node, weight, (weight, np.ones(5)), np.ones(16)) is None
    assert mean_shift(node, weight, (weight, np.ones(5)), np.ones(6)) is None


class Deep(nn.Module):
    """Pointwise and depthwise layers in turn; the linear layer before the last runs once, or twice."""

    def __init__(self, runs=1):
        super().__init__()
        self.runs = runs
        layers = [nn.Conv2d(3, 16, 3, 2)]
        for _ in range(3):
            layers += [nn.ReLU6(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU6(), nn.Conv2d(16, 16, 1)]
        self.body, self.shared, self.head = nn.Sequential(*layers), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        x = self.body(x).relu().mean((2, 3))
        for _ in range(self.runs):
            x = self.shared(x)
        return self.head(x)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("deep")
    model = Deep().eval()
    export.export_onnx(model, torch.from_numpy(images(2)), folder / "dynamic.onnx")
    export.set_static_batch(folder / "dynamic.onnx", folder / "static.onnx")
    return model, folder


def test_calibration_takes_the_mean_input_of_every_layer(files):
    model, folder = files
    batches = [images(5), images(11, 1)]  # unlike sizes: means weigh images, not batches
    means = calibrate(folder / "dynamic.onnx", batches, "minmax").means
    assert set(means) == {*(f"body.{index}" for index in range(0, 13, 2)), "shared", "head"}
    everything = torch.from_numpy(np.concatenate(batches))
    with torch.no_grad():
        np.testing.assert_allclose(means["body.0"], everything.mean((0, 2, 3)), rtol=1e-5)
        np.testing.assert_allclose(means["body.4"], model.body[:4](everything).mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_a_layer_that_runs_twice_has_no_one_mean_and_is_left_out(tmp_path):
    torch.manual_seed(0)
    export.export_onnx(Deep(runs=2).eval(), torch.from_numpy(images(2)), tmp_path / "twice.onnx")
    means = calibrate(tmp_path / "twice.onnx", [images(5)], "minmax").means
    assert set(means) == {*(f"body.{index}" for index in range(0, 13, 2)), "head"}


def test_layers_are_observed_where_the_runtime_reads_them(files):
    import onnx

    proto = onnx.load(str(files[1] / "dynamic.onnx"))
    assert observed_inputs(proto)["body.0"] == ("input", "Conv")
    assert observed_inputs(proto)["head"][1] in ("Gemm", "MatMul")


@pytest.mark.parametrize("pattern", ["all", "weights"])
def test_corrected_files_are_nearer_to_the_float_ones(tmp_path, pattern):
    target, out = dataclasses.replace(U8S8, weight_bits=7), tmp_path / "q.onnx"
    errors = [0.0, 0.0]
    for seed in range(8):  # one small network is nearer or not by chance
        torch.manual_seed(seed)
        export.export_onnx(Deep().eval(), torch.from_numpy(images(2)), tmp_path / "dynamic.onnx")
        export.set_static_batch(tmp_path / "dynamic.onnx", tmp_path / "static.onnx")
        ranges = calibrate(tmp_path / "dynamic.onnx", [images(64)], "minmax")
        wanted = export.open_session(tmp_path / "dynamic.onnx").run(None, {"input": images(64, 1)})[0]
        for corrected, means in enumerate(({}, ranges.means)):
            one = dataclasses.replace(ranges, means=means)
            quantize.quantize(tmp_path / "static.onnx", out, one, lambda _: "int8", target=target, pattern=pattern)
            session = export.open_session(out)
            found = np.concatenate([session.run(None, {"input": image[None]})[0] for image in images(64, 1)])
            errors[corrected] += np.abs((found - wanted).mean(0)).mean()
    assert errors[1] < 0.9 * errors[0]
