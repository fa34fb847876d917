from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from hirelc_deploy import _torchvision_guard
from hirelc_deploy.measure import remote, worker

_torchvision_guard.install()
torch.set_num_threads(1)

if any(name.startswith("COVERAGE_PROCESS") for name in os.environ):
    # What a board runs comes through a pipe; under its file's name its lines are counted too. See coverage_boards.ini.
    remote.BOOT = remote.BOOT.replace('"worker.py"', repr(worker.__file__))

HOW_TO_GET = (
    # (words of a reason, what brings it); the first that fits is printed.
    ("sysroot", "benchmarks/arm_sysroot.sh DIR, then HIRELC_DEPLOY_ARM_SYSROOT=DIR"),
    ("OpenSSH", "apt install openssh-server openssh-client"),
    ("qemu", "apt install qemu-user"),
    ("chromium", "apt install chromium"),
    ("extra openvino", "pip install openvino; best in an environment of its own, as .ci/run does"),
    ("Ray", "pip install ray"),
    ("GPU", "a machine with an NVIDIA GPU and its driver"),
    ("NVIDIA", "a machine with an NVIDIA GPU and its driver"),
    ("tensorrt", "pip install 'hirelc-deploy[tensorrt-rtx]'"),
    ("TensorRT", "pip install 'hirelc-deploy[tensorrt-rtx]'"),
    ("tensorboard is not", "pip install 'hirelc-deploy[tensorboard]'"),
    ("mlflow is not", "pip install 'hirelc-deploy[mlflow]'"),
    ("could not import", "pip install 'hirelc-deploy[dev]'"),
    ("is not installed", "pip install 'hirelc-deploy[dev]'"),
    ("root", "run as root"),
    ("CPU", "a CPU that has it"),
)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name every reason for which tests did not run, how many, and how to get what is missing.

    The lines are also appended to the file that HIRELC_DEPLOY_SKIPS names, for a caller that makes several passes.
    """
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        if isinstance(report.longrepr, tuple):
            reasons[" ".join(report.longrepr[2].removeprefix("Skipped: ").split())] += 1
    if not reasons:
        return
    lines = []
    for reason, count in reasons.most_common():
        how = next((how for words, how in HOW_TO_GET if words.lower() in reason.lower()), "")
        lines.append(f"{count:4d} not run: {reason}" + (f"\n          get it: {how}" if how else ""))
    terminalreporter.section("tests that could not run here")
    terminalreporter.write_line("\n".join(lines))
    if file := os.environ.get("HIRELC_DEPLOY_SKIPS"):
        with Path(file).open("a", encoding="utf-8") as kept:
            kept.write("\n".join(lines) + "\n")
