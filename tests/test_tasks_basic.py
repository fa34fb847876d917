"""In: five tasks. Out: proof that they keep the contract, and that their numbers are those worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hirelc_deploy.errors import InputError
from hirelc_deploy.tasks import registry
from hirelc_deploy.tasks.classification import Classification
from hirelc_deploy.tasks.contract import Scored
from hirelc_deploy.tasks.decoders import classification, embedding, keypoints, multilabel, regression
from hirelc_deploy.tasks.detection import Detection
from hirelc_deploy.tasks.embedding import Embedding
from hirelc_deploy.tasks.keypoints import Keypoints
from hirelc_deploy.tasks.multilabel import MultiLabel, average_precision
from hirelc_deploy.tasks.regression import Regression
from hirelc_deploy.tasks.segmentation import Segmentation
from hirelc_deploy.testing.task_contract import TaskContract

SIZE = [3, 32, 48]


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def numbers(seed, high, *shape):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


class TestClassification(TaskContract):
    def make(self):
        return Classification(("cat", "dog", "eel"), {})

    def answers(self, count, seed):
        return {"output": drawn(seed, count, 3)}

    def targets(self, count, seed):
        return numbers(seed, 3, count).tolist()

    def perfect(self, targets):
        return {"output": 9.0 * F.one_hot(torch.tensor(targets), 3)}


SURE = {"head": "detr", "input_size": SIZE}
NAMES = ("a", "b", "c")


@pytest.mark.parametrize(
    ("task", "answers", "wanted"),
    [
        (Classification((), {}), drawn(0, 4, 5).softmax(1), True),
        (Classification((), {}), drawn(0, 4, 5), False),
        (MultiLabel((), {}), 5 * drawn(0, 4, 5).sigmoid(), False),
        (MultiLabel((), {}), (5 * drawn(0, 4, 5)).sigmoid(), True),
        (MultiLabel((), {}), 0.5 + 0.01 * drawn(0, 4, 5), False),  # untrained
        (Segmentation(NAMES, {}), drawn(0, 4, 3, 2, 2).softmax(1), True),
        (Segmentation(NAMES, {}), drawn(0, 4, 3, 2, 2).sigmoid(), False),
        (Segmentation(NAMES[:1], {}), (5 * drawn(0, 4, 1, 2, 2)).sigmoid(), True),
        (Segmentation(NAMES[:1], {}), drawn(0, 4, 1, 2, 2), False),
        (Detection(NAMES, SURE), drawn(0, 4, 6, 4).softmax(2), True),
        (Detection(NAMES, SURE), drawn(0, 4, 6, 4), False),
        (Detection(NAMES, {**SURE, "scores": "sigmoid"}), (5 * drawn(0, 4, 6, 3)).sigmoid(), True),
        (Detection(NAMES, {"head": "decoded"}), drawn(0, 4, 6).sigmoid(), False),
    ],
)
def test_probabilities_are_told_from_logits_by_the_answers_to_several_images(task, answers, wanted):
    one_by_one = ({"scores": one, "boxes": drawn(1, 1, 6, 4).sigmoid()} for one in answers.split(1))
    if not isinstance(task, Detection):
        one_by_one = ({"output": one} for one in answers.split(1))
    assert isinstance(task, Scored)
    assert task.ends_in_probabilities(one_by_one) == wanted


class TestClassificationOfProbabilities(TestClassification):
    def make(self):
        return Classification(("cat", "dog", "eel"), {"scores": "probabilities"})

    def answers(self, count, seed):
        return {"output": drawn(seed, count, 3).softmax(1)}

    def perfect(self, targets):
        return {"output": (9.0 * F.one_hot(torch.tensor(targets), 3)).softmax(1)}


class TestMultiLabel(TaskContract):
    def make(self):
        return MultiLabel(("a", "b", "c", "d"), {})

    def answers(self, count, seed):
        return {"logits": drawn(seed, count, 4)}

    def targets(self, count, seed):
        return list(numbers(seed, 2, count, 4).float())

    def perfect(self, targets):
        return {"logits": 18 * torch.stack(targets) - 9}


class TestMultiLabelF1(TestMultiLabel):
    def make(self):
        return MultiLabel((), {"metric": "f1", "threshold": 0.3, "outputs": ["logits"]})


class TestRegressionOfNumbers(TaskContract):
    def make(self):
        return Regression(("width", "height"), {"unit": "m"})

    def answers(self, count, seed):
        return {"output": 5 + drawn(seed, count, 2)}

    def targets(self, count, seed):
        return (5 + drawn(seed + 10, count, 2)).tolist()

    def perfect(self, targets):
        return {"output": torch.tensor(targets)}


class TestRegressionOfMaps(TaskContract):
    def make(self):
        return Regression((), {"metric": "mae", "spread": 2.0})

    def answers(self, count, seed):
        return {"depth": drawn(seed, count, 8, 12)}

    def targets(self, count, seed):
        maps = drawn(seed + 10, count, 1, 8, 12)
        maps[:, 0, 0, 0] = math.nan
        return list(maps)

    def perfect(self, targets):
        return {"depth": torch.stack(targets)[:, 0].nan_to_num(7.0)}


def some_points(count, seed):
    where = torch.rand(count, 3, 2, generator=torch.Generator().manual_seed(seed + 10)) * torch.tensor([40, 26]) + 3
    return torch.cat([where, (torch.arange(3 * count) % 4 != 0).reshape(count, 3, 1)], 2)


class TestKeypointsOfCoordinates(TaskContract):
    def make(self):
        return Keypoints(("nose", "left", "right"), {"input_size": SIZE, "flip_pairs": [[1, 2]]})

    def answers(self, count, seed):
        return {"output": 16 + 8 * drawn(seed, count, 3, 2)}

    def targets(self, count, seed):
        return list(some_points(count, seed))

    def perfect(self, targets):
        return {"output": torch.stack(targets)[..., :2]}


class TestKeypointsOfHeatmaps(TaskContract):
    def make(self):
        return Keypoints((), {"input_size": SIZE, "metric": "oks", "sigmas": [0.05, 0.05, 0.1]})

    def answers(self, count, seed):
        return {"maps": drawn(seed, count, 3, 16, 24)}

    def targets(self, count, seed):
        return [{"points": points, "scale": 20.0} for points in some_points(count, seed)]

    def perfect(self, targets):
        task = self.make()
        return {"maps": task._heatmaps(task.collate(targets), 16, 24)}


class TestEmbedding(TaskContract):
    def make(self):
        return Embedding(("a", "b"), {})

    def answers(self, count, seed):
        return {"output": drawn(seed, count, 5)}

    def targets(self, count, seed):
        return [k % 2 for k in range(count)]

    def perfect(self, targets):
        return {"output": F.one_hot(torch.tensor(targets), 5) + 0.01 * drawn(9, len(targets), 5)}


# Classification


def test_probabilities_are_as_far_apart_as_the_logits_that_they_come_from():
    logits = [{"output": drawn(1, 20, 5)}, {"output": 2 * drawn(2, 20, 5)}]
    chances = [{"output": each["output"].softmax(1)} for each in logits]
    plain, other = Classification((), {}), Classification((), {"scores": "probabilities"})
    torch.testing.assert_close(other.divergence(*chances, 3.0), plain.divergence(*logits, 3.0))
    labels = torch.tensor([2] * 20)
    torch.testing.assert_close(other.loss(chances[0], labels), plain.loss(logits[0], labels))
    assert other.divergence({"output": torch.tensor([[1.0, 0]])}, {"output": torch.tensor([[0.0, 1]])}).isfinite()
    said = classification.decode({"output": np.array([[0.25, 0.75]])}, {"classes": (), **other.decoder_options}, {})
    assert said == [{"index": 1, "class": 1, "score": 0.75}]


def test_labels_scores_may_be_probabilities():
    logits, targets = drawn(3, 20, 6), (drawn(4, 20, 6) > 0).float()
    plain, other = (
        MultiLabel((), {"metric": "f1", "threshold": 0.3, **told}) for told in ({}, {"scores": "probabilities"})
    )
    both = {"output": logits}, {"output": logits.sigmoid()}
    again = {"output": logits + 0.3}, {"output": (logits + 0.3).sigmoid()}
    torch.testing.assert_close(other.divergence(both[1], again[1], 2.0), plain.divergence(both[0], again[0], 2.0))
    torch.testing.assert_close(other.loss(both[1], targets), plain.loss(both[0], targets))
    surprises = (
        task.surprise(one, torch.Generator().manual_seed(0)) for task, one in zip((plain, other), both, strict=True)
    )
    torch.testing.assert_close(*surprises)
    values = [
        task.value(task.parts({"output": one["output"].numpy()}, targets))
        for task, one in zip((plain, other), both, strict=True)
    ]
    assert values[0] == values[1]
    said = [
        multilabel.decode({"output": one["output"].numpy()}, {"classes": (), **task.decoder_options}, {})
        for task, one in zip((plain, other), both, strict=True)
    ]
    assert [row["labels"] for row in said[0]] == [row["labels"] for row in said[1]]
    assert said[0][0]["scores"] == pytest.approx(said[1][0]["scores"], abs=1e-5)


def test_the_divergence_of_classes_is_todays_numpy_code_and_todays_distillation():
    task, p, q = Classification((), {}), drawn(1, 50, 7), 2 * drawn(2, 50, 7)
    found = task.divergence({"o": p}, {"o": q})
    log_p, log_q = (x.double() - x.double().logsumexp(1, keepdim=True) for x in (p, q))
    assert found.mean().item() == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(1).mean()), rel=1e-5)
    soft = F.kl_div(F.log_softmax(q / 4, 1), F.log_softmax(p / 4, 1), reduction="batchmean", log_target=True)
    assert task.divergence({"o": p}, {"o": q}, 4.0).mean().item() == pytest.approx(16 * soft.item(), rel=1e-6)


def test_the_divergence_of_a_coin_is_the_number_worked_out_by_hand():
    # p = (3/4, 1/4), q = (1/2, 1/2): 3/4 ln 3/2 + 1/4 ln 1/2 = 0.130812.
    pair = {"o": torch.tensor([[math.log(3), 0.0]])}, {"o": torch.zeros(1, 2)}
    assert Classification((), {}).divergence(*pair).item() == pytest.approx(0.130812, abs=1e-6)


def test_a_classifier_is_surprised_by_other_than_its_first_choice():
    task, logits = Classification((), {}), torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    surprise = task.surprise({"o": logits}, torch.Generator())
    assert surprise.tolist() == pytest.approx([math.log(4 / 3), math.log(2)])


def test_accuracy_counts_the_largest_logit():
    logits = np.array([[0, 1], [3, 2], [5, 6], [1, 0]], np.float32)
    task = Classification((), {})
    parts = task.parts({"o": logits}, task.collate([1, 0, 0, 0]))
    assert parts == [1.0, 1.0, 0.0, 1.0]
    assert task.value(parts) == 0.75
    with pytest.raises(InputError, match="4 answers for 3 targets"):
        task.parts({"o": logits}, task.collate([1, 0, 0]))


def test_a_classifier_of_another_shape_or_size_is_refused_in_the_words_of_today():
    task = Classification(("a", "b"), {})
    with pytest.raises(
        InputError, match=r"answers 2 images with shape \(2, 2, 3\); a classifier returns \(batch, class"
    ):
        task.check({"o": torch.zeros(2, 2, 3)}, None)
    with pytest.raises(
        InputError, match=r"has 3 outputs, but the data has 2 classes; use a model .* num_classes=2\)\."
    ):
        task.check({"o": torch.zeros(2, 3)}, None)
    with pytest.raises(
        InputError, match="labels run from 0 to 2, but the model has 2 outputs; give labels from 0 to 1"
    ):
        task.check({"o": torch.zeros(2, 2)}, torch.tensor([0, 2]))
    with pytest.raises(InputError, match="a tuple of 2 tensors; it must return one"):
        task.answers((torch.zeros(2, 2), torch.zeros(2, 2)))


def test_an_output_is_chosen_by_name():
    task = Classification((), {"outputs": ["head"]})
    logits = torch.zeros(2, 2)
    assert list(task.answers({"head": logits, "other": logits})) == ["head"]
    with pytest.raises(InputError, match="no output 'head'"):
        task.answers({"other": logits})


def test_the_line_of_a_class_is_its_name_or_its_number():
    outputs = {"output": np.array([[0, 2], [1, 0]], np.float32)}
    named = classification.decode(outputs, {"classes": ["cat", "dog"]}, {})
    assert [classification.line(result) for result in named] == ["dog", "cat"]
    assert named[0]["score"] == pytest.approx(1 / (1 + math.exp(-2)), abs=1e-6)
    assert [classification.line(result) for result in classification.decode(outputs, {"classes": []}, {})] == ["1", "0"]


# Multi-label


def test_average_precision_is_the_number_worked_out_by_hand():
    # Ranked: yes, no, yes, no. Precision 1/1 at the first, 2/3 at the second: (1 + 2/3) / 2.
    scores = np.array([4, 3, 2, 1], np.float32)
    assert average_precision(scores, np.array([1, 0, 1, 0], np.float32)) == pytest.approx(5 / 6)
    # The image that is not known goes: yes, yes, no.
    assert average_precision(scores, np.array([1, np.nan, 1, 0], np.float32)) == 1.0
    # Three images of one score come in together, with one hit.
    assert average_precision(np.array([1, 1, 1], np.float32), np.array([0, 0, 1], np.float32)) == pytest.approx(1 / 3)
    assert average_precision(scores, np.zeros(4, np.float32)) is None


def test_f1_counts_over_all_labels_at_the_threshold():
    task = MultiLabel((), {"metric": "f1"})
    logits = np.array([[1, 1, -1], [-1, 1, -1]], np.float32)
    parts = task.parts({"o": logits}, torch.tensor([[1.0, 0, 1], [0, 1, math.nan]]))
    assert task.value(parts) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))  # two hits, one wrong, one missed


def test_the_divergence_of_labels_is_a_sum_of_coins():
    pair = {"o": torch.tensor([[math.log(3), math.log(3)]])}, {"o": torch.zeros(1, 2)}
    assert MultiLabel((), {}).divergence(*pair).item() == pytest.approx(2 * 0.130812, abs=1e-5)


def test_labels_may_be_numbers_of_those_that_are_true():
    task = MultiLabel(("a", "b", "c"), {})
    assert task.collate([[0, 2], [], [1]]).tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    with pytest.raises(InputError, match="are not numbers of 3 labels"):
        task.collate([[3]])


def test_labels_that_are_not_known_bring_no_loss():
    loss = MultiLabel((), {}).loss({"o": torch.zeros(1, 3)}, torch.tensor([[1, math.nan, 0]]))
    assert loss.item() == pytest.approx(2 * math.log(2))


def test_the_line_of_labels_has_the_surest_first():
    outputs = {"o": np.array([[0.5, 2, -1], [-1, -1, -1]], np.float32)}
    lines = [multilabel.line(r) for r in multilabel.decode(outputs, {"classes": ["a", "b", "c"], "threshold": 0.5}, {})]
    assert lines == ["b 0.88, a 0.62", "no label"]


# Regression


def test_rmse_and_mae_are_over_all_known_values():
    # Errors 1, -2 and 3; one value is not known. RMSE sqrt(14 / 3), MAE 2.
    answers, targets = {"o": np.array([[1, 2], [3, 4]], np.float32)}, torch.tensor([[0, 4], [math.nan, 1]])
    for metric, wanted in (("rmse", math.sqrt(14 / 3)), ("mae", 2.0)):
        task = Regression(("x", "y"), {"metric": metric})
        parts = task.parts(answers, targets)
        assert task.value(parts) == pytest.approx(wanted)
        assert task.by_class(parts)["x"] == pytest.approx(1.0)
        assert not task.metric.higher_is_better
        assert task.metric.drop(2.0, 3.0) == 1.0


def test_a_divergence_of_one_is_an_answer_that_says_only_the_mean():
    wanted = torch.tensor([[1.0, 10], [3, 10], [5, 40]])
    found = wanted.mean(0, keepdim=True).expand(3, 2)
    assert Regression((), {}).divergence({"o": wanted}, {"o": found}).mean().item() == pytest.approx(1.0)
    half = Regression((), {"spread": [2.0, 4.0]}).divergence({"o": wanted}, {"o": wanted + 2})
    assert half.tolist() == pytest.approx([(1 + 1 / 4) / 2] * 3)


def test_one_image_and_constant_answers_still_diverge_finitely():
    task = Regression((), {})
    one = task.divergence({"o": torch.tensor([[2.0]])}, {"o": torch.tensor([[3.0]])})
    assert one.item() == pytest.approx(0.25)  # relative to the size: 1 / 2^2
    assert task.divergence({"o": torch.zeros(2, 1)}, {"o": torch.ones(2, 1)}).tolist() == [1.0, 1.0]


def test_values_that_are_not_known_bring_neither_loss_nor_gradient():
    found = torch.tensor([[1.0], [2.0], [5.0]], requires_grad=True)
    loss = Regression((), {"spread": 2}).loss({"o": found}, torch.tensor([[0.0], [math.nan], [1.0]]))
    loss.sum().backward()
    assert loss.tolist() == [0.25, 0.0, 4.0]
    assert found.grad.tolist() == [[0.5], [0.0], [2.0]]


def test_targets_of_another_shape_are_refused():
    task = Regression((), {})
    task.check({"o": torch.zeros(2, 1)}, task.collate([1.0, 2.0]))
    task.check({"o": torch.zeros(2, 4, 6)}, torch.zeros(2, 1, 4, 6))
    with pytest.raises(InputError, match=r"targets have shape \(2, 3\), but the model answers \(2, 2\)"):
        task.check({"o": torch.zeros(2, 2)}, torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("task", "answers"),
    [
        (MultiLabel((), {}), torch.tensor([[0.3, -1.0]])),
        (Regression((), {"spread": [2.0, 0.5]}), torch.tensor([[0.3, -1.0]])),
        (Keypoints((), {"input_size": SIZE}), torch.tensor([[[3.0, 9.0]]])),
        (Embedding((), {}), torch.tensor([[0.6, 0.8]])),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_squared_gradient_of_surprise_is_the_curvature_of_the_divergence(task, answers):
    # With 20,000 draws a mean of squares is within 4 * sqrt(2 / 20,000) = 4 %.
    curvature = torch.autograd.functional.hessian(
        lambda found: task.divergence({"o": answers}, {"o": found}).sum(), answers.clone()
    )
    many = answers.expand(20_000, *answers.shape[1:]).clone().requires_grad_()
    task.surprise({"o": many}, torch.Generator().manual_seed(0)).sum().backward()
    wanted = curvature.reshape(answers.numel(), -1).diagonal()
    assert torch.allclose(many.grad.square().mean(0).flatten(), wanted, rtol=0.05)


def test_the_line_of_a_number_has_its_unit_and_that_of_a_map_its_mean():
    options = {"classes": ["depth"], "unit": "m"}
    (number,) = regression.decode({"o": np.array([[1.25]], np.float32)}, options, {})
    assert regression.line(number) == "depth 1.25 m"
    (result,) = regression.decode({"o": np.array([[[[1, 2], [3, 6]]]], np.float32)}, options, {})
    assert regression.line(result) == "depth mean 3 m"
    assert result["mask"].shape == (2, 2)


# Keypoints


def test_pck_counts_visible_points_that_are_near_enough():
    # Longer side 48, so 5 % are 2.4 pixels. Off by 2, 3 and, not visible, 9; of another image by 3 at a scale of 100.
    task = Keypoints(("a", "b", "c"), {"input_size": SIZE})
    truth = np.tile(np.float32([5, 5, 1]), (3, 1))
    hidden = truth.copy()
    hidden[2, 2] = 0
    targets = task.collate([hidden, {"points": truth, "scale": 100}])
    off = torch.tensor([[2.0, 3, 9], [3, 3, 6]])
    found = torch.stack([5 + off, torch.full_like(off, 5)], 2)
    parts = task.parts({"o": found.numpy()}, targets)
    assert task.value(parts) == pytest.approx(3 / 5)
    assert task.by_class(parts) == {"a": 1.0, "b": 0.5, "c": 0.0}
    assert task.loss({"o": found}, targets).tolist() == pytest.approx([(4 + 9) / 2 / 2.4**2, (9 + 9 + 36) / 3 / 25])
    assert task.divergence({"o": found}, {"o": found + torch.tensor([2.4, 0.0])}).tolist() == pytest.approx([1.0, 1.0])


def test_oks_is_cocos_formula():
    # d = 3, s = 10, k = 2 * 0.05: exp(-9 / (2 * 100 * 0.01)) = exp(-4.5); the other point is exact.
    task = Keypoints((), {"input_size": SIZE, "metric": "oks", "sigmas": [0.05, 0.05]})
    targets = task.collate([{"points": [[5, 5, 2], [9, 9, 1]], "scale": 10}, {"points": [[5, 5, 0], [9, 9, 0]]}])
    parts = task.parts({"o": np.array([[[8, 5], [9, 9]], [[0, 0], [0, 0]]], np.float32)}, targets)
    assert task.value(parts) == pytest.approx((math.exp(-4.5) + 1) / 2)  # the image without a visible point is out


def test_a_heatmap_is_read_a_quarter_cell_towards_its_second_highest():
    maps = np.zeros((1, 1, 4, 6), np.float32)
    maps[0, 0, 1, 2], maps[0, 0, 1, 3], maps[0, 0, 0, 2] = 1.0, 0.5, 0.1
    # Cells of 8 x 8: x (2 + 0.5 + 0.25) * 8 - 0.5 = 21.5, y (1 + 0.5 - 0.25) * 8 - 0.5 = 9.5.
    assert keypoints.located(maps, 32, 48).tolist() == [[[21.5, 9.5, 1.0]]]
    corner = np.zeros((1, 1, 4, 6), np.float32)
    corner[0, 0, 0, 5] = 1.0
    assert keypoints.located(corner, 32, 48).tolist() == [[[43.5, 3.5, 1.0]]]  # stays in the middle of its cell


def test_a_heatmap_of_its_own_gaussian_has_no_loss_and_one_of_zeros_about_one():
    task = Keypoints((), {"input_size": [3, 128, 128]})
    targets = task.collate([[[60, 60, 1], [0, 0, 0]]])
    truth = task._heatmaps(targets, 32, 32)
    assert task.loss({"o": truth}, targets).item() == 0
    assert task.loss({"o": torch.zeros(1, 2, 32, 32)}, targets).item() == pytest.approx(1.0, abs=0.01)


def test_points_of_a_mirrored_picture_change_sides_and_places():
    task = Keypoints((), {"input_size": SIZE, "flip_pairs": [[0, 1]]})
    targets = task.collate([[[3, 5, 1], [0, 0, 0], [40, 7, 1]]])
    assert task.flips
    assert task.mirrored(targets)[0, :, :3].tolist() == [[0, 0, 0], [44, 5, 1], [7, 7, 1]]
    assert torch.equal(task.mirrored(task.mirrored(targets)), targets)
    assert not Keypoints((), {"input_size": SIZE}).flips


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "input_size is None; give"),
        ({"input_size": SIZE, "metric": "oks"}, "oks needs sigmas"),
        ({"input_size": SIZE, "metric": "oks", "sigmas": "coco"}, "17 sigmas for 2 points"),
        ({"input_size": SIZE, "pck": 0}, "pck is 0; give a number above 0"),
        ({"input_size": SIZE, "metric": "ap"}, "metric is 'ap'; use pck or oks"),
        ({"input_size": SIZE, "flip_pairs": [[0, 2]]}, "flip_pairs names a point twice, or one that is not there"),
        ({"input_size": SIZE, "sigma": [1]}, "there is no option 'sigma'; did you mean sigmas"),
    ],
)
def test_options_of_keypoints_that_cannot_be_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        Keypoints(("a", "b"), options)


# Embedding


def test_recall_asks_for_the_nearest_other_image():
    task = Embedding(("a", "b"), {})
    # Angles 0, 10, 25 and 90 degrees with labels a, b, b, a: nearest are 1, 0, 1, 2, of which 2 alone is right.
    angles = np.deg2rad([0, 10, 25, 90]).astype(np.float32)
    vectors = 3 * np.stack([np.cos(angles), np.sin(angles)], 1)
    parts = task.parts({"o": vectors}, task.collate([0, 1, 1, 0]))
    assert task.value(parts) == 0.25
    assert task.by_class(parts) == {"a": 0.0, "b": 0.5}


def test_a_copy_of_an_image_is_not_its_neighbour_but_counts_again():
    task = Embedding((), {})
    angles = np.deg2rad([0, 10, 25, 90]).astype(np.float32)
    parts = task.parts({"o": np.stack([np.cos(angles), np.sin(angles)], 1)}, task.collate([0, 1, 1, 0]))
    assert task.value([*parts, parts[0]]) == pytest.approx(1 / 5)
    assert task.value([*parts, parts[2]]) == pytest.approx(2 / 5)
    with pytest.raises(InputError, match="1 image has no other"):
        task.value([parts[0], parts[0]])


def test_a_collapsed_embedding_is_as_good_as_chance():
    task = Embedding((), {})
    parts = task.parts({"o": np.ones((5, 3), np.float32)}, task.collate([0, 0, 0, 1, 1]))
    # Of four others equally near: 2/4 are right for the three, 1/4 for the two.
    assert task.value(parts) == pytest.approx((3 * 2 / 4 + 2 * 1 / 4) / 5)


def test_the_divergence_of_vectors_is_one_minus_their_cosine():
    pair = {"o": torch.tensor([[2.0, 0], [1, 1], [1, 0]])}, {"o": torch.tensor([[0.0, 5], [3, 3], [-1, 0]])}
    assert Embedding((), {}).divergence(*pair).tolist() == pytest.approx([1.0, 0.0, 2.0])


def test_the_contrastive_loss_is_the_number_worked_out_by_hand():
    # Cosines 1 (alike), 0 (not): -ln(e^10 / (e^10 + 1)); the third has nobody of its class.
    found = {"o": torch.tensor([[1.0, 0], [1, 0], [0, 1]])}
    loss = Embedding((), {}).loss(found, torch.tensor([0, 0, 1]))
    assert loss.tolist() == pytest.approx([math.log1p(math.exp(-10))] * 2 + [0.0], abs=1e-6)
    alone = torch.ones(1, 2, requires_grad=True)
    Embedding((), {}).loss({"o": alone}, torch.tensor([0])).sum().backward()
    assert alone.grad.tolist() == [[0.0, 0.0]]


def test_the_vector_in_a_bundle_has_length_one():
    (result,) = embedding.decode({"o": np.array([[3, 4]], np.float32)}, {}, {})
    assert result["vector"] == pytest.approx([0.6, 0.8])
    assert embedding.line(result) == "2 numbers: 0.600 0.800"


# By name


@pytest.mark.parametrize("name", ["classification", "multilabel", "regression", "keypoints", "embedding"])
def test_a_task_is_made_by_name_whatever_the_installation_says(monkeypatch, name):
    monkeypatch.setattr(registry, "entry_points", lambda group: ())
    options = {"input_size": SIZE} if name == "keypoints" else {}
    task = registry.make_task(name, ("a", "b"), options)
    assert task.name == name
    assert task.classes == ("a", "b")
    assert name in registry.TASKS


def test_tasks_and_options_that_do_not_exist_are_refused_with_those_that_do():
    with pytest.raises(
        InputError, match=r"'clasification' is not installed; did you mean classification\? Known tasks"
    ):
        registry.make_task("clasification")
    with pytest.raises(InputError, match="task regression: there is no option 'units'; did you mean unit"):
        registry.make_task("regression", (), {"units": "m"})
    with pytest.raises(InputError, match="there is no option 'top'; it knows outputs"):
        registry.make_task("classification", (), {"top": 5})


def test_a_task_of_somebody_else_is_found_and_a_broken_one_named(monkeypatch):
    entries = [
        registry.EntryPoint("theirs", f"{__name__}:Classification", registry.GROUP),
        registry.EntryPoint("broken", "nowhere_at_all:Task", registry.GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)
    assert registry.make_task("theirs", ("a",)).classes == ("a",)
    assert registry.task_names()[-2:] == ("broken", "theirs")
    with pytest.raises(InputError, match=r"task 'broken' \(nowhere_at_all:Task\) does not load: ModuleNotFoundError"):
        registry.make_task("broken")
