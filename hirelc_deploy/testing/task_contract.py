"""In: a task with examples. Out: the tests that every task passes, inherited in a few lines.

    class TestMyTask(TaskContract):
        def make(self):
            return MyTask(("cat", "dog"), {})

        def answers(self, count, seed):
            return {"output": torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))}

        def targets(self, count, seed):
            return torch.randint(2, (count,), generator=torch.Generator().manual_seed(seed)).tolist()

Where `perfect` is given too, the metric is held to it.
"""

from __future__ import annotations

import ast
import json
import math
import shutil
import subprocess
import sys
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.answers import Answers
from hirelc_deploy.tasks.contract import Task, on_device
from hirelc_deploy.tasks.paired import resamples_of
from hirelc_deploy.testing.other_device import OTHER, other_device

IMAGES = 6
STEPS = 30
"""Of gradient descent on the answers themselves: enough for every loss to fall, whatever its unit."""

DECODE = """
import json, sys
import numpy as np
sys.path.insert(0, ".")
import decode
load = lambda name: dict(np.load(name, allow_pickle=False))
results = decode.decode(load("outputs.npz"), json.load(open("options.json")), load("arrays.npz"))
def plain(value):
    assert isinstance(value, np.ndarray) and value.ndim == 2, type(value)
    return value.shape
for result in results:
    assert all(not isinstance(value, np.ndarray) for name, value in result.items() if name != "mask"), "an array"
foreign = [name for name in ("torch", "PIL", "hirelc_deploy") if name in sys.modules]
print(json.dumps({"results": results, "lines": [decode.line(r) for r in results], "foreign": foreign}, default=plain))
"""


class TaskContract:
    """What a task promises; see tasks/contract.py. No test says anything about which task is right for a model."""

    input_size: tuple[int, int, int] = (3, 32, 48)
    """(channels, height, width) of the model's input that the answers belong to."""

    @abstractmethod
    def make(self) -> Task:
        """Return the task under test."""

    @abstractmethod
    def answers(self, count: int, seed: int) -> Answers:
        """Return the answers of some model to `count` images; another seed gives others, the same one the same."""

    @abstractmethod
    def targets(self, count: int, seed: int) -> list[Any]:
        """Return the targets of `count` images, before they are collated."""

    def perfect(self, targets: Sequence[Any]) -> Answers | None:
        """Return answers that say exactly what is true, if that can be written down."""
        return None

    @pytest.fixture
    def task(self) -> Task:
        """Return the task."""
        return self.make()

    def test_it_has_a_name_a_metric_and_a_decoder(self, task: Task) -> None:
        """Reports and bundles are made of these."""
        assert task.name.isidentifier()
        assert isinstance(task.classes, tuple)
        assert task.metric.name
        assert task.metric.scale > 0
        assert isinstance(task.mean_of_images, bool)
        assert isinstance(task.flips, bool)
        assert task.decoder.is_file()
        json.dumps({**task.decoder_options})
        assert all(isinstance(array, np.ndarray) for array in task.decoder_arrays.values())

    def test_a_batch_has_one_target_for_each_image_in_order(self, task: Task) -> None:
        """Whoever cuts a batch in two counts on it."""
        targets = self.targets(IMAGES, 1)
        batch = task.collate(targets)
        assert len(batch) == IMAGES
        assert same(task.collate(targets[2:3])[0], batch[2])

    def test_its_own_examples_pass_the_check_with_and_without_targets(self, task: Task) -> None:
        """A check that refuses what is right is worse than none."""
        answers = self.answers(IMAGES, 1)
        task.check(answers, None)
        task.check(answers, task.collate(self.targets(IMAGES, 1)))
        assert list(task.answers(answers)) == list(answers)

    def test_wrong_answers_are_refused_in_one_sentence(self, task: Task) -> None:
        """Of another shape, NaN, or of another number of images than there are targets."""
        answers = self.answers(IMAGES, 1)
        targets = task.collate(self.targets(IMAGES, 1))
        first = next(iter(answers))
        wrong = (
            {name: value.reshape(*value.shape, 1, 1, 1, 1) for name, value in answers.items()},
            answers | {first: torch.full_like(answers[first], math.nan)},
            {name: value[1:] for name, value in answers.items()},
        )
        for found in wrong:
            with pytest.raises(InputError) as refused:
                task.check(found, targets)
            assert str(refused.value).endswith(".")
            assert "\n" not in str(refused.value)

    def test_equal_answers_do_not_diverge_and_others_do(self, task: Task) -> None:
        """At any temperature, and finitely far."""
        wanted, other = self.answers(IMAGES, 1), self.answers(IMAGES, 2)
        for temperature in (1.0, 3.0):
            none, some = task.divergence(wanted, wanted, temperature), task.divergence(wanted, other, temperature)
            assert none.shape == some.shape == (IMAGES,)
            assert none.abs().max() < 1e-5
            assert some.isfinite().all()
            assert (some > 1e-4).all()

    def test_the_divergence_of_an_image_is_its_own(self, task: Task) -> None:
        """It stays in another order, and when the others are answered otherwise."""
        wanted, other, third = (self.answers(IMAGES, seed) for seed in (1, 2, 3))
        whole = task.divergence(wanted, other)
        backwards = torch.arange(IMAGES - 1, -1, -1)
        wanted_turned, other_turned = ({name: v[backwards] for name, v in each.items()} for each in (wanted, other))
        turned = task.divergence(wanted_turned, other_turned)
        assert close(turned[backwards], whole)
        mixed = {name: torch.cat([other[name][:2], third[name][2:]]) for name in other}
        assert close(task.divergence(wanted, mixed)[:2], whole[:2])

    def test_the_divergence_has_finite_gradients_and_none_where_answers_are_equal(self, task: Task) -> None:
        """So it can be trained away, and stays away."""
        wanted = self.answers(IMAGES, 1)
        for seed, is_zero in ((1, True), (2, False)):
            found = leaves(self.answers(IMAGES, seed))
            task.divergence(wanted, found).sum().backward()
            steepest = max(float(gradient_of(tensor).abs().max()) for tensor in found.values())
            assert math.isfinite(steepest)
            assert steepest < 1e-4 if is_zero else steepest > 1e-7

    def test_the_divergence_of_float64_answers_is_that_of_float32_ones(self, task: Task) -> None:
        """Files are compared in float64."""
        pair = self.answers(IMAGES, 1), self.answers(IMAGES, 2)
        wanted, other = ({name: value.double() for name, value in each.items()} for each in pair)
        fine = task.divergence(wanted, other)
        assert fine.dtype == torch.float64
        assert close(fine.float(), task.divergence(*pair))

    def test_the_surprise_of_an_image_is_its_own_and_has_a_gradient(self, task: Task) -> None:
        """Importance sums squares of it over images."""
        found = leaves(self.answers(IMAGES, 1))
        surprise = task.surprise(found, torch.Generator().manual_seed(0))
        assert surprise.shape == (IMAGES,)
        assert surprise.isfinite().all()
        surprise[0].backward()
        gradients = [gradient_of(tensor) for tensor in found.values()]
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert any(gradient[0].abs().max() > 0 for gradient in gradients)
        assert all(gradient[1:].abs().max() == 0 for gradient in gradients)

    def test_the_surprise_is_the_same_for_the_same_seed(self, task: Task) -> None:
        """A search that is resumed finds the same importance."""
        first, second = (task.surprise(self.answers(IMAGES, 1), torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(first, second)

    def test_it_computes_where_the_answers_are(self, task: Task) -> None:
        """On a GPU, where it may mix nothing of the CPU in."""
        targets, wanted, found = task.collate(self.targets(IMAGES, 1)), self.answers(IMAGES, 1), self.answers(IMAGES, 2)

        def computed(wanted: Answers, found: Answers, targets: Any) -> list[Tensor]:
            drawn = torch.Generator().manual_seed(0)
            return [task.divergence(wanted, found), task.surprise(found, drawn), task.loss(found, targets)]

        here = computed(wanted, found, targets)
        with other_device():
            theirs, ours = ({name: value.to(OTHER) for name, value in each.items()} for each in (wanted, found))
            back = [value.cpu() for value in computed(theirs, ours, on_device(targets, OTHER))]
        assert all(map(close, back, here))

    def test_the_loss_falls_when_answers_follow_its_gradient(self, task: Task) -> None:
        """One finite number an image."""
        targets = task.collate(self.targets(IMAGES, 1))
        found = leaves(self.answers(IMAGES, 2))
        size = max(float(tensor.detach().abs().max()) for tensor in found.values())
        optimizer = torch.optim.Adam(found.values(), lr=0.01 * size)
        losses = []
        for _ in range(STEPS):
            loss = task.loss(found, targets)
            assert loss.shape == (IMAGES,)
            assert loss.isfinite().all()
            losses.append(float(loss.detach().mean()))
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
        assert all(tensor.isfinite().all() for tensor in found.values())
        assert losses[-1] < losses[0]

    def test_each_image_brings_one_part_whatever_batch_it_comes_in(self, task: Task) -> None:
        """The metric is the same over parts of one batch and of three."""
        answers, targets = self.answers(IMAGES, 1), self.targets(IMAGES, 1)
        parts = self._parts(task, answers, targets)
        assert len(parts) == IMAGES
        pieces: list[Any] = []
        for cut in (slice(0, 1), slice(1, 4), slice(4, IMAGES)):
            pieces += self._parts(task, {name: value[cut] for name, value in answers.items()}, targets[cut])
        assert task.value(pieces) == pytest.approx(task.value(parts), rel=1e-6)

    def test_the_metric_does_not_depend_on_the_order_of_images(self, task: Task) -> None:
        """Images come as the device gives them back, and again and again under a bootstrap."""
        parts = self._parts(task, self.answers(IMAGES, 1), self.targets(IMAGES, 1))
        value = task.value(parts)
        assert math.isfinite(value)
        assert task.value(parts[::-1]) == pytest.approx(value, rel=1e-9)
        assert math.isfinite(task.value([*parts, *parts[:2]]))
        if task.mean_of_images:
            assert value == pytest.approx(float(np.mean(parts)), rel=1e-9)

    def test_resamples_are_what_the_metric_says_of_them(self, task: Task) -> None:
        """Whether the task has a way of its own to answer many of them or not."""
        parts = self._parts(task, self.answers(IMAGES, 1), self.targets(IMAGES, 1))
        resampled = resamples_of(task, parts)
        for seed in range(3):
            drawn = np.random.default_rng(seed).integers(IMAGES, size=IMAGES)
            assert resampled(drawn) == pytest.approx(task.value([parts[i] for i in drawn]), abs=1e-9)

    def test_each_class_has_a_finite_metric_or_none(self, task: Task) -> None:
        """Under names of classes."""
        by_class = task.by_class(self._parts(task, self.answers(IMAGES, 1), self.targets(IMAGES, 1)))
        assert set(by_class) <= set(task.classes)
        assert all(math.isfinite(value) for value in by_class.values())

    def test_a_worse_value_is_a_drop(self, task: Task) -> None:
        """Limits are put on drops."""
        better, worse = (0.9, 0.4) if task.metric.higher_is_better else (0.4, 0.9)
        assert task.metric.drop(better, worse) == pytest.approx(0.5 * task.metric.scale)
        assert task.metric.drop(worse, better) == pytest.approx(-0.5 * task.metric.scale)

    def test_nothing_is_better_than_the_truth(self, task: Task) -> None:
        """By the metric and by the loss."""
        targets = self.targets(IMAGES, 1)
        truth = self.perfect(targets)
        if truth is None:
            pytest.skip("no perfect answers are given")
        batch = task.collate(targets)
        task.check(truth, batch)
        best = task.value(self._parts(task, truth, targets))
        for seed in (1, 2):
            answers = self.answers(IMAGES, seed)
            assert task.metric.drop(best, task.value(self._parts(task, answers, targets))) >= 0
            assert task.loss(truth, batch).mean() < task.loss(answers, batch).mean()

    def test_the_decoder_runs_in_a_bare_interpreter(self, task: Task, tmp_path: Path) -> None:
        """It is copied into bundles, which know neither this project nor torch."""
        answers = {name: value.numpy() for name, value in self.answers(IMAGES, 1).items()}
        report = self._decoded(task, answers, tmp_path)
        assert report["foreign"] == []
        assert len(report["results"]) == len(report["lines"]) == IMAGES
        assert all(isinstance(result, dict) for result in report["results"])
        assert all(isinstance(line, str) and line and "\n" not in line for line in report["lines"])

    def test_the_decoder_is_python_38_and_imports_numpy_alone(self, task: Task) -> None:
        """Small devices keep old interpreters."""
        tree = ast.parse(task.decoder.read_text("utf-8"), feature_version=(3, 8))
        imported = {
            name.partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        }
        assert imported - sys.stdlib_module_names <= {"numpy"}

    def test_a_result_is_drawn_on_a_picture_of_the_same_size(self, task: Task) -> None:
        """The picture that was given stays as it was."""
        _, height, width = self.input_size
        options = {"classes": list(task.classes), "input_size": list(self.input_size), **task.decoder_options}
        arrays = {name: value.numpy() for name, value in self.answers(2, 1).items()}
        scope: dict[str, Any] = {"__name__": "decode"}
        exec(compile(task.decoder.read_text("utf-8"), str(task.decoder), "exec"), scope)
        decode: Callable[..., list[dict[str, Any]]] = scope["decode"]
        for mode in ("RGB", "L"):
            picture = Image.new(mode, (width, height), 128)
            before = picture.tobytes()
            for result in decode(arrays, options, dict(task.decoder_arrays)):
                drawn = task.draw(picture, result)
                assert drawn.size == (width, height)
                assert picture.tobytes() == before

    def _parts(self, task: Task, answers: Answers, targets: Sequence[Any]) -> list[Any]:
        return task.parts({name: value.numpy() for name, value in answers.items()}, task.collate(targets))

    def _decoded(self, task: Task, answers: Mapping[str, NDArray[np.float32]], folder: Path) -> Any:
        shutil.copy(task.decoder, folder / "decode.py")
        np.savez(folder / "outputs.npz", **{name: np.asarray(value) for name, value in answers.items()})  # type: ignore[arg-type]
        np.savez(folder / "arrays.npz", **{name: np.asarray(value) for name, value in task.decoder_arrays.items()})  # type: ignore[arg-type]
        options = {"classes": list(task.classes), "input_size": list(self.input_size), **task.decoder_options}
        (folder / "options.json").write_text(json.dumps(options), "utf-8")
        command = [sys.executable, "-I", "-c", DECODE]
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)


def same(first: Any, second: Any) -> bool:
    """Return whether two targets are equal: tensors, arrays, or containers of them."""
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, Tensor | np.ndarray):
        return np.array_equal(np.asarray(first), np.asarray(second), equal_nan=np.asarray(first).dtype.kind == "f")
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(same(*pair) for pair in zip(first, second, strict=True))
    return bool(first == second)


def close(found: Tensor, wanted: Tensor) -> bool:
    """Return whether both are equal up to the rounding of float32."""
    return torch.allclose(found, wanted, rtol=1e-3, atol=1e-5)


def leaves(answers: Answers) -> Answers:
    """Return copies that collect gradients."""
    return {name: value.detach().clone().requires_grad_() for name, value in answers.items()}


def gradient_of(tensor: Tensor) -> Tensor:
    """Return the gradient that a leaf has collected, zeros where none came."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
