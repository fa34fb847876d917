"""PPO and its reward: it solves what is known, and the reward pays for nothing beyond the target."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from hirelc_deploy.outcome import Failed, Measured
from hirelc_deploy.strategies.ppo import A2C, ActionBatch, Ppo, PpoSettings, advantages
from hirelc_deploy.strategies.reward import FAILED_REWARD, Goal, reward_of


def measured(loss: float, ms: float | None = None) -> Measured:
    return Measured("p", "F1", loss, 0.9, 10, 20, predicted_ms=ms)


@dataclass
class Learned:
    mode: float
    found: float
    optimum: float
    random: float
    entropies: list[float]


def learn(
    seed: int,
    decisions: int,
    over_weight: float,
    updates: int,
    draws: int = 64,
    settings: PpoSettings | None = None,
) -> Learned:
    """Return what PPO and random draws reach on a knapsack of four options per decision, and its optimum."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    loss, weight = rng.uniform(0, 1, (decisions, 4)), rng.uniform(0, 1, (decisions, 4))
    limit, rows = 0.8 * weight.mean(axis=1).sum(), np.arange(decisions)

    def reward(actions: np.ndarray) -> np.ndarray:
        over = np.maximum(0.0, weight[rows, actions].sum(-1) - limit)
        return -loss[rows, actions].sum(-1) - over_weight * over

    everything = np.array(list(itertools.product(range(4), repeat=decisions)))
    logits = torch.zeros(decisions, 4, dtype=torch.float64, requires_grad=True)
    ppo = Ppo([logits], settings or PpoSettings(epochs=4, entropy=0.1))  # type: ignore[list-item]
    entropies, found = [], -math.inf
    for _ in range(updates):
        log_probs = torch.log_softmax(logits.detach(), dim=-1)
        actions = torch.multinomial(log_probs.exp(), draws, replacement=True, generator=generator).T
        chosen = log_probs.expand(draws, -1, -1).gather(-1, actions[..., None]).squeeze(-1)
        rewards = reward(actions.numpy())
        found = max(found, float(rewards.max()))
        batch = ActionBatch(lambda: logits.expand(draws, -1, -1), actions, chosen)
        entropies.append(ppo.update([batch], torch.from_numpy(rewards))["entropy"])
    mode = float(reward(logits.detach().argmax(dim=-1).numpy()))
    random = float(reward(rng.integers(0, 4, (updates * draws, decisions))).max())
    return Learned(mode, found, float(reward(everything).max()), random, entropies)


def test_it_finds_the_optimum_of_a_knapsack_for_19_of_20_seeds_where_random_draws_rarely_do() -> None:
    runs = [learn(seed, decisions=8, over_weight=3.0, updates=70) for seed in range(20)]
    assert sum(run.found == pytest.approx(run.optimum) for run in runs) >= 19
    assert sum(run.random == pytest.approx(run.optimum) for run in runs) <= 8
    assert all(run.entropies[-1] < 0.7 * run.entropies[0] for run in runs)


def test_a2c_is_one_unclipped_step_and_finds_the_optimum_too() -> None:
    runs = [
        learn(seed, decisions=8, over_weight=3.0, updates=70, settings=replace(A2C, entropy=0.1)) for seed in range(4)
    ]
    assert all(run.found == pytest.approx(run.optimum) for run in runs)


def test_credit_of_its_own_moves_one_decision_and_leaves_the_other() -> None:
    logits = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    learner = Ppo([logits], replace(A2C, entropy=0.0))  # type: ignore[list-item]
    old = torch.full((2, 2), 0.5, dtype=torch.float64).log()
    credit = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    batch = ActionBatch(lambda: logits.expand(2, -1, -1), torch.tensor([[0, 0], [1, 1]]), old, credit)
    learner.update([batch], torch.tensor([5.0, -5.0], dtype=torch.float64))
    assert logits[0, 0] > 0 > logits[0, 1]
    assert logits[1].tolist() == [0.0, 0.0]


def test_its_most_likely_actions_become_the_best_where_decisions_are_independent() -> None:
    for seed in range(5):
        run = learn(seed, decisions=5, over_weight=0.0, updates=80)
        assert run.mode == pytest.approx(run.optimum)


def test_advantages_leave_the_sample_itself_out_and_have_unit_size() -> None:
    rewards = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    # Against the mean of the other two: 1 - 4, 2 - 3.5, 6 - 1.5; root mean square sqrt((9 + 2.25 + 20.25) / 3).
    expected = torch.tensor([-3.0, -1.5, 4.5], dtype=torch.float64) / math.sqrt(31.5 / 3)
    torch.testing.assert_close(advantages(rewards), expected)
    torch.testing.assert_close(advantages(1000 * rewards + 7), expected)
    torch.testing.assert_close(advantages(rewards, leave_one_out=False).square().mean(), torch.tensor(1.0).double())


@pytest.mark.parametrize("rewards", [[2.0], [0.1, 0.1, 0.1]])
def test_equal_rewards_teach_nothing(rewards: list[float]) -> None:
    assert advantages(torch.tensor(rewards, dtype=torch.float64)).abs().sum() == 0


def test_a_ratio_beyond_the_clip_no_longer_pulls() -> None:
    logits = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    ppo = Ppo([logits], PpoSettings(epochs=1, entropy=0.0, clip=0.2))  # type: ignore[list-item]
    actions = torch.tensor([[0], [1]])
    # Drawn at probabilities 0.3 and 0.7, now 0.5 each: both have already moved further than the clip the right way.
    old = torch.tensor([[0.3], [0.7]], dtype=torch.float64).log()
    before = logits.detach().clone()
    stats = ppo.update(
        [ActionBatch(lambda: logits.expand(2, -1, -1), actions, old)], torch.tensor([1.0, -1.0], dtype=torch.float64)
    )
    assert stats["clipped"] == 1.0
    torch.testing.assert_close(logits.detach(), before)


def test_options_that_a_decision_does_not_have_stay_impossible() -> None:
    free = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    absent = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -torch.inf]], dtype=torch.float64)

    def logits() -> Tensor:
        return (free + absent).expand(2, -1, -1)

    ppo = Ppo([free])  # type: ignore[list-item]
    actions = torch.tensor([[0, 1], [2, 0]])
    old = torch.log_softmax(logits().detach(), -1).gather(-1, actions[..., None]).squeeze(-1)
    stats = ppo.update([ActionBatch(logits, actions, old)], torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert torch.isfinite(free).all()
    assert math.isfinite(stats["entropy"])
    assert free[0, 2] > free[0, 0]
    assert free[1, 0] > free[1, 1]


def test_beating_the_target_earns_nothing() -> None:
    goal = Goal(budget_ms=2.0, loss_scale=0.1, target_loss=0.05)
    assert reward_of(measured(0.05, 2.0), goal) == reward_of(measured(0.0, 0.5), goal)
    assert reward_of(measured(0.0, 0.5), goal).total == 0.0


def test_every_term_is_named_and_the_total_is_their_sum() -> None:
    reward = reward_of(measured(0.1, 2.2), Goal(budget_ms=2.0, loss_scale=0.1))
    assert reward.loss == pytest.approx(-math.log(2.0))
    assert reward.ms == pytest.approx(-1.0)  # 10 % over the budget
    assert reward.failed == 0.0
    assert reward.total == pytest.approx(reward.loss + reward.ms)


def test_more_parameters_than_the_target_cost_by_the_members_weight() -> None:
    goal = Goal(budget_ms=2.0, loss_scale=0.1, target_params=5, size_weight=0.5)
    assert reward_of(measured(0.0), goal).size == pytest.approx(-0.5 * math.log(2))
    assert reward_of(measured(0.0), replace(goal, target_params=20)).size == 0.0


def test_measured_time_counts_before_predicted_time() -> None:
    goal = Goal(budget_ms=2.0, loss_scale=1.0)
    outcome = Measured("p", "F2", 0.0, None, 1, 1, predicted_ms=1.0, median_ms=4.0)
    assert reward_of(outcome, goal).ms < 0


def test_failures_and_losses_that_are_no_number_are_worst() -> None:
    goal = Goal(budget_ms=2.0, loss_scale=0.1)
    assert reward_of(Failed("p", "F1", "slice", "no"), goal).total == FAILED_REWARD
    assert reward_of(measured(math.nan), goal).total == FAILED_REWARD
    assert reward_of(measured(5.0), goal).total > FAILED_REWARD
