"""Several limits in one search, and what another run has measured: a bundle each, and nothing measured twice."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from small_tasks import on_fake_device

import hirelc_deploy
from hirelc_deploy.cli import application
from hirelc_deploy.config import JobConfig, Limits
from hirelc_deploy.errors import ConstraintError, InputError
from hirelc_deploy.evaluate.judge import Judge
from hirelc_deploy.evaluate.training import Training
from hirelc_deploy.jobs.family import names_of
from hirelc_deploy.outcome import Outcome
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.runs import CONFIG, Run

MINE = """
import numpy as np
import torch
from torch.utils.data import Dataset

from hirelc_deploy.demo.model import DemoNet

class Brightness(Dataset):
    def __init__(self, count, seed):
        g = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(count) % 2
        noise = torch.randint(0, 128, (count, 3, 16, 16), generator=g)
        self.pictures = (noise + 100 * self.labels[:, None, None, None]).byte()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        return self.pictures[row], int(self.labels[row])

def data(seed=0):
    return {"train": Brightness(96, seed), "test": Brightness(32, seed + 1)}

def other_data():
    return data(5)

def net(seed=0):
    torch.manual_seed(seed)
    return DemoNet((16, 32), blocks_per_stage=1, num_classes=2).eval()

def other_net():
    return net(1)

def right(outputs, targets):
    return (outputs.argmax(1) == targets).float()
"""

OPTIONS: dict[str, Any] = {"trials": 2, "finalists": 1, "options": 3, "depth": False, "strategy": "knapsack"}
SPEEDUPS = (2.0, 4.0)


@dataclass(frozen=True)
class Searched:
    """A family, with what was judged and trained for it."""

    file: Path
    family: hirelc_deploy.Family
    judged: Counter[str]
    trained: Counter[str]
    lines: list[str]

    @property
    def first(self) -> Path:
        return self.family.directory / "speedup-2"

    def search(self, out: Path, speedup: float = 2.0, **changed: Any) -> hirelc_deploy.Result:
        """Return a search of its own, which takes over the first member."""
        given: dict[str, Any] = {"limits": {"speedup": speedup}, "library": self.first, **OPTIONS, **changed}
        model, data = given.pop("model", f"{self.file}:net"), given.pop("data", f"{self.file}:data")
        return hirelc_deploy.search(model, data, out=out, **given)


def watch(patch: pytest.MonkeyPatch) -> tuple[Counter[str], Counter[str]]:
    """Return which plans are judged before training, and trained, from here on."""
    judged, trained = Counter[str](), Counter[str]()
    outcome, recovered = Judge.outcome, Training.recovered

    def judging(self: Judge, plan: CompressionPlan) -> Outcome:
        judged[plan.digest] += 1
        return outcome(self, plan)

    def training(self: Training, model: Any, plan: CompressionPlan, until: float = 1.0) -> Any:
        trained[plan.digest] += 1
        return recovered(self, model, plan, until)

    patch.setattr(Judge, "outcome", judging)
    patch.setattr(Training, "recovered", training)
    return judged, trained


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Searched]:
    folder = tmp_path_factory.mktemp("family")
    file = folder / "mine.py"
    file.write_text(MINE)
    with pytest.MonkeyPatch.context() as patch:
        on_fake_device(patch, folder / "cache")
        lines = list[str]()
        judged, trained = watch(patch)
        family = hirelc_deploy.family(
            f"{file}:net",
            f"{file}:data",
            limits=[{"speedup": speedup} for speedup in reversed(SPEEDUPS)],
            out=folder / "runs",
            progress=lines.append,
            **OPTIONS,
        )
        yield Searched(file, family, judged.copy(), trained.copy(), lines)


def test_several_limits_give_a_bundle_each_and_one_page(searched: Searched) -> None:
    family = searched.family
    assert list(family.results) == ["speedup-4", "speedup-2"], "in the order in which they were given"
    ratios = [result.record["latency"]["ratio"] for result in family.results.values()]
    assert ratios[0] <= 1.02 / 4.0
    assert ratios[0] < ratios[1] <= 1.02 / 2.0
    for name, result in family.results.items():
        assert hirelc_deploy.verify(result.bundle).ok
        assert JobConfig.read(result.directory / CONFIG).limits == Limits(speedup=float(name.rpartition("-")[2]))
    page = family.page.read_text("utf-8")
    assert all(f'href="{name}/report.html"' in page for name in family.results)
    assert all(f">{name}</text>" in page for name in (*family.results, "uncut float"))
    assert str(family).count("times faster") == len(SPEEDUPS)


def test_its_record_is_as_its_schema_says(searched: Searched) -> None:
    from test_schemas import check  # which needs jsonschema

    check(json.loads((searched.family.directory / "family.json").read_text()), "family")
    check(json.loads((searched.family.directory / "speedup-4/result.json").read_text()), "result")


def test_model_and_data_are_measured_once_for_all_limits(searched: Searched) -> None:
    assert max(searched.judged.values()) == max(searched.trained.values()) == 1
    once = ("importance ...", "input moments ...", "precision placement ...")
    assert [sum(line == begun for line in searched.lines) for begun in once] == [1, 1, 1]
    stages = [searched.family.results[f"speedup-{speedup:g}"].record["stages"] for speedup in SPEEDUPS]
    assert [("importance" in one, "precision placement" in one) for one in stages] == [(True, True), (False, False)]
    first, second = (Run.read(searched.family.directory / f"speedup-{speedup:g}") for speedup in SPEEDUPS)
    assert second.fact("library")["run"] == str(searched.first)
    known = {(trial.plan.digest, trial.fidelity) for trial in first.trials}
    assert known <= {(trial.plan.digest, trial.fidelity) for trial in second.trials}


def test_a_family_finds_what_searches_of_their_own_find(searched: Searched, tmp_path: Path) -> None:
    alone = searched.search(tmp_path / "alone", 4.0, library=None)
    ours = searched.family.results["speedup-4"]
    assert "library" not in alone.record
    for key in ("accuracy", "latency", "params", "size_bytes", "layers"):
        assert alone.record[key] == ours.record[key], key


def test_searches_at_several_drops_recover_each_plan_once(
    searched: Searched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hirelc_deploy.deliver.finalists.ENTRY_LOSS", 99.0)
    monkeypatch.setattr("hirelc_deploy.deliver.finalists.BISECTIONS", 1)
    judged, trained = watch(monkeypatch)
    family = hirelc_deploy.family(
        f"{searched.file}:net",
        f"{searched.file}:data",
        limits=[{"max_drop": 90.0}, {"max_drop": 95.0}],
        out=tmp_path / "runs",
        **OPTIONS,
    )
    assert [len(result.record["finalists"]) for result in family.results.values()] == [1, 1]
    assert family.results["max-drop-90"].record["library"]["run"] == str(tmp_path / "runs/max-drop-95")
    assert (max(judged.values()), list(trained.values())) == (1, [1])


def test_a_killed_family_goes_on_where_it_was(
    searched: Searched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "runs"
    shutil.copytree(searched.first, out / "speedup-2")
    command = ["search", "--model", f"{searched.file}:net", "--data", f"{searched.file}:data", "--speedup", "2,4"]
    command += ["--trials", "2", "--finalists", "1", "--options", "3", "--widths-only", "--strategy", "knapsack"]
    command += ["--out", str(out), "--quiet"]
    recovered = Training.recovered

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Training, "recovered", stop)
    assert application.run(command) == application.INTERRUPTED
    assert not (out / "family.json").exists()
    monkeypatch.setattr(Training, "recovered", recovered)
    judged, trained = watch(monkeypatch)
    assert application.run(command) == 0
    assert (sum(judged.values()), sum(trained.values())) == (0, 1)
    ours = json.loads((out / "family.json").read_text())["members"]
    theirs = {member["name"]: member for member in searched.family.record["members"]}
    for member in ours:
        assert member["result"]["accuracy"] == theirs[member["name"]]["result"]["accuracy"]
        assert member["result"]["params"] == theirs[member["name"]]["result"]["params"]
    command[command.index("2,4")] = "1.5,2,4"
    assert application.run(command) == 0
    assert max(judged.values(), default=0) <= 1
    assert list(trained.values()) == [1], (
        "1.5 times is what the uncut integer file surpasses: the plan of 2 times again"
    )
    assert Run.read(out / "speedup-1.5").fact("library")["run"] == str(out / "speedup-4")


def test_limits_that_nothing_keeps_are_named_and_stop_no_other(
    searched: Searched, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    shutil.copytree(searched.first, out / "speedup-2")
    command = ["search", "--model", f"{searched.file}:net", "--data", f"{searched.file}:data", "--trials", "2"]
    command += ["--finalists", "1", "--options", "3", "--widths-only", "--strategy", "knapsack", "--out", str(out)]
    code = application.run([*command, "--speedup", "100000,2", "--quiet", "--json"])
    assert code == ConstraintError.exit_code
    missed, kept = json.loads(capsys.readouterr().out)["members"]
    assert "cannot be met" in missed["missed"]
    assert missed["result"] is None
    assert (kept["missed"], kept["name"]) == (None, "speedup-2")
    assert "missed: " in (out / "family.html").read_text("utf-8")
    with pytest.raises(ConstraintError, match="cannot be met"):
        hirelc_deploy.family(
            f"{searched.file}:net",
            f"{searched.file}:data",
            limits=[{"speedup": 1e5}, {"speedup": 2e5}],
            out=tmp_path / "none",
            **OPTIONS,
        )


def test_a_library_gives_losses_files_and_recovered_plans(
    searched: Searched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged, trained = watch(monkeypatch)
    result = searched.search(tmp_path / "run")
    assert (sum(judged.values()), sum(trained.values())) == (0, 0)
    assert {name: result.record["library"][name] > 0 for name in ("F1", "F2", "F3")} == dict.fromkeys(
        ("F1", "F2", "F3"), True
    )
    assert result.record["accuracy"] == searched.family.results["speedup-2"].record["accuracy"]


def test_what_was_recovered_in_another_way_is_left_where_it_is(searched: Searched, tmp_path: Path) -> None:
    lines = list[str]()
    other = searched.search(tmp_path / "run", learning_rate=0.003, progress=lines.append)
    assert (other.record["library"]["F1"] > 0, other.record["library"]["F2"] > 0) == (True, True)
    assert other.record["library"]["F3"] == 0
    assert any("(learning_rate is another one)" in line for line in lines)
    batch = searched.search(tmp_path / "batch", batch=2)
    assert (batch.record["library"]["F1"] > 0, batch.record["library"]["F2"]) == (True, 0)


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"model": "other_net"}, "another model"),
        ({"data": "other_data"}, "another data set"),
        ({"metric": "right"}, "another metric"),
        ({"library": "runs"}, "holds several runs"),
        ({"library": "nothing"}, "not a run directory"),
    ],
)
def test_a_library_of_another_model_or_other_data_is_refused(
    searched: Searched, tmp_path: Path, changed: dict[str, str], word: str
) -> None:
    given: dict[str, Any] = dict(changed)
    if "library" in given:
        given["library"] = searched.file.parent / given["library"]
    else:
        given = {name: f"{searched.file}:{value}" for name, value in given.items()}
    with pytest.raises(InputError, match=word):
        searched.search(tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_limits_are_named_by_what_tells_them_apart() -> None:
    assert list(names_of([Limits(1.0, speedup=2.0), Limits(1.0, speedup=4.5)])) == ["speedup-2", "speedup-4.5"]
    assert list(names_of([Limits(0.5), Limits(2.0)])) == ["max-drop-0.5", "max-drop-2"]
    with pytest.raises(InputError, match="speedup 2 is there twice"):
        names_of([Limits(speedup=2.0), Limits(speedup=4.0), Limits(speedup=2.0)])


def test_a_family_is_put_into_no_folder_of_something_else(searched: Searched, tmp_path: Path) -> None:
    limits = [{"speedup": 2.0}, {"speedup": 4.0}]
    model, data = f"{searched.file}:net", f"{searched.file}:data"
    with pytest.raises(InputError, match="run of one search"):
        hirelc_deploy.family(model, data, limits=limits, out=searched.first, **OPTIONS)
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match=r"holds 'letter\.txt'"):
        hirelc_deploy.family(model, data, limits=limits, out=tmp_path, **OPTIONS)
    with pytest.raises(InputError, match="no such file"):
        hirelc_deploy.family(f"{tmp_path}/no.py:net", data, limits=limits, out=tmp_path / "new", **OPTIONS)
    assert not (tmp_path / "new").exists()
