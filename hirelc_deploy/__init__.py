"""hirelc-deploy: a trained vision model in, the fastest file its device can run within an allowed accuracy drop out."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Return `deliver.read.load`, imported when asked for: torch takes seconds, --help must not."""
    if name == "load":
        return import_module("hirelc_deploy.deliver.read").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
