"""In: nothing. Out: for each task a network of a few thousand weights, trained on pictures that are made here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from hirelc_deploy import api
from hirelc_deploy.inputs.data.splits import Data
from hirelc_deploy.jobs import workplace
from hirelc_deploy.tasks.contract import Task
from hirelc_deploy.tasks.registry import make_task
from hirelc_deploy.testing.fake_backend import FakeBackend

SIDE = 16
COUNTS = {"train": 160, "test": 48}
COLOURS = ((230, 30, 30), (30, 30, 230), (30, 230, 30))

Item = tuple[Tensor, Any]
Outputs = Mapping[str, NDArray[np.float32]]


class Items:
    """A data set of Python: a length, and pairs of a uint8 picture (3, h, w) and its target."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = list(items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> Item:
        return self.items[row]


Splits = dict[str, Items]


@dataclass(frozen=True)
class Case:
    """A task with what it needs to be walked from the training to the bundle.

    Attributes:
        metric: What the result calls it.
        made: Makes a picture and its target.
        by_hand: The metric of outputs and targets, by code that has nothing from the product.
        on_disk: Writes the splits as a format and returns what `--data` says; None for Python data sets.
        limit: The drop that is allowed.
        classes: Names that the user gives to Python data sets.
        known: Names that the result has; `classes` where nothing else is said.
    """

    task: str
    metric: str
    net: Callable[[], nn.Module]
    made: Callable[[np.random.Generator], Item]
    by_hand: Callable[[Outputs, Sequence[Any]], float]
    limit: float
    on_disk: Callable[[Splits, Path], str] | None = None
    classes: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    known: tuple[str, ...] = ()
    steps: int = 70

    def splits(self) -> Splits:
        """Return the pictures of all splits, always the same."""
        rng = np.random.default_rng(0)
        return {split: Items([self.made(rng) for _ in range(count)]) for split, count in COUNTS.items()}

    def data(self, splits: Splits, folder: Path) -> str | Splits | Data:
        """Return the data as a job takes them."""
        return splits if self.on_disk is None else self.on_disk(splits, folder)

    def trained(self, splits: Splits) -> nn.Module:
        """Return the network after its training by the loss of its task: a second or two."""
        task = make_task(self.task, self.known or self.classes, {"input_size": [3, SIDE, SIDE], **self.options})
        torch.manual_seed(0)
        return train(self.net(), splits["train"], task, self.steps)


def train(net: nn.Module, data: Items, task: Task, steps: int) -> nn.Module:
    """Return the network after some steps of Adam over batches of 32."""
    pictures = torch.stack([picture for picture, _ in data.items]).float() / 255
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(data), (32,), generator=generator)
        targets = task.collate([data.items[row][1] for row in rows])
        loss = task.loss(task.answers(net(pictures[rows])), targets).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def on_fake_device(patch: pytest.MonkeyPatch, cache: Path) -> None:
    """Let jobs of this process run on the fake device, whose times are simulated and always the same."""
    for module in (workplace, api):
        patch.setattr(module, "open_target", lambda target: FakeBackend())
    patch.setenv("HIRELC_DEPLOY_CACHE", str(cache))


# Pictures


def noise(rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return a dark picture (h, w, 3)."""
    return rng.integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8)


def square(rng: np.random.Generator, least: int = 5, most: int = 9) -> tuple[int, int, int, int]:
    """Return the corners x0, y0, x1, y1 of a square inside the picture."""
    side = int(rng.integers(least, most))
    x, y = (int(place) for place in rng.integers(0, SIDE - side + 1, 2))
    return x, y, x + side, y + side


def tensor_of(picture: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(picture.transpose(2, 0, 1).copy())


def with_mask(rng: np.random.Generator) -> Item:
    picture, mask = noise(rng), np.zeros((SIDE, SIDE), np.uint8)
    for number, ink in enumerate(COLOURS[:2], 1):
        x0, y0, x1, y1 = square(rng)
        picture[y0:y1, x0:x1], mask[y0:y1, x0:x1] = ink, number
    return tensor_of(picture), mask


def with_boxes(rng: np.random.Generator) -> Item:
    picture, boxes, labels = noise(rng), [], []
    for label in rng.permutation(2)[: rng.integers(1, 3)]:
        x0, y0, x1, y1 = square(rng)
        picture[y0:y1, x0:x1] = COLOURS[label]
        if boxes and abs(boxes[0][0] - x0) < 6 and abs(boxes[0][1] - y0) < 6:  # hidden by this one
            boxes, labels = [], []
        boxes.append([float(x0), float(y0), float(x1), float(y1)])
        labels.append(int(label))
    return tensor_of(picture), {"boxes": torch.tensor(boxes), "labels": torch.tensor(labels)}


def with_numbers(rng: np.random.Generator) -> Item:
    """Two halves; how red and how blue they are on average is to be told."""
    red, blue = rng.random(2)
    picture = noise(rng)
    picture[:, : SIDE // 2, 0] = 40 + 200 * red
    picture[:, SIDE // 2 :, 2] = 40 + 200 * blue
    return tensor_of(picture), torch.tensor([red, blue], dtype=torch.float32)


def with_map(rng: np.random.Generator) -> Item:
    """Metres: near things are bright."""
    picture = noise(rng)
    depth = np.full((SIDE, SIDE), 5.0, np.float32)
    for _ in range(2):
        x0, y0, x1, y1 = square(rng)
        near = rng.random()
        picture[y0:y1, x0:x1] = 100 + 150 * near
        depth[y0:y1, x0:x1] = 4.0 - 3.0 * near
    return tensor_of(picture), torch.from_numpy(depth)


def with_labels(rng: np.random.Generator) -> Item:
    picture, there = noise(rng), rng.random(3) < 0.5
    for number in np.flatnonzero(there):
        x0, y0, x1, y1 = square(rng, 4, 6)
        picture[y0:y1, x0:x1] = np.maximum(picture[y0:y1, x0:x1], COLOURS[number])
    return tensor_of(picture), torch.from_numpy(there.astype(np.float32))


def with_points(rng: np.random.Generator) -> Item:
    """A red and a blue dot; the blue one is missing in one of five pictures."""
    picture, points = noise(rng), np.zeros((2, 3), np.float32)
    for number, place in enumerate(rng.permutation((SIDE - 6) ** 2)[:2]):
        if number and rng.random() < 0.2:
            continue
        y, x = divmod(int(place), SIDE - 6)
        picture[y + 2 : y + 5, x + 2 : x + 5] = COLOURS[number]
        points[number] = x + 3, y + 3, 1
    return tensor_of(picture), torch.from_numpy(points)


def with_class(rng: np.random.Generator) -> Item:
    """Stripes across or down, red or blue."""
    label, picture = int(rng.integers(4)), noise(rng)
    ink, start = COLOURS[label // 2], int(rng.integers(4))
    lines = np.arange(start, SIDE, 4)
    if label % 2:
        picture[lines] = ink
    else:
        picture[:, lines] = ink
    return tensor_of(picture), label


# Networks


def dense(outputs: int) -> nn.Module:
    """Answers at every pixel."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, outputs, 3, padding=1),
    )


def pooled(outputs: int) -> nn.Module:
    """Answers once for each picture, of what lies in its two halves."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d((1, 2)),
        nn.Flatten(),
        nn.Linear(64, outputs),
    )


class DepthNet(nn.Module):
    """Answers (n, h, w) metres."""

    def __init__(self) -> None:
        super().__init__()
        self.body = dense(1)

    def forward(self, x: Tensor) -> Tensor:
        return 5 * self.body(x)[:, 0].sigmoid()


CELLS = SIDE // 2
CENTRES = (np.arange(CELLS) + 0.5) / CELLS
ANCHORS = np.array([[x, y, 6.5 / SIDE, 6.5 / SIDE] for y in CENTRES for x in CENTRES], np.float32)


class BoxNet(nn.Module):
    """One anchor for each cell of 2 x 2 pixels; a background and two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
        )
        self.classes, self.codes = nn.Conv2d(32, 3, 3, padding=1), nn.Conv2d(32, 4, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.body(x)
        return {
            "cls_logits": self.classes(x).flatten(2).transpose(1, 2),
            "bbox_regression": self.codes(x).flatten(2).transpose(1, 2),
        }


# Metrics, slow and obvious


def only(outputs: Outputs) -> NDArray[np.float32]:
    [found] = outputs.values()
    return found


def mean_iou(outputs: Outputs, targets: Sequence[Any]) -> float:
    found, truth = only(outputs).argmax(1), np.stack(targets)
    pairs = [((found == k) & (truth == k), (found == k) | (truth == k)) for k in range(3)]
    return float(np.mean([both.sum() / either.sum() for both, either in pairs]))


def rmse(outputs: Outputs, targets: Sequence[Any]) -> float:
    return float(np.sqrt(np.mean((only(outputs) - np.stack([np.asarray(t) for t in targets])) ** 2)))


def mean_ap(outputs: Outputs, targets: Sequence[Any]) -> float:
    """Of each label the mean, over the pictures that have it, of the precision among those that score no less."""
    each = []
    for scores, truth in zip(only(outputs).T, np.stack([np.asarray(t) for t in targets]).T > 0.5, strict=True):
        each.append(np.mean([truth[scores >= score].mean() for score in scores[truth]]))
    return float(np.mean(each))


def pck(outputs: Outputs, targets: Sequence[Any]) -> float:
    """Share of visible points that are at most a tenth of the side away."""
    hits = []
    for maps, points in zip(only(outputs), targets, strict=True):
        for heat, (x, y, visible) in zip(maps, np.asarray(points), strict=True):
            row, column = np.unravel_index(heat.argmax(), heat.shape)
            place = [float(column), float(row)]
            if 0 < column < SIDE - 1:
                place[0] += 0.25 * np.sign(heat[row, column + 1] - heat[row, column - 1])
            if 0 < row < SIDE - 1:
                place[1] += 0.25 * np.sign(heat[row + 1, column] - heat[row - 1, column])
            if visible:
                hits.append(np.hypot(place[0] - x, place[1] - y) <= 0.1 * SIDE)
    return float(np.mean(hits))


def recall_at_1(outputs: Outputs, targets: Sequence[Any]) -> float:
    vectors = only(outputs) / np.linalg.norm(only(outputs), axis=1, keepdims=True)
    cosines = vectors @ vectors.T - 2 * np.eye(len(vectors))
    return float(np.mean([targets[row] == targets[near] for row, near in enumerate(cosines.argmax(1))]))


def coco_ap(outputs: Outputs, targets: Sequence[Any]) -> float:
    """AP by pycocotools, of the boxes that the codes mean: centres and sizes relative to the anchors."""
    codes, logits = outputs["bbox_regression"] * [0.1, 0.1, 0.2, 0.2], outputs["cls_logits"]
    scores = np.exp(logits - logits.max(2, keepdims=True))  # so: integer logits tie, and rounding breaks the ties
    scores /= scores.sum(2, keepdims=True)
    centres = (codes[..., :2] * ANCHORS[:, 2:] + ANCHORS[:, :2]) * SIDE
    sizes = np.exp(codes[..., 2:]) * ANCHORS[:, 2:] * SIDE
    corners = np.concatenate([centres - sizes / 2, centres + sizes / 2], 2)
    found = []
    for image, boxes in enumerate(corners):
        for label in (0, 1):
            chances = scores[image, :, label + 1]
            kept: list[NDArray[Any]] = []
            for place in np.argsort(-chances, kind="stable"):
                if chances[place] >= 0.001 and all(overlap(boxes[place], other) <= 0.6 for other in kept):
                    kept.append(boxes[place])
                    found.append((image, label, float(chances[place]), boxes[place].clip(0, SIDE)))
    truths = [
        (image, int(label), np.asarray(box))
        for image, target in enumerate(targets)
        for box, label in zip(target["boxes"], target["labels"], strict=True)
    ]
    return evaluated_by_coco(truths, found, len(targets), 2)


def overlap(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Return the shared area of two boxes over that of both."""
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    shared = float(np.prod(sides.clip(0)))
    return shared / float(np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2]) - shared)


def evaluated_by_coco(truths: Sequence[Any], found: Sequence[Any], images: int, classes: int) -> float:
    """Return pycocotools' AP of (image, label, score, corners) against (image, label, corners)."""
    coco, cocoeval = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    wide = [(image, label, [*box[:2], *(box[2:] - box[:2])]) for image, label, box in truths]
    truth = coco.COCO()
    truth.dataset = {
        "images": [{"id": image + 1} for image in range(images)],
        "categories": [{"id": label + 1} for label in range(classes)],
        "annotations": [
            {
                "id": number,
                "image_id": image + 1,
                "category_id": label + 1,
                "bbox": list(map(float, box)),
                "area": float(box[2] * box[3]),
                "iscrowd": 0,
            }
            for number, (image, label, box) in enumerate(wide, 1)
        ],
    }
    truth.createIndex()
    rows = [[image + 1, *box[:2], *(box[2:] - box[:2]), score, label + 1] for image, label, score, box in found]
    judge = cocoeval.COCOeval(truth, truth.loadRes(np.array(rows)), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    return float(judge.stats[0])


# Formats on the disk


def write_pictures(items: Items, folder: Path) -> None:
    folder.mkdir(parents=True)
    for number, (picture, _) in enumerate(items.items):
        Image.fromarray(picture.numpy().transpose(1, 2, 0)).save(folder / f"{number:03}.png")


def as_masks(splits: Splits, folder: Path) -> str:
    for split, items in splits.items():
        write_pictures(items, folder / split)
        (folder / f"{split}annot").mkdir()
        for number, (_, mask) in enumerate(items.items):
            Image.fromarray(mask).save(folder / f"{split}annot" / f"{number:03}.png")
    (folder / "classes.txt").write_text("background\nred\nblue\n")
    return f"masks:{folder}"


def as_coco(splits: Splits, folder: Path) -> str:
    for split, items in splits.items():
        write_pictures(items, folder / split)
        annotations: list[dict[str, Any]] = []
        for image, (_, target) in enumerate(items.items):
            for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
                width, height = box[2] - box[0], box[3] - box[1]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image,
                        "category_id": label + 1,
                        "bbox": [*box[:2], width, height],
                        "area": width * height,
                        "iscrowd": 0,
                    }
                )
        content = {
            "images": [
                {"id": image, "file_name": f"{image:03}.png", "width": SIDE, "height": SIDE}
                for image in range(len(items))
            ],
            "annotations": annotations,
            "categories": [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}],
        }
        (folder / f"{split}.json").write_text(json.dumps(content))
    return f"coco:{folder}"


SSD = {"head": "ssd", "anchors": ANCHORS, "scores": "softmax", "background": 0}

CASES = (
    Case(
        *("segmentation", "mIoU", lambda: dense(3), with_mask, mean_iou, 20.0),
        on_disk=as_masks,
        known=("background", "red", "blue"),
    ),
    Case(
        *("detection", "AP", BoxNet, with_boxes, coco_ap, 30.0),
        on_disk=as_coco,
        known=("red", "blue"),
        options=SSD,
        steps=100,
    ),
    Case(*("regression", "RMSE", lambda: pooled(2), with_numbers, rmse, 0.1), classes=("red", "blue"), name="numbers"),
    Case(*("regression", "RMSE", DepthNet, with_map, rmse, 0.5), name="depth", options={"unit": "m"}, steps=120),
    Case(
        *("multilabel", "mAP", lambda: pooled(3), with_labels, mean_ap, 20.0),
        classes=("red", "blue", "green"),
        steps=40,
    ),
    Case(
        *("keypoints", "PCK@0.1", lambda: dense(2), with_points, pck, 20.0),
        classes=("nose", "tail"),
        options={"pck": 0.1},
        steps=40,
    ),
    Case(
        *("embedding", "recall@1", lambda: pooled(8), with_class, recall_at_1, 20.0),
        classes=("red down", "red across", "blue down", "blue across"),
        steps=12,
    ),
)
CASE_NAMES = [case.name or case.task for case in CASES]
