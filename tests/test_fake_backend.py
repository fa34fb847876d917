"""The fake device keeps the contract, is never mistaken for a real one, and fails when asked to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hirelc_deploy.errors import ExportError, TargetUnavailable
from hirelc_deploy.graph.model_graph import LayerShape
from hirelc_deploy.measure.backend import Backend, only
from hirelc_deploy.measure.protocol import QUICK, compare
from hirelc_deploy.measure.table import LayerKey, layer_model
from hirelc_deploy.testing.backend_contract import BackendContract, write_model
from hirelc_deploy.testing.fake_backend import FakeBackend, Faults, Noise, operator_times


class TestFakeBackend(BackendContract):
    def make(self) -> Backend:
        return FakeBackend()


def conv_file(folder: Path, channels: int, precision: str = "float") -> Path:
    float_or_int8 = {p.name: p for p in FakeBackend().precisions()}[precision]
    shape = LayerShape("conv", 64, (8, 8), (3, 3), (1, 1), (1, 1))
    path = folder / f"{channels}_{precision}.onnx"
    path.write_bytes(layer_model(LayerKey(shape, channels, channels, precision), float_or_int8)[0].SerializeToString())
    return path


def microseconds(path: Path, threads: int = 1) -> float:
    return sum(operator.microseconds for operator in operator_times(path, threads))


def kernel_microseconds(path: Path) -> float:
    (kernel,) = (operator for operator in operator_times(path) if operator.operator == "Conv")
    return kernel.microseconds


def test_it_says_that_it_is_simulated() -> None:
    backend = FakeBackend()
    assert backend.name == "fake"
    assert set(backend.versions().values()) == {"simulated"}
    assert {precision.remark for precision in backend.precisions()} == {"simulated"}


def test_time_is_a_staircase_in_the_width(tmp_path: Path) -> None:
    times = [kernel_microseconds(conv_file(tmp_path, width)) for width in range(33, 50)]
    assert times == sorted(times)
    assert len(set(times)) < len(times) / 2
    assert times[0] < times[-1]


def test_a_convolution_costs_its_stepped_macs_and_one_node(tmp_path: Path) -> None:
    # 48 output channels are three steps of 16; 48 input channels six of 8; 64 positions.
    assert kernel_microseconds(conv_file(tmp_path, 48)) == pytest.approx(1.0 + 48 * 48 * 9 * 64 / 20_000)


def test_integer_files_are_faster_and_threads_help(tmp_path: Path) -> None:
    in_float, in_integers = conv_file(tmp_path, 64), conv_file(tmp_path, 64, "int8")
    assert microseconds(in_integers) < 0.5 * microseconds(in_float)
    assert microseconds(in_float, threads=2) < microseconds(in_float)


def test_without_noise_the_protocol_finds_the_simulated_ratio(tmp_path: Path) -> None:
    files = [conv_file(tmp_path, 64), conv_file(tmp_path, 64, "int8")]
    timing = compare(files, FakeBackend(), limits=QUICK)[1]
    assert timing.ratio == pytest.approx(microseconds(files[1]) / microseconds(files[0]), rel=1e-3)
    assert timing.verdict == "faster"


def test_equal_seeds_give_equal_noise_and_others_other(tmp_path: Path) -> None:
    file = conv_file(tmp_path, 16)

    def samples(seed: int) -> object:
        with FakeBackend(Noise()).open_timing([file], 1, seed) as process:
            return process.rounds(5).tolist()

    assert samples(1) == samples(1)
    assert samples(1) != samples(2)


def test_faults_come_as_the_errors_of_a_real_device(tmp_path: Path) -> None:
    file = write_model(tmp_path / "too_new.onnx")
    with pytest.raises(ExportError, match="too_new"):
        FakeBackend(faults=Faults(refuse="too_new")).build(file)
    with pytest.raises(ExportError, match="too_new"):
        compare([file], FakeBackend(faults=Faults(refuse="too_new")))
    with pytest.raises(TargetUnavailable):
        compare([file], FakeBackend(faults=Faults(end_after_rounds=7)))
    assert FakeBackend(faults=Faults(unavailable="it is switched off")).availability() == "it is switched off"


def test_outputs_are_real_though_times_are_not(tmp_path: Path) -> None:
    runner = FakeBackend().build(write_model(tmp_path / "model.onnx"))
    images = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    assert not np.array_equal(only(runner.infer(images))[0], only(runner.infer(images))[1])
