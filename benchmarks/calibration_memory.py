"""Question: does calibration need more memory for more images?

    python benchmarks/calibration_memory.py --images 100 5000

Calibrates ResNet-18 for 32 x 32 images on random images that are made batch by batch, once per count, each in a process
of its own, and prints the peak memory of each process and their ratio as JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pretrained import cifar_resnet18

from hirelc_deploy.compress.integer import calibration
from hirelc_deploy.compress.onnx_file import export
from hirelc_deploy.evaluate.effort import SMALL_BATCH


def random_batches(count: int) -> Iterator[NDArray[np.float32]]:
    """Yield `count` images of values in [0, 1), in batches as the pipeline makes them."""
    rng = np.random.default_rng(0)
    for start in range(0, count, SMALL_BATCH):
        yield rng.random((min(SMALL_BATCH, count - start), 3, 32, 32), np.float32)


def main() -> int:
    """Measure in child processes, or be one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[100, 5000])
    parser.add_argument("--method", choices=calibration.METHODS, default=calibration.DEFAULT_METHOD)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)  # given to the child processes
    options = parser.parse_args()
    if options.file is not None:
        found = calibration.calibrate(options.file, random_batches(options.images[0]), options.method)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"images": found.images, "peak_bytes": peak}))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "resnet18.onnx"
        export.export_onnx(cifar_resnet18().eval(), torch.rand((2, 3, 32, 32)), file)
        records = []
        for count in options.images:
            command = [
                sys.executable,
                __file__,
                "--images",
                str(count),
                "--method",
                options.method,
                "--file",
                str(file),
            ]
            records.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    peaks = [record["peak_bytes"] for record in records]
    print(json.dumps({"method": options.method, "runs": records, "ratio": max(peaks) / min(peaks)}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
