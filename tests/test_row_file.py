import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hirelc_deploy.compress import row_file
from hirelc_deploy.compress.row_file import RowFile
from hirelc_deploy.graph.answers import Answers

ROWS = np.array([5, 0, 3])


def answers(count: int = 3, seed: int = 0) -> Answers:
    drawn = torch.Generator().manual_seed(seed)
    return {
        "scores": torch.randn(count, 4, generator=drawn),
        "map": torch.randn(count, 2, 3, 3, generator=drawn),
        "angle": torch.randn(count, generator=drawn),
        "nothing": torch.empty(count, 0, 2),
    }


def test_answers_come_back_to_the_bit_in_any_order():
    kept, given = RowFile(8), answers()
    kept.keep(ROWS, 2, given)
    found = kept.get(ROWS[::-1].copy(), 2)
    assert found is not None
    assert all(torch.equal(found[name], values.flip(0)) for name, values in given.items())


def test_answers_of_other_images_and_views_are_not_known():
    kept = RowFile(8)
    assert kept.get(ROWS, 0) is None
    kept.keep(ROWS, 0, answers())
    assert kept.get(np.array([5, 1]), 0) is None
    assert kept.get(ROWS, 1) is None


def test_views_have_places_of_their_own():
    kept = RowFile(8)
    for view in (7, 0):
        kept.keep(ROWS, view, answers(seed=view))
    for view in (7, 0):
        found = kept.get(ROWS, view)
        assert found is not None
        assert torch.equal(found["map"], answers(seed=view)["map"])


def test_the_first_views_are_kept_as_far_as_the_room_goes(monkeypatch: pytest.MonkeyPatch):
    free = 2 * 2.5 * 8 * 4 * (4 + 18 + 1)  # half of it holds two views of eight images and a half
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, int(free)))
    kept = RowFile(8)
    for view in range(4):
        kept.keep(ROWS, view, answers())
    assert [kept.get(ROWS, view) is not None for view in range(4)] == [True, True, False, False]


def test_a_disk_that_is_full_keeps_what_was_written_and_no_more(monkeypatch: pytest.MonkeyPatch):
    kept = RowFile(8)
    kept.keep(ROWS, 0, answers())

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(row_file.os, "pwritev", full)
        kept.keep(np.array([1, 2, 4]), 0, answers())
        kept.keep(ROWS, 1, answers())
    kept.keep(ROWS, 2, answers())
    assert kept.get(ROWS, 0) is not None
    assert kept.get(np.array([1]), 0) is None
    assert kept.get(ROWS, 1) is kept.get(ROWS, 2) is None


def test_answers_of_another_size_are_not_kept():
    kept = RowFile(8)
    kept.keep(ROWS, 0, {"boxes": torch.zeros(3, 5, 4)})
    kept.keep(np.array([1]), 0, {"boxes": torch.zeros(1, 6, 4)})
    assert kept.get(np.array([1]), 0) is None


def test_nothing_is_left_in_the_folder(tmp_path: Path):
    RowFile(8, tmp_path).keep(ROWS, 0, answers())
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_keeps_nothing():
    kept = RowFile(8, Path("/nowhere"))
    kept.keep(ROWS, 0, answers())
    assert kept.get(ROWS, 0) is None
