"""In: nothing. Out: schemas of what commands print of a model, its layers, its timing and its strategies."""

from __future__ import annotations

from hirelc_deploy.schemas.shared import MACHINE, METRIC, PLAN_AS_WRITTEN, RATIO, VERDICT, VERSION
from hirelc_deploy.schemas.words import listed, mapped, number, one_of, or_null, record, text, truth, whole

FORETOLD = record(
    "What one thing can bring. Nothing of it was measured as a whole file; numbers are null where there are none.",
    {
        "what": text("`int8`, `bf16` or `f16`, `cutting half of the channels`, or another runtime."),
        "verdict": one_of("faster", "slower", "same", "not told apart", "unknown", "impossible"),
        "speedup": or_null(number("Times as fast as the uncut float file on the target's own runtime.")),
        "speedup_low": or_null(number("It is expected between this")),
        "speedup_high": or_null(number("and this.")),
        "ms": or_null(number("`float_ms` over `speedup`.")),
        "covered": or_null(number("Share of the network's work whose pieces were timed.")),
        "runtime": or_null(text("Name of the backend.")),
        "pattern": or_null(text("Which operators are integer or have 16 bits; `float` for none.")),
        "says": text("All that in a sentence, or why it cannot be known."),
        "command": text("What does it, measured; DATA and WEIGHTS stand for yours. Empty without a number."),
    },
)
FORETELLING = record(
    "What can be gained on a target, foretold from timed pieces of the network.",
    {
        "target": text(),
        "runtime": text("Name of the target's own backend."),
        "threads": whole(),
        "seconds": number("That it took, the inspection included."),
        "float_ms": number("Of the uncut float file as a whole, measured."),
        "note": text("What a reader must know about that measurement, or empty."),
        "pieces": whole("That the network consists of."),
        "kinds": whole("Of these pieces; one of each was timed."),
        "covered": number("Share of the network's work whose pieces were timed."),
        "foretold": listed(FORETOLD),
        "unknown": listed(text(), "What cannot be known beforehand."),
        "machine": MACHINE,
    },
)
INSPECTION = record(
    "`inspect --json`: what a model consists of and what can be cut.",
    {
        "model": text(),
        "notes": listed(text(), "What was changed when the model was loaded."),
        "input_size": listed(whole(), "Channels, height, width."),
        "params": whole(),
        "macs": whole(),
        "blocks": listed(text()),
        "units": listed(
            record(
                "What must be cut together.",
                {
                    "name": text(),
                    "kind": text(),
                    "size": whole(),
                    "block": text(),
                    "widths": listed(whole()),
                    "branch": or_null(text("The branch that may go as a whole.")),
                    "params": whole(),
                    "macs": whole(),
                    "bytes": whole(),
                },
            )
        ),
        "kept_whole": listed(record("A layer that stays whole.", {"layer": text(), "reason": text()})),
        "matched": mapped(listed(text()), "Pattern to the units that it matches."),
    },
    {"verdict": FORETELLING},
)
TARGET = record(
    "A device as the user names it.",
    {
        **{name: text() for name in ("name", "backend", "description", "source", "power_mode", "python", "folder")},
        **{name: listed(text()) for name in ("precisions", "hosts", "via", "also")},
        "threads": whole(),
        "remote": truth(),
    },
)
PRECISION = record(
    "A precision that the device executes.",
    {
        **{name: text() for name in ("name", "activation_type", "weight_type", "remark", "form")},
        "weight_bits": whole(),
    },
)
TIMING = record(
    "A file beside the first one.",
    {
        "file": text(),
        "median_ms": number(),
        "p90_ms": number(),
        "p99_ms": number(),
        **RATIO,
        "batch": whole("Images of one inference."),
        "images_per_second": number("Throughput by the median, one inference after the other."),
        "verdict": VERDICT,
        "rounds": whole(),
        "contended": or_null(truth("Other programs took the core; null with several threads.")),
        "note": text("What a reader must know about these numbers, or empty."),
    },
)
WON = or_null(mapped(or_null(number()), "`won`, and its 95 % interval `low` to `high`; below 0 it was lost."))
EFFECT = {
    "divergence": {**WON, "description": "From the same model in float; of a cut, from the uncut model."},
    "points": {**WON, "description": "Of the metric, in its unit; null without labels."},
    "ms": {**WON, "description": "Of one inference; null where nothing was timed."},
}
SPREAD = or_null(
    record(
        "Activations in some selection images: range of integers, values, share that 0.1 % take, share clipped.",
        {name: number() for name in ("low", "high", "least", "largest", "tail_share", "clipped")},
        {"widest_channel": or_null(number("Its largest magnitude over that of the middle channel."))},
    )
)
TRIED = {"how": text("Options of `search` and `apply`."), **EFFECT}
EXPLAINED_LAYER = record(
    "A layer; those that are integer come first, by what their rounding costs.",
    {
        **{name: text() for name in ("name", "block", "kind")},
        "precision": one_of("int8", "int4", "float", "left out"),
        "rounding": or_null(
            record("Where nothing else is rounded; `ms`: in the whole file.", {"as": text(), **EFFECT})
        ),
        "cut": or_null(
            record("Alone, before any recovery.", {"unit": text(), "kept": whole(), "full": whole(), **EFFECT})
        ),
        "spread": or_null(
            record("Its values.", {"reads": SPREAD, "writes": SPREAD, "widest_weight": number("Over the middle one.")})
        ),
        "fixes": listed(record("Tried in the whole file, beside what is suggested above.", {"what": text(), **TRIED})),
        "suggested": or_null(text("`how` of the change to make; null where none surely helps.")),
    },
)
WHY = record(
    "`why --json`, and `why.json` of a run: what each layer's rounding and cut cost, and what would help.",
    {
        "schema_version": VERSION,
        **{name: text() for name in ("run", "model", "target", "pattern", "command")},
        "explains": one_of("shipped", "placed", description="Or the uncut model's fastest integer file."),
        "plan": PLAN_AS_WRITTEN,
        "images": whole("Of the selection split."),
        "metric": METRIC,
        "rounding": record("The whole file beside the same model in float.", EFFECT),
        "cutting": or_null(record("The model in float beside the uncut one.", EFFECT)),
        "layers": listed(EXPLAINED_LAYER),
        "ends": listed(
            record(
                "What decodes outputs, and why rounding harms it.",
                {
                    **{name: text() for name in ("name", "why")},
                    "operators": whole(),
                    "precision": one_of("int8", "float"),
                    "rounding": or_null(record("Integers in it, in the whole file; null where none can be.", EFFECT)),
                },
            )
        ),
        "together": or_null(record("All suggested changes.", TRIED)),
        "training": record(
            "While rounded; and what the accuracy guard saw lost before and after it.",
            {"how": text(), "points_before": or_null(number()), "points": or_null(number())},
        ),
        "notes": listed(text()),
        "machine": MACHINE,
    },
)
STRATEGY = record(
    "A strategy over all its searches.",
    {
        **{name: whole() for name in ("searches", "within_budget", "plans")},
        "evaluations": listed(whole()),
        **{name: listed(number()) for name in ("curve", "curve_low", "curve_high")},
        **{
            name: number()
            for name in (
                *("best_loss_mean", "hypervolume", "hypervolume_low", "hypervolume_high"),
                *("thinking_seconds_per_search", "evaluating_seconds_per_search"),
            )
        },
        "at_budget": listed(mapped(number())),
    },
    {
        "against_ours": record(
            "A paired sign-flip test.",
            {**{n: whole() for n in ("pairs", "better", "worse")}, "log_ratio": number(), "p": number()},
        )
    },
)
AFTER_TRAINING = record(
    "Plans of all searches, trained at equal seconds of search and training together.",
    {
        "metric": METRIC,
        "test_images": whole(),
        "uncut": number("The metric of the uncut float file on them."),
        "budgets": listed(
            record(
                "One budget.",
                {
                    "budget_ms": number(),
                    "strategies": listed(
                        record(
                            "What a strategy ends at; one number for each seed.",
                            {
                                "strategy": text(),
                                "seeds": listed(whole()),
                                "values": listed(number(), "The metric of its file on all test images."),
                                "ratio": listed(number(), "Time over that of the uncut float file."),
                                "search_seconds": listed(number()),
                                "epochs": listed(number(), "Of its training."),
                            },
                            {
                                "lead": record(
                                    "By how much ours is ahead, in `metric.unit`, over the same images; 95 %.",
                                    {name: number() for name in ("points", "low", "high")},
                                )
                            },
                        )
                    ),
                },
            )
        ),
    },
)
