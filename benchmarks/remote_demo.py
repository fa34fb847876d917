"""Question: what does a search on a board cost beyond the same search here?

    python benchmarks/remote_demo.py line       # a round trip, one measurement here and there, connecting
    python benchmarks/remote_demo.py local
    python benchmarks/remote_demo.py remote

`remote` makes a board of a real sshd on loopback with a home of its own, adds it with `targets add`, and runs
the search of the embedded demo there: files are sent, built, run and timed by ONNX Runtime on the other side of SSH.
Both searches begin with an empty layer table. Each part writes its share of results/remote_demo.json; a search that is
run again is added to those before, because two searches of one kind differ by more than SSH costs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hirelc_backends.onnxruntime_cpu import OnnxRuntimeCpu
from record import provenance

from hirelc_deploy.cli import application
from hirelc_deploy.config import Limits, SearchConfig
from hirelc_deploy.demo import demo_config
from hirelc_deploy.jobs.search import run_search
from hirelc_deploy.jobs.shipping import stage_seconds
from hirelc_deploy.jobs.workplace import open_workplace
from hirelc_deploy.measure.program import ProgramBackend
from hirelc_deploy.progress import Progress
from hirelc_deploy.testing.backend_contract import random_images, write_model
from hirelc_deploy.testing.loopback import LoopbackBoard

RESULT = Path(__file__).resolve().parent / "results" / "remote_demo.json"


def search(target: str, folder: Path) -> dict[str, Any]:
    """Run the demo's search on a target and return what it took and found."""
    os.environ["HIRELC_DEPLOY_CACHE"] = str(folder / "cache")
    config = dataclasses.replace(
        demo_config(0),
        target=target,
        recovery_epochs=0.0,  # no training: it runs on the host and costs the same either way
        limits=Limits(max_drop=5.0),
        search=SearchConfig(f1_evaluations=4, finalists=1, options=3),
    )
    started, started_cpu = time.monotonic(), time.process_time()
    workplace = open_workplace(config, folder / "run", "benchmarks/remote_demo.py", Progress(quiet=True))
    with workplace.run:
        result = run_search(workplace)
        trials = list(workplace.run.trials)
        stages = {**stage_seconds(workplace.run), **workplace.pipeline.progress.seconds}
    seconds: dict[str, list[float]] = defaultdict(list)
    for trial in trials:
        if trial.fidelity != "F1":
            for stage in ("judge", "time"):
                if stage in trial.outcome.seconds:
                    seconds[stage].append(trial.outcome.seconds[stage])
    return {
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds_of_this_process": round(time.process_time() - started_cpu, 1),
        "trials": {name: sum(trial.fidelity == name for trial in trials) for name in ("F1", "F2", "F3")},
        "layer_times": sum(1 for _ in (folder / "cache/hirelc-deploy/layer-times.jsonl").open()),
        "seconds_by_stage": {name: round(spent, 1) for name, spent in stages.items()},
        "seconds_per_trial_on_the_device": {stage: round(float(np.mean(all_)), 2) for stage, all_ in seconds.items()},
        "machine": json.loads((folder / "run/machine.json").read_text("utf-8")),
        "latency": result["latency"],
        "accuracy": result["accuracy"],
        "size_bytes": result["size_bytes"],
        "load_average": os.getloadavg()[0],
    }


def median_ms(act: Callable[[], object], times: int = 40) -> float:
    """Return the median milliseconds of an act."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        act()
        taken.append(time.perf_counter() - started)
    return round(1000 * float(np.median(taken)), 3)


def line(board: LoopbackBoard, folder: Path) -> dict[str, Any]:
    """Return what SSH adds to single steps."""
    here, device = OnnxRuntimeCpu(), board.connect()
    there = ProgramBackend(here.name, here.program, here.precisions_on, device)
    started = time.monotonic()
    device.hardware()
    connect_s = time.monotonic() - started
    model, image = write_model(folder / "model.onnx"), random_images(1)
    runners = {"here": here.build(model), "there": there.build(model)}
    infer = {name: median_ms(lambda runner=runner: runner.infer(image)) for name, runner in runners.items()}
    profile = {name: median_ms(lambda runner=runner: runner.profile(image, 20), 10) for name, runner in runners.items()}
    rounds = {}
    for name, backend in (("here", here), ("there", there)):
        with backend.open_timing([model], 1, 0) as process:
            rounds[name] = median_ms(lambda process=process: process.rounds(5))
    data = os.urandom(20_000_000)
    started = time.monotonic()
    device.upload(data)
    upload_s = time.monotonic() - started
    found = {
        "connect_seconds": round(connect_s, 2),
        "round_trip_ms": median_ms(lambda: device.call("unlock"), 200),
        "one_inference_ms": infer,
        "one_profile_of_20_runs_ms": profile,
        "one_visit_of_5_timed_rounds_ms": rounds,
        "upload_mb_per_s": round(20 / upload_s, 1),
    }
    device.close()
    return found


def remote(folder: Path) -> dict[str, Any]:
    """Make the board, add it as a target, search on it, and see that nothing is left there."""
    board = LoopbackBoard(folder)
    board.onto_path()
    os.environ["HIRELC_DEPLOY_TARGETS"] = str(folder / "targets.toml")
    code = application.run(["targets", "add", "desk", "--like", "cpu", "--host", "board", "--python", sys.executable])
    if code:
        sys.exit(code)
    found = search("desk", folder)
    job_board_gone(board)
    return {"search": found, "left_on_the_board": board.leftovers()}


def job_board_gone(board: LoopbackBoard) -> None:
    """Say goodbye as the end of the program does, so that what is left can be looked at."""
    import atexit

    atexit._run_exitfuncs()
    until = time.monotonic() + 10
    while board.leftovers() and time.monotonic() < until:
        time.sleep(0.1)


def main() -> int:
    """Run one part and write it into the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("where", choices=("line", "local", "remote"))
    where = parser.parse_args().where
    folder = Path(tempfile.mkdtemp())
    if where == "line":
        part = {**line(LoopbackBoard(folder), folder), "load_average": os.getloadavg()[0]}
    else:
        part = remote(folder) if where == "remote" else {"search": search("cpu", folder)}
    record: dict[str, Any] = json.loads(RESULT.read_text("utf-8")) if RESULT.exists() else {}
    record |= provenance("python benchmarks/remote_demo.py line; ... local; ... remote")
    if where != "line":
        part["searches"] = [*record.get(where, {}).get("searches", []), part.pop("search")]
    record[where] = part
    RESULT.write_text(json.dumps(record, indent=1).replace(str(folder), "") + "\n", "utf-8")
    print(json.dumps(part))
    shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
