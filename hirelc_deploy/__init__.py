"""hirelc-deploy: a trained vision model in, the fastest file its device can run within an allowed accuracy drop out.

import hirelc_deploy

result = hirelc_deploy.search(model, {"train": train, "test": test}, target="cpu", out="runs/a")
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hirelc_deploy.version import __version__

# Since 1.29 ONNX Runtime tells Microsoft of models and machine, and MLflow tells its makers of calls.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

if TYPE_CHECKING:
    from hirelc_deploy.api import (
        Family,
        Inspection,
        Result,
        Why,
        apply,
        benchmark,
        family,
        inspect,
        load,
        search,
        verify,
        why,
    )

__all__ = [
    "Family",
    "Inspection",
    "Result",
    "Why",
    "__version__",
    "apply",
    "benchmark",
    "family",
    "inspect",
    "load",
    "search",
    "verify",
    "why",
]


def __getattr__(name: str) -> Any:
    """Return a call of `hirelc_deploy.api`, imported when asked for: torch takes seconds, --help must not."""
    if name in __all__:
        return getattr(import_module("hirelc_deploy.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
