"""In: stairs of a model on a device. Out: one self-contained HTML page with a drawing of each."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from hirelc_deploy.results.scatter import ticks
from hirelc_deploy.results.staircase import Stairs

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 340, 190, 46, 28, 10
COLOURS = {"float": "#3b6ea8", "int8": "#c2571a"}
OTHER_COLOURS = ("#3f8f5f", "#8a4fa3", "#777777")
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1120px; padding: 0 1em; color: #222 }
.stairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 1.2em }
figure { margin: 0 } figcaption { font-size: 13px; overflow-wrap: anywhere } svg { width: 100%; height: auto }
text { font: 11px system-ui, sans-serif; fill: #555 } .grid { stroke: #ddd }
@media (prefers-color-scheme: dark) {
  body { background: #16181b; color: #ddd } text { fill: #aaa } .grid { stroke: #333 }
}
"""


def staircase_page(title: str, stairs: Sequence[Stairs], facts: Mapping[str, Any]) -> str:
    """Return the page; `facts` are shown as they are, in order."""
    figures = "\n".join(figure(one) for one in sorted(stairs, key=lambda one: -max(map(max, one.ms.values()))))
    rows = "".join(
        f"<tr><th scope=row>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in facts.items()
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style><h1>{html.escape(title)}</h1>"
        "<p>Milliseconds of the layers around each unit against the unit's width, everything else uncut. A flat step "
        "buys nothing: cut to its left end.</p>"
        f"<table>{rows}</table><div class=stairs>{figures}</div></html>\n"
    )


def figure(stairs: Stairs) -> str:
    """Return one drawing: a step line per precision, time from 0 upwards, widths rightwards."""
    top_ms = max(map(max, stairs.ms.values())) or 1.0
    most = stairs.widths[-1]

    def across(width: float) -> float:
        return round(LEFT + (WIDTH - LEFT - 8) * width / most, 1)

    def down(ms: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * ms / top_ms, 1)

    marks = [
        f"<line class=grid x1={LEFT} x2={WIDTH - 8} y1={down(ms)} y2={down(ms)} /><text x={LEFT - 6} y={down(ms) + 4} "
        f"text-anchor=end>{ms:g}</text>"
        for ms in ticks(0.0, top_ms, 4)
    ]
    marks += [
        f"<text x={across(width)} y={HEIGHT - 10} text-anchor=middle>{width:g}</text>"
        for width in ticks(0.0, float(most), 5)
    ]
    others = iter(OTHER_COLOURS)
    names = []
    for precision, times in stairs.ms.items():
        colour = COLOURS.get(precision) or next(others, "#777777")
        places = [(across(width), down(ms)) for width, ms in zip(stairs.widths, times, strict=True)]
        path = f"M{places[0][0]},{places[0][1]}" + "".join(f"V{y}H{x}" for x, y in places[1:])
        dots = "".join(f"<circle cx={x} cy={y} r=2.4 fill='{colour}' />" for x, y in places)
        marks.append(f"<path d='{path}' fill=none stroke='{colour}' stroke-width=1.6 />{dots}")
        names.append(f"<span style='color:{colour}'>{html.escape(precision)} {times[-1]:.3f} ms uncut</span>")
    also = f" and {len(stairs.units) - 1} equal units" if len(stairs.units) > 1 else ""
    label = f"{stairs.units[0]}{also}, {stairs.kind}: milliseconds against width"
    return (
        f"<figure><svg viewBox='0 0 {WIDTH} {HEIGHT}' role=img aria-label='{html.escape(label, quote=True)}'>"
        f"{''.join(marks)}</svg><figcaption><b>{html.escape(stairs.units[0])}</b>{html.escape(also)}, "
        f"{html.escape(stairs.kind)}; {', '.join(names)}</figcaption></figure>"
    )
