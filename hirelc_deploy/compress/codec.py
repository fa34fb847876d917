"""In: an ONNX file with float weights. Out: a file for storage only whose weights take 2 to 7 bits, and the way back.

No runtime computes in these widths: a stored file is decoded at load into an ordinary ONNX file. It is smaller on disk
and on the wire and not a bit faster. Every byte is counted: packed indices, scales or codebooks, and the header.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, numpy_helper

from hirelc_deploy.errors import InputError

MAGIC = b"HDCODEC1"
BITS = range(2, 8)
LLOYD_STEPS = 25
"""Of k-means in one dimension; from quantiles on, ResNet-18's codebooks move by less than 0.1 % after 20."""

Floats = NDArray[np.float32]
Indices = NDArray[np.uint8]


@dataclass(frozen=True)
class Coded:
    """Weights as indices into values.

    Attributes:
        indices: (count,) below 2**bits, in the order of the tensor's elements.
        table: (rows, values per row) float32. `linear` and `log` hold one scale per output channel, `codebook` one row
            with all of its values.
    """

    indices: Indices
    table: Floats


def encode_linear(weights: Floats, bits: int) -> Coded:
    """Return symmetric steps per output channel (first axis): code = round(w / scale) + 2**(bits - 1) - 1."""
    rows = weights.reshape(len(weights), -1)
    most = 2 ** (bits - 1) - 1
    scale = np.abs(rows).max(axis=1, keepdims=True).astype(np.float32) / np.float32(most)
    steps = np.round(rows / np.where(scale > 0, scale, 1)) + most
    return Coded(np.clip(steps, 0, 2 * most).astype(np.uint8).ravel(), scale)


def decode_linear(coded: Coded, bits: int) -> Floats:
    """Return (rows, n) weights of `encode_linear`."""
    steps = coded.indices.reshape(len(coded.table), -1).astype(np.float32) - np.float32(2 ** (bits - 1) - 1)
    return np.asarray(steps * coded.table, np.float32)


def encode_log(weights: Floats, bits: int) -> Coded:
    """Return signed powers of two below each output channel's largest weight; code 0 is zero itself.

    Code 1 + 2 k + s stands for (-1)**s * largest * 2**-k. What is nearer to zero than to the smallest power is zero.
    """
    rows = weights.reshape(len(weights), -1)
    largest = np.abs(rows).max(axis=1, keepdims=True).astype(np.float32)
    powers = (2**bits - 1) // 2
    share = np.abs(rows) / np.where(largest > 0, largest, 1)
    # The nearest power in value: between 2**-k and 2**-(k + 1) the middle is 0.75 * 2**-k.
    exponent = np.ceil(-np.log2(np.maximum(share, 2.0**-60) / 0.75) - 1e-9)
    exponent = np.clip(exponent, 0, None)
    code = 1 + 2 * np.minimum(exponent, powers - 1) + (rows < 0)
    code = np.where(share < 2.0 ** -(powers - 1) / 2, 0, code)
    return Coded(code.astype(np.uint8).ravel(), largest)


def decode_log(coded: Coded, bits: int) -> Floats:
    """Return (rows, n) weights of `encode_log`."""
    code = coded.indices.reshape(len(coded.table), -1).astype(np.int32)
    magnitude = np.exp2(-((np.maximum(code, 1) - 1) // 2).astype(np.float32)) * coded.table
    return np.where(code == 0, 0, np.where((code - 1) % 2 == 1, -magnitude, magnitude)).astype(np.float32)


def encode_codebook(weights: Floats, bits: int) -> Coded:
    """Return 2**bits values for the whole tensor by k-means (Lloyd 1982), and the nearest of them for each weight."""
    flat = weights.ravel()
    values = np.quantile(flat, (np.arange(2**bits) + 0.5) / 2**bits)
    for _ in range(LLOYD_STEPS):
        nearest = np.searchsorted((values[1:] + values[:-1]) / 2, flat)
        counts = np.bincount(nearest, minlength=len(values))
        sums = np.bincount(nearest, flat.astype(np.float64), minlength=len(values))
        values = np.sort(np.where(counts > 0, sums / np.maximum(counts, 1), values))
    nearest = np.searchsorted((values[1:] + values[:-1]) / 2, flat)
    return Coded(nearest.astype(np.uint8), values.astype(np.float32)[None])


def decode_codebook(coded: Coded, bits: int) -> Floats:
    """Return (count,) weights of `encode_codebook`."""
    return np.asarray(coded.table[0][coded.indices], np.float32)


Scheme = tuple[Callable[[Floats, int], Coded], Callable[[Coded, int], Floats]]
SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        "linear": (encode_linear, decode_linear),
        "log": (encode_log, decode_log),
        "codebook": (encode_codebook, decode_codebook),
    }
)


def pack(indices: Indices, bits: int) -> bytes:
    """Return indices below 2**bits with no bit between them."""
    return np.packbits(np.unpackbits(indices[:, None], axis=1, count=8)[:, 8 - bits :]).tobytes()


def unpack(packed: bytes, bits: int, count: int) -> Indices:
    """Return what `pack` packed."""
    each = np.unpackbits(np.frombuffer(packed, np.uint8), count=count * bits).reshape(count, bits)
    return np.packbits(np.pad(each, ((0, 0), (8 - bits, 0))), axis=1)[:, 0]


def store(model: Path, out: Path, bits: int, scheme: str) -> None:
    """Write a file for storage only: float weights of more than one dimension as codes, all else as it is.

    Raises:
        InputError: a width or scheme that does not exist.
    """
    if bits not in BITS or scheme not in SCHEMES:
        raise InputError(f"storage codec {scheme!r} with {bits} bits: use {', '.join(SCHEMES)} with 2 to 7 bits.")
    proto = onnx.load(str(model))
    parts, records = [], []
    for tensor in proto.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2:
            continue
        coded = SCHEMES[scheme][0](numpy_helper.to_array(tensor), bits)
        records.append([tensor.name, list(coded.table.shape)])
        parts += [coded.table.astype("<f4").tobytes(), pack(coded.indices, bits)]
        tensor.ClearField("raw_data")
        tensor.ClearField("float_data")
    header = json.dumps({"bits": bits, "scheme": scheme, "tensors": records}, separators=(",", ":")).encode()
    graph = proto.SerializeToString()
    out.write_bytes(b"".join([MAGIC, struct.pack("<II", len(header), len(graph)), header, graph, *parts]))


def restore(stored: Path) -> ModelProto:
    """Return the model of a stored file, its weights as 32-bit floats.

    Raises:
        InputError: not a file of `store`, or one that was cut off.
    """
    content = stored.read_bytes()
    try:
        if content[:8] != MAGIC:
            raise ValueError(f"it starts with {content[:8]!r}")
        header_bytes, graph_bytes = struct.unpack_from("<II", content, 8)
        header = json.loads(content[16 : 16 + header_bytes])
        place = 16 + header_bytes + graph_bytes
        proto = ModelProto.FromString(content[16 + header_bytes : place])
        tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
        bits, decode = header["bits"], SCHEMES[header["scheme"]][1]
        for name, shape in header["tensors"]:
            tensor = tensors[name]
            count, table_bytes = int(np.prod(tensor.dims)), 4 * int(np.prod(shape))
            table = np.frombuffer(content[place : place + table_bytes], "<f4").reshape(shape)
            place += table_bytes
            indices = unpack(content[place : place + -(-count * bits // 8)], bits, count)
            place += -(-count * bits // 8)
            values = decode(Coded(indices, table), bits).reshape(tensor.dims)
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), name))
    except (ValueError, KeyError, struct.error, DecodeError) as error:
        raise InputError(f"{stored}: not a whole file of the storage codec ({error}); store it again.") from None
    return proto
