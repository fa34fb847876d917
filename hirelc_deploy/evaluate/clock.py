"""In: a piece of work. Out: the seconds that it took, under its name."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def clocked(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the time spent inside to `seconds[stage]`."""
    start = time.monotonic()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.monotonic() - start
