"""Judges and times several files of one model side by side, for integer_accuracy.py and file_sizes.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from hirelc_deploy.config import JobConfig
from hirelc_deploy.evaluate.cutting import arrays, divergence, tensors
from hirelc_deploy.evaluate.effort import BATCH
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.inputs.data.batches import batches
from hirelc_deploy.inputs.data.images import Images
from hirelc_deploy.jobs.workplace import open_workplace
from hirelc_deploy.measure.protocol import TimingLimits, compare
from hirelc_deploy.progress import Progress
from hirelc_deploy.tasks.paired import paired_drop

LIMITS = TimingLimits(processes=3, min_rounds=60, max_rounds=200, seconds=30.0)


@contextmanager
def opened(config: JobConfig, run: Path | None = None) -> Iterator[tuple[Pipeline, Path]]:
    """Give the pipeline of a model and a folder for files; both are gone afterwards, but for a `run` that was named."""
    with TemporaryDirectory() as name:
        yield open_workplace(config, run or Path(name) / "run", "", Progress()).pipeline, Path(name)


def judged(
    pipeline: Pipeline, files: Mapping[str, Path], test: Images, untimed: Collection[str] = ()
) -> dict[str, dict[str, Any]]:
    """Return for each file what it answers on all test images and how fast, against the first one, it does so.

    Args:
        untimed: Names of files that are not run on the device as they are.
    """
    task, threads = pipeline.task, torch.get_num_threads()
    pictures, targets = torch.cat(list(batches(test, BATCH))).numpy(), task.collate(test.targets(np.arange(len(test))))
    answers = {form: tensors(pipeline.backend.build(path, threads).infer(pictures)) for form, path in files.items()}
    parts = {form: task.parts(arrays(found), targets) for form, found in answers.items()}
    first = next(iter(files))
    rows: dict[str, dict[str, Any]] = {
        form: {
            "accuracy": task.value(parts[form]),
            "by_class": dict(task.by_class(parts[form])),
            "drop": dataclasses.asdict(paired_drop(task, parts[first], parts[form])),
            "divergence": divergence(task, answers[first], answers[form]),
            "bytes": path.stat().st_size,
        }
        for form, path in files.items()
    }
    timed = [form for form in files if form not in untimed]
    timings = compare([files[form] for form in timed], pipeline.backend, threads=1, limits=LIMITS)
    for form, timing in zip(timed, timings, strict=True):
        rows[form] |= {
            "ms": timing.median_ms,
            "speedup": 1 / timing.ratio,
            "speedup_interval": [1 / timing.ratio_high, 1 / timing.ratio_low],
        }
    return rows
