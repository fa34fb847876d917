"""In: the options of every decision and the price of time in its block. Out: a distribution over those options."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hirelc_deploy.strategies.high_level import small_network, standardised
from hirelc_deploy.strategies.knapsack import Tables
from hirelc_deploy.strategies.problem import Choices, Problem


class OptionPolicy(nn.Module):
    """The low-level agent, one policy for all decisions: -(loss + price * ms) / temperature + f(option features).

    With f = 0 its most likely options are the solver's at those prices. Besides the shared network, f has one free
    number per option, for what the features cannot tell apart.

    Args:
        features: (decisions, options, k).
        tables: Losses and times of the options.
        temperature: Nats of loss that make an option e times less likely.
        rng: For the initial weights.
        with_prior: Start at the solver (f = 0); else a random f and no losses, times or prices in the logits.
    """

    def __init__(
        self, features: Tensor, tables: Tables, temperature: float, rng: torch.Generator, with_prior: bool
    ) -> None:
        super().__init__()
        self._features = features
        self._with_prior = with_prior
        offered = torch.from_numpy(tables.offered)
        self._loss = torch.where(offered, torch.from_numpy(tables.loss), 0.0) / temperature
        self._ms = torch.from_numpy(tables.ms) / temperature
        self._absent = torch.where(offered, 0.0, -torch.inf).double()
        # The multiplier of its block is one more input of the shared network.
        self.shared = small_network(features.shape[-1] + 1, 1, rng, zero=with_prior)
        self._own = nn.Parameter(torch.zeros(offered.shape, dtype=torch.float64))

    def residual(self, octaves: Tensor) -> Tensor:
        """Return f: (samples, decisions, options) for the log2 multipliers (samples, decisions) of their blocks."""
        samples, options = len(octaves), self._features.shape[1]
        known = self._features.expand(samples, *self._features.shape)
        told = octaves[:, :, None, None].expand(-1, -1, options, 1)
        shared: Tensor = self.shared(torch.cat([known, told], dim=-1))
        return shared.squeeze(-1) + self._own

    def priced(self, residual: Tensor, prices: Tensor) -> Tensor:
        """Return logits (samples, decisions, options) at prices (samples, decisions) in nats of loss per ms."""
        if not self._with_prior:
            return residual + self._absent
        return residual - self._loss - prices[..., None] * self._ms + self._absent


def option_features(problem: Problem, tables: Tables, answer: Choices) -> NDArray[np.float64]:
    """Return (decisions, options, k): the decision's own features, then what is known of the option.

    Of the option: its rank from 0 to 1, loss and ms relative to the solver's `answer`, whether the answer takes it, and
    whether it is a width; absent options give 0.
    """
    decisions, options = tables.loss.shape
    rows = np.arange(decisions)
    own = standardised(np.stack([d.features for d in problem.decisions]).astype(np.float64))
    count = tables.offered.sum(axis=1, keepdims=True)
    rank = np.arange(options) / np.maximum(count - 1, 1)
    loss = np.where(tables.offered, tables.loss, 0.0)
    relative_loss = loss - loss[rows, answer][:, None]
    relative_ms = tables.ms - tables.ms[rows, answer][:, None]
    taken = np.arange(options) == answer[:, None]
    width = np.repeat([[d.kind == "width"] for d in problem.decisions], options, axis=1)
    columns = [rank, _bounded(relative_loss), _bounded(relative_ms), taken, width]
    known = np.concatenate([np.repeat(own[:, None], options, axis=1), np.stack(columns, axis=-1)], axis=-1)
    return np.where(tables.offered[..., None], known, 0.0)


def _bounded(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the values squeezed into (-1, 1), the median absolute one to a half."""
    nonzero = np.abs(values[values != 0])
    scale = float(np.median(nonzero)) if len(nonzero) else 1.0
    return values / (scale + np.abs(values))


def temperature_for(tables: Tables, price: float, expected_changes: float) -> float:
    """Return the temperature at which a draw differs from the priced answer in `expected_changes` decisions on average.

    Found by bisection on the logarithm; with fewer changeable decisions than asked for, the highest temperature tried.
    """
    cost = np.where(tables.offered, tables.loss + price * tables.ms, np.inf)
    above = cost - cost.min(axis=1, keepdims=True)
    finite = above[np.isfinite(above) & (above > 0)]
    if not len(finite):
        return 1.0
    low, high = float(finite.min()) / 50, float(finite.max()) * 10
    for _ in range(60):
        middle = (low * high) ** 0.5
        changes = float((1 - 1 / np.exp(-above / middle).sum(axis=1)).sum())
        low, high = (middle, high) if changes < expected_changes else (low, middle)
    return high
