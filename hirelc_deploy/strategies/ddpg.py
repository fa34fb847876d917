"""In: episodes of states and actions with a reward at their end. Out: a policy of one continuous action (DDPG)."""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


@dataclass(frozen=True)
class DdpgSettings:
    """Lillicrap et al. 2016, as AMC (He et al. 2018) uses it, with other credit.

    AMC gives the final reward to every step, and its critic judges one step: what the other steps did is noise to it.
    Here a critic judges all actions of an episode at once, so that its slope in each tells what that one is worth. It
    learns them as the actor meant them, too: where a limit has only ever shown what it left of them, more looks better
    everywhere. There are two critics, and the lower one counts (Fujimoto et al. 2018); of many episodes that could be
    played, they choose those that are (Dulac-Arnold et al. 2015); and the actor is drawn to the best one
    (self-imitation, Oh et al. 2018), for a search ends with its best plan and not with a mean of good ones.

    Attributes:
        actor_rate, critic_rate: Learning rates of Adam.
        noise: Deviation of the exploration at the start, of actions in [0, 1].
        decay: Of the noise, per learning episode, down to `least_noise`.
        astray: Share of the steps with a uniform action, always: noise around a settled actor reaches no other option.
        random_episodes: First episodes with uniform actions.
        memory: Episodes that are remembered, each as it was meant and as it was done.
        batch: Episodes of one update.
        updates: Per episode.
        candidates: Episodes to choose each played one from.
        imitation: Weight of the squared distance from the best episode.
    """

    actor_rate: float = 5e-3
    critic_rate: float = 3e-3
    noise: float = 0.5
    decay: float = 0.97
    least_noise: float = 0.15
    astray: float = 0.12
    random_episodes: int = 16
    memory: int = 2000
    batch: int = 64
    updates: int = 8
    candidates: int = 64
    imitation: float = 3.0


@dataclass(frozen=True)
class Played:
    """An episode: (steps, state_size) states, (steps,) actions, the reward at its end."""

    states: NDArray[np.float64]
    actions: NDArray[np.float64]
    reward: float


class Ddpg:
    """An actor that decides one step after the other, and critics of the whole episode.

    Args:
        state_size: Numbers that describe a step.
        steps: Of every episode.

    Attributes:
        noise: Present deviation of the exploration.
    """

    def __init__(self, state_size: int, steps: int, seed: int, settings: DdpgSettings | None = None) -> None:
        self.settings = settings or DdpgSettings()
        self.noise = self.settings.noise
        self._rng = np.random.default_rng(seed)
        generator = torch.Generator().manual_seed(seed)
        self._actor = _network(state_size, generator)
        self._critics = [_network(steps, generator) for _ in range(2)]
        self._actor_steps = torch.optim.Adam(self._actor.parameters(), lr=self.settings.actor_rate)
        weights = itertools.chain.from_iterable(critic.parameters() for critic in self._critics)
        self._critic_steps = torch.optim.Adam(weights, lr=self.settings.critic_rate)
        self._memory: deque[Played] = deque(maxlen=2 * self.settings.memory)
        self._best: Played | None = None
        self._seen = 0

    @property
    def candidates(self) -> int:
        """Return of how many episodes each played one should be the best by `worth`; 1 before there is any learning."""
        return self.settings.candidates if self._learning else 1

    @property
    def _learning(self) -> bool:
        return self._seen >= self.settings.random_episodes

    def act(self, states: NDArray[np.float64], explore: bool = True) -> NDArray[np.float64]:
        """Return (n,) actions in [0, 1] for (n, state_size) states, from a truncated normal around the actor's."""
        if explore and not self._learning:
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
        uniform, astray = self._rng.uniform(size=len(mean)), self._rng.uniform(size=len(mean)) < self.settings.astray
        return np.where(astray, uniform, np.clip(action, 0.0, 1.0))

    def worth(self, actions: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return (n,) what the critics expect of (n, steps) actions, in standardised rewards."""
        with torch.no_grad():
            return np.asarray(self._worth(torch.from_numpy(actions)).numpy())

    def learn(
        self,
        states: NDArray[np.float64],
        actions: NDArray[np.float64],
        reward: float,
        done: NDArray[np.float64] | None = None,
    ) -> None:
        """Remember one episode and take its updates.

        Args:
            states: (steps, state_size).
            actions: (steps,) as `act` gave them.
            reward: At the end of the episode.
            done: (steps,) what became of the actions: rounded to what there is, or limited. Acted on, it does the same.
        """
        self._seen += 1
        self._memory.append(Played(states, actions, reward))
        if done is not None:
            self._memory.append(Played(states, done, reward))
        if self._best is None or reward > self._best.reward:
            self._best = self._memory[-1]
        if not self._learning:
            return
        self.noise = max(self.noise * self.settings.decay, self.settings.least_noise)
        rewards = np.array([played.reward for played in self._memory])
        standardised = (rewards - rewards.mean()) / (float(rewards.std()) or 1.0)
        for _ in range(self.settings.updates):
            rows = self._rng.integers(len(rewards), size=self.settings.batch)
            played = [self._memory[row] for row in rows]
            self._teach_critics(torch.from_numpy(np.stack([one.actions for one in played])), standardised[rows])
            self._teach_actor(torch.from_numpy(np.stack([one.states for one in played])), self._best)

    def _teach_critics(self, actions: Tensor, rewards: NDArray[np.float64]) -> None:
        targets = torch.from_numpy(rewards)
        missed = (self._worths(actions) - targets).square().mean(dim=1).sum()
        self._critic_steps.zero_grad()
        missed.backward()
        self._critic_steps.step()

    def _teach_actor(self, states: Tensor, best: Played) -> None:
        worth = self._worth(self._act(states)).mean()
        distance = (self._act(torch.from_numpy(best.states)) - torch.from_numpy(best.actions)).square().sum()
        loss = self.settings.imitation * distance - worth
        self._actor_steps.zero_grad()
        loss.backward()
        self._actor_steps.step()

    def _act(self, states: Tensor) -> Tensor:
        action: Tensor = torch.sigmoid(self._actor(states)).squeeze(-1)
        return action

    def _worth(self, actions: Tensor) -> Tensor:
        return self._worths(actions).amin(dim=0)

    def _worths(self, actions: Tensor) -> Tensor:
        """Return (critics, n) what each critic expects of (n, steps) actions."""
        return torch.stack([critic(2.0 * actions - 1.0).squeeze(1) for critic in self._critics])


def _network(inputs: int, generator: torch.Generator, hidden: int = 64) -> nn.Sequential:
    sizes = (inputs, hidden, hidden, 1)
    layers = [nn.Linear(a, b, dtype=torch.float64) for a, b in itertools.pairwise(sizes)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.normal_(0.0, layer.in_features**-0.5, generator=generator)
            layer.bias.zero_()
        layers[-1].weight.mul_(0.1)  # so that nothing is preferred before anything is learned
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
