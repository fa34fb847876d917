"""In: nothing. Out: the schemas of how far a run is: its `progress.json`, and what `status` prints."""

from __future__ import annotations

from hirelc_deploy.schemas.shared import TIME, VERSION
from hirelc_deploy.schemas.words import listed, mapped, number, one_of, or_null, record, text, truth, whole

STEP = {
    "step": text("What is being done."),
    "done": whole("Of what it counts."),
    "total": whole("0 where nothing is counted."),
    "note": text("For example the current loss."),
}
PROGRESS = record(
    "`progress.json` of a run: how far the last command on it is, written every few seconds.",
    {
        "schema_version": VERSION,
        "command": text(),
        "host": text("Of the machine that it runs on."),
        "pid": whole("Of its process there."),
        "began": TIME,
        "updated": TIME,
        "state": one_of("running", "finished", "stopped"),
        "why": text("What stopped it, as a sentence."),
        **STEP,
        "seconds": number("Since it began."),
        "seconds_before": number("Of the commands before it on this run."),
        "seconds_left": or_null(number("Of the whole command; null where it is not known.")),
        "measured": mapped(
            record("Steps of one kind.", {"count": whole(), "seconds": number("Of all of them.")}),
            "What steps have taken, kind by kind.",
        ),
    },
)
STATUS = record(
    "`status --json`: how a run stands; null where the command on it did not say.",
    {
        "run": text(),
        "command": or_null(text()),
        "state": one_of("running", "finished", "stopped", "unknown"),
        "alive": or_null(truth("Whether a process holds the run; null where it was begun on another machine.")),
        "why": text("What stopped it, or why it is not known."),
        "host": or_null(text()),
        "pid": or_null(whole()),
        "began": or_null(TIME),
        "updated": or_null(TIME),
        **{name: or_null(schema) for name, schema in STEP.items()},
        "seconds": or_null(number("Of all commands on this run.")),
        "seconds_left": or_null(number("Of the whole command; null where nothing is running or it is not known.")),
        "trials": mapped(whole(), "Finished evaluations: F1, F2, F3, and how many of all failed."),
        "best": or_null(
            record(
                "The fastest recovered file that keeps the limits, else the one that lost least.",
                {
                    "plan": text("Its digest."),
                    "ratio": or_null(number("Time over that of the uncut float file.")),
                    "loss": number(),
                    "accuracy": or_null(number()),
                    "size_bytes": or_null(whole()),
                    "drop_points": or_null(number("On the selection split.")),
                    "drop_error": or_null(number("Standard error.")),
                    "keeps_limits": or_null(truth()),
                },
            )
        ),
        "bundle": or_null(text("Of a finished run.")),
        "log": listed(text(), "The last lines of `run.log`."),
    },
)
