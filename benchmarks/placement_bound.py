"""Question: how far ahead of the best other file could any file of the same network be, on this runtime's kernels?

    python benchmarks/placement_bound.py --folder runs/placement --record benchmarks/results/placement.json

After placement.py, whose files and record it takes. ONNX Runtime's own profile says which share of the time of our
file, and of the best other one, goes to the products that every file of the network has to compute: convolutions,
linear layers and products of attention. Let all else cost nothing: sums, activations, pooling, norms, softmax,
conversions. Then our file would be ahead by the measured gain divided by the share of its products, and the other one
by 1 over the share of its products. The greater of the two is the bound of that network.

It is a bound for the kernels of this runtime only, and generous: nobody adds up a residual in no time. What a kernel
does to its own output (bias, ReLU, rounding) stays with it. Operators of our file that are no products are listed by
share: a next gain lies where the bound leaves room.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hirelc_backends.onnxruntime_cpu import OnnxRuntimeCpu
from placement import random_images
from record import RESULTS, provenance

from hirelc_deploy.measure.backend import OperatorTime

PRODUCTS = frozenset(
    {
        *("Conv", "FusedConv", "ConvInteger", "QLinearConv", "NhwcFusedConv", "ConvTranspose", "Gemm", "FusedGemm"),
        *("MatMul", "FusedMatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul"),
        *("QGemm", "MatMulNBits", "Attention", "QAttention", "MultiHeadAttention"),
    }
)
"""Operators of ONNX Runtime whose work grows with the multiply-accumulates of the network."""

SHOWN = 5
TURNS = 3
"""Our file and the other one are profiled in turn so often; each operator counts with its fastest turn."""


def share_of_products(operators: Iterable[OperatorTime]) -> float:
    """Return the share of a file's operator time that its products take, in (0, 1]."""
    times = [(one.operator in PRODUCTS, one.microseconds) for one in operators]
    return sum(time for is_product, time in times if is_product) / sum(time for _, time in times)


def largest_others(operators: Sequence[OperatorTime], count: int = SHOWN) -> dict[str, float]:
    """Return operator type to its share of the time, for the `count` largest of those that are no products."""
    total = sum(one.microseconds for one in operators)
    shares: dict[str, float] = {}
    for one in operators:
        if one.operator not in PRODUCTS:
            shares[one.operator] = shares.get(one.operator, 0.0) + one.microseconds / total
    return dict(sorted(shares.items(), key=lambda item: -item[1])[:count])


def bound(gain: float, ours: float, others: float) -> float:
    """Return how many times faster than the best other file one of this network can be.

    Args:
        gain: Of our file over the best other one, as measured.
        ours, others: Shares of products in the time of our file and of the best other one.
    """
    return max(gain / ours, 1 / others)


def fastest(profiles: Sequence[Sequence[OperatorTime]]) -> list[OperatorTime]:
    """Return each operator's fastest time over profiles of one file."""
    return [min(turns, key=lambda one: one.microseconds) for turns in zip(*profiles, strict=True)]


def examined(folder: Path, model: dict[str, Any], runs: int) -> dict[str, Any]:
    """Profile our file and the best other one of a model and return its row.

    Args:
        model: Of placement.py's record.
    """
    best = model["best_of_the_others"]
    image = random_images(folder / "fp32.onnx")[:1]
    runners = [OnnxRuntimeCpu().build(folder / f"{name}.onnx") for name in ("placed", best)]
    turns = [[runner.profile(image, runs) for runner in runners] for _ in range(TURNS)]
    ours, other = (fastest([turn[index] for turn in turns]) for index in range(2))
    shares = share_of_products(ours), share_of_products(other)
    return {
        "best_of_the_others": best,
        "ours_over_best": model["ours_over_best"],
        "share_of_products": {"ours": round(shares[0], 3), "best of the others": round(shares[1], 3)},
        "operator_microseconds": {
            "ours": round(sum(one.microseconds for one in ours)),
            "best of the others": round(sum(one.microseconds for one in other)),
        },
        "bound": round(bound(model["ours_over_best"], *shares), 3),
        "what_else_ours_does": {name: round(share, 3) for name, share in largest_others(ours).items()},
        "what_else_the_best_other_does": {name: round(share, 3) for name, share in largest_others(other).items()},
    }


def main() -> int:
    """Print and store the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="of the record; all of them where none is named")
    parser.add_argument("--folder", type=Path, required=True, help="that of placement.py")
    parser.add_argument("--record", type=Path, default=RESULTS / "placement.json")
    parser.add_argument("--runs", type=int, default=30, help="inferences of each of the profiles of a file")
    options = parser.parse_args()
    placed = json.loads(options.record.read_text("utf-8"))["models"]
    names = options.models or list(placed)
    unknown = [name for name in names if name not in placed or not (options.folder / name / "placed.onnx").exists()]
    if unknown:
        sys.exit(f"placement_bound: {', '.join(unknown)}: not in {options.record} or no files in {options.folder}.")
    rows = {}
    for name in names:
        rows[name] = examined(options.folder / name, placed[name], options.runs)
        print(name, json.dumps(rows[name]), flush=True)

    def mean(key: str) -> float:
        return round(math.exp(sum(math.log(row[key]) for row in rows.values()) / len(rows)), 3)

    record = {
        **provenance("python " + " ".join(sys.argv)),
        "placement_commit": sorted({placed[name]["commit"] for name in names}),
        "geometric_mean_over_best": mean("ours_over_best"),
        "geometric_mean_of_bounds": mean("bound"),
        "models": rows,
    }
    (RESULTS / "placement_bound.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(f"geometric mean {record['geometric_mean_over_best']}, bound {record['geometric_mean_of_bounds']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
