"""In: a device with two made-up runtimes. Out: proof that the search works in that where cut networks are fastest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_pipeline import EFFORT, data_file, tiny_net

from hirelc_deploy.config import Limits, SearchConfig
from hirelc_deploy.deliver import finalists
from hirelc_deploy.deliver import race as delivery
from hirelc_deploy.errors import InputError
from hirelc_deploy.evaluate.leading import choose_runtime, take_up
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.inputs.data.load import load_data
from hirelc_deploy.measure.backend import TimingProcess
from hirelc_deploy.measure.table import LatencyTable
from hirelc_deploy.runs import Run
from hirelc_deploy.testing.fake_backend import NO_NOISE, FakeBackend, FakeTiming, Faults, operator_times

__all__ = ["data_file"]


class Scaled(FakeBackend):
    """A runtime that takes so many times as long for uncut files, and for all others."""

    def __init__(self, name: str, uncut: float = 1.0, cut: float = 1.0, refuse: str = "") -> None:
        super().__init__(faults=Faults(refuse=refuse))
        self.name = name
        self._uncut, self._cut = uncut, cut

    def versions(self) -> dict[str, str]:
        return {self.name: "simulated"}

    @contextmanager
    def _timing(self, files: Sequence[Path], threads: int, seed: int) -> Iterator[TimingProcess]:
        scale = [self._uncut if file.name.startswith("uncut") else self._cut for file in files]
        alone = [sum(operator.microseconds for operator in operator_times(file, threads)) for file in files]
        times = [by * microseconds for by, microseconds in zip(scale, alone, strict=True)]
        yield FakeTiming(times, NO_NOISE, seed, None, self, 0)


def make(data_file: Path, folder: Path, *backends: FakeBackend) -> Pipeline:
    run = Run.open(folder, "seed = 0\n", {"cpu": "fake"})
    data = load_data(f"npz:{data_file}")
    return Pipeline(tiny_net(), data, backends[0], run, effort=EFFORT, others=backends[1:])


def test_the_runtime_that_is_fastest_for_a_cut_network_leads_and_stays_so(data_file: Path, tmp_path: Path) -> None:
    own, other = Scaled("own"), Scaled("other", uncut=1.5, cut=0.5)
    pipeline = make(data_file, tmp_path / "run", own, other)
    rows = choose_runtime(pipeline)
    assert [row["runtime"] for row in rows] == ["other", "own"]
    assert rows[0]["cut"] < rows[1]["cut"]
    assert rows[0]["uncut"] > rows[1]["uncut"]
    assert pipeline.backend is other
    assert pipeline.files.folder.name == "files-other"
    assert pipeline.training.files is pipeline.files
    assert [files.folder.name for files in pipeline.others] == ["files"]
    with pipeline.run:
        pass
    again = make(data_file, tmp_path / "run", own, other)
    take_up(again)
    assert again.files.folder == pipeline.files.folder
    with again.run:
        pass
    alone = make(data_file, tmp_path / "run", own)
    with pytest.raises(InputError, match="was searched in other, which is not installed here"):
        take_up(alone)


def test_what_is_searched_runs_in_the_leading_runtime_and_is_raced_in_all(data_file: Path, tmp_path: Path) -> None:
    pipeline = make(data_file, tmp_path / "run", Scaled("own"), Scaled("other", cut=0.5))
    choose_runtime(pipeline)
    config = SearchConfig("knapsack", f1_evaluations=2, finalists=1, options=3, depth=False)
    table = LatencyTable(pipeline.backend, None)
    search = finalists.Search(pipeline, pipeline.run, table, Limits(speedup=3.0, max_drop=99.0), config)
    (found,) = search.finalists()
    ours = delivery.Contender("ours", pipeline.files.file_of(found.plan, "F3"), found.plan)
    assert ours.path.parent.name == "files-other"
    shipped = delivery.race(pipeline, ours)
    assert shipped.shipped is ours
    assert {"fp32", "ours", "fp32, own", "ours, own"} <= shipped.timings.keys()


def test_a_runtime_that_refuses_the_cut_network_does_not_lead(data_file: Path, tmp_path: Path) -> None:
    pipeline = make(data_file, tmp_path / "run", Scaled("own"), Scaled("other", cut=0.1, refuse="-F2"))
    assert [row["runtime"] for row in choose_runtime(pipeline)] == ["own"]
    assert pipeline.backend.name == "own"


def test_a_device_with_one_runtime_is_not_asked(data_file: Path, tmp_path: Path) -> None:
    pipeline = make(data_file, tmp_path / "run", Scaled("own"))
    assert choose_runtime(pipeline) == []
    assert not pipeline.run.facts
