from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hirelc_deploy import demo
from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.images import ArrayImages, FolderImages, Images
from hirelc_deploy.inputs.data.load import load_data
from hirelc_deploy.inputs.data.preprocess import Preprocess
from hirelc_deploy.inputs.data.splits import Data


def arrays(per_class: int = 40, classes: int = 4, side: int = 8, *, by_class: bool = False) -> dict[str, np.ndarray]:
    """A training image holds its own number in its first two pixels, so that a split can be traced to its rows."""
    rng = np.random.default_rng(0)
    count = per_class * classes
    labels = np.arange(count) // per_class if by_class else np.arange(count) % classes
    x = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    x[:, 0, 0, 0], x[:, 0, 1, 0] = np.arange(count) // 256, np.arange(count) % 256
    x_test = rng.integers(0, 256, (20, side, side, 3), dtype=np.uint8)
    return {"x_train": x, "y_train": labels, "x_test": x_test, "y_test": np.arange(20) % classes}


def saved(folder: Path, **changes: np.ndarray) -> str:
    np.savez(folder / "set.npz", **{**arrays(), **changes})
    return f"npz:{folder / 'set.npz'}"


def rows_of(images: Images) -> list[int]:
    pixels = (images.batch(range(len(images))) * 255).round().to(torch.int64)
    return (pixels[:, 0, 0, 0] * 256 + pixels[:, 0, 0, 1]).tolist()


def picture(file: Path, seed: int, size: tuple[int, int] = (12, 10)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(file)


def folder_of_classes(folder: Path, per_class: int = 30) -> Path:
    for index in range(per_class * 2):
        picture(folder / ("cat" if index % 2 else "dog") / f"{index:03}.png", index)
    return folder


def test_no_training_image_is_in_two_splits(tmp_path: Path) -> None:
    data = load_data(saved(tmp_path), calibration_images=10, selection_images=20)
    rows = [rows_of(split) for split in (data.train, data.calibration, data.selection)]
    assert [len(split) for split in rows] == [130, 10, 20]
    assert len({row for split in rows for row in split}) == 160


def test_what_is_held_out_comes_from_the_end_of_the_training_images(tmp_path: Path) -> None:
    data = load_data(saved(tmp_path), calibration_images=10, selection_images=20)
    assert sorted(rows_of(data.train)) == list(range(130))


def test_images_sorted_by_class_are_held_out_from_the_end_of_each_class(tmp_path: Path) -> None:
    data = load_data(saved(tmp_path, **arrays(by_class=True)), calibration_images=8, selection_images=8)
    assert np.bincount(data.calibration.labels).tolist() == [2, 2, 2, 2]
    assert sorted(rows_of(data.calibration) + rows_of(data.selection)) == [
        row for end in (40, 80, 120, 160) for row in range(end - 4, end)
    ]


def test_splits_that_the_file_names_are_used_as_they_are(tmp_path: Path) -> None:
    more = arrays(per_class=5)
    data = load_data(saved(tmp_path, x_selection=more["x_train"], y_selection=more["y_train"]), calibration_images=12)
    assert (len(data.train), len(data.calibration), len(data.selection)) == (144, 12, 20)


def test_the_test_split_is_handed_out_once_even_for_another_model(tmp_path: Path) -> None:
    data = load_data(saved(tmp_path))
    other = data.preprocessed(Preprocess((3, 6, 6), (0.5,) * 3, (0.5,) * 3))
    assert len(other.take_test()) == data.test_count == 20
    with pytest.raises(RuntimeError, match="handed out before"):
        data.take_test()


def test_a_batch_is_the_pixels_normalised_by_hand(tmp_path: Path) -> None:
    data = load_data(saved(tmp_path))
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    batch = data.preprocessed(Preprocess((3, 8, 8), mean, std)).train.batch([3, 5])
    expected = (arrays()["x_train"][[3, 5]].astype(np.float64) / 255 - mean) / std
    assert batch.dtype == torch.float32
    assert batch.is_contiguous()
    np.testing.assert_allclose(batch.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-6)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_images_in_memory_are_resized_as_pillow_does_it(interpolation: str) -> None:
    x = np.random.default_rng(1).integers(0, 256, (3, 20, 24, 3), dtype=np.uint8)
    preprocess = Preprocess((3, 28, 28), (0.0,) * 3, (1.0,) * 3, crop_pct=0.875, interpolation=interpolation)
    pixels = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    batch = ArrayImages(pixels, np.zeros(3, np.int64), np.arange(3), preprocess).batch(range(3))
    for image, ours in zip(x, batch.numpy(), strict=True):
        method = Image.Resampling[interpolation.upper()]
        resized = np.asarray(Image.fromarray(image).resize((38, 32), method), np.float64)[2:30, 5:33] / 255
        assert np.abs(ours - resized.transpose(2, 0, 1)).max() <= 1.01 / 255  # one level of rounding


def test_a_view_of_an_image_does_not_depend_on_its_batch() -> None:
    images = random_images(seed=3)
    together = images.views(range(6), 2)
    for row in range(6):
        assert torch.equal(images.views([row], 2)[0], together[row])
    assert not torch.equal(images.views(range(6), 1), together)
    assert not torch.equal(random_images(seed=4).views(range(6), 2), together)


def test_a_view_is_a_shifted_perhaps_mirrored_image_with_reflected_border() -> None:
    images = random_images(seed=0, count=64)
    plain = np.pad(images.batch(range(64)).numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)), mode="reflect")
    found = set()
    for row, view in enumerate(images.views(range(64), 5).numpy()):
        windows = {
            (top, left, flip): plain[row, :, top : top + 32, left : left + 32][..., :: -1 if flip else 1]
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
        }
        found |= {key for key, window in windows.items() if np.array_equal(window, view)}
    assert len(found) > 40  # 64 draws out of 162
    assert {0, 8} <= {top for top, _, _ in found}
    assert {False, True} == {flip for _, _, flip in found}


def random_images(seed: int, count: int = 6) -> ArrayImages:
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    preprocess = Preprocess((3, 32, 32), (0.5,) * 3, (0.5,) * 3)
    return ArrayImages(pixels, np.zeros(count, np.int64), np.arange(count), preprocess, seed)


def test_float_arrays_are_model_inputs_already(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(160, 3, 8, 8))
    data = load_data(saved(tmp_path, x_train=x, x_test=x[:20]))
    batch = data.preprocessed(Preprocess((3, 8, 8), (0.5,) * 3, (0.1,) * 3)).train.batch([0, 1])
    np.testing.assert_array_equal(batch.numpy(), x[:2].astype(np.float32))


def test_a_folder_gives_the_same_batch_as_its_images_in_memory(tmp_path: Path) -> None:
    files = [tmp_path / f"{index}.png" for index in range(3)]
    for index, file in enumerate(files):
        picture(file, index)
    pixels = np.stack([np.asarray(Image.open(file)) for file in files]).transpose(0, 3, 1, 2)
    preprocess = Preprocess((3, 9, 9), (0.4,) * 3, (0.2,) * 3, crop_pct=0.9)
    labels = np.zeros(3, np.int64)
    in_memory = ArrayImages(torch.from_numpy(pixels.copy()), labels, np.arange(3), preprocess)
    folder = FolderImages(files, labels, preprocess)
    level = 1.01 / 255 / 0.2
    assert (folder.batch([2, 0]) - in_memory.batch([2, 0])).abs().max() <= level
    assert (folder.views([2, 0], 7) - in_memory.views([2, 0], 7)).abs().max() <= level


def test_a_folder_of_classes_is_split_within_each_class(tmp_path: Path) -> None:
    data = load_data(f"imagefolder:{folder_of_classes(tmp_path)}", calibration_images=8, selection_images=8)
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.calibration), len(data.selection), data.test_count) == (32, 8, 8, 12)
    for split in (data.train, data.calibration, data.selection, data.take_test()):
        assert np.bincount(split.labels)[0] * 2 == len(split)
    assert data.preprocess.input_size == (3, 12, 10)


def test_val_is_for_selection_where_a_folder_also_has_test(tmp_path: Path) -> None:
    for split, per_class in (("train", 3), ("val", 10), ("test", 2)):
        folder_of_classes(tmp_path / split, per_class)
    data = load_data(f"imagefolder:{tmp_path}")
    assert (len(data.train), len(data.calibration), len(data.selection), data.test_count) == (6, 10, 10, 4)


def cifar_batches(folder: Path, *, binary: bool) -> np.ndarray:
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 40, 3072), dtype=np.uint8)
    labels = rng.permuted(np.tile(np.arange(10), (6, 4)), axis=1)
    for index, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        if binary:
            records = np.concatenate([labels[index][:, None].astype(np.uint8), pixels[index]], axis=1)
            (folder / f"{name}.bin").write_bytes(records.tobytes())
        else:
            batch = {
                b"batch_label": b"x",
                b"labels": labels[index].tolist(),
                b"data": pixels[index],
                b"filenames": [b"a"] * 40,
            }
            (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return np.concatenate([pixels.reshape(240, -1), labels.reshape(240, 1)], axis=1)


@pytest.mark.parametrize("binary", [False, True])
def test_both_layouts_of_cifar10_give_the_images_in_order(tmp_path: Path, binary: bool) -> None:
    folder = tmp_path / f"cifar-10-batches-{'bin' if binary else 'py'}"
    truth = cifar_batches(folder, binary=binary)
    for data_dir in (tmp_path, folder):
        data = load_data("torch/cifar10", data_dir=data_dir, calibration_images=10, selection_images=10)
        assert data.classes[3] == "cat"
        test = data.take_test()
        np.testing.assert_array_equal((test.batch(range(40)) * 255).round().reshape(40, -1), truth[200:, :-1])
        np.testing.assert_array_equal(test.labels, truth[200:, -1])
        np.testing.assert_array_equal(data.train.labels, truth[: len(data.train), -1])


def test_a_hostile_cifar10_batch_is_refused_and_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    folder = tmp_path / "cifar-10-batches-py"
    cifar_batches(folder, binary=False)
    (folder / "data_batch_2").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError, match="data_batch_2: not a batch of CIFAR-10"):
        load_data("torch/cifar10", data_dir=tmp_path)
    assert not (tmp_path / "ran").exists()


def test_the_demo_slice_is_balanced_and_large_enough() -> None:
    data = load_data("demo")
    assert data.labelled
    assert np.bincount(data.train.labels).tolist() == [800] * 10
    assert np.bincount(data.selection.labels).min() > 170
    assert len(data.calibration) == 256
    test = data.take_test()
    assert len(test) == 2000
    assert test.labels[:5].tolist() == [3, 8, 8, 0, 6]  # the first labels of CIFAR-10's test split
    pixels = (test.batch([0]) * 255).round().to(torch.int64)
    assert pixels[0, :, 0, 0].tolist() == [158, 112, 49]  # the first pixel of its first image, a cat


def test_what_the_demo_ships_stays_within_20_megabytes() -> None:
    folder = Path(demo.__file__).parent
    assert sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) <= 20e6


def test_random_inputs_repeat_have_no_labels_and_differ_between_splits() -> None:
    data = load_data("synthetic:4").preprocessed(Preprocess((3, 8, 8), (0.0,) * 3, (1.0,) * 3))
    assert not data.labelled
    assert data.train.labels is None
    assert torch.equal(data.train.batch([1, 2]), data.train.batch([1, 2]))
    assert torch.equal(data.train.batch([2, 1])[0], data.train.batch([1, 2])[1])
    assert not torch.equal(data.train.batch([0]), data.selection.batch([0]))


def one_class(folder: Path) -> str:
    picture(folder / "cat" / "a.png", 0)
    return f"imagefolder:{folder}"


def empty_class(folder: Path) -> str:
    folder_of_classes(folder)
    (folder / "fish").mkdir()
    return f"imagefolder:{folder}"


def corrupt(folder: Path) -> str:
    folder_of_classes(folder)
    file = folder / "cat" / "001.png"
    content = bytearray(file.read_bytes())
    content[60] ^= 255
    file.write_bytes(content)
    return f"imagefolder:{folder}"


def not_an_archive(folder: Path) -> str:
    (folder / "set.npz").write_bytes(b"PK nothing")
    return f"npz:{folder / 'set.npz'}"


def objects(folder: Path) -> str:
    return saved(folder, y_test=np.array([{"a": 1}] * 20, dtype=object))


BAD = {
    "no such file": (lambda folder: f"npz:{folder / 'none.npz'}", "no such file"),
    "no archive": (not_an_archive, "not readable as an .npz"),
    "pickled objects": (objects, "Python objects"),
    "unknown array": (lambda folder: saved(folder, x_calib=np.zeros(3)), "unknown array 'x_calib'"),
    "half a split": (lambda folder: saved(folder, x_selection=arrays()["x_test"]), "y_selection is missing"),
    "flat images": (lambda folder: saved(folder, x_train=np.zeros((160, 192), np.uint8)), r"shape \(160, 192\)"),
    "wrong type": (lambda folder: saved(folder, x_train=np.zeros((160, 8, 8, 3), np.int64)), "type int64"),
    "five channels": (lambda folder: saved(folder, x_train=np.zeros((160, 5, 5, 5), np.uint8)), "with fewer channels"),
    "NaN": (lambda folder: saved(folder, x_train=np.full((160, 8, 8, 3), np.nan)), "image 0 holds NaN"),
    "float labels": (lambda folder: saved(folder, y_train=np.zeros(160)), "whole numbers"),
    "fewer labels": (lambda folder: saved(folder, y_train=np.zeros(9, int)), "160 images, but there are 9 labels"),
    "negative label": (lambda folder: saved(folder, y_train=np.arange(160) % 4 - 1), "hold -1"),
    "label out of range": (lambda folder: saved(folder, y_test=np.full(20, 9)), "test labels hold 9"),
    "one label": (lambda folder: saved(folder, y_train=np.zeros(160, int)), "at least two classes"),
    "other size": (lambda folder: saved(folder, x_test=np.zeros((20, 9, 9, 3), np.uint8)), "test images are"),
    "empty test": (lambda folder: saved(folder, x_test=arrays()["x_test"][:0], y_test=np.zeros(0, int)), "is empty"),
    "no folder": (lambda folder: f"imagefolder:{folder / 'none'}", "no such folder"),
    "empty folder": (lambda folder: f"imagefolder:{folder}", "no class folders"),
    "one class": (one_class, "only one class"),
    "empty class": (empty_class, "fish: no images"),
    "corrupt image": (corrupt, r"001\.png: not a readable image"),
    "no data set": (lambda folder: "hfds/cifar10", "not supported; use one of"),
    "cifar10 without folder": (lambda folder: "torch/cifar10", "--data-dir"),
    "no number": (lambda folder: "synthetic:many", "number of random inputs"),
    "none at all": (lambda folder: "synthetic:0", "1 to 4096"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_gets_one_sentence(name: str, tmp_path: Path) -> None:
    make, sentence = BAD[name]
    with pytest.raises(InputError, match=sentence) as caught:
        load_data(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_one_image_is_not_enough_for_calibration(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 8"):
        load_data(saved(tmp_path), calibration_images=1)


def test_more_images_than_half_the_training_set_are_not_set_aside(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="too few to set 100 of them aside"):
        load_data(saved(tmp_path), calibration_images=50, selection_images=50)


def test_an_image_cut_short_is_named_when_it_is_read(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg", 0, (64, 64))
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:900])
    images = FolderImages([tmp_path / "a.jpg"], np.zeros(1, np.int64), Preprocess((3, 8, 8), (0.0,) * 3, (1.0,) * 3))
    with pytest.raises(InputError, match=r"a\.jpg: not a readable image"):
        images.batch([0])


def test_preprocessing_survives_json_and_refuses_nonsense() -> None:
    preprocess = Preprocess((3, 8, 9), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 0.9, "bilinear")
    assert Preprocess.from_dict(preprocess.to_dict()) == preprocess
    for change in ({"std": [0, 1, 1]}, {"mean": [0]}, {"crop_pct": 0}, {"interpolation": "magic"}, {"input_size": [3]}):
        with pytest.raises(InputError):
            Preprocess.from_dict({**preprocess.to_dict(), **change})


def test_data_for_a_model_with_other_channels_or_float_size_is_refused(tmp_path: Path) -> None:
    data: Data = load_data(saved(tmp_path))
    with pytest.raises(InputError, match="3 channels, but the model's input has 1"):
        data.preprocessed(Preprocess((1, 8, 8), (0.0,), (1.0,)))
    floats = np.zeros((160, 3, 8, 8), np.float32)
    data = load_data(saved(tmp_path, x_train=floats, x_test=floats[:20]))
    with pytest.raises(InputError, match="store uint8 images"):
        data.preprocessed(Preprocess((3, 16, 16), (0.0,) * 3, (1.0,) * 3))
