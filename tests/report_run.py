"""A small finished run, journaled by the real journal, for the tests of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hirelc_deploy.outcome import Failed, Fidelity, Measured, Outcome
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.runs import Run

EVIL = '<script>alert("x")</script>'
FP32_MS = 10.0


def candidate(name: str, ratio: float, size_bytes: int, accuracy: float) -> dict[str, Any]:
    return {
        "name": name,
        "ratio": ratio,
        "ratio_low": ratio * 0.99,
        "ratio_high": ratio * 1.01,
        "median_ms": FP32_MS * ratio,
        "size_bytes": size_bytes,
        "accuracy_selection": accuracy,
    }


def layer(name: str, block: str, full: int, kept: int, precision: str = "int8") -> dict[str, Any]:
    widths = {"in_full": full, "out_full": full, "in_kept": kept, "out_kept": kept}
    counts = {"params": 9 * kept * kept, "macs": 9 * kept * kept * 64}
    return {"name": name, "block": block, "kind": "conv", **widths, **counts, "precision": precision}


def operator(name: str, kind: str, microseconds: float) -> dict[str, Any]:
    return {"name": name, "operator": kind, "is_integer": kind.startswith("QLinear"), "microseconds": microseconds}


def result() -> dict[str, Any]:
    ours = candidate("ours", 0.1, 1_400_000, 0.937)
    return {
        "bundle": "bundle",
        "params": 1_300_000,
        "macs": 61_000_000,
        "size_bytes": 1_400_000,
        "size_ratio": 32.0,
        "accuracy": {
            "test": 0.9363,
            "baseline_test": 0.9422,
            "drop_points": 0.59,
            "drop_low": 0.31,
            "drop_high": 0.87,
        },
        "latency": {"reference": "fp32.onnx", "verdict": "faster", **ours},
        "best_unpruned": {"name": "int8 placed", "ratio": 0.3},
        "candidates": [
            candidate("fp32", 1.0, 44_800_000, 0.943),
            candidate("int8 blanket", 0.31, 11_300_000, 0.9425),
            candidate("int8 placed", 0.3, 11_300_000, 0.9427),
            ours,
        ],
        "layers": [
            layer("stages.0.0.conv1", "stages.0.0", 64, 24),
            layer("stages.0.0.conv2", "stages.0.0", 64, 64, "float"),
            layer("stages.0.0", "stages.0.0", 64, 64),
            layer(f"stages.1.{EVIL}", "stages.1", 128, 56),
        ],
        "operators": [
            operator("stages.0.0.conv1/Conv_quant", "QLinearConv", 60.0),
            operator("stages.0.0.conv2/Conv", "Conv", 30.0),
            operator("input_QuantizeLinear", "QuantizeLinear", 10.0),
        ],
        "stages": {"F1 judge": 80.0, "F3 recover": 142.5, "whole command": 300.0},
        "search": {"strategy": "hirelc", "f1": 310, "f2": 24, "f3": 3, "overhead_seconds": 17.0, "seconds": 170.0},
        "guard": {
            "pattern": "weights",
            "reverted": [{"layer": "stage1.conv", "divergence": 0.01, "ms": 0.125}],
            **{"points_before": 1.75, "points": 0.5, "ms_before": 2.25, "ms": 2.375},
        },
        "kept_whole": [{"layer": "fc", "reason": "gives the classes"}, {"layer": "conv1", "reason": "reads the image"}],
        "warnings": [f"Other programs took the core {EVIL}"],
    }


def trial(fidelity: Fidelity, ratio: float, accuracy: float) -> Outcome:
    timed = {"median_ms": FP32_MS * ratio, "ratio": ratio} if fidelity != "F1" else {}
    return Measured(
        "0", fidelity, loss=1 - accuracy, accuracy=accuracy, params=1, macs=1, predicted_ms=FP32_MS * ratio, **timed
    )


def write_run(directory: Path) -> Path:
    config = 'target = "onnxruntime_cpu"\n[model]\nspec = "resnet18"\n[data]\nspec = "torch/cifar10"\n'
    outcomes: list[Outcome] = [trial("F3", 0.08, 0.93), trial("F3", 0.12, 0.939), Failed("0", "F2", "export", EVIL)]
    outcomes += [trial("F1", 0.1 + 0.02 * i, 0.912 + 0.003 * i) for i in range(10)]
    outcomes += [trial("F2", 0.1 + 0.02 * i, 0.91 + 0.003 * i) for i in range(10)]
    outcomes += [trial("F2", 0.05, 0.1)]
    with Run.open(directory, config, {"cpu_model": "A processor", "versions": {"onnxruntime": "1.31"}}) as run:
        for number, outcome in enumerate(outcomes):
            plan = CompressionPlan({"unit": number + 1})
            run.evaluate_once(plan, outcome.fidelity, lambda *_, outcome=outcome: outcome)  # type: ignore[misc]
    (directory / "result.json").write_text(json.dumps(result()))
    (directory / "bundle").mkdir()
    manifest = {"created": "2026-11-20T17:00:00+00:00", "command": "hirelc-deploy search", "plan": {"keep": {"u": 3}}}
    (directory / "bundle" / "manifest.json").write_text(json.dumps(manifest))
    return directory
