"""In: what a run measures. Out: event files in its folder `tensorboard`, one subfolder for each training."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from hirelc_deploy.trackers.contract import Remember

ERRORS: tuple[type[Exception], ...] = (OSError,)
TRIALS = "trials"


class TensorBoard:
    """Trials are points of `trials`, at the step of their number; `tensorboard --logdir RUN/tensorboard` shows all."""

    errors = ERRORS

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writers: dict[str, EventFileWriter] = {}

    def scalars(self, training: str, step: int, values: Mapping[str, float]) -> None:
        """Write the scalars of one step of a training."""
        self._write(training, step, {f"training/{name}": value for name, value in values.items()})

    def trial(self, number: int, fidelity: str, values: Mapping[str, float]) -> None:
        """Write one finished evaluation."""
        self._write(TRIALS, number, {f"{fidelity}/{name}": value for name, value in values.items()})

    def result(self, values: Mapping[str, float], files: Sequence[Path]) -> None:
        """Write what a finished run says of the shipped file; files have no place here."""
        self._write(TRIALS, 0, {f"result/{name}": value for name, value in values.items()})

    def close(self, finished: bool) -> None:
        """Write out what is waiting."""
        for writer in self._writers.values():
            writer.close()
        self._writers = {}

    def _write(self, place: str, step: int, values: Mapping[str, float]) -> None:
        if place not in self._writers:
            (self._folder / place).mkdir(parents=True, exist_ok=True)
            self._writers[place] = EventFileWriter(str(self._folder / place))
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._writers[place].add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=points)))
        self._writers[place].flush()


def tracker(directory: Path, command: str, remember: Remember) -> TensorBoard:
    """Return the tracker of a run."""
    return TensorBoard(directory / "tensorboard")
