"""In: a problem, budgets, strategies and seeds. Out: what each found with equal evaluations, with tests and a page."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from hirelc_deploy.outcome import Measured
from hirelc_deploy.results.scatter import log_ticks, ticks
from hirelc_deploy.runs import json_text, write_atomic
from hirelc_deploy.strategies.baselines import make_strategy
from hirelc_deploy.strategies.hierarchy import Hierarchy
from hirelc_deploy.strategies.loop import SearchResult, run_search
from hirelc_deploy.strategies.problem import Evaluate, Problem

SCHEMA_VERSION = 1

RESAMPLES = 2000
"""Of a bootstrap."""

EXACT = 14
"""Pairs up to which every one of the 2^n sign patterns is tried; beyond, 2^14 random ones."""


@dataclass(frozen=True)
class Search:
    """One search of a comparison.

    Attributes:
        losses, ms: Of its F1 evaluations in order: loss (nats; inf for a failure), predicted milliseconds.
        files: Its F2 evaluations, as `loss`, `accuracy`, `ratio`.
        best_plan: The plan of least loss at F1, as `CompressionPlan.to_dict`; empty where nothing was measured.
        rivals: It, and the best plans that leave out other branches, best first; see `SearchResult.rivals`.
        thinking_seconds: Processor time outside evaluation.
        evaluating_seconds: Processor time inside; little where the journal answers.
        charged_seconds: What its evaluations took when they were done, whoever asked for them first.
        record: What a hierarchy wrote down; empty for others.
    """

    strategy: str
    seed: int
    budget_ms: float
    losses: tuple[float, ...]
    ms: tuple[float, ...]
    files: tuple[Mapping[str, Any], ...]
    best_plan: Mapping[str, Any]
    rivals: tuple[Mapping[str, Any], ...]
    thinking_seconds: float
    evaluating_seconds: float
    record: Mapping[str, Any]
    charged_seconds: float = 0.0

    @property
    def best_loss(self) -> float:
        """Return the least loss at F1."""
        return min(self.losses)


def run_all(
    problem: Problem,
    budgets_ms: Sequence[float],
    strategies: Sequence[str],
    seeds: Sequence[int],
    evaluate: Evaluate,
    *,
    f1_evaluations: int,
    f2_evaluations: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Search]:
    """Run every strategy with every seed at every budget, all with the same number of evaluations.

    Whatever one search has evaluated another gets from the journal behind `evaluate`, and both are charged for it.
    """
    searches = []
    for seed, budget_ms, name in itertools.product(seeds, budgets_ms, strategies):
        strategy = make_strategy(name, problem, budget_ms, seed)
        result = run_search(
            problem,
            strategy,
            evaluate,
            f1_evaluations=f1_evaluations,
            f2_evaluations=f2_evaluations,
            clock=time.process_time,
        )
        record = strategy.record() if isinstance(strategy, Hierarchy) else {}
        searches.append(_search_of(result, problem, seed, budget_ms, record))
        progress(f"{name}, seed {seed}, {budget_ms:.4g} ms: loss {searches[-1].best_loss:.4g}")
    return searches


def _search_of(
    result: SearchResult, problem: Problem, seed: int, budget_ms: float, record: Mapping[str, Any]
) -> Search:
    first = [trial for trial in result.trials if trial.fidelity == "F1"]
    files = [trial.outcome for trial in result.trials if trial.fidelity == "F2"]
    best = result.ranked("F1")[:1]
    return Search(
        result.strategy,
        seed,
        budget_ms,
        tuple(t.outcome.loss if isinstance(t.outcome, Measured) else float("inf") for t in first),
        tuple(problem.predict_ms(t.choices) for t in first),
        tuple({"loss": f.loss, "accuracy": f.accuracy, "ratio": f.ratio} for f in files if isinstance(f, Measured)),
        best[0].plan.to_dict() if best else {},
        tuple(plan.to_dict() for plan in result.rivals()),
        result.seconds - result.seconds_evaluating,
        result.seconds_evaluating,
        record,
        sum(sum(trial.outcome.seconds.values()) for trial in result.trials),
    )


def summarise(searches: Sequence[Search], uncut_ms: float, ours: str) -> dict[str, Any]:
    """Return the comparison as JSON values.

    Args:
        uncut_ms: Predicted time of the uncut model: the right edge of the hypervolume's box.
        ours: The strategy that all others are tested against.
    """
    names = list(dict.fromkeys(search.strategy for search in searches))
    length = max(len(search.losses) for search in searches)
    rng = np.random.default_rng(0)
    box = _box(searches, uncut_ms)
    found: dict[str, Any] = {}
    best = {name: _by_pair(searches, name) for name in names}
    for name in names:
        own = [search for search in searches if search.strategy == name]
        curves = np.stack([best_so_far(search.losses, length) for search in own])
        seeds = sorted({search.seed for search in own})
        volumes = np.array([hypervolume([s for s in own if s.seed == seed], box) for seed in seeds])
        found[name] = {
            "searches": len(own),
            "evaluations": sorted({len(search.losses) for search in own}),
            "within_budget": sum(ms <= s.budget_ms * (1 + 1e-9) for s in own for ms in s.ms),
            "plans": sum(len(search.ms) for search in own),
            "best_loss_mean": float(np.exp(curves[:, -1].mean())),
            "curve": np.exp(curves.mean(axis=0)).tolist(),
            "curve_low": np.exp(_interval(curves, rng)[0]).tolist(),
            "curve_high": np.exp(_interval(curves, rng)[1]).tolist(),
            "hypervolume": float(volumes.mean()),
            "hypervolume_low": float(_interval(volumes[:, None], rng)[0][0]),
            "hypervolume_high": float(_interval(volumes[:, None], rng)[1][0]),
            "thinking_seconds_per_search": float(np.mean([search.thinking_seconds for search in own])),
            "evaluating_seconds_per_search": float(np.mean([search.evaluating_seconds for search in own])),
            "at_budget": [_at_budget(own, budget_ms, rng) for budget_ms in sorted({s.budget_ms for s in own})],
        }
        if name != ours and ours in best:
            found[name]["against_ours"] = paired_test(best[ours], best[name])
    return {
        "schema_version": SCHEMA_VERSION,
        "ours": ours,
        "budgets_ms": sorted({search.budget_ms for search in searches}, reverse=True),
        "uncut_ms": uncut_ms,
        "seeds": sorted({search.seed for search in searches}),
        "strategies": found,
        "searches": [asdict(search) for search in searches],
    }


def _at_budget(own: Sequence[Search], budget_ms: float, rng: np.random.Generator) -> dict[str, Any]:
    """Return what one strategy found at one budget: its best losses, and of its best files accuracy and ratio."""
    here = [search for search in own if search.budget_ms == budget_ms]
    losses = np.log([[search.best_loss] for search in here])
    low, high = _interval(losses, rng)
    files = [min(search.files, key=lambda file: file["loss"]) for search in here if search.files]
    found: dict[str, Any] = {
        "budget_ms": budget_ms,
        "best_loss": float(np.exp(losses.mean())),
        "best_loss_low": float(np.exp(low[0])),
        "best_loss_high": float(np.exp(high[0])),
    }
    for key in ("accuracy", "ratio"):
        values = np.array([[file[key]] for file in files if file[key] is not None])
        if len(values):
            low, high = _interval(values, rng)
            found |= {key: float(values.mean()), f"{key}_low": float(low[0]), f"{key}_high": float(high[0])}
    return found


def best_so_far(losses: Sequence[float], length: int) -> NDArray[np.float64]:
    """Return (length,) log of the least loss after each evaluation; a search that ended early keeps its last."""
    best = np.minimum.accumulate(np.log(np.maximum(np.minimum(losses, 1e3), 1e-9)))
    return np.concatenate([best, np.full(length - len(best), best[-1])])


def _by_pair(searches: Sequence[Search], name: str) -> dict[tuple[int, float], float]:
    return {(s.seed, s.budget_ms): float(np.log(s.best_loss)) for s in searches if s.strategy == name}


def paired_test(ours: Mapping[Any, float], theirs: Mapping[Any, float]) -> dict[str, float]:
    """Return how ours differs from theirs over the pairs that both have, and the p-value of a sign-flip test.

    `log_ratio` is the mean of log(our loss / their loss), below 0 where ours is better; `p` is two-sided: the share of
    sign patterns of the differences whose mean is at least as far from 0 (Fisher's permutation test for pairs).
    """
    pairs = sorted(ours.keys() & theirs.keys())
    differences = np.array([ours[pair] - theirs[pair] for pair in pairs])
    count = len(differences)
    if count <= EXACT:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=count)))
    else:
        signs = np.random.default_rng(0).choice((1.0, -1.0), size=(2**EXACT, count))
        signs[0] = 1.0
    means = np.abs(signs @ differences) / count
    return {
        "pairs": count,
        "log_ratio": float(differences.mean()),
        "better": int((differences < -1e-12).sum()),
        "worse": int((differences > 1e-12).sum()),
        "p": float((means >= abs(differences.mean()) - 1e-12).mean()),
    }


def _interval(samples: NDArray[np.float64], rng: np.random.Generator) -> tuple[NDArray[np.float64], ...]:
    """Return the 95 % bootstrap interval of the mean over the first axis."""
    rows = rng.integers(len(samples), size=(RESAMPLES, len(samples)))
    means = samples[rows].mean(axis=1)
    return tuple(np.quantile(means, (0.025, 0.975), axis=0))


def _box(searches: Sequence[Search], uncut_ms: float) -> tuple[float, float, float, float]:
    """Return (least ms, most ms, least log loss, most log loss) of what hypervolumes are a share of.

    The worst loss is the worst that any search ended with, so that one collapsed plan does not set the scale.
    """
    ends = np.log([search.best_loss for search in searches if np.isfinite(search.best_loss)])
    return min(min(search.ms) for search in searches), uncut_ms, float(ends.min()), float(ends.max()) + 0.1


def hypervolume(searches: Sequence[Search], box: tuple[float, float, float, float]) -> float:
    """Return the share of the box in which something found is both as fast and as good, in [0, 1]."""
    fastest, slowest, least, most = box
    points = sorted(
        (max(ms, fastest), max(float(np.log(loss)), least))
        for search in searches
        for ms, loss in zip(search.ms, search.losses, strict=True)
        if np.isfinite(loss) and ms < slowest and np.log(max(loss, 1e-9)) < most
    )
    area, height = 0.0, most
    for ms, log_loss in points:
        if log_loss < height:
            area += (slowest - ms) * (height - log_loss)
            height = log_loss
    return area / ((slowest - fastest) * (most - least))


@dataclass(frozen=True)
class Curve:
    """A line of the page in pixels: `path` of the mean, `band` around it, `y` where it ends."""

    name: str
    path: str
    band: str
    y: float


def write_page(summary: Mapping[str, Any], title: str, path: Path) -> Path:
    """Write the comparison as one self-contained HTML file."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hirelc_deploy.results", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    strategies = summary["strategies"]
    width, height, left, right, top, bottom = 860, 420, 60, 700, 16, 380
    lows = [value for one in strategies.values() for value in one["curve_low"]]
    starts = [one["curve"][min(7, len(one["curve"]) - 1)] for one in strategies.values()]
    low, high = min(lows) / 1.05, max(starts) * 1.1
    length = max(len(one["curve"]) for one in strategies.values())

    def across(index: int) -> float:
        return round(left + (right - left) * index / max(length - 1, 1), 1)

    def down(loss: float) -> float:
        share = np.log(min(max(loss, low), high) / low) / np.log(high / low)
        return round(float(bottom - (bottom - top) * share), 1)

    def line(values: Sequence[float]) -> str:
        return "L".join(f"{across(i)},{down(v)}" for i, v in enumerate(values))

    curves = []
    for name, one in strategies.items():
        back = "L".join(f"{across(i)},{down(v)}" for i, v in reversed(list(enumerate(one["curve_high"]))))
        band = f"M{line(one['curve_low'])}L{back}z"
        curves.append(Curve(name, f"M{line(one['curve'])}", band, down(one["curve"][-1])))
    curves.sort(key=lambda curve: curve.y)
    label_y = itertools.accumulate((c.y for c in curves), lambda above, y: max(above + 15, y))
    page = environment.get_template("compare.html.j2").render(
        title=title,
        summary=summary,
        rows=sorted(strategies.items(), key=lambda item: item[1]["best_loss_mean"]),
        curves=list(zip(curves, label_y, strict=True)),
        size=(width, height, left, right, top, bottom),
        x_ticks=[(across(int(tick) - 1), int(tick)) for tick in ticks(1, max(length, 2), count=6) if tick == int(tick)],
        y_ticks=[(down(tick), f"{tick:g}") for tick in log_ticks(low, high)],
    )
    write_atomic(path, page)
    return path


def write_json(summary: Mapping[str, Any], path: Path) -> Path:
    """Write the comparison as JSON."""
    write_atomic(path, json_text(summary, indent=1) + "\n")
    return path
