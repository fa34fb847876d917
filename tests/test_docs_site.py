"""The site builds without a warning, and a link that leads nowhere is one."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("mkdocs", "material", "mkdocstrings")

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED),
    reason="needs the extra docs: `make docs`, or pip install -c constraints.txt 'hirelc-deploy[docs]'",
)


def build(folder: Path, out: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = build(ROOT, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    pages = {page.parent.name for page in (tmp_path / "site").rglob("index.html")}
    assert {"tutorial", "api", "cli", "formats", "glossary", "ci"} <= pages
    api = (tmp_path / "site" / "api" / "index.html").read_text("utf-8")
    assert 'id="hirelc_deploy.api.search"' in api
    assert "limits" in api
    assert "--max-drop" in (tmp_path / "site" / "cli" / "index.html").read_text("utf-8")


def test_dead_links_and_anchors_are_errors(tmp_path: Path) -> None:
    for name in ("docs", "mkdocs.yml", "hirelc_deploy", "backends"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, tmp_path / name)
    page = tmp_path / "docs" / "limits.md"
    page.write_text(page.read_text("utf-8") + "\n[a](nowhere.md) and [b](glossary.md#nowhere)\n", "utf-8")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert "nowhere.md" in done.stderr
    assert "#nowhere" in done.stderr
