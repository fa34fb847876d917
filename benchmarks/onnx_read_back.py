"""Question: of a network that is exported to ONNX and read again, how many units are found, and do they cut exactly?

    python benchmarks/onnx_read_back.py --jobs 2 --out benchmarks/results/onnx_read_back.json
    python benchmarks/onnx_read_back.py resnet18 deit_tiny_patch16_224

The families, their random weights and the proof are those of `zoo.py`; norm statistics are those of IMAGES random
images, since with others, and with those of two images, the rounding errors of some families grow beyond any tolerance
in float32. Per model: units of the torch
network; its file by the project's own exporter; what is read of it, which must equal the file in ONNX Runtime to be
read at all; units of that, proven; and the plan that keeps about half of each, against its masked twin. Writes each row
as it comes.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import zoo
from record import provenance

from hirelc_deploy.compress import slicing
from hirelc_deploy.compress.norms import reestimate_norms
from hirelc_deploy.compress.onnx_file import export
from hirelc_deploy.graph.units import build_graph
from hirelc_deploy.inputs.models.onnx_files.load import build
from hirelc_deploy.inputs.models.onnx_files.whole import FileNetwork

IMAGES = 32
"""Where one number is left of each channel, as behind global pooling, two images would give a spread near 0."""


def traced_row(name: str) -> dict[str, Any]:
    """Return how many units are found by tracing alone, before any is proven: seconds where the proof takes minutes."""
    model, images = zoo.randomised(name)
    seconds: dict[str, float] = {}
    ours = zoo.timed(seconds, "torch", lambda: build_graph(model, images))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "net.onnx"
        zoo.timed(seconds, "export", lambda: export.export_onnx(model, images, file))
        back = zoo.timed(seconds, "read", lambda: build(file, tuple(images.shape[1:])))
    graph = zoo.timed(seconds, "trace", lambda: build_graph(back, images))
    return {
        "seconds": seconds,
        "units": len(ours.units),
        "units_read": len(graph.units),
        "as_many": len(graph.units) >= len(ours.units),
        "params_in_units": zoo.share_in_units(model, ours),
        "params_in_units_read": zoo.share_in_units(back, graph),
        "kept_whole": zoo.kept_whole(back, graph)[:5],
    }


def row(name: str) -> dict[str, Any]:
    """Return what comes back of one family."""
    model, images = zoo.randomised(name)
    many = zoo.torch.randn((IMAGES, *images.shape[1:]), generator=zoo.torch.Generator().manual_seed(1))
    reestimate_norms(model, [many])
    seconds: dict[str, float] = {}
    ours = zoo.timed(seconds, "torch", lambda: slicing.provable(model, build_graph(model, images), images)[0])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "net.onnx"
        zoo.timed(seconds, "export", lambda: export.export_onnx(model, images, file))
        back = zoo.timed(seconds, "read", lambda: build(file, tuple(images.shape[1:])))
    if isinstance(back, FileNetwork):
        return {"seconds": seconds, "units": len(ours.units), "error": back.file.reason}
    traced = build_graph(back, images)
    graph, _ = zoo.timed(seconds, "prove", lambda: slicing.provable(back, traced, images))
    plan = slicing.uniform_plan(graph, 0.5, "float")
    kept = zoo.random_elements(graph, plan.keep, np.random.default_rng(0))
    small, masked = slicing.slice_model(back, graph, kept), slicing.mask_model(back, graph, kept)
    with zoo.torch.no_grad():
        answer = next(iter(back(images).values()))
    return {
        "seconds": seconds,
        "units": len(ours.units),
        "units_read": len(graph.units),
        "units_not_proven": len(traced.units) - len(graph.units),
        "as_many": len(graph.units) >= len(ours.units),
        "differs_from_torch": zoo.difference(answer, zoo.outputs(model, images)),
        "params_in_units": zoo.share_in_units(model, ours),
        "params_in_units_read": zoo.share_in_units(back, graph),
        "cut": zoo.gap(Answer(small), Answer(masked), images),
        "kept_whole": zoo.kept_whole(back, graph)[:5],
    }


class Answer(zoo.nn.Module):
    """One named output of a network, as zoo's functions take it: its tensor. The first where no name is given."""

    def __init__(self, network: zoo.nn.Module, name: str | None = None) -> None:
        super().__init__()
        self.network, self.name = network, name

    def forward(self, images: zoo.Tensor) -> zoo.Tensor:
        """Return the tensor."""
        answer = self.network(images)
        found: zoo.Tensor = answer[self.name or next(iter(answer))]
        return found


def main() -> None:
    """Read the command line, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="families; all of zoo.py's if none")
    parser.add_argument("--traced", action="store_true", help="count units, prove nothing")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds of one family")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    names = tuple(given.models) or zoo.FAMILIES
    rows: dict[str, dict[str, Any]] = {}
    start = time.time()
    jobs = [functools.partial(traced_row if given.traced else row, name) for name in names]
    for number, found in zoo.each(jobs, [given.limit] * len(jobs), given.jobs):
        name = names[number]
        rows[name] = {"model": name, **found}
        if "error" in found:
            print(f"{name:<30} {found['error'][:160]}", flush=True)
        else:
            gap = f", differs {found['cut']['difference']:.1e}" if "cut" in found else ""
            print(
                f"{name:<30} {found['units']:>4} units, read {found['units_read']:>4}{gap}"
                f"{'' if found['as_many'] else '   FEWER'}",
                flush=True,
            )
        if given.out:
            given.out.write_text(json.dumps(record(names, rows, time.time() - start), indent=1) + "\n", "utf-8")
    print(json.dumps(record(names, rows, time.time() - start)["totals"]))


def record(names: tuple[str, ...], rows: dict[str, dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Return the whole result."""
    done = [rows[name] for name in names if name in rows]
    good = [one for one in done if "error" not in one]
    return {
        "schema_version": 1,
        "question": "units found in networks that were exported to ONNX and read again, beside those of torch",
        **provenance("python benchmarks/onnx_read_back.py"),
        "versions": {name: version(name) for name in ("torch", "onnx", "onnxruntime", "timm")},
        "seconds": round(seconds, 1),
        "totals": {
            "families": len(names),
            "tried": len(done),
            "read": len(good),
            "as_many_units": sum(one["as_many"] for one in good),
            "proven_and_cut": sum("cut" in one for one in good),
            "cut_exactly": sum("cut" in one and one["cut"]["difference"] <= zoo.EXACT for one in good),
        },
        "rows": done,
    }


if __name__ == "__main__":
    main()
