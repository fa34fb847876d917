"""Question: what becomes of real ONNX files: are they read, placed and guarded, what do they lose, how fast are they?

    python benchmarks/onnx_files.py --assets assets --shared ../shared/tasks --runs runs/onnx_files \\
        --out benchmarks/results/onnx_files.json
    python benchmarks/onnx_files.py "text angle" --pictures 40 ...         a row, on few pictures
    python benchmarks/onnx_files.py --structure ...                        reading and cutting alone

`onnx_cases.py` says what the files are, what judges them, and where all of it comes from. A row has what is read
against ONNX Runtime on random images; units, proven, and the plan that keeps half of each against its masked twin, all
outputs by their names; and beside the file as it came: what was read of it in float, ONNX Runtime's static quantization
as it comes and with a scale per channel, NNCF's as we configure it, and what `apply` placed, guarded and shipped. All
are calibrated on the same pictures, answer the same test pictures, and are timed side by side.

Rows are kept as they come. A row that is there is not made again; one that was killed goes on from its run.
"""

from __future__ import annotations

import argparse
import functools
import json
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime
import zoo
from forms import judged
from integer_accuracy import peers
from onnx_cases import CASES, Assets, Case, MissingError
from onnx_read_back import Answer
from record import provenance

from hirelc_deploy import api
from hirelc_deploy.compress import slicing
from hirelc_deploy.deliver.race import unpruned
from hirelc_deploy.graph.units import build_graph
from hirelc_deploy.inputs.models.onnx_files.load import build
from hirelc_deploy.inputs.models.onnx_files.proto import read_file
from hirelc_deploy.inputs.models.onnx_files.whole import FileNetwork, whole_network
from hirelc_deploy.jobs.workplace import Given, reopened
from hirelc_deploy.progress import Progress

PLAN = "uniform:keep=1,precision=auto"
MAX_DROP = 0.5
"""Points of the metric that the guard lets go."""
SHIPPED = "ours, shipped"


def row(name: str, assets: Assets, runs: Path | None) -> dict[str, Any]:
    """Return what becomes of one file; a refusal is its sentence.

    Args:
        runs: Folder of the runs; None for structure alone.
    """
    try:
        case = CASES[name](assets)
    except MissingError as error:
        return {"missing": str(error)}
    told: dict[str, Any] = {"file": case.file.name, "bytes": case.file.stat().st_size}
    try:
        told |= structure(case)
        run = f"{name.replace(' ', '_').replace(',', '')}-{assets.pictures}"  # a run stays with its pictures
        return told | (measured(case, runs / run) if runs else {})
    except zoo.HirelcError as error:
        return told | {"refused": str(error).replace(f"{case.file.parent}/", "")}


def structure(case: Case) -> dict[str, Any]:
    """Return what is read of a file, what can be cut, and how far the cut network is from its masked twin."""
    seconds: dict[str, float] = {}
    network = zoo.timed(seconds, "read", lambda: build(case.file, case.job.get("input_size")))
    if isinstance(network, FileNetwork):
        return {"read": "whole", "why": network.file.reason, "outputs": list(network.file.outputs), "seconds": seconds}
    channels, height, width = network.pretrained_cfg["input_size"]
    images = zoo.torch.randn(2, channels, height, width, generator=zoo.torch.Generator().manual_seed(7))
    session = onnxruntime.InferenceSession(str(case.file), providers=["CPUExecutionProvider"])
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
    gaps = [zoo.gap(Answer(small, name), Answer(masked, name), images) for name in answer]
    return {
        "read": "layers",
        "outputs": list(answer),
        "outputs_of_the_cut": list(small(images)),
        "input_size": [channels, height, width],
        "params": graph.params,
        "units": len(graph.units),
        "units_not_proven": len(traced.units) - len(graph.units),
        "differs_from_onnxruntime": max(differences),
        "params_kept_at_half": sum(p.numel() for p in small.parameters()) / graph.params,
        "cut": max(gaps, key=lambda gap: float(gap["difference"])),
        "kept_whole": zoo.kept_whole(network, graph)[:5],
        "seconds": seconds,
    }


def measured(case: Case, run: Path) -> dict[str, Any]:
    """Return metric and time of the file as it came, of others' integer forms of it, and of ours."""
    job = {**case.job, "recovery_epochs": 0.0}
    api.apply(str(case.file), case.data(), PLAN, out=run, progress=print, **job)
    given = Given(None, case.data(), job.get("metric"), job.get("loss"), job.get("task_options"))
    workplace = reopened(run, Progress(quiet=True), given=given)
    with TemporaryDirectory() as name, workplace.run:
        pipeline, folder = workplace.pipeline, Path(name)
        found = {
            "as it came": as_it_came(case.file, pipeline.data.preprocess.input_size, folder / "came.onnx"),
            "read, in float": pipeline.files.reference,
            **peers(pipeline, folder),
            **{f"ours, {one.name}": one.path for one in unpruned(pipeline, MAX_DROP)[2:]},
            SHIPPED: run / "bundle" / "model.onnx",
        }
        files = {form: path for form, path in found.items() if isinstance(path, Path)}
        refused = {form: {"refused": why} for form, why in found.items() if isinstance(why, str)}
        test = case.data().preprocessed(pipeline.data.preprocess).take_test()
        forms = {**judged(pipeline, files, test), **refused}
        return {
            "task": pipeline.task.name,
            "metric": pipeline.task.metric.name,
            "images": {"calibration": len(pipeline.data.calibration), "selection": len(pipeline.data.selection),
                       "test": len(test)},
            "placement": {"pattern": pipeline.files.placement.pattern,
                          "float_layers": pipeline.files.placement.float_layers},
            "forms": forms,
            "beside_best_peer": beside_best_peer(forms),
        }  # fmt: skip


def as_it_came(file: Path, size: tuple[int, int, int], out: Path) -> Path:
    """Write a file for one image of a size, its input called as ours call theirs, and else as it is; return it."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    network = whole_network(read_file(file), session.get_inputs()[0].name, 1, size, False, "it is timed as it came")
    out.write_bytes(network.file.model.SerializeToString())
    return out


def beside_best_peer(forms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the fastest file of another tool, and how much faster ours is than it; whatever that one loses."""
    others = [form for form in forms if form.startswith(("onnxruntime", "nncf")) and "speedup" in forms[form]]
    if not others:
        return {}
    best = max(others, key=lambda form: float(forms[form]["speedup"]))
    ours = forms[SHIPPED]
    return {
        "best_peer": best,
        "its_drop": forms[best]["drop"]["points"],
        "our_drop": ours["drop"]["points"],
        "times_as_fast": ours["speedup"] / forms[best]["speedup"],
        "surely_slower": ours["speedup_interval"][1] < forms[best]["speedup_interval"][0],
    }


def line(name: str, found: dict[str, Any]) -> str:
    """Return one line for a terminal."""
    for key in ("missing", "refused", "error"):
        if key in found:
            return f"{name:<30} {key}: {found[key]}"
    if found["read"] == "layers":
        text = (
            f"{found['units']} units, {found['differs_from_onnxruntime']:.0e} off, cut {found['cut']['difference']:.0e}"
        )
    else:
        text = f"whole: {found['why'][:60]}"
    if "forms" in found:
        came, ours, best = found["forms"]["as it came"], found["forms"][SHIPPED], found["beside_best_peer"]
        drop, both = ours["drop"], [100 * form["accuracy"] for form in (came, ours)]
        text += f"; {found['metric']} {both[0]:.2f}, ours {both[1]:.2f} (drop {drop['points']:+.2f}, "
        text += f"{drop['low']:+.2f} to {drop['high']:+.2f}), {ours['speedup']:.2f} times FP32"
        if best:
            text += f", {best['times_as_fast']:.2f} times {best['best_peer']} (drop {best['its_drop']:+.2f})"
    return f"{name:<30} {text}"


def main() -> None:
    """Read the command line, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"rows; all if none: {'; '.join(CASES)}")
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--shared", type=Path, default=Path("../shared/tasks"))
    parser.add_argument("--pictures", type=int, default=300, help="drawn pictures of a split, at most")
    parser.add_argument("--structure", action="store_true", help="read and cut; judge and time nothing")
    parser.add_argument("--runs", type=Path, default=Path("runs/onnx_files"))
    parser.add_argument("--again", action="store_true", help="make rows that are there anew")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds of one row")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if unknown := sorted(set(given.names) - set(CASES)):
        parser.error(f"{unknown[0]!r} is no row; there are {', '.join(CASES)}")
    rows: dict[str, dict[str, Any]] = {}
    if given.out and given.out.is_file():
        rows = json.loads(given.out.read_text("utf-8"))["files"]
    complete = "units" if given.structure else "forms"
    names = [
        name
        for name in given.names or CASES
        if given.again or not (complete in rows.get(name, {}) or "refused" in rows.get(name, {}))
    ]
    assets = Assets(given.assets, given.shared, given.pictures)
    runs = None if given.structure else given.runs
    jobs = [functools.partial(row, name, assets, runs) for name in names]
    for number, found in zoo.each(jobs, [given.limit] * len(jobs), 1):
        rows[names[number]] = {**provenance("python benchmarks/onnx_files.py"), **found}
        print(line(names[number], found), flush=True)
        if given.out:
            versions = {one: version(one) for one in ("torch", "onnx", "onnxruntime")}
            record = {"schema_version": 2, "versions": versions, "files": {n: rows[n] for n in CASES if n in rows}}
            given.out.write_text(json.dumps(record, indent=1, default=float) + "\n", "utf-8")


if __name__ == "__main__":
    main()
