"""The file form for TensorRT: its rules, what ONNX Runtime computes from it, and what NVIDIA's compiler makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hand_written_nets import HandTransformer, MixedNet
from hirelc_backends import tensorrt_ahead
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from hirelc_deploy.compress.integer.calibration import Ranges, calibrate
from hirelc_deploy.compress.onnx_file.export import export_onnx, set_static_batch
from hirelc_deploy.compress.onnx_file.export_tensorrt import GRIDS, PATTERNS, _scales, write_tensorrt
from hirelc_deploy.errors import ExportError, InputError, TargetUnavailable

IMAGE = (3, 32, 32)


class FusedBlock(nn.Module):
    """A transformer block as most are written: one projection for queries, keys and values, 64 tokens."""

    def __init__(self, heads: int = 2, head_size: int = 32) -> None:
        super().__init__()
        width = heads * head_size
        self.heads = heads
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        count, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(count, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head((x + self.fc2(F.gelu(self.fc1(self.norm2(x))))).mean(1))


@dataclass(frozen=True)
class Case:
    """A network as a float file with its ranges, and images to run it on."""

    float_file: Path
    ranges: Ranges
    images: NDArray[np.float32]

    def write(self, folder: Path, pattern: str = "all", precision: Callable[[str], str] | str = "int8") -> Path:
        out = folder / "tensorrt.onnx"
        precision_of = precision if callable(precision) else lambda layer: str(precision)
        write_tensorrt(self.float_file, out, self.ranges, precision_of, pattern=pattern)
        return out

    def answers(self, file: Path) -> NDArray[np.float32]:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        return np.concatenate([session.run(None, {"input": image[None]})[0] for image in self.images])


def case_of(network: type[nn.Module], folder: Path) -> Case:
    torch.manual_seed(0)
    model = network().eval()
    images = torch.randn(32, *IMAGE)
    batched, static = folder / "batched.onnx", folder / "static.onnx"
    export_onnx(model, images[:2], batched)
    set_static_batch(batched, static)
    return Case(static, calibrate(batched, [images.numpy()], "minmax"), images[:4].numpy())


@pytest.fixture(scope="module", params=[MixedNet, HandTransformer, FusedBlock], ids=lambda network: network.__name__)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case_of(request.param, tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module")
def convolutions(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case_of(MixedNet, tmp_path_factory.mktemp("convolutions"))


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case_of(FusedBlock, tmp_path_factory.mktemp("transformer"))


def restored(proto: onnx.ModelProto) -> set[str]:
    return {node.output[0] for node in proto.graph.node if node.op_type == "DequantizeLinear"}


def rounded_nodes(file: Path) -> dict[str, list[int]]:
    """Return node name to the positions of its inputs that come from a DequantizeLinear."""
    proto = onnx.load(file)
    known = restored(proto)
    found = {node.name: [at for at, name in enumerate(node.input) if name in known] for node in proto.graph.node}
    return {name: positions for name, positions in found.items() if positions}


def test_fp16_alone_computes_what_the_float_file_computes(case: Case, tmp_path: Path) -> None:
    expected, found = case.answers(case.float_file), case.answers(case.write(tmp_path, precision="float"))
    assert np.abs(found - expected).max() <= 0.01 * np.abs(expected).max()
    assert not np.array_equal(found, expected)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_stays_near_the_float_file(case: Case, pattern: str, tmp_path: Path) -> None:
    expected, found = case.answers(case.float_file), case.answers(case.write(tmp_path, pattern))
    assert np.abs(found - expected).max() <= 0.15 * np.ptp(expected)


def test_the_form_is_what_tensorrt_10_3_to_11_read(case: Case, tmp_path: Path) -> None:
    proto = onnx.load(case.write(tmp_path))
    assert proto.opset_import[0].version <= 20
    assert proto.ir_version <= 9
    constants = {constant.name: numpy_helper.to_array(constant) for constant in proto.graph.initializer}
    pairs = [node for node in proto.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs
    for node in pairs:
        zero, scale = constants[node.input[2]], constants[node.input[1]]
        assert zero.dtype == np.int8
        assert not zero.any()
        assert scale.dtype == np.float16
        assert scale.ndim == zero.ndim == (1 if node.input[0] in constants else 0)
    types = {v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(proto).graph.value_info}
    wide = {name for name, kind in types.items() if kind == TensorProto.FLOAT}
    assert wide <= {value.name for value in (*proto.graph.input, *proto.graph.output)}
    assert all(value.dtype != np.float32 for value in constants.values())
    for value in (*proto.graph.input, *proto.graph.output):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT


def test_no_tensor_is_rounded_twice(case: Case, tmp_path: Path) -> None:
    sources = [n.input[0] for n in onnx.load(case.write(tmp_path)).graph.node if n.op_type == "QuantizeLinear"]
    assert len(sources) == len(set(sources))


def test_a_weight_is_rounded_per_output_channel() -> None:
    grid = GRIDS["int8"]
    scales = _scales(np.array([1.27, 0.0, 1e-3]), grid)
    # 0.01 lies between the FP16 numbers 0.0099945 and 0.010002: the larger one, so that 1.27 is not clipped.
    assert float(scales[0]) == pytest.approx(0.0100021, abs=1e-7)
    assert float(scales[0]) * 127 >= 1.27
    assert float(scales[1]) == 2.0**-24
    assert float(scales[2]) * 127 >= 1e-3
    np.testing.assert_array_equal(grid.rounded(np.array([-300.0, -1.4, 0.6, 127.4])), np.array([-127, -1, 1, 127]))


def test_the_stored_weight_is_the_float_one_to_half_a_step(convolutions: Case, tmp_path: Path) -> None:
    constants = {c.name: numpy_helper.to_array(c) for c in onnx.load(convolutions.write(tmp_path)).graph.initializer}
    exact = {c.name: numpy_helper.to_array(c) for c in onnx.load(convolutions.float_file).graph.initializer}
    rounded = [name for name in constants if name.startswith("wide.weight:") and name.endswith(":quantized")]
    scale = constants[rounded[0].replace(":quantized", ":scale")].astype(np.float64).reshape(-1, 1, 1, 1)
    assert (np.abs(constants[rounded[0]] * scale - exact["wide.weight"]) <= scale / 2 + 1e-9).all()


def test_a_layer_that_the_plan_leaves_float_is_not_rounded(convolutions: Case, tmp_path: Path) -> None:
    file = convolutions.write(tmp_path, precision=lambda layer: "float" if layer == "grouped" else "int8")
    rounded = rounded_nodes(file)
    assert "grouped/Conv" not in rounded
    assert rounded["wide/Conv"] == [0, 1]


def test_depthwise_layers_go_by_the_pattern(convolutions: Case, tmp_path: Path) -> None:
    assert "depthwise/Conv" in rounded_nodes(convolutions.write(tmp_path, "all"))
    assert "depthwise/Conv" not in rounded_nodes(convolutions.write(tmp_path, "all-depthwise"))


def test_a_residual_sum_rounds_the_input_that_its_last_convolution_does_not_write(
    convolutions: Case, tmp_path: Path
) -> None:
    def sums(pattern: str) -> list[tuple[list[str], list[int]]]:
        file = convolutions.write(tmp_path, pattern)
        nodes = {node.name: node for node in onnx.load(file).graph.node}
        positions = rounded_nodes(file)
        return [(list(nodes[name].input), at) for name, at in positions.items() if nodes[name].op_type == "Add"]

    assert sums("weights") == []
    [(inputs, positions)] = sums("all")
    proto = onnx.load(convolutions.write(tmp_path))
    maker = {tensor: node.name for node in proto.graph.node for tensor in node.output}
    assert len(positions) == 1
    assert maker[inputs[1 - positions[0]]] == "joined/Conv"


def test_an_attention_is_integer_as_a_whole_or_not_at_all(transformer: Case, tmp_path: Path) -> None:
    def rounded_sources(pattern: str) -> set[str]:
        nodes = onnx.load(transformer.write(tmp_path, pattern)).graph.node
        makers = {tensor: node for node in nodes for tensor in node.output}
        return {makers[n.input[0]].name for n in nodes if n.op_type == "QuantizeLinear" and n.input[0] in makers}

    only_in_all = rounded_sources("all") - rounded_sources("weights+add")
    # Queries, keys and values in one, where their projection writes them, and the shares.
    assert {name.rpartition("/")[2] for name in only_in_all} == {"MatMulAddFusion", "Softmax"}
    assert not rounded_sources("weights+add") - rounded_sources("all")


def attention_file(folder: Path, keys: int, size: int) -> tuple[Path, Ranges]:
    """Write Q K^T, Softmax, product with V, and a linear layer for `keys` keys and one head of `size`."""
    nodes = [
        helper.make_node("Transpose", ["input"], ["turned"], "turn", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["input", "turned"], ["scores"], "scores"),
        helper.make_node("Softmax", ["scores"], ["shares"], "softmax", axis=-1),
        helper.make_node("MatMul", ["shares", "input"], ["mixed"], "mix"),
        helper.make_node("MatMul", ["mixed", "weight"], ["output"], "linear"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, keys, size]) for name in ("input", "output")]
    weight = numpy_helper.from_array(np.eye(size, dtype=np.float32), "weight")
    graph = helper.make_graph(nodes, "attention", ends[:1], ends[1:], [weight])
    path = folder / f"attention{keys}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    names = ["input", "turned", "scores", "shares", "mixed", "output"]
    return path, Ranges(dict.fromkeys(names, -4.0), dict.fromkeys(names, 4.0), "minmax", 100)


@pytest.mark.parametrize(("keys", "size", "integer"), [(512, 16, True), (513, 16, False), (64, 24, False)])
def test_attention_without_a_fused_integer_kernel_stays_fp16(
    keys: int, size: int, integer: bool, tmp_path: Path
) -> None:
    path, ranges = attention_file(tmp_path, keys, size)
    write_tensorrt(path, tmp_path / "out.onnx", ranges, lambda layer: "int8", pattern="all")
    rounded = {name: at for name, at in rounded_nodes(tmp_path / "out.onnx").items() if "/" not in name}
    assert rounded.pop("linear") == [0, 1]
    assert rounded == ({"turn": [0], "scores": [0], "mix": [0, 1]} if integer else {})


def test_what_fp16_cannot_hold_is_computed_in_fp32(convolutions: Case, tmp_path: Path) -> None:
    wide = next(node.output[0] for node in onnx.load(convolutions.float_file).graph.node if node.name == "grouped/Conv")
    high = {**convolutions.ranges.high, wide: 40_000.0}
    ranges = Ranges(convolutions.ranges.low, high, "minmax", 32)
    out = tmp_path / "wide.onnx"
    write_tensorrt(convolutions.float_file, out, ranges, lambda layer: "int8", pattern="all")
    proto = onnx.load(out)
    node = next(node for node in proto.graph.node if node.name == "grouped/Conv")
    constants = {constant.name: constant.data_type for constant in proto.graph.initializer}
    assert {constants[name] for name in node.input if name in constants} == {TensorProto.FLOAT}
    expected, found = convolutions.answers(convolutions.float_file), convolutions.answers(out)
    assert np.abs(found - expected).max() <= 0.15 * np.ptp(expected)


def test_infinite_masks_stay_infinite_and_finite_ones_finite(tmp_path: Path) -> None:
    mask = numpy_helper.from_array(np.array([-1e9, -np.inf, 3.0, 0.0], np.float32), "mask")
    node = helper.make_node("Add", ["input", "mask"], ["output"], "add")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in ("input", "output")]
    graph = helper.make_graph([node], "mask", ends[:1], ends[1:], [mask])
    path, out = tmp_path / "mask.onnx", tmp_path / "half.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    write_tensorrt(path, out, Ranges({}, {}, "minmax", 100), lambda layer: "int8", pattern="all")
    [half] = onnx.load(out).graph.initializer
    np.testing.assert_array_equal(numpy_helper.to_array(half), np.array([-65504, -np.inf, 3, 0], np.float16))


def test_fp8_rounds_to_the_numbers_of_e4m3(convolutions: Case, tmp_path: Path) -> None:
    file = convolutions.write(tmp_path, precision="fp8")
    types = {constant.data_type for constant in onnx.load(file).graph.initializer}
    assert TensorProto.FLOAT8E4M3FN in types
    assert TensorProto.INT8 not in types
    expected, found = convolutions.answers(convolutions.float_file), convolutions.answers(file)
    assert 0 < np.abs(found - expected).max() <= 0.3 * np.ptp(expected)


def test_an_unknown_pattern_or_precision_and_a_missing_range_are_one_sentence(
    convolutions: Case, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="pattern 'some' is unknown"):
        convolutions.write(tmp_path, "some")
    with pytest.raises(InputError, match="stem: precision 'int4'; use int8, fp8 or float"):
        convolutions.write(tmp_path, precision="int4")
    bare = Case(convolutions.float_file, Ranges({}, {}, "minmax", 1), convolutions.images)
    with pytest.raises(ExportError, match="no range of its input"):
        bare.write(tmp_path)


# What NVIDIA's own parser and compiler say, on this CPU.

ahead = pytest.mark.skipif(
    tensorrt_ahead.availability() is not None, reason=str(tensorrt_ahead.availability() or "available")
)


@ahead
def test_tensorrt_accepts_the_types_and_runs_every_rounded_layer_in_integers(case: Case, tmp_path: Path) -> None:
    file = case.write(tmp_path)
    compiled = tensorrt_ahead.examine(file, tensorrt_ahead.compile_kernels(file))
    assert compiled.left_float == ()
    assert compiled.integer == compiled.wanted > 0


@ahead
@pytest.mark.parametrize(("pattern", "integers"), [("all", 1), ("weights+add", 0)])
def test_tensorrt_fuses_the_attention(transformer: Case, pattern: str, integers: int, tmp_path: Path) -> None:
    file = transformer.write(tmp_path, pattern)
    compiled = tensorrt_ahead.examine(file, tensorrt_ahead.compile_kernels(file), ("qkv", "proj", "fc1", "fc2"))
    assert (compiled.attentions, compiled.integer_attentions) == (1, integers)


@ahead
def test_what_tensorrt_refuses_comes_back_in_its_own_words(convolutions: Case, tmp_path: Path) -> None:
    proto = onnx.load(convolutions.write(tmp_path))
    for constant in proto.graph.initializer:
        if constant.name == "input:zero":
            constant.CopyFrom(numpy_helper.from_array(np.array(3, np.int8), "input:zero"))
    broken = tmp_path / "broken.onnx"
    onnx.save(proto, broken)
    with pytest.raises(ExportError, match=r"broken\.onnx: tensorrt_rtx.* refuses it \(.*zero"):
        tensorrt_ahead.compile_kernels(broken)
    with pytest.raises(TargetUnavailable, match="chip 'SM90' is not one"):
        tensorrt_ahead.compile_kernels(broken, "SM90")
