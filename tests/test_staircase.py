"""Stairs of a model on the fake device, whose staircase is known, and tables of other machines."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hirelc_deploy.graph.model_graph import LayerShape, ModelGraph
from hirelc_deploy.graph.units import build_graph
from hirelc_deploy.jobs.profile import profile_model
from hirelc_deploy.measure import table as tables
from hirelc_deploy.measure.table import CHECKS, LatencyTable, LayerKey
from hirelc_deploy.progress import Progress
from hirelc_deploy.results.staircase import stairs_of, thinned, wanted_keys
from hirelc_deploy.testing.fake_backend import FakeBackend

LINEAR = LayerShape("linear", 17, (1, 17))
KEYS = [LayerKey(LINEAR, 8 * width, 64, "float") for width in range(1, 21)]


class Twins(nn.Module):
    """Two equal hidden layers of 64 units one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
        self.second = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.mean((2, 3))
        x = torch.cat([x, x, x, x, x, x[:, :1]], 1)
        return self.second(self.first(x))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def graph() -> ModelGraph:
    torch.manual_seed(0)
    return build_graph(Twins().eval(), torch.rand(2, 3, 4, 4))


def hidden(graph: ModelGraph) -> list[str]:
    return [unit.name for unit in graph.units if unit.size == 64]


def test_equal_units_are_measured_once_and_the_steps_are_the_devices(graph: ModelGraph) -> None:
    table = LatencyTable(FakeBackend(), None)
    stairs = stairs_of(graph, table, ["float", "int8"], 8)
    (shared,) = [one for one in stairs if set(one.units) == set(hidden(graph))]
    assert shared.widths == (8, 16, 24, 32, 40, 48, 56, 64)
    assert table.measured == len(wanted_keys(graph, ["float", "int8"], 8))
    # The fake device fills float outputs 16 at a time.
    expected = [alone("first.0", graph, 16, w) + alone("first.2", graph, w, 16) for w in shared.widths]
    assert shared.ms["float"] == pytest.approx(expected)
    step = alone("first.0", graph, 16, 48)
    assert alone("first.0", graph, 16, 40) == pytest.approx(step, rel=2e-3)  # its ReLU has no steps
    assert alone("first.0", graph, 16, 56) > 1.004 * step


def alone(layer: str, graph: ModelGraph, inputs: int, outputs: int) -> float:
    (found,) = [one for one in graph.layers if one.name == layer]
    return LatencyTable(FakeBackend(), None).layer_ms(found.shape, inputs, outputs, "float")


def test_widths_are_legal_even_and_end_uncut(graph: ModelGraph) -> None:
    unit = graph.unit(hidden(graph)[0])
    assert thinned(unit, 4) == (16, 32, 48, 64)
    assert thinned(unit, 500) == unit.widths


def test_a_profile_is_stored_drawn_and_reused(
    graph: ModelGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HIRELC_DEPLOY_CACHE", str(tmp_path / "cache"))

    def once() -> dict[str, Any]:
        out, quiet = tmp_path / "out", Progress(quiet=True)
        return profile_model(
            graph, FakeBackend(), out, "Twins <1>", threads=1, batch=1, steps=4, fresh=False, progress=quiet
        )

    first, second = once(), once()
    assert first["stairs"] == second["stairs"]
    assert "0 measured now" in second["facts"]["layer times"]
    assert json.loads((tmp_path / "out/staircase.json").read_text())["stairs"] == json.loads(
        json.dumps(first["stairs"])
    )
    page = (tmp_path / "out/staircase.html").read_text()
    assert "Twins &lt;1&gt;" in page
    assert page.count("<svg") == len(first["stairs"])
    assert page.count("<circle") == sum(len(one["widths"]) * len(one["ms"]) for one in first["stairs"])
    assert not re.search(r"https?://", page)


class OtherMachine(FakeBackend):
    """The fake device under another runtime version, so many times slower."""

    def __init__(self, slower: float) -> None:
        super().__init__()
        self._slower = slower

    def versions(self) -> dict[str, str]:
        return {"fake": "another"}

    def build(self, model: Path, threads: int = 1) -> Any:
        runner = super().build(model, threads)
        profile = runner.profile
        runner.profile = lambda image, runs: [  # type: ignore[method-assign]
            replace(one, microseconds=one.microseconds * self._slower) for one in profile(image, runs)
        ]
        return runner


@pytest.mark.parametrize(("slower", "adopted"), [(1.0, len(KEYS) - CHECKS), (1.04, len(KEYS) - CHECKS), (1.07, 0)])
def test_another_machines_times_are_believed_only_when_ten_fresh_ones_agree(
    slower: float, adopted: int, tmp_path: Path
) -> None:
    path = tmp_path / "table.jsonl"
    LatencyTable(OtherMachine(slower), path).measure_many(KEYS)
    here = LatencyTable(FakeBackend(), path)
    adoption = here.adopt(KEYS)
    assert adoption is not None
    assert (adoption.checks, adoption.adopted) == (CHECKS, adopted)
    assert here.measured == CHECKS
    assert adoption.median_difference == pytest.approx(1 - 1 / slower, abs=1e-6)
    # What was taken over is not written down as measured here.
    assert LatencyTable(FakeBackend(), path).measure_many(KEYS)
    lines = path.read_text().splitlines()
    assert len(lines) == 2 * len(KEYS)


def test_a_machine_that_has_measured_too_little_is_not_asked(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    LatencyTable(OtherMachine(1.0), path).measure_many(KEYS[: CHECKS - 1])
    here = LatencyTable(FakeBackend(), path)
    assert here.adopt(KEYS) is None
    assert here.measured == 0


def test_a_pool_shares_out_what_is_missing_and_every_time_lands_at_its_layer() -> None:
    class Pool(FakeBackend):
        side_by_side = 3

    assert tables.LatencyTable(Pool(), None).measure_many(KEYS) == LatencyTable(FakeBackend(), None).measure_many(KEYS)
