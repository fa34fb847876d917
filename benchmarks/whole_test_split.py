"""Question: what do bundles lose on a whole test split, where their own jobs only had a part of it?

    python benchmarks/whole_test_split.py runs/demo0 runs/demo1 runs/demo2 --data npz:cifar10.npz --name demo

For each run, the uncut float file and the bundle's file answer every image of the test split, one after the other in
ONNX Runtime; the drop is paired. Writes results/NAME-whole-test-split.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from answers import drop, right
from hirelc_backends.onnxruntime_cpu import OnnxRuntimeCpu
from record import RESULTS, provenance

from hirelc_deploy.inputs.data.load import load_data
from hirelc_deploy.inputs.data.preprocess import Preprocess


def main() -> int:
    """Print and store one entry per run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--data", required=True)
    parser.add_argument("--name", required=True)
    options = parser.parse_args()
    backend = OnnxRuntimeCpu()
    found = {}
    for run in options.runs:
        preprocess = Preprocess.from_dict(json.loads((run / "bundle" / "preprocess.json").read_text("utf-8")))
        test = load_data(options.data).preprocessed(preprocess).take_test()
        before = right(run / "files" / "uncut-float.onnx", test, backend)
        after = right(run / "bundle" / "model.onnx", test, backend)
        result = json.loads((run / "result.json").read_text("utf-8"))
        found[run.name] = {
            "test_images": len(test),
            "baseline": float(before.mean()),
            **drop(before, after),
            **{key: result[key] for key in ("latency", "best_unpruned", "size_ratio")},
            "on_the_job's_own_test_part": result["accuracy"],
        }
    record = {**provenance(" ".join(["python", *sys.argv])), "runs": found}
    target = RESULTS / f"{options.name}-whole-test-split.json"
    target.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
