"""In: layers that most networks lack. Out: proof that their integer files, and their training, compute the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hirelc_backends.onnxruntime_cpu import OnnxRuntimeCpu
from numpy.typing import NDArray
from torch import Tensor, nn

from hirelc_deploy.compress.integer import calibration, quantize
from hirelc_deploy.compress.integer.equalisation import streams, wide_streams, write_equalised
from hirelc_deploy.compress.onnx_file import export
from hirelc_deploy.errors import InputError
from hirelc_deploy.evaluate.effort import Effort
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.graph.units import build_graph
from hirelc_deploy.inputs.data.load import load_data
from hirelc_deploy.inputs.models.checks import check_output, let_train
from hirelc_deploy.outcome import Measured
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.runs import Run
from hirelc_deploy.tasks.classification import CLASSIFICATION
from hirelc_deploy.testing.fake_backend import FakeBackend

INT8 = next(precision for precision in OnnxRuntimeCpu().precisions() if precision.name == "int8")


def head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4)]


class PooledResidual(nn.Module):
    """Linear layers on pooled features; the last one of the branch has no bias, so that its sum looks like one."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Conv2d(3, 16, 3, 2), nn.Linear(16, 32), nn.Linear(32, 16, bias=bias)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu().mean((2, 3))
        return self.out((x + self.down(self.up(x).relu())).relu())  # type: ignore[no-any-return]


class TwoBranches(nn.Module):
    """The sum of two products without a bias, on pooled features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Conv2d(3, 16, 3, 2), nn.Linear(16, 4)
        self.left, self.right = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu().mean((2, 3))
        return self.out(self.left(x) + self.right(x))  # type: ignore[no-any-return]


class Volumes(nn.Module):
    """Convolutions of three dims, over a depth that is a channel of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv3d(1, 8, (1, 3, 3)), nn.Conv3d(8, 16, 3)
        self.third, self.out = nn.Conv3d(16, 8, (1, 3, 3)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x[:, None]).relu()).relu()
        return self.out(self.third(x).mean((2, 3, 4)))  # type: ignore[no-any-return]


class ClassTokenLast(nn.Module):
    """Tokens first, joined with a class token, and torch's attention: the static file moves its transpositions."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, 16, 4, 4, bias=False), nn.Parameter(torch.randn(16) * 0.1)
        self.place, self.norm = nn.Parameter(torch.randn(17, 16) * 0.1), nn.LayerNorm(16)
        self.attention, self.out = nn.MultiheadAttention(16, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).permute(0, 2, 1)
        x = (torch.cat([self.token.expand(x.shape[0], 1, -1), x], 1) + self.place).permute(1, 0, 2)
        y = self.norm(x)
        return self.out((x + self.attention(y, y, y, need_weights=False)[0])[0])  # type: ignore[no-any-return]


def of_lines(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(2), *layers)


def transposed(groups: int, inputs: int = 16, outputs: int = 16) -> nn.Module:
    up = nn.ConvTranspose2d(inputs, outputs, 2, 2, groups=groups)
    return nn.Sequential(nn.Conv2d(3, inputs, 3, 2, 1), nn.ReLU(), up, nn.ReLU(), nn.Conv2d(outputs, 16, 3), *head(16))


ODD: dict[str, Callable[[], nn.Module]] = {
    "a sum in place of a bias": lambda: PooledResidual(bias=False),
    "a sum beside a bias": lambda: PooledResidual(bias=True),
    "a sum of products": TwoBranches,
    "one dim": lambda: of_lines(
        nn.Conv1d(8, 16, 3), nn.Conv1d(16, 16, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 4)
    ),
    "one dim, depthwise": lambda: of_lines(
        nn.Conv1d(8, 8, 5, groups=8), nn.ReLU(), nn.Conv1d(8, 4, 1), nn.AdaptiveAvgPool1d(1), nn.Flatten()
    ),
    "three dims": Volumes,
    "transposed in groups": lambda: transposed(4),
    "transposed, depthwise": lambda: transposed(16),
    "transposed in groups, wider": lambda: transposed(2, 8, 16),
    "transposed in groups, one dim": lambda: of_lines(
        nn.ConvTranspose1d(8, 8, 2, 2, groups=4), nn.ReLU(), nn.Conv1d(8, 4, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten()
    ),
    "transposed": lambda: transposed(1),
    "a class token, tokens first": ClassTokenLast,
}


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def files(model: nn.Module, folder: Path, across: bool = False) -> tuple[Path, Path, calibration.Ranges]:
    batched, static = folder / "batched.onnx", folder / "static.onnx"
    export.export_onnx(model.eval(), images(2), batched)
    export.set_static_batch(batched, static)
    equal = write_equalised(batched, static, [images(32).numpy()], across=across)
    return *equal, calibration.calibrate(equal[0], [images(32).numpy()])


def integer_answers(model: nn.Module, folder: Path, pattern: str, across: bool = False) -> NDArray[np.float32]:
    _, static, ranges = files(model, folder, across)
    quantize.quantize(static, folder / "i.onnx", ranges, lambda layer: "int8", target=INT8, pattern=pattern)
    session = export.open_session(folder / "i.onnx")
    return np.concatenate([session.run(None, {"input": one.numpy()})[0] for one in images(8, 1).split(1)])


@pytest.mark.parametrize("kind", ODD)
def test_integer_files_answer_as_torch_does(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ODD[kind]().eval()
    with torch.no_grad():
        wanted = model(images(8, 1)).numpy()
    for pattern in ("all", "weights"):
        found = integer_answers(model, tmp_path, pattern)
        assert np.abs(found - wanted).max() < 0.06 * np.abs(wanted).max(), pattern
    operators = {node.op_type for node in onnx.load(str(tmp_path / "i.onnx")).graph.node}
    assert "QuantizeLinear" in operators


# Channels far wider than others, in the same function


class Clamped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=0)


def widened(kind: str) -> nn.Module:
    """Return a network one channel of which is 3000 times as wide before its activation, and read as much less."""
    torch.manual_seed(0)
    between: list[nn.Module] = {
        "pool": [nn.ReLU(), nn.MaxPool2d(2)],
        "leaky": [nn.LeakyReLU(0.1)],
        "clamp": [Clamped()],
        "larger": [nn.ReLU(), nn.Upsample(scale_factor=2, mode="bilinear")],
        "padded": [nn.ReLU(), nn.ReflectionPad2d(1), nn.ZeroPad2d((0, 1, 0, 1))],
    }.get(kind, [nn.ReLU()])
    reader: nn.Module = nn.Conv2d(16, 16, 3, padding=1, groups=16 if kind == "depthwise" else 1)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), *between, reader, nn.ReLU(), *head(16))
    with torch.no_grad():
        if kind == "head":
            model[-4 - 1].weight[3] *= 3000
            model[-4 - 1].bias[3] *= 3000
            model[-1].weight[:, 3] /= 3000
            return model
        model[0].weight[3] *= 3000
        model[0].bias[3] *= 3000
        if kind == "depthwise":
            reader.weight[3] /= 3000
        else:
            reader.weight[:, 3] /= 3000
    return model


@pytest.mark.parametrize("kind", ["relu", "pool", "leaky", "depthwise", "head", "clamp", "larger", "padded"])
def test_a_wide_channel_is_made_like_the_others_across_an_activation(kind: str, tmp_path: Path) -> None:
    model = widened(kind).eval()
    with torch.no_grad():
        wanted = model(images(8, 1)).numpy()
    spread = np.abs(wanted - wanted.mean(0)).max()
    before, after = (np.abs(integer_answers(model, tmp_path, "all", across) - wanted).max() for across in (False, True))
    assert after < before / 4
    assert after < 0.25 * spread
    batched = files(model, tmp_path, across=True)[0]
    found = export.open_session(batched).run(None, {"input": images(8, 1).numpy()})[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_without_a_wide_channel_nothing_is_done_across_activations(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), *head(16))
    batched, _, _ = files(model, tmp_path)
    proto = onnx.load(str(batched))
    assert streams(proto) == []
    assert len(streams(proto, across=True)) == 2
    assert wide_streams(proto, [images(16).numpy()]) == []
    assert write_equalised(batched, batched, [images(16).numpy()], across=True) == (batched, batched)


def test_nothing_is_done_across_what_is_no_scaling(tmp_path: Path) -> None:
    layers = nn.GELU(), nn.ReLU6(), nn.Sigmoid(), nn.Hardswish(), nn.ConstantPad2d(1, 0.5), nn.Hardtanh(-1, 9)
    for number, layer in enumerate(layers):
        model = nn.Sequential(nn.Conv2d(3, 16, 3), layer, nn.Conv2d(16, 16, 3))
        export.export_onnx(model.eval(), images(2), tmp_path / f"{number}.onnx")
        assert streams(onnx.load(str(tmp_path / f"{number}.onnx")), across=True) == [], layer


def pipeline_of(model: nn.Module, folder: Path) -> Pipeline:
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in {"train": 32, "calibration": 16, "selection": 32, "test": 8}.items():
        arrays |= {f"x_{split}": rng.integers(0, 256, (count, 16, 16, 3), np.uint8), f"y_{split}": np.arange(count) % 4}
    np.savez(folder / "data.npz", **arrays)
    run = Run.open(folder / "run", "seed = 0\n", {"cpu": "fake"})
    return Pipeline(model.eval(), load_data(f"npz:{folder / 'data.npz'}"), FakeBackend(), run, effort=Effort())


def test_a_run_makes_a_wide_channel_like_the_others_where_that_was_measured_to_be_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "worse").mkdir()
    better, worse = pipeline_of(widened("relu"), tmp_path), pipeline_of(widened("relu"), tmp_path / "worse")
    numbers = iter((0.1, 0.2))
    monkeypatch.setattr(worse.files, "divergence", lambda path: next(numbers))
    assert better.files.across_activations
    assert not worse.files.across_activations
    losses = [one.evaluate(CompressionPlan(default_precision="int8"), "F2") for one in (better, worse)]
    assert isinstance(losses[0], Measured)
    assert isinstance(losses[1], Measured)
    assert losses[0].loss < losses[1].loss / 4
    assert better.run.fact(f"channels alike across activations on {better.files.machine}") is True


def test_a_run_without_a_wide_channel_measures_nothing_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    pipeline = pipeline_of(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), *head(16)), tmp_path)
    monkeypatch.setattr(pipeline.files, "divergence", lambda path: pytest.fail("nothing is to be judged"))
    assert not pipeline.files.across_activations


# Tensors that are written into


class PartialConvolution(nn.Module):
    """A slice of a tensor is replaced in place, as partial convolutions do (Chen et al. 2023)."""

    def __init__(self, *, of_copy: bool) -> None:
        super().__init__()
        self.stem, self.part, self.out = nn.Conv2d(3, 16, 3, 2), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(16, 4)
        self.of_copy = of_copy

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = x.clone() if self.of_copy else x
        y[:, :4] = self.part(y[:, :4])
        return self.out(y.relu().mean((2, 3)))  # type: ignore[no-any-return]


class AddsInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.more, self.out = nn.Conv2d(3, 16, 3, 2), nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x += self.more(x)
        return self.out(x.relu_().mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "make", [lambda: PartialConvolution(of_copy=True), lambda: PartialConvolution(of_copy=False), AddsInPlace]
)
def test_a_layer_reads_copies_where_its_input_is_written_into_later(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        wanted = model(images(2))
    with pytest.raises(RuntimeError, match="inplace"):
        model(images(2)).sum().backward()
    check_output(model, images(2), CLASSIFICATION)
    with torch.no_grad():
        assert torch.equal(model(images(2)), wanted)
    model.train()(images(2)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_copies_are_not_in_the_file_and_do_not_hide_units(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = PartialConvolution(of_copy=True).eval()
    check_output(model, images(2), CLASSIFICATION)
    export.export_onnx(model, images(2), tmp_path / "m.onnx")
    assert "Identity" not in {node.op_type for node in onnx.load(str(tmp_path / "m.onnx")).graph.node}
    assert build_graph(model, images(2)).layers


class WithoutSlopes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def backward(ctx: object, slope: Tensor) -> Tensor:  # type: ignore[override]
        raise RuntimeError("no slopes here")


def test_a_model_that_cannot_be_trained_gets_one_sentence() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), *head(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(WithoutSlopes.apply(x) * self.layers[0].weight.mean())  # type: ignore[no-any-return, no-untyped-call]

    class Last(Net):
        def forward(self, x: Tensor) -> Tensor:
            return WithoutSlopes.apply(self.layers(x))  # type: ignore[no-any-return, no-untyped-call]

    let_train(Net(), images(1), CLASSIFICATION)
    with pytest.raises(InputError, match="torch has no slopes of its weights") as caught:
        let_train(Last(), images(1), CLASSIFICATION)
    assert "\n" not in str(caught.value)
