"""In: a float ONNX file and a few images. Out: the same function with channels of like range, before they are rounded.

An activation tensor has one scale for all its channels, and one wide channel costs all others their precision. Where
convolutions write channels and convolutions read them, with nothing but sums between (the linear bottlenecks of
MobileNetV2 and its kin, residual sums included), a channel may be multiplied at its writers and divided at its readers
(Nagel et al., Data-Free Quantization, 2019, section 4.1; there without residual sums, and with weights' ranges alone).

The factor of a channel is sqrt(w / r): r is its range in the images, w the largest share of its readers' weights. On
MobileNetV2 with ImageNet weights the divergence of the integer file from the float one fell from 0.028 to 0.021 nats.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, numpy_helper

from hirelc_deploy.compress.onnx_file.export import give_each_layer_its_own_constants, layer_of_node
from hirelc_deploy.compress.onnx_file.links import makers_of, readers_of
from hirelc_deploy.compress.onnx_file.watch import Watch

LARGEST = 16.0
"""A channel is multiplied or divided by this at most: silent channels are not blown up to noise."""

Factors = Mapping[str, NDArray[np.float32]]
"""Layer name to one factor per channel."""


@dataclass(frozen=True)
class Stream:
    """Tensors with the same channels: those that `writers` write and `readers` read, and all sums of them."""

    tensors: tuple[str, ...]
    writers: tuple[NodeProto, ...]
    readers: tuple[NodeProto, ...]


def streams(proto: ModelProto) -> list[Stream]:
    """Return the streams of a float file that only convolutions write and read."""
    makers, readers = makers_of(proto.graph), readers_of(proto.graph)
    constants = {initializer.name: initializer for initializer in proto.graph.initializer}
    named = layer_of_node(proto)
    layers = [layer for layer in named.values() if layer]
    once = {name for name, layer in named.items() if layers.count(layer) == 1}
    outputs = {value.name for value in proto.graph.output}

    def is_sum(node: NodeProto) -> bool:
        return node.op_type == "Add" and not any(tensor in constants for tensor in node.input)

    def is_layer(node: NodeProto | None) -> bool:
        return node is not None and node.op_type == "Conv" and node.name in once

    found, seen = [], set[str]()
    for start in proto.graph.node:
        if not is_layer(start) or start.output[0] in seen:
            continue
        tensors, waiting = set[str](), [start.output[0]]
        while waiting:
            tensor = waiting.pop()
            if tensor in tensors:
                continue
            tensors.add(tensor)
            maker = makers.get(tensor)
            sums = [node for node in readers.get(tensor, []) if is_sum(node)]
            sums += [maker] if maker is not None and is_sum(maker) else []
            waiting += [name for node in sums for name in (*node.input, *node.output)]
        seen |= tensors
        writing = [makers.get(tensor) for tensor in sorted(tensors)]
        others = [node for node in writing if node is None or not is_sum(node)]
        reading = [node for tensor in sorted(tensors) for node in readers.get(tensor, []) if not is_sum(node)]
        dense = all(_group(node) == 1 and node.input[0] in tensors for node in reading)
        if reading and dense and not tensors & outputs and all(map(is_layer, (*others, *reading))):
            found.append(Stream(tuple(sorted(tensors)), tuple(n for n in others if n is not None), tuple(reading)))
    return found


def equalise(proto: ModelProto, images: Iterable[NDArray[np.float32]]) -> tuple[Factors, Factors]:
    """Return what the outputs of writers and the inputs of readers are multiplied by; nothing without a stream.

    Args:
        proto: A float file of any batch.
        images: Batches of (n, channels, height, width).
    """
    found = streams(proto)
    if not found:
        return {}, {}
    layers = layer_of_node(proto)
    constants = {initializer.name: initializer for initializer in proto.graph.initializer}
    largest = _largest(proto, [tensor for stream in found for tensor in stream.tensors], images)
    written: dict[str, NDArray[np.float32]] = {}
    read: dict[str, NDArray[np.float32]] = {}
    for stream in found:
        ranges = np.max([largest[tensor] for tensor in stream.tensors], axis=0)
        weights = [np.abs(numpy_helper.to_array(constants[node.input[1]])) for node in stream.readers]
        shares = [(w / np.maximum(w.max((1, 2, 3), keepdims=True), 1e-12)).max((0, 2, 3)) for w in weights]
        factors = np.sqrt(np.maximum(np.max(shares, axis=0), 1e-3) / np.maximum(ranges, 1e-6))
        factors = np.clip(factors / np.exp(np.log(factors).mean()), 1 / LARGEST, LARGEST).astype(np.float32)
        written |= {layers[node.name]: factors for node in stream.writers}
        read |= {layers[node.name]: 1 / factors for node in stream.readers}
    return written, read


def scale(proto: ModelProto, written: Factors, read: Factors) -> None:
    """Multiply outputs of writers and inputs of readers, in place; each layer must own its constants."""
    layers = layer_of_node(proto)
    constants = {initializer.name: initializer for initializer in proto.graph.initializer}

    def change(name: str, factors: NDArray[np.float32]) -> None:
        values = numpy_helper.to_array(constants[name]) * factors
        constants[name].CopyFrom(numpy_helper.from_array(values.astype(np.float32), name))

    for node in proto.graph.node:
        layer = layers.get(node.name, "")
        if node.op_type == "Conv" and layer in written:
            change(node.input[1], written[layer][:, None, None, None])
            if len(node.input) > 2:
                change(node.input[2], written[layer])
        if node.op_type == "Conv" and layer in read:
            change(node.input[1], read[layer][None, :, None, None])


def write_equalised(batched: Path, static: Path, images: Sequence[NDArray[np.float32]]) -> tuple[Path, Path]:
    """Write a model's two float files with like channels beside them and return their paths, or those given.

    Args:
        batched, static: Of any batch and of one; they stay as they are.
        images: Batches of (n, channels, height, width); a few dozen images do.
    """
    written, read = equalise(onnx.load(str(batched)), images)
    if not written:
        return batched, static
    paths = []
    for path in (batched, static):
        proto = onnx.load(str(path))
        give_each_layer_its_own_constants(proto)
        scale(proto, written, read)
        paths.append(path.with_suffix(".equalised.onnx"))
        paths[-1].write_bytes(proto.SerializeToString())
    return paths[0], paths[1]


def _largest(
    proto: ModelProto, tensors: Sequence[str], images: Iterable[NDArray[np.float32]]
) -> dict[str, NDArray[np.float32]]:
    """Return tensor to the (channels,) largest magnitude in the images."""
    watch = Watch(proto)
    for tensor in tensors:
        for operator in ("ReduceMin", "ReduceMax"):
            watch.reduce(operator, tensor, (0, 2, 3))
    values = [*map(watch.open(), images)]
    return {
        tensor: np.max([np.abs(found[end]) for found in values for end in (2 * index, 2 * index + 1)], axis=0)
        for index, tensor in enumerate(tensors)
    }


def _group(node: NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
