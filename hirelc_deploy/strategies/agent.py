"""In: a problem and a time budget. Out: one member of the ensemble: block prices and options at them, learning."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hirelc_deploy.strategies.high_level import MULTIPLIERS, PricePolicy, block_features, block_of
from hirelc_deploy.strategies.knapsack import Tables, project, solve_price, solve_prices
from hirelc_deploy.strategies.low_level import OptionPolicy, option_features, temperature_for
from hirelc_deploy.strategies.ppo import ActionBatch, Ppo, PpoSettings
from hirelc_deploy.strategies.problem import Choices, Problem
from hirelc_deploy.strategies.surrogate import Surrogate


@dataclass(frozen=True)
class Scene:
    """What all members look at.

    Attributes:
        answer: The solver's choices, and `tables` the tables around them.
    """

    problem: Problem
    budget_ms: float
    answer: Choices
    tables: Tables


@dataclass(frozen=True)
class Member:
    """In what a member differs from the others, besides its seed.

    Attributes:
        settings: PPO, or A2C.
        expected_changes: Decisions in which a draw differs from the solver's answer before anything is learned.
        size_weight: What it cares about parameters, against loss.
    """

    settings: PpoSettings
    expected_changes: float = 4.0
    size_weight: float = 0.0


@dataclass(frozen=True)
class Draws:
    """n joint actions of both levels, with the probabilities they were drawn with.

    Attributes:
        multipliers: (n, blocks) index into MULTIPLIERS.
        options: (n, decisions) drawn; `choices` is what the projection made of them.
        prices: (n,) common price of time, nats of loss per ms.
        high_log_probs: (n, blocks) of the drawn multipliers.
        low_log_probs: (n, decisions, options) of all options.
    """

    multipliers: Choices
    options: Choices
    choices: Choices
    prices: NDArray[np.float64]
    high_log_probs: NDArray[np.float64]
    low_log_probs: NDArray[np.float64]

    def take(self, rows: NDArray[np.int64]) -> Draws:
        """Return some of the draws."""
        return Draws(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


class Agent:
    """HLA and LLA over one problem.

    A draw fixes the noise of every option first (Gumbel), then bisects the common price until what is drawn fits the
    budget: feasible by construction, and the projection has only the last slack to give back.

    Args:
        scene: The problem and the solver's view of it.
        member: How this one learns and what it wants.
        seed: Of its weights and draws.
        warm_start: Begin at the solver's answer; else at random networks that know no losses and project blindly.
        high_level: Let each block have its own price; else all share one.
    """

    def __init__(self, scene: Scene, member: Member, seed: int, *, warm_start: bool, high_level: bool) -> None:
        self.member = member
        self._scene, self._warm_start, self._high_level = scene, warm_start, high_level
        self._rng = np.random.default_rng(seed)
        problem, tables = scene.problem, scene.tables
        self._block = block_of(problem)
        _, price = solve_price(tables.cheapest, problem, scene.budget_ms, tables.typical_price)
        self._start_price = price or tables.typical_price
        generator = torch.Generator().manual_seed(seed)
        features = torch.from_numpy(block_features(problem, tables, scene.answer))
        self.high = PricePolicy(features, generator, warm_start)
        temperature = temperature_for(tables, self._start_price, member.expected_changes)
        features = torch.from_numpy(option_features(problem, tables, scene.answer))
        self.low = OptionPolicy(features, tables, temperature, generator, warm_start)
        parameters = [*self.high.parameters(), *self.low.parameters()] if high_level else [*self.low.parameters()]
        self._ppo = Ppo(parameters, member.settings)

    def mode(self) -> Choices:
        """Return (decisions,) what this member now finds best."""
        only: Choices = self.draw(1, noise=0.0).choices[0]
        return only

    def draw(self, count: int, noise: float = 1.0, fill: bool = True) -> Draws:
        """Return joint actions.

        Args:
            count: How many.
            noise: Scales the Gumbel noise: 1 draws from the policies, 0 takes their mode.
            fill: Project what was drawn, which gives back the last slack; a warm start fits without.
        """
        scene, rows = self._scene, np.arange(count)[:, None]
        with torch.no_grad():
            high = np.broadcast_to(torch.log_softmax(self.high(), dim=-1).numpy(), (count, *self.high().shape))
            multipliers = (high + noise * self._rng.gumbel(size=high.shape)).argmax(axis=2)
            if not self._high_level:
                multipliers = np.full_like(multipliers, len(MULTIPLIERS) // 2)
            factor = MULTIPLIERS[multipliers][:, self._block]
            residual = self.low.residual(torch.from_numpy(np.log2(factor)))
            gumbel = noise * self._rng.gumbel(size=tuple(residual.shape))

            def logits(prices: NDArray[np.float64]) -> Tensor:
                return self.low.priced(residual, torch.from_numpy(prices[:, None] * factor))

            def pick(prices: NDArray[np.float64]) -> Choices:
                return np.asarray((logits(prices).numpy() + gumbel).argmax(axis=2), dtype=np.int64)

            prices = np.zeros(count)
            if self._warm_start:
                start = np.full(count, self._start_price)
                options, prices = solve_prices(pick, scene.problem, scene.budget_ms, start)
                choices = [project(scene.problem, one, scene.budget_ms) for one in options] if fill else options
            else:
                options = pick(prices)
                choices = [project(scene.problem, one, scene.budget_ms, self._rng) for one in options]
            low = torch.log_softmax(logits(prices), dim=-1).numpy()
        blocks = np.arange(multipliers.shape[1])
        return Draws(multipliers, options, np.asarray(choices), prices, high[rows, blocks, multipliers], low)

    def imagine(self, surrogate: Surrogate, count: int) -> dict[str, float]:
        """Take one step on draws that are not evaluated but predicted, each choice credited by itself."""
        draws = self.draw(count, fill=False)
        credit = counterfactual_credit(surrogate, self._scene.tables, draws)
        return self.update(draws, -surrogate.mean(draws.choices), credit)

    def update(
        self, draws: Draws, rewards: NDArray[np.float64], credit: NDArray[np.float64] | None = None
    ) -> dict[str, float]:
        """Take one policy-gradient step on draws and their (n,) rewards; returns what `Ppo.update` does.

        Args:
            credit: (n, decisions) advantage of each choice of the LLA, where known.
        """
        count, decisions = draws.options.shape
        factor = torch.from_numpy(MULTIPLIERS[draws.multipliers][:, self._block])
        prices = torch.from_numpy(draws.prices)[:, None] * factor

        def high_logits() -> Tensor:
            one: Tensor = self.high()
            return one.expand(count, -1, -1)

        chosen = draws.low_log_probs[np.arange(count)[:, None], np.arange(decisions), draws.options]
        batches = [
            ActionBatch(
                lambda: self.low.priced(self.low.residual(factor.log2()), prices),
                torch.from_numpy(draws.options),
                torch.from_numpy(chosen),
                None if credit is None else torch.from_numpy(credit),
            )
        ]
        if self._high_level:
            high = ActionBatch(high_logits, torch.from_numpy(draws.multipliers), torch.from_numpy(draws.high_log_probs))
            batches.append(high)
        return self._ppo.update(batches, torch.from_numpy(rewards))


def counterfactual_credit(surrogate: Surrogate, tables: Tables, draws: Draws) -> NDArray[np.float64]:
    """Return (n, decisions) how much better each drawn option is than what the policy draws there on average.

    Worth is minus the predicted log loss with only this choice changed, minus the price of its time, which in log loss
    per ms is the drawn price over the summed loss. Scaled to unit deviation over the batch.
    """
    (count, decisions), options = draws.options.shape, tables.loss.shape[1]
    changed = np.broadcast_to(draws.options[:, None, None], (count, decisions, options, decisions)).copy()
    every = np.arange(decisions)
    offered = tables.offered
    changed[:, every, :, every] = np.where(offered, np.arange(options), draws.options[:, :, None]).transpose(1, 0, 2)
    log_loss = surrogate.mean(changed.reshape(-1, decisions)).reshape(count, decisions, options)
    table_loss = np.maximum(tables.loss[every, draws.options].sum(axis=1), 1e-9)
    cost = log_loss + (draws.prices / table_loss)[:, None, None] * tables.ms
    expected = (np.exp(draws.low_log_probs) * cost).sum(axis=2)
    above = expected - np.take_along_axis(cost, draws.options[:, :, None], axis=2)[:, :, 0]
    size = np.sqrt((above**2).mean())
    return np.asarray(above / size if size > 0 else above)
