"""Which layer lost what: on networks with one layer spoiled on purpose; and what a run lacks is said in a sentence."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import spoiled_nets
from small_tasks import on_fake_device
from spoiled_nets import SPOILED, write_pictures

import hirelc_deploy
from hirelc_deploy.cli import application
from hirelc_deploy.compress.integer.guard import Guarded, Other
from hirelc_deploy.config import DataConfig, JobConfig, ModelConfig
from hirelc_deploy.evaluate.by_layer import AS_USUAL, ByLayer
from hirelc_deploy.evaluate.layer_losses import Effect, Fix, Won, suggested
from hirelc_deploy.inputs.data.load import load_data
from hirelc_deploy.jobs.why import training_record
from hirelc_deploy.jobs.workplace import reopened
from hirelc_deploy.progress import Progress
from hirelc_deploy.results.layer_text import why_text
from hirelc_deploy.runs import Run

NETS = Path(spoiled_nets.__file__)


@dataclass(frozen=True)
class Place:
    """A folder with pictures, in which jobs run on the fake device."""

    folder: Path

    def apply(self, name: str, out: str, plan: str, *more: str) -> dict[str, Any]:
        command = ["apply", "--model", f"{NETS}:{name}", "--data", f"npz:{self.folder / 'data.npz'}", "--plan", plan]
        command += ["--recovery-epochs", "0", "--out", str(self.folder / out), "-q", *more]
        assert application.run(command) == 0
        result: dict[str, Any] = json.loads((self.folder / out / "result.json").read_text("utf-8"))
        return result


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("why")
    write_pictures(folder / "data.npz", train=16, calibration=48, selection=120, test=200)
    with pytest.MonkeyPatch.context() as patch:
        on_fake_device(patch, folder / "cache")
        yield Place(folder)


WHOLE = "uniform:keep=1,precision=int8"


@pytest.fixture(scope="module")
def cut(place: Place) -> Path:
    """A run of a plan file that is gone, which cut one unit in half."""
    plan = place.folder / "plan.json"
    plan.write_text(json.dumps({"keep": {"points": 8}, "default_precision": "int8"}))
    place.apply("plain", "cut", str(plan))
    plan.unlink()
    return place.folder / "cut"


def shipped_accuracy(result: dict[str, Any]) -> float:
    ours = next(one for one in result["candidates"] if one["name"] == "ours")
    return 100 * float(ours["accuracy_selection"])


# One layer spoiled on purpose


def is_wide(spread: dict[str, Any]) -> bool:
    return spread["writes"]["widest_channel"] > 16


def is_cut_off(spread: dict[str, Any]) -> bool:
    return spread["writes"]["largest"] > 2 * spread["writes"]["high"] and spread["writes"]["clipped"] > 0


def is_badly_rounded(spread: dict[str, Any]) -> bool:
    return spread["widest_weight"] > 100


SIGNS: dict[str, tuple[Callable[[dict[str, Any]], bool], str]] = {
    "wide channel": (is_wide, "--float-layers mixed"),
    "range cut off": (is_cut_off, "--ranges points=minmax"),
    "badly rounded weight": (is_badly_rounded, "--float-layers joined"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_the_spoiled_layer_comes_first_and_its_fix_brings_what_was_said(kind: str, place: Place) -> None:
    name, (sign, options) = kind.replace(" ", "_"), SIGNS[kind]
    before = place.apply(name, name, WHOLE)
    found = hirelc_deploy.why(place.folder / name, fixes=1)
    first = found.layers[0]
    assert first["name"] == SPOILED[kind]
    assert first["rounding"]["divergence"]["high"] < 5 * found.layers[1]["rounding"]["divergence"]["low"] < 0
    assert sign(first["spread"])
    assert first["suggested"] == found.options == options
    (fix,) = (fix for fix in first["fixes"] if fix["how"] == options)
    assert found.record["together"] == {key: value for key, value in fix.items() if key != "what"}
    after = place.apply(name, f"{name} fixed", WHOLE, *shlex.split(found.options))
    assert shipped_accuracy(after) - shipped_accuracy(before) == pytest.approx(fix["points"]["won"])
    won = 100 * (after["accuracy"]["test"] - before["accuracy"]["test"])  # on other images
    assert fix["points"]["low"] < won < fix["points"]["high"]
    assert fix["points"]["low"] > 5
    precision = {layer["name"]: layer["precision"] for layer in after["layers"]}
    assert [layer for layer in precision if precision[layer] == "float"] == (
        [SPOILED[kind]] if "float" in options else []
    )


def test_the_benchmark_makes_a_suggested_change_and_finds_what_was_said(place: Place) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
    import why_fixes

    place.apply("wide_channel", "benchmark", WHOLE)
    told = hirelc_deploy.why(place.folder / "benchmark", fixes=1).record
    fixes = why_fixes.changes(told)
    assert [(fix["layer"], fix["what"], fix["suggested"]) for fix in fixes] == [("mixed", "float", True)]
    assert why_fixes.wish_of("a", "ranges mse").options == "--ranges a=mse"
    assert why_fixes.wish_of("a", "equalise").options == "--equalise a"
    workplace = reopened(place.folder / "benchmark", Progress(quiet=True))
    with workplace.run:
        test = (
            load_data(f"npz:{place.folder / 'data.npz'}").preprocessed(workplace.pipeline.data.preprocess).take_test()
        )
        found = why_fixes.made(workplace.pipeline, told, fixes, test)
    (row,) = found["fixes"]
    assert found["measured_on"] == 200
    assert found["divergence"][1] < 0.2 * found["divergence"][0]
    assert row["measured"]["divergence"]["won"] == pytest.approx(-np.diff(found["divergence"])[0])
    assert row["said"]["divergence"] == fixes[0]["divergence"]
    assert row["meet"]["divergence"]


def test_where_no_change_surely_helps_the_benchmark_makes_the_one_that_seemed_to_help_most() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
    import why_fixes

    fix = lambda what, how, won: {"what": what, "how": how, "divergence": {"won": won}}  # noqa: E731
    tried = [fix("float", "--float-layers a", 1.0), fix("ranges mse", "--ranges a=mse", 2.0), fix("f16", "", 3.0)]
    layers = [{"name": "a", "fixes": tried, "suggested": None}, {"name": "b", "fixes": [], "suggested": None}]
    (found,) = why_fixes.changes({"layers": layers})
    assert (found["layer"], found["what"], found["suggested"]) == ("a", "ranges mse", False)
    (found,) = why_fixes.changes({"layers": [{**layers[0], "suggested": "--float-layers a"}]})
    assert (found["what"], found["suggested"]) == ("float", True)


def test_layers_that_stay_float_are_in_the_plan_of_the_bundle(place: Place) -> None:
    out = place.folder / "wide_channel fixed"
    if not out.is_dir():
        place.apply("wide_channel", out.name, WHOLE, "--float-layers", "mixed")
    manifest = json.loads((out / "bundle/manifest.json").read_text("utf-8"))
    assert manifest["plan"]["precision"] == {"mixed": "float"}
    last = hirelc_deploy.why(out, fixes=0).layers[-1]  # what its rounding would cost is told all the same
    assert (last["name"], last["precision"]) == ("mixed", "float")
    assert last["rounding"]["divergence"]["high"] < -0.1


# A cut network


def test_cuts_are_told_and_a_plan_file_that_is_gone_does_not_matter(cut: Path) -> None:
    found = hirelc_deploy.why(cut / "bundle", fixes=0)
    layers = {layer["name"]: layer for layer in found.layers}
    told = layers["points"]["cut"]
    assert (told["unit"], told["kept"], told["full"]) == ("points", 8, 32)
    assert told["divergence"]["won"] < 0 < told["ms"]["won"]
    assert [name for name, layer in layers.items() if layer["cut"]] == ["points"]
    # Without recovery that is all that the cut file has lost before it is rounded.
    assert found.record["cutting"]["divergence"]["won"] == pytest.approx(told["divergence"]["won"], rel=0.02)
    assert found.record["rounding"]["ms"]["won"] > 0
    assert "32 → 8" in str(found)
    losses = [layer["rounding"]["divergence"]["won"] for layer in found.layers]
    assert losses == sorted(losses)


def test_the_same_again_measures_nothing_and_the_run_keeps_what_was_found(
    cut: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["why", str(cut), "--fixes", "0", "-q", "--json"]
    assert application.run(command) == 0
    printed, journal = json.loads(capsys.readouterr().out), (cut / "facts.jsonl").read_bytes()
    assert application.run(command) == 0
    assert json.loads(capsys.readouterr().out) == printed == json.loads((cut / "why.json").read_text("utf-8"))
    assert (cut / "facts.jsonl").read_bytes() == journal
    assert "Which layer lost what" in (cut / "report.html").read_text("utf-8")


def test_a_run_of_a_plan_file_that_is_gone_can_be_exported_again(cut: Path, tmp_path: Path) -> None:
    command = ["export", str(cut), "--format", "onnx", "--dynamic-batch", "--out", str(tmp_path / "many")]
    assert application.run(command) == 0
    assert (tmp_path / "many/model.onnx").is_file()


def test_a_run_that_shipped_nothing_has_its_placed_file_explained(cut: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(cut, run)
    shutil.rmtree(run / "bundle")
    found = hirelc_deploy.why(run, fixes=0).record
    assert (found["explains"], found["plan"]["keep"], found["cutting"]) == ("placed", {}, None)
    assert "shipped nothing" in found["notes"][0]


def test_data_that_were_moved_are_named(cut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, moved, there = tmp_path / "run", tmp_path / "moved.npz", cut.parent / "data.npz"
    shutil.copytree(cut, run)
    there.rename(moved)
    try:
        assert application.run(["why", str(run), "-q"]) == 2
        said = capsys.readouterr().err
        assert "its images are not at hand" in said
        assert "--data" in said
        assert application.run(["why", str(run), "-q", "--fixes", "0", "--data", f"npz:{moved}"]) == 0
    finally:
        moved.rename(there)


# Bad input


def run_of(folder: Path, data: str) -> Path:
    job = JobConfig(ModelConfig("resnet18"), DataConfig(data))
    Run.open(folder, job.to_toml(), {"cpu": "fake"}).close()
    return folder


def bundle_alone(folder: Path) -> Path:
    (folder / "bundle").mkdir(parents=True)
    (folder / "bundle/manifest.json").write_text("{}")
    return folder / "bundle"


def of_objects(folder: Path) -> Path:
    return run_of(folder, "datasets:mine")


BAD = {
    "no folder": (lambda folder: folder / "nowhere", "neither a run nor a bundle"),
    "a folder of something else": (lambda folder: folder, "neither a run nor a bundle"),
    "a bundle without a journal": (bundle_alone, "a bundle without the run around it"),
    "a run without its images": (lambda folder: run_of(folder, "npz:gone.npz"), "its images are not at hand"),
    "a run of Python objects": (of_objects, "hirelc_deploy.why(run, model=..., data=...)"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_explained_gets_one_sentence(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare, says = BAD[name]
    assert application.run(["why", str(prepare(tmp_path)), "-q"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert says in printed.err
    assert len(printed.err.splitlines()) == 1


def test_a_number_of_fixes_is_a_number(tmp_path: Path) -> None:
    with pytest.raises(hirelc_deploy.api.InputError, match="--fixes -1: give a whole number"):
        hirelc_deploy.why(tmp_path, fixes=-1)


# What is suggested


def fix(what: str, divergence: float, ms: float, sure: bool = True, how: str | None = None) -> Fix:
    wish = ByLayer(frozenset({what}))
    won = Won(divergence, divergence / 2 if sure else -divergence, 2 * divergence)
    return Fix(what, wish.options if how is None else how, wish, Effect(won, None, Won(ms, ms, ms)))


def test_of_changes_that_help_nearly_as_much_the_one_that_costs_least_time_is_suggested() -> None:
    best, free = fix("float", 1.0, -0.5), fix("ranges", 0.85, 0.0)
    assert suggested([best, free], lost=1.0) is free
    assert suggested([best, fix("ranges", 0.7, 0.0)], lost=1.0) is best
    assert suggested([best, fix("ranges", 2.0, 0.0, sure=False)], lost=1.0) is best
    assert suggested([fix("bf16", 1.0, 0.0, how="a plan")], lost=1.0) is None
    assert suggested([best], lost=30.0) is None, "it brings less than can be told from nothing"
    assert suggested([], lost=1.0) is None


def test_what_the_guard_of_the_run_saw_of_training_is_told() -> None:
    trained, other = Guarded("all", (), 3.0, 0.5, 2.0, 2.0, trained=True), Other(True, "all", (), 1.5, 0.0)
    for found, points in ((trained, 0.5), (replace(trained, trained=False, others=(other,)), 1.5)):
        facts = {"accuracy guard at 1 on here": found.to_dict()}
        pipeline = SimpleNamespace(run=SimpleNamespace(fact=facts.get), files=SimpleNamespace(machine="here"))
        limits = SimpleNamespace(max_drop=1.0)
        place: Any = SimpleNamespace(pipeline=pipeline, config=SimpleNamespace(limits=limits))
        assert training_record(place)["points_before"] == 3.0
        assert training_record(place)["points"] == points
        facts.clear()
        assert training_record(place)["points"] is None


# What the user wants otherwise for single layers


def test_patterns_name_layers_and_become_the_options_again() -> None:
    layers = ["stem", "stages.0.conv", "stages.1.conv", "head"]
    found = ByLayer.of(layers, ["stages.*"], {"*": "mse", "head": "minmax"}, ["stem"])
    assert found.in_float == {"stages.0.conv", "stages.1.conv"}
    assert found.ranges == {**dict.fromkeys(layers, "mse"), "head": "minmax"}
    assert found.equalised == {"stem"}
    assert found.precision_of(lambda _: "int8")("stages.1.conv") == "float"
    assert found.precision_of(lambda _: "int8")("head") == "int8"
    both = ByLayer(frozenset({"a b"}), {"stem": "mse"}) | ByLayer(ranges={"stem": "minmax"}, equalised=frozenset({"x"}))
    assert both.options == "--float-layers 'a b' --ranges stem=minmax --equalise x"
    assert AS_USUAL.options == ""


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--float-layers", "mixd"], "--float-layers mixd: no layer has this name; near names: mixed"),
        (["--equalise", "stages.*"], "--equalise stages.*: no layer has this name"),
        (["--ranges", "mixed=widest"], "--ranges mixed=widest: use minmax, percentile, mse"),
        (["--ranges", "mixed"], "--ranges 'mixed': write LAYERS=METHOD"),
    ],
)
def test_a_layer_that_is_not_there_gets_one_sentence(
    options: list[str], says: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    out = place.folder / "refused"
    command = ["apply", "--model", f"{NETS}:plain", "--data", f"npz:{place.folder / 'data.npz'}", "--plan", WHOLE]
    assert application.run([*command, "--out", str(out), "-q", *options]) == 2
    assert says in capsys.readouterr().err
    assert not out.exists()


# Words


def test_a_record_that_may_be_anything_is_told_without_a_crash() -> None:
    assert "not tried here" in why_text({})
    odd: dict[str, Any] = {
        "layers": [{"name": 3, "rounding": {"points": [1]}, "spread": {"reads": {"low": "x"}}}, None]
    }
    assert why_text({**odd, "together": {"how": "--float-layers a"}}).count("\n") > 3
    unlabelled = {"won": np.nan, "low": None, "high": None}
    assert "–" in why_text({"layers": [{"name": "a", "precision": "int8", "rounding": {"points": unlabelled}}]})
