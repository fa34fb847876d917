"""In: an ONNX file that cannot become layers. Out: a model that answers through ONNX Runtime, to be placed uncut."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.answers import stacked
from hirelc_deploy.inputs.models.onnx_files import runtime
from hirelc_deploy.inputs.models.onnx_files.network import constant, place
from hirelc_deploy.inputs.models.onnx_files.proto import OnnxFile, self_contained, tensors_of

HELP = "export the network without it, or give its torch code (file.py:make)"

INPUT = "input"
"""What the only input is called in every file that is made here; the programs of bundles know it by that."""

SAME = 1e-5
"""Largest difference of an image alone and beside another, as a share of the output's largest value."""


class WholeFile:
    """An ONNX file of one float32 input, (n, channels, height, width), with all its tensors in it.

    Attributes:
        reason: Why it is no network of layers; the text follows its name.
        batched: It takes any number of images and answers each as it does alone; else it takes one.
    """

    def __init__(self, name: str, model: ModelProto, reason: str, batched: bool) -> None:
        self.name, self.model, self.reason, self.batched = name, model, reason, batched

    def __deepcopy__(self, memo: Any) -> WholeFile:
        """Return itself: it never changes, and copies of a model share it."""
        return self

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what it answers."""
        return tuple(value.name for value in self.model.graph.output)

    def answer(self, images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Return (n, ...) arrays by the names of the outputs."""
        name = self.model.graph.input[0].name
        rows = len(images) if self.batched else 1
        parts = [self._session.run(None, {name: images[at : at + rows]}) for at in range(0, len(images), rows)]
        columns = zip(*parts, strict=True)
        return {
            output: stacked(column).astype(np.float32, copy=False)
            for output, column in zip(self.outputs, columns, strict=True)
        }

    @cached_property
    def _session(self) -> Any:
        return runtime.open_plain(self.model.SerializeToString(), torch.get_num_threads())


class FileNetwork(nn.Module):
    """A network that is known as a file alone: nothing of it can be cut or trained, and no slopes go through it.

    `forward` takes (n, channels, height, width) images and returns tensors by the names of the file's outputs. Its
    parameters and buffers are the file's constants, so that they are counted and kept in bundles.
    """

    def __init__(self, file: WholeFile) -> None:
        super().__init__()
        self.file = file
        for number, tensor in enumerate(tensors_of(file.model.graph)):
            values = torch.from_numpy(np.array(numpy_helper.to_array(tensor)))
            if values.numel():
                place(self, re.sub(r"[^\w.]", "_", tensor.name) or f"constant_{number}", constant(values))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Answer (n, channels, height, width) images, by the names of the outputs."""
        found = self.file.answer(np.ascontiguousarray(images.detach().numpy(), np.float32))
        return {name: torch.from_numpy(values) for name, values in found.items()}


def whole_network(
    file: OnnxFile, given: str, batch: int | None, size: tuple[int, int, int], last: bool, reason: str
) -> FileNetwork:
    """Return a file as a model, seen to answer random images as the file does.

    Args:
        given: Name of its input.
        batch: The number of images that it is written for; None where any will do.
        size: (channels, height, width).
        last: It takes (n, height, width, channels).
        reason: Why it cannot become layers.

    Raises:
        InputError: ONNX Runtime does not run it with one image, or its answers are of no use.
    """
    model = _standard(file, given, size, last)
    try:
        shapes = runtime.shapes_of_answers(model.SerializeToString(), (1, *size))
    except InputError as error:
        raise InputError(f"{file.path}: {reason}, and as it is {error}; {HELP}.") from None
    names = [value.name for value in model.graph.output]
    for name, shape in zip(names, shapes, strict=True):
        if not shape or shape[0] != 1:
            raise InputError(
                f"{file.path}: {reason}, and as it is output {name} has the shape {list(shape)} for one image, whose "
                f"first dimension must be the image; {HELP}."
            )
    images = np.random.default_rng(1).standard_normal((2, *size), np.float32)
    wanted = runtime.run(file.source, file.path, names, images, batch or 1, last)
    alone = WholeFile(file.path.name, model, reason, batched=False)
    found, again = alone.answer(images), alone.answer(images)
    for name, values in wanted.items():
        if not np.isfinite(values).all():
            raise InputError(f"{file.path}: output {name} holds NaN or infinity on random images; check its weights.")
        if max(runtime.difference(found[name], other) for other in (values, again[name])) > SAME:
            raise InputError(f"{file.path}: {reason}, and as it is it answers otherwise each time; {HELP}.")
    together = _any_batch(file.path.name, model, reason) if batch is None else None
    same = together is not None and _same(together, images, found)
    return FileNetwork(together if together is not None and same else alone).eval()


def _standard(file: OnnxFile, given: str, size: tuple[int, int, int], last: bool) -> ModelProto:
    """Return the file for one image of (channels, height, width), first dimension the image."""
    if file.half:
        raise InputError(f"{file.path}: it has 16-bit floats and cannot become layers; export it with 32-bit ones.")
    model = self_contained(file)
    graph = model.graph
    (value,) = [one for one in graph.input if one.name == given]
    if value.type.tensor_type.elem_type != TensorProto.FLOAT:
        raise InputError(f"{file.path}: its input holds doubles and it cannot become layers; export it with floats.")
    if given != INPUT:
        _rename(graph, INPUT, f"{INPUT}:own")
        _rename(graph, given, INPUT)
    if last:
        turned = f"{INPUT}:last"
        _rename(graph, INPUT, turned)
        node = helper.make_node("Transpose", [INPUT], [turned], f"{turned}/Transpose", perm=[0, 2, 3, 1])
        nodes = [node, *graph.node]
        del graph.node[:]
        graph.node.extend(nodes)
    del graph.input[:]  # older files list their tensors here too
    graph.input.append(helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, (1, *size)))
    del graph.value_info[:]
    for output in graph.output:
        if output.type.HasField("tensor_type"):
            output.type.tensor_type.ClearField("shape")
    return model


def _rename(graph: GraphProto, old: str, new: str) -> None:
    """Call a tensor otherwise, in the graphs within nodes too; outputs of the network keep their names."""
    for tensor in graph.initializer:
        tensor.name = new if tensor.name == old else tensor.name
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _rename(inner, old, new)
                for value in inner.output:
                    value.name = new if value.name == old else value.name


def _any_batch(name: str, model: ModelProto, reason: str) -> WholeFile | None:
    """Return the file for any number of images; None where ONNX Runtime does not take it."""
    batched = ModelProto()
    batched.CopyFrom(model)
    first = batched.graph.input[0].type.tensor_type.shape.dim[0]
    first.Clear()
    first.dim_param = "batch"
    file = WholeFile(name, batched, reason, batched=True)
    try:
        _ = file._session
    except Exception:  # the runtime's exception classes share no base below Exception
        return None
    return file


def _same(file: WholeFile, images: NDArray[np.float32], alone: dict[str, NDArray[np.float32]]) -> bool:
    """Return whether a file answers images beside others as it does alone."""
    try:
        found = file.answer(images)
    except Exception:  # as above
        return False
    return all(runtime.difference(found[name], values) <= SAME for name, values in alone.items())
