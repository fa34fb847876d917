"""In: made-up timing processes. Out: proof that several runtimes are timed as one, burst by burst."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hirelc_deploy.measure.backend import DeviceState
from hirelc_deploy.measure.protocol import TimingLimits, compare
from hirelc_deploy.measure.runtimes import SideBySide
from hirelc_deploy.measure.worker import BURST


class Runtime:
    """Each file takes as many microseconds as its name says; every call of `rounds` is written down."""

    def __init__(self, name: str, log: list[tuple[str, int]]) -> None:
        self.name, self.log, self.restarts, self.place = name, log, 1, self
        self.states = DeviceState(temperature_c=len(name)), DeviceState(temperature_c=50.0)

    @contextmanager
    def open_timing(self, files: Sequence[Path], threads: int, seed: int) -> Iterator[Any]:
        self.files = files
        yield self
        self.log.append((f"{self.name} closed", 0))

    def rounds(self, count: int) -> Any:
        self.log.append((self.name, count))
        times = [1000 * int(file.stem) for file in self.files]
        return np.broadcast_to(np.array(times, np.int64)[None, :, None], (count, len(times), 2))


FILES = [Path("40.onnx"), Path("10.onnx"), Path("20.onnx"), Path("30.onnx")]


def test_files_keep_their_columns_and_runtimes_take_turns_burst_by_burst() -> None:
    log: list[tuple[str, int]] = []
    one, two = Runtime("one", log), Runtime("two", log)
    clock = SideBySide(dict(zip(FILES, (one, two, one, two), strict=True)))  # type: ignore[arg-type]
    with clock.open_timing(FILES, 1, 0) as process:
        samples = process.rounds(BURST + 2)
        assert process.restarts == 2
        assert process.place is one
        assert process.states == (one.states[0], one.states[1])
    assert samples.shape == (BURST + 2, 4, 2)
    np.testing.assert_array_equal(samples, np.broadcast_to([[40000], [10000], [20000], [30000]], samples.shape))
    assert log == [("one", BURST), ("two", BURST), ("two", 2), ("one", 2), ("two closed", 0), ("one closed", 0)]


def test_a_single_runtime_is_timed_as_always() -> None:
    one = Runtime("one", [])
    with SideBySide(dict.fromkeys(FILES, one)).open_timing(FILES, 1, 0) as process:  # type: ignore[arg-type]
        assert process is one


def test_ratios_are_to_the_first_file_whatever_runs_it() -> None:
    one, two = Runtime("one", []), Runtime("two", [])
    clock = SideBySide(dict(zip(FILES, (one, two, one, two), strict=True)))  # type: ignore[arg-type]
    timings = compare(FILES, clock, limits=TimingLimits(processes=1, min_rounds=10, max_rounds=10))
    assert [timing.ratio for timing in timings] == pytest.approx([1.0, 0.25, 0.5, 0.75])
