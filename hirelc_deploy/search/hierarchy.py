"""In: a problem and a time budget. Out: the strategy `hirelc`: prices per block, options at them, learned by PPO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hirelc_deploy.outcome import Outcome
from hirelc_deploy.search.high_level import MULTIPLIERS, PricePolicy, block_budgets, block_features, block_of
from hirelc_deploy.search.knapsack import check_feasible, project, solve, solve_price, tables_around
from hirelc_deploy.search.low_level import OptionPolicy, option_features, temperature_for
from hirelc_deploy.search.ppo import ActionBatch, Ppo, PpoSettings
from hirelc_deploy.search.problem import Choices, Problem
from hirelc_deploy.search.reward import Goal, Reward, reward_of

EXPECTED_CHANGES = 4.0
"""Decisions in which an untaught draw differs from the solver's answer; of 2, 4 and 6 the best on made-up problems."""

DRAWS_PER_PROPOSAL = 4
"""Draws of known plans teach again for free; past this many per new plan asked for, draws are made wilder instead."""


@dataclass(frozen=True)
class Draw:
    """One joint action of both levels, with the probabilities it was drawn with.

    Attributes:
        multipliers: (blocks,) index into MULTIPLIERS.
        options: (decisions,) drawn; `choices` is what the projection made of them.
        price: Common price of time, nats of loss per ms.
        high_log_probs, low_log_probs: (blocks,), (decisions,).
    """

    multipliers: Choices
    options: Choices
    choices: Choices
    price: float
    high_log_probs: NDArray[np.float64]
    low_log_probs: NDArray[np.float64]


class Hierarchy:
    """HLA and LLA over one problem.

    A draw fixes the noise of every option first (Gumbel), then bisects the common price until what is drawn fits the
    budget: feasible by construction, and the projection has only the last slack to give back.

    Args:
        problem: The tables, and the prediction that decides what fits.
        budget_ms: Limit on the predicted time.
        seed: Equal seeds and equal outcomes give equal proposals.
        name: `hirelc`, or `untrained` for the null.
        with_prior: Start at the solver's answer. The null starts at random networks and projects blindly.
        learns: Update from outcomes.
        settings: Of PPO.

    Raises:
        ConstraintError: Even the smallest options miss the budget.
    """

    def __init__(
        self,
        problem: Problem,
        budget_ms: float,
        seed: int,
        *,
        name: str = "hirelc",
        with_prior: bool = True,
        learns: bool = True,
        settings: PpoSettings | None = None,
    ) -> None:
        check_feasible(problem, budget_ms)
        self.name = name
        self.rewards: list[Reward] = []
        self.updates: list[dict[str, float]] = []
        self._problem, self._budget_ms = problem, budget_ms
        self._with_prior, self._learns = with_prior, learns
        self._rng = np.random.default_rng(seed)
        self._answer = solve(problem, budget_ms)
        self._tables = tables_around(problem, self._answer)
        self._block = block_of(problem)
        self._goal = Goal(budget_ms, max(self._tables.additive_loss(self._answer), 1e-6))
        _, price = solve_price(self._tables.cheapest, problem.predict_ms, budget_ms, self._tables.typical_price)
        self._start_price = price or self._tables.typical_price
        generator = torch.Generator().manual_seed(seed)
        features = torch.from_numpy(block_features(problem, self._tables, self._answer))
        self._high = PricePolicy(features, generator, with_prior)
        temperature = temperature_for(self._tables, self._start_price, EXPECTED_CHANGES)
        features = torch.from_numpy(option_features(problem, self._tables, self._answer))
        self._low = OptionPolicy(features, self._tables, temperature, generator, with_prior)
        self._ppo = Ppo([*self._high.parameters(), *self._low.parameters()], settings)
        self._known: dict[bytes, float] = {}
        self._pending: list[Draw] = []

    def budgets(self, choices: Choices) -> tuple[float, NDArray[np.float64]]:
        """Return the unavoidable ms and the (blocks,) ms handed out on top; together they are the budget."""
        return block_budgets(self._problem, choices, self._budget_ms)

    def propose(self, count: int) -> list[Choices]:
        """Return up to `count` feasible choices that were not proposed before.

        The first ever is the solver's answer, the first of each later batch what the agents now find most likely.
        """
        fresh: dict[bytes, Choices] = {}

        def offer(choices: Choices) -> None:
            if choices.tobytes() not in self._known:
                fresh.setdefault(choices.tobytes(), choices)

        if self._with_prior:
            offer(self._answer if not self._known else self._draw(noise=0.0).choices)
        for attempt in range(2 * DRAWS_PER_PROPOSAL * count):
            if len(fresh) >= count:
                break
            wilder = max(0, attempt - DRAWS_PER_PROPOSAL * count)
            draw = self._draw(noise=1.0 + wilder / count)
            if not wilder:
                self._pending.append(draw)
            offer(draw.choices)
        return list(fresh.values())[:count]

    def observe(self, tried: Sequence[tuple[Choices, Outcome]]) -> None:
        """Take one PPO step on the draws of the last proposal, known plans among them included."""
        for choices, outcome in tried:
            if outcome.fidelity == "F1":
                reward = reward_of(outcome, self._goal)
                self.rewards.append(reward)
                self._known[choices.tobytes()] = reward.total
        batch = [draw for draw in self._pending if draw.choices.tobytes() in self._known]
        self._pending = []
        if self._learns and len(batch) > 1:
            self.updates.append(self._update(batch))

    def _draw(self, noise: float) -> Draw:
        """Return a joint action; `noise` scales the Gumbel noise: 1 draws from the policies, 0 takes their mode."""
        with torch.no_grad():
            high = torch.log_softmax(self._high(), dim=-1).numpy()
            multipliers = (high + noise * self._rng.gumbel(size=high.shape)).argmax(axis=1)
            factor = torch.from_numpy(MULTIPLIERS[multipliers][self._block])[None]
            residual = self._low.residual(factor.log2())
            gumbel = noise * self._rng.gumbel(size=tuple(residual.shape[1:]))

            def logits(price: float) -> NDArray[np.float64]:
                priced: NDArray[np.float64] = self._low.priced(residual, price * factor)[0].numpy()
                return priced

            def pick(price: float) -> Choices:
                return np.asarray((logits(price) + gumbel).argmax(axis=1), dtype=np.int64)

            if self._with_prior:
                options, price = solve_price(pick, self._problem.predict_ms, self._budget_ms, self._start_price)
                choices = project(self._problem, options, self._budget_ms)
            else:
                options, price = pick(0.0), 0.0
                choices = project(self._problem, options, self._budget_ms, self._rng)
            low = torch.log_softmax(torch.from_numpy(logits(price)), dim=-1).numpy()
        return Draw(
            multipliers.astype(np.int64),
            options,
            choices,
            price,
            high[np.arange(len(high)), multipliers],
            low[np.arange(len(low)), options],
        )

    def _update(self, batch: Sequence[Draw]) -> dict[str, float]:
        multipliers = np.stack([draw.multipliers for draw in batch])
        factors = torch.from_numpy(MULTIPLIERS[multipliers][:, self._block])
        prices = torch.tensor([draw.price for draw in batch], dtype=torch.float64)[:, None] * factors

        def high_logits() -> Tensor:
            one: Tensor = self._high()
            return one.expand(len(batch), -1, -1)

        def low_logits() -> Tensor:
            return self._low.priced(self._low.residual(factors.log2()), prices)

        high = ActionBatch(
            high_logits, torch.from_numpy(multipliers), torch.from_numpy(np.stack([d.high_log_probs for d in batch]))
        )
        low = ActionBatch(
            low_logits,
            torch.from_numpy(np.stack([draw.options for draw in batch])),
            torch.from_numpy(np.stack([draw.low_log_probs for draw in batch])),
        )
        rewards = torch.tensor([self._known[draw.choices.tobytes()] for draw in batch], dtype=torch.float64)
        return self._ppo.update([high, low], rewards)
