"""In: nothing. Out: tasks, data, metrics and Python calls that cannot be carried out, and the answer each must get.

As in `bad_input_cases`, beside calls of Python, whose error must be the sentence that the command line would print.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bad_input_cases import (
    Answer,
    Bomb,
    Case,
    apply,
    begun_run,
    contents,
    shown_warnings,
    text,
    write_arrays,
)
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import hirelc_deploy
from hirelc_deploy.errors import HirelcError
from hirelc_deploy.plan import CompressionPlan

NETS = """
import torch
from torch import nn

def net(*head, width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, width, 3, 1, 1), nn.ReLU(), *head)

def pooled(outputs): return net(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, outputs))

def two(): return pooled(2)
def three(): return pooled(3)
def one(): return pooled(1)
def eighty(): return pooled(80)
def pixels(classes=3): return net(nn.Conv2d(8, classes, 1))
def points(count=2): return nn.Sequential(pooled(2 * count), nn.Unflatten(1, (count, 2)))

class Named(nn.Module):
    def __init__(self, **heads):
        super().__init__()
        self.body, self.heads = net(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.ModuleDict(heads)
    def forward(self, images):
        features = self.body(images)
        return {name: head(features) for name, head in self.heads.items()}

def dictionary(): return Named(logits=nn.Linear(8, 2), boxes=nn.Linear(8, 4))

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 8)
    def forward(self, images, mask): return self.conv(images).flatten(1) * mask

def detector(anchors=4, classes=2, size=(3, 8, 8), given=None, **options):
    rows = lambda k: nn.Sequential(nn.Linear(8, anchors * k), nn.Unflatten(1, (anchors, k)))
    model = Named(scores=rows(classes), boxes=rows(4))
    boxes = [[0.25 + 0.5 * (k % 2), 0.25 + 0.5 * (k // 2), 0.5, 0.5] for k in range(given or anchors)]
    model.task_options = {"task": "detection", "head": "ssd", "anchors": boxes, "scores": "sigmoid", **options}
    model.pretrained_cfg = {"input_size": size, "mean": (0.0,), "std": (1.0,)}
    return model

def fixed_size(): return detector(input_size=[3, 8, 8])
def without_anchors():
    model = detector()
    del model.task_options["anchors"]
    return model
def other_anchors(): return detector(given=3)
def unknown_head(): return detector(head="sdd")
def other_order():
    model = two()
    model.class_names = ("dog", "cat")
    return model
"""


def built(name: str, **arguments: Any) -> Any:
    """Return a network of NETS."""
    space: dict[str, Any] = {}
    exec(NETS, space)
    return space[name](**arguments)


METRICS = """
import torch

def fine(outputs, targets): return (outputs.argmax(1) == targets).float()
def raises(outputs, targets): raise RuntimeError("no such column")
def nan(outputs, targets): return float("nan")
def none(outputs, targets): return None
def words(outputs, targets): return "0.9"
def short(outputs, targets): return (outputs.argmax(1) == targets).float()[:-1]
def percent(outputs, targets): return 100 * (outputs.argmax(1) == targets).float().mean()
def per_class(outputs, targets): return {"cat": 0.5, "dog": 0.7}
def no_arguments(): return 0.5
number = 7

def detached(outputs, targets): return torch.nn.functional.cross_entropy(outputs.detach(), targets)
def no_number(outputs, targets): return torch.nn.functional.cross_entropy(outputs, targets) * float("nan")
def sum_of_pairs(outputs, targets): return outputs
class Meter:
    def reset(self): self.seen = 0
    def update(self, outputs, targets): self.seen += self.total
    def compute(self): return self.seen
meter = Meter()
"""


@dataclass(frozen=True)
class Call:
    """One call of Python that must raise, run in a folder that `prepare` has filled; see `Case`."""

    name: str
    call: Callable[[], object]
    words: tuple[str, ...]
    prepare: Callable[[Path], None] = lambda folder: None
    keeps_run: bool = False
    code: int = 2


def attempt_call(call: Call, folder: Path) -> Answer:
    """Carry a call out in `folder`; what it raises is shown as the command line would."""
    folder.mkdir(parents=True, exist_ok=True)
    write_arrays(folder / "data.npz")
    nets(folder)
    call.prepare(folder)
    here, kept, before = Path.cwd(), dict(os.environ), contents(folder)
    out, err, code = io.StringIO(), io.StringIO(), 0
    os.environ["HIRELC_DEPLOY_CACHE"] = str(folder / "cache")
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), shown_warnings():
            try:
                call.call()
            except HirelcError as error:
                code = error.exit_code
                print(f"hirelc-deploy: {error}", file=err)
            except Exception:  # what must not happen
                code = 1
                traceback.print_exc(file=err)
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ.update(kept)
    return Answer(code, out.getvalue(), err.getvalue(), before, contents(folder))


# What the commands meet


def nets(folder: Path) -> None:
    (folder / "nets.py").write_text(NETS)
    (folder / "metrics.py").write_text(METRICS)


def case(name: str, argv: list[str], words: tuple[str, ...], *prepare: Callable[[Path], object], **more: Any) -> Case:
    """Return a case whose folder has nets.py and metrics.py too."""

    def everything(folder: Path) -> None:
        nets(folder)
        for one in prepare:
            one(folder)

    return Case(name, argv, words, prepare=everything, **more)


def pixels(index: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (side, side, 3), dtype=np.uint8)


def save(file: Path, values: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(file)


def photos(folder: Path, count: int = 40, suffix: str = "png") -> None:
    for index in range(count):
        save(folder / f"images/{index:02}.{suffix}", pixels(index))


def coco(change: Callable[[dict[str, Any]], object] = lambda value: None, **top: Any) -> Callable[[Path], None]:
    """Return what writes 40 pictures with a box each, and set.json; `change` is done to its content."""

    def write(folder: Path) -> None:
        photos(folder)
        value: dict[str, Any] = {
            "images": [{"id": k, "file_name": f"{k:02}.png", "width": 8, "height": 8} for k in range(40)],
            "categories": [{"id": 1, "name": "cat"}, {"id": 5, "name": "dog"}],
            "annotations": [
                {"id": k, "image_id": k, "category_id": (1, 5)[k % 2], "bbox": [1, 1, 4, 4]} for k in range(40)
            ],
            **top,
        }
        change(value)
        (folder / "set.json").write_text(json.dumps(value))

    return write


def annotation(**changes: Any) -> Callable[[Path], None]:
    """Return what writes a COCO file of which annotation 17 is otherwise."""
    return coco(lambda value: value["annotations"][17].update(changes))


def yolo(line: str = "0 0.5 0.5 0.2 0.2", lines: str | None = None) -> Callable[[Path], None]:
    """Return what writes a YOLO folder; `line` is that of picture 17, `lines` of all others."""

    def write(folder: Path) -> None:
        for index in range(40):
            save(folder / f"set/images/train/{index:02}.png", pixels(index))
            file = folder / f"set/labels/train/{index:02}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            usual = f"{index % 2} 0.5 0.5 0.5 0.5" if lines is None else lines
            file.write_text(f"{line if index == 17 else usual}\n")
        (folder / "set/data.yaml").write_text("train: images/train\nnames: [cat, dog]\n")

    return write


def voc(content: str | None = None) -> Callable[[Path], None]:
    """Return what writes a VOC folder; `content` is that of file 17."""

    def write(folder: Path) -> None:
        for index in range(40):
            save(folder / f"set/JPEGImages/{index:02}.png", pixels(index))
            whole = (
                "<annotation><size><width>8</width><height>8</height></size><object><name>cat</name><bndbox>"
                "<xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox></object><object><name>dog</name>"
                "<bndbox><xmin>2</xmin><ymin>2</ymin><xmax>8</xmax><ymax>8</ymax></bndbox></object></annotation>"
            )
            file = folder / f"set/Annotations/{index:02}.xml"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content if content is not None and index == 17 else whole)

    return write


def masks(
    values: np.ndarray | None = None, names: str = "a\nb\nc\n", every: np.ndarray | None = None
) -> Callable[[Path], None]:
    """Return what writes pictures with masks; `values` is the mask of picture 17, `every` those of all."""

    def write(folder: Path) -> None:
        for index in range(40):
            save(folder / f"set/images/{index:02}.png", pixels(index))
            usual = every if every is not None else np.random.default_rng(index).integers(0, 3, (8, 8), dtype=np.uint8)
            save(folder / f"set/masks/{index:02}.png", values if values is not None and index == 17 else usual)
        (folder / "set/classes.txt").write_text(names)

    return write


def table(*changes: str, header: str = "path,label", row: Callable[[int], str] | None = None) -> Callable[[Path], None]:
    """Return what writes set.csv of 40 pictures, with more lines below."""

    def write(folder: Path) -> None:
        photos(folder)
        lines = [row(k) if row else f"images/{k:02}.png,{'cat' if k % 2 else 'dog'}" for k in range(40)]
        (folder / "set.csv").write_text("\n".join([header, *lines, *changes]) + "\n")

    return write


def spoiled_photo(content: Callable[[bytes], bytes], suffix: str = "png") -> Callable[[Path], None]:
    """Return what writes class folders in which one picture is not whole."""

    def write(folder: Path) -> None:
        for index in range(60):
            place = f"photos/{'train' if index < 40 else 'test'}/{('cat', 'dog')[index % 2]}"
            save(folder / f"{place}/{index:02}.{suffix}", pixels(index, 32))
        file = folder / f"photos/test/dog/57.{suffix}"
        file.write_bytes(content(file.read_bytes()))

    return write


def hugging_face(**changes: Any) -> Callable[[Path], None]:
    """Return what writes a folder of transformers without weights."""

    def write(folder: Path) -> None:
        (folder / "vit").mkdir()
        config = {"architectures": ["ViTForImageClassification"], "model_type": "vit", "hidden_size": 8, **changes}
        (folder / "vit/config.json").write_text(json.dumps(config))

    return write


def detection(*more: str, **changes: str | None) -> list[str]:
    return apply(*more, **{"model": "nets.py:detector", "data": "coco:set.json", **changes})


def tasked(task: str, *more: str, **changes: str | None) -> list[str]:
    return apply(*more, **{"model": "nets.py:two", "task": task, **changes})


def judged(metric: str, *more: str, **changes: str | None) -> list[str]:
    return apply("--metric", f"metrics.py:{metric}", *more, **{"model": "nets.py:two", **changes})


def trained(loss: str, **changes: str | None) -> list[str]:
    return apply("--loss", f"metrics.py:{loss}", **{"model": "nets.py:two", "recovery_epochs": "1", **changes})


# Data sets of Python


class Items:
    """A data set of float images with targets; some items are otherwise.

    Args:
        target: Makes the target of an item.
        others: Number of an item to what it is, which is called where it can be.
    """

    def __init__(
        self,
        target: Callable[[int], Any],
        others: Mapping[int, Any] | None = None,
        count: int = 64,
        picture: bool = False,
    ) -> None:
        self.target, self.others, self.count, self.picture = target, others or {}, count, picture

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        if index in self.others:
            other = self.others[index]
            return other() if callable(other) else other
        return pixels(index) if self.picture else image(index), self.target(index)


class Endless:
    def __len__(self) -> int:
        raise OverflowError("no end")

    def __getitem__(self, index: int) -> Any:
        return image(index), 0


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Has no length."""

    def __iter__(self) -> Any:
        return iter([(image(0), 0)])


def image(index: int = 0, *shape: int) -> Tensor:
    return torch.rand(shape or (3, 8, 8), generator=torch.Generator().manual_seed(index))


def label(index: int) -> int:
    return index % 2


def splits(target: Callable[[int], Any] = label, others: Mapping[int, Any] | None = None, count: int = 64) -> Any:
    """Return a train split with other items, and a test split without."""
    return {"train": Items(target, others, count), "test": Items(target, count=20)}


def in_the_test(target: Callable[[int], Any] = label, others: Mapping[int, Any] | None = None) -> Any:
    """Return a train split, and a test split with other items."""
    return {"train": Items(target), "test": Items(target, others, count=20)}


def failing() -> None:
    raise OSError("the share is gone")


def boxes(*corners: Sequence[float], labels: Sequence[int] | None = None) -> dict[str, Any]:
    numbers = [0] * len(corners) if labels is None else labels
    return {"boxes": torch.tensor(corners, dtype=torch.float32).reshape(-1, 4), "labels": torch.tensor(numbers)}


def a_box(index: int) -> dict[str, Any]:
    return boxes([1, 1, 5, 5], labels=[index % 2])


def done(model: Any, data: Any, **options: Any) -> Callable[[], object]:
    """Return a call of `apply` with a net of NETS, or with what is no name of one."""

    def call() -> object:
        net = built(model) if isinstance(model, str) else model
        given: dict[str, Any] = {"out": "out", "recovery_epochs": 0, **options}
        plan = given.pop("plan", "uniform:keep=0.5")
        return hirelc_deploy.apply(net, data() if callable(data) else data, plan, **given)

    return call


def searched(model: Any, data: Any, **options: Any) -> Callable[[], object]:
    def call() -> object:
        net = built(model) if isinstance(model, str) else model
        return hirelc_deploy.search(net, data, **{"out": "out", "recovery_epochs": 0, "trials": 1, **options})

    return call


def detecting(others: Mapping[int, Any] | None = None, target: Callable[[int], Any] = a_box, **options: Any) -> Any:
    return done(lambda: built("detector"), splits(target, others), classes=("cat", "dog"), **options)


def plugged(place: str) -> Callable[[], object]:
    """Return a call with a task that a package of somebody else's brings."""

    def call() -> object:
        package = Path("plugged-1.dist-info")
        package.mkdir()
        (package / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1\n")
        (package / "entry_points.txt").write_text(f"[hirelc_deploy.tasks]\nplugged = {place}\n")
        Path("plugged_task.py").write_text(
            "def broken(classes, options): raise OSError('no such sensor')\ndef empty(classes, options): return 7\n"
        )
        sys.path.insert(0, str(Path.cwd()))
        try:
            return done("two", splits(), task="plugged")()
        finally:
            sys.path.pop(0)
            sys.modules.pop("plugged_task", None)
            for file in (*package.iterdir(), Path("plugged_task.py")):
                file.unlink()
            package.rmdir()

    return call


def item(target: Any) -> dict[int, Any]:
    return {17: (image(17), target)}


NAN = float("nan")

BOXES = [
    case("COCO box outside its picture", detection(), ("annotation 17", "outside"), annotation(bbox=[6, 6, 9, 9])),
    case("COCO box with NaN", detection(), ("annotation 17", "NaN"), annotation(bbox=[1, NAN, 2, 2])),
    case("COCO box of three numbers", detection(), ("annotation 17", "bbox"), annotation(bbox=[1, 2, 3])),
    case("COCO box of negative width", detection(), ("annotation 17", "ends before"), annotation(bbox=[5, 5, -3, 2])),
    case(
        "COCO file cut short",
        detection(),
        ("set.json", "not valid JSON"),
        coco(),
        lambda f: (f / "set.json").write_text((f / "set.json").read_text()[:-40]),
    ),
    case(
        "COCO annotation of a picture that is not listed",
        detection(),
        ("annotation 17", "99", "not listed"),
        annotation(image_id=99),
    ),
    case(
        "COCO picture that is not there",
        detection(),
        ("17.png", "not there"),
        coco(),
        lambda f: (f / "images/17.png").unlink(),
    ),
    case("COCO annotation of a list of pictures", detection(), ("annotation 17", "[1]"), annotation(image_id=[1])),
    case("COCO category that is not listed", detection(), ("annotation 17", "category 3"), annotation(category_id=3)),
    case("COCO without annotations", detection(), ("no image", "a box"), coco(annotations=[])),
    case("COCO without categories", detection(), ("categories",), coco(categories=[])),
    case("COCO without images", detection(), ("images are empty",), coco(images=[])),
    case(
        "COCO sizes of other pictures",
        detection(),
        ("00.png", "8 x 8"),
        coco(lambda v: [i.update(width=16) for i in v["images"]]),
    ),
    case(
        "COCO annotations that are crowds only",
        detection(),
        ("no image", "crowd"),
        coco(lambda v: [a.update(iscrowd=1) for a in v["annotations"]]),
    ),
    case(
        "YOLO line of four numbers",
        detection(data="yolo:set"),
        ("17.txt", "line 1", "4 numbers"),
        yolo("0 0.5 0.5 0.2"),
    ),
    case("YOLO class 99", detection(data="yolo:set"), ("17.txt", "line 1", "99"), yolo("99 0.5 0.5 0.2 0.2")),
    case("YOLO values in pixels", detection(data="yolo:set"), ("17.txt", "line 1", "outside"), yolo("0 4 4 2 2")),
    case(
        "YOLO text that is no numbers",
        detection(data="yolo:set"),
        ("17.txt", "line 1", "numbers"),
        yolo("cat 0.5 0.5 0.2 0.2"),
    ),
    case("YOLO files that are all empty", detection(data="yolo:set"), ("no image", "a box"), yolo("", "")),
    case(
        "YOLO folder without names",
        detection(data="yolo:set"),
        ("names",),
        yolo(),
        lambda f: (f / "set/data.yaml").unlink(),
    ),
    case("VOC file that is no XML", detection(data="voc:set"), ("17.xml", "XML"), voc("<annotation><object>")),
    case(
        "VOC file without a size and with a box outside",
        detection(data="voc:set"),
        ("17.xml", "outside", "8 x 8"),
        voc(
            "<annotation><object><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>50</xmax><ymax>5</ymax></bndbox></object></annotation>"
        ),
    ),
    case(
        "VOC object without a box",
        detection(data="voc:set"),
        ("17.xml", "object 0", "bndbox"),
        voc("<annotation><object><name>cat</name></object></annotation>"),
    ),
    case("detection data for a classifier", detection(model="nets.py:two"), ("head",), coco()),
    case("detector without anchors", detection(model="nets.py:without_anchors"), ("anchors",), coco()),
    case(
        "anchors of another number than the answers", detection(model="nets.py:other_anchors"), ("3 anchors",), coco()
    ),
    case("unknown head", detection(model="nets.py:unknown_head"), ("'sdd'", "ssd"), coco()),
    case("detector of other classes", detection("--model-arg", "classes=80"), ("2",), coco()),
    case(
        "input size that contradicts the detector's own",
        detection(model="nets.py:fixed_size", input_size="3,16,16"),
        ("(3, 8, 8)", "(3, 16, 16)"),
        coco(),
    ),
    case("unknown option of a task", detection("--task-arg", "nms=0.5"), ("'nms'", "nms_iou"), coco()),
    case(
        "threshold that is a word", detection("--task-arg", "score_threshold=high"), ("score_threshold", "high"), coco()
    ),
    case("nms_iou that is a word", detection("--task-arg", "nms_iou=high"), ("nms_iou", "high"), coco()),
    case("max_detections below 1", detection("--task-arg", "max_detections=-5"), ("max_detections",), coco()),
    case("background beyond the columns", detection("--task-arg", "background=9"), ("background is 9",), coco()),
    case("flips that are text", detection("--task-arg", "flips=no"), ("flips", "'no'"), coco()),
    case("variances that are none", detection("--task-arg", "variances=none"), ("variances",), coco()),
    case(
        "two categories of one name",
        detection(),
        ("'cat'", "twice"),
        coco(categories=[{"id": 1, "name": "cat"}, {"id": 5, "name": "cat"}]),
    ),
    case("segmentation network on boxes", detection(model="nets.py:pixels"), ("head",), coco()),
    case(
        "task that does not suit the labels", detection(task="segmentation"), ("--task segmentation", "boxes"), coco()
    ),
    Call("box with NaN", detecting(item(boxes([1, NAN, 3, 3]))), ("item 17", "NaN")),
    Call("box that ends before it begins", detecting(item(boxes([5, 1, 2, 3]))), ("item 17", "ends before")),
    Call("box outside", detecting(item(boxes([5, 1, 22, 3]))), ("item 17", "outside")),
    Call("class number 2 of 2", detecting(item(boxes([1, 1, 3, 3], labels=[2]))), ("item 17", "class number 2")),
    Call("more labels than boxes", detecting(item(boxes([1, 1, 3, 3], labels=[0, 1]))), ("item 17", "2 labels")),
    Call(
        "labels of boxes that are floats",
        detecting(item({"boxes": torch.ones(1, 4), "labels": torch.tensor([0.5])})),
        ("item 17", "float"),
    ),
    Call("target without boxes", detecting(item({"labels": torch.tensor([0])})), ("item 17", "boxes")),
    Call("no boxes anywhere", detecting(target=lambda k: boxes()), ("no image", "a box")),
    Call(
        "no boxes in the test split",
        done("detector", {"train": Items(a_box), "test": Items(lambda k: boxes(), count=20)}, classes=("cat", "dog")),
        ("test", "no image", "a box"),
    ),
    Call("boxes without class names", done("detector", lambda: splits(a_box)), ("class names", "classes")),
]

MASKS = [
    case(
        "mask of another size than its picture",
        apply(model="nets.py:pixels", data="masks:set"),
        ("17.png", "4 x 4", "8 x 8"),
        masks(np.zeros((4, 4), np.uint8)),
    ),
    case(
        "mask with a class beyond the names",
        apply(model="nets.py:pixels", data="masks:set"),
        ("17.png", "7", "0 to 2"),
        masks(np.full((8, 8), 7, np.uint8)),
    ),
    case("mask in colours", apply(model="nets.py:pixels", data="masks:set"), ("17.png", "colours"), masks(pixels(0))),
    case(
        "masks of void alone",
        apply(model="nets.py:pixels", data="masks:set"),
        ("void",),
        masks(every=np.full((8, 8), 255, np.uint8)),
    ),
    case(
        "picture without a mask",
        apply(model="nets.py:pixels", data="masks:set"),
        ("17.png", "no mask"),
        masks(),
        lambda f: (f / "set/masks/17.png").unlink(),
    ),
    case(
        "unknown option of a format",
        apply(model="nets.py:pixels", data="masks:set,viod=11"),
        ("'viod'", "void"),
        masks(),
    ),
    case("void that is no number", apply(model="nets.py:pixels", data="masks:set,void=x"), ("void=x",), masks()),
    case(
        "segmentation network of other classes",
        apply("--model-arg", "classes=7", model="nets.py:pixels", data="masks:set"),
        ("7",),
        masks(),
    ),
    case(
        "void class that is text",
        apply("--task-arg", "ignore_index=sky", model="nets.py:pixels", data="masks:set"),
        ("ignore_index", "'sky'"),
        masks(),
    ),
    case(
        "outputs that are a number",
        apply("--task-arg", "outputs=3", model="nets.py:pixels", data="masks:set"),
        ("outputs", "3"),
        masks(),
    ),
    case("classifier on masks", apply(model="nets.py:three", data="masks:set"), ("(2, 3)", "(n, 3, h, w)"), masks()),
    Call(
        "mask beyond the channels",
        done(
            "pixels",
            splits(lambda k: torch.ones(8, 8, dtype=torch.int64), item(torch.full((8, 8), 3))),
            classes=("a", "b", "c"),
        ),
        ("item 17", "3", "0 to 2"),
    ),
    Call(
        "mask beyond the channels, without names",
        done("pixels", splits(lambda k: torch.ones(8, 8, dtype=torch.int64), item(torch.full((8, 8), 3)))),
        ("class names",),
    ),
    Call(
        "mask smaller than its image",
        done(
            "pixels",
            splits(lambda k: torch.ones(8, 8, dtype=torch.int64), item(torch.ones(4, 4, dtype=torch.int64))),
            classes=("a", "b", "c"),
        ),
        ("item 17", "(4, 4)"),
    ),
    Call(
        "masks of void alone, of Python",
        done("pixels", splits(lambda k: torch.full((8, 8), 255)), classes=("a", "b", "c")),
        ("no image", "void"),
    ),
]

OTHER_TASKS = [
    case("unknown task", tasked("clasification"), ("'clasification'", "did you mean classification")),
    case("option of no task", tasked("classification", "--task-arg", "threshold=0.5"), ("'threshold'",)),
    case("task of other labels", tasked("regression"), ("--task regression", "classes")),
    Call(
        "third-party task that does not load",
        plugged("gone_module:Task"),
        ("'plugged'", "does not load", "gone_module"),
    ),
    Call("third-party task that cannot be made", plugged("plugged_task:broken"), ("'plugged'", "no such sensor")),
    Call("third-party task that is none", plugged("plugged_task:empty"), ("'plugged'", "has no")),
    case(
        "missing class",
        apply(model="nets.py:three", data="npz:set.npz"),
        ("3 outputs", "2 classes"),
        lambda f: write_arrays(f / "set.npz"),
    ),
    case("--lower-is-better without a metric", apply("--lower-is-better", model="nets.py:two"), ("--metric",)),
    Call("lower_is_better without a metric", done("two", splits(), lower_is_better=True), ("metric",)),
    Call("class number 80 of 80", done(lambda: built("eighty"), splits(label, item(80))), ("80", "0 to 79")),
    Call(
        "class number 80 of 80, listed",
        done(lambda: built("eighty"), lambda: listed(splits(label, item(80)))),
        ("80", "80 outputs"),
    ),
    Call("negative class", done("two", splits(label, item(-1))), ("item 17", "-1")),
    Call("class number in the test split alone", done("two", in_the_test(label, item(2))), ("2",)),
    Call("one class", done("two", splits(lambda k: 0)), ("two classes",)),
    Call(
        "keypoints of another number than the model",
        done("points", splits(lambda k: torch.ones(5, 3))),
        ("5 points", "2"),
    ),
    Call(
        "keypoints of another number in one image",
        done("points", splits(lambda k: torch.ones(2, 3), item(torch.ones(3, 3)))),
        ("17", "3 points"),
    ),
    Call(
        "keypoint outside its image",
        done("points", splits(lambda k: torch.ones(2, 3), item(torch.full((2, 3), 40.0)))),
        ("item 17", "outside"),
    ),
    Call(
        "scale of keypoints that is none",
        done("points", splits(lambda k: {"points": torch.ones(2, 3), "scale": 0})),
        ("item 0", "scale"),
    ),
    Call("keypoints that nobody sees", done("points", splits(lambda k: torch.zeros(2, 3))), ("no image", "visible")),
    Call(
        "regression of another width", done("two", splits(lambda k: torch.tensor([0.5, k, 2.0]))), ("(2, 3)", "(2, 2)")
    ),
    Call(
        "regression of another width in one image",
        done("two", splits(lambda k: torch.tensor([0.5, k]), item(torch.ones(3)))),
        ("17", "3"),
    ),
    Call("NaN targets everywhere", done("two", splits(lambda k: torch.tensor([NAN, NAN]))), ("no image", "NaN")),
    Call(
        "NaN targets in the test split",
        done(
            "two",
            {
                "train": Items(lambda k: torch.tensor([0.5, k])),
                "test": Items(lambda k: torch.tensor([NAN, NAN]), count=20),
            },
        ),
        ("test", "no image"),
    ),
    Call(
        "infinite target",
        done("two", splits(lambda k: torch.tensor([0.5, k]), item(torch.tensor([float("inf"), 0])))),
        ("item 17", "inf"),
    ),
    Call(
        "labels of which one is 2",
        done("three", splits(lambda k: torch.tensor([1, 0, k % 2]), item(torch.tensor([1, 2, 0])))),
        ("item 17", "2"),
    ),
    Call(
        "labels of another number",
        done("three", splits(lambda k: torch.tensor([1, 0, k % 2]), item(torch.tensor([1, 0])))),
        ("item 17", "3"),
    ),
    Call("labels that no image has", done("three", splits(lambda k: torch.zeros(3, dtype=torch.int64))), ("no image",)),
    Call("embedding of one class", done("two", splits(lambda k: 0), task="embedding"), ("two classes",)),
    Call("embedding with one image of each class", done("two", splits(lambda k: k), task="embedding"), ("recall@1",)),
    Call(
        "classes of a model in another order",
        done("other_order", splits(), classes=("cat", "dog")),
        ("dog, cat", "order"),
    ),
]

METRIC_CASES = [
    case("metric file is missing", apply(metric="gone.py:f"), ("--metric", "gone.py", "no such file")),
    case("metric is not in its file", judged("nann"), ("'nann'", "did you mean nan")),
    case("metric without a function", apply(metric="metrics.py"), ("--metric metrics.py", "colon")),
    case("metric that is a number", judged("number"), ("number is 7", "called")),
    case("metric raises", judged("raises"), ("metrics.py, line", "no such column")),
    case("metric returns NaN", judged("nan"), ("metric nan", "NaN")),
    case("metric returns None", judged("none"), ("metric none", "None")),
    case("metric returns text", judged("words"), ("metric words", "str")),
    case("metric of the wrong length", judged("short"), ("metric short", "shape")),
    case("metric in per cent", judged("percent"), ("metric percent", "scale = 1")),
    case("metric returns a dict", judged("per_class"), ("metric per_class", "dict")),
    case("metric takes no arguments", judged("no_arguments"), ("metric no_arguments", "takes 0")),
    case("metric object that fails", judged("meter"), ("Meter", "total")),
    case("loss file is missing", apply(loss="gone.py:f"), ("--loss", "gone.py")),
    case("loss raises", trained("raises"), ("metrics.py, line", "no such column")),
    case("loss returns NaN", trained("no_number"), ("loss no_number", "NaN")),
    case("loss returns None", trained("none"), ("loss none", "None")),
    case("loss without a gradient", trained("detached"), ("loss detached", "gradient")),
    case("loss of the wrong length", trained("short"), ("loss short", "shape")),
    case("loss of a square", trained("sum_of_pairs"), ("loss sum_of_pairs", "shape")),
    Call("metric that cannot be called", done("two", splits(), metric=7), ("metric 7", "called")),
    Call("loss that cannot be called", done("two", splits(), loss=7), ("loss 7", "called")),
    Call(
        "metric that raises, of Python",
        done("two", splits(), metric=lambda outputs, targets: outputs.logits),
        ("metric", "raises", "logits"),
    ),
    Call("loss that raises, of Python", done("two", splits(), loss=lambda o, t: failing()), ("loss", "share is gone")),
    Call(
        "metric without labels", done("two", {"train": Items(lambda k: None)}, metric=lambda o, t: 0.5), ("no labels",)
    ),
]

DATA_SETS = [
    Call(
        "floats among pictures",
        done("two", {"train": Items(label, {17: (image(17), 0)}, picture=True)}),
        ("item 17", "float32"),
    ),
    Call("length that raises", done("two", {"train": Endless()}), ("train", "OverflowError")),
    Call("collate_fn that returns no batch", done("two", splits(), collate_fn=lambda items: (5, 7)), ("item 0",)),
    Call(
        "item of another shape",
        done("two", splits(others={17: (image(17, 3, 9, 9), 0)})),
        ("item 17", "(3, 9, 9)", "(3, 8, 8)"),
    ),
    Call(
        "item of another shape, in the test split",
        done("two", in_the_test(others={17: (image(17, 3, 9, 9), 0)})),
        ("data set test, item 17", "(3, 9, 9)"),
    ),
    Call(
        "item of another channel count",
        done("two", splits(others={17: (image(17, 1, 8, 8), 0)})),
        ("item 17", "(1, 8, 8)"),
    ),
    Call(
        "item of another dtype",
        done("two", splits(others={17: (torch.zeros(3, 8, 8, dtype=torch.uint8), 0)})),
        ("item 17", "uint8"),
    ),
    Call(
        "item of 64-bit integers",
        done("two", splits(others={17: (torch.zeros(3, 8, 8, dtype=torch.int64), 0)})),
        ("item 17", "int64"),
    ),
    Call("image with NaN", done("two", splits(others={17: (image(17) * NAN, 0)})), ("item 17", "NaN")),
    Call("target of another type", done("two", splits(others=item("cat"))), ("item 17", "str")),
    Call("target that is a row", done("two", splits(others=item(torch.tensor([0, 1])))), ("item 17",)),
    Call("target that is missing", done("two", splits(others=item(None))), ("item 17", "NoneType")),
    Call("target that is a fraction", done("two", splits(others=item(0.5))), ("item 17", "0.5")),
    Call("item of three", done("two", splits(others={17: (image(), 0, 0)})), ("item 17", "tuple of 3")),
    Call("item raises", done("two", splits(others={17: failing})), ("item 17", "share is gone")),
    Call(
        "item of the test split raises",
        done("two", in_the_test(others={17: failing})),
        ("data set test, item 17", "share is gone"),
    ),
    Call("data set without items", done("two", splits(count=0)), ("train", "empty")),
    Call(
        "data set without a length",
        done("two", {"train": Stream(), "test": Items(label)}),
        ("train", "Stream", "__len__"),
    ),
    Call("generator in place of a data set", done("two", lambda: {"train": iter([])}), ("train", "length")),
    Call("mapping without train", done("two", {"val": Items(label), "test": Items(label)}), ("no train",)),
    Call("mapping with val alone", done("two", {"val": Items(label)}), ("no train",)),
    Call("unknown split", done("two", {"train": Items(label), "tset": Items(label)}), ("'tset'", "val")),
    Call("empty mapping", done("two", dict), ("train",)),
    Call("None in place of data", done("two", None), ("data", "ONNX file")),
    Call("data set that is a number", done("two", {"train": 7}), ("train", "int")),
    Call("collate_fn fails", done("two", splits(), collate_fn=lambda items: failing()), ("item 0", "share is gone")),
    Call(
        "collate_fn returns images alone",
        done("two", splits(), collate_fn=lambda items: "ab"),
        ("item 0", "collate_fn"),
    ),
    Call("collate_fn that is none", done("two", splits(), collate_fn=7), ("collate_fn", "7")),
    Call("classes that are one text", done("two", splits(), classes="ab"), ("classes", "'ab'")),
    Call("too few items", done("two", splits(count=9)), ("too few",)),
    Call("loader of an iterable data set", done("two", {"train": DataLoader(Stream())}), ("train", "__len__")),
    case(
        "factory of data raises",
        apply(model="nets.py:two", data="sets.py:made"),
        ("sets.py:made", "ValueError"),
        text("sets.py", "def made(): raise ValueError('no disk')"),
    ),
    case(
        "factory of data returns None",
        apply(model="nets.py:two", data="sets.py:made"),
        ("NoneType",),
        text("sets.py", "def made(): return None"),
    ),
    case("data file is missing", apply(model="nets.py:two", data="gone.py:made"), ("gone.py", "no such file")),
]

FILES = [
    case(
        "JPEG cut short",
        apply(model="nets.py:two", data="imagefolder:photos", input_size="3,8,8"),
        ("test/dog/57.jpg", "readable image"),
        spoiled_photo(lambda b: b[: len(b) * 2 // 3], "jpg"),
    ),
    case(
        "BMP cut short",
        apply(model="nets.py:two", data="imagefolder:photos", input_size="3,8,8"),
        ("test/dog/57.bmp", "readable image"),
        spoiled_photo(lambda b: b[: len(b) * 2 // 3], "bmp"),
    ),
    case(
        "WebP cut short",
        apply(model="nets.py:two", data="imagefolder:photos", input_size="3,8,8"),
        ("test/dog/57.webp", "readable image"),
        spoiled_photo(lambda b: b[: len(b) * 2 // 3], "webp"),
    ),
    case(
        "PNG cut short",
        apply(model="nets.py:two", data="imagefolder:photos", input_size="3,8,8"),
        ("test/dog/57.png", "readable image"),
        spoiled_photo(lambda b: b[: len(b) * 2 // 3]),
    ),
    case(
        "picture of 0 bytes",
        apply(model="nets.py:two", data="imagefolder:photos", input_size="3,8,8"),
        ("test/dog/57.png", "readable image"),
        spoiled_photo(lambda b: b""),
    ),
    case(
        "CSV without paths",
        apply(model="nets.py:two", data="csv:set.csv"),
        ("set.csv", "path"),
        table(header="file,label"),
    ),
    case(
        "CSV with an empty label",
        apply(model="nets.py:two", data="csv:set.csv"),
        ("set.csv, line 42", "label is empty"),
        table("images/00.png,"),
    ),
    case(
        "CSV with a path that leads elsewhere",
        apply(model="nets.py:two", data="csv:set.csv"),
        ("gone.png", "not there"),
        table("../gone.png,cat"),
    ),
    case(
        "CSV with a picture in it twice",
        apply(model="nets.py:two", data="csv:set.csv"),
        ("17.png", "twice"),
        table("images/17.png,cat"),
    ),
    case(
        "CSV with another number of values",
        apply(model="nets.py:two", data="csv:set.csv"),
        ("line 42", "3 values"),
        table("images/17.png,cat,7"),
    ),
    case(
        "CSV with a number that is none",
        apply(model="nets.py:two", data="csv:set.csv"),
        ("line 19", "angle", "'left'"),
        table(header="path,angle", row=lambda k: f"images/{k:02}.png,{'left' if k == 17 else k}"),
    ),
    case(
        "CSV with NaN",
        apply(model="nets.py:two", data="csv:set.csv"),
        ("line 19", "angle", "'nan'"),
        table(header="path,angle", row=lambda k: f"images/{k:02}.png,{'nan' if k == 17 else k}"),
    ),
    case("CSV file is missing", apply(data="csv:gone.csv"), ("gone.csv", "no such file")),
    case("webdataset folder that is none", apply(data="webdataset:gone"), ("gone", "no such folder")),
    case(
        "webdataset shard that is compressed",
        apply(data="webdataset:empty"),
        ("train.tar.gz", "compressed", "unpack"),
        lambda f: (f / "empty").mkdir(),
        text("empty/train.tar.gz", "x"),
    ),
    case(
        "webdataset shard that is none",
        apply(data="webdataset:empty"),
        ("train.tar", "not readable as a tar file"),
        lambda f: (f / "empty").mkdir(),
        text("empty/train.tar", "x" * 1000),
    ),
    case("hfdata folder that is none", apply(data="hfdata:gone"), ("gone", "no such folder")),
    case(
        "hfdata folder without data",
        apply(data="hfdata:empty"),
        ("empty", "state.json"),
        lambda f: (f / "empty").mkdir(),
    ),
    case(
        "Parquet file that is none",
        apply(data="hfdata:empty"),
        ("train.parquet", "readable"),
        lambda f: (f / "empty").mkdir(),
        text("empty/train.parquet", "x"),
    ),
    case("hf: folder that is none", apply(model="hf:gone"), ("hf:gone", "config.json")),
    case("hf: folder without a config", apply(model="hf:vit"), ("config.json",), lambda f: (f / "vit").mkdir()),
    case(
        "hf: folder with a pickle of weights",
        apply(model="hf:vit"),
        ("pytorch_model.bin", "refused"),
        hugging_face(),
        text("vit/pytorch_model.bin", pickle.dumps(Bomb())),
    ),
    case("hf: folder without weights", apply(model="hf:vit"), ("model.safetensors", "no such weights"), hugging_face()),
    case("hf: unknown architecture", apply(model="hf:vit"), ("NetOfMine",), hugging_face(architectures=["NetOfMine"])),
    case(
        "hf: unknown model type",
        apply(model="hf:vit"),
        ("config.json", "transformers cannot use it"),
        hugging_face(model_type="mine"),
    ),
    case("unknown torchvision name", apply(model="torchvision:resnet81"), ("resnet81", "did you mean")),
    case("two-stage detector", apply(model="torchvision:fasterrcnn_resnet50_fpn"), ("second stage", "one-stage")),
    case("video network of torchvision", apply(model="torchvision:r3d_18"), ("video",)),
    case("ultralytics is not installed", apply(model="ultralytics:yolo11n.yaml"), ("pip install", "ultralytics")),
    case("crop larger than the picture", apply("--crop-pct", "1.5", model="nets.py:two"), ("crop_pct 1.5", "(0, 1]")),
    case("unknown geometry", apply(model="nets.py:two", geometry="sqeeze"), ("'sqeeze'", "letterbox")),
    case("unknown interpolation", apply(model="nets.py:two", interpolation="lanzcos"), ("'lanzcos'", "bicubic")),
    case("network with two inputs", apply(model="nets.py:Two"), ("images, mask", "one tensor")),
    case("classifier that answers with a dict", apply(model="nets.py:dictionary"), ("2 tensors", "outputs")),
    case(
        "output that is not there",
        apply("--task-arg", "outputs=logit", model="nets.py:dictionary"),
        ("'logit'", "logits, boxes"),
    ),
]

PYTHON = [
    Call("model that is a number", searched(42, splits()), ("42", "torch.nn.Module")),
    Call("model that is None", searched(None, splits()), ("None", "torch.nn.Module")),
    Call("function that makes no model", done(lambda: 7, splits()), ("returns 7",)),
    Call("search without data", searched("two", None), ("data", "ONNX file")),
    Call("unknown limit", searched("two", splits(), limits={"max_dorp": 1.0}), ("'max_dorp'", "max_drop")),
    Call("negative limit", searched("two", splits(), limits={"max_drop": -1}), ("max_drop = -1",)),
    Call("limit that is text", searched("two", splits(), limits={"max_drop": "1"}), ("max_drop", "'1'")),
    Call("limit that is NaN", searched("two", splits(), limits={"speedup": NAN}), ("speedup",)),
    Call("limits that are a number", searched("two", splits(), limits=1.0), ("limits", "1.0")),
    Call("trials that are text", searched("two", splits(), trials="many"), ("trials", "'many'")),
    Call("budget that is no duration", searched("two", splits(), budget="soon"), ("'soon'", "30m")),
    Call("unknown strategy, of Python", searched("two", splits(), strategy="hirlec"), ("'hirlec'", "hirelc")),
    Call("unknown target, of Python", searched("two", splits(), target="gpu9"), ("'gpu9'",)),
    Call("trials that are a fraction", searched("two", splits(), trials=2.5), ("2.5", "whole number")),
    Call("std that is text", searched("two", splits(), std="abc"), ("std", "'abc'")),
    Call("mean of texts", searched("two", splits(), mean=("a", "b", "c")), ("mean", "numbers")),
    Call("seed that is text", searched("two", splits(), seed="x"), ("seed", "'x'")),
    Call("recovery_epochs that are text", searched("two", splits(), recovery_epochs="1"), ("recovery_epochs", "'1'")),
    Call("exclude that is one text", searched("two", splits(), exclude="0"), ("exclude", "'0'")),
    Call("input_size that is a number", searched("two", splits(), input_size=8), ("input_size", "8")),
    Call("mean that is a number", searched("two", splits(), mean=0.5), ("mean", "0.5")),
    Call("out that is a file", done("two", splits(), out="data.npz"), ("data.npz", "give another")),
    Call("out below a file", done("two", splits(), out="data.npz/run"), ("data.npz/run", "give another")),
    Call("out that is None", done("two", splits(), out=None), ("out", "None")),
    Call("progress that cannot be called", done("two", splits(), progress=7), ("progress", "7")),
    Call("weights beside a module", done("two", splits(), weights="w.safetensors"), ("weights",)),
    Call("arguments beside a module", done("two", splits(), model_args={"width": 4}), ("arguments",)),
    Call("scripted module", done(lambda: torch.jit.script(built("two")), splits()), ("scripted", "torch.nn.Module")),
    Call("plan with an unknown layer", done("two", splits(), plan=CompressionPlan(keep={"layer9": 4})), ("'layer9'",)),
    Call("plan that is a number", done("two", splits(), plan=7), ("plan", "7")),
    Call("unknown task of Python", done("two", splits(), task="segmentaton"), ("did you mean segmentation",)),
    Call("task that is a class", done("two", splits(), task=dict), ("task",)),
    Call("task_options that are text", done("two", splits(), task_options="outputs"), ("task_options",)),
    Call("folder of another job", done("two", splits()), ("out", "model.spec", "another --out"), prepare=begun_run),
    Call("inspect of a number", lambda: hirelc_deploy.inspect(42), ("42",)),  # type: ignore[arg-type]
    Call(
        "inspect of another channel count",
        lambda: hirelc_deploy.inspect(built("two"), input_size=(1, 8, 8)),
        ("1x8x8",),
    ),
    Call(
        "benchmark of what is not there", lambda: hirelc_deploy.benchmark(["gone.onnx"]), ("gone.onnx", "no such file")
    ),
    Call("benchmark of nothing", lambda: hirelc_deploy.benchmark([]), ("no file",)),
    Call("benchmark of a text", lambda: hirelc_deploy.benchmark("a.onnx"), ("files", "'a.onnx'")),
    Call("verify of what is not there", lambda: hirelc_deploy.verify("gone"), ("gone",)),
    Call("load of what is not there", lambda: hirelc_deploy.load("gone"), ("gone",)),
]


def listed(data: Any) -> Any:
    """Return data sets that list their labels, as torchvision's do."""
    for items in data.values():
        items.targets = [items[k][1] for k in range(len(items))]
    return data


CASES: list[Case | Call] = [*BOXES, *MASKS, *OTHER_TASKS, *METRIC_CASES, *DATA_SETS, *FILES, *PYTHON]
COMMANDS = [one for one in CASES if isinstance(one, Case)]
CALLS = [one for one in CASES if isinstance(one, Call)]
