"""In: a run directory. Out: one self-contained HTML page on what was shipped, what it costs and what it took."""

from __future__ import annotations

import base64
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
from hirelc_deploy.results import rounding
from hirelc_deploy.results.layer_text import WHY
from hirelc_deploy.results.scatter import Point, draw, frame
from hirelc_deploy.results.values import (
    MetricWords,
    Record,
    bytes_text,
    count_text,
    flat,
    list_of,
    ms_text,
    number,
    percent_text,
    positive,
    record,
    records,
    seconds_text,
    signed,
    text_of,
    times_text,
)
from hirelc_deploy.runs import CONFIG, MACHINE, RESULT, TRIALS, write_atomic
from hirelc_deploy.version import __version__

BUNDLE_MANIFEST = "bundle/manifest.json"
SAMPLES = "samples"
LARGEST_PICTURE = 2**20
"""Bytes of a sample picture: larger ones would make the page heavy."""
RUN_FILES = (CONFIG, MACHINE, TRIALS, RESULT)
"""Any one of these makes a directory a run; what else is absent is said on the page."""

WIDE, NARROW = (860, 420), (360, 340)
"""(width, height) in pixels of the scatter on a desktop and on a phone: drawn twice, so that text keeps its size."""

FLOATS = ("fp32", "fp16")
"""What the uncut float file is called: the second on a GPU, where that is the fastest without 8-bit numbers."""

WHOLE_COMMAND = "whole command"
"""The stage that contains the others: it is the total, not a bar beside them."""


@dataclass(frozen=True)
class ReportInput:
    """What the page is made from: JSON values as they lie in the run directory, unchecked.

    Attributes:
        name: Shown where the run does not name its model.
        manifest: Of the bundle; where the result does not tell date, command and plan, they come from here.
        why: What `why` found, if it was asked.
        trials: One record per evaluation; the outcome's keys lie in it or under `outcome`.
        pictures: Place of a sample picture in the run to its data URI.
        absent: One sentence for each part of the run that was missing or could not be read.
    """

    name: str
    result: Record = field(default_factory=dict)
    trials: Sequence[Record] = ()
    machine: Record = field(default_factory=dict)
    config: Record = field(default_factory=dict)
    manifest: Record = field(default_factory=dict)
    why: Record = field(default_factory=dict)
    pictures: Mapping[str, str] = field(default_factory=dict)
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
            value = parse((directory / name).read_text("utf-8-sig"))
        except FileNotFoundError:
            absent.append(f"{name} is not there.")
        except (OSError, ValueError, RecursionError) as error:  # JSON, TOML and Unicode errors are all ValueErrors
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
            except (ValueError, RecursionError):
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
        why=read(WHY, json.loads, {}) if (directory / WHY).is_file() else {},
        pictures=_pictures(directory / SAMPLES),
        absent=absent,
    )


def _pictures(folder: Path) -> dict[str, str]:
    """Return the sample pictures below a run; what is no small PNG file is left out."""
    found = {}
    for file in sorted(folder.glob("*.png")) if folder.is_dir() and not folder.is_symlink() else ():
        if file.is_file() and not file.is_symlink() and file.stat().st_size <= LARGEST_PICTURE:
            content = base64.b64encode(file.read_bytes()).decode("ascii")
            found[f"{SAMPLES}/{file.name}"] = f"data:image/png;base64,{content}"
    return found


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
    plan = record(result.get("plan")) or record(run.manifest.get("plan"))
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
        metric=MetricWords.of(result),
        by_class=_by_class(result),
        samples=_samples(run),
        facts=_facts(run),
        machine=flat(run.machine),
        config=json.dumps(run.config, indent=2, default=str, ensure_ascii=False) if run.config else "",
        plan=json.dumps(plan, indent=2, ensure_ascii=False) if plan else "",
        guard=rounding.guard(result),
        ends=rounding.ends(result),
        why=rounding.why(run.why),
        command=text_of(result.get("command")) or text_of(run.manifest.get("command")),
        warnings=[text_of(item) for item in list_of(result.get("warnings")) if text_of(item)],
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
    environment.filters |= {
        "count": count_text,
        "bytes": bytes_text,
        "ms": ms_text,
        "seconds": seconds_text,
        "percent": percent_text,
    }
    return environment.get_template("report.html.j2")


# What the page says, section by section. Each returns an empty value where the run does not tell.


def _title(run: ReportInput) -> str:
    model, data = _setting(run, "model"), _setting(run, "data")
    return f"{model} on {data}" if model and data else model or run.name


def _throughput(latency: Record) -> str:
    """Return images per second, and how many there are of one inference; nothing where an older run did not say."""
    rate, batch = positive(latency.get("images_per_second")), positive(latency.get("batch"))
    if not rate:
        return ""
    return f"{rate:,.0f} images per second" + (f", {batch:.0f} at a time" if batch and batch > 1 else "")


def _draws(result: Record) -> str:
    """Return the memory and energy of the running file, as far as they are known."""
    peak, energy = positive(result.get("peak_memory_bytes")), positive(result.get("energy_mj"))
    memory = f"its process takes {bytes_text(peak)} of memory" if peak else ""
    return "; ".join(filter(None, [memory, f"{energy:.3g} mJ an inference" if energy else ""]))


def _facts(run: ReportInput) -> list[str]:
    """Return the short facts under the title."""
    date = text_of(run.result.get("date")) or text_of(run.manifest.get("created"))
    cpu = text_of(run.machine.get("cpu_model"))
    return [fact for fact in (_setting(run, "target"), cpu, date.replace("T", " ").replace("+00:00", " UTC")) if fact]


def _setting(run: ReportInput, name: str) -> str:
    """Return what the result, or else the options, say for `name`; options may be a table with the name as `spec`."""
    option = run.config.get(name)
    return text_of(run.result.get(name)) or text_of(option) or text_of(record(option).get("spec"))


def _headline(result: Record) -> list[dict[str, str]]:
    """Return the tiles: a value, its label, and a note on how sure it is."""
    tiles = []
    latency, unpruned = record(result.get("latency")), record(result.get("best_unpruned"))
    ratio, rival = positive(latency.get("ratio")), positive(unpruned.get("ratio"))
    if ratio:
        low, high = positive(latency.get("ratio_low")), positive(latency.get("ratio_high"))
        sure = f"95 % interval {1 / high:.2f} to {1 / low:.2f}" if low and high else "no interval"
        median, verdict = positive(latency.get("median_ms")), text_of(latency.get("verdict"))
        longest = positive(latency.get("p99_ms"))
        times = [ms_text(median) if median else "", f"99 of 100 within {ms_text(longest)}" if longest else ""]
        times.append(_throughput(latency))
        notes = ["" if verdict == "faster" else verdict, *times, sure]
        tiles.append(
            {
                **_faster(ratio, f"the {_float_name(result)} file"),
                "note": "; ".join(filter(None, notes)),
            }
        )
    if ratio and rival:
        times_float = f"{times_text(1 / rival)} as fast as {_float_name(result)}"
        tiles.append(
            {
                **_faster(ratio / rival, "the best unpruned file"),
                "note": f"{text_of(unpruned.get('name')) or 'unnamed'}, {times_float}"
                if ratio != rival
                else "it is that file: nothing better was found",
            }
        )
    size_ratio, size = positive(result.get("size_ratio")), positive(result.get("size_bytes"))
    if size_ratio and size:
        became = f"{bytes_text(size)}, was {bytes_text(size * size_ratio)}"
        tiles.append(
            {
                "value": times_text(max(size_ratio, 1 / size_ratio)),
                "label": f"{'smaller' if size_ratio >= 1 else 'larger'} than the {_float_name(result)} file",
                "note": "; ".join(filter(None, [became, _draws(result)])),
            }
        )
    accuracy = record(result.get("accuracy"))
    drop = number(accuracy.get("drop_points"))
    if drop is not None:
        low, high = number(accuracy.get("drop_low")), number(accuracy.get("drop_high"))
        test, baseline = number(accuracy.get("test")), number(accuracy.get("baseline_test"))
        words, known = MetricWords.of(result), baseline is not None and test is not None
        became = f"test part {words.value(baseline)} before, {words.value(test)} now" if known else ""
        sure = "no interval"
        if low is not None and high is not None:
            sure = f"paired 95 % interval of the loss {signed(low)} to {signed(high)}"
        tiles.append(
            {
                "value": f"{abs(drop):.2f}",
                "label": f"{f'{words.unit} of ' if words.unit else ''}{words.name} {'lost' if drop >= 0 else 'won'}",
                "note": "; ".join(filter(None, [became, sure])),
            }
        )
    return tiles


def _float_name(result: Record) -> str:
    names = [text_of(candidate.get("name")).lower() for candidate in records(result.get("candidates"))]
    return next((name.upper() for name in names if name in FLOATS), FLOATS[0].upper())


def _faster(ratio: float, than: str) -> dict[str, str]:
    if abs(ratio - 1) < 0.005:  # 1.00 times in the figure's two digits
        return {"value": times_text(1.0), "label": f"as fast as {than}"}
    return {"value": times_text(max(ratio, 1 / ratio)), "label": f"{'faster' if ratio < 1 else 'slower'} than {than}"}


def _bars(result: Record) -> list[dict[str, Any]]:
    """Return one bar per candidate file: its time as a share of the slowest, with its interval."""
    timed = [(c, ratio) for c in records(result.get("candidates")) if (ratio := positive(c.get("ratio"))) is not None]
    longest = max((positive(c.get("ratio_high")) or ratio for c, ratio in timed), default=0.0) or 1.0
    bars: list[dict[str, Any]] = []
    for candidate, ratio in timed:
        low, high = positive(candidate.get("ratio_low")), positive(candidate.get("ratio_high"))
        interval = (low, high) if low is not None and high is not None and high > low else None
        bars.append(
            {
                "name": text_of(candidate.get("name")) or "unnamed",
                "ratio": ratio,
                "interval": interval,
                "width": f"{100 * ratio / longest:.2f}",
                "interval_width": [f"{100 * end / longest:.2f}" for end in interval or ()],
                "median_ms": positive(candidate.get("median_ms")),
                "size_bytes": positive(candidate.get("size_bytes")),
                "accuracy": number(candidate.get("accuracy_selection")),
                "role": _role(candidate, result),
            }
        )
    return bars


def _role(candidate: Record, result: Record) -> str:
    """Return `shipped`, `unpruned` (the float reference too) or `candidate`.

    A run may say so itself; else the shipped file is the one with the result's latency and size, and names tell.
    """
    role, name = text_of(candidate.get("role")), text_of(candidate.get("name")).lower()
    if role in ("shipped", "unpruned", "candidate"):
        return role
    shipped = number(record(result.get("latency")).get("ratio")), number(result.get("size_bytes"))
    if shipped == (number(candidate.get("ratio")), positive(candidate.get("size_bytes"))):
        return "shipped"
    return "unpruned" if name.startswith((*FLOATS, "int8")) else "candidate"


def _by_class(result: Record) -> list[dict[str, Any]]:
    """Return the metric of each class before and after, those that lost most first."""
    words, rows = MetricWords.of(result), []
    for name, values in record(result.get("by_class")).items():
        after, before = number(record(values).get("test")), number(record(values).get("baseline_test"))
        if after is not None and before is not None:
            lost = words.scale * ((before - after) if words.higher_is_better else (after - before))
            rows.append({"name": str(name), "before": words.value(before), "after": words.value(after), "lost": lost})
    return sorted(rows, key=lambda row: -row["lost"])


def _samples(run: ReportInput) -> list[dict[str, str]]:
    """Return the sample pictures as data URIs, and what the shipped file says of each."""
    return [
        {"picture": run.pictures.get(text_of(sample.get("picture")), ""), "says": text_of(sample.get("says"))}
        for sample in records(run.result.get("samples"))
    ]


def _layers(result: Record) -> list[dict[str, Any]]:
    """Return the layers grouped by block, in execution order."""
    layers = [layer for layer in records(result.get("layers")) if text_of(layer.get("name"))]
    share = _time_shares([str(layer["name"]) for layer in layers], records(result.get("operators")))
    blocks: dict[str, list[dict[str, Any]]] = {}
    for layer in layers:
        numbers = {
            key: number(layer.get(key)) for key in ("in_full", "out_full", "in_kept", "out_kept", "params", "macs")
        }
        full, kept, block = numbers["out_full"], numbers["out_kept"], text_of(layer.get("block"))
        blocks.setdefault(block, []).append(
            {
                "name": str(layer["name"]),
                "short_name": str(layer["name"]).removeprefix(f"{block}."),
                "kind": text_of(layer.get("kind")),
                "precision": text_of(layer.get("precision")),
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
        words = re.split(r"\W+", text_of(operator.get("name")))
        for path, name in paths:
            if any(words[at : at + len(path)] == path for at in range(len(words) - len(path) + 1)):
                spent[name] += positive(operator.get("microseconds")) or 0.0
                break
    total = sum(positive(operator.get("microseconds")) or 0.0 for operator in operators)
    return {name: value / total for name, value in spent.items()} if total else {}


def _operators(result: Record) -> dict[str, Any]:
    """Return each kind of operator with its count and share of the profiled time, and the share by arithmetic."""
    count: Counter[tuple[str, str]] = Counter()
    time: dict[tuple[str, str], float] = defaultdict(float)
    for operator in records(result.get("operators")):
        kind = text_of(operator.get("operator")) or "unnamed"
        arithmetic = "integer" if operator.get("is_integer") is True else "float"
        key = kind, "none" if kind in WITHOUT_ARITHMETIC else arithmetic
        count[key] += 1
        time[key] += positive(operator.get("microseconds")) or 0.0
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
    for item in records(result.get("kept_whole")):
        if text_of(item.get("layer")):
            reasons.setdefault(text_of(item.get("reason")) or "no reason given", []).append(str(item["layer"]))
    return [{"reason": reason, "layers": layers} for reason, layers in reasons.items()]


def _cost(result: Record, outcomes: Sequence[Record]) -> dict[str, Any]:
    """Return wall time by stage, evaluations by fidelity, and the share of time spent outside evaluation."""
    stages = {
        name: seconds for name, value in record(result.get("stages")).items() if (seconds := number(value)) is not None
    }
    total = stages.pop(WHOLE_COMMAND, None)
    if not stages:
        return {}
    longest = max(stages.values())
    search = record(result.get("search"))
    counts = [
        ("trained, exported and timed (F3)", number(search.get("f3"))),
        ("exported and timed (F2)", number(search.get("f2"))),
        ("sliced and judged (F1)", number(search.get("f1"))),
        ("repeats answered from the journal", number(search.get("repeats"))),
    ]
    overhead, searching = number(search.get("overhead_seconds")), positive(search.get("seconds"))
    failed = Counter(
        (text_of(outcome.get("stage")) or "unnamed stage", text_of(outcome.get("reason")) or "no reason given")
        for outcome in outcomes
        if outcome.get("kind") == "failed"
    )
    return {
        "stages": [
            {"name": name, "seconds": seconds, "width": f"{100 * seconds / longest if longest else 0:.2f}"}
            for name, seconds in sorted(stages.items(), key=lambda item: -item[1])
        ],
        "total": total or sum(stages.values()),
        "strategy": text_of(search.get("strategy")),
        "counts": [(name, count) for name, count in counts if count is not None],
        "overhead": overhead / searching if overhead is not None and searching else None,
        "failed": [(stage, reason, count) for (stage, reason), count in failed.most_common()],
    }


def _scatter(result: Record, outcomes: Sequence[Record]) -> dict[str, Any]:
    """Return the two drawings of accuracy (or loss) against time, and what the caption must say about them.

    A file's time is its ratio to the float file from interleaved runs times the time of that, so that points taken at
    different moments can be compared; where a ratio is missing it is the file's own median.
    """
    candidates = records(result.get("candidates"))
    float_ms = next(
        (positive(c.get("median_ms")) for c in candidates if text_of(c.get("name")).lower() in FLOATS), None
    )
    by_accuracy = any(number(o.get("accuracy")) is not None for o in outcomes) or any(
        number(c.get("accuracy_selection")) is not None for c in candidates
    )

    words = MetricWords.of(result)

    def point(value: Record, accuracy: str, role: str, name: str = "") -> Point | None:
        ratio, y = positive(value.get("ratio")), number(value.get(accuracy if by_accuracy else "loss"))
        timed = ratio * float_ms if ratio and float_ms else positive(value.get("median_ms"))
        ms = timed or positive(value.get("predicted_ms"))
        if y is None or ms is None or ms <= 0:
            return None
        return Point(ms, words.scale * y if by_accuracy else y, role if timed else "predicted", name)

    drawn = [
        *(
            point(outcome, "accuracy", "recovered" if outcome.get("fidelity") == "F3" else "trial")
            for outcome in outcomes
            if outcome.get("kind") != "failed"
        ),
        *(
            point(c, "accuracy_selection", role, "" if role == "candidate" else text_of(c.get("name")))
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
    upside_down = ", lower is better and drawn higher"
    return {
        "drawings": [
            (name, draw(inside, y_range, size, higher_is_better=by_accuracy and words.higher_is_better))
            for name, size in (("wide", WIDE), ("narrow", NARROW))
        ],
        "y_title": f"{words.title} on the selection part{words.axis}{'' if words.higher_is_better else upside_down}"
        if by_accuracy
        else f"Divergence from the uncut model{upside_down}",
        "outside": len(points) - len(inside),
        "roles": {p.role for p in inside},
        "measured": len(measured),
    }


# Reading values that may be anything, and writing numbers for people.


def _outcome(trial: Record) -> Record:
    inner = trial.get("outcome")
    return inner if isinstance(inner, Mapping) else trial
