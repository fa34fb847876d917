"""A pool of equal boards without SSH: what is shared out, what moves when a board fails, and what the last one says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hirelc_deploy.errors import ExportError, TargetUnavailable
from hirelc_deploy.measure.backend import Precision
from hirelc_deploy.measure.pool import SHARE, PoolBackend


class Gone(TargetUnavailable):
    """A board that was switched off."""


class Board:
    """Stands for a ProgramBackend; `fails` says in which calls the board is gone."""

    name = "toy"

    def __init__(self, name: str, fails: Sequence[str] = (), cpu: str = "a") -> None:
        self.device_name, self.fails, self.cpu = name, fails, cpu
        self.did: list[str] = []
        self.states, self.restarts, self.place = None, 2, self

    def _do(self, what: str) -> None:
        self.did.append(what)
        if what in self.fails:
            raise Gone(f"{self.device_name} is switched off.")

    def availability(self) -> str | None:
        return f"{self.device_name} is away." if "availability" in self.fails else None

    def precisions(self) -> tuple[Precision, ...]:
        return (Precision("float", "float32", "float32", 32),)

    def versions(self) -> dict[str, str]:
        return {"toy": "1"}

    def hardware(self) -> dict[str, Any]:
        return {"cpu_model": self.cpu, "cores": 1, "features": [], "architecture": "x"}

    def build(self, model: Path, threads: int) -> Board:
        self._do("build")
        if model.read_text() == "bad":
            raise ExportError(f"{model}: refused.")
        return self

    def infer(self, images: Any) -> dict[str, Any]:
        self._do("infer")
        return {"output": images[:, :1] * 2}

    def profile(self, image: Any, runs: int) -> list[str]:
        self._do("profile")
        return [f"profile of {runs}"]

    def options(self) -> dict[str, Any]:
        return {"on": self.device_name}

    @contextmanager
    def open_timing(self, files: Sequence[Path], threads: int, seed: int) -> Iterator[Board]:
        self._do("open")
        yield self
        self.did.append("closed")

    def rounds(self, count: int) -> Any:
        self._do("rounds")
        return np.full((count, 1, 2), len(self.device_name))


def pool_of(*boards: Board) -> tuple[PoolBackend, list[str]]:
    said: list[str] = []
    return PoolBackend(boards, said.append), said  # type: ignore[arg-type]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.write_text("good")
    return path


def test_a_pool_is_as_its_boards_are(model: Path) -> None:
    pool, said = pool_of(Board("one"), Board("two"))
    assert pool.availability() is None
    assert (pool.name, pool.side_by_side) == ("toy", 2)
    assert pool.precisions()[0].name == "float"
    assert pool.versions() == {"toy": "1"}
    assert pool.hardware()["cpu_model"] == "a"
    runner = pool.build(model)
    assert runner.profile(np.zeros((1, 3)), 4) == ["profile of 4"]
    assert runner.options()["on"] in {"one", "two"}
    assert said == []


def test_images_are_shared_out_and_come_back_in_order(model: Path) -> None:
    one, two = Board("one"), Board("two")
    pool, _ = pool_of(one, two)
    images = np.arange(3 * SHARE + 5, dtype=np.float32).reshape(-1, 1)
    found = pool.build(model).infer(images)
    np.testing.assert_array_equal(found["output"], images * 2)
    assert (one.did + two.did).count("infer") == 4
    assert len(pool.build(model).infer(images[:0])["output"]) == 0


def test_what_a_failing_board_was_doing_is_done_on_another(model: Path) -> None:
    pool, said = pool_of(Board("one", ["infer", "profile"]), Board("two"))
    images = np.ones((2 * SHARE, 1), np.float32)
    np.testing.assert_array_equal(pool.build(model).infer(images)["output"], images * 2)
    assert said == ["one is set aside, 1 left: one is switched off."]
    assert pool.side_by_side == 1


def test_the_last_board_says_why_none_is_left(model: Path) -> None:
    pool, said = pool_of(Board("one", ["build"]), Board("two", ["build"]))
    with pytest.raises(TargetUnavailable, match=r"The last one said: \w+ is switched off"):
        pool.build(model)
    assert len(said) == 2
    with pytest.raises(TargetUnavailable, match="no board of the pool is left"):
        pool.versions()
    assert pool.side_by_side == 1


def test_a_file_that_a_board_refuses_costs_no_board(model: Path) -> None:
    pool, said = pool_of(Board("one"))
    model.write_text("bad")
    for _ in range(2):
        with pytest.raises(ExportError, match="refused"):
            pool.build(model)
    assert said == []


def test_boards_that_are_away_are_set_aside_and_unequal_ones_refused() -> None:
    pool, said = pool_of(Board("one", ["availability"]), Board("two"))
    assert pool.availability() is None
    assert said == ["one is set aside, 1 left: one is away."]
    pool, _ = pool_of(Board("one"), Board("two", cpu="b"))
    assert "one and two differ in CPU" in str(pool.availability())
    pool, _ = pool_of(Board("one", ["availability"]))
    assert pool.availability() == "one is away."


def test_timing_goes_round_the_boards_and_moves_from_one_that_fails(model: Path) -> None:
    one, two = Board("one"), Board("two!!", ["rounds"])
    pool, said = pool_of(one, two)
    with pool.open_timing([model], 1, seed=0) as timing:
        assert timing.place is one
        assert (timing.rounds(2) == 3).all()
        assert (timing.states, timing.restarts) == (None, 2)
    assert one.did == ["open", "rounds", "closed"]
    with pool.open_timing([model], 1, seed=1) as timing:
        assert timing.place is two
        assert (timing.rounds(2) == 3).all()
        assert timing.place is one
        assert timing.restarts == 3, "one move, and the restarts on the present board"
    assert said == ["two!! is set aside, 1 left: two!! is switched off."]


def test_timing_begins_on_the_next_board_that_opens(model: Path) -> None:
    pool, said = pool_of(Board("one", ["open"]), Board("two"))
    with pool.open_timing([model], 1, seed=0) as timing:
        assert (timing.rounds(1) == 3).all()
    assert len(said) == 1
    pool, _ = pool_of(Board("one", ["open"]))
    with pytest.raises(TargetUnavailable, match="no board of the pool is left"), pool.open_timing([model], 1, 0):
        raise AssertionError("not reached")


def test_who_waits_for_a_board_hears_when_the_last_one_is_lost(model: Path) -> None:
    pool, _ = pool_of(Board("one"))
    board = pool._take()
    pool.set_aside(board, "it burnt.")
    pool.set_aside(board, "twice is once.")
    with pytest.raises(TargetUnavailable, match="it burnt"):
        pool.on_a_board(lambda board: None)
