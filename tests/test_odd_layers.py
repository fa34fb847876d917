"""In: layers that most networks lack. Out: proof that their integer files, and their training, compute the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hirelc_backends.onnxruntime_cpu import OnnxRuntimeCpu
from numpy.typing import NDArray
from small_tasks import on_fake_device
from torch import Tensor, nn

import hirelc_deploy
from hirelc_deploy.compress import slicing
from hirelc_deploy.compress.integer import calibration, quantize
from hirelc_deploy.compress.integer.equalisation import streams, wide_streams, write_equalised
from hirelc_deploy.compress.onnx_file import export
from hirelc_deploy.errors import ExportError, InputError
from hirelc_deploy.evaluate.effort import Effort
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.graph.costs import cost_of
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


BY_HAND = {
    # One dim: 64 pixels * 8 * 27, 62 places * 16 * 24, 60 places * 16 * 48, 16 * 4.
    "one dim": ({"3": 16, "4": 16}, 13_824 + 23_808 + 46_080 + 64),
    # Three: 588 places * 8 * 9, 144 places * 16 * 216, 100 places * 8 * 144, 8 * 4.
    "three dims": ({"first": 8, "second": 16, "third": 8}, 42_336 + 497_664 + 115_200 + 32),
    # 64 pixels * 16 * 27, 64 pixels * 16 channels * (4 outputs of a group * 4), 196 pixels * 16 * 144, 16 * 4.
    "transposed in groups": ({"4": 16}, 27_648 + 16_384 + 451_584 + 64),
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_convolutions_of_any_dims_are_counted_and_cut(kind: str) -> None:
    torch.manual_seed(0)
    wanted, macs = BY_HAND[kind]
    model = ODD[kind]().eval()
    graph, error = slicing.provable(model, build_graph(model, images(2)), images(2))
    assert graph.macs == macs
    assert error < 1e-10
    sizes = {unit.name: unit.size for unit in graph.units}
    assert {name: sizes.get(name) for name in wanted} == wanted
    kept = {unit.name: np.arange(0, unit.size, 2) for unit in graph.units}
    small = slicing.slice_model(model, graph, kept)
    found = build_graph(small.eval(), images(2))
    cost = cost_of(model, graph, {name: len(elements) for name, elements in kept.items()})
    assert (cost.macs, cost.params) == (found.macs, sum(p.numel() for p in small.parameters()))


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


class WritesIntoSlices(AddsInPlace):
    """What an activation saved of itself is written into, in a module and in a function: added, scaled, set to zero."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).sigmoid()
        y = self.more(x)
        x[:, :8] += y[:, :8]
        x[:, 8:] *= y[:, 8:].tanh()
        x[..., 0] = 0
        return self.out(x.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "make",
    [
        lambda: PartialConvolution(of_copy=True),
        lambda: PartialConvolution(of_copy=False),
        AddsInPlace,
        WritesIntoSlices,
    ],
)
def test_torch_saves_copies_where_a_model_writes_into_what_slopes_need(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        wanted = model(images(2))
    with pytest.raises(RuntimeError, match="inplace"):
        model(images(2)).sum().backward()
    check_output(model, images(2), CLASSIFICATION)
    with torch.no_grad():
        assert torch.equal(model(images(2)), wanted)
    again = copy.deepcopy(model).train()
    again(images(2)).sum().backward()
    assert all(parameter.grad is not None for parameter in again.parameters())
    slope, step = again.stem.bias.grad, 1e-3  # type: ignore[union-attr]
    with torch.no_grad():
        model.stem.bias += step * slope  # type: ignore[union-attr, operator]
        rise = model(images(2)).sum() - wanted.sum()
    assert float(rise) == pytest.approx(step * float(slope.square().sum()), rel=0.05)  # type: ignore[union-attr, operator]


class WritesFloats(AddsInPlace):
    """Writes a parameter, in float32, where half precision has 16 bits."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x[:, [1, 5]] = self.more.bias[:2, None, None].expand(2, 7, 7)
        return self.out(x.mean((2, 3)))  # type: ignore[no-any-return]


def test_a_model_that_fails_in_half_precision_runs_in_float32_there() -> None:
    torch.manual_seed(0)
    model = WritesFloats().eval()
    with torch.no_grad():
        wanted = model(images(2))
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="dtypes match"):
            model(images(2))
    check_output(model, images(2), CLASSIFICATION)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(copy.deepcopy(model)(images(2)), wanted)
        assert model.stem(images(2)).dtype == torch.bfloat16, "others go on as before"


def test_slopes_of_three_dims_are_those_of_float32_in_half_precision_too() -> None:
    class Frames(nn.Module):
        """Space, then time, as R(2+1)D: torch 2.13 gives the weights of the second garbage in bfloat16."""

        def __init__(self) -> None:
            super().__init__()
            self.space, self.time = nn.Conv3d(3, 12, (1, 3, 3)), nn.Conv3d(12, 16, (3, 1, 1), padding=(1, 0, 0))

        def forward(self, x: Tensor) -> Tensor:
            return self.time(self.space(torch.stack(x.chunk(2, 2), 2)).relu()).mean((2, 3, 4))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, slopes = Frames().eval(), []
    check_output(model, images(2), CLASSIFICATION)
    for half in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            model(images(8)).square().sum().backward()
        assert model.time.weight.grad is not None
        slopes.append(model.time.weight.grad.clone())
    assert torch.equal(*slopes)


def test_a_model_that_runs_without_slopes_alone_gets_one_sentence() -> None:
    class WritesIntoParts(AddsInPlace):
        def forward(self, x: Tensor) -> Tensor:
            first, _ = self.stem(x).chunk(2, 1)
            first *= 2
            return self.out(first.mean((2, 3)).repeat(1, 2))  # type: ignore[no-any-return]

    with pytest.raises(InputError, match=r"torch has no slopes of its weights.*multiple views") as caught:
        check_output(WritesIntoParts().eval(), images(2), CLASSIFICATION)
    assert "\n" not in str(caught.value)
    assert "--input-size" not in str(caught.value)


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


# What no file can hold


def test_what_no_file_can_hold_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unwritten(*_: object) -> None:
        raise ExportError("not this one")

    on_fake_device(monkeypatch, tmp_path / "cache")
    for exporter in ("_torchscript", "_torch_export"):
        monkeypatch.setattr(export, exporter, unwritten)
    model, lines = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), *head(16)), list[str]()
    files = pipeline_of(model, tmp_path).data
    with pytest.raises(ExportError, match="Sequential: not this one"):
        hirelc_deploy.apply(
            model, files, "uniform:keep=0.5,precision=int8", out=tmp_path / "out", progress=lines.append
        )
    assert not [line for line in lines if "recovery" in line]


# Maxima over positions


class Points(nn.Module):
    """Layers that see each position by itself, and the maximum over all of them, as in PointNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv1d(8, 16, 1), nn.Conv1d(16, 32, 1)
        self.out = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu().flatten(2)
        return self.out(self.second(self.first(x).relu()).amax(2))  # type: ignore[no-any-return]


def test_ranges_of_what_a_maximum_picks_are_not_clipped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    export.export_onnx(Points().eval(), images(2), tmp_path / "m.onnx")
    pictures = torch.cat([images(63), 20 * images(1, 2)]).numpy()  # one in 64 is far brighter
    clipped, plain = (calibration.calibrate(tmp_path / "m.onnx", [pictures], how) for how in ("percentile", "minmax"))
    layers = {node.name: node.output[0] for node in onnx.load(str(tmp_path / "m.onnx")).graph.node}
    for layer in ("first/Conv", "second/Conv"):
        assert clipped.high[layers[layer]] == plain.high[layers[layer]], layer
        assert clipped.low[layers[layer]] == plain.low[layers[layer]], layer
    picture = onnx.load(str(tmp_path / "m.onnx")).graph.input[0].name
    assert clipped.high[picture] < plain.high[picture], "others are clipped as before"
