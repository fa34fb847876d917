"""The worker's three parts without SSH: requests to a keeper over its socket, a serving process, a bench in it."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzzing import changed, fuzz
from hypothesis import given
from hypothesis import strategies as st
from remote_fault_cases import TOY

from hirelc_deploy.measure import worker

TOKEN, OTHER = "ab" * 16, "cd" * 16
SOURCE = Path(worker.__file__).read_bytes()


class Host:
    """A keeper of our own in a thread, and the host's end of its socket."""

    def __init__(self, base: Path, token: str = TOKEN, **options: Any) -> None:
        defaults = {"python": sys.executable, "root": "/", "idle_s": 60.0, "abandoned_s": 60.0}
        self.keeper = worker.Keeper(str(base), token, SOURCE, {**defaults, **options})
        self.thread = threading.Thread(target=self.keeper.run, daemon=True)
        self.thread.start()
        self.number = 0
        self.connect()

    def connect(self) -> None:
        found = worker.connect(self.keeper.folder)
        assert found is not None
        self.socket, self.buffer = found, worker.Buffer()
        self.socket.settimeout(30.0)

    def send(self, header: dict[str, Any], data: bytes = b"") -> None:
        self.socket.sendall(worker.pack(header, data))

    def receive(self) -> tuple[dict[str, Any], bytes]:
        frame = self.buffer.feed(b"")
        while frame is None:
            data = self.socket.recv(1 << 16)
            if not data:
                raise worker.Closed
            frame = self.buffer.feed(data)
        return frame

    def ask(self, do: str, data: bytes = b"", **values: Any) -> dict[str, Any]:
        self.number += 1
        self.send({"do": do, "number": self.number, **values}, data)
        answer, _ = self.receive()
        assert answer["number"] == self.number
        return answer

    def store(self, content: bytes) -> str:
        name = hashlib.sha256(content).hexdigest()
        self.ask("chunk", content, sha256=name, offset=0, total=len(content))
        assert self.ask("commit", sha256=name) == {"number": self.number}
        return name

    def toy(self, text: str = "fine") -> str:
        """Start a process with the toy runtime and build a model in it."""
        name = os.urandom(8).hex()
        self.ask("start", process=name, program=self.store(TOY.encode()))
        request = {"do": "build", "file": self.store(text.encode()), "threads": 1}
        self.built = self.ask("ask", process=name, request=request, limit_s=30.0)
        return name

    def end(self) -> None:
        if self.thread.is_alive():
            self.socket.close()
            self.connect()
            self.ask("bye")
            self.thread.join(10)
        self.socket.close()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path / "worker"


@pytest.fixture
def host(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made = Host(base)
    yield made
    made.end()


def test_a_goodbye_leaves_nothing(host: Host, base: Path) -> None:
    hello = host.ask("hello")
    assert hello["folder"] == str(base)
    assert hello["hardware"]["cores"] == os.cpu_count()
    assert host.ask("bye") == {"number": 2}
    host.thread.join(10)
    assert not base.exists()


def test_a_file_arrives_in_pieces_and_is_known_the_next_time(host: Host, base: Path) -> None:
    content = b"a" * 1000 + b"b" * 500
    name = hashlib.sha256(content).hexdigest()
    assert host.ask("have", sha256=name)["complete"] is False
    assert host.ask("chunk", content[:1000], sha256=name, offset=0, total=1500)["size"] == 1000
    assert host.ask("have", sha256=name)["size"] == 1000
    assert host.ask("chunk", content[1200:], sha256=name, offset=1200, total=1500)["code"] == "protocol"
    assert host.ask("chunk", content[1000:], sha256=name, offset=1000, total=1500)["size"] == 1500
    host.ask("commit", sha256=name)
    assert host.ask("have", sha256=name) == {"complete": True, "size": 1500, "number": host.number}
    (base / "files" / name).write_bytes(b"after a power cut")
    assert host.ask("have", sha256=name) == {"complete": False, "size": 0, "number": host.number}


def test_another_content_than_was_announced_is_dropped(host: Host, base: Path) -> None:
    name = hashlib.sha256(b"wanted").hexdigest()
    host.ask("chunk", b"other", sha256=name, offset=0, total=5)
    assert host.ask("commit", sha256=name)["code"] == "damaged"
    assert list((base / "files").iterdir()) == []


def test_old_files_make_room_for_new_ones(host: Host, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "MOST_STORED_BYTES", 250)
    first, second = host.store(b"1" * 100), host.store(b"2" * 100)
    os.utime(base / "files" / first, (1, 1))
    third = host.store(b"3" * 100)
    assert {path.name for path in (base / "files").iterdir()} == {second, third}


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "ABCDEF0123456789", "a" * 15, "", 7, None, ["a" * 16], "a" * 65]
)
def test_only_hexadecimal_digits_become_part_of_a_path(name: Any, host: Host, base: Path) -> None:
    before = sorted(base.rglob("*"))
    for do, key in (("have", "sha256"), ("commit", "sha256"), ("evict", "token"), ("start", "process")):
        answer = host.ask(do, **{"program": "a" * 64, key: name})
        assert answer["code"] == "protocol"
        assert "no identifier" in answer["refused"]
    assert sorted(base.rglob("*")) == before


@pytest.mark.parametrize(
    "sent",
    [
        b"\xff\xff\xff\xff",
        b"\0\0\0\1[",
        worker.pack({"number": 1}),
        worker.pack({"do": "hello"}),
        worker.pack({"do": "hello", "number": "1"}),
        worker.pack({"do": 3, "number": 1}),
        worker.pack({"do": "hello", "number": True}),
    ],
)
def test_what_is_no_request_ends_the_connection_and_not_the_keeper(sent: bytes, host: Host) -> None:
    host.socket.sendall(sent)
    with pytest.raises((worker.Closed, ConnectionError)):
        host.receive()
    host.connect()
    assert "hardware" in host.ask("hello")


def test_requests_that_a_keeper_does_not_know_or_understand_are_refused(host: Host) -> None:
    assert host.ask("reboot")["code"] == "protocol"
    assert host.ask("chunk")["code"] == "failed"
    assert host.ask("ask", process="nobody", request={}, limit_s=1.0)["code"] == "protocol"
    name = host.toy()
    assert host.ask("ask", process=name, request={"do": "options"}, limit_s=float("inf"))["code"] == "protocol"
    assert host.ask("ask", process=name, request={"do": "dance"}, limit_s=30.0)["code"] == "protocol"
    assert host.ask("ask", process=name, request={"do": "infer", "images": "../x", "shape": [1]}, limit_s=30.0) == {
        "refused": "'../x' is no identifier",
        "code": "protocol",
        "number": host.number,
    }


def test_a_question_asked_again_gets_the_same_answer_and_runs_once(host: Host) -> None:
    name = host.toy("log " + str(Path(host.keeper.base) / "log"))
    model = host.store(("log " + str(Path(host.keeper.base) / "log")).encode())
    request = {"do": "load", "files": [model], "threads": 1, "seed": 0}
    assert host.ask("ask", process=name, request=request, limit_s=30.0)["seconds_per_round"] > 0
    host.number += 1
    question = {"do": "ask", "number": host.number, "process": name, "request": {"do": "rounds", "count": 3}}
    host.send({**question, "limit_s": 30.0})
    first, samples = host.receive()
    runs = (Path(host.keeper.base) / "log").read_text().count("\n")
    host.connect()
    host.send({**question, "limit_s": 30.0})
    assert host.receive() == (first, samples)
    assert (Path(host.keeper.base) / "log").read_text().count("\n") == runs
    assert first["shape"] == [3, 1, 2]
    assert len(samples) == 3 * 2 * 8


def test_a_process_that_hangs_or_dies_is_ended_and_said(host: Host) -> None:
    images = host.store(b"\0" * 12)
    infer = {"do": "infer", "images": images, "shape": [1, 3]}
    assert host.ask("ask", process=host.toy("hang in infer"), request=infer, limit_s=0.5)["hung"] is True
    ended = host.ask("ask", process=host.toy("die in infer"), request=infer, limit_s=30.0)
    assert ended["ended"] == "signal 9"
    host.toy("refuse")
    assert host.built["code"] == "file"
    assert "this is no model" in host.built["refused"]


def test_a_host_that_gave_up_waiting_goes_on(host: Host) -> None:
    name = host.toy("hang in infer")
    images = host.store(b"\0" * 12)
    host.number += 1
    request = {"do": "infer", "images": images, "shape": [1, 3]}
    host.send({"do": "ask", "number": host.number, "process": name, "request": request, "limit_s": 60.0})
    assert "hardware" in host.ask("hello")
    assert host.ask("stop", process=name) == {"number": host.number}
    assert host.ask("stop", process=name) == {"number": host.number}


def test_one_host_at_a_time_has_the_lock_and_a_dead_one_is_evicted(host: Host, base: Path, tmp_path: Path) -> None:
    other = Host(base, OTHER)
    assert host.ask("lock", who={"user": "me"})["locked"] is True
    refused = other.ask("lock", who={"user": "you"})
    assert refused["locked"] is False
    assert refused["holder"] == {"who": {"user": "me"}, "token": TOKEN}
    (tmp_path / "hirelc-deploy.lock").write_text("[" * 100_000)
    assert other.ask("lock", who={})["holder"] == {}
    (tmp_path / "hirelc-deploy.lock").write_text("[1]")
    assert other.ask("lock", who={})["holder"] == {}
    assert other.ask("evict", token=TOKEN) == {"number": other.number}
    host.thread.join(10)
    assert not host.thread.is_alive()
    assert other.ask("lock", who={"user": "you"})["locked"] is True
    assert other.ask("unlock") == {"number": other.number}
    assert other.ask("evict", token=TOKEN) == {"number": other.number}
    other.end()
    assert not base.exists()


@pytest.mark.parametrize("options", [{"abandoned_s": 0.2}, {"idle_s": 0.2}])
def test_a_keeper_that_is_left_alone_ends(options: dict[str, float], tmp_path: Path) -> None:
    host = Host(tmp_path / "alone", **options)
    if "abandoned_s" in options:
        host.socket.close()
    host.thread.join(10)
    assert not host.thread.is_alive()
    host.keeper.clean_up()
    assert not (tmp_path / "alone").exists()


def test_what_killed_keepers_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    base = tmp_path / "worker"
    dead, unborn, old = (base / "sessions" / name for name in ("dead", "unborn", "old"))
    for folder in (dead, unborn, old):
        folder.mkdir(parents=True)
    (dead / "alive").touch()
    os.utime(old, (1, 1))
    worker.remove_dead_sessions(str(base))
    assert [path.name for path in (base / "sessions").iterdir()] == ["unborn"]
    worker.remove_if_unused(str(base))
    assert base.exists()


def test_a_keeper_that_starts_is_not_taken_for_a_dead_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, lock = tmp_path / "base", worker.fcntl.flock

    def another_starts_first(file: Any, kind: int) -> None:
        if kind == worker.fcntl.LOCK_EX:
            worker.remove_dead_sessions(str(base))
        lock(file, kind)

    monkeypatch.setattr(worker.fcntl, "flock", another_starts_first)
    host = Host(base)
    host.end()
    assert not base.exists()


class Left(BaseException):
    """This process would have ended."""


@pytest.mark.parametrize("trouble", [None, MemoryError("no memory for the keeper")])
def test_a_keeper_of_its_own_process_cleans_up_and_never_comes_back(
    trouble: Exception | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []

    class Watched:
        number = 0

        def __init__(self, base: str, token: str, source: bytes, options: dict[str, Any]) -> None:
            assert (base, token, source) == (str(tmp_path), TOKEN, SOURCE)

        def run(self) -> None:
            done.append("served")
            if trouble is not None:
                raise trouble

        def clean_up(self) -> None:
            done.append("cleaned up")

    def leave(code: int) -> None:
        raise Left(code)

    for name in ("setsid", "dup2", "closerange"):
        monkeypatch.setattr(worker.os, name, lambda *_: None)
    monkeypatch.setattr(worker.os, "fork", lambda: 0)
    monkeypatch.setattr(worker.os, "_exit", leave)
    monkeypatch.setattr(worker.signal, "signal", lambda *_: None)
    monkeypatch.setattr(worker, "Keeper", Watched)
    with pytest.raises(Left):
        worker.detach(str(tmp_path), {"token": TOKEN}, SOURCE)
    assert done == ["served", "cleaned up"]
    assert ("no memory for the keeper" in capsys.readouterr().err) is (trouble is not None)
    assert (tmp_path / "keeper.log").stat().st_mode & 0o777 == 0o600


def test_nobody_listens_where_there_is_no_keeper(tmp_path: Path) -> None:
    before = os.getcwd()
    assert worker.connect(str(tmp_path)) is None
    assert worker.connect(str(tmp_path / "gone")) is None
    assert os.getcwd() == before


def test_the_lock_of_a_board_is_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "hirelc-deploy.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic link"):
        worker.open_lock()
    assert not (tmp_path / "precious").exists()


# The bench of a serving process


@pytest.fixture
def runtime(tmp_path: Path) -> Any:
    program = tmp_path / "toy"
    program.write_text(TOY)
    return worker.load_module(str(program))


def test_a_bench_describes_builds_runs_and_times(runtime: Any, tmp_path: Path) -> None:
    import gc

    bench = worker.Bench(str(tmp_path), "/")
    model = tmp_path / "model"
    model.write_text("fine")
    described, _ = bench.do(runtime, {"do": "describe"}, b"")
    assert described == {"versions": {"toy": "1"}, "runtime": {}, "availability": None}
    assert bench.do(runtime, {"do": "build", "file": str(model), "threads": 1}, b"") == ({}, b"")
    assert bench.do(runtime, {"do": "options"}, b"") == ({"options": {}}, b"")
    answer, data = bench.do(runtime, {"do": "infer", "shape": [1, 3]}, b"\0\0\x80\x3f" * 3)
    assert (answer, data) == ({"outputs": [["twice", (1, 3)]]}, b"\0\0\0\x40" * 3)
    assert bench.do(runtime, {"do": "profile", "shape": [1, 3], "runs": 2}, b"\0" * 12)[0]["operators"]
    loading = {"do": "load", "files": [str(model)] * 2, "threads": 1, "seed": 3}
    try:
        assert bench.do(runtime, loading, b"")[0]["seconds_per_round"] > 0
        answer, data = bench.do(runtime, {"do": "rounds", "count": 7}, b"")
    finally:
        gc.enable()  # which loading switches off
    assert answer["shape"] == (7, 2, 2)
    assert len(data) == 7 * 2 * 2 * 8


def test_a_bench_refuses_with_a_code(runtime: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = worker.Bench(str(tmp_path), "/")
    model = tmp_path / "model"
    model.write_text("refuse")
    for request, code in (
        ({"do": "build", "file": str(model), "threads": 1}, "file"),
        ({"do": "load", "files": [str(model)], "threads": 1, "seed": 0}, "file 0"),
        ({"do": "dance"}, "protocol"),
    ):
        with pytest.raises(worker.Refusal) as refusal:
            bench.do(runtime, request, b"")
        assert refusal.value.code == code
    model.write_text("fine")
    bench.do(runtime, {"do": "build", "file": str(model), "threads": 1}, b"")
    monkeypatch.setattr(bench.built, "infer", lambda images: float("no number"))
    with pytest.raises(worker.Refusal) as refusal:
        bench.do(runtime, {"do": "infer", "shape": [1, 3]}, b"\0" * 12)
    assert refusal.value.code == "input"


def test_a_slow_file_warms_up_for_a_limited_time(runtime: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gc

    monkeypatch.setattr(worker, "WARM_UP_SECONDS", 0.0)
    bench = worker.Bench(str(tmp_path), "/")
    model = tmp_path / "model"
    model.write_text("fine")
    try:
        bench.load(runtime, {"files": [str(model)], "threads": 1, "seed": 0})
    finally:
        gc.enable()
    assert bench.sessions[0].runs == 7


# Frames


def frames_of(stream: bytes, step: int) -> None:
    """Feed a stream in pieces; whatever comes out is a header and as many bytes as it says."""
    buffer = worker.Buffer()
    for start in range(0, len(stream), step):
        frame = buffer.feed(stream[start : start + step])
        while frame is not None:
            assert isinstance(frame[0], dict)
            assert len(frame[1]) == frame[0].get("bytes", 0)
            frame = buffer.feed(b"")
    assert len(buffer.held) <= len(stream)


HEADER = {"do": "infer", "number": 3, "bytes": 5, "shape": [1, 2]}


@fuzz()
@given(
    header=changed(HEADER),
    body=st.binary(max_size=20),
    noise=st.binary(max_size=30),
    step=st.integers(1, 40),
)
def test_any_stream_gives_frames_or_is_closed(header: Any, body: bytes, noise: bytes, step: int) -> None:
    import io
    import struct

    text = json.dumps(header).encode()
    stream = struct.pack(">I", len(text)) + text + body + noise
    for read in (lambda: frames_of(stream, step), lambda: worker.read_frame(io.BytesIO(stream))):
        try:
            read()
        except worker.Closed:
            continue


REQUESTS: dict[str, dict[str, Any]] = {
    "hello": {},
    "have": {"sha256": "a" * 64},
    "chunk": {"sha256": "a" * 64, "offset": 0, "total": 3},
    "commit": {"sha256": "a" * 64},
    "ask": {"process": "a" * 16, "request": {"do": "infer", "images": "b" * 64, "shape": [1]}, "limit_s": 1.0},
    "stop": {"process": "a" * 16},
    "lock": {"who": {"user": "me", "pid": 1}},
    "unlock": {},
    "evict": {"token": "c" * 32},
}


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[worker.Keeper]:
    """A keeper that answers nobody: what it would have sent stays in `answer`."""
    folder = tmp_path_factory.mktemp("silent")
    options = {"python": sys.executable, "root": "/", "idle_s": 60.0, "abandoned_s": 60.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(folder))
        keeper = worker.Keeper(str(folder / "base"), TOKEN, SOURCE, options)
        yield keeper
        keeper.clean_up()
        keeper.alive.close()


@fuzz()
@given(do=st.sampled_from(sorted(REQUESTS)), data=st.data())
def test_any_request_is_answered_and_touches_nothing_outside(
    do: str, data: st.DataObject, silent: worker.Keeper
) -> None:
    values = data.draw(changed(REQUESTS[do]).filter(lambda value: isinstance(value, dict)))
    outside = sorted(Path(silent.base).parent.iterdir())
    silent.answer = None
    host, keeper_end = socket.socketpair()
    with host, keeper_end:
        silent.connection, silent.incoming = keeper_end, worker.Buffer()
        frame = worker.pack(
            {**{key: value for key, value in values.items() if key != "bytes"}, "do": do, "number": 7}, b"x"
        )
        silent.number = 6
        host.sendall(frame)
        silent._hear_host()
        silent.connection = None
    assert silent.number == 7
    assert silent.answer is not None
    added = set(Path(silent.base).parent.iterdir()) - set(outside)
    assert {path.name for path in added} <= {"hirelc-deploy.lock"}
