"""In: accuracy and time of the files of two methods. Out: how much faster one is where both are as accurate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
"""Of the test images, for intervals."""


@dataclass(frozen=True)
class Frontier:
    """The files of a method that none of its own beats: ascending accuracy, and the log of the time of each."""

    accuracy: NDArray[np.float64]
    log_time: NDArray[np.float64]

    @classmethod
    def of(cls, accuracy: NDArray[np.float64], log_time: NDArray[np.float64]) -> Frontier:
        """Leave out every file that another one is at least as accurate and as fast as."""
        order = np.lexsort((log_time, -accuracy))
        kept, fastest = [], np.inf
        for index in order:
            if log_time[index] < fastest:
                kept.append(index)
                fastest = log_time[index]
        return cls(accuracy[kept[::-1]], log_time[kept[::-1]])

    def at(self, accuracy: float) -> float:
        """Return the log time at an accuracy, linear between files; above the best inf, below the worst its own."""
        if accuracy > self.accuracy[-1]:
            return np.inf
        return float(np.interp(accuracy, self.accuracy, self.log_time))


def equal_accuracy(ours: Frontier, theirs: Frontier, accuracies: NDArray[np.float64]) -> dict[str, Any]:
    """Return our time over theirs at those of these accuracies that both methods' files enclose.

    Returns:
        `at` each of them and their `geometric_mean`; `at_most`, where theirs enclose one that is below all of ours: our
        fastest file does better and takes that long.
    """
    low, high = max(ours.accuracy[0], theirs.accuracy[0]), min(ours.accuracy[-1], theirs.accuracy[-1])
    shared = [a for a in np.unique(accuracies) if low <= a <= high]
    below = [a for a in np.unique(accuracies) if theirs.accuracy[0] <= a < ours.accuracy[0]]
    logs = [ours.at(a) - theirs.at(a) for a in shared]
    return {
        "at": {f"{100 * a:.2f}": float(np.exp(log)) for a, log in zip(shared, logs, strict=True)},
        "at_most": {f"{100 * a:.2f}": float(np.exp(ours.at(a) - theirs.at(a))) for a in below},
        "geometric_mean": float(np.exp(np.mean(logs))) if logs else None,
    }


def speed_at_equal_accuracy(
    right: Mapping[str, NDArray[np.bool_]], log_times: Mapping[str, float], ours: Sequence[str], theirs: Sequence[str]
) -> dict[str, Any]:
    """Return `equal_accuracy` of two methods' files, with the interval of its mean over resampled test images.

    Args:
        right: File to which test images it answers right.
        log_times: File to the logarithm of its time.
        ours, theirs: Files of each method, the uncut one first: between files it counts, but nothing is compared at its
            accuracy.
    """
    answers = np.stack([right[name] for name in (*ours, *theirs)])
    times, count = np.array([log_times[name] for name in (*ours, *theirs)]), len(ours)

    def compared(accuracy: NDArray[np.float64]) -> dict[str, Any]:
        first, second = Frontier.of(accuracy[:count], times[:count]), Frontier.of(accuracy[count:], times[count:])
        return equal_accuracy(first, second, np.delete(accuracy, [0, count]))

    rng, images = np.random.default_rng(0), answers.shape[1]
    weights = rng.multinomial(images, np.full(images, 1 / images), RESAMPLES).astype(np.float32)
    resampled = (weights @ answers.T.astype(np.float32)).astype(np.float64) / images
    means = [mean for row in resampled if (mean := compared(row)["geometric_mean"]) is not None]
    found = compared(answers.mean(axis=1))
    if means:
        found["low"], found["high"] = np.percentile(means, [2.5, 97.5]).tolist()
    return found | {"resamples_that_overlap": len(means) / RESAMPLES}
