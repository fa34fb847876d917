"""Everything that is known to go wrong between a host and a board, each with what must come of it.

The board is a real sshd on loopback with a home of its own. Where the runtime itself is to misbehave, it is a toy whose
"models" are texts that say how; everything else is real: ONNX Runtime, and OpenVINO where it is installed. A case
returns what the user saw, in words.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hirelc_backends.onnxruntime_cpu import OnnxRuntimeCpu
from hirelc_backends.openvino_cpu import OpenvinoCpu

from hirelc_deploy.errors import COMMAND, ExportError, HirelcError, TargetUnavailable
from hirelc_deploy.measure import program, remote
from hirelc_deploy.measure.backend import Precision, only
from hirelc_deploy.measure.device import Refused
from hirelc_deploy.measure.pool import PoolBackend
from hirelc_deploy.measure.program import ProgramBackend
from hirelc_deploy.measure.protocol import TimingLimits, compare
from hirelc_deploy.measure.remote import Board
from hirelc_deploy.testing.backend_contract import random_images, write_model
from hirelc_deploy.testing.loopback import LoopbackBoard, make_key

TOY = """
import os, signal, time
def availability(): return None
def versions(): return {"toy": "1"}
def facts(): return {}
def open_session(path, threads, cache):
    with open(path) as file: return Session(file.read())
class Session:
    def __init__(self, text):
        self.text, self.runs = text, 0
        if text.startswith("refuse"): raise ValueError("this is no model")
        print("a stray word on standard output", flush=True)
    def infer(self, images):
        if self.text == "hang in infer": time.sleep(600)
        if self.text == "die in infer": os.kill(os.getpid(), signal.SIGKILL)
        return {"twice": images.reshape(len(images), -1)[:, :3] * 2}
    def profile(self, image, runs): return [("one", "Conv", False, 1.0)]
    def timed_run(self):
        self.runs += 1
        if self.runs > 20 and self.text == "die in timing": os.kill(os.getpid(), signal.SIGKILL)
        if self.runs > 20 and self.text == "hang in timing": time.sleep(600)
        if self.text.startswith("log"):
            with open(self.text.split()[1], "a") as log: log.write("%.6f %d\\n" % (time.monotonic(), os.getpid()))
        time.sleep(0.001)
        return 1000000 + self.runs, 1000000 + self.runs
"""


Runtime = OnnxRuntimeCpu | OpenvinoCpu
RUNTIMES: dict[str, Runtime] = {"ONNX Runtime": OnnxRuntimeCpu(), "OpenVINO": OpenvinoCpu()}


class Bench:
    """One board for one case, and a clock for how long the recovery took."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.board = LoopbackBoard(folder)
        self.said: list[str] = []
        self.toy = folder / "toy.py"
        self.toy.write_text(TOY)
        self.opened: list[Board] = []
        self.boards = [self.board]
        self._fault_at = 0.0
        self.recovery_s: float | None = None

    def connect(self, board: LoopbackBoard | None = None, **options: Any) -> Board:
        found = (board or self.board).connect(say=self.said.append, **options)
        self.opened.append(found)
        return found

    def second_board(self) -> LoopbackBoard:
        self.boards.append(LoopbackBoard(self.folder, f"board{len(self.boards) + 1}"))
        return self.boards[-1]

    def toys(self, device: Board | None = None, **options: Any) -> ProgramBackend:
        def precisions(facts: Any) -> tuple[Precision, ...]:
            return (Precision("float", "float32", "float32", 32),)

        return ProgramBackend("toy", self.toy, precisions, device or self.connect(**options))

    def real(self, runtime: Runtime, **options: Any) -> ProgramBackend:
        return ProgramBackend(runtime.name, runtime.program, runtime.precisions_on, self.connect(**options))

    def model(self, text: str = "fine", name: str = "model") -> Path:
        path = self.folder / f"{name}.toy"
        path.write_text(text)
        return path

    def fault(self) -> None:
        self._fault_at = time.monotonic()

    def recovered(self) -> None:
        self.recovery_s = time.monotonic() - self._fault_at

    def kill_runtime(self) -> None:
        for pid in self.board.keepers():
            if b"serve" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)

    def later(self, seconds: float, act: Callable[[], object]) -> None:
        def run() -> None:
            time.sleep(seconds)
            self.fault()
            act()

        threading.Thread(target=run, daemon=True).start()

    def close(self) -> list[str]:
        """Close everything and return what is left on the boards."""
        for device in self.opened:
            with contextlib.suppress(HirelcError):
                device.close()
        until = time.monotonic() + 10
        while (left := [one for board in self.boards for one in board.leftovers()]) and time.monotonic() < until:
            time.sleep(0.05)
        for board in self.boards:
            board.kill_everything()
            board.stop()
        return left


@dataclass(frozen=True)
class Case:
    name: str
    what: str
    run: Callable[[Bench], str]
    needs_root: bool = False
    seconds: float = 3.0
    missing: Callable[[], str | None] = lambda: None


CASES: list[Case] = []


def case(what: str, *, needs_root: bool = False, seconds: float = 3.0) -> Callable[[Callable[[Bench], str]], object]:
    def add(function: Callable[[Bench], str]) -> object:
        CASES.append(Case(function.__name__, what, function, needs_root, seconds))
        return function

    return add


def case_of_each_runtime(
    what: str, *, seconds: float = 3.0, installed: bool = True
) -> Callable[[Callable[[Bench, Runtime], str]], object]:
    """Add a case for each runtime; with `installed` it skips where the runtime is not there."""

    def add(function: Callable[[Bench, Runtime], str]) -> object:
        for words, runtime in RUNTIMES.items():
            missing = runtime.availability if installed else lambda: None
            run = functools.partial(function, runtime=runtime)
            name = f"{function.__name__}_{runtime.name}"
            CASES.append(Case(name, what.format(words), run, seconds=seconds, missing=missing))
        return function

    return add


def refused(kind: type[HirelcError], *words: str) -> Any:
    class Expect(contextlib.AbstractContextManager["Expect"]):
        sentence = ""

        def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> bool:
            assert isinstance(error, kind), f"expected {kind.__name__}, found {error!r}"
            whole = f"exit {error.exit_code}: {error}".replace(COMMAND, " | ")
            self.sentence = re.sub(r"ssh -F \S+", "ssh", whole)  # the user's own ssh has no such file
            for word in words:
                assert word in self.sentence, (word, self.sentence)
            return True

    return Expect()


def rounds_once_each(bench: Bench, disturb: Callable[[], object], backend: ProgramBackend | None = None) -> Any:
    """Run half a second of rounds, disturb in the middle, and check that every run was made once and in order."""
    backend = backend or bench.toys()
    with backend.open_timing([bench.model()], 1, seed=0) as timing:
        first = timing.rounds(5)
        bench.later(0.15, disturb)
        second = timing.rounds(200)
        bench.recovered()
    runs = np.concatenate([first, second])[:, 0, 0] - 1_000_000
    assert len(runs) == 205
    assert (np.diff(runs) > 0).all()
    return timing


# The line


@case("the host's ssh is killed in mid-run")
def ssh_killed(bench: Bench) -> str:
    board = bench.connect()

    def kill() -> None:
        assert board._line is not None
        board._line.ssh.kill()

    timing = rounds_once_each(bench, kill, bench.toys(board))
    assert timing.restarts == 0
    assert board.connections == 2
    return " / ".join(bench.said)


@case("the board's end of the SSH connection is killed in mid-run")
def sshd_session_killed(bench: Bench) -> str:
    timing = rounds_once_each(bench, bench.board.drop_connections)
    assert timing.restarts == 0
    return " / ".join(bench.said)


@case("the network is down for 4 s", seconds=6)
def network_down(bench: Bench) -> str:
    def down() -> None:
        bench.board.stop()
        time.sleep(4)
        bench.board.start()

    timing = rounds_once_each(bench, down)
    assert timing.restarts == 0
    return " / ".join(bench.said)


@case("the line goes silent without closing (no packet passes)", seconds=25)
def line_silent(bench: Bench) -> str:
    frozen: list[int] = []

    def freeze() -> None:
        frozen.extend(bench.board.sessions())
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)

    try:
        timing = rounds_once_each(bench, freeze)
    finally:
        for pid in frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert timing.restarts == 0
    return " / ".join(bench.said)


@case("a slow line: 50 ms more each way")
def slow_line(bench: Bench) -> str:
    pipe = bench.folder / "slow.py"
    pipe.write_text(SLOW_PIPE)
    bench.board.write_config(ProxyCommand=f"{sys.executable} {pipe} %h %p")
    started = time.monotonic()
    assert only(bench.toys().build(bench.model()).infer(np.ones((2, 3), np.float32))).tolist() == [[2.0] * 3] * 2
    return f"nothing; connected and ran in {time.monotonic() - started:.1f} s"


SLOW_PIPE = """
import os, queue, socket, sys, threading, time
line = socket.create_connection((sys.argv[1], int(sys.argv[2])))
def way(read, write):
    held = queue.Queue()
    def out():
        while True:
            at, data = held.get()
            time.sleep(max(0, at + 0.05 - time.monotonic()))
            if not data: os._exit(0)
            write(data)
    threading.Thread(target=out, daemon=True).start()
    while True:
        data = read(16384)
        held.put((time.monotonic(), data))
        if not data: return
threading.Thread(target=way, args=(lambda n: os.read(0, n), line.sendall), daemon=True).start()
way(line.recv, lambda data: os.write(1, data))
time.sleep(1)
"""


@case("the board is switched off before the start")
def board_off(bench: Bench) -> str:
    bench.board.stop()
    with refused(TargetUnavailable, "cannot be reached", "ssh board") as error:
        bench.toys().connect()
    bench.board.start()
    return error.sentence


@case("the board is gone in mid-run and does not come back", seconds=8)
def board_gone(bench: Bench) -> str:
    def off() -> None:
        bench.board.stop()
        bench.board.kill_everything()

    backend = bench.toys(patience_s=3.0)
    with refused(TargetUnavailable, "What was finished is kept") as error:
        rounds_once_each(bench, off, backend)
    bench.recovered()
    shutil.rmtree(bench.board.home)  # the board is gone, with all that is on it
    bench.board.home.mkdir()
    bench.board.start()
    return error.sentence


@case("the login hangs: no answer after the connection", seconds=4)
def login_hangs(bench: Bench) -> str:
    before, remote.CONNECT_SECONDS = remote.CONNECT_SECONDS, 1.0
    try:
        with refused(TargetUnavailable, "no answer in time") as error:
            bench.toys(python="sleep 3; python3").connect()
    finally:
        remote.CONNECT_SECONDS = before
    return error.sentence


@case("the login shell prints a greeting")
def greeting(bench: Bench) -> str:
    bench.board.stop()
    bench.board.start(command='echo Welcome; cat /etc/hostname; eval "$SSH_ORIGINAL_COMMAND"')
    bench.toys().connect()
    return "nothing: skipped"


# Keys and names


@case("the board's host key is not known")
def host_key_unknown(bench: Bench) -> str:
    bench.board.known_hosts.write_text("")
    with refused(TargetUnavailable, "compare the fingerprint", "ssh board") as error:
        bench.toys().connect()
    return error.sentence


@case("the board's host key has changed")
def host_key_changed(bench: Bench) -> str:
    other = bench.folder / "other_key"
    make_key(other)
    kind, public = other.with_suffix(".pub").read_text().split()[:2]
    bench.board.known_hosts.write_text(f"[127.0.0.1]:{bench.board.port} {kind} {public}\n")
    with refused(TargetUnavailable, "not the one on record", "ssh-keygen -R board") as error:
        bench.toys().connect()
    return error.sentence


@case("the board does not take the user's key")
def key_refused(bench: Bench) -> str:
    other = bench.folder / "other_key"
    make_key(other)
    bench.board.write_config(IdentityFile=other)
    with refused(TargetUnavailable, "refuses your key", "ssh-copy-id board") as error:
        bench.toys().connect()
    return error.sentence


@case("there is no host of this name")
def no_such_host(bench: Bench) -> str:
    bench.board.write_config(HostName="no-such-board.invalid")
    with refused(TargetUnavailable, "no host of this name") as error:
        bench.toys().connect()
    return error.sentence


@case("there is no ssh on the host")
def no_ssh(bench: Bench) -> str:
    device = Board("board", ssh=("no-such-ssh",))
    with refused(TargetUnavailable, "install the OpenSSH client") as error:
        bench.toys(device).connect()
    return error.sentence


# What is on the board


@case("there is no Python on the board")
def no_python(bench: Bench) -> str:
    with refused(TargetUnavailable, "no Python there", "sudo apt install python3") as error:
        bench.toys(python="/no/such/python").connect()
    return error.sentence


@case("the Python on the board is too old")
def python_too_old(bench: Bench) -> str:
    old = bench.folder / "old-python"
    code = "import sys; sys.version_info = (3, 6, 9); exec(sys.argv[-1])"
    # Without site-packages: what measures coverage there stumbles over the other version.
    old.write_text(f"#!/bin/sh\nexec {sys.executable} -I -S -c '{code}' \"$@\"\n")
    old.chmod(0o755)
    with refused(TargetUnavailable, "python 3.6 is too old", "3.8 or newer") as error:
        bench.toys(python=str(old)).connect()
    return error.sentence


@case_of_each_runtime("there is no {} on the board", installed=False)
def no_runtime(bench: Bench, runtime: Runtime) -> str:
    package = {"onnxruntime_cpu": "onnxruntime", "openvino_cpu": "openvino"}[runtime.name]
    with refused(TargetUnavailable, f"pip install {package}") as error:
        bench.real(runtime, python=f"{sys.executable} -S").connect()
    return error.sentence


@case("the file has an operator set that ONNX Runtime does not know")
def opset_too_new(bench: Bench) -> str:
    path = write_model(bench.folder / "new.onnx")
    model = onnx.load(path)
    model.opset_import[0].version = 99
    path.write_bytes(model.SerializeToString())
    with refused(ExportError, "new.onnx", "refuses it", "99") as error:
        bench.real(RUNTIMES["ONNX Runtime"]).build(path)
    return error.sentence


@case_of_each_runtime("the file has an operator that {} does not know")
def unknown_operator(bench: Bench, runtime: Runtime) -> str:
    path = write_model(bench.folder / "odd.onnx")
    model = onnx.load(path)
    model.graph.node[0].op_type = "Frobnicate"
    path.write_bytes(model.SerializeToString())
    with refused(ExportError, "odd.onnx", "refuses it", "Frobnicate") as error:
        bench.real(runtime).build(path)
    return error.sentence


@case_of_each_runtime("the file is no model for {}", seconds=4)
def not_a_model(bench: Bench, runtime: Runtime) -> str:
    path = bench.folder / "text.onnx"
    path.write_text("not a model")
    with refused(ExportError, "text.onnx", "refuses it") as error:
        bench.real(runtime).build(path)
    return error.sentence


@case("the disk of the board is full", needs_root=True)
def disk_full(bench: Bench) -> str:
    with mounted(bench.board.home, "size=1m"):
        device = bench.connect()
        with refused(TargetUnavailable, "disk there is full", "folder =") as error:
            device.upload(os.urandom(3_000_000))
        device.close()
    return error.sentence


@case("the home of the board cannot be written", needs_root=True)
def home_read_only(bench: Bench) -> str:
    with mounted(bench.board.home, "ro"):
        with refused(TargetUnavailable, "Name a folder there that can be written") as error:
            bench.toys().connect()
        bench.toys(folder=str(bench.board.temporary / "work")).connect()
    return error.sentence + " / with that folder: runs"


@case("the home of the board is mounted noexec", needs_root=True)
def home_noexec(bench: Bench) -> str:
    with mounted(bench.board.home, "noexec"):
        device = bench.connect()
        rounds_once_each(bench, lambda: None, bench.toys(device))
        device.close()
    return "nothing: only Python reads there"


@contextlib.contextmanager
def mounted(path: Path, options: str) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@case("what is left of an upload from before is something else")
def corrupt_part(bench: Bench) -> str:
    device, data = bench.connect(), os.urandom(2_500_000)
    device.hardware()
    name = remote.hashlib.sha256(data).hexdigest()
    files = bench.board.home / ".cache/hirelc-deploy/files"
    (files / f"{name}.part").write_bytes(b"x" * 1_500_000)
    bench.fault()
    device.upload(data)
    bench.recovered()
    assert (files / name).read_bytes() == data
    return "nothing: refused by its hash and sent whole"


@case("the line drops in mid-upload")
def upload_cut(bench: Bench) -> str:
    device, data, sent = bench.connect(), os.urandom(6_000_000), 0
    call = device.call

    def counting(do: str, body: bytes = b"", **values: Any) -> Any:
        nonlocal sent
        sent += len(body)
        if do == "chunk" and values["offset"] == 3 * remote.CHUNK_BYTES:
            bench.fault()
            bench.board.drop_connections()
            answer = call(do, body, **values)
            bench.recovered()
            return answer
        return call(do, body, **values)

    device.call = counting  # type: ignore[method-assign]
    name = device.upload(data)
    assert (bench.board.home / ".cache/hirelc-deploy/files" / name).read_bytes() == data
    assert sent == len(data)
    assert device.connections == 2
    return " / ".join(bench.said) + f" (of {len(data)} bytes, at most {remote.CHUNK_BYTES} sent twice)"


@case("a stored file is damaged, as by a power cut")
def stored_file_damaged(bench: Bench) -> str:
    data = os.urandom(2_000_000)
    first, second = bench.connect(), bench.connect()
    name = first.upload(data)
    path = bench.board.home / ".cache/hirelc-deploy/files" / name
    path.write_bytes(b"zzzz")
    second.upload(data)
    assert path.read_bytes() == data
    return "nothing: found by its hash and sent again"


# Processes on the board


@case("the timing process is killed once (out of memory)")
def killed_once(bench: Bench) -> str:
    backend = bench.toys()
    with backend.open_timing([bench.model()], 1, seed=0) as timing:
        timing.rounds(5)
        bench.later(0.1, bench.kill_runtime)
        assert len(timing.rounds(300)) == 300
        bench.recovered()
        assert timing.restarts == 1
    return "note: Timing processes lost and started again: 1."


@case("the file kills the timing process every time")
def killed_always(bench: Bench) -> str:
    with (
        refused(ExportError, "lost 3 times", "signal 9", "memory ran out") as error,
        bench.toys().open_timing([bench.model("die in timing")], 1, seed=0) as timing,
    ):
        timing.rounds(5)
    return error.sentence


@case("the file kills the process that judges it")
def killed_in_infer(bench: Bench) -> str:
    backend = bench.toys()
    with refused(ExportError, "signal 9") as error:
        backend.build(bench.model("die in infer", "bad")).infer(np.ones((1, 3), np.float32))
    backend.build(bench.model("fine", "next")).infer(np.ones((1, 3), np.float32))
    return error.sentence


@case("an inference hangs")
def hung(bench: Bench) -> str:
    before, program.ANSWER_SECONDS = program.ANSWER_SECONDS, 1.0
    try:
        backend = bench.toys()
        with refused(ExportError, "did not answer within 1 s") as error:
            backend.build(bench.model("hang in infer", "bad")).infer(np.ones((1, 3), np.float32))
    finally:
        program.ANSWER_SECONDS = before
    bench.fault()
    backend.build(bench.model("fine", "next")).infer(np.ones((1, 3), np.float32))
    bench.recovered()
    return error.sentence


@case("the runtime prints on standard output")
def stray_print(bench: Bench) -> str:
    bench.toys().build(bench.model()).infer(np.ones((1, 3), np.float32))
    return "nothing: it goes to a log"


@case("the worker on the board is killed in mid-run")
def keeper_killed(bench: Bench) -> str:
    backend = bench.toys()
    with backend.open_timing([bench.model()], 1, seed=0) as timing:
        timing.rounds(5)
        bench.later(0.1, bench.board.kill_everything)
        assert len(timing.rounds(300)) == 300
        bench.recovered()
        assert timing.restarts == 1
    return " / ".join(bench.said) + " / note: Timing processes lost and started again: 1."


@case("the board restarts in mid-run", seconds=5)
def restarted(bench: Bench) -> str:
    root = fake_root(bench.folder / "root")

    def restart() -> None:
        bench.board.stop()
        bench.board.kill_everything()
        (root / "proc/sys/kernel/random/boot_id").write_text("second")
        time.sleep(1.0)
        bench.board.start()

    backend = bench.toys(system_root=str(root))
    with backend.open_timing([bench.model()], 1, seed=0) as timing:
        timing.rounds(5)
        bench.later(0.1, restart)
        assert len(timing.rounds(300)) == 300
        bench.recovered()
        assert timing.restarts == 1
    return " / ".join(bench.said) + " / note: Timing processes lost and started again: 1."


def fake_root(path: Path) -> Path:
    for name, text in (
        ("proc/sys/kernel/random/boot_id", "first"),
        ("proc/cpuinfo", "processor: 0\nFeatures: asimd asimddp\nCPU implementer: 0x41\nCPU part: 0xd0b\n"),
        ("sys/devices/platform/soc/soc:firmware/get_throttled", "0x0"),
        ("sys/class/thermal/thermal_zone0/temp", "45000"),
        ("sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", "2400000"),
        ("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "performance"),
    ):
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return path


@case("the board throttles during a run")
def throttled(bench: Bench) -> str:
    root = fake_root(bench.folder / "root")
    word = root / "sys/devices/platform/soc/soc:firmware/get_throttled"
    turns = 0

    def progress(done: int, most: int) -> None:
        nonlocal turns
        turns += 1
        if turns == 1:
            bench.fault()
            word.write_text("0x50005")

    def pause(seconds: float) -> None:
        word.write_text("0x50000")
        bench.recovered()

    limits = TimingLimits(processes=1, min_rounds=20, max_rounds=40)
    backend = bench.toys(system_root=str(root))
    timing = compare([bench.model()], backend, limits=limits, progress=progress, pause=pause)[0]
    assert timing.device is not None
    assert timing.device["slowed_down"] == ["throttled", "undervoltage"]
    assert timing.device["repeated_turns"] == 1
    return timing.note


@case("the clock of the board is set back by an hour in mid-run", seconds=4)
def clock_set_back(bench: Bench) -> str:
    site = bench.folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        textwrap.dedent("""
            import time
            began, now = time.monotonic(), time.time
            time.time = lambda: now() - (3600 if time.monotonic() - began > 1.0 else 0)
        """)
    )
    bench.board.stop()
    bench.board.start({"PYTHONPATH": str(site)})
    backend = bench.toys()
    with backend.open_timing([bench.model()], 1, seed=0) as timing:
        timing.rounds(5)
        time.sleep(1.2)
        found = timing.rounds(40)
    assert (found > 0).all()
    bench.connect().upload(b"x" * 2_000_000)
    return "nothing: only clocks that cannot be set are read"


# Several at once


@case("two hosts measure on one board")
def two_hosts(bench: Bench) -> str:
    log = bench.board.temporary / "log"
    model = bench.model(f"log {log}")
    limits = TimingLimits(processes=2, min_rounds=40, max_rounds=60)

    def measure(device: Board) -> None:
        compare([model], bench.toys(device), limits=limits)

    threads = [threading.Thread(target=measure, args=(bench.connect(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    order = [line.split()[1] for line in log.read_text().splitlines()]
    log.unlink()
    first, second, *others = dict.fromkeys(order)
    assert len(others) == 2
    # The two processes of one host alternate; those of the other begin when both are done.
    begin = order.index(others[0])
    assert set(order[:begin]) == {first, second}
    assert set(order[begin:]) == set(others)
    return " / ".join(bench.said)


@case("a host that measured was killed; another start finds the board free at once")
def dead_holder(bench: Bench) -> str:
    code = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from hirelc_deploy.measure.remote import Board
        board = Board("board", ssh=("ssh", "-F", sys.argv[1]), python=sys.executable)
        with board.measuring():
            board.hardware()
            print("measuring", flush=True)
            time.sleep(600)
    """)
    with held_by(bench, code) as child:
        bench.fault()
        child.kill()
        child.wait()
        with bench.connect().measuring():
            bench.opened[-1].hardware()
        bench.recovered()
    return "nothing"


@contextlib.contextmanager
def held_by(bench: Bench, code: str) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(bench.board.config)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == "measuring\n"
        yield child
    finally:
        child.kill()
        child.communicate()


@case("the host is killed and never comes back")
def host_killed(bench: Bench) -> str:
    code = textwrap.dedent("""
        import sys, time
        from hirelc_deploy.measure.remote import Board
        board = Board("board", ssh=("ssh", "-F", sys.argv[1]), python=sys.executable, abandoned_s=1.0)
        board.upload(b"x" * 100)
        print("measuring", flush=True)
        time.sleep(600)
    """)
    with held_by(bench, code) as child:
        assert bench.board.leftovers()
        bench.fault()
        child.kill()
        until = time.monotonic() + 20
        while bench.board.leftovers() and time.monotonic() < until:
            time.sleep(0.02)
        bench.recovered()
    assert not bench.board.leftovers()
    return "nothing: the board cleaned up by itself (after 1 s here, 150 s by default)"


@case("Ctrl-C during a measurement")
def interrupted(bench: Bench) -> str:
    code = textwrap.dedent("""
        import signal, sys, time
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
        from hirelc_deploy.measure.remote import Board
        board = Board("board", ssh=("ssh", "-F", sys.argv[1]), python=sys.executable)
        with board.measuring():
            board.upload(b"x" * 100)
            print("measuring", flush=True)
            time.sleep(600)
    """)
    with held_by(bench, code) as child:
        bench.fault()
        child.send_signal(signal.SIGINT)
        child.wait(20)
        bench.recovered()
    until = time.monotonic() + 5
    while bench.board.leftovers() and time.monotonic() < until:
        time.sleep(0.02)
    assert not bench.board.leftovers()
    return "exit 130; the board is clean"


@case("what a power cut left on the board")
def leftovers_of_a_power_cut(bench: Bench) -> str:
    device = bench.connect()
    device.upload(b"x" * 100)
    bench.board.kill_everything()
    assert bench.board.leftovers()
    device._line = device._token = None
    other = bench.connect()
    other.hardware()
    other.close()
    return "nothing: the next session removes it"


@case("the same question is asked again over a new connection")
def asked_twice(bench: Bench) -> str:
    device = bench.connect()
    with device.open(bench.toy) as process:
        process.ask("load", files=[bench.model()], threads=1, seed=0, limit_s=20)
        first = process.ask("rounds", count=5, limit_s=20)
        device._line.close()  # type: ignore[union-attr]
        device._line = None
        device._number -= 1
        again = process.ask("rounds", count=5, limit_s=20)
    assert again == first
    return "nothing: the kept answer comes, nothing runs twice"


@case("a request tries to leave its folder")
def path_trick(bench: Bench) -> str:
    device = bench.connect()
    with pytest.raises(Refused, match="is no identifier") as refusal:
        device.call("have", sha256="../../../etc/passwd")
    return f"refused: {refusal.value}"


def two_boards(bench: Bench) -> tuple[PoolBackend, LoopbackBoard]:
    other = bench.second_board()
    devices = [bench.connect(patience_s=2.0), bench.connect(other, patience_s=2.0)]
    return PoolBackend([bench.toys(device) for device in devices], bench.said.append), other


@case("a board of a pool dies for good in mid-run", seconds=8)
def board_of_a_pool_dies(bench: Bench) -> str:
    pool, other = two_boards(bench)
    assert pool.availability() is None

    def off() -> None:
        other.stop()
        other.kill_everything()

    killed = False

    def progress(done: int, most: int) -> None:
        nonlocal killed
        if not killed:
            killed = True
            bench.fault()
            off()

    limits = TimingLimits(processes=4, min_rounds=80, max_rounds=120)
    timing = compare([bench.model()], pool, limits=limits, progress=progress)[0]
    bench.recovered()
    assert timing.rounds >= 80
    images = np.arange(900, dtype=np.float32).reshape(300, 3)
    np.testing.assert_array_equal(only(pool.build(bench.model()).infer(images)), 2 * images)
    assert pool.side_by_side == 1
    shutil.rmtree(other.home)
    other.home.mkdir()
    other.start()
    return " / ".join(bench.said)


@case("every board of a pool dies", seconds=8)
def all_boards_die(bench: Bench) -> str:
    pool, other = two_boards(bench)
    assert pool.availability() is None
    for board in (bench.board, other):
        board.stop()
        board.kill_everything()
        shutil.rmtree(board.home)
        board.home.mkdir()
    with refused(TargetUnavailable, "no board of the pool is left") as error:
        pool.build(bench.model()).infer(np.ones((2, 3), np.float32))
    for board in (bench.board, other):
        board.start()
    return error.sentence


@case("the boards of a pool are not equal (another runtime version)")
def unequal_pool(bench: Bench) -> str:
    other = bench.second_board()
    newer = bench.folder / "newer.py"
    newer.write_text(TOY.replace('"toy": "1"', '"toy": "2"'))
    one = bench.toys()
    two = ProgramBackend("toy", newer, lambda facts: (), bench.connect(other))
    reason = PoolBackend([one, two], bench.said.append).availability()
    assert reason is not None
    assert "must be equal" in reason
    return reason


@case_of_each_runtime("{}'s answers come over a line that drops twice", seconds=5)
def answers_over_a_bad_line(bench: Bench, runtime: Runtime) -> str:
    backend = bench.real(runtime)
    path = write_model(bench.folder / "model.onnx", integer=True)
    images = random_images(6)
    expected = only(runtime.build(path).infer(images))
    runner = backend.build(path)
    for _ in range(2):
        bench.board.drop_connections()
        np.testing.assert_array_equal(only(runner.infer(images)), expected)
    return " / ".join(bench.said)


@case_of_each_runtime("the process that times {}'s files is killed in mid-run", seconds=5)
def timing_of_a_runtime_is_killed(bench: Bench, runtime: Runtime) -> str:
    model = write_model(bench.folder / "model.onnx", integer=True)
    with bench.real(runtime).open_timing([model], 1, seed=0) as timing:
        timing.rounds(3)
        bench.fault()
        bench.kill_runtime()
        assert timing.rounds(3).shape == (3, 1, 2)
        bench.recovered()
        assert timing.restarts == 1
    return "nothing; it was timed in a new process"


def run_case(one: Case, folder: Path) -> dict[str, Any]:
    """Run a case on a fresh board and return its row of the table."""
    bench = Bench(folder)
    started = time.monotonic()
    try:
        saw = one.run(bench)
        seconds = time.monotonic() - started
    finally:
        left = bench.close()
    return {
        "case": one.name,
        "what": one.what,
        "user_saw": saw.replace(str(folder), "")
        .replace(sys.executable, "python3")
        .replace(socket.gethostname(), "desk"),
        "seconds_to_recover": None if bench.recovery_s is None else round(bench.recovery_s, 2),
        "seconds": round(seconds, 2),
        "leftovers": left,
    }


def why_not(one: Case) -> str | None:
    """Return None where a case can run here."""
    if one.needs_root:
        with contextlib.suppress(OSError):
            if os.geteuid() == 0 and subprocess.run(["mount"], capture_output=True, check=False).returncode == 0:
                return None
        return "mounting a small disk needs root"
    reason = one.missing()
    return None if reason is None else "needs the extra openvino"
