"""benchmarks/equal_accuracy.py: ratios of times at equal accuracy, against numbers worked out by hand."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from equal_accuracy import Frontier, equal_accuracy, speed_at_equal_accuracy


def frontier(*points: tuple[float, float]) -> Frontier:
    accuracy, time = zip(*points, strict=True)
    return Frontier.of(np.array(accuracy), np.log(time))


def test_a_file_that_another_of_its_method_beats_is_left_out():
    found = frontier((0.94, 1.0), (0.90, 0.5), (0.92, 0.4))
    assert found.accuracy.tolist() == [0.92, 0.94]
    assert np.exp(found.log_time).tolist() == pytest.approx([0.4, 1.0])


def test_between_two_files_log_time_is_linear_in_accuracy_and_outside_nothing_is_promised():
    found = frontier((0.94, 1.0), (0.90, 0.25))
    assert math.exp(found.at(0.92)) == pytest.approx(0.5)
    assert math.exp(found.at(0.80)) == pytest.approx(0.25)
    assert found.at(0.95) == math.inf


def test_twice_as_fast_at_every_accuracy_is_a_ratio_of_one_half():
    theirs = frontier((0.94, 1.0), (0.92, 0.5), (0.90, 0.25))
    ours = frontier((0.94, 0.5), (0.92, 0.25), (0.90, 0.125))
    found = equal_accuracy(ours, theirs, np.array([0.90, 0.91, 0.94]))
    assert list(found["at"].values()) == pytest.approx([0.5] * 3)
    assert found["geometric_mean"] == pytest.approx(0.5)
    assert not found["at_most"]


def test_only_accuracies_that_both_reach_count_and_below_ours_there_is_a_bound():
    ours, theirs = frontier((0.94, 1.0), (0.92, 0.25)), frontier((0.93, 1.0), (0.90, 0.5))
    found = equal_accuracy(ours, theirs, np.array([0.94, 0.92, 0.93, 0.90]))
    assert list(found["at"]) == ["92.00", "93.00"]
    assert found["at"]["93.00"] == pytest.approx(0.5)
    assert found["at_most"] == {"90.00": pytest.approx(0.5)}


def test_methods_that_share_no_accuracy_have_no_ratio():
    ours, theirs = frontier((0.94, 1.0), (0.93, 0.5)), frontier((0.91, 0.3), (0.90, 0.2))
    found = equal_accuracy(ours, theirs, np.array([0.94, 0.93, 0.91, 0.90]))
    assert found["geometric_mean"] is None
    assert len(found["at_most"]) == 2


def test_the_interval_covers_a_ratio_that_does_not_depend_on_the_images():
    rng = np.random.default_rng(0)
    good, poor = rng.random(2000) < 0.9, rng.random(2000) < 0.8
    right = {"uncut": good, "a": poor, "c": poor}
    times = {"uncut": 0.0, "a": math.log(1 / 4), "c": math.log(1 / 2)}
    found = speed_at_equal_accuracy(right, times, ["uncut", "a"], ["uncut", "c"])
    assert found["at"] == {f"{100 * poor.mean():.2f}": pytest.approx(0.5)}
    assert (found["low"], found["high"]) == pytest.approx((0.5, 0.5))
    assert found["resamples_that_overlap"] == 1.0


def test_the_interval_is_wide_where_few_images_tell_the_files_apart():
    rng = np.random.default_rng(0)
    answers = rng.random(400)
    right = {"uncut": answers < 0.9, "a": answers < 0.85, "c": rng.random(400) < 0.85}
    times = {"uncut": 0.0, "a": math.log(1 / 4), "c": math.log(1 / 4)}
    found = speed_at_equal_accuracy(right, times, ["uncut", "a"], ["uncut", "c"])
    assert found["low"] < 0.8
    assert found["high"] > 1.25
