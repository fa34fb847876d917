"""Question: does loading keep up with decoding, does training wait for pictures, and does memory grow with the files?

    python benchmarks/loading.py rate imagenet-sample-1000.zip       images per second, of 0, 1 and 2 processes
    python benchmarks/loading.py wait imagenet-sample-1000.zip       share of a recovery's time spent waiting
    python benchmarks/loading.py memory imagenet-sample-1000.zip     peak of apply and of search, 2,000 and 50,000 files

The archive holds WNID/CLASS.jpg. Its first pictures become 500 x 375 JPEG files, and hard links make of them as many as
are asked for. `rate` holds the loader, in as many processes, against three loops: one that decodes as Pillow does, one
that decodes as the loader does, and one that also resizes. Decoding is the limit of any loader, resizing is what the
model's input asks for. Prints JSON with machine,
versions, command and commit.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from record import provenance
from torch import nn
from torch.utils.data import DataLoader

from hirelc_deploy import _torchvision_guard
from hirelc_deploy.compress.recovery import Recovery, Teacher, fine_tune
from hirelc_deploy.evaluate.effort import GRADIENT_VALUES, LEAST_BATCH
from hirelc_deploy.evaluate.training import weights_of_model
from hirelc_deploy.inputs.data import loader
from hirelc_deploy.inputs.data.canvas import resized
from hirelc_deploy.inputs.data.image_folder import read_image_folder
from hirelc_deploy.inputs.data.images import Images
from hirelc_deploy.inputs.data.pictures import read_image, read_reduced
from hirelc_deploy.inputs.data.preprocess import Preprocess
from hirelc_deploy.inputs.data.splits import HELD_OUT, SplitSizes
from hirelc_deploy.progress import Progress

SIZE = 500, 375
SOURCES = 100
"""Different pictures; the others are links to them."""

CLASSES, BATCH, VAL_FILES, HELD = 10, 64, 500, 100
IMAGENET = Preprocess((3, 224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.95)
MOST_GROWTH = 1.15
NETWORK = "mobilenetv3_small_050"
"""A small network: its training asks for more pictures a second than most."""


def make_files(archive: Path, folder: Path, count: int) -> Path:
    """Write train with `count` files and val with VAL_FILES, in CLASSES folders each; return the folder."""
    with zipfile.ZipFile(archive) as packed:
        names = [name for name in packed.namelist() if name.endswith(".jpg")][:SOURCES]
        sources = []
        for index, name in enumerate(names):
            picture = Image.open(io.BytesIO(packed.read(name))).convert("RGB")
            sources.append(folder / f"source-{index:03}.jpg")
            picture.resize(SIZE, Image.Resampling.BICUBIC).save(sources[-1], quality=90)
    for split, files in (("train", count), ("val", VAL_FILES)):
        for label in range(CLASSES):
            (folder / split / str(label)).mkdir(parents=True)
        for index in range(files):
            os.link(sources[index % len(sources)], folder / split / str(index % CLASSES) / f"{index:06}.jpg")
    return folder


def training_images(folder: Path) -> Images:
    """Return the training split for the network's input."""
    return read_image_folder(folder, SplitSizes(HELD, HELD), 0).preprocessed(IMAGENET).train


# Rate


class Reading:
    """A data set of torch's: a batch of files is read, and nothing of it kept."""

    def __init__(self, read: Callable[[Path], Any]) -> None:
        self.read = read

    def __getitem__(self, files: list[Path]) -> int:
        return len([self.read(file) for file in files])


def decoded(file: Path) -> np.ndarray:
    """Return the pixels of a file as the loader decodes them."""
    return read_reduced(file, IMAGENET.canvas_size)[0]


def read_by(read: Callable[[Path], Any], files: list[Path], workers: int) -> Iterator[Any]:
    """Read whole batches of files in so many processes, in this one where there are none."""
    parts = [files[start : start + BATCH] for start in range(0, len(files) - BATCH + 1, BATCH)]
    if not workers:
        return map(Reading(read).__getitem__, parts)
    context = {"multiprocessing_context": "fork", "num_workers": workers}
    return iter(DataLoader(Reading(read), sampler=parts, batch_size=None, **context))  # type: ignore[arg-type]


def images_per_second(batches: Iterator[Any], skipped: int) -> float:
    """Return the rate after the first batches, in which processes start."""
    for _ in itertools.islice(batches, skipped):
        pass
    begun = time.perf_counter()
    return sum(BATCH for _ in batches) / (time.perf_counter() - begun)


def rate(archive: Path, count: int, processes: list[int]) -> list[dict[str, Any]]:
    """Return images per second of the loader and of its limits, for each number of processes; 0 is this one alone."""
    torch.set_num_threads(1)  # the processes that load have one thread each, and so has this one
    records = []
    with tempfile.TemporaryDirectory() as folder:
        images = training_images(make_files(archive, Path(folder), count))
        files = sorted((Path(folder) / "train").rglob("*.jpg"))[: len(images)]
        rows = np.arange(len(images))
        wanted = [loader.Wanted(rows[start : start + BATCH], 0) for start in range(0, len(rows) - BATCH + 1, BATCH)]
        for workers in processes:
            ways: dict[str, Callable[[int], Iterator[Any]]] = {
                "pillows_decoding": lambda workers: read_by(read_image, files, workers),
                "decoding": lambda workers: read_by(decoded, files, workers),
                "decoding_and_resizing": lambda workers: read_by(
                    lambda file: resized(decoded(file), IMAGENET, exact=False), files, workers
                ),
                "loader": lambda workers: loader.loaded(
                    images.preprocessed(IMAGENET), wanted, targets=True, workers=workers
                ),
            }
            record: dict[str, Any] = {"processes": workers}
            for name, begin in ways.items():  # begun one after the other: processes read ahead
                record[f"{name}_images_per_second"] = images_per_second(begin(workers), 2 * max(1, workers))
            for limit in ("pillows_decoding", "decoding", "decoding_and_resizing"):
                record[f"share_of_{limit}"] = record["loader_images_per_second"] / record[f"{limit}_images_per_second"]
            records.append(record)
            print(record, file=sys.stderr)
    alone = next((one["loader_images_per_second"] for one in records if one["processes"] == 0), None)
    return [{**one, "against_no_process": alone and one["loader_images_per_second"] / alone} for one in records]


# Waiting


class Watched(Teacher):
    """A teacher that clocks how long its pictures are waited for."""

    waited = 0.0

    def batches(self, wanted: Any) -> Any:
        """Yield the same batches."""
        arriving = super().batches(wanted)
        while True:
            begun = time.perf_counter()
            batch = next(arriving, None)
            self.waited += time.perf_counter() - begun
            if batch is None:
                return
            yield batch


def small_network() -> nn.Module:
    """Return the network that is trained, untrained."""
    _torchvision_guard.install()
    return import_module("timm").create_model(NETWORK, num_classes=CLASSES)


def wait(archive: Path, count: int, steps: int) -> list[dict[str, Any]]:
    """Return how long a recovery waits for pictures, loaded by this process alone and by as many as are found."""
    records, found = [], loader.workers_for
    with tempfile.TemporaryDirectory() as folder:
        make_files(archive, Path(folder), count)
        for alone in (True, False):
            chosen: list[int] = []

            def choose(*measured: float, alone: bool = alone, chosen: list[int] = chosen) -> int:
                chosen.append(0 if alone else found(*measured))
                return chosen[-1]

            loader.workers_for = choose
            torch.manual_seed(0)
            images = training_images(Path(folder))
            network = small_network().eval()
            teacher = Watched(network, images, 8, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
            recipe = Recovery(epochs=steps / (len(images) // BATCH), batch_size=BATCH)
            student = small_network()
            begun = time.perf_counter()
            fine_tune(student, teacher, recipe, seed=0, progress=Progress(quiet=True))
            seconds = time.perf_counter() - begun
            records.append(
                {"processes": chosen[-1:], "seconds": seconds, "waited": teacher.waited / seconds, "steps": steps}
            )
            print(records[-1], file=sys.stderr)
    loader.workers_for = found
    return records


# Memory


def memory(archive: Path, counts: list[int], steps: int) -> dict[str, Any]:
    """Return the peak memory of one apply with a recovery and of one search, for each number of files.

    Splits have the sizes that users get: of 2,000 files 100 judge, of 50,000 2,000 do. The ratio is that of the most
    files to the fewest; the goal is 1.15.
    """
    records = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            make_files(archive, Path(folder), count)
            weights = Path(folder) / "weights.safetensors"
            torch.manual_seed(0)
            weights.write_bytes(weights_of_model(small_network()))
            epochs = steps / ((count - round(HELD_OUT * count)) // batch_of(IMAGENET))
            common = [
                *("--model", NETWORK, "--model-arg", f"num_classes={CLASSES}", "--weights", str(weights)),
                *("--data", f"imagefolder:{folder}", "--recovery-epochs", f"{epochs:.6f}", "--quiet"),
            ]
            for job, own in (
                ("apply", ["--plan", "uniform:keep=0.5,precision=float"]),
                ("search", ["--trials", "2", "--finalists", "1", "--max-drop", "100"]),
            ):
                command = [sys.executable, "-m", "hirelc_deploy", job, *common, *own, "--out", f"{folder}/{job}"]
                begun = time.perf_counter()
                peak, child = peak_bytes(command)
                seconds = time.perf_counter() - begun
                records.append(
                    {"files": count, "job": job, "seconds": seconds, "peak_bytes": peak, "largest_child_bytes": child}
                )
                print(records[-1], file=sys.stderr)
    ratios = {}
    for job in ("apply", "search"):
        peaks = {one["files"]: one["peak_bytes"] for one in records if one["job"] == job}
        ratios[job] = peaks[max(peaks)] / peaks[min(peaks)]
    return {"runs": records, "ratio": ratios, "goal": MOST_GROWTH, "kept": max(ratios.values()) <= MOST_GROWTH}


def batch_of(preprocess: Preprocess) -> int:
    """Return the images of one step of a recovery; see `workplace.recovery_of`."""
    return max(LEAST_BATCH, min(BATCH, GRADIENT_VALUES // math.prod(preprocess.input_size)))


def peak_bytes(command: list[str]) -> tuple[int, int]:
    """Run a command; return the peak memory of its process, and that of the largest process that it started."""
    code = (
        "import json, resource, runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "try:\n    runpy.run_module('hirelc_deploy', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "who = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN\n"
        "print(json.dumps([resource.getrusage(one).ru_maxrss * 1024 for one in who]))\n"
    )
    result = subprocess.run([command[0], "-c", code, *command[2:]], check=True, capture_output=True, text=True)
    own, child = json.loads(result.stdout.splitlines()[-1])
    return own, child


def main() -> int:
    """Measure one of the three and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rate", "wait", "memory"])
    parser.add_argument("archive", type=Path)
    parser.add_argument("--files", type=int, nargs="+", help="4000; for wait 12000, for memory 2000 50000")
    parser.add_argument("--processes", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of a recovery: 40; for wait 160")
    options = parser.parse_args()
    files = options.files or {"rate": [4000], "wait": [12000], "memory": [2000, 50000]}[options.what]
    if options.what == "rate":
        found: Any = rate(options.archive, files[0], options.processes)
    elif options.what == "wait":
        found = wait(options.archive, files[0], options.steps or 160)
    else:
        found = memory(options.archive, files, options.steps or 40)
    print(json.dumps({**provenance(shlex.join(["python", *sys.argv])), options.what: found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
