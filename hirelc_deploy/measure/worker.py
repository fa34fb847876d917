"""In: frames on a pipe. Out: frames on a pipe. Everything that runs on a device, in one file for Python 3.8 and numpy.

A frame is a 4-byte big-endian length, a JSON object of that length, and as many raw bytes as its key `bytes` says. The
file plays three parts:

serve   A process that has loaded one runtime module (such as `onnxruntime_program.py`) and builds, runs and times files
        with it. On this machine the tool starts it directly.
keeper  On a board: holds files, serving processes and the board's lock for one host, and outlives the connection.
relay   What `ssh board python3 -c ...` runs: passes bytes between SSH's pipe and the keeper. It holds nothing, so a
        dropped line loses nothing: the host comes back with the same token and asks the same numbered question again.

The host sends this file over the pipe at every connection, so nothing is installed and no versions can differ.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import platform
import queue
import random
import re
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from typing import IO, TYPE_CHECKING, Any

if sys.platform != "win32":  # a host may be anything; a board is Linux
    import fcntl

if TYPE_CHECKING:
    Frame = tuple[dict[str, Any], bytes]

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read by ONNX Runtime when it is imported

LARGEST_HEADER = 1 << 24
LARGEST_BODY = 1 << 31
"""Of a frame: 150 answers a pixel for the images that travel at a time are 1.7 GB. Nobody makes us hold more."""
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

WARM_UP_RUNS = 20
"""Runs are steady within 1 to 2 % from the 4th to 7th on (20 sessions watched), so 20 leaves room."""
WARM_UP_SECONDS = 0.25
"""A slow file stops warming up after this, but not before 7 runs: files of 8 to 50 ms are steady from the 4th (28
sessions of 7 files watched)."""
SETTLE_NANOSECONDS = 5_000_000
"""Untimed runs of the same file, at least one, before a burst: each file finds the caches as it leaves them itself.
ResNet-18 at 64x64 beside its FP32 form, integer / FP32 time: 0.33 when single runs alternate, because each integer run
then fetches weights that 44 MB of FP32 weights have just driven out; 0.20 after settling; 0.18 with the files apart."""
BURST = 5
"""Timed runs of one file in a row; keeps what settling costs near the cost of the runs themselves."""

LONGEST_SECONDS = 1e6
"""Of one answer: eleven days."""

MOST_STORED_BYTES = 2 << 30
"""Files beyond this are dropped, those not used for the longest time first."""


class Closed(Exception):  # noqa: N818 - said as one says it
    """The other end of a pipe or socket is gone."""


class Refusal(Exception):  # noqa: N818
    """A request that cannot be met; `code` is for programs, the text for people."""

    def __init__(self, code: str, text: str = "") -> None:
        super().__init__(text)
        self.code = code


# Frames


def pack(header: dict[str, Any], data: bytes = b"") -> bytes:
    """Return the bytes of a frame."""
    text = json.dumps(dict(header, bytes=len(data)) if data else header).encode()
    return struct.pack(">I", len(text)) + text + data


def header_bytes(start: bytes) -> int:
    """Return the length of the header that the first four bytes of a frame announce; raises Closed beyond the limit."""
    (length,) = struct.unpack(">I", start)
    if length > LARGEST_HEADER:
        raise Closed(f"a frame with a header of {length} bytes, which no worker sends")
    return int(length)


def parse_header(text: bytes) -> tuple[dict[str, Any], int]:
    """Return the header of a frame and the number of bytes behind it; raises Closed for what is no frame."""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise Closed("a frame whose header is no JSON") from None
    count = header.get("bytes", 0) if isinstance(header, dict) else None
    if type(count) is not int or not 0 <= count <= LARGEST_BODY:
        raise Closed("a frame whose header is no object, or says no size that a worker sends")
    return header, count


def read_frame(stream: IO[bytes]) -> Frame:
    """Return the next frame; raises Closed at the end of the stream, and for what is no frame."""
    header, count = parse_header(read_exactly(stream, header_bytes(read_exactly(stream, 4))))
    return header, read_exactly(stream, count)


def read_exactly(stream: IO[bytes], count: int) -> bytes:
    """Return `count` bytes; raises Closed when the stream ends before."""
    parts = []
    while count:
        part = stream.read(count)
        if not part:
            raise Closed
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


# What the machine says about itself


def slurp(path: str) -> str | None:
    """Return the stripped text of a file, or None."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return None


def hardware(root: str = "/") -> dict[str, Any]:
    """Return what a reader needs to judge a timing taken here; None where this system does not say.

    `root` is where `proc` and `sys` are; another folder in tests.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    frequency = slurp(os.path.join(root, "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq"))
    governors = {slurp(path + "/scaling_governor") for path in _cpufreq(root)}
    features = cpu_features(root)
    return {
        "cpu_model": _cpu_model(root),
        "cores": os.cpu_count(),
        "cores_allowed": affinity,
        "features": None if features is None else [name for name in FEATURES_THAT_MATTER if name in features],
        "memory_bytes": _memory_bytes(root),
        "os": platform.system() + " " + platform.release(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "governor": ", ".join(sorted(name for name in governors if name)) or None,
        "max_frequency_khz": int(frequency) if frequency and frequency.isdigit() else None,
        "power_mode": slurp(os.path.join(root, "var/lib/nvpmodel/status")),
    }


def cpu_features(root: str = "/") -> frozenset[str] | None:
    """Return the CPU's feature flags as Linux names them, or None where the system does not list them."""
    for line in (slurp(os.path.join(root, "proc/cpuinfo")) or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return None


def _cpu_model(root: str) -> str:
    fields: dict[str, str] = {}
    for line in (slurp(os.path.join(root, "proc/cpuinfo")) or "").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    # x86 and ARM, then MIPS, POWER and RISC-V; virtual machines may call a processor unknown
    names = [fields.get(name) for name in ("model name", "cpu model", "cpu", "uarch")]
    known = next((name for name in names if name and name.lower() not in ("unknown", "-")), None)
    if known is not None:
        family = " ".join(f"{name} {fields[name]}" for name in ("cpu family", "model", "stepping") if name in fields)
        return f"{known} ({family})" if family else known
    board = (slurp(os.path.join(root, "proc/device-tree/model")) or "").strip("\0 ")
    part = " ".join(f"{name} {fields[name]}" for name in ("CPU implementer", "CPU part") if name in fields)
    return ", ".join(text for text in (board, part) if text) or platform.processor() or platform.machine()


def _memory_bytes(root: str) -> int | None:
    for line in (slurp(os.path.join(root, "proc/meminfo")) or "").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return None


def _folders(path: str, prefix: str) -> list[str]:
    try:
        return [os.path.join(path, name) for name in sorted(os.listdir(path)) if name.startswith(prefix)]
    except OSError:
        return []


def _cpufreq(root: str) -> list[str]:
    cores = _folders(os.path.join(root, "sys/devices/system/cpu"), "cpu")
    return [path + "/cpufreq" for path in cores if path[-1].isdigit()]


def _number(text: str | None) -> int | None:
    return int(text) if text and text.lstrip("-").isdigit() else None


def state(root: str = "/") -> dict[str, Any]:
    """Return clocks, heat, throttling and power at this moment; None or empty where the device does not say.

    Keys: `frequency_khz` of the fastest core, `temperature_c` of the hottest zone, `throttled` (reasons that hold now),
    `power_w` of the whole board, `peak_memory_bytes` of this process, `energy_uj` that the processors have drawn since
    some moment in the past, `clock_ns` at which that was read.
    """
    clocks = [_number(slurp(path + "/scaling_cur_freq")) for path in _cpufreq(root)]
    heat = _folders(os.path.join(root, "sys/class/thermal"), "thermal_zone")
    zones = [_number(slurp(path + "/temp")) for path in heat]
    peak = [line.split()[1] for line in (slurp("/proc/self/status") or "").splitlines() if line.startswith("VmHWM:")]
    return {
        "frequency_khz": max([clock for clock in clocks if clock], default=None),
        "temperature_c": max([zone / 1000.0 for zone in zones if zone is not None], default=None),
        "throttled": _throttled(root),
        "power_w": _power_w(root),
        "peak_memory_bytes": int(peak[0]) * 1024 if peak else None,
        "energy_uj": _energy_uj(root),
        "clock_ns": time.monotonic_ns(),
    }


def _throttled(root: str) -> list[str]:
    """Raspberry Pi: bits 0 to 3 of the firmware's word. Jetson: an over-current or thermal event that is active."""
    word = slurp(os.path.join(root, "sys/devices/platform/soc/soc:firmware/get_throttled"))
    reasons = ["undervoltage", "frequency capped", "throttled", "soft temperature limit"]
    try:
        bits = int(word, 16) if word else 0
    except ValueError:
        bits = 0
    found = [reason for index, reason in enumerate(reasons) if bits >> index & 1]
    for path in _folders(os.path.join(root, "sys/class/thermal"), "cooling_device"):
        kind, active = slurp(path + "/type") or "", _number(slurp(path + "/cur_state"))
        if active and ("throttle" in kind or "cpufreq" in kind or kind.startswith(("cpu-", "gpu-"))):
            found.append(f"cooling device {kind}")
    return found


def _power_w(root: str) -> float | None:
    """Volts times amperes of the rail that feeds the board, `VDD_IN`, as the INA3221 of a Jetson tells them."""
    for path in _folders(os.path.join(root, "sys/class/hwmon"), "hwmon"):
        for channel in "1234":
            if slurp(f"{path}/in{channel}_label") == "VDD_IN":
                volts = _number(slurp(f"{path}/in{channel}_input"))
                amperes = _number(slurp(f"{path}/curr{channel}_input"))
                return volts * amperes / 1e6 if volts and amperes else None
    return None


def _energy_uj(root: str) -> int | None:
    """Sum of the counters of all processor packages (RAPL); None where there is none or it may not be read."""
    zones = _folders(os.path.join(root, "sys/class/powercap"), "intel-rapl:")
    packages = [path for path in zones if (slurp(path + "/name") or "").startswith("package")]
    drawn = [_number(slurp(path + "/energy_uj")) for path in packages]
    known = [one for one in drawn if one is not None]
    return sum(known) if known and len(known) == len(drawn) else None


def boot_id(root: str = "/") -> str:
    """Return what changes with every start of the machine."""
    return slurp(os.path.join(root, "proc/sys/kernel/random/boot_id")) or "unknown"


# serve: one process with one runtime


def serve(program: str, cache: str, root: str) -> None:
    """Answer the requests on standard input with the runtime module in the file `program`, until it closes."""
    # Whatever a library prints must not end up between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # when memory is short, a candidate goes first
    except OSError:
        pass
    requests: queue.SimpleQueue[Frame] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    runtime: Any = None
    bench = Bench(cache, root)
    while True:
        header, data = requests.get()
        try:
            if runtime is None:
                runtime = load_module(program)
            answer, result = bench.do(runtime, header, data)
        except Refusal as refusal:
            answer, result = {"refused": str(refusal), "code": refusal.code}, b""
        except Exception as error:
            traceback.print_exc()
            answer, result = {"refused": f"{type(error).__name__}: {error}", "code": "failed"}, b""
        answers.write(pack(answer, result))
        answers.flush()


def _listen(requests: queue.SimpleQueue[Frame]) -> None:
    # Reads in a thread, so that the end of the parent ends this process even in the middle of a long load or run.
    try:
        while True:
            requests.put(read_frame(sys.stdin.buffer))
    finally:
        os._exit(0)


def load_module(path: str) -> Any:
    """Return the module in a file, whatever the file is called."""
    loader = importlib.machinery.SourceFileLoader("hirelc_program", path)
    spec = importlib.util.spec_from_loader("hirelc_program", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.dont_write_bytecode = True
    loader.exec_module(module)
    return module


class Bench:
    """The files that a serving process has opened."""

    def __init__(self, cache: str, root: str) -> None:
        self.cache, self.root = cache, root
        self.built: Any = None
        self.sessions: list[Any] = []
        self.order: list[int] = []
        self.random = random.Random()

    def do(self, runtime: Any, header: dict[str, Any], data: bytes) -> Frame:
        """Return the answer to one request."""
        what = header["do"]
        if what == "describe":
            reason = runtime.availability()
            known = {} if reason else {"versions": runtime.versions(), "runtime": runtime.facts()}
            return dict(known, availability=reason), b""
        if what == "build":
            self.built = None  # two large models at once may be one too many for a board
            self.built = self.open(runtime, header["file"], header["threads"])
            return {}, b""
        if what == "load":
            return {"seconds_per_round": self.load(runtime, header), "state": state(self.root)}, b""
        if what == "options":
            return {"options": getattr(self.built, "options", {})}, b""
        answers = {"infer": self._infer, "profile": self._profile, "rounds": self._rounds}
        if what not in answers:
            raise Refusal("protocol", f"unknown request {what!r}")
        return answers[what](header, data)

    def _images(self, header: dict[str, Any], data: bytes) -> Any:
        import numpy as np

        if "images" in header:
            with open(header["images"], "rb") as file:
                data = file.read()
        return np.frombuffer(data, "<f4").reshape(header["shape"])

    def _infer(self, header: dict[str, Any], data: bytes) -> Frame:
        import numpy as np

        try:
            outputs = self.built.infer(self._images(header, data))
        except ValueError as error:
            raise Refusal("input", str(error)) from None
        shapes = [[name, np.shape(output)] for name, output in outputs.items()]
        return {"outputs": shapes}, b"".join(np.ascontiguousarray(one, "<f4").tobytes() for one in outputs.values())

    def _profile(self, header: dict[str, Any], data: bytes) -> Frame:
        return {"operators": self.built.profile(self._images(header, data), header["runs"])}, b""

    def _rounds(self, header: dict[str, Any], data: bytes) -> Frame:
        import numpy as np

        before = state(self.root)
        samples = np.array(self.rounds(header["count"]), "<i8").reshape(header["count"], len(self.sessions), 2)
        return {"before": before, "after": state(self.root), "shape": samples.shape}, samples.tobytes()

    def open(self, runtime: Any, path: str, threads: int) -> Any:
        """Return a session of the runtime; whatever it raises becomes a refusal of this file."""
        try:
            return runtime.open_session(path, threads, self.cache)
        except Exception as error:
            raise Refusal("file", str(error)) from None

    def load(self, runtime: Any, header: dict[str, Any]) -> float:
        """Open and warm up all files and return the seconds of one run of each."""
        import gc

        seed, files = header["seed"], header["files"]
        self.random, self.order = random.Random(seed), list(range(len(files)))
        # The same file loaded twice was 1.5 % faster the second time, so the order of loading is drawn too, and turned
        # around in the process with the next seed.
        random.Random(seed // 2).shuffle(self.order)
        if seed % 2:
            self.order.reverse()
        sessions, seconds = {}, 0.0
        for index in self.order:
            try:
                session = runtime.open_session(files[index], header["threads"], self.cache)
                started = time.monotonic()
                for runs in range(1, WARM_UP_RUNS + 1):
                    session.timed_run()
                    if runs >= 7 and time.monotonic() - started > WARM_UP_SECONDS:
                        break
            except Exception as error:
                raise Refusal(f"file {index}", str(error)) from None
            seconds += (time.monotonic() - started) / runs
            sessions[index] = session
        self.sessions = [sessions[index] for index in range(len(files))]
        gc.collect()
        gc.disable()
        return seconds

    def rounds(self, count: int) -> list[list[tuple[int, int]]]:
        """Return (count, files, 2) nanoseconds; files take turns in random order, in bursts after untimed runs."""
        samples: list[list[tuple[int, int]]] = []
        while len(samples) < count:
            rows = [[(0, 0)] * len(self.order) for _ in range(min(BURST, count - len(samples)))]
            self.random.shuffle(self.order)
            for index in self.order:
                session = self.sessions[index]
                settled = time.perf_counter_ns() + SETTLE_NANOSECONDS
                session.timed_run()
                while time.perf_counter_ns() < settled:
                    session.timed_run()
                for row in rows:
                    row[index] = session.timed_run()
            samples += rows
        return samples


# keeper: what stays on a board while its host comes and goes


class Child:
    """A serving process of the keeper, and the answer it is writing."""

    def __init__(self, keeper: Keeper, name: str, program: str) -> None:
        self.log = os.path.join(keeper.folder, name + ".log")
        python = [os.path.expanduser(word) for word in shlex.split(keeper.python)]
        command = [*python, os.path.join(keeper.folder, "worker.py"), "serve"]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*command, program, keeper.cache, keeper.root],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=keeper.folder,
                env={**os.environ, "XDG_CACHE_HOME": keeper.cache},  # where runtimes leave things of their own
            )
        self.buffer = Buffer()

    def send(self, frame: bytes) -> None:
        """Pass a request on; a process that has ended is noticed when its answer is awaited."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(frame)
            self.process.stdin.flush()
        except OSError:
            pass

    def ending(self) -> dict[str, Any]:
        """Wait for the end and return how it came."""
        code = self.process.wait()
        lines = (slurp(self.log) or "").splitlines()
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        return {"ended": how, "said": lines[-1][-300:] if lines else ""}

    def kill(self) -> None:
        """End the process now."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            try:
                if stream is not None:
                    stream.close()
            except OSError:
                pass


class Buffer:
    """Bytes that arrive in pieces, and the frames in them."""

    def __init__(self) -> None:
        self.held = bytearray()
        self.header: tuple[dict[str, Any], int] | None = None

    def feed(self, data: bytes) -> Frame | None:
        """Add bytes and return the frame that is complete now, or None; raises Closed for what is no frame."""
        self.held += data
        if self.header is None:
            if len(self.held) < 4:
                return None
            end = 4 + header_bytes(bytes(self.held[:4]))
            if len(self.held) < end:
                return None
            self.header = parse_header(bytes(self.held[4:end]))
            del self.held[:end]
        header, count = self.header
        if len(self.held) < count:
            return None
        body = bytes(self.held[:count])
        del self.held[:count]
        self.header = None
        return header, body


IDENTIFIER = re.compile(r"[0-9a-f]{16,64}\Z")


def checked(identifier: str) -> str:
    """Return a name from the host that is going to be part of a path; anything but hexadecimal digits is refused."""
    if not isinstance(identifier, str) or not IDENTIFIER.match(identifier):
        raise Refusal("protocol", f"{identifier!r} is no identifier")
    return identifier


class Keeper:
    """Files, processes and lock of one host on this board.

    Requests are numbered. A host that lost its line sends the same number again and gets the answer that is there, or
    waits for the one under way: nothing runs twice.
    """

    def __init__(self, base: str, token: str, source: bytes, options: dict[str, Any]) -> None:
        self.base, self.token = base, token
        self.blobs = os.path.join(base, "files")
        self.folder = os.path.join(base, "sessions", token)
        self.cache = os.path.join(self.folder, "cache")
        self.python, self.root = options["python"], options["root"]
        self.idle_s, self.abandoned_s = options["idle_s"], options["abandoned_s"]
        for path in (self.blobs, self.folder, self.cache):
            os.makedirs(path, mode=0o700, exist_ok=True)
        unborn = os.path.join(self.folder, "unborn")
        self.alive = open(unborn, "w")  # noqa: SIM115 - held to the end
        fcntl.flock(self.alive, fcntl.LOCK_EX)  # the kernel drops it at any death, so no process can be mistaken
        os.rename(unborn, os.path.join(self.folder, "alive"))  # nobody sees it without its lock
        with open(os.path.join(self.folder, "worker.py"), "wb") as file:
            file.write(source)
        remove_dead_sessions(base)
        self.children: dict[str, Child] = {}
        self.board_lock: Any = None
        self.number = 0
        self.answer: bytes | None = None
        self.waiting: Child | None = None
        self.limit = 0.0
        self.connection: socket.socket | None = None
        self.incoming = Buffer()
        self.listener = listen(self.folder)
        self.last_heard = time.monotonic()

    def run(self) -> None:
        """Serve until the host says goodbye, or is silent for too long."""
        while self.number >= 0:
            streams: list[Any] = [self.listener] + ([self.connection] if self.connection else [])
            if self.waiting is not None:
                streams.append(self.waiting.process.stdout)
            now = time.monotonic()
            patience = self.idle_s if self.connection else self.abandoned_s
            due = self.limit if self.waiting is not None else self.last_heard + patience
            ready = select.select(streams, [], [], max(0.0, due - now))[0]
            if not ready and time.monotonic() >= due:
                if self.waiting is None:
                    return
                self.waiting.kill()
                self.reply({"hung": True})
            if self.waiting is not None and self.waiting.process.stdout in ready:
                self._hear_child(self.waiting)
            if self.connection in ready:
                self._hear_host()
            if self.listener in ready:
                self._drop_connection()
                self.connection = self.listener.accept()[0]
                self.last_heard = time.monotonic()

    def _hear_child(self, child: Child) -> None:
        assert child.process.stdout is not None
        data = os.read(child.process.stdout.fileno(), 1 << 16)
        if not data:
            self.reply(child.ending())
            return
        try:
            frame = child.buffer.feed(data)
        except Closed as nonsense:
            child.kill()
            self.reply({"ended": f"{nonsense}", "said": ""})
            return
        if frame is not None:
            self.reply(*frame)

    def _hear_host(self) -> None:
        assert self.connection is not None
        try:
            data = self.connection.recv(1 << 18)
            if not data:
                raise Closed
            frame = self.incoming.feed(data)
            while frame is not None and self.number >= 0:
                self._hear_request(*frame)
                frame = self.incoming.feed(b"")
        except (OSError, Closed):
            self._drop_connection()

    def _hear_request(self, header: dict[str, Any], body: bytes) -> None:
        if type(header.get("number")) is not int or not isinstance(header.get("do"), str):
            raise Closed("no request of a host")
        self.last_heard = time.monotonic()
        if header["number"] == self.number:  # asked again over a new connection
            if self.answer is not None:
                self._transmit(self.answer)
            return
        if self.waiting is not None:  # a host that gave up waiting goes on: what ran for it must not answer for another
            self.waiting.kill()
            self.waiting = None
        self.number, self.answer = header["number"], None
        self._meet(header, body)
        if header["do"] == "bye":
            self.number = -1

    def _meet(self, header: dict[str, Any], body: bytes) -> None:
        """Do what a new request asks for, and answer it unless the answer comes from a child."""
        try:
            do = getattr(self, "_do_" + header["do"], None)
            if do is None:
                raise Refusal("protocol", f"unknown request {header['do']!r}")
            answer = do(header, body)
            if answer is not None:
                self.reply(answer)
        except Refusal as refusal:
            self.reply({"refused": str(refusal), "code": refusal.code})
        except OSError as error:
            code = "disk_full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "failed"
            self.reply({"refused": f"{error.filename or self.base}: {error.strerror}", "code": code})
        except Exception as error:
            traceback.print_exc()
            self.reply({"refused": f"{type(error).__name__}: {error}", "code": "failed"})

    def reply(self, header: dict[str, Any], data: bytes = b"") -> None:
        """Keep the answer to the present request, and send it if somebody listens."""
        self.waiting = None
        self.last_heard = time.monotonic()
        self.answer = pack(dict(header, number=self.number), data)
        self._transmit(self.answer)

    def _transmit(self, frame: bytes) -> None:
        if self.connection is not None:
            try:
                self.connection.settimeout(30.0)  # a host that does not read is a host that is gone
                self.connection.sendall(frame)
                self.connection.settimeout(None)
            except OSError:
                self._drop_connection()

    def _drop_connection(self) -> None:
        if self.connection is not None:
            self.connection.close()
        self.connection, self.incoming = None, Buffer()

    def _blob(self, identifier: str) -> str:
        return os.path.join(self.blobs, checked(identifier))

    def _do_hello(self, header: dict[str, Any], data: bytes) -> dict[str, Any]:
        return {
            "hardware": hardware(self.root),
            "boot_id": boot_id(self.root),
            "state": state(self.root),
            "free_bytes": shutil.disk_usage(self.base).free,
            "folder": self.base,
        }

    def _do_have(self, header: dict[str, Any], data: bytes) -> dict[str, Any]:
        path = self._blob(header["sha256"])
        if os.path.exists(path):
            if digest_of(path) == header["sha256"]:  # a power cut may have left another content
                os.utime(path)
                return {"complete": True, "size": os.path.getsize(path)}
            os.unlink(path)
        part = path + ".part"
        return {"complete": False, "size": os.path.getsize(part) if os.path.exists(part) else 0}

    def _do_chunk(self, header: dict[str, Any], data: bytes) -> dict[str, Any]:
        part = self._blob(header["sha256"]) + ".part"
        if header["offset"] == 0:
            self._make_room(header["total"])
        with open(part, "r+b" if os.path.exists(part) else "w+b") as file:
            if file.seek(0, 2) < header["offset"]:
                raise Refusal("protocol", "a gap in an upload")
            file.truncate(header["offset"])
            file.seek(header["offset"])
            file.write(data)
        return {"size": header["offset"] + len(data)}

    def _do_commit(self, header: dict[str, Any], data: bytes) -> dict[str, Any]:
        path = self._blob(header["sha256"])
        if digest_of(path + ".part") != header["sha256"]:
            os.unlink(path + ".part")
            raise Refusal("damaged", "what arrived is not what was sent")
        with open(path + ".part", "rb") as file:
            os.fsync(file.fileno())
        os.replace(path + ".part", path)
        return {}

    def _make_room(self, size: int) -> None:
        stored = [os.path.join(self.blobs, name) for name in os.listdir(self.blobs)]
        stored.sort(key=os.path.getmtime)
        total = sum(map(os.path.getsize, stored))
        while stored and total + size > MOST_STORED_BYTES:
            total -= os.path.getsize(stored[0])
            os.unlink(stored.pop(0))

    def _do_start(self, header: dict[str, Any], data: bytes) -> dict[str, Any]:
        name = checked(header["process"])
        self.children[name] = Child(self, name, self._blob(header["program"]))
        return {}

    def _do_ask(self, header: dict[str, Any], data: bytes) -> None:
        child = self.children.get(header["process"])
        if child is None:
            raise Refusal("protocol", "no such process")
        request = header["request"]
        for key in ("file", "images"):
            if key in request:
                request[key] = self._blob(request[key])
        if "files" in request:
            request["files"] = [self._blob(name) for name in request["files"]]
        if not 0 < header["limit_s"] <= LONGEST_SECONDS:
            raise Refusal("protocol", f"a limit of {header['limit_s']} s")
        self.waiting, self.limit = child, time.monotonic() + header["limit_s"]
        child.send(pack(request, data))

    def _do_stop(self, header: dict[str, Any], data: bytes) -> dict[str, Any]:
        child = self.children.pop(header["process"], None)
        if child is not None:
            child.kill()
        return {}

    def _do_lock(self, header: dict[str, Any], data: bytes) -> dict[str, Any]:
        """One measurement at a time on a board, whoever asks: the lock lies where all users meet."""
        if self.board_lock is None:
            file = open_lock()
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                said = file.read(4096)  # any user of the board may have written it
                file.close()
                try:
                    holder = json.loads(said or "{}")
                except (ValueError, RecursionError):
                    holder = {}
                return {"locked": False, "holder": holder if isinstance(holder, dict) else {}}
            self.board_lock = file
        self.board_lock.seek(0)
        self.board_lock.truncate()
        self.board_lock.write(json.dumps({"who": header["who"], "token": self.token}))
        self.board_lock.flush()
        return {"locked": True}

    def _do_unlock(self, header: dict[str, Any], data: bytes) -> dict[str, Any]:
        if self.board_lock is not None:
            self.board_lock.close()
            self.board_lock = None
        return {}

    def _do_evict(self, header: dict[str, Any], data: bytes) -> dict[str, Any]:
        """End the keeper of a host that is known to be dead, so that its lock is free."""
        caller = connect(os.path.join(self.base, "sessions", checked(header["token"])))
        if caller is not None:
            with caller:
                caller.sendall(pack({"do": "bye", "number": -1}))
                caller.settimeout(10.0)
                with contextlib.suppress(OSError):
                    caller.recv(1)
        return {}

    def _do_bye(self, header: dict[str, Any], data: bytes) -> dict[str, Any]:
        self.clean_up()
        return {}

    def clean_up(self) -> None:
        """End all processes and leave nothing behind, except what other living hosts use."""
        for child in self.children.values():
            child.kill()
        self.children = {}
        self.waiting = None
        self._do_unlock({}, b"")
        self.listener.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        remove_dead_sessions(self.base)
        remove_if_unused(self.base)


def digest_of(path: str) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for part in iter(lambda: file.read(1 << 20), b""):
            digest.update(part)
    return digest.hexdigest()


def open_lock() -> Any:
    """Return the board's lock file, open for reading and writing; any user may have made it."""
    path = os.path.join(tempfile.gettempdir(), "hirelc-deploy.lock")
    try:
        return os.fdopen(os.open(path, os.O_RDWR | os.O_NOFOLLOW), "r+")
    except FileNotFoundError:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        with contextlib.suppress(PermissionError):  # another user was faster
            os.fchmod(descriptor, 0o666)
        return os.fdopen(descriptor, "r+")


def remove_dead_sessions(base: str) -> None:
    """Remove what keepers left behind that were killed, or that a power cut ended."""
    for folder in _folders(os.path.join(base, "sessions"), ""):
        try:
            with open(os.path.join(folder, "alive")) as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            if time.time() - os.path.getmtime(folder) < 60:  # it may be about to be born
                continue
        except OSError:
            continue  # its keeper lives
        shutil.rmtree(folder, ignore_errors=True)


def remove_if_unused(base: str) -> None:
    """Remove the files and the folder itself where no session is left."""
    try:
        os.rmdir(os.path.join(base, "sessions"))  # refused while there is one
    except OSError:
        return
    shutil.rmtree(os.path.join(base, "files"), ignore_errors=True)
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(base, "keeper.log"))
    with contextlib.suppress(OSError):
        os.rmdir(base)


def listen(folder: str) -> socket.socket:
    """Return a listening socket in a folder; by way of the working directory, because the path of a socket is short."""
    server, before = socket.socket(socket.AF_UNIX), os.getcwd()
    os.chdir(folder)
    try:
        server.bind("socket")
    finally:
        os.chdir(before)
    server.listen(4)
    return server


def connect(folder: str) -> socket.socket | None:
    """Return a connection to the keeper of a folder, or None where there is none."""
    client, before = socket.socket(socket.AF_UNIX), os.getcwd()
    try:
        os.chdir(folder)
        client.connect("socket")
    except OSError:
        client.close()
        return None
    finally:
        os.chdir(before)
    return client


# relay: the end of an SSH connection


def relay(mark: str, source: bytes) -> None:
    """Connect standard input and output to the keeper that the first frame names, starting it if that is asked for."""
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    output.write(b"\0" + mark.encode() + b"\n")  # the host skips what shells and greetings printed before this
    output.flush()
    header, _ = read_frame(sys.stdin.buffer)
    os.umask(0o077)
    base = os.path.expanduser(os.path.expandvars(header["folder"]))
    folder = os.path.join(base, "sessions", checked(header["token"]))
    keeper = connect(folder)
    if keeper is None and header["start"]:
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            probe = os.path.join(folder, "probe")
            with open(probe, "wb") as file:
                file.write(b"x" * 4096)
            os.unlink(probe)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            remove_if_unused(base)
            code = "disk_full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "folder"
            output.write(pack({"refused": f"{base}: {error.strerror}", "code": code}))
            output.flush()
            return
        detach(base, header, source)
        until = time.monotonic() + 20
        while keeper is None and time.monotonic() < until:
            time.sleep(0.01)
            keeper = connect(folder)
    if keeper is None:
        said = (slurp(os.path.join(base, "keeper.log")) or "").splitlines()
        answer = {"refused": said[-1] if said else "no session", "code": "no_session", "boot_id": boot_id()}
        output.write(pack(answer))
        output.flush()
        return
    output.write(pack({"attached": True}))
    output.flush()
    threading.Thread(target=_pump_in, args=(keeper,), daemon=True).start()
    while True:
        data = keeper.recv(1 << 18)
        if not data:
            os._exit(0)  # the other thread still reads
        output.write(data)
        output.flush()


def _pump_in(keeper: socket.socket) -> None:
    try:
        while True:
            data = sys.stdin.buffer.read1(1 << 18)  # type: ignore[union-attr]
            if not data:
                break
            keeper.sendall(data)
    except OSError:
        pass
    os._exit(0)


def detach(base: str, header: dict[str, Any], source: bytes) -> None:
    """Start a keeper that outlives this process. Nothing may get out of a forked child into our own course."""
    if os.fork():
        os.wait()
        return
    try:
        os.setsid()
        if os.fork() == 0:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            log = os.open(os.path.join(base, "keeper.log"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
            nothing = os.open(os.devnull, os.O_RDWR)
            os.dup2(nothing, 0)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.closerange(3, 1024)
            keeper = Keeper(base, header["token"], source, header)
            try:
                keeper.run()
            finally:
                if keeper.number >= 0:
                    keeper.clean_up()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


if __name__ == "board":
    relay(globals()["MARK"], globals()["SOURCE"])
elif __name__ == "__main__":
    serve(*sys.argv[2:])
