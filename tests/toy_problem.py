"""In: a seed. Out: a made-up problem whose times multiply and whose losses interact, with an evaluation to match."""

from __future__ import annotations

import itertools

import numpy as np

from hirelc_deploy.outcome import Fidelity, Measured, Outcome
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.strategies.problem import Choices, Decision, Problem

WIDTHS = (2, 4, 6, 8, 10)


class Toy:
    """A chain of layers in blocks; layer i takes time in proportion to the widths at both of its ends.

    The loss of a plan is the sum of the single losses plus, for every pair within a block, a term that tables of single
    changes cannot see: some pairs may not be cut together, others cost less together than alone.
    """

    def __init__(self, seed: int, *, blocks: int = 6, per_block: int = 3, interaction: float = 1.0) -> None:
        rng = np.random.default_rng(seed)
        count = blocks * per_block
        self.block_names = tuple(f"block{b}" for b in range(blocks))
        self.block = np.repeat(np.arange(blocks), per_block)
        self.cost = rng.uniform(0.5, 2.0, count + 1)
        self.weight = np.exp(rng.normal(0.0, 0.7, count))
        self.pairs = [
            (i, j, interaction * rng.choice([-0.8, 3.0]) * np.sqrt(self.weight[i] * self.weight[j]))
            for i, j in itertools.combinations(range(count), 2)
            if self.block[i] == self.block[j]
        ]
        self.calls: list[tuple[str, Fidelity]] = []
        self.problem = self._problem(rng)

    def keep(self, choices: Choices) -> np.ndarray:
        return np.array(WIDTHS)[choices] / WIDTHS[-1]

    def times(self, choices: Choices) -> np.ndarray:
        ends = np.ones((len(choices), 1))
        widths = np.concatenate([ends, self.keep(choices), ends], axis=1)
        return 0.5 + (self.cost * widths[:, :-1] * widths[:, 1:]).sum(axis=1)

    def ms(self, choices: Choices) -> float:
        return float(self.times(choices[None])[0])

    def loss(self, choices: Choices) -> float:
        cut = 1.0 - self.keep(choices)
        single = float((self.weight * cut**2).sum())
        return single + max(-0.7 * single, sum(w * cut[i] * cut[j] * max(cut[i], cut[j]) for i, j, w in self.pairs))

    def evaluate(self, plan: CompressionPlan, fidelity: Fidelity) -> Outcome:
        self.calls.append((plan.digest, fidelity))
        choices = np.array([WIDTHS.index(plan.keep[d.name]) for d in self.problem.decisions])
        ms = self.ms(choices)
        if fidelity == "F1":
            return Measured(plan.digest, fidelity, self.loss(choices), None, 100, 1000, predicted_ms=ms)
        return Measured(
            plan.digest, fidelity, self.loss(choices), None, 100, 1000, median_ms=ms, ratio=ms / 10, size_bytes=400
        )

    def _problem(self, rng: np.random.Generator) -> Problem:
        count = len(self.weight)
        top = np.full(count, len(WIDTHS) - 1)
        uncut_ms = self.ms(top)
        decisions = []
        for index in range(count):
            single = [np.where(np.arange(count) == index, option, top) for option in range(len(WIDTHS))]
            decisions.append(
                Decision(
                    name=f"unit{index}",
                    kind="width",
                    block=self.block_names[self.block[index]],
                    options=WIDTHS,
                    loss=np.array([self.loss(choices) for choices in single]),
                    ms=np.array([self.ms(choices) - uncut_ms for choices in single]),
                    size_bytes=np.array(WIDTHS, dtype=np.float64) - WIDTHS[-1],
                    features=np.array([index / count, np.log(self.weight[index]), rng.normal()]),
                    worth=self.weight[index] * np.linspace(1.0, 0.1, len(WIDTHS)),
                )
            )
        return Problem(
            self.block_names, tuple(decisions), uncut_ms, self.times, lambda choices: plan_of(tuple(decisions), choices)
        )


def plan_of(decisions: tuple[Decision, ...], choices: Choices) -> CompressionPlan:
    taken = [(d, d.options[c]) for d, c in zip(decisions, choices, strict=True)]
    return CompressionPlan(
        {d.name: int(option) for d, option in taken if d.kind == "width"},
        {d.name: str(option) for d, option in taken if d.kind == "precision"},
    )


def random_problem(seed: int) -> Problem:
    """A problem as a device would give it: products of widths, steps of four channels, one precision per block.

    A step may even make a narrower layer slower, and the tables are noisy.
    """
    rng = np.random.default_rng(seed)
    blocks = int(rng.integers(1, 5))
    block, kinds, options = [], [], []
    for index in range(blocks):
        for _ in range(int(rng.integers(1, 4))):
            block.append(index)
            kinds.append("width")
            options.append(tuple(int(w) for w in np.sort(rng.choice(np.arange(1, 33), int(rng.integers(2, 7)), False))))
        block.append(index)
        kinds.append("precision")
        options.append(("int8", "float"))
    count = len(options)
    cost, fixed = rng.uniform(0.1, 1.0, count), float(rng.uniform(0.0, 1.0))

    def predict_ms(choices: Choices) -> float:
        total, before = fixed, 1.0
        for index in range(count):
            if kinds[index] == "precision":
                continue
            width = int(options[index][choices[index]])
            step = np.ceil(width / 4) * 4 + (2 if width % 4 else 0)
            precision = next(i for i in range(count) if block[i] == block[index] and kinds[i] == "precision")
            total += cost[index] * before * step / 32 * (0.4 if choices[precision] == 0 else 1.0)
            before = step / 32
        return float(total)

    top = np.array([len(o) - 1 for o in options])
    uncut_ms = predict_ms(top)
    decisions = []
    for index in range(count):
        ms = [predict_ms(np.where(np.arange(count) == index, o, top)) - uncut_ms for o in range(len(options[index]))]
        loss = np.append(rng.exponential(1.0, len(ms) - 1), 0.0)
        decisions.append(
            Decision(
                f"d{index}", kinds[index], f"b{block[index]}", options[index], loss, np.array(ms), np.zeros(len(ms)),
                rng.normal(size=4),
            )
        )  # fmt: skip
    names = tuple(f"b{index}" for index in range(blocks))

    def predict_batch(choices: Choices) -> np.ndarray:
        return np.array([predict_ms(one) for one in choices])

    return Problem(names, tuple(decisions), uncut_ms, predict_batch, lambda choices: plan_of(tuple(decisions), choices))


def additive_problem(seed: int, decisions: int = 5, options: int = 4) -> Problem:
    """A problem whose tables are the whole truth: times add up, so brute force and tables must agree."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(decisions):
        saved = np.append(-np.sort(rng.uniform(0.1, 2.0, options - 1))[::-1], 0.0)
        loss = np.append(rng.exponential(1.0, options - 1), 0.0)
        widths = tuple(range(1, options + 1))
        features = np.array([float(index)])
        rows.append(Decision(f"d{index}", "width", f"b{index % 2}", widths, loss, saved, np.zeros(options), features))

    def predict_batch(choices: Choices) -> np.ndarray:
        return 15.0 + np.sum([d.ms[taken] for d, taken in zip(rows, choices.T, strict=True)], axis=0)

    return Problem(("b0", "b1"), tuple(rows), 15.0, predict_batch, lambda choices: plan_of(tuple(rows), choices))
