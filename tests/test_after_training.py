"""Plans of several strategies, trained at equal seconds: what each gets, and who is ahead on the same images."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import data_file, make_pipeline
from test_rungs import set_recovery

from hirelc_deploy.compress.recovery import Recovery
from hirelc_deploy.errors import InputError
from hirelc_deploy.evaluate import network_time, tables
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.evaluate.training import Training
from hirelc_deploy.jobs import after_training
from hirelc_deploy.jobs.after_training import CONTROL, check_trainable, compared
from hirelc_deploy.measure.table import LatencyTable
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.results.comparison import Search, run_all
from hirelc_deploy.results.trained import Trained, over_seeds, side_by_side, trained_lines
from hirelc_deploy.strategies.problem import Problem
from hirelc_deploy.tasks.classification import CLASSIFICATION
from hirelc_deploy.tasks.paired import Z_95, PairedDrop

__all__ = ["data_file"]

TABLES, EPOCH = 0.25, 0.5
"""Seconds."""


def problem_of(pipeline: Pipeline) -> Problem:
    network, _ = network_time.fit_network_time(pipeline, LatencyTable(pipeline.backend, None))
    return tables.build_problem(pipeline, network, options=3)


def searches_of(pipeline: Pipeline, problem: Problem) -> list[Search]:
    found = run_all(
        problem, [0.6 * problem.uncut_ms], ["greedy", "uniform"], [0, 1], pipeline.outcome, f1_evaluations=2
    )
    spent = {"greedy": (0.5, 0.75), "uniform": (0.0, 0.25)}
    return [
        replace(one, thinking_seconds=spent[one.strategy][0], charged_seconds=spent[one.strategy][1]) for one in found
    ]


def test_a_shorter_search_trains_longer_and_nothing_is_trained_twice(
    data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = make_pipeline(data_file, tmp_path / "run")
    set_recovery(pipeline, Recovery(epochs=1.0, batch_size=16, soft_weight=1.0))
    monkeypatch.setattr(after_training, "table_seconds", lambda pipeline: TABLES)
    monkeypatch.setattr(after_training, "epoch_seconds", lambda pipeline, plan: EPOCH)
    epochs, trained = list[float](), Training.trained

    def training(self: Training, *given: Any) -> Any:
        assert self.effort.recovery is not None
        epochs.append(self.effort.recovery.epochs)
        return trained(self, *given)

    monkeypatch.setattr(Training, "trained", training)
    problem = problem_of(pipeline)
    searches = searches_of(pipeline, problem)
    record = compared(pipeline, problem, searches, "greedy")
    (budget,) = record["budgets"]
    rows = {row["strategy"]: row for row in budget["strategies"]}
    assert list(rows) == ["greedy", "uniform", CONTROL]
    # 0.25 s of tables, 1.25 s of search and 0.5 s of training are 2 s for everybody.
    assert rows["greedy"]["search_seconds"] == [1.5, 1.5]
    assert {name: row["epochs"] for name, row in rows.items()} == {
        "greedy": [1.0, 1.0],
        "uniform": [3.5, 3.5],
        CONTROL: [3.5, 3.5],
    }
    assert sorted(epochs) == [1.0, 1.0, 3.5, 3.5, 3.5, 3.5]
    assert record["test_images"] == 64
    for row in rows.values():
        assert all(0 <= value <= 1 for value in row["values"])
        assert all(0 < ratio < 0.7 for ratio in row["ratio"])
    for name in ("uniform", CONTROL):
        points = [100 * (a - b) for a, b in zip(rows["greedy"]["values"], rows[name]["values"], strict=True)]
        assert rows[name]["lead"]["points"] == pytest.approx(sum(points) / 2)
        assert rows[name]["lead"]["low"] < rows[name]["lead"]["points"] < rows[name]["lead"]["high"]
    assert trained_lines(record, "greedy")[1:] != []
    again = pipeline.in_run(pipeline.run)  # as another process opens it, which may have the test images once
    assert compared(again, problem, searches, "greedy") == record
    assert len(epochs) == 6


def test_what_a_step_takes_is_measured_and_leaves_random_numbers_as_they_were(data_file: Path, tmp_path: Path) -> None:
    pipeline = make_pipeline(data_file, tmp_path / "run")
    plan = CompressionPlan({unit.name: unit.least for unit in pipeline.graph.units}, default_precision="float")
    seconds = after_training.epoch_seconds(pipeline, plan)
    assert 0 < seconds < 60
    assert after_training.epoch_seconds(pipeline, plan) == seconds, "it is remembered"


def test_the_seconds_of_the_table_are_those_of_single_widths(data_file: Path, tmp_path: Path) -> None:
    pipeline = make_pipeline(data_file, tmp_path / "run")
    units = {unit.name: unit for unit in pipeline.graph.units}
    single = CompressionPlan({next(iter(units)): next(iter(units.values())).least}, default_precision="auto")
    both = CompressionPlan({name: unit.least for name, unit in units.items()}, default_precision="auto")
    one = pipeline.outcome(single, "F1")
    pipeline.outcome(both, "F1")
    assert after_training.table_seconds(pipeline) == pytest.approx(sum(one.seconds.values()))


def test_the_interval_over_trainings_by_hand() -> None:
    half = 2 * Z_95  # of one training: a standard error of 2 points
    one = PairedDrop(1.0, 1.0 - half, 1.0 + half)
    assert over_seeds([one]) == pytest.approx((1.0, 1.0 - half, 1.0 + half))
    # Means 1 and 5: their own standard error is sqrt(8 / 2) = 2, with that of the images sqrt(8).
    other = PairedDrop(5.0, 5.0 - half, 5.0 + half)
    wide = Z_95 * math.sqrt(8)
    assert over_seeds([one, other]) == pytest.approx((3.0, 3.0 - wide, 3.0 + wide))


def test_budgets_stand_apart_and_the_longest_comes_first() -> None:
    rows = [
        Trained("a", 0, ms, 1.0, 1.0, 0.5, parts)
        for ms, parts in ((2.0, [True, True, False]), (4.0, [True, False, False]))
    ]
    rows += [replace(row, strategy="b", parts=[False, True, False]) for row in rows]
    longest, shortest = side_by_side(CLASSIFICATION, rows, "a")
    assert (longest["budget_ms"], shortest["budget_ms"]) == (4.0, 2.0)
    assert [row["strategy"] for row in longest["strategies"]] == ["a", "b"]
    assert longest["strategies"][1]["lead"]["points"] == pytest.approx(0.0)
    assert shortest["strategies"][1]["lead"]["points"] == pytest.approx(100 / 3)


def test_without_training_or_labels_there_is_nothing_to_compare(data_file: Path, tmp_path: Path) -> None:
    pipeline = make_pipeline(data_file, tmp_path / "run")
    check_trainable(pipeline)
    pipeline.data = replace(pipeline.data, labelled=False)
    with pytest.raises(InputError, match="no labels"):
        check_trainable(pipeline)
    set_recovery(pipeline, None)
    with pytest.raises(InputError, match="trains nothing"):
        check_trainable(pipeline)
