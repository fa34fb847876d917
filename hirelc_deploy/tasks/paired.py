"""In: what each image brings to a metric, before and after. Out: how much of the metric is lost, with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hirelc_deploy.errors import InputError
from hirelc_deploy.tasks.contract import Resampling, Task

Z_95 = 1.959964
"""The normal quantile that 95 % of the mass lies within, on both sides."""

RESAMPLES = 400
"""Of the bootstrap. An end of the interval then moves by 0.13 standard errors from seed to seed.

The standard error of the quantile q of B draws is sqrt(q (1 - q) / B) / density; for 2.5 % of a normal distribution
sqrt(0.025 * 0.975 / 400) / 0.0584 = 0.134.
"""

SEED = 0  # of the bootstrap: the same parts give the same interval


@dataclass(frozen=True)
class PairedDrop:
    """Metric lost on the same images, in its unit (accuracy: points), with its 95 % interval; negative is a gain."""

    points: float
    low: float
    high: float


def paired_drop(task: Task, parts_before: Sequence[Any], parts_after: Sequence[Any]) -> PairedDrop:
    """Return how much of the task's metric is lost from before to after on the same n images.

    The interval depends on what the parts are:

    - Right or wrong, 1 or 0: Agresti and Min's for paired proportions (Statistics in Medicine 2005). Half an image is
      added to each of the four cells of the before-after table, then Wald's interval. It keeps its 95 % for small
      numbers of differing images too, where Wald's own does not.
    - Other numbers whose mean is the metric: mean difference +- Student's t * standard error of the n differences.
      Exact for normal differences; else its error in coverage falls as 1 / n (Hall 1992, The Bootstrap and Edgeworth
      Expansion, chapter 3). One image gives no end to the interval.
    - Anything else: the percentile interval of a paired bootstrap over images (Efron and Tibshirani 1993, chapter 13).
      Its error in coverage falls as 1 / n too (Hall), and is larger for few: of a mean of ten normal numbers it is
      1.96 * sqrt(9 / 10) standard errors wide to either side instead of 2.26, so it holds 90 % instead of 95 %.
      A resample of which the metric says nothing, such as one without any object, is left out. The interval is
      stretched to hold the drop itself, which a metric that looks at pairs of images may push out.
    """
    n = len(parts_before)
    if n == 0 or n != len(parts_after):
        raise InputError(f"{n} answers before and {len(parts_after)} after; both must come from the same images.")
    before, after = task.value(parts_before), task.value(parts_after)
    # Asked after `value`: a user's own metric shows only when it is called whether it is a mean of images.
    if not task.mean_of_images:
        return _by_bootstrap(task, parts_before, parts_after, task.metric.drop(before, after))
    first, second = (np.asarray(parts, np.float64) for parts in (parts_before, parts_after))
    unit = task.metric.drop(1.0, 0.0)  # below 0 where lower is better
    if all(np.isin(numbers, (0.0, 1.0)).all() for numbers in (first, second)):
        return _right_or_wrong(first > 0, second > 0, unit)
    return mean_drop(first - second, unit)


def _right_or_wrong(before: NDArray[np.bool_], after: NDArray[np.bool_], unit: float) -> PairedDrop:
    n = len(before)
    lost, gained = int(np.sum(before & ~after)), int(np.sum(~before & after))
    middle = (lost - gained) / (n + 2)
    half_width = Z_95 * math.sqrt(lost + gained + 1 - (lost - gained) ** 2 / (n + 2)) / (n + 2)
    low, high = sorted((unit * (middle - half_width), unit * (middle + half_width)))
    return PairedDrop(unit * (lost - gained) / n, low, high)


def mean_drop(differences: NDArray[np.float64], unit: float = 1.0) -> PairedDrop:
    """Return the mean of (n,) differences in a unit, with Student's interval; see `paired_drop`."""
    n = len(differences)
    mean = math.fsum(differences) / n
    if n == 1:
        return PairedDrop(unit * mean, -math.inf, math.inf)
    half_width = abs(unit) * student_95(n - 1) * float(differences.std(ddof=1)) / math.sqrt(n)
    return PairedDrop(unit * mean, unit * mean - half_width, unit * mean + half_width)


def resamples_of(task: Task, parts: Sequence[Any]) -> Callable[[NDArray[np.int64]], float]:
    """Return a function from (n,) indices of the parts to the metric of those parts."""
    if isinstance(task, Resampling):
        return task.resamples(parts)
    return lambda drawn: task.value([parts[i] for i in drawn.tolist()])


def _by_bootstrap(task: Task, before: Sequence[Any], after: Sequence[Any], drop: float) -> PairedDrop:
    generator = np.random.default_rng(SEED)
    value_before, value_after = resamples_of(task, before), resamples_of(task, after)
    drops = []
    for _ in range(RESAMPLES):
        drawn = generator.integers(len(before), size=len(before))
        first, second = _tried(value_before, drawn), _tried(value_after, drawn)
        if first is not None and second is not None:
            drops.append(task.metric.drop(first, second))
    if not drops:
        raise InputError(f"{task.metric.name}: {len(before)} images are too few for an interval; give more.")
    low, high = np.percentile(drops, (2.5, 97.5))
    return PairedDrop(drop, min(float(low), drop), max(float(high), drop))


def _tried(value: Callable[[NDArray[np.int64]], float], drawn: NDArray[np.int64]) -> float | None:
    try:
        return value(drawn)
    except InputError:
        return None


def student_95(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t.

    Exact for 1 and 2 degrees of freedom; beyond, the expansion 26.7.5 of Abramowitz and Stegun (1964), 0.12 % too
    small at 3 degrees and nearer above.
    """
    if freedom == 1:
        return math.tan(math.pi * 0.475)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / (4 * 0.975 * 0.025))
    z, v = Z_95, float(freedom)
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )
