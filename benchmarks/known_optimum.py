"""Question: do PPO, A2C and DDPG reach the optimum of a small multiple-choice knapsack, which is known by trying all?

    python benchmarks/known_optimum.py --seeds 20

Eight decisions with four options each: 65,536 plans. A plan costs its summed loss and three times what it is over the
limit. Each learner draws 64 plans per update. DDPG has five decisions (1,024 plans) and learns after every episode, one
decision per step; an option that leaves no room for the rest is not taken. `found` counts seeds in which the optimum
was among the plans drawn, `learned` those in which the learner's own best plan is the optimum; random draws of the same
number are beside them. With --stable-baselines3 (in an environment that has it) its PPO runs too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from hirelc_deploy.search.ddpg import Ddpg, DdpgSettings
from hirelc_deploy.search.ppo import A2C, ActionBatch, Ppo, PpoSettings

OPTIONS, DRAWS, UPDATES, EPISODES = 4, 64, 70, 500


@dataclass(frozen=True)
class Toy:
    """A knapsack: (decisions, OPTIONS) losses and weights, and the limit on the summed weight."""

    loss: NDArray[np.float64]
    weight: NDArray[np.float64]
    limit: float

    @classmethod
    def of(cls, seed: int, decisions: int) -> Toy:
        """Return the toy of a seed; a heavier option loses less, as a wider layer does."""
        rng = np.random.default_rng(seed)
        weight = np.sort(rng.uniform(0, 1, (decisions, OPTIONS)), axis=1)
        loss = -np.sort(-rng.uniform(0, 1, (decisions, OPTIONS)), axis=1)
        return cls(loss, weight, 0.8 * float(weight.mean(axis=1).sum()))

    def reward(self, actions: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return (n,) rewards of (n, decisions) actions."""
        rows = np.arange(self.decisions)
        over = np.maximum(0.0, self.weight[rows, actions].sum(-1) - self.limit)
        return np.asarray(-self.loss[rows, actions].sum(-1) - 3.0 * over)

    @property
    def decisions(self) -> int:
        """Return the number of decisions."""
        return len(self.loss)

    @property
    def optimum(self) -> float:
        """Return the best reward of all plans."""
        return float(self.reward(np.array(list(itertools.product(range(OPTIONS), repeat=self.decisions)))).max())


@dataclass(frozen=True)
class Reached:
    """The best reward among the plans drawn, and that of what the learner would do in the end."""

    found: float
    learned: float
    plans: int


def policy_gradient(toy: Toy, seed: int, settings: PpoSettings) -> Reached:
    """Return what PPO or A2C reaches with one free number per option."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.zeros(toy.decisions, OPTIONS, dtype=torch.float64, requires_grad=True)
    learner = Ppo([logits], settings)  # type: ignore[list-item]
    found = -np.inf
    for _ in range(UPDATES):
        log_probs = torch.log_softmax(logits.detach(), dim=-1)
        actions = torch.multinomial(log_probs.exp(), DRAWS, replacement=True, generator=generator).T
        chosen = log_probs.expand(DRAWS, -1, -1).gather(-1, actions[..., None]).squeeze(-1)
        rewards = toy.reward(actions.numpy())
        found = max(found, float(rewards.max()))
        batch = ActionBatch(lambda: logits.expand(DRAWS, -1, -1), actions, chosen)
        learner.update([batch], torch.from_numpy(rewards))
    mode = logits.detach().argmax(dim=-1).numpy()
    return Reached(found, float(toy.reward(mode[None])[0]), UPDATES * DRAWS)


def deterministic(toy: Toy, seed: int) -> Reached:
    """Return what DDPG reaches, deciding one after the other and seeing the weight that is left."""
    learner = Ddpg(toy.decisions + 2, seed, DdpgSettings(random_episodes=100, decay=0.995, memory=400, updates=2))

    def episode(explore: bool) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
        states, actions, options, left = [], [], [], toy.limit
        for index in range(toy.decisions):
            state = np.append(np.eye(toy.decisions)[index], [left / toy.limit, actions[-1] if actions else 0.0])
            action = float(learner.act(state[None], explore)[0])
            rest = toy.weight[index + 1 :, 0].sum()
            room = max(int((toy.weight[index] + rest <= left + 1e-12).sum()), 1)
            option = min(int(action * OPTIONS), room - 1)
            left -= toy.weight[index, option]
            states.append(state)
            actions.append((option + 0.5) / OPTIONS)
            options.append(option)
        return np.stack(states), np.array(actions), np.array(options)

    found = -np.inf
    for _ in range(EPISODES):
        states, actions, options = episode(explore=True)
        reward = float(toy.reward(options[None])[0])
        found = max(found, reward)
        learner.learn(states, actions, reward)
    _, _, options = episode(explore=False)
    return Reached(found, float(toy.reward(options[None])[0]), EPISODES)


def random_draws(toy: Toy, seed: int, count: int) -> Reached:
    """Return what as many random plans reach."""
    best = float(toy.reward(np.random.default_rng(seed).integers(0, OPTIONS, (count, toy.decisions))).max())
    return Reached(best, best, count)


def stable_baselines(toy: Toy, seed: int) -> Reached:
    """Return what Stable-Baselines3's PPO reaches with as many plans, each a one-step episode."""
    import gymnasium
    import stable_baselines3

    drawn: list[float] = []

    class OneStep(gymnasium.Env):  # type: ignore[misc]
        """Nothing to see, one joint action, then the reward."""

        observation_space = gymnasium.spaces.Box(0.0, 1.0, (1,))
        action_space = gymnasium.spaces.MultiDiscrete([OPTIONS] * toy.decisions)

        def reset(self, *, seed: int | None = None, options: object = None) -> tuple[NDArray[np.float32], dict]:  # type: ignore[type-arg]
            """Begin."""
            return np.zeros(1, np.float32), {}

        def step(self, action: NDArray[np.int64]) -> tuple[NDArray[np.float32], float, bool, bool, dict]:  # type: ignore[type-arg]
            """Take the one action."""
            drawn.append(float(toy.reward(action[None])[0]))
            return np.zeros(1, np.float32), drawn[-1], True, False, {}

    model = stable_baselines3.PPO(
        "MlpPolicy", OneStep(), learning_rate=3e-3, n_steps=DRAWS, batch_size=DRAWS, n_epochs=8, seed=seed, device="cpu"
    )
    model.learn(UPDATES * DRAWS)
    action, _ = model.predict(np.zeros(1, np.float32), deterministic=True)
    return Reached(max(drawn), float(toy.reward(action[None])[0]), len(drawn))


LEARNERS: dict[str, tuple[int, Callable[[Toy, int], Reached]]] = {
    "PPO": (8, lambda toy, seed: policy_gradient(toy, seed, PpoSettings(epochs=4, entropy=0.1))),
    "A2C": (8, lambda toy, seed: policy_gradient(toy, seed, replace(A2C, entropy=0.1))),
    "DDPG": (5, deterministic),
}
"""Decisions of its toy, and the learner. DDPG sees a twentieth as many plans, so its toy is smaller."""


def main() -> int:
    """Print one JSON object with the share of seeds in which each learner reached the optimum."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--stable-baselines3", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    learners = dict(LEARNERS)
    if options.stable_baselines3:
        learners["PPO of Stable-Baselines3"] = (8, stable_baselines)
    table = {}
    for name, (decisions, learner) in learners.items():
        runs = [(toy, learner(toy, seed)) for seed in range(options.seeds) if (toy := Toy.of(seed, decisions))]
        plans = runs[0][1].plans
        table[name] = {
            "decisions": decisions,
            "plans": plans,
            "found": float(np.mean([run.found >= toy.optimum - 1e-9 for toy, run in runs])),
            "learned": float(np.mean([run.learned >= toy.optimum - 1e-9 for toy, run in runs])),
            "learned_below_optimum_mean": float(np.mean([toy.optimum - run.learned for toy, run in runs])),
            "random_draws_found": float(
                np.mean([random_draws(toy, s, plans).found >= toy.optimum - 1e-9 for s, (toy, _) in enumerate(runs)])
            ),
        }
        print(name, table[name], file=sys.stderr, flush=True)
    print(json.dumps(table, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
