"""In: what a command says while it works. Out: `run.log` and `progress.json` in its run's folder."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hirelc_deploy.progress import Step
from hirelc_deploy.runs import PARTIAL
from hirelc_deploy.time_left import TimeLeft

LOG, PROGRESS = "run.log", "progress.json"
SCHEMA_VERSION = 1
LOG_BYTES = 2**20
"""Of a run's log at most: about 12,000 lines. Of a longer one the older half goes."""
WRITE_SECONDS = 2.0
"""Between two writings of how far a command is."""
RUNNING, FINISHED, STOPPED = "running", "finished", "stopped"
KINDS = {
    **dict.fromkeys(("command", "host", "began", "updated", "state", "why", "step", "note"), str),
    **dict.fromkeys(("pid", "done", "total"), int),
    **dict.fromkeys(("seconds_before", "seconds"), float),
    "measured": dict,
}
"""What a `progress.json` holds at least."""


def utc(moment: float) -> str:
    """Return a time of `time.time` in UTC, ISO 8601, in whole seconds."""
    return datetime.datetime.fromtimestamp(moment, datetime.UTC).isoformat(timespec="seconds")


class RunLog:
    """Keeps what one command says in the run that it writes; see `progress.Keeper`.

    Nothing of it is needed to resume, so a disk that takes no more of it stops nothing here: it does so where results
    are written.
    """

    def __init__(
        self,
        directory: Path,
        command: str,
        left: TimeLeft | None = None,
        *,
        clock: Callable[[], float] = time.time,
        log_bytes: int = LOG_BYTES,
    ) -> None:
        """Args: `left` knows what the command needs yet; `clock` gives seconds since 1970, UTC."""
        self._left = left or TimeLeft()
        self._directory, self._clock, self._log_bytes = directory, clock, log_bytes
        self._guard = threading.Lock()
        self._written = -float("inf")
        self._step = Step("")
        before = read_progress(directory)
        self._left.take_up(before.get("measured", {}))
        self._record: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "command": command,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "began": utc(clock()),
            "seconds_before": float(before.get("seconds_before", 0.0) + before.get("seconds", 0.0)),
        }
        self._began = clock()
        self._left.spent = self._record["seconds_before"]
        self._end: tuple[str, str] | None = None
        self.line(f"begun: {command}")
        self._write(RUNNING)

    def line(self, text: str) -> None:
        """Append a line with its time."""
        entry = f"{utc(self._clock())} {' '.join(text.splitlines())}\n".encode(errors="backslashreplace")
        path = self._directory / LOG
        with self._guard, contextlib.suppress(OSError):
            if self._end is not None:
                return
            if path.exists() and path.stat().st_size + len(entry) > self._log_bytes:
                kept = path.read_bytes()[-self._log_bytes // 2 :]
                _replace(path, kept[kept.find(b"\n") + 1 :])
            with path.open("ab") as file:
                file.write(entry)

    def step(self, step: Step) -> None:
        """Write down what is being done, every WRITE_SECONDS and when something else begins."""
        another = step.name != self._step.name
        self._step = step
        if another or self._clock() - self._written >= WRITE_SECONDS:
            self._write(RUNNING)

    def end(self, why: str = "") -> None:
        """Say that the command is over; nothing is kept after it.

        Args:
            why: A sentence, where it did not come to its end.
        """
        self.line(f"stopped: {why}" if why else "finished")
        self._write(STOPPED if why else FINISHED, why)
        self._end = (STOPPED if why else FINISHED, why)

    def _write(self, state: str, why: str = "") -> None:
        if self._end is not None:
            return
        now = self._written = self._clock()
        step = {"step": self._step.name, "done": self._step.done, "total": self._step.total, "note": self._step.note}
        record = {
            **self._record,
            "updated": utc(now),
            "seconds": now - self._began,
            "seconds_left": self._left.seconds() if state == RUNNING else None,
            "measured": self._left.record(),
            "state": state,
            "why": why,
            **step,
        }
        with self._guard, contextlib.suppress(OSError):
            _replace(self._directory / PROGRESS, json.dumps(record, indent=1).encode() + b"\n")


def read_progress(directory: Path) -> Mapping[str, Any]:
    """Return what the last command of a run wrote of how far it is; empty where there is nothing that can be read."""
    try:
        found = json.loads((directory / PROGRESS).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict) or found.get("schema_version") != SCHEMA_VERSION:
        return {}
    return found if all(isinstance(found.get(name), kind) for name, kind in KINDS.items()) else {}


def last_lines(directory: Path, count: int) -> list[str]:
    """Return the last lines of a run's log, fewer where there are fewer."""
    try:
        with (directory / LOG).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return lines[len(lines) - count :] if count < len(lines) else lines


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that readers see it whole or as it was; unlike results it need not survive a power loss."""
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
