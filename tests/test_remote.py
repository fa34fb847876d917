"""Backends on a board: a real sshd on loopback, real ONNX Runtime there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hirelc_backends.onnxruntime_arm import NO_DOT_PRODUCTS, OnnxRuntimeArm
from hirelc_backends.onnxruntime_cpu import OnnxRuntimeCpu

from hirelc_deploy.errors import ExportError, InputError
from hirelc_deploy.measure import worker
from hirelc_deploy.measure.backend import Backend, DeviceState, only
from hirelc_deploy.measure.device import LocalDevice
from hirelc_deploy.measure.machine import describe, fingerprint
from hirelc_deploy.measure.pool import PoolBackend
from hirelc_deploy.measure.program import ProgramBackend
from hirelc_deploy.measure.remote import TOO_OLD, Dropped, ssh_problem
from hirelc_deploy.measure.targets import add_target, check_boards, find_target, new_target, open_target
from hirelc_deploy.testing import loopback
from hirelc_deploy.testing.backend_contract import BackendContract, random_images, write_model

needs_sshd = pytest.mark.skipif(loopback.why_not() is not None, reason=str(loopback.why_not()))


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[loopback.LoopbackBoard]:
    made = loopback.LoopbackBoard(tmp_path_factory.mktemp("boards"))
    yield made
    made.kill_everything()
    made.stop()


@pytest.fixture(scope="module")
def remote(board: loopback.LoopbackBoard) -> Iterator[ProgramBackend]:
    real, device = OnnxRuntimeCpu(), board.connect()
    yield ProgramBackend(real.name, real.program, real.precisions_on, device)
    device.close()


@needs_sshd
class TestOnnxRuntimeOnABoard(BackendContract):
    @pytest.fixture(autouse=True)
    def _remote(self, remote: ProgramBackend) -> None:
        self._backend = remote

    def make(self) -> Backend:
        return self._backend


class TestOnnxRuntimeInAProcess(BackendContract):
    """The same without SSH: a backend that has only a program, on this machine."""

    backend_here = ProgramBackend(
        OnnxRuntimeCpu.name, OnnxRuntimeCpu.program, OnnxRuntimeCpu().precisions_on, LocalDevice()
    )

    def make(self) -> Backend:
        return self.backend_here


class TestOnnxRuntimeArm(BackendContract):
    def make(self) -> Backend:
        return OnnxRuntimeArm()


@needs_sshd
def test_a_board_is_described_by_its_own_words_and_shares_no_table_with_others(
    board: loopback.LoopbackBoard, tmp_path: Path
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("Features: asimd asimddp\nCPU implementer: 0x41\nCPU part: 0xd0b\n")
    real, device = OnnxRuntimeCpu(), board.connect(system_root=str(tmp_path))
    there = describe(ProgramBackend(real.name, real.program, real.precisions_on, device))
    device.close()
    assert there["cpu_model"] == "CPU implementer 0x41 CPU part 0xd0b"
    assert there["features"] == ["asimddp"]
    assert fingerprint(there) != fingerprint(describe(real))


@needs_sshd
def test_a_target_on_a_board_is_checked_written_and_opened(
    board: loopback.LoopbackBoard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper = tmp_path / "bin/ssh"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {loopback.SSH} -F {board.config} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", str(wrapper.parent), prepend=":")
    new = new_target("desk", ["board"], "cpu", python=sys.executable)
    checked = check_boards(new)
    assert "onnxruntime" in "\n".join(checked.lines())
    path = tmp_path / "targets.toml"
    add_target(path, checked.target)
    backend = open_target(find_target("desk", {"HIRELC_DEPLOY_TARGETS": str(path)}), say=lambda text: None)
    model = write_model(tmp_path / "model.onnx")
    images = random_images(3)
    np.testing.assert_array_equal(
        only(backend.build(model).infer(images)), only(OnnxRuntimeCpu().build(model).infer(images))
    )


@needs_sshd
def test_the_python_of_a_board_may_be_named_from_its_home_and_have_options(
    board: loopback.LoopbackBoard, tmp_path: Path
) -> None:
    wrapper = board.home / "venv python"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    real, device = OnnxRuntimeCpu(), board.connect(python="~/'venv python' -X utf8")
    backend = ProgramBackend(real.name, real.program, real.precisions_on, device)
    assert backend.availability() is None
    device.close()
    wrapper.unlink()


@needs_sshd
def test_a_pool_answers_like_one_board_and_uses_all_of_them(board: loopback.LoopbackBoard, tmp_path: Path) -> None:
    real = OnnxRuntimeCpu()
    devices = [board.connect(), board.connect(folder=str(board.home / "second"))]
    boards = [ProgramBackend(real.name, real.program, real.precisions_on, device) for device in devices]
    pool = PoolBackend(boards, say=lambda text: None)
    assert pool.availability() is None
    assert pool.side_by_side == 2
    model, images = write_model(tmp_path / "model.onnx"), random_images(200)
    np.testing.assert_array_equal(only(pool.build(model).infer(images)), only(real.build(model).infer(images)))
    with pytest.raises(InputError, match="takes input of shape"):
        pool.build(model).infer(np.zeros((1, 3, 9, 9), np.float32))
    (tmp_path / "bad.onnx").write_text("no")
    with pytest.raises(ExportError, match=r"bad\.onnx"):
        pool.build(tmp_path / "bad.onnx")
    for device in devices:
        device.close()


def test_images_travel_in_pieces_and_come_back_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("hirelc_deploy.measure.program.PIECE_BYTES", 2 * 3 * 8 * 8 * 4)
    model, images = write_model(tmp_path / "model.onnx"), random_images(5)
    found = only(TestOnnxRuntimeInAProcess.backend_here.build(model).infer(images))
    np.testing.assert_array_equal(found, only(OnnxRuntimeCpu().build(model).infer(images)))


def test_a_pool_of_nobody_is_unavailable() -> None:
    class Gone(ProgramBackend):
        def availability(self) -> str | None:
            return "it is switched off."

    gone = Gone("x", Path("x.py"), lambda facts: (), LocalDevice())
    assert PoolBackend([gone, gone], say=lambda text: None).availability() == "it is switched off. it is switched off."


@pytest.mark.parametrize(
    ("features", "remark"),
    [
        ([], NO_DOT_PRODUCTS),
        (None, NO_DOT_PRODUCTS),
        (["asimddp"], "dot products"),
        (["asimddp", "i8mm"], "matrix products"),
    ],
)
def test_arm_precisions_say_what_the_cpu_can_do(features: list[str] | None, remark: str) -> None:
    in_float, integer = OnnxRuntimeArm().precisions_on({"features": features})
    assert (in_float.name, integer.name, integer.activation_type, integer.weight_bits) == ("float", "int8", "int8", 8)
    assert remark in integer.remark


def test_frames_survive_any_cut() -> None:
    sent = [({"a": 1}, b""), ({"do": "x", "text": "é"}, b"12345"), ({}, b"")]
    stream = b"".join(worker.pack(header, data) for header, data in sent)
    for step in (1, 3, 7):
        buffer, found = worker.Buffer(), []
        for start in range(0, len(stream), step):
            frame = buffer.feed(stream[start : start + step])
            while frame is not None:
                found.append(frame)
                frame = buffer.feed(b"")
        assert [({k: v for k, v in header.items() if k != "bytes"}, data) for header, data in found] == sent
    with pytest.raises(worker.Closed):
        worker.Buffer().feed(b"\xff\xff\xff\xff")


def test_a_device_state_is_read_from_the_system_and_ignores_what_is_not_there(tmp_path: Path) -> None:
    nothing = DeviceState.of(worker.state(str(tmp_path)))
    assert (nothing.frequency_khz, nothing.temperature_c, nothing.throttled, nothing.power_w) == (None, None, (), None)
    for name, text in (
        ("sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", "1500000"),
        ("sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq", "1800000"),
        ("sys/class/thermal/thermal_zone0/temp", "48312"),
        ("sys/class/thermal/thermal_zone1/temp", "61250"),
        ("sys/devices/platform/soc/soc:firmware/get_throttled", "0x50005"),
        ("sys/class/hwmon/hwmon3/in1_label", "VDD_IN"),
        ("sys/class/hwmon/hwmon3/in1_input", "5000"),
        ("sys/class/hwmon/hwmon3/curr1_input", "1400"),
    ):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    found = DeviceState.of(worker.state(str(tmp_path)))
    assert (found.frequency_khz, found.temperature_c) == (1_800_000, 61.25)
    assert found.throttled == ("undervoltage", "throttled")  # bits 0 and 2; 16 and 18 are history
    assert found.power_w == 7.0  # 5 V and 1.4 A


def test_what_ssh_says_becomes_what_to_do() -> None:
    assert isinstance(ssh_problem("me@pi", "ssh: connect to host pi port 22: Connection refused", 255), Dropped)
    assert isinstance(ssh_problem("me@pi", "", 255), Dropped)
    assert "python 3.6 is too old" in str(ssh_problem("me@pi", "", TOO_OLD + 36))
    assert "ssh-keygen -R pi" in str(ssh_problem("me@pi", "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @", 255))
    assert "sudo apt install python3" in str(ssh_problem("me@pi", "bash: python3: command not found", 127))
