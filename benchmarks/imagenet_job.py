"""Question: what does a whole job take on a network and pictures of ImageNet's size, and what would all of ImageNet?

    python benchmarks/imagenet_job.py imagenet-sample-1000.zip --weights weights/resnet50.safetensors --budget 25m \\
        --run runs/imagenet_job --out benchmarks/results/imagenet_job.json

ResNet-50 with its published weights, and 1,000 JPEG files in shards (WNID/CLASS.jpg in the archive): 700 for training,
of which some calibrate and select, 300 for the test. The search is one command with a budget, and its record has the
seconds of every part, the peak memory of the process, and what the budget was kept to. With one training image a class
the accuracies say nothing.

What ImageNet would take on GPUs is on paper. A pass is the uncut network's forward computation of one picture. A
training step has one of the teacher's and three of the student's for each picture; a GPU that trains ResNet-50 at R
pictures per second does 3 R passes per second, and N of them N * SCALES ** log2(N) times as many. Seconds of an epoch:

    1,281,167 * (1 + 3 * macs_cut / macs) / (3 * R * N * SCALES ** log2(N))

An F1 judgement has two passes of each picture for batch norm, and one of each that judges, at macs_cut / macs. What the
target does (files, timing) takes as long as here. R is `--gpu-rate`, an assumption: no GPU was at hand.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import resource
import shlex
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import provenance

from hirelc_deploy.graph.units import build_graph
from hirelc_deploy.inputs.models.source import ModelSource

TRAIN, PICTURES = 700, 1_281_167
SCALES = 0.95
"""Of the doubled rate, what is left of it each time that the number of GPUs doubles; an assumption."""
EPOCHS = 10
"""Of recovery, as papers on this network take."""
JUDGED, NORMS = 512, 64
"""Pictures of an F1 judgement at ImageNet's size; see `Effort`."""
ON_GPU = ("importance", "input moments", "F1 slice", "F1 judge", "F2 slice", "F3 slice", "F3 recover")
"""Stages that a GPU computes; the others write, judge or time files on the target."""


def make_shards(archive: Path, folder: Path) -> Path:
    """Write the pictures, as they are stored, to shards of 100 in a random order; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive) as packed:
        names = sorted(name for name in packed.namelist() if name.endswith(".jpg"))
        order = np.random.default_rng(0).permutation(len(names))
        for start in range(0, len(order), 100):
            split = "train" if start < TRAIN else "test"
            with tarfile.open(folder / f"{split}-{start // 100:06}.tar", "w") as shard:
                for row in order[start : start + 100]:
                    for suffix, data in (("jpg", packed.read(names[row])), ("cls", Path(names[row]).stem.encode())):
                        member = tarfile.TarInfo(f"{row:06}.{suffix}")
                        member.size = len(data)
                        shard.addfile(member, io.BytesIO(data))
    return folder


def searched(options: argparse.Namespace, shards: Path) -> dict[str, Any]:
    """Run the search and return what its folder says, with the wall seconds and the peak memory of the command."""
    command = [
        *("hirelc-deploy", "search", "--model", f"{Path(__file__).parent}/pretrained.py:resnet50"),
        *("--model-arg", "num_classes=1000", "--weights", str(options.weights), "--data", f"webdataset:{shards}"),
        *("--calibration-images", "100", "--selection-images", "150", "--speedup", "6", "--max-drop", "100"),
        *("--trials", "12", "--options", "4", "--recovery-epochs", "2", "--budget", options.budget),
        *("--out", str(options.run)),
    ]
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "hirelc_deploy", *command[1:]], check=True)
    return {
        "command": shlex.join(command),
        "wall_seconds": time.perf_counter() - begun,
        "peak_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "result": json.loads((options.run / "result.json").read_text("utf-8")),
        "steps": json.loads((options.run / "progress.json").read_text("utf-8"))["measured"],
    }


def on_paper(found: Mapping[str, Any], macs: int, rate: float) -> dict[str, Any]:
    """Return what the same search with all of ImageNet's pictures, and EPOCHS of recovery, takes on GPUs.

    Args:
        macs: Of the uncut network.
        rate: Pictures per second at which one GPU trains it.
    """
    result, share = found["result"], found["result"]["macs"] / macs
    judgements = sum(one["count"] for kind, one in found["steps"].items() if kind == "F1")
    stages = {name: seconds for name, seconds in result["stages"].items() if name != "whole command"}
    here = sum(seconds for name, seconds in stages.items() if name not in ON_GPU)
    paper: dict[str, Any] = {"gpu_rate": rate, "macs_share": share, "epochs": EPOCHS, "f1_judgements": judgements,
                             "seconds_as_here": here}  # fmt: skip
    for count in (1, 8):
        passes = 3 * rate * count * SCALES ** math.log2(count)
        epoch = PICTURES * (1 + 3 * share) / passes
        judging = judgements * (2 * NORMS + JUDGED) * share / (3 * rate)
        paper[f"{count} GPUs"] = {
            "epoch_seconds": epoch,
            "pictures_per_second": PICTURES / epoch,
            "f1_seconds": judging,
            "search_seconds": EPOCHS * epoch + judging + here,
        }
    return paper


def main() -> None:
    """Read the command line, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--budget", default="25m", help="of the search, as hirelc-deploy takes it")
    parser.add_argument("--gpu-rate", type=float, default=2500.0, help="pictures per second that one GPU trains on")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    shards = make_shards(options.archive, options.run.with_name(f"{options.run.name}-shards"))
    found = searched(options, shards)
    source = ModelSource(f"{Path(__file__).parent}/pretrained.py:resnet50", arguments={"num_classes": 1000})
    macs = build_graph(source.load().eval(), torch.zeros(2, 3, 224, 224)).macs
    result = found.pop("result")
    record = {
        **provenance("python " + shlex.join(sys.argv)),
        **found,
        "budget": options.budget,
        **{
            key: result[key] for key in ("stages", "macs", "accuracy", "latency", "best_unpruned", "search", "warnings")
        },
        "uncut_macs": macs,
        "imagenet_on_paper": on_paper({**found, "result": result}, macs, options.gpu_rate),
    }
    text = json.dumps(record, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
