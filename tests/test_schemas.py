"""Every JSON file and every --json output has a schema, and real ones are as it says."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import typer

from hirelc_deploy import api, schemas
from hirelc_deploy.cli import application
from hirelc_deploy.config import PreprocessConfig
from hirelc_deploy.jobs import workplace
from hirelc_deploy.measure import targets
from hirelc_deploy.measure.machine import describe
from hirelc_deploy.outcome import Failed, outcome_to_dict
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.runs import json_text
from hirelc_deploy.testing.fake_backend import FakeBackend

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")

NET = """
import torch
from torch import nn

def data():
    g = torch.Generator().manual_seed(0)
    items = [(torch.randint(0, 255, (3, 16, 16), generator=g).byte(), n % 3) for n in range(160)]
    return {"train": items[:120], "test": items[120:]}

def net():
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(first, nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(16, 3))
"""
MODEL = ["--model", "net.py:net", "--input-size", "3,16,16"]
JOB = [*MODEL, "--data", "net.py:data", "--recovery-epochs", "0.1", "--calibration-images", "16"]
JOB += ["--selection-images", "24", "--json", "-q"]
SEARCH = ["search", *JOB, "--trials", "2", "--finalists", "1", "--options", "3", "--max-drop", "90", "--out", "run"]
COMPARE = ["compare", "run", "--strategies", "hirelc,random", "--seeds", "1", "--speedups", "1.1", "--trials", "2"]
OUTPUTS: dict[str, list[str]] = {
    "inspect": ["inspect", *MODEL, "--exclude", "0.*", "--verdict", "--json", "-q"],
    "verify": ["verify", "run/bundle", "--data", "net.py:data", "--json"],
    "benchmark": ["benchmark", "run/bundle/model.onnx", "run/bundle/model.onnx", "--json"],
    "profile": ["profile", *MODEL, "--out", "stairs", "--steps", "3", "--json", "-q"],
    "compare": [*COMPARE, "--out", "compared", "--json", "-q"],
    "status": ["status", "run", "--json"],
    "why": ["why", "run", "--fixes", "1", "--json", "-q"],
    "doctor": ["doctor", "--json"],
    "targets": ["targets", "--json"],
    "search": SEARCH,  # a finished run, which prints what it found
    "apply": ["apply", *JOB, "--plan", "uniform:keep=0.5", "--out", "half"],
}
FILES = {
    "result": "run/result.json",
    "pareto": "run/pareto.json",
    "machine": "run/machine.json",
    "trial": "run/trials.jsonl",
    "fact": "run/facts.jsonl",
    "progress": "run/progress.json",
    "manifest": "run/bundle/manifest.json",
    "preprocess": "run/bundle/preprocess.json",
    "task": "run/bundle/task.json",
    "labels": "run/bundle/labels.json",
    "shapes": "run/bundle/shapes.json",
}


def closed(schema: Any) -> Any:
    """Return a schema that allows no key it does not name."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    return {"additionalProperties": False, **inner} if "properties" in schema else inner


def strict(text: str) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def check(value: Any, name: str) -> None:
    jsonschema.Draft202012Validator(closed(schemas.schema(name))).validate(value)


def command(*arguments: str) -> str:
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert application.run(arguments) == 0
    return printed.getvalue()


@contextlib.contextmanager
def searched_in(folder: Path, *options: str) -> Iterator[Path]:
    """Yield a folder with a finished search, made on the fake device; the current one."""
    (folder / "net.py").write_text(NET)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HIRELC_DEPLOY_CACHE", str(folder / "cache"))
        for module in (workplace, api, targets):
            patch.setattr(module, "open_target", lambda target: FakeBackend())
        command(*SEARCH, *options)
        yield folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with searched_in(tmp_path_factory.mktemp("schemas")) as folder:
        yield folder


@pytest.mark.parametrize("name", schemas.NAMES)
def test_a_schema_is_one(name: str) -> None:
    schema = schemas.schema(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["description"].endswith(".")
    assert json.loads(command("schema", name)) == schema


def test_schemas_are_listed_and_a_wrong_name_gets_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert [line.split()[0] for line in command("schema").splitlines()] == list(schemas.NAMES)
    for wrong, says in (("reslt", "did you mean result?"), ("", "lists them"), ("../plan", "")):
        assert application.run(["schema", wrong]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"hirelc-deploy: schema {wrong!r}: there is none of this name; ")
        assert says in error
        assert len(error.splitlines()) == 1


def test_every_command_that_prints_json_has_a_schema() -> None:
    def with_json(group: Any, before: str = "") -> Iterator[str]:
        for name, one in group.commands.items():
            if any("--json" in parameter.opts for parameter in one.params):
                yield f"{before}{name}"
            if hasattr(one, "commands"):
                yield from with_json(one, f"{before}{name} ")

    assert set(with_json(typer.main.get_command(application.app))) == set(schemas.COMMANDS)
    assert set(schemas.COMMANDS.values()) <= set(schemas.NAMES)
    assert schemas.schema("apply")["properties"] == schemas.schema("search")["properties"]


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_a_command_prints_is_as_its_schema_says(name: str, place: Path) -> None:
    check(strict(command(*OUTPUTS[name])), name)


@pytest.mark.parametrize("name", FILES)
def test_what_a_run_and_its_bundle_hold_is_as_their_schemas_say(name: str, place: Path) -> None:
    text = (place / FILES[name]).read_text("utf-8")
    values = [strict(line) for line in text.splitlines()] if FILES[name].endswith("l") else [strict(text)]
    assert values
    for value in values:
        check(value, name)


def test_an_old_run_is_as_the_schemas_say() -> None:
    old = Path(__file__).parent / "data" / "run_schema_1"
    for line in (old / "trials.jsonl").read_text("utf-8").splitlines():
        check(json.loads(line), "trial")
    for line in (old / "facts.jsonl").read_text("utf-8").splitlines():
        check(json.loads(line), "fact")


def test_files_that_a_run_seldom_has_are_as_their_schemas_say(place: Path) -> None:
    command("export", "run", "--format", "tensorrt", "--out", "trt")
    check(strict((place / "trt/forms.json").read_text("utf-8")), "forms")
    check({"keep": {"a": 0}, "precision": {"b": "int4"}}, "plan")
    check(CompressionPlan({"a": 3}, pattern="all", trained_rounding=True).to_dict(), "plan")
    failed = outcome_to_dict(Failed("0", "F2", "export", "refused", {"slice": 0.1}))
    plan = CompressionPlan().to_dict()
    line = {"schema_version": 1, "trial": 1, "time": "", "plan": plan, "fidelity": "F2", "context": ""}
    check({**line, "outcome": failed}, "trial")
    with pytest.raises(jsonschema.ValidationError):
        check({"keep": {"a": -1}}, "plan")
    with pytest.raises(jsonschema.ValidationError):
        check({**line, "outcome": {**failed, "kind": "lost"}}, "trial")


def test_pictures_that_are_not_cropped_are_described(place: Path) -> None:
    from hirelc_deploy.inputs.data.preprocess import Preprocess

    fields = PreprocessConfig((3, 8, 8), geometry="letterbox").overrides()
    usual = json.loads((place / "run/bundle/preprocess.json").read_text("utf-8"))
    check(Preprocess.from_dict({**usual, **fields, "pad_value": 0, "from_pictures": False}).to_dict(), "preprocess")


def test_what_boards_said_is_as_its_schema_says() -> None:
    backend = FakeBackend()
    found = targets.CheckedBoards(
        targets.BUILT_IN[0], {"me@board": describe(backend)}, backend.precisions(), {"me@board": 0.5}
    )
    check(strict(json_text(found.to_dict(), indent=1)), "targets-add")


def test_what_is_no_number_is_null() -> None:
    assert strict(json_text({"a": [float("nan"), float("inf"), 1, True, "x", None], "b": (1.5,)}, indent=1)) == {
        "a": [None, None, 1, True, "x", None],
        "b": [1.5],
    }


def test_a_comparison_of_one_evaluation_is_drawn(place: Path) -> None:
    command(*COMPARE[:-1], "1", "--out", "one", "--json", "-q")
    assert (place / "one/compare.html").is_file()


def test_a_comparison_after_training_is_drawn_and_as_its_schema_says(place: Path) -> None:
    strategies = ["--strategies", "uniform,random", "--seeds", "1", "--speedups", "1.1", "--trials", "1"]
    found = json.loads(command("compare", "run", *strategies, "--after-training", "--out", "trained", "--json", "-q"))
    check(found, "compare")
    rows = found["after_training"]["budgets"][0]["strategies"]
    assert [row["strategy"] for row in rows][:2] == ["uniform", "random"]
    page = (place / "trained/compare.html").read_text("utf-8")
    assert "After training, at equal seconds" in page
    assert page.count("<td>solver, all else training</td>") == 1


def test_the_page_for_agents_names_commands_and_exit_codes_that_exist() -> None:
    page = command("skill")
    assert page == schemas.skill()
    assert len(page.splitlines()) <= 80
    known = set(typer.main.get_command(application.app).commands)  # type: ignore[attr-defined]
    used = {part.split()[0].strip("`,") for part in page.split("`hirelc-deploy ")[1:]}
    assert used <= known
    assert known - used <= {"demo", "report", "compare", "profile", "skill"}
    assert all(f"| {code} |" in page for code in (0, 1, 2, 3, 4, 130))
