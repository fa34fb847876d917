"""Question: does a search lose anything when it is killed, and does it end with the plan it would have ended with?

    python benchmarks/kill_resume.py --kills 100 --out DIR -- search --model ... --data ... (all options but --out)

Runs the command undisturbed, then again in another folder with SIGKILL after a random time, the same command each
time, until it is done; and so on in further folders, until it has been killed often enough. Two runs of one search may
choose differently because a clock never says the same twice; here what differs shall be the killing only. All therefore
read the same layer table (kept per machine), and what the first run measured of a file is what the others get for a
file of the same bytes. The result goes to benchmarks/results/kill_resume.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from record import RESULTS, provenance

from hirelc_deploy.cli import application
from hirelc_deploy.runs import write_atomic

REPLAYED = "--replayed"


def replayed(store: Path, arguments: Sequence[str]) -> NoReturn:
    """Run a command in which every comparison of files is timed once, and from then on read from `store`."""
    from hirelc_deploy.deliver import race
    from hirelc_deploy.evaluate import files as evaluated
    from hirelc_deploy.measure.protocol import Timing, compare

    def compare_once(files: Sequence[Path], *args: Any, **options: Any) -> list[Timing]:
        contents = "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
        known = store / hashlib.sha256(contents.encode()).hexdigest()
        if not known.exists():
            write_atomic(known, json.dumps([timing.to_dict() for timing in compare(files, *args, **options)]))
        found = zip(json.loads(known.read_text("utf-8")), files, strict=True)
        nothing = np.empty((0, 0, 2), np.int64)
        kept = {field.name for field in dataclasses.fields(Timing)} - {"file", "samples"}
        return [
            Timing(file=file, samples=nothing, **{key: timing[key] for key in kept & timing.keys()})
            for timing, file in found
        ]

    store.mkdir(parents=True, exist_ok=True)
    evaluated.compare = race.compare = compare_once
    sys.exit(application.run(list(arguments)))


def finished_trials(run: Path) -> list[str]:
    """Return the complete lines of the trial log."""
    log = run / "trials.jsonl"
    if not log.exists():
        return []
    return [line for line in log.read_text("utf-8").split("\n")[:-1] if line]


def final_plan(run: Path) -> dict[str, object]:
    """Return the plan of the shipped bundle."""
    plan: dict[str, object] = json.loads((run / "bundle" / "manifest.json").read_text("utf-8"))["plan"]
    return plan


def killed_search(command: Sequence[str], folder: Path, rng: random.Random, most: int, latest: float) -> dict[str, Any]:
    """Kill a search after random times, so often at most, until it is done; return what it kept.

    Args:
        latest: Seconds after which a search is killed at the latest.
    """
    kills, lost, seen = list[dict[str, Any]](), 0, list[str]()
    done = False
    while not done:
        process = subprocess.Popen([*command, "--out", str(folder)], stdout=subprocess.DEVNULL)
        delay = rng.uniform(1.0, latest) if len(kills) < most else None
        try:
            done = process.wait(delay) == 0
            if not done:
                raise SystemExit(f"{folder}: the search ends with exit code {process.returncode}")
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills.append({"after_seconds": round(delay or 0.0, 2), "finished_trials": len(finished_trials(folder))})
        now = finished_trials(folder)
        lost += sum(before not in now for before in seen)
        seen = now
    return {"kills": kills, "trials_lost": lost, "trials": len(seen)}


def main() -> int:
    """Run the experiment and print its record; exit code 1 when a finished trial was lost or the plans differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    command = [sys.executable, __file__, REPLAYED, str(options.out / "times"), *options.command]
    rng = random.Random(options.seed)
    undisturbed = options.out / "undisturbed"
    start = time.monotonic()
    subprocess.run([*command, "--out", str(undisturbed)], check=True, stdout=subprocess.DEVNULL)
    whole_seconds = time.monotonic() - start
    latest = min(14.0, max(8.0, whole_seconds / 6))

    plan, searches = final_plan(undisturbed), list[dict[str, Any]]()
    while (left := options.kills - sum(len(search["kills"]) for search in searches)) > 0:
        searches.append(killed_search(command, options.out / f"disturbed-{len(searches) + 1}", rng, left, latest))
        searches[-1]["same_plan"] = final_plan(options.out / f"disturbed-{len(searches)}") == plan
        print(json.dumps(searches[-1]), file=sys.stderr, flush=True)
    lost, same = sum(search["trials_lost"] for search in searches), all(search["same_plan"] for search in searches)
    record = {
        **provenance("python " + " ".join(sys.argv)),
        "kills": options.kills,
        "finished_trials_lost": lost,
        "same_final_plan": same,
        "trials_undisturbed": len(finished_trials(undisturbed)),
        "undisturbed_seconds": round(whole_seconds, 1),
        "searches": searches,
    }
    (RESULTS / "kill_resume.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(json.dumps(record))
    return 0 if same and not lost else 1


if __name__ == "__main__":
    if sys.argv[1:2] == [REPLAYED]:
        replayed(Path(sys.argv[2]), sys.argv[3:])
    sys.exit(main())
