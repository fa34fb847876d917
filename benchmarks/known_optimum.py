"""Question: do PPO, A2C and DDPG reach the optimum of a small multiple-choice knapsack, which is known by trying all?

    python benchmarks/known_optimum.py --seeds 20

Eight decisions with four options each: 65,536 plans. A plan costs its summed loss and three times what it is over the
limit, for every learner. PPO and A2C draw 64 plans per update; DDPG plays 8 episodes at a time, one decision per step.
`found` counts seeds in which the optimum was among the plans drawn, `learned` those in which what the learner itself
would do in the end (mode of the policy, actor without noise) is the optimum; random draws of the same number are beside
them. With --stable-baselines3 (in an environment that has it) its PPO runs too, with as many plans as ours.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from record import provenance

from hirelc_deploy.strategies.ddpg import Ddpg, DdpgSettings
from hirelc_deploy.strategies.ppo import A2C, ActionBatch, Ppo, PpoSettings

OPTIONS, DECISIONS = 4, 8
DRAWS, UPDATES, IMITATED = 64, 150, 16
EPISODES, TOGETHER = 1920, 8


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


def policy_gradient(toy: Toy, seed: int, settings: PpoSettings, imitates: bool = True) -> Reached:
    """Return what PPO or A2C reaches with one free number per option.

    The entropy bonus goes to 0 over the updates. With `imitates` (self-imitation, Oh et al. 2018) the best plan so far
    stands beside the draws, IMITATED times.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.zeros(toy.decisions, OPTIONS, dtype=torch.float64, requires_grad=True)
    learner = Ppo([logits], settings)  # type: ignore[list-item]
    best, found = torch.zeros(0, toy.decisions, dtype=torch.int64), -np.inf
    for update in range(UPDATES):
        learner.settings = replace(settings, entropy=settings.entropy * (1 - update / UPDATES))
        log_probs = torch.log_softmax(logits.detach(), dim=-1)
        drawn = torch.multinomial(log_probs.exp(), DRAWS, replacement=True, generator=generator).T
        actions = torch.cat([drawn, best.expand(IMITATED, -1)]) if imitates and len(best) else drawn
        chosen = log_probs.expand(len(actions), -1, -1).gather(-1, actions[..., None]).squeeze(-1)
        rewards = toy.reward(actions.numpy())
        if rewards.max() > found:
            found, best = float(rewards.max()), actions[int(rewards.argmax())][None]
        batch = ActionBatch(partial(logits.expand, len(actions), -1, -1), actions, chosen)
        learner.update([batch], torch.from_numpy(rewards))
    mode = logits.detach().argmax(dim=-1).numpy()
    return Reached(found, float(toy.reward(mode[None])[0]), UPDATES * DRAWS)


def deterministic(toy: Toy, seed: int) -> Reached:
    """Return what DDPG reaches, deciding one after the other and seeing the weight that is left."""
    settings = DdpgSettings(random_episodes=64, decay=0.996, batch=128, updates=1)
    learner = Ddpg(toy.decisions + 2, toy.decisions, seed, settings)

    def play(count: int, explore: bool = True) -> tuple[NDArray[np.float64], ...]:
        """Return (count, decisions, state), (count, decisions) meant and done, and (count, decisions) options."""
        steps, left, done = [], np.full(count, toy.limit), np.zeros(count)
        for index in range(toy.decisions):
            place = np.repeat(np.eye(toy.decisions)[index][None], count, axis=0)
            state = np.column_stack([place, left / toy.limit, done])
            action = learner.act(state, explore)
            option = np.minimum(action * OPTIONS, OPTIONS - 1).astype(np.int64)
            left, done = left - toy.weight[index, option], (option + 0.5) / OPTIONS
            steps.append((state, action, done, option))
        states, meant, took, options = zip(*steps, strict=True)
        return np.stack(states, axis=1), np.stack(meant, axis=1), np.stack(took, axis=1), np.stack(options, axis=1)

    rewards: dict[bytes, float] = {}
    for _ in range(EPISODES // TOGETHER):
        states, meant, took, options = play(TOGETHER * learner.candidates)
        order = np.argsort(-learner.worth(meant), kind="stable")
        new = [row for row in order if options[row].tobytes() not in rewards]
        for row in [*new, *order][:TOGETHER]:
            reward = rewards[options[row].tobytes()] = float(toy.reward(options[row][None])[0])
            learner.learn(states[row], meant[row], reward, took[row])
    last = play(1, explore=False)[3]
    return Reached(max(rewards.values()), float(toy.reward(last)[0]), EPISODES)


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


FINE_PPO = PpoSettings(learning_rate=0.015, epochs=4, entropy=0.2)
FINE_A2C = replace(A2C, learning_rate=0.05, entropy=0.2)
LEARNERS: dict[str, Callable[[Toy, int], Reached]] = {
    "PPO": lambda toy, seed: policy_gradient(toy, seed, FINE_PPO),
    "A2C": lambda toy, seed: policy_gradient(toy, seed, FINE_A2C),
    "DDPG": deterministic,
    "PPO without imitation": lambda toy, seed: policy_gradient(toy, seed, FINE_PPO, imitates=False),
    "A2C without imitation": lambda toy, seed: policy_gradient(toy, seed, FINE_A2C, imitates=False),
}


def share_at_optimum(toys: Sequence[Toy], rewards: Sequence[float]) -> float:
    """Return the share of the toys whose optimum was reached."""
    return float(np.mean([reward >= toy.optimum - 1e-9 for toy, reward in zip(toys, rewards, strict=True)]))


def main() -> int:
    """Print one JSON object with the share of seeds in which each learner reached the optimum."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--stable-baselines3", action="store_true")
    parser.add_argument("--only", nargs="*", help="Learners by name; all if not given.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    learners = dict(LEARNERS)
    if options.stable_baselines3:
        learners["PPO of Stable-Baselines3"] = stable_baselines
    table = {}
    for name, learner in learners.items():
        if options.only and name not in options.only:
            continue
        toys = [Toy.of(seed, DECISIONS) for seed in range(options.seeds)]
        runs = [learner(toy, seed) for seed, toy in enumerate(toys)]
        plans = runs[0].plans
        draws = [random_draws(toy, seed, plans) for seed, toy in enumerate(toys)]
        table[name] = {
            "plans": plans,
            "found": share_at_optimum(toys, [run.found for run in runs]),
            "learned": share_at_optimum(toys, [run.learned for run in runs]),
            "learned_below_optimum_mean": float(
                np.mean([toy.optimum - run.learned for toy, run in zip(toys, runs, strict=True)])
            ),
            "random_draws_found": share_at_optimum(toys, [one.found for one in draws]),
        }
        print(name, table[name], file=sys.stderr, flush=True)
    record = {**provenance(shlex.join(["python", *sys.argv])), "seeds": options.seeds, "learners": table}
    print(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
