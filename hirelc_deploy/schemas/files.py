"""In: nothing. Out: the schemas of `result.json` and of a bundle's manifest."""

from __future__ import annotations

from hirelc_deploy.schemas.shared import (
    ACCURACY,
    ANYTHING,
    LATENCY,
    MACHINE,
    METRIC,
    PLAN_AS_WRITTEN,
    RATIO,
    SECONDS,
    SHA256,
    TEST,
    TIME,
    VERSION,
)
from hirelc_deploy.schemas.words import listed, mapped, number, or_null, record, text, truth, whole

PRINTED = {
    "bundle": text("The folder to deploy."),
    "params": whole(),
    "macs": whole("Multiply-accumulates of one image."),
    "size_bytes": whole("Of the shipped file."),
    "size_ratio": number("Bytes of the uncut float file over those of the shipped one."),
    "metric": METRIC,
    "accuracy": ACCURACY,
    "latency": LATENCY,
    "best_unpruned": record("The fastest file without cutting.", {"name": text(), "ratio": number()}),
}
RESULT = record(
    "`result.json` of a run: everything that was found.",
    {
        **PRINTED,
        "layers": listed(
            record(
                "A layer, in execution order.",
                {
                    "name": text(),
                    "block": text(),
                    "kind": text(),
                    **{name: whole() for name in ("in_full", "out_full", "in_kept", "out_kept", "params", "macs")},
                    "precision": text(),
                },
            )
        ),
        "candidates": listed(
            record(
                "A file of the last race.",
                {
                    "name": text(),
                    **RATIO,
                    "median_ms": number(),
                    "size_bytes": whole(),
                    "accuracy_selection": or_null(number()),
                },
            )
        ),
        "stages": SECONDS,
        "exports": record("How files were made.", {"filled in": whole(), "exported": mapped(whole())}),
        "kept_whole": listed(record("A layer that stays whole.", {"layer": text(), "reason": text()})),
        "operators": listed(
            record(
                "An operator as it ran.",
                {"name": text(), "operator": text(), "is_integer": truth(), "microseconds": number()},
            )
        ),
        "placement": mapped(record("A placement that was timed.", RATIO)),
        "guard": or_null(mapped(ANYTHING, "What the accuracy guard gave back, and what else kept the drop.")),
        "by_class": mapped(number(), "The metric of each class."),
        "samples": listed(record("A picture and what the file says.", {"picture": text(), "says": text()})),
        "warnings": listed(text()),
    },
    {
        "peak_memory_bytes": or_null(whole("Of a process that runs the shipped file; null where none is told.")),
        "energy_mj": or_null(number("Of one inference of the shipped file; null where nothing limits it.")),
        "search": record(
            "How the search was done; not after `apply`.",
            {
                "strategy": text(),
                "f1": whole(),
                "f2": whole(),
                "f3": whole(),
                "overhead_seconds": number(),
                "seconds": number(),
            },
        ),
        "ends": listed(
            record(
                "What decodes outputs, and why rounding harms it.",
                {"name": text(), "precision": text(), "why": text(), "operators": whole()},
                {
                    "divergence": number("Of the file where it is integer, in nats."),
                    "float_divergence": number("Of the file where it is float."),
                    **RATIO,
                },
            )
        ),
        "library": record(
            "What was taken over from another run.",
            {"run": text("Its folder."), **{name: whole() for name in ("F1", "F2", "F3")}},
        ),
        "latency_model": mapped(ANYTHING, "How well the layer table predicts files."),
        "runtimes": listed(
            record(
                "A runtime of the device; the search worked in the first.",
                {
                    "runtime": text(),
                    "uncut": number("Time of the uncut integer file over that of the float file of the target's own."),
                    "cut": number("Of a uniformly cut one."),
                },
            ),
            "Where the device has several.",
        ),
        "agents": listed(mapped(ANYTHING), "What each search learned."),
        "agreement": mapped(ANYTHING, "How far tables, F1, F2 and F3 agree."),
        "finalists": listed(
            record(
                "A plan that was recovered.",
                {
                    "plan": text("Its digest."),
                    "ratio": or_null(number()),
                    "drop_points": number(),
                    "drop_error": number(),
                    "keeps_limits": truth(),
                },
                {
                    "peak_memory_bytes": or_null(whole("Of its process; null where nothing limits it.")),
                    "energy_mj": or_null(number("Of one inference; null where nothing limits it.")),
                },
            )
        ),
    },
)
FAMILY = record(
    "`family.json`, and `search --json` with several values of a limit: what was found for each.",
    {
        "schema_version": VERSION,
        "model": text(),
        "target": text(),
        "command": text(),
        "machine": MACHINE,
        "seconds": number("Of all searches together."),
        "members": listed(
            record(
                "One of the limits.",
                {
                    "name": text("What tells it from the others, and its folder."),
                    "run": text("The folder of its run."),
                    "limits": mapped(number(), "Name of a limit to its value."),
                    "missed": or_null(text("Why nothing keeps the limits; null where something does.")),
                    "seconds": number("Of its search, by all commands."),
                    "result": or_null(record("The result in short; null where the limits are missed.", PRINTED)),
                },
            ),
            "In the order in which they were given.",
        ),
    },
)
MANIFEST = record(
    "`manifest.json` of a bundle: sources, plan, measurements, and the hash of each file.",
    {
        "schema_version": {"enum": [1, 2]},
        "created": TIME,
        "tool": record("What wrote it.", {"name": text(), "version": text()}),
        "command": text(),
        "source": mapped(ANYTHING, "Where the uncut model came from, with hashes."),
        "plan": PLAN_AS_WRITTEN,
        "measurements": record(
            "As printed at the end of the run.",
            {
                **{name: schema for name, schema in PRINTED.items() if name not in ("bundle", "metric")},
                "operators": record("Of the file, as they ran.", {"integer_ops": whole(), "float_ops": whole()}),
                "test": or_null(TEST),
            },
            {"metric": METRIC},
        ),
        "machine": MACHINE,
        "versions": mapped(text()),
        "files": mapped(record("A file of the bundle.", {"sha256": SHA256, "bytes": whole()})),
    },
    {
        "runtime": record("What runs the file, and how it was opened.", {"name": text(), "options": mapped(ANYTHING)}),
        "batch": whole("Images that the file takes at a time; 1 where it is missing."),
    },
)
