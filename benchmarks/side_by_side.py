"""Question: how much faster do several processes judge cut models than one, and do they say the same?

    python benchmarks/side_by_side.py --jobs 2 --plans 32 > side_by_side.json

The demo's network and images; random plans judged at F1: by one process with one thread, by one process with as many
threads as there are jobs, and by that many processes with one thread each. What all of them need is computed before the
clock starts; copying the processes is inside.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hirelc_backends.onnxruntime_cpu import OnnxRuntimeCpu
from record import provenance

from hirelc_deploy.demo import demo_config
from hirelc_deploy.evaluate.effort import Effort
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.inputs.data.load import configured_data
from hirelc_deploy.inputs.fitting import fit
from hirelc_deploy.inputs.models.source import ModelSource
from hirelc_deploy.outcome import Measured
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.runs import Run


def judged(folder: Path, count: int, jobs: int, threads: int) -> dict[str, Any]:
    """Return the seconds of the evaluations and what they measured."""
    torch.set_num_threads(threads)
    config = demo_config()
    weights = Path(str(config.model.weights))
    fitted = fit(ModelSource(config.model.spec, weights), configured_data(config))
    model, data = fitted.model, fitted.data
    run = Run.open(folder, "seed = 0\n", {})
    pipeline = Pipeline(model, data, OnnxRuntimeCpu(), run, effort=Effort(), jobs=jobs)
    rng = np.random.default_rng(0)
    plans = [
        CompressionPlan({unit.name: int(rng.choice(unit.widths)) for unit in pipeline.graph.units})
        for _ in range(count + 1)
    ]
    pipeline.outcome(plans[-1], "F1")  # computes what all plans need
    began = time.perf_counter()
    losses = []
    for start in range(0, count, 8):  # batches of a search
        batch = plans[start : min(start + 8, count)]
        pipeline.begin(batch)
        outcomes = [pipeline.outcome(plan, "F1") for plan in batch]
        losses += [outcome.loss for outcome in outcomes if isinstance(outcome, Measured)]
    seconds = time.perf_counter() - began
    run.close()
    return {"jobs": jobs, "threads": threads, "plans": count, "seconds": round(seconds, 3), "losses": losses}


def main() -> int:
    """Print one JSON object with the three ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--plans", type=int, default=32)
    options = parser.parse_args()
    ways = [(1, 1), (1, options.jobs), (options.jobs, 1)]
    with tempfile.TemporaryDirectory() as folder:
        found = [judged(Path(folder) / str(i), options.plans, *way) for i, way in enumerate(ways)]
    first = found[0]
    for one in found:
        one["times_faster"] = round(first["seconds"] / one["seconds"], 3)
        one["same_losses"] = one["losses"] == first["losses"]
        differences = np.abs(np.log(one["losses"]) - np.log(first["losses"]))
        one["largest_difference_of_log_losses"] = float(differences.max())
        print({key: value for key, value in one.items() if key != "losses"}, file=sys.stderr)
    print(json.dumps({**provenance(shlex.join(["python", *sys.argv])), "ways": found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
