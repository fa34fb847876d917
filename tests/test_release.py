"""What is released: a wheel and an sdist with everything in them, and metadata that says what they are."""

from __future__ import annotations

import email
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from email.message import Message
from pathlib import Path

import pytest

import hirelc_deploy

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
DATA = (".html.j2", ".md", ".webp", ".jpg", ".json", ".safetensors", ".typed", ".py")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="hatchling, which builds the package, is not installed")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    assert path.name == f"hirelc_deploy-{hirelc_deploy.__version__}-py3-none-any.whl"
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "hirelc_deploy", "backends"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("this is no git checkout, so that no list of files is at hand")
    wanted = {name.removeprefix("backends/") for name in listed.stdout.split()}
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == wanted
    assert {"hirelc_deploy/py.typed", "hirelc_backends/py.typed", "hirelc_deploy/SKILL.md"} <= found
    assert [name for name in found if not name.endswith(DATA)] == []


def test_the_sdist_can_be_tested_and_read(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    pages = {f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY")}
    files = {"pyproject.toml", "LICENSE", "Makefile", "constraints.txt", "mkdocs.yml"}
    assert pages | files | {"tests/test_release.py", "docs/index.md", "docs/tutorial.ipynb"} <= names
    assert not [name for name in names if name.startswith((".venv", "runs", "site", "dist"))]


def test_the_metadata_says_what_it_is(metadata: Message) -> None:
    assert metadata["Version"] == hirelc_deploy.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().startswith("# hirelc-deploy")
    for key in ("Summary", "Keywords", "Author", "Project-URL"):
        assert metadata[key]
    classifiers = metadata.get_all("Classifier")
    assert "Typing :: Typed" in classifiers
    assert [name for name in classifiers if name.startswith("Programming Language :: Python :: 3.")] == [
        f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)
    ]


def test_the_version_has_one_place() -> None:
    assert PROJECT["dynamic"] == ["version"]
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert f"## [{hirelc_deploy.__version__}]" in changes or "## [Unreleased]" in changes


def test_every_extra_is_explained_on_the_first_page() -> None:
    page = (ROOT / "docs" / "index.md").read_text("utf-8")
    assert [extra for extra in PROJECT["optional-dependencies"] if f"`{extra}`" not in page] == []


def test_entry_points_lead_to_what_they_name(wheel: zipfile.ZipFile) -> None:
    groups = [{"": PROJECT["scripts"]["hirelc-deploy"]}, *PROJECT["entry-points"].values()]
    for target in (target for group in groups for target in group.values()):
        module, _, name = target.partition(":")
        path = module.replace(".", "/")
        file = f"{path}.py" if f"{path}.py" in wheel.namelist() else f"{path}/__init__.py"
        assert name in wheel.read(file).decode(), target


def run(*command: str | Path) -> str:
    """Run a command that must succeed; nothing of this checkout or environment is on its path."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV") and "COV" not in k}
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, cwd="/", env=clean
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("tool", ["pip", "uv"])
def test_an_installed_wheel_works_without_the_checkout(built: Path, tmp_path: Path, tool: str) -> None:
    """`.ci/release` does the same with everything that it depends on, and with pipx."""
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed")
    (wheel,) = built.glob("*.whl")
    environment = tmp_path / "environment"
    if tool == "uv":
        run(sys.executable, "-m", "uv", "venv", "-q", "--python", sys.executable, environment)
        run(
            sys.executable, "-m", "uv", "pip", "install", "-q", "--offline", "--no-deps", "--python", environment, wheel
        )
    else:
        run(sys.executable, "-m", "venv", environment)
        run(environment / "bin" / "python", "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel)
    (site,) = environment.glob("lib/python*/site-packages")
    # What it depends on is seen from here, behind its own packages.
    (site / "outer.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n", "utf-8")
    command, python = environment / "bin" / "hirelc-deploy", environment / "bin" / "python"
    assert hirelc_deploy.__version__ in run(command, "--version")
    for module in ("hirelc_deploy", "hirelc_backends"):
        assert str(site) in run(python, "-c", f"import {module}; print({module}.__path__)")
    assert "exit" in run(command, "skill").lower()
    assert "resnet18" in run(command, "inspect", "--model", "resnet18", "--json")
