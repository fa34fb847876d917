"""In: one configuration, several limits and a folder. Out: a run for each of them, and one page with the curve."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hirelc_deploy.config import JobConfig, Limits
from hirelc_deploy.errors import ConstraintError, HirelcError, InputError
from hirelc_deploy.jobs.workplace import Workplace, beside, finished
from hirelc_deploy.results.family_page import write_page
from hirelc_deploy.run_log import read_progress
from hirelc_deploy.runs import CONFIG, json_text, write_atomic

SCHEMA_VERSION = 1
FAMILY, FAMILY_PAGE = "family.json", "family.html"


def run_family(
    members: Sequence[Limits],
    config: JobConfig,
    out: Path,
    opened: Callable[[JobConfig, Path], Workplace],
    search: Callable[[Workplace], Any],
    command: str,
) -> dict[str, Any]:
    """Search at each of several limits and return the record of all; it is also written to `out`, with a page.

    The one that allows most time comes first, but for runs that are there. Each further run begins with what the one
    before it has measured. Limits that nothing keeps stop no other search.

    Args:
        config: Of all searches, but for their limits.
        opened: Opens the first run.
        search: Does the search of an open run, or takes what a finished one found.

    Raises:
        ConstraintError: No limit of all can be kept.
        InputError: A limit is there twice, the folder holds something else, or what a single search refuses.
    """
    named = names_of(members)
    was_there = out.exists()
    _check_folder(out, named)
    workplace: Workplace | None = None
    missed: dict[str, str] = {}
    try:
        for name, limits in sorted(named.items(), key=lambda item: (_is_new(out / item[0]), _severity(item[1]))):
            own, folder = replace(config, limits=limits), out / name
            workplace = opened(own, folder) if workplace is None else beside(workplace, own, folder)
            workplace.pipeline.progress.say(f"{name}:")
            try:
                search(workplace)
            except ConstraintError as error:
                missed[name] = str(error)
                workplace.pipeline.progress.say(f"{name} is missed: {error}")
    except HirelcError:
        if not was_there:
            with contextlib.suppress(OSError):  # something was measured, and is kept
                out.rmdir()
        raise
    if workplace is None or len(missed) == len(named):
        raise ConstraintError(next(iter(missed.values())))
    found = [_member(out / name, limits, missed.get(name)) for name, limits in named.items()]
    record = {
        "schema_version": SCHEMA_VERSION,
        "model": workplace.source.spec,
        "target": config.target,
        "command": command,
        "machine": workplace.run.machine,
        "seconds": sum(member["seconds"] for member in found),
        "members": found,
    }
    write_atomic(out / FAMILY, json_text(record, indent=1) + "\n")
    write_page(record, out / FAMILY_PAGE)
    return record


def names_of(members: Sequence[Limits]) -> dict[str, Limits]:
    """Return limits by what tells each from the others, as `speedup-4`; raises InputError where two are alike."""
    if not members:
        raise InputError("limits: give at least one.")
    fields = [field.name for field in dataclasses.fields(Limits)]
    differing = [name for name in fields if len({getattr(limits, name) for limits in members}) > 1]
    found: dict[str, Limits] = {}
    for limits in members:
        told = [(name, getattr(limits, name)) for name in differing or fields]
        name = "-".join(f"{name.replace('_', '-')}-{value:.12g}" for name, value in told if value is not None)
        if name in found:
            raise InputError(f"limits: {name.replace('-', ' ') or 'no limit'} is there twice; give each once.")
        found[name or "no-limit"] = limits
    return found


def _is_new(run: Path) -> bool:
    return not (run / CONFIG).exists()


def _severity(limits: Limits) -> tuple[float, ...]:
    """Return what sorts limits: those that allow most come first."""
    time = (None if limits.speedup is None else 1 / limits.speedup, limits.max_latency_ms)
    rest = (limits.max_drop, limits.max_bytes, limits.max_memory_bytes, limits.max_energy_mj)
    return tuple(-math.inf if most is None else -most for most in (*time, *rest))


def _check_folder(out: Path, names: Iterable[str]) -> None:
    """Raise InputError for a folder that holds something else than runs of a family."""
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out}: a file of that name is there; give another --out.")
    if (out / CONFIG).exists():
        raise InputError(f"{out}: holds a run of one search; several limits need another --out.")
    known = {*names, FAMILY, FAMILY_PAGE, *(path.parent.name for path in out.glob(f"*/{CONFIG}"))}
    foreign = sorted(path.name for path in out.iterdir() if path.name not in known)
    if foreign:
        raise InputError(f"{out}: holds {foreign[0]!r}; give an empty or new folder as --out.")


def _member(folder: Path, limits: Limits, missed: str | None) -> dict[str, Any]:
    """Return what became of one of the limits."""
    progress = read_progress(folder)
    return {
        "name": folder.name,
        "run": str(folder),
        "limits": {name: value for name, value in dataclasses.asdict(limits).items() if value is not None},
        "missed": missed,
        "seconds": float(progress.get("seconds_before", 0.0) + progress.get("seconds", 0.0)),
        "result": None if missed else finished(folder),
    }
