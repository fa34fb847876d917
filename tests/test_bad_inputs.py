from __future__ import annotations

from pathlib import Path

import pytest
from bad_input_cases import CASES, Case, attempt, complaints


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_bad_input_gets_one_sentence_and_its_exit_code_and_touches_nothing(case: Case, tmp_path: Path) -> None:
    assert complaints(case, attempt(case, tmp_path)) == []


def test_what_a_command_must_not_do_is_noticed(tmp_path: Path) -> None:
    case = Case("accepted", ["targets", "--json"], ("refused",), prepare=lambda folder: None)
    wrong = " ".join(complaints(case, attempt(case, tmp_path)))
    assert "'refused' is not said" in wrong
    assert "exit code 0, not 2" in wrong
    assert "not one sentence" in wrong


def test_every_case_has_a_name_of_its_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 45
