"""In: a backend. Out: the tests that every backend passes, inherited in three lines.

    class TestMyBackend(BackendContract):
        def make(self):
            return MyBackend()

Where the backend is not available, every test is skipped with its own reason.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from hirelc_deploy.errors import HirelcError
from hirelc_deploy.measure.backend import BFLOAT_FORM, HALF_FORM, ONNX_FORM, TENSORRT_FORM, Backend, only

IMAGE = (3, 8, 8)
CLASSES = 5
KNOWN_TYPES = {"float32", "float16", "uint8", "int8", "float8"}


class BackendContract:
    """What a backend promises; see measure/backend.py. No test says anything about how fast it is."""

    @abstractmethod
    def make(self) -> Backend:
        """Return the backend under test."""

    @pytest.fixture
    def backend(self) -> Backend:
        """Return the backend, or skip with the reason it gives."""
        backend = self.make()
        reason = backend.availability()
        if reason is not None:
            pytest.skip(reason)
        return backend

    def test_it_has_a_name_and_a_reason_or_none(self) -> None:
        """A backend can be asked what it is anywhere, also where it cannot run."""
        backend = self.make()
        assert backend.name.isidentifier()
        reason = backend.availability()
        assert reason is None or (len(reason) > 10 and "\n" not in reason)

    def test_float_comes_first_and_every_precision_names_known_types(self, backend: Backend) -> None:
        """The search offers exactly these."""
        precisions = backend.precisions()
        assert precisions[0].name == "float"
        assert len({precision.name for precision in precisions}) == len(precisions)
        forms = {precision.form for precision in precisions}
        assert len(forms) == len(forms & {ONNX_FORM, TENSORRT_FORM, BFLOAT_FORM, HALF_FORM}) == 1
        for precision in precisions:
            assert {precision.activation_type, precision.weight_type} <= KNOWN_TYPES
            assert 1 <= precision.weight_bits <= 32

    def test_versions_are_texts(self, backend: Backend) -> None:
        """They go into every bundle."""
        versions = backend.versions()
        assert versions
        assert all(isinstance(item, str) and item for pair in versions.items() for item in pair)

    @pytest.mark.parametrize("batch", ["n", 1, 2])
    def test_any_number_of_images_gives_the_reference_outputs(
        self, backend: Backend, batch: int | str, tmp_path: Path
    ) -> None:
        """Whatever batch the file was built for."""
        path = write_model(tmp_path / "float.onnx", batch=batch)
        runner = backend.build(path)
        images = random_images(5)
        expected = reference_outputs(path, images)
        for count in (0, 1, 3, 5):
            found = only(runner.infer(images[:count]))
            assert found.shape == (count, CLASSES)
            np.testing.assert_allclose(found, expected[:count], rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("batch", ["n", 2])
    def test_all_outputs_come_by_the_names_of_the_file(
        self, backend: Backend, batch: int | str, tmp_path: Path
    ) -> None:
        """A detector has two: in the file's order, each with the image as its first dimension."""
        path = write_model(tmp_path / "two.onnx", batch=batch, also="pooled")
        found = backend.build(path).infer(random_images(3))
        assert {name: output.shape for name, output in found.items()} == {"head": (3, CLASSES), "pooled": (3, 16, 1, 1)}
        assert list(found) == ["head", "pooled"]
        np.testing.assert_allclose(found["head"], reference_outputs(path, random_images(3)), rtol=1e-3, atol=1e-4)

    def test_images_of_another_memory_layout_give_the_same_outputs(self, backend: Backend, tmp_path: Path) -> None:
        """A channels-last array that was transposed is what an image file gives."""
        runner = backend.build(write_model(tmp_path / "float.onnx"))
        images = random_images(2)
        turned = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(only(runner.infer(turned)), only(runner.infer(images)))

    def test_an_integer_file_gives_the_outputs_its_grid_defines(self, backend: Backend, tmp_path: Path) -> None:
        """Up to two steps of 0.01 in outputs of up to 0.3: runtimes may round a value between two steps apart."""
        if all(precision.name != "int8" for precision in backend.precisions()):
            pytest.skip(f"{backend.name} executes no int8")
        path = write_model(tmp_path / "int8.onnx", integer=True, form=backend.precisions()[0].form)
        images = random_images(4)
        found, expected = only(backend.build(path).infer(images)), reference_outputs(path, images)
        assert np.abs(found - expected).max() <= 0.02 + 1e-6

    def test_a_profile_lists_each_operator_with_its_arithmetic(self, backend: Backend, tmp_path: Path) -> None:
        """A claim of integer arithmetic rests on this."""
        image = random_images(1)
        in_float = backend.build(write_model(tmp_path / "float.onnx")).profile(image, 3)
        assert in_float
        assert not any(operator.is_integer for operator in in_float)
        assert all(operator.microseconds > 0 and operator.operator for operator in in_float)
        if any(precision.name == "int8" for precision in backend.precisions()):
            path = write_model(tmp_path / "int8.onnx", integer=True, form=backend.precisions()[0].form)
            in_integers = backend.build(path).profile(image, 3)
            assert any(operator.is_integer for operator in in_integers)
            for operator in in_integers:
                assert not (operator.is_integer and operator.operator in ("QuantizeLinear", "DequantizeLinear", "Cast"))

    def test_timing_returns_wall_and_cpu_time_of_every_file_and_round(self, backend: Backend, tmp_path: Path) -> None:
        """The protocol pairs them by round."""
        files = [write_model(tmp_path / f"{name}.onnx") for name in ("a", "b")]
        with backend.open_timing(files, 1, seed=0) as process:
            for count in (3, 7):
                nanoseconds = process.rounds(count)
                assert nanoseconds.shape == (count, 2, 2)
                assert nanoseconds.dtype == np.int64
                assert (nanoseconds[..., 0] > 0).all()
                assert (nanoseconds >= 0).all()

    def test_a_file_of_a_fixed_batch_is_profiled_and_timed_with_all_its_images(
        self, backend: Backend, tmp_path: Path
    ) -> None:
        """A server gathers images: `profile` gets as many as the file takes, and a timed run has as many."""
        path = write_model(tmp_path / "two.onnx", batch=2)
        assert all(operator.microseconds > 0 for operator in backend.build(path).profile(random_images(2), 2))
        with backend.open_timing([path], 1, seed=0) as process:
            assert (process.rounds(2)[..., 0] > 0).all()

    @pytest.mark.parametrize("content", [None, b"", b"not a model"])
    def test_a_missing_or_broken_file_is_refused_in_one_sentence(
        self, backend: Backend, content: bytes | None, tmp_path: Path
    ) -> None:
        """By name, by `build` and by `open_timing` alike."""
        good, bad = write_model(tmp_path / "good.onnx"), tmp_path / "bad.onnx"
        if content is not None:
            bad.write_bytes(content)
        with pytest.raises(HirelcError, match=r"bad\.onnx"):
            backend.build(bad)
        with pytest.raises(HirelcError, match=r"bad\.onnx"), backend.open_timing([good, bad], 1, seed=0):
            pass


def random_images(count: int) -> NDArray[np.float32]:
    """Return (count, *IMAGE) standard normal images, always the same."""
    return np.random.default_rng(5).standard_normal((count, *IMAGE)).astype(np.float32)


def reference_outputs(path: Path, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return what ONNX's own slow evaluator computes, image by image."""
    model = onnx.load(path)
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 1
    evaluator = ReferenceEvaluator(model)
    rows: list[Any] = [evaluator.run(None, {"images": np.repeat(image[None], batch, 0)})[0][:1] for image in images]
    return np.concatenate(rows)


def write_model(
    path: Path, *, batch: int | str = "n", integer: bool = False, form: str = ONNX_FORM, also: str = ""
) -> Path:
    """Write a convolution, ReLU, pooling and linear layer, in float or with Q/DQ of a form; return `path`.

    Args:
        also: `pooled` for what the linear layer reads as a second output.
    """
    typed = form == TENSORRT_FORM
    rng = np.random.default_rng(1)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def constant(name: str, value: NDArray[Any]) -> str:
        constants.append(numpy_helper.from_array(value, name))
        return name

    def add(operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], output, **attributes))
        return output

    def rounded(tensor: str, scale: float, zero: int) -> str:
        if not integer:
            return tensor
        if typed:  # half the range in either direction instead of a zero point
            scale, zero_point = scale if zero else 2 * scale, np.array(0, np.int8)
        else:
            zero_point = np.array(zero, np.uint8)
        grid = [constant(f"{tensor}_s", np.array(scale, np.float32)), constant(f"{tensor}_z", zero_point)]
        return add("DequantizeLinear", [add("QuantizeLinear", [tensor, *grid], f"{tensor}_q"), *grid], f"{tensor}_dq")

    def weights(name: str, shape: tuple[int, ...], input_scale: float) -> list[str]:
        if not integer:
            weight = rng.standard_normal(shape).astype(np.float32) / np.float32(np.sqrt(np.prod(shape[1:])))
            return [
                constant(f"{name}_w", weight),
                constant(f"{name}_b", rng.standard_normal(shape[0]).astype(np.float32)),
            ]
        scales = np.linspace(0.002, 0.004, shape[0]).astype(np.float32)
        made = []
        for kind, value, scale in (
            ("w", rng.integers(-63, 64, shape).astype(np.int8), scales),
            ("b", rng.integers(-500, 500, shape[0]).astype(np.int32), scales * np.float32(input_scale)),
        ):
            full = f"{name}_{kind}"
            if typed and kind == "b":
                made.append(constant(full, (value * scale).astype(np.float32)))
                continue
            zero = constant(f"{full}_z", np.zeros(shape[0], value.dtype))
            inputs = [constant(f"{full}_q", value), constant(f"{full}_s", scale), zero]
            made.append(add("DequantizeLinear", inputs, full, axis=0))
        return made

    images = rounded("images", 0.04, 128)
    add("Conv", [images, *weights("conv", (16, 3, 3, 3), 0.04)], "conv", pads=[1, 1, 1, 1])
    relu = rounded(add("Relu", ["conv"], "relu"), 0.02, 0)
    flat = rounded(add("Flatten", [add("GlobalAveragePool", [relu], "pooled")], "flat"), 0.02, 0)
    add("Gemm", [flat, *weights("head", (CLASSES, 16), 0.02)], "head", transB=1)
    output = rounded("head", 0.01, 128)
    graph = helper.make_graph(
        nodes,
        "contract",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, *IMAGE])],
        [
            helper.make_tensor_value_info(output, TensorProto.FLOAT, [batch, CLASSES]),
            *([helper.make_tensor_value_info(also, TensorProto.FLOAT, [batch, 16, 1, 1])] if also else []),
        ],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path
