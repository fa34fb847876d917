"""Question: what are bits per layer, and weights left out, worth in the file for storage, at equal bytes?

    python benchmarks/stored_bits.py --model M --weights W --data D --keep 0.5 --seeds 3 > stored_bits.json
    python benchmarks/stored_bits.py --demo --keep 0.5 --seeds 3 > stored_bits.json

The model is cut uniformly, compensated and written as an integer file. `equal` stores it with the same bits everywhere;
every strategy then chooses bits per layer within the bytes of the file with EQUAL_BITS, judging 48 restored files on
selection images (single choices for the knapsack and hirelc come on top). `sparse` leaves out the smallest weights.
Losses are nats between the integer file's answers and those of the restored one; nothing here is faster.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from record import provenance

from hirelc_deploy.compress import slicing
from hirelc_deploy.compress.storage import codec, restore
from hirelc_deploy.config import DataConfig, JobConfig, ModelConfig
from hirelc_deploy.deliver.stored_bits import StoredBits
from hirelc_deploy.demo import demo_config
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.evaluate.selection import judged, loss_of
from hirelc_deploy.jobs.workplace import open_workplace
from hirelc_deploy.progress import Progress

EQUAL_BITS, EVALUATIONS = 3, 48
STRATEGIES = ("two-stage", "knapsack", "hirelc", "random")


class Bench:
    """One integer file and how restored ones are judged."""

    def __init__(self, pipeline: Pipeline, keep: float, folder: Path) -> None:
        plan = slicing.uniform_plan(pipeline.graph, keep, "int8")
        self.file = pipeline.files.build(pipeline.cut(plan), plan, "F2")
        self._folder = folder
        self._files, self._task = pipeline.files, pipeline.task
        whole, shown = self._files.answers_of(self.file), pipeline.uncut.selection.shown(pipeline.effort.search_images)
        self._shown = [replace(part, answers=whole(part.pictures)) for part in shown]

    def judge(self, path: Path) -> float:
        """Return the loss of a restored file."""
        return loss_of(self._task, self._shown, self._files.answers_of(path))

    def stored(self, bits: int, sparsity: float, scheme: str) -> dict[str, Any]:
        """Return bytes, loss and accuracy of one stored file."""
        path = self._folder / "stored"
        codec.store(self.file, path, bits, scheme, sparsity=sparsity)
        restored = Path(restore.restore(str(path), str(self._folder)))
        loss, right = judged(self._task, self._shown, self._files.answers_of(restored))
        return {"bits": bits, "sparsity": sparsity, "bytes": path.stat().st_size, "loss": loss, "accuracy": right}


def main() -> int:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--weights")
    parser.add_argument("--data")
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--scheme", default="linear")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    config = demo_config()
    if not options.demo:
        config = JobConfig(ModelConfig(options.model, weights=options.weights), DataConfig(options.data))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pipeline = open_workplace(config, folder / "run", "", Progress(quiet=True)).pipeline
        bench = Bench(pipeline, options.keep, folder)
        equal = [bench.stored(bits, 0.0, options.scheme) for bits in codec.BITS]
        sparse = [bench.stored(bits, share, options.scheme) for bits in (3, 4, 5) for share in (0.25, 0.5, 0.7)]
        limit = next(one["bytes"] for one in equal if one["bits"] == EQUAL_BITS)
        print(equal, sparse, file=sys.stderr, flush=True)
        choice = StoredBits(bench.file, bench.judge, options.scheme)
        found: dict[str, Any] = {}
        for strategy in STRATEGIES:
            began, runs = time.perf_counter(), []
            for seed in range(options.seeds):
                runs.append(choice.choose(limit, strategy, EVALUATIONS, seed))
            losses = [run.loss for run in runs]
            found[strategy] = {
                "losses": losses,
                "geometric_mean_loss": float(np.exp(np.log(losses).mean())),
                "bytes": [run.size_bytes for run in runs],
                "evaluations": [run.evaluations for run in runs],
                "bits_of_first_seed": dict(runs[0].bits),
                "curve_of_first_seed": runs[0].curve,
                "seconds": round(time.perf_counter() - began, 1),
            }
            print(strategy, losses, found[strategy]["seconds"], file=sys.stderr, flush=True)
        record = {
            **provenance(shlex.join(["python", *sys.argv])),
            "integer_file_bytes": bench.file.stat().st_size,
            "equal": equal,
            "sparse": sparse,
            "limit_bytes": limit,
            "strategies": found,
        }
    print(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
