"""In: disks, streams, locales and files as users have them. Out: proof that commands work, or say what is wrong."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hirelc_deploy import api, errors
from hirelc_deploy.cli import application
from hirelc_deploy.cli.application import run
from hirelc_deploy.config import JobConfig
from hirelc_deploy.deliver.read import json_object
from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.models.source import ModelSource
from hirelc_deploy.measure import targets, worker
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.progress import Progress
from hirelc_deploy.user_code import parse_arguments

# Disks


def failing(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    """Let every command meet this error."""

    def meets(*_: object, **__: object) -> int:
        raise error

    monkeypatch.setattr(application, "app", meets)
    application.app.info = type("Info", (), {"name": "hirelc-deploy"})  # type: ignore[attr-defined]


def test_a_disk_that_takes_no_more_files_is_a_full_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = os.statvfs(tmp_path)
    none_left = os.statvfs_result((*usual[:5], 100, 0, 0, *usual[8:]))
    monkeypatch.setattr(os, "statvfs", lambda place: none_left if "small" in str(place) else usual)
    (tmp_path / "small").mkdir()
    assert errors.fullest([tmp_path, tmp_path / "small" / "new"]) == (tmp_path / "small" / "new", 0)


TROUBLE = {
    "quota": (
        OSError(errno.EDQUOT, "Disk quota exceeded", "files/a.onnx"),
        "files/a.onnx: your quota there is used up",
    ),
    "long name": (
        OSError(errno.ENAMETOOLONG, "File name too long", "o" * 5000),
        "the name is too long; give a shorter",
    ),
    "elsewhere": (OSError(errno.ENOSPC, "No space left on device"), "what is printed: its disk is full"),
}


@pytest.mark.parametrize("kind", TROUBLE)
def test_what_a_disk_refuses_is_said_with_what_to_do(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error, sentence = TROUBLE[kind]
    failing(monkeypatch, error)
    usage = errors.shutil.disk_usage("/")
    monkeypatch.setattr(errors.shutil, "disk_usage", lambda place: usage._replace(free=10**12))
    assert run(["apply", "--out", "new"]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert len(said) < 300


def test_a_machine_without_a_folder_for_temporary_files_is_told_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")
    failing(monkeypatch, error)

    def none() -> str:
        raise error

    monkeypatch.setattr(application.tempfile, "gettempdir", none)
    assert run(["inspect"]) == 2
    assert "TMPDIR names one to write to" in capsys.readouterr().err


def test_a_user_without_a_home_has_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    monkeypatch.chdir(tmp_path)
    assert targets.targets_file({}) == tmp_path / ".config" / "hirelc-deploy" / "targets.toml"


def test_a_name_in_bytes_that_are_no_text_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", os.fsdecode(b"b\xe9d")]) == 2
    assert "b?d: holds bytes that are no text here" in capsys.readouterr().err


# Streams


class Gone(io.StringIO):
    """A stream whose reader has gone."""

    def write(self, _: str) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_progress_that_nobody_reads_ends_no_work() -> None:
    progress = Progress(Gone(), line_seconds=0)
    with progress.stage("work"):
        assert list(progress.track([1, 2], "steps")) == [1, 2]
    assert progress.quiet


def in_a_process(code: str, folder: Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command line whose `app` is replaced, which spares the imports of torch."""
    program = f"""
import os, sys
from hirelc_deploy.cli import application
def app(*_, **__):
{code}
app.info = type("Info", (), {{"name": "hirelc-deploy"}})
application.app = app
sys.argv = ["hirelc-deploy"]
application.main()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **options.pop("environment", {})}  # type: ignore[dict-item]
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=folder, env=environment, text=True, check=False, **options)  # type: ignore[call-overload, no-any-return]


def test_closed_streams_leave_the_files_that_are_written_alone(tmp_path: Path) -> None:
    code = "    file = open('kept', 'w'); print('text'); os.write(1, b'from C'); file.write('mine'); file.close()"
    done = in_a_process(code, tmp_path, preexec_fn=lambda: (os.close(1), os.close(2)))
    assert done.returncode == 0
    assert (tmp_path / "kept").read_text() == "mine"


def test_names_of_any_alphabet_are_printed_in_any_locale(tmp_path: Path) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    done = in_a_process("    print('\\u6570')", tmp_path, environment=plain, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\u6570\n", "")


# Files with a mark, and the current folder


def test_files_that_people_edit_may_begin_with_a_mark_and_end_lines_as_windows_does(tmp_path: Path) -> None:
    text = json.dumps({"schema_version": 1, "keep": {"a": 4}}, indent=1).replace("\n", "\r\n")
    (tmp_path / "plan.json").write_bytes(text.encode("utf-8-sig"))
    assert CompressionPlan.read(tmp_path / "plan.json").keep == {"a": 4}
    assert json_object(tmp_path / "plan.json")["keep"] == {"a": 4}
    toml = 'schema_version = 1\r\n[model]\r\nspec = "a.py:b"\r\n[data]\r\nspec = "synthetic:8"\r\n'
    (tmp_path / "config.toml").write_bytes(toml.encode("utf-8-sig"))
    assert JobConfig.read(tmp_path / "config.toml").model.spec == "a.py:b"
    (tmp_path / "targets.toml").write_bytes(b'\xef\xbb\xbf[pi]\r\nbackend = "onnxruntime_arm"\r\n')
    new = targets.new_target("pi", ["me@pi"], "raspberrypi5")
    targets.add_target(tmp_path / "targets.toml", new, replace=True)
    assert targets.read_targets(tmp_path / "targets.toml")["pi"].hosts == ("me@pi",)


def test_a_factory_that_goes_to_another_folder_takes_nobody_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wandering.py").write_text(
        "import os\nfrom torch import nn\ndef net():\n    os.chdir('/')\n    return nn.Conv2d(3, 4, 3)\n"
    )
    ModelSource("wandering.py:net").load()
    assert Path.cwd() == tmp_path


# What is written on the command line


def test_words_of_python_are_values_too() -> None:
    given = parse_arguments(["bias=False", "norm=None", "size=(3, 4)", "name='a'", "act=relu", "flag=true"])
    assert given == {"bias": False, "norm": None, "size": (3, 4), "name": "a", "act": "relu", "flag": True}


MEANT = {
    "torchvison:resnet18": "did you mean torchvision:resnet18",
    "hfhub:timm/some": "did you mean hf-hub:timm/some",
    "timm:resnet18": "give --model resnet18",
    "runs/best.pth": "that is a file of weights; give it with --weights",
    "model.safetensors": "that is a file of weights",
    "photos": "that is a folder; give hf:photos",
}


@pytest.mark.parametrize("spec", MEANT)
def test_a_model_that_is_none_is_told_what_was_meant(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(InputError, match=MEANT[spec]):
        ModelSource(spec).load()


def test_a_target_in_capitals_is_meant() -> None:
    with pytest.raises(InputError, match="Did you mean 'cpu'"):
        targets.find_target("CPU", {})


def test_a_model_without_outputs_is_refused() -> None:
    empty = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 0))
    with pytest.raises(InputError, match="its answer is empty"):
        api.inspect(empty, input_size=(3, 8, 8))
    assert torch.is_grad_enabled()


# Processors

CPUINFO = {
    "cpu\t\t: POWER9 (raw), altivec supported\n": "POWER9 (raw), altivec supported",
    "processor\t: 0\nisa\t: rv64imafdc\nuarch\t: sifive,u74-mc\n": "sifive,u74-mc",
    "system type\t: Loongson\ncpu model\t: ICT Loongson-3\n": "ICT Loongson-3",
    "model name\t: unknown\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n": "CPU implementer 0x41 CPU part 0xd0c",
}


@pytest.mark.parametrize("text", CPUINFO)
def test_processors_of_every_family_have_their_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(text)
    assert worker.hardware(str(tmp_path))["cpu_model"] == CPUINFO[text]
