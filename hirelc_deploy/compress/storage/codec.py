"""In: an ONNX file. Out: a file for storage only whose weights take 2 to 7 bits; restore.py is the way back.

No runtime computes in these widths, nor without single weights: a stored file is decoded at load into an ordinary ONNX
file. It is smaller on disk and on the wire and not a bit faster. Every byte is counted: packed indices, the places of
those that are written, scales or codebooks, and the header.
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

from hirelc_deploy.compress.storage.restore import MAGIC, WEIGHTS
from hirelc_deploy.errors import InputError

BITS = range(2, 8)
GAP_BITS = range(2, 9)
"""Of the distance between two written indices, where most of a tensor's are the same and left out."""

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
    """Return 2**bits values for the whole tensor by k-means (Lloyd 1982), and the nearest of them for each weight.

    Where more weights are 0 than one of so many values would stand for, one value is 0 and the others are for the rest.
    """
    flat = weights.ravel()
    zeros = flat == 0
    if 2.0**-bits < zeros.mean() < 1 and bits > 1:
        rest = _codebook(flat[~zeros], 2**bits - 1)
        indices = np.zeros(len(flat), np.uint8)
        indices[~zeros] = rest.indices + 1
        return Coded(indices, np.concatenate([np.zeros((1, 1), np.float32), rest.table], axis=1))
    return _codebook(flat, 2**bits)


def _codebook(flat: Floats, size: int) -> Coded:
    values = np.quantile(flat, (np.arange(size) + 0.5) / size)
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


@dataclass(frozen=True)
class Packed:
    """A tensor's indices as bytes, and what restore.py needs to read them.

    Attributes:
        gap_bits: 0 where every index is written; else the most frequent one, `common`, is not. 1 for a bit per weight
            that says whether its index is written, more for as many bits of distance before each written one.
        written: Indices that are written.
    """

    content: bytes
    gap_bits: int
    common: int
    written: int


def smallest(indices: Indices, bits: int) -> Packed:
    """Return the indices in the form of the fewest bytes, those that say where the written ones are included."""
    every = Packed(pack(indices, bits), 0, 0, len(indices))
    common = int(np.bincount(indices).argmax())
    places = np.flatnonzero(indices != common)
    if len(places) > 0.9 * len(indices):  # a place takes a tenth of an index at least
        return every
    found = [every]
    written = indices[places]
    flags = pack((indices != common).astype(np.uint8), 1)
    found.append(Packed(flags + pack(written, bits), 1, common, len(written)))
    before = np.diff(places, prepend=-1) - 1
    for gap_bits in GAP_BITS:
        most = 2**gap_bits - 1
        # A distance that does not fit is bridged by common indices that are written after all.
        bridges = before // (most + 1)
        ends = np.cumsum(bridges + 1) - 1
        gaps = np.full(len(written) + int(bridges.sum()), most, np.uint8)
        codes = np.full(len(gaps), common, np.uint8)
        gaps[ends], codes[ends] = before - bridges * (most + 1), written
        found.append(Packed(pack(gaps, gap_bits) + pack(codes, bits), gap_bits, common, len(gaps)))
    return min(found, key=lambda one: len(one.content))


def without_small(weights: Floats, sparsity: float) -> Floats:
    """Return the weights with this share of them, the smallest in size, set to 0; ties go in order."""
    flat = weights.ravel().copy()
    flat[np.argsort(np.abs(flat), kind="stable")[: round(sparsity * len(flat))]] = 0
    return flat.reshape(weights.shape)


def check(bits: int, scheme: str, sparsity: float = 0.0) -> None:
    """Raise InputError for a width, a scheme or a share that does not exist."""
    if bits not in BITS or scheme not in ENCODERS:
        raise InputError(f"storage codec {scheme!r} with {bits} bits: use {', '.join(ENCODERS)} with 2 to 7 bits.")
    if not 0 <= sparsity < 1:
        raise InputError(f"storage codec: a share of {sparsity:g} cannot be left out; give a number from 0 to below 1.")


def store(
    model: Path,
    out: Path,
    bits: int,
    scheme: str,
    *,
    sparsity: float = 0.0,
    bits_of: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Write a file for storage only: weights of more than one dimension as codes, all else as it is.

    Integer weights come back as the integers nearest to what the codes mean, under the scales the file has; what a
    runtime then executes is the same integer file with fewer different weights. restore.py is the way back.

    Args:
        sparsity: Share of each tensor's weights, the smallest, that becomes 0 first.
        bits_of: Of single tensors by name; the others take `bits`.

    Raises:
        InputError: a width, scheme or share that does not exist.
    """
    for width in {bits, *bits_of.values()}:
        check(width, scheme, sparsity)
    proto = onnx.load(str(model))
    parts, records, place = [], [], 0
    for tensor in coded_tensors(proto):
        weights = numpy_helper.to_array(tensor)
        record, content = stored_tensor(weights, bits_of.get(tensor.name, bits), scheme, sparsity)
        records.append(record)
        parts.append(content)
        set_external_data(tensor, WEIGHTS, offset=place, length=weights.nbytes)
        for data in ("raw_data", "float_data", "int32_data"):
            tensor.ClearField(data)
        place += weights.nbytes
    header = f'{{"scheme":"{scheme}","tensors":[{",".join(records)}]}}'.encode()
    graph = proto.SerializeToString()
    out.write_bytes(b"".join([MAGIC, struct.pack("<II", len(header), len(graph)), header, graph, *parts]))


def stored_tensor(weights: NDArray[np.generic], bits: int, scheme: str, sparsity: float) -> tuple[str, bytes]:
    """Return a tensor's record in the header, as JSON, and its bytes: the table, then the indices."""
    values = weights.astype(np.float32)
    coded = ENCODERS[scheme](without_small(values, sparsity) if sparsity else values, bits)
    packed = smallest(coded.indices, bits)
    record: dict[str, object] = {
        "count": weights.size,
        "type": weights.dtype.name,
        "table": list(coded.table.shape),
        "bits": bits,
        "gap_bits": packed.gap_bits,
    }
    if packed.gap_bits:
        record |= {"common": packed.common, "written": packed.written}
    return json.dumps(record, separators=(",", ":")), coded.table.astype("<f4").tobytes() + packed.content


def coded_tensors(proto: onnx.ModelProto) -> list[TensorProto]:
    """Return the weights that a stored file holds as codes."""
    return [t for t in proto.graph.initializer if t.data_type in CODED_TYPES and len(t.dims) > 1]
