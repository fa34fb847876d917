"""In: the machine this runs on. Out: a plain description of it, and a short fingerprint of what timings depend on."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hirelc_deploy.measure.backend import Backend

FEATURES_THAT_MATTER = (
    # x86: what picks ONNX Runtime's kernels, and whether 8-bit products can saturate.
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    # ARM: dot products, 8-bit matrix products, half-precision arithmetic.
    "asimddp",
    "i8mm",
    "asimdhp",
    "bf16",
    "sve",
)
ROOT = Path("/")


def describe(backend: Backend, root: Path = ROOT) -> dict[str, Any]:
    """Return what a reader needs to judge a timing taken here, as JSON values.

    Args:
        backend: Its name and versions are part of the description.
        root: Where `proc` and `sys` are; another folder in tests.

    Returns:
        Keys `cpu_model, cores, cores_allowed, features, memory_bytes, os, architecture, python, backend, versions,
        load_average, governor, max_frequency_khz`; None where this system does not say.
    """
    governors = {_text(path) for path in sorted(root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor"))}
    return {
        "cpu_model": _cpu_model(root),
        "cores": os.cpu_count(),
        "cores_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "features": known_features(root),
        "memory_bytes": _memory_bytes(root),
        "os": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "backend": backend.name,
        "versions": backend.versions(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "governor": ", ".join(sorted(filter(None, governors))) or None,
        "max_frequency_khz": _max_frequency_khz(root),
    }


def fingerprint(machine: Mapping[str, Any]) -> str:
    """Return 12 hex digits, equal for descriptions whose timings may be put in one table.

    CPU, features, cores, architecture, backend and its versions count; load, kernel and host name do not.
    """
    lasting = ("cpu_model", "cores", "features", "architecture", "backend", "versions")
    return hashlib.sha256(json.dumps([machine[key] for key in lasting], sort_keys=True).encode()).hexdigest()[:12]


def cpu_features(root: Path = ROOT) -> frozenset[str] | None:
    """Return the CPU's feature flags as Linux names them, or None where the system does not list them."""
    for line in (_text(root / "proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return None


def known_features(root: Path = ROOT) -> list[str] | None:
    """Return those of FEATURES_THAT_MATTER that this CPU has, or None where the system does not list them."""
    features = cpu_features(root)
    return None if features is None else [name for name in FEATURES_THAT_MATTER if name in features]


def _cpu_model(root: Path) -> str:
    fields: dict[str, str] = {}
    for line in (_text(root / "proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    if "model name" in fields:
        family = " ".join(f"{name} {fields[name]}" for name in ("cpu family", "model", "stepping") if name in fields)
        return f"{fields['model name']} ({family})" if family else fields["model name"]
    board = (_text(root / "proc/device-tree/model") or "").strip("\0 ")
    part = " ".join(f"{name} {fields[name]}" for name in ("CPU implementer", "CPU part") if name in fields)
    return ", ".join(filter(None, (board, part))) or platform.processor() or platform.machine()


def _memory_bytes(root: Path) -> int | None:
    for line in (_text(root / "proc/meminfo") or "").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return None


def _max_frequency_khz(root: Path) -> int | None:
    text = _text(root / "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
    return int(text) if text and text.isdigit() else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return None
