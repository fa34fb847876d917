"""In: the name of a device. Out: which backend, threads and precisions to use for it, built in or from targets.toml."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hirelc_deploy.errors import InputError, TargetUnavailable
from hirelc_deploy.measure.backend import Backend, Precision
from hirelc_deploy.measure.registry import get_backend, installed_backends

ENVIRONMENT_VARIABLE = "HIRELC_DEPLOY_TARGETS"
KEYS = ("backend", "threads", "precisions", "description")


@dataclass(frozen=True)
class Target:
    """A device as the user names it.

    Attributes:
        precisions: Names that a plan may use, a subset of what the backend executes; empty for all of them.
        source: Where it was defined: `built in` or a file.
    """

    name: str
    backend: str
    threads: int = 1
    precisions: tuple[str, ...] = ()
    description: str = ""
    source: str = "built in"


BUILT_IN = (Target("cpu", "onnxruntime_cpu", description="this machine's CPU, one thread, ONNX Runtime"),)

NOT_YET = {
    "jetson": "an NVIDIA Jetson needs the TensorRT backend",
    "gpu": "an NVIDIA GPU needs the TensorRT backend",
    "raspberrypi4": "a Raspberry Pi 4 needs the backend that runs ONNX Runtime on an ARM board over SSH",
    "raspberrypi5": "a Raspberry Pi 5 needs the backend that runs ONNX Runtime on an ARM board over SSH",
    "arm": "an ARM board needs the backend that runs ONNX Runtime on it over SSH",
}
"""Devices the tool is meant for and cannot reach in this version: name to what is missing."""


def targets_file(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the user's file: $HIRELC_DEPLOY_TARGETS, else hirelc-deploy/targets.toml in the folder for configs."""
    if ENVIRONMENT_VARIABLE in environ:
        return Path(environ[ENVIRONMENT_VARIABLE]).expanduser()
    configs = environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(configs).expanduser() / "hirelc-deploy" / "targets.toml"


def known_targets(environ: Mapping[str, str] = os.environ) -> dict[str, Target]:
    """Return all targets by name; the user's file may redefine a built-in one.

    Raises:
        InputError: The file is broken, or $HIRELC_DEPLOY_TARGETS names one that is not there.
    """
    path = targets_file(environ)
    targets = {target.name: target for target in BUILT_IN}
    if path.exists() or ENVIRONMENT_VARIABLE in environ:
        targets |= read_targets(path)
    return targets


def find_target(name: str, environ: Mapping[str, str] = os.environ) -> Target:
    """Return the target called `name`.

    Raises:
        InputError: Nobody knows it.
        TargetUnavailable: It is a device whose backend this version does not have.
    """
    targets = known_targets(environ)
    if name in targets:
        return targets[name]
    usable = ", ".join(targets)
    if name in NOT_YET:
        raise TargetUnavailable(
            f"target {name!r}: {NOT_YET[name]}, which this version does not have; usable: {usable}."
        )
    near = difflib.get_close_matches(name, [*targets, *NOT_YET], 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise InputError(
        f"target {name!r} is unknown; known targets: {usable}.{hint} Define others in {targets_file(environ)}."
    )


def open_target(target: Target) -> Backend:
    """Return the target's backend, ready to run.

    Raises:
        InputError: The target asks for a precision that its backend does not execute.
        TargetUnavailable: The backend says that it cannot run here, and why.
    """
    backend = get_backend(target.backend)
    reason = backend.availability()
    if reason is not None:
        raise TargetUnavailable(f"target {target.name!r}: {reason}")
    target_precisions(target, backend)
    return backend


def target_precisions(target: Target, backend: Backend) -> tuple[Precision, ...]:
    """Return the precisions that plans for this target may use, in the backend's order."""
    offered = backend.precisions()
    unknown = set(target.precisions) - {precision.name for precision in offered}
    if unknown:
        names = ", ".join(precision.name for precision in offered)
        raise InputError(
            f"{target.source}: target {target.name!r} asks for precision {min(unknown)!r}, "
            f"but backend {backend.name!r} executes {names}."
        )
    return tuple(p for p in offered if not target.precisions or p.name in target.precisions)


def read_targets(path: Path) -> dict[str, Target]:
    """Read a targets file: one table per target, with `backend` and optionally threads, precisions, description.

    Raises:
        InputError: naming file and line, for a missing or broken file, an unknown key or backend, a wrong value.
    """
    try:
        text = path.read_text("utf-8")
        tables = tomllib.loads(text)
    except FileNotFoundError:
        raise InputError(f"{path}: no such targets file; create it or unset ${ENVIRONMENT_VARIABLE}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a targets file ({error}).") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML: {error}.") from None
    return {name: _target(name, table, path, text) for name, table in tables.items()}


def _target(name: str, table: Any, path: Path, text: str) -> Target:
    def wrong(key: str, found: str) -> InputError:
        return InputError(f"{path}, line {_line_of(text, name, key)}: target {name!r}: {found}.")

    if not isinstance(table, dict):
        raise wrong(name, f"is {table!r}, not a table; write [{name}] and keys below it")
    for key in table:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise wrong(key, f"unknown key {key!r}{hint}; a target has {', '.join(KEYS)}")
    backends = [registered.name for registered in installed_backends()]
    if "backend" not in table:
        raise wrong("", f"has no backend; add one of: {', '.join(backends)}")
    backend, threads = table["backend"], table.get("threads", 1)
    if backend not in backends:
        raise wrong("backend", f"backend {backend!r} is not installed; known backends: {', '.join(backends)}")
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise wrong("threads", f"threads is {threads!r}; give a whole number of at least 1")
    precisions = table.get("precisions", [])
    if not isinstance(precisions, list) or not all(isinstance(item, str) for item in precisions):
        raise wrong("precisions", f'precisions is {precisions!r}; give a list of names, such as ["float", "int8"]')
    description = table.get("description", "")
    if not isinstance(description, str):
        raise wrong("description", f"description is {description!r}; give a text")
    return Target(name, backend, threads, tuple(precisions), description, str(path))


def _line_of(text: str, target: str, key: str) -> int:
    """Return the number of the line that sets `key` below [target], or that of the target, or 1."""
    header = re.compile(rf"""\s*\[\s*["']?{re.escape(target)}["']?\s*\]""")
    at = 1
    inside = False
    for number, line in enumerate(text.splitlines(), 1):
        if header.match(line):
            inside, at = True, number
        elif line.lstrip().startswith("["):
            inside = False
        elif key and re.match(rf"""\s*["']?{re.escape(key)}["']?\s*[=.]""", line) and (inside or key == target):
            return number
    return at
