"""Question: how many instructions does one inference take on an ARM CPU? A number that repeats, and no latency.

    benchmarks/arm_sysroot.sh DIR
    python benchmarks/arm_instructions.py DIR --cpu cortex-a76 cortex-a72 -- a.onnx b.onnx

Counts single-threaded inferences of real aarch64 ONNX Runtime under emulation and prints `arm_instructions_proxy` per
file and CPU: the least of the counted inferences, in all and by kind. Use it to see which kernels run and whether a
change made a file dearer; compare only equal CPUs, emulators and runtimes. What it cannot see: caches, memory, dual
issue, frequency, threads.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from record import provenance

GUEST = """
import gc, os, sys
sys.path.insert(0, sys.argv[1])
import onnxruntime_program as program
session = program.open_session(sys.argv[2], 1)
def mark():
    try: os.lseek(-77, 0, 0)
    except OSError: pass
for _ in range(4): session.timed_run()
gc.disable()
mark()
for _ in range(int(sys.argv[3])):
    session.timed_run()
    mark()
"""


def counts(sysroot: Path, cpu: str, file: Path, runs: int) -> dict[str, int]:
    """Return instructions of one inference by kind: of the run with the fewest in all."""
    backends = Path(__file__).resolve().parents[1] / "backends" / "hirelc_backends"
    command = [str(sysroot / "python-count"), cpu, "-c", GUEST, str(backends), str(file.resolve()), str(runs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith('{"total"')]
    if done.returncode or len(lines) != runs + 1:
        sys.exit(f"{file}: the emulated run failed: {done.stderr[-300:]}")
    best: dict[str, int] = min(lines[1:], key=lambda line: int(line["total"]))
    return best


def main() -> int:
    """Count and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sysroot", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--cpu", nargs="+", default=["cortex-a76"])
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    emulator = subprocess.run(["qemu-aarch64", "--version"], capture_output=True, text=True, check=True)
    record: dict[str, Any] = provenance("python benchmarks/arm_instructions.py SYSROOT --cpu CPU... -- FILE...")
    record["emulator"] = emulator.stdout.splitlines()[0]
    record["arm_instructions_proxy"] = {
        cpu: {file.name: counts(options.sysroot.resolve(), cpu, file, options.runs) for file in options.files}
        for cpu in options.cpu
    }
    print(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
