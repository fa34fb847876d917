"""In: episodes of states and actions with a reward at their end. Out: a policy of one continuous action (DDPG)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


@dataclass(frozen=True)
class DdpgSettings:
    """Lillicrap et al. 2016, as AMC (He et al. 2018) uses it: the final reward is that of every step.

    The critic learns that reward itself, so that no target network has to carry it back from the end.

    Attributes:
        actor_rate, critic_rate: Learning rates of Adam; ten times AMC's, for a tenth of its 800 episodes.
        noise: Deviation of the exploration at the start, of actions in [0, 1].
        decay: Of the noise, per learning episode.
        random_episodes: First episodes with uniform actions.
        memory: Episodes that are remembered.
        batch: Steps of one update.
        updates: Per episode.
    """

    actor_rate: float = 1e-3
    critic_rate: float = 1e-2
    noise: float = 0.5
    decay: float = 0.97
    random_episodes: int = 16
    memory: int = 100
    batch: int = 64
    updates: int = 8


class Ddpg:
    """Actor and critic of one hidden pair of layers each.

    Attributes:
        noise: Present deviation of the exploration.
        baseline: Moving mean of the rewards, which the critic does not have to learn.
    """

    def __init__(self, state_size: int, seed: int, settings: DdpgSettings | None = None) -> None:
        self.settings = settings or DdpgSettings()
        self.noise = self.settings.noise
        self.baseline: float | None = None
        self._rng = np.random.default_rng(seed)
        generator = torch.Generator().manual_seed(seed)
        self._actor = _network(state_size, generator)
        self._critic = _network(state_size + 1, generator)
        self._actor_steps = torch.optim.Adam(self._actor.parameters(), lr=self.settings.actor_rate)
        self._critic_steps = torch.optim.Adam(self._critic.parameters(), lr=self.settings.critic_rate)
        self._episodes: list[tuple[NDArray[np.float64], NDArray[np.float64], float]] = []
        self._seen = 0

    def act(self, states: NDArray[np.float64], explore: bool = True) -> NDArray[np.float64]:
        """Return (n,) actions in [0, 1] for (n, state_size) states, from a truncated normal around the actor's."""
        if explore and self._seen < self.settings.random_episodes:
            return self._rng.uniform(size=len(states))
        with torch.no_grad():
            mean = self._act(torch.from_numpy(states)).numpy()
        if not explore:
            return np.asarray(mean)
        action = mean + self.noise * self._rng.normal(size=len(mean))
        for _ in range(100):
            outside = (action < 0) | (action > 1)
            if not outside.any():
                break
            action[outside] = (mean + self.noise * self._rng.normal(size=len(mean)))[outside]
        return np.clip(action, 0.0, 1.0)

    def learn(self, states: NDArray[np.float64], actions: NDArray[np.float64], reward: float) -> None:
        """Remember one episode of (steps, state_size) states and (steps,) actions, and take its updates."""
        self._seen += 1
        self._episodes = [*self._episodes, (states, actions, reward)][-self.settings.memory :]
        self.baseline = reward if self.baseline is None else 0.95 * self.baseline + 0.05 * reward
        if self._seen < self.settings.random_episodes:
            return
        self.noise *= self.settings.decay
        all_states = torch.from_numpy(np.concatenate([s for s, _, _ in self._episodes]))
        all_actions = torch.from_numpy(np.concatenate([a for _, a, _ in self._episodes]))
        rewards = np.concatenate([np.full(len(a), r - self.baseline) for _, a, r in self._episodes])
        spread = float(rewards.std()) or 1.0
        targets = torch.from_numpy(rewards / spread)
        for _ in range(self.settings.updates):
            rows = torch.from_numpy(self._rng.integers(len(targets), size=self.settings.batch))
            self._update(all_states[rows], all_actions[rows], targets[rows])

    def _update(self, states: Tensor, actions: Tensor, targets: Tensor) -> None:
        missed = (self._worth(states, actions) - targets).square().mean()
        self._critic_steps.zero_grad()
        missed.backward()
        self._critic_steps.step()
        worth = -self._worth(states, self._act(states)).mean()
        self._actor_steps.zero_grad()
        worth.backward()
        self._actor_steps.step()

    def _act(self, states: Tensor) -> Tensor:
        action: Tensor = torch.sigmoid(self._actor(states)).squeeze(1)
        return action

    def _worth(self, states: Tensor, actions: Tensor) -> Tensor:
        worth: Tensor = self._critic(torch.cat([states, actions[:, None]], dim=1)).squeeze(1)
        return worth


def _network(inputs: int, generator: torch.Generator, hidden: int = 64) -> nn.Sequential:
    sizes = (inputs, hidden, hidden, 1)
    layers = [nn.Linear(a, b, dtype=torch.float64) for a, b in itertools.pairwise(sizes)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.normal_(0.0, layer.in_features**-0.5, generator=generator)
            layer.bias.zero_()
        layers[-1].weight.mul_(0.1)  # so that nothing is preferred before anything is learned
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
