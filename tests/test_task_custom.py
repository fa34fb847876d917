"""In: users' metrics and losses. Out: proof that they are called as promised, and that their faults are told."""

from __future__ import annotations

import inspect
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hirelc_deploy.errors import InputError
from hirelc_deploy.tasks.classification import Classification
from hirelc_deploy.tasks.custom import WithLoss, WithMetric, load_function
from hirelc_deploy.testing.task_contract import TaskContract

LOGITS = np.array([[2, 1], [0, 1], [1, 0], [0, 3]], np.float32)
LABELS = [0, 0, 0, 1]  # right, wrong, right, right
TASK = Classification(("a", "b"), {})


def hits(outputs, targets):
    return (outputs.argmax(1) == targets).float()


def share(outputs, targets):
    return hits(outputs, targets).mean()


def worst_error(outputs, targets):
    return float(F.cross_entropy(outputs, targets, reduction="none").max())


worst_error.lower_is_better = True


def parts_in(task, *cuts):
    found = []
    for cut in cuts:
        found += task.parts({"output": LOGITS[cut]}, task.collate(LABELS[cut]))
    return found


class TestAMetricOfEachImage(TaskContract):
    def make(self):
        return WithMetric(WithLoss(TASK, F.multi_margin_loss), hits)

    def answers(self, count, seed):
        return {"output": torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))}

    def targets(self, count, seed):
        return torch.randint(2, (count,), generator=torch.Generator().manual_seed(seed)).tolist()

    def perfect(self, targets):
        return {"output": 9.0 * F.one_hot(torch.tensor(targets), 2)}


class TestAMetricOfTheWholeSet(TestAMetricOfEachImage):
    def make(self):
        return WithLoss(WithMetric(TASK, worst_error), F.cross_entropy)


@pytest.mark.parametrize("cuts", [(slice(0, 4),), (slice(0, 1), slice(1, 4)), (slice(0, 3), slice(3, 4))])
def test_a_metric_of_each_image_is_a_mean_in_whatever_batches_they_come(cuts):
    task = WithMetric(TASK, hits)
    parts = parts_in(task, *cuts)
    assert parts == [1.0, 0.0, 1.0, 1.0]
    assert task.mean_of_images
    assert task.value(parts) == 0.75
    assert (task.metric.name, task.metric.scale, task.metric.unit) == ("hits", 100.0, "points")


@pytest.mark.parametrize("cuts", [(slice(0, 4),), (slice(0, 1), slice(1, 4)), (slice(0, 3), slice(3, 4))])
def test_a_metric_of_the_whole_set_is_called_with_all_images_at_once(cuts):
    task = WithMetric(TASK, worst_error, name="worst")
    parts = parts_in(task, *cuts)
    assert not task.mean_of_images
    assert task.value(parts) == pytest.approx(math.log(1 + math.e))  # the second image: ln(1 + e^1)
    assert (task.metric.name, task.metric.scale, task.metric.higher_is_better) == ("worst", 1.0, False)
    assert task.metric.drop(1.0, 1.5) == 0.5


def test_what_is_said_with_the_metric_comes_before_what_the_function_says():
    task = WithMetric(TASK, worst_error, higher_is_better=True, scale=7.0)
    assert task.metric.higher_is_better
    assert task.metric.scale == 7.0


def test_outputs_come_as_a_tensor_or_as_a_dict_of_several():
    seen = []

    def watch(outputs, targets):
        seen.append(outputs)
        return 0.5

    task = WithMetric(TASK, watch)
    task.parts({"output": LOGITS.astype(np.float64)}, task.collate(LABELS))
    assert seen[0].dtype == torch.float32
    task = WithMetric(TASK, watch)
    task.parts({"one": LOGITS, "two": LOGITS}, task.collate(LABELS))
    assert list(seen[1]) == ["one", "two"]


def test_targets_in_a_list_stay_a_list():
    task = WithMetric(TASK, lambda outputs, targets: len(targets) if isinstance(targets, list) else 0.0, scale=1)
    parts = task.parts({"output": LOGITS}, [{"boxes": 1}] * 4)
    assert task.value(parts * 2) == 8


class Counting:
    """As torchmetrics makes them."""

    higher_is_better = True

    def reset(self):
        self.right = self.count = 0

    def update(self, outputs, targets):
        self.right += int((outputs.argmax(1) == targets).sum())
        self.count += len(targets)

    def compute(self):
        return torch.tensor(self.right / self.count)


@pytest.mark.parametrize("given", [Counting, Counting()])
def test_an_object_with_update_and_compute_is_a_metric_of_the_whole_set(given):
    task = WithMetric(TASK, given)
    parts = parts_in(task, slice(0, 1), slice(1, 4))
    assert not task.mean_of_images
    assert task.value(parts) == pytest.approx(0.75)
    assert task.value(parts[:2]) == 0.5
    assert task.metric.name == "Counting"


def divides(outputs, targets):
    return 1 / 0


def line_of(function, inside=0):
    return f"{__file__}, line {inspect.getsourcelines(function)[1] + inside}"


def test_a_metric_that_raises_is_told_with_its_file_and_line():
    with pytest.raises(InputError) as told:
        parts_in(WithMetric(TASK, divides), slice(0, 4))
    assert str(told.value) == (
        f"{line_of(divides, 1)}: metric divides raises ZeroDivisionError: division by zero; "
        "it is given a tensor (4, 2) of float32 and a tensor (4,) of int64."
    )


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (None, "returns None; return one finite number, or one for each of the 4 images"),
        ("0.9", "returns a str;"),
        ({"f1": 0.9}, "returns a dict;"),
        ([1.0, math.nan, 1.0, 1.0], "returns NaN;"),
        ([1.0, math.inf, 1.0, 1.0], "returns infinity;"),
        ([1.0, 0.0], r"returns shape \(2,\);"),
        (np.ones((4, 2)), r"returns shape \(4, 2\);"),
        (93.0, r"returns 93, which is no share in \[0, 1\]; set faulty.scale = 1"),
    ],
)
def test_what_is_no_metric_is_refused_with_its_file_and_line(returned, words):
    def faulty(outputs, targets):
        return returned

    with pytest.raises(InputError, match=words) as told:
        parts_in(WithMetric(TASK, faulty), slice(0, 4))
    assert str(told.value).startswith(f"{line_of(faulty)}: metric faulty ")


def test_nan_of_the_whole_set_is_refused_but_a_batch_may_lack_what_it_is_about():
    task = WithMetric(TASK, lambda outputs, targets: math.nan)
    parts = parts_in(task, slice(0, 4))
    with pytest.raises(InputError, match="returns NaN; return one finite number"):
        task.value(parts)


def test_a_metric_that_changes_its_kind_is_refused():
    task = WithMetric(TASK, lambda outputs, targets: hits(outputs, targets) if len(targets) == 3 else 0.5)
    task.parts({"output": LOGITS[:3]}, task.collate(LABELS[:3]))
    with pytest.raises(InputError, match="returns one number for 2 images, but one an image before"):
        task.parts({"output": LOGITS[:2]}, task.collate(LABELS[:2]))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_loss_of_one_number_is_that_of_every_image(reduction):
    task = WithLoss(TASK, lambda outputs, targets: F.cross_entropy(outputs, targets, reduction=reduction))
    outputs, targets = torch.from_numpy(LOGITS).requires_grad_(), torch.tensor(LABELS)
    loss = task.loss({"output": outputs}, targets)
    assert loss.shape == (4,)
    assert loss.mean().item() == pytest.approx(F.cross_entropy(outputs, targets).item())
    (slope,) = torch.autograd.grad(loss.mean(), outputs)
    (wanted,) = torch.autograd.grad(F.cross_entropy(outputs, targets), outputs)
    assert torch.allclose(slope, wanted)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda outputs, targets: outputs.detach().sum(), "a number without a gradient; compute it with torch"),
        (lambda outputs, targets: 1.0, "a number without a gradient"),
        (lambda outputs, targets: outputs.sum() * math.nan, "returns NaN"),
        (lambda outputs, targets: outputs.sum(1)[:2], r"returns shape \(2,\)"),
        (lambda outputs, targets: outputs.no_such_thing, "raises AttributeError"),
    ],
)
def test_what_is_no_loss_is_refused(loss, words):
    with pytest.raises(InputError, match=words) as told:
        WithLoss(TASK, loss).loss({"output": torch.ones(4, 2, requires_grad=True)}, torch.tensor(LABELS))
    assert str(told.value).startswith(f"{__file__}, line ")


def test_a_function_is_loaded_from_a_file_that_may_import_its_neighbour(tmp_path, monkeypatch):
    (tmp_path / "neighbour_of_metric.py").write_text("half = 0.5\n\n\ndef whole(outputs, targets):\n    return 1.0\n")
    file = tmp_path / "mine.py"
    file.write_text("from neighbour_of_metric import half\n\n\ndef dice(outputs, targets):\n    return half\n")
    assert load_function(f"{file}:dice", "--metric")(None, None) == 0.5
    monkeypatch.chdir(tmp_path)
    assert load_function("neighbour_of_metric:whole", "--loss")(None, None) == 1.0
    assert str(tmp_path) not in sys.path


def test_a_function_of_an_installed_module_is_loaded_by_its_name():
    assert load_function("torch.nn.functional:cross_entropy", "--loss") is F.cross_entropy


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nowhere.py:dice", r"--metric nowhere\.py: no such file"),
        ("mine.py", r"--metric mine\.py: name the function behind a colon"),
        ("mine.py:", "name the function behind a colon"),
        ("mine.py:dise", r"there is no function 'dise' in mine\.py; did you mean dice\?"),
        ("broken.py:dice", r"broken\.py, line 2: ValueError: not today\."),
        ("unreadable.py:dice", r"unreadable\.py, line 1: SyntaxError"),
        ("no_such_package.metrics:dice", "there is no module 'no_such_package'"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_told_in_a_sentence(tmp_path, monkeypatch, spec, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def dice(outputs, targets):\n    return 1.0\n")
    (tmp_path / "broken.py").write_text("import math\nraise ValueError('not today')\n")
    (tmp_path / "unreadable.py").write_text("def dice(:\n")
    with pytest.raises(InputError, match=words) as told:
        load_function(spec, "--metric")
    assert str(told.value).count("\n") == 0


def test_what_a_function_changes_in_place_is_a_copy():
    def spoils(outputs, targets):
        outputs.mul_(0)
        targets.zero_()
        return outputs.sum(1)

    task = WithMetric(WithLoss(TASK, spoils), spoils, higher_is_better=False)
    answers, targets = {"output": torch.tensor(LOGITS, requires_grad=True)}, task.collate(LABELS)
    arrays = {"output": LOGITS.copy()}
    task.loss(answers, targets)
    task.value(task.parts(arrays, targets))
    assert torch.equal(answers["output"], torch.tensor(LOGITS))
    assert np.array_equal(arrays["output"], LOGITS)
    assert targets.tolist() == LABELS


def test_targets_in_lists_are_copies_too():
    boxes = {
        "boxes": torch.ones(1, 4),
        "labels": torch.zeros(1, dtype=torch.int64),
        "crowd": torch.zeros(1, dtype=bool),
    }

    def spoils(outputs, targets):
        targets[0]["boxes"].zero_()
        return outputs.sum()

    task = WithMetric(WithLoss(TASK, spoils), spoils, higher_is_better=False)
    task.loss({"output": torch.tensor(LOGITS[:1])}, [boxes])
    task.value(task.parts({"output": LOGITS[:1]}, [boxes]))
    assert boxes["boxes"].tolist() == [[1, 1, 1, 1]]
