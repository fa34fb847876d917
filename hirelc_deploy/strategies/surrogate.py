"""In: plans that were measured. Out: the loss of plans that were not, with its uncertainty, and whether to trust it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hirelc_deploy.strategies.knapsack import Tables
from hirelc_deploy.strategies.problem import Choices

LEAST_PLANS = 4
"""Fewer measured plans than this teach no more than the tables know.

With 4 instead of 8 hirelc's 24 evaluations of a ResNet-18 at 3.6 times its integer speed ended at 0.086 nats, not at
0.093, mean of eight seeds.
"""

TRUSTED_CORRELATION = 0.5
"""Rank correlation of held-out predictions with measured losses, from which on a surrogate may teach agents."""

NOISE = 0.02
"""Deviation, in log loss, that no kernel is asked to explain."""

OFFSET, SLOPE = 4.0, 0.25
"""Variances of what all plans cost together beyond the sum, and of how that grows with the log of the sum.

The first is wide: on a ResNet-18 plans cost 3 to 12 times the sum of what their parts cost alone.
"""

Kernel = tuple[float, float, float]
"""Variances of a weight per decision and of what is smooth in all of them, and the square of the inverse length."""

KERNELS: tuple[Kernel, ...] = tuple(itertools.product((0.03, 0.3, 3.0), (0.03, 0.3, 1.0), (0.5, 2.0, 8.0)))
"""What the marginal likelihood chooses from."""


@dataclass(frozen=True)
class _Features:
    """How n plans look to the process.

    Attributes:
        shares: (n, decisions) of the summed loss.
        log_sum: (n,) its logarithm.
        height: (n,) that logarithm above its mean over the measured plans.
    """

    shares: NDArray[np.float64]
    log_sum: NDArray[np.float64]
    height: NDArray[np.float64]


@dataclass(frozen=True)
class _Fit:
    """A Gaussian process on n plans: with K their covariance, `factor` is its Cholesky factor, `weights` K^-1 y."""

    kernel: Kernel
    features: _Features
    factor: NDArray[np.float64]
    weights: NDArray[np.float64]
    likelihood: float


class Surrogate:
    """A Gaussian process on log(measured loss / summed loss of the tables); without data it says what the tables say.

    What the tables cannot see is in its kernel: all plans may cost more than the sum, the more so the larger it is; a
    decision may cost more or less beside others than alone (linear in its share of the sum); the rest is a Matern
    kernel of smoothness 3/2 (Rasmussen and Williams 2006, eq. 4.17) on the square roots of the shares. Loss is
    quadratic in what a cut changes, so these roots are the sizes of the changes, and equal distances mean equally much.
    """

    def __init__(self, tables: Tables) -> None:
        self._loss = np.where(tables.offered, np.maximum(tables.loss, 0.0), 0.0)
        self._top = np.maximum(tables.offered.sum(axis=1) - 1, 0)
        self._choices: Choices = np.empty((0, len(self._loss)), np.int64)
        self._log_loss: NDArray[np.float64] = np.empty(0)
        self._mean_log_sum = 0.0
        self._fit: _Fit | None = None
        self.correlation = 0.0
        """Spearman's rank correlation of leave-one-out predictions with the measured losses."""
        self.error = math.nan
        """Mean absolute error of these predictions, in log loss."""

    @property
    def fitted(self) -> bool:
        """Return whether enough plans were measured to know more than the tables."""
        return self._fit is not None

    @property
    def trusted(self) -> bool:
        """Return whether held-out predictions rank plans well enough to teach agents by."""
        return self._fit is not None and self.correlation >= TRUSTED_CORRELATION

    @property
    def best(self) -> float:
        """Return the least measured log loss."""
        return float(self._log_loss.min())

    def learn(self, choices: Choices, losses: NDArray[np.float64]) -> None:
        """Take in (n, decisions) plans and their (n,) measured losses, all there are, in place of what was known."""
        self._choices, self._log_loss = choices, np.log(np.maximum(losses, 1e-9))
        if len(choices) < LEAST_PLANS:
            return
        self._mean_log_sum = float(self._features(choices).log_sum.mean())
        features = self._features(choices)
        excess = self._log_loss - features.log_sum
        fits = [fit for kernel in KERNELS if (fit := _fitted(kernel, features, excess))]
        self._fit = max(fits, key=lambda fit: fit.likelihood)
        held_out = self._log_loss - self._left_out(self._fit)
        self.correlation = rank_correlation(held_out, self._log_loss)
        self.error = float(np.abs(held_out - self._log_loss).mean())

    def predict(self, choices: Choices) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the (n,) expected log losses of (n, decisions) plans and their standard deviations."""
        features = self._features(choices)
        if self._fit is None:
            return features.log_sum, np.full(len(choices), 0.5)
        cross = _covariance(self._fit.kernel, features, self._fit.features)
        whitened = np.linalg.solve(self._fit.factor, cross.T)
        own = _own_covariance(self._fit.kernel, features)
        deviation = np.sqrt(np.maximum(own - (whitened**2).sum(axis=0), 1e-8))
        return features.log_sum + cross @ self._fit.weights, deviation

    def mean(self, choices: Choices) -> NDArray[np.float64]:
        """Return only the expected log losses; much cheaper than `predict`."""
        features = self._features(choices)
        if self._fit is None:
            return features.log_sum
        return features.log_sum + _covariance(self._fit.kernel, features, self._fit.features) @ self._fit.weights

    def expected_by_tables(self, choices: Choices) -> NDArray[np.float64]:
        """Return the (n,) log losses that the tables alone expect: their sums."""
        return self._features(choices).log_sum

    def believing(self, choices: Choices) -> Surrogate:
        """Return a surrogate that takes its own expectation of these plans for measured, with the same kernel."""
        other = object.__new__(Surrogate)
        other.__dict__.update(self.__dict__)
        if self._fit is not None:
            mean = self.mean(choices)
            other._choices = np.concatenate([self._choices, choices])
            other._log_loss = np.concatenate([self._log_loss, mean])
            features = self._features(other._choices)
            other._fit = _fitted(self._fit.kernel, features, other._log_loss - features.log_sum) or self._fit
        return other

    def excess_of_blocks(self, block: NDArray[np.int64], count: int, around: Choices) -> NDArray[np.float64]:
        """Return (count,) how much more, in log loss, each block is expected to cost at `around` than the tables say.

        The expectation there, less that with the block uncut, minus the same difference by the tables.
        """
        without = np.where(block[None] == np.arange(count)[:, None], self._top, around)
        everything = np.concatenate([around[None], without])
        excess = self.mean(everything) - self.expected_by_tables(everything)
        return np.asarray(excess[0] - excess[1:])

    def _features(self, choices: Choices) -> _Features:
        loss = self._loss[np.arange(choices.shape[1]), choices]
        total = np.maximum(loss.sum(axis=1), 1e-9)
        log_sum = np.log(total)
        return _Features(loss / total[:, None], log_sum, log_sum - self._mean_log_sum)

    def _left_out(self, fit: _Fit) -> NDArray[np.float64]:
        """Return (n,) by how much each plan misses what the others predict (Rasmussen and Williams 2006, eq. 5.12)."""
        inverse = np.linalg.solve(fit.factor.T, np.linalg.solve(fit.factor, np.eye(len(fit.weights))))
        return np.asarray(fit.weights / np.diag(inverse))


def _covariance(kernel: Kernel, features: _Features, others: _Features) -> NDArray[np.float64]:
    weight, smooth, sharpness = kernel
    shares, other_shares = features.shares, others.shares
    # The squares of the roots are the shares, so their sums are the squared lengths.
    squared = shares.sum(axis=1)[:, None] + other_shares.sum(axis=1) - 2 * np.sqrt(shares) @ np.sqrt(other_shares).T
    distance = np.sqrt(3.0 * sharpness * np.maximum(squared, 0.0))
    together = OFFSET + SLOPE * np.outer(features.height, others.height)
    return np.asarray(together + weight * shares @ other_shares.T + smooth * (1.0 + distance) * np.exp(-distance))


def _own_covariance(kernel: Kernel, features: _Features) -> NDArray[np.float64]:
    weight, smooth, _ = kernel
    return np.asarray(OFFSET + SLOPE * features.height**2 + weight * (features.shares**2).sum(axis=1) + smooth)


def _fitted(kernel: Kernel, features: _Features, excess: NDArray[np.float64]) -> _Fit | None:
    """Return the process with its log marginal likelihood, or None where the covariance is not positive definite."""
    covariance = _covariance(kernel, features, features) + NOISE**2 * np.eye(len(excess))
    try:
        factor = np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        return None
    weights = np.asarray(np.linalg.solve(factor.T, np.linalg.solve(factor, excess)), np.float64)
    likelihood = -0.5 * float(excess @ weights) - float(np.log(np.diag(factor)).sum())
    return _Fit(kernel, features, np.asarray(factor, np.float64), weights, likelihood)


def expected_improvement(mean: NDArray[np.float64], deviation: NDArray[np.float64], best: float) -> NDArray[np.float64]:
    """Return how far below `best` a normal value is expected to fall, 0 where it stays above (Jones et al. 1998)."""
    z = (best - mean) / deviation
    erf = np.array([math.erf(value / math.sqrt(2.0)) for value in z])
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    return np.asarray(np.maximum((best - mean) * 0.5 * (1 + erf) + deviation * density, 0.0))


def rank_correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Return Spearman's rank correlation, ties sharing their mean rank; 0 where one of the two is constant."""
    ranks = [_ranks(np.asarray(values, np.float64)) for values in (first, second)]
    centred = [rank - rank.mean() for rank in ranks]
    size = math.sqrt(float((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum() / size) if size > 0 else 0.0


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse])
