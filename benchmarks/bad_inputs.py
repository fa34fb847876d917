"""In: the cases of tests/bad_input_cases.py. Out: a Markdown table of what each command is told, and its exit code.

    python benchmarks/bad_inputs.py > benchmarks/results/bad_inputs.md

With --processes every command runs in a process of its own, as a person would run it (some minutes instead of seconds).
"""

from __future__ import annotations

import argparse
import importlib
import platform
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import hirelc_deploy

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
cases: Any = importlib.import_module("bad_input_cases")


def row(case: Any, folder: Path, in_process: bool) -> tuple[str, bool]:
    """Return the table's line of one case, and whether the answer was as it must be."""
    answer = cases.attempt(case, folder, in_process=in_process)
    good = not cases.complaints(case, answer)
    sentence = answer.sentence.replace("|", "\\|").replace("<", "&lt;")
    for place, shown in ((f"{folder.resolve()}/", ""), (str(folder.resolve()), "."), (str(Path.home()), "~")):
        sentence = sentence.replace(place, shown)
    command = shlex.join(argument for argument in ["hirelc-deploy", *case.argv] if argument != "--quiet")
    cells = (case.name, f"`{command}`", str(answer.code), sentence)
    return f"| {' | '.join(cells)} |", good


def main() -> None:
    """Print the table; exit with 1 where an answer is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", action="store_true", help="run every command in a process of its own")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row(case, Path(folder) / str(number), not options.processes) for number, case in enumerate(cases.CASES)]
    bad = [line for line, good in rows if not good]
    print("# Bad inputs\n")
    print(
        f"{len(rows)} commands that cannot be carried out, run with hirelc-deploy {hirelc_deploy.__version__} on "
        f"Python {platform.python_version()}: {len(rows) - len(bad)} were answered with one sentence, the right exit "
        "code and no traceback, and left every file as it was.\n"
    )
    print("Exit codes: 1 the check says no, 2 bad input, 3 target not available, 4 the limits cannot be met.\n")
    print("| case | command | exit code | sentence |\n| --- | --- | --- | --- |")
    print("\n".join(line for line, _ in rows))
    if bad:
        print("\n".join(["Not as it must be:", *bad]), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
