"""In: the folder of a run. Out: how it stands: what is done, what is best, whether somebody is at work on it."""

from __future__ import annotations

import datetime
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hirelc_deploy.errors import printable
from hirelc_deploy.outcome import Failed, Measured
from hirelc_deploy.progress import duration
from hirelc_deploy.run_log import FINISHED, LOG, RUNNING, STOPPED, last_lines, read_progress
from hirelc_deploy.runs import FINALIST, RESULT, Run, TrialRecord, writer_of

UNKNOWN = "unknown"


def status_of(directory: Path, lines: int = 5, now: float | None = None) -> dict[str, Any]:
    """Return how a run stands, as `status --json` prints it. The folder is only read, and never locked.

    Args:
        lines: Of its log, the last ones.
        now: Seconds since 1970, UTC; this moment where it is None.

    Raises:
        InputError: It is no run, or its journal is damaged.
    """
    writer = writer_of(directory)  # asked first: a run that ends meanwhile has its end written down before it lets go
    progress = read_progress(directory)
    run = Run.read(directory)
    counts = {name: sum(t.fidelity == name for t in run.trials) for name in ("F1", "F2", "F3")}
    bundle = directory / "bundle"
    known = ("command", "host", "began", "updated", "step", "done", "total", "note")
    return {
        "run": str(directory),
        **_state(directory, writer, progress),
        **{name: progress.get(name) for name in known},
        "pid": writer or progress.get("pid"),
        "seconds": progress["seconds_before"] + progress["seconds"] if progress else None,
        "seconds_left": _seconds_left(progress, now) if writer is not None else None,
        "trials": {**counts, "failed": sum(isinstance(t.outcome, Failed) for t in run.trials)},
        "best": best_so_far(run.trials, run.facts),
        "bundle": str(bundle) if (directory / RESULT).exists() and bundle.is_dir() else None,
        "log": last_lines(directory, lines),
    }


def _state(directory: Path, writer: int | None, progress: Mapping[str, Any]) -> dict[str, Any]:
    alive: bool | None = writer is not None
    state, why = progress.get("state"), progress.get("why", "")
    if state is None:  # a run of an older version
        state = FINISHED if (directory / RESULT).exists() else RUNNING if alive else STOPPED
    elif state == RUNNING and not alive:
        if progress["host"] == socket.gethostname():
            state, why = STOPPED, "its process ended without a word: it was killed, or the machine went down."
        else:
            alive, state = None, UNKNOWN
            why = f"it was begun on {progress['host']}, and processes of other machines cannot be seen from here."
    return {"state": state, "alive": alive, "why": why}


def _seconds_left(progress: Mapping[str, Any], now: float | None) -> float | None:
    """Return what the command said, less what has passed since it did."""
    left = progress.get("seconds_left")
    if not isinstance(left, float | int):
        return None
    try:
        updated = datetime.datetime.fromisoformat(progress["updated"]).timestamp()
    except ValueError:
        return None
    passed = (time.time() if now is None else now) - updated
    return max(0.0, left - max(0.0, passed))


def best_so_far(trials: Sequence[TrialRecord], facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the fastest recovered file that keeps the limits, else the one that lost least; None before the first."""
    found = {t.plan.digest: t.outcome for t in trials if t.fidelity == "F3" and isinstance(t.outcome, Measured)}
    said = {fact["plan"]: fact for key, fact in facts.items() if key.startswith(FINALIST) and _judges(fact, found)}
    candidates = said.keys() or found.keys()  # the accuracy guard trains the uncut model, which is no finalist

    def rank(digest: str) -> tuple[bool, float]:
        judged = said.get(digest, {"keeps_limits": True})
        if judged["keeps_limits"]:
            return False, found[digest].ratio or 1.0
        return True, judged["drop_points"] or 0.0

    if not candidates:
        return None
    best = min(candidates, key=rank)
    outcome, judged = found[best], said.get(best, {})
    return {
        "plan": best,
        "ratio": outcome.ratio,
        "loss": outcome.loss,
        "accuracy": outcome.accuracy,
        "size_bytes": outcome.size_bytes,
        **{name: judged.get(name) for name in ("drop_points", "drop_error", "keeps_limits")},
    }


def _judges(fact: Any, found: Mapping[str, Measured]) -> bool:
    kinds = {"plan": str, "drop_points": float | int, "drop_error": float | int, "keeps_limits": bool}
    whole = isinstance(fact, Mapping) and all(isinstance(fact.get(name), kind) for name, kind in kinds.items())
    return whole and fact["plan"] in found


def status_text(status: Mapping[str, Any]) -> str:
    """Return what `status` prints for people."""
    lines = [status["command"] or "a run of an older version, which did not say how far it is", _state_line(status)]
    if status["step"] and status["state"] == RUNNING:
        counted = f": {status['done']} of {status['total']}" if status["total"] else ""
        lines.append(f"now: {status['step']}{counted}{'  ' + status['note'] if status['note'] else ''}")
    trials = status["trials"]
    failed = f", {trials['failed']} of them failed" if trials["failed"] else ""
    lines.append(f"trials: {trials['F1']} F1 (cut), {trials['F2']} F2 (file), {trials['F3']} F3 (recovered){failed}")
    lines.append(_best_line(status["best"]))
    if status["bundle"]:
        lines.append(f"bundle: {status['bundle']}")
    if status["log"]:
        lines += [f"log ({Path(status['run']) / LOG}):", *(f"  {line}" for line in status["log"])]
    return "\n".join(map(printable, lines))


def _state_line(status: Mapping[str, Any]) -> str:
    spent = f" after {duration(status['seconds'])}" if status["seconds"] is not None else ""
    if status["state"] == RUNNING:
        left = status["seconds_left"]
        ending = f", about {duration(left)} left" if left is not None else ", time left not yet known"
        return f"running{spent.replace('after', 'for')} (process {status['pid'] or 'unknown'}){ending}"
    if status["state"] == UNKNOWN:
        return f"not known whether it runs: {status['why']} It was last heard of at {status['updated']}."
    held = f"; process {status['pid']} has it open" if status["alive"] else ""
    return f"{status['state']}{spent}{held}{': ' + status['why'] if status['why'] else ''}"


def _best_line(best: Mapping[str, Any] | None) -> str:
    if best is None:
        return "best so far: nothing is recovered yet"
    faster = f"{1 / best['ratio']:.2f} times faster than the uncut float file" if best["ratio"] else "not timed"
    drop = f", drop {best['drop_points']:+.2f} on the selection split" if best["drop_points"] is not None else ""
    keeps = {None: "", True: ", keeps the limits", False: ", does NOT keep the limits"}[best["keeps_limits"]]
    return f"best so far: {best['plan']}, {faster}{drop}{keeps}"
