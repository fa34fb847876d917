"""A plan within a recovered one begins at its weights: they are the same where they should be, and trained for less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_pipeline import data_file, make_pipeline

from hirelc_deploy.compress import slicing
from hirelc_deploy.config import SearchConfig
from hirelc_deploy.errors import InputError
from hirelc_deploy.evaluate.cutting import cut
from hirelc_deploy.evaluate.further import lies_within, recovered
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.plan import CompressionPlan

__all__ = ["data_file"]

LARGE = {"stages.0.residual": 8, "stages.1.0.conv1": 16, "stages.1.residual": 16}
SMALL = {**LARGE, "stages.1.0.conv1": 8}
OTHER = {"stages.0.0.conv1": 8}


def float_plan(keep: dict[str, int]) -> CompressionPlan:
    return CompressionPlan(keep, default_precision="float")


@pytest.fixture(scope="module")
def pipeline(data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    pipeline = make_pipeline(data_file, tmp_path_factory.mktemp("further") / "run")
    pipeline.outcome(float_plan(LARGE), "F3")
    return pipeline


def test_what_a_recovered_plan_does_not_use_can_be_cut_from_it_and_nothing_changes(pipeline: Pipeline) -> None:
    large, small = float_plan(LARGE), float_plan(SMALL)
    weights = load_file(str(pipeline.files.weights_of(large)))
    kept, fewer = (slicing.keep_indices(pipeline.graph, plan, pipeline.uncut.scores) for plan in (large, small))
    unused = np.flatnonzero(~np.isin(kept["stages.1.0.conv1"], fewer["stages.1.0.conv1"]))
    assert len(unused) == 8
    trained = slicing.slice_model(pipeline.model, pipeline.graph, kept).eval()
    images = torch.cat([part.pictures for part in pipeline.uncut.selection.shown()])
    for cut_away in ([], unused):
        weights["stages.1.0.conv2.weight"][:, cut_away] = 0
        trained.load_state_dict(weights)
        base = recovered(pipeline.uncut, large, weights)
        with torch.no_grad():
            wanted = trained(images)
            apart = cut(base, small if len(cut_away) else large)(images) - wanted
        assert apart.abs().max() < 0.01 * wanted.std(), "but for norms, which are looked at in half precision"
    with pytest.raises(RuntimeError):
        recovered(pipeline.uncut, small, weights)


def test_a_plan_lies_within_another_where_no_unit_is_wider(pipeline: Pipeline) -> None:
    def within(one: dict[str, int], other: dict[str, int]) -> bool:
        return lies_within(pipeline.graph, float_plan(one), float_plan(other))

    assert within(SMALL, LARGE)
    assert within(LARGE, LARGE)
    assert within({**SMALL, "stages.0.0.conv1": 0}, LARGE)
    assert not within(LARGE, SMALL)
    assert not within(OTHER, LARGE)


def test_only_a_plan_within_a_recovered_one_begins_there_and_a_killed_one_goes_on_to_the_same_weights(
    pipeline: Pipeline, data_file: Path, tmp_path: Path
) -> None:
    killed, seen = make_pipeline(data_file, tmp_path / "run"), list[int]()
    killed.outcome(float_plan(LARGE), "F3")
    for one in (pipeline, killed):
        one.training.further = 2 / 3

    def stop(_plan: CompressionPlan, epoch: int, _model: Any) -> None:
        seen.append(epoch)
        if seen == [1]:
            raise KeyboardInterrupt

    killed.training.after_epoch = stop
    small = float_plan(SMALL)
    with pytest.raises(KeyboardInterrupt):
        killed.outcome(small, "F3")
    killed.outcome(small, "F3")
    pipeline.outcome(small, "F3")
    assert seen == [1, 2], "two thirds of three epochs"
    assert killed.files.weights_of(small).read_bytes() == pipeline.files.weights_of(small).read_bytes()
    assert pipeline.run.fact(f"recovery of {small.digest} begins at") == float_plan(LARGE).digest
    other = float_plan(OTHER)
    seen.clear()
    seen.append(0)
    killed.outcome(other, "F3")
    assert seen == [0, 1, 2, 3]
    assert killed.run.facts[f"recovery of {other.digest} begins at"] is None


def test_a_share_of_a_recovery_is_one_and_no_race_is_run_with_it() -> None:
    with pytest.raises(InputError, match="at most 1"):
        SearchConfig(further_recovery=1.5)
    with pytest.raises(InputError, match="train equally long"):
        SearchConfig(further_recovery=0.5, race=4)
