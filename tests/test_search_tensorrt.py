"""A whole search for a GPU, on a fake TensorRT that reads the files: which forms are written, timed and shipped."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from hirelc_backends import tensorrt_ahead
from hirelc_backends.tensorrt_gpu import TensorrtGpu
from onnx import TensorProto

from hirelc_deploy.cli import application
from hirelc_deploy.compress.integer.forms import form_of
from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.model_graph import LayerShape
from hirelc_deploy.measure import targets
from hirelc_deploy.measure.backend import Backend, Precision
from hirelc_deploy.measure.device import LocalDevice
from hirelc_deploy.measure.program import ProgramBackend
from hirelc_deploy.measure.table import LatencyTable, LayerKey, layer_model
from hirelc_deploy.testing.backend_contract import BackendContract

PROGRAM = Path(__file__).parent / "fake_gpu_program.py"
ORIN = {
    precision.name: precision for precision in TensorrtGpu.precisions_on({"runtime": {"compute_capability": "8.7"}})
}
CONV = LayerShape("conv", 256, (16, 16), (3, 3), (1, 1), (1, 1), activation="relu")
DEPTHWISE = LayerShape("conv", 64, (16, 16), (3, 3), (2, 2), (1, 1), depthwise=True, activation="relu6")
LINEAR = LayerShape("linear", 197, (1, 197), activation="gelu")
ATTENTION = LayerShape("attention", 197, (1, 197), head_dim=64)


def fake_gpu() -> ProgramBackend:
    return ProgramBackend("tensorrt_gpu", PROGRAM, TensorrtGpu.precisions_on, LocalDevice())


class TestTensorrtOnAFakeGpu(BackendContract):
    def make(self) -> Backend:
        return fake_gpu()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(targets, "get_backend", lambda name: fake_gpu())
    monkeypatch.setenv("HIRELC_DEPLOY_CACHE", str(tmp_path / "cache"))


def run(command: str, out: Path, *options: str) -> int:
    net = ("--model", "hirelc_deploy.demo.model:DemoNet", "--model-arg", "widths=[16,16]")
    data = ("--model-arg", "blocks_per_stage=1", "--data", "synthetic:16", "--target", "gpu", "--quiet")
    return application.run([command, *net, *data, "--recovery-epochs", "0", "--out", str(out), *options])


def types_of(file: Path) -> set[int]:
    proto = onnx.load(str(file))
    return {constant.data_type for constant in proto.graph.initializer}


@pytest.mark.usefixtures("gpu")
def test_a_search_for_a_gpu_ships_a_typed_file_that_beats_fp16(tmp_path: Path) -> None:
    assert run("search", tmp_path / "run", "--speedup", "6", "--trials", "2", "--options", "3") == 0
    result = json.loads((tmp_path / "run/result.json").read_text("utf-8"))
    names = [candidate["name"] for candidate in result["candidates"]]
    assert "fp16" in names
    assert "fp32" not in names
    assert result["latency"]["ratio"] < min(1 / 5.5, result["best_unpruned"]["ratio"])
    for file in (*(tmp_path / "run/files").glob("*.onnx"), tmp_path / "run/bundle/model.onnx"):
        assert TensorProto.FLOAT not in types_of(file), file
    assert TensorProto.INT8 in types_of(tmp_path / "run/bundle/model.onnx")
    assert TensorProto.INT8 not in types_of(tmp_path / "run/files/uncut-float.onnx")
    assert "FP16 file" in (tmp_path / "run/report.html").read_text("utf-8")
    assert (tmp_path / "cache/hirelc-deploy/layer-times.jsonl").read_text("utf-8").count("\n") > 5


@pytest.mark.usefixtures("gpu")
def test_apply_for_a_gpu_says_which_patterns_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"schema_version": 1, "default_precision": "auto", "pattern": "all-softmax-add"}))
    assert run("apply", tmp_path / "run", "--plan", str(plan)) == 2
    assert "use all, all-depthwise, weights+add" in capsys.readouterr().err


def test_the_devices_forms_are_told_apart() -> None:
    assert form_of(list(ORIN.values())).float_name == "fp16"
    assert form_of([Precision("float", "float32", "float32", 32)]).float_name == "fp32"
    with pytest.raises(InputError, match="form onnx, tensorrt: a device takes one of onnx, tensorrt"):
        form_of([*ORIN.values(), Precision("float", "float32", "float32", 32)])


@pytest.mark.parametrize("precision", ["float", "int8"])
@pytest.mark.parametrize(
    "shape", [CONV, DEPTHWISE, LINEAR, ATTENTION], ids=["conv", "depthwise", "linear", "attention"]
)
def test_a_layer_is_timed_in_the_form_it_has_in_a_network(shape: LayerShape, precision: str, tmp_path: Path) -> None:
    features = 3 if shape.kind == "attention" else 64
    table = LatencyTable(fake_gpu(), tmp_path / "table.jsonl")
    assert table.layer_ms(shape, features, features, precision) > 0
    integer = precision == "int8" and shape.kind != "attention"
    model, _, _ = layer_model(LayerKey(shape, features, features, precision), ORIN["int8" if integer else "float"])
    source, result = model.graph.input[0], model.graph.output[0]
    assert source.type.tensor_type.elem_type == (TensorProto.INT8 if integer else TensorProto.FLOAT16)
    ends_in_integers = integer and shape.kind == "conv"
    assert result.type.tensor_type.elem_type == (TensorProto.INT8 if ends_in_integers else TensorProto.FLOAT16)


@pytest.mark.skipif(tensorrt_ahead.availability() is not None, reason=str(tensorrt_ahead.availability()))
@pytest.mark.parametrize("precision", ["float", "int8"])
@pytest.mark.parametrize("shape", [CONV, DEPTHWISE, LINEAR], ids=["conv", "depthwise", "linear"])
def test_nvidia_s_compiler_makes_one_product_of_a_layer(shape: LayerShape, precision: str, tmp_path: Path) -> None:
    model, _, _ = layer_model(LayerKey(shape, 64, 64, precision), ORIN[precision])
    path = tmp_path / "layer.onnx"
    path.write_bytes(model.SerializeToString())
    (product,) = (kernel for kernel in tensorrt_ahead.compile_kernels(path) if kernel.is_product)
    assert product.is_integer == (precision == "int8")
