"""In: a strategy's name. Out: that strategy; those that train no policy are written here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hirelc_deploy.errors import InputError
from hirelc_deploy.outcome import Measured, Outcome
from hirelc_deploy.strategies.hierarchy import MEMBERS, Hierarchy, Parts, neighbours
from hirelc_deploy.strategies.knapsack import (
    check_feasible,
    project,
    smallest,
    solve,
    solve_price,
    tables_around,
    tables_of,
    uncut,
)
from hirelc_deploy.strategies.problem import Choices, Problem, Strategy
from hirelc_deploy.strategies.sampled import Sampled
from hirelc_deploy.strategies.two_stage import TwoStage

ATTEMPTS = 20
"""Draws per new plan asked for, before a strategy admits that it finds no more."""


class RandomChoices:
    """Every option with the same probability, projected in random order: knows the device's times, no losses."""

    name = "random"

    def __init__(self, problem: Problem, budget_ms: float, seed: int) -> None:
        check_feasible(problem, budget_ms)
        self._problem, self._budget_ms = problem, budget_ms
        self._rng = np.random.default_rng(seed)
        self._proposed: set[bytes] = set()

    def propose(self, count: int) -> list[Choices]:
        """Return up to `count` random feasible choices that were not proposed before."""
        return _new_ones(self._draw, count, self._proposed)

    def observe(self, tried: Sequence[tuple[Choices, Outcome]]) -> None:
        """Learn nothing."""

    def _draw(self) -> Choices:
        options = [len(decision.options) for decision in self._problem.decisions]
        return project(self._problem, self._rng.integers(options), self._budget_ms, self._rng)


class Uniform:
    """The same keep ratio everywhere, as large as the budget allows: one proposal for each precision, then none."""

    name = "uniform"

    def __init__(self, problem: Problem, budget_ms: float) -> None:
        check_feasible(problem, budget_ms)
        self._problem, self._budget_ms = problem, budget_ms
        precisions = {str(o): None for d in problem.decisions if d.kind != "width" for o in d.options} or {"": None}
        proposals = [choices for precision in precisions if (choices := self._widest(precision)) is not None]
        self._left = {choices.tobytes(): choices for choices in proposals or [smallest(problem)[0]]}

    def propose(self, count: int) -> list[Choices]:
        """Return the next of its few proposals."""
        return [self._left.pop(key) for key in list(self._left)[:count]]

    def observe(self, tried: Sequence[tuple[Choices, Outcome]]) -> None:
        """Learn nothing."""

    def _at(self, keep_ratio: float, precision: str) -> Choices:
        """Return the choices nearest to a keep ratio, in one precision wherever it is offered."""
        choices = uncut(self._problem)
        for index, decision in enumerate(self._problem.decisions):
            if decision.kind == "width":
                widths = np.array(decision.options, dtype=np.float64)
                choices[index] = int(np.abs(widths - keep_ratio * widths[-1]).argmin())
            elif precision in decision.options:
                choices[index] = decision.options.index(precision)
        return choices

    def _widest(self, precision: str) -> Choices | None:
        """Return the choices at the largest of 1,000 keep ratios that fits, by bisection; None when none does."""
        fits, too_wide = 0, 1001
        if self._problem.predict_ms(self._at(0.0, precision)) > self._budget_ms:
            return None
        while too_wide - fits > 1:
            middle = (fits + too_wide) // 2
            within = self._problem.predict_ms(self._at(middle / 1000, precision)) <= self._budget_ms
            fits, too_wide = (middle, too_wide) if within else (fits, middle)
        return self._at(fits / 1000, precision)


class Taylor:
    """One threshold for what an element is worth within its unit, the lowest whose widths fit the budget.

    Fisher importance (Theis et al. 2018; Molchanov et al. 2019 call it Taylor) relative to the unit's mean, as
    Torch-Pruning's group Taylor. No branch goes by a threshold, and every block keeps the precision of the uncut file;
    where that is still too slow with every unit at its narrowest, the plan nearest to it that fits.
    """

    name = "taylor"

    def __init__(self, problem: Problem, budget_ms: float) -> None:
        check_feasible(problem, budget_ms)
        self._problem, self._budget_ms = problem, budget_ms
        known = [decision.worth for decision in problem.decisions if decision.kind == "width"]
        thresholds = np.unique(np.concatenate([worth[np.isfinite(worth)] for worth in known])) if known else np.zeros(1)
        self._left = [self._lowest(np.append(thresholds, np.inf))]

    def propose(self, count: int) -> list[Choices]:
        """Return its one proposal, once."""
        found, self._left = self._left[:count], self._left[count:]
        return found

    def observe(self, tried: Sequence[tuple[Choices, Outcome]]) -> None:
        """Learn nothing."""

    def _at(self, threshold: float) -> Choices:
        """Return for each width the widest option whose every element reaches the threshold, or the narrowest."""
        choices = uncut(self._problem)
        for index, decision in enumerate(self._problem.decisions):
            if decision.kind == "width":
                reach = np.flatnonzero(np.isfinite(decision.worth) & (decision.worth >= threshold))
                choices[index] = reach[-1] if len(reach) else int(decision.options[0] == 0)
        return choices

    def _lowest(self, thresholds: NDArray[np.float64]) -> Choices:
        """Return the choices at the first threshold that fits, by bisection: widths fall as it rises."""
        low, high = 0, len(thresholds) - 1
        while low < high:
            middle = (low + high) // 2
            fits = self._problem.predict_ms(self._at(thresholds[middle])) <= self._budget_ms
            low, high = (low, middle) if fits else (middle + 1, high)
        found = self._at(thresholds[high])
        fits = self._problem.predict_ms(found) <= self._budget_ms
        return found if fits else project(self._problem, found, self._budget_ms)


class Knapsack:
    """The solver's answer, then the answers for other weights of the losses, kept when they measure better.

    The further proposals follow SPDY (Frantar and Alistarh 2022): each decision's losses are multiplied by a weight,
    the priced problem is solved for these weights, and the weights of the best measured plan are where the next ones
    start from. So the solver, too, uses its evaluations.
    """

    name = "knapsack"

    def __init__(self, problem: Problem, budget_ms: float, seed: int) -> None:
        check_feasible(problem, budget_ms)
        self._problem, self._budget_ms = problem, budget_ms
        self._rng = np.random.default_rng(seed)
        self._answer = solve(problem, budget_ms)
        self._tables = tables_around(problem, self._answer)
        self._log_weights: NDArray[np.float64] = np.zeros(len(problem.decisions))
        self._best_loss = np.inf
        self._weights_of = {self._answer.tobytes(): self._log_weights}
        self._proposed: set[bytes] = set()

    def propose(self, count: int) -> list[Choices]:
        """Return the answer first, then up to `count` answers for perturbed weights that were not proposed before."""
        return _new_ones(self._draw, count, self._proposed)

    def observe(self, tried: Sequence[tuple[Choices, Outcome]]) -> None:
        """Start the next perturbations from the weights of the plan with the least measured loss."""
        for choices, outcome in tried:
            if isinstance(outcome, Measured) and outcome.fidelity == "F1" and outcome.loss < self._best_loss:
                self._best_loss = outcome.loss
                self._log_weights = self._weights_of[choices.tobytes()]

    def _draw(self) -> Choices:
        if not self._proposed:
            return self._answer
        # Sizes of steps differ by a factor of 10: some draws look around the best weights, some leave them.
        step = 10 ** self._rng.uniform(-1.0, 0.0)
        log_weights = self._log_weights + step * self._rng.normal(size=len(self._log_weights))
        tables = replace(self._tables, loss=self._tables.loss * np.exp(log_weights)[:, None])
        priced, _ = solve_price(tables.cheapest, self._problem, self._budget_ms, tables.typical_price)
        choices = project(self._problem, priced, self._budget_ms)
        self._weights_of.setdefault(choices.tobytes(), log_weights)
        return choices


class Greedy:
    """The least sensitive step first, from the uncut model down to the budget; then exchanges around the best plan.

    Sensitivity is the tables' loss per saved millisecond. An exchange narrows one decision by a step and widens
    another; those that the tables think best are measured first, and the best measured plan is the next start.
    """

    name = "greedy"

    def __init__(self, problem: Problem, budget_ms: float) -> None:
        check_feasible(problem, budget_ms)
        self._problem, self._budget_ms = problem, budget_ms
        self._tables = tables_of(problem)
        self._best, self._best_loss = project(problem, uncut(problem), budget_ms), np.inf
        self._proposed: set[bytes] = set()

    def propose(self, count: int) -> list[Choices]:
        """Return the greedy plan first, then untried exchanges around the best plan measured."""
        if not self._proposed:
            plans = [self._best]
        else:
            near = neighbours(self._problem, self._best, self._budget_ms)
            rows = np.arange(near.shape[1])
            order = np.argsort(self._tables.loss[rows, near].sum(axis=1), kind="stable")
            plans = [near[index] for index in order if near[index].tobytes() not in self._proposed][:count]
        self._proposed |= {choices.tobytes() for choices in plans}
        return plans

    def observe(self, tried: Sequence[tuple[Choices, Outcome]]) -> None:
        """Move to the plan with the least measured loss."""
        for choices, outcome in tried:
            if isinstance(outcome, Measured) and outcome.fidelity == "F1" and outcome.loss < self._best_loss:
                self._best, self._best_loss = choices, outcome.loss


def _new_ones(draw: Callable[[], Choices], count: int, proposed: set[bytes]) -> list[Choices]:
    """Return up to `count` draws that are not among the `proposed`, and add them to those."""
    found: list[Choices] = []
    for _ in range(ATTEMPTS * count):
        if len(found) == count:
            break
        choices = draw()
        if choices.tobytes() not in proposed:
            proposed.add(choices.tobytes())
            found.append(choices)
    return found


PARTS: dict[str, Parts] = {
    "hirelc": Parts(),
    "flat": Parts(MEMBERS[:1], high_level=False, surrogate=False),
    "untrained": Parts(surrogate=False, warm_start=False, learns=False),
}
"""Strategies that are a hierarchy, whole, without its upper level and what supports it, and with nothing it knows."""

ABLATIONS: dict[str, Parts] = {
    "hirelc without HLA": Parts(high_level=False),
    "hirelc without Fisher": Parts(fisher=False),
    "hirelc without surrogate": Parts(surrogate=False),
    "hirelc without warm start": Parts(warm_start=False),
    "hirelc with one agent": Parts(MEMBERS[:1]),
    "hirelc without learning": Parts(learns=False),
}
"""The hierarchy without one of its parts, for comparisons only."""


def _hierarchy(name: str, parts: Parts) -> Callable[[Problem, float, int], Strategy]:
    return lambda problem, budget_ms, seed: Hierarchy(problem, budget_ms, seed, name=name, parts=parts)


STRATEGIES: dict[str, Callable[[Problem, float, int], Strategy]] = {
    "hirelc": _hierarchy("hirelc", PARTS["hirelc"]),
    "knapsack": Knapsack,
    "random": RandomChoices,
    "uniform": lambda problem, budget_ms, seed: Uniform(problem, budget_ms),
    "taylor": lambda problem, budget_ms, seed: Taylor(problem, budget_ms),
    "untrained": _hierarchy("untrained", PARTS["untrained"]),
    "flat": _hierarchy("flat", PARTS["flat"]),
    "greedy": lambda problem, budget_ms, seed: Greedy(problem, budget_ms),
    "two-stage": TwoStage,
    "tpe": lambda problem, budget_ms, seed: Sampled("tpe", problem, budget_ms, seed),
    "nsga2": lambda problem, budget_ms, seed: Sampled("nsga2", problem, budget_ms, seed),
}


def make_strategy(name: str, problem: Problem, budget_ms: float, seed: int) -> Strategy:
    """Return the strategy called `name`, one of STRATEGIES or of ABLATIONS.

    Raises:
        InputError: No such strategy, or a problem with nothing to decide.
        ConstraintError: Even the smallest options miss the budget.
    """
    if name not in STRATEGIES | ABLATIONS:
        raise InputError(f"strategy {name!r} is unknown; use one of {', '.join(STRATEGIES)}.")
    if not problem.decisions:
        raise InputError("search: nothing in this model can be cut on this target; `inspect` lists the reasons.")
    make = STRATEGIES.get(name) or _hierarchy(name, ABLATIONS[name])
    return make(problem, budget_ms, seed)
