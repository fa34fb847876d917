"""Nobody is told of models and machines: ONNX Runtime's telemetry is off wherever this project loads it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import hirelc_deploy

PACKAGE = Path(hirelc_deploy.__file__).parent
FROM = "import sys; sys.path.insert(0, {!r}); import {}"
LOADED_BY = {
    "this tool": "import hirelc_deploy.compress.onnx_file.export",
    "a bundle": FROM.format(str(PACKAGE / "deliver/bundle_template"), "runtime_onnxruntime"),
    "a board": FROM.format(str(PACKAGE / "measure"), "worker, onnxruntime"),
}


def what_is_left_at_home(code: str, home: Path) -> list[Path]:
    home.mkdir()
    told = {"ORT_DISABLE_TELEMETRY", "CI", "XDG_CACHE_HOME", "PYTHONDONTWRITEBYTECODE"}
    environment = {name: value for name, value in os.environ.items() if name not in told}
    environment |= {"HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONPYCACHEPREFIX": str(home.parent)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, timeout=120)
    return [path for path in home.rglob("*") if path.is_file() and "onnxruntime" in str(path)]


@pytest.mark.parametrize("where", LOADED_BY)
def test_the_telemetry_of_the_runtime_is_off(where: str, tmp_path: Path) -> None:
    if not what_is_left_at_home("import onnxruntime", tmp_path / "as it comes"):
        pytest.skip("this ONNX Runtime has no telemetry")
    assert what_is_left_at_home(LOADED_BY[where], tmp_path / "as we load it") == []
