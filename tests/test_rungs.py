"""In: plans of one time, made-up losses. Out: proof that the better half goes on, and what a search does with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from test_pipeline import data_file, make_pipeline

from hirelc_deploy.compress.recovery import Recovery
from hirelc_deploy.config import Limits, SearchConfig
from hirelc_deploy.deliver import finalists
from hirelc_deploy.deliver.limits import TOLERANCE
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.measure.table import LatencyTable
from hirelc_deploy.outcome import Measured
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.strategies.rungs import RUNGS, raced, shares_of_a_race

__all__ = ["data_file"]


def set_recovery(pipeline: Pipeline, recovery: Recovery | None) -> None:
    changed = replace(pipeline.effort, recovery=recovery)
    pipeline.effort = pipeline.uncut.effort = pipeline.training.effort = changed


def watched(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """Return what plans are found to lose in a race, by digest, as it goes on."""
    judged: dict[str, list[float]] = {}
    loss_at = pipeline.training.loss_at

    def watched(plan: CompressionPlan, share: float) -> float:
        judged.setdefault(plan.digest, []).append(loss_at(plan, share))
        return judged[plan.digest][-1]

    monkeypatch.setattr(pipeline.training, "loss_at", watched)
    return judged


def ratios_of(pipeline: Pipeline, digests: Iterable[str]) -> list[float]:
    """Return the time of each plan's untrained file over that of the float file."""
    files = {t.plan.digest: t.outcome for t in pipeline.run.trials if t.fidelity == "F2"}
    found = [files[digest] for digest in digests]
    return [outcome.ratio or 9.0 for outcome in found if isinstance(outcome, Measured)]


def plans_of(count: int) -> list[CompressionPlan]:
    return [CompressionPlan({"unit": width}) for width in range(1, count + 1)]


@pytest.mark.parametrize(("count", "asked"), [(1, []), (2, [2]), (3, [3, 2]), (4, [4, 2]), (5, [5, 2]), (8, [8, 4])])
def test_the_better_half_goes_on_and_the_winner_lost_least_at_the_last_rung(count: int, asked: list[int]) -> None:
    plans, calls = plans_of(count), list[tuple[int, float]]()

    def loss_at(plan: CompressionPlan, share: float) -> float:
        width = plan.keep["unit"]
        calls.append((width, share))
        return abs(width - 2.0) if share == RUNGS[0] else -float(width)

    found = raced(plans, loss_at)
    assert sorted(found, key=plans.index) == plans
    assert [sum(share == rung for _, share in calls) for rung in RUNGS[: len(asked)]] == asked
    late = [width for width, share in calls if share == RUNGS[1]]
    assert found[0].keep["unit"] == max(late or [min(2, count)])
    last = raced(plans, lambda plan, share: float(plan.keep["unit"]))
    assert [plan.keep["unit"] for plan in last] == list(range(1, count + 1))


def test_what_a_race_trains_is_what_its_plans_train_less_the_winners_part() -> None:
    for count in range(1, 10):
        done: dict[str, float] = {}

        def loss_at(plan: CompressionPlan, share: float, done: dict[str, float] = done) -> float:
            done[plan.digest] = share
            return float(plan.keep["unit"])

        winner = raced(plans_of(count), loss_at)[0]
        losers = sum(share for digest, share in done.items() if digest != winner.digest)
        assert shares_of_a_race(count) == pytest.approx(losers)


def test_the_plan_that_wins_the_race_is_recovered_from_where_it_stands(
    data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, limits = make_pipeline(data_file, tmp_path / "run"), Limits(speedup=2.0, max_drop=99.0)
    judged = watched(pipeline, monkeypatch)
    config = SearchConfig("hirelc", f1_evaluations=6, finalists=1, options=4, race=4, depth=False)
    search = finalists.Search(pipeline, pipeline.run, LatencyTable(pipeline.backend, None), limits, config)
    (found,) = search.finalists()
    assert 2 <= len(judged) <= 4
    went_on = {digest: losses for digest, losses in judged.items() if len(losses) == len(RUNGS)}
    best = min(went_on, key=lambda digest: went_on[digest][-1]) if went_on else min(judged, key=lambda d: judged[d][0])
    assert found.plan.digest == best
    ratios = ratios_of(pipeline, judged)
    assert len(ratios) == len(judged)
    assert max(ratios) <= (1 + TOLERANCE) / 2.0
    assert list(pipeline.files.folder.glob("*.training")) == []


def test_without_an_asked_speed_no_entrant_is_much_slower_than_the_best_plan(
    data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = make_pipeline(data_file, tmp_path / "run")
    judged = watched(pipeline, monkeypatch)
    config = SearchConfig("random", f1_evaluations=6, finalists=1, options=8, race=9, depth=False)
    search = finalists.Search(pipeline, pipeline.run, LatencyTable(pipeline.backend, None), Limits(), config)
    aim_ms = 0.7 * search.problem.uncut_ms
    assert search._best_at(aim_ms) is not None
    plans = {plan.digest: (plan, pipeline.outcome(plan, "F2")) for plan in search._others(aim_ms)}
    measured = [(plan, outcome) for plan, outcome in plans.values() if isinstance(outcome, Measured)]
    for plan, outcome in measured:
        judged.clear()
        search._raced((plan, outcome), aim_ms, None)
        assert outcome.ratio is not None
        most = (1 + finalists.UNUSED) * outcome.ratio
        within = {other.digest for other, found in measured if (found.ratio or 0.0) <= most}
        assert judged.keys() == (within if len(within) > 1 else set())
    assert len(measured) > 1


def test_without_training_there_is_no_race(data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = make_pipeline(data_file, tmp_path / "run")
    set_recovery(pipeline, None)

    def never(*_: object) -> float:
        raise AssertionError("nothing is trained here")

    monkeypatch.setattr(pipeline.training, "loss_at", never)
    config = SearchConfig("knapsack", f1_evaluations=2, finalists=1, options=3, race=3)
    limits = Limits(speedup=2.0, max_drop=99.0)
    search = finalists.Search(pipeline, pipeline.run, LatencyTable(pipeline.backend, None), limits, config)
    assert len(search.finalists()) == 1
