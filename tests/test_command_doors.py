"""In: commands in surroundings that are not clean. Out: proof that what they print can be relied on."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx
import pytest
import torch
from google.protobuf.message import DecodeError
from torch import nn

from hirelc_deploy import api, errors
from hirelc_deploy.cli import application, run
from hirelc_deploy.compress.onnx_file import export
from hirelc_deploy.errors import InputError
from hirelc_deploy.jobs import doctor
from hirelc_deploy.measure import targets

PRINTING = """
import atexit, os, warnings
from torch import nn
print("=> imported")

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        )
    def forward(self, x):
        print("forward")
        return self.layers(x)

def make():
    print("=> loaded checkpoint (epoch 12)")
    os.system("echo from a program")
    os.write(1, b"from C\\n")
    atexit.register(print, "at the end")
    warnings.warn("a library warns its own developers")
    return Net()
"""


QUIETER = PRINTING.replace('    os.system("echo from a program")\n', "").replace('    os.write(1, b"from C\\n")\n', "")
"""Without what goes past Python."""


def test_with_json_the_standard_output_holds_the_json_alone(tmp_path: Path) -> None:
    (tmp_path / "printing.py").write_text(PRINTING)
    command = [sys.executable, "-m", "hirelc_deploy", "inspect", "--json", "--model", "printing.py:make"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, "--input-size", "3,16,16"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert [unit["size"] for unit in json.loads(done.stdout)["units"]] == [8]
    for text in ("=> imported", "=> loaded checkpoint", "from a program", "from C", "forward", "at the end"):
        assert text in done.stderr
    assert "warns its own developers" not in done.stderr


def test_in_one_process_too_and_the_output_is_given_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "printing_too.py").write_text(QUIETER)
    spec = f"{tmp_path / 'printing_too.py'}:make"
    before = sys.stdout
    assert run(["inspect", "--json", "--model", spec, "--input-size", "3,16,16"]) == 0
    assert sys.stdout is before
    found = capsys.readouterr()
    assert json.loads(found.out)["blocks"]
    assert "=> loaded checkpoint" in found.err
    assert run(["inspect", "--model", spec, "--input-size", "3,16,16"]) == 0
    assert "1 units that can be cut" in capsys.readouterr().out


def test_answers_arrive_also_where_a_model_file_closes_the_output(tmp_path: Path) -> None:
    silent = PRINTING.replace('        print("forward")\n', "").replace(
        "    atexit.register", "    import sys; sys.stdout.close()  # "
    )
    (tmp_path / "net.py").write_text(silent)
    command = [sys.executable, "-m", "hirelc_deploy", "inspect", "--model", "net.py:make", "--input-size", "3,16,16"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "1 units that can be cut" in done.stdout, done.stderr


def test_an_error_with_json_leaves_the_standard_output_empty(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "--json", "--model", "no_such.py:make"]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert "no such file" in found.err


def test_the_processor_has_a_name() -> None:
    says = {finding["what"]: finding["says"] for finding in doctor.examine()}
    assert "None" not in says.get("processor", "")


def test_a_targets_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "targets.toml").write_text('[mine]\nbackend = "onnxruntime_cpu"\nthreads = 2\n', "utf-8-sig")
    assert targets.read_targets(tmp_path / "targets.toml")["mine"].threads == 2


def test_pretrained_is_an_option_and_no_argument_of_the_model() -> None:
    with pytest.raises(InputError, match="pretrained is no --model-arg; give --pretrained, or --weights FILE"):
        api.inspect("resnet18", model_args={"pretrained": True})


def test_the_key_of_weights_is_an_option_of_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "keyed.py").write_text(QUIETER)
    names = {"layers.0.weight": (8, 3, 3, 3), "layers.0.bias": (8,), "layers.4.weight": (4, 8), "layers.4.bias": (4,)}
    state = {name: torch.ones(shape) for name, shape in names.items()}
    torch.save({"model": state, "model_ema": state}, tmp_path / "w.pth")
    command = ["inspect", "--model", f"{tmp_path / 'keyed.py'}:make", "--input-size", "3,16,16"]
    assert run([*command, "--weights", str(tmp_path / "w.pth"), "--weights-key", "model"]) == 0
    assert run([*command, "--weights", str(tmp_path / "w.pth"), "--weights-key", "other"]) == 2
    assert "no weights of this model under --weights-key other; give model or model_ema" in capsys.readouterr().err


# Full disks


def full(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the disk of a folder have no room, and every other one much."""
    usage = errors.shutil.disk_usage(folder)
    monkeypatch.setattr(
        errors.shutil,
        "disk_usage",
        lambda place: usage._replace(free=0 if Path(place).is_relative_to(folder) else 10**12),
    )


@pytest.mark.parametrize("which", ["out", "temporary"])
def test_a_full_disk_is_named_whatever_file_the_error_names(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = {"out": tmp_path / "out", "temporary": tmp_path / "temporary"}
    folders[which].mkdir()
    full(folders[which], monkeypatch)
    monkeypatch.setattr(application.tempfile, "gettempdir", lambda: str(folders["temporary"]))

    def no_room(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "elsewhere" / "read.onnx"))

    monkeypatch.setattr(application, "app", no_room)
    application.app.info = type("Info", (), {"name": "hirelc-deploy"})  # type: ignore[attr-defined]
    assert run(["apply", "--out", str(folders["out"] / "new")]) == 2
    said = capsys.readouterr().err
    assert f"the disk of {folders[which]}" in said
    assert "0.0 MB are free" in said
    assert ("TMPDIR" in said) == (which == "temporary")
    assert "elsewhere" not in said


def test_a_file_that_a_library_could_not_finish_is_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()).eval()

    def cut_short(path: str) -> object:
        raise DecodeError("Error parsing message")

    monkeypatch.setattr(onnx, "load", cut_short)
    with pytest.raises(DecodeError):
        export.export_onnx(model, torch.rand(2, 3, 8, 8), tmp_path / "m.onnx")
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: open("/dev/full", "wb"))  # noqa: SIM115
    with pytest.raises(OSError, match="No space left on device"):
        export.export_onnx(model, torch.rand(2, 3, 8, 8), tmp_path / "m.onnx")
