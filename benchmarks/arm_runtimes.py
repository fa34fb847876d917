"""Question: which runtime does an ARM CPU compute a network with in the fewest instructions, and at what accuracy?

    benchmarks/arm_sysroot.sh SYSROOT 1.31.1 openvino ncnn MNN ai-edge-litert
    pip install --no-deps --target TOOLS/litert ai-edge-litert ai-edge-quantizer litert-converter litert-torch ...
    python benchmarks/arm_runtimes.py SYSROOT --tools TOOLS --weights WEIGHTS --data DATA --folder runs/arm

For each network (`arm_runtime_files.py`) and runtime: the float file and the int8 file of the runtime's own converter,
and what they cost; what the int8 file answers to real images on this CPU against the float network; and the
instructions of one inference on emulated CPUs, by kind, as `arm_instructions_proxy`: the least of the counted ones.
Counts are no times: what they cannot see are caches, memory, dual issue and frequency.

Every step's result is kept in the folder, so that a killed command goes on where it was; --record writes down what is
there so far, an empty object where nothing is. A runtime whose tools are not
in TOOLS is left out, one that refuses a network has the reason in its row.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from arm_runtime_files import MAKERS, NETWORKS
from record import RESULTS, provenance

HERE = Path(__file__).resolve().parent
MODES: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino", "openvino f32"),
    "ncnn": ("ncnn", "ncnn f32"),
    "mnn": ("mnn", "mnn f32"),
    "litert": ("litert",),
    "executorch": ("executorch",),
}
"""Runtime to the ways in which it is run; the first takes half precision where the CPU multiplies it, and integer files
run in it alone."""
READS_ONNX = {"openvino": ("float",)}
"""Forms of the onnxruntime step that other runtimes read as they are."""
SECONDS = 900
EXACT_X86 = {"openvino": "openvino f32"}
"""On x86 OpenVINO rounds what stays float to bfloat16, which no Cortex-A76 does."""


def remembered(path: Path, make: Callable[[], Any], otherwise: Any = None) -> Any:
    """Return what a JSON file holds, made and written if it is not there; or, where that is given, `otherwise`."""
    if not path.exists() and otherwise is not None:
        return otherwise
    if not path.exists():
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(made, indent=1), "utf-8")
    return json.loads(path.read_text("utf-8"))


def ran(command: Sequence[str], tools: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with a runtime's tools on Python's path."""
    paths = [*([str(tools)] if tools else []), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": ":".join(paths), "OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1"}
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, timeout=SECONDS, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"took longer than {SECONDS} s")


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return the last words of a command that failed."""
    lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("{")]
    said = (
        re.sub(r"(?<!\S)(/[^\s/]+)+/", "", lines[-1]) if lines else ""
    )  # folders of this machine say nothing elsewhere
    return f"exit code {done.returncode}: {said[-300:]}"


def made_files(runtime: str, name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of arm_runtime_files.py; a form that broke has the reason."""
    folder = options.folder / name

    def make() -> list[dict[str, Any]]:
        command = [sys.executable, str(HERE / "arm_runtime_files.py"), runtime, name]
        done = ran([*command, str(options.weights), str(options.data), str(folder)], options.tools / runtime)
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"form"')]
        return rows if done.returncode == 0 else [*rows, {"form": "rest", "refused": last_line(done)}]

    rows: list[dict[str, Any]] = remembered(folder / f"{runtime}.json", make, [] if options.record else None)
    return rows


def forms(runtime: str, name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield form, mode and file of everything to be run, or the reason why it cannot be."""
    own = made_files(runtime, name, options)
    if runtime in READS_ONNX:
        own = [one for one in made_files("onnxruntime", name, options) if one["form"] in READS_ONNX[runtime]] + own
    for row in own:
        for mode in MODES[runtime] if row["form"] == "float" else MODES[runtime][:1]:
            yield {"runtime": runtime, "mode": mode, **row}


def answers(mode: str, file: str, runtime: str, options: argparse.Namespace, folder: Path) -> Any:
    """Return (images, outputs) of a file on this CPU, or None where the runtime does not run it here."""
    out = folder / "answers" / f"{Path(file).name}-{mode}.npy"
    out.parent.mkdir(exist_ok=True)
    if not out.exists():
        command = [sys.executable, str(HERE / "arm_runtime_sessions.py"), "answers", mode, file]
        done = ran([*command, str(folder / "test.npy"), str(out)], options.tools / runtime)
        if not out.exists():
            print(f"{file} in {mode}: {last_line(done)}", file=sys.stderr)
            return None
    return np.load(out)


def judged(row: dict[str, Any], options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return accuracy, agreement with ONNX Runtime's float file, and the relative error of the outputs."""
    mode = EXACT_X86.get(row["mode"], row["mode"])
    found = answers(mode, row["file"], row["runtime"], options, folder)
    exact = answers("onnxruntime", str(folder / "float.onnx"), "onnxruntime", options, folder)
    if found is None:
        return {"x86_refused": True}
    labels = np.load(folder / "labels.npy")
    return {
        "images": len(labels),
        "accuracy": float(np.mean(found.argmax(1) == labels)),
        "agreement": float(np.mean(found.argmax(1) == exact.argmax(1))),
        "relative_error": float(np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2))),
    }


def counts(row: dict[str, Any], cpu: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return instructions of one inference by kind, or the reason why there are none."""
    command = [str(options.sysroot / "python-count"), cpu, str(HERE / "arm_runtime_sessions.py"), "count"]
    done = ran([*command, row["mode"], row["file"], str(folder / "test.npy"), str(options.runs)])
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith('{"total"')]
    if done.returncode or len(lines) != options.runs + 1:
        return {"refused": last_line(done)}
    best: dict[str, Any] = min(lines[1:], key=lambda line: int(line["total"]))
    return best


def measured(runtime: str, name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of one network in one runtime."""
    folder, rows = options.folder / name, []
    for found in forms(runtime, name, options):
        row = dict(found)
        if "file" in row:
            key = f"{row['mode']}-{row['form']}".replace(" ", "_")
            nothing: dict[str, Any] | None = {} if options.record else None
            row |= remembered(folder / "judged" / f"{key}.json", partial(judged, row, options, folder), nothing)
            row["arm_instructions_proxy"] = {
                cpu: remembered(
                    folder / "counts" / f"{key}-{cpu}.json",
                    partial(counts, row, cpu, options, folder),
                    nothing,
                )
                for cpu in options.cpu
            }
            row["file"] = Path(row["file"]).name
        rows.append(row)
        print(name, json.dumps(row), flush=True)
    return rows


def main() -> int:
    """Measure what is asked for and write results/arm_runtimes.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sysroot", type=Path)
    parser.add_argument("--tools", type=Path, required=True, help="a folder of packages for this CPU per runtime")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--runtimes", nargs="+", choices=MAKERS, default=list(MAKERS))
    parser.add_argument("--cpu", nargs="+", default=["cortex-a76", "cortex-a72"])
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--record", action="store_true", help="write down what the folder has, and measure nothing")
    options = parser.parse_args()
    for key in ("sysroot", "tools", "weights", "data", "folder"):
        setattr(options, key, getattr(options, key).resolve())
    rows = {
        name: [row for runtime in options.runtimes for row in measured(runtime, name, options)]
        for name in options.networks
    }
    emulator = subprocess.run(["qemu-aarch64", "--version"], capture_output=True, text=True, check=True)
    wheels = {file.name: file.stat().st_size for file in sorted((options.sysroot / "wheels").glob("*.whl"))}
    record = {
        **provenance("python benchmarks/arm_runtimes.py SYSROOT --tools TOOLS --weights W --data DATA --folder F"),
        "emulator": emulator.stdout.splitlines()[0],
        "wheel_bytes": wheels,
        "networks": rows,
    }
    RESULTS.joinpath("arm_runtimes.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
