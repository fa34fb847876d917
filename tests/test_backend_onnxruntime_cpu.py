"""The ONNX Runtime CPU backend: the contract, and what only it can get wrong."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from hirelc_backends.onnxruntime_cpu import OnnxRuntimeCpu, weight_bits
from hirelc_backends.onnxruntime_program import is_integer, mean_of_fastest_half, negations

from hirelc_deploy.errors import ExportError, InputError
from hirelc_deploy.measure import worker
from hirelc_deploy.measure.backend import Backend, Portable
from hirelc_deploy.measure.device import LocalDevice
from hirelc_deploy.testing.backend_contract import BackendContract, random_images, write_model


class TestOnnxRuntimeCpu(BackendContract):
    def make(self) -> Backend:
        return OnnxRuntimeCpu()


def test_importing_the_adapter_does_not_import_the_runtime() -> None:
    code = "import sys, hirelc_backends.onnxruntime_cpu as b; b.OnnxRuntimeCpu(); print('onnxruntime' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.strip() == "False"


def test_a_missing_runtime_is_a_reason_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install onnxruntime" in (OnnxRuntimeCpu().availability() or "")


@pytest.mark.parametrize(
    ("features", "architecture", "bits"),
    [
        (frozenset({"avx2", "avx512_vnni"}), "x86_64", 8),
        (frozenset({"avx2", "avx_vnni"}), "x86_64", 8),
        (frozenset({"avx2", "avx512f"}), "x86_64", 7),
        (None, "AMD64", 7),
        (None, "arm64", 8),
        (frozenset({"asimd"}), "aarch64", 8),
    ],
)
def test_weights_use_seven_bits_where_products_would_saturate(
    features: frozenset[str] | None, architecture: str, bits: int
) -> None:
    found, remark = weight_bits(features, architecture)
    assert found == bits
    assert bool(remark) == (bits == 7)


def test_integer_arithmetic_is_told_from_conversions_and_moves() -> None:
    integers = [{"uint8": [1, 3, 8, 8]}]
    for operator in ("QLinearConv", "QLinearMatMul", "QLinearAdd", "QGemm", "ConvInteger", "MatMulIntegerToFloat"):
        assert is_integer({"op_name": operator, "input_type_shape": integers})
    for operator in ("QuantizeLinear", "DequantizeLinear", "Cast", "Transpose", "Reshape", "Conv", "Gemm"):
        assert not is_integer({"op_name": operator, "input_type_shape": integers})
    assert is_integer({"op_name": "MaxPool", "input_type_shape": integers})
    assert not is_integer({"op_name": "MaxPool", "input_type_shape": [{"float": [1, 3, 8, 8]}]})


def test_the_fastest_half_drops_what_other_programs_added() -> None:
    assert mean_of_fastest_half([3.0, 1.0, 900.0, 2.0]) == 1.5
    assert mean_of_fastest_half([7.0]) == 7.0
    assert mean_of_fastest_half([5.0, 900.0, 1.0]) == 3.0


def test_a_profile_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    runner = OnnxRuntimeCpu().build(write_model(tmp_path / "model.onnx"))
    runner.profile(random_images(1), 2)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_profile_names_integer_kernels_of_an_integer_file(tmp_path: Path) -> None:
    runner = OnnxRuntimeCpu().build(write_model(tmp_path / "model.onnx", integer=True))
    integer = {operator.operator for operator in runner.profile(random_images(1), 2) if operator.is_integer}
    assert {"QLinearConv", "QGemm"} <= integer


def test_images_of_a_wrong_size_are_bad_input(tmp_path: Path) -> None:
    runner = OnnxRuntimeCpu().build(write_model(tmp_path / "model.onnx"))
    with pytest.raises(InputError, match=r"takes input of shape .*found \[1, 3, 9, 9\]"):
        runner.infer(np.zeros((1, 3, 9, 9), np.float32))


def test_the_timing_process_ends_with_the_context_and_leaves_no_zombie(tmp_path: Path) -> None:
    with OnnxRuntimeCpu().open_timing([write_model(tmp_path / "model.onnx")], 1, seed=0) as process:
        child = process._process.child  # type: ignore[attr-defined]
        assert child.poll() is None
        process.rounds(2)
    assert child.returncode == 0


def test_a_timing_process_that_is_killed_is_started_again(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.onnx")
    with OnnxRuntimeCpu().open_timing([model], 1, seed=0) as process:
        assert process.rounds(2).shape == (2, 1, 2)
        process._process.child.kill()  # type: ignore[attr-defined]
        assert process.rounds(3).shape == (3, 1, 2)
        assert process.restarts == 1


def test_a_timing_process_that_keeps_ending_is_the_files_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ending = tmp_path / "ending.py"
    ending.write_text(
        "import os\nclass Session:\n    runs = 0\n    def timed_run(self):\n        self.runs += 1\n"
        "        os.abort() if self.runs > 20 else None\n        return 1, 1\n"
        "def open_session(path, threads, cache): return Session()\n"
    )
    model = write_model(tmp_path / "model.onnx")
    monkeypatch.setattr(OnnxRuntimeCpu, "program", ending)
    with (
        pytest.raises(ExportError, match=r"model\.onnx: the timing process on this machine was lost 3 times.*signal 6"),
        OnnxRuntimeCpu().open_timing([model], 1, seed=0) as process,
    ):
        process.rounds(2)


def test_a_file_that_ends_the_runtime_is_an_export_error_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crashing = tmp_path / "crashing_program.py"
    crashing.write_text("import sys, os\nprint('illegal instruction', file=sys.stderr, flush=True)\nos.abort()\n")
    monkeypatch.setattr(OnnxRuntimeCpu, "program", crashing)
    model = write_model(tmp_path / "model.onnx")
    with (
        pytest.raises(ExportError, match=r"signal 6, illegal instruction.*model\.onnx"),
        OnnxRuntimeCpu().open_timing([model], 1, seed=0),
    ):
        pass


def test_a_timing_process_that_hangs_is_ended_at_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = tmp_path / "hanging_program.py"
    hanging.write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr(OnnxRuntimeCpu, "program", hanging)
    model = write_model(tmp_path / "model.onnx")
    with (
        pytest.raises(ExportError, match=r"did not answer within .*model\.onnx"),
        OnnxRuntimeCpu(load_deadline_s=0.2).open_timing([model], 1, seed=0),
    ):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX signals")
def test_the_timing_process_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.onnx")
    parent_code = (
        "import sys, time; from pathlib import Path; from hirelc_backends.onnxruntime_cpu import OnnxRuntimeCpu\n"
        "with OnnxRuntimeCpu().open_timing([Path(sys.argv[1])], 1, 0) as process:\n"
        "    print(process._process.child.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", parent_code, str(model)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until = time.monotonic() + 30
    while is_running(child) and time.monotonic() < until:
        time.sleep(0.02)
    assert not is_running(child)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    # A process that ended stays in the list until whoever inherited it has asked for its status.
    return not (state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z")


def test_the_model_that_gauges_the_profiler_is_a_valid_one() -> None:
    model = onnx.load_from_string(negations(20))
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Neg"] * 20
    assert (model.graph.input[0].name, model.graph.output[0].name) == ("t0", "t20")


def test_what_runs_on_a_device_is_python_38_and_imports_nothing_of_ours() -> None:
    assert isinstance(OnnxRuntimeCpu(), Portable)
    for file in (OnnxRuntimeCpu.program, Path(worker.__file__)):
        source = file.read_text("utf-8")
        ast.parse(source, feature_version=(3, 8))
        assert source.index("from __future__ import annotations") < source.index("import json")
        assert "from hirelc" not in source
        assert "import hirelc" not in source


def test_several_threads_are_timed_too(tmp_path: Path) -> None:
    with OnnxRuntimeCpu().open_timing([write_model(tmp_path / "model.onnx")], 2, seed=0) as process:
        assert process.rounds(2).shape == (2, 1, 2)


def test_a_process_started_ahead_serves_one_measurement_and_a_dead_one_none() -> None:
    device = LocalDevice(ahead=1)
    with device.open(OnnxRuntimeCpu.program) as first:
        assert "onnxruntime" in first.ask("describe", limit_s=60)[0]["versions"]
    ((_, ready),) = device._ready
    with device.open(OnnxRuntimeCpu.program) as second:
        assert second is ready
        assert second.ask("describe", limit_s=60)[0]["availability"] is None
    ((_, third),) = device._ready
    assert third is not second
    third.child.kill()
    third.child.wait()
    with device.open(OnnxRuntimeCpu.program) as fourth:
        assert fourth is not third
        assert fourth.ask("describe", limit_s=60)[0]["availability"] is None


def test_nothing_that_was_started_ahead_outlives_its_device() -> None:
    device = LocalDevice(ahead=2)
    with device.open(OnnxRuntimeCpu.program):
        pass
    children = [process.child for _, process in device._ready]
    assert len(children) == 2
    del device
    assert all(child.poll() is not None for child in children)
