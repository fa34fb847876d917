"""Question: how well do single layers, timed alone, predict the time of a whole cut network?

    python benchmarks/profile_error.py resnet18 --run DIR      # run it again to go on where it was stopped
    python benchmarks/profile_error.py deit_tiny --run DIR

Fits measured = fixed + scale * (sum of layer times) on the uniformly cut files that a search fits it on, then compares
the prediction with the measured time of 30 random plans: every unit at a random legal width, placed integers as in a
search. Weights are random; time does not depend on them. Writes its part of results/profile_error.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from record import provenance

from hirelc_deploy.config import DataConfig, JobConfig, ModelConfig, PreprocessConfig
from hirelc_deploy.evaluate.network_time import fit_network_time
from hirelc_deploy.jobs.workplace import open_workplace
from hirelc_deploy.measure.table import LatencyTable
from hirelc_deploy.outcome import Measured
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.progress import Progress

RESULT = Path(__file__).resolve().parent / "results" / "profile_error.json"
MODELS = {
    "resnet18": (ModelConfig("resnet18", arguments={"num_classes": 10}), (3, 64, 64)),
    "deit_tiny": (ModelConfig("deit_tiny_patch16_224"), (3, 224, 224)),
}


def main() -> int:
    """Measure, predict, compare and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--plans", type=int, default=30)
    options = parser.parse_args()
    source, size = MODELS[options.model]
    config = JobConfig(source, DataConfig("synthetic:8"), preprocess=PreprocessConfig(size), recovery_epochs=0)
    workplace = open_workplace(config, options.run, "benchmarks/profile_error.py", Progress(quiet=True))
    with workplace.run:
        pipeline = workplace.pipeline
        table = LatencyTable(pipeline.backend, options.run / "layer-times.jsonl", pipeline.threads)
        started = time.monotonic()
        network, facts = fit_network_time(pipeline, table)
        print(json.dumps(facts), flush=True)
        rng = np.random.default_rng(7)
        rows: list[dict[str, Any]] = []
        for _ in range(options.plans):
            low = rng.uniform(0.2, 0.9)
            keep = {unit.name: _width(rng, unit.widths, unit.size, low) for unit in pipeline.graph.units}
            outcome = pipeline.outcome(CompressionPlan(keep, default_precision="auto"), "F2")
            assert isinstance(outcome, Measured), outcome
            assert outcome.ratio is not None
            measured = outcome.ratio * pipeline.files.reference_ms
            predicted = network.predict(keep, lambda _: "int8")
            rows.append({"measured_ms": measured, "predicted_ms": predicted, "error": predicted / measured - 1})
            print(json.dumps(rows[-1]), flush=True)
    errors = np.abs([row["error"] for row in rows])
    record: dict[str, Any] = json.loads(RESULT.read_text("utf-8")) if RESULT.exists() else {}
    record |= provenance("python benchmarks/profile_error.py MODEL --run DIR")
    record[options.model] = {
        "input_size": size,
        "plans": len(rows),
        "median_error": float(np.median(errors)),
        "p90_error": float(np.percentile(errors, 90)),
        "largest_error": float(errors.max()),
        "rank_correlation": _spearman(rows),
        "fit": facts,
        "layer_measurements": table.measured,
        "seconds_of_this_run": round(time.monotonic() - started, 1),
        "rows": rows,
    }
    RESULT.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(json.dumps({key: value for key, value in record[options.model].items() if key != "rows"}))
    return 0


def _width(rng: np.random.Generator, widths: tuple[int, ...], size: int, low: float) -> int:
    ratio = rng.uniform(low, 1.0)
    return min(widths, key=lambda width: abs(width - ratio * size))


def _spearman(rows: list[dict[str, Any]]) -> float:
    ranks = [np.argsort(np.argsort([row[key] for row in rows])) for key in ("measured_ms", "predicted_ms")]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


if __name__ == "__main__":
    sys.exit(main())
