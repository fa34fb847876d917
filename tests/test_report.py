from __future__ import annotations

import base64
import itertools
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_run import EVIL, result, write_run

from hirelc_deploy.errors import InputError
from hirelc_deploy.results.report import ReportInput, read_run, render, write_report
from hirelc_deploy.results.scatter import Point, draw, frame, front, log_ticks, ticks


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return render(read_run(write_run(tmp_path_factory.mktemp("run"))))


class Page(HTMLParser):
    """Collects the text and the tags, and notices a tag that is not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags, self._open = "", [], []  # type: ignore[var-annotated]
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += " " + data.replace("\u00a0", " ")


def words(html: str) -> str:
    return re.sub(r"\s+", " ", Page(html).text)


def only(value: dict[str, Any]) -> str:
    return words(render(ReportInput("run", result=value)))


def test_the_headline_gives_times_faster_bytes_and_drop_with_intervals(page: str) -> None:
    text = words(page)
    assert "10.0 × faster than the FP32 file 1 ms; 95 % interval 9.90 to 10.10" in text
    assert "3.00 × faster than the best unpruned file int8 placed, 3.33 × as fast as FP32" in text
    assert "32.0 × smaller than the FP32 file 1.4 MB, was 44.8 MB" in text
    assert "0.59 points of accuracy lost" in text
    assert "94.22 % before, 93.63 % now; paired 95 % interval of the loss +0.31 to +0.87" in text


def test_a_slower_file_is_called_slower() -> None:
    text = only({**result(), "latency": {"ratio": 1.25, "verdict": "slower"}, "best_unpruned": {}, "size_ratio": 0.5})
    assert "1.25 × slower than the FP32 file slower; no interval" in text
    assert "2.00 × larger than the FP32 file" in text
    assert "faster than" not in text


def test_an_unpruned_file_that_was_shipped_is_called_what_it_is() -> None:
    value = result()
    text = only({**value, "best_unpruned": {"name": "int8 placed", "ratio": value["latency"]["ratio"]}})
    assert "1.00 × as fast as the best unpruned file it is that file: nothing better was found" in text


def test_what_the_accuracy_guard_turned_back_is_listed_with_its_cost(page: str) -> None:
    text = words(page)
    assert re.search(
        r"Back to float for accuracy .* 1\.75 points .* loses 0\.50 and takes 2\.38 ms instead of 2\.25", text
    )
    assert re.search(r"Back to float for accuracy .* stage1\.conv 0\.125 ms", text)
    for nothing in (None, []):
        assert "Back to float" not in only({**result(), "guard": nothing})


def test_a_pattern_that_keeps_the_drop_alone_is_told() -> None:
    guard = {**result()["guard"], "reverted": []}
    assert re.search(r"pattern weights; every layer stays integer", only({**result(), "guard": guard}))


def test_a_file_that_keeps_the_drop_by_training_is_told() -> None:
    guard = {**result()["guard"], "reverted": [], "trained": True}
    told = r"Trained in integers for accuracy .*pattern weights; its weights were trained while they were rounded"
    text = only({**result(), "guard": guard})
    assert re.search(told, text)
    assert "Back to float" not in text


def test_what_why_found_is_a_section_and_escaped(tmp_path: Path) -> None:
    won = {"won": -3.25, "low": -5.0, "high": -1.5}
    effect = {"points": won, "divergence": {"won": -0.125, "low": -0.25, "high": 0.0}, "ms": None}
    fix = {"what": "float", "how": f"--float-layers {EVIL}", **effect}
    layer = {
        "name": EVIL,
        "precision": "int8",
        "rounding": effect,
        "cut": None,
        "fixes": [fix],
        "suggested": fix["how"],
    }
    found = {"explains": "shipped", "pattern": "all", "images": 500, "rounding": effect, "layers": [layer]}
    run = write_run(tmp_path / "run")
    (run / "why.json").write_text(json.dumps({**found, "together": fix}))
    html = render(read_run(run))
    text = words(html)
    assert re.search(r"Which layer lost what The shipped file, pattern all, on 500 selection images\.", text)
    assert "int8 −3.25 (−5.00 to −1.50) −0.1250 (−0.2500 to +0.0000) –" in text
    assert f"--float-layers {EVIL} : −3.25 (−5.00 to −1.50) points, −0.1250" in text
    assert "suggested" in text
    assert "<script" not in html
    assert "Which layer lost what" not in words(render(read_run(write_run(tmp_path / "other"))))
    (run / "why.json").write_text("[" * 5)
    assert "why.json cannot be read" in words(render(read_run(run)))


def test_the_guard_of_an_old_run_is_still_listed() -> None:
    old = [{"layer": "stage1.conv", "divergence": 0.01, "drop_points": 0.75, "ms": 0.125}]
    assert re.search(r"Back to float for accuracy .* stage1\.conv 0\.125 ms", only({**result(), "guard": old}))


def test_each_end_is_told_in_a_line_with_what_decided(page: str) -> None:
    end = {"name": "end of boxes", "precision": "float", "why": "Exp turns a step of rounding into a factor"}
    far = {**end, "divergence": 0.5, "float_divergence": 0.002}
    near = {**end, "precision": "int8", "divergence": 0.001, "float_divergence": 0.002, "ratio": 0.9}
    text = only({"ends": [end, far, near, {"name": "end of nothing"}]})
    assert "end of boxes float Exp turns a step of rounding into a factor; the fastest pattern rounds nothing" in text
    assert "factor; as integers 0.5 nats from the float answers, as floats 0.002" in text
    assert "end of boxes int8 Exp turns a step of rounding into a factor; integers answer no worse" in text
    assert "end of nothing" not in text
    assert "What decodes the outputs" not in words(page)


def test_without_layer_names_in_the_profile_no_share_of_time_is_shown() -> None:
    value = result()
    assert re.search(r"MACs Time", only(value))
    assert not re.search(r"MACs Time", only({**value, "operators": [{**value["operators"][0], "name": "44_token_2"}]}))


def test_the_page_names_run_machine_command_and_date(page: str) -> None:
    text = words(page)
    assert "resnet18 on torch/cifar10" in text
    assert "onnxruntime_cpu A processor 2026-11-20 17:00:00 UTC" in text
    assert "hirelc-deploy search" in text
    assert "versions.onnxruntime 1.31" in text
    assert "Absent" not in text


def test_every_text_of_the_run_is_escaped(page: str) -> None:
    assert "<script" not in page
    assert words(page).count(EVIL) >= 3  # a layer, a warning, a failed trial


def test_the_page_loads_nothing(page: str) -> None:
    for tag, attributes in Page(page).tags:
        assert tag not in ("script", "img", "iframe", "object", "embed", "base")
        assert not {"src", "srcset", "action"} & attributes.keys()
        assert attributes.get("href", "data:,") == "data:,"
    assert not re.search(r"@import|url\(", page)


def test_layers_show_widths_precision_and_their_share_of_the_measured_time(page: str) -> None:
    text = words(page)
    # The conv1 inside the block takes its own time, not the block's: the longest name that fits wins.
    assert re.search(r"conv1 conv 64 → 24 64 → 24 int8 5.18 k 332 k 60.0 %", text)
    assert re.search(r"conv2 conv 64 64 float 36.9 k 2.36 M 30.0 %", text)
    assert "60.0 % of the time in integer arithmetic, 30.0 % in floating point, 10.0 % moving and converting" in text


def test_the_total_is_the_whole_command_and_not_the_sum_of_nested_stages(page: str) -> None:
    text = words(page)
    assert "5 min 0 s of wall time, strategy hirelc , 10.0 % of the search outside evaluation and timing" in text
    assert "whole command" not in text


def test_failed_trials_are_counted_with_their_reason(page: str) -> None:
    assert f"export {EVIL} 1" in words(page)


def test_trials_that_fell_far_below_are_left_out_and_counted(page: str) -> None:
    assert "1 trial lies outside the frame" in words(page)


def test_without_labels_the_scatter_shows_the_loss() -> None:
    value = result()
    for item in value["candidates"]:
        item["accuracy_selection"] = None
    trials = [{"outcome": {"kind": "measured", "fidelity": "F2", "loss": 0.2, "accuracy": None, "ratio": 0.4}}]
    assert "Divergence from the uncut model, lower is better" in words(
        render(ReportInput("run", result=value, trials=trials))
    )


@pytest.mark.parametrize("name", ["result.json", "trials.jsonl", "machine.json", "config.toml", "bundle/manifest.json"])
@pytest.mark.parametrize("harm", ["remove", "cut", "other"])
def test_a_missing_or_broken_part_is_named_instead_of_failing(tmp_path: Path, name: str, harm: str) -> None:
    path = write_run(tmp_path / "run") / name
    content = path.read_bytes()
    path.unlink()
    if harm != "remove":
        path.write_bytes(content[: len(content) // 2 - 3] + b'"' if harm == "cut" else b'[1, "a", [null]]\n\xff')
    text = words(render(read_run(tmp_path / "run")))
    assert f"Absent from this run {name}" in text


def test_a_run_that_was_killed_still_gives_a_page(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run")
    (directory / "result.json").unlink()
    with (directory / "trials.jsonl").open("a") as file:
        file.write('{"trial": 25, "outc')
    text = words(render(read_run(directory)))
    assert "1 of 25 lines cannot be read" in text
    assert "Nothing in this run tells what was shipped" in text
    assert "Accuracy against time" in text


WRONG = (None, "text", 7, True, math.nan, math.inf, -1.0, [], {}, [None], ["a"], [[]], {"a": {"b": []}}, 10**400)


@pytest.mark.parametrize("key", sorted(result()))
def test_wrong_values_never_break_the_page(key: str) -> None:
    good = result()
    for wrong in WRONG:
        assert render(ReportInput("run", result={**good, key: wrong})).rstrip().endswith("</html>")
        inner = good[key]
        if isinstance(inner, list) and isinstance(inner[0], dict):
            for name in inner[0]:
                render(ReportInput("run", result={**good, key: [{**inner[0], name: wrong}, *inner[1:]]}))
        if isinstance(inner, dict):
            for name in inner:
                render(ReportInput("run", result={**good, key: {**inner, name: wrong}}))


def test_trials_of_any_shape_never_break_the_page() -> None:
    keys = ("kind", "fidelity", "ratio", "median_ms", "predicted_ms", "accuracy", "loss", "stage", "reason")
    trials: list[Any] = [
        {"outcome": {"kind": "measured", "ratio": 0.5, "accuracy": 0.5, key: wrong}} for key in keys for wrong in WRONG
    ]
    trials += [{"outcome": wrong} for wrong in WRONG]
    page = render(ReportInput("run", result=result(), trials=trials))
    assert page.rstrip().endswith("</html>")


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("")])
def test_what_is_no_run_directory_is_refused(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "run")
    with pytest.raises(InputError, match="run directory"):
        read_run(tmp_path / "run")


def test_an_unwritable_place_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        write_report(ReportInput("run"), tmp_path / "absent" / "report.html")


def test_the_page_is_written_and_small(tmp_path: Path) -> None:
    path = write_report(read_run(write_run(tmp_path / "run")), tmp_path / "report.html")
    assert path.read_text("utf-8").startswith("<!doctype html>")
    assert path.stat().st_size < 100_000
    json.dumps(result(), allow_nan=False)


# The scatter


def test_the_front_keeps_only_what_nothing_else_beats() -> None:
    points = [Point(1, 90, "trial"), Point(2, 89, "trial"), Point(2, 92, "trial"), Point(2, 91, "trial")]
    assert [(p.ms, p.y) for p in front(points, higher_is_better=True)] == [(1, 90), (2, 92)]
    assert [(p.ms, p.y) for p in front(points, higher_is_better=False)] == [(1, 90), (2, 89)]


def test_better_is_drawn_higher_and_slower_further_right() -> None:
    points = [Point(1, 1.0, "trial"), Point(10, 2.0, "shipped", "s"), Point(100, 3.0, "unpruned", "u")]
    for higher_is_better in (True, False):
        drawing = draw(points, (0.5, 3.5), (400, 300), higher_is_better=higher_is_better)
        xs, ys = [mark.x for mark in drawing.marks], [mark.y for mark in drawing.marks]
        by_ms = [mark.x for mark in sorted(drawing.marks, key=lambda mark: mark.point.ms)]
        assert by_ms == sorted(xs)
        assert by_ms[1] - by_ms[0] == pytest.approx(by_ms[2] - by_ms[1], abs=0.2)  # tenfold is tenfold
        best = min(drawing.marks, key=lambda mark: mark.y).point.y
        assert best == (3.0 if higher_is_better else 1.0)
        assert all(drawing.left <= x <= drawing.right for x in xs)
        assert all(drawing.top <= y <= drawing.bottom for y in ys)


def test_names_never_cover_one_another() -> None:
    points = [Point(1 + 0.01 * i, 90 + 0.01 * i, "unpruned", f"file number {i}") for i in range(4)]
    labels = draw(points, (89, 91), (360, 340), higher_is_better=True).labels
    for i, one in enumerate(labels):
        for other in labels[:i]:
            apart = abs(one.y - other.y) >= 14 or one.span[1] <= other.span[0] or other.span[1] <= one.span[0]
            assert apart


def test_the_frame_holds_what_could_ship_and_not_every_trial() -> None:
    points = [Point(1, 94, "unpruned"), Point(1, 93, "shipped"), Point(1, 91, "trial"), Point(1, 10, "trial")]
    low, high = frame(points, least=4.0)
    assert low < 91
    assert low > 10
    assert high > 94


@pytest.mark.parametrize(("low", "high"), [(0, 1), (89.4, 94.9), (0.001, 0.0013), (-3, 7)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    values = ticks(low, high, count=5)
    assert 2 <= len(values) <= 7
    assert all(low <= value <= high for value in values)
    assert len({round(b - a, 9) for a, b in itertools.pairwise(values)}) == 1


def test_logarithmic_ticks_are_one_two_five() -> None:
    assert log_ticks(0.08, 11) == [0.1, 0.2, 0.5, 1, 2, 5, 10]
    assert len(log_ticks(3.0, 3.4)) >= 3


def test_the_page_speaks_of_the_metric_of_the_task() -> None:
    value = result()
    value["metric"] = {"task": "regression", "name": "RMSE", "scale": 1.0, "unit": "px", "higher_is_better": False}
    value["accuracy"] = {"test": 2.25, "baseline_test": 2.0, "drop_points": 0.25, "drop_low": 0.2, "drop_high": 0.3}
    value["by_class"] = {"left": {"test": 2.0, "baseline_test": 2.0}, "right": {"test": 2.5, "baseline_test": 2.0}}
    page = words(render(ReportInput("run", result=value)))
    assert "px of RMSE lost" in page
    assert "test part 2 px before, 2.25 px now" in page
    assert "RMSE against time" in page
    assert "RMSE on the selection part (px), lower is better and drawn higher" in page
    assert page.index("right 2 px 2.5 px +0.50") < page.index("left 2 px 2 px +0.00")


def test_sample_pictures_are_in_the_page_and_what_is_no_picture_of_the_run_is_not(tmp_path: Path) -> None:
    value = result()
    value["samples"] = [
        {"picture": "samples/0.png", "says": "cat <0.93>"},
        {"picture": "../secret.png", "says": "outside"},
        {"picture": None, "says": "no picture"},
    ]
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "0.png").write_bytes(b"picture of a cat")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "samples" / "1.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "result.json").write_text(json.dumps(value))
    page = render(read_run(tmp_path))
    assert base64.b64encode(b"picture of a cat").decode() in page
    assert base64.b64encode(b"secret").decode() not in page
    assert "cat &lt;0.93&gt;" in page
    assert "no picture" in page
