"""In: work that counts its steps. Out: a bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TextIO, TypeVar

Item = TypeVar("Item")
Clock = Callable[[], float]
Listener = Callable[[str], None]
"""Called with one line of text."""


class Progress:
    """Says what is being done and how long it will still take, on a stream that is not the program's output.

    On a terminal the current line is rewritten; elsewhere a line is printed when a stage starts and ends and every
    `line_seconds` between. `note` adds to the next line, for example the current loss.
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
        """Args: `listener` gets every line in place of the stream."""
        self.stream = stream or sys.stderr
        self.quiet = quiet
        self.line_seconds = line_seconds
        self.clock = clock
        self.listener = listener
        self.seconds: dict[str, float] = {}
        self._note = ""
        self._last_line = 0.0

    def say(self, text: str) -> None:
        """Print one line of its own."""
        if self.quiet:
            return
        if self.listener is not None:
            self.listener(text)
        else:
            clear = "\r\x1b[K" if self.stream.isatty() else ""
            print(f"{clear}{text}", file=self.stream, flush=True)

    def note(self, text: str) -> None:
        """Show `text` behind the counter from the next step on."""
        self._note = text

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage: its seconds are added to `seconds[name]`, also when it fails."""
        start = self.clock()
        if not self._terminal:
            self.say(f"{name} ...")
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self.clock() - start
            self._note = ""
        self.say(f"{name}: {self.clock() - start:.1f} s")

    def track(self, items: Iterable[Item], name: str, total: int | None = None) -> Iterator[Item]:
        """Yield the items and show how many are done and the time left, judged from the mean so far."""
        total = total if total is not None else len(items) if isinstance(items, Sized) else 0
        start = self.clock()
        self._last_line = start
        for done, item in enumerate(items, 1):
            yield item
            self._show(name, done, total, self.clock() - start)

    def _show(self, name: str, done: int, total: int, elapsed: float) -> None:
        if self.quiet:
            return
        now, terminal = self.clock(), self._terminal
        if now - self._last_line < (0.1 if terminal else self.line_seconds):
            return
        self._last_line = now
        left = f", {elapsed / done * (total - done):.0f} s left" if total >= done else ""
        line = f"{name}: {done}/{total}{left}{'  ' + self._note if self._note else ''}"
        if terminal:
            print(f"\r\x1b[K{line}", end="", file=self.stream, flush=True)
        else:
            self.say(line)

    @property
    def _terminal(self) -> bool:
        return self.listener is None and self.stream.isatty()
