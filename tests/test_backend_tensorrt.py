"""The TensorRT backend: the contract where a GPU is; elsewhere its host side, on recorded APIs and a fake driver."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from fake_tensorrt import GPU_MILLISECONDS, INSPECTED, OUTPUTS, SHAPE, SURFACES, FakeDriver, FakeTensorrt
from hirelc_backends import tensorrt_program as program
from hirelc_backends.tensorrt_gpu import TensorrtGpu

from hirelc_deploy.graph.model_graph import LayerShape
from hirelc_deploy.measure.backend import Backend, Portable, only
from hirelc_deploy.measure.table import LayerKey, layer_model
from hirelc_deploy.testing.backend_contract import BackendContract

RELEASES = [f"{surface['module']} {surface['version']}" for surface in SURFACES]


class TestTensorrtGpu(BackendContract):
    def make(self) -> Backend:
        return TensorrtGpu()


@pytest.fixture(params=SURFACES, ids=RELEASES)
def trt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeTensorrt:
    module = FakeTensorrt(request.param, FakeDriver())
    monkeypatch.setattr(program, "load_tensorrt", lambda: module)
    return module


def cuda_of(trt: FakeTensorrt) -> program.Cuda:
    return program.Cuda(trt.driver)


def test_the_releases_from_10_3_to_11_4_and_rtx_are_recorded() -> None:
    versions = {(surface["module"], ".".join(surface["version"].split(".")[:2])) for surface in SURFACES}
    plain = {("tensorrt", version) for version in ("10.3", "10.7", "10.13", "10.16", "11.0", "11.4")}
    assert versions == plain | {("tensorrt_rtx", "1.7")}


def test_every_release_builds_and_runs_with_the_names_it_has(trt: FakeTensorrt, tmp_path: Path) -> None:
    session = program.Session(trt, b"model", str(tmp_path), cuda_of(trt))
    images = np.arange(2 * np.prod(SHAPE), dtype=np.float32).reshape(2, *SHAPE[1:])
    expected = np.stack([2 * image.ravel()[:OUTPUTS] for image in images])
    np.testing.assert_array_equal(only(session.infer(images)), expected)
    assert only(session.infer(images[:0])).shape == (0, OUTPUTS)
    wall, gpu = session.timed_run()
    assert gpu == GPU_MILLISECONDS * 1e6
    assert wall > 0
    assert session.profile(images[:1], 4) == [
        ("conv + relu", "CaskConvolution", True, 250.0),
        ("reformat", "Reformat", False, 250.0),
    ]
    with pytest.raises(ValueError, match=r"takes input of shape \[1, 3, 4, 4\], found \[1, 3, 5, 5\]"):
        session.infer(np.zeros((1, 3, 5, 5), np.float32))


def test_an_engine_is_built_once_per_file_runtime_and_gpu(trt: FakeTensorrt, tmp_path: Path) -> None:
    for model, builds in ((b"model", 1), (b"model", 1), (b"other", 2)):
        program.Session(trt, model, str(tmp_path), cuda_of(trt))
        assert trt.builds == builds
    trt.driver.gpu = "Another GPU"
    program.Session(trt, b"model", str(tmp_path), cuda_of(trt))
    assert trt.builds == 3
    assert (tmp_path / "timing.cache").exists() == (trt.__name__ == "tensorrt")


def test_types_come_from_the_file_and_tf32_is_off(trt: FakeTensorrt) -> None:
    assert program.build_plan(trt, b"model") == (b"plan of model", "strong")
    assert trt.settings["flags"] == 1 << trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    assert trt.settings["cleared"] == [trt.BuilderFlag.TF32]
    assert "set" not in trt.settings


def test_release_10_falls_back_to_weak_typing_and_says_so(trt: FakeTensorrt) -> None:
    trt.refuses_strong = True
    if trt.__version__.startswith("10."):
        assert program.build_plan(trt, b"model") == (b"plan of model", "weak")
        assert trt.settings["set"] == [trt.BuilderFlag.FP16, trt.BuilderFlag.INT8]
        assert trt.settings["flags"] == 0
    else:
        with pytest.raises(program.Unusable, match=r"refuses it.*no implementation found"):
            program.build_plan(trt, b"model")


def test_a_refused_file_comes_back_in_the_parser_s_words(trt: FakeTensorrt) -> None:
    with pytest.raises(program.Unusable, match=r"refuses it \(zero point must be 0\)"):
        program.build_plan(trt, b"bad")


def test_the_first_module_that_is_new_enough_is_taken() -> None:
    def find(**known: str) -> Any:
        def found(name: str) -> Any:
            if name not in known:
                raise ImportError(f"No module named {name!r}")
            module = type(sys)(name)
            module.__version__ = known[name]
            if "rtx" in name:
                module.ComputeCapability = object  # type: ignore[attr-defined]
            return module

        return found

    assert program.load_tensorrt(find(tensorrt="10.3.0", tensorrt_rtx="1.7.1")).__name__ == "tensorrt"
    assert program.load_tensorrt(find(tensorrt="8.6.1", tensorrt_rtx="1.7.1")).__name__ == "tensorrt_rtx"
    with pytest.raises(program.Unusable, match=r"tensorrt: version 10.2.0 is older than 10.3; tensorrt_rtx: No module"):
        program.load_tensorrt(find(tensorrt="10.2.0"))


def test_a_machine_without_a_gpu_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "_driver", lambda: FakeDriver(devices=0))
    assert "the NVIDIA driver sees 0 GPUs" in (program.availability() or "")
    monkeypatch.setattr(program, "LIBRARIES", ("libnowhere.so.1",))
    monkeypatch.undo()
    monkeypatch.setattr(program, "LIBRARIES", ("libnowhere.so.1",))
    assert "no NVIDIA driver is here (libnowhere.so.1 cannot be loaded)" in (program.availability() or "")


def test_a_gpu_without_tensorrt_is_a_reason_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "_driver", FakeDriver)
    monkeypatch.setattr(program, "MODULES", ("no_such_module",))
    assert "pip install tensorrt" in (program.availability() or "")


def test_facts_name_the_gpu_and_what_it_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "_driver", lambda: FakeDriver("Orin", (8, 7)))
    facts = program.facts()
    assert (facts["gpu"], facts["compute_capability"], facts["cuda_driver"]) == ("Orin", "8.7", "12.6")


@pytest.mark.parametrize(
    ("capability", "names"),
    [
        ("7.0", ["float"]),
        ("7.5", ["float", "int8"]),
        ("8.7", ["float", "int8"]),
        ("8.9", ["float", "int8", "fp8"]),
        ("10.0", ["float", "int8", "fp8"]),
    ],
)
def test_precisions_follow_the_compute_capability(capability: str, names: list[str]) -> None:
    precisions = TensorrtGpu.precisions_on({"runtime": {"compute_capability": capability}})
    assert [precision.name for precision in precisions] == names
    assert precisions[0].weight_type == "float16"


def test_the_backend_can_be_sent_to_a_board() -> None:
    assert isinstance(TensorrtGpu(), Portable)


def test_the_program_is_one_file_for_python_3_8_without_this_project() -> None:
    source = TensorrtGpu.program.read_text("utf-8")
    tree = ast.parse(source, feature_version=(3, 8))
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not any(name.startswith("hirelc") or name == "torch" for name in names)


# The inspector's JSON


def test_layers_are_read_as_release_10_and_release_11_write_them() -> None:
    ten = program.read_layers(json.dumps(INSPECTED))
    assert [(layer["name"], layer["is_integer"]) for layer in ten] == [("conv + relu", True), ("reformat", False)]
    eleven = {"Name": "fc", "LayerType": "gemm", "Inputs": [{"Format": "Row major", "DataType": "Int8"}]}
    half = {"Name": "mha", "LayerType": "kgen", "Inputs": [{"Format": "Row major", "DataType": "Half"}]}
    quantize = {"Name": "__myl_MulMinMaxRounCast", "LayerType": "kgen", "Inputs": [{"DataType": "Int8"}]}
    layers = program.read_layers(json.dumps({"Layers": [eleven, half, quantize, "only a name"], "I/O Tensors": []}))
    assert [layer["is_integer"] for layer in layers] == [True, False, False, False]
    assert layers[0]["inputs"] == ["Int8"]
    assert layers[3]["name"] == "only a name"


# The exported folder


@pytest.fixture
def folder(trt: FakeTensorrt, tmp_path: Path) -> Path:
    (tmp_path / "model.fp16.onnx").write_bytes(b"model")
    inputs = np.random.default_rng(0).standard_normal((3, *SHAPE[1:])).astype(np.float32)
    logits = 2 * inputs.reshape(3, -1)[:, :OUTPUTS]
    np.savez(tmp_path / "inputs.npz", inputs=inputs, **{"model.fp16.onnx": logits})
    return tmp_path


def test_a_built_engine_is_found_and_checked_again(trt: FakeTensorrt, folder: Path) -> None:
    record = program.build(str(folder), cuda=cuda_of(trt))
    assert record == json.loads((folder / "engine.json").read_text("utf-8"))
    assert record["built_for"]["gpu"] == "Fake GPU"
    found = program.check(str(folder), cuda_of(trt))
    answers = {"reproduced": True, "furthest_share_of_range": 0.0, "same_class": 1.0}
    assert found == {"model": "model.fp16.onnx", **answers, "samples": 3}


def test_the_fastest_form_is_kept_and_a_refused_one_is_named(trt: FakeTensorrt, folder: Path) -> None:
    (folder / "model.int8-all.onnx").write_bytes(b"fast")
    (folder / "model.int8-weights.onnx").write_bytes(b"bad")
    record = program.build(str(folder), cuda=cuda_of(trt))
    assert record["model"] == "model.int8-all.onnx"
    forms = record["forms"]
    assert forms["model.fp16.onnx"]["gpu_ms"]["median"] == GPU_MILLISECONDS
    assert forms["model.int8-all.onnx"]["gpu_ms"] == {"median": 1.0, "p99": 1.0, "runs": program.ROUNDS}
    assert "zero point must be 0" in forms["model.int8-weights.onnx"]["refused"]
    program.load(str(folder), cuda_of(trt)).close()


def test_a_form_slower_than_fp16_is_not_kept(trt: FakeTensorrt, folder: Path) -> None:
    (folder / "model.int8-all.onnx").write_bytes(b"slow")
    assert program.build(str(folder), cuda=cuda_of(trt))["model"] == "model.fp16.onnx"


def test_a_folder_without_a_usable_form_is_one_sentence(trt: FakeTensorrt, tmp_path: Path) -> None:
    with pytest.raises(program.Unusable, match=r"holds no model\.NAME\.onnx"):
        program.build(str(tmp_path), cuda=cuda_of(trt))
    (tmp_path / "model.fp16.onnx").write_bytes(b"bad")
    with pytest.raises(program.Unusable, match=r"every form was refused: .*zero point must be 0"):
        program.build(str(tmp_path), cuda=cuda_of(trt))


def test_wrong_answers_are_not_reproduced(trt: FakeTensorrt, folder: Path) -> None:
    with np.load(folder / "inputs.npz") as samples:
        inputs, logits = samples["inputs"], samples["model.fp16.onnx"]
    logits[1] = logits[1][::-1]
    np.savez(folder / "inputs.npz", inputs=inputs, **{"model.fp16.onnx": logits})
    program.build(str(folder), cuda=cuda_of(trt))
    assert not program.check(str(folder), cuda_of(trt))["reproduced"]


def test_an_engine_refuses_another_gpu_another_file_and_another_engine(trt: FakeTensorrt, folder: Path) -> None:
    with pytest.raises(program.Unusable, match=r"holds no model\.engine.*engine\.py build"):
        program.load(str(folder), cuda_of(trt))
    program.build(str(folder), cuda=cuda_of(trt))
    trt.driver.gpu = "Another GPU"
    with pytest.raises(program.Unusable, match="was built for gpu Fake GPU, but here is Another GPU; an engine runs"):
        program.load(str(folder), cuda_of(trt))
    trt.driver.gpu = "Fake GPU"
    version, trt.__version__ = trt.__version__, "12.0"
    with pytest.raises(program.Unusable, match=r"was built for runtime .*, but here is .* 12.0"):
        program.load(str(folder), cuda_of(trt))
    trt.__version__ = version
    (folder / "model.fp16.onnx").write_bytes(b"edited")
    with pytest.raises(program.Unusable, match=r"model\.fp16\.onnx has changed"):
        program.load(str(folder), cuda_of(trt))
    (folder / "model.engine").write_bytes(b"other")
    with pytest.raises(program.Unusable, match=r"not the file that engine\.json describes"):
        program.load(str(folder), cuda_of(trt))


def test_bench_tells_three_times_with_and_without_graph_and_copies(trt: FakeTensorrt, folder: Path) -> None:
    program.build(str(folder), cuda=cuda_of(trt))
    engine = program.load(str(folder), cuda_of(trt))
    found = program.bench(engine, seconds=0.0)
    for regime in ("graph", "kernels"):
        times = found[regime]
        assert times["gpu_ms"] == {"median": GPU_MILLISECONDS, "p99": GPU_MILLISECONDS, "runs": program.BENCH_RUNS}
        assert 0 < times["launch_ms"]["median"] <= times["host_ms"]["median"]
        assert times["host_without_copies_ms"]["runs"] == program.BENCH_RUNS
    assert engine.graph is not None


def test_an_engine_that_cannot_be_captured_runs_kernel_by_kernel(trt: FakeTensorrt, folder: Path) -> None:
    program.build(str(folder), cuda=cuda_of(trt))

    def refuse(stream: Any, graph: Any) -> int:
        trt.driver.capturing = False
        return 901

    trt.driver._cuStreamEndCapture = refuse  # type: ignore[method-assign]
    engine = program.load(str(folder), cuda_of(trt))
    assert engine.graph is None
    assert set(program.bench(engine, seconds=0.0)) == {"kernels"}


def test_memory_is_given_back(trt: FakeTensorrt, folder: Path) -> None:
    program.build(str(folder), cuda=cuda_of(trt))
    before = len([key for key in trt.driver.live if key > 0])
    engine = program.load(str(folder), cuda_of(trt))
    assert len([key for key in trt.driver.live if key > 0]) == before + 4
    engine.close()
    assert len([key for key in trt.driver.live if key > 0]) == before


def test_summary_is_the_median_and_the_99th_percentile() -> None:
    assert program.summary([1_000_000, 3_000_000, 2_000_000]) == {"median": 2.0, "p99": 3.0, "runs": 3}
    assert program.summary([1_000_000, 3_000_000]) == {"median": 2.0, "p99": 3.0, "runs": 2}


@pytest.mark.skipif(program.availability() is None, reason="a GPU with TensorRT is here")
def test_the_program_without_a_gpu_is_one_sentence(tmp_path: Path) -> None:
    script = shutil.copy(TensorrtGpu.program, tmp_path / "engine.py")
    (tmp_path / "model.fp16.onnx").write_bytes(b"model")
    done = subprocess.run(
        [sys.executable, str(script), "build"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("engine.py: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", program.PROVIDERS)
@pytest.mark.parametrize("precision", ["float", "int8"])
def test_onnx_runtime_s_providers_run_files_where_no_tensorrt_can_be_imported(
    name: str, precision: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Any] = []

    class Session:
        """A session on the CPU that says it is on the provider it was asked for."""

        def __init__(self, path: str, options: Any, providers: list[Any]) -> None:
            asked.extend(providers)
            self._real = real(path, options, providers=["CPUExecutionProvider"])

        def __getattr__(self, member: str) -> Any:
            return getattr(self._real, member)

        def get_providers(self) -> list[str]:
            return [name, "CPUExecutionProvider"]

    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [name, "CPUExecutionProvider"])
    monkeypatch.setattr(program, "MODULES", ("no_such_module",))
    orin = {one.name: one for one in TensorrtGpu.precisions_on({"runtime": {"compute_capability": "8.7"}})}
    shape = LayerShape("conv", 64, (8, 8), (3, 3), (1, 1), (1, 1), activation="relu")
    model, image_shape, _ = layer_model(LayerKey(shape, 4, 8, precision), orin[precision])
    path = tmp_path / "layer.onnx"
    path.write_bytes(model.SerializeToString())
    session = program.open_session(str(path), 1, str(tmp_path))
    images = np.ones((3, *image_shape[1:]), np.float32)
    assert only(session.infer(images)).shape == (3, 8, 8, 8)
    assert session.timed_run()[0] > 0
    ((what, operator, is_integer, microseconds),) = session.profile(images[:1], 4)
    assert (what, operator, is_integer) == ("whole file", name, False)
    assert microseconds > 0
    assert asked[0][0] == name
    assert ("trt_int8_enable" in asked[0][1]) == (name == "TensorrtExecutionProvider")
