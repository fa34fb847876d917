"""In: this machine. Out: what can run here, what is missing, and how to get it, one finding a line."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from typing import Any

from hirelc_deploy.measure.registry import installed_backends
from hirelc_deploy.measure.worker import hardware

PACKAGES = ("torch", "torchvision", "timm", "onnx", "onnxscript", "onnxruntime", "numpy", "safetensors")


def examine() -> list[dict[str, Any]]:
    """Return findings with the keys `what`, `ok` and `says`."""
    findings = [
        _finding("python", sys.version_info >= (3, 11), f"{platform.python_version()}; 3.11 or newer is needed.")
    ]
    for package in PACKAGES:
        try:
            findings.append(_finding(package, True, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            findings.append(_finding(package, False, f"is not installed; `pip install {package}`."))
    for entry in installed_backends():
        problem = entry.problem if entry.backend is None else entry.backend.availability()
        findings.append(_finding(f"backend {entry.name}", problem is None, problem or "can run here."))
        if entry.backend is not None and problem is None:
            for precision in entry.backend.precisions():
                says = (
                    f"{precision.activation_type} activations, {precision.weight_bits}-bit weights. {precision.remark}"
                )
                findings.append(_finding(f"backend {entry.name}, precision {precision.name}", True, says.strip()))
    model = hardware()["cpu_model"] or "of unknown model"
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    findings.append(_finding("processor", True, f"{model}, {cores} {'core' if cores == 1 else 'cores'}."))
    findings.append(
        _finding(
            "quiet machine", load < 0.5 * cores, f"load average {load:.1f} on {cores} cores; timing wants little else."
        )
    )
    ssh = shutil.which("ssh")
    findings.append(_finding("ssh", ssh is not None, ssh or "not found; remote boards need the OpenSSH client."))
    return findings


def _finding(what: str, ok: bool, says: str) -> dict[str, Any]:
    return {"what": what, "ok": ok, "says": says}
