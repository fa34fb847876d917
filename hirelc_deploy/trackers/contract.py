"""In: names of trackers. Out: one that tells all of them; what a tracker must be able to do."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from hirelc_deploy.errors import InputError

TRACKERS = ("tensorboard", "mlflow")
"""Each is a module of this room with a function `tracker` (`Open`), and an extra of the same name."""
Values = Mapping[str, float]


class Tracker(Protocol):
    """Takes what a run measures to where people compare runs.

    Attributes:
        errors: What its library raises where it cannot take something.
    """

    errors: tuple[type[Exception], ...]

    def scalars(self, training: str, step: int, values: Values) -> None:
        """Take the scalars of one step of a training, such as its loss."""

    def trial(self, number: int, fidelity: str, values: Values) -> None:
        """Take one finished evaluation."""

    def result(self, values: Values, files: Sequence[Path]) -> None:
        """Take what a finished run says of the shipped file, and its files and folders."""

    def close(self, finished: bool) -> None:
        """Take the end of the command; the run may go on in another one."""


Remember = Callable[[str, Callable[[], Any]], Any]
"""As `runs.Run.remember`."""
Open = Callable[[Path, str, Remember], Tracker]
"""From the run's folder, the command and what the run remembers to a tracker."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise InputError for a tracker that is unknown or not installed."""
    for name in names:
        if name not in TRACKERS:
            raise InputError(f"--track {name!r:.40}: this tracker is unknown; use {' or '.join(TRACKERS)}.")
        try:
            importlib.import_module(f"hirelc_deploy.trackers.{name}")
        except ImportError:
            raise InputError(
                f"--track {name}: {name} is not installed; run pip install 'hirelc-deploy[{name}]'."
            ) from None


class Trackers:
    """Tells several trackers. One whose library or server fails is told nothing more, and the run goes on."""

    def __init__(
        self, names: Sequence[str], directory: Path, command: str, remember: Remember, say: Callable[[str], None]
    ) -> None:
        """Args: `say` is told of a tracker that fails."""
        self._say = say
        self._open: dict[str, Tracker] = {}
        for name in names:
            module = importlib.import_module(f"hirelc_deploy.trackers.{name}")
            try:
                self._open[name] = module.tracker(directory, command, remember)
            except module.ERRORS as error:
                self._lost(name, error)

    def scalars(self, training: str, step: int, values: Values) -> None:
        """Tell all of one step of a training."""
        self._tell(lambda tracker: tracker.scalars(training, step, finite(values)))

    def trial(self, number: int, fidelity: str, values: Mapping[str, float | None]) -> None:
        """Tell all of one finished evaluation."""
        self._tell(lambda tracker: tracker.trial(number, fidelity, finite(values)))

    def result(self, values: Mapping[str, float | None], files: Sequence[Path]) -> None:
        """Tell all of the result of a finished run."""
        self._tell(lambda tracker: tracker.result(finite(values), files))

    def close(self, finished: bool) -> None:
        """Tell all that the command is over."""
        self._tell(lambda tracker: tracker.close(finished))

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                what(tracker)
            except tracker.errors as error:
                del self._open[name]
                self._lost(name, error)

    def _lost(self, name: str, error: Exception) -> None:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        self._say(f"warning: {name} takes nothing more ({first:.200}); the run goes on without it.")


def finite(values: Mapping[str, float | None]) -> dict[str, float]:
    """Return the values that are numbers."""
    return {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}
