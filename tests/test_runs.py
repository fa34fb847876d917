"""Run directories: nothing finished is lost, nothing foreign is touched, and old ones are still read."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_problem import Toy

from hirelc_deploy.errors import InputError
from hirelc_deploy.outcome import Failed, Fidelity, Measured, Outcome
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.runs import Run, atomic_path, write_atomic
from hirelc_deploy.strategies.baselines import make_strategy
from hirelc_deploy.strategies.loop import run_search

OLD_RUN = Path(__file__).parent / "data" / "run_schema_1"
OPTIONS = 'strategy = "hirelc"\nseed = 3\n\n[limits]\nmax_drop = 1.0\n'


def plan(width: int) -> CompressionPlan:
    return CompressionPlan({"conv1": width})


def measure(asked: CompressionPlan, fidelity: Fidelity) -> Outcome:
    return Measured(asked.digest, fidelity, 0.1 + 0.2, 1 / 3, 10, 20, predicted_ms=0.7, seconds={"slice": 0.1})


def never(asked: CompressionPlan, fidelity: Fidelity) -> Outcome:
    raise AssertionError("the journal should have answered")


def fill(directory: Path, trials: int = 3) -> None:
    with Run.open(directory, OPTIONS, {"cpu": "x"}) as run:
        for width in range(1, trials + 1):
            run.evaluate_once(plan(width), "F1", measure)
        run.remember("tables", lambda: {"a": [1.5]})


def test_a_finished_trial_is_answered_from_the_journal_in_the_next_process(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", OPTIONS, {}) as run:
        first = run.evaluate_once(plan(4), "F1", measure)
        assert run.evaluate_once(plan(4), "F1", never) is first
    with Run.open(tmp_path / "run", OPTIONS, {}) as run:
        assert run.evaluate_once(plan(4), "F1", never) == first == measure(plan(4), "F1")


def test_fidelity_and_context_are_part_of_what_is_remembered(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", OPTIONS, {}) as run:
        run.evaluate_once(plan(4), "F1", measure, "machine a")
        run.evaluate_once(plan(4), "F2", measure, "machine a")
        run.evaluate_once(plan(4), "F1", measure, "machine b")
        assert [(t.trial, t.fidelity, t.context) for t in run.trials] == [
            (1, "F1", "machine a"),
            (2, "F2", "machine a"),
            (3, "F1", "machine b"),
        ]


def test_failures_are_kept_and_exceptions_are_not(tmp_path: Path) -> None:
    def broken(asked: CompressionPlan, fidelity: Fidelity) -> Outcome:
        raise KeyboardInterrupt

    failed = Failed(plan(1).digest, "F1", "slice", "groups=4 needs a multiple of 4", {"slice": 0.1})
    with Run.open(tmp_path / "run", OPTIONS, {}) as run:
        run.evaluate_once(plan(1), "F1", lambda p, f: failed)
        with pytest.raises(KeyboardInterrupt):
            run.evaluate_once(plan(2), "F1", broken)
    assert [t.outcome for t in Run.read(tmp_path / "run").trials] == [failed]


def test_other_steps_are_remembered_as_json_gives_them_back(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", OPTIONS, {}) as run:
        first = run.remember("times", lambda: {"ms": (1.5, 0.1 + 0.2), "none": None})
    with Run.open(tmp_path / "run", OPTIONS, {}) as run:
        again = run.remember("times", lambda: pytest.fail("computed twice"))
    assert first == again == {"ms": [1.5, 0.1 + 0.2], "none": None}


@pytest.mark.parametrize("name", ["trials.jsonl", "facts.jsonl"])
def test_a_line_torn_at_any_byte_costs_that_line_only(tmp_path: Path, name: str) -> None:
    whole = tmp_path / "whole"
    fill(whole)
    content = (whole / name).read_bytes()
    last = content[:-1].rfind(b"\n") + 1
    for cut in range(last, len(content), 29):
        torn = tmp_path / f"torn{cut}"
        shutil.copytree(whole, torn)
        (torn / name).write_bytes(content[:cut])
        kept = 2 if name == "trials.jsonl" else 3
        assert len(Run.read(torn).trials) == kept
        with Run.open(torn, OPTIONS, {}) as run:
            assert len(run.trials) == kept
            assert run.remember("tables", lambda: "anew") == ("anew" if name == "facts.jsonl" else {"a": [1.5]})
            run.evaluate_once(plan(9), "F1", measure)
        numbers = [json.loads(line)["trial"] for line in (torn / "trials.jsonl").read_text().splitlines()]
        assert numbers == list(range(1, kept + 2))


def test_zeros_that_a_power_loss_leaves_at_the_end_are_cut_off(tmp_path: Path) -> None:
    fill(tmp_path / "run")
    with (tmp_path / "run" / "trials.jsonl").open("ab") as file:
        file.write(b"\0" * 40 + b"\n")
    with Run.open(tmp_path / "run", OPTIONS, {}) as run:
        assert len(run.trials) == 3
    assert b"\0" not in (tmp_path / "run" / "trials.jsonl").read_bytes()


def test_a_damaged_line_in_the_middle_is_named_and_nothing_is_changed(tmp_path: Path) -> None:
    fill(tmp_path / "run")
    journal = tmp_path / "run" / "trials.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[1] = b"}" + lines[1]
    journal.write_bytes(b"".join(lines))
    with pytest.raises(InputError, match=r"trials\.jsonl, line 2: damaged"):
        Run.open(tmp_path / "run", OPTIONS, {})
    assert journal.read_bytes() == b"".join(lines)
    lines[1] = b'{"schema_version": 1, "trial": 2}\n'
    journal.write_bytes(b"".join(lines))
    with pytest.raises(InputError, match=r"line 2: not a trial"):
        Run.open(tmp_path / "run", OPTIONS, {})


def test_a_journal_of_a_newer_program_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "run")
    journal = tmp_path / "run" / "trials.jsonl"
    journal.write_text(journal.read_text().replace('"schema_version": 1, "trial"', '"schema_version": 2, "trial"'))
    with pytest.raises(InputError, match="line 1: schema version 2, this program reads version 1"):
        Run.read(tmp_path / "run")


def test_an_old_run_is_still_read_and_resumed(tmp_path: Path) -> None:
    shutil.copytree(OLD_RUN, tmp_path / "run")
    with Run.open(tmp_path / "run", OPTIONS, {"cpu": "another"}) as run:
        assert run.machine == {"cpu": "made up", "cores": 2}
        assert [(t.trial, t.fidelity, type(t.outcome).__name__) for t in run.trials] == [
            (1, "F1", "Measured"),
            (2, "F1", "Failed"),
            (3, "F2", "Measured"),
        ]
        wide = CompressionPlan({"layer1.0.conv1": 32, "layer1.1.conv1": 48})
        outcome = run.evaluate_once(wide, "F2", never, "selection-a")
        assert isinstance(outcome, Measured)
        assert (outcome.median_ms, outcome.ratio_low, outcome.size_bytes) == (1.31, 0.2, 160000)
        assert run.remember("whole-network times", lambda: None) == [1.5, 2.25]


def test_other_options_are_refused_by_name(tmp_path: Path) -> None:
    fill(tmp_path / "run")
    with pytest.raises(InputError, match=r"limits\.max_drop = 1\.0 then, 2\.0 now\).*another --out"):
        Run.open(tmp_path / "run", OPTIONS.replace("1.0", "2.0"), {})
    with pytest.raises(InputError, match=r"batch = 'unset' then, 8 now; .*seed = 3 then, 'unset' now"):
        Run.open(tmp_path / "run", OPTIONS.replace("seed = 3", "batch = 8"), {})
    Run.open(tmp_path / "run", "# a remark\nseed = 3\nstrategy = 'hirelc'\nlimits.max_drop = 1.0", {}).close()


def test_an_option_that_an_older_program_lacked_changes_nothing_where_it_is_off(tmp_path: Path) -> None:
    fill(tmp_path / "run")
    Run.open(tmp_path / "run", f"search.precisions = false\n{OPTIONS}", {}).close()
    with pytest.raises(InputError, match=r"search\.precisions = 'unset' then, True now"):
        Run.open(tmp_path / "run", f"search.precisions = true\n{OPTIONS}", {})


def test_a_folder_with_other_files_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"holds 'thesis\.tex' and is not a run"):
        Run.open(tmp_path, OPTIONS, {})
    (tmp_path / "config.toml").write_text("title = 'a web site'")
    with pytest.raises(InputError, match="not a run"):
        Run.open(tmp_path, OPTIONS, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.toml", "thesis.tex"]
    with pytest.raises(InputError, match="not a run directory"):
        Run.read(tmp_path)


def test_a_run_whose_creation_was_cut_short_is_created_anew(tmp_path: Path) -> None:
    fill(tmp_path / "run", trials=0)
    (tmp_path / "run" / "config.toml").unlink()
    (tmp_path / "run" / ".config.toml.77.partial").write_text("stra")
    fill(tmp_path / "run")
    assert not (tmp_path / "run" / ".config.toml.77.partial").exists()
    assert len(Run.read(tmp_path / "run").trials) == 3


def test_places_that_cannot_be_written_are_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for directory in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(InputError, match=str(directory)):
            Run.open(directory, OPTIONS, {})


def test_a_full_disk_is_said_and_leaves_the_finished_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    fill(tmp_path / "run")
    with Run.open(tmp_path / "run", OPTIONS, {}) as run, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match=r"trials\.jsonl: cannot be written \(No space left on device\)"):
            run.evaluate_once(plan(8), "F1", measure)
    with Run.open(tmp_path / "run", OPTIONS, {}) as run:
        assert [t.plan for t in run.trials][:3] == [plan(1), plan(2), plan(3)]


def test_two_processes_cannot_write_one_run_and_reading_needs_no_lock(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from hirelc_deploy.runs import Run\n"
        f"run = Run.open(Path({str(tmp_path / 'run')!r}), '', {{}}); print('open', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(InputError, match="another process is writing this run"):
            Run.open(tmp_path / "run", "", {})
        assert Run.read(tmp_path / "run").trials == []
    finally:
        other.kill()
        other.communicate()
    Run.open(tmp_path / "run", "", {}).close()


def test_a_file_is_there_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write_atomic(path, b"first")

    def fail(partial: Path) -> None:
        partial.write_bytes(b"half of the sec")
        raise RuntimeError("died")

    with pytest.raises(RuntimeError), atomic_path(path) as partial:
        fail(partial)
    assert path.read_bytes() == b"first"
    with atomic_path(path) as partial:
        partial.write_bytes(b"second")
        assert path.read_bytes() == b"first"
    assert path.read_bytes() == b"second"
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_the_front_is_rewritten_whole(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", OPTIONS, {}) as run:
        run.write_pareto({"F1": [(plan(2), measure(plan(2), "F1"))]})
        run.write_pareto({"F1": [], "F2": [(plan(3), measure(plan(3), "F2"))]})
    value: dict[str, Any] = json.loads((tmp_path / "run" / "pareto.json").read_text())
    assert value["schema_version"] == 1
    assert value["fronts"]["F1"] == []
    assert CompressionPlan.from_dict(value["fronts"]["F2"][0]["plan"]) == plan(3)
    assert value["fronts"]["F2"][0]["outcome"]["accuracy"] == 1 / 3


def search_toy(directory: Path, evaluate: Callable[[Toy, CompressionPlan, Fidelity], Outcome] = Toy.evaluate) -> None:
    """Search a toy in a run directory and write the plan it ends with."""
    toy = Toy(1, blocks=2)
    strategy = make_strategy("hirelc", toy.problem, 0.45 * toy.problem.uncut_ms, 3)
    with Run.open(directory, "", {}) as run:
        result = run_search(
            toy.problem,
            strategy,
            lambda p, f: run.evaluate_once(p, f, lambda p, f: evaluate(toy, p, f)),
            f1_evaluations=30,
            f2_evaluations=3,
        )
        assert result.best is not None
        write_atomic(directory / "plan.json", json.dumps(result.best[0].to_dict()))


def search_and_be_killed(directory: Path, evaluations: int) -> None:
    """What the killed process runs: the same search, with SIGKILL in the middle of an evaluation."""

    def deadly(toy: Toy, asked: CompressionPlan, fidelity: Fidelity) -> Outcome:
        if len(toy.calls) == evaluations:
            os.kill(os.getpid(), signal.SIGKILL)
        return toy.evaluate(asked, fidelity)

    search_toy(directory, deadly)


def test_killed_twice_in_the_middle_a_search_ends_with_the_plan_of_an_undisturbed_one(tmp_path: Path) -> None:
    search_toy(tmp_path / "undisturbed")
    for evaluations, finished in ((5, 5), (14, 19)):
        ended = subprocess.run([sys.executable, __file__, str(tmp_path / "killed"), str(evaluations)], check=False)
        assert ended.returncode == -signal.SIGKILL
        assert len(Run.read(tmp_path / "killed").trials) == finished
    search_toy(tmp_path / "killed")

    def outcomes(directory: Path) -> list[tuple[str, Fidelity, Outcome]]:
        return [(t.plan.digest, t.fidelity, t.outcome) for t in Run.read(directory).trials]

    assert len(outcomes(tmp_path / "undisturbed")) == 33
    assert outcomes(tmp_path / "killed") == outcomes(tmp_path / "undisturbed")
    assert (tmp_path / "killed" / "plan.json").read_bytes() == (tmp_path / "undisturbed" / "plan.json").read_bytes()


if __name__ == "__main__":
    search_and_be_killed(Path(sys.argv[1]), int(sys.argv[2]))


def fails_in(folder: Path, first: Callable[[Run], object]) -> None:
    with Run.open(folder, OPTIONS, {}) as run:
        first(run)
        raise InputError("an item of the data set cannot be read.")


@pytest.mark.parametrize("is_there", [False, True])
def test_a_new_run_whose_input_is_bad_before_anything_is_judged_leaves_nothing(tmp_path: Path, is_there: bool) -> None:
    folder = tmp_path / "run"
    if is_there:
        folder.mkdir()
    with pytest.raises(InputError):
        fails_in(folder, lambda run: (run.remember("contents", lambda: 1), (folder / "files").mkdir()))
    assert folder.exists() == is_there
    assert not is_there or list(folder.iterdir()) == []


def test_a_run_that_was_begun_before_or_has_a_trial_stays(tmp_path: Path) -> None:
    Run.open(tmp_path / "begun", OPTIONS, {}).close()
    with pytest.raises(InputError):
        fails_in(tmp_path / "begun", lambda run: None)
    with pytest.raises(InputError):
        fails_in(tmp_path / "judged", lambda run: run.evaluate_once(plan(3), "F1", measure))
    for name in ("begun", "judged"):
        assert Run.read(tmp_path / name).config_text == OPTIONS
