"""In: a program file. Out: processes that run it, on this machine; a board over SSH offers the same (remote.py)."""

from __future__ import annotations

import queue
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hirelc_deploy.errors import TargetUnavailable, printable
from hirelc_deploy.measure import worker

IMPORT_SECONDS = 60.0
"""A process that was started ahead and has not imported its runtime by then is left."""


MOST_WORDS = 2000
"""Characters of a device's own words that go into a sentence."""


class Refused(Exception):  # noqa: N818 - these four never leave measure/
    """The process is well and says no; `code` tells what kind of no."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class ProcessEnded(Exception):  # noqa: N818
    """The process ended by itself, or something ended it; the text says how."""


class ProcessHung(Exception):  # noqa: N818
    """The process did not answer in time and was ended."""


class SessionLost(Exception):  # noqa: N818
    """The device has forgotten its processes and files, as after a restart; the text says why."""


class Process(Protocol):
    """A serving process on a device; see worker.py for what it can be asked."""

    def ask(
        self,
        do: str,
        *,
        limit_s: float,
        file: Path | None = None,
        files: Sequence[Path] = (),
        images: NDArray[np.float32] | None = None,
        **values: Any,
    ) -> tuple[dict[str, Any], bytes]:
        """Return the answer; `file`, `files` and `images` travel to the device first, where it is another machine.

        Raises:
            Refused, ProcessEnded, ProcessHung, SessionLost: see there.
            TargetUnavailable: The device cannot be reached any more.
        """


class Device(Protocol):
    """Where programs run."""

    name: str
    """As it stands in a sentence: `this machine` or `me@board`."""

    def hardware(self) -> dict[str, Any]:
        """Return what worker.hardware says there."""

    def open(self, program: Path) -> AbstractContextManager[Process]:
        """Start a process that serves with this program; the program's own file is all it needs."""

    def measuring(self) -> AbstractContextManager[None]:
        """Have the device for oneself; waits while another measures."""


class LocalDevice:
    """This machine and this Python environment."""

    name = "this machine"

    def __init__(self, ahead: int = 0) -> None:
        """Args: `ahead` processes are started when one ends, so that the next measurement does not wait for imports."""
        self._ahead = ahead
        self._ready: list[tuple[Path, LocalProcess]] = []
        weakref.finalize(self, _end_all, self._ready)

    def hardware(self) -> dict[str, Any]:
        """Return what this machine says about itself."""
        return worker.hardware()

    def open(self, program: Path) -> AbstractContextManager[Process]:
        """Start a child process, or take one that was started ahead; none serves twice."""
        return self._process(program)

    def measuring(self) -> AbstractContextManager[None]:
        """Return at once: whoever starts two measurements here can see both."""
        return nullcontext()

    @contextmanager
    def _process(self, program: Path) -> Iterator[Process]:
        process = self._taken(program) or LocalProcess(program)
        try:
            yield process
        finally:
            process.close()
            while len(self._ready) < self._ahead:
                self._ready.append((program, LocalProcess(program)))
                self._ready[-1][1].send("describe")  # imports the runtime

    def _taken(self, program: Path) -> LocalProcess | None:
        """Return a process that was started ahead and is well, or None."""
        for entry in [entry for entry in self._ready if entry[0] == program]:
            self._ready.remove(entry)
            with suppress(Refused, ProcessEnded, ProcessHung):
                entry[1].receive(IMPORT_SECONDS)
                return entry[1]
            entry[1].close()
        return None


def _end_all(started: list[tuple[Path, LocalProcess]]) -> None:
    for _, process in started:
        process.child.kill()
        process.close()


class LocalProcess:
    """The parent's end of a child process. Every read has a deadline."""

    def __init__(self, program: Path) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._cache = tempfile.TemporaryDirectory()
        command = [sys.executable, "-P", worker.__file__, "serve", str(program), self._cache.name, "/"]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors)
        self._frames: queue.SimpleQueue[tuple[dict[str, Any], bytes] | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def ask(
        self,
        do: str,
        *,
        limit_s: float,
        file: Path | None = None,
        files: Sequence[Path] = (),
        images: NDArray[np.float32] | None = None,
        **values: Any,
    ) -> tuple[dict[str, Any], bytes]:
        """Return the answer of the child; see Process."""
        self.send(do, file=file, files=files, images=images, **values)
        return self.receive(limit_s)

    def send(
        self,
        do: str,
        *,
        file: Path | None = None,
        files: Sequence[Path] = (),
        images: NDArray[np.float32] | None = None,
        **values: Any,
    ) -> None:
        """Hand the child a request and do not wait; as `ask` otherwise."""
        request = request_of(
            do, str(file.resolve()) if file else None, [str(one.resolve()) for one in files], images, values
        )
        assert self.child.stdin is not None
        with suppress(BrokenPipeError):  # how it ended is found out below
            self.child.stdin.write(worker.pack(request, b"" if images is None else image_bytes(images)))
            self.child.stdin.flush()

    def receive(self, limit_s: float) -> tuple[dict[str, Any], bytes]:
        """Return the answer to the request that was sent first; raises as `ask` does."""
        try:
            frame = self._frames.get(timeout=limit_s)
        except queue.Empty:
            self.child.kill()
            raise ProcessHung(f"did not answer within {limit_s:.0f} s and was ended") from None
        if frame is None:
            code = self.child.wait()
            self._errors.seek(0)
            said = self._errors.read().decode("utf-8", "replace").strip().splitlines()
            how = f"signal {-code}" if code < 0 else f"exit status {code}"
            raise ProcessEnded(how + (f", {said[-1]}" if said else ""))
        raise_refusal(frame[0])
        return frame

    def close(self) -> None:
        """End the child and wait for it."""
        assert self.child.stdin is not None
        with suppress(BrokenPipeError):
            self.child.stdin.close()
        try:
            self.child.wait(5.0)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self._errors.close()
        self._cache.cleanup()

    def _listen(self) -> None:
        assert self.child.stdout is not None
        with self.child.stdout as answers, suppress(worker.Closed):
            while True:
                self._frames.put(worker.read_frame(answers))
        self._frames.put(None)


def request_of(
    do: str,
    file: str | None,
    files: Sequence[str],
    images: NDArray[np.float32] | None,
    values: dict[str, Any],
) -> dict[str, Any]:
    """Return the header of a request, with files as the device knows them."""
    request = {"do": do, **values}
    if file is not None:
        request["file"] = file
    if files:
        request["files"] = list(files)
    if images is not None:
        request["shape"] = images.shape
    return request


def image_bytes(images: NDArray[np.float32]) -> bytes:
    """Return images as they travel: little-endian float32, rows first."""
    return np.ascontiguousarray(images, "<f4").tobytes()


def raise_refusal(header: dict[str, Any]) -> None:
    """Raise Refused where an answer is a refusal."""
    if "refused" in header:
        raise Refused(str(header.get("code")), printable(str(header["refused"])[:MOST_WORDS]))


@contextmanager
def understood(device: str) -> Iterator[None]:
    """Turn whatever goes wrong in reading a device's answer into one sentence: it may be broken, or hostile."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, MemoryError) as error:
        reason = printable(f"{type(error).__name__}: {error}")[:MOST_WORDS]
        raise TargetUnavailable(
            f"{device}: its worker gives an answer that cannot be used ({reason}). Start the device anew; if that does "
            "not help, something else than our worker answers there."
        ) from None
