"""In: small float files. Out: proof that ranges are right, that integer files run on integers, and what they weigh."""

import dataclasses
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import nn

from hirelc_deploy.compress.integer import quantize
from hirelc_deploy.compress.integer.calibration import Histogram, Ranges, calibrate
from hirelc_deploy.compress.integer.four_bits import use_four_bits
from hirelc_deploy.compress.integer.quantize import PATTERNS
from hirelc_deploy.compress.onnx_file import export
from hirelc_deploy.demo.model import DemoNet
from hirelc_deploy.errors import ExportError, InputError
from hirelc_deploy.inputs import models  # noqa: F401  (makes timm importable beside a CPU torch)
from hirelc_deploy.measure.backend import Precision

U8S8 = Precision("int8", "uint8", "int8", 8)


def images(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 3, 16, 16)).astype(np.float32)


def write(model, folder):
    """Return the dynamic and the static float file of a model."""
    dynamic, static = folder / "dynamic.onnx", folder / "static.onnx"
    export.export_onnx(model.eval(), torch.from_numpy(images(2)), dynamic)
    export.set_static_batch(dynamic, static)
    return dynamic, static


class Separable(nn.Module):
    """A depthwise and a pointwise convolution."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise = nn.Conv2d(16, 16, 1)
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        return self.fc(self.pointwise(torch.relu(self.depthwise(torch.relu(self.stem(x))))).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def cnn(tmp_path_factory):
    torch.manual_seed(0)
    return write(DemoNet(widths=(16, 32), blocks_per_stage=1), tmp_path_factory.mktemp("cnn"))


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=8, num_classes=5, embed_dim=32, depth=2, num_heads=2)
    return write(model, tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def separable(tmp_path_factory):
    torch.manual_seed(0)
    return write(Separable(), tmp_path_factory.mktemp("separable"))


def build(files, out, pattern="all", precision_of=lambda _: "int8", target=U8S8, means=True):
    ranges = calibrate(files[0], [images(32)], "minmax")
    ranges = ranges if means else dataclasses.replace(ranges, means={})
    quantize.quantize(files[1], out, ranges, precision_of, target=target, pattern=pattern)
    return out


def run(path, batch):
    session = export.open_session(path)
    return np.concatenate([session.run(None, {session.get_inputs()[0].name: image[None]})[0] for image in batch])


def kernels(path, tmp_path):
    """Count the operators that are left after ONNX Runtime's own rewriting: those that run."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "rewritten.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(str(tmp_path / "rewritten.onnx")).graph.node)


# Calibration


def test_minmax_is_the_least_and_largest_value_of_all_batches(cnn):
    batches = [images(5, 1), images(0), images(3, 2), images(8, 3)]
    ranges = calibrate(cnn[0], iter(batches), "minmax")
    everything = np.concatenate(batches)
    assert ranges.images == 16
    assert ranges.low["input"] == everything.min()
    assert ranges.high["input"] == everything.max()
    logits = export.open_session(cnn[0]).run(None, {"input": everything})[0]
    assert ranges.low["output"] == pytest.approx(logits.min(), rel=1e-5)
    assert ranges.high["output"] == pytest.approx(logits.max(), rel=1e-5)


@pytest.mark.parametrize("method", ["percentile", "mse"])
def test_clipping_stays_inside_the_plain_range(cnn, method):
    batches = [images(32)]
    plain, clipped = calibrate(cnn[0], batches, "minmax"), calibrate(cnn[0], batches, method)
    assert plain.low.keys() == clipped.low.keys()
    for tensor in plain.low:
        assert plain.low[tensor] <= clipped.low[tensor] <= clipped.high[tensor] <= plain.high[tensor]
    assert clipped.high["input"] < plain.high["input"]


def test_a_histogram_that_grew_counts_what_one_of_full_size_counts():
    rng = np.random.default_rng(0)
    grown, whole = Histogram(), Histogram()
    parts = [rng.normal(size=4000).astype(np.float32) * scale for scale in (0.01, 1.0, 0.0, 30.0)]
    for part in parts:
        grown.add(part)
    whole.bin_width = grown.bin_width
    whole.add(np.concatenate(parts))
    # Bins of values that sit on an edge may differ by rounding of the narrower bins; no value may be lost.
    assert grown.counts.sum() == whole.counts.sum() == 16000
    assert np.abs(np.cumsum(grown.counts) - np.cumsum(whole.counts)).max() <= 2


def test_percentiles_of_a_stream_are_those_of_the_whole():
    values = np.random.default_rng(0).exponential(size=50_000).astype(np.float32)
    histogram = Histogram()
    for part in np.split(values, 10):
        histogram.add(part)
    low, high = histogram.percentile_range(99.0)
    assert low == pytest.approx(np.percentile(values, 0.5), abs=2 * histogram.bin_width)
    assert high == pytest.approx(np.percentile(values, 99.5), abs=2 * histogram.bin_width)


def test_a_gaussian_is_clipped_where_the_literature_clips_it():
    # 256 uniform steps for a Gaussian: a step of 0.0308 sigma has the least error (Jayant and Noll 1984), +-3.94 sigma.
    values = np.random.default_rng(0).normal(size=2_000_000).astype(np.float32)
    histogram = Histogram()
    histogram.add(values)
    low, high = histogram.least_error_range(-5.5, 5.5)
    assert high == pytest.approx(3.94, abs=0.12)
    assert low == -high


def test_a_tensor_of_zeros_has_an_empty_range():
    histogram = Histogram()
    histogram.add(np.zeros(10, dtype=np.float32))
    assert histogram.percentile_range(99.9) == (0.0, 0.0)


def test_one_image_is_enough_but_is_warned_about(cnn):
    ranges = calibrate(cnn[0], [images(1)])
    assert ranges.warning.startswith("calibrated on 1 image;")
    assert calibrate(cnn[0], [images(32)]).warning == ""


@pytest.mark.parametrize("batches", [[], [images(0)]])
def test_no_image_is_refused(cnn, batches):
    with pytest.raises(InputError, match="no calibration image"):
        calibrate(cnn[0], batches)


def test_an_image_that_is_not_finite_is_named_as_the_tensor_it_breaks(cnn):
    broken = images(2)
    broken[1, 0, 0, 0] = np.inf
    with pytest.raises(ExportError, match="tensor input: NaN or infinity"):
        calibrate(cnn[0], [broken])


def test_calibration_wants_a_known_method_and_a_dynamic_file(cnn, tmp_path):
    with pytest.raises(InputError, match="'median' is unknown; use minmax"):
        calibrate(cnn[0], [images(1)], "median")
    export.set_static_batch(cnn[0], tmp_path / "two.onnx", 2)
    with pytest.raises(InputError, match="fixed batch"):
        calibrate(tmp_path / "two.onnx", [images(2)])


def test_a_file_for_one_image_is_calibrated_image_by_image(cnn):
    together, alone = (calibrate(file, [images(4)], "minmax") for file in cnn[:2])
    assert alone.images == together.images == 4
    shared = together.low.keys() & alone.low.keys()
    assert len(shared) > 3
    for tensor in shared:
        assert alone.low[tensor] == pytest.approx(together.low[tensor], abs=1e-5)
        assert alone.high[tensor] == pytest.approx(together.high[tensor], abs=1e-5)
    for layer, mean in together.means.items():
        np.testing.assert_allclose(alone.means[layer], mean, atol=1e-5)


def test_ranges_come_back_from_their_file(cnn, tmp_path):
    ranges = calibrate(cnn[0], [images(4)])
    ranges.write(tmp_path / "ranges.json")
    assert Ranges.read(tmp_path / "ranges.json") == ranges


@pytest.mark.parametrize("text", ["", "[]", '{"schema_version": 1}', '{"schema_version": 9}'])
def test_a_broken_range_file_is_refused(tmp_path, text):
    (tmp_path / "ranges.json").write_text(text)
    with pytest.raises(InputError, match=r"ranges\.json"):
        Ranges.read(tmp_path / "ranges.json")


# Placement


def test_all_is_what_onnx_runtimes_static_quantization_computes(cnn, tmp_path):
    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = iter([{"input": image[None]} for image in images(32)])

        def get_next(self):
            return next(self.batches, None)

    quantize_static(
        str(cnn[1]),
        str(tmp_path / "theirs.onnx"),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    ours = build(cnn, tmp_path / "ours.onnx", means=False)
    # They calibrate image by image, we in batches: float kernels then differ in the last bit, and so do the scales.
    theirs = run(tmp_path / "theirs.onnx", images(4, 9))
    np.testing.assert_allclose(run(ours, images(4, 9)), theirs, rtol=1e-6, atol=1e-7)
    assert kernels(ours, tmp_path) == kernels(tmp_path / "theirs.onnx", tmp_path)


@pytest.mark.parametrize("pattern", [name for name, pattern in PATTERNS.items() if pattern.operators is not None])
def test_an_integer_file_answers_nearly_as_the_float_one(cnn, vit, separable, tmp_path, pattern):
    for files in (cnn, vit, separable):
        wanted = run(files[1], images(8))
        found = run(build(files, tmp_path / "q.onnx", pattern), images(8))
        assert np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()


def test_a_residual_network_has_no_float_arithmetic_under_all(cnn, tmp_path):
    found = kernels(build(cnn, tmp_path / "q.onnx", "all"), tmp_path)
    expected = {"QLinearConv": 6, "QLinearAdd": 2, "QLinearGlobalAveragePool": 1, "QGemm": 1}
    borders = {"QuantizeLinear", "DequantizeLinear", "Transpose", "Flatten"}
    assert {kind: count for kind, count in found.items() if kind not in borders} == expected
    assert found["QuantizeLinear"] == found["DequantizeLinear"] == 1


def test_the_last_layer_writes_floats_by_itself_where_nothing_integer_reads_it(cnn, tmp_path):
    found = kernels(build(cnn, tmp_path / "q.onnx", "weights+add"), tmp_path)
    assert found["QGemm"] == 1
    assert found["DequantizeLinear"] == 0


def test_weights_makes_linear_layers_integer_and_leaves_attention_float(vit, tmp_path):
    found = kernels(build(vit, tmp_path / "q.onnx", "weights"), tmp_path)
    assert found["QGemm"] == 9  # qkv, proj, fc1, fc2 of two blocks, and the head
    assert found["QLinearConv"] == 1
    assert found["MatMul"] + found["FusedMatMul"] == 4  # scores and mix of two blocks
    assert found["Gelu"] == found["Softmax"] == 2
    assert found["QLinearMatMul"] == found["QLinearSoftmax"] == found["QLinearAdd"] == 0
    assert found["DequantizeLinear"] == 1  # behind the patch convolution, which has no float output


def test_depthwise_convolutions_stay_float_where_the_pattern_says_so(separable, tmp_path):
    for pattern, depthwise in PATTERNS.items():
        found = kernels(build(separable, tmp_path / "q.onnx", pattern), tmp_path)
        assert found["QLinearConv"] == (3 if depthwise.depthwise else 2), pattern


@pytest.mark.parametrize("layer", ["stem", "depthwise", "pointwise", "fc"])
@pytest.mark.parametrize("pattern", ["all", "weights"])
def test_a_layer_that_the_plan_wants_float_runs_float(separable, tmp_path, layer, pattern):
    path = build(separable, tmp_path / "q.onnx", pattern, lambda name: "float" if name == layer else "int8")
    found = kernels(path, tmp_path)
    assert found["QLinearConv"] + found["QGemm"] == 3
    assert found["Conv"] + found["FusedConv"] + found["Gemm"] == 1


def test_a_bias_shared_with_an_integer_layer_is_not_rounded_for_a_float_one(cnn, tmp_path):
    proto = onnx.load(str(cnn[1]))
    convolutions = {node.name: node for node in proto.graph.node if node.op_type == "Conv"}
    shared = convolutions["stages.1.0.conv1/Conv"].input[2]  # as files are that keep equal constants once
    convolutions["stages.1.0.conv2/Conv"].input[2] = shared
    onnx.save(proto, str(tmp_path / "shared.onnx"))
    files = (cnn[0], tmp_path / "shared.onnx", *cnn[2:])
    path = build(files, tmp_path / "q.onnx", "all", lambda name: "float" if name == "stages.1.0.conv2" else "int8")
    proto = onnx.load(str(path))
    floats = {i.name for i in proto.graph.initializer if i.data_type == onnx.TensorProto.FLOAT}
    (node,) = (node for node in proto.graph.node if node.name == "stages.1.0.conv2/Conv")
    assert node.input[1] in floats
    assert node.input[2] in floats


def test_nothing_integer_gives_the_float_file(cnn, tmp_path):
    for pattern in ("all", "weights"):
        path = build(cnn, tmp_path / "q.onnx", pattern, lambda _: "float")
        if pattern == "weights":
            assert path.read_bytes() == cnn[1].read_bytes()
        else:
            assert kernels(path, tmp_path)["QLinearConv"] == 0


def test_seven_bit_weights_stay_within_seven_bits(cnn, tmp_path):
    for bits, largest in ((8, 127), (7, 64)):
        build(cnn, tmp_path / "q.onnx", target=Precision("int8", "uint8", "int8", bits))
        weights = [i for i in onnx.load(str(tmp_path / "q.onnx")).graph.initializer if len(i.dims) > 1]
        assert len(weights) == 7
        assert max(np.abs(onnx.numpy_helper.to_array(w).astype(int)).max() for w in weights) == largest


def test_signed_activations_are_written_where_the_target_has_them(cnn, tmp_path):
    path = build(cnn, tmp_path / "q.onnx", target=Precision("int8", "int8", "int8", 8))
    zero_points = [i for i in onnx.load(str(path)).graph.initializer if i.name == "input_zero_point"]
    assert zero_points[0].data_type == onnx.TensorProto.INT8


def test_unknown_words_and_foreign_ranges_are_refused(cnn, vit, tmp_path):
    ranges = calibrate(cnn[0], [images(2)])
    out, floats = tmp_path / "q.onnx", Precision("float", "float32", "float32", 32)
    with pytest.raises(InputError, match="pattern 'some' is unknown; use all"):
        quantize.quantize(cnn[1], out, ranges, lambda _: "int8", target=U8S8, pattern="some")
    with pytest.raises(InputError, match="conv1: precision 'auto'"):
        quantize.quantize(cnn[1], out, ranges, lambda _: "auto", target=U8S8, pattern="all")
    with pytest.raises(InputError, match="no integer arithmetic"):
        quantize.quantize(cnn[1], out, ranges, lambda _: "int8", target=floats, pattern="all")
    with pytest.raises(ExportError, match="calibrate on this very model"):
        quantize.quantize(vit[1], out, ranges, lambda _: "int8", target=U8S8, pattern="all")


@pytest.mark.parametrize("others", ["int8", "float"])
def test_linear_layers_in_four_bits_run_near_the_float_file_and_are_an_eighth_of_it(vit, tmp_path, others):
    ranges = calibrate(vit[0], [images(8)])
    linear = {layer for layer in export.layer_of_node(onnx.load(str(vit[1]))).values() if "patch" not in layer}
    out = tmp_path / "four.onnx"
    quantize.quantize(
        vit[1], out, ranges, lambda layer: "int4" if layer in linear else others, target=U8S8, pattern="all"
    )
    proto = onnx.load(str(out))
    found = {layer for node, layer in export.layer_of_node(proto).items() if node.endswith("_Q4")}
    assert found == linear
    weights = sum(i.ByteSize() for i in onnx.load(str(vit[1])).graph.initializer if len(i.dims) == 2)
    packed = sum(i.ByteSize() for i in proto.graph.initializer if i.data_type == onnx.TensorProto.UINT8 and i.dims[1:])
    assert packed < weights / 7
    assert np.corrcoef(run(out, images(32)).ravel(), run(vit[1], images(32)).ravel())[0, 1] > 0.9


def test_a_weight_in_four_bits_is_within_a_step_of_what_it_was():
    weights = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)
    gemm = onnx.helper.make_node("Gemm", ["x", "w", "b"], ["y"], "layer/Gemm", transB=1)
    values = [("x", ["batch", 64]), ("y", ["batch", 16])]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in values]
    bias = np.arange(16, dtype=np.float32)
    constants = [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(bias, "b")]
    graph = onnx.helper.make_graph([gemm], "g", ends[:1], ends[1:], constants)
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=10)
    session = export.open_session(use_four_bits(proto, {"layer"}))
    found = (session.run(None, {"x": np.eye(64, dtype=np.float32)})[0] - bias).T
    steps = np.abs(weights.reshape(16, 2, 32)).max(axis=2, keepdims=True) / 8
    assert (np.abs(found.reshape(16, 2, 32) - weights.reshape(16, 2, 32)) <= 1.01 * steps).all()
    assert len(np.unique(found.reshape(16, 2, 32)[0, 0])) <= 16


def test_a_convolution_cannot_have_four_bits(cnn, tmp_path):
    ranges = calibrate(cnn[0], [images(8)])
    with pytest.raises(InputError, match="'int4' is for Linear layers"):
        quantize.quantize(cnn[1], tmp_path / "o.onnx", ranges, lambda _: "int4", target=U8S8, pattern="all")


# Size


@pytest.mark.parametrize("pattern", ["all", "weights"])
def test_stripping_changes_no_bit_of_the_output_and_no_kernel(cnn, vit, tmp_path, pattern):
    for files in (cnn, vit):
        path, slim = build(files, tmp_path / "q.onnx", pattern), tmp_path / "slim.onnx"
        slim.write_bytes(path.read_bytes())
        quantize.strip_for_shipping(slim)
        np.testing.assert_array_equal(run(slim, images(3)), run(path, images(3)))
        assert kernels(slim, tmp_path) == kernels(path, tmp_path)


def test_stripping_keeps_the_layer_of_every_weight_node_in_its_answer(cnn, tmp_path):
    path = build(cnn, tmp_path / "q.onnx")
    before = export.layer_of_node(onnx.load(str(path)))
    shipped = quantize.strip_for_shipping(path)
    nodes = {node.name: node.op_type for node in onnx.load(str(path)).graph.node}
    assert list(shipped.values()) == list(before.values())
    assert Counter(nodes[name] for name in shipped) == {"Conv": 6, "Gemm": 1}


def test_a_shipped_file_holds_little_beside_its_weights(cnn, tmp_path):
    path = build(cnn, tmp_path / "q.onnx")
    channels = 16 * 3 + 32 * 3 + 10
    quantize.strip_for_shipping(path)
    # Scale, bias and bias scale are 4 bytes each per channel; a zero point of 1 byte per width; 40 nodes of 60 bytes.
    assert quantize.overhead_bytes(path) < 13 * channels + 5000
    proto = onnx.load(str(path))
    assert not proto.metadata_props
    assert not proto.graph.value_info
    assert {opset.domain for opset in proto.opset_import} == {""}
