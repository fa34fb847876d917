"""In: the trials of a run and the tables they were searched with. Out: how far tables, F1, F2 and F3 agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hirelc_deploy.outcome import Measured
from hirelc_deploy.runs import TrialRecord
from hirelc_deploy.strategies.knapsack import tables_of
from hirelc_deploy.strategies.problem import Problem
from hirelc_deploy.strategies.surrogate import rank_correlation


def agreement(problem: Problem, trials: Sequence[TrialRecord], reference_ms: float) -> dict[str, Any]:
    """Return what is left to learn: how far the sums of the tables are from what whole networks showed.

    Returns:
        `loss`: plans that cut at least two units, the median and the 5 and 95 % quantiles of measured (F1) over summed
        loss, and the rank correlation. `ms`: files, and the median and largest relative error of their predicted time.
        `f1_f3`: rank correlation of the losses before and after recovery. A part without at least two plans is None.
    """
    if not problem.decisions:
        return dict.fromkeys(("loss", "ms", "f1_f3"))
    summed, found, errors = [], [], []
    additive = tables_of(problem)
    losses: dict[str, dict[str, float]] = {"F1": {}, "F3": {}}
    for trial in trials:
        outcome, choices = trial.outcome, problem.choices_of(trial.plan)
        if not isinstance(outcome, Measured) or choices is None:
            continue
        if trial.fidelity in losses:
            losses[trial.fidelity][trial.plan.digest] = outcome.loss
        if trial.fidelity == "F1" and len(trial.plan.keep) > 1:
            summed.append(additive.additive_loss(choices))
            found.append(outcome.loss)
        if outcome.ratio is not None and trial.plan.default_precision == "auto":
            errors.append(abs(problem.predict_ms(choices) / (outcome.ratio * reference_ms) - 1))
    both = sorted(losses["F1"].keys() & losses["F3"].keys())
    ratio = np.array(found) / np.maximum(summed, 1e-12)
    return {
        "loss": {
            "plans": len(found),
            "measured_over_summed_median": float(np.median(ratio)),
            "measured_over_summed_5_to_95": np.quantile(ratio, (0.05, 0.95)).tolist(),
            "spearman": rank_correlation(np.array(summed), np.array(found)),
        }
        if len(found) > 1
        else None,
        "ms": {"files": len(errors), "median_error": float(np.median(errors)), "largest_error": max(errors)}
        if len(errors) > 1
        else None,
        "f1_f3": {
            "plans": len(both),
            "spearman": rank_correlation(*(np.array([losses[f][p] for p in both]) for f in ("F1", "F3"))),
        }
        if len(both) > 1
        else None,
    }
