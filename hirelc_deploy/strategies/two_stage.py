"""In: a problem and a time budget. Out: the strategy `two-stage`: widths by DDPG, then precisions of the cut model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hirelc_deploy.outcome import Measured, Outcome
from hirelc_deploy.strategies.ddpg import Ddpg
from hirelc_deploy.strategies.high_level import standardised
from hirelc_deploy.strategies.knapsack import check_feasible, project, smallest
from hirelc_deploy.strategies.problem import Choices, Problem
from hirelc_deploy.strategies.reward import Goal, reward_of

FIRST_STAGE = 48
"""Evaluations of the first stage, where there is anything for a second one to decide."""

FIRST_SHARE = 0.75
"""Of the time above the shortest one, what the first stage may use then: the rest buys precision back."""


@dataclass(frozen=True)
class Episode:
    """One pass over the decisions of a stage: (steps, state), (steps,) meant and done, and the plan it ended with."""

    states: NDArray[np.float64]
    actions: NDArray[np.float64]
    done: NDArray[np.float64]
    choices: Choices


class TwoStage:
    """Zhan, Lin and Cao 2019 (arXiv 1912.02254) in the form of their relatives: AMC for widths, HAQ for precisions.

    An agent decides layer after layer. Its action is clipped so that the layers still to come can meet the budget at
    their smallest (AMC's wall). Stage 2 decides the precisions of the plan that stage 1 found best, widths frozen. A
    model without precisions to decide has no stage 2.
    """

    name = "two-stage"

    def __init__(self, problem: Problem, budget_ms: float, seed: int) -> None:
        shortest_ms = check_feasible(problem, budget_ms)
        self._problem, self._budget_ms, self._seed = problem, budget_ms, seed
        self._smallest = smallest(problem)[0]
        kinds = [decision.kind == "width" for decision in problem.decisions]
        self._widths = np.flatnonzero(kinds)
        self._precisions = np.flatnonzero(~np.array(kinds))
        room = FIRST_SHARE if len(self._precisions) else 1.0
        self._first_ms = shortest_ms + room * (budget_ms - shortest_ms)
        # Scaled by the budget's time, not by a loss: nothing of the tables' losses is known here.
        self._goal = Goal(budget_ms, 0.1)
        self._features = standardised(np.stack([decision.features for decision in problem.decisions]))
        self._pending: dict[bytes, list[Episode]] = {}
        self._outcomes: dict[bytes, Outcome] = {}
        self._start(self._widths if len(self._widths) else self._precisions, self._smallest)

    def propose(self, count: int) -> list[Choices]:
        """Return up to `count` new plans, one episode each, of those that the critics expect the most from.

        Some of the episodes that end at a known plan teach at once.
        """
        found: list[Choices] = []
        for _ in range(10):
            if len(found) >= count:
                break
            episodes = self._episodes(count * self._agent.candidates)
            worth = self._agent.worth(np.stack([episode.actions for episode in episodes]))
            known = 0
            for index in np.argsort(-worth, kind="stable"):
                episode = episodes[index]
                key = episode.choices.tobytes()
                if key in self._outcomes:
                    known += 1
                    if known <= count:
                        self._learn(episode, self._outcomes[key])
                elif key in self._pending:
                    self._pending[key].append(episode)
                elif len(found) < count:
                    self._pending[key] = [episode]
                    found.append(episode.choices)
        return found

    def observe(self, tried: Sequence[tuple[Choices, Outcome]]) -> None:
        """Learn from the episodes of these plans; after the first stage, begin the second with the best of them."""
        for choices, outcome in tried:
            self._outcomes[choices.tobytes()] = outcome
            for episode in self._pending.pop(choices.tobytes(), []):
                self._learn(episode, outcome)
        measured = {key: o.loss for key, o in self._outcomes.items() if isinstance(o, Measured)}
        if self._stage is self._widths and len(self._precisions) and measured and len(self._outcomes) >= FIRST_STAGE:
            best = np.frombuffer(min(measured, key=measured.__getitem__), np.int64)
            self._start(self._precisions, np.where(np.isin(np.arange(len(best)), self._widths), best, self._smallest))

    def _start(self, stage: NDArray[np.int64], base: Choices) -> None:
        self._stage, self._base = stage, base
        self._limit_ms = self._first_ms if stage is self._widths else self._budget_ms
        self._agent = Ddpg(self._features.shape[1] + 4, len(stage), self._seed)

    def _learn(self, episode: Episode, outcome: Outcome) -> None:
        reward = reward_of(outcome, self._goal).total
        self._agent.learn(episode.states, episode.actions, reward, episode.done)

    def _episodes(self, count: int) -> list[Episode]:
        """Return `count` episodes, decided side by side."""
        choices = np.repeat(self._base[None], count, axis=0)
        previous, states, actions = np.ones(count), [], []
        for step, index in enumerate(self._stage):
            options = len(self._problem.decisions[index].options)
            times = self._times_with(choices, int(index), options)
            state = self._state(step, int(index), times, previous)
            action = self._agent.act(state)
            wanted = np.rint(action * (options - 1)).astype(np.int64)
            fits = times <= self._limit_ms
            allowed = fits & (np.arange(options) <= wanted[:, None])
            # Where nothing so narrow fits, the fastest option; else the widest that fits and was asked for.
            widest = options - 1 - allowed[:, ::-1].argmax(axis=1)
            choices[:, index] = np.where(allowed.any(axis=1), widest, times.argmin(axis=1))
            previous = choices[:, index] / max(options - 1, 1)
            states.append(state)
            actions.append(action)
        final = [project(self._problem, one, self._limit_ms) for one in choices]
        most = np.array([max(len(self._problem.decisions[index].options) - 1, 1) for index in self._stage])
        return [
            Episode(
                np.stack([s[row] for s in states]), np.array([a[row] for a in actions]), plan[self._stage] / most, plan
            )
            for row, plan in enumerate(final)
        ]

    def _times_with(self, choices: Choices, index: int, options: int) -> NDArray[np.float64]:
        """Return (n, options) predicted times with each option of a decision, those to come at their smallest."""
        tried = np.repeat(choices, options, axis=0)
        tried[:, index] = np.tile(np.arange(options), len(choices))
        return self._problem.predict_batch(tried).reshape(len(choices), options)

    def _state(
        self, step: int, index: int, times: NDArray[np.float64], previous: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return (n, state): features of the decision, its place, the time left, what it can cost, the last action."""
        count = len(times)
        known = np.repeat(self._features[index][None], count, axis=0)
        place = np.full(count, step / len(self._stage))
        left = 1 - times.min(axis=1) / self._limit_ms
        span = np.ptp(times, axis=1) / self._limit_ms
        return np.column_stack([known, place, left, span, previous])
