"""Question: does the whole path work on an ARM board, and does it compute there what it computes here?

    benchmarks/arm_sysroot.sh DIR [1.31.1 openvino]
    python benchmarks/arm_apply.py DIR [--cpu cortex-a76] [--runtime openvino] [FILE.onnx ...]

The board is a real sshd on loopback whose Python is real aarch64 Python with a real aarch64 runtime under emulation.
`hirelc-deploy apply` cuts and quantizes a small network for it, and builds, judges and times the file there. Then every
file it made, and every file named on the command line, runs here and there on the same images, and the bundle's run.py
there with no package but numpy and the runtime. Milliseconds under emulation say nothing and are not kept.

ONNX Runtime's integer files must answer alike to the last bit. OpenVINO's kernels scale sums in float, in another order
on each CPU, so its integer files may differ by a few steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from hirelc_backends.onnxruntime_arm import OnnxRuntimeArm
from hirelc_backends.onnxruntime_cpu import OnnxRuntimeCpu
from hirelc_backends.openvino_cpu import OpenvinoCpu
from record import provenance

from hirelc_deploy.cli import application
from hirelc_deploy.compress.integer.quantize import BLANKET
from hirelc_deploy.measure import accuracy
from hirelc_deploy.measure.backend import FLOAT_AS, Backend
from hirelc_deploy.measure.program import ProgramBackend
from hirelc_deploy.testing.loopback import LoopbackBoard

RESULTS = Path(__file__).resolve().parent / "results"
RUNTIME_OWN = f"uncut-{BLANKET}.onnx"
"""The reference file that the runtime's own quantizer would have written."""
RUNTIMES = {
    "onnxruntime": ("arm", OnnxRuntimeArm, OnnxRuntimeCpu),
    "openvino": ("arm-openvino", OpenvinoCpu, OpenvinoCpu),
}
"""Runtime to the target's profile, its backend there and its backend here."""
FEW_STEPS = 0.03
"""Of the largest output: what an integer file of OpenVINO may differ by."""
ALONE = """
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names | {"numpy", RUNTIME, "runtime", "inputs", "decode", "run"}:
            raise ImportError(name + " is not numpy or " + RUNTIME)
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, sys.argv[1]); sys.argv = ["run.py", "--check"]
runpy.run_path(sys.path[0] + "/run.py", run_name="__main__")
"""
MODEL = ("--model", "hirelc_deploy.demo.model:DemoNet", "--model-arg", "widths=[8,16,16,24]", "--model-arg")


def main() -> int:
    """Run it and write results/arm_apply_CPU.json; exit code 1 where outputs of our files do not agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sysroot", type=Path)
    parser.add_argument("files", type=Path, nargs="*", help="integer files of other models")
    parser.add_argument("--cpu", default="cortex-a76")
    parser.add_argument("--runtime", choices=RUNTIMES, default="onnxruntime")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    board = LoopbackBoard(folder)
    board.onto_path()
    os.environ["HIRELC_DEPLOY_TARGETS"] = str(folder / "targets.toml")
    os.environ["HIRELC_DEPLOY_CACHE"] = str(folder / "cache")
    python = f"{options.sysroot.resolve()}/python {options.cpu}"
    profile, arm_backend, own_backend = RUNTIMES[options.runtime]
    steps = {
        "targets add": ["targets", "add", "emulated", "--like", profile, "--host", "board", "--python", python],
        "apply": [
            *("apply", *MODEL, "blocks_per_stage=1", "--data", "synthetic:16", "--target", "emulated", "--quiet"),
            *("--plan", "uniform:keep=0.5,precision=int8", "--recovery-epochs", "0", "--out", str(folder / "run")),
        ],
    }
    seconds = {}
    for name, command in steps.items():
        started = time.monotonic()
        code = application.run(command)
        seconds[name] = round(time.monotonic() - started, 1)
        if code:
            return code
    device = board.connect(python=python)
    arm, here = arm_backend(), own_backend()
    there = ProgramBackend(arm.name, arm.program, arm.precisions_on, device)
    files = [*sorted((folder / "run/files").glob("*.onnx")), folder / "run/bundle/model.onnx", *options.files]
    rows = [compared(options.runtime, file, here, there) for file in files]
    record = {
        **provenance(f"python benchmarks/arm_apply.py SYSROOT --cpu {options.cpu} --runtime {options.runtime}"),
        "emulated_cpu": options.cpu,
        "board": there.hardware(),
        "board_versions": there.versions(),
        "precisions": [vars(precision) for precision in there.precisions()],
        "seconds": seconds,
        "files": rows,
        "bundle_alone": ran_alone(options.sysroot.resolve(), options.cpu, options.runtime, folder / "run/bundle"),
    }
    device.close()
    suffix = "" if options.runtime == "onnxruntime" else f"_{options.runtime}"
    RESULTS.joinpath(f"arm_apply_{options.cpu}{suffix}.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(json.dumps(rows, indent=1))
    board.stop()
    for row in rows:
        if not agrees(row):
            print(f"{row['file']}: differs by {row['largest_difference']:.3g}, more than it may.", file=sys.stderr)
    return 0 if all(agrees(row) for row in rows) else 1


def agrees(row: dict[str, Any]) -> bool:
    """Return whether a file's outputs differ no more than they may: ONNX Runtime's integer files not at all."""
    if row["runtime_own"]:
        return True
    if row["runtime"] == "openvino" and (row["integer_ops"] or row["float_as"]):
        return bool(row["largest_difference"] <= FEW_STEPS * row["largest_output"])
    if not row["integer_ops"]:
        return bool(row["largest_difference"] <= 1e-5 * row["largest_output"])
    return bool(row["bit_exact"] or row["float_ops"])


def ran_alone(sysroot: Path, cpu: str, runtime: str, bundle: Path) -> dict[str, Any]:
    """Return what `run.py --check` of a bundle says on the emulated CPU where only numpy and the runtime can be had."""
    code = ALONE.replace("RUNTIME", repr(runtime))
    command = [str(sysroot / "python"), cpu, "-c", code, str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    return {"exit_code": done.returncode, "says": (done.stdout or done.stderr).strip().splitlines()[-1:]}


def compared(runtime: str, file: Path, here: Backend, there: ProgramBackend) -> dict[str, Any]:
    """Return how far the outputs of one file differ between this CPU and the board."""
    proto = onnx.load(str(file))
    shape = [dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim[1:]]
    images = np.random.default_rng(3).random((8, *shape)).astype(np.float32)
    runners = here.build(file), there.build(file)
    x86, arm = (runner.infer(images) for runner in runners)
    pairs = [(x86[name], arm[name]) for name in x86]
    count = accuracy.operators(runners[1], images[:1])
    return {
        "file": file.name,
        "runtime": runtime,
        "float_as": next((one.value for one in proto.metadata_props if one.key == FLOAT_AS), None),
        "runtime_own": file.name == RUNTIME_OWN,
        "integer_ops": count.integer_ops,
        "float_ops": count.float_ops,
        "largest_output": max(float(np.abs(ours).max()) for ours, _ in pairs),
        "largest_difference": max(float(np.abs(ours - theirs).max()) for ours, theirs in pairs),
        "bit_exact": all(np.array_equal(*pair) for pair in pairs),
    }


if __name__ == "__main__":
    sys.exit(main())
