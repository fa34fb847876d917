"""In: records of a run. Out: what its report says of rounding: the guard, the ends, which layer lost what."""

from __future__ import annotations

from typing import Any

from hirelc_deploy.results.layer_text import effect_text, end_rows, layer_rows, sentences
from hirelc_deploy.results.values import MetricWords, Record, number, positive, record, records, text_of


def guard(result: Record) -> dict[str, Any]:
    """Return what the accuracy guard trained or turned back to float, and at what price; empty where it did nothing.

    Of runs before joint reverts, whose guard was a list of steps, only the layers and their milliseconds are known.
    """
    found = result.get("guard")
    totals = record(found)
    steps = [
        {"layer": str(step["layer"]), "ms": number(step.get("ms")) or 0.0}
        for step in records(totals.get("reverted") if totals else found)
        if text_of(step.get("layer"))
    ]
    numbers = [number(totals.get(name)) for name in ("points_before", "points", "ms_before", "ms")]
    pattern = text_of(totals.get("pattern"))
    if not steps and (not pattern or None in numbers):
        return {}
    trained = totals.get("trained") is True
    return {"steps": steps, "pattern": pattern, "numbers": None if None in numbers else numbers, "trained": trained}


def ends(result: Record) -> list[dict[str, str]]:
    """Return what decodes the outputs, whether it is float, and why, in one line each."""
    rows = []
    for end in records(result.get("ends")):
        name, why, precision = (text_of(end.get(key)) for key in ("name", "why", "precision"))
        if not (name and why and precision):
            continue
        nats, float_nats = number(end.get("divergence")), number(end.get("float_divergence"))
        ratio = positive(end.get("ratio"))
        if nats is None or float_nats is None:
            decided = "the fastest pattern rounds nothing of it"
        elif ratio is None:
            decided = f"as integers {nats:.2g} nats from the float answers, as floats {float_nats:.2g}"
        else:
            decided = f"integers answer no worse here and take {ratio:.3f} of the time"
        rows.append({"name": name, "precision": precision, "why": f"{why}; {decided}"})
    return rows


def why(found: Record) -> dict[str, Any]:
    """Return what `why` says of the file and of each layer; empty where it was not asked."""
    together, words = record(found.get("together")), MetricWords.of(found)
    if not records(found.get("layers")):
        return {}
    return {
        "sentences": sentences(found),
        "unit": words.unit or words.name,
        "layers": layer_rows(found),
        "ends": end_rows(found),
        "together": {"how": text_of(together.get("how")), "effect": effect_text(together, words)} if together else {},
    }
