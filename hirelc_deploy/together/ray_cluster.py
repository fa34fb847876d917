"""In: the address of a Ray cluster. Out: Ray, connected to it, or one sentence why not."""

from __future__ import annotations

import os
import socket
from types import ModuleType
from typing import Any

from hirelc_deploy.errors import COMMAND, InputError, TargetUnavailable

KNOCK_SECONDS = 5.0
"""Ray itself tries for minutes to reach an address where nobody answers."""


def connect(address: str, who: str) -> Any:
    """Return the module `ray`, connected.

    Args:
        address: HOST:PORT of a cluster that this machine is a node of; `auto` finds that cluster; `local` starts one of
            this machine alone, which ends with this process.
        who: Begins the sentences, such as `--ray`.

    Raises:
        InputError: Ray is not installed, or this is no address.
        TargetUnavailable: There is no cluster, or it does not take this machine.
    """
    ray = installed(f"{who} {address}")
    if "://" in address:
        raise InputError(
            f"{who} {address}: this machine must be a node of the cluster; make it one, and give HOST:PORT or `auto`:"
            f"{COMMAND}ray start --address=HOST:PORT"
        )
    if ray.is_initialized():
        return ray
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)
    _knock(address, who)
    options = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **options)
    except (ConnectionError, ValueError, RuntimeError, AssertionError, ray.exceptions.RayError) as error:
        raise TargetUnavailable(
            f"{who} {address}: {reason(error)}. This machine must be a node of a running cluster, of the same "
            f"versions of Ray and Python and with the same token:{COMMAND}ray start --address=HOST:PORT"
        ) from None
    return ray


def installed(who: str) -> ModuleType:
    """Return the module `ray`, or raise InputError in the name of `who` wants it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray reports to its makers
    try:
        import ray
    except ImportError:
        raise InputError(
            f"{who}: Ray is not installed; this brings it:{COMMAND}pip install 'hirelc-deploy[ray]'"
        ) from None
    module: ModuleType = ray
    return module


def _knock(address: str, who: str) -> None:
    """Raise where nobody listens at HOST:PORT."""
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"{who} {address}: give HOST:PORT, auto or local.")
    try:
        socket.create_connection((host, int(port)), KNOCK_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise TargetUnavailable(
            f"{who} {address}: nobody answers there ({error}); start the cluster, or give the address that "
            f"`ray start --head` printed:{COMMAND}ray start --head --port={port}"
        ) from None


def reason(error: Exception) -> str:
    """Return what an error of Ray says, without the traceback of another host."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "Error: " in line and not line.startswith("File")]
    return (named[-1] if named else lines[0] if lines else type(error).__name__).partition(". ")[0].rstrip(".")
