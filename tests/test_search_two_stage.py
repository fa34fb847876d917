"""DDPG and the two-stage strategy: the actor follows what is rewarded, the wall holds, stage 2 leaves widths alone."""

from __future__ import annotations

import numpy as np
from toy_problem import random_problem

from hirelc_deploy.outcome import Measured
from hirelc_deploy.strategies import two_stage
from hirelc_deploy.strategies.ddpg import Ddpg, DdpgSettings
from hirelc_deploy.strategies.knapsack import smallest
from hirelc_deploy.strategies.two_stage import TwoStage


def test_the_actor_goes_where_the_reward_is_in_each_state() -> None:
    learner = Ddpg(2, 2, 0, DdpgSettings(random_episodes=32, critic_rate=3e-3, actor_rate=3e-3))
    states = np.eye(2)
    for _ in range(150):
        actions = learner.act(states)
        learner.learn(states, actions, -float((actions[0] - 0.8) ** 2 + (actions[1] - 0.3) ** 2))
    best = learner.act(states, explore=False)
    assert abs(best[0] - 0.8) < 0.15
    assert abs(best[1] - 0.3) < 0.15
    assert learner.noise == learner.settings.least_noise < 0.2


def test_exploration_stays_in_its_range_and_equal_seeds_act_alike() -> None:
    first, second = (Ddpg(3, 4, 7, DdpgSettings(random_episodes=0)) for _ in range(2))
    states = np.random.default_rng(0).normal(size=(200, 3))
    actions = first.act(states)
    assert ((actions >= 0) & (actions <= 1)).all()
    assert np.ptp(actions) > 0.5
    assert np.array_equal(actions, second.act(states))


def test_the_second_stage_decides_precisions_of_the_best_widths(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(two_stage, "FIRST_STAGE", 6)
    problem = random_problem(3)
    shortest_ms = smallest(problem)[1]
    budget_ms = shortest_ms + 0.6 * (problem.uncut_ms - shortest_ms)
    strategy = TwoStage(problem, budget_ms, 0)
    widths = [index for index, decision in enumerate(problem.decisions) if decision.kind == "width"]
    rows = np.arange(len(problem.decisions))
    losses = np.stack([np.pad(d.loss, (0, 8 - len(d.loss))) for d in problem.decisions])
    tried = []
    for _ in range(3):
        proposed = strategy.propose(3)
        outcomes = [Measured("", "F1", float(losses[rows, c].sum()), None, 1, 1) for c in proposed]
        assert all(problem.predict_ms(c) <= budget_ms for c in proposed)
        strategy.observe(list(zip(proposed, outcomes, strict=True)))
        tried += [(outcome.loss, choices) for outcome, choices in zip(outcomes, proposed, strict=True)]
    best = min(tried[:6], key=lambda one: one[0])[1]
    assert strategy._stage is strategy._precisions
    assert np.array_equal(strategy._base[widths], best[widths])
