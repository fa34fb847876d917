"""In: weights and small files. Out: proof that codes come back exactly, and that every byte is counted."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from hirelc_deploy.compress.integer import calibration, quantize
from hirelc_deploy.compress.storage import codec, restore
from hirelc_deploy.demo.model import DemoNet
from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs import models  # noqa: F401  (makes timm importable beside a CPU torch)
from tests.test_quantize import U8S8, images, run, write


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    torch.manual_seed(0)
    return write(DemoNet(widths=(16, 32), blocks_per_stage=1), tmp_path_factory.mktemp("cnn"))


@pytest.fixture(scope="module")
def cnn(files):
    return files[1]


@pytest.mark.parametrize("bits", codec.BITS)
def test_packed_indices_come_back_and_no_bit_is_wasted(bits):
    indices = np.random.default_rng(0).integers(0, 2**bits, 1001).astype(np.uint8)
    packed = codec.pack(indices, bits)
    assert len(packed) == -(-1001 * bits // 8)
    np.testing.assert_array_equal(restore.unpack(packed, bits, 1001), indices)


def record_of(packed: codec.Packed, count: int, bits: int) -> dict[str, int]:
    return {
        "count": count,
        "bits": bits,
        "gap_bits": packed.gap_bits,
        "common": packed.common,
        "written": packed.written,
    }


@pytest.mark.parametrize("bits", codec.BITS)
def test_indices_come_back_from_the_smallest_form_and_every_form_is_that_somewhere(bits):
    rng, forms = np.random.default_rng(bits), set()
    for share in (1.0, 0.6, 0.3, 0.12, 0.05, 0.02, 0.005, 0.0):
        indices = rng.integers(0, 2**bits, 5000).astype(np.uint8)
        indices[rng.uniform(size=5000) >= share] = 2**bits - 1
        packed = codec.smallest(indices, bits)
        record = record_of(packed, 5000, bits)
        np.testing.assert_array_equal(restore.dense(packed.content, record), indices)
        assert len(packed.content) == restore.code_size(record) <= -(-5000 * bits // 8)
        forms.add(min(packed.gap_bits, 2))
    assert forms == {0, 1, 2}


def test_a_tenth_of_the_weights_takes_about_a_tenth_of_the_bytes_and_their_places():
    indices = np.zeros(80_000, np.uint8)
    indices[::10] = 5
    packed = codec.smallest(indices, 4)
    # 8,000 written, each 4 bits behind a distance of 4 bits (9 others fit): 8,000 bytes. Flags alone take 10,000.
    assert (packed.gap_bits, packed.written, len(packed.content)) == (4, 8000, 8000)


def test_a_distance_that_does_not_fit_is_bridged():
    indices = np.zeros(2001, np.uint8)
    indices[[1, 2000]] = [3, 2]
    packed = codec.smallest(indices, 2)
    assert (packed.gap_bits, packed.written) == (8, 2 + 7)  # 1,998 before the last: seven times 256, and 206
    np.testing.assert_array_equal(restore.dense(packed.content, record_of(packed, 2001, 2)), indices)


def test_small_weights_are_left_out_in_order_of_size():
    weights = np.array([[0.5, -0.1, 0.2], [-3.0, 0.1, 0.4]], np.float32)
    expected = np.array([[0.5, 0.0, 0.0], [-3.0, 0.0, 0.4]], np.float32)
    np.testing.assert_array_equal(codec.without_small(weights, 0.5), expected)


def test_three_bits_worked_by_hand():
    assert codec.pack(np.array([1, 2, 7], np.uint8), 3) == bytes([0b00101011, 0b10000000])


def test_linear_steps_worked_by_hand():
    coded = codec.encode_linear(np.array([[0.9, -0.3, 0.1, 0.0]], np.float32), 3)
    assert coded.indices.tolist() == [6, 2, 3, 3]  # a step is 0.3, code 3 is zero
    np.testing.assert_allclose(restore.decode_linear(coded.indices, coded.table, 3), [[0.9, -0.3, 0.0, 0.0]], rtol=1e-6)


def test_powers_of_two_worked_by_hand_and_zero_has_its_own_code():
    coded = codec.encode_log(np.array([[1.0, -0.5, 0.3, 0.74, 0.05, 0.0]], np.float32), 3)
    assert coded.indices.tolist() == [1, 4, 5, 3, 0, 0]  # three powers: 1, 1/2, 1/4
    np.testing.assert_array_equal(restore.decode_log(coded.indices, coded.table, 3), [[1.0, -0.5, 0.25, 0.5, 0.0, 0.0]])


def test_a_codebook_finds_the_values_that_are_there():
    values = np.array([-1.0, 0.0, 0.5, 2.0], np.float32)
    weights = np.random.default_rng(0).choice(values, (8, 50))
    coded = codec.encode_codebook(weights, 2)
    np.testing.assert_allclose(coded.table[0], values, atol=1e-6)
    np.testing.assert_allclose(
        restore.decode_codebook(coded.indices, coded.table, 2).reshape(weights.shape), weights, atol=1e-6
    )


@pytest.fixture(scope="module")
def integer_cnn(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("int8") / "int8.onnx"
    ranges = calibration.calibrate(files[0], [images(8)])
    quantize.quantize(files[1], out, ranges, lambda layer: "int8", target=U8S8, pattern="all")
    return out


@pytest.mark.parametrize("scheme", codec.ENCODERS)
@pytest.mark.parametrize("bits", [2, 4, 7])
@pytest.mark.parametrize("file", ["cnn", "integer_cnn"])
def test_what_is_restored_is_what_was_coded(file, tmp_path, scheme, bits, request):
    model = request.getfixturevalue(file)
    codec.store(model, tmp_path / "stored", bits, scheme)
    before = {i.name: numpy_helper.to_array(i) for i in onnx.load(str(model)).graph.initializer}
    types = set()
    for tensor in onnx.load(restore.restore(tmp_path / "stored", tmp_path / "restored")).graph.initializer:
        found, wanted = numpy_helper.to_array(tensor), before[tensor.name]
        assert found.dtype == wanted.dtype
        if tensor.data_type in codec.CODED_TYPES and len(tensor.dims) > 1:
            types.add(codec.CODED_TYPES[tensor.data_type])
            coded = codec.ENCODERS[scheme](wanted.astype(np.float32), bits)
            values = restore.DECODERS[scheme](coded.indices, coded.table, bits).reshape(wanted.shape)
            wanted = np.rint(values).astype(np.int8) if found.dtype == np.int8 else values
            assert len(np.unique(found)) <= 2**bits * (1 if scheme == "codebook" else len(found))
        np.testing.assert_array_equal(found, wanted)
    assert types == {"float32" if file == "cnn" else "int8"}


@pytest.mark.parametrize("file", ["cnn", "integer_cnn"])
@pytest.mark.parametrize("scheme", codec.ENCODERS)
def test_more_bits_are_nearer_to_the_file_except_for_powers_of_two(file, tmp_path, scheme, request):
    model = request.getfixturevalue(file)
    wanted, errors = run(model, images(4)), []
    for bits in (2, 4, 7):
        codec.store(model, tmp_path / "stored", bits, scheme)
        restored = restore.restore(tmp_path / "stored", tmp_path / "restored")
        errors.append(float(np.abs(run(Path(restored), images(4)) - wanted).max()))
    assert errors[0] > errors[1]
    assert scheme == "log" or errors[1] > errors[2]  # more powers only reach further down


def test_a_file_is_restored_where_this_project_is_not_installed(integer_cnn, tmp_path):
    codec.store(integer_cnn, tmp_path / "stored", 7, "linear")
    script = shutil.copy(restore.__file__, tmp_path / "restore.py")
    subprocess.run([sys.executable, "-I", script, tmp_path / "stored", tmp_path / "there"], check=True)
    codes = run(tmp_path / "there" / "model.onnx", images(4))
    np.testing.assert_allclose(codes, run(integer_cnn, images(4)), atol=0.1)


def test_a_stored_file_holds_its_codes_and_little_else(cnn, tmp_path):
    codec.store(cnn, tmp_path / "stored", 4, "linear")
    initializers = onnx.load(str(cnn)).graph.initializer
    weights = sum(int(np.prod(i.dims)) for i in initializers if len(i.dims) > 1 and i.data_type == 1)
    assert (tmp_path / "stored").stat().st_size < weights / 2 + 8000
    assert (tmp_path / "stored").stat().st_size > weights / 2


@pytest.mark.parametrize("scheme", codec.ENCODERS)
@pytest.mark.parametrize("file", ["cnn", "integer_cnn"])
def test_weights_left_out_come_back_as_zeros_and_cost_their_places_only(file, tmp_path, scheme, request):
    model = request.getfixturevalue(file)
    codec.store(model, tmp_path / "whole", 4, scheme)
    codec.store(model, tmp_path / "tenth", 4, scheme, sparsity=0.9)
    before = {t.name: numpy_helper.to_array(t) for t in codec.coded_tensors(onnx.load(str(model)))}
    weights = sum(tensor.size for tensor in before.values())
    saved = (tmp_path / "whole").stat().st_size - (tmp_path / "tenth").stat().st_size
    assert saved > weights * (0.5 - 0.14)  # half a byte each; a tenth takes as much again for its place, and bridges
    for tensor in onnx.load(restore.restore(tmp_path / "tenth", tmp_path / "restored")).graph.initializer:
        if tensor.name in before:
            found, wanted = numpy_helper.to_array(tensor), before[tensor.name]
            small = codec.without_small(wanted.astype(np.float32), 0.9) == 0
            assert not found[small].any()
            assert scheme == "linear" or found[~small].all()


def test_each_tensor_may_have_its_own_bits(cnn, tmp_path):
    names = [tensor.name for tensor in codec.coded_tensors(onnx.load(str(cnn)))]
    codec.store(cnn, tmp_path / "stored", 2, "linear", bits_of={names[1]: 7})
    for tensor in onnx.load(restore.restore(tmp_path / "stored", tmp_path / "restored")).graph.initializer:
        if tensor.name in names:
            found = numpy_helper.to_array(tensor).reshape(tensor.dims[0], -1)
            most = max(len(np.unique(row)) for row in found)
            assert most > 3 if tensor.name == names[1] else most <= 3


@pytest.mark.parametrize("content", [b"", restore.MAGIC, b"an onnx file, say"])
def test_what_is_no_stored_file_is_refused(tmp_path, content):
    (tmp_path / "stored").write_bytes(content)
    with pytest.raises(ValueError, match="not a whole file of the storage codec"):
        restore.restore(tmp_path / "stored", tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


def test_widths_and_schemes_that_do_not_exist_are_refused(cnn, tmp_path):
    for bits, scheme in ((8, "linear"), (1, "linear"), (4, "huffman")):
        with pytest.raises(InputError, match="use linear, log, codebook with 2 to 7 bits"):
            codec.store(cnn, tmp_path / "stored", bits, scheme)
    with pytest.raises(InputError, match="from 0 to below 1"):
        codec.store(cnn, tmp_path / "stored", 4, "linear", sparsity=1.0)
