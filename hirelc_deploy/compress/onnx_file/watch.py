"""In: a float file and tensors of it. Out: a function of images that tells how large they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from hirelc_deploy.compress.onnx_file.export import open_session

PREFIX = "watch:"
"""Starts the names of what is added to the file."""

EVERYTHING = 2**62


def as_taken(proto: ModelProto, images: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
    """Yield batches of images as a file takes them: one image at a time where it is written for one."""
    one_by_one = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    for batch in images:
        yield from (batch[row : row + 1] for row in range(len(batch))) if one_by_one else (batch,)


class Watch:
    """A copy of a file whose only outputs are those that were asked for, in the order of asking."""

    def __init__(self, proto: ModelProto) -> None:
        self._proto = ModelProto()
        self._proto.CopyFrom(proto)
        del self._proto.graph.output[:]
        self._constants: set[str] = set()

    def reduce(self, operator: str, tensor: str, axes: Sequence[int] = ()) -> None:
        """Ask for a tensor's ReduceMin, ReduceMax or ReduceMean over these axes, over all where none is named."""
        inputs = [tensor, self._constant(axes)] if axes else [tensor]
        rank: list[int | None] = [None] if axes else []
        self._ask(operator, inputs, rank, keepdims=0)

    def sample(self, tensor: str, step: int) -> None:
        """Ask for every `step`-th value of a tensor."""
        flat = f"{PREFIX}flat:{len(self._proto.graph.node)}"
        self._proto.graph.node.append(helper.make_node("Reshape", [tensor, self._constant([-1])], [flat]))
        start, end = self._constant([0]), self._constant([EVERYTHING])
        self._ask("Slice", [flat, start, end, start, self._constant([step])], [None])

    def open(self, threads: int = 1) -> Callable[[NDArray[np.float32]], list[NDArray[np.float32]]]:
        """Return what takes (n, channels, height, width) images and gives the values that were asked for."""
        session = open_session(self._proto, threads)
        name = session.get_inputs()[0].name
        return lambda images: session.run(None, {name: np.ascontiguousarray(images, dtype=np.float32)})

    def _ask(self, operator: str, inputs: list[str], shape: list[int | None], **attributes: int) -> None:
        graph = self._proto.graph
        output = f"{PREFIX}{len(graph.output)}"
        graph.node.append(helper.make_node(operator, inputs, [output], **attributes))
        graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, shape))

    def _constant(self, values: Sequence[int]) -> str:
        name = f"{PREFIX}constant:{','.join(map(str, values))}"
        if name not in self._constants:
            self._constants.add(name)
            self._proto.graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name
