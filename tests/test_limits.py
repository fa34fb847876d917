"""Limits of a search, against what the selection images can tell at all."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from hirelc_deploy.deliver.limits import drop_error, too_few_images
from hirelc_deploy.tasks.classification import CLASSIFICATION
from hirelc_deploy.tasks.paired import paired_drop


def pipeline(images: int, task: Any = CLASSIFICATION) -> Any:
    return SimpleNamespace(uncut=SimpleNamespace(selection=SimpleNamespace(parts=[1.0] * images)), task=task)


@pytest.mark.parametrize(
    ("images", "limit", "few"), [(36, 1.0, True), (97, 1.0, True), (98, 1.0, False), (36, 3.0, False)]
)
def test_images_are_too_few_where_not_even_equal_answers_keep_the_limit(images: int, limit: float, few: bool) -> None:
    assert bool(too_few_images(pipeline(images), limit)) is few


def test_the_number_that_is_asked_for_lets_a_file_change_two_answers() -> None:
    sentence = too_few_images(pipeline(36), 1.0)
    assert "36 selection images are too few for --max-drop 1:" in sentence
    assert "the drop is known to 2.63" in sentence
    (enough,) = (int(found) for found in re.findall(r"--selection-images (\d+)", sentence))
    before, after = [1.0] * enough, [1.0] * enough
    before[0] = after[1] = 0.0
    drop = paired_drop(CLASSIFICATION, before, after)
    assert drop.points + drop_error(drop) <= 1.0


def test_nothing_is_said_without_a_limit_or_labels_and_of_metrics_whose_error_is_not_counted_so() -> None:
    assert too_few_images(pipeline(36), None) == ""
    assert too_few_images(pipeline(0), 1.0) == ""
    assert too_few_images(pipeline(36, SimpleNamespace(mean_of_images=False)), 1.0) == ""
