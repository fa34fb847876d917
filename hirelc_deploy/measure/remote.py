"""In: the SSH name of a board. Out: a device that runs programs there, over a connection that may drop and come back.

Everything goes through one `ssh` of the user's own (keys, jumps, known hosts) and one framed channel; at its other end
worker.py answers. Requests are numbered and asked again after a reconnect, so nothing runs twice and nothing that
was finished is lost.
"""

from __future__ import annotations

import atexit
import getpass
import hashlib
import os
import queue
import secrets
import select
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hirelc_deploy.errors import HirelcError, TargetUnavailable, printable
from hirelc_deploy.measure import worker
from hirelc_deploy.measure.board_answers import check_hardware, is_dead
from hirelc_deploy.measure.device import (
    MOST_WORDS,
    Process,
    ProcessEnded,
    ProcessHung,
    Refused,
    SessionLost,
    image_bytes,
    raise_refusal,
    request_of,
    understood,
)

FOLDER = "~/.cache/hirelc-deploy"
CHUNK_BYTES = 1 << 20
"""Of an upload: what is sent again at most after the line dropped, and small enough not to wait long for an answer."""
ANSWER_SECONDS = 60.0
"""A keeper that does not answer a question of its own within this is taken for gone."""
CONNECT_SECONDS = 30.0
SLOWEST_BYTES_PER_S = 1e6
"""A large answer may take this much longer than a small one; a slower line has the time of the answer besides."""
PIECE_BYTES = 1 << 18
UNREAD_PIECES = 64
"""What a board sends unasked waits in its pipe beyond these 16 MiB, not in our memory."""
MOST_GREETING_BYTES = 1 << 20
"""Of what shells and greetings print before the worker speaks."""
MOST_EVICTIONS = 3
"""Dead holders of a board's lock in a row; beyond that somebody else writes the lock."""
GOODBYE_SECONDS = 20.0
"""Whoever closes a board waits no longer; it cleans up by itself."""
UNREAD_SECONDS = 60.0
"""Who reads nothing of what is sent for this long is taken for gone."""
IDLE_SECONDS = 900.0
"""Asked nothing for this long, the board takes us for dead even while the connection stands."""

SSH_OPTIONS = (
    *("-T", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes", "-o", "ConnectTimeout=10"),
    *("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"),  # a dead line is seen after 15 s
    *("-o", "ForwardAgent=no", "-o", "ClearAllForwardings=yes", "-o", "ControlPath=none"),
)

TOO_OLD = 180
"""A Python that cannot run the worker ends with this + 10 * major + minor: its words may be lost on the way."""

BOOT = (
    f"import sys; v = sys.version_info; v >= (3, 8) or sys.exit({TOO_OLD} + 10 * v[0] + v[1]); "
    "SOURCE = sys.stdin.buffer.read({size}); "
    'exec(compile(SOURCE, "worker.py", "exec"), {{"__name__": "board", "SOURCE": SOURCE, "MARK": "{mark}"}})'
)
"""What is typed at the board: reads the worker from the pipe, so that nothing is installed and no data is quoted."""


class Dropped(Exception):  # noqa: N818 - never leaves this module
    """The line is gone; another attempt may succeed."""


class Line:
    """One `ssh` process and the frames on its pipes."""

    def __init__(self, command: Sequence[str], host: str, python: str) -> None:
        self._host = host
        source, mark = Path(worker.__file__).read_bytes(), secrets.token_hex(8)
        boot = f"{python} -u -c {shlex.quote(BOOT.format(size=len(source), mark=mark))}"
        try:
            self.ssh = subprocess.Popen(
                [*command, *SSH_OPTIONS, "--", host, boot],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for us; we say goodbye over this line
            )
        except FileNotFoundError:
            raise TargetUnavailable(
                f"{host}: there is no `{command[0]}` here; install the OpenSSH client (apt install openssh-client)."
            ) from None
        assert self.ssh.stdin is not None
        os.set_blocking(self.ssh.stdin.fileno(), False)
        self._said: list[str] = []
        self._incoming: queue.Queue[bytes] = queue.Queue(UNREAD_PIECES)
        self._is_closed = False
        self._buffer = worker.Buffer()
        self._threads = [threading.Thread(target=one, daemon=True) for one in (self._hear, self._overhear)]
        for thread in self._threads:
            thread.start()
        try:
            self._write(source)
            self._skip_until(f"\0{mark}\n".encode())
        except BaseException:
            self.close()
            raise

    def send(self, frame: bytes) -> None:
        """Write a frame; raises Dropped."""
        self._write(frame)

    def receive(self, limit_s: float) -> tuple[dict[str, Any], bytes]:
        """Return the next frame; raises Dropped when the line ends or says nothing for `limit_s`."""
        until = time.monotonic() + limit_s
        try:
            frame = self._buffer.feed(b"")
            while frame is None:
                arriving = self._buffer.header[1] if self._buffer.header else 0
                frame = self._buffer.feed(self._next(until + arriving / SLOWEST_BYTES_PER_S))
        except worker.Closed as nonsense:
            raise Dropped(f"it sent {nonsense}") from None
        return frame

    def close(self) -> None:
        """End the connection; what runs on the board goes on."""
        self._is_closed = True
        self.ssh.kill()
        self.ssh.wait()
        for thread in self._threads:
            thread.join(5.0)
        for stream in (self.ssh.stdin, self.ssh.stdout, self.ssh.stderr):
            with suppress(OSError):
                if stream is not None:
                    stream.close()

    def _write(self, data: bytes) -> None:
        assert self.ssh.stdin is not None
        pipe, rest = self.ssh.stdin.fileno(), memoryview(data)
        try:
            while rest:
                if not select.select([], [pipe], [], UNREAD_SECONDS)[1]:
                    raise Dropped("it does not read what it is sent")
                with suppress(BlockingIOError):
                    rest = rest[os.write(pipe, rest) :]
        except OSError:
            self._fail()

    def _skip_until(self, mark: bytes) -> None:
        until, held, skipped = time.monotonic() + CONNECT_SECONDS, b"", 0
        while mark not in held:
            if skipped > MOST_GREETING_BYTES:
                raise Dropped("it greets without end and never starts the worker")
            held = held[-len(mark) :] + self._next(until)
            skipped += len(held)
        self._buffer.held += held.partition(mark)[2]

    def _next(self, until: float) -> bytes:
        try:
            if time.monotonic() > until:  # however much there still is to read
                raise queue.Empty
            data = self._incoming.get(timeout=max(0.001, until - time.monotonic()))
        except queue.Empty:
            raise Dropped("no answer in time") from None
        if not data:
            self._fail()
        return data

    def _hear(self) -> None:
        assert self.ssh.stdout is not None
        data = b"-"
        while data:
            data = os.read(self.ssh.stdout.fileno(), PIECE_BYTES)
            while not self._is_closed:
                with suppress(queue.Full):
                    self._incoming.put(data, timeout=0.2)
                    break

    def _overhear(self) -> None:
        stream = self.ssh.stderr
        assert stream is not None
        for line in iter(lambda: stream.readline(MOST_WORDS), b""):  # a line need not end
            self._said = [*self._said[-20:], printable(line.decode("utf-8", "replace").strip())]

    def _fail(self) -> None:
        """Raise what the end of ssh means: Dropped, or TargetUnavailable where trying again is no use."""
        try:
            code = self.ssh.wait(5.0)
        except subprocess.TimeoutExpired:
            self.ssh.kill()
            code = self.ssh.wait()
        self._threads[1].join(2.0)
        said = [line for line in self._said if line]
        raise ssh_problem(self._host, "\n".join(said), code)


def ssh_problem(host: str, said: str, code: int) -> Exception:
    """Return what the words of an `ssh` that ended mean, with the line that mends it where a person has to act."""
    place = host.rpartition("@")[2]
    last = said.splitlines()[-1] if said else f"ssh ended with {code}"
    for words, sentence in (
        (
            "REMOTE HOST IDENTIFICATION HAS CHANGED",
            "its SSH host key is not the one on record. If the board was installed anew, forget it and compare the "
            f"new one:\n  ssh-keygen -R {place}\n  ssh {host}",
        ),
        (
            "Host key verification failed",
            f"its SSH host key is not known yet. Connect once by hand and compare the fingerprint:\n  ssh {host}",
        ),
        ("Permission denied", f"it refuses your key ({last}). Copy your key there:\n  ssh-copy-id {host}"),
        ("Could not resolve hostname", f"there is no host of this name ({last}). Check the name:\n  ssh {host}"),
        ("Bad configuration option", f"its SSH configuration is broken ({last})."),
    ):
        if words in said:
            return TargetUnavailable(f"{host}: {sentence}")
    major, minor = divmod(code - TOO_OLD, 10)
    if major in (2, 3):
        return TargetUnavailable(f"{host}: python {major}.{minor} is too old; 3.8 or newer is needed.")
    if code != 255 and (code == 127 or "not found" in said or "No such file or directory" in said):
        return TargetUnavailable(
            f"{host}: no Python there ({last}). On the board:\n  sudo apt install python3 python3-numpy"
        )
    return Dropped(last)


class Board:
    """A device over SSH."""

    def __init__(
        self,
        host: str,
        *,
        python: str = "python3",
        folder: str = FOLDER,
        ssh: Sequence[str] = ("ssh",),
        system_root: str = "/",
        patience_s: float = 120.0,
        abandoned_s: float = 150.0,
        busy_s: float = 1800.0,
        say: Callable[[str], None] = lambda text: print(f"hirelc-deploy: {text}", file=sys.stderr),
    ) -> None:
        """Nothing is connected yet.

        Args:
            host: As `ssh` takes it: `me@board`, or a name of the user's SSH configuration.
            python: Command of the Python there that has the runtime.
            folder: On the board, for files while they are needed; made and removed.
            ssh: The command, with options of the user's.
            system_root: Where the board's proc and sys are; another folder in tests.
            patience_s: How long a board that was there may be away before it is given up.
            abandoned_s: Without a connection for this long, the board takes us for dead and cleans up.
            busy_s: How long to wait while somebody else measures on the board.
            say: Hears what a person who waits wants to know.
        """
        self.name = host
        self._python, self._folder, self._ssh = python, folder, tuple(ssh)
        self._options = {"python": python, "root": system_root, "idle_s": IDLE_SECONDS, "abandoned_s": abandoned_s}
        self._patience_s, self._busy_s, self._say = patience_s, busy_s, say
        self._mutex = threading.RLock()
        self._line: Line | None = None
        self._token: str | None = None
        self._number = 0
        self._hello: dict[str, Any] = {}
        self._stored: set[str] = set()
        self._measuring = 0
        self.connections = 0
        """How often a line was opened."""

    # What a device offers.

    def hardware(self) -> dict[str, Any]:
        """Return what worker.hardware says on the board."""
        with self._mutex:
            self._attach()
            return dict(self._hello["hardware"])

    def open(self, program: Path) -> AbstractContextManager[Process]:
        """Start a process there."""
        return self._open(program)

    @contextmanager
    def _open(self, program: Path) -> Iterator[Process]:
        with self._mutex:
            self._attach()
            token, name = self._token, secrets.token_hex(8)
            self.call("start", process=name, program=self.upload(program.read_bytes()))
        assert token is not None
        try:
            yield RemoteProcess(self, name, token)
        finally:
            # A board that is gone takes its processes along.
            with self._mutex, suppress(HirelcError, SessionLost, Refused):
                if self._token == token:
                    self.call("stop", process=name)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Hold the board's lock; waits while another measures there, and says so."""
        with self._mutex:
            self._measuring += 1
        try:
            with self._mutex:
                if self._measuring == 1 and self._token is not None:
                    self._lock()
            yield
        finally:
            with self._mutex:
                self._measuring -= 1
                if not self._measuring and self._token is not None:
                    with suppress(HirelcError, SessionLost):
                        self.call("unlock")

    def close(self) -> None:
        """Leave nothing on the board. A later call begins anew."""
        with self._mutex:
            if self._token is not None:
                settings = self._patience_s, self._say
                self._patience_s, self._say = min(self._patience_s, 5.0), lambda text: None
                with suppress(HirelcError, SessionLost, Refused):
                    self.call("bye", limit_s=GOODBYE_SECONDS, grace_s=0.0)
                self._patience_s, self._say = settings
            self._forget()
            atexit.unregister(self.close)

    # Questions.

    def call(
        self, do: str, data: bytes = b"", limit_s: float = ANSWER_SECONDS, grace_s: float = 30.0, **values: Any
    ) -> tuple[dict[str, Any], bytes]:
        """Ask the keeper and return its answer, over as many connections as it takes.

        Args:
            limit_s: What the keeper allows itself, or the process that it asks.
            grace_s: How much longer we wait for the answer to arrive.

        Raises:
            Refused: The keeper says no.
            SessionLost: The board has forgotten us, as after a restart.
            TargetUnavailable: It cannot be reached, or not any more.
        """
        with self._mutex:
            self._attach()
            self._number += 1
            frame = worker.pack({"do": do, "number": self._number, "limit_s": limit_s, **values}, data)
            lost_at: float | None = None
            while True:
                try:
                    if self._line is None:
                        self._line = self._connect(start=False)
                        if lost_at is not None:
                            self._say(f"{self.name}: back after {time.monotonic() - lost_at:.0f} s.")
                    self._line.send(frame)
                    until = time.monotonic() + limit_s + grace_s
                    answer, body = self._line.receive(limit_s + grace_s)
                    while answer.get("number") != self._number:
                        if time.monotonic() > until:
                            raise Dropped("it answers what nobody asked")
                        answer, body = self._line.receive(until - time.monotonic())
                    break
                except Dropped as dropped:
                    lost_at = self._wait_after(dropped, lost_at)
            if answer.get("code") == "disk_full":
                self._no_room(printable(str(answer.get("refused"))[:MOST_WORDS]))
            raise_refusal(answer)
            return answer, body

    def upload(self, data: bytes) -> str:
        """Store bytes on the board, unless it has them, and return the name they have there."""
        name = hashlib.sha256(data).hexdigest()
        with self._mutex:
            self._attach()
            if name in self._stored:
                return name
            offset = 0
            if len(data) > CHUNK_BYTES:  # for less, asking takes as long as sending
                status = self.call("have", sha256=name)[0]
                with understood(self.name):
                    offset = len(data) if status["complete"] else max(0, min(int(status["size"]), len(data)))
                if status["complete"]:
                    self._stored.add(name)
                    return name
            for attempt in (1, 2):
                while offset < len(data) or not data:
                    part = data[offset : offset + CHUNK_BYTES]
                    self.call("chunk", part, sha256=name, offset=offset, total=len(data))
                    offset += len(part)
                    if not data:
                        break
                try:
                    self.call("commit", sha256=name)
                    break
                except Refused as refused:
                    if refused.code != "damaged" or attempt == 2:
                        raise
                    offset = 0  # half of it had been there from before, and was something else
            self._stored.add(name)
            return name

    def forget_file(self, name: str) -> None:
        """Take it that the board does not have this file any more."""
        self._stored.discard(name)

    def is_session(self, token: str) -> bool:
        """Return whether this is still the session in which a process was started."""
        return token == self._token

    # Connections.

    def _attach(self) -> None:
        """Begin a session where there is none."""
        with self._mutex:
            if self._token is not None:
                return
            token = secrets.token_hex(16)
            before = self._hello.get("boot_id")
            lost_at: float | None = None
            while True:
                try:
                    self._token = token
                    self._line = self._connect(start=True)
                    break
                except Dropped as dropped:
                    self._token = None
                    if before is None:
                        raise TargetUnavailable(self._unreachable(dropped)) from None
                    lost_at = self._wait_after(dropped, lost_at)
                except BaseException:
                    self._token = None
                    raise
            self._number, self._stored = 0, set()
            atexit.unregister(self.close)
            atexit.register(self.close)  # however the program ends, the board is left clean
            try:
                hello = self.call("hello")[0]
                with understood(self.name):
                    check_hardware(hello["hardware"])
            except HirelcError:
                self._forget()  # no goodbye for whom we do not understand
                raise
            self._hello = hello
            if self._measuring:
                self._lock()

    def _connect(self, *, start: bool) -> Line:
        """Return a line to our keeper; raises Dropped, SessionLost or TargetUnavailable."""
        line = Line(self._ssh, self.name, self._python)
        self.connections += 1
        try:
            line.send(worker.pack({"token": self._token, "start": start, "folder": self._folder, **self._options}))
            answer, _ = line.receive(CONNECT_SECONDS)
        except BaseException:
            line.close()
            raise
        if "refused" not in answer:
            return line
        line.close()
        refused, code = printable(str(answer["refused"])[:MOST_WORDS]), answer.get("code")
        if code == "disk_full":
            self._no_room(refused)
        if code == "folder":
            raise TargetUnavailable(
                f"{self.name}: {refused}. Name a folder there that can be written, in your targets.toml:\n"
                '  folder = "/tmp/hirelc-deploy"'
            )
        if start:
            raise TargetUnavailable(f"{self.name}: the worker does not start there ({refused}).")
        restarted = answer.get("boot_id") != self._hello.get("boot_id")
        self._forget()
        raise SessionLost("the board restarted" if restarted else "the worker there was ended")

    def _wait_after(self, dropped: Dropped, lost_at: float | None) -> float:
        """Sleep before the next attempt and return since when the line is gone; TargetUnavailable when that is long."""
        now = time.monotonic()
        if self._line is not None:
            self._line.close()
            self._line = None
        if lost_at is None:
            self._say(f"{self.name}: the line dropped ({dropped}); trying for {self._patience_s:.0f} s to get it back.")
            return now
        if now - lost_at > self._patience_s:
            self._forget()
            raise TargetUnavailable(
                f"{self.name}: gone for {now - lost_at:.0f} s ({dropped}). What was finished is kept: bring the board "
                "back, and run the same again."
            )
        time.sleep(min(5.0, 0.2 + (now - lost_at) / 4))
        return lost_at

    def _forget(self) -> None:
        if self._line is not None:
            self._line.close()
        self._line = self._token = None
        self._stored = set()

    def _unreachable(self, dropped: Dropped) -> str:
        return (
            f"{self.name} cannot be reached ({dropped}). Switch it on and try by hand:\n"
            f"  {shlex.join(self._ssh)} {self.name} {self._python} --version"
        )

    def _no_room(self, where: str) -> None:
        raise TargetUnavailable(
            f"{self.name}: the disk there is full ({where}). Make room, or name another folder in your targets.toml:\n"
            '  folder = "/tmp/hirelc-deploy"'
        )

    def _lock(self) -> None:
        until, said, evictions = time.monotonic() + self._busy_s, False, 0
        while True:
            answer, _ = self.call("lock", who=own_name())
            if answer.get("locked"):
                return
            with understood(self.name):
                token, who = answer["holder"].get("token"), answer["holder"].get("who", {})
                name = printable(f"{who.get('user', 'somebody')} on {who.get('host', 'another machine')}")[:200]
                dead = is_dead(who)
            if dead and evictions < MOST_EVICTIONS:
                self.call("evict", token=token)
                evictions += 1
                continue
            if time.monotonic() > until:
                raise TargetUnavailable(
                    f"{self.name}: {name} has been measuring there for {self._busy_s:.0f} s; try later."
                )
            if not said:
                self._say(f"{self.name}: {name} is measuring there; waiting.")
                said = True
            time.sleep(0.5)


class RemoteProcess:
    """A serving process on a board."""

    def __init__(self, board: Board, name: str, token: str) -> None:
        self._board, self._name, self._token = board, name, token

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
        """Send what the board does not have yet, ask and return the answer; see device.Process."""
        with self._board._mutex:
            if not self._board.is_session(self._token):
                raise SessionLost("the board restarted, or its worker was ended")
            upload = self._board.upload
            request = request_of(
                do,
                upload(file.read_bytes()) if file is not None else None,
                [upload(one.read_bytes()) for one in files],
                images,
                values,
            )
            if images is not None:
                request["images"] = upload(image_bytes(images))
            answer, data = self._board.call("ask", process=self._name, request=request, limit_s=limit_s)
        if answer.get("hung"):
            raise ProcessHung(f"did not answer within {limit_s:.0f} s and was ended")
        if "ended" in answer:
            words = ", ".join(str(answer[key])[:MOST_WORDS] for key in ("ended", "said") if answer.get(key))
            raise ProcessEnded(printable(words))
        return answer, data


def own_name() -> dict[str, Any]:
    """Return who we are, for others who wait for the same board."""
    return {
        "user": getpass.getuser(),
        "host": socket.gethostname(),
        "boot_id": worker.boot_id(),
        "pid": os.getpid(),
    }
