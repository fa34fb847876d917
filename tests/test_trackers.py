"""What a run measures is read back from TensorBoard's event files and MLflow's store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from hirelc_deploy.errors import InputError
from hirelc_deploy.trackers import contract
from hirelc_deploy.trackers.contract import Trackers, check_trackers

COMMAND = "hirelc-deploy search --out run"


class Memory:
    """Remembers as a run does."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}

    def remember(self, key: str, compute: Callable[[], Any]) -> Any:
        if key not in self.facts:
            self.facts[key] = compute()
        return self.facts[key]


def tracked(names: Sequence[str], folder: Path, memory: Memory, first: int, said: list[str]) -> None:
    """Tell trackers what a command measures whose training begins at step `first`."""
    (folder / "bundle").mkdir(parents=True, exist_ok=True)
    (folder / "bundle" / "model.onnx").write_bytes(b"model")
    (folder / "report.html").write_text("report")
    trackers = Trackers(names, folder, COMMAND, memory.remember, said.append)
    for step in (first, first + 20):
        trackers.scalars("recovery of abc", step, {"loss": 1.0 / (1 + step), "learning rate": 0.01})
    trackers.trial(1 + first, "F1", {"loss": 0.5, "accuracy": float("nan")})
    trackers.result({"ratio": 0.25}, [folder / "bundle", folder / "report.html"])
    trackers.close(finished=True)


def test_tensorboard_holds_every_training_and_trial(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    memory, said = Memory(), list[str]()
    for first in (0, 40):  # killed and resumed
        tracked(["tensorboard"], tmp_path, memory, first, said)
    assert said == []

    def points(place: str, tag: str) -> list[tuple[int, float]]:
        found = EventAccumulator(str(tmp_path / "tensorboard" / place))
        found.Reload()
        return [(event.step, event.value) for event in found.Scalars(tag)]

    losses = points("recovery of abc", "training/loss")
    assert [step for step, _ in losses] == [0, 20, 40, 60]
    assert [loss for _, loss in losses] == pytest.approx([1.0, 1 / 21, 1 / 41, 1 / 61])
    assert points("trials", "F1/loss") == [(1, 0.5), (41, 0.5)]
    assert points("trials", "result/ratio")[-1] == (0, 0.25)
    with pytest.raises(KeyError):
        points("trials", "F1/accuracy")


def test_mlflow_holds_trainings_trials_bundle_and_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    memory, said = Memory(), list[str]()
    for first in (0, 40):  # killed and resumed
        tracked(["mlflow"], tmp_path / "run", memory, first, said)
    assert said == []
    client = MlflowClient()
    experiment = client.get_experiment_by_name("hirelc-deploy")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"run", "recovery of abc"}
    parent, training = runs["run"], runs["recovery of abc"]
    assert training.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (parent.data.tags["command"], parent.info.status, training.info.status) == (COMMAND, *2 * ("FINISHED",))
    losses = client.get_metric_history(training.info.run_id, "loss")
    assert [point.step for point in losses] == [0, 20, 40, 60]
    assert [point.step for point in client.get_metric_history(parent.info.run_id, "F1/loss")] == [1, 41]
    assert parent.data.metrics["result/ratio"] == 0.25
    assert "F1/accuracy" not in parent.data.metrics
    assert {one.path for one in client.list_artifacts(parent.info.run_id)} == {"bundle", "report.html"}
    assert [one.path for one in client.list_artifacts(parent.info.run_id, "bundle")] == ["bundle/model.onnx"]


def test_a_tracker_that_is_unknown_or_not_installed_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--track 'wandb': this tracker is unknown; use tensorboard or mlflow"):
        check_trackers(["wandb"])

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(contract.importlib, "import_module", missing)
    with pytest.raises(InputError, match=r"mlflow is not installed; run pip install 'hirelc-deploy\[mlflow\]'"):
        check_trackers(["mlflow"])


def test_a_tracker_that_fails_is_told_nothing_more_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    class Failing:
        errors = (OSError,)

        def trial(self, number: int, fidelity: str, values: Any) -> None:
            told.append(fidelity)
            raise OSError("the server is gone\nin many lines")

    module = type("Module", (), {"ERRORS": (OSError,), "tracker": staticmethod(lambda *given: Failing())})
    monkeypatch.setattr(contract.importlib, "import_module", lambda name: module)
    said: list[str] = []
    trackers = Trackers(["mlflow"], tmp_path, COMMAND, Memory().remember, said.append)
    for fidelity in ("F1", "F2"):
        trackers.trial(1, fidelity, {})
    trackers.close(finished=True)
    assert told == ["F1"]
    assert said == ["warning: mlflow takes nothing more (the server is gone); the run goes on without it."]
