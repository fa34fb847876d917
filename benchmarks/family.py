"""Question: what do bundles at several speed-ups from one search cost beside searches of their own, and what is lost?

    python benchmarks/family.py --run runs/family-resnet18 --name family-resnet18 --speedups 2,4,8 -- \\
        --model resnet18 --weights w.safetensors --data npz:cifar10.npz --recovery-epochs 1

What stands behind `--` are options of `hirelc-deploy search` without --speedup and --out. Beside the search at all
speed-ups each has a search of its own, with layer times of its own too, as for somebody who asks for one alone.

The record has the seconds of each search, those of the search at all of them over those of the longest of the others,
and for each speed-up how much its file of the one search loses against that of its own search, on the same test images.
What was finished in --run is taken as it is. Seconds are wall time, so run it where nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from answers import drop, right
from record import RESULTS, provenance

from hirelc_deploy.jobs.workplace import reopened
from hirelc_deploy.progress import Progress
from hirelc_deploy.run_log import read_progress

ONE = "one"


def searched(out: Path, speedups: str, options: list[str]) -> None:
    """Do a search in a process of its own, with a cache of layer times of its own."""
    command = [sys.executable, "-m", "hirelc_deploy", "search", *options, "--speedup", speedups, "--out", str(out)]
    subprocess.run(command, check=True, env={**os.environ, "HIRELC_DEPLOY_CACHE": f"{out}-cache"})


def seconds_of(run: Path) -> float:
    """Return what the commands on a run have taken."""
    progress = read_progress(run)
    return float(progress["seconds_before"] + progress["seconds"])


def compared(run: Path, speedups: list[str]) -> list[dict[str, Any]]:
    """Return seconds, time and accuracy of both searches of each speed-up."""
    with (workplace := reopened(run / speedups[0], Progress())).run:
        pipeline = workplace.pipeline
        images = pipeline.data.take_test()
        rows = []
        for speedup in speedups:
            row: dict[str, Any] = {"speedup": float(speedup)}
            folders = {"own": run / speedup, ONE: run / ONE / f"speedup-{float(speedup):g}"}
            answers = {
                name: right(folder / "bundle" / "model.onnx", images, pipeline.backend, pipeline.threads)
                for name, folder in folders.items()
            }
            for name, folder in folders.items():
                result = json.loads((folder / "result.json").read_text("utf-8"))
                row[name] = {
                    "seconds": seconds_of(folder),
                    "accuracy": float(answers[name].mean()),
                    **{key: result["latency"][key] for key in ("ratio", "ratio_low", "ratio_high")},
                }
            rows.append({**row, "one_loses": drop(answers["own"], answers[ONE])})
    return rows


def main() -> int:
    """Search what is missing, judge, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--speedups", required=True, help="numbers with commas between them")
    parser.add_argument("search", nargs="+", help="behind --: options of hirelc-deploy search")
    options = parser.parse_args()
    command = " ".join(["python", "benchmarks/family.py", *sys.argv[1:]])
    speedups = options.speedups.split(",")
    options.run.mkdir(parents=True, exist_ok=True)
    searched(options.run / ONE, options.speedups, options.search)
    for speedup in speedups:
        searched(options.run / speedup, speedup, options.search)
    rows = compared(options.run, speedups)
    together, longest = sum(row[ONE]["seconds"] for row in rows), max(row["own"]["seconds"] for row in rows)
    record = {
        "name": options.name,
        **provenance(command),
        "seconds": together,
        "over_the_longest_own_search": together / longest,
        "over_all_own_searches": together / sum(row["own"]["seconds"] for row in rows),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{options.name}.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
