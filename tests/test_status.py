"""How a run stands can be seen from outside, and what it said is kept."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hirelc_deploy.cli import application
from hirelc_deploy.errors import InputError
from hirelc_deploy.outcome import Failed, Fidelity, Measured, Outcome
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.progress import Progress, Step, duration
from hirelc_deploy.results.status import status_of, status_text
from hirelc_deploy.run_log import LOG, PROGRESS, RunLog
from hirelc_deploy.runs import FINALIST, LOCK, Run, writer_of

OLD_RUN = Path(__file__).parent / "data" / "run_schema_1"
COMMAND = "hirelc-deploy search --out run"
HOLDER = """
import sys
from hirelc_deploy.runs import Run
from hirelc_deploy.run_log import RunLog
from hirelc_deploy.progress import Step
from pathlib import Path
run = Run.open(Path("run"), "seed = 0", {})
log = RunLog(run.directory, "hirelc-deploy search --out run")
log.step(Step("recovery of abc", 7, 20, "loss 0.5"))
print("held", flush=True)
sys.stdin.read()
"""


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def plan(width: int) -> CompressionPlan:
    return CompressionPlan({"conv1": width})


def recovered(asked: CompressionPlan, fidelity: Fidelity) -> Outcome:
    width = asked.keep["conv1"]
    return Measured(asked.digest, fidelity, 1 / width, 0.9, 10, 20, ratio=width / 10, size_bytes=100 * width)


def judged(run: Run, width: int, drop: float, keeps: bool) -> None:
    run.evaluate_once(plan(width), "F3", recovered)
    digest = plan(width).digest
    value = {"plan": digest, "drop_points": drop, "drop_error": 0.1, "keeps_limits": keeps}
    run.remember(f"{FINALIST}{digest} on x", lambda: value)


def held(folder: Path) -> subprocess.Popen[str]:
    """Start another process that writes `folder/run` until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER], cwd=folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_run_that_another_process_writes_is_alive_and_a_killed_one_is_not(tmp_path: Path) -> None:
    process = held(tmp_path)
    found = status_of(tmp_path / "run")
    assert (found["state"], found["alive"], found["pid"]) == ("running", True, process.pid)
    assert (found["command"], found["step"], found["done"], found["total"]) == (COMMAND, "recovery of abc", 7, 20)
    assert "now: recovery of abc: 7 of 20  loss 0.5" in status_text(found)
    with pytest.raises(InputError, match="another process is writing this run"):
        Run.open(tmp_path / "run", "seed = 0", {})
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = status_of(tmp_path / "run")
    assert (found["state"], found["alive"], found["pid"]) == ("stopped", False, process.pid)
    assert "killed" in found["why"]
    assert "now:" not in status_text(found)


def test_asking_about_a_run_neither_takes_nor_loses_its_lock(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", "seed = 0", {}) as run:
        before = sorted((path.name, path.stat().st_mtime_ns) for path in run.directory.iterdir())
        assert writer_of(run.directory) == os.getpid()
        assert status_of(run.directory)["alive"]
        assert sorted((path.name, path.stat().st_mtime_ns) for path in run.directory.iterdir()) == before
        code = "from pathlib import Path; from hirelc_deploy.runs import writer_of; print(writer_of(Path('run')))"
        asked = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert asked.stdout == f"{os.getpid()}\n"
    assert writer_of(tmp_path / "run") is None
    assert writer_of(tmp_path / "nowhere") is None


def test_a_run_of_another_machine_is_not_called_dead(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", "seed = 0", {}) as run:
        RunLog(run.directory, COMMAND)
    path = tmp_path / "run" / PROGRESS
    path.write_text(json.dumps({**json.loads(path.read_text()), "host": "elsewhere"}))
    found = status_of(tmp_path / "run")
    assert (found["state"], found["alive"]) == ("unknown", None)
    assert "begun on elsewhere" in status_text(found)
    assert f"last heard of at {found['updated']}" in status_text(found)


def test_the_best_is_the_fastest_that_keeps_the_limits_else_the_one_that_lost_least(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", "seed = 0", {}) as run:
        run.evaluate_once(plan(9), "F1", lambda asked, fidelity: Failed(asked.digest, "F1", "slice", "refused"))
        assert status_of(run.directory)["best"] is None
        run.evaluate_once(plan(1), "F3", recovered)  # no finalist: the guard's
        assert status_of(run.directory)["best"]["keeps_limits"] is None
        judged(run, 2, 5.0, keeps=False)
        judged(run, 3, 4.0, keeps=False)
        assert status_of(run.directory)["best"]["plan"] == plan(3).digest
        judged(run, 6, 0.7, keeps=True)
        judged(run, 5, 0.9, keeps=True)
        found = status_of(run.directory)
        assert found["trials"] == {"F1": 1, "F2": 0, "F3": 5, "failed": 1}
        assert found["best"]["plan"] == plan(5).digest
        assert f"{plan(5).digest}, 2.00 times faster" in status_text(found)
        assert "drop +0.90 on the selection split, keeps the limits" in status_text(found)


def test_a_damaged_progress_file_costs_what_it_says_and_nothing_else(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", "seed = 0", {}) as run:
        RunLog(run.directory, COMMAND)
        run.remember(f"{FINALIST}x", lambda: "no record")
    for content in ("", "[]", '{"schema_version": 1}', '{"schema_version": 1, "seconds": "long"}'):
        (tmp_path / "run" / PROGRESS).write_text(content)
        found = status_of(tmp_path / "run")
        assert (found["command"], found["state"], found["best"]) == (None, "stopped", None)
        assert status_text(found)


def test_an_old_run_is_read_and_a_folder_that_is_no_run_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert application.run(["status", str(OLD_RUN)]) == 0
    assert "older version" in capsys.readouterr().out
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert application.run(["status", str(folder)]) == 2
        error = capsys.readouterr().err
        assert error == (f"hirelc-deploy: {folder}: not a run directory; give the folder a search was told as --out.\n")


def test_every_line_is_kept_with_its_time_and_a_long_log_loses_its_older_half(tmp_path: Path) -> None:
    clock = Clock()
    log = RunLog(tmp_path, COMMAND, clock=clock, log_bytes=2000)
    sizes = []
    for number in range(200):
        clock.now += 60
        log.line(f"line {number}\nof two")
        sizes.append((tmp_path / LOG).stat().st_size)
    assert max(sizes) <= 2000
    lines = (tmp_path / LOG).read_text().splitlines()
    assert lines[-1] == "2027-01-15T11:20:00+00:00 line 199 of two"
    assert [int(line.split()[2]) for line in lines] == list(range(200 - len(lines), 200))
    assert len(lines) > 15


def test_how_far_it_is_is_written_every_few_seconds_and_when_something_else_begins(tmp_path: Path) -> None:
    clock = Clock()
    log = RunLog(tmp_path, COMMAND, clock=clock)

    def done() -> tuple[str, int]:
        found = json.loads((tmp_path / PROGRESS).read_text())
        return found["step"], found["done"]

    for count in range(5):
        clock.now += 1
        log.step(Step("a", count, 5))
    assert done() == ("a", 4)
    log.step(Step("b", 0, 9))
    assert done() == ("b", 0)
    log.step(Step("b", 1, 9))
    assert done() == ("b", 0)
    log.end("interrupted")
    log.line("too late")
    log.step(Step("c"))
    found = json.loads((tmp_path / PROGRESS).read_text())
    assert (found["state"], found["why"], found["step"], found["seconds"]) == ("stopped", "interrupted", "b", 5.0)
    assert (tmp_path / LOG).read_text().splitlines()[-1].endswith("stopped: interrupted")
    RunLog(tmp_path, COMMAND, clock=clock)
    assert json.loads((tmp_path / PROGRESS).read_text())["seconds_before"] == 5.0


def test_a_quiet_command_keeps_its_lines_and_those_said_before_there_was_a_run(tmp_path: Path) -> None:
    moments = iter(range(0, 10_000, 10))
    stream = io.StringIO()
    progress = Progress(stream, quiet=True, clock=lambda: next(moments))
    progress.say("note: said early")
    progress.keep_in(RunLog(tmp_path, COMMAND))
    with progress.stage("importance"):
        pass
    list(progress.track(range(6), "work"))
    lines = [line.split(" ", 1)[1] for line in (tmp_path / LOG).read_text().splitlines()]
    assert lines[:3] == [f"begun: {COMMAND}", "note: said early", "importance ..."]
    assert lines[3].startswith("importance: ")
    assert lines[4].startswith("work: ")
    assert stream.getvalue() == ""


def test_a_full_disk_stops_no_command_at_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path, COMMAND)
    monkeypatch.setattr(Path, "open", lambda *given, **more: (_ for _ in ()).throw(OSError(28, "No space left")))
    log.line("lost")
    log.step(Step("a"))
    log.end()


def test_a_job_keeps_its_log_and_says_how_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hirelc_deploy.jobs import recording

    workplace: Any = type("Workplace", (), {})()
    workplace.track = ()
    workplace.command, workplace.pipeline = COMMAND, type("Pipeline", (), {"progress": Progress(quiet=True)})()
    for error, state, why in (
        (None, "finished", ""),
        (KeyboardInterrupt(), "stopped", "interrupted; the same command resumes."),
        (InputError("bad"), "stopped", "bad"),
        (ValueError("a bug"), "stopped", "ValueError: a bug"),
    ):
        workplace.run = Run.open(tmp_path / "run", "seed = 0", {})
        workplace.run.evaluate_once(plan(1), "F3", recovered)
        expected = contextlib.nullcontext() if error is None else pytest.raises(type(error))
        with expected, recording.recorded(workplace):
            workplace.pipeline.progress.say("at work")
            if error is not None:
                raise error
        found = status_of(tmp_path / "run")
        assert (found["state"], found["why"], found["alive"]) == (state, why, False)
        assert found["log"][-2].endswith(" at work")
    assert writer_of(tmp_path / "run") is None


def test_durations_are_said_as_people_do() -> None:
    assert [duration(seconds) for seconds in (0.4, 59, 200, 3900, -1)] == [
        "0 s",
        "59 s",
        "3 min 20 s",
        "1 h 5 min",
        "0 s",
    ]


def test_the_lock_is_that_of_the_run(tmp_path: Path) -> None:
    with Run.open(tmp_path / "a", "seed = 0", {}), Run.open(tmp_path / "b", "seed = 0", {}) as second:
        second.close()
        assert (tmp_path / "b" / LOCK).exists()
        assert writer_of(tmp_path / "b") is None
        assert writer_of(tmp_path / "a") == os.getpid()
