"""What an attacker on a board can do to the host: be refused, in one sentence; see docs/security-model.md."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hostile_board
import numpy as np
import pytest
from fuzzing import VALUES, changed, fuzz, outcome_of
from hirelc_backends.onnxruntime_arm import OnnxRuntimeArm
from hypothesis import given
from hypothesis import strategies as st

from hirelc_deploy.cli.application import fail
from hirelc_deploy.errors import HirelcError, TargetUnavailable
from hirelc_deploy.measure import remote, worker
from hirelc_deploy.measure.board_answers import check_hardware, is_dead
from hirelc_deploy.measure.device import ProcessEnded, SessionLost
from hirelc_deploy.measure.machine import describe, fingerprint
from hirelc_deploy.measure.program import ProgramBackend
from hirelc_deploy.measure.remote import Board
from hirelc_deploy.measure.targets import power_mode

MOST_GROWTH_BYTES = 200 << 20
"""Of this process while it deals with a board that sends without end."""


def memory() -> int:
    return next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmRSS:")
    )


def board_of(mode: str, *more: str, **options: Any) -> Board:
    command = (sys.executable, hostile_board.__file__, mode, *more)
    return Board("evil", ssh=command, **{"patience_s": 0.5, "say": lambda text: None, **options})


@contextmanager
def within(seconds: float) -> Iterator[None]:
    started, before = time.monotonic(), memory()
    yield
    assert time.monotonic() - started < seconds
    assert memory() - before < MOST_GROWTH_BYTES


@pytest.mark.parametrize("mode", [*hostile_board.FIRST, *hostile_board.HELLO])
def test_what_is_no_answer_ends_in_one_sentence(mode: str) -> None:
    board = board_of(mode)
    with within(60), pytest.raises(TargetUnavailable) as error:
        board.hardware()
    board.close()
    text = str(error.value)
    assert text.startswith("evil")
    assert text.replace("\n", "").isprintable()


@pytest.mark.parametrize("mode", ["greets forever", "errors without end", "other numbers"])
def test_a_board_that_never_stops_is_given_up(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "CONNECT_SECONDS", 3.0)
    monkeypatch.setattr(Board.call, "__defaults__", (b"", 1.0, 1.0))  # an answer within 2 s
    board = board_of(mode)
    with within(90), pytest.raises(TargetUnavailable):
        board.hardware()
    board.close()


def test_what_a_board_sends_unasked_waits_in_its_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "GOODBYE_SECONDS", 1.0)
    board = board_of("floods")
    with within(30):
        assert board.hardware()["cores"] == 4
        time.sleep(2.0)
    board.close()


def test_a_board_that_reads_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "UNREAD_SECONDS", 0.5)
    board = board_of("never reads")
    board.hardware()
    monkeypatch.setattr(Board.call, "__defaults__", (b"", 1.0, 0.0))
    with within(60), pytest.raises((TargetUnavailable, SessionLost)):
        board.upload(bytes(5 << 20))
    board.close()


@pytest.mark.parametrize(
    "holder",
    [
        None,
        {"who": 7},
        {"who": {"pid": -1}, "token": "../.."},
        {"who": {"pid": "1", "boot_id": worker.boot_id()}},
        {"who": {"user": "\x1b[2J" * 1000, "host": {}}},
    ],
)
def test_a_lock_that_somebody_else_wrote_is_waited_for_and_then_given_up(holder: Any) -> None:
    said: list[str] = []
    board = board_of("lock", json.dumps(holder), busy_s=0.6, say=said.append)
    board.hardware()
    with within(30), pytest.raises(TargetUnavailable), board.measuring():
        raise AssertionError("not reached")
    board.close()
    assert all(text.isprintable() and len(text) < 400 for text in said)


def test_a_lock_whose_holder_is_dead_again_and_again_is_not_asked_for_without_end() -> None:
    dead = {"who": {"boot_id": worker.boot_id(), "pid": 2**22 + 1}, "token": "ab" * 16}
    board = board_of("lock", json.dumps(dead), busy_s=0.6)
    board.hardware()
    with within(30), pytest.raises(TargetUnavailable, match="has been measuring there"), board.measuring():
        raise AssertionError("not reached")
    board.close()


@pytest.mark.parametrize("pid", [-1, 0, 1, True, "7", None, 10**30])
def test_the_process_that_a_board_names_is_never_a_group_of_ours(pid: Any) -> None:
    assert not is_dead({"boot_id": worker.boot_id(), "pid": pid})


def test_a_process_that_ends_oddly_is_a_process_that_ended(tmp_path: Path) -> None:
    board = board_of("ended oddly")
    program = tmp_path / "program.py"
    program.write_text("")
    with board.open(program) as process, pytest.raises(ProcessEnded) as error:
        process.ask("describe", limit_s=5.0)
    assert str(error.value).isprintable()
    board.close()


def test_words_of_strangers_cannot_move_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    assert fail("board: \x1b[2J\x1b]0;x\x07\u202egnp \x9b1m end", 3) == 3
    error = capsys.readouterr().err
    assert re.sub(r"[\n]", "", error).isprintable()
    assert "end" in error


# The host's side of the protocol, answer by answer


class Answering:
    """A device whose worker gives one answer to everything."""

    name = "evil"

    def __init__(self, answers: dict[str, tuple[Any, bytes]]) -> None:
        self.answers = answers

    def hardware(self) -> dict[str, Any]:
        return dict(hostile_board.GOOD_HARDWARE)

    @contextmanager
    def open(self, program: Path) -> Iterator[Answering]:
        yield self

    @contextmanager
    def measuring(self) -> Iterator[None]:
        yield

    def ask(self, do: str, **values: Any) -> tuple[Any, bytes]:
        return self.answers.get(do, ({}, b""))


DESCRIBED = {"availability": None, "versions": {"onnxruntime": "1.31.1"}, "runtime": {"providers": ["CPU"]}}
ANSWERS: dict[str, tuple[Any, bytes]] = {
    "describe": (DESCRIBED, b""),
    "infer": ({"outputs": [["a", [2, 3]], ["b", [2]]]}, b"\0" * 32),
    "profile": ({"operators": [["conv", "Conv", True, 3.5]]}, b""),
    "options": ({"options": {"threads": 1}}, b""),
    "load": ({"seconds_per_round": 0.001, "state": {}}, b""),
    "rounds": ({"before": {}, "after": {}, "shape": [2, 1, 2]}, b"\1" * 32),
}


def use(backend: ProgramBackend, model: Path) -> None:
    """Call everything that a backend offers."""
    backend.connect()
    machine = describe(backend)
    fingerprint(machine)
    power_mode(machine)
    backend.precisions()
    runner = backend.build(model)
    runner.infer(np.zeros((2, 3, 4, 4), np.float32))
    runner.profile(np.zeros((1, 3, 4, 4), np.float32), 2)
    runner.options()
    with backend.open_timing([model], 1, 0) as timing:
        timing.rounds(2)


def backend_that_answers(answers: dict[str, tuple[Any, bytes]]) -> ProgramBackend:
    arm = OnnxRuntimeArm()
    return ProgramBackend(arm.name, arm.program, arm.precisions_on, Answering(answers))  # type: ignore[arg-type]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"model")
    return path


def test_the_answers_that_are_varied_are_good_as_they_stand(model: Path) -> None:
    use(backend_that_answers(ANSWERS), model)


@fuzz()
@given(data=st.data())
def test_any_answer_is_used_or_refused_in_one_sentence(data: st.DataObject, model: Path) -> None:
    do = data.draw(st.sampled_from(sorted(ANSWERS)))
    header, body = ANSWERS[do]
    header = data.draw(changed(header).filter(lambda value: isinstance(value, dict)))
    body = data.draw(st.sampled_from([body, b"", body[:-3], body * 2, b"\xff" * len(body)]))
    outcome_of(lambda: use(backend_that_answers({**ANSWERS, do: (header, body)}), model), HirelcError)


@fuzz()
@given(said=st.dictionaries(st.sampled_from([*hostile_board.GOOD_HARDWARE, "power_mode", "governor"]), VALUES))
def test_any_description_is_taken_or_refused(said: dict[str, Any]) -> None:
    hardware = {**hostile_board.GOOD_HARDWARE, **said}
    try:
        check_hardware(hardware)
    except (TypeError, KeyError, ValueError):
        return
    assert isinstance(power_mode(hardware), str)
    assert fingerprint({**hardware, "backend": "b", "versions": {}})
