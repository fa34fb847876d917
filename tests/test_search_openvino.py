"""`search` and `apply` with OpenVINO as their runtime, from the command to a bundle that runs without this project."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hirelc_backends import openvino_program
from hirelc_backends.onnxruntime_cpu import OnnxRuntimeCpu
from hirelc_backends.openvino_cpu import OpenvinoCpu
from PIL import Image

from hirelc_deploy.cli import application
from hirelc_deploy.deliver.bundle import runtime_of
from hirelc_deploy.deliver.race import race
from hirelc_deploy.deliver.verify import verify
from hirelc_deploy.evaluate.effort import Effort
from hirelc_deploy.jobs import doctor
from hirelc_deploy.measure.backend import BFLOAT_FORM, FLOAT_AS
from hirelc_deploy.measure.protocol import Timing, TimingLimits, compare

needs_openvino = pytest.mark.skipif(openvino_program.availability() is not None, reason="needs the extra openvino")

BRIEF = TimingLimits(processes=1, min_rounds=5, max_rounds=5, half_width=1.0, seconds=5.0)
"""No test looks at how fast anything is."""

ALONE = """
import runpy, sys
sys.modules.update(dict.fromkeys(("torch", "onnx", "onnxruntime", "hirelc_deploy", "hirelc_backends")))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a program that can import none of these."""


@pytest.fixture(scope="module")
def brief(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hirelc_deploy.jobs.workplace.Effort", partial(Effort, timing=BRIEF))
        patch.setattr("hirelc_deploy.jobs.shipping.race", partial(race, limits=BRIEF))
        patch.setenv("HIRELC_DEPLOY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def run(command: str, out: Path, *options: str, target: str = "openvino") -> Path:
    net = ("--model", "hirelc_deploy.demo.model:DemoNet", "--model-arg", "widths=[16,16]")
    data = ("--model-arg", "blocks_per_stage=1", "--data", "synthetic:16", "--target", target, "--quiet")
    assert application.run([command, *net, *data, "--recovery-epochs", "0", "--out", str(out), *options]) == 0
    return out


@pytest.fixture(scope="module")
def applied(brief: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run("apply", tmp_path_factory.mktemp("applied") / "run", "--plan", "uniform:keep=0.5")


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def script(bundle: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-c", ALONE, str(bundle / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@needs_openvino
def test_apply_records_the_runtime_and_the_options_that_were_timed(applied: Path) -> None:
    manifest = read(applied / "bundle/manifest.json")
    assert manifest["machine"]["backend"] == "openvino_cpu"
    assert set(manifest["versions"]) == {"openvino", "numpy"}
    assert manifest["runtime"] == {
        "name": "openvino",
        "options": {**openvino_program.OPTIONS, "INFERENCE_NUM_THREADS": 1},
    }
    assert "runtime.py" in manifest["files"]
    assert manifest["measurements"]["operators"]["integer_ops"] >= 7
    named = [one["name"] for one in read(applied / "result.json")["operators"] if one["is_integer"]]
    assert any(name.startswith("conv1/Convolution ") for name in named)


@needs_openvino
@pytest.mark.usefixtures("brief")
def test_a_plan_may_ask_for_bfloat16_and_the_bundle_says_so(tmp_path: Path) -> None:
    if OpenvinoCpu().precisions()[0].form != BFLOAT_FORM:
        pytest.skip("this CPU does not multiply bfloat16")
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"schema_version": 1, "default_precision": "float", "pattern": "float+bf16"}))
    out = run("apply", tmp_path / "run", "--plan", str(plan))
    assert read(out / "bundle/manifest.json")["runtime"]["options"]["INFERENCE_PRECISION_HINT"] == "bf16"
    assert {one.key: one.value for one in onnx.load(out / "bundle/model.onnx").metadata_props} == {FLOAT_AS: "bf16"}
    assert script(out / "bundle", "--check").stdout.splitlines()[-1] == "samples reproduced: True"


@needs_openvino
def test_its_bundle_runs_with_numpy_and_openvino_alone(applied: Path, tmp_path: Path) -> None:
    done = script(applied / "bundle", "--check")
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["samples reproduced: True"]), done.stderr
    options = {**openvino_program.OPTIONS, "INFERENCE_NUM_THREADS": 1}
    assert f"OPTIONS = {options!r}" in (applied / "bundle/runtime.py").read_text("utf-8")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save(tmp_path / "picture.png")
    shown = script(applied / "bundle", str(tmp_path / "picture.png"))
    assert (shown.returncode, len(shown.stdout.splitlines())) == (0, 1), shown.stderr


@needs_openvino
def test_its_bundle_is_what_it_says(applied: Path) -> None:
    result = verify(applied / "bundle", None, OpenvinoCpu())
    assert result.problems == ()
    assert result.integer_ops >= 7  # type: ignore[operator]


@needs_openvino
@pytest.mark.usefixtures("brief")
def test_a_search_ships_a_file_that_openvino_timed(tmp_path: Path) -> None:
    out = run(
        "search", tmp_path / "run", "--speedup", "1.1", "--trials", "2", "--options", "2", "--strategy", "knapsack"
    )
    names = [candidate["name"] for candidate in read(out / "result.json")["candidates"]]
    assert {"fp32", "int8 blanket"} <= {*names}
    assert ("bf16" in names) == (OpenvinoCpu().precisions()[0].form == BFLOAT_FORM)
    assert read(out / "bundle/manifest.json")["runtime"]["name"] == "openvino"
    assert read(out / "machine.json")["backend"] == "openvino_cpu"


@needs_openvino
@pytest.mark.usefixtures("brief")
def test_the_last_race_of_a_cpu_has_the_files_of_both_runtimes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def openvino_wins(files: Any, clock: Any, **options: Any) -> list[Timing]:
        found = compare(files, clock, **options)
        return [replace(t, ratio=0.01 if "files-openvino_cpu" in str(t.file) else t.ratio) for t in found]

    monkeypatch.setattr("hirelc_deploy.deliver.race.compare", openvino_wins)
    out = run("apply", tmp_path / "run", "--plan", "uniform:keep=0.5", target="cpu")
    result, manifest = read(out / "result.json"), read(out / "bundle/manifest.json")
    names = {candidate["name"] for candidate in result["candidates"]}
    assert {"fp32", "ours", "fp32, openvino_cpu", "int8 blanket, openvino_cpu", "ours, openvino_cpu"} <= names
    assert (manifest["runtime"]["name"], manifest["machine"]["backend"]) == ("openvino", "openvino_cpu")
    assert result["latency"]["ratio"] == 0.01
    assert result["latency"]["reference"] == "uncut-float.onnx"
    assert "ours, openvino_cpu" in (out / "report.html").read_text("utf-8")
    ours, theirs = OnnxRuntimeCpu(), OpenvinoCpu()
    float_file = out / "files/uncut-float.onnx"
    checked = verify(out / "bundle", None, ours, others=[theirs], reference=float_file, limits=BRIEF)
    assert (checked.problems, checked.machine["backend"]) == ((), "openvino_cpu")  # type: ignore[index]
    assert checked.latency is not None
    (remark,) = (one for one in verify(out / "bundle", None, ours).remarks if "bundle is for" in one)
    assert remark == "The bundle is for 'openvino'; it was run in onnxruntime."
    assert script(out / "bundle", "--check").stdout.splitlines()[-1] == "samples reproduced: True"


@pytest.mark.usefixtures("brief")
def test_without_openvino_a_cpu_has_the_files_of_one_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenvinoCpu, "availability", lambda self: "OpenVINO cannot be imported.")
    out = run("apply", tmp_path / "run", "--plan", "uniform:keep=0.5", target="cpu")
    names = [candidate["name"] for candidate in read(out / "result.json")["candidates"]]
    assert {*names} <= {"fp32", "int8 blanket", "int8 placed", "ours"}
    assert read(out / "bundle/manifest.json")["runtime"] == {"name": "onnxruntime", "options": {}}
    assert not (out / "files-openvino_cpu").exists()


def test_doctor_says_how_to_get_openvino_and_what_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    reason = openvino_program.availability()
    monkeypatch.setattr(OpenvinoCpu, "availability", lambda self: reason)
    (found,) = (one for one in doctor.examine() if one["what"] == "backend openvino_cpu")
    assert not found["ok"]
    assert "may be faster" in found["says"]
    assert "`pip install openvino`" in found["says"]


def test_a_bundle_needs_the_package_whose_version_its_backend_tells_and_else_onnxruntime() -> None:
    assert runtime_of({"openvino": "2026.4.1", "numpy": "2.4"}) == "openvino"
    assert runtime_of({"onnxruntime": "1.31.1", "numpy": "2.4"}) == "onnxruntime"
    assert runtime_of({"tensorrt": "10.9", "cuda": "13"}) == "onnxruntime"
