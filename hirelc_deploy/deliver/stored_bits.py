"""In: an ONNX file, who judges files, a limit on bytes. Out: bits of each layer of the stored file, by a strategy.

The second stage of Zhan, Lin and Cao 2019 (in the form of HAQ: Wang et al. 2019), where it means something: no runtime
computes in 2 to 7 bits, but a file for disk and wire may hold them. A choice is judged by the file that restore.py
makes of it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from hirelc_deploy.compress.storage import codec, restore
from hirelc_deploy.errors import ConstraintError
from hirelc_deploy.outcome import Fidelity, Measured, Outcome
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.strategies.baselines import make_strategy
from hirelc_deploy.strategies.knapsack import smallest
from hirelc_deploy.strategies.loop import run_search
from hirelc_deploy.strategies.problem import Choices, Decision, Problem

NEEDS_NO_LOSSES = frozenset({"two-stage", "random", "taylor", "uniform", "untrained"})
"""Strategies that look at no loss of single choices, so that none is measured for them."""

Judge = Callable[[Path], float]
"""A restored file to its loss (nats) against the file before it was stored."""


@dataclass(frozen=True)
class Chosen:
    """What a search for bits found.

    Attributes:
        bits: Tensor name to bits.
        loss: Nats, of the restored file.
        size_bytes: Of the stored file.
        evaluations: Files that were judged for it, those for single choices not among them.
        curve: Least loss after each of them.
    """

    bits: Mapping[str, int]
    loss: float
    size_bytes: int
    evaluations: int
    curve: tuple[float, ...]


class StoredBits:
    """The choice of bits for one file under one scheme.

    Args:
        model: The file that is to be stored.
        judge: Of restored files.
        scheme: Of the codec.
        sparsity: Share of each tensor's weights that is left out first.
    """

    def __init__(self, model: Path, judge: Judge, scheme: str, sparsity: float = 0.0) -> None:
        self._model, self._judge, self._scheme, self._sparsity = model, judge, scheme, sparsity
        proto = onnx.load(str(model))
        self._tensors = {t.name: numpy_helper.to_array(t) for t in codec.coded_tensors(proto)}
        self._known: dict[tuple[int, ...], tuple[float, int]] = {}
        wide = dict.fromkeys(self._tensors, codec.BITS[-1])
        parts, errors = self._sizes_and_errors()
        self._sizes, self._errors = parts, errors
        self._beside = self.evaluate(wide)[1] - float(parts[:, -1].sum())

    @property
    def names(self) -> tuple[str, ...]:
        """Return the tensors whose bits are chosen."""
        return tuple(self._tensors)

    def evaluate(self, bits: Mapping[str, int]) -> tuple[float, int]:
        """Return loss and bytes of the file with these bits: stored, restored and judged, once."""
        key = tuple(bits[name] for name in self._tensors)
        if key not in self._known:
            with tempfile.TemporaryDirectory() as folder:
                stored = Path(folder) / "stored"
                codec.store(self._model, stored, key[0], self._scheme, sparsity=self._sparsity, bits_of=bits)
                loss = self._judge(Path(restore.restore(str(stored), folder)))
                self._known[key] = loss, stored.stat().st_size
        return self._known[key]

    def choose(self, max_bytes: int, strategy: str, evaluations: int, seed: int) -> Chosen:
        """Return the best bits found within a limit on the stored file's bytes.

        Raises:
            ConstraintError: The file is too large even at the fewest bits.
        """
        problem = self.problem(measured=strategy not in NEEDS_NO_LOSSES)
        least = smallest(problem)[1]
        if least > max_bytes:
            raise ConstraintError(
                f"--max-bytes {max_bytes:,}: with {codec.BITS[0]} bits everywhere the stored file still takes "
                f"{int(least):,} bytes; allow more, or leave out more weights with --sparsity."
            )

        def outcome(plan: CompressionPlan, fidelity: Fidelity) -> Outcome:
            loss, size = self.evaluate(plan.keep)
            return Measured(plan.digest, fidelity, max(loss, 1e-9), None, size, 0, predicted_ms=float(size))

        result = run_search(
            problem,
            make_strategy(strategy, problem, float(max_bytes), seed),
            outcome,
            f1_evaluations=evaluations,
            f2_evaluations=0,
        )
        losses = [trial.outcome.loss for trial in result.trials if isinstance(trial.outcome, Measured)]
        best = dict(result.ranked("F1")[0].plan.keep)
        loss, size = self.evaluate(best)
        curve = tuple(np.minimum.accumulate(losses).tolist())
        return Chosen(best, loss, size, len(losses), curve)

    def problem(self, *, measured: bool) -> Problem:
        """Return the choice as the problem of a search whose currency, called ms everywhere there, is bytes.

        Args:
            measured: Judge every tensor at every number of bits alone; else losses are 0 and mean nothing.
        """
        names, options = self.names, tuple(codec.BITS)
        top = dict.fromkeys(names, options[-1])
        decisions = []
        for index, name in enumerate(names):
            loss = np.zeros(len(options))
            if measured:
                whole = self.evaluate(top)[0]
                loss = np.array([max(self.evaluate({**top, name: bits})[0] - whole, 0.0) for bits in options])
            size = self._sizes[index]
            change = size - size[-1]
            features = _features(self._tensors[name], index / max(len(names) - 1, 1), self._errors[index], size)
            decisions.append(Decision(name, "bits", name, options, loss, change, change, features))
        rows = np.arange(len(names))

        def size_of(choices: Choices) -> NDArray[np.float64]:
            return np.asarray(self._beside + self._sizes[rows, choices].sum(axis=1))

        def plan_of(choices: Choices) -> CompressionPlan:
            """Name the choice for the loop; nothing is cut by it."""
            return CompressionPlan({name: options[choice] for name, choice in zip(names, choices, strict=True)})

        uncut = float(self._beside + self._sizes[:, -1].sum())
        return Problem(names, tuple(decisions), uncut, size_of, plan_of)

    def _sizes_and_errors(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return (tensors, bits) bytes, records in the header included, and squared errors by squared weights."""
        sizes, errors = [], []
        for weights in self._tensors.values():
            stored = [codec.stored_tensor(weights, bits, self._scheme, self._sparsity) for bits in codec.BITS]
            sizes.append([len(record) + len(content) for record, content in stored])
            values = weights.astype(np.float32)
            kept = codec.without_small(values, self._sparsity)
            coded = [(codec.ENCODERS[self._scheme](kept, bits), bits) for bits in (2, 4)]
            back = [restore.DECODERS[self._scheme](one.indices, one.table, bits).ravel() for one, bits in coded]
            power = float(np.square(values).sum()) or 1.0
            errors.append([float(np.square(one - values.ravel()).sum()) / power for one in back])
        return np.array(sizes, np.float64), np.array(errors, np.float64)


def _features(
    weights: NDArray[np.generic], depth: float, errors: NDArray[np.float64], sizes: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(8,) depth, whether a convolution, log of outputs, inputs and places, of the error at 2 and 4 bits, of bytes."""
    places = int(np.prod(weights.shape[2:])) if weights.ndim > 2 else 1
    return np.array(
        [
            depth,
            float(weights.ndim > 2),
            np.log2(weights.shape[0]),
            np.log2(weights.shape[1]),
            np.log2(places),
            np.log(errors[0] + 1e-9),
            np.log(errors[1] + 1e-9),
            np.log2(sizes[-1]),
        ]
    )
