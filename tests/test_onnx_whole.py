"""ONNX files that cannot become layers: placed, guarded, raced and bundled as they are, and why they were not cut."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnx_nets import FLOAT, branched_net, external, graph_of, looped_net, model_of, node, saved, small_net, values
from small_tasks import on_fake_device

import hirelc_deploy
from hirelc_deploy.compress.onnx_file.links import put_in_order, readers_of, replace_nodes
from hirelc_deploy.compress.onnx_file.whole import FileExporter, forms_of
from hirelc_deploy.compress.onnx_file.whole import graph_of as graph_of_file
from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.answers import stacked
from hirelc_deploy.inputs.data.load import load_data
from hirelc_deploy.inputs.data.preprocess import Preprocess
from hirelc_deploy.inputs.models.onnx_files import runtime
from hirelc_deploy.inputs.models.onnx_files.load import build
from hirelc_deploy.inputs.models.onnx_files.whole import FileNetwork
from hirelc_deploy.jobs.export import export_batched
from hirelc_deploy.tasks.none import NoTask

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))


REAL_TRIAL = runtime.shapes_of_answers


def shapes_here(model: bytes, shape: Any) -> list[tuple[int, ...]]:
    """Files of these tests do no harm: they need no process of their own, but where that is what is tested."""
    session = runtime.open_plain(model)
    return [one.shape for one in session.run(None, {session.get_inputs()[0].name: np.ones(shape, np.float32)})]


@pytest.fixture(autouse=True, scope="module")
def _without_a_trial() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "shapes_of_answers", shapes_here)
        yield


def whole(model: Any, folder: Path) -> FileNetwork:
    network = build(saved(model, folder / "net.onnx"))
    assert isinstance(network, FileNetwork)
    return network


def answers(path: Path, images: torch.Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    parts = [session.run(None, {session.get_inputs()[0].name: image[None].numpy()}) for image in images]
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a file that has a Loop, and pictures whose classes are what it answers to them."""
    folder, rng = tmp_path_factory.mktemp("whole"), np.random.default_rng(0)
    pixels = rng.integers(0, 200, (160, 1, 1, 3)) + rng.integers(0, 56, (160, 16, 16, 3))
    images = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    network = looped_net()
    (said,) = answers(saved(network, folder / "net.onnx"), images)
    (bias,) = [tensor for tensor in network.graph.initializer if tensor.name == "head.bias"]
    bias.raw_data = (np.frombuffer(bias.raw_data, np.float32) - said.mean(0)).tobytes()  # so that all classes occur
    (said,) = answers(saved(network, folder / "net.onnx"), images)
    pixels, labels = pixels.astype(np.uint8), said.argmax(1)
    labels[:5] = range(5)
    np.savez(folder / "d.npz", x_train=pixels[:120], y_train=labels[:120], x_test=pixels[120:], y_test=labels[120:])
    with pytest.MonkeyPatch.context() as patch:
        on_fake_device(patch, folder / "cache")
        yield folder


@pytest.fixture(scope="module")
def searched(place: Path) -> hirelc_deploy.Result:
    return hirelc_deploy.search(
        str(place / "net.onnx"), f"npz:{place}/d.npz", out=place / "run", limits={"max_drop": 60}
    )


def test_a_file_with_a_loop_is_placed_and_the_report_says_why_it_was_not_cut(searched: hirelc_deploy.Result) -> None:
    record = searched.record
    assert record["kept_whole"] == [
        {"layer": "net.onnx", "reason": "operator Loop (node looped) cannot be read: there is no module for it"}
    ]
    assert any("nothing of it is cut" in text for text in record["warnings"])
    assert any("nothing can be cut" in text for text in record["warnings"])
    assert {layer["name"] for layer in record["layers"]} == {"stem", "body.0", "body.1", "head"}
    assert {"fp32", "int8 blanket"} <= {one["name"] for one in record["candidates"]}
    assert record["latency"]["ratio"] < 1
    assert record["best_unpruned"]["name"].startswith("int8")
    page = searched.report.read_text("utf-8")
    assert "operator Loop" in page


def test_its_integer_file_keeps_loop_outputs_and_accuracy(searched: hirelc_deploy.Result) -> None:
    shipped = onnx.load(str(searched.bundle / "model.onnx"))
    kinds = {one.op_type for one in shipped.graph.node}
    assert {"Loop", "QuantizeLinear", "DequantizeLinear"} <= kinds
    assert [value.name for value in shipped.graph.output] == ["y"]
    accuracy = searched.record["accuracy"]
    assert accuracy["baseline_test"] == 1.0
    assert 0 <= accuracy["drop_points"] <= 60


def test_its_bundle_runs_alone_and_is_verified(searched: hirelc_deploy.Result, place: Path) -> None:
    command = [sys.executable, "-I", str(searched.bundle / "run.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert hirelc_deploy.verify(searched.bundle, f"npz:{place}/d.npz").ok


def test_inspect_counts_its_layers_and_says_why_none_is_cut(place: Path) -> None:
    record = hirelc_deploy.inspect(str(place / "net.onnx")).record
    assert record["units"] == []
    assert record["kept_whole"][0]["reason"].startswith("operator Loop")
    assert record["params"] > sum(layer.params for layer in graph_of_file(build(place / "net.onnx")).layers)


@pytest.mark.parametrize("padding", [{"pads": [0, 0, 1, 1]}, {"pads": [2, 0, 1, 1]}, {"auto_pad": "SAME_UPPER"}])
@pytest.mark.parametrize("side", [2, 7, 16])
def test_a_layer_that_pads_unlike_at_both_ends_is_timed_on_what_it_sees(
    tmp_path: Path, side: int, padding: dict[str, Any]
) -> None:
    model = looped_net(image=(1, 3, side, side))
    stem = next(one for one in model.graph.node if one.op_type == "Conv")
    del stem.attribute[:]
    options = {"strides": [2, 2], "dilations": [1, 1], "kernel_shape": [3, 3], **padding}
    stem.attribute.extend(helper.make_attribute(name, value) for name, value in options.items())
    shape = graph_of_file(whole(model, tmp_path)).layers[0].shape
    sizes = zip(shape.input_size, shape.padding, shape.dilation, shape.kernel, shape.stride, strict=True)
    found = [
        (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1 for size, pad, dilation, kernel, stride in sizes
    ]
    assert np.prod(found) == shape.positions > 0


def test_a_verdict_beforehand_needs_pieces_which_a_loop_does_not_have(place: Path) -> None:
    with pytest.raises(InputError, match="has a Loop or an If, which cannot be timed in pieces; apply it with --plan"):
        hirelc_deploy.inspect(str(place / "net.onnx"), verdict=True, seconds=20)


def test_a_file_of_one_image_stays_one(place: Path) -> None:
    path = saved(looped_net(image=(1, 3, 16, 16)), place / "one.onnx")
    result = hirelc_deploy.apply(str(path), f"npz:{place}/d.npz", "uniform:precision=auto", out=place / "one")
    assert hirelc_deploy.why(result.directory, fixes=0).layers
    with pytest.raises(InputError, match=r"one.onnx takes one image at a time; leave --dynamic-batch out"):
        export_batched(result.directory, place)


def test_a_plan_that_cuts_is_refused_and_leaves_no_run(place: Path) -> None:
    with pytest.raises(InputError, match=r"nothing of .*net.onnx can be cut: operator Loop .*precision=auto"):
        hirelc_deploy.apply(str(place / "net.onnx"), f"npz:{place}/d.npz", "uniform:keep=0.5", out=place / "half")
    assert not (place / "half").exists()


def test_without_data_two_outputs_are_placed_and_accuracy_is_said_to_be_unknown(place: Path) -> None:
    path = saved(branched_net(), place / "two.onnx")
    result = hirelc_deploy.apply(str(path), None, "uniform:precision=auto", out=place / "free")
    assert set(result.record["accuracy"].values()) == {None}
    assert any("accuracy is unknown" in text for text in result.record["warnings"])
    assert "no accuracy is claimed" in result.summary
    assert json.loads((result.bundle / "task.json").read_text("utf-8"))["task"] == "none"
    found = onnx.load(str(result.bundle / "model.onnx"))
    assert [value.name for value in found.graph.output] == ["y", "z"]


def test_answers_that_no_task_knows_are_judged_by_a_metric_of_ones_own(tmp_path: Path) -> None:
    path = saved(branched_net(), tmp_path / "two.onnx")

    def right_sign(outputs: Any, targets: Any) -> Any:
        return ((outputs["y"].flatten(1).sum(1) > 0) == (targets[:, 0] > 0)).float()

    class Rows:
        """Model inputs, and three numbers that have the form of no output."""

        def __len__(self) -> int:
            return 150

        def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
            drawn = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(row))
            return drawn, drawn[:, 0, 0].clone()

    sets = {"train": Rows(), "test": Rows()}
    job = {"task": "none", "metric": right_sign, "recovery_epochs": 0.0}
    result = hirelc_deploy.apply(str(path), sets, "uniform:precision=auto", out=tmp_path / "run", **job)
    assert result.record["metric"]["name"] == "right_sign"
    assert 0 <= result.record["accuracy"]["test"] <= 1
    with pytest.raises(InputError, match="judges nothing; name the task of these labels"):
        hirelc_deploy.apply(str(path), sets, "uniform:precision=auto", out=tmp_path / "other", task="none")


@pytest.mark.parametrize("opset", [9, 11, 13, 20])
def test_files_of_any_opset_answer_as_before_in_the_form_that_is_placed(tmp_path: Path, opset: int) -> None:
    network = whole(branched_net(opset), tmp_path)
    FileExporter(IMAGES[:2]).write(network, tmp_path / "batched.onnx", tmp_path / "static.onnx")
    for found, wanted in zip(
        answers(tmp_path / "static.onnx", IMAGES), answers(tmp_path / "net.onnx", IMAGES), strict=True
    ):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert forms_of(network.file).static.opset_import[0].version == 20
    layers = graph_of_file(network).layers
    assert [(one.name, one.in_features, one.out_features, one.macs) for one in layers] == [
        ("stem", 3, 8, 3 * 8 * 9 * 256),
        ("body", 8, 4, 8 * 4 * 256),
    ]


def test_images_are_taken_together_only_where_each_is_answered_as_alone(tmp_path: Path) -> None:
    assert whole(looped_net(), tmp_path).file.batched
    assert not whole(branched_net(), tmp_path).file.batched  # one image decides the branch of all
    assert not whole(looped_net(image=(1, 3, 16, 16)), tmp_path).file.batched


def test_tensors_beside_the_file_are_taken_along(tmp_path: Path) -> None:
    model = looped_net()
    (tmp_path / "w.bin").write_bytes(bytes(8) + model.graph.initializer[0].raw_data)
    wanted = answers(saved(looped_net(), tmp_path / "one.onnx"), IMAGES)[0]
    found = whole(external(model, "w.bin", offset=8), tmp_path)(IMAGES)["y"]
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5)


def test_channels_last_are_turned_at_the_door(tmp_path: Path) -> None:
    model = branched_net()
    model.graph.node.insert(0, node("Transpose", ["pixels"], ["x"], perm=[0, 3, 1, 2]))
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("pixels", FLOAT, ["n", 16, 16, 3]))
    found = whole(model, tmp_path)(IMAGES)
    wanted = answers(saved(branched_net(), tmp_path / "first.onnx"), IMAGES)
    np.testing.assert_allclose(found["y"].numpy(), wanted[0], atol=1e-5)


def test_an_operator_of_the_runtime_alone_is_placed_and_named(tmp_path: Path) -> None:
    model = small_net()
    model.graph.node[1].CopyFrom(node("QuickGelu", ["a"], ["b"], domain="com.microsoft", alpha=1.0))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    network = whole(model, tmp_path)
    assert network.file.reason == "operator com.microsoft.QuickGelu is not of the ONNX standard"
    assert len(graph_of_file(network).layers) == 4


def test_a_file_that_answers_otherwise_each_time_is_refused(tmp_path: Path) -> None:
    model = small_net()
    model.graph.node[1].CopyFrom(node("RandomNormalLike", ["a"], ["b"]))
    with pytest.raises(InputError, match="answers otherwise each time"):
        build(saved(model, tmp_path / "net.onnx"))


def test_a_file_is_tried_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "shapes_of_answers", REAL_TRIAL)
    assert whole(looped_net(), tmp_path).file.batched


def test_what_a_body_reads_is_kept_and_comes_before_it() -> None:
    body = graph_of([node("Relu", ["inside"], ["t"])], ["t"])
    nodes = [
        node("Relu", ["x"], ["inside"]),
        node("Neg", ["x"], ["nobody"]),
        node("If", ["c"], ["y"], then_branch=body, else_branch=body),
    ]
    model = model_of(nodes, {"c": np.array(True)})
    replace_nodes(model, model.graph.node[:])
    assert [one.op_type for one in model.graph.node] == ["Relu", "If"]
    assert [one.op_type for one in readers_of(model.graph)["inside"]] == ["If"]
    backwards = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(backwards)
    put_in_order(model.graph)
    assert [one.op_type for one in model.graph.node] == ["Relu", "If"]


def test_answers_of_unequal_size_are_filled_with_zeros_and_compared() -> None:
    long, short = values(1, 4, 2), values(1, 3, 2)
    both = stacked([long, short])
    assert both.shape == (2, 4, 2)
    assert not both[1, 3].any()
    task = NoTask((), {})
    wanted, found = {"y": torch.from_numpy(long)}, {"y": torch.from_numpy(long[:, :3].copy())}
    assert float(task.divergence(wanted, wanted)) == 0
    expected = float((wanted["y"][:, 3] ** 2).sum() / 8 / wanted["y"].var(correction=0))
    assert float(task.divergence(wanted, found)) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(InputError, match="judges nothing"):
        task.parts({"y": long}, [0])
    assert task.loss(wanted, [0]).tolist() == [0.0]
    assert task.collate([1, 2]).tolist() == [1, 2]
    assert len(task.collate([torch.zeros(2), torch.zeros(3)])) == 2


def test_an_archive_of_inputs_alone_has_no_labels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 3), dtype=np.uint8)
    for arrays in ({"x": pixels}, {"x_train": pixels, "x_test": pixels[:9]}):
        np.savez(tmp_path / "d.npz", **arrays)
        data = load_data(f"npz:{tmp_path}/d.npz")
        assert not data.labelled
        assert data.kind == "none"
        assert data.test_count == (20 if "x" in arrays else 9)
    np.savez(tmp_path / "d.npz", x_test=pixels)
    with pytest.raises(InputError, match="x_train is missing"):
        load_data(f"npz:{tmp_path}/d.npz")


def test_random_pictures_are_normalised_as_the_input_is() -> None:
    data = load_data("pixels:9").preprocessed(Preprocess((3, 8, 8), (0.5,) * 3, (0.25,) * 3))
    images = data.calibration.batch(np.arange(9))
    assert images.shape == (9, 3, 8, 8)
    assert -2.0 <= float(images.min()) < -1.9
    assert 1.9 < float(images.max()) <= 2.0
    assert torch.equal(images, data.calibration.batch(np.arange(9)))


def test_a_model_of_torch_needs_data(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--data is missing"):
        hirelc_deploy.search("resnet18", out=tmp_path / "run")


@pytest.mark.parametrize("make", [small_net, looped_net])
def test_an_input_beside_the_image_may_be_told_beforehand(tmp_path: Path, make: Any) -> None:
    model = make()
    model.graph.node.append(node("Mul", ["y", "factor"], ["scaled"]))
    model.graph.output[0].name = "scaled"
    model.graph.input.append(helper.make_tensor_value_info("factor", FLOAT, [1, 1]))
    path = saved(model, tmp_path / "net.onnx")
    wanted = 3 * answers(saved(make(), tmp_path / "plain.onnx"), IMAGES)[0]
    found = build(path, told={"factor": [[3]]})(IMAGES)["scaled"]
    np.testing.assert_allclose(found.detach().numpy(), wanted, atol=1e-4)
    for told, words in (({}, "--model-arg"), ({"factor": 3}, "shape"), ({"f": 3}, "only input_size and x, factor")):
        with pytest.raises(InputError, match=words):
            build(path, told=told)


def test_sixteen_bits_that_cannot_become_layers_are_refused(tmp_path: Path) -> None:
    model = model_of(
        [node("QuickGelu", ["x"], domain="com.microsoft"), node("Conv", ["y", "w"], ["z"])],
        {"w": values(4, 3, 3, 3).astype(np.float16)},
        ("z",),
        kind=TensorProto.FLOAT16,
    )
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    with pytest.raises(InputError, match="16-bit floats"):
        build(saved(model, tmp_path / "net.onnx"))
