from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hirelc_deploy.compress import row_file
from hirelc_deploy.evaluate import selection as module
from hirelc_deploy.evaluate.cutting import forward
from hirelc_deploy.evaluate.effort import SMALL_BATCH
from hirelc_deploy.evaluate.selection import First, Selection, judged, loss_of, parts_of
from hirelc_deploy.graph.answers import Answers
from hirelc_deploy.inputs.data.images import ArrayImages
from hirelc_deploy.inputs.data.splits import identity
from hirelc_deploy.inputs.data.views import Indices
from hirelc_deploy.progress import Progress
from hirelc_deploy.tasks.classification import CLASSIFICATION

QUIET = Progress(quiet=True)
COUNT = 2 * SMALL_BATCH + 6


class Watched(ArrayImages):
    """Images that note how many are asked for at once."""

    def __init__(self, labelled: bool = True) -> None:
        drawn = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (COUNT, 3, 6, 6), generator=drawn, dtype=torch.uint8)
        labels = np.arange(COUNT, dtype=np.int64) % 3 if labelled else None
        super().__init__(pixels, labels, np.arange(COUNT), identity((3, 6, 6)))
        self.asked: list[int] = []

    def batch(self, indices: Indices) -> Tensor:
        self.asked.append(len(indices))
        return super().batch(indices)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()


class Counted:
    """Answers, and counts to how many images."""

    def __init__(self) -> None:
        self.images, self._model = 0, network(0)

    def __call__(self, pictures: Tensor) -> Answers:
        self.images += len(pictures)
        return forward(self._model, pictures)


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_BYTES", 4 * 3 * 6 * 6 * SMALL_BATCH)


def figures(selection: Selection, count: int | None = None) -> tuple[float, float | None, list[float]]:
    other = partial(forward, network(1))
    loss, metric = judged(CLASSIFICATION, selection.shown(count), other)
    assert loss_of(CLASSIFICATION, selection.shown(count), other) == loss
    return loss, metric, parts_of(CLASSIFICATION, selection.shown(count), other)


def test_images_in_parts_are_judged_as_all_at_once_to_the_bit(monkeypatch: pytest.MonkeyPatch):
    whole = Selection(Watched(), CLASSIFICATION, Counted(), QUIET)
    expected = [figures(whole, count) for count in (None, SMALL_BATCH + 3)]
    assert len(list(whole.shown())) == 1
    monkeypatch.setattr(module, "KEPT_BYTES", 0)
    parted = Selection(Watched(), CLASSIFICATION, Counted(), QUIET)
    assert [len(part) for part in parted.shown()] == [SMALL_BATCH, SMALL_BATCH, 6]
    assert [len(part) for part in parted.shown(SMALL_BATCH + 3)] == [SMALL_BATCH, 3]
    assert [figures(parted, count) for count in (None, SMALL_BATCH + 3)] == expected
    assert parted.parts == whole.parts


def test_more_images_than_fit_are_never_held_whole(in_parts: None):
    images = Watched()
    selection = Selection(images, CLASSIFICATION, Counted(), QUIET)
    figures(selection)
    assert selection._kept is None
    assert max(images.asked) == SMALL_BATCH
    assert sum(images.asked) == 2 + 1 + COUNT  # three by which sizes are known; the others come back from a file


def test_the_uncut_model_answers_once_to_each_image_that_is_not_held(in_parts: None):
    counted = Counted()
    selection = Selection(Watched(), CLASSIFICATION, counted, QUIET)
    for _ in range(3):
        figures(selection)
    assert counted.images == 2 + COUNT  # two by which the size of an answer is known


def test_without_room_for_its_answers_the_uncut_model_is_asked_again(in_parts: None, monkeypatch: pytest.MonkeyPatch):
    expected = figures(Selection(Watched(), CLASSIFICATION, Counted(), QUIET))
    monkeypatch.setattr(row_file, "SHARE_OF_DISK", 0.0)
    counted = Counted()
    assert figures(Selection(Watched(), CLASSIFICATION, counted, QUIET)) == expected
    assert counted.images > 2 * COUNT


def test_the_first_images_can_be_gone_through_again_and_be_copied(in_parts: None):
    few = First(Selection(Watched(), CLASSIFICATION, Counted(), QUIET), SMALL_BATCH + 3)
    other = partial(forward, network(1))
    assert judged(CLASSIFICATION, few, other) == judged(CLASSIFICATION, few, other)
    assert judged(CLASSIFICATION, few.copied(), other) == judged(CLASSIFICATION, few, other)


def test_a_copy_of_the_first_images_brings_no_others_along():
    (own,) = First(Selection(Watched(), CLASSIFICATION, Counted(), QUIET), 5).copied()
    assert own.pictures.untyped_storage().nbytes() == own.pictures.nbytes == 5 * 4 * 3 * 6 * 6


def test_without_labels_there_is_a_loss_and_no_metric():
    selection = Selection(Watched(labelled=False), CLASSIFICATION, Counted(), QUIET)
    assert selection.parts is None
    assert judged(CLASSIFICATION, selection.shown(), partial(forward, network(1)))[1] is None
