"""In: the steps that a command has before it, and what steps have taken. Out: the seconds that it needs yet."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

CUT, F1, F3, FILE, TRAINING_STEP = "cut", "F1", "F3", "file", "training step"
"""Kinds of steps of evaluations: F2 is a cut and a file, F3 is both and training steps, and of no length itself. Other
kinds are stages."""


class TimeLeft:
    """Counts the steps still to come, kind by kind, and knows what one of each kind takes.

    A step's seconds are its own: those of steps inside it are theirs. What one takes is the mean of those measured in
    this process; before the first one the mean of the commands before on the same run, else a guess.

    Attributes:
        spent: Seconds of the commands before.
        deadline: On the clock, when a budget of time ends: what does not fit into it is not begun.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._measured: dict[str, tuple[int, float]] = {}
        self._before: dict[str, tuple[int, float]] = {}
        self._guesses: dict[str, float] = {}
        self._ahead: dict[str, float] = {}
        self._answered: dict[str, int] = {}
        self._inside = self.spent = 0.0
        self.deadline = math.inf

    @contextmanager
    def step(self, kind: str) -> Iterator[None]:
        """Time a step of a kind; one that fails counts for nothing."""
        outer, self._inside = self._inside, 0.0
        start = self._clock()
        try:
            yield
            self.took(kind, self._clock() - start - self._inside)
        finally:
            self._inside = outer + self._clock() - start

    def took(self, kind: str, seconds: float) -> None:
        """Take note that one step of a kind is done, and of its seconds."""
        count, total = self._measured.get(kind, (0, 0.0))
        self._measured[kind] = count + 1, total + seconds
        self._count_down(kind)

    def expect(self, kind: str, count: float) -> None:
        """Say how many steps of a kind are still to come, whatever was said before."""
        self._ahead[kind] = count

    def expect_nothing(self) -> None:
        """Forget all steps that were to come."""
        self._ahead = {}

    def journal_answers(self, kind: str, count: int) -> None:
        """Say that so many of the steps to come need no time, as their results are in the journal."""
        self._answered[kind] = count

    def unasked(self, kind: str) -> int:
        """Return how many answers the journal has for steps that are still to come."""
        return self._answered.get(kind, 0)

    def guess(self, kind: str, seconds: float) -> None:
        """Say what one step of a kind may take, for as long as none has been measured."""
        self._guesses[kind] = seconds

    def answered(self, kind: str) -> None:
        """Take note that the journal has answered one of them."""
        self._answered[kind] = max(0, self._answered.get(kind, 0) - 1)
        self._count_down(kind)

    def is_measured(self, kind: str) -> bool:
        """Return whether this process has done a step of this kind."""
        return kind in self._measured

    def measured(self, kind: str) -> tuple[int, float]:
        """Return how many steps of a kind this process has done, and their seconds."""
        return self._measured.get(kind, (0, 0.0))

    def seconds_of(self, kind: str) -> float | None:
        """Return what one step of a kind takes; None where nothing says it."""
        for known in (self._measured, self._before):
            if kind in known:
                count, total = known[kind]
                return total / count
        return self._guesses.get(kind)

    def seconds(self) -> float | None:
        """Return what the whole command needs yet; None before its steps are known, or what one of them takes."""
        new = {kind: count - self._answered.get(kind, 0) for kind, count in self._ahead.items()}
        needed = self.seconds_for(new) if self._ahead else None
        return None if needed is None else min(needed, max(0.0, self.deadline - self._clock()))

    def seconds_for(self, counts: Mapping[str, float]) -> float | None:
        """Return what so many steps of each kind take; None where nothing says it of one of them."""
        total = 0.0
        for kind, count in counts.items():
            if count > 0:
                one = self.seconds_of(kind)
                if one is None:
                    return None
                total += count * one
        return total

    def record(self) -> dict[str, dict[str, float]]:
        """Return what was measured, for the next command on the same run, as JSON values."""
        known = {**self._before, **self._measured}
        return {kind: {"count": count, "seconds": seconds} for kind, (count, seconds) in known.items()}

    def take_up(self, record: Mapping[str, Any]) -> None:
        """Begin with what `record` returned in a command before; what is damaged is left out."""
        for kind, one in record.items():
            count, seconds = (one.get(name) for name in ("count", "seconds")) if isinstance(one, Mapping) else (0, 0.0)
            if isinstance(count, int) and isinstance(seconds, float) and count > 0 and seconds >= 0:
                self._before[kind] = count, seconds

    def _count_down(self, kind: str) -> None:
        if kind in self._ahead:
            self._ahead[kind] = max(0, self._ahead[kind] - 1)
