"""In: what a run measures. Out: an MLflow run with its trials, bundle and report; inside it one for each training."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from hirelc_deploy.trackers.contract import Remember

ERRORS: tuple[type[Exception], ...] = (MlflowException, OSError)
EXPERIMENT = "hirelc-deploy"
PARENT = "mlflow.parentRunId"


class Mlflow:
    """Goes where MLflow's own MLFLOW_TRACKING_URI says; MLFLOW_EXPERIMENT_NAME names another experiment.

    Trials are points of the run, at the step of their number. A run that is resumed goes on in the same MLflow run.
    """

    errors = ERRORS

    def __init__(self, name: str, command: str, remember: Remember) -> None:
        self._client, self._remember = MlflowClient(), remember
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        found = self._client.get_experiment_by_name(experiment)
        self._experiment = found.experiment_id if found else self._client.create_experiment(experiment)
        self._trainings: dict[str, str] = {}
        self._run = self._run_of(name, {"command": command})
        self._client.update_run(self._run, status="RUNNING")

    def scalars(self, training: str, step: int, values: Mapping[str, float]) -> None:
        """Log the scalars of one step of a training in its own run."""
        if training not in self._trainings:
            self._trainings[training] = self._run_of(training, {PARENT: self._run})
        self._log(self._trainings[training], step, values)

    def trial(self, number: int, fidelity: str, values: Mapping[str, float]) -> None:
        """Log one finished evaluation."""
        self._log(self._run, number, {f"{fidelity}/{name}": value for name, value in values.items()})

    def result(self, values: Mapping[str, float], files: Sequence[Path]) -> None:
        """Log what a finished run says of the shipped file, and its bundle and report as artefacts."""
        self._log(self._run, 0, {f"result/{name}": value for name, value in values.items()})
        for path in files:
            if path.is_dir():
                self._client.log_artifacts(self._run, str(path), path.name)
            else:
                self._client.log_artifact(self._run, str(path))

    def close(self, finished: bool) -> None:
        """Set the status of the run and of its trainings."""
        for run in (*self._trainings.values(), self._run):
            self._client.set_terminated(run, "FINISHED" if finished else "KILLED")

    def _run_of(self, name: str, tags: Mapping[str, Any]) -> str:
        """Return the MLflow run of this name that was made for this run of ours, now or in a command before."""

        def make() -> str:
            return str(self._client.create_run(self._experiment, run_name=name, tags=dict(tags)).info.run_id)

        known = str(self._remember(f"mlflow run of {name}", make))
        try:
            return str(self._client.get_run(known).info.run_id)
        except MlflowException:  # resumed with another server
            return make()

    def _log(self, run: str, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(run, metrics=[Metric(name, value, now, step) for name, value in values.items()])


def tracker(directory: Path, command: str, remember: Remember) -> Mlflow:
    """Return the tracker of a run."""
    return Mlflow(directory.resolve().name, command, remember)
