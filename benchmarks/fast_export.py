"""Question: are ONNX files that are filled in from earlier exports those of an export, and how much faster are they?

    python benchmarks/fast_export.py --plans 50

Per model: random widths of every unit, random elements, random weights. Every plan is written both ways, the fast one
with its comparison against torch included, the slow one by torch's exporter, with the same comparison; both batch
forms each. Writes results/fast_export.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import RESULTS, provenance
from zoo import difference, random_elements, randomised, run_file

from hirelc_deploy.compress import slicing
from hirelc_deploy.compress.onnx_file.refill import Exporter
from hirelc_deploy.graph.units import build_graph

MODELS = ("resnet18", "efficientnet_lite0", "deit_tiny_patch16_224")


def both_ways(name: str, plans: int, folder: Path) -> dict[str, Any]:
    """Return times and differences over `plans` random plans of a timm model."""
    model, images = randomised(name)
    graph, rng = build_graph(model, images), np.random.default_rng(0)
    fast, slow = Exporter(images), folder / "slow.onnx"
    paths = folder / "batched.onnx", folder / "static.onnx"
    fast.write(model, *paths)
    ratios, differences, seconds = [], [], []
    for _ in range(plans):
        widths = {unit.name: int(rng.choice(unit.widths)) for unit in graph.units}
        cut = slicing.slice_model(model, graph, random_elements(graph, widths, rng))
        before, started = fast.filled, time.perf_counter()
        fast.write(cut, *paths)
        quick = time.perf_counter() - started
        if fast.filled == before:
            continue
        started = time.perf_counter()
        Exporter(images).write(cut, slow, folder / "slow-static.onnx")
        ratios.append((time.perf_counter() - started) / quick)
        seconds.append(quick)
        ours, theirs = (torch.from_numpy(run_file(path, images)) for path in (paths[0], slow))
        differences.append(difference(ours, theirs))
    return {
        "model": name,
        "plans": plans,
        "filled_in": fast.filled,
        "exported": dict(fast.exported),
        "median_seconds_filled_in": statistics.median(seconds),
        "times_faster_median": statistics.median(ratios),
        "times_faster_least": min(ratios),
        "largest_difference": max(differences),
    }


def main() -> int:
    """Print one line per model and store the record; exit code 1 where a difference exceeds 1e-5 of the scale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--plans", type=int, default=50)
    options = parser.parse_args()
    rows = []
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(both_ways(name, options.plans, Path(folder)))
        print(rows[-1], flush=True)
    record = {**provenance(" ".join(["python", *sys.argv])), "models": rows}
    (RESULTS / "fast_export.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    return int(any(row["largest_difference"] > 1e-5 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
