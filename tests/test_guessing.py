"""A model that only guesses is told so, and most of all one whose classes come in another order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_tasks import on_fake_device
from torch import Tensor, nn

import hirelc_deploy
from hirelc_deploy.tasks.classification import Classification
from hirelc_deploy.tasks.guessing import guesses
from hirelc_deploy.tasks.regression import Regression

COLOURS = ("red", "green", "blue")


class Dyed(torch.utils.data.Dataset):
    """Pictures of one colour, numbered in the order that is given."""

    def __init__(self, count: int, order: tuple[int, ...]) -> None:
        self.count, self.order, self.classes = count, order, list(COLOURS)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        picture = torch.randint(0, 60, (3, 16, 16), generator=torch.Generator().manual_seed(row), dtype=torch.uint8)
        picture[row % 3] += 150
        return picture, self.order[row % 3]


def sees_colours() -> nn.Module:
    """Answer with the mean of each colour."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.append(nn.Linear(8, 3, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(8)[:, :3, None, None])
        model[4].weight.copy_(20 * torch.eye(8)[:3])
    return model


@pytest.mark.parametrize(("order", "told"), [((0, 1, 2), False), ((1, 2, 0), True)])
def test_classes_in_another_order_are_told(
    order: tuple[int, ...], told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a line of progress, in the result and in the report."""
    on_fake_device(monkeypatch, tmp_path / "cache")
    lines: list[str] = []
    data = {"train": Dyed(400, order), "test": Dyed(60, order)}
    done: Any = hirelc_deploy.apply(
        sees_colours(),
        data,
        "uniform:keep=1,precision=float",
        task="classification",
        out=tmp_path / "run",
        progress=lines.append,
        recovery_epochs=0.0,
    )
    sentences = [line for line in done.record["warnings"] if "the uncut model guesses: accuracy 0 on" in line]
    assert bool(sentences) == told
    assert any("warning: the uncut model guesses" in line for line in lines) == told
    assert ("the uncut model guesses" in (tmp_path / "run/report.html").read_text()) == told
    if told:
        assert sentences[0].endswith("whether the model's classes come in this order: red, green, blue.")


@pytest.mark.parametrize(
    ("value", "guessed", "images", "expected"),
    [
        (0.10, 0.10, 1000, True),
        (0.14, 0.10, 1000, True),
        (0.15, 0.10, 1000, False),
        (0.02, 0.10, 1000, True),
        (0.10, 0.10, 15, False),
        (1.00, 1.00, 1000, False),  # one class: nothing to guess
    ],
)
def test_a_share_is_held_against_what_guessing_gives(value: float, guessed: float, images: int, expected: bool) -> None:
    assert guesses(Classification((), {}), value, guessed, images) == expected


@pytest.mark.parametrize(("value", "expected"), [(1.0, True), (0.96, True), (0.94, False), (1.5, True), (0.0, False)])
def test_an_error_is_held_against_what_guessing_gives(value: float, expected: bool) -> None:
    assert guesses(Regression((), {}), value, 1.0, 100) == expected
