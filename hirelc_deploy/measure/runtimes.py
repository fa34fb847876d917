"""In: files, each with the runtime that runs it. Out: their times side by side, as if one process held them all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hirelc_deploy.measure.backend import Backend, DeviceState, TimingProcess
from hirelc_deploy.measure.worker import BURST


class SideBySide:
    """Times files of several runtimes of one device, for `protocol.compare`.

    Each runtime has a process of its own. They take turns after every burst, so that all files meet the same minutes.
    """

    def __init__(self, backends: Mapping[Path, Backend]) -> None:
        """Args: `backends` says for each file what runs it."""
        self._backends = backends

    def open_timing(self, files: Sequence[Path], threads: int, seed: int) -> AbstractContextManager[TimingProcess]:
        """Start a timing process of each runtime; raises as theirs do."""
        return self._timing(files, threads, seed)

    @contextmanager
    def _timing(self, files: Sequence[Path], threads: int, seed: int) -> Iterator[TimingProcess]:
        columns: dict[int, list[int]] = {}
        for index, file in enumerate(files):
            columns.setdefault(id(self._backends[file]), []).append(index)
        with ExitStack() as stack:
            parts = [
                (
                    own,
                    stack.enter_context(
                        self._backends[files[own[0]]].open_timing([files[i] for i in own], threads, seed)
                    ),
                )
                for own in columns.values()
            ]
            yield parts[0][1] if len(parts) == 1 else TakingTurns(parts)


class TakingTurns:
    """Timing processes of several runtimes as one; see TimingProcess."""

    def __init__(self, parts: Sequence[tuple[Sequence[int], TimingProcess]]) -> None:
        """Args: `parts` are the columns of each process, and the process."""
        self._parts = list(parts)
        self.states: tuple[DeviceState, DeviceState] | None = None
        self.place = parts[0][1].place

    @property
    def restarts(self) -> int:
        """Of all processes."""
        return sum(process.restarts for _, process in self._parts)

    def rounds(self, count: int) -> NDArray[np.int64]:
        """Return (count, files, 2) nanoseconds; the runtime that went first goes last in the next burst."""
        samples = np.zeros((count, sum(len(columns) for columns, _ in self._parts), 2), np.int64)
        states: list[DeviceState] = []
        for start in range(0, count, BURST):
            stop = min(start + BURST, count)
            for columns, process in self._parts:
                samples[start:stop, list(columns)] = process.rounds(stop - start)
                states += process.states or ()
            self._parts.reverse()
        self.states = (states[0], states[-1]) if states else None
        return samples
