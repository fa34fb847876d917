"""Question: is the AP of an exported detector that of a plain reference, on images few enough to check by hand?

    python benchmarks/ten_images.py runs/bccd

RUN is a search or apply of a detector. Its shipped file answers the first --images test images in its runtime, the
bundle's own decoder says what it found, and three programs judge it: ours, pycocotools, and the plain one below, which
follows COCO's rules in as few lines as they can be said. --show prints true boxes and what was found, with overlaps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from task_files import by_pycocotools

from hirelc_deploy.config import JobConfig
from hirelc_deploy.inputs.data.images import Images
from hirelc_deploy.inputs.data.load import configured_data
from hirelc_deploy.jobs.workplace import open_workplace
from hirelc_deploy.progress import Progress
from hirelc_deploy.tasks.decoding import decoded

RECALLS = np.linspace(0, 1, 101)
Found = Sequence[Mapping[str, Any]]


class First:
    """The first images of a split."""

    def __init__(self, images: Images, count: int) -> None:
        self._images, self._count = images, min(count, len(images))

    def __len__(self) -> int:
        return self._count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._images, name)


def overlap(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Return the intersection of two boxes over their union."""
    width, height = np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])
    both = max(width, 0.0) * max(height, 0.0)
    return float(both / (np.prod(first[2:] - first[:2]) + np.prod(second[2:] - second[:2]) - both))


def plain_ap(found: Found, true: Found, label: int, least: float) -> float | None:
    """Return the average precision of one class where boxes must overlap so far; None where it is nowhere."""
    boxes = [np.asarray(image["boxes"], float)[np.asarray(image["labels"]) == label] for image in true]
    said = [
        (float(score), number, np.asarray(box, float))
        for number, image in enumerate(found)
        for box, score, told in zip(image["boxes"], image["scores"], image["labels"], strict=True)
        if told == label
    ]
    taken = [np.zeros(len(each), bool) for each in boxes]
    right = []
    for _, number, box in sorted(said, key=lambda one: -one[0]):
        overlaps = [0.0 if taken[number][k] else overlap(box, other) for k, other in enumerate(boxes[number])]
        best = int(np.argmax(overlaps)) if overlaps else 0
        right.append(bool(overlaps) and overlaps[best] >= least)
        if right[-1]:
            taken[number][best] = True
    count = sum(len(each) for each in boxes)
    if not count:
        return None
    hits = np.cumsum(right)
    precision, recall = hits / np.arange(1, len(right) + 1), hits / count
    return float(np.mean([precision[recall >= level].max(initial=0.0) for level in RECALLS]))


def main() -> int:
    """Print what the three programs say; exit code 1 where they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=int, default=10)
    parser.add_argument("--show", type=int, default=0, metavar="N", help="images whose boxes are printed")
    options = parser.parse_args()
    config = JobConfig.read(options.run / "config.toml")
    workplace = open_workplace(config, options.run, "", Progress(quiet=True))
    with workplace.run:
        pipeline = workplace.pipeline
        task, size = pipeline.task, pipeline.data.preprocess.input_size
        test = First(configured_data(config).preprocessed(pipeline.data.preprocess).take_test(), options.images)
        file = options.run / "bundle" / "model.onnx"
        rows = np.arange(len(test))
        outputs = pipeline.backend.build(file, 2).infer(test.batch(rows).numpy())
        true = [{name: value.numpy() for name, value in target.items()} for target in test.targets(rows)]
        found = decoded(task, outputs, size, {"score_threshold": 0.001})
        ours = task.value(task.parts(outputs, task.collate(test.targets(rows))))
        theirs = by_pycocotools(pipeline, file, test)[task.metric.name]
    levels = [0.5] if task.metric.name == "AP50" else np.arange(0.5, 1.0, 0.05).round(2).tolist()
    each = [plain_ap(found, true, label, level) for label in range(len(task.classes)) for level in levels]
    plain = float(np.mean([value for value in each if value is not None]))
    for number in range(min(options.show, len(true))):
        for box, label in zip(true[number]["boxes"], true[number]["labels"], strict=True):
            near = [
                (round(overlap(np.asarray(other, float), box), 2), round(float(score), 2))
                for other, score, told in zip(*(found[number][k] for k in ("boxes", "scores", "labels")), strict=True)
                if told == label and overlap(np.asarray(other, float), box) >= 0.3
            ]
            print(
                f"image {number}, {task.classes[label]} at {box.round().astype(int).tolist()}: (overlap, score) {near}"
            )
    print(f"{len(true)} images, {task.metric.name}: ours {ours:.6f}, pycocotools {theirs:.6f}, plain {plain:.6f}")
    return 0 if np.allclose([theirs, plain], ours, atol=1e-6) else 1


if __name__ == "__main__":
    sys.exit(main())
