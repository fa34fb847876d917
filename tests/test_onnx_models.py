"""An ONNX file as a model: what is read equals the file, has readable names, is cut exactly, and keeps its outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_nets import FLOAT, graph_of, model_of, node, saved, small_net, values
from PIL import Image
from torch import nn

from hirelc_deploy.compress import slicing
from hirelc_deploy.compress.onnx_file.export import export_onnx
from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.units import build_graph
from hirelc_deploy.inputs.data.views import normalised
from hirelc_deploy.inputs.models.onnx_files.load import build
from hirelc_deploy.inputs.models.onnx_files.network import OnnxNetwork
from hirelc_deploy.inputs.models.onnx_files.whole import FileNetwork
from hirelc_deploy.inputs.models.ordinary import notes_of
from hirelc_deploy.inputs.models.source import ModelSource, preprocess_of

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def answer_of_runtime(path: Path, images: torch.Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images.numpy()})


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 20])
def test_a_file_of_any_opset_equals_the_runtime(tmp_path: Path, opset: int) -> None:
    path = saved(small_net(opset), tmp_path / "net.onnx")
    with torch.no_grad():
        found = build(path)(IMAGES)["y"].numpy()
    np.testing.assert_allclose(found, answer_of_runtime(path, IMAGES)[0], atol=1e-5)


def test_layers_have_the_names_of_their_weights(tmp_path: Path) -> None:
    network = build(saved(small_net(), tmp_path / "net.onnx"))
    assert isinstance(network.get_submodule("body.0"), nn.Conv2d)
    assert isinstance(network.get_submodule("body"), nn.ModuleList)
    assert isinstance(network.get_submodule("head"), nn.Linear)
    assert network.get_submodule("stem").bias is not None


def test_units_are_found_and_cut_exactly(tmp_path: Path) -> None:
    network = build(saved(small_net(), tmp_path / "net.onnx"))
    graph, _ = slicing.provable(network, build_graph(network, IMAGES), IMAGES)
    assert {(unit.kind, unit.size) for unit in graph.units} == {("channels", 32), ("residual channels", 16)}
    kept = {unit.name: np.arange(0, unit.size, 2) for unit in graph.units}
    small, masked = slicing.slice_model(network, graph, kept), slicing.mask_model(network, graph, kept)
    with torch.no_grad():
        torch.testing.assert_close(small(IMAGES)["y"], masked(IMAGES)["y"], atol=1e-5, rtol=1e-4)


def test_a_file_for_one_image_takes_many(tmp_path: Path) -> None:
    heads = [
        node("Conv", ["x", "w"], ["a"], kernel_shape=[4, 4], strides=[4, 4]),
        node("Reshape", ["a", "tokens"], ["b"]),
        node("Transpose", ["b"], ["t"], perm=[0, 2, 1]),
        node("Concat", ["cls", "t"], ["c"], axis=1),
        node("MatMul", ["c", "qkv"], ["d"]),
        node("Reshape", ["d", "split"], ["e"]),
        node("Transpose", ["e"], ["f"], perm=[2, 0, 3, 1, 4]),
        node("Gather", ["f", "zero"], ["q"], axis=0),
        node("Gather", ["f", "one"], ["k"], axis=0),
        node("Gather", ["f", "two"], ["v"], axis=0),
        node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
        node("MatMul", ["q", "kt"], ["s"]),
        node("Softmax", ["s"], ["p"], axis=-1),
        node("MatMul", ["p", "v"], ["o"]),
        node("Transpose", ["o"], ["r"], perm=[0, 2, 1, 3]),
        node("Reshape", ["r", "joined"], ["j"]),
        node("MatMul", ["j", "out"], ["z"]),
        node("ReduceMean", ["z"], ["y"], axes=[1], keepdims=0),
    ]
    tensors = {
        "w": values(32, 3, 4, 4),
        "cls": values(1, 1, 32, seed=1),
        "qkv": values(32, 96, seed=2),
        "out": values(32, 7, seed=3),
        "tokens": ints(1, 32, 16),
        "split": ints(1, 17, 3, 4, 8),
        "joined": ints(1, 17, 32),
        "zero": np.array(0, np.int64),
        "one": np.array(1, np.int64),
        "two": np.array(2, np.int64),
    }
    path = saved(model_of(heads, tensors, image=(1, 3, 16, 16)), tmp_path / "net.onnx")
    network = build(path)
    with torch.no_grad():
        found = network(IMAGES)["y"].numpy()
    wanted = np.concatenate([answer_of_runtime(path, image[None])[0] for image in IMAGES])
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    graph, _ = slicing.provable(network, build_graph(network, IMAGES), IMAGES)
    assert [unit.size for unit in graph.units if unit.kind == "attention heads"] == [4]


def test_shape_arithmetic_and_an_if_on_shapes_are_gone(tmp_path: Path) -> None:
    branches = {
        "then_branch": graph_of([node("Squeeze", ["p", "last"], ["t"])], ["t"]),
        "else_branch": graph_of([node("Identity", ["p"], ["e"])], ["e"]),
    }
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Relu", ["a"], ["r"]),
        node("Shape", ["r"], ["s"]),
        node("Gather", ["s", "zero"], ["n"], axis=0),
        node("Unsqueeze", ["n", "axis"], ["n1"]),
        node("Concat", ["n1", "rest"], ["shape"], axis=0),
        node("Reshape", ["r", "shape"], ["b"]),
        node("ReduceMean", ["b"], ["p"], axes=[2], keepdims=1),
        node("Shape", ["p"], ["ps"]),
        node("Gather", ["ps", "two"], ["last_size"], axis=0),
        node("Equal", ["last_size", "unit"], ["c"]),
        node("If", ["c"], ["f"], **branches),
        node("Gemm", ["f", "head"], ["y"]),
    ]
    tensors = {
        "w": values(16, 3, 3, 3), "head": values(16, 4, seed=1), "zero": np.array(0, np.int64), "axis": ints(0),
        "rest": ints(16, -1), "two": np.array(2, np.int64), "unit": np.array(1, np.int64), "last": ints(2),
    }  # fmt: skip
    path = saved(model_of(nodes, tensors), tmp_path / "net.onnx")
    network = build(path)
    assert len(build_graph(network, IMAGES).units) == 1
    np.testing.assert_allclose(network(IMAGES)["y"].detach().numpy(), answer_of_runtime(path, IMAGES)[0], atol=1e-5)


def test_functions_that_were_written_out_become_layers_again(tmp_path: Path) -> None:
    nodes = [
        node("Conv", ["x", "w"], ["c"]),
        node("Add", ["c", "bias"], ["b"]),
        node("Sigmoid", ["b"], ["s"]),
        node("Mul", ["b", "s"], ["m"]),
        node("Transpose", ["m"], ["t"], perm=[0, 2, 3, 1]),
        node("ReduceMean", ["t"], ["mean"], axes=[-1]),
        node("Sub", ["t", "mean"], ["d"]),
        node("Pow", ["d", "two"], ["q"]),
        node("ReduceMean", ["q"], ["var"], axes=[-1]),
        node("Add", ["var", "eps"], ["v1"]),
        node("Sqrt", ["v1"], ["root"]),
        node("Div", ["d", "root"], ["n"]),
        node("Mul", ["n", "gamma"], ["g"]),
        node("Add", ["g", "beta"], ["l"]),
        node("MatMul", ["l", "proj"], ["h"]),
        node("ReduceMean", ["h"], ["y"], axes=[1, 2], keepdims=0),
    ]
    tensors = {
        "w": values(16, 3, 3, 3), "bias": values(1, 16, 1, 1, seed=1), "two": np.array(2, np.float32),
        "eps": np.array(1e-5, np.float32), "gamma": values(16, seed=2), "beta": values(16, seed=3),
        "proj": values(16, 4, seed=4),
    }  # fmt: skip
    path = saved(model_of(nodes, tensors, opset=13), tmp_path / "net.onnx")
    network = build(path)
    kinds = {type(module) for module in network.modules()}
    assert nn.LayerNorm in kinds
    assert next(m for m in network.modules() if isinstance(m, nn.Conv2d)).bias is not None
    np.testing.assert_allclose(network(IMAGES)["y"].detach().numpy(), answer_of_runtime(path, IMAGES)[0], atol=1e-5)
    assert [unit.size for unit in build_graph(network, IMAGES).units] == [16]


def test_a_weight_of_two_convolutions_is_one_layer(tmp_path: Path) -> None:
    nodes = [
        node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
        node("Conv", ["a", "shared.weight"], ["b"], pads=[1, 1, 1, 1]),
        node("Conv", ["b", "shared.weight"], ["y"], pads=[1, 1, 1, 1]),
    ]
    tensors = {"w": values(8, 3, 3, 3), "shared.weight": values(8, 8, 3, 3, seed=1)}
    network = build(saved(model_of(nodes, tensors), tmp_path / "net.onnx"))
    assert sum(isinstance(module, nn.Conv2d) for module in network.modules()) == 2


def test_grids_and_strides_are_not_trained(tmp_path: Path) -> None:
    nodes = [
        node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
        node("Add", ["a", "grid"], ["b"]),
        node("Mul", ["b", "gamma"], ["y"]),
    ]
    tensors = {
        "w": values(4, 3, 3, 3),
        "grid": np.arange(256, dtype=np.float32).reshape(1, 1, 16, 16) + 0.5,
        "gamma": values(4, 1, 1, seed=1),
    }
    network = build(saved(model_of(nodes, tensors), tmp_path / "net.onnx"))
    assert set(dict(network.named_parameters())) == {"conv_1.weight", "gamma"}
    assert "grid" in dict(network.named_buffers())


def test_outputs_keep_their_names_in_the_file_that_is_exported(tmp_path: Path) -> None:
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "u"], ["scores"]),
        node("Conv", ["b", "v"], ["boxes"]),
    ]
    tensors = {"w": values(16, 3, 3, 3), "u": values(4, 16, 1, 1, seed=1), "v": values(8, 16, 1, 1, seed=2)}
    path = saved(model_of(nodes, tensors, ("scores", "boxes")), tmp_path / "net.onnx")
    export_onnx(build(path), IMAGES, tmp_path / "out.onnx")
    assert [value.name for value in onnx.load(str(tmp_path / "out.onnx")).graph.output] == ["scores", "boxes"]


def test_channels_last_and_sixteen_bits_are_read(tmp_path: Path) -> None:
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
        node("Conv", ["t", "w"], ["a"]),
        node("GlobalAveragePool", ["a"], ["g"]),
        node("Flatten", ["g"]),
    ]
    model = model_of(nodes, {"w": values(8, 3, 3, 3).astype(np.float16)}, image=("n", 16, 16, 3), kind=10)
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    network = build(saved(model, tmp_path / "net.onnx"))
    assert network(IMAGES)["y"].shape == (3, 8)
    assert any("channels last" in text for text in notes_of(network))


def test_a_free_size_is_asked_for_and_a_fixed_one_kept(tmp_path: Path) -> None:
    free = saved(small_net(image=("n", 3, "h", "w")), tmp_path / "free.onnx")
    with pytest.raises(InputError, match="--input-size"):
        ModelSource(str(free)).load()
    network = ModelSource(str(free)).with_input_size((3, 24, 16)).load()
    assert preprocess_of(network).input_size == (3, 24, 16)
    fixed = saved(small_net(), tmp_path / "fixed.onnx")
    with pytest.raises(InputError, match="written for inputs of"):
        ModelSource(str(fixed)).with_input_size((3, 24, 16)).load()


def test_a_network_that_mixes_its_images_is_refused(tmp_path: Path) -> None:
    nodes = [node("Reshape", ["x", "s"], ["a"]), node("MatMul", ["a", "w"], ["y"])]
    tensors = {"s": ints(3, 512), "w": values(512, 4)}
    with pytest.raises(InputError, match="operator Reshape"):
        build(saved(model_of(nodes, tensors, image=(2, 3, 16, 16)), tmp_path / "net.onnx"))


def test_a_file_that_computes_something_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hirelc_deploy.inputs.models.onnx_files import elementwise

    monkeypatch.setitem(elementwise.PLAIN, "Relu", torch.tanh)
    network = build(saved(small_net(channels=8), tmp_path / "other.onnx"))
    assert isinstance(network, FileNetwork)
    assert "differs from the file's in ONNX Runtime" in network.file.reason


def one(operator: str, tensors: dict[str, np.ndarray] | None = None, **attributes: Any) -> Any:
    return model_of([node(operator, ["x", *(tensors or {})], **attributes)], tensors or {})


OPERATORS: dict[str, Any] = {
    "average_pool": one("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2]),
    "average_pool_uneven": one("AveragePool", kernel_shape=[3, 3], pads=[0, 0, 1, 1], strides=[2, 2]),
    "average_pool_ceil": one("AveragePool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    "max_pool_uneven": one("MaxPool", kernel_shape=[3, 3], pads=[0, 0, 1, 1], strides=[2, 2]),
    "max_pool_same": one("MaxPool", kernel_shape=[3, 3], auto_pad="SAME_UPPER", strides=[2, 2]),
    "conv_same_lower": one("Conv", {"w": values(4, 3, 4, 4)}, auto_pad="SAME_LOWER", strides=[3, 3]),
    "conv_uneven": one("Conv", {"w": values(4, 3, 3, 3)}, pads=[0, 1, 2, 1], dilations=[2, 1]),
    "conv_groups": one("Conv", {"w": values(6, 1, 3, 3)}, group=3),
    "conv_transpose": one(
        "ConvTranspose", {"w": values(3, 4, 3, 3)}, strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]
    ),
    "conv_transpose_uneven": one("ConvTranspose", {"w": values(3, 4, 3, 3)}, strides=[2, 2], pads=[1, 1, 0, 0]),
    "clip": one("Clip", {"a": np.array(-0.5, np.float32), "b": np.array(0.7, np.float32)}),
    "hard_sigmoid": one("HardSigmoid", alpha=0.3, beta=0.4),
    "leaky": one("LeakyRelu", alpha=0.2),
    "prelu": one("PRelu", {"s": values(3, 1, 1)}),
    "elu": one("Elu", alpha=0.5),
    "softmax_rows": one("Softmax", axis=1),
    "slice_steps": one("Slice", {"a": ints(1, 0), "b": ints(15, 16), "c": ints(2, 3), "d": ints(2, 3)}),
    "slice_backwards": one("Slice", {"a": ints(-1), "b": ints(-(2**63)), "c": ints(3), "d": ints(-1)}),
    "pad_edge": one("Pad", {"p": ints(0, 0, 1, 2, 0, 0, 3, 0)}, mode="edge"),
    "pad_channels": one("Pad", {"p": ints(0, 1, 0, 0, 0, 2, 0, 0)}),
    "resize_nearest": one(
        "Resize",
        {"e": values(0), "s": np.array([1, 1, 2, 2], np.float32)},
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    ),
    "resize_linear": one("Resize", {"e": values(0), "f": values(0), "s": ints(2, 3, 24, 40)}, mode="linear"),
    "resize_corners": one(
        "Resize",
        {"e": values(0), "s": np.array([1, 1, 2, 3], np.float32)},
        mode="linear",
        coordinate_transformation_mode="align_corners",
    ),
    "resize_cubic": one(
        "Resize", {"e": values(0), "s": np.array([1, 1, 2, 2], np.float32)}, mode="cubic", cubic_coeff_a=-0.75
    ),
    "instance_norm": one("InstanceNormalization", {"w": values(3), "b": values(3, seed=1)}),
    "depth_to_space": model_of(
        [node("Conv", ["x", "w"], ["c"]), node("DepthToSpace", ["c"], blocksize=2, mode="CRD")],
        {"w": values(8, 3, 1, 1)},
    ),
    "space_to_depth": one("SpaceToDepth", blocksize=4),
    "reduce_l2": one("ReduceL2", axes=[1], keepdims=1),
    "split": model_of(
        [node("Split", ["x", "s"], ["a", "b"], axis=1), node("Concat", ["b", "a"], axis=1)], {"s": ints(1, 2)}
    ),
    "gather_many": one("Gather", {"i": ints(2, 0, 0, 1)}, axis=1),
    "gather_matrix": one("Gather", {"i": np.array([[2, 0], [1, 1]])}, axis=1),
    "gather_nd": model_of(  # as torch exports x[:, [2, 0]]
        [
            node("Transpose", ["x"], ["t"], perm=[1, 0, 2, 3]),
            node("GatherND", ["t", "i"], ["g"]),
            node("Transpose", ["g"], perm=[1, 0, 2, 3]),
        ],
        {"i": np.array([[2], [-3]])},
    ),
    "gather_nd_matrix": model_of(
        [
            node("Transpose", ["x"], ["t"], perm=[1, 2, 3, 0]),
            node("GatherND", ["t", "i"], ["g"]),
            node("Transpose", ["g"], perm=[4, 0, 1, 2, 3]),
        ],
        {"i": np.array([[[2], [0]], [[1], [1]]])},
    ),
    "top_k": model_of(
        [
            node("TopK", ["x", "k"], ["v", "i"], axis=2),
            node("GatherElements", ["x", "i"], ["g"], axis=2),
            node("Sub", ["g", "v"], ["d"]),
            node("Add", ["d", "v"]),
        ],
        {"k": ints(5)},
    ),
    "top_k_smallest": model_of(
        [node("TopK", ["x", "k"], ["v", "i"], axis=3, largest=0), node("Relu", ["v"])], {"k": ints(16)}
    ),
    "expand": model_of([node("GlobalMaxPool", ["x"], ["g"]), node("Expand", ["g", "s"])], {"s": ints(1, 3, 5, 7)}),
    "tile": one("Tile", {"t": ints(1, 2, 1, 3)}),
    "scalar_first": model_of(
        [node("Sub", ["one", "x"], ["a"]), node("Exp", ["a"], ["e"]), node("Div", ["one", "e"])],
        {"one": np.array([1.5], np.float32)},
    ),
    "where": model_of(
        [node("Greater", ["x", "z"], ["c"]), node("Where", ["c", "x", "z"])], {"z": np.array(0.1, np.float32)}
    ),
    "max_of_three": model_of([node("Neg", ["x"], ["n"]), node("Max", ["x", "n", "w"])], {"w": values(1, 3, 1, 1)}),
    "einsum": one("Einsum", {"w": values(3, 5)}, equation="nchw,cd->ndhw"),
    "batch_norm": one(
        "BatchNormalization",
        {"w": values(3), "b": values(3, seed=1), "m": values(3, seed=2), "v": np.abs(values(3, seed=3)) + 0.1},
    ),
}


@pytest.mark.parametrize(
    ("index", "settings", "why"),
    [
        ([[0]], {}, "it picks [0] of"),
        ([[0, 1]], {}, "along several dimensions at once"),
        ([[0]], {"batch_dims": 1}, "others for each image"),
    ],
)
def test_what_is_not_read_of_gather_nd_is_placed_whole(tmp_path: Path, index: Any, settings: Any, why: str) -> None:
    path = saved(one("GatherND", {"i": np.array(index)}, **settings), tmp_path / "net.onnx")
    network = build(path)
    assert isinstance(network, FileNetwork)
    assert why in network.file.reason


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_equals_the_runtime(tmp_path: Path, name: str) -> None:
    network = build(saved(OPERATORS[name], tmp_path / "net.onnx"))
    assert isinstance(network, OnnxNetwork)  # else it would be the runtime's own answer
    assert network(IMAGES)["y"].isfinite().all()


def test_a_choice_that_no_network_of_pictures_makes_is_not_read(tmp_path: Path) -> None:
    def file_of(count: int, axis: int) -> Path:
        nodes = [node("TopK", ["x", "k"], ["v", "i"], axis=axis), node("Relu", ["v"])]
        return saved(model_of(nodes, {"k": ints(count)}), tmp_path / f"{axis}.onnx")

    assert "chooses among the images" in build(file_of(1, 0)).file.reason
    with pytest.raises(InputError, match="takes 9 of 3"):
        build(file_of(9, 1))


def test_files_of_another_kind_of_number_are_named(tmp_path: Path) -> None:
    model = model_of([node("Cast", ["x"], to=1)], image=("n", 3, 16, 16), kind=TensorProto.INT32)
    with pytest.raises(InputError, match="INT32"):
        build(saved(model, tmp_path / "net.onnx"))


def test_a_constant_that_the_images_are_joined_with_is_cut_with_them(tmp_path: Path) -> None:
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Mul", ["a", "scale.gamma"], ["b"]), node("Conv", ["b", "u"], ["y"])]
    tensors = {"w": values(16, 3, 3, 3), "scale.gamma": values(16, 1, 1, seed=1), "u": values(4, 16, 3, 3, seed=2)}
    model = model_of(nodes, tensors)
    assert numpy_helper.to_array(model.graph.initializer[1]).shape == (16, 1, 1)
    assert helper.printable_graph(model.graph)
    graph = build_graph(build(saved(model, tmp_path / "net.onnx")), IMAGES)
    assert {part.tensor for part in graph.units[0].slices} == {"conv_1.weight", "scale.gamma", "conv_2.weight"}
    assert FLOAT == TensorProto.FLOAT


def test_the_whole_path_from_a_file_to_a_bundle(tmp_path: Path) -> None:
    import hirelc_deploy

    path = saved(small_net(image=("n", 3, "h", "w")), tmp_path / "net.onnx")
    result = hirelc_deploy.apply(
        str(path),
        "synthetic:64",
        "uniform:keep=0.5,precision=int8",
        out=tmp_path / "run",
        input_size=(3, 16, 16),
        recovery_epochs=0,
    )
    manifest = json.loads((result.bundle / "manifest.json").read_text("utf-8"))
    assert manifest["source"]["kind"] == "onnx"
    assert manifest["source"]["arguments"] == {"input_size": [3, 16, 16]}
    graph = onnx.load(str(result.bundle / "model.onnx")).graph
    assert [value.name for value in graph.output] == ["y"]
    assert manifest["plan"]["keep"]


def test_a_file_that_ends_in_a_softmax_is_compared_by_its_probabilities(tmp_path: Path) -> None:
    import hirelc_deploy

    model = small_net()
    model.graph.node[-1].output[0] = "logits"
    model.graph.node.append(node("Softmax", ["logits"], axis=1))
    path = saved(model, tmp_path / "net.onnx")
    pixels = np.random.default_rng(0).integers(0, 256, (120, 16, 16, 3), dtype=np.uint8)
    labels = np.arange(120) % 5
    arrays = {"x_train": pixels[:90], "y_train": labels[:90], "x_test": pixels[90:], "y_test": labels[90:]}
    np.savez(tmp_path / "d.npz", **arrays)
    job = ("uniform:keep=1,precision=float", f"npz:{tmp_path}/d.npz")
    for name, told in (("run", {}), ("other", {"scores": "logits"})):
        result = hirelc_deploy.apply(
            str(path), job[1], job[0], out=tmp_path / name, task_options=told, crop_pct=0.8 if told else None
        )
        preprocess = json.loads((result.bundle / "preprocess.json").read_text("utf-8"))
        assert preprocess["crop_pct"] == (0.8 if told else 1.0)
        task = json.loads((result.bundle / "task.json").read_text("utf-8"))
        assert task["made_of"]["options"]["scores"] == told.get("scores", "probabilities")
        assert any("ends in a softmax or in sigmoids" in text for text in result.record["warnings"]) == (not told)


def test_a_segmenter_that_ends_in_a_sigmoid_is_judged_at_one_half(tmp_path: Path) -> None:
    import hirelc_deploy

    # Bright pixels are leaves: their probability is the sigmoid of 12 times the mean of three channels, less 6.
    weights = {"w": np.full((1, 3, 1, 1), 4.0, np.float32), "b": np.array([-6.0], np.float32)}
    model = model_of([node("Conv", ["x", "w", "b"], ["logits"]), node("Sigmoid", ["logits"])], weights)
    path, rng = saved(model, tmp_path / "net.onnx"), np.random.default_rng(0)
    for index in range(60):
        leaf = np.kron(rng.integers(0, 2, (4, 4)), np.ones((4, 4), np.int64))
        for folder, pixels in (("images", 40 + 180 * leaf), ("masks", 255 * leaf)):
            (tmp_path / "d" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "d" / folder / f"{index:02}.png")
    plan, data = "uniform:keep=1,precision=float", f"masks:{tmp_path}/d,kind=binary"
    result = hirelc_deploy.apply(str(path), data, plan, out=tmp_path / "run")
    assert any("ends in a softmax or in sigmoids" in text for text in result.record["warnings"])
    assert result.record["accuracy"]["test"] == pytest.approx(1.0)


def of_bytes(tmp_path: Path, *first: Any, image: tuple[Any, ...] = ("n", 3, 16, 16)) -> Path:
    """Save a small network whose images are bytes; `first` are the nodes between x and its `floats`."""
    small = small_net()
    nodes = [*first, *small.graph.node]
    nodes[len(first)].input[0] = "floats"
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in small.graph.initializer}
    return saved(model_of(nodes, tensors, image=image, kind=TensorProto.UINT8), tmp_path / "net.onnx")


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_a_file_that_takes_bytes_answers_pictures_as_it_did(tmp_path: Path, last: bool, whole: bool) -> None:
    first = [node("Cast", ["x"], ["floats"], to=1)]
    if last:
        first = [node("Transpose", ["x"], ["turned"], perm=[0, 3, 1, 2]), node("Cast", ["turned"], ["floats"], to=1)]
    if whole:  # an If that depends on the image cannot become layers
        first[-1].output[0] = "shown"
        branches = {name: graph_of([node("Identity", ["shown"], [name])], [name]) for name in ("then", "else")}
        first += [
            node("ReduceMax", ["shown"], ["most"], keepdims=0),
            node("Cast", ["most"], ["bright"], to=9),
            node("If", ["bright"], ["floats"], then_branch=branches["then"], else_branch=branches["else"]),
        ]
    path = of_bytes(tmp_path, *first, image=("n", 16, 16, 3) if last else ("n", 3, 16, 16))
    network = build(path)
    assert isinstance(network, FileNetwork if whole else OnnxNetwork)
    assert any("takes bytes" in text for text in notes_of(network))
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = network(normalised(pixels, preprocess_of(network)))["y"].numpy()
    given = pixels.permute(0, 2, 3, 1).contiguous() if last else pixels
    np.testing.assert_allclose(found, answer_of_runtime(path, given)[0], rtol=1e-4, atol=1e-4)


def test_a_file_that_needs_whole_numbers_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = of_bytes(tmp_path, node("Cast", ["x"], ["whole"], to=6), node("Cast", ["whole"], ["floats"], to=1))
    with pytest.raises(InputError, match=r"input x takes bytes, and output y is another one .* export it with"):
        build(path)
