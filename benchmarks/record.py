"""Turns a finished run into a record under benchmarks/results/: figures, machine, versions, command, commit and date.

    python benchmarks/record.py runs/resnet18-9x --name resnet18-9x [--attach peers.json timing.json ...]

Attached JSON files (of peers_resnet18.py, of `hirelc-deploy benchmark --json`, of kill_resume.py) are kept as they are,
under their file names.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
COPIED = (
    *("params", "macs", "size_bytes", "size_ratio", "metric", "accuracy", "by_class", "latency", "best_unpruned"),
    *("candidates", "finalists"),
    *("search", "latency_model", "placement", "stages", "warnings"),
)
"""Keys of a run's result that a record keeps."""


def provenance(command: str) -> dict[str, Any]:
    """Return date, commit, command, machine and versions for a result of this machine."""
    from hirelc_backends.onnxruntime_cpu import OnnxRuntimeCpu

    from hirelc_deploy.measure.machine import describe

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "command": command,
        "machine": describe(OnnxRuntimeCpu()),
    }


def operator_shares(operators: list[dict[str, Any]]) -> dict[str, Any]:
    """Return per operator type: how many, whether integer, and the share of the file's own time."""
    total = sum(one["microseconds"] for one in operators) or 1.0
    shares: dict[str, Any] = {}
    for one in operators:
        entry = shares.setdefault(one["operator"], {"count": 0, "integer": one["is_integer"], "share_of_time": 0.0})
        entry["count"] += 1
        entry["share_of_time"] += one["microseconds"] / total
    for entry in shares.values():
        entry["share_of_time"] = round(entry["share_of_time"], 4)
    return dict(sorted(shares.items(), key=lambda item: -item[1]["share_of_time"]))


def main() -> int:
    """Write the record and print where it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--attach", type=Path, nargs="*", default=[])
    options = parser.parse_args()
    result = json.loads((options.run / "result.json").read_text("utf-8"))
    manifest = json.loads((options.run / "bundle" / "manifest.json").read_text("utf-8"))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    record = {
        "name": options.name,
        "date": manifest["created"],
        "commit": commit.stdout.strip(),
        "command": manifest["command"],
        "machine": manifest["machine"],
        "versions": manifest["versions"],
        **{key: result[key] for key in COPIED if key in result},
        "widths": {layer["name"]: [layer["out_full"], layer["out_kept"]] for layer in result["layers"]},
        "operators": operator_shares(result["operators"]),
        **{path.stem: json.loads(path.read_text("utf-8")) for path in options.attach},
    }
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{options.name}.json"
    target.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
