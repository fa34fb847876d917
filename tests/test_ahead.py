"""Side by side: the same journal as one after the other, errors seen where they are asked for, and orderly ends."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_pipeline import data_file, make_pipeline  # noqa: F401  (a fixture)

from hirelc_deploy.compress import slicing
from hirelc_deploy.config import Limits, SearchConfig
from hirelc_deploy.deliver.finalists import Search
from hirelc_deploy.errors import InputError
from hirelc_deploy.measure.table import LatencyTable
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.runs import TRIALS
from hirelc_deploy.together.processes import DIES_WITH_RAY, Ahead


def answer(question: str) -> str:
    """Return the question and who answered; some questions take long, raise, or end the process."""
    if question == "slow":
        time.sleep(0.2)
    if question == "raise":
        raise ZeroDivisionError
    if question == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return f"{question} {os.getpid()}"


@pytest.fixture(autouse=True)
def process_that_can_be_copied() -> None:
    if "ray" in sys.modules and sys.version_info >= DIES_WITH_RAY:
        pytest.skip("in Python 3.13 no process is copied that has worked with Ray, as this one has in another test")


@pytest.fixture
def ahead() -> Iterator[Ahead]:
    found = Ahead(answer, 2)
    yield found
    found.close()


def test_answers_come_from_copies_in_any_order_asked(ahead: Ahead):
    ahead.begin(["slow", "a", "b", "c"])
    answers = [ahead.take(question) for question in ("c", "slow", "a", "b")]
    assert [str(found).split()[0] for found in answers] == ["c", "slow", "a", "b"]
    assert str(os.getpid()) not in " ".join(map(str, answers))
    assert len({str(found).split()[1] for found in answers}) == 2


def test_what_was_not_announced_or_raised_is_left_to_who_asks(ahead: Ahead):
    ahead.begin(["raise", "a"])
    assert ahead.take("b") is None
    assert ahead.take("raise") is None
    assert str(ahead.take("a")).startswith("a ")


def test_a_new_announcement_drops_what_had_not_begun(ahead: Ahead):
    ahead.begin(["slow", "slow too", "a"])
    ahead.begin(["b"])
    assert ahead.take("a") is None
    assert str(ahead.take("b")).startswith("b ")
    assert str(ahead.take("slow")).startswith("slow ")


def test_a_copy_that_dies_is_one_sentence(ahead: Ahead):
    ahead.begin(["a", "die", "b"])
    assert str(ahead.take("a")).startswith("a ")
    with pytest.raises(InputError, match=r"died \(SIGKILL, often because the memory is full\).*fewer --jobs"):
        ahead.take("die")


def test_copies_end_with_the_process_that_made_them_and_do_not_hear_ctrl_c(tmp_path: Path):
    code = (
        "import os, signal, sys, time\n"
        "from hirelc_deploy.together.processes import DIES_WITH_RAY, Ahead\n"
        "ahead = Ahead(lambda q: time.sleep(0.3) or str(os.getpid()), 2)\n"
        "ahead.begin(['a', 'b'])\n"
        "time.sleep(0.1)\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "os.killpg(0, signal.SIGINT)\n"
        "print(ahead.take('a'), ahead.take('b'), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=False, capture_output=True, text=True, start_new_session=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    copies = [int(pid) for pid in done.stdout.split()]
    assert len(set(copies)) == 2
    deadline = time.monotonic() + 10
    while any(running(pid) for pid in copies):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def journal(folder: Path) -> list[dict]:  # type: ignore[type-arg]
    """Return the lines of a journal without what a clock said."""
    lines = [json.loads(line) for line in (folder / TRIALS).read_text().splitlines()]
    for line in lines:
        line.pop("time")
        line["outcome"].pop("seconds", None)
    return lines


def test_side_by_side_gives_the_journal_of_one_after_the_other(data_file: Path, tmp_path: Path):  # noqa: F811
    journals = []
    for jobs in (1, 3):
        folder = tmp_path / f"jobs{jobs}"
        pipeline = make_pipeline(data_file, folder)
        pipeline.jobs = jobs
        table = LatencyTable(pipeline.backend, tmp_path / f"table{jobs}.jsonl", 1)
        config = SearchConfig(f1_evaluations=10, finalists=1, options=4)
        Search(pipeline, pipeline.run, table, Limits(speedup=2.0), config).finalists()
        pipeline.run.close()
        assert ("_ahead" in vars(pipeline)) == (jobs > 1)
        journals.append(journal(folder))
    assert journals[0] == journals[1]
    assert sum(line["fidelity"] == "F1" for line in journals[0]) >= 5


def test_a_plan_that_cannot_be_cut_fails_the_same_way_and_a_bug_is_seen(data_file: Path, tmp_path: Path, monkeypatch):  # noqa: F811
    pipeline = make_pipeline(data_file, tmp_path / "run")
    pipeline.jobs = 2
    plans = [slicing.uniform_plan(pipeline.graph, keep, "int8") for keep in (0.5, 0.75)]
    pipeline.begin(plans)
    assert {pipeline.outcome(plan, "F1").plan_digest for plan in plans} == {plan.digest for plan in plans}
    pipeline.begin([*plans, CompressionPlan({"nothing": 1}), CompressionPlan({"nothing": 2})])
    with pytest.raises(InputError, match="nothing"):
        pipeline.outcome(CompressionPlan({"nothing": 1}), "F1")
    assert len(pipeline.run.trials) == 2


def test_a_process_that_has_worked_with_ray_is_not_copied_where_the_copies_would_die(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", sys)
    monkeypatch.setattr("hirelc_deploy.together.processes.DIES_WITH_RAY", (3, 11))
    with pytest.raises(InputError, match="begin a new process"):
        Ahead(answer, 2)
