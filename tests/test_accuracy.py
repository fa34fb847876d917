"""In: outputs made by hand. Out: proof that accuracy, intervals and divergences are the numbers worked out on paper."""

import math

import numpy as np
import pytest

from hirelc_deploy.errors import ExportError, InputError
from hirelc_deploy.measure import accuracy
from hirelc_deploy.measure.backend import OperatorTime


class FixedRunner:
    """Answers each image with its first two pixels."""

    def infer(self, images):
        return images[:, 0, 0, :2]

    def profile(self, image, runs):
        kinds = [
            ("QuantizeLinear", False),
            ("QLinearConv", True),
            ("Transpose", False),
            ("QGemm", True),
            ("Add", False),
        ]
        return [OperatorTime(str(i), operator, integer, 1.0) for i, (operator, integer) in enumerate(kinds)]


def test_predictions_of_batches_come_in_order():
    images = np.arange(5 * 3 * 2 * 2, dtype=np.float32).reshape(5, 3, 2, 2)
    logits = accuracy.predict(FixedRunner(), [images[:3], images[3:3], images[3:]])
    np.testing.assert_array_equal(logits, images[:, 0, 0, :2])


def test_no_images_and_nan_answers_are_told_in_a_sentence():
    with pytest.raises(InputError, match="no images"):
        accuracy.predict(FixedRunner(), [])
    images = np.zeros((3, 3, 2, 2), dtype=np.float32)
    images[2, 0, 0, 1] = np.nan
    with pytest.raises(ExportError, match="image 2"):
        accuracy.predict(FixedRunner(), [images])


def test_top1_counts_the_largest_logit():
    logits = np.array([[0, 1], [3, 2], [5, 6], [1, 0]], dtype=np.float32)
    assert accuracy.top1(logits, np.array([1, 0, 0, 0])) == 0.75
    with pytest.raises(InputError, match="4 answers for 3 labels"):
        accuracy.top1(logits, np.array([1, 0, 0]))


def test_paired_drop_is_the_interval_worked_out_by_hand():
    # 1000 images: 10 lost, 4 gained. Middle 6/1002, half width 1.96 * sqrt(15 - 36/1002) / 1002 = 0.7567 %.
    before, after = np.ones(1000, dtype=bool), np.ones(1000, dtype=bool)
    after[:10] = False
    before[10:14] = False
    drop = accuracy.paired_drop(before, after)
    assert drop.points == pytest.approx(0.6)
    assert drop.low == pytest.approx(0.5988 - 0.7567, abs=1e-4)
    assert drop.high == pytest.approx(0.5988 + 0.7567, abs=1e-4)


def test_equal_answers_still_leave_an_interval_around_zero():
    right = np.ones(2000, dtype=bool)
    drop = accuracy.paired_drop(right, right)
    assert drop.points == 0
    assert -0.11 < drop.low < 0 < drop.high < 0.11


def test_the_paired_interval_holds_the_truth_in_95_of_100_draws():
    rng = np.random.default_rng(0)
    lost, gained, n, held = 0.02, 0.012, 2000, 0
    for _ in range(2000):
        cell = rng.choice(4, size=n, p=[lost, gained, 0.9, 1 - lost - gained - 0.9])
        drop = accuracy.paired_drop((cell == 0) | (cell == 2), (cell == 1) | (cell == 2))
        held += drop.low <= 100 * (lost - gained) <= drop.high
    assert 0.935 < held / 2000 < 0.965


def test_answers_of_different_images_are_not_paired():
    with pytest.raises(InputError, match="same images"):
        accuracy.paired_drop(np.ones(3, dtype=bool), np.ones(4, dtype=bool))


def test_divergence_of_two_coins_is_the_number_on_paper():
    # p = (1/2, 1/2), q = (1/4, 3/4): KL = 1/2 ln 2 + 1/2 ln 2/3.
    p = np.log(np.array([[0.5, 0.5]], dtype=np.float32))
    q = np.log(np.array([[0.25, 0.75]], dtype=np.float32)) + 7
    assert accuracy.kl_divergence(p, q) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-6)
    assert accuracy.kl_divergence(p, p + 100) == pytest.approx(0, abs=1e-6)


def test_divergence_survives_logits_that_overflow_an_exponential():
    assert accuracy.kl_divergence(np.array([[1e4, 0.0]]), np.array([[1e4, 0.0]])) == 0


def test_agreement_is_the_share_of_equal_classes():
    assert accuracy.agreement(np.eye(4), np.eye(4)[[0, 1, 3, 3]]) == 0.75


def test_operators_that_only_move_numbers_are_not_counted():
    assert accuracy.operators(FixedRunner(), np.zeros((1, 3, 2, 2))) == (2, 1)
