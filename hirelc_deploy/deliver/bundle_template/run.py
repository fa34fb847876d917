"""Predict: `python run.py PICTURE|IMAGES.npy|DATA.npz ...`, or run the stored samples again: `python run.py --check`.

Needs Python 3.8, numpy and what runtime.py imports; Pillow for pictures and for images of another size than the model's
input. Masks are written beside their pictures. In a program of yours, use inputs.py, runtime.py and decode.py as here.
"""

import json
import sys
from importlib import import_module
from pathlib import Path

import numpy as np

HERE, sys.dont_write_bytecode = Path(__file__).resolve().parent, True  # a bundle stays what its manifest says
sys.path.insert(0, str(HERE))
INPUTS, RUNTIME, DECODER = (import_module(name) for name in ("inputs", "runtime", "decode"))
TASK = json.loads((HERE / "task.json").read_text("utf-8"))
ARRAYS = dict(np.load(HERE / "decode.npz")) if (HERE / "decode.npz").exists() else {}
decode = getattr(DECODER, TASK["decoder"].get("decode") or "decode")
line = getattr(DECODER, "line", lambda result: json.dumps(result, default=lambda array: array.tolist()))

try:
    model, batch = RUNTIME.open_model(str(HERE / "model.onnx"))
    for path in sys.argv[1:] or ["--check"]:
        data = INPUTS.read(str(HERE / "samples.npz") if path == "--check" else path)
        parts = [(model(inputs), count) for inputs, count in INPUTS.batches(data["images"], batch)]
        outputs = {name: INPUTS.stacked([part[name][:count] for part, count in parts]) for name in parts[0][0]}
        results = decode(outputs, TASK["decoder"], ARRAYS)
        for number, result in enumerate(results):
            print(line(result))
            if "mask" in result and path != "--check":
                kind = "png" if result["mask"].dtype == np.uint8 else "tiff"  # PNG holds no floats
                import_module("PIL.Image").fromarray(result["mask"]).save(f"{path}.mask{number or ''}.{kind}")
        if "labels" in data and "index" in results[0]:
            hits = [result["index"] == label for result, label in zip(results, data["labels"])]  # noqa: B905
            print(f"accuracy {np.mean(hits):.4f} of {len(hits)} images")
        if path == "--check":  # within 5 % of each output's range: other processors round some integers differently
            good = True
            for name, found in outputs.items():
                ours, wanted = (x.reshape(len(x), -1) for x in (found, data[f"output.{name}"]))
                good = good and bool(np.all(np.abs(ours - wanted) <= 0.05 * np.ptp(wanted, axis=1, keepdims=True)))
            print("samples reproduced:", good)
            sys.exit(0 if good else 1)
except Exception as error:
    sys.exit(print(f"run.py: {error} (what it takes: see its first lines)", file=sys.stderr) or 2)
