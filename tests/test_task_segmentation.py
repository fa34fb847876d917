from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.answers import Answers
from hirelc_deploy.tasks.contract import Task
from hirelc_deploy.tasks.decoders import segmentation as decoder
from hirelc_deploy.tasks.segmentation import Segmentation
from hirelc_deploy.testing.task_contract import TaskContract

NAMES = ("road", "car", "tree")
TASK = Segmentation(NAMES, {"input_size": [3, 32, 48]})
BINARY = Segmentation(("leaf",), {})


def logits(count: int, seed: int, channels: int = 3, size: tuple[int, int] = (8, 12)) -> torch.Tensor:
    return 2 * torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(seed))


def said(masks: list[Any], channels: int = 3) -> torch.Tensor:
    """Return logits that are sure of these masks."""
    return 20 * F.one_hot(torch.tensor(masks), channels).permute(0, 3, 1, 2).float()


def parts_of(task: Segmentation, answer: torch.Tensor, masks: list[Any]) -> list[Any]:
    return task.parts({"out": answer.numpy()}, task.collate([np.array(mask) for mask in masks]))


def test_mean_intersection_over_union_by_hand() -> None:
    # Road: three pixels true, two of them found, none found too much: 2/3. Car: one pixel true and found, one too much:
    # 1/2. There is no tree, so that it does not count. The void pixel would be a second car found too much.
    true, found = [[0, 0, 0], [1, 255, 255]], [[0, 0, 1], [1, 1, 0]]
    [matrix] = parts_of(TASK, said([found]), [true])
    assert matrix.tolist() == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert TASK.value([matrix]) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert TASK.by_class([matrix]) == pytest.approx({"road": 2 / 3, "car": 1 / 2})


def test_one_matrix_is_over_all_images_and_an_image_counts_as_often_as_it_is_given() -> None:
    parts = parts_of(TASK, said([[[0, 0]], [[1, 0]]]), [[[0, 0]], [[0, 0]]])
    assert TASK.by_class(parts) == pytest.approx({"road": 3 / 4, "car": 0})
    assert TASK.by_class([*parts, parts[0]]) == pytest.approx({"road": 5 / 6, "car": 0})
    assert TASK.value(parts_of(TASK, said([[[0, 0]]]), [[[255, 255]]])) == 0.0  # nothing is labelled


@pytest.mark.parametrize("channels", [1, 3])
def test_scores_may_be_probabilities(channels: int) -> None:
    names = ("leaf",) if channels == 1 else NAMES
    plain, other = (Segmentation(names, told) for told in ({}, {"scores": "probabilities"}))
    chances = torch.sigmoid if channels == 1 else lambda values: values.softmax(1)
    two = [logits(2, seed, channels) for seed in (0, 1)]
    as_logits, as_chances = ([{"out": kind(values)} for values in two] for kind in (lambda values: values, chances))
    masks = torch.randint(2, (2, 8, 12), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(other.divergence(*as_chances, 2.0), plain.divergence(*as_logits, 2.0))
    torch.testing.assert_close(other.loss(as_chances[0], masks), plain.loss(as_logits[0], masks))
    drawn = [
        task.surprise(answers, torch.Generator().manual_seed(3))
        for task, answers in ((plain, as_logits[0]), (other, as_chances[0]))
    ]
    torch.testing.assert_close(*drawn)
    found = [
        task.parts({"out": answers["out"].numpy()}, masks)
        for task, answers in ((plain, as_logits[0]), (other, as_chances[0]))
    ]
    np.testing.assert_array_equal(*found)
    zero = {"out": torch.zeros_like(two[0])}
    assert other.divergence(zero, as_chances[0]).isfinite().all()


def test_one_channel_is_the_second_of_two_classes() -> None:
    assert BINARY.classes == ("background", "leaf")
    answer = torch.tensor([[[[3.0, -1.0], [0.5, -4.0]]]])
    [matrix] = parts_of(BINARY, answer, [[[1, 0], [0, 0]]])
    assert matrix.tolist() == [[2, 1], [0, 1]]
    one, two = logits(2, 0, channels=1), logits(2, 1, channels=1)
    as_two = [torch.cat([torch.zeros_like(z), z], 1) for z in (one, two)]
    masks = torch.randint(2, (2, 8, 12))
    for temperature in (1.0, 2.0):
        got = BINARY.divergence({"out": one}, {"out": two}, temperature)
        torch.testing.assert_close(got, BINARY.divergence({"out": as_two[0]}, {"out": as_two[1]}, temperature))
    torch.testing.assert_close(
        BINARY.loss({"out": one}, masks), F.cross_entropy(as_two[0], masks, reduction="none").mean((1, 2))
    )


def test_the_divergence_is_the_mean_over_pixels() -> None:
    wanted, found = torch.zeros(1, 3, 1, 2), torch.zeros(1, 3, 1, 2)
    found[0, 0, 0, 0] = np.log(2)  # probabilities 1/2, 1/4, 1/4 instead of thirds at one pixel of two
    nats = (np.log(2 / 3) + 2 * np.log(4 / 3)) / 3
    assert float(TASK.divergence({"out": wanted}, {"out": found})) == pytest.approx(nats / 2, rel=1e-5)
    at_two = TASK.divergence({"out": 2 * wanted}, {"out": 2 * found}, 2.0)
    assert float(at_two) == pytest.approx(4 * nats / 2, rel=1e-5)


def test_a_smaller_answer_is_judged_after_bilinear_enlargement() -> None:
    small = logits(2, 0, size=(3, 4))
    whole = F.interpolate(small, size=(12, 17), mode="bilinear", align_corners=False)
    masks = [np.random.default_rng(k).integers(0, 3, (12, 17)) for k in range(2)]
    for mine, theirs in zip(parts_of(TASK, small, masks), parts_of(TASK, whole, masks), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    targets = TASK.collate(masks)
    torch.testing.assert_close(TASK.loss({"out": small}, targets), TASK.loss({"out": whole}, targets))


@pytest.mark.parametrize(("here", "there"), [((3, 4), (12, 17)), ((1, 1), (5, 4)), ((9, 7), (4, 3)), ((2, 6), (7, 6))])
def test_the_decoder_enlarges_as_torch_does(here: tuple[int, int], there: tuple[int, int]) -> None:
    small = logits(1, 0, size=here)
    whole = F.interpolate(small, size=there, mode="bilinear", align_corners=False)
    mine = decoder._enlarged(small[0].numpy(), *there)
    np.testing.assert_allclose(mine, whole[0], atol=1e-5)


def test_the_loss_is_that_of_labelled_pixels_alone() -> None:
    answer, masks = logits(2, 0), torch.randint(3, (2, 8, 12))
    masks[0, :4] = 255
    alone = F.cross_entropy(answer, masks, ignore_index=255, reduction="none").flatten(1).sum(1) / torch.tensor(
        [48, 96]
    )
    torch.testing.assert_close(TASK.loss({"out": answer}, masks), alone)
    masks[1] = 255
    assert TASK.loss({"out": answer}, masks)[1] == 0
    eleven = Segmentation(NAMES, {"ignore_index": 11})
    torch.testing.assert_close(
        eleven.loss({"out": answer}, torch.where(masks == 255, 11, masks)), TASK.loss({"out": answer}, masks)
    )


@pytest.mark.parametrize("task", [TASK, BINARY])
def test_squared_gradients_of_the_surprise_are_the_curvature_of_the_divergence(task: Segmentation) -> None:
    channels = 1 if task is BINARY else 3
    one = logits(1, 0, channels, (2, 2)).double()
    many = one.repeat(20000, 1, 1, 1).requires_grad_()
    [slope] = torch.autograd.grad(task.surprise({"out": many}, torch.Generator().manual_seed(0)).sum(), [many])
    slope = slope.flatten(1)
    hessian = torch.autograd.functional.hessian(lambda found: task.divergence({"out": one}, {"out": found})[0], one)
    bends = hessian.reshape(one.numel(), one.numel())
    squares = slope.T @ slope / len(slope)
    torch.testing.assert_close(squares, bends, rtol=0.1, atol=float(bends.max()) * 0.03)


def test_the_output_that_counts_is_found() -> None:
    out, aux = logits(1, 0), logits(1, 1)
    assert list(TASK.answers(out)) == ["output"]
    assert TASK.answers({"aux": aux, "out": out})["out"] is out
    assert TASK.answers({"loss": None, "logits": out, "hidden": aux})["logits"] is out
    assert list(Segmentation(NAMES, {"outputs": "aux"}).answers({"aux": aux, "out": out})) == ["aux"]
    with pytest.raises(InputError, match="name the one with the logits in outputs"):
        TASK.answers({"first": out, "second": aux})


def test_a_mirrored_picture_has_the_mirrored_mask() -> None:
    assert TASK.mirrored(torch.tensor([[[0, 1], [2, 255]]])).tolist() == [[[1, 0], [255, 2]]]


def test_what_does_not_fit_is_said_in_a_sentence() -> None:
    answers, masks = {"out": logits(2, 0)}, torch.zeros(2, 8, 12, dtype=torch.long)
    with pytest.raises(InputError, match=r"the answer is \(2, 5, 8, 12\); logits \(n, 3, h, w\) are needed"):
        TASK.check({"out": logits(2, 0, channels=5)}, None)
    with pytest.raises(InputError, match="not finite"):
        TASK.check({"out": logits(2, 0) / 0}, None)
    with pytest.raises(InputError, match="for 2 images"):
        TASK.check(answers, masks[:1])
    with pytest.raises(InputError, match="holds the number 11, but classes are 0 to 2"):
        TASK.check(answers, masks + 11)
    with pytest.raises(InputError, match="masks of one batch"):
        TASK.collate([np.zeros((2, 2)), np.zeros((2, 3))])
    with pytest.raises(InputError, match="0 class names"):
        Segmentation((), {})
    with pytest.raises(InputError, match="no option 'ignore'"):
        Segmentation(NAMES, {"ignore": 1})
    with pytest.raises(InputError, match="name the one output that counts"):
        Segmentation(NAMES, {"outputs": ["a", "b"]})


def test_a_mask_is_shown_in_colours_and_shares() -> None:
    options = {"classes": list(BINARY.classes), "input_size": [3, 4, 8], **BINARY.decoder_options}
    answer = np.full((1, 1, 4, 8), -5, dtype=np.float32)
    answer[0, 0, :, 6:] = 5
    [result] = decoder.decode({"output": answer}, options, {})
    assert result["shares"] == {"background": 0.75, "leaf": 0.25}
    assert decoder.line(result) == "background 75 %, leaf 25 %"
    assert result["mask"].tolist() == [[0] * 6 + [1] * 2] * 4
    drawn = np.asarray(BINARY.draw(Image.new("RGB", (8, 4), "white"), result))
    assert (drawn[:, :6] == 255).all()
    assert (drawn[:, 6:] != 255).any(2).all()
    again = BINARY.draw(Image.new("RGB", (8, 4), "white"), {"mask": result["mask"].tolist()})
    assert (np.asarray(again) == drawn).all()


class TestSegmentation(TaskContract):
    def make(self) -> Task:
        return TASK

    def answers(self, count: int, seed: int) -> Answers:
        return {"out": logits(count, seed, size=(16, 24))}

    def targets(self, count: int, seed: int) -> list[Any]:
        return list(np.random.default_rng(seed).choice([0, 1, 2, 255], (count, 32, 48)))

    def perfect(self, targets: Sequence[Any]) -> Answers:
        masks = torch.from_numpy(np.stack(targets))
        return {"out": said(torch.where(masks == 255, 0, masks).tolist())}


class TestBinarySegmentation(TestSegmentation):
    def make(self) -> Task:
        return BINARY

    def answers(self, count: int, seed: int) -> Answers:
        return {"out": logits(count, seed, channels=1, size=(32, 48))}

    def targets(self, count: int, seed: int) -> list[Any]:
        return list(np.random.default_rng(seed).choice([0, 1, 255], (count, 32, 48)))

    def perfect(self, targets: Sequence[Any]) -> Answers:
        return {"out": 40.0 * torch.from_numpy(np.stack(targets))[:, None] - 20}
