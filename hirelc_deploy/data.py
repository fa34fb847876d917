"""In: what the user wrote behind --data. Out: four disjoint splits of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickletools
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hirelc_deploy.config import JobConfig
from hirelc_deploy.errors import InputError
from hirelc_deploy.images import ArrayImages, FolderImages, Images, Indices, Labels, Preprocess, image_size, read_image

__all__ = ["Data", "Images", "Preprocess", "load_data"]

SUPPORTED = "npz:FILE, imagefolder:DIR, torch/cifar10 with --data-dir, synthetic:N, demo"
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}
MINIMUM_CALIBRATION = 8  # fewer images give ranges of single pictures, not of the data
HELD_OUT = 0.1  # of the training images, from their end; CIFAR-10: the last 5,000, which the usual recipes leave out
FOLDER_TEST = 0.2  # of each class, from its end, where a folder has no test split of its own
CHECKED_FILES = 5000  # image files whose headers are read before the work starts
MOST_SYNTHETIC = 4096  # a split is kept in memory: 2.5 GB of 3 x 224 x 224
NATIVE_SPLITS = ("train", "calibration", "selection", "test")


class _Seal:
    """Remembers, for all views of one data set, that the test images were handed out."""

    broken = False


@dataclass(frozen=True)
class Data:
    """Four disjoint splits of one data set.

    Attributes:
        name: Short name for reports.
        classes: Class names; their number is that of the model's outputs. Empty without labels.
        train: For recovery and importance.
        calibration: For activation ranges.
        selection: For choosing between candidates.
        labelled: False for random inputs, for which no accuracy is claimed.
        test_count: Number of test images.
    """

    name: str
    classes: tuple[str, ...]
    train: Images
    calibration: Images
    selection: Images
    preprocess: Preprocess
    labelled: bool
    test_count: int
    _test: Images
    _seal: _Seal = dataclasses.field(default_factory=_Seal)

    def take_test(self) -> Images:
        """Return the test images. They can be had once, for the final report; a second call is a bug."""
        if self._seal.broken:
            raise RuntimeError("the test split was handed out before: nothing may be chosen by it.")
        self._seal.broken = True
        return self._test

    def fingerprint(self) -> str:
        """Return a hash of the labels of what a search may see, and of the first images of each split."""
        digest = hashlib.sha256()
        for split in (self.train, self.calibration, self.selection):
            if split.labels is not None:
                digest.update(np.ascontiguousarray(split.labels, "<i8").tobytes())
            digest.update(split.batch(np.arange(min(8, len(split)))).numpy().tobytes())
        return digest.hexdigest()[:16]

    def preprocessed(self, preprocess: Preprocess) -> Data:
        """Return the same splits for another model's input; pixels and the seal of the test split are shared."""
        return dataclasses.replace(
            self,
            train=self.train.preprocessed(preprocess),
            calibration=self.calibration.preprocessed(preprocess),
            selection=self.selection.preprocessed(preprocess),
            preprocess=preprocess,
            _test=self._test.preprocessed(preprocess),
        )


@dataclass(frozen=True)
class SplitSizes:
    """How many training images are set aside; None takes 256 for calibration and up to 2,000 for selection."""

    calibration: int | None = None
    selection: int | None = None

    def __post_init__(self) -> None:
        if self.calibration is not None and self.calibration < MINIMUM_CALIBRATION:
            raise InputError(
                f"--calibration-images {self.calibration}: ranges taken from so few images do not hold for others; "
                f"give at least {MINIMUM_CALIBRATION} (256 is usual)."
            )
        if self.selection is not None and self.selection < 1:
            raise InputError(f"--selection-images {self.selection}: give at least 1 (2000 is usual).")


def configured_data(config: JobConfig) -> Data:
    """Load the data set that a job names, in its splits; see `load_data`."""
    return load_data(
        config.data.spec,
        data_dir=Path(config.data.directory) if config.data.directory else None,
        calibration_images=config.data.calibration_images,
        selection_images=config.data.selection_images,
        seed=config.seed,
    )


def load_data(
    spec: str,
    *,
    data_dir: Path | None = None,
    calibration_images: int | None = None,
    selection_images: int | None = None,
    seed: int = 0,
) -> Data:
    """Open the data set that `spec` names; every problem with it is an InputError of one sentence.

    The images come in their own size, scaled to [0, 1]; `Data.preprocessed` adapts them to a model.

    Args:
        spec: `npz:FILE`, `imagefolder:DIR`, `torch/cifar10`, `synthetic:N` (N random inputs in each split), or `demo`.
        data_dir: Where `torch/cifar10` lies: the folder with cifar-10-batches-py (or -bin) in it, or that folder.
        seed: Of the random crops and flips, and of synthetic inputs.
    """
    sizes = SplitSizes(calibration_images, selection_images)
    kind, _, rest = spec.partition(":")
    if spec == "demo":
        return _demo(seed)
    if spec == "torch/cifar10":
        return _cifar10(data_dir, sizes, seed)
    if kind == "npz" and rest:
        return _npz(Path(rest), sizes, seed)
    if kind == "imagefolder" and rest:
        return _image_folder(Path(rest), sizes, seed)
    if kind == "synthetic":
        return _synthetic(rest, seed)
    raise InputError(f"--data {spec!r} is not supported; use one of: {SUPPORTED}.")


# From a training set to train, calibration and selection.


def hold_out(
    labels: Labels, sizes: SplitSizes, want: Sequence[str], where: str, share: float = HELD_OUT
) -> dict[str, NDArray[np.int64]]:
    """Set images aside for the splits in `want` (calibration, selection) and return the rows of each split.

    They come from the last `share` of the images, or of each class where the images are sorted by class. Within it
    classes take turns, so that the first k images of a split are as balanced as they can be.

    Returns:
        Name of the split, `train` for what is left, to its (k,) rows in `labels`.
    """
    rows = np.arange(len(labels))
    if not want:
        return {"train": rows}
    asked = {"calibration": sizes.calibration, "selection": sizes.selection}
    count = max(round(share * len(labels)), sum(asked[name] or MINIMUM_CALIBRATION for name in want))
    if count > (len(labels) // 2 if share < 1 else len(labels)):
        raise InputError(
            f"{where}: {len(labels)} images are too few to set {count} of them aside for {' and '.join(want)}; "
            "give more images, or set fewer aside with --calibration-images and --selection-images."
        )
    tail = rows[-count:]
    if len(np.unique(labels[tail])) < len(np.unique(labels)):
        rank_from_end = _rank_within_class(labels[::-1])[::-1]
        tail = np.sort(np.lexsort((rows, rank_from_end))[:count])
    tail = tail[np.lexsort((labels[tail], _rank_within_class(labels[tail])))]
    parts = {"train": np.setdiff1d(rows, tail)}
    if "calibration" in want:
        left = count - asked["selection"] if "selection" in want and asked["selection"] else count // len(want)
        size = asked["calibration"] or min(256, left)
        parts["calibration"], tail = tail[:size], tail[size:]
    if "selection" in want:
        parts["selection"] = tail[: asked["selection"] or 2000]
    return parts


def _rank_within_class(labels: Labels) -> NDArray[np.int64]:
    """Return (n,): how many earlier images have the same label."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(labels) else np.zeros(0, np.int64)
    rank = np.empty(len(labels), np.int64)
    rank[order] = np.arange(len(labels)) - np.repeat(starts, np.diff(np.r_[starts, len(labels)]))
    return rank


def _check_labels(labels: Mapping[str, Labels], names: Sequence[str] | None, where: str) -> tuple[str, ...]:
    """Return the class names; raises InputError for labels that no classifier could have."""
    for split, values in labels.items():
        if not len(values):
            raise InputError(f"{where}: the {split} split is empty.")
        if values.min() < 0:
            raise InputError(f"{where}: the {split} labels hold {values.min()}; classes count from 0.")
    found = np.unique(labels["train"])
    if len(found) < 2:
        raise InputError(
            f"{where}: every training image has label {found[0]}; a classifier needs at least two classes."
        )
    count = len(names) if names is not None else int(found[-1]) + 1
    for split, values in labels.items():
        if values.max() >= count:
            raise InputError(f"{where}: the {split} labels hold {values.max()}, but the classes are 0 to {count - 1}.")
    return tuple(names) if names is not None else tuple(str(index) for index in range(count))


def _array_data(
    name: str,
    arrays: Mapping[str, tuple[NDArray[np.generic], Labels]],
    class_names: Sequence[str] | None,
    sizes: SplitSizes,
    seed: int,
) -> Data:
    """Make splits of (pixels (n, channels, height, width), labels) arrays: train and test, and what else there is."""
    classes = _check_labels({split: labels for split, (_, labels) in arrays.items()}, class_names, name)
    shapes = {split: pixels.shape[1:] for split, (pixels, _) in arrays.items()}
    for split, shape in shapes.items():
        if shape != shapes["train"]:
            raise InputError(f"{name}: the {split} images are {shape}, the training images {shapes['train']}.")
    preprocess = identity(shapes["train"])
    want = [split for split in ("calibration", "selection") if split not in arrays]
    splits = {}
    for split, rows in hold_out(arrays["train"][1], sizes, want, name).items():
        splits[split] = ArrayImages(torch.from_numpy(arrays["train"][0]), arrays["train"][1], rows, preprocess, seed)
    for split in set(arrays) - {"train"}:
        pixels, labels = arrays[split]
        splits[split] = ArrayImages(torch.from_numpy(pixels), labels, np.arange(len(labels)), preprocess, seed)
    return _data(name, classes, splits, preprocess)


def _data(name: str, classes: tuple[str, ...], splits: Mapping[str, Images], preprocess: Preprocess) -> Data:
    if len(splits["calibration"]) < MINIMUM_CALIBRATION:
        raise InputError(
            f"{name}: {len(splits['calibration'])} calibration images; give at least {MINIMUM_CALIBRATION}, better 256."
        )
    test = splits["test"]
    return Data(
        name,
        classes,
        splits["train"],
        splits["calibration"],
        splits["selection"],
        preprocess,
        labelled=True,
        test_count=len(test),
        _test=test,
    )


def identity(shape: Sequence[int]) -> Preprocess:
    """Return the preprocessing of a model that takes pixels in [0, 1] of this (channels, height, width)."""
    channels, height, width = shape
    return Preprocess((channels, height, width), (0.0,) * channels, (1.0,) * channels)


# npz


def _npz(file: Path, sizes: SplitSizes, seed: int) -> Data:
    try:
        with np.load(file, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise InputError(f"{file}: a single array, not an .npz archive with x_train, y_train, x_test, y_test.")
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise InputError(f"{file}: no such file.") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = "it holds Python objects" if "allow_pickle" in str(error) else str(error)
        raise InputError(f"{file}: not readable as an .npz archive of plain arrays ({reason}).") from None
    names = arrays.pop("classes", None)
    allowed = {f"{part}_{split}" for part in "xy" for split in NATIVE_SPLITS}
    if unknown := sorted(set(arrays) - allowed):
        raise InputError(f"{file}: unknown array {unknown[0]!r}; use {', '.join(sorted(allowed))} and classes.")
    splits = {}
    for split in NATIVE_SPLITS:
        if f"x_{split}" in arrays or f"y_{split}" in arrays:
            if missing := {f"x_{split}", f"y_{split}"} - set(arrays):
                raise InputError(f"{file}: array {missing.pop()} is missing.")
            splits[split] = _checked_arrays(arrays[f"x_{split}"], arrays[f"y_{split}"], f"{file}: x_{split}")
        elif split in ("train", "test"):
            raise InputError(f"{file}: arrays x_{split} and y_{split} are missing; it has {', '.join(sorted(arrays))}.")
    class_names = None if names is None else [str(name) for name in names.ravel().tolist()]
    return _array_data(file.name, splits, class_names, sizes, seed)


def _checked_arrays(
    pixels: NDArray[np.generic], labels: NDArray[np.generic], where: str
) -> tuple[NDArray[np.generic], Labels]:
    """Return (n, channels, height, width) uint8 or float32 pixels and (n,) int64 labels."""
    if pixels.ndim != 4:
        raise InputError(f"{where} has shape {pixels.shape}; images are (n, height, width, channels).")
    if pixels.dtype.kind == "f":
        if not np.isfinite(pixels).all():
            bad = int(np.flatnonzero(~np.isfinite(pixels).all((1, 2, 3)))[0])
            raise InputError(f"{where}: image {bad} holds NaN or infinity.")
        pixels = pixels.astype(np.float32, copy=False)
    elif pixels.dtype != np.uint8:
        raise InputError(f"{where} has type {pixels.dtype}; give uint8 images, or float model inputs.")
    if pixels.shape[3] in (1, 3):
        pixels = pixels.transpose(0, 3, 1, 2)
    elif pixels.shape[1] not in (1, 3):
        raise InputError(f"{where} has shape {pixels.shape}; images have 1 or 3 channels, on the last axis.")
    labels = labels.reshape(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise InputError(f"{where}: its labels are {labels.dtype} of shape {labels.shape}; give whole numbers (n,).")
    if len(labels) != len(pixels):
        raise InputError(f"{where} has {len(pixels)} images, but there are {len(labels)} labels.")
    return np.ascontiguousarray(pixels), labels.astype(np.int64)


# imagefolder


def _image_folder(folder: Path, sizes: SplitSizes, seed: int) -> Data:
    """Read DIR/train/CLASS/* with DIR/val or DIR/test (or both), or DIR/CLASS/*, of which a fifth becomes the test."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; imagefolder: names a folder with one folder per class.")
    where = str(folder)
    parts: dict[str, tuple[list[Path], Labels]] = {}
    if (folder / "train").is_dir():
        classes = _class_folders(folder / "train")
        parts["train"] = _listed(folder / "train", classes)
        held = [name for name in ("val", "test") if (folder / name).is_dir()]
        if not held:
            raise InputError(f"{folder}: has train, but neither val nor test; add one of them.")
        parts["test"] = _listed(folder / held[-1], classes)
        if len(held) == 2:
            parts["val"] = _listed(folder / "val", classes)
    else:
        classes = _class_folders(folder)
        files, labels = _listed(folder, classes)
        rank, counts = _rank_within_class(labels), np.bincount(labels, minlength=len(classes))
        is_test = rank >= counts[labels] - np.ceil(FOLDER_TEST * counts[labels])
        for split, rows in (("train", np.flatnonzero(~is_test)), ("test", np.flatnonzero(is_test))):
            parts[split] = [files[row] for row in rows], labels[rows]
    names = _check_labels({split: labels for split, (_, labels) in parts.items()}, classes, where)
    source = "val" if "val" in parts else "train"
    share = 1.0 if source == "val" else HELD_OUT
    rows_of = hold_out(parts[source][1], sizes, ["calibration", "selection"], where, share)
    if source == "val":
        del rows_of["train"]
    chosen = {split: (source, rows) for split, rows in rows_of.items()}
    for split in {"train", "test"} - set(chosen):
        chosen[split] = split, np.arange(len(parts[split][1]))
    native = _checked_files([file for files, _ in parts.values() for file in files])
    splits = {}
    for split, (source, rows) in chosen.items():
        files, labels = parts[source]
        splits[split] = FolderImages([files[row] for row in rows], labels[rows], native, seed)
    return _data(folder.name or where, names, splits, native)


def _class_folders(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise InputError(f"{folder}: no class folders in it; put the images of each class into a folder of its own.")
    if len(names) == 1:
        raise InputError(f"{folder}: only one class ({names[0]}); a classifier needs at least two.")
    return names


def _listed(folder: Path, classes: Sequence[str]) -> tuple[list[Path], Labels]:
    found = set(_class_folders(folder))
    if unknown := sorted(found - set(classes)):
        raise InputError(f"{folder / unknown[0]}: this class has no training images.")
    if missing := sorted(set(classes) - found):
        raise InputError(
            f"{folder}: no class {missing[0]}, which has training images; add it here, or remove it there."
        )
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        images = sorted((folder / name).rglob("*"))
        images = [file for file in images if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]
        if not images:
            raise InputError(f"{folder / name}: no images in it ({', '.join(sorted(IMAGE_SUFFIXES))} are read).")
        files += images
        labels += [label] * len(images)
    return files, np.array(labels, np.int64)


def _checked_files(files: Sequence[Path]) -> Preprocess:
    """Look into files spread over the whole set before the work starts; return their common size, or 224 x 224."""
    sizes = {image_size(file) for file in files[:: max(1, len(files) // CHECKED_FILES)]}
    height, width = sizes.pop() if len(sizes) == 1 else (224, 224)
    return identity((3, height, width))


# CIFAR-10 as torchvision keeps it, or in the official binary form


def _cifar10(data_dir: Path | None, sizes: SplitSizes, seed: int) -> Data:
    if data_dir is None:
        raise InputError("--data torch/cifar10: say with --data-dir which folder holds cifar-10-batches-py.")
    read: Callable[[Path], tuple[NDArray[np.uint8], Labels]]
    for name, suffix, read in (
        ("cifar-10-batches-py", "", _python_batch),
        ("cifar-10-batches-bin", ".bin", _binary_batch),
    ):
        for folder in (data_dir / name, data_dir):
            if (folder / f"test_batch{suffix}").is_file():
                batches = [read(folder / f"data_batch_{index}{suffix}") for index in range(1, 6)]
                train = np.concatenate([pixels for pixels, _ in batches]), np.concatenate([y for _, y in batches])
                arrays = {"train": train, "test": read(folder / f"test_batch{suffix}")}
                return _array_data("cifar10", arrays, CIFAR10_CLASSES, sizes, seed)
    raise InputError(
        f"{data_dir}: neither cifar-10-batches-py nor cifar-10-batches-bin is in it; unpack the official archive "
        "there, or make an npz file with benchmarks/import_cifar10.py."
    )


def _binary_batch(file: Path) -> tuple[NDArray[np.uint8], Labels]:
    """Read records of one label byte and 3,072 pixel bytes (channel, row, column)."""
    try:
        raw = np.fromfile(file, np.uint8)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}).") from None
    if not len(raw) or len(raw) % 3073:
        raise InputError(f"{file}: {len(raw)} bytes are not whole records of 3,073; fetch the archive again.")
    records = raw.reshape(-1, 3073)
    return np.ascontiguousarray(records[:, 1:]).reshape(-1, 3, 32, 32), records[:, 0].astype(np.int64)


def _python_batch(file: Path) -> tuple[NDArray[np.uint8], Labels]:
    """Read a batch of the Python archive without running it.

    Such a file is a program that builds a dict. Only its constants are looked at: the pixels are its one long byte
    string, the labels the whole numbers behind the string `labels`.
    """
    pixels, labels, in_labels = b"", list[int](), False
    try:
        for opcode, constant, _ in pickletools.genops(file.read_bytes()):
            if isinstance(constant, str | bytes) and opcode.name != "GLOBAL":
                text = constant if isinstance(constant, bytes) else constant.encode("latin-1", "replace")
                in_labels = text == b"labels"
                pixels = max(pixels, text, key=len)
            elif in_labels and "INT" in opcode.name and isinstance(constant, int):
                labels.append(constant)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}).") from None
    except ValueError:
        pixels = b""
    if not labels or len(pixels) != 3072 * len(labels):
        raise InputError(f"{file}: not a batch of CIFAR-10; fetch the official archive again.")
    return np.frombuffer(pixels, np.uint8).reshape(-1, 3, 32, 32).copy(), np.array(labels, np.int64)


# Random inputs, and the data that ships with the package


def _synthetic(count_text: str, seed: int) -> Data:
    """Make random inputs; the model's input size is not known yet, so that they are made again by `preprocessed`."""
    if not count_text.isdecimal() or not 1 <= int(count_text) <= MOST_SYNTHETIC:
        raise InputError(
            f"--data synthetic:{count_text}: give the number of random inputs in each split, 1 to {MOST_SYNTHETIC}."
        )
    count, native = int(count_text), identity((3, 224, 224))
    parts = {split: RandomImages(count, native, seed * 4 + index) for index, split in enumerate(NATIVE_SPLITS)}
    return Data(
        f"synthetic:{count}",
        (),
        parts["train"],
        parts["calibration"],
        parts["selection"],
        native,
        labelled=False,
        test_count=count,
        _test=parts["test"],
    )


class RandomImages:
    """Standard normal inputs without labels, made when asked for and equal each time."""

    labels = None

    def __init__(self, count: int, preprocess: Preprocess, seed: int) -> None:
        self._count, self._preprocess, self._seed = count, preprocess, seed

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: Indices) -> torch.Tensor:
        """Return (b, channels, height, width) inputs."""
        return self.views(indices, 0)

    def views(self, indices: Indices, view: int) -> torch.Tensor:
        """Return other inputs for another view: noise has no crops."""
        generator, inputs = torch.Generator(), []
        for row in torch.as_tensor(indices, dtype=torch.int64).tolist():
            generator.manual_seed(((self._seed * 1_000_003 + view) * 1_000_003 + row) % 2**63)
            inputs.append(torch.randn(self._preprocess.input_size, generator=generator))
        return torch.stack(inputs)

    def preprocessed(self, preprocess: Preprocess) -> RandomImages:
        """Return inputs of another size."""
        return RandomImages(self._count, preprocess, self._seed)


def _demo(seed: int) -> Data:
    """Read the slice of CIFAR-10 that ships with the package; see demo/DATA.md."""
    folder = Path(__file__).parent / "demo"
    arrays: dict[str, tuple[NDArray[np.generic], Labels]] = {}
    for split, labels in json.loads((folder / "labels.json").read_text("utf-8")).items():
        sheet = np.asarray(read_image(next(folder.glob(f"{split}.[wj]*"))))
        arrays[split] = _tiles(sheet)[: len(labels)], np.array(labels, np.int64)
    return _array_data("demo", arrays, CIFAR10_CLASSES, SplitSizes(), seed)


def _tiles(sheet: NDArray[np.uint8], side: int = 32) -> NDArray[np.uint8]:
    """Cut (rows * side, columns * side, 3) into (rows * columns, 3, side, side), row by row."""
    rows, columns = sheet.shape[0] // side, sheet.shape[1] // side
    return np.ascontiguousarray(
        sheet.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, side, side)
    )
