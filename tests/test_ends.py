"""In: small detectors with their decoders. Out: proof that INT8 breaks them, and that ends that stay float do not."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from detector_nets import Centres, Detr, Gated, Masks, Ssd, Yolo
from numpy.typing import NDArray
from onnx_nets import graph_of, model_of, node, values
from torch import Tensor, nn

from hirelc_deploy.compress.integer import ends, quantize
from hirelc_deploy.compress.integer.calibration import Ranges, calibrate
from hirelc_deploy.compress.integer.placement import Placement
from hirelc_deploy.compress.onnx_file import export
from hirelc_deploy.compress.onnx_file.export_tensorrt import write_tensorrt
from hirelc_deploy.demo.model import DemoNet
from hirelc_deploy.errors import InputError
from hirelc_deploy.evaluate.effort import Effort
from hirelc_deploy.evaluate.guarded import guarded
from hirelc_deploy.evaluate.layer_losses import LayerLosses
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.evaluate.selection import Selection
from hirelc_deploy.inputs.data.load import load_data
from hirelc_deploy.jobs.shipping import end_records, end_warnings
from hirelc_deploy.jobs.why import end_record
from hirelc_deploy.measure.backend import Precision
from hirelc_deploy.plan import END_OF, CompressionPlan
from hirelc_deploy.results.layer_text import why_text
from hirelc_deploy.runs import Run
from hirelc_deploy.tasks.paired import PairedDrop
from hirelc_deploy.tasks.registry import make_task
from hirelc_deploy.testing.fake_backend import FakeBackend

FOLDER = tempfile.TemporaryDirectory()
U8S8 = Precision("int8", "uint8", "int8", 8)
IMAGES = np.random.default_rng(0).normal(size=(16, 3, 16, 16)).astype(np.float32)
SCORES = {Ssd: np.s_[:, :, 4:], Yolo: np.s_[:, 4:]}
DECODERS = ("TopK", "GatherElements", "GridSample", "LayerNormalization", "Log")
Answers = dict[str, NDArray[np.float32]]


class Aligned(nn.Module):
    """A picture is straightened by GridSample before all else: what follows is the network."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.net = nn.Conv2d(3, 2, 3, padding=1), DemoNet((16, 32), blocks_per_stage=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(F.grid_sample(x, self.shift(x).tanh().permute(0, 2, 3, 1), align_corners=False))


@dataclass(frozen=True)
class Files:
    """The files of a network with random weights, and what calibration saw."""

    dynamic: Path
    static: Path
    ranges: Ranges

    def integer(self, pattern: str, float_ends: bool) -> Path:
        """Return the file with all layers integer."""
        path = self.static.with_name(f"{pattern}-{float_ends}.onnx")
        quantize.quantize(
            self.static,
            path,
            self.ranges,
            lambda name: "float" if float_ends and name.startswith(END_OF) else "int8",
            target=U8S8,
            pattern=pattern,
        )
        return path


@cache
def files(net: Callable[[], nn.Module]) -> Files:
    folder = Path(FOLDER.name) / net.__name__
    folder.mkdir()
    torch.manual_seed(0)
    dynamic, static = folder / "dynamic.onnx", folder / "static.onnx"
    export.export_onnx(net().eval(), torch.from_numpy(IMAGES[:2]), dynamic)
    export.set_static_batch(dynamic, static)
    return Files(dynamic, static, calibrate(dynamic, [IMAGES], "minmax"))


def answers(path: Path) -> Answers:
    session = export.open_session(path)
    names = [output.name for output in session.get_outputs()]
    each = [session.run(None, {session.get_inputs()[0].name: image[None]}) for image in IMAGES]
    return {name: np.concatenate(found) for name, found in zip(names, zip(*each, strict=True), strict=True)}


def rounded(path: Path) -> set[str]:
    """Return the operators whose results a file rounds."""
    graph = onnx.load(str(path)).graph
    makers = {tensor: one.op_type for one in graph.node for tensor in one.output}
    return {makers[one.input[0]] for one in graph.node if one.op_type == "QuantizeLinear" and one.input[0] in makers}


def classifier() -> nn.Module:
    return DemoNet((16, 32), blocks_per_stage=1)


# What INT8 does


@pytest.mark.parametrize("pattern", ["all", "all-softmax-add"])
@pytest.mark.parametrize("net", [Ssd, Yolo])
def test_boxes_and_scores_in_one_concat_round_every_score_to_zero_unless_the_end_is_float(net, pattern):
    wanted, found = answers(files(net).static)["output"], files(net)
    scores = SCORES[net]
    broken, ours = (answers(found.integer(pattern, kept))["output"] for kept in (False, True))
    assert broken[scores].max() == 0
    assert wanted[scores].max() > 0.4
    np.testing.assert_allclose(ours[scores], wanted[scores], atol=0.01)


def test_boxes_from_an_expectation_are_nearer_where_it_is_float_in_patterns_of_layers_too():
    found = files(Yolo)
    wanted = answers(found.static)["output"]
    errors = [
        np.abs(answers(found.integer(pattern, kept))["output"] - wanted)[:, :4].max()
        for pattern in ("all", "weights")
        for kept in (False, True)
    ]
    blanket, ours, layers, ours_of_layers = errors
    assert blanket > 10
    assert ours < 3
    assert layers > 3 * ours_of_layers


def test_a_decoder_of_queries_rounds_only_its_layers():
    found = files(Detr)
    assert {"GatherElements", "LayerNormalization", "Sigmoid", "Add"} & rounded(found.integer("all", False))
    ours = found.integer("all", True)
    assert not {*DECODERS, "Sigmoid", "Add", "Sub"} & rounded(ours)
    graph = onnx.load(str(ours)).graph
    integer = {one.name for one in graph.node if one.op_type == "DequantizeLinear" and "weight" in one.input[0]}
    layers = export.layer_of_node(onnx.load(str(found.static)))
    assert len(integer) == len(layers) == 10


def test_heat_maps_and_sizes_are_nearer_where_their_sigmoid_and_exponential_are_float():
    found = files(Centres)
    wanted, blanket, ours = (
        answers(p) for p in (found.static, found.integer("all", False), found.integer("all", True))
    )
    peaks = [int((each["heat"] > 0).sum()) for each in (wanted, blanket, ours)]  # equal neighbours are peaks, too
    assert peaks[1] > 1.2 * peaks[0]
    assert peaks[2] < 1.1 * peaks[0]
    errors = [np.abs(each["size"] - wanted["size"]).mean() for each in (blanket, ours)]
    assert errors[1] < 0.7 * errors[0]


# What is an end


@pytest.mark.parametrize(
    ("net", "outputs", "why"),
    [
        (Ssd, [("output",)], ["Exp turns", r"Concat joins values up to 0\.\d+ with values up to 6\d\d"]),
        (Yolo, [("output",)], ["an expectation over a Softmax", "Sigmoid", "Concat joins"]),
        (Detr, [("logits", "boxes")], ["TopK ranks", "GatherElements reads", "Sigmoid", "GridSample", "Add joins"]),
        (Centres, [("heat",), ("size",)], ["Sigmoid gives", "Exp turns"]),
    ],
)
def test_an_end_is_found_with_its_reasons_in_the_file_for_one_image_and_for_many(net, outputs, why):
    found = quantize.ends_of(files(net).static, files(net).ranges)
    assert [end.outputs for end in found] == outputs
    said = "; ".join(reason for end in found for reason in end.why)
    assert [words for words in why if not re.search(words, said)] == []
    assert [end.outputs for end in quantize.ends_of(files(net).dynamic, files(net).ranges)] == outputs


def test_the_layer_of_an_expectation_belongs_to_the_end_and_those_of_a_decoder_do_not():
    (yolo,), (detr,) = (quantize.ends_of(files(net).static, files(net).ranges) for net in (Yolo, Detr))
    assert (yolo.name, yolo.layers) == ("end of output", {"expected"})
    assert (detr.name, detr.layers) == ("end of logits, boxes", frozenset())


@pytest.mark.parametrize("net", [classifier, Masks, Gated, Aligned])
def test_networks_that_decode_nothing_have_no_end(net):
    assert quantize.ends_of(files(net).static, files(net).ranges) == ()
    assert quantize.ends_of(files(net).dynamic, files(net).ranges) == ()


def test_values_that_only_a_branch_reads_are_seen_and_what_ranks_boxes_ends_a_network():
    nodes = [
        node("Conv", ["x", "w"], ["a"], name="a"),
        node("Reshape", ["a", "boxes_shape"], ["boxes"], name="boxes"),
        node("Reshape", ["a", "scores_shape"], ["scores"], name="scores"),
        node("NonMaxSuppression", ["boxes", "scores"], ["picked"], name="nms"),
        node("Slice", ["picked", "two", "three", "one"], ["rows"], name="rows"),
        node("Reshape", ["a", "boxes_shape"], ["inside"], name="inside"),
        node("ReduceMax", ["scores"], ["most"], keepdims=0, name="most"),
        node("Greater", ["most", "zero"], ["any"], name="any"),
        node(
            *("If", ["any"], ["y"]),
            name="if",
            then_branch=graph_of([node("Identity", ["inside"], ["t"])], ["t"]),
            else_branch=graph_of([node("Identity", ["boxes"], ["e"])], ["e"]),
        ),
        node("GatherND", ["scores", "picked"], ["z"], name="gathered"),
    ]
    sizes = {"boxes_shape": (1, 192, 4), "scores_shape": (1, 4, 192), "one": (1,), "two": (2,), "three": (3,)}
    tensors = {"w": values(3, 3, 1, 1), **{name: np.array(size, np.int64) for name, size in sizes.items()}}
    tensors["zero"] = np.array(0, np.float32)
    proto = model_of(nodes, tensors, ("y", "z"), image=(1, 3, 16, 16))
    (found,) = ends.find(proto, {})
    assert found.nodes >= {"boxes", "scores", "inside", "if", "nms", "gathered"}
    assert "a" not in found.nodes
    assert [reason.split()[0] for reason in found.why] == ["NonMaxSuppression", "If", "GatherND"]


@pytest.mark.parametrize(
    ("first", "second", "constant", "joined"),
    [
        ((0, 1), (0, 640), 0.0, True),
        ((-90, 2), (0, 640), 0.0, False),
        ((0, 0), (0, 640), 0.0, False),
        ((0, 20), (0, 40), 500.0, True),
        ((0, 20), (0, 40), 1e-6, False),
    ],
)
def test_a_join_matters_where_a_tensor_is_narrower_than_another_by_more_than_three_bits(
    first, second, constant, joined
):
    nodes = [
        node("Conv", ["x", "w"], ["a"], name="a"),
        node("Conv", ["x", "w"], ["b"], name="b"),
        node("Concat", ["a", "b"], ["c"], axis=1, name="c"),
        node("Add", ["c", "constant"], ["y"], name="y"),
    ]
    proto = model_of(nodes, {"w": values(3, 3, 1, 1), "constant": np.array([constant], np.float32)})
    found = ends.find(proto, {"a": first, "b": second, "c": (0, max(*first, *second))})
    assert bool(found) == joined


def test_an_expectation_written_as_a_sum_is_one_and_attention_is_none():
    nodes = [
        node("Conv", ["x", "w"], ["a"], name="a"),
        node("Reshape", ["a", "rows"], ["r"], name="r"),
        node("Softmax", ["r"], ["s"], axis=2, name="s"),
        node("Mul", ["s", "places"], ["m"], name="m"),
        node("ReduceSum", ["m", "last"], ["y"], keepdims=0, name="y"),
    ]
    tensors = {
        "w": values(3, 3, 1, 1),
        "rows": np.array([1, 3, 256], np.int64),
        "places": np.arange(256, dtype=np.float32),
        "last": np.array([2], np.int64),
    }
    (found,) = ends.find(model_of(nodes, tensors, image=(1, 3, 16, 16)), {})
    assert (found.nodes, [words.split()[1] for words in found.why]) == ({"r", "s", "m", "y"}, ["expectation"])
    nodes[3:] = [node("MatMul", ["s", "values"], ["y"], name="y")]
    tensors["values"] = values(256, 8)
    assert ends.find(model_of(nodes, tensors, image=(1, 3, 16, 16)), {}) == ()


# What becomes of ends


def test_tensorrts_form_keeps_the_layer_of_an_expectation_in_floats(tmp_path):
    found, path = files(Yolo), tmp_path / "typed.onnx"
    for precision, kept in (("float", True), ("int8", False)):
        asked = lambda name, precision=precision: precision if name.startswith(END_OF) else "int8"  # noqa: E731
        write_tensorrt(found.static, path, found.ranges, asked, pattern="all")
        makers = {tensor: one.op_type for one in onnx.load(str(path)).graph.node for tensor in one.output}
        (layer,) = (one for one in onnx.load(str(path)).graph.node if one.name == "expected/Conv")
        assert (makers.get(layer.input[1]) != "DequantizeLinear") == kept


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """A detector on the fake device; its metric is not asked."""
    folder = tmp_path_factory.mktemp("ends")
    rng = np.random.default_rng(0)
    arrays = {f"x_{split}": rng.integers(0, 255, (48, 16, 16, 3)).astype(np.uint8) for split in ("train", "test")}
    np.savez(folder / "data.npz", **arrays, y_train=np.arange(48) % 2, y_test=np.arange(48) % 2)
    torch.manual_seed(0)
    return Pipeline(
        Ssd().eval(),
        load_data(f"npz:{folder / 'data.npz'}"),
        FakeBackend(),
        Run.open(folder / "run", "seed = 0\n", {"cpu": "fake"}),
        effort=Effort(32, 16, 16, None, Effort().timing),
        task=make_task("regression", (), {}),
    )


def without_targets(selection: Selection) -> SimpleNamespace:
    """Return the same images; nobody knows their boxes."""
    parts = [replace(part, targets=None) for part in selection.shown()]
    return SimpleNamespace(shown=lambda count=48: (part.first(count) for part in parts), parts=None)


def test_the_placed_file_keeps_the_scores_that_the_blanket_file_rounds_to_zero(pipeline):
    placed = pipeline.files.placement
    assert "end of output" in placed.float_layers
    assert Placement.from_dict(placed.to_dict()) == placed
    blanket, ours = (answers(path)["output"][SCORES[Ssd]] for path in (pipeline.files.blanket, pipeline.files.placed))
    assert blanket.max() == 0
    assert ours.max() > 0.3


def test_a_result_tells_of_each_end_its_precision_and_why(pipeline):
    for default, precision in (("auto", "float"), ("int8", "int8"), ("float", "float")):
        (told,) = end_records(pipeline.files, CompressionPlan(default_precision=default))
        warned = end_warnings(pipeline.files, [told])
        assert len(warned) == (default == "int8")
        assert all(says.startswith("end of output is integer in the shipped file") for says in warned)
        assert (told["name"], told["precision"]) == ("end of output", precision)
        assert "Concat joins values up to" in told["why"]
        assert told["operators"] > 5


def test_the_guard_makes_an_end_float_as_one_group(pipeline, monkeypatch):
    def file_drop(path: Path) -> PairedDrop:
        points = 9.0 * ("Concat" in rounded(path))
        return PairedDrop(points, points, points)

    placed = Placement("all", (), 0.4, {"all": {"ratio": 0.4}}, {"end of output": {"why": "it joins", "operators": 9}})
    monkeypatch.setattr(pipeline.files, "file_drop", file_drop)
    monkeypatch.setattr(pipeline.files, "placement", placed)
    plan, found = guarded(pipeline, 1.0)
    assert [step.layer for step in found.reverted] == ["end of output"]
    assert plan.precision == {"end of output": "float"}
    assert pipeline.files.precision_of(plan)("end of output") == "float"
    pipeline.cut(plan)


def test_why_tells_what_integers_in_an_end_lose_and_win(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.uncut, "selection", without_targets(pipeline.uncut.selection))
    plan = CompressionPlan(default_precision="auto")
    losses = LayerLosses(pipeline, pipeline.cut(plan), plan)
    (end,) = losses.ends
    told = end_record(losses, end)
    assert (told["name"], told["precision"], told["operators"]) == ("end of output", "float", len(end.nodes))
    lost = told["rounding"]["divergence"]
    assert lost["high"] < 0
    assert told["rounding"]["points"] is None
    assert told["rounding"]["ms"] is not None
    assert losses.end(end) == losses.end(end)
    text = why_text({"ends": [told]})
    assert "won by integers in what decodes the outputs" in text
    assert "end of output (float): " in text
    assert "Concat joins values up to" in text


def test_an_end_of_which_a_pattern_rounds_nothing_is_told_so(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.uncut, "selection", without_targets(pipeline.uncut.selection))
    plan = CompressionPlan(default_precision="auto", pattern="weights")
    losses = LayerLosses(pipeline, pipeline.cut(plan), plan)
    told = end_record(losses, losses.ends[0])
    assert told["rounding"] is None
    assert "end of output (float): the pattern rounds nothing of it" in why_text({"ends": [told]})


def test_an_end_that_a_plan_names_and_the_model_lacks_is_refused(pipeline):
    plan = CompressionPlan({}, {"end of scores": "float"}, "auto")
    with pytest.raises(InputError, match="'end of scores' does not exist in this model; it has: end of output"):
        pipeline.files.precision_of(plan)
    with pytest.raises(InputError, match="no Linear layer and cannot have int4"):
        pipeline.cut(CompressionPlan({}, {"end of output": "int4"}, "auto"))
