"""In: backends of equal boards. Out: one backend that uses them side by side and goes on when a board fails."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hirelc_deploy.errors import TargetUnavailable
from hirelc_deploy.measure.backend import DeviceState, OperatorTime, Outputs, Precision, Runner, TimingProcess
from hirelc_deploy.measure.machine import fingerprint
from hirelc_deploy.measure.program import ProgramBackend, check_file, joined

T = TypeVar("T")

SHARE = 64
"""Images that a board takes at a time, at most: small enough that the boards finish together."""


class PoolBackend:
    """Equal boards as one backend.

    Images are shared out among the boards, operator profiles and timing processes go to whichever is free. A board that
    cannot be reached any more is set aside, and what it was doing is done again on another.
    """

    def __init__(self, boards: Sequence[ProgramBackend], say: Callable[[str], None]) -> None:
        """Args: `boards` are connected at first use; `say` hears when one is set aside."""
        self.name = boards[0].name
        self._boards, self._say = list(boards), say
        self._free: queue.SimpleQueue[ProgramBackend] = queue.SimpleQueue()
        self._changed = threading.Lock()
        self._last_words = ""
        for board in boards:
            self._free.put(board)

    @property
    def side_by_side(self) -> int:
        """How many things can be done at the same time."""
        return max(1, len(self._boards))

    def availability(self) -> str | None:
        """Return None where at least one board is there and all that are there are equal."""
        with ThreadPoolExecutor(len(self._boards) or 1) as executor:
            reasons = list(executor.map(lambda board: board.availability(), self._boards))
        missing = [(board, reason) for board, reason in zip(self._boards, reasons, strict=True) if reason is not None]
        if len(missing) == len(self._boards):
            return " ".join(reason for _, reason in missing) or self._last_words
        for board, reason in missing:
            self._set_aside(board, reason)
        kinds = {fingerprint(self._description(board)): board for board in self._boards}
        if len(kinds) > 1:
            names = " and ".join(board.device_name for board in kinds.values())
            return f"the boards of a pool must be equal, but {names} differ in CPU, power mode or runtime version."
        return None

    def precisions(self) -> tuple[Precision, ...]:
        """Return what the boards execute."""
        return self._one().precisions()

    def versions(self) -> dict[str, str]:
        """Return the versions on the boards."""
        return self._one().versions()

    def hardware(self) -> dict[str, Any]:
        """Return what one of the boards says about itself."""
        return self._one().hardware()

    def build(self, model: Path, threads: int = 1) -> Runner:
        """Load a file on one board, which tells whether the runtime takes it."""
        check_file(model)
        self.on_a_board(lambda board: board.build(model, threads))
        return PoolRunner(self, model, threads)

    def open_timing(self, files: Sequence[Path], threads: int, seed: int) -> AbstractContextManager[TimingProcess]:
        """Start a timing process on the next board in turn."""
        return self._timing(files, threads, seed)

    def on_a_board(self, work: Callable[[ProgramBackend], T]) -> T:
        """Do `work` on a free board, and on another when that one fails; raises TargetUnavailable at the last."""
        while True:
            board = self._take()
            try:
                result = work(board)
            except TargetUnavailable as gone:
                self._set_aside(board, str(gone))
            except BaseException:
                self._free.put(board)
                raise
            else:
                self._free.put(board)
                return result

    @contextmanager
    def _timing(self, files: Sequence[Path], threads: int, seed: int) -> Iterator[TimingProcess]:
        timing = PoolTiming(self, files, threads, seed)
        try:
            timing.open()
            yield timing
        finally:
            timing.close()

    def board_for(self, number: int) -> ProgramBackend:
        """Return the board whose turn it is; raises TargetUnavailable when none is left."""
        with self._changed:
            if not self._boards:
                raise TargetUnavailable(f"no board of the pool is left. The last one said: {self._last_words}")
            return self._boards[number % len(self._boards)]

    def set_aside(self, board: ProgramBackend, reason: str) -> None:
        """Use a board no more."""
        self._set_aside(board, reason)

    def _set_aside(self, board: ProgramBackend, reason: str) -> None:
        with self._changed:
            if board in self._boards:
                self._boards.remove(board)
                self._last_words = reason
                self._say(f"{board.device_name} is set aside, {len(self._boards)} left: {reason}")

    def _take(self) -> ProgramBackend:
        while True:
            with self._changed:
                if not self._boards:
                    raise TargetUnavailable(f"no board of the pool is left. The last one said: {self._last_words}")
            try:
                board = self._free.get(timeout=0.2)
            except queue.Empty:
                continue
            if board in self._boards:
                return board

    def _one(self) -> ProgramBackend:
        return self.board_for(0)

    def _description(self, board: ProgramBackend) -> dict[str, Any]:
        return {**board.hardware(), "backend": board.name, "versions": board.versions()}


class PoolRunner:
    """One file on all boards."""

    def __init__(self, pool: PoolBackend, model: Path, threads: int) -> None:
        self._pool, self._model, self._threads = pool, model, threads

    def infer(self, images: NDArray[np.float32]) -> Outputs:
        """Return all outputs for (n, ...) images, each from whichever board took it."""
        share = max(1, min(SHARE, math.ceil(len(images) / self._pool.side_by_side)))
        parts = [images[start : start + share] for start in range(0, len(images), share)] or [images]

        def work(part: NDArray[np.float32]) -> Outputs:
            return self._pool.on_a_board(lambda board: board.build(self._model, self._threads).infer(part))

        with ThreadPoolExecutor(self._pool.side_by_side) as executor:
            return joined(list(executor.map(work, parts)))

    def profile(self, image: NDArray[np.float32], runs: int) -> list[OperatorTime]:
        """Return the operator times that a free board finds."""
        return self._pool.on_a_board(lambda board: board.build(self._model, self._threads).profile(image, runs))

    def options(self) -> dict[str, Any]:
        """Return what the runtime of a free board was told when it opened the file; see Configured."""
        return self._pool.on_a_board(lambda board: board.build(self._model, self._threads).options())


class PoolTiming:
    """A timing process on one board, and on another from the moment that one fails."""

    def __init__(self, pool: PoolBackend, files: Sequence[Path], threads: int, seed: int) -> None:
        self._pool, self._files, self._threads, self._seed = pool, files, threads, seed
        self._stack = ExitStack()
        self._board: ProgramBackend | None = None
        self._process: TimingProcess | None = None
        self._moves = 0

    @property
    def states(self) -> tuple[DeviceState, DeviceState] | None:
        """Of the board it is on."""
        return self._process.states if self._process is not None else None

    @property
    def restarts(self) -> int:
        """Restarts on the present board, and moves to another."""
        return self._moves + (self._process.restarts if self._process is not None else 0)

    @property
    def place(self) -> object:
        """The board it is on."""
        return self._board

    def open(self) -> None:
        """Start on the board whose turn it is, or the next one that answers."""
        while self._process is None:
            self._board = self._pool.board_for(self._seed)
            try:
                self._process = self._stack.enter_context(
                    self._board.open_timing(self._files, self._threads, self._seed)
                )
            except TargetUnavailable as gone:
                self._pool.set_aside(self._board, str(gone))

    def rounds(self, count: int) -> NDArray[np.int64]:
        """Return (count, files, 2) nanoseconds, all from one board."""
        while True:
            self.open()
            assert self._process is not None
            assert self._board is not None
            try:
                return self._process.rounds(count)
            except TargetUnavailable as gone:
                self._moves += 1
                self._pool.set_aside(self._board, str(gone))
                self.close()

    def close(self) -> None:
        """End the process."""
        self._process = None
        self._stack.close()
