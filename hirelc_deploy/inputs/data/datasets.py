"""In: data sets of Python, with a length and items. Out: their images and targets in four splits."""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.canvas import resized
from hirelc_deploy.inputs.data.geometry import Frame, Pairs, cut, frame_of, moved, scales, view_frame
from hirelc_deploy.inputs.data.images import Images, Labels, Windowed
from hirelc_deploy.inputs.data.pictures import eight_bits
from hirelc_deploy.inputs.data.preprocess import Preprocess
from hirelc_deploy.inputs.data.samples import GEOMETRY_OF
from hirelc_deploy.inputs.data.splits import Data, SplitSizes, check_labels, data_of, identity, share_out
from hirelc_deploy.inputs.data.targets import KINDS, kind_of, truth_of
from hirelc_deploy.inputs.data.text_files import SPLITS
from hirelc_deploy.inputs.data.views import Indices, as_rows, draws
from hirelc_deploy.tasks.custom import load_function
from hirelc_deploy.user_code import settings_kept

Collate = Callable[[list[Any]], Any]
PLAIN = 2**62
"""Stands for the view of `batch`: a number that no view has."""
LOOKED_AT = 8  # items by which the kind of the targets is told
IMAGE_KEYS, TARGET_KEYS = ("image", "pixel_values"), ("target", "label", "labels")


@dataclass(frozen=True)
class Source:
    """One data set as the user gave it, and what is known of it.

    Attributes:
        name: Of its split, for errors.
        kind: Of its targets; see `targets.KINDS`.
        classes: Number of classes; None where it is not known.
        collate: Makes (images, targets) of a list of items, where items are something else.
        floats: Whether its images are model inputs.
        for_processes: Whether other processes may ask for items: its owner's DataLoader has workers, and it keeps no
            file open, which would give them each other's bytes. Elsewhere nobody knows.
    """

    name: str
    items: Any
    kind: str
    classes: int | None
    collate: Collate | None = None
    floats: bool = False
    for_processes: bool = False

    def item(self, row: int) -> tuple[Any, Any]:
        """Return an image and its target as they are; raises InputError for an item that is something else."""
        where = f"data set {self.name}, item {row}"
        try:
            found = self.items[row]
            if self.collate is not None:
                image, target = _pair(self.collate([found]), where)
                return _first(image), _first(target)
        except InputError:
            raise
        except Exception as error:  # somebody's own code: anything can come out of it
            reason = f"{type(error).__name__}: {error}".rstrip(".")
            raise InputError(f"{where} raises {reason}; correct the data set.") from error
        return _pair(found, where)


class DatasetImages(Windowed):
    """Rows of a data set of Python: anything with a length and items (image, target).

    An image is a float tensor (c, h, w), which is a model input already, or a uint8 tensor (c, h, w), a uint8 array
    (h, w, c) or a Pillow image, which are preprocessed, and targets that lie in them move along. Random augmentation of
    its own is drawn anew for each view, and is the same whenever a view is asked for again. Inputs that are floats are
    not cut or mirrored further.
    """

    canvases = None

    def __init__(
        self,
        source: Source,
        rows: NDArray[np.int64],
        preprocess: Preprocess,
        seed: int = 0,
        flips: bool = True,
        pairs: Pairs = (),
    ) -> None:
        self._source, self._rows, self._preprocess = source, rows, preprocess
        self._seed, self._flips, self._pairs = seed, flips, tuple(pairs)
        self._labels: Labels | None = None
        self._last: tuple[tuple[Any, ...], list[Any]] | None = None

    @property
    def labels(self) -> Labels | None:
        """(n,) class of each image; None for other targets.

        Where the data set does not list them, as torchvision's do, all items are read for it.
        """
        if self._source.kind != "classes":
            return None
        if self._labels is None:
            listed = listed_labels(self._source.items)
            self._labels = (
                listed[self._rows]
                if listed is not None
                else np.array([self._item(row, None)[1] for row in range(len(self))], np.int64)
            )
        return self._labels

    @property
    def decodes(self) -> bool:
        """Whether other processes may make items; see `Source.for_processes`."""
        return self._source.for_processes

    @property
    def labelled(self) -> bool:
        """Whether items have targets."""
        return self._source.kind != "none"

    def __len__(self) -> int:
        return len(self._rows)

    def targets(self, indices: Indices, view: int | None = None) -> list[Any]:
        """Return the targets as they lie in what `batch` or `views` return; see `targets.KINDS`."""
        key = (*as_rows(indices).tolist(), view)
        if self._last is None or self._last[0] != key:
            self._last = key, [self._item(row, view)[1] for row in key[:-1]]
        return list(self._last[1])

    def name_of(self, row: int) -> str:
        """Return the data set and the number of the item in it."""
        return f"data set {self._source.name}, item {int(self._rows[row])}"

    def preprocessed(self, preprocess: Preprocess) -> DatasetImages:
        """Return the same images for another model's input."""
        return DatasetImages(self._source, self._rows, preprocess, self._seed, self._flips, self._pairs)

    def flipping(self, flips: bool, pairs: Pairs = ()) -> DatasetImages:
        """Return the same images; views of pictures are mirrored at random or not. Float inputs never are."""
        return DatasetImages(self._source, self._rows, self._preprocess, self._seed, flips, pairs)

    def windows(self, indices: Indices, view: int | None) -> Tensor:
        """Return the images, pictures cut to the model's size; see `images.Windowed`.

        Views are under the data set's own augmentation, too.
        """
        rows = as_rows(indices).tolist()
        items = [self._item(row, view) for row in rows]
        self._last = (*rows, view), [target for _, target in items]
        return torch.stack([image for image, _ in items])

    def _item(self, row: int, view: int | None) -> tuple[Tensor, Any]:
        number = int(self._rows[row])
        where, kind = self.name_of(row), self._source.kind
        with seeded(int(draws(self._seed, PLAIN if view is None else view, torch.tensor([number]))[0, 0])):
            image, target = self._source.item(number)
        if _is_input(image) != self._source.floats:
            given, others = ("floats", "pictures") if _is_input(image) else ("a picture", "floats")
            form = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor | np.ndarray) else given
            raise InputError(
                f"{where}: the image is {form}, but the first ones are {others}; give all as floats (model inputs), or "
                "all as uint8 or Pillow pictures, which are preprocessed."
            )
        if self._source.floats:
            return self._float_input(image, target, where)
        picture = _picture(image, self._preprocess.input_size[0], where)
        size = (picture.height, picture.width)
        frame = self._frame(size, view, row)
        truth = truth_of(kind, target, where, size, self._source.classes)
        canvas = resized(picture, self._preprocess, frame.canvas, exact=view is None)
        window = cut(canvas, frame, self._preprocess.pad_value)
        return window, moved(kind, truth, frame, self._pairs)

    def _float_input(self, image: Tensor | NDArray[Any], target: Any, where: str) -> tuple[Tensor, Any]:
        tensor = torch.as_tensor(image).as_subclass(Tensor).float().contiguous()
        if tuple(tensor.shape) != self._preprocess.input_size:
            raise InputError(
                f"{where}: a model input (floats) of shape {tuple(tensor.shape)}, but the model takes "
                f"{self._preprocess.input_size}; resize in the data set, or return uint8 images, which are resized."
            )
        if not bool(tensor.isfinite().all()):
            raise InputError(f"{where}: the image holds NaN or infinity; correct the data set.")
        kind, size = self._source.kind, self._preprocess.input_size[1:]
        truth = truth_of(kind, target, where, size if kind in ("boxes", "keypoints") else None, self._source.classes)
        if kind in ("boxes", "keypoints"):
            truth = moved(kind, truth, Frame(size, size, (0, 0), size))
        return tensor, truth

    def _frame(self, size: tuple[int, int], view: int | None, row: int) -> Frame:
        if view is None:
            return frame_of(self._preprocess, size)
        return view_frame(self._preprocess, size, self._seed, view, row, self._flips, scales(self._source.kind))


def data_from_datasets(
    datasets: Any,
    sizes: SplitSizes | None = None,
    seed: int = 0,
    collate_fn: Collate | None = None,
    *,
    name: str = "datasets",
    kind: str | None = None,
    classes: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Data:
    """Make a data set of Python data sets: anything with a length and items (image, target); see `DatasetImages`.

    Args:
        datasets: Split to data set, or to a DataLoader, whose data set and collate_fn are taken. Splits are train, val
            (or validation), test, calibration and selection, in any case. With val and test, calibration and selection
            come from val; with one of them, from train. A single data set gives a fifth of itself for the test.
        sizes: How many images are set aside for calibration and selection.
        collate_fn: Makes (images, targets) of a list of items, where items are not (image, target).
        kind: Of the targets; else told from the first ones, see `targets.kind_of`.
        classes: Names; else the data set's own `classes`. Class numbers count from 0.
        options: Such as `flip_pairs` of keypoints.
    """
    if kind is not None and kind not in KINDS:
        raise InputError(f"{name}: kind {kind!r} is unknown; use one of {', '.join(KINDS)}.")
    if collate_fn is not None and not callable(collate_fn):
        raise InputError(f"{name}: collate_fn is {collate_fn!r:.60}; give a function of a list of items.")
    if classes is not None and (isinstance(classes, str) or not all(isinstance(word, str) for word in classes)):
        raise InputError(f"{name}: classes are {classes!r:.60}; give a list of names.")
    given = _by_split(datasets, name)
    first = next(iter(given.values()))
    names = tuple(classes) if classes is not None else _own_classes(first.items)
    looked = [
        Source(first.name, first.items, "none", None, first.collate or collate_fn).item(row)
        for row in range(min(LOOKED_AT, len(first.items)))
    ]
    kind = kind or kind_of([target for _, target in looked], f"data set {first.name}")
    listed = {split: listed_labels(source.items) for split, source in given.items()} if kind == "classes" else {}
    labels = {split: found for split, found in listed.items() if found is not None}
    if len(labels) == len(given) and "train" in labels:
        names = check_labels(labels, names or None, name)
    elif kind == "multilabel" and not names:
        names = tuple(str(index) for index in range(len(looked[0][1])))
    sources = {
        split: replace(
            source,
            kind=kind,
            classes=len(names) or None,
            collate=source.collate or collate_fn,
            floats=_is_input(looked[0][0]),
            for_processes=source.for_processes and _keeps_nothing_open(source.items),
        )
        for split, source in given.items()
    }
    counts = {split: len(source.items) for split, source in sources.items()}
    native = _native([image for image, _ in looked], kind)
    pairs = tuple((options or {}).get("flip_pairs", ()))
    flips = kind != "numbers" and (kind != "keypoints" or bool(pairs))
    splits: dict[str, Images] = {
        split: DatasetImages(sources[source], rows, native, seed, flips, pairs)
        for split, (source, rows) in share_out(counts, labels, sizes or SplitSizes(), name).items()
    }
    return data_of(name, names, splits, native, kind, options, floats=_is_input(looked[0][0]))


class _Nowhere(io.RawIOBase):
    """A file that forgets what is written."""

    def writable(self) -> bool:
        """It takes anything."""
        return True

    def write(self, data: Any) -> int:
        """Forget it."""
        return len(data)


def _keeps_nothing_open(items: Any) -> bool:
    """Return whether a data set that has read an item could be sent elsewhere; one with an open file cannot."""
    try:
        items[0]  # many open their file here
        ForkingPickler(_Nowhere(), 5).dump(items)
    except Exception:  # somebody's own code
        return False
    return True


def read_factory(spec: str, sizes: SplitSizes, seed: int) -> Data:
    """Call the function that FILE.py:factory names, without arguments; see `data_from_datasets` for what it returns.

    It may return a `Data` too.
    """
    factory = load_function(spec, "--data")
    try:
        with settings_kept():
            made = factory()
    except InputError:
        raise
    except Exception as error:  # somebody's own code: anything can come out of it
        reason = f"{type(error).__name__}: {error}".rstrip(".")
        raise InputError(f"--data {spec} raises {reason}; it is called without arguments.") from error
    if isinstance(made, Data):
        return made
    name = Path(spec.rpartition(":")[0]).stem
    return data_from_datasets(made, sizes, seed, getattr(factory, "collate_fn", None), name=name)


def listed_labels(items: Any) -> Labels | None:
    """Return the (n,) class numbers that a data set lists as torchvision's do, in `targets` or `labels`."""
    if isinstance(items, torch.utils.data.Subset):
        listed = listed_labels(items.dataset)
        return None if listed is None else listed[np.asarray(items.indices, np.int64)]
    for key in ("targets", "labels"):
        with contextlib.suppress(TypeError, ValueError):
            found = np.asarray(getattr(items, key, None))
            if found.shape == (len(items),) and found.dtype.kind in "iu" and len(found):
                return found.astype(np.int64)
    return None


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch, numpy and Python's random, and put them back afterwards."""
    python, array = random.getstate(), np.random.get_state()  # noqa: NPY002  # what data sets use
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)  # noqa: NPY002


def _by_split(datasets: Any, name: str) -> dict[str, Source]:
    """Return split to data set; one without a name is train."""
    given = datasets if isinstance(datasets, Mapping) else {"train": datasets}
    if not given:
        raise InputError(f"{name}: no data set in it; give at least train.")
    found: dict[str, Source] = {}
    for key, value in given.items():
        split = SPLITS.get(str(key).lower())
        if split is None:
            raise InputError(f"{name}: the split {key!r} is unknown; use train, val, test, calibration or selection.")
        if split in found:
            raise InputError(f"{name}: {key!r} and {found[split].name!r} are both {split}; keep one of them.")
        items, collate, for_processes = value, None, False
        if isinstance(value, torch.utils.data.DataLoader):
            items = value.dataset
            usual = torch.utils.data.default_collate
            collate = None if value.collate_fn is usual else value.collate_fn
            for_processes = value.num_workers > 0 and value.worker_init_fn is None
        if not hasattr(items, "__getitem__") or not hasattr(items, "__len__"):
            raise InputError(
                f"{name}: {key} is a {type(items).__name__}, which has no length or no items; give a data set with "
                "__len__ and __getitem__."
            )
        try:
            count = len(items)
        except Exception as error:  # somebody's own code: anything can come out of it
            raise InputError(f"{name}: the length of {key} raises {type(error).__name__}: {error}.") from error
        if not count:
            raise InputError(f"{name}: the data set {key} is empty; add items, or leave it out.")
        found[split] = Source(str(key), items, "none", None, collate, for_processes=for_processes)
    return found


def _own_classes(items: Any) -> tuple[str, ...]:
    while isinstance(items, torch.utils.data.Subset):
        items = items.dataset
    found = getattr(items, "classes", None)
    is_names = isinstance(found, list | tuple) and all(isinstance(name, str) for name in found)
    return tuple(found) if found and is_names else ()


def _pair(found: Any, where: str) -> tuple[Any, Any]:
    if isinstance(found, Mapping):
        image = next((found[key] for key in IMAGE_KEYS if key in found), None)
        target = next((found[key] for key in TARGET_KEYS if key in found), None)
        if image is not None:
            return image, target
        raise InputError(f"{where} has {', '.join(map(str, found))}; give (image, target) pairs, or a collate_fn.")
    if isinstance(found, tuple | list) and len(found) == 2:
        return found[0], found[1]
    if isinstance(found, Tensor | Image.Image | np.ndarray):
        return found, None
    shown = f"a {type(found).__name__}" + (f" of {len(found)}" if isinstance(found, tuple | list) else "")
    raise InputError(f"{where} is {shown}; give (image, target) pairs, or a collate_fn that makes them.")


def _first(value: Any) -> Any:
    """Return what a collated batch of one holds."""
    if isinstance(value, Mapping):
        return {key: _first(entry) for key, entry in value.items()}
    return None if value is None else value[0]


def _is_input(image: Any) -> bool:
    if isinstance(image, Tensor):
        return image.is_floating_point()
    return isinstance(image, np.ndarray) and image.dtype.kind == "f"


def _picture(image: Any, channels: int, where: str) -> Image.Image:
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim in (2, 3):
        image = image.as_subclass(Tensor).cpu().numpy()
        image = image.transpose(1, 2, 0) if image.ndim == 3 else image
    if isinstance(image, np.ndarray):
        image = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
        if image.dtype != np.uint8 or (image.ndim != 2 and (image.ndim != 3 or image.shape[2] != 3)):
            raise InputError(
                f"{where}: an image of {image.dtype} and shape {image.shape}; give uint8 with 1 or 3 channels, or a "
                "float tensor (channels, height, width) that is the model's input."
            )
        image = Image.fromarray(np.ascontiguousarray(image))
    if not isinstance(image, Image.Image):
        shown = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise InputError(f"{where}: the image is a {shown}; give a float or uint8 tensor, or a Pillow image.")
    return eight_bits(image, channels, where, image.format)


def _native(images: Sequence[Any], kind: str) -> Preprocess:
    """Return the input that suits the first images: their common size, or 3 x 224 x 224."""
    if _is_input(images[0]):
        shape = tuple(images[0].shape)
        if len(shape) != 3 or (shape[2] in (1, 3) and min(shape[:2]) > shape[2]):
            raise InputError(f"the first image has shape {shape}; a model input (floats) is (channels, height, width).")
        return identity(shape)
    pictures = [_picture(image, 3, "the first data set") for image in images]
    found = {(picture.height, picture.width) for picture in pictures}
    height, width = found.pop() if len(found) == 1 else (224, 224)
    native = identity((3, height, width))
    return Preprocess(native.input_size, native.mean, native.std, geometry=GEOMETRY_OF.get(kind, "crop"))
