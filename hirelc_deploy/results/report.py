"""In: a run directory. Out: one self-contained HTML page on what was shipped, what it costs and what it took."""

from __future__ import annotations

import functools
import json
import re
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from hirelc_deploy.errors import InputError
from hirelc_deploy.measure.accuracy import WITHOUT_ARITHMETIC
from hirelc_deploy.results.scatter import Point, draw, frame
from hirelc_deploy.runs import CONFIG, MACHINE, TRIALS, write_atomic
from hirelc_deploy.version import __version__

RESULT, BUNDLE_MANIFEST = "result.json", "bundle/manifest.json"
RUN_FILES = (CONFIG, MACHINE, TRIALS, RESULT)
"""Any one of these makes a directory a run; what else is absent is said on the page."""

WIDE, NARROW = (860, 420), (360, 340)
"""(width, height) in pixels of the scatter on a desktop and on a phone: drawn twice, so that text keeps its size."""

LARGEST = 1e30
"""No figure of a run is larger: what is, is damage, and would overflow the arithmetic below."""

FLOATS = ("fp32", "fp16")
"""What the uncut float file is called: the second on a GPU, where that is the fastest without 8-bit numbers."""

WHOLE_COMMAND = "whole command"
"""The stage that contains the others: it is the total, not a bar beside them."""

Record = Mapping[str, Any]


@dataclass(frozen=True)
class ReportInput:
    """What the page is made from: JSON values as they lie in the run directory, unchecked.

    Attributes:
        name: Shown where the run does not name its model.
        manifest: Of the bundle; where the result does not tell date, command and plan, they come from here.
        trials: One record per evaluation; the outcome's keys lie in it or under `outcome`.
        absent: One sentence for each part of the run that was missing or could not be read.
    """

    name: str
    result: Record = field(default_factory=dict)
    trials: Sequence[Record] = ()
    machine: Record = field(default_factory=dict)
    config: Record = field(default_factory=dict)
    manifest: Record = field(default_factory=dict)
    absent: Sequence[str] = ()


def read_run(directory: Path) -> ReportInput:
    """Read what a run directory holds; missing and broken files end up in `absent`.

    Raises:
        InputError: `directory` is not a run at all.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: no such run directory; give the folder named with --out of a search.")
    if not any((directory / name).is_file() for name in RUN_FILES):
        raise InputError(f"{directory}: not a run directory (it has none of {', '.join(RUN_FILES)}).")
    absent: list[str] = []

    def read(name: str, parse: Callable[[str], Any], default: Any) -> Any:
        try:
            value = parse((directory / name).read_text("utf-8"))
        except FileNotFoundError:
            absent.append(f"{name} is not there.")
        except (OSError, ValueError) as error:  # JSON, TOML and Unicode errors are all ValueErrors
            absent.append(f"{name} cannot be read ({error}).")
        else:
            if isinstance(value, type(default)):
                return value
            absent.append(f"{name} holds a {type(value).__name__} where a {type(default).__name__} belongs.")
        return default

    def lines(text: str) -> list[Record]:
        records: list[Record] = []
        broken = 0
        for line in filter(str.strip, text.splitlines()):
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            if isinstance(value, dict):
                records.append(value)
            else:
                broken += 1
        if broken:
            absent.append(f"{TRIALS}: {broken} of {broken + len(records)} lines cannot be read.")
        return records

    return ReportInput(
        name=directory.resolve().name,
        result=read(RESULT, json.loads, {}),
        trials=read(TRIALS, lines, []),
        machine=read(MACHINE, json.loads, {}),
        config=read(CONFIG, tomllib.loads, {}),
        manifest=read(BUNDLE_MANIFEST, json.loads, {}),
        absent=absent,
    )


def write_report(run: ReportInput, path: Path) -> Path:
    """Write the page to `path` and return it; raises InputError where it cannot be written."""
    try:
        write_atomic(path, render(run))
    except OSError as error:
        raise InputError(f"{path}: the report cannot be written ({error.strerror}).") from None
    return path


def render(run: ReportInput) -> str:
    """Return the page as HTML; every text of the run is escaped."""
    result = run.result
    outcomes = [_outcome(trial) for trial in run.trials]
    plan = _record(result.get("plan")) or _record(run.manifest.get("plan"))
    sections: dict[str, Any] = {
        "headline": _headline(result),
        "scatter": _scatter(result, outcomes),
        "bars": _bars(result),
        "layers": _layers(result),
        "operators": _operators(result),
        "kept_whole": _kept_whole(result),
        "cost": _cost(result, outcomes),
    }
    titles = {
        "headline": "what was shipped",
        "scatter": "measured files",
        "bars": "latency with intervals",
        "layers": "widths and precision per layer",
        "operators": "the runtime's own profile",
        "kept_whole": "layers that were kept whole",
        "cost": "wall time by stage",
    }
    return _template().render(
        **sections,
        layers_timed=any(layer["share"] is not None for group in sections["layers"] for layer in group["layers"]),
        title=_title(run),
        float_name=_float_name(result),
        facts=_facts(run),
        machine=_flat(run.machine),
        config=json.dumps(run.config, indent=2, default=str, ensure_ascii=False) if run.config else "",
        plan=json.dumps(plan, indent=2, ensure_ascii=False) if plan else "",
        guard=_guard(result),
        command=_text(result.get("command")) or _text(run.manifest.get("command")),
        warnings=[_text(item) for item in _list(result.get("warnings")) if _text(item)],
        absent=[
            *run.absent,
            *(f"Nothing in this run tells {titles[name]}." for name, part in sections.items() if not part),
        ],
        tool_version=__version__,
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hirelc_deploy.results", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"count": _count, "bytes": _bytes, "ms": _ms, "seconds": _seconds, "percent": _percent}
    return environment.get_template("report.html.j2")


# What the page says, section by section. Each returns an empty value where the run does not tell.


def _title(run: ReportInput) -> str:
    model, data = _setting(run, "model"), _setting(run, "data")
    return f"{model} on {data}" if model and data else model or run.name


def _facts(run: ReportInput) -> list[str]:
    """Return the short facts under the title."""
    date = _text(run.result.get("date")) or _text(run.manifest.get("created"))
    cpu = _text(run.machine.get("cpu_model"))
    return [fact for fact in (_setting(run, "target"), cpu, date.replace("T", " ").replace("+00:00", " UTC")) if fact]


def _setting(run: ReportInput, name: str) -> str:
    """Return what the result, or else the options, say for `name`; options may be a table with the name as `spec`."""
    option = run.config.get(name)
    return _text(run.result.get(name)) or _text(option) or _text(_record(option).get("spec"))


def _headline(result: Record) -> list[dict[str, str]]:
    """Return the tiles: a value, its label, and a note on how sure it is."""
    tiles = []
    latency, unpruned = _record(result.get("latency")), _record(result.get("best_unpruned"))
    ratio, rival = _positive(latency.get("ratio")), _positive(unpruned.get("ratio"))
    if ratio:
        low, high = _positive(latency.get("ratio_low")), _positive(latency.get("ratio_high"))
        sure = f"95 % interval {1 / high:.2f} to {1 / low:.2f}" if low and high else "no interval"
        median, verdict = _positive(latency.get("median_ms")), _text(latency.get("verdict"))
        notes = ["" if verdict == "faster" else verdict, _ms(median) if median else "", sure]
        tiles.append(
            {
                **_faster(ratio, f"the {_float_name(result)} file"),
                "note": "; ".join(filter(None, notes)),
            }
        )
    if ratio and rival:
        times_float = f"{_times(1 / rival)} as fast as {_float_name(result)}"
        tiles.append(
            {
                **_faster(ratio / rival, "the best unpruned file"),
                "note": f"{_text(unpruned.get('name')) or 'unnamed'}, {times_float}"
                if ratio != rival
                else "it is that file: nothing better was found",
            }
        )
    size_ratio, size = _positive(result.get("size_ratio")), _positive(result.get("size_bytes"))
    if size_ratio and size:
        tiles.append(
            {
                "value": _times(max(size_ratio, 1 / size_ratio)),
                "label": f"{'smaller' if size_ratio >= 1 else 'larger'} than the {_float_name(result)} file",
                "note": f"{_bytes(size)}, was {_bytes(size * size_ratio)}",
            }
        )
    accuracy = _record(result.get("accuracy"))
    drop = _number(accuracy.get("drop_points"))
    if drop is not None:
        low, high = _number(accuracy.get("drop_low")), _number(accuracy.get("drop_high"))
        test, baseline = _number(accuracy.get("test")), _number(accuracy.get("baseline_test"))
        became = f"test part {_percent(baseline, 2)} before, {_percent(test, 2)} now" if baseline and test else ""
        sure = "no interval"
        if low is not None and high is not None:
            sure = f"paired 95 % interval of the loss {_signed(low)} to {_signed(high)}"
        tiles.append(
            {
                "value": f"{abs(drop):.2f}",
                "label": f"points of accuracy {'lost' if drop >= 0 else 'won'}",
                "note": "; ".join(filter(None, [became, sure])),
            }
        )
    return tiles


def _float_name(result: Record) -> str:
    names = [_text(candidate.get("name")).lower() for candidate in _records(result.get("candidates"))]
    return next((name.upper() for name in names if name in FLOATS), FLOATS[0].upper())


def _faster(ratio: float, than: str) -> dict[str, str]:
    if abs(ratio - 1) < 0.005:  # 1.00 times in the figure's two digits
        return {"value": _times(1.0), "label": f"as fast as {than}"}
    return {"value": _times(max(ratio, 1 / ratio)), "label": f"{'faster' if ratio < 1 else 'slower'} than {than}"}


def _bars(result: Record) -> list[dict[str, Any]]:
    """Return one bar per candidate file: its time as a share of the slowest, with its interval."""
    timed = [(c, ratio) for c in _records(result.get("candidates")) if (ratio := _positive(c.get("ratio"))) is not None]
    longest = max((_positive(c.get("ratio_high")) or ratio for c, ratio in timed), default=0.0) or 1.0
    bars: list[dict[str, Any]] = []
    for candidate, ratio in timed:
        low, high = _positive(candidate.get("ratio_low")), _positive(candidate.get("ratio_high"))
        interval = (low, high) if low is not None and high is not None and high > low else None
        bars.append(
            {
                "name": _text(candidate.get("name")) or "unnamed",
                "ratio": ratio,
                "interval": interval,
                "width": f"{100 * ratio / longest:.2f}",
                "interval_width": [f"{100 * end / longest:.2f}" for end in interval or ()],
                "median_ms": _positive(candidate.get("median_ms")),
                "size_bytes": _positive(candidate.get("size_bytes")),
                "accuracy": _number(candidate.get("accuracy_selection")),
                "role": _role(candidate, result),
            }
        )
    return bars


def _role(candidate: Record, result: Record) -> str:
    """Return `shipped`, `unpruned` (the float reference too) or `candidate`.

    A run may say so itself; else the shipped file is the one with the result's latency and size, and names tell.
    """
    role, name = _text(candidate.get("role")), _text(candidate.get("name")).lower()
    if role in ("shipped", "unpruned", "candidate"):
        return role
    shipped = _number(_record(result.get("latency")).get("ratio")), _number(result.get("size_bytes"))
    if shipped == (_number(candidate.get("ratio")), _positive(candidate.get("size_bytes"))):
        return "shipped"
    return "unpruned" if name.startswith((*FLOATS, "int8")) else "candidate"


def _layers(result: Record) -> list[dict[str, Any]]:
    """Return the layers grouped by block, in execution order."""
    layers = [layer for layer in _records(result.get("layers")) if _text(layer.get("name"))]
    share = _time_shares([str(layer["name"]) for layer in layers], _records(result.get("operators")))
    blocks: dict[str, list[dict[str, Any]]] = {}
    for layer in layers:
        numbers = {
            key: _number(layer.get(key)) for key in ("in_full", "out_full", "in_kept", "out_kept", "params", "macs")
        }
        full, kept, block = numbers["out_full"], numbers["out_kept"], _text(layer.get("block"))
        blocks.setdefault(block, []).append(
            {
                "name": str(layer["name"]),
                "short_name": str(layer["name"]).removeprefix(f"{block}."),
                "kind": _text(layer.get("kind")),
                "precision": _text(layer.get("precision")),
                **numbers,
                "kept_width": f"{100 * kept / full:.1f}" if kept and full else "",
                "share": share.get(str(layer["name"])),
            }
        )
    return [{"block": block, "layers": members} for block, members in blocks.items()]


def _time_shares(layers: Sequence[str], operators: Sequence[Record]) -> dict[str, float]:
    """Return layer name to its share of the profiled time.

    An exported operator carries its layer's name as a run of its own path (`/stages/0/conv1/Conv_quant` holds
    `stages.0.conv1`); the longest name that fits wins, so that `stages.0` does not take what is `stages.0.conv1`'s.
    """
    paths = sorted(((re.split(r"\W+", name.strip("./")), name) for name in layers), key=lambda item: -len(item[0]))
    spent: dict[str, float] = defaultdict(float)
    for operator in operators:
        words = re.split(r"\W+", _text(operator.get("name")))
        for path, name in paths:
            if any(words[at : at + len(path)] == path for at in range(len(words) - len(path) + 1)):
                spent[name] += _positive(operator.get("microseconds")) or 0.0
                break
    total = sum(_positive(operator.get("microseconds")) or 0.0 for operator in operators)
    return {name: value / total for name, value in spent.items()} if total else {}


def _operators(result: Record) -> dict[str, Any]:
    """Return each kind of operator with its count and share of the profiled time, and the share by arithmetic."""
    count: Counter[tuple[str, str]] = Counter()
    time: dict[tuple[str, str], float] = defaultdict(float)
    for operator in _records(result.get("operators")):
        kind = _text(operator.get("operator")) or "unnamed"
        arithmetic = "integer" if operator.get("is_integer") is True else "float"
        key = kind, "none" if kind in WITHOUT_ARITHMETIC else arithmetic
        count[key] += 1
        time[key] += _positive(operator.get("microseconds")) or 0.0
    total = sum(time.values())
    if not total:
        return {}
    by_arithmetic = {name: sum(s for (_, a), s in time.items() if a == name) for name in ("integer", "float", "none")}
    return {
        "kinds": [
            {"operator": kind, "arithmetic": arithmetic, "count": count[kind, arithmetic], "share": spent / total}
            for (kind, arithmetic), spent in sorted(time.items(), key=lambda item: -item[1])
        ],
        "shares": {name: spent / total for name, spent in by_arithmetic.items()},
        "total_ms": total / 1000,
    }


def _kept_whole(result: Record) -> list[dict[str, Any]]:
    """Return each reason with the layers it holds for."""
    reasons: dict[str, list[str]] = {}
    for item in _records(result.get("kept_whole")):
        if _text(item.get("layer")):
            reasons.setdefault(_text(item.get("reason")) or "no reason given", []).append(str(item["layer"]))
    return [{"reason": reason, "layers": layers} for reason, layers in reasons.items()]


def _guard(result: Record) -> dict[str, Any]:
    """Return what the accuracy guard trained or turned back to float, and at what price; empty where it did nothing.

    Of runs before joint reverts, whose guard was a list of steps, only the layers and their milliseconds are known.
    """
    found = result.get("guard")
    totals = _record(found)
    steps = [
        {"layer": str(step["layer"]), "ms": _number(step.get("ms")) or 0.0}
        for step in _records(totals.get("reverted") if totals else found)
        if _text(step.get("layer"))
    ]
    numbers = [_number(totals.get(name)) for name in ("points_before", "points", "ms_before", "ms")]
    pattern = _text(totals.get("pattern"))
    if not steps and (not pattern or None in numbers):
        return {}
    trained = totals.get("trained") is True
    return {"steps": steps, "pattern": pattern, "numbers": None if None in numbers else numbers, "trained": trained}


def _cost(result: Record, outcomes: Sequence[Record]) -> dict[str, Any]:
    """Return wall time by stage, evaluations by fidelity, and the share of time spent outside evaluation."""
    stages = {
        name: seconds
        for name, value in _record(result.get("stages")).items()
        if (seconds := _number(value)) is not None
    }
    total = stages.pop(WHOLE_COMMAND, None)
    if not stages:
        return {}
    longest = max(stages.values())
    search = _record(result.get("search"))
    counts = [
        ("trained, exported and timed (F3)", _number(search.get("f3"))),
        ("exported and timed (F2)", _number(search.get("f2"))),
        ("sliced and judged (F1)", _number(search.get("f1"))),
        ("repeats answered from the journal", _number(search.get("repeats"))),
    ]
    overhead, searching = _number(search.get("overhead_seconds")), _positive(search.get("seconds"))
    failed = Counter(
        (_text(outcome.get("stage")) or "unnamed stage", _text(outcome.get("reason")) or "no reason given")
        for outcome in outcomes
        if outcome.get("kind") == "failed"
    )
    return {
        "stages": [
            {"name": name, "seconds": seconds, "width": f"{100 * seconds / longest if longest else 0:.2f}"}
            for name, seconds in sorted(stages.items(), key=lambda item: -item[1])
        ],
        "total": total or sum(stages.values()),
        "strategy": _text(search.get("strategy")),
        "counts": [(name, count) for name, count in counts if count is not None],
        "overhead": overhead / searching if overhead is not None and searching else None,
        "failed": [(stage, reason, count) for (stage, reason), count in failed.most_common()],
    }


def _scatter(result: Record, outcomes: Sequence[Record]) -> dict[str, Any]:
    """Return the two drawings of accuracy (or loss) against time, and what the caption must say about them.

    A file's time is its ratio to the float file from interleaved runs times the time of that, so that points taken at
    different moments can be compared; where a ratio is missing it is the file's own median.
    """
    candidates = _records(result.get("candidates"))
    float_ms = next((_positive(c.get("median_ms")) for c in candidates if _text(c.get("name")).lower() in FLOATS), None)
    by_accuracy = any(_number(o.get("accuracy")) is not None for o in outcomes) or any(
        _number(c.get("accuracy_selection")) is not None for c in candidates
    )

    def point(value: Record, accuracy: str, role: str, name: str = "") -> Point | None:
        ratio, y = _positive(value.get("ratio")), _number(value.get(accuracy if by_accuracy else "loss"))
        timed = ratio * float_ms if ratio and float_ms else _positive(value.get("median_ms"))
        ms = timed or _positive(value.get("predicted_ms"))
        if y is None or ms is None or ms <= 0:
            return None
        return Point(ms, 100 * y if by_accuracy else y, role if timed else "predicted", name)

    drawn = [
        *(
            point(outcome, "accuracy", "recovered" if outcome.get("fidelity") == "F3" else "trial")
            for outcome in outcomes
            if outcome.get("kind") != "failed"
        ),
        *(
            point(c, "accuracy_selection", role, "" if role == "candidate" else _text(c.get("name")))
            for c in candidates
            for role in (_role(c, result),)
        ),
    ]
    points = [p for p in drawn if p is not None]
    measured = [p for p in points if p.role != "predicted"]
    if not measured:
        return {}
    y_range = frame(measured, 4.0 if by_accuracy else 0.1)
    inside = [p for p in points if y_range[0] <= p.y <= y_range[1]]
    return {
        "drawings": [
            (name, draw(inside, y_range, size, higher_is_better=by_accuracy))
            for name, size in (("wide", WIDE), ("narrow", NARROW))
        ],
        "y_title": "Accuracy on the selection part (%)"
        if by_accuracy
        else "Loss (nats), lower is better and drawn higher",
        "outside": len(points) - len(inside),
        "roles": {p.role for p in inside},
        "measured": len(measured),
    }


# Reading values that may be anything, and writing numbers for people.


def _outcome(trial: Record) -> Record:
    inner = trial.get("outcome")
    return inner if isinstance(inner, Mapping) else trial


def _record(value: Any) -> Record:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _records(value: Any) -> list[Record]:
    return [item for item in _list(value) if isinstance(item, Mapping)]


def _number(value: Any) -> float | None:
    """Return a number that is finite, as a time, a count or an accuracy must be; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < LARGEST else None


def _positive(value: Any) -> float | None:
    number = _number(value)
    return number if number is not None and number > 1 / LARGEST else None


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return " ".join(value)
    return ""


def _flat(value: Record, prefix: str = "") -> list[tuple[str, str]]:
    """Return nested JSON as (dotted key, text) rows."""
    rows: list[tuple[str, str]] = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            rows += _flat(item, f"{prefix}{key}.")
        elif isinstance(item, list):
            rows.append((f"{prefix}{key}", ", ".join(str(part) for part in item)))
        elif item is not None and item != "":
            rows.append((f"{prefix}{key}", str(item)))
    return rows


def _count(value: float | None) -> str:
    """Return a whole number in four digits or less: 940, 2.8 k, 140 M."""
    if value is None:
        return "–"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}\u00a0{unit}"
    return f"{value:.0f}"


def _bytes(value: float | None) -> str:
    return "–" if value is None else f"{_count(value)}B" if abs(value) >= 1000 else f"{value:.0f}\u00a0B"


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}\u00a0ms"


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    if value < 100:
        return f"{value:.1f}\u00a0s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}\u00a0h {minutes}\u00a0min" if hours else f"{minutes}\u00a0min {seconds}\u00a0s"


def _times(factor: float) -> str:
    return f"{factor:.2f}\u00a0×" if factor < 10 else f"{factor:.1f}\u00a0×"


def _percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f}\u00a0%"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")
