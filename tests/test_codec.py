"""In: weights and small files. Out: proof that codes come back exactly, and that every byte is counted."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from hirelc_deploy import models  # noqa: F401  (makes timm importable beside a CPU torch)
from hirelc_deploy.compress import codec
from hirelc_deploy.demo.model import DemoNet
from hirelc_deploy.errors import InputError
from tests.test_quantize import images, run, write


@pytest.fixture(scope="module")
def cnn(tmp_path_factory):
    torch.manual_seed(0)
    return write(DemoNet(widths=(16, 32), blocks_per_stage=1), tmp_path_factory.mktemp("cnn"))[1]


@pytest.mark.parametrize("bits", codec.BITS)
def test_packed_indices_come_back_and_no_bit_is_wasted(bits):
    indices = np.random.default_rng(0).integers(0, 2**bits, 1001).astype(np.uint8)
    packed = codec.pack(indices, bits)
    assert len(packed) == -(-1001 * bits // 8)
    np.testing.assert_array_equal(codec.unpack(packed, bits, 1001), indices)


def test_three_bits_worked_by_hand():
    assert codec.pack(np.array([1, 2, 7], np.uint8), 3) == bytes([0b00101011, 0b10000000])


def test_linear_steps_worked_by_hand():
    coded = codec.encode_linear(np.array([[0.9, -0.3, 0.1, 0.0]], np.float32), 3)
    assert coded.indices.tolist() == [6, 2, 3, 3]  # a step is 0.3, code 3 is zero
    np.testing.assert_allclose(codec.decode_linear(coded, 3), [[0.9, -0.3, 0.0, 0.0]], rtol=1e-6)


def test_powers_of_two_worked_by_hand_and_zero_has_its_own_code():
    coded = codec.encode_log(np.array([[1.0, -0.5, 0.3, 0.74, 0.05, 0.0]], np.float32), 3)
    assert coded.indices.tolist() == [1, 4, 5, 3, 0, 0]  # three powers: 1, 1/2, 1/4
    np.testing.assert_array_equal(codec.decode_log(coded, 3), [[1.0, -0.5, 0.25, 0.5, 0.0, 0.0]])


def test_a_codebook_finds_the_values_that_are_there():
    values = np.array([-1.0, 0.0, 0.5, 2.0], np.float32)
    weights = np.random.default_rng(0).choice(values, (8, 50))
    coded = codec.encode_codebook(weights, 2)
    np.testing.assert_allclose(coded.table[0], values, atol=1e-6)
    np.testing.assert_allclose(codec.decode_codebook(coded, 2).reshape(weights.shape), weights, atol=1e-6)


@pytest.mark.parametrize("scheme", codec.SCHEMES)
@pytest.mark.parametrize("bits", [2, 4, 7])
def test_what_is_restored_is_what_was_coded(cnn, tmp_path, scheme, bits):
    encode, decode = codec.SCHEMES[scheme]
    codec.store(cnn, tmp_path / "stored", bits, scheme)
    before = {i.name: numpy_helper.to_array(i) for i in onnx.load(str(cnn)).graph.initializer}
    for tensor in codec.restore(tmp_path / "stored").graph.initializer:
        found, wanted = numpy_helper.to_array(tensor), before[tensor.name]
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 1:
            wanted = decode(encode(wanted, bits), bits).reshape(wanted.shape)
            assert len(np.unique(found)) <= 2**bits * (1 if scheme == "codebook" else len(found))
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("scheme", codec.SCHEMES)
def test_more_bits_are_nearer_to_the_float_file_except_for_powers_of_two(cnn, tmp_path, scheme):
    wanted, errors = run(cnn, images(4)), []
    for bits in (2, 4, 7):
        codec.store(cnn, tmp_path / "stored", bits, scheme)
        (tmp_path / "restored.onnx").write_bytes(codec.restore(tmp_path / "stored").SerializeToString())
        errors.append(float(np.abs(run(tmp_path / "restored.onnx", images(4)) - wanted).max()))
    assert errors[0] > errors[1]
    assert scheme == "log" or errors[1] > errors[2]  # more powers only reach further down


def test_a_stored_file_holds_its_codes_and_little_else(cnn, tmp_path):
    codec.store(cnn, tmp_path / "stored", 4, "linear")
    initializers = onnx.load(str(cnn)).graph.initializer
    weights = sum(int(np.prod(i.dims)) for i in initializers if len(i.dims) > 1 and i.data_type == 1)
    assert (tmp_path / "stored").stat().st_size < weights / 2 + 8000
    assert (tmp_path / "stored").stat().st_size > weights / 2


@pytest.mark.parametrize("content", [b"", b"HDCODEC1", b"an onnx file, say"])
def test_what_is_no_stored_file_is_refused(tmp_path, content):
    (tmp_path / "stored").write_bytes(content)
    with pytest.raises(InputError, match="not a whole file of the storage codec"):
        codec.restore(tmp_path / "stored")


def test_widths_and_schemes_that_do_not_exist_are_refused(cnn, tmp_path):
    for bits, scheme in ((8, "linear"), (1, "linear"), (4, "huffman")):
        with pytest.raises(InputError, match="use linear, log, codebook with 2 to 7 bits"):
            codec.store(cnn, tmp_path / "stored", bits, scheme)
