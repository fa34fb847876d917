"""The learners of the search on a knapsack whose optimum is known; 20 seeds of each are in benchmarks/results/."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import known_optimum
from known_optimum import FINE_A2C, FINE_PPO, Toy, deterministic, policy_gradient


@pytest.mark.parametrize("settings", [FINE_PPO, FINE_A2C])
def test_the_mode_of_a_policy_that_imitates_its_best_plan_ends_at_the_optimum(settings):
    for seed in range(2):
        toy = Toy.of(seed, 6)
        assert policy_gradient(toy, seed, settings).learned == pytest.approx(toy.optimum)


def test_an_actor_with_critics_of_whole_episodes_ends_at_the_optimum(monkeypatch):
    monkeypatch.setattr(known_optimum, "EPISODES", 240)
    for seed in range(2):
        toy = Toy.of(seed, 4)
        assert deterministic(toy, seed).learned == pytest.approx(toy.optimum)
