"""hirelc-deploy: a trained vision model in, the fastest file its device can run within an allowed accuracy drop out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hirelc_deploy.bundle import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import `load` when it is asked for: torch takes seconds, and `hirelc-deploy --help` does not need it."""
    if name == "load":
        from hirelc_deploy.bundle import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
