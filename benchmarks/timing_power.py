"""Question: how often does the timing protocol find a difference of 3 %, and how often one that is not there?

    python benchmarks/timing_power.py synthetic            # simulated noise, true ratio known; minutes
    python benchmarks/timing_power.py real --trials 10     # two real files, 34 layers against 33; needs a quiet machine

Beside it, each time, the plain loop: all runs of one file in one process, then all of the other in another, judged by a
95 % bootstrap interval of the ratio of medians and the same margin of 1 %. `real` adds its trials to those already in
results/timing_power.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from hirelc_backends.onnxruntime_cpu import OnnxRuntimeCpu
from onnx import TensorProto, helper, numpy_helper
from record import provenance

from hirelc_deploy.measure.protocol import FULL, MARGIN, compare
from hirelc_deploy.testing.fake_backend import FakeTiming, Noise

RESULT = Path(__file__).resolve().parent / "results" / "timing_power.json"
RATIOS = (1.0, 1.03, 1 / 1.03)
LAYERS = 33
"""One layer more is 3.03 % more work; everything else in the file is Python and a pooling of 64 values."""
PLAIN_RUNS = 200


def verdict_of(ratios: np.ndarray) -> str:
    """Return what the plain loop says from bootstrapped ratios."""
    low, high = np.percentile(np.log(ratios), [2.5, 97.5])
    return "slower" if low > MARGIN else "faster" if high < -MARGIN else "same or not told apart"


def plain_verdict(reference: np.ndarray, candidate: np.ndarray, seed: int) -> str:
    """Judge two arrays of run times that were taken one after the other."""
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(reference), size=(2, 1000, len(reference)))
    return verdict_of(np.median(candidate[draws[1]], axis=1) / np.median(reference[draws[0]], axis=1))


def rates(ratio: float, verdicts: Counter[str]) -> dict[str, Any]:
    """Return counts, the share that found the true difference, and the share that found a wrong one."""
    truth = "slower" if ratio > 1 + 1e-9 else "faster" if ratio < 1 - 1e-9 else "same"
    total = sum(verdicts.values())
    wrong = {"slower", "faster"} - {truth}
    return {
        "true_ratio": ratio,
        "trials": total,
        "verdicts": dict(verdicts),
        "detected": verdicts[truth] / total if truth != "same" else None,
        "false": sum(verdicts[name] for name in wrong) / total,
    }


def synthetic(trials: int) -> dict[str, Any]:
    """Return the rates over simulated noise."""
    files = [Path("reference.onnx"), Path("candidate.onnx")]
    found: dict[str, list[Any]] = {"protocol": [], "plain loop, wall time": [], "plain loop, CPU time": []}
    for ratio in RATIOS:
        backend = KnownTruth(ratio)
        timings = [compare(files, backend, limits=FULL, seed=trial)[1] for trial in range(trials)]  # type: ignore[arg-type]
        row = rates(ratio, Counter(timing.verdict for timing in timings))
        row["median_rounds"] = float(np.median([timing.rounds for timing in timings]))
        row["interval_covers_truth"] = float(np.mean([t.ratio_low <= ratio <= t.ratio_high for t in timings]))
        found["protocol"].append(row)
        for clock, index in (("wall", 0), ("CPU", 1)):
            verdicts: Counter[str] = Counter()
            for trial in range(trials):
                a, b = (
                    FakeTiming([us], Noise(), 2 * trial + which).rounds(PLAIN_RUNS)[:, 0, index]
                    for which, us in enumerate((1000.0, 1000.0 * ratio))
                )
                verdicts[plain_verdict(a, b, trial)] += 1
            found[f"plain loop, {clock} time"].append(rates(ratio, verdicts))
        print(json.dumps({name: rows[-1] for name, rows in found.items()}), flush=True)
    return found


class KnownTruth:
    """A device that takes exactly so long for each file, but for its noise."""

    name = "simulated"

    def __init__(self, ratio: float) -> None:
        self._microseconds = [1000.0, 1000.0 * ratio]

    def open_timing(self, files: Any, threads: int, seed: int) -> Any:
        """Return a simulated process."""
        return nullcontext(FakeTiming(self._microseconds, Noise(), seed))


def network(path: Path, layers: int) -> Path:
    """Write `layers` equal 3x3 convolutions of 64 channels at 16x16, and a pooling."""
    rng = np.random.default_rng(0)
    nodes, constants, tensor = [], [], "images"
    for index in range(layers):
        weight = (rng.standard_normal((64, 64, 3, 3)) / 24).astype(np.float32)
        constants.append(numpy_helper.from_array(weight, f"w{index}"))
        nodes.append(helper.make_node("Conv", [tensor, f"w{index}"], [f"t{index}"], pads=[1, 1, 1, 1]))
        tensor = f"t{index}"
    nodes.append(helper.make_node("GlobalAveragePool", [tensor], ["out"]))
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 64, 16, 16])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 64, 1, 1])],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    return path


def plain_loop(file: Path, seed: int) -> np.ndarray:
    """Return the wall nanoseconds of PLAIN_RUNS runs in a process of their own, as a plain benchmark takes them."""
    with OnnxRuntimeCpu().open_timing([file], 1, seed) as process:
        return process.rounds(PLAIN_RUNS)[:, 0, 0].astype(np.float64)


def real(trials: int, first_seed: int) -> list[dict[str, Any]]:
    """Return the trials with real files: one layer more, one less, and the same again under another name."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        short, long = network(Path(folder) / "33.onnx", LAYERS), network(Path(folder) / "34.onnx", LAYERS + 1)
        again = network(Path(folder) / "33-again.onnx", LAYERS)
        for trial in range(first_seed, first_seed + trials):
            for ratio, candidate in ((1.0, again), ((LAYERS + 1) / LAYERS, long)):
                started = time.monotonic()
                timing = compare([short, candidate], OnnxRuntimeCpu(), limits=FULL, seed=trial)[1]
                seconds = time.monotonic() - started
                plain = plain_verdict(plain_loop(short, 2 * trial), plain_loop(candidate, 2 * trial + 1), trial)
                rows.append(
                    {
                        "true_ratio": ratio,
                        "protocol": timing.verdict,
                        "ratio": timing.ratio,
                        "interval": [timing.ratio_low, timing.ratio_high],
                        "rounds": timing.rounds,
                        "contended": timing.contended,
                        "seconds": round(seconds, 1),
                        "plain": plain,
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> int:
    """Run one part and write it into the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("synthetic", "real"))
    parser.add_argument("--trials", type=int, default=400)
    options = parser.parse_args()
    record: dict[str, Any] = json.loads(RESULT.read_text("utf-8")) if RESULT.exists() else {}
    record |= provenance("python benchmarks/timing_power.py synthetic; ... real --trials N, several times")
    if options.part == "synthetic":
        record["synthetic"] = synthetic(options.trials)
    else:
        rows = record.get("real_trials", [])
        rows += real(options.trials, len(rows))
        record["real_trials"] = rows
        record["real"] = {
            method: [
                rates(ratio, Counter(row[method] for row in rows if row["true_ratio"] == ratio))
                for ratio in sorted({row["true_ratio"] for row in rows})
            ]
            for method in ("protocol", "plain")
        }
    RESULT.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
