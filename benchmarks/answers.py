"""In: files of one job. Out: what each answers on the test split, read once, and how long it takes, beside each other.

For benchmarks that compare several files: one walk over the test split, one interleaved timing, both journaled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hirelc_deploy.deliver.race import parts_of
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.inputs.data.images import Images
from hirelc_deploy.measure.backend import Backend
from hirelc_deploy.measure.protocol import TimingLimits, compare
from hirelc_deploy.tasks.classification import CLASSIFICATION
from hirelc_deploy.tasks.paired import paired_drop

Right = NDArray[np.bool_]
"""(images,) whether a file names the label of each."""


def right(file: Path, images: Images, backend: Backend, threads: int = 1) -> Right:
    """Return which of the labelled images a file answers right."""
    assert images.labels is not None
    return np.array(parts_of(backend.build(file, threads), CLASSIFICATION, images)) > 0


def drop(before: Right, after: Right) -> dict[str, float]:
    """Return the accuracy of a file, and what it lost against another on the same images, in points."""
    lost = paired_drop(CLASSIFICATION, before.astype(float).tolist(), after.astype(float).tolist())
    return {
        "accuracy": float(after.mean()),
        "drop_points": lost.points,
        "drop_low": lost.low,
        "drop_high": lost.high,
    }


def on_test_split(pipeline: Pipeline, files: Mapping[str, Path]) -> dict[str, Right]:
    """Return which test images each file answers right; a file that the run's journal knows is not run again."""
    keys = {name: f"test split, {digest(path)}" for name, path in files.items()}
    missing = [name for name, key in keys.items() if pipeline.run.fact(key) is None]
    images = pipeline.data.take_test() if missing else None
    found = {}
    for name in pipeline.progress.track(files, "test split", len(files)):

        def packed(path: Path = files[name]) -> dict[str, Any]:
            assert images is not None
            answers = right(path, images, pipeline.backend, pipeline.threads)
            return {"images": len(answers), "right": np.packbits(answers).tobytes().hex()}

        value = pipeline.run.remember(keys[name], packed)
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(value["right"]), np.uint8), count=value["images"])
        found[name] = bits.astype(np.bool_)
    return found


def timings(pipeline: Pipeline, files: Mapping[str, Path], limits: TimingLimits) -> dict[str, dict[str, Any]]:
    """Return the timing of each file, all taken side by side, relative to the first; journaled together."""

    def measure() -> list[dict[str, Any]]:
        with pipeline.progress.stage("timing of all files"):
            found = compare(list(files.values()), pipeline.backend, threads=pipeline.threads, limits=limits)
        return [timing.to_dict() | {"file": timing.file.name} for timing in found]

    key = f"timing of {[digest(path) for path in files.values()]} with {limits} on {pipeline.files.machine}"
    return dict(zip(files, pipeline.run.remember(key, measure), strict=True))


def digest(path: Path) -> str:
    """Return 16 hex digits of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
