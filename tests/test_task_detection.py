from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.answers import Answers
from hirelc_deploy.tasks import decoding, detection_heads, detection_losses
from hirelc_deploy.tasks.average_precision import Matches
from hirelc_deploy.tasks.contract import Task
from hirelc_deploy.tasks.decoders import detection as decoder
from hirelc_deploy.tasks.detection import Detection
from hirelc_deploy.testing.task_contract import TaskContract

NAMES = ("cat", "dog", "bird")
SIZE = [3, 100, 200]  # boxes of 100 rows and 200 columns
ANCHORS = np.array([[0.25, 0.5, 0.5, 1.0], [0.5, 0.5, 0.2, 0.2], [0.75, 0.5, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0]])
DECODED = Detection(NAMES, {"head": "decoded"})


def task_of(head: str, **options: Any) -> Detection:
    given: dict[str, Any] = {"head": head, "input_size": SIZE}
    if head == "ssd":
        given.update(anchors=ANCHORS, scores="sigmoid", background=0)
    return Detection(NAMES, {**given, **options})


def random_answers(task: Detection, images: int = 2, seed: int = 0, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Return outputs that a detector of this form could give: boxes within the picture, scores of all sizes."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return scale * torch.randn(shape, generator=g)

    def shares(*shape: int) -> torch.Tensor:
        return 0.3 + 0.4 * torch.rand(shape, generator=g)

    head = task.decoder_options["head"]
    if head == "ssd":
        return {"scores": normal(images, 4, 4), "boxes": normal(images, 4, 4)}
    if head == "detr":
        columns = 3 if task.decoder_options["scores"] == "sigmoid" else 4
        return {"scores": normal(images, 6, columns), "boxes": shares(images, 6, 4)}
    if head == "yolo":
        found = torch.cat([100 * shares(images, 6, 4), normal(images, 6, 3).sigmoid()], 2)
        if task.decoder_options["objectness"]:
            return {"boxes": torch.cat([found[..., :4], shares(images, 6, 1), found[..., 4:]], 2)}
        return {"boxes": found.transpose(1, 2)}
    corner = 100 * shares(images, 6, 2)
    boxes = torch.cat([corner, corner + 50 * shares(images, 6, 2)], 2)
    labels = torch.tensor([[0.0, 1, 2, 0, 1, 2]] * images)
    return {"boxes": boxes, "scores": shares(images, 6), "labels": labels}


FORMS = {
    "ssd by sigmoid": task_of("ssd"),
    "ssd by softmax": task_of("ssd", scores="softmax"),
    "ssd of rows first": task_of("ssd", code_order="yxhw", variances=[0.2, 0.1, 0.3, 0.4]),
    "detr": task_of("detr"),
    "detr by sigmoid": task_of("detr", scores="sigmoid"),
    "yolo": task_of("yolo"),
    "yolo with objectness": task_of("yolo", objectness=True),
    "decoded": task_of("decoded"),
}
each_form = pytest.mark.parametrize("task", FORMS.values(), ids=list(FORMS))


def decoded(task: Detection, answers: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    arrays = {name: np.asarray(answer, dtype=np.float32) for name, answer in answers.items()}
    given = {"classes": list(task.classes), "input_size": SIZE, **task.decoder_options, **options}
    return decoder.decode(arrays, given, dict(task.decoder_arrays))


def parts_of(found: list[tuple[Any, Any, Any]], true: list[dict[str, Any]]) -> list[Matches]:
    """Return the parts of images from (boxes, scores, labels) each, of different numbers."""
    parts: list[Matches] = []
    for (boxes, scores, labels), target in zip(found, true, strict=True):
        answers = {"boxes": [boxes], "scores": [scores], "labels": [labels]}
        arrays = {name: np.asarray(value, dtype=np.float32) for name, value in answers.items()}
        parts += DECODED.parts(arrays, DECODED.collate([target]))
    return parts


def test_average_precision_by_hand() -> None:
    # Two cats. The surest box is exact, the next finds nothing, the third overlaps the other cat by 64 of 100.
    true = {"boxes": [[0, 0, 10, 10], [50, 0, 60, 10]], "labels": [0, 0]}
    found = ([[0, 0, 10, 10], [20, 20, 30, 30], [50, 0, 60, 6.4]], [0.9, 0.8, 0.7], [0, 0, 0])
    parts = parts_of([found], [true])
    # At overlaps 0.5, 0.55 and 0.6 precision is 1 up to recall 0.5, of one of one box (51 of the recalls 0, 0.01, ...,
    # 1), and 2/3 on the other 50. At the seven overlaps from 0.65 on the second cat is never found.
    easy, hard = (51 + 50 * 2 / 3) / 101, 51 / 101
    assert DECODED.value(parts) == pytest.approx((3 * easy + 7 * hard) / 10, abs=1e-12)
    assert DECODED.by_class(parts) == pytest.approx({"cat": (3 * easy + 7 * hard) / 10})
    assert Detection(NAMES, {"head": "decoded", "metric": "AP50"}).value(parts) == pytest.approx(easy, abs=1e-12)


def test_a_box_on_a_crowd_is_neither_true_nor_false() -> None:
    true = {"boxes": [[0, 0, 10, 10], [40, 0, 90, 50]], "labels": [0, 0], "crowd": [False, True]}
    alone = ([[0, 0, 10, 10]], [0.5], [0])
    with_crowd = ([[0, 0, 10, 10], [50, 10, 60, 20], [60, 10, 70, 20]], [0.5, 0.9, 0.8], [0, 0, 0])
    assert DECODED.value(parts_of([alone], [true])) == DECODED.value(parts_of([with_crowd], [true]))


def test_images_without_true_boxes_lower_the_precision_and_alone_give_zero() -> None:
    true: list[dict[str, Any]] = [{"boxes": [[0, 0, 10, 10]], "labels": [1]}, {"boxes": [], "labels": []}]
    found = [([[0, 0, 10, 10]], [0.8], [1]), ([[5, 5, 9, 9]], [0.9], [1])]
    parts = parts_of(found, true)
    assert DECODED.value(parts) == pytest.approx(0.5)  # one of two is true at every recall
    assert DECODED.value(parts[1:]) == 0.0
    assert DECODED.by_class(parts[1:]) == {}


def random_scenes(images: int, seed: int) -> tuple[list[tuple[Any, Any, Any]], list[dict[str, Any]]]:
    rng = np.random.default_rng(seed)
    found, true = [], []
    for _ in range(images):
        count = int(rng.integers(0, 9))
        corner = rng.uniform(0, 80, (count, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(5, 60, (count, 2))], 1).astype(np.float32)
        labels, crowd = rng.integers(0, 3, count), rng.random(count) < 0.2
        true.append({"boxes": boxes, "labels": labels, "crowd": crowd})
        chosen = boxes[rng.integers(0, max(count, 1), 30 if count else 0)]
        near = chosen + rng.normal(0, 3, chosen.shape)  # some end before they begin
        far = rng.uniform(0, 60, (10, 2))
        places = np.concatenate([near, np.concatenate([far, far + 20], 1)]).astype(np.float32)
        scores = rng.uniform(0.01, 1, len(places)).round(2).astype(np.float32)  # some are equal
        found.append((places, scores, rng.integers(0, 3, len(places))))
    return found, true


def coco_precisions(found: list[tuple[Any, Any, Any]], true: list[dict[str, Any]]) -> NDArray[np.float64]:
    """Return (overlaps, recalls, classes) precision by pycocotools."""
    coco_module, evaluation = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    truths: list[dict[str, Any]] = []
    results = []
    for image, ((boxes, scores, labels), target) in enumerate(zip(found, true, strict=True)):
        for box, label, crowd in zip(target["boxes"].astype(float), target["labels"], target["crowd"], strict=True):
            place = [*box[:2], *(box[2:] - box[:2])]
            entry = {"id": len(truths) + 1, "image_id": image, "category_id": int(label), "bbox": place}
            truths.append({**entry, "area": place[2] * place[3], "iscrowd": int(crowd)})
        for box, score, label in zip(boxes.astype(float), scores.astype(float), labels, strict=True):
            place = [*box[:2], *(box[2:] - box[:2])]
            results.append({"image_id": image, "category_id": int(label), "bbox": place, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        data = coco_module.COCO()
        images, categories = [{"id": k} for k in range(len(true))], [{"id": k} for k in range(len(NAMES))]
        data.dataset = {"images": images, "annotations": truths, "categories": categories, "info": {}}
        data.createIndex()
        judged = evaluation.COCOeval(data, data.loadRes(results), "bbox")
        judged.evaluate()
        judged.accumulate()
    return np.asarray(judged.eval["precision"][:, :, :, 0, 2])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_average_precision_is_that_of_pycocotools(seed: int) -> None:
    found, true = random_scenes(12, seed)
    parts = parts_of(found, true)
    theirs = coco_precisions(found, true)
    assert DECODED.value(parts) == pytest.approx(theirs.mean(), abs=1e-9)
    assert list(DECODED.by_class(parts).values()) == pytest.approx(theirs.mean((0, 1)), abs=1e-9)
    half = Detection(NAMES, {"head": "decoded", "metric": "AP50"})
    assert half.value(parts) == pytest.approx(theirs[0].mean(), abs=1e-9)


def test_images_drawn_more_than_once_count_more_than_once() -> None:
    found, true = random_scenes(12, 3)
    parts = parts_of(found, true)
    drawn = np.random.default_rng(0).integers(0, 12, 12)
    theirs = coco_precisions([found[k] for k in drawn], [true[k] for k in drawn])
    assert DECODED.value([parts[k] for k in drawn]) == pytest.approx(theirs.mean(), abs=1e-9)


def test_resamples_are_those_of_pycocotools_where_no_two_scores_are_equal() -> None:
    found, true = random_scenes(12, 3)
    rng = np.random.default_rng(1)
    found = [(boxes, rng.random(len(boxes)).astype(np.float32), labels) for boxes, _, labels in found]
    parts = parts_of(found, true)
    half = Detection(NAMES, {"head": "decoded", "metric": "AP50"})
    for _ in range(3):
        drawn = rng.integers(0, 12, 12)
        theirs = coco_precisions([found[k] for k in drawn], [true[k] for k in drawn])
        assert DECODED.resamples(parts)(drawn) == pytest.approx(np.nanmean(theirs[theirs > -1]), abs=1e-9)
        assert half.resamples(parts)(drawn) == pytest.approx(theirs[0][theirs[0] > -1].mean(), abs=1e-9)


def test_a_hundred_boxes_of_a_class_count() -> None:
    true = {"boxes": [[0, 0, 10, 10]], "labels": [0]}
    places = np.tile([50.0, 50, 60, 60], (150, 1))
    places[120] = [0, 0, 10, 10]
    many = Detection(NAMES, {"head": "decoded", "max_detections": 200})
    answers = {"boxes": places[None], "scores": np.linspace(0.9, 0.1, 150)[None], "labels": np.zeros((1, 150))}
    arrays = {name: value.astype(np.float32) for name, value in answers.items()}
    assert many.value(many.parts(arrays, many.collate([true]))) == 0.0


def sure(label: int, columns: int, *, places: int, at: int) -> NDArray[np.float32]:
    """Return (1, places, columns) logits that are sure of one class at one place and of the first column elsewhere."""
    logits = np.full((1, places, columns), -9.0, dtype=np.float32)
    logits[0, :, 0] = 9
    logits[0, at] = -9
    logits[0, at, label] = 9
    return logits


def test_codes_of_an_ssd_move_and_stretch_its_anchor() -> None:
    # Anchor 1 lies in the middle, 40 pixels wide and 20 high. One code of a centre is a tenth of that: 4 pixels right,
    # and 4 up for two codes. A code of ln 2 / 0.2 doubles the width.
    codes = np.zeros((1, 4, 4), dtype=np.float32)
    codes[0, 1] = [1, -2, np.log(2) / 0.2, 0]
    answers = {"scores": sure(2, 4, places=4, at=1), "boxes": codes}
    [result] = decoded(task_of("ssd"), answers)
    assert result["names"] == ["dog"]
    assert result["labels"] == [1]  # column 2, without the background in column 0
    np.testing.assert_allclose(result["boxes"], [[104 - 40, 46 - 10, 104 + 40, 46 + 10]], atol=1e-4)
    [turned] = decoded(task_of("ssd", code_order="yxhw"), {**answers, "boxes": codes[..., [1, 0, 3, 2]]})
    assert turned == result
    [by_softmax] = decoded(task_of("ssd", scores="softmax"), answers)
    assert by_softmax["boxes"] == result["boxes"]
    [last] = decoded(task_of("ssd", background=3), {**answers, "scores": np.roll(answers["scores"], -1, 2)})
    assert last == result


def test_a_detr_has_one_class_a_query_and_no_object_last() -> None:
    scores = np.full((1, 3, 4), -4.0, dtype=np.float32)
    scores[0, :, 3] = 6
    scores[0, 1] = [-4, 6, 5, -4]
    boxes = np.tile(np.array([0.5, 0.5, 0.2, 0.4], dtype=np.float32), (1, 3, 1))
    [result] = decoded(task_of("detr"), {"scores": scores, "boxes": boxes})
    assert result["names"] == ["dog"]
    np.testing.assert_allclose(result["boxes"], [[80, 30, 120, 70]], atol=1e-4)
    np.testing.assert_allclose(result["scores"], 1 / (1 + np.exp(-1) + 2 * np.exp(-10)), rtol=1e-5)
    [several] = decoded(task_of("detr", scores="sigmoid"), {"scores": scores[..., :3], "boxes": boxes})
    assert several["names"] == ["dog", "bird"]


@pytest.mark.parametrize("form", ["ssd by sigmoid", "ssd by softmax", "detr", "detr by sigmoid"])
def test_scores_may_be_probabilities(form: str) -> None:
    plain = FORMS[form]
    kept = ("head", "scores", "background", "variances", "code_order")
    options = {key: value for key, value in plain.decoder_options.items() if key in kept}
    anchors = {"anchors": ANCHORS} if options["head"] == "ssd" else {}
    other = Detection(NAMES, {**options, **anchors, "input_size": SIZE, "probabilities": True})
    two = [random_answers(plain, seed=seed) for seed in (0, 1)]
    chances = (lambda x: x.softmax(-1)) if options["scores"] == "softmax" else torch.sigmoid
    as_chances = [{**one, "scores": chances(one["scores"])} for one in two]
    torch.testing.assert_close(other.divergence(*as_chances), plain.divergence(*two), rtol=1e-4, atol=1e-6)
    drawn = [
        task.surprise(answers, torch.Generator().manual_seed(2))
        for task, answers in ((plain, two[0]), (other, as_chances[0]))
    ]
    torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-6)
    found, again = decoded(plain, two[0]), decoded(other, as_chances[0])
    assert [one["names"] for one in found] == [one["names"] for one in again]
    for one, same in zip(found, again, strict=True):
        assert one["scores"] == pytest.approx(same["scores"], rel=1e-5)


def test_a_yolo_is_read_with_and_without_objectness() -> None:
    found = np.zeros((1, 7, 2), dtype=np.float32)
    found[0, :, 1] = [100, 50, 20, 10, 0.1, 0.2, 0.8]
    expected = {"boxes": [[90, 45, 110, 55]], "labels": [2], "names": ["bird"]}
    for name in ("output", "output0"):
        [result] = decoded(task_of("yolo"), {name: found})
        assert {key: result[key] for key in expected} == expected
        assert result["scores"] == pytest.approx([0.8])
    with_objectness = np.insert(found.transpose(0, 2, 1), 4, 0.5, axis=2)
    [result] = decoded(task_of("yolo", objectness=True), {"output": with_objectness})
    assert {key: result[key] for key in expected} == expected
    assert result["scores"] == pytest.approx([0.4])


def test_boxes_that_are_decoded_already_are_taken_and_clipped() -> None:
    answers = {"boxes": [[[-5, 2, 30, 40], [0, 0, 9, 9], [1, 1, 2, 2]]], "scores": [[0.4, 0.9, 0.8]]}
    [result] = decoded(task_of("decoded", background=0), {**answers, "labels": [[2, 0, -1]]})
    assert result["boxes"] == [[0, 2, 30, 40]]  # the others are background, and a place that was not filled
    assert result["names"] == ["dog"]


def test_suppression_keeps_what_a_slow_walk_keeps() -> None:
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 60, (700, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 40, (700, 2))], 1).astype(np.float32)
    scores, labels = rng.permutation(700).astype(np.float32) / 700, rng.integers(0, 3, 700)
    kept: list[int] = []
    for k in np.argsort(-scores):
        near = [iou(boxes[k], boxes[j]) > 0.6 for j in kept if labels[j] == labels[k]]
        if not any(near):
            kept.append(int(k))
    answers = {"boxes": boxes[None], "scores": scores[None], "labels": labels[None]}
    for most in (100, 1000):
        [result] = decoded(task_of("decoded", nms_iou=0.6, max_detections=most), answers, score_threshold=0.0)
        assert result["scores"] == scores[kept[:most]].tolist()
        assert len(result["scores"]) == min(most, len(kept))


def iou(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(wide, 0) * max(high, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return float(shared / (sum(areas) - shared))


@each_form
def test_what_the_decoder_says_is_json_and_a_line(task: Detection) -> None:
    for result in decoded(task, random_answers(task)):
        assert json.loads(json.dumps(result)) == result
        assert len(result["boxes"]) == len(result["scores"]) == len(result["labels"])
        assert result["scores"] == sorted(result["scores"], reverse=True)
        assert "\n" not in decoder.line(result)
    [empty] = decoded(task, random_answers(task, images=1), score_threshold=2.0)
    assert decoder.line(empty) == "nothing found"


@each_form
def test_candidates_lie_where_the_decoder_puts_boxes(task: Detection) -> None:
    answers = random_answers(task, images=1)
    head = task.head
    assert head is not None
    boxes = head.candidates(answers).boxes[0]
    unit = torch.ones(4) if head.in_pixels else torch.tensor([200.0, 100.0, 200.0, 100.0])
    places = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1) * unit
    found = decoded(
        task, answers, score_threshold=0.0, nms_iou=None, max_detections=10**6, input_size=[3, 10**4, 10**4]
    )
    if not head.in_pixels:
        found = decoded(task, answers, score_threshold=0.0, nms_iou=None, max_detections=10**6)
        places[:, ::2], places[:, 1::2] = places[:, ::2].clamp(0, 200), places[:, 1::2].clamp(0, 100)
    assert len(found[0]["boxes"]) >= len(places)
    for box in found[0]["boxes"]:
        assert (places - torch.tensor(box)).abs().amax(1).min() < 1e-3


def test_a_place_that_sees_something_weighs_more() -> None:
    task = task_of("ssd")
    wanted = {"scores": torch.full((1, 4, 4), -5.0), "boxes": torch.zeros(1, 4, 4)}
    wanted["scores"][0, 1, 2] = 4.0

    def moved(place: int) -> float:
        boxes = wanted["boxes"].clone()
        boxes[0, place, 0] += 1
        return float(task.divergence(wanted, {**wanted, "boxes": boxes}))

    # Weights are the probabilities plus 0.01: sigmoid(4) = 0.982 here, sigmoid(-5) = 0.0067 at the other three. A code
    # off by 1 costs 1/2, the mean over four 1/8.
    total = 0.98201 + 3 * 0.0066929 + 4 * 0.01
    assert moved(1) == pytest.approx(0.98201 / total / 8, rel=1e-4)
    assert moved(0) == pytest.approx(0.0066929 / total / 8, rel=1e-4)


def test_the_unused_column_of_a_background_counts_nowhere() -> None:
    task, wanted = task_of("ssd"), random_answers(task_of("ssd"))
    found = {**wanted, "scores": wanted["scores"].clone()}
    found["scores"][..., 0] += 3
    assert task.divergence(wanted, found).abs().max() == 0


def test_boxes_of_a_list_may_change_their_places_but_not_vanish() -> None:
    task = FORMS["decoded"]
    wanted = random_answers(task, images=1)
    turned = {name: answer.flip(1) for name, answer in wanted.items()}
    assert float(task.divergence(wanted, turned)) == pytest.approx(0, abs=1e-6)
    without = {**wanted, "scores": wanted["scores"].clone()}
    without["scores"][0, 0] = 0.0
    assert float(task.divergence(wanted, without)) > 0.3
    assert float(task.divergence(without, wanted)) > 0.05  # one too many


@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
def test_queries_are_a_set_whose_order_an_image_may_choose(scores: str) -> None:
    task = task_of("detr", scores=scores)
    wanted = random_answers(task, images=3, scale=3.0)
    wanted["boxes"][:, 1] = wanted["boxes"][:, 0]  # two queries on one box, told apart by how sure they are
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    turned = {name: answer[:, order] for name, answer in wanted.items()}
    assert task.divergence(wanted, turned).tolist() == pytest.approx([0.0] * 3, abs=1e-6)
    slopes = []
    for found in (wanted, turned):
        scores_of = (found["scores"] - 0.1 * torch.arange(found["scores"].shape[-1])).requires_grad_()
        total = task.divergence(wanted, {**found, "scores": scores_of}).sum()
        slopes += torch.autograd.grad(total, scores_of)
    torch.testing.assert_close(slopes[1], slopes[0][:, order])
    lost = {**wanted, "scores": wanted["scores"].clone()}
    lost["scores"][:, 0] = -9.0 if scores == "sigmoid" else torch.tensor([-9.0, -9.0, -9.0, 9.0])
    assert task.divergence(wanted, lost).min() > 0.01


@each_form
def test_squared_gradients_of_the_surprise_are_the_curvature_of_the_divergence(task: Detection) -> None:
    one = {name: answer.double() for name, answer in random_answers(task, images=1, scale=0.7).items()}
    learned = [name for name in one if name != "labels"]
    many = 4000
    draws = {name: answer.repeat(many, *([1] * (answer.ndim - 1))).requires_grad_() for name, answer in one.items()}
    losses = task.surprise(draws, torch.Generator().manual_seed(0))
    slopes = torch.autograd.grad(losses.sum(), [draws[name] for name in learned])

    def apart(*answers: torch.Tensor) -> torch.Tensor:
        return task.divergence(one, {**one, **dict(zip(learned, answers, strict=True))})[0]

    hessian = torch.autograd.functional.hessian(apart, tuple(one[name] for name in learned))
    for k, slope in enumerate(slopes):
        size = one[learned[k]].numel()
        bends = hessian[k][k].reshape(size, size).diagonal()
        squares = slope.flatten(1).square().mean(0)
        torch.testing.assert_close(squares, bends, rtol=0.25, atol=float(bends.max()) * 0.02)


def targets_of(task: Detection) -> Any:
    return task.collate(
        [
            {"boxes": [[10, 10, 90, 95], [85, 35, 125, 60]], "labels": [0, 2]},
            {"boxes": [[110, 5, 190, 90]], "labels": [1]},
        ]
    )


@pytest.mark.parametrize("form", ["ssd by sigmoid", "ssd by softmax", "ssd of rows first", "detr", "detr by sigmoid"])
def test_training_by_the_loss_alone_finds_the_boxes(form: str) -> None:
    task = FORMS[form]
    answers = {name: answer.requires_grad_() for name, answer in random_answers(task).items()}
    targets = targets_of(task)
    optimizer = torch.optim.Adam(answers.values(), lr=0.05)
    first = task.loss(answers, targets).detach()
    for _ in range(300):
        optimizer.zero_grad()
        loss = task.loss(answers, targets)
        loss.sum().backward()
        optimizer.step()
    assert (loss < 0.3 * first).all()
    arrays = {name: answer.detach().numpy() for name, answer in answers.items()}
    assert task.value(task.parts(arrays, targets)) > 0.9


def test_what_lies_on_a_crowd_need_not_be_background() -> None:
    task = task_of("ssd")
    answers = random_answers(task, images=1)
    crowd = {"boxes": [[0, 0, 200, 100]], "labels": [0], "crowd": [True]}
    assert float(task.loss(answers, task.collate([crowd]))) == 0
    nothing: dict[str, Any] = {"boxes": [], "labels": []}
    assert float(task.loss(answers, task.collate([nothing]))) > 0


def test_each_true_box_has_its_best_anchor_and_an_anchor_its_best_box() -> None:
    head = task_of("ssd").head
    assert head is not None
    # The first box overlaps anchor 0 (the left half) by 0.8; the small one no anchor by half, but anchor 1 most.
    boxes = torch.tensor([[0.25, 0.5, 0.4, 1.0], [0.55, 0.5, 0.1, 0.1]])
    candidates = head.candidates(random_answers(task_of("ssd"), images=1))
    assert head.assigned(candidates, 0, boxes, torch.tensor([0, 1])).tolist() == [0, 1, -1, -1]


def test_answers_are_found_by_name_or_place() -> None:
    scores, boxes = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)
    assert list(task_of("ssd").answers((scores, boxes))) == ["scores", "boxes"]
    from_mapping = task_of("detr").answers({"loss": None, "pred_boxes": boxes, "hidden": boxes, "logits": scores})
    assert list(from_mapping) == ["logits", "pred_boxes"]
    turned = task_of("ssd", outputs=["boxes", "scores"])
    assert turned.answers((boxes, scores))["scores"] is scores
    own_names = task_of("ssd", outputs=["cls", "reg"])
    assert list(own_names.answers({"reg": boxes, "cls": scores})) == ["cls", "reg"]
    own_names.check({"cls": scores, "reg": boxes}, None)
    assert list(task_of("yolo").answers((torch.zeros(1, 7, 5), [torch.zeros(1, 2)]))) == ["boxes"]
    alone = task_of("yolo")
    assert list(alone.answers({"output0": torch.zeros(1, 7, 5)})) == ["output0"]
    alone.check({"output0": torch.zeros(1, 7, 5)}, None)
    with pytest.raises(InputError, match="no output 'rows'"):
        task_of("yolo", outputs=["rows"]).answers({"output0": torch.zeros(1, 7, 5)})
    with pytest.raises(InputError, match="known as boxes; name them in the option outputs"):
        task_of("detr").answers({"logits": scores, "places": boxes})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"head": "rcnn"}, "take one of ssd, detr, yolo, decoded"),
        ({}, "head is None"),
        ({"head": "yolo", "nms": 0.5}, "no option 'nms'"),
        ({"head": "yolo", "metric": "AP75"}, "take AP or AP50"),
        ({"head": "detr"}, "give input_size"),
        ({"head": "yolo", "input_size": 300}, r"give \[channels, height, width\]"),
        ({"head": "ssd", "input_size": SIZE, "background": 0}, "no anchors"),
        ({"head": "ssd", "input_size": SIZE, "anchors": ANCHORS}, "need a column for background"),
        ({"head": "ssd", "input_size": SIZE, "anchors": ANCHORS[:, :3], "background": 0}, r"anchors are \(4, 3\)"),
        ({"head": "ssd", "input_size": SIZE, "anchors": ANCHORS, "background": 0, "code_order": "cxcy"}, "yxhw"),
        ({"head": "detr", "input_size": SIZE, "scores": "relu"}, "take sigmoid or softmax"),
        ({"head": "detr", "input_size": SIZE, "outputs": ["logits"]}, "outputs names 1 answers"),
    ],
)
def test_options_that_do_not_fit_are_said_in_a_sentence(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Detection(NAMES, options)


def test_answers_and_targets_that_do_not_fit_are_said_in_a_sentence() -> None:
    task = task_of("ssd")
    answers = random_answers(task)
    with pytest.raises(InputError, match=r"\(2, 3, 4\), but 4 anchors and 4 score columns need \(n, 4, 4\)"):
        task.check({**answers, "boxes": answers["boxes"][:, :3]}, None)
    with pytest.raises(InputError, match=r"need \(n, 7, any\)"):
        task_of("yolo").check({"boxes": torch.zeros(1, 6, 9)}, None)
    with pytest.raises(InputError, match="all must have the same"):
        task_of("decoded").check(
            {"boxes": torch.zeros(1, 5, 4), "scores": torch.zeros(1, 6), "labels": torch.zeros(1, 6)}, None
        )
    box = [[0, 0, 5, 5]]
    with pytest.raises(InputError, match="a label is 3, but classes are 0 to 2"):
        task.check(answers, task.collate([{"boxes": box, "labels": [3]}, {"boxes": box, "labels": [0]}]))
    with pytest.raises(InputError, match="ends before it begins"):
        task.check(answers, task.collate([{"boxes": [[5, 5, 0, 0]], "labels": [0]}, {"boxes": box, "labels": [0]}]))
    with pytest.raises(InputError, match="2 images have 1 targets"):
        task.check(answers, task.collate([{"boxes": box, "labels": [0]}]))
    with pytest.raises(InputError, match="give a mapping with boxes"):
        task.collate([torch.zeros(4)])


def test_a_mirrored_picture_has_its_boxes_on_the_other_side() -> None:
    task = task_of("yolo")  # 200 columns
    [target] = task.mirrored(task.collate([{"boxes": [[10, 20, 50, 60]], "labels": [1]}]))
    assert target["boxes"].tolist() == [[150, 20, 190, 60]]
    assert target["labels"].tolist() == [1]


def test_anchors_come_from_a_file_too(tmp_path: Path) -> None:
    np.save(tmp_path / "anchors.npy", ANCHORS)
    task = task_of("ssd", anchors=str(tmp_path / "anchors.npy"))
    np.testing.assert_array_equal(task.decoder_arrays["anchors"], ANCHORS.astype(np.float32))
    with pytest.raises(InputError, match="anchors cannot be read"):
        task_of("ssd", anchors=str(tmp_path / "none.npy"))


ONE_BOX = """
import numpy as np

def one_box(outputs, options, arrays):
    return [{"boxes": np.round(row)[None], "scores": [1.0], "labels": [0]} for row in outputs["output"]]
"""
"""Decodes a network that answers the corners of its only box."""


def test_a_decoder_of_the_users_own_is_judged_and_bundled(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(ONE_BOX)
    task = Detection(NAMES, {"decode": f"{file}:one_box"})
    answers = task.answers(torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 4]]))
    targets = task.collate([{"boxes": [[0, 0, 10, 10]], "labels": [0]}] * 2)
    task.check(answers, targets)
    parts = task.parts({name: answer.numpy() for name, answer in answers.items()}, targets)
    assert task.value(parts[:1]) == pytest.approx(1)
    assert task.value(parts) < 0.6
    assert task.decoder == file
    assert task.decoder_options["decode"] == "one_box"
    assert task.divergence(answers, answers).tolist() == [0, 0]
    half = {name: answer * 0.5 for name, answer in answers.items()}
    # Half of the mean square 50 over 4, over the variance 25 of 0, 0, 10, 10.
    assert task.divergence(answers, half)[0] == pytest.approx(0.25 * 50 / 25 / 2)
    assert task.loss(answers, targets).tolist() == [0, 0]
    assert task.surprise(answers, torch.Generator().manual_seed(0)).shape == (2,)
    [result, _] = decoding.decoded(task, {name: answer.numpy() for name, answer in answers.items()}, (3, 20, 20))
    assert result["boxes"].tolist() == [[0, 0, 10, 10]]
    assert json.loads(decoding.line(task, result)) == {"boxes": [[0, 0, 10, 10]], "scores": [1.0], "labels": [0]}
    file.write_text(f"{ONE_BOX}def line(result):\n    return 'one box'\n")
    assert decoding.line(task, result) == "one box"


def test_a_decoder_that_no_bundle_could_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(f"import torch\n{ONE_BOX}")
    with pytest.raises(InputError, match=r"own\.py, which imports torch, but bundles have numpy alone"):
        Detection(NAMES, {"decode": f"{tmp_path / 'own.py'}:one_box"})
    with pytest.raises(InputError, match="no function 'two'"):
        Detection(NAMES, {"decode": f"{tmp_path / 'own.py'}:two"})
    with pytest.raises(InputError, match="decode stands beside head, or in no file"):
        Detection(NAMES, {"decode": 3})


def test_boxes_are_drawn_with_their_colour() -> None:
    picture = Image.new("RGB", (200, 100), "white")
    result = {"boxes": [[50.0, 40.0, 150.0, 90.0]], "scores": [0.93], "labels": [1], "names": ["dog"]}
    drawn = task_of("yolo").draw(picture, result)
    assert drawn.size == picture.size
    pixels = np.asarray(drawn).astype(int)
    assert (pixels[89:91, 60:140] != 255).any()
    assert (pixels[60, 90] == 255).all()  # inside
    assert (np.asarray(picture) == 255).all()  # the picture itself is left alone


def test_the_floor_lets_false_boxes_count() -> None:
    assert 0 < detection_losses.FLOOR < 0.1
    assert detection_heads.SURE < detection_losses.FLOOR
    task = task_of("ssd")
    wanted = {"scores": torch.full((1, 4, 4), -8.0), "boxes": torch.zeros(1, 4, 4)}
    found = {**wanted, "scores": wanted["scores"].clone()}
    found["scores"][0, 0, 1] = 4
    assert float(task.divergence(wanted, found)) > 0.5


class DetectionContract(TaskContract):
    input_size = (3, 100, 200)
    form: str

    def make(self) -> Task:
        return FORMS[self.form]

    def answers(self, count: int, seed: int) -> Answers:
        return random_answers(FORMS[self.form], count, seed)

    def targets(self, count: int, seed: int) -> list[Any]:
        rng = np.random.default_rng(seed)
        corner = rng.uniform(0, 60, (count, 2, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(20, 40, (count, 2, 2))], 2)
        return [{"boxes": each, "labels": rng.integers(0, 3, 2)} for each in boxes]


class SsdContract(DetectionContract):
    def perfect(self, targets: Sequence[Any]) -> Answers:
        """Let every anchor show the object that it overlaps most, and speak for it where it is given to it."""
        head = FORMS[self.form].head
        assert isinstance(head, detection_heads.Ssd)
        anchors = head.anchors.float()
        scores, codes = torch.full((len(targets), 4, 4), -9.0), torch.zeros(len(targets), 4, 4)
        scores[..., 0] = 9.0
        for image, target in enumerate(targets):
            shares = torch.from_numpy(target["boxes"]).float() / torch.tensor([200.0, 100.0, 200.0, 100.0])
            boxes = torch.cat([(shares[:, :2] + shares[:, 2:]) / 2, shares[:, 2:] - shares[:, :2]], 1)
            which = head.assigned(None, image, boxes, torch.from_numpy(target["labels"]))  # type: ignore[arg-type]
            near = boxes[which.clamp(min=0)]
            shift, growth = (near[:, :2] - anchors[:, :2]) / anchors[:, 2:], (near[:, 2:] / anchors[:, 2:]).log()
            codes[image] = torch.cat([shift, growth], 1) / torch.tensor(head.variances)
            for anchor in range(4):
                if which[anchor] >= 0:
                    scores[image, anchor, 0] = -9.0
                    scores[image, anchor, 1 + int(target["labels"][which[anchor]])] = 9.0
        return {"scores": scores, "boxes": codes}


class TestSsdBySigmoid(SsdContract):
    form = "ssd by sigmoid"


class TestSsdBySoftmax(SsdContract):
    form = "ssd by softmax"


class TestDetr(DetectionContract):
    form = "detr"

    def perfect(self, targets: Sequence[Any]) -> Answers:
        corners = torch.stack([torch.from_numpy(each["boxes"]) for each in targets]).float() / torch.tensor(
            [200.0, 100.0, 200.0, 100.0]
        )
        boxes = torch.cat([(corners[..., :2] + corners[..., 2:]) / 2, corners[..., 2:] - corners[..., :2]], 2)
        labels = torch.stack([torch.from_numpy(each["labels"]) for each in targets])
        return {"scores": 20 * torch.nn.functional.one_hot(labels, 4).float(), "boxes": boxes}


class TestYolo(DetectionContract):
    form = "yolo"

    def perfect(self, targets: Sequence[Any]) -> Answers:
        corners = torch.stack([torch.from_numpy(each["boxes"]) for each in targets]).float()
        boxes = torch.cat([(corners[..., :2] + corners[..., 2:]) / 2, corners[..., 2:] - corners[..., :2]], 2)
        labels = torch.stack([torch.from_numpy(each["labels"]) for each in targets])
        return {"boxes": torch.cat([boxes, torch.nn.functional.one_hot(labels, 3).float()], 2).transpose(1, 2)}


class TestDecoded(DetectionContract):
    form = "decoded"

    def perfect(self, targets: Sequence[Any]) -> Answers:
        boxes = torch.stack([torch.from_numpy(each["boxes"]) for each in targets]).float()
        labels = torch.stack([torch.from_numpy(each["labels"]) for each in targets]).float()
        return {"boxes": boxes, "scores": torch.ones(labels.shape), "labels": labels}
