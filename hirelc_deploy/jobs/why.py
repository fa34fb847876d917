"""In: a run, or the bundle in it. Out: which layer of its integer file lost what, and what would help; text and record.

Every step is journaled, so an interrupted `why` goes on where it was, and the same again answers at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hirelc_deploy.compress.integer.ends import End
from hirelc_deploy.compress.integer.guard import Guarded
from hirelc_deploy.config import JobConfig
from hirelc_deploy.deliver.bundle import runtime_of
from hirelc_deploy.deliver.race import metric_record
from hirelc_deploy.deliver.read import MANIFEST, MODEL, read_manifest
from hirelc_deploy.errors import InputError
from hirelc_deploy.evaluate.by_layer import AS_USUAL, ByLayer
from hirelc_deploy.evaluate.cutting import FLOAT
from hirelc_deploy.evaluate.guarded import guard_key
from hirelc_deploy.evaluate.layer_losses import Fix, LayerLosses, suggested
from hirelc_deploy.graph.costs import kept_features
from hirelc_deploy.graph.model_graph import Layer
from hirelc_deploy.inputs.data.load import configured_data
from hirelc_deploy.jobs.workplace import Given, Workplace, reopened, shipped_of
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.progress import Progress
from hirelc_deploy.results.layer_text import WHY
from hirelc_deploy.results.report import read_run, write_report
from hirelc_deploy.runs import CONFIG, TRIALS, json_text, write_atomic

SCHEMA_VERSION = 1

SAME_ANSWERS = 0.01
"""Divergence up to which the file that is written anew counts as the shipped one; a rounding step here and there."""

TRAINING = 'train while rounded: "trained_rounding": true in the plan that apply is given'


def explain(
    path: Path, *, fixes: int = 3, given: Given | None = None, progress: Progress | None = None, command: str = ""
) -> dict[str, Any]:
    """Say which layers of a run's integer file lost what; write it to `why.json` and the report of the run.

    Args:
        path: The folder of a run, or the bundle in it.
        fixes: Layers, those that lost most, for which changes are tried.
        given: Model and data, where the run cannot name them or they are elsewhere now.

    Raises:
        InputError: No run, or its model or images are not at hand.
        TargetUnavailable: The device executes no integers.
    """
    if isinstance(fixes, bool) or not isinstance(fixes, int) or fixes < 0:
        raise InputError(f"--fixes {fixes!r:.60}: give a whole number of at least 0.")
    run = run_of(path)
    given = at_hand(run, given or Given())
    workplace = reopened(run, progress or Progress(quiet=True), command=command, given=given)
    with workplace.run:
        record = explained(workplace, fixes)
        write_atomic(run / WHY, json_text(record, indent=1) + "\n")
        write_report(read_run(run), run / "report.html")
    return record


def run_of(path: Path) -> Path:
    """Return the folder of the run that a path is, or that a bundle lies in."""
    bundle = (path / MANIFEST).is_file()
    for folder in (path, *([path.absolute().parent] if bundle else [])):
        if (folder / CONFIG).is_file() and (folder / TRIALS).is_file():
            return folder
    if bundle:
        raise InputError(
            f"{path}: a bundle without the run around it, whose journal names the model and the images; give the "
            "folder of the run that wrote it."
        )
    raise InputError(f"{path}: neither a run nor a bundle; give the folder that search or apply was told as --out.")


def at_hand(run: Path, given: Given) -> Given:
    """Return what was given, with the data that the run names where none was; raises InputError without any."""
    config, manifest = JobConfig.read(run / CONFIG), run / "bundle" / MANIFEST
    module = manifest.is_file() and read_manifest(manifest.parent)["source"].get("kind") == "module"
    in_memory = config.data.spec.startswith("datasets:")
    if (module and given.source is None) or (in_memory and given.data is None):
        raise InputError(
            f"{run}: its model or data were Python objects, which no configuration can name; call "
            "hirelc_deploy.why(run, model=..., data=...)."
        )
    if given.data is not None:
        return given
    try:
        return replace(given, data=configured_data(config))
    except InputError as error:
        raise InputError(f"{run}: its images are not at hand ({error}) Say where they are with --data.") from None


def explained(workplace: Workplace, fixes: int) -> dict[str, Any]:
    """Return the record; see `explain`."""
    pipeline, run = workplace.pipeline, workplace.run
    _ = pipeline.files.writer.integer  # a device without integers is said before anything is measured
    losses, is_shipped, notes = losses_of(workplace)
    rounding = losses.rounding()
    names = pipeline.progress.track(losses.layers, "rounding of each layer alone", len(losses.layers))
    alone = {layer: losses.alone(layer) for layer in names}
    ms, spread = losses.milliseconds(), losses.spread()

    # Layers that are integer in the file come first, and of these the ones whose rounding costs most.
    worst = sorted(losses.layers, key=lambda name: (losses.precision_of(name) == FLOAT, alone[name].divergence.won))
    rounded = [layer for layer in worst if losses.precision_of(layer) != FLOAT]
    helped, taken = dict[str, list[Fix]](), dict[str, Fix]()
    for layer in pipeline.progress.track(rounded[:fixes], "changes that may help", len(rounded[:fixes])):
        helped[layer] = losses.fixes(layer, joined(taken.values()))
        if fix := suggested(helped[layer], -rounding.divergence.won):
            taken[layer] = fix
    layers = {layer.name: layer for layer in pipeline.graph.layers}
    left_out = [name for name in layers if pipeline.graph.leaves_out(name, losses.plan.keep)]
    cuts = {name: cut_record(losses, layers[name]) for name in (*worst, *left_out)}
    return {
        "schema_version": SCHEMA_VERSION,
        "run": str(run.directory),
        "model": workplace.source.spec,
        "target": workplace.config.target,
        "explains": "shipped" if is_shipped else "placed",
        "plan": losses.plan.to_dict(),
        "pattern": losses.pattern,
        "images": len(pipeline.uncut.selection),
        "metric": metric_record(pipeline.task),
        "rounding": rounding.to_dict(),
        "cutting": losses.cutting().to_dict() if any(cuts.values()) else None,
        "layers": [
            {
                "name": name,
                "block": layers[name].block,
                "kind": layers[name].shape.kind,
                "precision": losses.precision_of(name) if name in alone else "left out",
                "rounding": {"as": losses.rounded_as(name), **replace(alone[name], ms=ms[name]).to_dict()}
                if name in alone
                else None,
                "cut": cuts[name],
                "spread": spread[name].to_dict() if name in spread else None,
                "fixes": [fix_record(fix) for fix in helped.get(name, ())],
                "suggested": taken[name].how if name in taken else None,
            }
            for name in (*worst, *left_out)
        ],
        "ends": [end_record(losses, end) for end in losses.ends],
        "together": together_record(losses, joined(taken.values())) if taken else None,
        "training": training_record(workplace),
        "notes": notes,
        "command": workplace.command,
        "machine": dict(run.machine),
    }


def losses_of(workplace: Workplace) -> tuple[LayerLosses, bool, list[str]]:
    """Return the integer file to explain, whether it is the shipped one, and notes about the choice.

    Where a float file was shipped, or nothing, it is the uncut model's fastest integer file.
    """
    pipeline, bundle = workplace.pipeline, workplace.run.directory / "bundle"
    files, notes = pipeline.files, list[str]()
    if (bundle / MANIFEST).is_file():
        manifest = read_manifest(bundle)
        model, plan = shipped_of(workplace)
        if files.pattern_of(plan) not in (FLOAT, files.writer.form.half_pattern):
            losses = LayerLosses(pipeline, model, plan)
            runtime = manifest.get("runtime")
            here = runtime_of(pipeline.backend.versions())
            if isinstance(runtime, dict) and runtime.get("name") not in (None, here):
                notes.append(f"the bundle is for {runtime['name']}; explained is the same plan in {here}.")
            elif (apart := losses.apart(bundle / MODEL)) > SAME_ANSWERS:
                notes.append(
                    f"written anew the file answers {apart:.2g} away from the shipped one: another version made that."
                )
            return losses, True, notes
        notes.append("the shipped file is a float one; explained is the uncut model's fastest integer file.")
    else:
        notes.append("this run has shipped nothing; explained is the uncut model's fastest integer file.")
    plan = CompressionPlan(default_precision="auto")
    return LayerLosses(pipeline, pipeline.cut(plan), plan), False, notes


def cut_record(losses: LayerLosses, layer: Layer) -> dict[str, Any] | None:
    """Return what the cut of the unit that a layer writes costs alone; None where it is whole."""
    graph, keep = losses.pipeline.graph, losses.plan.keep
    for share in layer.writes:
        unit = graph.unit(share.unit)
        if (kept := keep.get(unit.name, unit.size)) != unit.size:
            wide = kept_features(layer, graph, keep)[1]
            effect = losses.cut(unit.name, kept).to_dict()
            return {"unit": unit.name, "kept": wide, "full": layer.out_features, **effect}
    return None


def end_record(losses: LayerLosses, end: End) -> dict[str, Any]:
    """Return what decodes some outputs, why it suffers from rounding, and what integers in it bring and cost."""
    effect = losses.end(end)
    return {
        "name": end.name,
        "why": "; ".join(end.why),
        "operators": len(end.nodes),
        "precision": losses.precision_of(end.name),
        "rounding": None if effect is None else effect.to_dict(),
    }


def fix_record(fix: Fix) -> dict[str, Any]:
    """Return a change that was tried as JSON values."""
    return {"what": fix.what, "how": fix.how, **fix.effect.to_dict()}


def joined(fixes: Iterable[Fix]) -> ByLayer:
    """Return what several changes ask for."""
    wish = AS_USUAL
    for fix in fixes:
        wish |= fix.wish
    return wish


def together_record(losses: LayerLosses, wish: ByLayer) -> dict[str, Any]:
    """Return the options that ask for all suggested changes, and what they bring together."""
    return {"how": wish.options, **losses.together(wish).to_dict()}


def training_record(workplace: Workplace) -> dict[str, Any]:
    """Return how weights are trained while they are rounded, and what the accuracy guard of the run has seen of it."""
    pipeline, limit = workplace.pipeline, workplace.config.limits.max_drop
    told = None if limit is None else pipeline.run.fact(guard_key(pipeline, limit))
    seen: dict[str, Any] = {"how": TRAINING, "points_before": None, "points": None}
    if told is not None:
        guarded = Guarded.from_dict(told)
        points = [guarded.points] if guarded.trained else [other.points for other in guarded.others if other.trained]
        if points:
            seen |= {"points_before": guarded.points_before, "points": points[0]}
    return seen
