"""In: the name of a JSON file or of a command. Out: the JSON Schema of what is in it, or of what --json prints.

Schemas say what is always there and of what kind it is. They allow keys that a later version adds; tests hold
real outputs to them without that allowance, so that none is missing here.
"""

from __future__ import annotations

import difflib
from importlib import resources

from hirelc_deploy.errors import InputError
from hirelc_deploy.schemas.answers import AFTER_TRAINING, INSPECTION, PRECISION, STRATEGY, TARGET, TIMING, WHY
from hirelc_deploy.schemas.files import FAMILY, MANIFEST, PRINTED, RESULT
from hirelc_deploy.schemas.shared import (
    ANYTHING,
    CHANGE,
    FIDELITY,
    MACHINE,
    METRIC,
    OUTCOME,
    PLAN,
    PLAN_AS_WRITTEN,
    RATIO,
    SHA256,
    TEST,
    TIME,
    VERDICT,
    VERSION,
)
from hirelc_deploy.schemas.status import PROGRESS, STATUS
from hirelc_deploy.schemas.words import Schema, listed, mapped, number, one_of, or_null, record, text, truth, whole

DIALECT = "https://json-schema.org/draft/2020-12/schema"

_SCHEMAS: dict[str, Schema] = {
    "plan": PLAN,
    "result": RESULT,
    "family": FAMILY,
    "trial": record(
        "A line of `trials.jsonl`: one finished evaluation.",
        {
            "schema_version": VERSION,
            "trial": {"type": "integer", "minimum": 1},
            "time": TIME,
            "plan": PLAN_AS_WRITTEN,
            "fidelity": FIDELITY,
            "context": text("What else the outcome depends on, or empty."),
            "outcome": OUTCOME,
        },
    ),
    "fact": record(
        "A line of `facts.jsonl`: one finished measurement or decision.",
        {"schema_version": VERSION, "time": TIME, "key": text("What it is, in words."), "value": ANYTHING},
    ),
    "pareto": record(
        "`pareto.json` of a run: plans that no other plan of their fidelity beats.",
        {
            "schema_version": VERSION,
            "fronts": mapped(listed(record("A plan of the front.", {"plan": PLAN_AS_WRITTEN, "outcome": OUTCOME}))),
        },
    ),
    "machine": MACHINE,
    "manifest": MANIFEST,
    "preprocess": record(
        "`preprocess.json` of a bundle: how a picture becomes an input.",
        {
            "input_size": {**listed(whole(), "Channels, height, width."), "minItems": 3, "maxItems": 3},
            "mean": listed(number(), "Per channel."),
            "std": listed(number(), "Per channel."),
            "crop_pct": number("Share of the resized picture that the crop takes."),
            "interpolation": text(),
        },
        {
            "geometry": one_of("stretch", "letterbox", description="A centre crop where it is missing."),
            "pad_value": whole("Grey of a letterbox; 114 where it is missing."),
            "from_pictures": truth("False where inputs are floats that nobody can make of a picture."),
        },
    ),
    "task": record(
        "`task.json` of a bundle: what the answers are for.",
        {
            "task": text(),
            "metric": METRIC,
            "own_metric": ANYTHING,
            "own_loss": ANYTHING,
            "decoder": mapped(ANYTHING, "Options of `decode.py`."),
            "made_of": mapped(ANYTHING, "What makes the task again."),
        },
    ),
    "labels": listed(text(), "`labels.json` of a bundle: class names in the order of the outputs; empty without."),
    "shapes": mapped(
        {"type": ["array", "integer", "string"]},
        "`shapes.json` of a bundle: tensors to their shapes, numbers that modules keep, branches that were left out.",
    ),
    "forms": mapped(
        {
            "anyOf": [
                record("A file that is the same as another.", {"equal_to": text()}),
                record(
                    "A form of the model, judged on the selection split.",
                    {"bytes": whole(), "images": whole(), "divergence": number(), "kept": truth()},
                    {name: number() for name in ("accuracy", "drop_points", "drop_low", "drop_high")},
                ),
            ]
        },
        "`forms.json` of `export --format tensorrt`: file to its bytes and accuracy.",
    ),
    "search": record("`search`, `apply` and `demo` with --json: the result in short.", PRINTED),
    "inspect": INSPECTION,
    "benchmark": record(
        "`benchmark --json`: files timed against the first of them.", {"machine": MACHINE, "results": listed(TIMING)}
    ),
    "verify": record(
        "`verify --json`: whether a bundle is what it says.",
        {
            "ok": truth("Exit code 0; else 1."),
            "problems": listed(text()),
            "remarks": listed(text()),
            "integer_ops": or_null(whole()),
            "float_ops": or_null(whole()),
            "accuracy": or_null(number("Measured now; null without --data.")),
            "claimed_accuracy": or_null(number()),
            "metric": METRIC,
            "latency": or_null(record("Against --reference.", {"median_ms": number(), **RATIO, "verdict": VERDICT})),
            "test": or_null(TEST),
            "machine": or_null(MACHINE),
            "reference_sha256": or_null(SHA256),
            "worse": truth("Than --against allows: exit code 5."),
            "changes": listed(CHANGE, "Figures beside those of --against; empty without it."),
        },
    ),
    "why": WHY,
    "progress": PROGRESS,
    "status": STATUS,
    "doctor": record(
        "`doctor --json`: what can run here, what is missing, and how to get it.",
        {"findings": listed(record("One finding.", {"what": text(), "ok": truth(), "says": text()}))},
    ),
    "targets": record("`targets --json`: target profiles.", {"targets": listed(TARGET)}),
    "targets-add": record(
        "`targets add --json`: what boards said of themselves.",
        {
            "target": TARGET,
            "machines": mapped(MACHINE, "Host to its machine."),
            "precisions": listed(PRECISION),
            "seconds": mapped(number(), "Host to the seconds until it answered."),
        },
    ),
    "profile": record(
        "`profile --json`, and its `staircase.json`: milliseconds against width.",
        {
            "schema_version": VERSION,
            "title": text(),
            "facts": mapped({"type": ["string", "number"]}),
            "machine": MACHINE,
            "adoption": or_null(mapped(ANYTHING, "What was taken over from another machine.")),
            "stairs": listed(
                record(
                    "Equal units, and their milliseconds at each width.",
                    {
                        "units": listed(text()),
                        "kind": text(),
                        "widths": listed(whole()),
                        "ms": mapped(listed(number()), "Precision to one number a width."),
                    },
                )
            ),
        },
    ),
    "compare": record(
        "`compare --json`, and its `compare.json`: strategies on one problem.",
        {
            "schema_version": VERSION,
            "ours": text(),
            "budgets_ms": listed(number()),
            "uncut_ms": number(),
            "seeds": listed(whole()),
            "strategies": mapped(STRATEGY),
            "searches": listed(mapped(ANYTHING)),
            "model": text(),
            "command": text(),
            "machine": MACHINE,
        },
        {"after_training": AFTER_TRAINING},
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
