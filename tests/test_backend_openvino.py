"""The OpenVINO backend, here and on a board: the contract, and what only it can get wrong."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from hirelc_backends import openvino_program
from hirelc_backends.openvino_cpu import OpenvinoCpu
from onnx import TensorProto, helper

from hirelc_deploy.errors import ExportError, InputError
from hirelc_deploy.measure.accuracy import operators
from hirelc_deploy.measure.backend import BFLOAT_FORM, FLOAT_AS, HALF_FORM, ONNX_FORM, Backend, Portable, only
from hirelc_deploy.measure.program import ProgramBackend
from hirelc_deploy.testing import loopback
from hirelc_deploy.testing.backend_contract import BackendContract, random_images, write_model

needs_openvino = pytest.mark.skipif(openvino_program.availability() is not None, reason="needs the extra openvino")


class TestOpenvinoCpu(BackendContract):
    def make(self) -> Backend:
        return OpenvinoCpu()


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProgramBackend]:
    board = loopback.LoopbackBoard(tmp_path_factory.mktemp("boards"))
    device = board.connect()
    yield ProgramBackend(OpenvinoCpu().name, OpenvinoCpu.program, OpenvinoCpu.precisions_on, device)
    device.close()
    board.stop()


@pytest.mark.skipif(loopback.why_not() is not None, reason=str(loopback.why_not()))
class TestOpenvinoOnABoard(BackendContract):
    @pytest.fixture(autouse=True)
    def _remote(self, remote: ProgramBackend) -> None:
        self._backend = remote

    def make(self) -> Backend:
        return self._backend


@pytest.fixture(scope="module")
def backend() -> OpenvinoCpu:
    return OpenvinoCpu()


def test_what_runs_on_a_device_is_python_38_and_imports_numpy_and_openvino_alone() -> None:
    assert isinstance(OpenvinoCpu(), Portable)
    tree = ast.parse(OpenvinoCpu.program.read_text("utf-8"), feature_version=(3, 8))
    imported = {
        (node.names[0].name if isinstance(node, ast.Import) else str(node.module)).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported - sys.stdlib_module_names == {"numpy", "openvino"}


def test_importing_the_adapter_does_not_import_the_runtime() -> None:
    code = "import sys, hirelc_backends.openvino_cpu as b; b.OpenvinoCpu(); print('openvino' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.strip() == "False"


@needs_openvino
def test_openvino_is_imported_without_telling_its_makers() -> None:
    code = (
        "import sys; from pathlib import Path; import hirelc_backends.openvino_program as p; p.versions()\n"
        "children = [t.read_text() for t in Path('/proc/self/task').glob('*/children')]\n"
        "print([n for n in sys.modules if n.startswith('openvino_telemetry.')], ''.join(children).split())"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.strip() == "[] []"


def test_a_missing_runtime_is_a_reason_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert "pip install openvino" in (openvino_program.availability() or "")


@pytest.mark.parametrize(
    ("features", "capabilities", "bits", "words", "form"),
    [
        (["avx512_vnni"], ["FP32", "INT8", "BF16"], 8, "", BFLOAT_FORM),
        (["avx512_vnni"], ["FP32", "INT8", "FP16", "BF16"], 8, "", BFLOAT_FORM),
        (["avx512_vnni"], ["FP32", "INT8", "FP16"], 8, "", HALF_FORM),
        (["avx2"], ["FP32", "INT8"], 7, "no VNNI", ONNX_FORM),
        (["avx512_vnni"], ["FP32"], 8, "does not name INT8", ONNX_FORM),
    ],
)
def test_int8_and_sixteen_bits_follow_the_cpu_and_what_openvino_says_of_it(
    features: list[str], capabilities: list[str], bits: int, words: str, form: str
) -> None:
    facts = {"features": features, "architecture": "x86_64", "runtime": {"capabilities": capabilities}}
    in_float, in_integers = OpenvinoCpu.precisions_on(facts)
    assert (in_float.name, in_integers.name, in_integers.weight_bits) == ("float", "int8", bits)
    assert words in in_integers.remark
    assert in_float.form == in_integers.form == form
    assert ("bfloat16" in in_float.remark) == (form == BFLOAT_FORM)
    assert ("FP16" in in_float.remark) == (form == HALF_FORM)


def test_words_of_an_exception_are_one_sentence_without_its_place() -> None:
    said = "Exception from src/core.cpp:84:\nCheck 'is_static()' failed at src/shape.cpp:7:\nNo such operator: Foo.\n\n"
    assert openvino_program.in_one_line(said) == "No such operator: Foo"
    assert openvino_program.in_one_line("Check 'a' failed at b.cpp:1:\n") == "Check 'a' failed at b.cpp:1:"


@pytest.mark.parametrize(
    ("friendly", "originals", "name"),
    [
        ("conv/WithoutBiases", "conv/WithoutBiases,Multiply_10029,conv,relu_q", "conv"),
        ("head_dq", "Convert_11981,Subtract_11982,head_dq", "head_dq"),
        ("images_abcd_acdb_conv/WithoutBiases", "", "images_abcd_acdb_conv/WithoutBiases"),
    ],
)
def test_a_kernel_is_called_after_the_first_node_of_the_file_in_it(friendly: str, originals: str, name: str) -> None:
    assert openvino_program.own_name(friendly, {"originalLayersNames": originals}) == name


@needs_openvino
def test_a_profile_names_integer_kernels_and_their_layers(backend: OpenvinoCpu, tmp_path: Path) -> None:
    runner = backend.build(write_model(tmp_path / "model.onnx", integer=True, batch=1))
    found = {one.name: one for one in runner.profile(random_images(1), 6)}
    assert found["conv"].is_integer
    assert found["conv"].operator.startswith("Convolution ")
    assert found["head"].is_integer
    assert operators(runner, random_images(1)).integer_ops == 2


@needs_openvino
def test_float_is_float32_also_where_the_cpu_multiplies_bf16(backend: OpenvinoCpu, tmp_path: Path) -> None:
    runner = backend.build(write_model(tmp_path / "model.onnx"))
    kernels = [one.operator for one in runner.profile(random_images(1), 1)]
    assert any(kernel.endswith("f32") for kernel in kernels)
    assert not any("bf16" in kernel for kernel in kernels)


@needs_openvino
def test_a_file_that_asks_for_bfloat16_gets_it_where_the_cpu_multiplies_it(
    backend: OpenvinoCpu, tmp_path: Path
) -> None:
    assert openvino_program.FLOAT_AS == FLOAT_AS
    plain, asking = write_model(tmp_path / "plain.onnx"), write_model(tmp_path / "asking.onnx")
    proto = onnx.load(str(asking))
    helper.set_model_props(proto, {FLOAT_AS: "bf16"})
    onnx.save(proto, asking)
    runners = [backend.build(path) for path in (plain, asking)]
    assert [runner.options()["INFERENCE_PRECISION_HINT"] for runner in runners] == ["f32", "bf16"]
    if backend.precisions()[0].form != BFLOAT_FORM:
        pytest.skip("this CPU does not multiply bfloat16")
    assert any("bf16" in one.operator for one in runners[1].profile(random_images(1), 1))
    wanted, found = (only(runner.infer(random_images(2))) for runner in runners)
    assert 0 < np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()


@needs_openvino
def test_images_of_a_wrong_size_are_bad_input(backend: OpenvinoCpu, tmp_path: Path) -> None:
    runner = backend.build(write_model(tmp_path / "model.onnx", batch=1))
    with pytest.raises(InputError, match=r"takes float32 input of shape \[1, 3, 8, 8\], found .*\[1, 3, 9, 9\]"):
        runner.infer(np.zeros((1, 3, 9, 9), np.float32))


@needs_openvino
def test_a_file_with_two_inputs_or_an_unknown_operator_is_refused_in_words(
    backend: OpenvinoCpu, tmp_path: Path
) -> None:
    for name, operator, domain, inputs, words in (
        ("two", "Add", "", ["a", "b"], "has 2 inputs"),
        ("odd", "Foo", "nobody", ["a", "a"], "Foo"),
    ):
        values = [helper.make_tensor_value_info(one, TensorProto.FLOAT, [1, 2]) for one in sorted({*inputs})]
        output = helper.make_tensor_value_info("c", TensorProto.FLOAT, [1, 2])
        graph = helper.make_graph([helper.make_node(operator, inputs, ["c"], domain=domain)], "g", values, [output])
        opsets = [helper.make_opsetid("", 19), helper.make_opsetid("nobody", 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / f"{name}.onnx")
        with pytest.raises(ExportError, match=words) as refused:
            backend.build(tmp_path / f"{name}.onnx")
        assert "\n" not in str(refused.value)


@needs_openvino
def test_many_images_have_the_answers_of_single_ones(backend: OpenvinoCpu, tmp_path: Path) -> None:
    runner = backend.build(write_model(tmp_path / "model.onnx", integer=True, batch=1))
    images = random_images(7)
    one_by_one = np.concatenate([only(runner.infer(images[n : n + 1])) for n in range(len(images))])
    np.testing.assert_array_equal(only(runner.infer(images)), one_by_one)


@needs_openvino
def test_several_threads_are_timed_too(backend: OpenvinoCpu, tmp_path: Path) -> None:
    with backend.open_timing([write_model(tmp_path / "model.onnx")], 2, seed=0) as process:
        assert process.rounds(2).shape == (2, 1, 2)
