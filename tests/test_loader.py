from __future__ import annotations

import itertools
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, get_worker_info

from hirelc_deploy.compress.recovery import Recovery, Teacher, fine_tune
from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data import canvas, loader
from hirelc_deploy.inputs.data.batches import batches
from hirelc_deploy.inputs.data.datasets import data_from_datasets
from hirelc_deploy.inputs.data.images import ArrayImages, FolderImages, Images
from hirelc_deploy.inputs.data.loader import JUDGED, MEASURED, Wanted, loaded, workers_for
from hirelc_deploy.inputs.data.masks import MaskFile
from hirelc_deploy.inputs.data.pictures import read_image, read_reduced
from hirelc_deploy.inputs.data.placed import PlacedImages, Sample
from hirelc_deploy.inputs.data.preprocess import Preprocess
from hirelc_deploy.inputs.data.targets import Boxes
from hirelc_deploy.progress import Progress

SMALL = Preprocess((3, 8, 8), (0.5,) * 3, (0.25,) * 3, 0.8)
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # four processes on a small machine


def pictures(folder: Path, count: int = 24, size: tuple[int, int] = (20, 16)) -> list[Path]:
    """Save smooth JPEG pictures of this (width, height)."""
    rng = np.random.default_rng(0)
    files = [folder / f"{index:02}.jpg" for index in range(count)]
    for file in files:
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(file, quality=95)
    return files


def folder_images(folder: Path, count: int = 24) -> FolderImages:
    return FolderImages(pictures(folder, count), np.arange(count) % 2, SMALL, seed=3)


def boxed(folder: Path) -> PlacedImages:
    boxes = Boxes(np.array([[2.0, 2, 12, 9], [5, 1, 19, 15]]), np.arange(2), np.zeros(2, bool))
    return PlacedImages([Sample(file, boxes) for file in pictures(folder)], "boxes", SMALL)


def masked(folder: Path) -> PlacedImages:
    samples = []
    for index, file in enumerate(pictures(folder)):
        mask = file.with_suffix(".png")
        Image.fromarray(np.full((16, 20), index, np.uint8)).save(mask)
        samples.append(Sample(file, MaskFile(mask, "masks", None, 24)))
    return PlacedImages(samples, "masks", SMALL)


def wanted(count: int = 6, size: int = 4, total: int = 24) -> list[Wanted]:
    rng = np.random.default_rng(1)
    return [Wanted(rng.permutation(total)[:size], JUDGED if index % 3 == 2 else index) for index in range(count)]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return type(a) is type(b) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def fixed(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr(loader, "workers_for", lambda *_: workers)


# The same pictures


@pytest.mark.parametrize("make", [folder_images, boxed, masked])
def test_batches_and_targets_are_the_same_with_every_number_of_processes(make, tmp_path: Path):
    images = make(tmp_path)
    alone = list(loaded(images, wanted(), targets=True, workers=0))
    for asked, batch in zip(wanted(), alone, strict=True):
        view = None if asked.view == JUDGED else asked.view
        assert torch.equal(batch.pictures, images.batch(asked.rows) if view is None else images.views(asked.rows, view))
        assert same(batch.targets, images.targets(asked.rows, view))
    for workers in (1, 2, 4):
        found = list(loaded(images, wanted(), targets=True, workers=workers))
        assert [one.wanted.view for one in found] == [one.view for one in wanted()]
        assert all(torch.equal(a.pictures, b.pictures) for a, b in zip(alone, found, strict=True))
        assert all(same(a.targets, b.targets) for a, b in zip(alone, found, strict=True))


class Noise(nn.Module):
    """Draws random numbers of its own while it is trained."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.2, self.training)


class StoppedError(Exception):
    pass


def recovered(images: Images, begun: bytes = b"", stop_at: int = 99) -> tuple[dict[str, Tensor] | None, bytes]:
    torch.manual_seed(5)
    uncut = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    student = nn.Sequential(
        *[nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)], Noise()
    )
    left = begun

    def after_epoch(epoch: int, _student: nn.Module, standing: bytes) -> None:
        nonlocal left
        left = standing
        if epoch == stop_at:
            raise StoppedError

    recipe = Recovery(epochs=2.5, batch_size=4, learning_rate=0.1, feature_weight=0.0)
    teacher = Teacher(uncut, images, 8, torch.device("cpu"))
    try:
        student = fine_tune(
            student, teacher, recipe, seed=1, progress=Progress(quiet=True), begun=begun, after_epoch=after_epoch
        )
    except StoppedError:
        return None, left
    return student.state_dict(), left


def test_a_recovery_gives_the_same_weights_with_every_number_of_processes_and_after_a_resume(tmp_path, monkeypatch):
    fixed(monkeypatch, 0)
    alone, _ = recovered(folder_images(tmp_path))
    assert alone is not None
    for workers in (1, 2, 4):
        fixed(monkeypatch, workers)
        found, _ = recovered(folder_images(tmp_path))
        assert same(dict(alone), dict(found or {}))
    fixed(monkeypatch, 2)
    nothing, left = recovered(folder_images(tmp_path), stop_at=1)
    assert nothing is None
    resumed, _ = recovered(folder_images(tmp_path), left)
    assert same(dict(alone), dict(resumed or {}))


def test_loading_by_processes_draws_nothing_from_the_generator_of_the_training(tmp_path: Path):
    torch.manual_seed(2)
    before = torch.get_rng_state()
    list(loaded(folder_images(tmp_path), wanted(), workers=1))
    assert torch.equal(torch.get_rng_state(), before)


# What goes wrong


def test_a_broken_picture_is_the_same_sentence_whoever_reads_it(tmp_path: Path):
    images = folder_images(tmp_path)
    broken = tmp_path / "05.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    sentences = []
    for workers in (0, 2):
        with pytest.raises(InputError, match=r"05\.jpg: not a readable image .*; replace or remove it") as caught:
            list(loaded(images, [Wanted(np.arange(24), 0)], workers=workers))
        sentences.append(str(caught.value))
    assert sentences[0] == sentences[1]
    assert "\n" not in sentences[0]


def test_a_process_that_dies_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Deadly(FolderImages):
        def windows(self, indices: Any, view: int | None) -> Tensor:
            if get_worker_info() is not None and view == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().windows(indices, view)

    looks = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(looks, "__defaults__", (0.2,))  # seconds between looks at the processes: 5
    handler = signal.getsignal(signal.SIGCHLD)
    images = Deadly(pictures(tmp_path), np.zeros(24, np.int64), SMALL)
    with pytest.raises(InputError, match=r"a process that loads images died, .* run the same again") as caught:
        list(loaded(images, [Wanted(np.arange(4), view) for view in range(6)], workers=2))
    assert "\n" not in str(caught.value)
    assert signal.getsignal(signal.SIGCHLD) == handler  # or torch's would raise anywhere


# How many processes


def no_processes(*_args: Any) -> Any:
    raise AssertionError("a process was started")


def test_images_in_memory_are_loaded_by_no_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loader, "_by_processes", no_processes)
    monkeypatch.setattr(loader, "workers_for", no_processes)
    images = ArrayImages(torch.zeros(24, 3, 8, 8, dtype=torch.uint8), None, np.arange(24), SMALL)
    assert len(list(loaded(images, wanted()))) == 6


class Clock:
    """A clock that is only moved on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_number_of_processes_follows_from_the_time_that_loading_and_using_take(tmp_path, monkeypatch):
    clock, asked = Clock(), list[tuple[float, float]]()

    class Slow(FolderImages):
        def windows(self, indices: Any, view: int | None) -> Tensor:
            clock.now += 0.2
            return super().windows(indices, view)

    def asked_for(loading: float, using: float, _size: float) -> int:
        asked.append((loading, using))
        return 0

    monkeypatch.setattr(loader, "workers_for", asked_for)
    images = Slow(pictures(tmp_path), np.zeros(24, np.int64), SMALL)
    batches = [Wanted(np.arange(4) + 4 * view, view) for view in range(MEASURED + 2)]
    list(loaded(images, batches[: MEASURED + 1], clock=clock, workers=0))  # those are in memory then
    for _ in loaded(images, batches + batches[-1:], clock=clock):
        clock.now += 0.05
    assert asked == []  # too few others to know what loading takes
    images.canvases.forget()
    for _ in loaded(images, batches[: MEASURED + 1], clock=clock):
        clock.now += 0.05
    assert asked == [pytest.approx((0.2, 0.05))]
    asked.clear()
    list(loaded(images, batches[:MEASURED], clock=clock))
    assert asked == []  # nothing is left for other processes


def cores(monkeypatch: pytest.MonkeyPatch, count: int, shared_bytes: float = math.inf) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(count)), raising=False)
    free = type("Usage", (), {"free": min(shared_bytes, 2.0**40)})
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda _: free)


def test_as_many_processes_load_as_keep_up_and_no_more_than_there_are_cores(monkeypatch: pytest.MonkeyPatch):
    cores(monkeypatch, 8)
    assert workers_for(0.3, 0.1, 1e6) == 3
    assert workers_for(0.31, 0.1, 1e6) == 4
    assert workers_for(9.0, 0.1, 1e6) == 8
    assert workers_for(0.3, 0.0, 1e6) == 8
    assert workers_for(0.05, 0.95, 1e6) == 0  # a wait of 5 %
    assert workers_for(0.06, 0.94, 1e6) == 1
    cores(monkeypatch, 1)
    assert workers_for(0.3, 0.1, 1e6) == 0


def test_processes_are_fewer_where_little_memory_is_shared(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loader, "SHARED_MEMORY", Path("/"))
    cores(monkeypatch, 8, 64e6)  # a container's usual 64 MB; two batches of each process take half of it at most
    assert workers_for(9.0, 0.1, 4e6) == 4
    assert workers_for(9.0, 0.1, 40e6) == 0


def test_own_data_sets_are_asked_by_processes_only_where_their_loader_has_some():
    items = TensorDataset(torch.rand(40, 3, 8, 8), torch.arange(40) % 2)

    def train(**options: Any) -> Images:
        return data_from_datasets({"train": DataLoader(items, **options)}).train

    assert train(num_workers=2).decodes
    assert not train().decodes
    assert not train(num_workers=2, worker_init_fn=print).decodes  # what it opens is not known here
    assert not data_from_datasets({"train": items}).train.decodes
    asked = [Wanted(np.arange(4), 0)]
    (alone,), (found,) = (list(loaded(train(num_workers=1), asked, targets=True, workers=n)) for n in (0, 1))
    assert torch.equal(alone.pictures, found.pictures)
    assert same(alone.targets, found.targets)


# Memory


def test_what_fits_into_memory_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images = folder_images(tmp_path)
    answers = itertools.chain([1], itertools.repeat(0))
    monkeypatch.setattr(loader, "workers_for", lambda *_: next(answers))
    arriving = loaded(images, [Wanted(np.arange(2) + 2 * view, view) for view in range(12)], again=True)
    for _ in range(MEASURED + 1):
        next(arriving)
    for file in tmp_path.iterdir():
        file.unlink()
    assert len(list(arriving)) == 12 - MEASURED - 1
    assert images.canvases.unread(reduced=True) == []
    assert images.views(range(24), 5).shape == (24, 3, 8, 8)


def test_what_does_not_fit_into_memory_is_not_kept_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(canvas, "KEPT_BYTES", 3 * 12 * 10 * 23)  # of 24 canvases of 12 x 10
    images = folder_images(tmp_path)
    assert images.canvases.unread(reduced=True) == []
    fixed(monkeypatch, 1)
    list(loaded(images, wanted(), again=True))
    assert len(images.canvases._kept) <= 4 * MEASURED  # what this process decoded itself


def test_pictures_of_the_right_size_are_kept_once(tmp_path: Path) -> None:
    files = pictures(tmp_path, 4, (12, 10))
    images = FolderImages(files, np.zeros(4, np.int64), SMALL)
    images.batch(range(4))
    assert len(images.canvases._kept) == 2 * 4
    assert images.canvases._kept[1, True] is images.canvases._kept[1, False]


def test_all_splits_together_keep_no_more_than_the_room_for_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, second = folder_images(tmp_path), folder_images(tmp_path)
    monkeypatch.setattr(canvas, "_all", [first.canvases, second.canvases])
    monkeypatch.setattr(canvas, "KEPT_BYTES", 3 * 12 * 10 * 30)  # 30 canvases of 12 x 10
    for images in (first, second):
        images.batch(range(24))
    assert [len(images.canvases._kept) for images in (first, second)] == [24, 6]
    first.canvases.forget()
    second.batch(range(24))
    assert len(second.canvases._kept) == 24


def test_the_same_rows_are_read_by_processes_where_batches_are_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images = folder_images(tmp_path)
    alone = torch.cat(list(batches(images, 3, 20)))
    fixed(monkeypatch, 2)
    assert torch.equal(torch.cat(list(batches(folder_images(tmp_path), 3, 20))), alone)
    assert len(alone) == 20


# Decoding at a reduced size


@pytest.mark.parametrize(
    ("size", "wanted_size", "decoded"),
    [
        ((400, 300), (90, 70), (200, 150)),  # a quarter, 100 x 75, would not be twice as large
        ((400, 300), (50, 37), (100, 75)),
        ((401, 303), (25, 12), (51, 38)),
        ((400, 300), (101, 70), (400, 300)),
        ((100, 75), (10, 40), (100, 75)),  # one side decides
    ],
)
def test_a_large_jpeg_is_decoded_at_least_twice_as_large_as_it_is_wanted(size, wanted_size, decoded, tmp_path):
    (file,) = pictures(tmp_path, 1, size)
    image, own = read_reduced(file, lambda height, width: wanted_size[::-1])
    assert own == size[::-1]
    assert image.shape == (*decoded[::-1], 3)
    assert read_image(file).size == size


def test_a_png_is_decoded_whole(tmp_path: Path):
    Image.new("RGB", (400, 300)).save(tmp_path / "a.png")
    image, own = read_reduced(tmp_path / "a.png", lambda height, width: (10, 10))
    assert (image.shape, own) == ((300, 400, 3), (300, 400))


def test_views_of_a_large_jpeg_show_what_the_whole_picture_shows(tmp_path: Path):
    files = pictures(tmp_path, 4, (203, 161))
    images = FolderImages(files, np.arange(4), SMALL)
    for row, file in enumerate(files):
        whole, reduced = (images.canvases.read(row, reduced=reduced).int() for reduced in (False, True))
        assert whole.shape == reduced.shape == (3, *SMALL.canvas_size(161, 203))
        assert images.canvases.size(row) == (161, 203)
        assert not torch.equal(whole, reduced)
        assert (whole - reduced).abs().max() <= 3  # levels of 255
        assert torch.equal(whole.byte(), canvas.resized(read_image(file), SMALL))


def test_what_is_judged_is_decoded_whole_whatever_was_asked_for_before(tmp_path: Path):
    files = pictures(tmp_path, 4, (203, 161))
    first, second = (FolderImages(files, np.arange(4), SMALL) for _ in range(2))
    views, judged = first.views(range(4), 1), first.batch(range(4))
    assert torch.equal(second.batch(range(4)), judged)
    assert torch.equal(second.views(range(4), 1), views)


def test_boxes_lie_where_they_lay_in_pictures_decoded_at_a_reduced_size(tmp_path: Path):
    (file,) = pictures(tmp_path, 1, (160, 160))
    boxes = Boxes(np.array([[40.0, 40, 120, 120]]), np.arange(1), np.zeros(1, bool))
    square = Preprocess((3, 8, 8), (0.0,) * 3, (1.0,) * 3, geometry="stretch")
    images = PlacedImages([Sample(file, boxes)], "boxes", square, flips=False)
    images.views([0], 2)
    reduced = images.targets([0], 2)
    fresh = PlacedImages([Sample(file, boxes)], "boxes", square, flips=False)
    assert same(reduced, fresh.targets([0], 2))
    assert reduced[0]["boxes"][0, 2] - reduced[0]["boxes"][0, 0] == 4  # half of the picture, as before


class OpensItsFile:
    """The usual idiom: the file is opened by whoever first asks for an item."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, None

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.file is None:
            self.file = self.path.open("rb", buffering=0)
        self.file.seek(index * 192)
        return torch.frombuffer(bytearray(self.file.read(192)), dtype=torch.uint8).view(3, 8, 8), index % 2


def test_a_data_set_that_keeps_its_file_open_is_read_by_this_process_alone(tmp_path: Path):
    (tmp_path / "pictures").write_bytes(bytes(40 * 192))
    data = data_from_datasets({"train": DataLoader(OpensItsFile(tmp_path / "pictures"), num_workers=2)})
    assert not data.train.decodes


def test_batches_of_a_split_hold_no_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loader, "workers_for", lambda *args: 2)
    images = torch.arange(40 * 192, dtype=torch.float32).view(40, 3, 8, 8)
    data = data_from_datasets({"train": DataLoader(TensorDataset(images, torch.arange(40) % 2), num_workers=2)})
    assert data.train.decodes
    assert not any(batch.is_shared() for batch in batches(data.train, 2))
