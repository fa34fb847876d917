"""In: nothing. Out: schemas of what stands in several files: metrics, times, machines, plans, outcomes."""

from __future__ import annotations

from hirelc_deploy.schemas.words import Schema, listed, mapped, number, one_of, or_null, record, text, truth, whole

ANYTHING: Schema = {}
VERSION = {"const": 1, "description": "Of this form."}
TIME = text("UTC, ISO 8601.")
SHA256 = {"type": "string", "pattern": "^[0-9a-f]{64}$"}

METRIC = record(
    "What the numbers under `accuracy` are.",
    {
        "name": text("`accuracy`, `mIoU`, `AP`, `RMSE`, or that of your own function."),
        "scale": number("A value times this is what limits count: 100 for shares, 1 for others."),
        "unit": text("Of the scaled value."),
        "higher_is_better": truth(),
    },
    {"task": text("Name of the task.")},
)
ACCURACY = record(
    "The metric of the exported file on the test split; null where the data has no labels.",
    {
        "test": or_null(number("Of the shipped file.")),
        "baseline_test": or_null(number("Of the uncut float file.")),
        "drop_points": or_null(number("How much worse, in `metric.unit`; below 0 it is better.")),
        "drop_low": or_null(number("95 % interval.")),
        "drop_high": or_null(number()),
    },
)
TEST = record("The test images behind `accuracy`.", {"images": whole(), "labels_sha256": SHA256})
CHANGE = record(
    "One figure of a new bundle beside the baseline's.",
    {
        "name": one_of("accuracy", "latency"),
        "worse": or_null(truth("Null where the two cannot be compared.")),
        "text": text("What was compared, and what came of it."),
        "change": or_null(number("Points lost, or per cent slower; below 0 it is better.")),
        "allowed": number("The limit of `change`."),
    },
)
VERDICT = one_of("reference", "faster", "slower", "same", "not told apart", description="About `ratio`.")
RATIO = {"ratio": number("Time over that of the reference."), "ratio_low": number("95 %."), "ratio_high": number()}
LATENCY = record(
    "The shipped file beside the uncut float file.",
    {"median_ms": number(), "reference": text(), **RATIO, "verdict": VERDICT},
    {
        "p99_ms": number("What 99 of 100 inferences stay within."),
        "batch": whole("Images of one inference."),
        "threads": whole("Of one inference."),
        "images_per_second": number("Throughput by the median, one inference after the other."),
    },
)
MACHINE = record(
    "What a reader needs to judge a timing; null where the system does not say.",
    {
        "cpu_model": or_null(text()),
        "cores": or_null(whole()),
        "cores_allowed": or_null(whole()),
        "features": or_null(listed(text(), "Instructions that matter here.")),
        "memory_bytes": or_null(whole()),
        "os": text(),
        "architecture": text(),
        "python": text(),
        "load_average": or_null(listed(number())),
        "governor": or_null(text()),
        "max_frequency_khz": or_null(whole()),
        "power_mode": or_null(text()),
        "backend": text(),
        "versions": mapped(text(), "Of the runtime and what it depends on."),
    },
)
PLAN = record(
    "How wide each unit stays and in which precision each layer runs. Any key may be left out.",
    {},
    {
        "schema_version": VERSION,
        "keep": mapped(whole(), "Unit to the elements it keeps; 0 leaves its branch out. Others stay whole."),
        "precision": mapped(one_of("int8", "int4", "float"), "Layer to its precision, where not the default."),
        "default_precision": one_of("int8", "float", "auto"),
        "pattern": text("Which operators around integer layers are integer too."),
        "trained_rounding": truth("The recovery rounds as the integer file does."),
    },
)
PLAN_AS_WRITTEN = {**PLAN, "required": ["schema_version", "keep", "precision", "default_precision"]}
FIDELITY = one_of("F1", "F2", "F3", description="Judged in torch; as a timed file; as a timed file after recovery.")
SECONDS = mapped(number(), "Stage to the seconds it took.")
OUTCOME = {
    "oneOf": [
        record(
            "What one evaluation found; null where its fidelity does not measure it.",
            {
                "kind": {"const": "measured"},
                "plan_digest": text(),
                "fidelity": FIDELITY,
                "loss": number("Divergence from the uncut model's answers, on the selection split."),
                "accuracy": or_null(number("The metric on the selection split.")),
                "params": whole(),
                "macs": whole("Multiply-accumulates."),
                "predicted_ms": or_null(number()),
                "median_ms": or_null(number()),
                **{name: or_null(schema) for name, schema in RATIO.items()},
                "size_bytes": or_null(whole()),
                "seconds": SECONDS,
            },
        ),
        record(
            "A plan that could not be built or run.",
            {
                "kind": {"const": "failed"},
                "plan_digest": text(),
                "fidelity": FIDELITY,
                "stage": text(),
                "reason": text(),
                "seconds": SECONDS,
            },
        ),
    ]
}
