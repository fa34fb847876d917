"""In: a problem and a time budget. Out: the strategy `hirelc`: agents draw plans, a surrogate chooses of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hirelc_deploy.outcome import Measured, Outcome
from hirelc_deploy.strategies.agent import Agent, Draws, Member, Scene
from hirelc_deploy.strategies.high_level import block_budgets, block_of
from hirelc_deploy.strategies.knapsack import check_feasible, project, solve, solve_without, tables_around
from hirelc_deploy.strategies.ppo import A2C, PpoSettings
from hirelc_deploy.strategies.problem import FISHER, Choices, Problem
from hirelc_deploy.strategies.reward import FAILED_REWARD, Goal, Reward, reward_of
from hirelc_deploy.strategies.surrogate import Surrogate, expected_improvement
from hirelc_deploy.strategies.transfer import FRESH, Verdict, Weights, take_over
from hirelc_deploy.strategies.votes import vote

MEMBERS = (Member(PpoSettings()), Member(A2C, expected_changes=2.5), Member(PpoSettings(), 6.0, size_weight=0.1))
"""They differ in algorithm, in how far they begin to look, and in what they care for."""

DRAWS = 24
"""Plans that each member draws per batch; the surrogate chooses of them."""

IMAGINED = 32
"""Draws of one step of learning from the surrogate."""

IMAGINED_STEPS = 2
"""Such steps per member and batch."""

WILDER = 4
"""Times that noisier draws are made when too few are new."""

POOL = 400
"""Plans of the pool that are looked at closely: those of the least expected loss."""

CLIMBS = 8
"""Steps of the climb from the best plan to one that the surrogate expects to be better than its neighbours."""


@dataclass(frozen=True)
class Parts:
    """What a hierarchy consists of; every part can be left out, to see what it is worth.

    Attributes:
        high_level: A price per block, not one for all.
        surrogate: Chooses what is evaluated, and teaches the agents between evaluations.
        warm_start: Agents begin at the solver's answer; else at random networks that know no losses.
        learns: Agents learn from outcomes.
        fisher: Agents see the Fisher sensitivity of what they decide.
    """

    members: tuple[Member, ...] = MEMBERS
    high_level: bool = True
    surrogate: bool = True
    warm_start: bool = True
    learns: bool = True
    fisher: bool = True


@dataclass
class Round:
    """What happened between two batches, for the log.

    Attributes:
        foreseen: Predicted log losses of the plans of this batch before they were measured; `found` the measured ones.
        correlation, error: Of held-out predictions; see `Surrogate`.
        trusted: Whether the surrogate may teach the agents.
        weights: (members,) in votes.
        octaves: (blocks,) that the price of a block's time is expected to lie above the common one, mean of members.
        budgets_ms: (blocks,) that the best plan so far hands out on top of what nobody can avoid.
        feedback: (blocks,) log loss that each block was found to cost more than the tables said.
        updates: Statistics of each member's last step.
    """

    foreseen: list[float] = field(default_factory=list)
    found: list[float] = field(default_factory=list)
    correlation: float = 0.0
    error: float = float("nan")
    trusted: bool = False
    weights: list[float] = field(default_factory=list)
    octaves: list[float] = field(default_factory=list)
    budgets_ms: list[float] = field(default_factory=list)
    feedback: list[float] = field(default_factory=list)
    updates: list[dict[str, float]] = field(default_factory=list)


class Hierarchy:
    """An ensemble of agents over one problem.

    Each batch, every member draws feasible plans and the ensemble votes on one. The first batch is the solver's answer,
    its answers without one of the branches that may go, and draws, in turn those that the tables like best and those of
    each member. From then on the plans of the pool
    (draws, vote, neighbours of the best) are evaluated from which the surrogate expects the most improvement, which
    counts how little it knows. Outcomes teach the surrogate and the members that drew them. While its held-out
    predictions rank plans well, the surrogate teaches the members further, and tells the HLA which blocks cost more
    than the tables said.

    Args:
        problem: The tables, and the prediction that decides what fits.
        budget_ms: Limit on the predicted time.
        seed: Equal seeds and equal outcomes give equal proposals.
        name: `hirelc`, or that of a strategy without some of the parts.
        parts: What is there.

    Raises:
        ConstraintError: Even the smallest options miss the budget.
    """

    def __init__(
        self, problem: Problem, budget_ms: float, seed: int, *, name: str = "hirelc", parts: Parts | None = None
    ) -> None:
        check_feasible(problem, budget_ms)
        self.name = name
        self.rewards: list[Reward] = []
        self.rounds: list[Round] = []
        self.parts = parts = parts or Parts()
        problem = problem if parts.fisher else blind_to_fisher(problem)
        self._problem, self._budget_ms = problem, budget_ms
        answer = solve(problem, budget_ms)
        tables = tables_around(problem, answer)
        self._scene = Scene(problem, budget_ms, answer, tables)
        self._goal = Goal(budget_ms, max(tables.additive_loss(answer), 1e-6))
        self._block = block_of(problem)
        self.agents = [
            Agent(
                self._scene,
                member,
                seed * len(parts.members) + index,
                warm_start=parts.warm_start,
                high_level=parts.high_level,
            )
            for index, member in enumerate(parts.members)
        ]
        self.surrogate = Surrogate(tables)
        self._proposed: dict[bytes, float] = {}
        self._measured: dict[bytes, tuple[Choices, Measured]] = {}
        self._failed: set[bytes] = set()
        self._pending: list[Draws] = []
        self._merit = np.zeros(len(self.agents))
        self.elsewhere: Weights | None = None
        """What agents learned elsewhere, to begin with once FRESH plans were measured; see `transfer`."""
        self.verdict: Verdict | None = None
        """What became of it."""

    def budgets(self, choices: Choices) -> tuple[float, NDArray[np.float64]]:
        """Return the unavoidable ms and the (blocks,) ms handed out on top; together they are the budget."""
        return block_budgets(self._problem, choices, self._budget_ms)

    def vote(self) -> Choices:
        """Return what the members find best together, made to fit."""
        weights = np.exp(self._merit - self._merit.max())
        elected = vote(self._problem.decisions, np.stack([agent.mode() for agent in self.agents]), weights)
        return project(self._problem, elected, self._budget_ms)

    def propose(self, count: int) -> list[Choices]:
        """Return up to `count` feasible choices that are new; the first ever is the solver's answer."""
        self._pending = [agent.draw(DRAWS) for agent in self.agents]
        first, *others = self._answers(count) if self.parts.warm_start and not self._proposed else [self.vote()]
        # One draw of each member after the other, so that every one is heard when all are taken in this order.
        drawn = [draws.choices[index] for index in range(DRAWS) for draws in self._pending]
        picked = self._chosen(self._unseen([first, *drawn] if self.parts.warm_start else drawn), count - len(others))
        picked = self._unseen([*picked[:1], *others, *picked[1:]])
        for noise in range(2, 2 + WILDER):
            if len(picked) >= count:
                break
            wilder = [agent.draw(DRAWS, float(noise)).choices for agent in self.agents]
            picked = self._unseen([*picked, *np.concatenate(wilder)])[:count]
        if picked:
            foreseen = self.surrogate.mean(np.stack(picked))
            self._proposed |= {c.tobytes(): float(f) for c, f in zip(picked, foreseen, strict=True)}
        return picked

    def observe(self, tried: Sequence[tuple[Choices, Outcome]]) -> None:
        """Learn from outcomes: first the surrogate, then every member by its own draws, then by imagined ones."""
        this = Round()
        for choices, outcome in tried:
            if outcome.fidelity != "F1":
                continue
            if self._goal.target_params is None and isinstance(outcome, Measured):
                self._goal = replace(self._goal, target_params=outcome.params)
            self.rewards.append(reward_of(outcome, self._goal))
            if isinstance(outcome, Measured) and np.isfinite(outcome.loss):
                self._measured[choices.tobytes()] = (choices, outcome)
                this.foreseen.append(self._proposed.get(choices.tobytes(), float("nan")))
                this.found.append(float(np.log(max(outcome.loss, 1e-9))))
            else:
                self._failed.add(choices.tobytes())
        if self.parts.surrogate and self._measured:
            measured = self._measured.values()
            losses = np.array([outcome.loss for _, outcome in measured])
            self.surrogate.learn(np.stack([choices for choices, _ in measured]), losses)
        if self.elsewhere is not None and len(self._measured) >= FRESH:
            plans, outcomes = zip(*self._measured.values(), strict=True)
            losses = np.array([outcome.loss for outcome in outcomes])
            self.verdict = take_over(self.agents, self.elsewhere, np.stack(plans), losses)
            self.elsewhere = None
        if self.parts.learns:
            this.updates = [self._teach(index, draws) for index, draws in enumerate(self._pending)]
        self._pending = []
        self._write_down(this)

    def _answers(self, count: int) -> list[Choices]:
        """Return the solver's answer, and for up to half of a first batch of `count` those without a branch."""
        return [self._scene.answer, *solve_without(self._problem, self._budget_ms, count // 2)]

    @property
    def _trusted(self) -> bool:
        return self.parts.surrogate and self.surrogate.trusted

    def _chosen(self, pool: list[Choices], count: int) -> list[Choices]:
        """Return up to `count` plans of the pool, or of what lies near the best, to be evaluated next."""
        if self.parts.surrogate and self.surrogate.fitted:
            pool = self._unseen([*pool, *self._near_the_best()])
            return self._most_expected(np.stack(pool), count) if pool else []
        if self.parts.surrogate and self.parts.warm_start:
            pool = self._half_by_tables(pool)
        return pool[:count]

    def _half_by_tables(self, pool: list[Choices]) -> list[Choices]:
        """Return the pool with its first plan first, then in turn what the tables expect most of and the next drawn.

        While it has no data the surrogate is what the tables say; the other half shows it how plans differ.
        """
        if len(pool) < 2:
            return pool
        best = np.argsort(self.surrogate.expected_by_tables(np.stack(pool[1:])), kind="stable")
        in_turn = (plan for pair in zip((pool[1 + index] for index in best), pool[1:], strict=True) for plan in pair)
        return self._unseen([*pool[:1], *in_turn])

    def _unseen(self, plans: Sequence[Choices]) -> list[Choices]:
        """Return the plans, each once, that were not proposed before."""
        return list({c.tobytes(): c for c in plans if c.tobytes() not in self._proposed}.values())

    def _reward(self, choices: Choices, size_weight: float) -> float | None:
        """Return what a member that weighs size so gets for a plan; None for one that was not evaluated."""
        key = choices.tobytes()
        if key in self._measured:
            return reward_of(self._measured[key][1], replace(self._goal, size_weight=size_weight)).total
        return FAILED_REWARD if key in self._failed else None

    def _teach(self, index: int, draws: Draws) -> dict[str, float]:
        """Let a member learn from those of its draws that were evaluated, then from what the surrogate imagines."""
        agent, statistics = self.agents[index], dict[str, float]()
        rewards = [self._reward(choices, agent.member.size_weight) for choices in draws.choices]
        known = np.array([row for row, reward in enumerate(rewards) if reward is not None], dtype=np.int64)
        if len(known):
            found = np.array([rewards[row] for row in known], dtype=np.float64)
            self._merit[index] = 0.5 * (self._merit[index] + found.mean())
            if len(known) > 1:
                statistics = agent.update(draws.take(known), found)
        if self._trusted and self.parts.warm_start:
            for _ in range(IMAGINED_STEPS):
                statistics = agent.imagine(self.surrogate, IMAGINED)
        return statistics

    def _best(self) -> Choices:
        return min(self._measured.values(), key=lambda known: known[1].loss)[0]

    def _near_the_best(self) -> list[Choices]:
        """Return the neighbours of the best measured plan, and of the plans on the climb from it by the surrogate."""
        current, found = self._best(), list[Choices]()
        expected = float(self.surrogate.mean(current[None])[0])
        for _ in range(CLIMBS):
            near = neighbours(self._problem, current, self._budget_ms)
            if not len(near):
                break
            found += list(near)
            means = self.surrogate.mean(near)
            if means.min() >= expected:
                break
            current, expected = near[means.argmin()], float(means.min())
        return found

    def _most_expected(self, pool: Choices, count: int) -> list[Choices]:
        """Return the plans of the most expected improvement, each as if those before had come out as expected."""
        picked: list[Choices] = []
        surrogate = self.surrogate
        mean, _ = surrogate.predict(pool)
        pool = pool[np.argsort(mean, kind="stable")[:POOL]]
        while len(picked) < count and len(pool):
            mean, deviation = surrogate.predict(pool)
            chosen = int(expected_improvement(mean, deviation, surrogate.best).argmax())
            picked.append(pool[chosen])
            surrogate = surrogate.believing(pool[chosen][None])
            pool = np.delete(pool, chosen, axis=0)
        return picked

    def _write_down(self, this: Round) -> None:
        this.correlation, this.error = self.surrogate.correlation, self.surrogate.error
        this.trusted = self._trusted
        this.weights = np.exp(self._merit).tolist()
        this.octaves = np.mean([agent.high.octaves() for agent in self.agents], axis=0).tolist()
        if self._measured:
            best = self._best()
            feedback = self.surrogate.excess_of_blocks(self._block, len(self._problem.blocks), best)
            this.feedback = feedback.tolist()
            this.budgets_ms = self.budgets(best)[1].tolist()
            if self._trusted and self.parts.learns:
                for agent in self.agents:
                    agent.high.feedback = torch.from_numpy(feedback)[:, None]
        self.rounds.append(this)

    def record(self) -> dict[str, Any]:
        """Return what was learned, as JSON values: gate decisions, foreseen and found log losses, budgets per round."""
        record = {
            "strategy": self.name,
            "blocks": list(self._problem.blocks),
            "rounds": [vars(one) for one in self.rounds],
        }
        return record | ({} if self.verdict is None else {"transfer": vars(self.verdict)})


def blind_to_fisher(problem: Problem) -> Problem:
    """Return the problem with 0 for every decision's Fisher sensitivity."""

    def blinded(features: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(np.arange(len(features)) == FISHER, 0.0, features)

    return replace(problem, decisions=tuple(replace(d, features=blinded(d.features)) for d in problem.decisions))


def neighbours(problem: Problem, choices: Choices, budget_ms: float) -> Choices:
    """Return (n, decisions) the feasible plans one step away in one decision, or in two that move opposite ways.

    A step is to the next option of a width and to any option of a nominal decision. Ways are those of the width, and of
    the time where options have no order.
    """
    moves = [
        (
            index,
            option,
            np.sign(option - choices[index])
            if decision.kind == "width"
            else np.sign(decision.ms[option] - decision.ms[choices[index]]),
        )
        for index, decision in enumerate(problem.decisions)
        for option in range(len(decision.options))
        if option != choices[index] and (decision.kind != "width" or abs(option - choices[index]) == 1)
    ]
    plans = []
    for first, (index, option, up) in enumerate(moves):
        one = choices.copy()
        one[index] = option
        plans.append(one)
        for other, second, way in moves[first + 1 :]:
            if other != index and way != up:
                two = one.copy()
                two[other] = second
                plans.append(two)
    if not plans:
        return np.empty((0, len(choices)), np.int64)
    found = np.stack(plans)
    return found[problem.predict_batch(found) <= budget_ms]
