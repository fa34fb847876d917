"""The pipe to a board behind a Ray node, without Ray: the far process, how bytes are carried, and what is said."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from hirelc_deploy.errors import InputError, TargetUnavailable
from hirelc_deploy.measure import ray_pipe
from hirelc_deploy.measure.ray_pipe import FarProcess


class RayError(Exception):
    """As `ray.exceptions.RayError`."""


class Near:
    """An actor that is here: each call is made at once, and `get` gives its result or raises what it raised."""

    def __init__(self, made: Any) -> None:
        self._made = made

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._made, name)
        return SimpleNamespace(remote=lambda *values: lambda: method(*values))


NODES = [
    {"NodeID": "1", "Alive": True, "NodeName": "near", "NodeManagerHostname": "h1", "NodeManagerAddress": "10.0.0.1"},
    {"NodeID": "2", "Alive": True, "NodeName": "far", "NodeManagerHostname": "h2", "NodeManagerAddress": "10.0.0.2"},
    {"NodeID": "3", "Alive": False, "NodeName": "gone", "NodeManagerHostname": "h3", "NodeManagerAddress": "10.0.0.3"},
    {"NodeID": "4", "Alive": True, "NodeName": "twin", "NodeManagerHostname": "h4", "NodeManagerAddress": "10.0.0.4"},
    {"NodeID": "5", "Alive": True, "NodeName": "twin", "NodeManagerHostname": "h5", "NodeManagerAddress": "10.0.0.5"},
]


def fake_ray(placed: list[str]) -> Any:
    def affinity(node: str, *, soft: bool) -> str:
        assert soft is False
        return node

    def remote(kind: Callable[..., Any]) -> Any:
        def options(**values: Any) -> Any:
            placed.append(values["scheduling_strategy"])
            assert values["max_concurrency"] == ray_pipe.FLOWS
            return SimpleNamespace(remote=lambda *made_of: Near(kind(*made_of)))

        return SimpleNamespace(options=options)

    strategies = SimpleNamespace(NodeAffinitySchedulingStrategy=affinity)
    return SimpleNamespace(
        nodes=lambda: NODES,
        remote=remote,
        get=lambda call: call(),
        exceptions=SimpleNamespace(RayError=RayError),
        util=SimpleNamespace(scheduling_strategies=strategies),
    )


def test_a_far_process_reads_writes_and_ends() -> None:
    far = FarProcess(["sh", "-c", "cat; echo wrong >&2; exit 7"])
    assert far.write(b"words") is True
    assert far.read(1) == b"words"
    assert far.write(b"") is True
    assert far.read(1) == b""
    assert far.read(2) == b"wrong\n"
    assert far.read(2) == b""
    assert far.wait() == 7


def test_a_far_process_that_a_signal_ended_has_the_code_of_a_shell() -> None:
    far = FarProcess(["sleep", "60"])
    far._child.send_signal(signal.SIGTERM)
    assert far.wait() == 128 + signal.SIGTERM


def test_nobody_reads_any_more_after_the_end() -> None:
    far = FarProcess(["true"])
    assert far.wait() == 0
    assert far.write(b"x" * 100_000) is False


@pytest.mark.parametrize(("name", "node"), [("far", "2"), ("h1", "1"), ("10.0.0.2", "2")])
def test_a_node_is_found_by_any_of_its_names(name: str, node: str) -> None:
    placed: list[str] = []
    far = ray_pipe.far_process(fake_ray(placed), name, ["true"])
    assert placed == [node]
    assert far.wait.remote()() == 0


@pytest.mark.parametrize(("name", "count"), [("gone", "no"), ("nowhere", "no"), ("twin", "2")])
def test_a_name_of_no_node_or_several_is_one_sentence(name: str, count: str) -> None:
    with pytest.raises(TargetUnavailable, match=f"{count} nodes of the Ray cluster are called '{name}'; it has"):
        ray_pipe.far_process(fake_ray([]), name, ["true"])


@pytest.fixture
def standard_input(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Descriptor 0 is a pipe; the test writes into it."""
    kept, (ours, theirs) = os.dup(0), os.pipe()
    os.dup2(ours, 0)
    yield theirs
    os.dup2(kept, 0)
    for descriptor in (kept, ours):
        os.close(descriptor)


def test_bytes_are_carried_both_ways_and_the_code_comes_back(
    standard_input: int, capfd: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    far = Near(FarProcess(["sh", "-c", "tr a-z A-Z; echo done >&2; exit 3"]))
    os.write(standard_input, b"hello")
    os.close(standard_input)
    assert ray_pipe.join(fake_ray([]), far, writing) == 3
    assert os.read(reading, 100) == b"HELLO"
    assert capfd.readouterr().err == "done\n"
    for descriptor in (reading, writing):
        os.close(descriptor)


def test_a_node_that_is_lost_ends_the_carrying(standard_input: int) -> None:
    def lost(*values: Any) -> Any:
        raise RayError("the node died")

    far = Near(SimpleNamespace(write=lambda data: True, read=lost, wait=lambda: 0))
    reading, writing = os.pipe()
    with pytest.raises(RayError):
        ray_pipe.join(fake_ray([]), far, writing)
    os.close(standard_input)
    for descriptor in (reading, writing):
        os.close(descriptor)


@pytest.fixture
def own_standard_output() -> Any:
    """`main` moves standard output away, as a program of its own may."""
    kept = os.dup(1)
    yield
    os.dup2(kept, 1)
    os.close(kept)


@pytest.mark.usefixtures("own_standard_output")
def test_the_program_says_one_sentence_where_a_node_or_ray_is_missing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_pipe, "connect", lambda address, who: fake_ray([]))
    assert ray_pipe.main(["nowhere", "ssh", "me@board"]) == ray_pipe.LOST
    assert "no nodes of the Ray cluster" in capfd.readouterr().err

    def missing(address: str, who: str) -> Any:
        raise InputError(f"{who} {address}: Ray is not installed;\n  pip install ray")

    monkeypatch.setattr(ray_pipe, "connect", missing)
    assert ray_pipe.main(["far", "ssh"]) == ray_pipe.LOST
    assert capfd.readouterr().err == "via far: ray auto: Ray is not installed; pip install ray\n"


@pytest.mark.usefixtures("own_standard_output")
def test_the_program_returns_the_code_of_the_command_and_says_when_the_actor_is_lost(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], standard_input: int
) -> None:
    monkeypatch.setattr(ray_pipe, "connect", lambda address, who: fake_ray([]))
    os.close(standard_input)
    assert ray_pipe.main(["far", "sh", "-c", "exit 9"]) == 9

    def lost(ray: Any, far: Any, out: int) -> int:
        raise RayError("The actor died. Its node too.")

    monkeypatch.setattr(ray_pipe, "join", lost)
    assert ray_pipe.main(["far", "true"]) == ray_pipe.LOST
    assert "via far: its Ray actor is lost (The actor died)" in capfd.readouterr().err
