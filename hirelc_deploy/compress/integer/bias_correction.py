"""In: an integer file and the mean inputs of its layers. Out: biases that take back what rounding the weights shifts.

Rounding a weight matrix W to Q shifts the mean output of its layer by (Q - W) E[x], the same for every image: a bias of
the layer can take that back for nothing (Nagel et al., Data-Free Quantization, 2019, section 4.2, there with E[x] from
batch norm; here it is measured). Layers of few inputs gain most, depthwise ones above all, because little averages out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper

from hirelc_deploy.compress.onnx_file.export import layer_of_node

INT32 = np.iinfo(np.int32)


def observed_inputs(proto: ModelProto) -> dict[str, tuple[str, str]]:
    """Return layer name to its input tensor and operator, for convolutions and linear layers that run once.

    A layer that runs on several tensors has no one mean input, and is left out.
    """
    layers = layer_of_node(proto)
    found: dict[str, tuple[str, str]] = {}
    twice: set[str] = set()
    for node in proto.graph.node:
        layer = layers.get(node.name, "")  # also of nodes whose layer the exporter lost
        if layer and node.op_type in ("Conv", "Gemm", "MatMul"):
            twice |= {layer} & found.keys()
            found[layer] = node.input[0], node.op_type
    return {layer: entry for layer, entry in found.items() if layer not in twice}


def correct_biases(
    integer: ModelProto,
    weights: Mapping[str, NDArray[np.float32]],
    means: Mapping[str, Sequence[float]],
    sizes: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Change the biases of a Q/DQ file, in place.

    Args:
        weights: Node name to the float weight that was rounded, as its node holds it.
        means: Layer name to the (inputs,) mean of each input channel or feature. Layers without one stay as they are.
        sizes: Node name of a convolution to the size of its input without batch and channels; without one its image
            counts as if it went on beyond its borders.
    """
    layers = layer_of_node(integer)
    sizes = sizes or {}
    constants = {initializer.name: initializer for initializer in integer.graph.initializer}
    makers = {node.output[0]: node for node in integer.graph.node if node.op_type == "DequantizeLinear"}
    for node in integer.graph.node:
        mean = means.get(layers.get(node.name, ""))
        pairs = [makers[tensor].input[:2] for tensor in node.input[1:3] if tensor in makers]
        if mean is None or node.name not in weights or len(pairs) < 2 or pairs[1][0] not in constants:
            continue  # a Gemm may add a tensor, such as a shortcut, in place of a bias
        weight, bias = ([numpy_helper.to_array(constants[name]).astype(np.float64) for name in pair] for pair in pairs)
        shift = mean_shift(node, weights[node.name], weight, np.array(mean), sizes.get(node.name, ()))
        if shift is None:
            continue
        corrected = bias[0] - np.rint(shift / bias[1])
        name = pairs[1][0]
        values = np.clip(corrected, INT32.min, INT32.max).astype(np.int32)
        constants[name].CopyFrom(numpy_helper.from_array(values, name))


def mean_shift(
    node: NodeProto,
    before: NDArray[np.float32],
    rounded: Sequence[NDArray[np.float64]],
    mean: NDArray[np.float64],
    size: Sequence[int] = (),
) -> NDArray[np.float64] | None:
    """Return the (outputs,) mean that rounding added; None where the inputs are not those of the weight."""
    values, scale = rounded
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if node.op_type == "Conv":
        error = values * scale.reshape(-1, *[1] * (before.ndim - 1)) - before
        for axis, share in enumerate(inside(attributes, before.shape[2:], size)):
            error = error * share.reshape(-1, *[1] * (before.ndim - 3 - axis))
        error = error.sum(axis=tuple(range(2, before.ndim)))
    elif node.op_type == "Gemm":
        error = values * (scale[:, None] if attributes.get("transB", 0) else scale) - before
        error = error if attributes.get("transB", 0) else error.T
    else:
        return None
    groups = attributes.get("group", 1) if node.op_type == "Conv" else 1
    missing = groups * error.shape[1] - len(mean)
    if missing and not (groups == 1 and 0 < missing < error.shape[1] and not before[:, len(mean) :].any()):
        return None
    inputs = np.pad(mean, (0, missing)).reshape(groups, error.shape[1])  # a stem is padded by channels of zeros
    shift: NDArray[np.float64] = (error * inputs.repeat(len(error) // groups, 0)).sum(axis=1)
    return shift


def inside(attributes: Mapping[str, Any], kernel: Sequence[int], size: Sequence[int]) -> Iterator[NDArray[np.float64]]:
    """Yield per dim of a convolution the share of its outputs for which each weight meets the image, not its border."""
    dims = len(kernel)
    if len(size) != dims or attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        return
    pads = attributes.get("pads", [0] * 2 * dims)
    strides, dilations = attributes.get("strides", [1] * dims), attributes.get("dilations", [1] * dims)
    for dim in range(dims):
        reach = dilations[dim] * (kernel[dim] - 1)
        count = (size[dim] + pads[dim] + pads[dims + dim] - reach - 1) // strides[dim] + 1
        starts = np.arange(count) * strides[dim] - pads[dim]
        at = starts[None, :] + dilations[dim] * np.arange(kernel[dim])[:, None]
        yield ((at >= 0) & (at < size[dim])).mean(axis=1)
