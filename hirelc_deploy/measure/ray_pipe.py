"""In: a node of a Ray cluster and a command. Out: that command, run on that node, with this process's pipes.

    python -m hirelc_deploy.measure.ray_pipe NODE ssh me@board uptime

remote.py starts it in the place of `ssh`, so that a board may hang on another host. Bytes go through an actor there; as
this file is the main program here, Ray sends the actor's code, and that host needs nothing of this project.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from hirelc_deploy.errors import HirelcError, TargetUnavailable
from hirelc_deploy.together.ray_cluster import connect, reason

PIECE_BYTES = 1 << 20
LOST = 255
"""Exit code of an `ssh` whose line is gone, so also of a node that is."""
FLOWS = 3
"""In, out, and what is said on standard error; each has one call under way, so its bytes stay in order."""


class FarProcess:
    """An actor: a process on its node and the other ends of its pipes."""

    def __init__(self, command: Sequence[str]) -> None:
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )

    def write(self, data: bytes) -> bool:
        """Write all bytes, none closes the pipe; return whether somebody still reads."""
        assert self._child.stdin is not None
        try:
            if not data:
                self._child.stdin.close()
            while data:
                data = data[self._child.stdin.write(data) :]
        except OSError:
            return False
        return True

    def read(self, number: int) -> bytes:
        """Return the next bytes of standard output (1) or error (2), nothing at the end."""
        stream = self._child.stdout if number == 1 else self._child.stderr
        assert stream is not None
        return os.read(stream.fileno(), PIECE_BYTES)

    def wait(self) -> int:
        """Return the exit code, 128 and the number for a signal, as a shell does."""
        code = self._child.wait()
        return code if code >= 0 else 128 - code


def far_process(ray: Any, node: str, command: Sequence[str]) -> Any:
    """Return a FarProcess on the node of this name, host name or address; raises TargetUnavailable without one."""
    alive = [one for one in ray.nodes() if one["Alive"]]
    names = ("NodeName", "NodeManagerHostname", "NodeManagerAddress")
    found = [one["NodeID"] for one in alive if node in {one.get(name) for name in names}]
    if len(found) != 1:
        known = ", ".join(sorted({str(one.get(name)) for one in alive for name in names}))
        raise TargetUnavailable(f"{len(found) or 'no'} nodes of the Ray cluster are called {node!r}; it has {known}")
    where = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(found[0], soft=False)
    actor = ray.remote(FarProcess).options(num_cpus=0, scheduling_strategy=where, max_concurrency=FLOWS)
    return actor.remote(list(command))


def join(ray: Any, far: Any, out: int) -> int:
    """Carry bytes, to descriptor `out` and to our errors, until the far process has ended; return its exit code."""
    failed: list[Exception] = []

    def carried(flow: Callable[..., None], *values: int) -> threading.Thread:
        def run() -> None:
            try:
                flow(*values)
            except ray.exceptions.RayError as error:
                failed.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def there() -> None:
        data = b"-"
        while data:
            data = os.read(0, PIECE_BYTES)
            if not ray.get(far.write.remote(data)):
                return

    def back(number: int, ours: int) -> None:
        while data := ray.get(far.read.remote(number)):
            while data:
                data = data[os.write(ours, data) :]

    carried(there)
    for thread in (carried(back, 1, out), carried(back, 2, 2)):
        thread.join()
    if failed:
        raise failed[0]
    return int(ray.get(far.wait.remote()))


def main(arguments: Sequence[str]) -> int:
    """Run the command line: the node, then the command."""
    node, *command = arguments
    out = os.dup(1)
    os.dup2(2, 1)  # Ray prints what befalls a node on standard output, where it would be taken for the board's bytes
    try:
        ray = connect("auto", f"via {node}: ray")
        try:
            return join(ray, far_process(ray, node, command), out)
        except ray.exceptions.RayError as error:
            raise TargetUnavailable(f"via {node}: its Ray actor is lost ({reason(error)})") from None
    except HirelcError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return LOST


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code)  # a thread may still wait for standard input
