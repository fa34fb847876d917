"""In: the wall time that a search may take, and what its steps take. Out: what is still begun, so that it is kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from hirelc_deploy.deliver.agenda import Agenda
from hirelc_deploy.runs import SHORTENED
from hirelc_deploy.time_left import CUT, FILE, TRAINING_STEP

LEAST_SHARE = 1 / 3
"""Of the time that is left, at least so much is for a search before its recovery, which may be shortened."""
SINGLES_SHARE = 1 / 3
"""Of the whole budget, options alone are judged for so long even where a whole recovery would not fit behind them."""


class Budget:
    """Sets aside what must follow: the recovery of a finalist, the last race, the test split, the bundle.

    Decisions are journaled, so a run that is resumed takes them as before. What commands before on this run have spent
    counts.
    """

    def __init__(
        self,
        seconds: float | None,
        agenda: Agenda,
        *,
        spent: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args: `seconds` is None for no budget; `spent` of it are gone already."""
        self._agenda, self._clock, self._seconds = agenda, clock, seconds
        self._began = clock() - spent
        self.deadline = agenda.left.deadline = math.inf if seconds is None else self._began + seconds

    @property
    def left(self) -> float:
        """Seconds until the last race must begin; below 0 after it."""
        return self.deadline - (self._agenda.delivery_seconds() or 0.0) - self._clock()

    def time_for(self, seconds: float | None) -> bool:
        """Return whether something may begin that takes so long; None, which nobody knows, counts as nothing."""
        return self.left > (seconds or 0.0)

    def decides(self, what: str, seconds: float | None) -> bool:
        """Return the same, as it was decided when it was asked first on this run."""
        if self._seconds is None:
            return True
        return bool(self._agenda.run.remember(f"time for {what}", lambda: self.time_for(seconds)))

    def measures_more(self) -> bool:
        """Return whether a further option may be judged alone."""
        if self._seconds is None or self._clock() < self._began + SINGLES_SHARE * self._seconds:
            return True
        return self.time_for(self._agenda.finalist_seconds())

    def search_deadline(self) -> float:
        """Return until when a search may begin evaluations, on the clock: its file and a recovery come after it."""
        if self._seconds is None:
            return math.inf
        after = (self._agenda.finalist_seconds(search=False) or 0.0) + (self._agenda.left.seconds_of(FILE) or 0.0)
        return self._clock() + max(self.left - after, LEAST_SHARE * self.left)

    def recovery_share(self) -> float:
        """Return which share of a recovery fits, in (0, 1]; journaled, and the same for all finalists of a run."""
        if self._seconds is None:
            return 1.0

        def measure() -> float:
            steps, one = self._agenda.sizes.steps, self._agenda.left.seconds_of(TRAINING_STEP)
            if not steps or not one:
                return 1.0
            files = self._agenda.left.seconds_for({FILE: 1, CUT: 1}) or 0.0
            return min(1.0, max(1.0 / steps, (self.left - files) / (steps * one)))

        return float(self._agenda.run.remember(SHORTENED, measure))
