"""In: images, and which of them are wanted in which order. Out: batches in this order, made ahead where that pays.

An image is the same whoever makes it: its view is drawn from seed, view and row alone. So how many processes load, and
whether a training was resumed, changes no bit of a batch. Crops and flips stay ours for that reason: torchvision's v2
draws from torch's global generator, so that an image would depend on those before it. It also places masks and
keypoints otherwise (see `geometry`).
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from hirelc_deploy.errors import HirelcError, InputError
from hirelc_deploy.inputs.data.images import Images, Windowed
from hirelc_deploy.together import ranks

CPU = torch.device("cpu")
MEASURED = 3
"""Batches that this process makes itself before it is decided whether others load. The last one counts: on the first
ones memory is fetched and kernels are chosen."""

SHORT_WAIT = 0.05
"""Share of the time for which whoever uses the batches may wait for them; other processes load where it is more."""

JUDGED = -1
"""Stands for the view of images that are not augmented."""

AHEAD = 2
"""Batches that each process has ready before they are asked for: torch's own number."""

SHARED_MEMORY = Path("/dev/shm")
"""Where Linux keeps what processes share; a container may have little of it."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
FREED_BYTES = 2**26
"""That a process which loads does not give back."""

DIED = "DataLoader worker (pid"
"""What torch's errors begin with where a process of it is gone."""


@dataclass(frozen=True)
class Wanted:
    """A batch: rows of the images under a view; under `JUDGED` they are as they are judged."""

    rows: NDArray[np.int64]
    view: int


@dataclass(frozen=True)
class Batch:
    """What was wanted: (b, channels, height, width) model inputs, and their targets where those were asked for."""

    wanted: Wanted
    pictures: Tensor
    targets: list[Any] | None


def loaded(
    images: Images,
    wanted: Iterable[Wanted],
    *,
    targets: bool = False,
    device: torch.device = CPU,
    again: bool = False,
    workers: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Batch]:
    """Yield the batches in order; other processes make them ahead where whoever uses them would wait.

    Args:
        targets: Yield targets too.
        device: Where pictures are wanted. They become floats there: a quarter of the bytes are sent.
        again: The same images will be wanted again: those that all fit into memory are decoded first, and kept.
        workers: Processes that load; None finds how many, from the time that loading and using a batch take.

    Raises:
        InputError: An image cannot be read, or a process that loads died.
    """
    rest = iter(wanted)
    if not images.decodes:
        workers = 0
    all_kept = workers is None and _all_kept(images)
    while workers is None:
        loading = using = size_bytes = 0.0
        left = MEASURED
        while left and (asked := next(rest, None)) is not None:
            # What happens to be in memory says nothing of the others.
            left -= all_kept or not _are_kept(images, asked)
            begun = clock()
            batch = _made(images, asked, targets)
            size_bytes = batch.pictures.nbytes
            batch = _ready(images, batch, device)
            made = clock()
            yield batch
            del batch  # of a hundred megabytes or so
            loading, using = made - begun, clock() - made
        following = next(rest, None)
        if following is None:
            return
        rest = chain([following], rest)
        workers = workers_for(loading, using, size_bytes)
        if workers and again and _kept_ahead(images, following.view != JUDGED, workers):
            workers, again, all_kept = None, False, True  # from memory it is faster: measure once more
    if workers:
        make = lambda asked: _packed(_made(images, asked, targets))  # noqa: E731
        for asked, pictures, sent in _by_processes(make, rest, workers, device.type == "cuda"):
            yield _ready(images, Batch(asked, pictures, _unpacked(sent)), device)
        return
    for asked in rest:
        yield _ready(images, _made(images, asked, targets), device)


def workers_for(loading: float, using: float, size_bytes: float) -> int:
    """Return how many processes should load.

    Args:
        loading: Seconds that one process takes to make a batch.
        using: Seconds until the next one is asked for.
        size_bytes: Of the pictures of a batch.

    Returns:
        As many as keep up with whoever uses the batches, and no more than there are cores (torchrun's processes share
        them) and room in shared memory; 0 where waiting is short, where there is one core, in a process that may have
        none, and outside of Linux, where copying a process with threads is not safe.
    """
    if loading <= SHORT_WAIT * (loading + using):
        return 0
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return 0
    cores = len(os.sched_getaffinity(0)) // ranks.here()
    most = cores if cores > 1 else 0
    if SHARED_MEMORY.is_dir():  # half of what is free: others need some too, and who writes beyond the end is killed
        most = min(most, int(shutil.disk_usage(SHARED_MEMORY).free / 2 / (AHEAD * max(1.0, size_bytes))))
    return min(most, math.ceil(loading / using)) if using > 0 else most


def _made(images: Images, asked: Wanted, targets: bool) -> Batch:
    """Return a batch; of images that are decoded the windows of which their inputs are made."""
    view = None if asked.view == JUDGED else asked.view
    if images.decodes:
        pictures = cast(Windowed, images).windows(asked.rows, view)
    else:
        pictures = images.batch(asked.rows) if view is None else images.views(asked.rows, view)
    return Batch(asked, pictures, images.targets(asked.rows, view) if targets else None)


def _ready(images: Images, batch: Batch, device: torch.device) -> Batch:
    pictures = batch.pictures.to(device, non_blocking=True)
    return replace(batch, pictures=cast(Windowed, images).inputs(pictures) if images.decodes else pictures)


def _are_kept(images: Images, asked: Wanted) -> bool:
    canvases = images.canvases
    return canvases is not None and canvases.keeps(asked.rows.tolist(), reduced=asked.view != JUDGED)


def _all_kept(images: Images) -> bool:
    canvases = images.canvases
    return canvases is None or any(canvases.keeps(range(len(images)), reduced=reduced) for reduced in (True, False))


def _kept_ahead(images: Images, reduced: bool, workers: int) -> bool:
    """Decode what is not yet in memory, where all of it fits there; return whether there was anything."""
    canvases = images.canvases
    rows = [] if canvases is None else canvases.unread(reduced=reduced)
    if canvases is None or not rows:
        return False
    decoded = _by_processes(lambda row: canvases.read(row, reduced=reduced), rows, workers, False)
    for row, pixels in zip(rows, decoded, strict=True):
        canvases.keep(row, pixels.clone(), reduced=reduced)  # a clone, as a shared tensor keeps a file open
    return True


@dataclass(frozen=True)
class _Making:
    """What torch's DataLoader calls a data set: it makes what a key asks for."""

    make: Callable[[Any], Any]

    def __getitem__(self, key: Any) -> Any:
        """Return what was made, or the error that says why not: raised, torch would wrap it into a traceback."""
        try:
            made = self.make(key)
            for part in made if isinstance(made, tuple) else (made,):
                if isinstance(part, Tensor):
                    part.share_memory_()  # here: torch's own thread would print an error, and nobody get the batch
        except HirelcError as error:
            return error
        except RuntimeError as error:
            if "shared memory" not in str(error):
                raise
            return InputError(
                "the memory that processes share (/dev/shm) is full; give the container more (docker: --shm-size)."
            )
        return made


def _by_processes(make: Callable[[Any], Any], keys: Iterable[Any], workers: int, pinned: bool) -> Iterator[Any]:
    """Yield what copies of this process make of the keys, in their order."""
    loader: DataLoader[Any] = DataLoader(
        _Making(make),  # type: ignore[arg-type]  # it needs no base class
        sampler=keys,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pinned,
        worker_init_fn=_set_up,
        multiprocessing_context="fork",
        generator=torch.Generator(),  # of its own: that of the training must not know how many processes load
        prefetch_factor=AHEAD,
    )
    arriving = _begun(loader)
    died = False
    try:
        for made in arriving:
            if isinstance(made, HirelcError):
                raise made
            yield made
    except RuntimeError as error:
        if not str(error).startswith(DIED):
            raise
        died = True
    finally:
        del arriving  # which ends the processes, also where an error still holds this frame
    if died:  # said here, where torch's error and all that it holds is gone
        raise InputError(
            "a process that loads images died, often because the memory is full; what was finished is kept, so free "
            "some memory and run the same again."
        )


def _begun(loader: DataLoader[Any]) -> Iterator[Any]:
    """Start the processes of a loader."""
    # Torch's handler raises wherever this process happens to be when one of them dies; `next` notices it too.
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD)
    with warnings.catch_warnings():
        # Python 3.12 warns of threads when a process is copied: those of runtimes, which no copy uses.
        warnings.simplefilter("ignore", DeprecationWarning)
        arriving = iter(loader)
    if is_main:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    return arriving


def _as_it_is(made: Any) -> Any:
    return made


def _set_up(_number: int) -> None:
    """Leave Ctrl-C, which reaches every process, to the first one, and keep freed memory for the next picture.

    The C library would give it back, and Linux hand it out anew page by page: a sixth of the time of a picture.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(AttributeError):  # of another C library than GNU's
        allocator = ctypes.CDLL(None)
        for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            allocator.mallopt(option, FREED_BYTES)


# Between processes, tensors of targets travel as arrays: each shared tensor would keep a file open.


@dataclass(frozen=True)
class _Array:
    values: NDArray[Any]


def _packed(batch: Batch) -> tuple[Wanted, Tensor, Any]:
    return batch.wanted, batch.pictures, _replaced(batch.targets, Tensor, lambda tensor: _Array(tensor.numpy()))


def _unpacked(targets: Any) -> Any:
    return _replaced(targets, _Array, lambda array: torch.from_numpy(array.values))


def _replaced(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _replaced(entry, kind, change) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_replaced(entry, kind, change) for entry in value)
    return value
