"""In: folders and arrays as people have them. Out: proof that they are read rightly, or refused in one sentence."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from hirelc_deploy.deliver import bundle as bundles
from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.datasets import data_from_datasets
from hirelc_deploy.inputs.data.load import load_data
from hirelc_deploy.inputs.data.pictures import left_out, pictures_in, read_image
from hirelc_deploy.inputs.data.preprocess import Preprocess
from hirelc_deploy.inputs.data.splits import Data, empty_classes
from hirelc_deploy.inputs.data.text_files import split_called
from hirelc_deploy.inputs.fitting import fit
from hirelc_deploy.inputs.models.given import source_of

RNG = np.random.default_rng(0)


def pixels(*shape: int) -> NDArray[np.uint8]:
    return RNG.integers(0, 256, shape, np.uint8)


def net(classes: int, channels: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)
    )


def folder(
    root: Path, *splits: str, classes: tuple[str, ...] = ("a", "b"), suffix: str = "png", count: int = 45
) -> Path:
    for split in splits or ("",):
        for name in classes:
            place = root / split / name
            place.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(pixels(8, 8, 3)).save(place / f"{number}.{suffix}")
    return root


def counts(data: Data) -> tuple[int, int]:
    return sum(len(images) for name, images in data.splits().items() if name != "test"), data.test_count


# Folders


@pytest.mark.parametrize(
    "names",
    [
        ("Training", "Testing"), ("TRAIN", "TEST"), ("train", "validation"), ("train", "Valid"),
        ("training_set", "test_set"),
        ("seg_train", "seg_test"), ("Train", "eval"), ("train_images", "val_images"), ("trainset", "testset"),
    ],
)  # fmt: skip
def test_split_folders_are_found_by_the_names_that_people_give(names: tuple[str, str], tmp_path: Path) -> None:
    data = load_data(f"imagefolder:{folder(tmp_path, *names, count=45)}")
    assert data.classes == ("a", "b")
    assert counts(data) == (90, 90)


def test_three_splits_of_other_names(tmp_path: Path) -> None:
    data = load_data(f"imagefolder:{folder(tmp_path, 'Train', 'Validation', 'Test', count=20)}")
    assert len(data.train) == 40
    assert data.test_count == 40


@pytest.mark.parametrize("classes", [("Test", "Validation"), ("test", "valid", "eval"), ("Train", "Test")])
def test_classes_that_are_named_like_splits_are_refused(classes: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="are named like splits, and none is train") as caught:
        load_data(f"imagefolder:{folder(tmp_path, classes=classes)}")
    assert "\n" not in str(caught.value)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    data = load_data(f"imagefolder:{folder(tmp_path, classes=('bus', 'car', 'train'), count=30)}")
    assert data.classes == ("bus", "car", "train")


def test_two_folders_of_one_split_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="val and validation are both val; keep one of them"):
        load_data(f"imagefolder:{folder(tmp_path, 'train', 'val', 'validation', count=2)}")


def test_names_that_are_no_splits() -> None:
    for name in ("trainer", "images", "test_annotations", "latest", "retrain", "dev_kit"):
        assert split_called(name) is None
    for name in ("train2017", "Train", " train_1 ", "training-set"):
        assert split_called(name) == "train"


# Pictures


def sixteen(root: Path, kind: str) -> tuple[Path, NDArray[np.uint8]]:
    grey = pixels(8, 8)
    deep = grey.astype(np.uint16) * 257
    file = root / f"picture.{kind.partition(' ')[0]}"
    if kind == "pgm":
        file.write_bytes(b"P5 8 8 65535\n" + deep.astype(">u2").tobytes())
    elif kind == "tif big-endian":
        Image.frombytes("I;16B", (8, 8), deep.astype(">u2").tobytes()).save(file)
    else:
        Image.fromarray(deep).save(file)
    return file, grey


@pytest.mark.parametrize("kind", ["png", "tif", "pgm", "tif big-endian", "jp2"])
def test_sixteen_bits_become_eight(kind: str, tmp_path: Path) -> None:
    file, grey = sixteen(tmp_path, kind)
    loss = 2 if kind == "jp2" else 0
    for channels in (1, 3):
        found = np.asarray(read_image(file, channels), np.int64).reshape(8, 8, -1)
        assert np.abs(found - grey[:, :, None]).max() <= loss
    own = {"train": [(Image.open(file), 0)] * 90 + [(Image.open(file), 1)] * 30, "test": [(Image.open(file), 1)] * 4}
    images = data_from_datasets(own, classes=("a", "b")).calibration.batch([0])
    assert (images[0, 0] * 255 - torch.tensor(grey)).abs().max() <= loss + 1e-3


@pytest.mark.parametrize(("value", "what"), [(np.float32(0.5), "floats"), (np.int32(70_000), "32-bit whole numbers")])
def test_pixels_of_unknown_range_are_refused(value: np.generic, what: str, tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), value)).save(tmp_path / "deep.tif")
    with pytest.raises(InputError, match=f"its pixels are {what}, whose range nobody knows"):
        read_image(tmp_path / "deep.tif")


@pytest.mark.parametrize("suffix", ["pgm", "gif", "jfif", "tga", "JPG", "jp2", "ico", "pcx"])
def test_whatever_pillow_reads_is_read(suffix: str, tmp_path: Path) -> None:
    Image.fromarray(pixels(16, 16)).save(tmp_path / f"picture.{suffix}")
    (file,) = pictures_in(tmp_path)
    assert read_image(file).size == (16, 16)


def test_what_is_left_out_is_counted_in_one_line(tmp_path: Path) -> None:
    root = folder(tmp_path / "set", count=40)
    for name in ("notes.txt", "b.heic", "c.heic", "Thumbs.db", ".DS_Store", "._0.png", "README"):
        (root / "a" / name).write_bytes(b"x")
    data = load_data(f"imagefolder:{root}")
    assert counts(data) == (64, 16)
    assert data.notes == (
        "4 files are left out, as Pillow reads no pictures by these names: 2 .heic, 1 without a suffix, 1 .txt",
    )
    assert left_out([root / "b"]) == ()


def test_a_class_without_a_readable_picture_says_what_is_there(tmp_path: Path) -> None:
    root = folder(tmp_path / "set", count=10)
    (root / "c").mkdir()
    (root / "c" / "one.heic").write_bytes(b"x")
    with pytest.raises(InputError, match=r"set/c: no images in it \(1 files are left out, .*: 1 \.heic\)"):
        load_data(f"imagefolder:{root}")


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp"])
def test_a_broken_picture_is_named_before_the_work_wherever_it_is(suffix: str, tmp_path: Path) -> None:
    root = folder(tmp_path / "set", "train", "test", count=20, suffix=suffix)
    broken = root / "test" / "b" / f"13.{suffix}"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size * 2 // 3])
    with pytest.raises(InputError, match=f"test/b/13.{suffix}: not a readable image"):
        load_data(f"imagefolder:{root}")


# Channels and classes


@pytest.mark.parametrize("channels", [2, 4])
def test_pictures_for_a_model_of_other_channels_are_refused(channels: int, tmp_path: Path) -> None:
    root = folder(tmp_path, count=20)
    with pytest.raises(InputError, match=f"1 or 3 channels, but the model's input has {channels}") as caught:
        fit(source_of(net(2, channels)), load_data(f"imagefolder:{root}"), {"input_size": (channels, 8, 8)})
    assert "\n" not in str(caught.value)
    own = {"train": [(Image.fromarray(pixels(8, 8, 3)), label) for label in (0, 1) * 60]}
    with pytest.raises(InputError, match=f"1 or 3 channels, but the model's input has {channels}"):
        fit(source_of(net(2, channels)), data_from_datasets(own), {"input_size": (channels, 8, 8)})


def npz(file: Path, labels: NDArray[np.int64], images: NDArray[np.generic] | None = None) -> str:
    images = pixels(len(labels), 8, 8, 3) if images is None else images
    np.savez(file, x_train=images, y_train=labels, x_test=images[:40], y_test=labels[:40])
    return f"npz:{file}"


@pytest.mark.parametrize(
    ("classes", "empty"),
    [((1, 2, 3, 4), "0"), ((0, 1, 3), "2"), ((10, 20), "0, 1, 2, 3 and so on"), ((0, 2, 4, 6), "1, 3, 5")],
)
def test_classes_that_no_image_has_are_named(classes: tuple[int, ...], empty: str, tmp_path: Path) -> None:
    data = load_data(npz(tmp_path / "d.npz", np.array(classes * 40)))
    with pytest.raises(InputError, match=f"No image is of class {empty}: class numbers count from 0, without gaps"):
        fit(source_of(net(len(classes))), data)
    if classes == (1, 2, 3, 4):
        torch.save(net(4).state_dict(), tmp_path / "w.pth")
        with pytest.raises(InputError, match="No image is of class 0"):
            fit(source_of("resnet10t", tmp_path / "w.pth"), data)


def test_a_class_without_images_is_no_error_where_the_model_has_it(tmp_path: Path) -> None:
    data = load_data(npz(tmp_path / "d.npz", np.array([0, 1, 3] * 40)))
    assert empty_classes(data) == ("2",)
    assert fit(source_of(net(4)), data).task.classes == ("0", "1", "2", "3")


# Inputs that are floats already

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SAID = {"mean": MEAN, "std": STD}


def floats(kind: str) -> NDArray[np.float32]:
    images = pixels(120, 8, 8, 3) / 255
    scaled = {"imagenet": (images - MEAN) / STD, "minus one to one": 2 * images - 1, "0 to 255": 255 * images}
    return scaled.get(kind, images).astype(np.float32)


@pytest.mark.parametrize(
    ("kind", "overrides", "known"),
    [
        ("imagenet", {}, False), ("imagenet", SAID, True), ("imagenet", {"mean": (0.5,), "std": (0.25,)}, False),
        ("minus one to one", {}, False), ("minus one to one", {"mean": (0.5,), "std": (0.5,)}, True),
        ("0 to 255", {}, False), ("pixels", {}, True),
    ],
)  # fmt: skip
def test_floats_are_inputs_and_pictures_become_such_floats_only_where_it_is_known_how(
    kind: str, overrides: dict[str, tuple[float, ...]], known: bool, tmp_path: Path
) -> None:
    data = fit(
        source_of(net(2)), load_data(npz(tmp_path / "d.npz", np.array([0, 1] * 60), floats(kind))), overrides
    ).data
    assert data.preprocess.from_pictures == known
    assert ("refuses pictures" in "".join(data.notes)) != known
    assert Preprocess.from_dict(data.preprocess.to_dict()) == data.preprocess
    assert torch.equal(data.train.batch([0]), data.train.preprocessed(data.preprocess).batch([0]))


def test_the_normalisation_of_a_model_is_not_believed_where_the_floats_deny_it(tmp_path: Path) -> None:
    model = net(2)
    model.pretrained_cfg = {"mean": MEAN, "std": STD, "input_size": (3, 8, 8)}  # type: ignore[assignment]
    for kind, known in (("imagenet", True), ("pixels", False)):
        data = load_data(npz(tmp_path / "d.npz", np.array([0, 1] * 60), floats(kind)))
        assert fit(source_of(model), data).data.preprocess.from_pictures == known


def test_data_sets_of_python_that_normalise_are_seen(tmp_path: Path) -> None:
    items = [(torch.tensor(image).permute(2, 0, 1), row % 2) for row, image in enumerate(floats("imagenet"))]
    data = fit(source_of(net(2)), data_from_datasets({"train": items, "test": items[:20]})).data
    assert not data.preprocess.from_pictures
    assert data_from_datasets({"train": [((image * 0).byte(), label) for image, label in items]}).floats is False


def inputs_module(place: Path, preprocess: Preprocess) -> ModuleType:
    """Return the inputs.py of a bundle with this preprocessing."""
    (place / "preprocess.json").write_text(json.dumps(preprocess.to_dict()))
    program = Path(bundles.__file__).parent / "bundle_template" / "inputs.py"
    (place / "inputs.py").write_bytes(program.read_bytes())
    found = importlib.util.spec_from_file_location("inputs_of_bundle", place / "inputs.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_a_bundle_of_unknown_floats_refuses_pictures_and_takes_floats(tmp_path: Path) -> None:
    module = inputs_module(tmp_path, Preprocess((3, 8, 8), (0.0,) * 3, (1.0,) * 3, from_pictures=False))
    Image.fromarray(pixels(8, 8, 3)).save(tmp_path / "one.png")
    (picture,) = module.read(str(tmp_path / "one.png"))["images"]
    with pytest.raises(ValueError, match="made for floats that were prepared elsewhere"):
        module.model_input(picture)
    given = floats("imagenet")[0]
    np.testing.assert_array_equal(module.model_input(given)[0], given.transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["png", "tif", "pgm"])
def test_a_bundle_reads_sixteen_bits_as_the_data_were_read(kind: str, tmp_path: Path) -> None:
    file, grey = sixteen(tmp_path, kind)
    module = inputs_module(tmp_path, Preprocess((3, 8, 8), (0.0,) * 3, (1.0,) * 3))
    (picture,) = module.read(str(file))["images"]
    np.testing.assert_array_equal(picture, np.asarray(read_image(file)))
    np.testing.assert_array_equal(picture[:, :, 0], grey)
