"""A verdict beforehand, on the fake device: pieces of a network foretell what its whole files then take."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn
from typer.testing import CliRunner

import hirelc_deploy
from hirelc_deploy import api
from hirelc_deploy.cli import app
from hirelc_deploy.compress.integer import calibration, quantize
from hirelc_deploy.compress.onnx_file.refill import Exporter
from hirelc_deploy.errors import ExportError, InputError
from hirelc_deploy.evaluate.foretold import Form, PieceTime, Times, foretell, piece_time, time_pieces, total
from hirelc_deploy.evaluate.pieces import OUTSIDE, Part, Pieces, inside_a_network, pieces_of
from hirelc_deploy.graph.units import build_graph
from hirelc_deploy.inputs.models.given import source_of
from hirelc_deploy.jobs.inspect import inspected
from hirelc_deploy.jobs.verdict import ACCURACY, TRIED, Answers, Commands, Place, float_file, halved, verdict_of
from hirelc_deploy.measure.backend import BFLOAT_FORM, HALF_FORM, OperatorTime, Precision
from hirelc_deploy.measure.targets import find_target
from hirelc_deploy.progress import Progress
from hirelc_deploy.testing import fake_backend
from hirelc_deploy.testing.fake_backend import FakeBackend, Faults

SIZE = (3, 32, 32)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(torch.relu(self.first(x))))


class Residual(nn.Module):
    """A stem, three equal blocks, a wider layer and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(Block(64) for _ in range(3)))
        self.wide = nn.Conv2d(64, 128, 1)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.wide(self.blocks(torch.relu(self.stem(x)))))
        answer: Tensor = self.head(x.mean((2, 3)))
        return answer


def network() -> nn.Module:
    torch.manual_seed(0)
    return Residual().eval()


def exported(model: nn.Module, folder: Path) -> tuple[Path, calibration.Ranges]:
    images = torch.rand((2, *SIZE))
    return float_file(Exporter(images), model, images, folder)


def microseconds(file: Path) -> float:
    return sum(operator.microseconds for operator in fake_backend.operator_times(file))


def foretold(
    device: Any = None, seconds: float = 60.0, progress: Progress | None = None, **place: Any
) -> dict[str, Any]:
    told = progress or Progress(quiet=True, clock=lambda: 0.0)  # it stands still: no machine is too slow for a test
    target = find_target("cpu")
    source = source_of(network())

    def verdict(*model: Any) -> dict[str, Any]:
        there = Place(target, 1, device or FakeBackend(), **place)
        command = Commands(source, [], target)
        return verdict_of(*model, place=there, command=command, seconds=seconds, started=told.clock(), progress=told)

    found: dict[str, Any] = inspected(source, {"input_size": SIZE}, verdict=verdict)["verdict"]
    return found


@pytest.fixture(scope="module")
def verdict() -> dict[str, Any]:
    return foretold(missing={"openvino_cpu": "it is not installed; `pip install openvino`."})


def about(record: dict[str, Any], what: str) -> dict[str, Any]:
    (one,) = (answer for answer in record["foretold"] if answer["what"] == what)
    return dict(one)


def test_equal_blocks_are_one_kind_and_every_node_is_in_one_piece(tmp_path: Path) -> None:
    proto = onnx.load(str(exported(network(), tmp_path)[0]))
    pieces = pieces_of(proto)
    assert [part.kind for part in pieces.parts] == [0, 1, 1, 1, 2, 3]
    assert [part.before for part in pieces.parts] == [(OUTSIDE,), (0,), (1,), (1,), (1,), (2,)]
    assert [part.after for part in pieces.parts] == [(1,), (1,), (1,), (2,), (3,), (OUTSIDE,)]
    assert [node.op_type for node in pieces.files[1].graph.node] == ["Conv", "Relu", "Conv", "Add", "Relu"]
    assert sum(len(pieces.files[part.kind].graph.node) for part in pieces.parts) == len(proto.graph.node)
    assert pieces.by_work()[0] == 1
    assert pieces.covered([0, 1, 2, 3]) == 1
    assert pieces.work[0] == 16 * 16 * (64 * 27 + 64 * 5)  # a convolution, and a ReLU's elements through memory


def test_a_piece_computes_what_its_nodes_compute_in_the_network(tmp_path: Path) -> None:
    static, _ = exported(network(), tmp_path)
    image = np.random.default_rng(0).random((1, *SIZE), np.float32)
    given = image = image - image.min()
    pieces = pieces_of(onnx.load(str(static)))
    # Equal pieces have the weights of the first of them, and so has the network here.
    model = network()
    for block in model.blocks[1:]:  # type: ignore[union-attr]
        block.load_state_dict(model.blocks[0].state_dict())  # type: ignore[index]
    static, _ = exported(model, tmp_path)
    for part in pieces.parts:
        wrapped, shape = inside_a_network(pieces.files[part.kind])
        onnx.checker.check_model(wrapped)
        session = onnxruntime.InferenceSession(wrapped.SerializeToString())
        # The piece reads the largest value minus each: what a ReLU left has zeros, and so has the image here.
        given = -session.run(None, {session.get_inputs()[0].name: (given.max() - given).reshape(shape)})[0]
    whole = onnxruntime.InferenceSession(str(static)).run(None, {"input": image})[0]
    np.testing.assert_allclose(given, whole, rtol=1e-4, atol=1e-5)


def test_long_branches_are_taken_apart_after_a_few_layers_and_all_their_inputs_are_given() -> None:
    shape = [1, 4, 8, 8]
    weights = [helper.make_tensor(f"w{n}", TensorProto.FLOAT, [4, 4, 1, 1], [0.1] * 16) for n in range(12)]
    nodes = [
        helper.make_node("Conv", ["x" if n == 0 else f"t{n - 1}", f"w{n}"], [f"t{n}"], f"layer{n}/Conv")
        for n in range(12)
    ]
    nodes.append(helper.make_node("Add", ["t0", "t11"], ["y"], "last/Add"))  # t0 is open all the way
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    proto = helper.make_model(helper.make_graph(nodes, "long", ends[:1], ends[1:], weights), ir_version=10)
    proto.opset_import[0].version = 20
    pieces = pieces_of(proto)
    assert [len(pieces.files[part.kind].graph.node) for part in pieces.parts] == [1, 8, 1, 1, 2]
    last = pieces.files[-1]
    assert {value.name for value in last.graph.input} == {"t0", last.graph.node[0].input[0]}
    for swept, values in ((0, 2 * 4 * 64), (4000, 1000)):
        wrapped, shape = inside_a_network(last, swept)
        onnx.checker.check_model(wrapped, full_check=True)
        session = onnxruntime.InferenceSession(wrapped.SerializeToString())
        assert shape == (values,)
        found = session.run(None, {session.get_inputs()[0].name: np.ones(shape, np.float32)})[0]
        assert found.shape == (1, 4, 8, 8)


def test_a_network_with_a_loop_or_a_branch_stays_in_one_piece() -> None:
    true, one = (helper.make_tensor(name, kind, [], [1]) for name, kind in (("go", TensorProto.BOOL), ("one", 1)))
    branch = helper.make_graph(
        [helper.make_node("Add", ["t0", "one"], ["z"], "inner/Add")],
        "branch",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 4, 8, 8])],
    )
    weights = [helper.make_tensor(f"w{n}", TensorProto.FLOAT, [4, 4, 1, 1], [0.1] * 16) for n in range(2)]
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["t0"], "a/Conv"),
        helper.make_node("Conv", ["t0", "w1"], ["t1"], "b/Conv"),
        helper.make_node("If", ["go"], ["y"], "c/If", then_branch=branch, else_branch=branch),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 8, 8]) for name in ("x", "y")]
    proto = helper.make_model(helper.make_graph(nodes, "branched", ends[:1], ends[1:], [true, one, *weights]))
    assert len(pieces_of(proto).parts) == 1


def test_conversions_at_an_end_count_where_the_neighbour_does_not_convert() -> None:
    parts = (Part(0, (OUTSIDE,), (1,)), Part(1, (0,), (1,)), Part(1, (1,), (2,)), Part(2, (1,), (OUTSIDE,)))
    pieces = Pieces((onnx.ModelProto(),) * 3, (1.0, 1.0, 1.0), parts)
    integer, plain = PieceTime(10.0, entry=2.0, exit=3.0), PieceTime(20.0)
    # The image is rounded (2); between the integer pieces nothing is; before the float one floats are made again (3).
    assert total(pieces, {0: integer, 1: integer, 2: plain}) == 10 + 10 + 10 + 20 + 2 + 3
    # A float piece first: what it leaves is rounded once, and the outputs are made floats.
    assert total(pieces, {0: plain, 1: integer, 2: integer}) == 20 + 10 + 10 + 10 + 2 + 3


def test_a_profile_is_taken_apart_into_the_ends_and_the_network_s_own_operators() -> None:
    ran = [
        OperatorTime("border/Neg", "Neg", False, 50.0),
        OperatorTime("x_QuantizeLinear", "QuantizeLinear", False, 1.0),
        OperatorTime("added", "Transpose", False, 2.0),
        OperatorTime("a/Conv_quant", "QLinearConv", True, 10.0),
        OperatorTime("turn", "Transpose", False, 4.0),
        OperatorTime("y_DequantizeLinear", "DequantizeLinear", False, 8.0),
    ]
    assert piece_time(ran, frozenset({"a/Conv", "turn"})) == PieceTime(14.0, 3.0, 8.0)
    assert piece_time(ran, frozenset({"a/Conv"})) == PieceTime(10.0, 3.0, 12.0)


def test_the_interval_is_wider_where_turns_disagree_and_pieces_are_missing() -> None:
    sure = foretell([2.0, 2.0, 2.0], [1.0, 1.0, 1.0], 0.0, 1.0)
    assert sure.speedup == pytest.approx(2.0)
    assert (sure.low, sure.high) == pytest.approx((2 * np.exp(-0.15), 2 * np.exp(0.15)))
    for other in (
        foretell([2.0, 2.0, 2.0], [1.0, 1.0, 1.6], 0.0, 1.0),
        foretell([2.0, 2.0, 2.0], [1.0, 1.0, 1.0], 0.4, 1.0),
        foretell([2.0, 2.0, 2.0], [1.0, 1.0, 1.0], 0.0, 0.7),
    ):
        assert other.low < sure.low < sure.high < other.high
    assert foretell([1.0] * 3, [1.0] * 3, 0.0, 1.0).verdict == "not told apart"
    assert foretell([1.0] * 3, [2.0] * 3, 0.0, 1.0).verdict == "slower"
    assert foretell([1.0] * 3, [1.0] * 3, 0.0, 1.0, 3.0).verdict == "faster"  # a runtime whose float file is


def test_int8_and_cutting_are_foretold_as_the_whole_files_then_measure(verdict: dict[str, Any], tmp_path: Path) -> None:
    integer = about(verdict, "int8")
    assert integer["verdict"] == "faster"
    static, ranges = exported(network(), tmp_path)
    target = FakeBackend().precisions()[1]

    def whole(pattern: str, static: Path, ranges: calibration.Ranges) -> float:
        quantize.quantize(static, tmp_path / "i.onnx", ranges, lambda _: "int8", target=target, pattern=pattern)
        return microseconds(tmp_path / "i.onnx")

    measured = microseconds(static) / min(whole(pattern, static, ranges) for pattern in TRIED)
    assert integer["speedup"] == pytest.approx(measured, rel=0.02)
    assert integer["speedup_low"] < measured < integer["speedup_high"]
    assert integer["covered"] == 1

    half, ranges = exported(halved(network(), build_graph(network(), torch.rand((2, *SIZE)))), tmp_path)
    uncut = 1000 * verdict["float_ms"]
    for what in ("cutting half of the channels", "cutting half of the channels, with int8"):
        found = about(verdict, what)
        assert found["says"].endswith("at most")
        measured = uncut / (
            microseconds(half) if found["pattern"] == "float" else whole(found["pattern"], half, ranges)
        )
        assert found["speedup"] == pytest.approx(measured, rel=0.02)


def test_a_device_on_which_int8_is_slower_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fake_backend.STEPS, "int8", (32, 8, 2.0))
    found = about(foretold(), "int8")
    assert found["verdict"] == "slower"
    assert found["speedup_high"] < 1
    assert found["says"].startswith("int8: slower, 0.")


def test_what_cannot_be_known_is_said_and_has_no_number(verdict: dict[str, Any]) -> None:
    missing = about(verdict, "openvino")
    assert missing["says"] == "openvino: cannot be known; it is not installed; `pip install openvino`."
    assert missing["verdict"] == "unknown"
    for one in (missing, about(verdict, "bf16")):
        assert one["speedup"] is None
        assert one["ms"] is None
        assert one["command"] == ""
    assert verdict["unknown"] == [ACCURACY]


@pytest.mark.parametrize(
    ("features", "verdict", "words"),
    [
        (["avx2"], "impossible", "bf16: this CPU does not multiply it"),
        (["avx512_bf16"], "unknown", "no runtime of this target that can run here offers it"),
        (None, "unknown", "no runtime of this target that can run here offers it"),
    ],
)
def test_bfloat16_is_looked_up_where_no_runtime_offers_it(
    features: list[str] | None, verdict: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hirelc_deploy.jobs.verdict.describe", lambda backend: {"features": features})
    times = Times(Pieces((), (), ()), {}, {})
    found = Answers(Place(find_target("cpu"), 1, FakeBackend()), {}, times, None).sixteen_bits()  # type: ignore[arg-type]
    assert found["verdict"] == verdict
    assert found["says"].endswith(words)


@pytest.mark.parametrize(("form", "name"), [(BFLOAT_FORM, "bf16"), (HALF_FORM, "f16")])
def test_a_device_with_sixteen_bits_is_foretold_them_and_the_search_that_tries_them(form: str, name: str) -> None:
    class WithHalf(FakeBackend):
        def precisions(self) -> tuple[Precision, ...]:
            return tuple(replace(one, form=form) for one in super().precisions())

    found = about(foretold(WithHalf()), name)
    assert found["pattern"] == f"float+{name}"
    assert found["speedup"] == pytest.approx(1.0)  # the fake device multiplies it as it does float
    assert "search" in found["command"]


def test_another_runtime_is_foretold_over_the_target_s_own_float_file() -> None:
    other = FakeBackend()
    other.name = "openvino_cpu"  # type: ignore[misc]
    found = foretold(others=(other,))
    assert about(found, "openvino, float")["speedup"] == pytest.approx(1.0)
    assert about(found, "openvino, int8")["speedup"] == pytest.approx(about(found, "int8")["speedup"])
    assert about(found, "openvino, int8")["runtime"] == "openvino_cpu"


def test_seconds_are_bounded_and_what_they_do_not_reach_is_unknown() -> None:
    """Every look at this clock takes a second."""
    ticks = itertools.count()
    clock: Callable[[], float] = lambda: float(next(ticks))  # noqa: E731
    found = foretold(seconds=30.0, progress=Progress(quiet=True, clock=clock))
    assert found["seconds"] <= 40
    few = foretold(seconds=1.0, progress=Progress(quiet=True, clock=clock))
    assert few["covered"] == 0
    assert {one["speedup"] for one in few["foretold"]} == {None}
    assert about(few, "int8")["verdict"] == "unknown"
    assert "give more with --seconds" in about(few, "int8")["says"]


def test_progress_is_told_with_the_time_left() -> None:
    ticks = itertools.count(step=0.01)
    lines: list[str] = []
    told = Progress(clock=lambda: float(next(ticks)), listener=lines.append, line_seconds=0.0)
    foretold(progress=told)
    assert any("4 kinds of pieces: 2/4" in line and "s left" in line for line in lines)


def test_a_form_that_the_runtime_refuses_is_unknown_and_the_float_file_is_an_error() -> None:
    found = about(foretold(FakeBackend(faults=Faults(refuse="form1"))), "int8")
    assert found["verdict"] != "unknown"  # other patterns are left
    with pytest.raises(ExportError, match="asked to refuse"):
        foretold(FakeBackend(faults=Faults(refuse="fake-float")))


NET = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(32, 3))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "open_target", lambda target: FakeBackend())
    monkeypatch.setattr(api, "place_of", lambda target, threads, backend: Place(target, threads or 1, backend))
    return tmp_path


def test_the_command_line_and_python_say_the_same(place: Path) -> None:
    options = ["inspect", "--model", "net.py:net", "--input-size", "3,16,16", "--verdict"]
    done = CliRunner().invoke(app, [*options, "--threads", "1", "--seconds", "1e6", "--json"])
    assert done.exit_code == 0
    record = json.loads(done.stdout)["verdict"]
    found = hirelc_deploy.inspect("net.py:net", input_size=(3, 16, 16), verdict=True, threads=1, seconds=1e6)
    assert [one["says"] for one in found.foretold] == [one["says"] for one in record["foretold"]]
    assert about(record, "int8")["command"] == (
        "hirelc-deploy apply --model net.py:net --input-size 3,16,16 --threads 1 --data DATA --target cpu "
        "--plan uniform:keep=1.0,precision=auto --out runs/int8"
    )
    text = str(found)
    assert "foretold in" in text
    assert "none of it measured" in text
    assert f"cannot be known beforehand: {ACCURACY}" in text


def test_a_form_whose_piece_fails_while_it_runs_is_refused_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = pieces_of(onnx.load(str(exported(network(), tmp_path)[0])))
    healthy, broken = FakeBackend(), FakeBackend()
    build = broken.build

    def fails(*_: Any) -> list[OperatorTime]:
        raise ExportError("the device went away")

    def build_broken(file: Path, threads: int = 1) -> Any:
        runner = build(file, threads)
        monkeypatch.setattr(runner, "profile", fails)
        return runner

    monkeypatch.setattr(broken, "build", build_broken)

    def as_it_is(plain: Path, path: Path) -> None:
        path.write_bytes(plain.read_bytes())

    forms = {("fake", "float"): Form(healthy, as_it_is), ("broken", "float"): Form(broken, as_it_is)}
    progress = Progress(quiet=True, clock=lambda: 0.0)
    times = time_pieces(pieces, forms, tmp_path, threads=1, until=1.0, progress=progress, name="pieces")
    assert times.refused == {("broken", "float"): "the device went away"}
    assert list(times.turns) == [("fake", "float")]
    assert all(len(turn) == len(pieces.files) for turn in times.turns["fake", "float"])


def test_options_of_the_verdict_alone_and_wrong_ones_are_refused_in_a_sentence(place: Path) -> None:
    for options, words in (
        ({"target": "cpu"}, "--target cpu: a device is asked for a verdict only"),
        ({"seconds": 5.0}, "--seconds 5.0"),
        ({"verdict": True, "seconds": 0.0}, "--seconds 0: give a finite number above 0"),
        ({"verdict": True, "target": "cpuu"}, "Did you mean 'cpu'"),
    ):
        with pytest.raises(InputError, match=words):
            hirelc_deploy.inspect("net.py:net", input_size=(3, 16, 16), **options)  # type: ignore[arg-type]


def test_a_model_of_python_gets_the_call_and_an_untrained_one_is_asked_for_weights() -> None:
    target = replace(find_target("cpu"), name="mine")
    call = Commands(source_of(network()), [], target)("apply", "half", "uniform:keep=0.5,precision=float")
    assert (
        call == 'hirelc_deploy.apply(model, data, "uniform:keep=0.5,precision=float", target="mine", out="runs/half")'
    )
    line = Commands(source_of("resnet18", arguments={"in_chans": 1}), [], target)("search", "bf16", target="openvino")
    assert line == (
        "hirelc-deploy search --model resnet18 --model-arg in_chans=1 --weights WEIGHTS --data DATA --target openvino "
        "--out runs/bf16"
    )
