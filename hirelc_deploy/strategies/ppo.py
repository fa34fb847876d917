"""In: drawn actions and their rewards. Out: policies moved a little towards the actions that did better (PPO, A2C)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class PpoSettings:
    """Schulman et al. 2017, for one-step episodes: no critic, the baseline comes from the batch.

    Attributes:
        learning_rate: Of Adam. Large, for a search has tens of updates, not thousands.
        epochs: Passes over each batch.
        clip: How far the probability of an action may move, as a ratio, before it stops counting.
        entropy: Weight of the entropy bonus, per decision.
        max_gradient_norm: Over all parameters together.
        leave_one_out: Baseline of a sample is the mean of the others, else the mean of all.
    """

    learning_rate: float = 0.05
    epochs: int = 8
    clip: float = 0.2
    entropy: float = 0.003
    max_gradient_norm: float = 1.0
    leave_one_out: bool = True


@dataclass(frozen=True)
class ActionBatch:
    """What one policy drew.

    Attributes:
        logits: Computes (samples, decisions, options) from the policy's present parameters; -inf for no such option.
        actions: (samples, decisions) drawn options.
        log_probs: (samples, decisions) of those options when they were drawn.
        credit: (samples, decisions) advantage of each single choice, where something can tell them apart; None for that
            of the reward, which all choices of a sample share.
    """

    logits: Callable[[], Tensor]
    actions: Tensor
    log_probs: Tensor
    credit: Tensor | None = None


A2C = PpoSettings(learning_rate=0.1, epochs=1, clip=math.inf)
"""Advantage actor-critic is the same update taken once and not clipped (Huang et al. 2022, arXiv 2205.09123)."""


def advantages(rewards: Tensor, leave_one_out: bool = True) -> Tensor:
    """Return (samples,) rewards minus their baseline, scaled to unit deviation; zeros when all rewards are equal."""
    count = len(rewards)
    if count < 2 or bool((rewards == rewards[0]).all()):
        return torch.zeros_like(rewards)
    baseline = (rewards.sum() - rewards) / (count - 1) if leave_one_out else rewards.mean()
    above = rewards - baseline
    return above / above.square().mean().sqrt()


class Ppo:
    """One optimiser over the parameters of all policies that share a reward."""

    def __init__(self, parameters: Iterable[nn.Parameter], settings: PpoSettings | None = None) -> None:
        self.settings = settings or PpoSettings()
        self._parameters = list(parameters)
        self._optimizer = torch.optim.Adam(self._parameters, lr=self.settings.learning_rate)

    def update(self, batches: Sequence[ActionBatch], rewards: Tensor) -> dict[str, float]:
        """Take one update on samples that were drawn once and rewarded once.

        Each decision is clipped by its own ratio: with fifty decisions the joint ratio would leave the clip at once.

        Args:
            batches: One per policy; sample i of each led to reward i.
            rewards: (samples,).

        Returns:
            `entropy` (nats per decision), `clipped` (share of ratios outside the clip) after the last epoch.
        """
        shared = advantages(rewards, self.settings.leave_one_out)[:, None]
        entropy_sum, clipped_sum, decisions = 0.0, 0.0, 0
        for _ in range(self.settings.epochs):
            loss = torch.zeros((), dtype=rewards.dtype)
            entropy_sum, clipped_sum, decisions = 0.0, 0.0, 0
            for batch in batches:
                advantage = shared if batch.credit is None else batch.credit
                log_probs = torch.log_softmax(batch.logits(), dim=-1)
                chosen = log_probs.gather(-1, batch.actions[..., None]).squeeze(-1)
                ratio = (chosen - batch.log_probs).exp()
                within = ratio.clamp(1 - self.settings.clip, 1 + self.settings.clip)
                gain = torch.minimum(ratio * advantage, within * advantage)
                offered = log_probs > -torch.inf
                entropy = -(log_probs.exp() * torch.where(offered, log_probs, 0.0)).sum(-1)
                loss = loss - gain.sum(1).mean() - self.settings.entropy * entropy.sum(1).mean()
                entropy_sum += float(entropy.detach().mean(0).sum())
                clipped_sum += float((ratio != within).double().mean(0).sum())
                decisions += batch.actions.shape[1]
            self._optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self._parameters, self.settings.max_gradient_norm)
            self._optimizer.step()
        return {"entropy": entropy_sum / decisions, "clipped": clipped_sum / decisions}
