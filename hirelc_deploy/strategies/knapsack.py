"""In: a problem and a time budget. Out: choices within that budget, by solving its tables and repairing the answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hirelc_deploy.errors import ConstraintError
from hirelc_deploy.strategies.problem import Choices, Problem

Table = NDArray[np.float64]
"""(decisions, options): one number per option; a decision with fewer options than the widest is filled up."""

MAX_STATES = 2000
"""Partial solutions the exact solver keeps; beyond that it thins them to one per 1/2000 of the time range."""

ROUNDS = 5
"""How often the tables are taken anew around the last answer; in practice the answer stands after two or three."""


@dataclass(frozen=True)
class Tables:
    """An additive picture of a problem around one point.

    Attributes:
        loss: Rise of the loss over the uncut float model; inf where there is no such option.
        ms: Change of the predicted time when only this decision leaves `around`; 0 where there is no such option.
        around: The choices at which `ms` was taken.
        around_ms: Predicted time there.
    """

    loss: Table
    ms: Table
    around: Choices
    around_ms: float

    @property
    def offered(self) -> NDArray[np.bool_]:
        """Return (decisions, options): which entries are real options."""
        return np.isfinite(self.loss)

    @property
    def typical_price(self) -> float:
        """Return a price, in loss per ms, of the order at which options change."""
        return float(np.abs(self.loss[self.offered]).sum() / max(np.abs(self.ms).sum(), 1e-12)) or 1.0

    def cheapest(self, price: float) -> Choices:
        """Return for each decision the option with the least loss + price * ms."""
        return np.asarray((self.loss + price * self.ms).argmin(axis=1), dtype=np.int64)

    def additive_loss(self, choices: Choices) -> float:
        """Return the summed loss of the choices: a prediction, blind to how decisions act together."""
        return float(self.loss[np.arange(len(choices)), choices].sum())


def uncut(problem: Problem) -> Choices:
    """Return the choices of the uncut model: the last option everywhere."""
    return np.array([len(decision.options) - 1 for decision in problem.decisions], dtype=np.int64)


def _padded(rows: list[NDArray[np.float64]], fill: float) -> Table:
    table = np.full((len(rows), max(map(len, rows))), fill)
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return table


def tables_of(problem: Problem) -> Tables:
    """Return the tables as they were taken, around the uncut model. An option whose loss is NaN is not offered."""
    loss = _padded([np.where(np.isnan(d.loss), np.inf, d.loss) for d in problem.decisions], np.inf)
    return Tables(loss, _padded([d.ms for d in problem.decisions], 0.0), uncut(problem), problem.uncut_ms)


def tables_around(problem: Problem, choices: Choices) -> Tables:
    """Return the tables with the time of every single change predicted at `choices`."""
    tables = tables_of(problem)
    index, option = np.nonzero(tables.offered)
    changed = np.repeat(choices[None], len(index), axis=0)
    changed[np.arange(len(index)), index] = option
    here = problem.predict_ms(choices)
    ms = np.zeros_like(tables.ms)
    ms[index, option] = problem.predict_batch(changed) - here
    return Tables(tables.loss, ms, choices.copy(), here)


def _with(choices: Choices, index: int, option: int) -> Choices:
    changed = choices.copy()
    changed[index] = option
    return changed


def smallest(problem: Problem) -> tuple[Choices, float]:
    """Return the fastest choices that single changes can reach, and their predicted milliseconds."""
    tables = tables_of(problem)
    choices = np.where(tables.offered, tables.ms, np.inf).argmin(axis=1).astype(np.int64)
    while True:
        here = tables_around(problem, choices)
        saving = np.where(here.offered, here.ms, 0.0)
        index, option = np.unravel_index(int(saving.argmin()), saving.shape)
        if saving[index, option] >= -1e-12 * here.around_ms:
            return choices, here.around_ms
        choices = _with(choices, int(index), int(option))


def check_feasible(problem: Problem, budget_ms: float) -> float:
    """Return the shortest time the options can reach; raises ConstraintError when the budget asks for less."""
    _, shortest_ms = smallest(problem)
    if shortest_ms > budget_ms:
        raise ConstraintError(
            f"The limit of {budget_ms:.4g} ms cannot be met: with the smallest widths and the fastest precision this "
            f"model is predicted to take {shortest_ms:.4g} ms (uncut {problem.uncut_ms:.4g} ms). "
            f"Allow at least {shortest_ms:.4g} ms, or choose a smaller model."
        )
    return shortest_ms


def project(problem: Problem, choices: Choices, budget_ms: float, rng: np.random.Generator | None = None) -> Choices:
    """Return choices near the given ones whose predicted time is within the budget.

    Over the budget, it takes away the milliseconds that cost the least loss by the tables, one change at a time; then
    it gives back what slack is left, one step of one decision at a time, the best loss per millisecond first.

    Args:
        problem: Its `predict_ms` decides what fits; the tables only order the changes.
        choices: (decisions,) any legal choices.
        budget_ms: Limit on the predicted time.
        rng: With a generator the changes are taken in random order and the losses are not looked at: the
            projection of a strategy that must know nothing.

    Raises:
        ConstraintError: Even the smallest options miss the budget.
    """
    tables = tables_of(problem)
    current = choices.astype(np.int64)
    current_ms = problem.predict_ms(current)
    while current_ms > budget_ms:
        for index, option in _cheaper(tables, current, rng):
            candidate = _with(current, index, option)
            candidate_ms = problem.predict_ms(candidate)
            if candidate_ms < current_ms:
                break
        else:
            check_feasible(problem, budget_ms)
            candidate, candidate_ms = smallest(problem)
        current, current_ms = candidate, candidate_ms
    return _give_back(problem, tables, current, budget_ms, rng)


def _cheaper(tables: Tables, choices: Choices, rng: np.random.Generator | None) -> list[tuple[int, int]]:
    """Return the changes that save time by the tables, cheapest loss per saved millisecond first."""
    rows = np.arange(len(choices))
    saved = tables.ms[rows, choices][:, None] - tables.ms
    added_loss = tables.loss - tables.loss[rows, choices][:, None]
    index, option = np.nonzero(tables.offered & (saved > 0))
    if rng is None:
        order = np.argsort(added_loss[index, option] / saved[index, option], kind="stable")
    else:
        order = rng.permutation(len(index))
    return [(int(index[i]), int(option[i])) for i in order]


def _give_back(
    problem: Problem, tables: Tables, choices: Choices, budget_ms: float, rng: np.random.Generator | None
) -> Choices:
    """Return the choices after every next step that still fits; a step that does not fit is not asked about again."""
    current = choices
    too_long: set[int] = set()
    while True:
        steps = [step for step in _next_steps(tables, current, rng) if step[0] not in too_long]
        if not steps:
            return current
        index, option = steps[0]
        candidate = _with(current, index, option)
        if problem.predict_ms(candidate) <= budget_ms:
            current = candidate
        else:
            too_long.add(index)


def _next_steps(tables: Tables, choices: Choices, rng: np.random.Generator | None) -> list[tuple[int, int]]:
    """Return for each decision its nearest slower option that lowers the loss, best loss per millisecond first."""
    rows = np.arange(len(choices))
    added = tables.ms - tables.ms[rows, choices][:, None]
    gained = tables.loss[rows, choices][:, None] - tables.loss
    allowed = tables.offered & (added > 0) if rng is not None else tables.offered & (added > 0) & (gained > 0)
    movable = np.flatnonzero(allowed.any(axis=1))
    option = np.where(allowed, added, np.inf).argmin(axis=1)
    if rng is None:
        worth = gained[movable, option[movable]] / added[movable, option[movable]]
        movable = movable[np.argsort(-worth, kind="stable")]
    else:
        movable = rng.permutation(movable)
    return [(int(index), int(option[index])) for index in movable]


def solve_additive(tables: Tables, budget_ms: float) -> Choices | None:
    """Return the choices of least summed loss whose summed time fits the budget; None when nothing fits.

    A multiple-choice knapsack, decision by decision over the partial sums that are not dominated (Nemhauser and
    Ullmann 1969). Exact while there are at most MAX_STATES of them; then one per slice of the time range is kept, and
    sums of time stay exact, so the answer always fits.
    """
    ms = np.where(tables.offered, tables.ms, np.inf)
    least_after = np.append(np.cumsum(ms.min(axis=1)[::-1])[::-1][1:], 0.0)
    room = budget_ms - tables.around_ms
    state_ms, state_loss = np.zeros(1), np.zeros(1)
    trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for row_ms, row_loss, rest_ms in zip(ms, tables.loss, least_after, strict=True):
        next_ms = (state_ms[:, None] + row_ms).ravel()
        next_loss = (state_loss[:, None] + row_loss).ravel()
        fits = np.flatnonzero(next_ms + rest_ms <= room + 1e-9 * abs(budget_ms))
        if not len(fits):
            return None
        keep = _undominated(next_ms, next_loss, fits)
        trail.append((keep // len(row_ms), keep % len(row_ms)))
        state_ms, state_loss = next_ms[keep], next_loss[keep]
    state = int(state_loss.argmin())
    choices = np.zeros(len(trail), dtype=np.int64)
    for index in reversed(range(len(trail))):
        parent, option = trail[index]
        choices[index], state = option[state], int(parent[state])
    return choices


def _undominated(ms: NDArray[np.float64], loss: NDArray[np.float64], among: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return, in order of time, the indices that nothing faster beats on loss; at most about MAX_STATES of them."""
    order = among[np.lexsort((loss[among], ms[among]))]
    best_before = np.minimum.accumulate(np.append(np.inf, loss[order]))[:-1]
    front = order[loss[order] < best_before]
    if len(front) <= MAX_STATES:
        return front
    span = ms[front[-1]] - ms[front[0]]
    piece = np.floor((ms[front] - ms[front[0]]) / span * MAX_STATES)
    thinned: NDArray[np.int64] = front[np.append(piece[1:] != piece[:-1], True)]
    return thinned


def solve(problem: Problem, budget_ms: float) -> Choices:
    """Return the choices of least summed loss within the budget, with times that fit together.

    A layer's time depends on the widths at both of its ends, so the tables are taken again around each answer, and
    solved again, until the answer stands. The best projected answer by summed loss is kept.

    Raises:
        ConstraintError: Even the smallest options miss the budget.
    """
    tables = tables_of(problem)
    best = project(problem, tables.around, budget_ms)
    for _ in range(ROUNDS):
        answer = solve_additive(tables, budget_ms)
        # The last tables may call the budget hopeless although it is not; then they are taken around the best so far.
        answer = best if answer is None else project(problem, answer, budget_ms)
        if tables.additive_loss(answer) < tables.additive_loss(best):
            best = answer
        if np.array_equal(answer, tables.around):
            break
        tables = tables_around(problem, answer)
    return best


FORCED = 1e3
"""Nats that an option is made cheaper by, so that every answer takes it."""


def solve_without(problem: Problem, budget_ms: float, most: int) -> list[Choices]:
    """Return the solver's answers when one branch is left out, at most so many, least summed loss first.

    Alone a branch may cost as much as all the cuts of an answer together; beside them it often does not.
    """
    tables, found = tables_of(problem), list[Choices]()
    for index, decision in enumerate(problem.decisions):
        if decision.options[0] == 0:
            loss = decision.loss - FORCED * (np.arange(len(decision.loss)) == 0)
            forced = replace(decision, loss=loss)
            decisions = *problem.decisions[:index], forced, *problem.decisions[index + 1 :]
            found.append(solve(replace(problem, decisions=decisions), budget_ms))
    different = {answer.tobytes(): answer for answer in found}
    return sorted(different.values(), key=tables.additive_loss)[:most]


def solve_price(
    pick: Callable[[float], Choices], problem: Problem, budget_ms: float, start: float
) -> tuple[Choices, float]:
    """Return the choices at the lowest price per millisecond that fits, and that price; see `solve_prices`."""
    choices, prices = solve_prices(lambda price: pick(float(price[0]))[None], problem, budget_ms, np.array([start]))
    return choices[0], float(prices[0])


def solve_prices(
    pick: Callable[[NDArray[np.float64]], Choices], problem: Problem, budget_ms: float, start: NDArray[np.float64]
) -> tuple[Choices, NDArray[np.float64]]:
    """Return for each of n plans its choices at the lowest price that fits the budget, and that price, by bisection.

    Args:
        pick: (n,) prices (loss per ms, 0 or more) to (n, decisions) choices; their times fall as the prices rise.
        problem: Predicts the times.
        budget_ms: Limit on the predicted time.
        start: (n,) positive prices to begin with, of the right order of magnitude.

    Returns:
        (n, decisions) and (n,). Where no price fits, the choices at a very high one: the caller projects them.
    """

    def fit(choices: Choices) -> NDArray[np.bool_]:
        return problem.predict_batch(choices) <= budget_ms

    free = pick(np.zeros(len(start)))
    costs_nothing = fit(free)
    low, high = np.zeros(len(start)), start.astype(np.float64)
    chosen = pick(high)
    for _ in range(40):
        too_long = ~fit(chosen) & ~costs_nothing
        if not too_long.any():
            break
        low, high = np.where(too_long, high, low), np.where(too_long, 4 * high, high)
        chosen = pick(high)
    for _ in range(30):
        if (costs_nothing | ((low > 0) & (high < 1.001 * low))).all():
            break
        middle = np.where(low > 0, np.sqrt(low * high), high / 4)
        candidate = pick(middle)
        fits = fit(candidate)
        chosen = np.where(fits[:, None], candidate, chosen)
        low, high = np.where(fits, low, middle), np.where(fits, middle, high)
    return np.where(costs_nothing[:, None], free, chosen), np.where(costs_nothing, 0.0, high)
