from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from hirelc_deploy import _torchvision_guard
from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.datasets import data_from_datasets
from hirelc_deploy.inputs.data.load import load_data
from hirelc_deploy.inputs.data.preprocess import Preprocess
from hirelc_deploy.inputs.data.splits import Data, SplitSizes

SMALL = SplitSizes(8, 8)


class Items:
    """Anything with a length and items."""

    def __init__(self, make: Any, count: int = 40, **attributes: Any) -> None:
        self.make, self.count = make, count
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


def float_image(index: int, side: int = 8) -> Tensor:
    return torch.full((3, side, side), float(index))


def picture(index: int, height: int = 12, width: int = 16) -> Image.Image:
    return Image.fromarray(np.full((height, width, 3), index, np.uint8))


def rows_of(split: Any) -> list[int]:
    return split.batch(range(len(split)))[:, 0, 0, 0].int().tolist()


def made(make: Any, **options: Any) -> Data:
    return data_from_datasets({"train": Items(make), "test": Items(make, 10)}, SMALL, **options)


def with_target(target: Any) -> Any:
    return lambda index: (float_image(index), target)


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        (3, "classes"),
        (np.int64(3), "classes"),
        (torch.tensor(3), "classes"),
        (0.5, "numbers"),
        (torch.tensor(0.5), "numbers"),
        (torch.tensor([0.0, 1.0, 1.0]), "multilabel"),
        ([0, 1], "multilabel"),
        (torch.tensor([0.0, 0.5]), "numbers"),
        (torch.tensor([1.0]), "numbers"),
        (torch.zeros(8, 8, dtype=torch.int64), "masks"),
        (Image.new("L", (8, 8)), "masks"),
        (torch.zeros(8, 8), "map"),
        (torch.zeros(2, 8, 8), "map"),
        (torch.zeros(5, 3), "keypoints"),
        ({"points": torch.zeros(5, 3)}, "keypoints"),
        ({"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)}, "boxes"),
    ],
)
def test_the_kind_follows_from_the_first_targets(target: Any, kind: str) -> None:
    assert made(with_target(target)).kind == kind


def test_images_without_targets_have_no_labels() -> None:
    data = made(float_image)
    assert (data.kind, data.labelled, data.train.labelled) == ("none", False, False)
    assert data.train.targets([0, 1]) == [None, None]


def test_splits_follow_the_names_in_any_case() -> None:
    items = {name: Items(lambda index: (float_image(index), 0.5), 20) for name in ("Train", "Validation", "TEST")}
    data = data_from_datasets(items, SMALL)
    assert [len(split) for split in (data.train, data.calibration, data.selection)] == [20, 8, 8]
    assert not set(rows_of(data.calibration)) & set(rows_of(data.selection))
    assert data.test_count == 20


def test_without_classes_images_are_held_out_evenly_spread_over_the_list() -> None:
    data = data_from_datasets(Items(lambda index: (float_image(index), 0.5), 160), SMALL)
    rows = {name: rows_of(getattr(data, name)) for name in ("train", "calibration", "selection")}
    test = rows_of(data.take_test())
    assert len(test) == 32
    assert sorted(sum(rows.values(), test)) == list(range(160))
    for held in (rows["calibration"], rows["selection"], test):
        quarters = np.bincount(np.array(held) // 40, minlength=4)
        assert quarters.max() - quarters.min() <= 1


def test_classes_that_the_data_set_lists_are_balanced() -> None:
    labels = [index // 20 for index in range(80)]
    items = Items(lambda index: (float_image(index), labels[index]), 80, targets=labels, classes=["a", "b", "c", "d"])
    data = data_from_datasets(items, SMALL)
    assert data.classes == ("a", "b", "c", "d")
    assert np.bincount(data.calibration.labels).tolist() == [2, 2, 2, 2]
    assert data.calibration.targets(range(8)) == data.calibration.labels.tolist()
    part = data_from_datasets({"train": Subset(items, range(20, 80)), "test": Subset(items, range(10))}, SMALL)
    assert set(part.train.labels.tolist()) == {1, 2, 3}


def test_labels_that_are_listed_nowhere_are_read_from_the_items() -> None:
    data = made(lambda index: (float_image(index), index % 3))
    assert data.train.labels.tolist() == [row % 3 for row in rows_of(data.train)]


def test_float_inputs_stay_as_they_are_in_every_view() -> None:
    ramp = torch.arange(192.0).reshape(3, 8, 8)
    images = made(lambda index: (ramp, 0)).train
    for view in range(6):
        assert torch.equal(images.views([0], view)[0], ramp)


def test_augmentation_of_its_own_is_the_same_in_every_run_and_leaves_no_trace() -> None:
    def make(index: int) -> tuple[Tensor, float]:
        noise = torch.full((3, 4, 4), index + torch.rand(()).item())
        noise[1], noise[2] = random.random(), float(np.random.rand())  # noqa: NPY002
        return noise, 0.5

    images = made(make).train
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    together = images.views([3, 1], 7)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002
    assert torch.equal(images.views([1], 7)[0], together[1])
    for channel in range(3):
        assert images.views([1], 8)[0, channel, 0, 0] != together[1, channel, 0, 0]
    assert torch.equal(made(make).train.views([1], 7)[0], together[1])
    assert torch.equal(images.batch([1]), images.batch([1]))


def test_targets_belong_to_the_augmented_view() -> None:
    def make(index: int) -> tuple[Tensor, Tensor]:
        shift = torch.rand(2)
        return float_image(index) + shift[0], shift

    images = made(make, kind="numbers").train
    for view in (None, 0, 5):
        shown = images.batch([2, 4]) if view is None else images.views([2, 4], view)
        fresh = made(make, kind="numbers").train  # asked for targets without the images
        for image, target, again in zip(shown, images.targets([2, 4], view), fresh.targets([2, 4], view), strict=True):
            assert torch.equal(target, again)
            assert abs(float(image[0, 0, 0]) % 1 - float(target[0])) < 1e-5


@pytest.mark.parametrize("form", ["pillow", "tensor", "array"])
def test_pictures_are_preprocessed_and_their_boxes_moved(form: str) -> None:
    def make(index: int) -> tuple[Any, dict[str, Any]]:
        image: Any = picture(index)
        if form != "pillow":
            image = np.asarray(image)
        if form == "tensor":
            image = torch.from_numpy(image.transpose(2, 0, 1).copy())
        return image, {"boxes": [[0, 0, 8, 6]], "labels": [1]}

    wanted = Preprocess((3, 8, 8), (0.0,) * 3, (1.0,) * 3, geometry="letterbox")
    data = made(make, classes=["cat", "dog"]).preprocessed(wanted)
    assert data.train.batch([4]).shape == (1, 3, 8, 8)
    found = data.train.targets([4])[0]
    assert found["boxes"].tolist() == [[0, 1, 4, 4]]
    assert found["labels"].tolist() == [1]
    assert found["crowd"].tolist() == [False]


def test_boxes_of_torchvision_in_another_form_are_understood() -> None:
    _torchvision_guard.install()
    from torchvision import tv_tensors

    corners = tv_tensors.BoundingBoxes([[4, 3, 8, 6]], format="CXCYWH", canvas_size=(12, 16))
    data = made(lambda index: (picture(index), {"boxes": corners, "labels": torch.tensor([0])}))
    assert data.train.targets([0])[0]["boxes"].tolist() == [[0, 0, 8, 6]]


def test_a_collate_fn_makes_pairs_of_items_that_are_something_else() -> None:
    def collate(items: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        return torch.stack([item["x"] for item in items]), torch.tensor([item["y"] for item in items])

    items = Items(lambda index: {"x": float_image(index), "y": index % 2})
    data = data_from_datasets({"train": items, "test": items}, SMALL, collate_fn=collate)
    assert data.train.targets([0, 1]) == [row % 2 for row in rows_of(data.train)[:2]]
    loaders = {name: DataLoader(items, collate_fn=collate) for name in ("train", "test")}  # type: ignore[arg-type]
    assert data_from_datasets(loaders, SMALL).train.targets([0, 1]) == data.train.targets([0, 1])


def test_torchs_own_data_sets_are_taken() -> None:
    tensors = TensorDataset(torch.zeros(40, 3, 8, 8), torch.arange(40) % 2)
    data = data_from_datasets({"train": tensors, "val": tensors}, SMALL, classes=["a", "b"])
    assert (data.kind, data.test_count, data.preprocess.input_size) == ("classes", 40, (3, 8, 8))


def test_a_factory_in_a_file_gives_data_sets(tmp_path: Path) -> None:
    (tmp_path / "my_data.py").write_text(
        "import torch\nfrom torch.utils.data import TensorDataset\n"
        "def make():\n"
        "    tensors = TensorDataset(torch.zeros(40, 3, 8, 8), torch.zeros(40, 2) + 0.5)\n"
        "    return {'train': tensors, 'val': tensors}\n"
        "def one():\n    return make()['train']\n"
        "def broken():\n    raise KeyError('no disk')\n"
    )
    for name, count in (("make", 40), ("one", 8)):
        data = load_data(f"{tmp_path / 'my_data.py'}:{name}", calibration_images=8, selection_images=8)
        assert (data.name, data.kind, data.test_count) == ("my_data", "numbers", count)
    with pytest.raises(InputError, match=r"my_data\.py:broken raises KeyError.*called without arguments"):
        load_data(f"{tmp_path / 'my_data.py'}:broken")


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield 1


def raising(index: int) -> Any:
    if index > 8:
        raise OSError("disk gone")
    return float_image(index), 0.5


BAD = {
    "nothing": (lambda: data_from_datasets({}), "no data set in it; give at least train"),
    "unknown split": (
        lambda: data_from_datasets({"train": Items(float_image), "extra": []}),
        "split 'extra' is unknown; use",
    ),
    "one split twice": (
        lambda: data_from_datasets({"val": Items(float_image), "Validation": Items(float_image)}),
        "both val; keep one",
    ),
    "no train": (
        lambda: data_from_datasets({"val": Items(float_image), "test": Items(float_image)}, SMALL),
        "no train; add it",
    ),
    "a stream": (lambda: data_from_datasets({"train": Stream()}), "Stream, which has no length or no items; give"),
    "empty": (lambda: data_from_datasets({"train": Items(float_image, 0)}), "data set train is empty; add items"),
    "too few": (lambda: data_from_datasets(Items(float_image, 12), SMALL), "too few to set 16 of them aside"),
    "an item of three": (lambda: made(lambda index: (1, 2, 3)), "item 0 is a tuple of 3; give .* collate_fn"),
    "unknown keys": (lambda: made(lambda index: {"x": 1}), "item 0 has x; give .* collate_fn"),
    "strings": (lambda: made(lambda index: (float_image(index), "cat")), "is a str, not numbers; give numbers"),
    "no boxes": (lambda: made(with_target({"masks": 1})), "a target has masks; give boxes and labels"),
    "an item that raises": (lambda: made(raising).train.batch(range(20)), "item 9 raises OSError: disk gone; correct"),
    "an image that is none": (lambda: made(lambda index: ("a.png", 1)), "image is a str; give a float or uint8 tensor"),
    "int64 pixels": (lambda: made(lambda index: (torch.zeros(3, 8, 8).long(), 1)), "image is a torch.int64"),
    "five channels": (lambda: made(lambda index: (torch.zeros(5, 8, 8).byte(), 1)), r"uint8 and shape \(8, 8, 5\)"),
    "another float size": (
        lambda: made(with_target(1)).preprocessed(Preprocess((3, 9, 9), (0.0,) * 3, (1.0,) * 3)).train.batch([0]),
        r"shape \(3, 8, 8\), but the model takes \(3, 9, 9\); resize",
    ),
    "NaN pixels": (
        lambda: made(lambda index: (float_image(index) * np.nan, 1)).train.batch([0]),
        "holds NaN or infinity",
    ),
    "negative class": (lambda: made(with_target(-1)).train.targets([0]), "class number -1, but the classes are from 0"),
    "class beyond": (
        lambda: made(with_target(5), classes=["a", "b"]).train.targets([0]),
        "class number 5, but .* 0 to 1",
    ),
    "listed beyond": (
        lambda: data_from_datasets(Items(with_target(1), 40, targets=[*range(40)], classes=["a", "b"]), SMALL),
        "labels hold 39, but the classes are 0 to 1",
    ),
    "a box outside": (
        lambda: made(with_target({"boxes": [[0, 0, 20, 4]], "labels": [0]})).train.targets([0]),
        r"box 0: \(0, 0, 20, 4\) lies outside the picture \(the picture is 8 x 8\); correct",
    ),
    "a reversed box": (
        lambda: made(with_target({"boxes": [[4, 4, 2, 6]], "labels": [0]})).train.targets([0]),
        "ends before it begins; give",
    ),
    "a mask of another size": (
        lambda: made(lambda index: (picture(index), torch.zeros(5, 5).long())).train.targets([0]),
        "5 x 5 pixels, but its picture has 16 x 12; make both one size",
    ),
    "a negative mask": (
        lambda: made(with_target(torch.zeros(8, 8).long() - 1)).train.targets([0]),
        "holds the number -1",
    ),
    "an endless map": (lambda: made(with_target(torch.zeros(8, 8) + np.inf)).train.targets([0]), "infinity; write NaN"),
    "a point nowhere": (
        lambda: made(with_target(torch.tensor([[np.nan, 1, 1]])), kind="keypoints").train.targets([0]),
        "visible keypoint holds NaN or infinity; mark",
    ),
    "an unknown kind": (lambda: made(with_target(1), kind="boxs"), "kind 'boxs' is unknown; use one of classes"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_data_set_gets_one_sentence(name: str) -> None:
    make, sentence = BAD[name]
    with pytest.raises(InputError, match=sentence) as caught:
        make()
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def test_keypoints_keep_the_size_of_what_is_seen_which_is_resized_with_the_picture() -> None:
    def item(index: int) -> tuple[Image.Image, dict[str, Any]]:
        return picture(index, 12, 16), {"points": torch.tensor([[3.0, 2.0, 1.0], [0, 0, 0]]), "scale": 4.0}

    data = made(item).preprocessed(Preprocess((3, 24, 32), (0.0,) * 3, (1.0,) * 3, geometry="stretch"))
    (found,) = data.train.targets([0])
    assert found.tolist() == [[6.5, 4.5, 1, 8], [0, 0, 0, 8]]


def test_a_single_data_set_under_the_name_of_another_split_is_not_trained_on() -> None:
    with pytest.raises(InputError, match="has test, but no train; add it"):
        data_from_datasets({"test": Items(with_target(0))}, SMALL)
