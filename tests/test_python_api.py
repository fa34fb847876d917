"""The calls of `import hirelc_deploy`, and that they do what the command line does."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_tasks import on_fake_device
from torch import nn

import hirelc_deploy
from hirelc_deploy.cli import application
from hirelc_deploy.errors import InputError
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.tasks.custom import load_function

MINE = """
import torch
from torch import nn
from torch.utils.data import Dataset

class Halves(Dataset):
    \"\"\"How bright the left and the right half of a picture are.\"\"\"

    def __init__(self, count, seed):
        g = torch.Generator().manual_seed(seed)
        self.truth = torch.rand(count, 2, generator=g)
        noise = torch.randint(0, 30, (count, 3, 16, 16), generator=g)
        self.pictures = (noise + 220 * self.truth.repeat_interleave(8, 1)[:, None, None]).byte()

    def __len__(self):
        return len(self.truth)

    def __getitem__(self, row):
        return self.pictures[row], self.truth[row]

def data():
    return {"train": Halves(160, 0), "test": Halves(48, 1)}

def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(), nn.Linear(64, 2),
    )

def worst_error(outputs, targets):
    return (outputs - targets).abs().max(1).values

worst_error.lower_is_better = True

def huber(outputs, targets):
    return nn.functional.smooth_l1_loss(outputs, targets, reduction="none", beta=0.1).mean(1)
"""
"""A user's file; pictures are made by it."""

OPTIONS: dict[str, Any] = {"trials": 2, "finalists": 1, "options": 3}
LIMIT = 0.5


@dataclass(frozen=True)
class Searched:
    """A search from Python, with what it was given."""

    folder: Path
    file: Path
    model: nn.Module
    before: dict[str, torch.Tensor]
    data: Any
    lines: list[str]
    result: hirelc_deploy.Result

    def again(self, **changed: Any) -> hirelc_deploy.Result:
        """Return the result of the same call, into the same folder."""
        given: dict[str, Any] = {"metric": function(self.file, "worst_error"), "loss": function(self.file, "huber")}
        given |= {"out": self.result.directory, "limits": {"max_drop": LIMIT}, **OPTIONS, **changed}
        return hirelc_deploy.search(given.pop("model", self.model), given.pop("data", self.data), **given)


def function(file: Path, name: str) -> Any:
    return load_function(f"{file}:{name}", "a function")


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Searched]:
    folder = tmp_path_factory.mktemp("python")
    file = folder / "mine.py"
    file.write_text(MINE)
    with pytest.MonkeyPatch.context() as patch:
        on_fake_device(patch, folder / "cache")
        model, data, lines = function(file, "net")(), function(file, "data")(), list[str]()
        model.train()
        before = copy.deepcopy(model.state_dict())
        result = hirelc_deploy.search(
            model,
            data,
            metric=function(file, "worst_error"),
            loss=function(file, "huber"),
            limits={"max_drop": LIMIT},
            out=folder / "by-python",
            progress=lines.append,
            **OPTIONS,
        )
        yield Searched(folder, file, model, before, data, lines, result)


def journal(run: Path) -> list[dict[str, Any]]:
    """Return the trials without what a clock said."""
    trials = [json.loads(line) for line in (run / "trials.jsonl").read_text().splitlines()]
    for trial in trials:
        del trial["time"], trial["outcome"]["seconds"]
    return trials


def test_the_command_line_finds_the_same(searched: Searched, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model and data of a file's functions, the same metric and loss: equal trials, an equal file."""
    monkeypatch.setenv("HIRELC_DEPLOY_CACHE", str(searched.folder / "another-cache"))
    mine, out = searched.file, searched.folder / "by-command"
    named = ["--model", f"{mine}:net", "--data", f"{mine}:data", "--metric", f"{mine}:worst_error"]
    options = [word for name, number in OPTIONS.items() for word in (f"--{name}", str(number))]
    command = ["search", *named, "--loss", f"{mine}:huber", "--max-drop", str(LIMIT), *options]
    assert application.run([*command, "--out", str(out), "--quiet"]) == 0
    ours, theirs = journal(searched.result.directory), journal(out)
    assert {trial["fidelity"] for trial in ours} == {"F1", "F2", "F3"}
    assert ours == theirs
    assert (out / "bundle/model.onnx").read_bytes() == (searched.result.bundle / "model.onnx").read_bytes()
    record = json.loads((out / "result.json").read_text())
    for key in ("metric", "accuracy", "latency", "layers", "finalists", "guard", "params", "size_bytes"):
        assert searched.result.record[key] == record[key], key


def test_the_metric_is_the_users_and_bought_by_the_users_loss(searched: Searched) -> None:
    metric, accuracy = searched.result.record["metric"], searched.result.record["accuracy"]
    assert (metric["name"], metric["unit"], metric["higher_is_better"]) == ("worst_error", "", False)
    assert accuracy["drop_points"] == pytest.approx(accuracy["test"] - accuracy["baseline_test"])
    told = json.loads((searched.result.bundle / "task.json").read_text())
    assert (told["own_metric"], told["own_loss"]) == ("worst_error", "huber")


def test_a_result_prints_and_draws_itself(searched: Searched) -> None:
    result = searched.result
    assert str(result) == result.summary
    assert repr(result) == f"Result(directory={result.directory!r})"
    assert "worst_error on the test split" in str(result)
    assert "  " not in str(result)
    assert result.bundle.is_dir()
    assert result.report.read_text("utf-8").lstrip().lower().startswith("<!doctype html>")
    drawn = result._repr_html_()
    assert drawn.startswith("<iframe srcdoc=")
    assert "worst_error" in drawn
    assert drawn.count('"') == 4, "the page inside is escaped"
    ((plan, outcome),) = result.front
    assert plan.keep
    assert outcome.fidelity == "F3"


def test_the_callers_model_stays_as_it_was(searched: Searched) -> None:
    after = searched.model.state_dict()
    assert list(after) == list(searched.before)
    assert all(torch.equal(after[name], values) for name, values in searched.before.items())
    assert searched.model.training
    assert not searched.model._forward_hooks
    assert all(weight.requires_grad and weight.grad is None for weight in searched.model.parameters())


def test_progress_is_told_line_by_line(searched: Searched) -> None:
    assert any(line.startswith("finalist ") for line in searched.lines)
    assert any(line.startswith("final timing") for line in searched.lines)
    assert all(line.strip() and "\n" not in line and "\r" not in line for line in searched.lines)


def test_without_a_listener_nothing_is_said(searched: Searched, capfd: pytest.CaptureFixture[str]) -> None:
    searched.again()
    assert capfd.readouterr() == ("", "")


def test_the_same_call_again_answers_without_working(searched: Searched) -> None:
    trials = (searched.result.directory / "trials.jsonl").read_bytes()
    again = searched.again()
    assert again.record == searched.result.record
    assert (searched.result.directory / "trials.jsonl").read_bytes() == trials


def test_a_killed_job_is_taken_up_where_it_was(searched: Searched) -> None:
    run = searched.result.directory
    trials, model = (run / "trials.jsonl").read_bytes(), (searched.result.bundle / "model.onnx").read_bytes()
    (run / "result.json").unlink()
    again = searched.again()
    assert (run / "trials.jsonl").read_bytes() == trials
    assert (again.bundle / "model.onnx").read_bytes() == model
    assert again.record["accuracy"] == searched.result.record["accuracy"]


def worst_error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return 2 * (outputs - targets).abs().amax(1)


worst_error.lower_is_better = True  # type: ignore[attr-defined]


def brighter(searched: Searched) -> dict[str, Any]:
    data = copy.deepcopy(searched.data)
    data["train"].pictures += 1
    return data  # type: ignore[no-any-return]


def other_net(searched: Searched) -> nn.Module:
    model = copy.deepcopy(searched.model)
    with torch.no_grad():
        model[0].bias += 0.01
    return model


@pytest.mark.parametrize(
    ("what", "changed"),
    [
        ("metric", lambda searched: {"metric": worst_error}),
        ("images", lambda searched: {"data": brighter(searched)}),
        ("factory", lambda searched: {"model": other_net(searched)}),
    ],
)
def test_a_run_is_not_taken_up_with_another_thing_of_the_same_name(
    what: str, changed: Callable[[Searched], dict[str, Any]], searched: Searched
) -> None:
    with pytest.raises(InputError, match=f"made with other {what} under the same name"):
        searched.again(**changed(searched))


def test_a_run_is_not_taken_up_with_other_options(searched: Searched) -> None:
    with pytest.raises(InputError, match="other options"):
        searched.again(seed=1)


def test_what_is_wrong_is_said_in_one_sentence_before_anything_is_made(searched: Searched, tmp_path: Path) -> None:
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("split 'tests' is unknown", {"data": {"train": searched.data["train"], "tests": searched.data["test"]}}),
        ("is empty", {"data": {"train": []}}),
        ("give a torch.nn.Module", {"model": 3}),
        ("max_drop", {"limits": {"max_drop": -1}}),
        ("task 'guessing' is not installed", {"task": "guessing"}),
        ("cannot be called", {"metric": 3.5}),
        ("name one", {"metric": None, "lower_is_better": True}),
        ("target 'toaster' is unknown", {"target": "toaster"}),
    ]
    for words, changed in wrong:
        with pytest.raises(InputError) as refused:
            searched.again(**{"out": tmp_path / "run", **changed})
        assert words in str(refused.value)
        assert "\n" not in str(refused.value)
        assert not (tmp_path / "run").exists()
    with pytest.raises(TypeError, match="'epochs'"):
        searched.again(epochs=3)


def test_a_lower_error_is_better_where_the_call_says_so(searched: Searched, tmp_path: Path) -> None:
    def error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs - targets).abs().mean(1)

    plan = CompressionPlan({"0": 8}, default_precision="int8")
    brief: Any = {"recovery_epochs": 0, "out": tmp_path / "run"}
    result = hirelc_deploy.apply(searched.model, searched.data, plan, metric=error, lower_is_better=True, **brief)
    assert result.record["metric"]["higher_is_better"] is False
    assert json.loads((result.bundle / "manifest.json").read_text())["plan"]["keep"] == {"0": 8}
    assert result.front == []


def test_inspect_counts_what_can_be_cut(searched: Searched) -> None:
    found = hirelc_deploy.inspect(searched.model, input_size=(3, 16, 16))
    assert [(unit["name"], unit["size"]) for unit in found.units] == [("0", 16), ("2", 32)]
    assert found.record["params"] == sum(weight.numel() for weight in searched.model.parameters())
    assert "2 units that can be cut" in str(found)


def test_benchmark_times_files_against_the_first(searched: Searched) -> None:
    files = [searched.result.directory / "files/uncut-float.onnx", searched.result.bundle / "model.onnx"]
    reference, ours = hirelc_deploy.benchmark(files, seconds=5)
    assert (reference.verdict, ours.verdict) == ("reference", "faster")
    assert ours.ratio == pytest.approx(searched.result.record["latency"]["ratio"])
    with pytest.raises(InputError, match="no such file"):
        hirelc_deploy.benchmark([searched.folder / "none.onnx"])


def test_verify_leaves_the_users_metric_to_the_user(searched: Searched) -> None:
    found = hirelc_deploy.verify(searched.result.bundle, searched.data)
    assert found.ok
    assert found.accuracy is None
    assert any("worst_error" in remark for remark in found.remarks)


def test_the_cut_float_model_comes_back_for_more_training(searched: Searched) -> None:
    net = function(searched.file, "net")
    with pytest.raises(InputError, match="was made in Python"):
        hirelc_deploy.load(searched.result.bundle)
    model = searched.result.model(net)
    assert sum(weight.numel() for weight in model.parameters()) == searched.result.record["params"]
    with np.load(searched.result.bundle / "samples.npz") as samples:
        pictures, wanted = torch.from_numpy(samples["images"]), samples["output.output"]
    found = model(pictures.permute(0, 3, 1, 2).float() / 255).detach().numpy()
    assert np.abs(found - wanted).max() < 0.1 * np.ptp(wanted)


def test_the_logging_of_the_program_is_left_alone() -> None:
    code = (
        "import logging, hirelc_deploy.api\n"
        "from hirelc_deploy.compress.integer import four_bits\n"
        "four_bits._quantizer_class()\n"
        "root = logging.getLogger()\n"
        "print(root.handlers, root.level)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", str(30)]
