"""Question: do the first changes that `why` suggests bring what it says, on images that it did not see?

    python benchmarks/why_fixes.py --model mobilenetv2_100 --weights weights/mobilenetv2_100.safetensors \\
        --data npz:imagenet.npz --run runs/why_fixes --out benchmarks/results/why_fixes.json

The network is placed (`apply`), and `why` is asked for its worst layers' changes on the selection split. Of the first
three layers the change that it suggests is made, each with those suggested before it, as its own figures are; of a
layer for which none surely helps, the one that seemed to help most, alone. Every file is judged on the test split and
timed beside the one that it changes. What was said of divergence, points and milliseconds is right where the new value
lies within the interval that was said; whether the two intervals meet is told too, since the new value has an interval
of its own. A killed command goes on from its run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from forms import LIMITS
from record import provenance

from hirelc_deploy import api
from hirelc_deploy.evaluate.by_layer import AS_USUAL, ByLayer
from hirelc_deploy.evaluate.cutting import divergences, tensors
from hirelc_deploy.evaluate.files import Files
from hirelc_deploy.evaluate.layer_losses import Won
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.inputs.data.batches import batches
from hirelc_deploy.inputs.data.images import Images
from hirelc_deploy.inputs.data.load import load_data
from hirelc_deploy.jobs.workplace import reopened
from hirelc_deploy.measure.protocol import compare
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.progress import Progress
from hirelc_deploy.tasks.paired import mean_drop, paired_drop

Record = dict[str, Any]
MEASURES = ("divergence", "points", "ms")


def wish_of(layer: str, what: str) -> ByLayer:
    """Return what a change of one layer asks for."""
    if what == "float":
        return ByLayer(in_float=frozenset({layer}))
    if what == "equalise":
        return ByLayer(equalised=frozenset({layer}))
    return ByLayer(ranges={layer: what.removeprefix("ranges ")})


def changes(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a change for each layer that `why` tried some for, worst layers first, with what was said of it."""
    found = []
    for layer in told["layers"]:
        tried = [fix for fix in layer["fixes"] if fix["how"] == wish_of(layer["name"], fix["what"]).options]
        suggested = [fix for fix in tried if fix["how"] == layer["suggested"]]
        if tried:
            fix = max(suggested or tried, key=lambda fix: fix["divergence"]["won"])
            found.append({"layer": layer["name"], "suggested": bool(suggested), **fix})
    return found


def written(pipeline: Pipeline, plan: CompressionPlan, wish: ByLayer, folder: str) -> Path:
    """Return the file of a plan with the options of `wish`, as `apply` writes it with them."""
    files = Files(
        pipeline.uncut, pipeline.backend, pipeline.run, pipeline.threads, Progress(quiet=True), folder, by_layer=wish
    )
    return files.build(pipeline.cut(plan), plan, "F2")


def made(
    pipeline: Pipeline, told: Mapping[str, Any], fixes: Sequence[Mapping[str, Any]], test: Images
) -> dict[str, Any]:
    """Return what changes bring on images that `why` did not see, each beside what was suggested before it.

    Args:
        told: What `why` said.
        fixes: Of `changes`.
    """
    plan, task = CompressionPlan.from_dict(told["plan"]), pipeline.task
    wish, paths, changed = AS_USUAL, [written(pipeline, plan, AS_USUAL, "why-fixes")], list[int]()
    for number, fix in enumerate(fixes, 1):
        changed.append(max((n for n in range(1, number) if fixes[n - 1]["suggested"]), default=0))
        with_it = wish | wish_of(fix["layer"], fix["what"])
        paths.append(written(pipeline, plan, with_it, f"why-fixes-{number}"))
        wish = with_it if fix["suggested"] else wish
    pictures, targets = torch.cat(list(batches(test, 32))).numpy(), task.collate(test.targets(np.arange(len(test))))
    outputs = [
        pipeline.backend.build(path, torch.get_num_threads()).infer(pictures)
        for path in (pipeline.files.reference, *paths)
    ]
    exact, *found = [tensors(each) for each in outputs]
    apart = [divergences(task, exact, each) for each in found]
    parts = [task.parts(each, targets) for each in outputs[1:]]
    rows = []
    for number, (old, fix) in enumerate(zip(changed, fixes, strict=True), 1):
        pair = [paths[old], paths[number]]
        before, timing = compare(pair, pipeline.backend, threads=pipeline.threads, limits=LIMITS)
        shares = (timing.ratio, timing.ratio_high, timing.ratio_low)
        now = {
            "divergence": asdict(Won.back(mean_drop(apart[number] - apart[old]))),
            "points": asdict(Won.back(paired_drop(task, parts[old], parts[number]))),
            "ms": asdict(Won(*(before.median_ms * (1 - share) for share in shares))),
        }
        said = {name: fix[name] for name in MEASURES}
        rows.append({
            **{name: fix[name] for name in ("layer", "what", "how", "suggested")}, "said": said, "measured": now,
            "within": {name: within(said[name], now[name]) for name in MEASURES},
            "meet": {name: meet(said[name], now[name]) for name in MEASURES},
        })  # fmt: skip
    return {
        "said_on": told["images"],
        "measured_on": len(test),
        "pattern": told["pattern"],
        "divergence": [float(np.mean(each)) for each in apart],
        "metric": [task.value(task.parts(outputs[0], targets)), *map(task.value, parts)],
        "fixes": rows,
    }


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Return what was said and what came of it."""
    job: api.JobOptions = {"weights": options.weights, "recovery_epochs": 0.0, "progress": print}
    api.apply(options.model, options.data, "uniform:keep=1,precision=auto", out=options.run, **job)
    told = api.why(options.run, fixes=options.layers, progress=print).record
    workplace = reopened(options.run, Progress(quiet=True))
    with workplace.run:
        pipeline = workplace.pipeline
        test = load_data(options.data).preprocessed(pipeline.data.preprocess).take_test()
        found = made(pipeline, told, changes(told)[: options.fixes], test)
        return {**provenance("python " + " ".join(sys.argv)), "model": options.model, **found}


def within(said: Mapping[str, float] | None, now: Mapping[str, float]) -> bool | None:
    """Return whether a new value lies within the interval that was said; None where nothing was."""
    return None if said is None else said["low"] <= now["won"] <= said["high"]


def meet(said: Mapping[str, float] | None, now: Mapping[str, float]) -> bool | None:
    """Return whether two intervals have a value in common."""
    return None if said is None else said["low"] <= now["high"] and now["low"] <= said["high"]


def main() -> None:
    """Read the command line, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights")
    parser.add_argument("--data", required=True)
    parser.add_argument("--fixes", type=int, default=3, help="changes that are made")
    parser.add_argument("--layers", type=int, default=6, help="worst layers whose changes `why` tries")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    record = measured(options)
    if options.out:
        options.out.write_text(json.dumps(record, indent=1, default=float) + "\n", "utf-8")
    for row in record["fixes"]:
        print(f"{row['layer']}: {row['what']}{', suggested' if row['suggested'] else ''}")
        for name in MEASURES:
            if (said := row["said"][name]) is not None:
                now, verdict = row["measured"][name], "within" if row["within"][name] else "outside"
                print(f"  {name:<11} said {_text(said)}, is {_text(now)}: {verdict}")


def _text(won: Mapping[str, float]) -> str:
    return f"{won['won']:.4f} ({won['low']:.4f} to {won['high']:.4f})"


if __name__ == "__main__":
    main()
