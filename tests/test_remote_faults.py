"""Each known fault between a host and a board ends as it should, and leaves nothing on the board."""

from __future__ import annotations

from pathlib import Path

import pytest
from remote_fault_cases import CASES, Case, run_case
from remote_fault_cases import why_not as why_not_this

from hirelc_deploy.testing.loopback import why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.mark.parametrize("one", [case for case in CASES if case.seconds <= 3.0], ids=lambda case: case.name)
def test_the_fault_ends_as_it_should_and_leaves_nothing_behind(one: Case, tmp_path: Path) -> None:
    if why_not_this(one):
        pytest.skip(str(why_not_this(one)))
    assert run_case(one, tmp_path)["leftovers"] == []
