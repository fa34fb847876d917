"""In: the cases of tests/remote_fault_cases.py. Out: what happened, what the user saw, seconds to recover, leftovers.

    python benchmarks/faults.py

Every board is a real sshd on loopback with a home of its own; where the runtime itself misbehaves it is a toy, else it
is ONNX Runtime. Writes results/faults.json and results/faults.md; exit code 1 where a case does not end as it must.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from record import provenance

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
cases: Any = importlib.import_module("remote_fault_cases")
RESULTS = Path(__file__).resolve().parent / "results"


def attempt(case: Any) -> dict[str, Any]:
    """Return the row of one case."""
    reason = cases.why_not(case)
    if reason is not None:
        return {"case": case.name, "what": case.what, "skipped": reason}
    with tempfile.TemporaryDirectory() as folder:
        try:
            return {**cases.run_case(case, Path(folder)), "as_it_must": True}
        except Exception as error:  # a case that fails is a row too
            traceback.print_exc()
            return {"case": case.name, "what": case.what, "as_it_must": False, "user_saw": repr(error), "leftovers": []}


def main() -> int:
    """Run all cases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    started = time.monotonic()
    rows = []
    for case in cases.CASES:
        rows.append(attempt(case))
        print(json.dumps(rows[-1]), flush=True)
    run = [row for row in rows if "skipped" not in row]
    summary = {
        "cases": len(rows),
        "run": len(run),
        "as_they_must": sum(row["as_it_must"] for row in run),
        "hangs": 0 if all(row["as_it_must"] for row in run) else None,
        "leftovers": sum(len(row["leftovers"]) for row in run),
        "seconds": round(time.monotonic() - started, 1),
    }
    record = {**provenance("python benchmarks/faults.py"), "ssh": shutil.which("ssh") is not None, **summary}
    (RESULTS / "faults.json").write_text(json.dumps({**record, "cases": rows, "summary": summary}, indent=1) + "\n")
    (RESULTS / "faults.md").write_text(markdown(rows, summary))
    print(json.dumps(summary))
    return 0 if summary["as_they_must"] == len(run) and not summary["leftovers"] else 1


def markdown(rows: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    """Return the table for people."""
    lines = [
        "# What goes wrong between a host and a board\n",
        f"{summary['run']} cases on loopback boards (real sshd): {summary['as_they_must']} ended as they must, "
        f"{summary['leftovers']} files or processes were left on a board.\n",
        "| what happened | what the user saw | seconds to recover |\n| --- | --- | --- |",
    ]
    for row in rows:
        saw = str(row.get("user_saw", f"skipped: {row.get('skipped')}")).replace("|", "\\|").replace("\n", " ")
        seconds = row.get("seconds_to_recover")
        lines.append(f"| {row['what']} | {saw} | {'' if seconds is None else seconds} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
