"""Question: how small does a file get, on disk and as it runs, and what does each step cost in accuracy and time?

    python benchmarks/file_sizes.py --model benchmarks/pretrained.py:cifar_resnet18 \
        --weights weights/cifar_resnet18.safetensors --data npz:cifar10.npz --name file_sizes-resnet18

No layer is cut. Forms: float, integer as placed on this machine, the same with Linear layers in four bits, and the
integer file stored by the codec (each scheme, 4 and 6 bits; for disk and wire only), restored and run. Every form
answers all test images. Times are of one interleaved run; what is restored is as fast as the integer file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import RESULTS, provenance

from hirelc_deploy.compress import codec, slicing
from hirelc_deploy.compress.restore import restore
from hirelc_deploy.config import DataConfig, JobConfig, ModelConfig
from hirelc_deploy.job import open_workplace
from hirelc_deploy.measure.accuracy import correct, paired_drop, predict
from hirelc_deploy.measure.protocol import compare
from hirelc_deploy.outcome import Measured
from hirelc_deploy.pipeline import BATCH, Pipeline, batches
from hirelc_deploy.progress import Progress


def forms(pipeline: Pipeline, folder: Path) -> dict[str, tuple[Path, int]]:
    """Return name to the file that runs and the bytes that are kept."""
    runs = {"fp32": pipeline.reference, "int8 placed": pipeline.placed}
    plan = slicing.uniform_plan(pipeline.graph, 1.0, "int4")
    outcome = pipeline.outcome(plan, "F2")
    assert isinstance(outcome, Measured), outcome
    runs["int8 placed, Linear int4"] = pipeline.file_of(plan, "F2")
    found = {name: (path, path.stat().st_size) for name, path in runs.items()}
    for scheme in codec.ENCODERS:
        for bits in (4, 6):
            name = f"stored {scheme} {bits} bits"
            stored = folder / f"{scheme}-{bits}.stored"
            codec.store(pipeline.placed, stored, bits, scheme)
            found[name] = Path(restore(str(stored), str(folder / name))), stored.stat().st_size
    return found


def main() -> int:
    """Print and store the table of one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--name", required=True)
    options = parser.parse_args()
    config = JobConfig(
        ModelConfig(options.model, weights=options.weights), DataConfig(options.data, selection_images=1000)
    )
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        workplace = open_workplace(config, Path(folder) / "run", "", Progress())
        pipeline = workplace.pipeline
        files = forms(pipeline, Path(folder))
        test = pipeline.data.take_test()
        assert test.labels is not None
        before = None
        for name, (path, size) in files.items():
            answers = predict(pipeline.backend.build(path), (images.numpy() for images in batches(test, BATCH)))
            right = correct(answers, test.labels)
            before = right if before is None else before
            drop = paired_drop(before, right)
            rows[name] = {"bytes": size, "accuracy": float(right.mean())} | {
                "drop_points": drop.points,
                "drop_low": drop.low,
                "drop_high": drop.high,
            }
        timed = [name for name in files if not name.startswith("stored")]
        for name, timing in zip(timed, compare([files[n][0] for n in timed], pipeline.backend, threads=1), strict=True):
            rows[name] |= {"ratio": timing.ratio, "ratio_low": timing.ratio_low, "ratio_high": timing.ratio_high}
    whole = rows["fp32"]["bytes"]
    for row in rows.values():
        row["times_fewer_bytes"] = round(whole / row["bytes"], 2)
    record = {**provenance(" ".join(["python", *sys.argv])), "test_images": len(test), "forms": rows}
    (RESULTS / f"{options.name}.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
