"""Agents move to another problem where they foretell it, and are refused with a sentence where they do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from test_pipeline import data_file, make_pipeline  # noqa: F401  (a fixture)
from toy_problem import Toy, plan_of

from hirelc_deploy.config import Limits, SearchConfig
from hirelc_deploy.deliver.finalists import AGENTS, Search
from hirelc_deploy.errors import InputError
from hirelc_deploy.measure.table import LatencyTable
from hirelc_deploy.strategies.hierarchy import Hierarchy
from hirelc_deploy.strategies.loop import run_search
from hirelc_deploy.strategies.transfer import FRESH, shared_weights, take_over


def searched(toy: Toy, hierarchy: Hierarchy, trials: int) -> Hierarchy:
    run_search(toy.problem, hierarchy, toy.evaluate, f1_evaluations=trials, f2_evaluations=0)
    return hierarchy


def hierarchy(toy: Toy) -> Hierarchy:
    return Hierarchy(toy.problem, 0.45 * toy.problem.uncut_ms, 3)


def sampled(toy: Toy, count: int = FRESH) -> tuple[np.ndarray, np.ndarray]:
    plans = np.random.default_rng(1).integers(0, 5, (count, len(toy.problem.decisions)))
    return plans, np.array([toy.loss(plan) for plan in plans])


def test_what_moves_has_the_same_shapes_for_a_model_with_other_blocks_and_is_used_there():
    there, here = Toy(0), Toy(1, blocks=4, per_block=2)
    learned = shared_weights(searched(there, hierarchy(there), 32).agents)
    assert any(tensor.abs().sum() > 0 for name, tensor in learned.items() if name.endswith("low.2.weight"))
    agents = hierarchy(here).agents
    verdict = take_over(agents, learned, *sampled(here, 40))
    assert verdict.taken, verdict.says
    moved = shared_weights(agents)
    assert all(moved[name].equal(learned[name]) for name in learned)
    blind = [column for column in range(agents[0].high.shared[0].in_features) if column not in agents[0].high.general]
    assert len(blind) == 4
    assert not agents[0].high.shared[0].weight[:, blind].any()


def test_what_foretells_nothing_is_refused_and_changes_nothing():
    toy = Toy(2)
    agents = hierarchy(toy).agents
    learned = {name: 50 * tensor.sign() + 20 for name, tensor in shared_weights(agents).items()}
    before = shared_weights(agents)
    plans, losses = sampled(toy)
    verdict = take_over(agents, learned, plans, -losses)
    assert not verdict.taken
    assert "the search goes on without it" in verdict.says
    assert all(tensor.equal(before[name]) for name, tensor in shared_weights(agents).items())


def test_agents_with_other_inputs_are_refused():
    toy = Toy(2)
    agents = hierarchy(toy).agents
    learned = shared_weights(agents)
    learned["0.low.0.weight"] = learned["0.low.0.weight"][:, :-1]
    verdict = take_over(agents, learned, *sampled(toy))
    assert not verdict.taken
    assert "0.low.0.weight has shape" in verdict.says


def test_a_search_decides_once_ten_plans_were_measured_and_says_so():
    there, here = Toy(0), Toy(1)
    second = hierarchy(here)
    second.elsewhere = shared_weights(searched(there, hierarchy(there), 24).agents)
    searched(here, second, 8)
    assert second.verdict is None
    searched(here, second, 24)
    assert second.verdict is not None
    assert second.record()["transfer"]["correlation"] == pytest.approx(second.verdict.correlation)
    assert plan_of(here.problem.decisions, second.vote())


def test_a_run_leaves_its_agents_and_another_begins_with_them_or_says_that_there_are_none(
    data_file: Path,  # noqa: F811
    tmp_path: Path,
):
    def search(folder: Path, earlier: Path | None) -> Search:
        pipeline = make_pipeline(data_file, folder)
        table = LatencyTable(pipeline.backend, tmp_path / "times.jsonl", 1)
        config = SearchConfig(f1_evaluations=4, finalists=1, options=3, warm_start=str(earlier) if earlier else None)
        return Search(pipeline, pipeline.run, table, Limits(speedup=2.0), config)

    search(tmp_path / "first", None).finalists()
    assert "0.low.0.weight" in load_file(tmp_path / "first" / AGENTS)
    second = search(tmp_path / "second", tmp_path / "first")
    assert second._elsewhere is not None
    with pytest.raises(InputError, match="no agents of a search could be read"):
        search(tmp_path / "third", tmp_path / "second")
