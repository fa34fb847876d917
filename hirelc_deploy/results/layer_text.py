"""In: what `why` found, as JSON values that may be anything. Out: the same for people: text, and rows of the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hirelc_deploy.results.values import MetricWords, Record, list_of, number, record, records, text_of

WHY = "why.json"
"""In a run's folder."""

COLUMNS = ("points", "divergence", "ms")
DIGITS = {"points": 2, "divergence": 4, "ms": 3}


def won_text(effect: Record, name: str) -> str:
    """Return what was won of points, divergence or ms, with its interval; a dash where that is not known."""
    told = record(effect.get(name))
    won, low, high = (number(told.get(key)) for key in ("won", "low", "high"))
    if won is None:
        return "–"
    shown = ["–" if one is None else _signed(one, DIGITS[name]) for one in (won, low, high)]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


def _signed(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "−")  # no minus before nothing


def spread_text(end: Record) -> str:
    """Return the ranges and outliers of one tensor in words; empty where nothing is known."""
    low, high = number(end.get("low")), number(end.get("high"))
    if low is None or high is None:
        return ""
    words = [f"{low:.3g} to {high:.3g}"]
    least, largest = number(end.get("least")), number(end.get("largest"))
    if least is not None and largest is not None:
        words[0] += f" of {least:.3g} to {largest:.3g} seen"
    tail, clipped, widest = (number(end.get(key)) for key in ("tail_share", "clipped", "widest_channel"))
    if tail is not None:
        words.append(f"the outermost 0.1 % take {100 * tail:.0f} % of it")
    if widest is not None:
        words.append(f"widest channel {widest:.1f} times the middle one")
    if clipped is not None:
        words.append(f"{100 * clipped:.3f} % clipped")
    return ", ".join(words)


def sentences(found: Record) -> list[str]:
    """Return what is said of the whole file."""
    shipped = text_of(found.get("explains")) == "shipped"
    file = "the shipped file" if shipped else "the uncut model's fastest integer file"
    images = number(found.get("images"))
    said = [f"{file}, pattern {text_of(found.get('pattern'))}, on {images or 0:.0f} selection images"]
    for name, words in (("rounding", "rounding it, beside the same model in float"), ("cutting", "cutting it before")):
        if effect := record(found.get(name)):
            said.append(f"{words}: {effect_text(effect, MetricWords.of(found))}")
    return [*said, *(text_of(note) for note in list_of(found.get("notes")) if text_of(note))]


def effect_text(effect: Record, words: MetricWords) -> str:
    """Return an effect in one line."""
    unit = f"{words.unit or words.name} " if words.unit else f"of {words.name} "
    parts = [
        f"{won_text(effect, 'points')} {unit}".strip(),
        f"{won_text(effect, 'divergence')} divergence",
        f"{won_text(effect, 'ms')} ms",
    ]
    return ", ".join(part for part in parts if not part.startswith("–"))


def layer_rows(found: Record) -> list[dict[str, Any]]:
    """Return one row a layer, as `why` ordered them."""
    rows = []
    for layer in records(found.get("layers")):
        rounding, cut, spread = (record(layer.get(key)) for key in ("rounding", "cut", "spread"))
        rows.append(
            {
                "name": text_of(layer.get("name")),
                "precision": text_of(layer.get("precision")),
                "won": [won_text(rounding, name) for name in COLUMNS],
                "cut": _cut_text(cut),
                "reads": spread_text(record(spread.get("reads"))),
                "writes": spread_text(record(spread.get("writes"))),
                "widest_weight": number(spread.get("widest_weight")),
                "fixes": [
                    {
                        "how": text_of(fix.get("how")),
                        "effect": effect_text(fix, MetricWords.of(found)),
                        "suggested": text_of(fix.get("how")) == text_of(layer.get("suggested")),
                    }
                    for fix in records(layer.get("fixes"))
                ],
            }
        )
    return rows


def end_rows(found: Record) -> list[dict[str, str]]:
    """Return one row for each end: its name, its precision, and what integers in it bring."""
    words, rows = MetricWords.of(found), list[dict[str, str]]()
    for end in records(found.get("ends")):
        name, precision, reason = (text_of(end.get(key)) for key in ("name", "precision", "why"))
        rounding = record(end.get("rounding"))
        effect = effect_text(rounding, words) if rounding else "the pattern rounds nothing of it"
        if name:
            rows.append({"name": name, "precision": precision, "effect": effect, "why": reason})
    return rows


def _cut_text(cut: Record) -> str:
    kept, full = number(cut.get("kept")), number(cut.get("full"))
    if kept is None or full is None:
        return ""
    return f"{full:.0f} → {kept:.0f}: {', '.join(f'{won_text(cut, name)} {name}' for name in COLUMNS)}"


def why_text(found: Mapping[str, Any]) -> str:
    """Return what `why` prints for people."""
    rows, words = layer_rows(found), MetricWords.of(found)
    name = max([len("layer"), *(len(row["name"]) for row in rows)])
    titles = (words.unit or words.name, "divergence", "ms")
    lines = [*sentences(found), "won by rounding each layer alone; below 0 is lost:"]
    lines.append(f"  {'layer':<{name}}  {'precision':<9}  " + "  ".join(f"{title:<28}" for title in titles).rstrip())
    for row in rows:
        cells = "  ".join(f"{cell:<28}" for cell in row["won"]).rstrip()
        lines.append(f"  {row['name']:<{name}}  {row['precision']:<9}  {cells}")
    if cuts := [row for row in rows if row["cut"]]:
        lines.append("won by each cut alone, before any recovery:")
        lines += [f"  {row['name']:<{name}}  {row['cut']}" for row in cuts]
    if ends := end_rows(found):
        lines.append("won by integers in what decodes the outputs, in the whole file:")
        lines += [f"  {end['name']} ({end['precision']}): {end['effect']}; {end['why']}" for end in ends]
    for row in rows:
        if not row["fixes"]:
            continue
        lines.append(f"{row['name']}, widest weight {row['widest_weight'] or 1:.1f} times the middle one of its output")
        lines += [f"  {end} {row[end]}" for end in ("reads", "writes") if row[end]]
        for fix in row["fixes"]:
            lines.append(f"  {fix['how']}: {fix['effect']}{'  <- suggested' if fix['suggested'] else ''}")
    if together := record(found.get("together")):
        lines.append(f"all suggested together: {effect_text(together, words)}")
        lines.append(f"  add to the same command, with another --out: {text_of(together.get('how'))}")
    elif any(row["fixes"] for row in rows):
        lines.append("nothing that was tried surely helps.")
    training = record(found.get("training"))
    before, after = number(training.get("points_before")), number(training.get("points"))
    seen = "" if before is None or after is None else f"; the accuracy guard saw {before:.2f} lost become {after:.2f}"
    lines.append(f"not tried here, because it trains: {text_of(training.get('how'))}{seen}")
    return "\n".join(lines)
