"""In: parts made by hand. Out: proof that drops and their intervals are the numbers worked out on paper."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hirelc_deploy.errors import InputError
from hirelc_deploy.tasks.classification import Classification
from hirelc_deploy.tasks.custom import WithLoss, WithMetric
from hirelc_deploy.tasks.embedding import Embedding
from hirelc_deploy.tasks.multilabel import MultiLabel
from hirelc_deploy.tasks.paired import paired_drop, resamples_of, student_95
from hirelc_deploy.tasks.regression import Regression

ACCURACY = Classification((), {})


def lower(outputs, targets):
    return outputs[:, 0]


lower.lower_is_better = True


def test_right_and_wrong_have_the_interval_of_agresti_and_min():
    # 1000 images: 10 lost, 4 gained. Middle 6/1002, half width 1.96 * sqrt(15 - 36/1002) / 1002 = 0.7567 %.
    before, after = [1.0] * 1000, [1.0] * 1000
    after[:10] = [0.0] * 10
    before[10:14] = [0.0] * 4
    drop = paired_drop(ACCURACY, before, after)
    assert drop.points == pytest.approx(0.6)
    assert drop.low == pytest.approx(0.5988 - 0.7567, abs=1e-4)
    assert drop.high == pytest.approx(0.5988 + 0.7567, abs=1e-4)


def test_equal_answers_still_leave_a_doubt_where_they_are_right_or_wrong():
    # (0 +- 1.96 * sqrt(1)) / 102.
    drop = paired_drop(ACCURACY, [1.0] * 100, [1.0] * 100)
    assert drop.points == 0
    assert drop.high == -drop.low == pytest.approx(100 * 1.959964 / 102)


def test_more_errors_are_a_drop_where_lower_is_better():
    task = WithMetric(ACCURACY, lower, scale=100)
    drop = paired_drop(task, [0.0] * 10, [0.0] * 8 + [1.0] * 2)
    assert drop.points == pytest.approx(20)
    assert drop.low < 20 < drop.high


def test_means_have_the_interval_of_students_t():
    # Differences 0.1, 0.2, 0.3: mean 0.2, standard error 0.1 / sqrt(3), t with two degrees 4.3027.
    task = WithMetric(ACCURACY, lower)
    drop = paired_drop(task, [0.5, 0.5, 0.5], [0.6, 0.7, 0.8])
    assert drop.points == pytest.approx(0.2)
    assert drop.high - drop.points == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)
    assert drop.points - drop.low == pytest.approx(drop.high - drop.points)
    assert paired_drop(task, [0.5], [0.7]).high == math.inf


def test_students_quantile_is_that_of_the_tables():
    for freedom, wanted in ((1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (10, 2.228), (30, 2.042), (10**6, 1.960)):
        assert student_95(freedom) == pytest.approx(wanted, rel=1.5e-3)


def test_another_metric_is_resampled_over_images_in_pairs():
    task = Regression((), {"unit": "m"})
    truth = torch.linspace(-1, 1, 200)[:, None]
    noise = torch.randn(200, 1, generator=torch.Generator().manual_seed(0))
    before = task.parts({"o": (truth + 0.1 * noise).numpy()}, truth)
    after = task.parts({"o": (truth + 0.15 * noise).numpy()}, truth)
    drop = paired_drop(task, before, after)
    # The errors are in proportion on every image, so the drop is 0.05 times the root mean square of the noise, whose
    # standard error is that over sqrt(2 * 200): 1.96 / 20 = 9.8 % to either side.
    size = 0.05 * float(noise.square().mean().sqrt())
    assert drop.points == pytest.approx(size, rel=1e-5)
    assert drop.high - drop.points == pytest.approx(0.098 * size, rel=0.3)
    assert drop.points - drop.low == pytest.approx(0.098 * size, rel=0.3)
    assert drop == paired_drop(task, before, after)


def test_equal_answers_have_no_drop_and_no_doubt_under_a_bootstrap():
    task = Embedding((), {})
    vectors = np.random.default_rng(0).standard_normal((12, 4)).astype(np.float32)
    parts = task.parts({"o": vectors}, task.collate([k % 3 for k in range(12)]))
    drop = paired_drop(task, parts, parts)
    assert (drop.points, drop.low, drop.high) == (0, 0, 0)


@pytest.mark.parametrize(("images", "numbers"), [(2, 3), (40, 3), (200, 2), (200, 8)])
def test_an_embedding_answers_resamples_as_its_metric_does(images, numbers):
    task = Embedding((), {})
    generator = np.random.default_rng(images)
    vectors = np.round(generator.standard_normal((images, numbers)), 1 if numbers == 2 else 6) + 0.01  # with ties
    parts = task.parts({"o": vectors.astype(np.float32)}, task.collate([k % 3 for k in range(images)]))
    fast = resamples_of(WithLoss(task, lambda *_: 0.0), parts)
    for size in (images, 2 * images, 3):
        drawn = generator.integers(images, size=size)
        drawn[:2] = 0, 1
        assert fast(drawn) == pytest.approx(task.value([parts[i] for i in drawn]), abs=1e-9)
    with pytest.raises(InputError, match="no other to be near to"):
        fast(np.zeros(5, int))


def test_resamples_of_which_the_metric_says_nothing_are_left_out():
    task = MultiLabel((), {})
    truth = torch.zeros(5, 1)
    truth[0] = 1  # a third of the resamples lack it
    before = task.parts({"o": np.array([[5], [1], [2], [3], [4]], np.float32)}, truth)
    after = task.parts({"o": np.array([[3.5], [1], [2], [3], [4]], np.float32)}, truth)
    drop = paired_drop(task, before, after)
    assert drop.points == pytest.approx(50)
    assert 0 <= drop.low <= 50 <= drop.high <= 100


def test_parts_of_other_images_are_refused():
    with pytest.raises(InputError, match="3 answers before and 2 after"):
        paired_drop(ACCURACY, [1.0] * 3, [1.0] * 2)
    with pytest.raises(InputError, match="0 answers before"):
        paired_drop(ACCURACY, [], [])
