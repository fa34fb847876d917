"""In: the machine this runs on. Out: a plain description of it, and a short fingerprint of what timings depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hirelc_deploy.measure import worker
from hirelc_deploy.measure.backend import Backend, Elsewhere

ROOT = Path("/")


def describe(backend: Backend, root: Path = ROOT) -> dict[str, Any]:
    """Return what a reader needs to judge a timing taken here, as JSON values.

    Args:
        backend: Its name and versions are part of the description.
        root: Where `proc` and `sys` are; another folder in tests.

    Returns:
        Keys `cpu_model, cores, cores_allowed, features, memory_bytes, os, architecture, python, backend, versions,
        load_average, governor, max_frequency_khz, power_mode`; None where this system does not say.
    """
    hardware = backend.hardware() if isinstance(backend, Elsewhere) else worker.hardware(str(root))
    return {**hardware, "backend": backend.name, "versions": backend.versions()}


def fingerprint(machine: Mapping[str, Any]) -> str:
    """Return 12 hex digits, equal for descriptions whose timings may be put in one table.

    CPU, features, cores, architecture, backend and its versions count, and a Jetson's power mode; load, kernel and host
    name do not.
    """
    lasting = ("cpu_model", "cores", "features", "architecture", "backend", "versions")
    values = [machine[key] for key in lasting]
    if machine.get("power_mode") is not None:
        values.append(machine["power_mode"])
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def cpu_features(root: Path = ROOT) -> frozenset[str] | None:
    """Return the CPU's feature flags as Linux names them, or None where the system does not list them."""
    return worker.cpu_features(str(root))


def known_features(root: Path = ROOT) -> list[str] | None:
    """Return those of worker.FEATURES_THAT_MATTER that this CPU has, or None where the system does not list them."""
    features = cpu_features(root)
    return None if features is None else [name for name in worker.FEATURES_THAT_MATTER if name in features]
