"""All that trains and judges runs on a GPU, too: on a device that refuses what mixes it with the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_pipeline import data_file, make_pipeline, tiny_net
from torch import Tensor, nn

from hirelc_deploy.compress import devices, slicing
from hirelc_deploy.compress.integer.qat import OUTPUT, Grid, Rounding, install
from hirelc_deploy.evaluate import uncut
from hirelc_deploy.evaluate.further import recovered
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.evaluate.uncut import UncutModel
from hirelc_deploy.inputs.data.load import load_data
from hirelc_deploy.outcome import Measured
from hirelc_deploy.progress import Progress
from hirelc_deploy.tasks.classification import CLASSIFICATION
from hirelc_deploy.testing.other_device import OTHER, other_device

__all__ = ["data_file"]

SAME = 1e-4
"""Relative difference of the same sums in another order."""


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """No device multiplies bfloat16: it would round what is compared to three digits."""
    monkeypatch.setattr(devices, "multiplies_bfloat16", lambda _: False)


@pytest.fixture
def pipelines(data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Pipeline]:
    """One that computes on the CPU, one that does so elsewhere."""
    here = make_pipeline(data_file, tmp_path / "here")
    assert here.uncut.device == devices.CPU
    monkeypatch.setattr(uncut.ranks, "device", lambda: OTHER)
    return [here, make_pipeline(data_file, tmp_path / "there")]


def test_plans_are_judged_and_recovered_elsewhere_as_on_the_cpu(pipelines: list[Pipeline]) -> None:
    here, there = pipelines
    with other_device():
        assert there.uncut.device == OTHER
        assert there.uncut.there is not there.model
        for name, scores in here.uncut.scores.items():
            assert np.allclose(scores, there.uncut.scores[name], rtol=SAME)
        for name, gram in here.uncut.grams.items():
            assert np.allclose(gram.second_moment, there.uncut.grams[name].second_moment, rtol=SAME, atol=1e-6)
        plan = slicing.uniform_plan(here.graph, 0.5, "float")
        one, other = (each.evaluate(plan, "F1") for each in pipelines)
        assert isinstance(one, Measured)
        assert isinstance(other, Measured)
        assert one.loss == pytest.approx(other.loss, rel=1e-3)
        assert one.accuracy == other.accuracy
        models = [each.training.recovered(each.cut(plan), plan) for each in pipelines]
        assert [devices.device_of(model) for model in models] == [devices.CPU, devices.CPU]
        assert torch.allclose(*(model(here.uncut.example) for model in models), rtol=0.01, atol=0.01)
        assert not torch.allclose(models[1](here.uncut.example), there.cut(plan)(here.uncut.example), atol=0.01)
        weights = models[0].state_dict()
        larger = [recovered(each.uncut, plan, weights) for each in pipelines]
        assert [devices.device_of(each.model) for each in larger] == [devices.CPU, OTHER]
        answers = [devices.at(each.restated, devices.CPU)(here.uncut.example) for each in larger]
        assert torch.allclose(*answers, rtol=SAME, atol=SAME)


def test_rounding_is_the_same_elsewhere(data_file: Path) -> None:
    rounding = Rounding({"conv1": 127}, {("conv1", OUTPUT): (Grid(0.05, -128, 127),)})
    images = torch.rand((4, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    answers, slopes = [], []
    with other_device():
        for device in (devices.CPU, OTHER):
            model = devices.at(tiny_net(), device)
            install(model, rounding)
            answer = model(images.to(device))
            answer.sum().backward()
            answers.append(answer.detach().cpu())
            weight = model.conv1.parametrizations.weight.original
            slopes.append(weight.grad.cpu())
    assert torch.allclose(*answers, rtol=SAME, atol=SAME)
    assert torch.allclose(*slopes, rtol=0.01, atol=SAME)
    assert not torch.allclose(answers[0], tiny_net()(images))


def test_processes_side_by_side_judge_on_the_cpu(pipelines: list[Pipeline]) -> None:
    there = pipelines[1]
    there.jobs = 2
    with other_device():
        assert devices.device_of(there.judge.uncut.model) == devices.CPU
        assert all(batch.device == devices.CPU for batch in there.judge.uncut.norm_batches)


class OnTheCpuAlone(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images + torch.ones(1, 3, 1, 1))


def test_a_model_that_runs_on_the_cpu_alone_computes_there_and_it_is_said(
    pipelines: list[Pipeline], data_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = pipelines[1].uncut
    model = OnTheCpuAlone(there.model)
    with other_device():
        found = UncutModel(model, load_data(f"npz:{data_file}"), CLASSIFICATION, there.effort, Progress())
        assert found.device == devices.CPU
        assert found.there is model
    assert "does not run on meta (RuntimeError: aten.add.Tensor: expected all tensors" in capsys.readouterr().err
