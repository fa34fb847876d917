"""In: work that counts its steps. Out: a bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol, TextIO, TypeVar

from hirelc_deploy.time_left import TimeLeft

Item = TypeVar("Item")
Clock = Callable[[], float]
Listener = Callable[[str], None]
"""Called with one line of text."""

EARLY_LINES = 100
"""Lines said before there is a run to keep them in; more are not waited for."""


@dataclass(frozen=True)
class Step:
    """What a command is doing.

    Attributes:
        done, total: Of what it counts; `total` is 0 where nothing is counted.
        note: For example the current loss.
    """

    name: str
    done: int = 0
    total: int = 0
    note: str = ""


class Keeper(Protocol):
    """Keeps what a command says where others can read it; see `run_log.RunLog`."""

    def line(self, text: str) -> None:
        """Keep a line."""

    def step(self, step: Step) -> None:
        """Take note of what is being done; called often."""


def duration(seconds: float) -> str:
    """Return `12 s`, `3 min 20 s` or `1 h 5 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Progress:
    """Says what is being done and how long it will still take, on a stream that is not the program's output.

    On a terminal the current line is rewritten; elsewhere a line is printed when a stage starts and ends and every
    `line_seconds` between. `note` adds to the next line, for example the current loss.

    Attributes:
        left: Knows what the whole command needs yet; stages are steps of their name.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        quiet: bool = False,
        line_seconds: float = 15.0,
        clock: Clock = time.monotonic,
        listener: Listener | None = None,
    ) -> None:
        """Args: `listener` gets every line in place of the stream; `quiet` says nothing, but a run's log is kept."""
        self.stream = stream or sys.stderr
        self.quiet = quiet
        self.line_seconds = line_seconds
        self.clock = clock
        self.listener = listener
        self.left = TimeLeft(clock)
        self.seconds: dict[str, float] = {}
        self._note = ""
        self._last_line = self._last_kept = 0.0
        self._keeper: Keeper | None = None
        self._early: deque[str] = deque(maxlen=EARLY_LINES)

    def keep_in(self, keeper: Keeper) -> None:
        """Have every line kept, those that were said before too."""
        self._keeper = keeper
        while self._early:
            keeper.line(self._early.popleft())

    def say(self, text: str) -> None:
        """Print one line of its own."""
        self._keep(text)
        self._print(text)

    def note(self, text: str) -> None:
        """Show `text` behind the counter from the next step on."""
        self._note = text

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage: its seconds are added to `seconds[name]`, also when it fails."""
        start = self.clock()
        self._keep(f"{name} ...")
        self._tell(Step(name))
        if not self._terminal:
            self._print(f"{name} ...")
        try:
            with self.left.step(name):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self.clock() - start
            self._note = ""
        self.say(f"{name}: {self.clock() - start:.1f} s")

    def track(
        self, items: Iterable[Item], name: str, total: int | None = None, *, kind: str | None = None
    ) -> Iterator[Item]:
        """Yield the items and show how many are done and the time left, judged from the mean so far.

        Args:
            kind: Of the steps that these items are for `left`, where they are no steps already.
        """
        total = total if total is not None else len(items) if isinstance(items, Sized) else 0
        start = self.clock()
        self._last_line = self._last_kept = start
        self._tell(Step(name, 0, total))
        for done, item in enumerate(items, 1):
            with nullcontext() if kind is None else self.left.step(kind):
                yield item
            self._show(Step(name, done, total, self._note), start)

    def _show(self, step: Step, start: float) -> None:
        self._tell(step)
        now, terminal = self.clock(), self._terminal
        left = (now - start) / step.done * (step.total - step.done)
        ending = f", {left:.0f} s left" if step.total >= step.done else ""
        if (whole := self.left.seconds()) is not None:
            ending += f" (whole command: {duration(whole)})"
        line = f"{step.name}: {step.done}/{step.total}{ending}{'  ' + step.note if step.note else ''}"
        if now - self._last_kept >= self.line_seconds:
            self._last_kept = now
            self._keep(line)
        if self.quiet or now - self._last_line < (0.1 if terminal else self.line_seconds):
            return
        self._last_line = now
        if terminal:
            self._write(f"\r\x1b[K{line}", "")
        else:
            self._print(line)

    def _print(self, text: str) -> None:
        if self.quiet:
            return
        if self.listener is not None:
            self.listener(text)
        else:
            clear = "\r\x1b[K" if self.stream.isatty() else ""
            self._write(f"{clear}{text}", "\n")

    def _write(self, text: str, end: str) -> None:
        """Write to the stream; whoever read it may have gone, or its disk be full, which does not end hours of work."""
        try:
            print(text, end=end, file=self.stream, flush=True)
        except OSError:
            self.quiet = True

    def _keep(self, text: str) -> None:
        if self._keeper is None:
            self._early.append(text)
        else:
            self._keeper.line(text)

    def _tell(self, step: Step) -> None:
        if self._keeper is not None:
            self._keeper.step(step)

    @property
    def _terminal(self) -> bool:
        return self.listener is None and self.stream.isatty()
