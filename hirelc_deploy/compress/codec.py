"""In: an ONNX file. Out: a file for storage only whose weights take 2 to 7 bits; restore.py is the way back.

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
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import set_external_data

from hirelc_deploy.compress.restore import MAGIC, WEIGHTS
from hirelc_deploy.errors import InputError

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


ENCODERS: Mapping[str, Callable[[Floats, int], Coded]] = MappingProxyType(
    {"linear": encode_linear, "log": encode_log, "codebook": encode_codebook}
)
CODED_TYPES: Mapping[int, str] = MappingProxyType({TensorProto.FLOAT: "float32", TensorProto.INT8: "int8"})


def pack(indices: Indices, bits: int) -> bytes:
    """Return indices below 2**bits with no bit between them."""
    return np.packbits(np.unpackbits(indices[:, None], axis=1, count=8)[:, 8 - bits :]).tobytes()


def check(bits: int, scheme: str) -> None:
    """Raise InputError for a width or a scheme that does not exist."""
    if bits not in BITS or scheme not in ENCODERS:
        raise InputError(f"storage codec {scheme!r} with {bits} bits: use {', '.join(ENCODERS)} with 2 to 7 bits.")


def store(model: Path, out: Path, bits: int, scheme: str) -> None:
    """Write a file for storage only: weights of more than one dimension as codes, all else as it is.

    Integer weights come back as the integers nearest to what the codes mean, under the scales the file has; what a
    runtime then executes is the same integer file with fewer different weights. restore.py is the way back.

    Raises:
        InputError: a width or scheme that does not exist.
    """
    check(bits, scheme)
    proto = onnx.load(str(model))
    parts, records, place = [], [], 0
    for tensor in proto.graph.initializer:
        if tensor.data_type not in CODED_TYPES or len(tensor.dims) < 2:
            continue
        weights = numpy_helper.to_array(tensor)
        coded = ENCODERS[scheme](weights.astype(np.float32), bits)
        records.append([weights.size, CODED_TYPES[tensor.data_type], list(coded.table.shape)])
        parts += [coded.table.astype("<f4").tobytes(), pack(coded.indices, bits)]
        set_external_data(tensor, WEIGHTS, offset=place, length=weights.nbytes)
        for data in ("raw_data", "float_data", "int32_data"):
            tensor.ClearField(data)
        place += weights.nbytes
    header = json.dumps({"bits": bits, "scheme": scheme, "tensors": records}, separators=(",", ":")).encode()
    graph = proto.SerializeToString()
    out.write_bytes(b"".join([MAGIC, struct.pack("<II", len(header), len(graph)), header, graph, *parts]))
