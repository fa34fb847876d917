"""Question: is what `inspect --verdict` foretells what whole files then measure?

    python benchmarks/verdict.py --threads 1 2                  # all networks; rows that the record has stay
    python benchmarks/verdict.py resnet18 --threads 1 --seconds 60

For each network and number of threads the verdict is asked for first. Then the files that it speaks of are written
whole and timed beside the float file: the same patterns of INT8, the network of half width in float, and in INT8. The
verdict about INT8 is right where it names the side of 1 that was measured; where the clock does not tell the sides
apart, where its interval holds 1. Weights are random and nothing is trained; times do not depend on it. Writes
results/verdict.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hirelc_backends.onnxruntime_cpu import OnnxRuntimeCpu
from record import RESULTS, provenance

from hirelc_deploy import api
from hirelc_deploy.compress.integer.quantize import quantize
from hirelc_deploy.compress.onnx_file.refill import Exporter
from hirelc_deploy.graph.units import build_graph
from hirelc_deploy.inputs.models.source import ModelSource, preprocess_of
from hirelc_deploy.jobs.verdict import SECONDS, TRIED, float_file, halved
from hirelc_deploy.measure.protocol import Timing, TimingLimits, compare

NETWORKS = (
    *("resnet18", "resnet50", "resnext50_32x4d", "regnety_008", "repvgg_a0", "densenet121", "vgg11_bn"),
    *("mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv3_large_100", "efficientnet_lite0", "efficientnet_b0"),
    *("ghostnet_100", "convnext_atto", "edgenext_xx_small", "mobilevit_xxs", "levit_128s"),
    *("deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s32_224"),
)
LIMITS = TimingLimits(processes=3, min_rounds=60, max_rounds=300, half_width=0.01, seconds=60.0)
HALF, HALF_INTEGER = "cutting half of the channels", "cutting half of the channels, with int8"


def measured(name: str, threads: int, folder: Path) -> dict[str, Timing]:
    """Return the times of the whole files beside the float file, INT8 by the fastest pattern of each."""
    backend = OnnxRuntimeCpu()
    target = next(precision for precision in backend.precisions() if precision.name == "int8")
    torch.manual_seed(0)
    network = ModelSource(name).load().eval()
    images = torch.rand((2, *preprocess_of(network, None, {}).input_size), generator=torch.Generator().manual_seed(0))
    exporter, files = Exporter(images), dict[str, Path]()
    models = {"float": network, HALF: halved(network, build_graph(network, images))}
    for what, model in models.items():
        plain, ranges = float_file(exporter, model, images, folder)
        files[what] = plain.rename(folder / f"{what}.onnx")
        for pattern in TRIED:
            files[f"{what}/{pattern}"] = path = folder / f"{what}-{pattern}.onnx"
            quantize(files[what], path, ranges, lambda layer: "int8", target=target, pattern=pattern)
    timings = dict(zip(files, compare([*files.values()], backend, threads=threads, limits=LIMITS), strict=True))
    integer = {
        what: min((timings[f"{what}/{pattern}"] for pattern in TRIED), key=lambda timing: timing.ratio)
        for what in models
    }
    return {"float": timings["float"], "int8": integer["float"], HALF: timings[HALF], HALF_INTEGER: integer[HALF]}


def is_right(foretold: Mapping[str, Any], verdict: str) -> bool:
    """Return whether an answer names the side that was measured; unknown is wrong."""
    if foretold["speedup"] is None:
        return False
    if verdict in ("faster", "slower"):
        return bool((foretold["speedup"] > 1) == (verdict == "faster"))
    return bool(foretold["speedup_low"] <= 1 <= foretold["speedup_high"])


def row(answers: Sequence[Mapping[str, Any]], seconds: float, timings: Mapping[str, Timing]) -> dict[str, Any]:
    """Return what was foretold beside what was measured."""
    rows: dict[str, Any] = {"seconds": round(seconds, 1), "float_ms": round(timings["float"].median_ms, 3)}
    by_name = {answer["what"]: answer for answer in answers}
    for what, timing in timings.items():
        answer = by_name.get(what)
        if answer is None:
            continue
        speedup = 1 / timing.ratio
        told = answer["speedup"]
        rows[what] = {
            "foretold": told,
            "interval": [answer["speedup_low"], answer["speedup_high"]],
            "measured": speedup,
            "verdict": timing.verdict,
            "right": is_right(answer, timing.verdict),
            "error": None if told is None else abs(told / speedup - 1),
            "inside": None if told is None else answer["speedup_low"] <= speedup <= answer["speedup_high"],
            "contended": timing.contended,
        }
    return rows


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return how often INT8 was foretold rightly, and how far off every kind of answer was."""
    found: dict[str, Any] = {
        "networks": len(rows),
        "int8_right": sum(one["int8"]["right"] for one in rows),
        "longest_seconds": max(one["seconds"] for one in rows),
    }
    for what in ("int8", HALF, HALF_INTEGER):
        known = [one[what] for one in rows if what in one and one[what]["foretold"] is not None]
        found[what] = {
            "known": len(known),
            "median_error": statistics.median([one["error"] for one in known]) if known else None,
            "largest_error": max((one["error"] for one in known), default=None),
            "inside": sum(one["inside"] for one in known),
        }
    return found


def main() -> int:
    """Foretell, measure, and write the record after each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=SECONDS)
    options = parser.parse_args()
    target = RESULTS / "verdict.json"
    record: dict[str, Any] = json.loads(target.read_text("utf-8")) if target.exists() else {}
    for name in options.networks:
        for threads in options.threads:
            rows = record.get("rows", {})
            if name in rows.get(str(threads), {}):
                continue
            found = api.inspect(name, verdict=True, threads=threads, seconds=options.seconds)
            with tempfile.TemporaryDirectory() as folder:
                timings = measured(name, threads, Path(folder))
            one = row(found.foretold, found.record["verdict"]["seconds"], timings)
            rows = {**rows, str(threads): {**rows.get(str(threads), {}), name: one}}
            record = {
                **provenance("python " + " ".join(sys.argv)),
                "summary": {number: summary([*each.values()]) for number, each in rows.items()},
                "rows": rows,
            }
            target.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
            told = one["int8"]["foretold"] or math.nan
            print(
                f"{name}, {threads} threads: int8 {told:.2f} foretold, {one['int8']['measured']:.2f} measured",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
