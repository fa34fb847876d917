from __future__ import annotations

from pathlib import Path

import bad_input_cases
import pytest
from bad_input_cases import Case, attempt, complaints
from bad_task_cases import CALLS, COMMANDS, Call, attempt_call


@pytest.mark.parametrize("case", COMMANDS, ids=[case.name for case in COMMANDS])
def test_a_bad_task_or_data_set_gets_one_sentence_and_touches_nothing(case: Case, tmp_path: Path) -> None:
    assert complaints(case, attempt(case, tmp_path)) == []


@pytest.mark.parametrize("call", CALLS, ids=[call.name for call in CALLS])
def test_a_call_of_python_raises_the_same_sentence_and_touches_nothing(call: Call, tmp_path: Path) -> None:
    assert complaints(call, attempt_call(call, tmp_path)) == []


def test_what_a_call_must_not_do_is_noticed(tmp_path: Path) -> None:
    def leaves_a_file() -> None:
        (tmp_path / "left.txt").write_text("x")
        raise OSError("no sentence")

    call = Call("raises", leaves_a_file, ("refused",))
    wrong = " ".join(complaints(call, attempt_call(call, tmp_path)))
    for word in ("'refused' is not said", "exit code 1, not 2", "a traceback", "left.txt was left behind"):
        assert word in wrong


def test_every_case_has_a_name_of_its_own() -> None:
    names = [case.name for case in (*COMMANDS, *CALLS)]
    assert len(set(names)) == len(names) >= 200
    assert not set(names) & {case.name for case in bad_input_cases.CASES}
