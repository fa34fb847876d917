"""A whole ARM board under emulation: sshd on loopback, real aarch64 Python and runtimes. Nothing is timed.

benchmarks/arm_sysroot.sh DIR [1.31.1 openvino] && HIRELC_DEPLOY_ARM_SYSROOT=DIR pytest tests/test_arm_emulated.py
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hirelc_backends.onnxruntime_arm import NO_DOT_PRODUCTS, OnnxRuntimeArm
from hirelc_backends.onnxruntime_cpu import OnnxRuntimeCpu
from hirelc_backends.openvino_cpu import OpenvinoCpu

from hirelc_deploy.measure.backend import HALF_FORM, ONNX_FORM, Backend, only
from hirelc_deploy.measure.machine import cpu_features
from hirelc_deploy.measure.program import ProgramBackend
from hirelc_deploy.testing import loopback
from hirelc_deploy.testing.backend_contract import BackendContract, random_images, write_model

SYSROOT = os.environ.get("HIRELC_DEPLOY_ARM_SYSROOT", "")
pytestmark = [
    pytest.mark.skipif(shutil.which("qemu-aarch64") is None, reason="needs the ARM emulator (apt install qemu-user)"),
    pytest.mark.skipif(loopback.why_not() is not None, reason=str(loopback.why_not())),
    pytest.mark.skipif(not SYSROOT, reason="needs HIRELC_DEPLOY_ARM_SYSROOT, made by benchmarks/arm_sysroot.sh"),
]


@pytest.fixture(scope="module", params=["cortex-a72", "cortex-a76"])
def board(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProgramBackend]:
    made = loopback.LoopbackBoard(tmp_path_factory.mktemp(request.param), request.param)
    device = made.connect(python=f"{Path(SYSROOT).resolve()}/python {request.param}")
    arm = OnnxRuntimeArm()
    yield ProgramBackend(arm.name, arm.program, arm.precisions_on, device)
    device.close()
    made.stop()


@pytest.fixture(scope="module", params=["cortex-a72", "cortex-a76"])
def openvino_board(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ProgramBackend]:
    if not (Path(SYSROOT) / "root/opt/site/openvino").is_dir():
        pytest.skip("needs openvino in HIRELC_DEPLOY_ARM_SYSROOT: benchmarks/arm_sysroot.sh DIR 1.31.1 openvino")
    made = loopback.LoopbackBoard(tmp_path_factory.mktemp(f"openvino-{request.param}"), f"openvino-{request.param}")
    device = made.connect(python=f"{Path(SYSROOT).resolve()}/python {request.param}")
    own = OpenvinoCpu()
    yield ProgramBackend(own.name, own.program, own.precisions_on, device)
    device.close()
    made.stop()


class TestOnnxRuntimeOnAnEmulatedBoard(BackendContract):
    @pytest.fixture(autouse=True)
    def _board(self, board: ProgramBackend) -> None:
        self._backend = board

    def make(self) -> Backend:
        return self._backend


class TestOpenvinoOnAnEmulatedBoard(BackendContract):
    @pytest.fixture(autouse=True)
    def _board(self, openvino_board: ProgramBackend) -> None:
        self._backend = openvino_board

    def make(self) -> Backend:
        return self._backend


def test_openvino_offers_fp16_where_the_cpu_multiplies_it(
    openvino_board: ProgramBackend, request: pytest.FixtureRequest
) -> None:
    is_a72 = request.node.callspec.params["openvino_board"] == "cortex-a72"
    assert {one.form for one in openvino_board.precisions()} == {ONNX_FORM if is_a72 else HALF_FORM}


def test_the_board_says_what_it_is_and_what_int8_brings_there(
    board: ProgramBackend, request: pytest.FixtureRequest
) -> None:
    facts = board.facts()
    assert facts["architecture"] == "aarch64"
    is_a72 = request.node.callspec.params["board"] == "cortex-a72"
    assert facts["features"] == ([] if is_a72 else ["asimddp", "asimdhp"])
    assert (board.precisions()[1].remark == NO_DOT_PRODUCTS) == is_a72


@pytest.mark.skipif(
    not (cpu_features() or frozenset()) & {"avx512_vnni", "avx_vnni"},
    reason="x86 without VNNI saturates 8-bit products, so it is no judge",
)
def test_integers_are_equal_to_the_last_bit_and_floats_to_the_sixth_digit(
    board: ProgramBackend, tmp_path: Path
) -> None:
    images, here = random_images(6), OnnxRuntimeCpu()
    integer, in_float = write_model(tmp_path / "i.onnx", integer=True), write_model(tmp_path / "f.onnx")
    np.testing.assert_array_equal(only(board.build(integer).infer(images)), only(here.build(integer).infer(images)))
    np.testing.assert_allclose(
        only(board.build(in_float).infer(images)), only(here.build(in_float).infer(images)), rtol=1e-5, atol=1e-6
    )
