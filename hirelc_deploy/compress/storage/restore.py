"""Turns a file of the storage codec back into an ONNX file that a runtime executes.

    python restore.py model.stored FOLDER

writes FOLDER/model.onnx and its weights, FOLDER/model.bin. It needs Python 3.8 and numpy, and nothing else.
"""

from __future__ import annotations

import json
import os
import struct
import sys

import numpy as np
from numpy.typing import NDArray

MAGIC = b"HDCODEC3"
WEIGHTS = "model.bin"


def unpack(packed: bytes, bits: int, count: int) -> NDArray[np.uint8]:
    """Return (count,) indices below 2**bits that lie in `packed` with no bit between them."""
    each = np.unpackbits(np.frombuffer(packed, np.uint8), count=count * bits).reshape(count, bits)
    return np.packbits(np.pad(each, ((0, 0), (8 - bits, 0))), axis=1)[:, 0]


def dense(packed: bytes, record: dict[str, int]) -> NDArray[np.uint8]:
    """Return (count,) indices: those that are written, and the common one everywhere else.

    The places of the written ones are a bit per weight (`gap_bits` 1), or how many common ones lie before each of them.
    """
    count, bits, gap_bits = record["count"], record["bits"], record["gap_bits"]
    if not gap_bits:
        return unpack(packed, bits, count)
    indices = np.full(count, record["common"], np.uint8)
    written, index_bytes = record["written"], index_size(record)
    codes = unpack(packed[index_bytes:], bits, written)
    if gap_bits == 1:
        places = np.flatnonzero(unpack(packed[:index_bytes], 1, count))
    else:
        gaps = unpack(packed[:index_bytes], gap_bits, written)
        places = np.cumsum(gaps.astype(np.int64) + 1) - 1
    indices[places] = codes
    return indices


def index_size(record: dict[str, int]) -> int:
    """Return the bytes that say where the written indices of a tensor are."""
    if not record["gap_bits"]:
        return 0
    return -(-record["count"] // 8) if record["gap_bits"] == 1 else -(-record["written"] * record["gap_bits"] // 8)


def code_size(record: dict[str, int]) -> int:
    """Return the bytes of a tensor's indices and of their places."""
    written = record["written"] if record["gap_bits"] else record["count"]
    return index_size(record) + -(-written * record["bits"] // 8)


def decode_linear(indices: NDArray[np.uint8], table: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """Return (rows, n) weights from (rows * n,) codes of symmetric steps and (rows, 1) scales."""
    steps = indices.reshape(len(table), -1).astype(np.float32) - np.float32(2 ** (bits - 1) - 1)
    return np.asarray(steps * table, np.float32)


def decode_log(indices: NDArray[np.uint8], table: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """Return (rows, n) weights from (rows * n,) codes of signed powers of two and (rows, 1) largest weights."""
    code = indices.reshape(len(table), -1).astype(np.int32)
    magnitude = np.exp2(-((np.maximum(code, 1) - 1) // 2).astype(np.float32)) * table
    return np.asarray(np.where(code == 0, 0.0, np.where((code - 1) % 2, -magnitude, magnitude)), np.float32)


def decode_codebook(indices: NDArray[np.uint8], table: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """Return (count,) weights from (count,) places in the one row of `table`."""
    return np.asarray(table[0][indices], np.float32)


DECODERS = {"linear": decode_linear, "log": decode_log, "codebook": decode_codebook}


def tensor_of(
    indices: NDArray[np.uint8], table: NDArray[np.float32], bits: int, scheme: str, dtype: str
) -> NDArray[np.generic]:
    """Return (count,) values of one tensor, integers rounded to the nearest they can be."""
    values = DECODERS[scheme](indices, table, bits).ravel()
    if dtype == "int8":
        return np.clip(np.rint(values), -128, 127).astype(np.int8)
    return values.astype("<f4")


def restore(stored: str, folder: str) -> str:
    """Write model.onnx and model.bin; raises ValueError for what is not a whole stored file."""
    with open(stored, "rb") as file:
        content = file.read()
    try:
        if content[:8] != MAGIC:
            raise ValueError(f"it starts with {content[:8]!r}")
        header_bytes, graph_bytes = struct.unpack_from("<II", content, 8)
        header = json.loads(content[16 : 16 + header_bytes].decode())
        place = 16 + header_bytes + graph_bytes
        graph, tensors = content[16 + header_bytes : place], []
        for record in header["tensors"]:
            table_ends = place + 4 * int(np.prod(record["table"]))
            ends = table_ends + code_size(record)
            table = np.frombuffer(content[place:table_ends], "<f4").reshape(record["table"])
            indices = dense(content[table_ends:ends], record)
            tensors.append(tensor_of(indices, table, record["bits"], header["scheme"], record["type"]).tobytes())
            place = ends
        if place != len(content):
            raise ValueError(f"{len(content)} bytes where {place} were expected")
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise ValueError(f"{stored}: not a whole file of the storage codec ({error}); store it again.") from None
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, WEIGHTS), "wb") as file:
        file.write(b"".join(tensors))
    path = os.path.join(folder, "model.onnx")
    with open(path, "wb") as file:
        file.write(graph)
    return path


if __name__ == "__main__":
    print(restore(*sys.argv[1:3]))
