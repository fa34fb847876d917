"""A task in somebody else's package: installed, held to the contract, and used by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent / "data" / "third_party_task"
CONTRACT = "contract_of_counting.py"

MINE = """
import torch
from torch import nn

def data():
    g = torch.Generator().manual_seed(0)
    items = []
    for number in range(120):
        picture, count = torch.randint(0, 40, (3, 16, 16), generator=g), number % 5
        for place in torch.randperm(16, generator=g)[:count].tolist():
            y, x = 4 * (place // 4), 4 * (place % 4)
            picture[:, y : y + 3, x : x + 3] = 220
        items.append((picture.byte(), torch.tensor(float(count))))
    return {"train": items[:90], "test": items[90:]}

def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(16, 1, 1), nn.Sigmoid(), nn.AvgPool2d(4))
"""

ON_FAKE_DEVICE = """
import sys
from hirelc_deploy.cli import application
from hirelc_deploy.jobs import workplace
from hirelc_deploy.testing.fake_backend import FakeBackend
workplace.open_target = lambda target: FakeBackend()
sys.exit(application.run(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Install the package into a folder of its own, without network, and return what lets Python find it there."""
    folder = tmp_path_factory.mktemp("third-party")
    shutil.copytree(PACKAGE, folder / "source")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "--target", str(folder / "packages"), str(folder / "source")]
    pytest.importorskip("hatchling", reason="hatchling, which builds the package, is not installed")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {
        **os.environ,
        "PYTHONPATH": str(folder / "packages"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HIRELC_DEPLOY_CACHE": str(folder / "cache"),
    }


def test_it_passes_the_contract_suite_that_is_shipped(environment: dict[str, str], tmp_path: Path) -> None:
    shutil.copy(PACKAGE / CONTRACT, tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", CONTRACT]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout


def test_the_command_line_applies_a_plan_with_it(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    options = ["--task", "counting", "--task-arg", "noun=cells", "--recovery-epochs", "3", "--out", "run", "--json"]
    command = ["apply", "--model", "mine.py:net", "--data", "mine.py:data", *options, "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", ON_FAKE_DEVICE, *command, "--plan", "uniform:keep=0.5,precision=int8"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    metric = json.loads(done.stdout)["metric"]
    assert (metric["task"], metric["name"], metric["unit"]) == ("counting", "MAE", "objects")
    assert "MAE" in (tmp_path / "run/report.html").read_text("utf-8")
    assert json.loads((tmp_path / "run/result.json").read_text())["samples"][0]["says"].endswith(" cells")
    check = [sys.executable, "-I", "run/bundle/run.py", "--check"]
    said = subprocess.run(check, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[-1] == "samples reproduced: True"
    assert said[0].endswith(" cells")
