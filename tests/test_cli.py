from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import typer
from bad_input_cases import MODEL_FILE, contents, tiny_onnx
from onnx import load as load_onnx
from safetensors.numpy import load_file

from hirelc_deploy import __version__
from hirelc_deploy.cli import application
from hirelc_deploy.jobs.workplace import PRINTED

GROUP: Any = typer.main.get_command(application.app)
COMMANDS = sorted(GROUP.commands)
JOB = ["--data", "npz:data.npz", "--recovery-epochs", "0.2", "--quiet", "--json"]
APPLY = ["apply", "--model", "net.py:net", *JOB, "--plan", "uniform:keep=0.5,precision=int8", "--out", "half"]
LIMITS = ["--max-drop", "100", "--trials", "3", "--finalists", "1", "--options", "3"]
SEARCH = [
    "search",
    "--model",
    "wide.py:net",
    *JOB,
    "--input-size",
    "3,16,16",
    "--strategy",
    "hirelc",
    *LIMITS,
    "--out",
    "found",
]


WIDE = """
from torch import nn
import torch

def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2))
"""
"""Wide enough for narrower layers to be faster."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The current folder of this module's commands, with a tiny network and 200 tiny pictures."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "net.py").write_text(MODEL_FILE)
    (folder / "wide.py").write_text(WIDE)
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (200, 8, 8, 3), dtype=np.uint8), rng.integers(0, 2, 200)
    np.savez(folder / "data.npz", x_train=pixels[:150], y_train=labels[:150], x_test=pixels[150:], y_test=labels[150:])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HIRELC_DEPLOY_CACHE", str(folder / "cache"))
        yield folder


def answer(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    """Run a command and return what it printed, read as JSON where it was asked to print that."""
    assert application.run(arguments) == code
    printed = capsys.readouterr()
    assert printed.err == ""
    return json.loads(printed.out) if "--json" in arguments else printed.out


@pytest.fixture(scope="module")
def applied(place: Path) -> Path:
    assert application.run(APPLY) == 0
    return place / "half"


@pytest.fixture(scope="module")
def searched(place: Path) -> Path:
    assert application.run(SEARCH) == 0
    return place / "found"


def shell(*arguments: str, **environment: str) -> str:
    command = [sys.executable, "-m", "hirelc_deploy", *arguments]
    environment = {**os.environ, **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


# Help, version, completion


def test_the_commands_are_those_of_the_design() -> None:
    wanted = (
        "apply benchmark compare demo doctor export inspect profile report schema search skill status targets verify "
        "why"
    )
    assert " ".join(COMMANDS) == wanted


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_has_an_example_on_one_line_that_the_command_takes(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = answer(capsys, name, "--help").splitlines()
    examples = [line.split("Example: ")[1] for line in lines if "Example: " in line]
    assert examples
    for example in examples:
        program, command, *arguments = shlex.split(example)
        assert (program, command) == ("hirelc-deploy", name)
        GROUP.commands[name].make_context(name, arguments).close()


def test_every_option_is_explained() -> None:
    for name in COMMANDS:
        for parameter in GROUP.commands[name].params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"


def test_a_bare_command_helps_and_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert all(name in answer(capsys) for name in COMMANDS)
    assert answer(capsys, "--version").strip() == __version__


def test_help_and_version_do_not_wait_for_torch() -> None:
    program = (
        "import sys; from hirelc_deploy.cli import application; application.run(['--version']);"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_a_shell_can_complete_commands_and_options() -> None:
    complete = {"_HIRELC_DEPLOY_COMPLETE": "complete_bash"}
    assert shell(**complete, COMP_WORDS="hirelc-deploy se", COMP_CWORD="1").split() == ["search"]
    assert "--max-drop" in shell(**complete, COMP_WORDS="hirelc-deploy search --max-", COMP_CWORD="2")
    script = shell("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "_HIRELC_DEPLOY_COMPLETE=complete_bash" in script


def test_a_process_leaves_with_the_exit_code_and_one_line_of_error() -> None:
    command = [sys.executable, "-m", "hirelc_deploy", "benchmark", "gone.onnx", "--target", "jetson"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == ["hirelc-deploy: gone.onnx: no such file; give ONNX files, the reference first."]


def test_a_full_disk_gets_a_sentence_and_leaves_only_whole_files(place: Path) -> None:
    options = ["--plan", "uniform:keep=0.5", "--recovery-epochs", "0", "--out", "full", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "hirelc_deploy", "apply", "--model", "net.py:net", "--data", "npz:data.npz", *options],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == "hirelc-deploy: the disk: File too large; what was finished is kept: make room, and run the same again.\n"
    )
    assert not [path for path in Path("full").rglob("*") if path.name.endswith(".partial")]
    assert not (Path("full") / "bundle").exists()


def test_ctrl_c_says_that_nothing_is_lost(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hirelc_deploy.jobs.doctor.examine", interrupted)
    assert application.run(["doctor"]) == 130
    assert "the same command resumes" in capsys.readouterr().err


# What programs read


def test_inspect_says_what_can_be_cut_and_why_not(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = answer(capsys, "inspect", "--model", "net.py:net", "--input-size", "3,8,8", "--json")
    assert set(record) == {"model", "input_size", "params", "macs", "blocks", "units", "kept_whole", "matched", "notes"}
    assert record["params"] == 3 * 8 * 9 + 8 + 2 * 8 + 8 * 8 * 9 + 8 + 8 * 2 + 2
    assert record["macs"] == 64 * 3 * 8 * 9 + 16 * 8 * 8 * 9 + 8 * 2
    keys = {"name", "kind", "size", "block", "widths", "branch", "params", "macs", "bytes"}
    assert [set(unit) for unit in record["units"]] == [keys] * 2
    first = record["units"][0]
    assert first["params"] == 3 * 8 * 9 + 8 + 2 * 8 + 8 * 8 * 9, "the first convolution, its norm, the second's inputs"
    assert first["macs"] == 64 * 3 * 8 * 9 + 16 * 8 * 8 * 9
    assert (first["bytes"], first["widths"][-1]) == (4 * first["params"], first["size"])
    assert all(unit["block"] in record["blocks"] for unit in record["units"])
    assert record["kept_whole"]
    assert all(set(kept) == {"layer", "reason"} for kept in record["kept_whole"])
    assert "2 units that can be cut" in answer(capsys, "inspect", "--model", "net.py:net", "--input-size", "3,8,8")


def test_an_excluded_layer_is_kept_whole_with_the_pattern_as_its_reason(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", "net.py:net", "--input-size", "3,8,8", "--exclude", "3", "--json"]
    record = answer(capsys, "inspect", *options)
    assert any(kept["layer"] == "3" and "'3'" in kept["reason"] for kept in record["kept_whole"])
    assert len(record["units"]) < 2
    assert set(record["matched"]) == {"3"}
    assert record["matched"]["3"]


def test_inspect_lists_what_each_pattern_matches(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "net.py:net", "--input-size", "3,8,8"]
    names = [unit["name"] for unit in answer(capsys, "inspect", *options, "--json")["units"]]
    record = answer(capsys, "inspect", *options, "--include", names[0], "--json")
    assert record["matched"] == {names[0]: names[:1]}
    assert [unit["name"] for unit in record["units"]] == names[:1]
    text = answer(capsys, "inspect", *options, "--include", names[0], "--exclude", "*")
    assert f"pattern {names[0]!r} matches {names[0]}" in text
    assert f"pattern '*' matches {', '.join(names)}" in text
    assert "0 units that can be cut" in text


def test_targets_and_doctor_answer_programs_and_people(capsys: pytest.CaptureFixture[str]) -> None:
    (cpu,) = (target for target in answer(capsys, "targets", "--json")["targets"] if target["name"] == "cpu")
    assert cpu["backend"] == "onnxruntime_cpu"
    findings = answer(capsys, "doctor", "--json")["findings"]
    assert all(set(finding) == {"what", "ok", "says"} for finding in findings)
    assert next(finding for finding in findings if finding["what"] == "backend onnxruntime_cpu")["ok"]
    (processor,) = (finding for finding in findings if finding["what"] == "processor")
    assert not processor["says"].startswith("None")
    assert "cpu" in answer(capsys, "targets")
    assert "onnxruntime" in answer(capsys, "doctor")


def test_benchmark_compares_with_the_first_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_onnx(place / "a.onnx")
    tiny_onnx(place / "b.onnx", operator="Erf")
    record = answer(capsys, "benchmark", "a.onnx", "b.onnx", "--seconds", "3", "--json")
    assert set(record) == {"machine", "results"}
    assert record["machine"]["cpu_model"]
    keys = {"file", "median_ms", "p90_ms", "p99_ms", "ratio", "ratio_low", "ratio_high", "verdict"}
    assert all(keys <= set(result) for result in record["results"])
    first, second = record["results"]
    assert (first["file"], first["ratio"], first["verdict"]) == ("a.onnx", 1.0, "reference")
    assert 0 < second["median_ms"] <= second["p90_ms"] <= second["p99_ms"]
    assert second["ratio_low"] <= second["ratio"] <= second["ratio_high"]
    assert second["verdict"] in ("faster", "slower", "same", "not told apart")


# A job, its bundle and its report


def check_result(result: dict[str, Any], run: Path, reference_params: int) -> None:
    assert set(result) == set(PRINTED)
    assert set(result["accuracy"]) == {"test", "baseline_test", "drop_points", "drop_low", "drop_high"}
    keys = {"median_ms", "p99_ms", "batch", "threads", "images_per_second", "reference"}
    assert set(result["latency"]) == keys | {"ratio", "ratio_low", "ratio_high", "verdict"}
    assert set(result["best_unpruned"]) == {"name", "ratio"}
    assert result["params"] <= reference_params
    shipped, reference = run / "bundle/model.onnx", run / "files" / result["latency"]["reference"]
    assert result["size_bytes"] == shipped.stat().st_size
    assert result["size_ratio"] == pytest.approx(reference.stat().st_size / shipped.stat().st_size)


def test_apply_builds_the_plan_it_is_given(applied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = answer(capsys, *APPLY)
    check_result(result, applied, 842)
    assert result["params"] == 3 * 4 * 9 + 4 + 2 * 4 + 4 * 4 * 9 + 4 + 4 * 2 + 2
    assert result["macs"] == 64 * 3 * 4 * 9 + 16 * 4 * 4 * 9 + 4 * 2
    accuracy = result["accuracy"]
    assert accuracy["drop_points"] == pytest.approx(100 * (accuracy["baseline_test"] - accuracy["test"]))
    assert accuracy["drop_low"] <= accuracy["drop_points"] <= accuracy["drop_high"]
    assert round(accuracy["test"] * 50) == pytest.approx(accuracy["test"] * 50)


def test_a_finished_job_answers_again_without_working(applied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(applied)
    first = answer(capsys, *APPLY)
    assert first == answer(capsys, *APPLY)
    assert contents(applied) == before


def test_a_person_is_told_the_same_in_words(applied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = answer(capsys, *(argument for argument in APPLY if argument != "--json"))
    assert "times smaller" in words
    assert "accuracy on the test split" in words
    assert str(Path("half/report.html")) in words


def test_verify_agrees_with_what_apply_claimed(applied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claimed = json.loads((applied / "result.json").read_text())["accuracy"]["test"]
    record = answer(capsys, "verify", "half/bundle", "--data", "npz:data.npz", "--json")
    assert {"ok", "problems", "integer_ops", "float_ops", "accuracy", "claimed_accuracy"} <= set(record)
    assert (record["ok"], record["problems"]) == (True, [])
    assert record["accuracy"] == record["claimed_accuracy"] == pytest.approx(claimed)
    assert record["integer_ops"] >= 3
    assert "the bundle is what it says" in answer(capsys, "verify", "half/bundle")


def test_export_copies_what_runs_elsewhere(applied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = answer(capsys, "export", "half", "--format", "onnx", "--out", "deploy").split()
    assert {Path(name).name for name in written} >= {"model.onnx", "run.py", "preprocess.json"}
    assert load_onnx("deploy/model.onnx").graph.node
    assert Path("deploy/model.onnx").read_bytes() == (applied / "bundle/model.onnx").read_bytes()
    written = answer(capsys, "export", "half", "--format", "torch", "--out", "deploy-torch").split()
    assert {Path(name).name for name in written} >= {"weights.safetensors", "shapes.json"}


def test_an_export_for_any_number_of_images_answers_as_the_shipped_file(
    applied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = answer(capsys, "export", "half", "--dynamic-batch", "--out", "deploy-batched").split()
    assert {Path(name).name for name in written} == {"model.onnx", "preprocess.json", "labels.json"}
    assert load_onnx("deploy-batched/model.onnx").graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    with np.load(applied / "bundle/samples.npz") as samples:
        session = onnxruntime.InferenceSession("deploy-batched/model.onnx", providers=["CPUExecutionProvider"])
        scale = json.loads(Path("deploy-batched/preprocess.json").read_text())
        mean, std = (np.array(scale[key], np.float32)[:, None, None] for key in ("mean", "std"))
        images = (samples["images"].transpose(0, 3, 1, 2).astype(np.float32) / 255 - mean) / std
        [together] = session.run(None, {"input": images})
        [alone] = session.run(None, {"input": images[:1]})
        expected = samples["output.output"]
        np.testing.assert_allclose(together, expected, atol=0.05 * np.abs(expected).max())
    np.testing.assert_allclose(alone, together[:1], rtol=1e-6)


def test_a_stored_export_is_small_and_comes_back_without_this_project(
    applied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = answer(capsys, "export", "half", "--format", "stored", "--bits", "7", "--out", "deploy-small").split()
    assert {Path(name).name for name in written} >= {"model.stored", "restore.py", "run.py", "preprocess.json"}
    here = Path("deploy-small")
    subprocess.run([sys.executable, "-I", "restore.py", "model.stored", "."], cwd=here, check=True)
    samples = applied / "bundle/samples.npz"
    answers = subprocess.run([sys.executable, "run.py", samples], cwd=here, check=True, capture_output=True, text=True)
    with np.load(samples) as data:
        expected = data["output.output"].argmax(1)
    classes = json.loads((here / "labels.json").read_text())
    found = [classes.index(line) for line in answers.stdout.splitlines()[: len(expected)]]
    assert np.mean(np.equal(found, expected)) > 0.8


def test_a_stored_export_within_a_limit_has_bits_of_its_own_for_each_layer(
    applied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ["export", "half", "--format", "stored", "--sparsity", "0.2"]
    answer(capsys, *store, "--bits", "3", "--out", "deploy-equal")
    limit = Path("deploy-equal/model.stored").stat().st_size
    answer(capsys, *store, "--max-bytes", str(limit), "--trials", "6", "--out", "deploy-chosen")
    assert Path("deploy-chosen/model.stored").stat().st_size <= limit
    subprocess.run([sys.executable, "-I", "restore.py", "model.stored", "."], cwd="deploy-chosen", check=True)
    assert application.run([*store, "--max-bytes", "10", "--out", "deploy-none"]) == 4
    assert "with 2 bits everywhere" in capsys.readouterr().err


def test_export_to_tensorrt_writes_forms_with_answers_and_the_program_that_builds_them(
    applied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = answer(capsys, "export", "half", "--format", "tensorrt", "--out", "deploy-trt").split()
    names = {Path(name).name for name in written}
    assert names >= {"model.fp16.onnx", "engine.py", "inputs.npz", "forms.json", "preprocess.json", "labels.json"}
    forms = json.loads(Path("deploy-trt/forms.json").read_text())
    kept = {name for name, record in forms.items() if record.get("kept")}
    assert kept == {name for name in names if name.startswith("model.")}
    assert len(kept) > 1
    assert forms["model.fp16.onnx"]["drop_points"] == 0.0
    shapes = {name: [list(i.dims) for i in load_onnx(f"deploy-trt/{name}").graph.initializer] for name in kept}
    assert [4, 3, 3, 3] in shapes["model.fp16.onnx"]  # the cut width: half of eight channels
    with np.load("deploy-trt/inputs.npz") as samples:
        assert set(samples) == {"inputs", *(f"{name}/output" for name in kept)}
        session = onnxruntime.InferenceSession("deploy-trt/model.fp16.onnx", providers=["CPUExecutionProvider"])
        [logits] = session.run(None, {"input": samples["inputs"][:1]})
        np.testing.assert_allclose(logits[0], samples["model.fp16.onnx/output"][0], atol=1e-3)
    program = subprocess.run(
        [sys.executable, "deploy-trt/engine.py", "--help"], capture_output=True, text=True, check=True
    )
    assert "build" in program.stdout


def test_report_writes_one_page(applied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "report", "half", "--out", "page.html").strip() == "page.html"
    page = Path("page.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert "net.py:net" in page


def test_an_edited_plan_file_is_another_job(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("plan.json").write_text('{"keep": {"0": 4}}')
    options = ["--model", "net.py:net", "--data", "synthetic:16", "--input-size", "3,8,8", "--recovery-epochs", "0"]
    command = ["apply", *options, "--plan", "plan.json", "--out", "edited", "--quiet", "--json"]
    result = answer(capsys, *command)
    assert set(result["accuracy"].values()) == {None}, "random inputs have no labels, so no accuracy is claimed"
    assert result["latency"]["ratio"] > 0
    words = answer(capsys, *(argument for argument in command if argument != "--json"))
    assert "no accuracy is claimed" in words
    Path("plan.json").write_text('{"keep": {"0": 8}}')
    assert application.run(command) == 2
    assert "other options (plan = " in capsys.readouterr().err


def test_a_run_is_not_resumed_with_other_images_of_the_same_name(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy("data.npz", "mine.npz")
    command = [{"npz:data.npz": "npz:mine.npz", "half": "mine"}.get(argument, argument) for argument in APPLY]
    assert application.run(command) == 0
    arrays = dict(np.load("mine.npz"))
    np.savez("mine.npz", **{**arrays, "x_train": 255 - arrays["x_train"]})
    assert application.run(command) == 2
    assert "made with other images under the same name" in capsys.readouterr().err


def test_the_recovery_of_a_bundle_goes_on(applied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = APPLY[APPLY.index("--plan") + 1]
    no_training = {"0.2": "0", plan: str(applied / "bundle"), "half": "again"}
    assert application.run([no_training.get(argument, argument) for argument in APPLY]) == 0
    before, after = (load_file(Path(run, "bundle/weights.safetensors")) for run in (applied, "again"))
    assert all(np.array_equal(before[name], after[name]) for name in before)
    more = {plan: str(applied / "bundle"), "half": "more"}
    assert application.run([more.get(argument, argument) for argument in APPLY]) == 0
    further = load_file(Path("more/bundle/weights.safetensors"))
    assert not any(np.array_equal(before[name], further[name]) for name in before if name.endswith("weight"))
    other = [{plan: str(applied), "half": "none"}.get(argument, argument) for argument in APPLY]
    capsys.readouterr()
    assert application.run(other) == 2
    assert "a bundle?" in capsys.readouterr().err


def test_a_network_written_by_hand_walks_the_whole_path(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", f"{Path(__file__).with_name('hand_written_nets.py')}:Assembled"]
    plan = ["--plan", "uniform:keep=0.5,precision=int8", "--out", "assembled"]
    result = answer(capsys, "apply", *model, *JOB, *plan)
    layers = {layer["name"]: layer for layer in json.loads(Path("assembled/result.json").read_text())["layers"]}
    cut = ("stem", "left", "right", "attention.q", "attention.k", "attention.v", "hidden")
    assert [layers[name]["out_kept"] for name in cut] == [8, 8, 16, 16, 16, 16, 16]
    verified = answer(capsys, "verify", "assembled/bundle", "--data", "npz:data.npz", "--json")
    assert (verified["ok"], verified["accuracy"]) == (True, result["accuracy"]["test"])
    assert verified["integer_ops"] >= 8


def test_a_search_finds_journals_and_resumes(searched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trials = (searched / "trials.jsonl").read_bytes()
    fidelities = {json.loads(line)["fidelity"] for line in trials.splitlines()}
    assert fidelities == {"F1", "F2", "F3"}
    kept = json.loads((searched / "result.json").read_text())
    result = answer(capsys, *SEARCH)
    check_result(result, searched, 28 * 64 + 577 * 64 + 65 * 2)
    assert result["params"] < 28 * 64 + 577 * 64 + 65 * 2
    assert result == {key: kept[key] for key in PRINTED}
    assert (searched / "trials.jsonl").read_bytes() == trials
    assert (searched.parent / "cache/hirelc-deploy/layer-times.jsonl").stat().st_size


def test_where_no_width_buys_time_the_best_file_there_is_gets_shipped(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", "net.py:net", *JOB, "--trials", "1", "--finalists", "1", "--options", "2"]
    result = answer(capsys, "search", *options, "--out", "hopeless")
    check_result(result, place / "hopeless", 842)
    assert result["latency"]["ratio"] <= 1
    # A file that is not told apart from the float one is no better than it.
    assert result["latency"]["ratio"] == pytest.approx(result["best_unpruned"]["ratio"], rel=0.02)


def test_a_search_that_lost_its_end_ships_the_same_without_new_trials(
    searched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = (searched / "trials.jsonl").read_bytes()
    before = json.loads((searched / "result.json").read_text())
    (searched / "result.json").unlink()
    result = answer(capsys, *SEARCH)
    assert (searched / "trials.jsonl").read_bytes() == trials
    assert json.loads((searched / "result.json").read_text())["finalists"] == before["finalists"]
    assert result["accuracy"]["baseline_test"] == before["accuracy"]["baseline_test"]
