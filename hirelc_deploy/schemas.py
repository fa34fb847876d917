"""In: the name of a JSON file or of a command. Out: the JSON Schema of what is in it, or of what --json prints.

Schemas say what is always there and of what kind it is. They allow keys that a later version adds; tests hold
real outputs to them without that allowance, so that none is missing here.
"""

from __future__ import annotations

import difflib
from importlib import resources
from typing import Any

from hirelc_deploy.errors import InputError

DIALECT = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, Any]


def _text(description: str = "") -> Schema:
    return {"type": "string"} | ({"description": description} if description else {})


def _number(description: str = "") -> Schema:
    return {"type": "number"} | ({"description": description} if description else {})


def _whole(description: str = "") -> Schema:
    return {"type": "integer", "minimum": 0} | ({"description": description} if description else {})


def _truth(description: str = "") -> Schema:
    return {"type": "boolean"} | ({"description": description} if description else {})


def _one_of(*values: str, description: str = "") -> Schema:
    return {"enum": list(values)} | ({"description": description} if description else {})


def _list(items: Schema, description: str = "") -> Schema:
    return {"type": "array", "items": items} | ({"description": description} if description else {})


def _map(values: Schema, description: str = "") -> Schema:
    """Return an object whose keys are names."""
    return {"type": "object", "additionalProperties": values} | ({"description": description} if description else {})


def _or_null(schema: Schema) -> Schema:
    """Return a schema that null satisfies too; where it stands at the top, the description."""
    inner = dict(schema)
    description = inner.pop("description", "")
    return {"anyOf": [inner, {"type": "null"}]} | ({"description": description} if description else {})


def _record(description: str, needed: dict[str, Schema], maybe: dict[str, Schema] | None = None) -> Schema:
    """Return an object with these keys; those of `maybe` need not be there."""
    return {
        "type": "object",
        "description": description,
        "properties": {**needed, **(maybe or {})},
        "required": list(needed),
    }


ANYTHING: Schema = {}
VERSION = {"const": 1, "description": "Of this form."}
TIME = _text("UTC, ISO 8601.")
SHA256 = {"type": "string", "pattern": "^[0-9a-f]{64}$"}

METRIC = _record(
    "What the numbers under `accuracy` are.",
    {
        "name": _text("`accuracy`, `mIoU`, `AP`, `RMSE`, or that of your own function."),
        "scale": _number("A value times this is what limits count: 100 for shares, 1 for others."),
        "unit": _text("Of the scaled value."),
        "higher_is_better": _truth(),
    },
    {"task": _text("Name of the task.")},
)
ACCURACY = _record(
    "The metric of the exported file on the test split; null where the data has no labels.",
    {
        "test": _or_null(_number("Of the shipped file.")),
        "baseline_test": _or_null(_number("Of the uncut float file.")),
        "drop_points": _or_null(_number("How much worse, in `metric.unit`; below 0 it is better.")),
        "drop_low": _or_null(_number("95 % interval.")),
        "drop_high": _or_null(_number()),
    },
)
TEST = _record("The test images behind `accuracy`.", {"images": _whole(), "labels_sha256": SHA256})
CHANGE = _record(
    "One figure of a new bundle beside the baseline's.",
    {
        "name": _one_of("accuracy", "latency"),
        "worse": _or_null(_truth("Null where the two cannot be compared.")),
        "text": _text("What was compared, and what came of it."),
        "change": _or_null(_number("Points lost, or per cent slower; below 0 it is better.")),
        "allowed": _number("The limit of `change`."),
    },
)
VERDICT = _one_of("reference", "faster", "slower", "same", "not told apart", description="About `ratio`.")
RATIO = {"ratio": _number("Time over that of the reference."), "ratio_low": _number("95 %."), "ratio_high": _number()}
LATENCY = _record(
    "The shipped file beside the uncut float file.",
    {"median_ms": _number(), "reference": _text(), **RATIO, "verdict": VERDICT},
    {
        "p99_ms": _number("What 99 of 100 inferences stay within."),
        "batch": _whole("Images of one inference."),
        "threads": _whole("Of one inference."),
        "images_per_second": _number("Throughput by the median, one inference after the other."),
    },
)
MACHINE = _record(
    "What a reader needs to judge a timing; null where the system does not say.",
    {
        "cpu_model": _or_null(_text()),
        "cores": _or_null(_whole()),
        "cores_allowed": _or_null(_whole()),
        "features": _or_null(_list(_text(), "Instructions that matter here.")),
        "memory_bytes": _or_null(_whole()),
        "os": _text(),
        "architecture": _text(),
        "python": _text(),
        "load_average": _or_null(_list(_number())),
        "governor": _or_null(_text()),
        "max_frequency_khz": _or_null(_whole()),
        "power_mode": _or_null(_text()),
        "backend": _text(),
        "versions": _map(_text(), "Of the runtime and what it depends on."),
    },
)
PLAN = _record(
    "How wide each unit stays and in which precision each layer runs. Any key may be left out.",
    {},
    {
        "schema_version": VERSION,
        "keep": _map(_whole(), "Unit to the elements it keeps; 0 leaves its branch out. Others stay whole."),
        "precision": _map(_one_of("int8", "int4", "float"), "Layer to its precision, where not the default."),
        "default_precision": _one_of("int8", "float", "auto"),
        "pattern": _text("Which operators around integer layers are integer too."),
        "trained_rounding": _truth("The recovery rounds as the integer file does."),
    },
)
PLAN_AS_WRITTEN = {**PLAN, "required": ["schema_version", "keep", "precision", "default_precision"]}
STEP = {
    "step": _text("What is being done."),
    "done": _whole("Of what it counts."),
    "total": _whole("0 where nothing is counted."),
    "note": _text("For example the current loss."),
}
FIDELITY = _one_of("F1", "F2", "F3", description="Judged in torch; as a timed file; as a timed file after recovery.")
SECONDS = _map(_number(), "Stage to the seconds it took.")
OUTCOME = {
    "oneOf": [
        _record(
            "What one evaluation found; null where its fidelity does not measure it.",
            {
                "kind": {"const": "measured"},
                "plan_digest": _text(),
                "fidelity": FIDELITY,
                "loss": _number("Divergence from the uncut model's answers, on the selection split."),
                "accuracy": _or_null(_number("The metric on the selection split.")),
                "params": _whole(),
                "macs": _whole("Multiply-accumulates."),
                "predicted_ms": _or_null(_number()),
                "median_ms": _or_null(_number()),
                **{name: _or_null(schema) for name, schema in RATIO.items()},
                "size_bytes": _or_null(_whole()),
                "seconds": SECONDS,
            },
        ),
        _record(
            "A plan that could not be built or run.",
            {
                "kind": {"const": "failed"},
                "plan_digest": _text(),
                "fidelity": FIDELITY,
                "stage": _text(),
                "reason": _text(),
                "seconds": SECONDS,
            },
        ),
    ]
}
PRINTED = {
    "bundle": _text("The folder to deploy."),
    "params": _whole(),
    "macs": _whole("Multiply-accumulates of one image."),
    "size_bytes": _whole("Of the shipped file."),
    "size_ratio": _number("Bytes of the uncut float file over those of the shipped one."),
    "metric": METRIC,
    "accuracy": ACCURACY,
    "latency": LATENCY,
    "best_unpruned": _record("The fastest file without cutting.", {"name": _text(), "ratio": _number()}),
}
RESULT = _record(
    "`result.json` of a run: everything that was found.",
    {
        **PRINTED,
        "layers": _list(
            _record(
                "A layer, in execution order.",
                {
                    "name": _text(),
                    "block": _text(),
                    "kind": _text(),
                    **{name: _whole() for name in ("in_full", "out_full", "in_kept", "out_kept", "params", "macs")},
                    "precision": _text(),
                },
            )
        ),
        "candidates": _list(
            _record(
                "A file of the last race.",
                {
                    "name": _text(),
                    **RATIO,
                    "median_ms": _number(),
                    "size_bytes": _whole(),
                    "accuracy_selection": _or_null(_number()),
                },
            )
        ),
        "stages": SECONDS,
        "exports": _record("How files were made.", {"filled in": _whole(), "exported": _map(_whole())}),
        "kept_whole": _list(_record("A layer that stays whole.", {"layer": _text(), "reason": _text()})),
        "operators": _list(
            _record(
                "An operator as it ran.",
                {"name": _text(), "operator": _text(), "is_integer": _truth(), "microseconds": _number()},
            )
        ),
        "placement": _map(_record("A placement that was timed.", RATIO)),
        "guard": _or_null(_map(ANYTHING, "What the accuracy guard gave back, and what else kept the drop.")),
        "by_class": _map(_number(), "The metric of each class."),
        "samples": _list(_record("A picture and what the file says.", {"picture": _text(), "says": _text()})),
        "warnings": _list(_text()),
    },
    {
        "peak_memory_bytes": _or_null(_whole("Of a process that runs the shipped file; null where none is told.")),
        "energy_mj": _or_null(_number("Of one inference of the shipped file; null where nothing limits it.")),
        "search": _record(
            "How the search was done; not after `apply`.",
            {
                "strategy": _text(),
                "f1": _whole(),
                "f2": _whole(),
                "f3": _whole(),
                "overhead_seconds": _number(),
                "seconds": _number(),
            },
        ),
        "ends": _list(
            _record(
                "What decodes outputs, and why rounding harms it.",
                {"name": _text(), "precision": _text(), "why": _text(), "operators": _whole()},
                {
                    "divergence": _number("Of the file where it is integer, in nats."),
                    "float_divergence": _number("Of the file where it is float."),
                    **RATIO,
                },
            )
        ),
        "latency_model": _map(ANYTHING, "How well the layer table predicts files."),
        "agents": _list(_map(ANYTHING), "What each search learned."),
        "agreement": _map(ANYTHING, "How far tables, F1, F2 and F3 agree."),
        "finalists": _list(
            _record(
                "A plan that was recovered.",
                {
                    "plan": _text("Its digest."),
                    "ratio": _or_null(_number()),
                    "drop_points": _number(),
                    "drop_error": _number(),
                    "keeps_limits": _truth(),
                },
                {
                    "peak_memory_bytes": _or_null(_whole("Of its process; null where nothing limits it.")),
                    "energy_mj": _or_null(_number("Of one inference; null where nothing limits it.")),
                },
            )
        ),
    },
)
MANIFEST = _record(
    "`manifest.json` of a bundle: sources, plan, measurements, and the hash of each file.",
    {
        "schema_version": {"enum": [1, 2]},
        "created": TIME,
        "tool": _record("What wrote it.", {"name": _text(), "version": _text()}),
        "command": _text(),
        "source": _map(ANYTHING, "Where the uncut model came from, with hashes."),
        "plan": PLAN_AS_WRITTEN,
        "measurements": _record(
            "As printed at the end of the run.",
            {
                **{name: schema for name, schema in PRINTED.items() if name not in ("bundle", "metric")},
                "operators": _record("Of the file, as they ran.", {"integer_ops": _whole(), "float_ops": _whole()}),
                "test": _or_null(TEST),
            },
            {"metric": METRIC},
        ),
        "machine": MACHINE,
        "versions": _map(_text()),
        "files": _map(_record("A file of the bundle.", {"sha256": SHA256, "bytes": _whole()})),
    },
    {
        "runtime": _record("What runs the file, and how it was opened.", {"name": _text(), "options": _map(ANYTHING)}),
        "batch": _whole("Images that the file takes at a time; 1 where it is missing."),
    },
)
FORETOLD = _record(
    "What one thing can bring. Nothing of it was measured as a whole file; numbers are null where there are none.",
    {
        "what": _text("`int8`, `bf16`, `cutting half of the channels`, or another runtime."),
        "verdict": _one_of("faster", "slower", "same", "not told apart", "unknown", "impossible"),
        "speedup": _or_null(_number("Times as fast as the uncut float file on the target's own runtime.")),
        "speedup_low": _or_null(_number("It is expected between this")),
        "speedup_high": _or_null(_number("and this.")),
        "ms": _or_null(_number("`float_ms` over `speedup`.")),
        "covered": _or_null(_number("Share of the network's work whose pieces were timed.")),
        "runtime": _or_null(_text("Name of the backend.")),
        "pattern": _or_null(_text("Which operators are integer or have 16 bits; `float` for none.")),
        "says": _text("All that in a sentence, or why it cannot be known."),
        "command": _text("What does it, measured; DATA and WEIGHTS stand for yours. Empty without a number."),
    },
)
FORETELLING = _record(
    "What can be gained on a target, foretold from timed pieces of the network.",
    {
        "target": _text(),
        "runtime": _text("Name of the target's own backend."),
        "threads": _whole(),
        "seconds": _number("That it took, the inspection included."),
        "float_ms": _number("Of the uncut float file as a whole, measured."),
        "note": _text("What a reader must know about that measurement, or empty."),
        "pieces": _whole("That the network consists of."),
        "kinds": _whole("Of these pieces; one of each was timed."),
        "covered": _number("Share of the network's work whose pieces were timed."),
        "foretold": _list(FORETOLD),
        "unknown": _list(_text(), "What cannot be known beforehand."),
        "machine": MACHINE,
    },
)
INSPECTION = _record(
    "`inspect --json`: what a model consists of and what can be cut.",
    {
        "model": _text(),
        "notes": _list(_text(), "What was changed when the model was loaded."),
        "input_size": _list(_whole(), "Channels, height, width."),
        "params": _whole(),
        "macs": _whole(),
        "blocks": _list(_text()),
        "units": _list(
            _record(
                "What must be cut together.",
                {
                    "name": _text(),
                    "kind": _text(),
                    "size": _whole(),
                    "block": _text(),
                    "widths": _list(_whole()),
                    "branch": _or_null(_text("The branch that may go as a whole.")),
                    "params": _whole(),
                    "macs": _whole(),
                    "bytes": _whole(),
                },
            )
        ),
        "kept_whole": _list(_record("A layer that stays whole.", {"layer": _text(), "reason": _text()})),
        "matched": _map(_list(_text()), "Pattern to the units that it matches."),
    },
    {"verdict": FORETELLING},
)
TARGET = _record(
    "A device as the user names it.",
    {
        **{name: _text() for name in ("name", "backend", "description", "source", "power_mode", "python", "folder")},
        **{name: _list(_text()) for name in ("precisions", "hosts", "via", "also")},
        "threads": _whole(),
        "remote": _truth(),
    },
)
PRECISION = _record(
    "A precision that the device executes.",
    {
        **{name: _text() for name in ("name", "activation_type", "weight_type", "remark", "form")},
        "weight_bits": _whole(),
    },
)
TIMING = _record(
    "A file beside the first one.",
    {
        "file": _text(),
        "median_ms": _number(),
        "p90_ms": _number(),
        "p99_ms": _number(),
        **RATIO,
        "batch": _whole("Images of one inference."),
        "images_per_second": _number("Throughput by the median, one inference after the other."),
        "verdict": VERDICT,
        "rounds": _whole(),
        "contended": _or_null(_truth("Other programs took the core; null with several threads.")),
        "note": _text("What a reader must know about these numbers, or empty."),
    },
)
WON = _or_null(_map(_or_null(_number()), "`won`, and its 95 % interval `low` to `high`; below 0 it was lost."))
EFFECT = {
    "divergence": {**WON, "description": "From the same model in float; of a cut, from the uncut model."},
    "points": {**WON, "description": "Of the metric, in its unit; null without labels."},
    "ms": {**WON, "description": "Of one inference; null where nothing was timed."},
}
SPREAD = _or_null(
    _record(
        "Activations in some selection images: range of integers, values, share that 0.1 % take, share clipped.",
        {name: _number() for name in ("low", "high", "least", "largest", "tail_share", "clipped")},
        {"widest_channel": _or_null(_number("Its largest magnitude over that of the middle channel."))},
    )
)
TRIED = {"how": _text("Options of `search` and `apply`."), **EFFECT}
EXPLAINED_LAYER = _record(
    "A layer; those that are integer come first, by what their rounding costs.",
    {
        **{name: _text() for name in ("name", "block", "kind")},
        "precision": _one_of("int8", "int4", "float", "left out"),
        "rounding": _or_null(
            _record("Where nothing else is rounded; `ms`: in the whole file.", {"as": _text(), **EFFECT})
        ),
        "cut": _or_null(
            _record("Alone, before any recovery.", {"unit": _text(), "kept": _whole(), "full": _whole(), **EFFECT})
        ),
        "spread": _or_null(
            _record(
                "Its values.", {"reads": SPREAD, "writes": SPREAD, "widest_weight": _number("Over the middle one.")}
            )
        ),
        "fixes": _list(_record("Tried in the whole file, beside what is suggested above.", {"what": _text(), **TRIED})),
        "suggested": _or_null(_text("`how` of the change to make; null where none surely helps.")),
    },
)
WHY = _record(
    "`why --json`, and `why.json` of a run: what each layer's rounding and cut cost, and what would help.",
    {
        "schema_version": VERSION,
        **{name: _text() for name in ("run", "model", "target", "pattern", "command")},
        "explains": _one_of("shipped", "placed", description="Or the uncut model's fastest integer file."),
        "plan": PLAN_AS_WRITTEN,
        "images": _whole("Of the selection split."),
        "metric": METRIC,
        "rounding": _record("The whole file beside the same model in float.", EFFECT),
        "cutting": _or_null(_record("The model in float beside the uncut one.", EFFECT)),
        "layers": _list(EXPLAINED_LAYER),
        "together": _or_null(_record("All suggested changes.", TRIED)),
        "training": _record(
            "While rounded; and what the accuracy guard saw lost before and after it.",
            {"how": _text(), "points_before": _or_null(_number()), "points": _or_null(_number())},
        ),
        "notes": _list(_text()),
        "machine": MACHINE,
    },
)
STRATEGY = _record(
    "A strategy over all its searches.",
    {
        **{name: _whole() for name in ("searches", "within_budget", "plans")},
        "evaluations": _list(_whole()),
        **{name: _list(_number()) for name in ("curve", "curve_low", "curve_high")},
        **{
            name: _number()
            for name in (
                *("best_loss_mean", "hypervolume", "hypervolume_low", "hypervolume_high"),
                *("thinking_seconds_per_search", "evaluating_seconds_per_search"),
            )
        },
        "at_budget": _list(_map(_number())),
    },
    {
        "against_ours": _record(
            "A paired sign-flip test.",
            {**{n: _whole() for n in ("pairs", "better", "worse")}, "log_ratio": _number(), "p": _number()},
        )
    },
)

_SCHEMAS: dict[str, Schema] = {
    "plan": PLAN,
    "result": RESULT,
    "trial": _record(
        "A line of `trials.jsonl`: one finished evaluation.",
        {
            "schema_version": VERSION,
            "trial": {"type": "integer", "minimum": 1},
            "time": TIME,
            "plan": PLAN_AS_WRITTEN,
            "fidelity": FIDELITY,
            "context": _text("What else the outcome depends on, or empty."),
            "outcome": OUTCOME,
        },
    ),
    "fact": _record(
        "A line of `facts.jsonl`: one finished measurement or decision.",
        {"schema_version": VERSION, "time": TIME, "key": _text("What it is, in words."), "value": ANYTHING},
    ),
    "pareto": _record(
        "`pareto.json` of a run: plans that no other plan of their fidelity beats.",
        {
            "schema_version": VERSION,
            "fronts": _map(_list(_record("A plan of the front.", {"plan": PLAN_AS_WRITTEN, "outcome": OUTCOME}))),
        },
    ),
    "machine": MACHINE,
    "manifest": MANIFEST,
    "preprocess": _record(
        "`preprocess.json` of a bundle: how a picture becomes an input.",
        {
            "input_size": {**_list(_whole(), "Channels, height, width."), "minItems": 3, "maxItems": 3},
            "mean": _list(_number(), "Per channel."),
            "std": _list(_number(), "Per channel."),
            "crop_pct": _number("Share of the resized picture that the crop takes."),
            "interpolation": _text(),
        },
        {
            "geometry": _one_of("stretch", "letterbox", description="A centre crop where it is missing."),
            "pad_value": _whole("Grey of a letterbox; 114 where it is missing."),
            "from_pictures": _truth("False where inputs are floats that nobody can make of a picture."),
        },
    ),
    "task": _record(
        "`task.json` of a bundle: what the answers are for.",
        {
            "task": _text(),
            "metric": METRIC,
            "own_metric": ANYTHING,
            "own_loss": ANYTHING,
            "decoder": _map(ANYTHING, "Options of `decode.py`."),
            "made_of": _map(ANYTHING, "What makes the task again."),
        },
    ),
    "labels": _list(_text(), "`labels.json` of a bundle: class names in the order of the outputs; empty without."),
    "shapes": _map(
        {"type": ["array", "integer", "string"]},
        "`shapes.json` of a bundle: tensors to their shapes, numbers that modules keep, branches that were left out.",
    ),
    "forms": _map(
        {
            "anyOf": [
                _record("A file that is the same as another.", {"equal_to": _text()}),
                _record(
                    "A form of the model, judged on the selection split.",
                    {"bytes": _whole(), "images": _whole(), "divergence": _number(), "kept": _truth()},
                    {name: _number() for name in ("accuracy", "drop_points", "drop_low", "drop_high")},
                ),
            ]
        },
        "`forms.json` of `export --format tensorrt`: file to its bytes and accuracy.",
    ),
    "search": _record("`search`, `apply` and `demo` with --json: the result in short.", PRINTED),
    "inspect": INSPECTION,
    "benchmark": _record(
        "`benchmark --json`: files timed against the first of them.", {"machine": MACHINE, "results": _list(TIMING)}
    ),
    "verify": _record(
        "`verify --json`: whether a bundle is what it says.",
        {
            "ok": _truth("Exit code 0; else 1."),
            "problems": _list(_text()),
            "remarks": _list(_text()),
            "integer_ops": _or_null(_whole()),
            "float_ops": _or_null(_whole()),
            "accuracy": _or_null(_number("Measured now; null without --data.")),
            "claimed_accuracy": _or_null(_number()),
            "metric": METRIC,
            "latency": _or_null(_record("Against --reference.", {"median_ms": _number(), **RATIO, "verdict": VERDICT})),
            "test": _or_null(TEST),
            "machine": _or_null(MACHINE),
            "reference_sha256": _or_null(SHA256),
            "worse": _truth("Than --against allows: exit code 5."),
            "changes": _list(CHANGE, "Figures beside those of --against; empty without it."),
        },
    ),
    "why": WHY,
    "progress": _record(
        "`progress.json` of a run: how far the last command on it is, written every few seconds.",
        {
            "schema_version": VERSION,
            "command": _text(),
            "host": _text("Of the machine that it runs on."),
            "pid": _whole("Of its process there."),
            "began": TIME,
            "updated": TIME,
            "state": _one_of("running", "finished", "stopped"),
            "why": _text("What stopped it, as a sentence."),
            **STEP,
            "seconds": _number("Since it began."),
            "seconds_before": _number("Of the commands before it on this run."),
            "seconds_left": _or_null(_number("Of the whole command; null where it is not known.")),
            "measured": _map(
                _record("Steps of one kind.", {"count": _whole(), "seconds": _number("Of all of them.")}),
                "What steps have taken, kind by kind.",
            ),
        },
    ),
    "status": _record(
        "`status --json`: how a run stands; null where the command on it did not say.",
        {
            "run": _text(),
            "command": _or_null(_text()),
            "state": _one_of("running", "finished", "stopped", "unknown"),
            "alive": _or_null(_truth("Whether a process holds the run; null where it was begun on another machine.")),
            "why": _text("What stopped it, or why it is not known."),
            "host": _or_null(_text()),
            "pid": _or_null(_whole()),
            "began": _or_null(TIME),
            "updated": _or_null(TIME),
            **{name: _or_null(schema) for name, schema in STEP.items()},
            "seconds": _or_null(_number("Of all commands on this run.")),
            "seconds_left": _or_null(
                _number("Of the whole command; null where nothing is running or it is not known.")
            ),
            "trials": _map(_whole(), "Finished evaluations: F1, F2, F3, and how many of all failed."),
            "best": _or_null(
                _record(
                    "The fastest recovered file that keeps the limits, else the one that lost least.",
                    {
                        "plan": _text("Its digest."),
                        "ratio": _or_null(_number("Time over that of the uncut float file.")),
                        "loss": _number(),
                        "accuracy": _or_null(_number()),
                        "size_bytes": _or_null(_whole()),
                        "drop_points": _or_null(_number("On the selection split.")),
                        "drop_error": _or_null(_number("Standard error.")),
                        "keeps_limits": _or_null(_truth()),
                    },
                )
            ),
            "bundle": _or_null(_text("Of a finished run.")),
            "log": _list(_text(), "The last lines of `run.log`."),
        },
    ),
    "doctor": _record(
        "`doctor --json`: what can run here, what is missing, and how to get it.",
        {"findings": _list(_record("One finding.", {"what": _text(), "ok": _truth(), "says": _text()}))},
    ),
    "targets": _record("`targets --json`: target profiles.", {"targets": _list(TARGET)}),
    "targets-add": _record(
        "`targets add --json`: what boards said of themselves.",
        {
            "target": TARGET,
            "machines": _map(MACHINE, "Host to its machine."),
            "precisions": _list(PRECISION),
            "seconds": _map(_number(), "Host to the seconds until it answered."),
        },
    ),
    "profile": _record(
        "`profile --json`, and its `staircase.json`: milliseconds against width.",
        {
            "schema_version": VERSION,
            "title": _text(),
            "facts": _map({"type": ["string", "number"]}),
            "machine": MACHINE,
            "adoption": _or_null(_map(ANYTHING, "What was taken over from another machine.")),
            "stairs": _list(
                _record(
                    "Equal units, and their milliseconds at each width.",
                    {
                        "units": _list(_text()),
                        "kind": _text(),
                        "widths": _list(_whole()),
                        "ms": _map(_list(_number()), "Precision to one number a width."),
                    },
                )
            ),
        },
    ),
    "compare": _record(
        "`compare --json`, and its `compare.json`: strategies on one problem.",
        {
            "schema_version": VERSION,
            "ours": _text(),
            "budgets_ms": _list(_number()),
            "uncut_ms": _number(),
            "seeds": _list(_whole()),
            "strategies": _map(STRATEGY),
            "searches": _list(_map(ANYTHING)),
            "model": _text(),
            "command": _text(),
            "machine": MACHINE,
        },
    ),
}
COMMANDS = {
    **dict.fromkeys(("search", "apply", "demo"), "search"),
    **{
        name: name
        for name in ("inspect", "benchmark", "verify", "why", "status", "doctor", "targets", "profile", "compare")
    },
    "targets add": "targets-add",
}
"""Command that takes --json, to the name of its schema."""
NAMES = tuple(_SCHEMAS)


def schema(name: str) -> Schema:
    """Return the JSON Schema of a file or output; the name of a command serves too.

    Raises:
        InputError: There is none of that name.
    """
    found = _SCHEMAS.get(COMMANDS.get(name, name))
    if found is None:
        near = difflib.get_close_matches(name, [*NAMES, *COMMANDS], n=1)
        hint = f"did you mean {near[0]}?" if near else "`hirelc-deploy schema` lists them."
        raise InputError(f"schema {name!r}: there is none of this name; {hint}")
    return {"$schema": DIALECT, "title": name, **found}


def skill() -> str:
    """Return the page for coding agents: when to use which command, exit codes, and what to check."""
    return (resources.files("hirelc_deploy") / "SKILL.md").read_text("utf-8")
