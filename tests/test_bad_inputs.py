from __future__ import annotations

from pathlib import Path

import pytest
from bad_input_cases import CASES, Case, attempt


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_bad_input_gets_one_sentence_and_its_exit_code_and_touches_nothing(case: Case, tmp_path: Path) -> None:
    answer = attempt(case, tmp_path)
    assert "Traceback" not in answer.stdout + answer.stderr
    assert answer.code == case.code, answer.stderr
    if case.code == 1:
        assert answer.stderr == ""
        assert '"ok": false' in answer.stdout
    else:
        assert answer.stderr.startswith("hirelc-deploy: ")
        assert answer.stderr.count("\n") == 1, answer.stderr
        assert answer.stdout == ""
    for word in case.words:
        assert word in answer.sentence
    made = {name for name in answer.after if name not in answer.before}
    if case.keeps_run:
        made = {name for name in made if Path(name).parts[0] != "out"}
    assert not made
    assert all(answer.after.get(name) == content for name, content in answer.before.items())


def test_every_case_has_a_name_of_its_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 45
