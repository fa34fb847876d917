"""In: what a board says of itself, and of who holds its lock. Out: the same, checked; it may come from an attacker."""

from __future__ import annotations

import os
from typing import Any

from hirelc_deploy.errors import printable
from hirelc_deploy.measure import worker
from hirelc_deploy.measure.device import MOST_WORDS


def check_hardware(said: Any) -> None:
    """Raise TypeError or KeyError unless a board's description of itself is what worker.hardware returns."""
    texts = ("cpu_model", "os", "architecture", "python", "governor", "power_mode")
    for key, value in said.items():
        kind = str if key in texts else (int, float, list)
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"{key} is a {type(value).__name__}")
    if missing := {"cpu_model", "cores", "features", "architecture"} - said.keys():
        raise KeyError(min(missing))
    if not all(isinstance(name, str) for name in said["features"] or ()):
        raise TypeError("features are no names")
    for key in texts:
        if said.get(key) is not None:
            said[key] = printable(said[key][:MOST_WORDS])


def is_dead(who: dict[str, Any]) -> bool:
    """Return whether the holder of a lock was a process of this machine, since its last start, that is no more."""
    if who.get("boot_id") != worker.boot_id() or who.get("boot_id") == "unknown":
        return False
    pid = who.get("pid")
    if type(pid) is not int or pid <= 1:  # it is a board's word, and must not name a group of ours
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False
