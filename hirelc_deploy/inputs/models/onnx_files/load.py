"""In: an ONNX file and, where it leaves it open, the size of its images. Out: a network, proven equal to the file.

A network of layers, which can be cut and trained; else the file as it is, which can be placed.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import nn

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.models.onnx_files import runtime
from hirelc_deploy.inputs.models.onnx_files.network import OnnxNetwork
from hirelc_deploy.inputs.models.onnx_files.node import LARGEST_VALUE, UnreadError
from hirelc_deploy.inputs.models.onnx_files.proto import OnnxFile, read_file, with_float_input, with_told
from hirelc_deploy.inputs.models.onnx_files.reader import read_graph
from hirelc_deploy.inputs.models.onnx_files.runtime import difference
from hirelc_deploy.inputs.models.onnx_files.whole import whole_network
from hirelc_deploy.inputs.models.ordinary import note
from hirelc_deploy.inputs.models.plain import marked

PARITY_TOLERANCE = 1e-4
"""Largest difference between the network and the file, as a share of the output's largest value; floats reach 1e-5."""

HALF_TOLERANCE = 2e-2
"""The same of a file with 16-bit floats, which the network computes in 32 bits."""

LARGEST_ROUNDING = 1e-2
"""No difference beyond is put down to rounding."""

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
CHANNELS = (1, 2, 3, 4)
"""Numbers of channels that tell a file of (n, height, width, channels) from one of (n, channels, height, width)."""

PREPROCESSING = (
    "an ONNX file does not say how its input is made of pixels: they go in from 0 to 1 as they are, unless --mean and "
    "--std say otherwise"
)

BYTES = (
    "takes bytes; what is made of it takes the same numbers as floats, from 0 to 255, and pictures become such floats "
    "unless --mean and --std say otherwise"
)
BELOW = 2e-5
"""By so much a float may miss the byte that it was made of; a network that cuts it to a whole number is one off."""


def build(
    path: Path, input_size: Sequence[int] | None = None, told: Mapping[str, Any] = MappingProxyType({})
) -> nn.Module:
    """Return the network of a file, which answers (n, channels, height, width) images by the names of its outputs.

    It is an `OnnxNetwork`, or a `FileNetwork` where the file cannot become one and ONNX Runtime runs it.

    Args:
        input_size: (channels, height, width); needed where the file leaves the height or width open.
        told: Values of the other inputs, by name, which become constants.

    Raises:
        InputError: It is no file of pictures, or ONNX Runtime does not run it.
    """
    try:
        state = path.stat()
        size = None if input_size is None else tuple(input_size)
        key = (
            str(path),
            size,
            json.dumps(dict(told), default=lambda array: array.tolist()),
            state.st_mtime_ns,
            state.st_size,
        )
    except OSError:
        raise InputError(f"{path}: no such ONNX file.") from None
    return copy.deepcopy(_built(*key))


@functools.lru_cache(maxsize=1)
def _built(name: str, input_size: tuple[int, ...] | None, told: str, _changed: int, _size: int) -> nn.Module:
    as_it_came = with_told(read_file(Path(name)), json.loads(told))
    file = with_float_input(as_it_came)
    given, batch, size, last = _input_of(file, input_size)
    try:
        network: nn.Module = _of_layers(file, given, batch, size, last)
    except UnreadError as reason:
        network = whole_network(file, given, batch, size, last, str(reason))
        note(network, f"{Path(name).name}: nothing of it is cut, its precision is placed: {reason}")
    of_bytes = file is not as_it_came
    if of_bytes:
        _check_bytes(as_it_came, network, given, size, batch, last)
    note(network, f"{Path(name).name}: {BYTES if of_bytes else PREPROCESSING}")
    if last:
        note(network, f"{Path(name).name}: takes channels last; what is made of it takes them first")
    return marked(network, {}, (), {"input_size": size, **({"std": (1 / 255,)} if of_bytes else {})})


def _of_layers(file: OnnxFile, given: str, batch: int | None, size: tuple[int, int, int], last: bool) -> OnnxNetwork:
    """Return the network of a file; raises UnreadError where it cannot become one."""
    if file.foreign:
        raise UnreadError(f"operator {file.foreign} is not of the ONNX standard")
    network = read_graph(file, given, (*size[1:], size[0]) if last else size, batch)
    network.channels_last = last
    _check_parity(file, network.eval(), size, batch)
    return network


def _input_of(file: OnnxFile, wanted: Sequence[int] | None) -> tuple[str, int | None, tuple[int, int, int], bool]:
    """Return the name of the input, the batch that it is written for, (channels, height, width), and their order."""
    inputs = [value for value in file.graph.input if value.name not in file.tensors]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs[:4]) or "none"
        raise InputError(
            f"{file.path}: it must have one input, the images; it has {len(inputs)} ({names}); give values of the "
            "others with --model-arg NAME=VALUE."
        )
    kind = inputs[0].type.tensor_type
    sizes = [dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None for dim in kind.shape.dim]
    if not inputs[0].type.HasField("tensor_type") or kind.elem_type not in FLOATS or len(sizes) != 4:
        types = TensorProto.DataType.keys()
        found = types[kind.elem_type] if 0 <= kind.elem_type < len(types) else kind.elem_type
        raise InputError(
            f"{file.path}: input {inputs[0].name} is {found} with {len(sizes)} dimensions; networks of pictures are "
            "read, which take floats or bytes (n, channels, height, width)."
        )
    last = sizes[3] in CHANNELS and sizes[1] not in CHANNELS and (sizes[1] is not None or sizes[2] is not None)
    batch, own = sizes[0], [sizes[3], *sizes[1:3]] if last else sizes[1:]
    size = list(own) if wanted is None else list(wanted)
    if wanted is not None and (len(size) != 3 or not all(type(edge) is int and edge > 0 for edge in size)):
        raise InputError(f"--input-size {wanted!r}: give channels,height,width.")
    if any(there not in (None, edge) for there, edge in zip(own, size, strict=True)):
        raise InputError(
            f"{file.path}: it is written for inputs of {own}, not {size}; leave --input-size out, or export it anew."
        )
    if None in size:
        edges = zip(("channels", "height", "width"), size, strict=True)
        open_ones = " and ".join(name for name, edge in edges if edge is None)
        raise InputError(
            f"{file.path}: its input leaves {open_ones} open; say the size that it is to run at with "
            "--input-size CHANNELS,HEIGHT,WIDTH."
        )
    channels, height, width = (int(edge) for edge in size if edge is not None)
    if (batch or 3) * channels * height * width > LARGEST_VALUE:
        raise InputError(f"{file.path}: inputs of {[batch or 'n', *size]} are larger than any picture.")
    return inputs[0].name, batch, (channels, height, width), last


def _check_parity(file: OnnxFile, network: OnnxNetwork, size: tuple[int, int, int], batch: int | None) -> None:
    """Raise UnreadError unless the network answers two random images as the file does in ONNX Runtime."""
    images = torch.randn((2, *size), generator=torch.Generator().manual_seed(1))
    wanted = runtime.run(file.source, file.path, network.output_names, images.numpy(), batch, network.channels_last)
    with torch.no_grad():
        found = {name: values.numpy() for name, values in network(images).items()}
    scales = runtime.least_scales(file.graph)
    tolerance = HALF_TOLERANCE if file.half else PARITY_TOLERANCE
    for name, values in wanted.items():
        if not np.isfinite(values).all():
            raise InputError(f"{file.path}: output {name} holds NaN or infinity on random images; check its weights.")
        apart = difference(found[name], values, scales[name])
        if not apart <= max(tolerance, _rounding(network, images, name, found[name], values, apart)):
            raise UnreadError(
                f"output {name} of what was read differs from the file's in ONNX Runtime by {apart:.1e} of its "
                f"largest value, more than {tolerance:g}"
            )


def _check_bytes(
    file: OnnxFile, network: nn.Module, given: str, size: tuple[int, int, int], batch: int | None, last: bool
) -> None:
    """Raise InputError unless the network answers floats as the file answers the bytes that they stand for."""
    images = np.random.default_rng(2).integers(0, 256, (2, *size)).astype(np.float32)
    with torch.no_grad():
        found = {name: values.numpy() for name, values in network(torch.from_numpy(images - BELOW)).items()}
    wanted = runtime.run(file.source, file.path, list(found), images, batch, last)
    for name, values in wanted.items():
        if not difference(found[name], values) <= PARITY_TOLERANCE:
            raise InputError(
                f"{file.path}: input {given} takes bytes, and output {name} is another one where it is given the same "
                "numbers as floats; export it with an input of floats."
            )


def _rounding(
    network: OnnxNetwork,
    images: torch.Tensor,
    output: str,
    ours: NDArray[np.float32],
    theirs: NDArray[np.float32],
    apart: float,
) -> float:
    """Return the difference that rounding explains: where in double precision the file is as near as our own floats.

    Outputs near 0 all over, as probabilities of nothing being there are, differ by more of their largest value.
    """
    if not PARITY_TOLERANCE < apart <= LARGEST_ROUNDING:
        return 0.0
    with torch.no_grad():
        exact = copy.deepcopy(network).double()(images.double())[output].numpy()
    return apart if difference(theirs, exact) <= 4 * difference(ours, exact) else 0.0
