"""In: a sampler of Optuna. Out: a strategy that asks it for plans and tells it what came of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hirelc_deploy.errors import InputError
from hirelc_deploy.outcome import Measured, Outcome
from hirelc_deploy.strategies.knapsack import check_feasible, project, solve
from hirelc_deploy.strategies.problem import Choices, Problem

ATTEMPTS = 20
"""Plans asked for per new one wanted: a projection maps many to one."""

POPULATION = 16
"""Of NSGA-II: Optuna's 50 would be random search at the evaluations a search has."""


class Sampled:
    """TPE or NSGA-II over the option indices, with the solver's answer as its first trial.

    What a sampler asks for is projected into the budget, and it is told what came of the projection. TPE is told the
    loss, NSGA-II the loss and the predicted time.
    """

    def __init__(self, name: str, problem: Problem, budget_ms: float, seed: int) -> None:
        try:
            import optuna
        except ImportError:
            raise InputError(
                f"strategy {name}: Optuna is not installed; `pip install 'hirelc-deploy[optuna]'` brings it."
            ) from None
        check_feasible(problem, budget_ms)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.name = name
        self._problem, self._budget_ms, self._failed = problem, budget_ms, optuna.trial.TrialState.FAIL
        self._spaces = {
            f"{index} {decision.name}": optuna.distributions.IntDistribution(0, len(decision.options) - 1)
            if decision.kind == "width"
            else optuna.distributions.CategoricalDistribution(range(len(decision.options)))
            for index, decision in enumerate(problem.decisions)
        }
        if name == "tpe":
            sampler: Any = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        else:
            sampler = optuna.samplers.NSGAIISampler(seed=seed, population_size=POPULATION)
        self._study = optuna.create_study(sampler=sampler, directions=["minimize"] * (1 if name == "tpe" else 2))
        self._study.enqueue_trial(dict(zip(self._spaces, solve(problem, budget_ms).tolist(), strict=True)))
        self._pending: dict[bytes, Any] = {}
        self._values: dict[bytes, list[float] | None] = {}

    def propose(self, count: int) -> list[Choices]:
        """Return up to `count` feasible choices that were not proposed before."""
        found: list[Choices] = []
        for _ in range(ATTEMPTS * count):
            if len(found) == count:
                break
            trial = self._study.ask(self._spaces)
            asked = np.array([trial.params[name] for name in self._spaces], dtype=np.int64)
            choices = project(self._problem, asked, self._budget_ms)
            key = choices.tobytes()
            if key in self._values:
                self._tell(trial, self._values[key])
            elif key in self._pending:
                self._tell(trial, None)
            else:
                self._pending[key] = trial
                found.append(choices)
        return found

    def observe(self, tried: Sequence[tuple[Choices, Outcome]]) -> None:
        """Tell the sampler what came of its plans."""
        for choices, outcome in tried:
            key = choices.tobytes()
            if key in self._pending:
                self._values[key] = self._value(choices, outcome)
                self._tell(self._pending.pop(key), self._values[key])

    def _value(self, choices: Choices, outcome: Outcome) -> list[float] | None:
        if not isinstance(outcome, Measured) or not np.isfinite(outcome.loss):
            return None
        return [outcome.loss] if self.name == "tpe" else [outcome.loss, self._problem.predict_ms(choices)]

    def _tell(self, trial: Any, values: list[float] | None) -> None:
        if values is None:
            self._study.tell(trial, state=self._failed)
        else:
            self._study.tell(trial, values)
