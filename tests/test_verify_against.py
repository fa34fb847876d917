"""A new bundle beside a baseline: what is worse fails, what cannot be compared is said, and a CI server can read it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from test_bundle import BACKEND, Made, bundle, claim, edit_manifest, flip_a_weight, made  # noqa: F401  (fixtures)

from hirelc_deploy.cli import application
from hirelc_deploy.deliver.against import MAX_DROP, MAX_SLOWDOWN, accuracy_change, latency_change, read_baseline
from hirelc_deploy.deliver.junit import junit_xml
from hirelc_deploy.deliver.verify import VerifyResult, verify, verify_against
from hirelc_deploy.errors import InputError
from hirelc_deploy.measure.protocol import TimingLimits
from hirelc_deploy.testing.fake_backend import NO_NOISE, FakeBackend

MACHINE = {
    "cpu_model": "one",
    "cores": 2,
    "features": ["avx2"],
    "architecture": "x86_64",
    "backend": "onnxruntime_cpu",
    "versions": {"onnxruntime": "1.31.1"},
    "load_average": [0.0, 0.0, 0.0],
}
METRIC = {"name": "accuracy", "scale": 100.0, "unit": "points", "higher_is_better": True}
OLD: dict[str, Any] = {
    "ok": True,
    "accuracy": 0.90,
    "metric": METRIC,
    "test": {"images": 100, "labels_sha256": "a"},
    "latency": {"median_ms": 1.0, "ratio": 0.50, "ratio_low": 0.495, "ratio_high": 0.505},
    "machine": MACHINE,
    "reference_sha256": "r",
}
BRIEF = TimingLimits(processes=2, min_rounds=10, max_rounds=10, half_width=1.0, seconds=20.0)


@pytest.fixture
def quiet(bundle: Path) -> FakeBackend:  # noqa: F811
    claim("measurements", "operators", value={"integer_ops": 1})(bundle)
    return FakeBackend(noise=NO_NOISE)


@pytest.mark.parametrize(
    ("accuracy", "limit", "worse"),
    [(0.90, None, False), (0.89, None, False), (0.889, None, True), (0.95, 0.0, False), (0.899, 0.0, True)],
)
def test_a_drop_is_held_against_the_limit_in_points(accuracy: float, limit: float | None, worse: bool) -> None:
    change = accuracy_change({**OLD, "accuracy": accuracy}, OLD, limit)
    assert change.worse is worse
    assert change.change == pytest.approx(100 * (0.90 - accuracy))
    assert change.allowed == (MAX_DROP if limit is None else limit)


def test_an_error_that_grows_is_a_drop() -> None:
    metric = {"name": "RMSE", "scale": 1.0, "unit": "px", "higher_is_better": False}
    old = {**OLD, "metric": metric, "accuracy": 2.0}
    assert accuracy_change({**old, "accuracy": 2.5}, old, 0.4).worse is True
    change = accuracy_change({**old, "accuracy": 1.5}, old, 0.4)
    assert (change.worse, change.change) == (False, -0.5)
    assert "1.5 px" in change.text


@pytest.mark.parametrize(
    ("ratio", "limit", "worse", "words"),
    [
        (0.50, None, False, "1.000 of the baseline's"),
        (0.54, None, False, "reaches beyond what is allowed"),
        (0.58, None, True, "1.160 of the baseline's"),
        (0.58, 20.0, False, "up to 1.200 allowed"),
        (0.40, 0.0, False, "0.800 of the baseline's"),
    ],
)
def test_a_slowdown_fails_only_when_its_whole_interval_is_beyond_the_limit(
    ratio: float, limit: float | None, worse: bool, words: str
) -> None:
    latency = {"median_ms": 9.0, "ratio": ratio, "ratio_low": ratio * 0.99, "ratio_high": ratio * 1.01}
    change = latency_change({**OLD, "latency": latency}, OLD, limit)
    assert change.worse is worse
    assert words in change.text
    assert change.allowed == (MAX_SLOWDOWN if limit is None else limit)


@pytest.mark.parametrize(
    ("compare", "new", "old", "words"),
    [
        (accuracy_change, {"accuracy": None}, {}, "give --data"),
        (accuracy_change, {}, {"accuracy": None}, "write it again with --data"),
        (accuracy_change, {}, {"test": {"images": 100, "labels_sha256": "b"}}, "of other test images"),
        (accuracy_change, {}, {"metric": {**METRIC, "name": "mIoU"}}, "the baseline's metric is mIoU, not accuracy"),
        (latency_change, {"latency": None}, {}, "give --reference"),
        (latency_change, {}, {"latency": None}, "write it again with --reference"),
        (latency_change, {}, {"reference_sha256": "other"}, "another reference"),
        (latency_change, {}, {"machine": {**MACHINE, "cpu_model": "two"}}, "milliseconds of another machine"),
        (latency_change, {}, {"machine": None}, "milliseconds of another machine"),
    ],
)
def test_what_cannot_be_compared_is_said_and_refused_where_a_limit_was_given(
    compare: Callable[..., Any], new: dict[str, Any], old: dict[str, Any], words: str
) -> None:
    change = compare({**OLD, **new}, {**OLD, **old}, None)
    assert (change.worse, change.change) == (None, None)
    assert words in change.text
    with pytest.raises(InputError, match="cannot be held against the baseline"):
        compare({**OLD, **new}, {**OLD, **old}, 5.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ("[]", "where an object belongs"),
        ("{}", "no baseline ('accuracy' is missing)"),
        (json.dumps({**OLD, "accuracy": "high"}), "accuracy must be a number"),
        (json.dumps({**OLD, "accuracy": float("nan")}), "accuracy must be a number"),
        (json.dumps({**OLD, "metric": []}), "metric must be an object"),
        (json.dumps({**OLD, "machine": 3}), "machine must be an object"),
        (json.dumps({**OLD, "latency": {"ratio": 0}}), "latency must be an object with ratio"),
        (json.dumps({**OLD, "ok": False}), "was not what it says"),
    ],
)
def test_a_bad_baseline_is_one_sentence(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read_baseline(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)


def test_an_older_bundle_is_timed_side_by_side(bundle: Path, made: Made, quiet: FakeBackend) -> None:  # noqa: F811
    older = Path(shutil.copytree(bundle, bundle.parent / "older"))
    result = verify_against(bundle, older, None, quiet, limits=BRIEF)
    accuracy, latency = result.changes
    assert (accuracy.worse, latency.worse) == (None, False)
    assert latency.change == pytest.approx(0.0)
    assert not result.worse
    flip_a_weight(older)
    with pytest.raises(InputError, match="the baseline is not what it says"):
        verify_against(bundle, older, None, quiet, limits=BRIEF)


def test_a_bundle_that_is_not_what_it_says_is_not_compared(bundle: Path, made: Made) -> None:  # noqa: F811
    flip_a_weight(bundle)
    result = verify_against(bundle, made.directory, None, BACKEND)
    assert (result.ok, result.changes) == (False, ())


def test_what_verify_prints_is_a_baseline_and_the_command_fails_when_worse(
    bundle: Path,  # noqa: F811
    made: Made,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = ["--data", f"npz:{made.npz}"]
    assert application.run(["verify", str(bundle), *data, "--json"]) == 0
    printed = capsys.readouterr().out
    baseline, junit = tmp_path / "baseline.json", tmp_path / "out" / "verify.xml"
    baseline.write_text(printed)
    against = ["verify", str(bundle), *data, "--against", str(baseline), "--junit", str(junit)]
    assert application.run(against) == 0
    assert "no worse than allowed" in capsys.readouterr().out
    suite = ElementTree.parse(junit).getroot()[0]
    assert [case.get("name") for case in suite] == ["bundle", "accuracy", "latency"]
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("3", "0", "1")

    better = {**json.loads(printed), "accuracy": 0.99}
    baseline.write_text(json.dumps(better))
    assert application.run(against) == 5
    assert "WORSE than allowed" in capsys.readouterr().out
    suite = ElementTree.parse(junit).getroot()[0]
    failure = suite.find("testcase[@name='accuracy']/failure")
    assert failure is not None
    assert "a drop of 9.00 points, 1 allowed" in str(failure.text)
    assert application.run([*against, "--max-drop", "9.5"]) == 0
    assert application.run([*against, "--max-slowdown", "9.5"]) == 2
    assert "cannot be held against the baseline" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-drop", "1"], "give the baseline"),
        (["--against", "gone.json"], "gone.json: no such baseline"),
        (["--against", ".", "--max-drop", "-1"], "give a number from 0 on"),
        (["--against", ".", "--max-slowdown", "nan"], "give a number from 0 on"),
        (["--junit", "/dev/null/x.xml"], "give another --junit"),
    ],
)
def test_a_bad_option_is_exit_code_2(
    options: list[str],
    words: str,
    bundle: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert application.run(["verify", str(bundle), *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_junit_file_is_valid_whatever_a_problem_holds(bundle: Path) -> None:  # noqa: F811
    edit_manifest(bundle, lambda manifest: manifest["files"].update({"\x1b[31m<&\ud800": {}}))
    result = verify(bundle, None, BACKEND)
    assert not result.ok
    problems = VerifyResult((*result.problems, "\x00 \x1b[31m <&> \ud800"), (), None, None, None, None, None)
    root = ElementTree.fromstring(junit_xml(problems, bundle))
    failure = root.find("testsuite/testcase/failure")
    assert failure is not None
    assert "? ?[31m <&> ?" in str(failure.text)
