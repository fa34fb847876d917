"""In: what is known about each block. Out: a price of time per block, and the budgets in ms that prices amount to."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hirelc_deploy.strategies.knapsack import Tables, smallest
from hirelc_deploy.strategies.problem import Choices, Problem

MULTIPLIERS = 2.0 ** np.linspace(-2.0, 2.0, 9)
"""A block's price as a multiple of the common price: a quarter to four, in steps of the square root of 2."""

PRIOR_DEVIATION = 0.35
"""In octaves: an untaught agent leaves 57 % of the blocks at the common price and moves most others by one step."""


class PricePolicy(nn.Module):
    """The high-level agent: a distribution over MULTIPLIERS for each block, exp(prior + h(block features, feedback)).

    Attributes:
        feedback: (blocks, 1) what measured plans have taught about each block since; 0 at the start.
        shared: The network h, and `general` those of its inputs that mean the same in every model.

    Args:
        features: (blocks, k), of which the last `blocks` only tell them apart.
        rng: For the initial weights.
        with_prior: Start at the common price (h = 0, prior at a multiplier of 1); else a random h and no prior.
    """

    def __init__(self, features: Tensor, rng: torch.Generator, with_prior: bool) -> None:
        super().__init__()
        self._features = features
        self.feedback = torch.zeros(len(features), 1, dtype=torch.float64)
        inputs = features.shape[1]
        self.general = [*range(inputs - len(features)), inputs]
        octaves = torch.from_numpy(np.log2(MULTIPLIERS))
        self._prior = -0.5 * (octaves / PRIOR_DEVIATION).square() if with_prior else torch.zeros_like(octaves)
        self.shared = small_network(features.shape[1] + 1, len(MULTIPLIERS), rng, zero=with_prior)

    def forward(self) -> Tensor:
        """Return (blocks, multipliers) logits."""
        learned: Tensor = self.shared(torch.cat([self._features, self.feedback], dim=1))
        return self._prior + learned

    def octaves(self) -> NDArray[np.float64]:
        """Return the (blocks,) expected octaves by which each block's price lies above the common one."""
        with torch.no_grad():
            expected = torch.softmax(self(), dim=1) @ torch.from_numpy(np.log2(MULTIPLIERS))
        return np.asarray(expected.numpy())


def small_network(inputs: int, outputs: int, rng: torch.Generator, zero: bool, hidden: int = 32) -> nn.Sequential:
    """Return a float64 network of one hidden layer; `zero` makes its answer 0 until it has learned."""
    first = nn.Linear(inputs, hidden, dtype=torch.float64)
    last = nn.Linear(hidden, outputs, dtype=torch.float64)
    with torch.no_grad():
        for layer in (first, last):
            layer.weight.normal_(0.0, layer.in_features**-0.5, generator=rng)
            layer.bias.zero_()
        if zero:
            last.weight.zero_()
    return nn.Sequential(first, nn.Tanh(), last)


def standardised(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (rows, k) columns with mean 0 and deviation 1; a constant column gives 0."""
    centred: NDArray[np.float64] = columns - columns.mean(axis=0)
    deviation = columns.std(axis=0)
    return centred / np.where(deviation > 1e-12 * (1 + np.abs(columns).max(axis=0)), deviation, np.inf)


def block_features(problem: Problem, tables: Tables, answer: Choices) -> NDArray[np.float64]:
    """Return (blocks, k): depth, mean decision features, and the solver's loss and share of saved time per block.

    The last columns are one per block, so that blocks that look alike can still be told apart.
    """
    rows = np.arange(len(answer))
    loss, ms = tables.loss[rows, answer], tables.ms[rows, answer]
    members = block_of(problem)[:, None] == np.arange(len(problem.blocks))
    count = np.maximum(members.sum(axis=0), 1)[:, None]
    known = np.stack([decision.features for decision in problem.decisions])
    depth = np.arange(len(problem.blocks), dtype=np.float64)[:, None]
    columns = [depth, members.T @ known / count, (members.T @ loss)[:, None], (members.T @ ms)[:, None]]
    return np.hstack([standardised(np.hstack(columns)), np.eye(len(problem.blocks))])


def block_of(problem: Problem) -> NDArray[np.int64]:
    """Return (decisions,) the index of each decision's block."""
    return np.array([problem.blocks.index(decision.block) for decision in problem.decisions], dtype=np.int64)


def block_budgets(problem: Problem, choices: Choices, budget_ms: float) -> tuple[float, NDArray[np.float64]]:
    """Return what the choices hand out: the time that nobody can avoid, and (blocks,) the ms each block may add to it.

    The parts sum to the budget. A block's part is what its choices add when they replace the smallest ones, block after
    block in execution order, stretched so that the slack is handed out too.
    """
    current, shortest_ms = smallest(problem)
    block = block_of(problem)
    times = [shortest_ms]
    for index in range(len(problem.blocks)):
        current = np.where(block == index, choices, current)
        times.append(problem.predict_ms(current))
    added = np.maximum(np.diff(times), 0.0)
    room = budget_ms - shortest_ms
    if added.sum() <= 0:
        return shortest_ms, np.full(len(problem.blocks), room / len(problem.blocks))
    return shortest_ms, added * (room / added.sum())
