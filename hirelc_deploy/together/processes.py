"""In: a function and questions that will be asked. Out: its answers, computed side by side by copies of this process.

A copy (fork) shares everything that was computed before it was made, so nothing is loaded or sent but plain text.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from hirelc_deploy.errors import InputError

DIES_WITH_RAY = (3, 13)
"""From this Python on, copies of a process that has worked with Ray (2.60) end with SIGSEGV."""


class Evaluators(Protocol):
    """Processes that compute answers before they are asked for; see `Ahead` and `RayAhead`."""

    def begin(self, questions: Sequence[str]) -> None:
        """Announce what `take` will ask for, in this order, instead of what was announced and not begun before."""

    def take(self, question: str) -> str | None:
        """Return the answer to a question once it is there; None where it was not announced or could not be found."""

    def close(self) -> None:
        """End the processes, whatever they are doing."""


class Ahead:
    """Answers that are computed before they are asked for.

    Args:
        answer: From text to text, without other effects. What it raises in a copy is no answer: `take` gives None, and
            whoever asks computes it in this process, where the error is seen.
        jobs: Copies of this process.

    Raises:
        InputError: This system cannot copy a process, or not this one.
    """

    def __init__(self, answer: Callable[[str], str], jobs: int) -> None:
        if "fork" not in multiprocessing.get_all_start_methods():
            raise InputError(f"--jobs {jobs}: this system cannot copy a process; leave --jobs out.")
        if "ray" in sys.modules and sys.version_info >= DIES_WITH_RAY:
            raise InputError(
                f"--jobs {jobs}: this process has worked with Ray, and copies of it would die in this Python; begin a "
                "new process, or leave --jobs out."
            )
        context = multiprocessing.get_context("fork")
        self._waiting: deque[str] = deque()
        self._asked: dict[Connection, str | None] = {}
        self._answers: dict[str, str] = {}
        self._copies: dict[Connection, Any] = {}
        for _ in range(jobs):
            ours, theirs = context.Pipe()
            copy = context.Process(target=_serve, args=(answer, theirs, [*self._asked, ours]), daemon=True)
            with warnings.catch_warnings():
                # Python 3.12 warns of threads when a process is copied: those of runtimes, which no copy uses.
                warnings.simplefilter("ignore", DeprecationWarning)
                copy.start()
            theirs.close()
            self._asked[ours], self._copies[ours] = None, copy

    def begin(self, questions: Sequence[str]) -> None:
        """Announce what `take` will ask for, in this order, instead of what was announced and not begun before."""
        known = {*self._answers, *self._asked.values()}
        self._waiting = deque(question for question in questions if question not in known)
        self._hand_out()

    def take(self, question: str) -> str | None:
        """Return the answer to a question once it is there; None where it was not announced or could not be found.

        Raises:
            InputError: A copy ended before it answered.
        """
        while question not in self._answers:
            if question not in self._waiting and question not in self._asked.values():
                return None
            for one in wait([connection for connection, asked in self._asked.items() if asked is not None]):
                assert isinstance(one, Connection)
                self._receive(one)
            self._hand_out()
        return self._answers.pop(question) or None

    def close(self) -> None:
        """End the copies, whatever they are doing."""
        for connection, copy in self._copies.items():
            copy.kill()
            copy.join()
            connection.close()
        self._copies, self._asked = {}, {}

    def _receive(self, connection: Connection) -> None:
        question = self._asked[connection]
        assert question is not None
        try:
            self._answers[question] = connection.recv_bytes().decode()
        except (EOFError, ConnectionError):
            copy = self._copies[connection]
            copy.join()
            self.close()
            raise InputError(
                f"--jobs: a process of these died ({_end_of(copy.exitcode)}); what was finished is kept, "
                "so run the same again with fewer --jobs."
            ) from None
        self._asked[connection] = None

    def _hand_out(self) -> None:
        for connection, asked in self._asked.items():
            if asked is None and self._waiting:
                self._asked[connection] = self._waiting.popleft()
                try:
                    connection.send_bytes(str(self._asked[connection]).encode())
                except ConnectionError:
                    self._receive(connection)


def _end_of(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    memory = ", often because the memory is full" if code == -signal.SIGKILL else ""
    return f"{signal.Signals(-code).name}{memory}"


def _serve(answer: Callable[[str], str], ours: Connection, inherited: Sequence[Connection]) -> None:
    """Answer questions until the other end is gone; of Ctrl-C, which reaches every process, only the first one hears.

    Args:
        inherited: Ends that belong to the first process: while a copy held them, the end of that process would not be
            noticed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for connection in inherited:
        connection.close()
    try:
        while True:
            question = ours.recv_bytes().decode()
            try:
                found = answer(question)
            except Exception:  # seen where the question is asked again
                found = ""
            ours.send_bytes(found.encode())
    except (EOFError, ConnectionError):
        return
