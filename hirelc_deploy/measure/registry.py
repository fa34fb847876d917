"""In: the installed entry points. Out: the backends by name, and what is wrong with those that do not load."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from hirelc_deploy.errors import InputError, TargetUnavailable
from hirelc_deploy.measure.backend import Backend

GROUP = "hirelc_deploy.backends"


@dataclass(frozen=True)
class Registered:
    """One installed backend: either `backend` is there, or `problem` says in one sentence why not."""

    name: str
    backend: Backend | None
    problem: str


def installed_backends() -> list[Registered]:
    """Return every backend that is installed, by name; a broken one is reported, never raised."""
    return [_load(entry) for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name)]


def get_backend(name: str) -> Backend:
    """Return the backend called `name`.

    Raises:
        InputError: No backend of this name is installed.
        TargetUnavailable: It is installed but does not load.
    """
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in found:
        known = ", ".join(sorted(found)) or "none (reinstall hirelc-deploy)"
        raise InputError(f"backend {name!r} is not installed; known backends: {known}.")
    registered = _load(found[name])
    if registered.backend is None:
        raise TargetUnavailable(registered.problem)
    return registered.backend


def _load(entry: EntryPoint) -> Registered:
    try:
        backend: Backend = entry.load()()
    except Exception as error:  # third-party code at import: anything can come out of it
        reason = f"{type(error).__name__}: {error}"
        return Registered(entry.name, None, f"backend {entry.name!r} ({entry.value}) does not load: {reason}.")
    return Registered(entry.name, backend, "")
