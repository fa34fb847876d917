"""In: limits on memory and energy of what runs. Out: proof that they are refused, met and missed as measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hirelc_backends.onnxruntime_cpu import OnnxRuntimeCpu
from onnx import TensorProto, helper, numpy_helper
from test_pipeline import data_file, make_pipeline  # noqa: F401  (a fixture)

from hirelc_deploy.config import Limits, SearchConfig, parse_bytes
from hirelc_deploy.deliver import finalists
from hirelc_deploy.deliver.limits import appetite, check_energy, check_memory, keeps_energy, keeps_limits
from hirelc_deploy.deliver.race import uncut_files
from hirelc_deploy.errors import ConstraintError, InputError
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.jobs.search import closest_plan, unpruned_limits
from hirelc_deploy.measure import worker
from hirelc_deploy.measure.backend import DeviceState
from hirelc_deploy.measure.protocol import QUICK, compare
from hirelc_deploy.measure.table import LatencyTable
from hirelc_deploy.outcome import Measured
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.testing.backend_contract import write_model
from hirelc_deploy.testing.fake_backend import PROCESS_BYTES, WATTS, FakeBackend, Faults


@pytest.fixture
def pipeline(data_file: Path, tmp_path: Path) -> Pipeline:  # noqa: F811
    return make_pipeline(data_file, tmp_path / "run")


def searched(pipeline: Pipeline, most: int) -> list[finalists.Finalist]:
    config = SearchConfig("knapsack", f1_evaluations=2, finalists=2, options=3)
    limits = Limits(max_drop=99.0, max_memory_bytes=most)
    return finalists.Search(pipeline, pipeline.run, LatencyTable(pipeline.backend, None), limits, config).finalists()


def narrowest(pipeline: Pipeline) -> int:
    """Return the peak of the process of the network with every unit at its narrowest."""
    plan = CompressionPlan({unit.name: unit.least for unit in pipeline.graph.units}, default_precision="auto")
    pipeline.outcome(plan, "F2")
    return pipeline.files.peak_memory_bytes(pipeline.files.file_of(plan, "F2")) or 0


def test_a_limit_that_the_narrowest_network_exceeds_is_refused_before_anything_is_trained(pipeline: Pipeline) -> None:
    with pytest.raises(ConstraintError, match=r"40,000,000 bytes of memory cannot be met.*Allow more memory"):
        searched(pipeline, PROCESS_BYTES)
    assert not any(trial.fidelity == "F3" for trial in pipeline.run.trials)


def test_a_limit_is_refused_where_the_device_does_not_tell_the_memory_of_a_process(
    data_file: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    pipeline = make_pipeline(data_file, tmp_path / "run", FakeBackend(faults=Faults(silent=True)))
    with pytest.raises(InputError, match=r"--max-memory: fake does not tell the memory.*leave it out"):
        check_memory(pipeline, 10**9)
    assert pipeline.files.peak_memory_bytes(pipeline.files.reference) is None


def test_finalists_that_meet_the_limit_keep_it(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finalists, "ENTRY_LOSS", np.inf)
    most = pipeline.files.peak_memory_bytes(pipeline.files.reference)
    assert most is not None
    found = searched(pipeline, most)
    assert found
    assert all(one.keeps_limits and (one.peak_memory_bytes or most + 1) <= most for one in found)


def test_a_finalist_that_misses_the_limit_is_followed_by_a_smaller_one(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finalists, "ENTRY_LOSS", 0.0)  # the search enters with hardly anything cut
    most = narrowest(pipeline) + 1
    found = searched(pipeline, most)
    assert not found[0].keeps_limits
    assert (found[0].peak_memory_bytes or 0) > most
    assert found[1].outcome.macs < found[0].outcome.macs
    assert f"takes {found[-1].peak_memory_bytes:,} bytes of memory" in closest_plan(pipeline, found[-1:], 99.0)


def test_at_an_asked_speed_too_a_smaller_one_follows_until_the_limit_is_met(pipeline: Pipeline) -> None:
    most = narrowest(pipeline) + 20_000
    limits = Limits(max_drop=99.0, speedup=1.1, max_memory_bytes=most)
    config = SearchConfig("knapsack", f1_evaluations=2, finalists=9, options=3)
    search = finalists.Search(pipeline, pipeline.run, LatencyTable(pipeline.backend, None), limits, config)
    found = search.finalists()
    assert not found[0].keeps_limits
    peaks = [one.peak_memory_bytes or 0 for one in found]
    assert len(peaks) > 1
    assert peaks == sorted(peaks, reverse=True)


def test_an_unpruned_file_is_held_to_the_limit_too(pipeline: Pipeline) -> None:
    files = uncut_files(pipeline, pipeline.files)
    timings = compare([file.path for file in files], pipeline.backend, limits=QUICK)
    peaks = [pipeline.files.peak_memory_bytes(file.path) or 0 for file in files]
    keeps = unpruned_limits(pipeline, Limits(max_memory_bytes=max(peaks) - 1))
    assert [keeps(*pair) for pair in zip(files, timings, strict=True)] == [peak < max(peaks) for peak in peaks]


@pytest.mark.parametrize(("memory", "kept"), [(1000, True), (1001, False), (None, False)])
def test_memory_that_was_not_told_keeps_no_limit(memory: int | None, kept: bool) -> None:
    outcome = Measured("x", "F3", 0.1, 0.9, 1, 1, ratio=0.2, size_bytes=1)
    assert keeps_limits(Limits(max_memory_bytes=1000), outcome, 0.0, 0.0, 10.0, memory) is kept
    assert keeps_limits(Limits(), outcome, 0.0, 0.0, 10.0, memory)


def test_a_process_with_a_larger_file_has_a_higher_peak(tmp_path: Path) -> None:
    small, large = write_model(tmp_path / "small.onnx"), tmp_path / "large.onnx"
    weight = numpy_helper.from_array(np.ones((2048, 4096), np.float32), "w")  # 32 MiB
    x, y = (helper.make_tensor_value_info(*end) for end in (("x", TensorProto.FLOAT, [1, 2048]), ("y", 1, [1, 4096])))
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), large)
    peaks = []
    for file in (small, large):
        with OnnxRuntimeCpu().open_timing([file], 1, seed=0) as process:
            process.rounds(1)
            assert process.states is not None
            peaks.append(process.states[1].peak_memory_bytes)
    if None in peaks:
        pytest.skip("this system does not tell the memory of a process")
    assert peaks[1] > peaks[0] + 16 * 2**20


def test_sizes_are_read_as_people_write_them() -> None:
    assert [parse_bytes(text) for text in ("90000", "200M", "200MB", "1.5GiB", "3k")] == [
        90000,
        200_000_000,
        200_000_000,
        3 * 2**29,
        3000,
    ]
    for wrong in ("", "0", "M", "-1", "1e9", "12 MB", "nan", "0.1"):
        with pytest.raises(InputError, match="write it like 90000, 200M or"):
            parse_bytes(wrong)


# Energy


def state_with(folder: Path, **files: str) -> DeviceState:
    """Return the state that a device tells whose system has these files under sys/class/powercap."""
    for name, text in files.items():
        zone, _, file = name.partition("__")
        path = folder / "sys/class/powercap" / f"intel-rapl:{zone}" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return DeviceState.of(worker.state(str(folder)))


def test_the_energy_counters_of_all_packages_are_added_up_and_those_of_their_parts_are_not(tmp_path: Path) -> None:
    assert state_with(tmp_path).energy_uj is None
    two = {"0__name": "package-0", "0__energy_uj": "1000", "1__name": "package-1", "1__energy_uj": "234"}
    assert state_with(tmp_path, **two).energy_uj == 1234
    assert state_with(tmp_path, **{"0:0__name": "core", "0:0__energy_uj": "500"}).energy_uj == 1234
    (tmp_path / "sys/class/powercap/intel-rapl:1/energy_uj").unlink()  # as where only root may read it
    assert state_with(tmp_path).energy_uj is None


def test_power_is_energy_over_time_and_unknown_where_the_counter_has_started_again() -> None:
    before = DeviceState(energy_uj=1_000_000, clock_ns=10**9)
    assert before.mean_power_w(DeviceState(energy_uj=4_000_000, clock_ns=3 * 10**9)) == 1.5  # 3 J in 2 s
    assert before.mean_power_w(DeviceState(energy_uj=10, clock_ns=3 * 10**9, power_w=7.0)) is None
    assert DeviceState().mean_power_w(DeviceState(power_w=7.0)) == 7.0
    assert DeviceState().mean_power_w(DeviceState()) is None


def test_a_board_that_tells_words_for_numbers_is_not_believed() -> None:
    with pytest.raises(TypeError, match="energy_uj is a str"):
        DeviceState.of({"energy_uj": "much"})


def test_the_energy_of_an_inference_is_power_times_time(pipeline: Pipeline) -> None:
    path = pipeline.files.reference
    ms = compare([path], pipeline.backend, limits=QUICK)[0].median_ms
    assert pipeline.files.energy_mj(path) == pytest.approx(WATTS * ms, rel=1e-3)


def test_a_limit_on_energy_is_refused_where_the_device_does_not_tell_it_and_else_kept_or_not(
    pipeline: Pipeline,
    data_file: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    silent = make_pipeline(data_file, tmp_path / "silent", FakeBackend(faults=Faults(silent=True)))
    with pytest.raises(InputError, match=r"--max-energy-mj: fake does not tell what it draws.*leave it out"):
        check_energy(silent)
    check_energy(pipeline)
    files = pipeline.files
    drawn = files.energy_mj(files.reference)
    assert drawn is not None
    assert appetite(Limits(max_energy_mj=1.0), files, files.reference) == (None, drawn)
    for most, kept in ((drawn, True), (0.99 * drawn, False)):
        assert keeps_energy(Limits(max_energy_mj=most), drawn) is kept
    assert not keeps_energy(Limits(max_energy_mj=1.0), None)
