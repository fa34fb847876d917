"""The timing protocol against noise whose truth is known. No test reads a clock."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

from hirelc_deploy.errors import InputError, TargetUnavailable
from hirelc_deploy.measure.backend import DeviceState
from hirelc_deploy.measure.protocol import (
    FULL,
    MARGIN,
    MOST_REPEATS,
    QUICK,
    ROUGH,
    Timing,
    TimingLimits,
    Watch,
    _bootstrap_medians,
    compare,
    judge,
    one_turn,
)
from hirelc_deploy.testing.backend_contract import write_model
from hirelc_deploy.testing.fake_backend import NO_NOISE, FakeBackend, FakeTiming, Heat, Noise

FILES = [Path("reference.onnx"), Path("candidate.onnx")]
TRIALS = 120


class KnownTruth:
    """A backend whose files take exactly so many microseconds, under so much noise."""

    name = "known truth"

    def __init__(self, microseconds: Sequence[float], noise: Noise = NO_NOISE, end_after: int | None = None) -> None:
        self.microseconds, self.noise, self.end_after = microseconds, noise, end_after
        self.open_now, self.seconds = 0, 0.0

    @contextmanager
    def open_timing(self, files: Sequence[Path], threads: int, seed: int) -> Iterator[FakeTiming]:
        self.open_now += 1
        process = FakeTiming(self.microseconds, self.noise, seed, self.end_after)
        try:
            yield SimpleNamespace(  # type: ignore[misc]
                rounds=lambda count: self._watched(process.rounds(count)), states=None, restarts=0, place=None
            )
        finally:
            self.open_now -= 1

    def _watched(self, nanoseconds: NDArray[np.int64]) -> NDArray[np.int64]:
        self.seconds += nanoseconds[..., 0].sum() / 1e9
        return nanoseconds


@cache
def verdicts(true_ratio: float, limits: TimingLimits = FULL) -> Counter[str]:
    backend = KnownTruth([1000.0, 1000.0 * true_ratio], Noise())
    return Counter(compare(FILES, backend, limits=limits, seed=trial)[1].verdict for trial in range(TRIALS))


def back_to_back_verdict(true_ratio: float, trial: int, runs: int = 200) -> str:
    """The plain benchmark: all runs of one file in one process, then all of the other in another process."""
    rng = np.random.default_rng(trial)
    reference, candidate = (
        np.log(FakeTiming([microseconds], Noise(), 2 * trial + which, None).rounds(runs)[:, 0, 1])
        for which, microseconds in enumerate((1000.0, 1000.0 * true_ratio))
    )
    draws = rng.integers(runs, size=(2, 200, runs))
    difference = np.median(candidate[draws[0]], axis=1) - np.median(reference[draws[1]], axis=1)
    low, high = np.percentile(difference, [2.5, 97.5])
    return "slower" if low > 0 else "faster" if high < 0 else "not told apart"


def test_three_percent_is_found_on_a_crowded_machine() -> None:
    assert verdicts(1.03)["slower"] >= 0.95 * TRIALS
    assert verdicts(1 / 1.03)["faster"] >= 0.95 * TRIALS


def test_the_same_file_twice_is_not_called_faster_or_slower() -> None:
    found = verdicts(1.0)
    assert found["faster"] + found["slower"] <= 0.01 * TRIALS
    assert found["same"] > 0


def test_the_plain_back_to_back_loop_calls_the_same_file_different_on_this_noise() -> None:
    found = Counter(back_to_back_verdict(1.0, trial) for trial in range(TRIALS))
    assert found["faster"] + found["slower"] >= 0.36 * TRIALS


def test_quick_limits_are_weaker_but_do_not_turn_a_difference_around() -> None:
    found = verdicts(1.05, QUICK)
    assert found["slower"] >= 0.9 * TRIALS
    assert found["faster"] == 0


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    backend = KnownTruth([1000.0, 1100.0], Noise())
    timings = [compare(FILES, backend, seed=trial)[1] for trial in range(TRIALS)]
    covered = sum(t.ratio_low <= 1.1 <= t.ratio_high for t in timings)
    assert covered >= 0.88 * TRIALS  # five processes and optional stopping cost some of the nominal 95 %


def test_the_vectorised_bootstrap_equals_the_obvious_loop() -> None:
    values = np.random.default_rng(3).standard_normal((2, 3, 7))
    rng = np.random.default_rng(11)
    processes, starts = rng.integers(3, size=(50, 3, 1)), rng.integers(7, size=(50, 3, 2))
    expected = np.empty((2, 50))
    for file in range(2):
        for draw in range(50):
            drawn = []
            for place in range(3):
                rounds = [(start + offset) % 7 for start in starts[draw, place] for offset in range(5)][:7]
                drawn += [values[file, processes[draw, place, 0], one] for one in rounds]
            expected[file, draw] = np.median(drawn)
    np.testing.assert_array_equal(_bootstrap_medians(values, 50, seed=11), expected)


def test_without_noise_the_ratio_is_the_ratio_and_the_fewest_rounds_suffice() -> None:
    reference, candidate = compare(FILES, KnownTruth([2000.0, 500.0]))
    assert candidate.ratio == pytest.approx(0.25)
    assert (candidate.ratio_low, candidate.ratio_high) == pytest.approx((0.25, 0.25))
    assert candidate.median_ms == pytest.approx(0.5)
    shortest_to_longest = candidate.min_ms, candidate.p90_ms, candidate.p99_ms
    assert (*shortest_to_longest, candidate.cpu_median_ms) == pytest.approx((0.5, 0.5, 0.5, 0.5))
    assert candidate.verdict == "faster"
    assert reference.verdict == "reference"
    assert reference.ratio == reference.ratio_low == reference.ratio_high == 1.0
    assert FULL.min_rounds <= candidate.rounds < 2 * FULL.min_rounds
    assert candidate.contended is False
    assert candidate.note == ""


def test_half_a_percent_lies_within_the_margin_and_is_called_same() -> None:
    assert compare(FILES, KnownTruth([1000.0, 1005.0]))[1].verdict == "same"


def test_an_interval_across_the_margin_is_not_told_apart() -> None:
    found = verdicts(1.01)
    assert found["not told apart"] > 0.8 * TRIALS


def test_rounds_stop_at_the_limit_when_the_noise_is_too_much() -> None:
    noisy = Noise(run=0.5)
    timing = compare(FILES, KnownTruth([1000.0, 1000.0], noisy), limits=TimingLimits(max_rounds=313))[1]
    assert 313 <= timing.rounds < 313 + 5
    assert timing.ratio_high - timing.ratio_low > 0.015
    assert timing.verdict == "not told apart"


def test_few_rounds_do_not_call_a_file_too_slow_that_is_not() -> None:
    backend = KnownTruth([1000.0, 1000.0], Noise())
    found = [compare(FILES, backend, limits=ROUGH, seed=trial)[1] for trial in range(TRIALS)]
    assert {timing.rounds for timing in found} == {20}
    assert sum(timing.ratio_low > np.exp(MARGIN) for timing in found) <= 0.05 * TRIALS
    slower = KnownTruth([1000.0, 1100.0], Noise())
    found = [compare(FILES, slower, limits=ROUGH, seed=trial)[1] for trial in range(TRIALS)]
    assert sum(timing.ratio_low > np.exp(MARGIN) for timing in found) >= 0.8 * TRIALS


def test_the_time_limit_ends_a_slow_comparison_and_the_note_says_so() -> None:
    backend = KnownTruth([1e6, 1e6])  # a second each, so that 100 rounds would take 200 s
    timing = compare(FILES, backend, limits=TimingLimits(seconds=90.0), now=lambda: backend.seconds)[1]
    assert 80 < backend.seconds <= 90
    assert timing.rounds == backend.seconds / 2
    assert f"Stopped by the time limit after {timing.rounds} of at least 100 rounds." in timing.note


def test_every_process_is_closed_also_when_one_ends_early() -> None:
    well, ending = KnownTruth([1000.0, 1000.0]), KnownTruth([1000.0, 1000.0], end_after=10)
    compare(FILES, well)
    with pytest.raises(TargetUnavailable):
        compare(FILES, ending)
    assert well.open_now == ending.open_now == 0


def test_contention_is_seen_and_said() -> None:
    crowded = compare(FILES, KnownTruth([1000.0, 900.0], Noise()))[1]
    assert crowded.contended
    assert "Other programs took the core" in crowded.note
    alone = compare(FILES, KnownTruth([1000.0, 900.0], Noise(burst_share=0.0, drift=0.0)))[1]
    assert alone.contended is False
    assert "Other programs" not in alone.note


def test_one_thread_is_judged_by_cpu_time_and_more_by_wall_time() -> None:
    samples = np.empty((2, 20, 2, 2), np.int64)
    samples[:, :, 0] = (2_000_000, 1_000_000)
    samples[:, :, 1] = (3_000_000, 800_000)
    by_cpu, by_wall = judge(FILES, samples, "cpu")[1], judge(FILES, samples, "wall")[1]
    assert (by_cpu.ratio, by_cpu.verdict, by_cpu.clock) == (pytest.approx(0.8), "faster", "cpu")
    assert (by_wall.ratio, by_wall.verdict, by_wall.clock) == (pytest.approx(1.5), "slower", "wall")
    assert by_cpu.wall_ratio == by_wall.wall_ratio == pytest.approx(1.5)
    assert by_wall.contended is None
    assert compare(FILES, KnownTruth([1000.0, 900.0]), threads=2)[1].clock == "wall"


def steady(ratios: NDArray[np.float64], level: NDArray[np.float64]) -> NDArray[np.int64]:
    """(5 processes, rounds, 2 files, 2) samples of the given ratio and reference time per round."""
    rng = np.random.default_rng(0)
    scatter = 1 + 0.005 * rng.standard_normal((5, len(ratios), 2))
    times = 1e6 * level[:, None] * np.stack([np.ones_like(ratios), ratios], axis=1) * scatter
    return np.repeat(times[..., None], 2, axis=3).astype(np.int64)


def test_a_ratio_that_changes_half_way_is_reported_as_drift() -> None:
    level, flat = np.ones(80), np.full(80, 0.9)
    stepped = np.where(np.arange(80) < 40, 0.90, 0.95)
    assert "ratio to the reference changed by +5" in judge(FILES, steady(stepped, level), "cpu")[1].note
    assert judge(FILES, steady(flat, level), "cpu")[1].note == ""


def test_a_device_that_slows_down_is_reported_though_the_ratio_stays() -> None:
    slowing = np.where(np.arange(80) < 40, 1.0, 1.2)
    timing = judge(FILES, steady(np.full(80, 0.9), slowing), "cpu")[1]
    assert "its time changed by +20" in timing.note
    assert "ratio to the reference" not in timing.note
    assert timing.ratio == pytest.approx(0.9, abs=0.005)


def test_raw_samples_are_kept_whole(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    timings = compare(FILES, KnownTruth([1000.0, 900.0], Noise()), limits=QUICK, samples_path=path)
    with np.load(path) as kept:
        assert kept["files"].tolist() == [str(file) for file in FILES]
        nanoseconds = kept["nanoseconds"]
    assert nanoseconds.shape[0] * nanoseconds.shape[1] == timings[1].rounds
    for index, timing in enumerate(timings):
        np.testing.assert_array_equal(nanoseconds[:, :, index], timing.samples)
    again = judge(FILES, nanoseconds, "cpu")
    assert again[1].ratio == timings[1].ratio


def test_equal_seeds_give_equal_results_and_the_dictionary_is_json() -> None:
    import json

    first, second = (compare(FILES, KnownTruth([1000.0, 990.0], Noise()), seed=4) for _ in range(2))
    assert [t.to_dict() for t in first] == [t.to_dict() for t in second]
    assert json.loads(json.dumps(first[1].to_dict()))["file"] == "candidate.onnx"


def test_one_file_alone_has_a_time_and_no_verdict() -> None:
    (timing,) = compare(FILES[:1], KnownTruth([1500.0], Noise(burst_share=0.0)))
    assert timing.median_ms == pytest.approx(1.5, rel=0.1)
    assert (timing.verdict, timing.ratio) == ("reference", 1.0)


def test_progress_counts_up_to_the_rounds_done() -> None:
    seen: list[tuple[int, int]] = []
    timing = compare(
        FILES, KnownTruth([1000.0, 900.0], Noise()), progress=lambda done, most: seen.append((done, most))
    )[1]
    assert seen[-1] == (timing.rounds, FULL.max_rounds)
    assert seen == sorted(seen)


def test_a_clock_that_saw_nothing_does_not_break_the_statistics() -> None:
    samples = np.zeros((2, 20, 2, 2), np.int64)
    assert np.isfinite(judge(FILES, samples, "cpu")[1].ratio)


@pytest.mark.parametrize(
    "bad", [{"processes": 0}, {"min_rounds": 0}, {"max_rounds": 50}, {"half_width": 0.0}, {"seconds": 0}]
)
def test_impossible_limits_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(InputError, match="timing limits"):
        TimingLimits(**bad)  # type: ignore[arg-type]


def test_no_file_is_bad_input() -> None:
    with pytest.raises(InputError, match="no file"):
        compare([], KnownTruth([]))


def heated(heat: Heat, tmp_path: Path) -> tuple[FakeBackend, Timing]:
    backend = FakeBackend(heat=heat)
    files = [write_model(tmp_path / f"{name}.onnx") for name in ("a", "b")]
    limits = TimingLimits(processes=2, min_rounds=100, max_rounds=200)
    return backend, compare(files, backend, limits=limits, pause=backend.pause)[1]


def test_a_turn_in_which_the_device_throttled_is_taken_again_after_it_has_cooled(tmp_path: Path) -> None:
    cool = heated(Heat(), tmp_path)[1]
    backend, timing = heated(Heat(per_round_c=0.5, limit_c=80.0), tmp_path)
    assert timing.device is not None
    assert timing.device["repeated_turns"] >= 1
    assert timing.device["slowed_down"] == ["simulated heat"]
    assert "taken again after it had recovered: " in timing.note
    # Not one slow run is left in the samples.
    assert timing.samples.max() == cool.samples.max()
    assert backend.celsius < 80.0


def test_a_device_that_never_cools_is_timed_and_the_numbers_say_so(tmp_path: Path) -> None:
    _, timing = heated(Heat(start_c=90.0), tmp_path)
    assert timing.device is not None
    assert timing.device["repeated_turns"] == MOST_REPEATS
    assert "slowed itself down while it was timed (simulated heat)" in timing.note
    assert timing.rounds >= 100


def test_a_falling_clock_counts_as_slowing_down_and_a_rising_one_does_not() -> None:
    slow, fast = DeviceState(frequency_khz=1_400_000), DeviceState(frequency_khz=1_500_000)
    assert Watch().slowed_down([(fast, slow), None])
    assert not Watch().slowed_down([(slow, fast), (fast, fast), None])
    assert Watch().to_dict() is None


def test_boards_work_side_by_side_and_one_board_does_one_thing_at_a_time() -> None:
    here, there, active, seen = object(), object(), [], set()

    def process(place: object) -> SimpleNamespace:
        def rounds(count: int) -> NDArray[np.int64]:
            assert place not in active
            active.append(place)
            meet.wait(10.0) if len(seen) < 2 else None
            seen.add(place)
            active.remove(place)
            return np.full((count, 1, 2), id(place))

        return SimpleNamespace(rounds=rounds, place=place)

    meet = threading.Barrier(2)  # passed only if both boards are at work at the same time
    found = one_turn([process(here), process(there), process(here)], 3)  # type: ignore[list-item]
    assert [one[0, 0, 0] for one in found] == [id(here), id(there), id(here)]
