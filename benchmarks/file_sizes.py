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
from pathlib import Path

from forms import judged, opened
from record import RESULTS, provenance

from hirelc_deploy.compress import slicing
from hirelc_deploy.compress.storage import codec
from hirelc_deploy.compress.storage.restore import restore
from hirelc_deploy.config import DataConfig, JobConfig, ModelConfig
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.outcome import Measured


def forms(pipeline: Pipeline, folder: Path) -> dict[str, tuple[Path, int]]:
    """Return name to the file that runs and the bytes that are kept."""
    runs = {"fp32": pipeline.files.reference, "int8 placed": pipeline.files.placed}
    plan = slicing.uniform_plan(pipeline.graph, 1.0, "int4")
    outcome = pipeline.outcome(plan, "F2")
    assert isinstance(outcome, Measured), outcome
    runs["int8 placed, Linear int4"] = pipeline.files.file_of(plan, "F2")
    found = {name: (path, path.stat().st_size) for name, path in runs.items()}
    for scheme in codec.ENCODERS:
        for bits in (4, 6):
            name = f"stored {scheme} {bits} bits"
            stored = folder / f"{scheme}-{bits}.stored"
            codec.store(pipeline.files.placed, stored, bits, scheme)
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
    with opened(config) as (pipeline, folder):
        kept = forms(pipeline, folder)
        test = pipeline.data.take_test()
        stored = [name for name in kept if name.startswith("stored")]
        rows = judged(pipeline, {name: path for name, (path, _) in kept.items()}, test, untimed=stored)
    for name, row in rows.items():
        row["bytes"] = kept[name][1]
        row["times_fewer_bytes"] = round(rows["fp32"]["bytes"] / row["bytes"], 2)
    record = {**provenance(" ".join(["python", *sys.argv])), "test_images": len(test), "forms": rows}
    (RESULTS / f"{options.name}.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
