"""In: a float ONNX graph whose constants are folded. Out: the same, its convolutions padding for themselves."""

from __future__ import annotations

from onnx import ModelProto, NodeProto, helper, numpy_helper

from hirelc_deploy.compress.onnx_file.folding import Arrays
from hirelc_deploy.compress.onnx_file.links import readers_of, reads


def pad_in_convolutions(proto: ModelProto) -> None:
    """Let each convolution that alone reads a Pad with zeros do that padding, in place.

    Torch's convolutions pad both ends of a dimension alike; where a network pads them unlike (TensorFlow's `SAME`), a
    Pad of its own is written, which took 10 % of a float SSD's time in ONNX Runtime.
    """
    graph = proto.graph
    constants = {initializer.name: numpy_helper.to_array(initializer) for initializer in graph.initializer}
    readers, outputs = readers_of(graph), {value.name for value in graph.output}
    for pad in list(graph.node):
        widths = constants.get(pad.input[1]) if pad.op_type == "Pad" and pad.output[0] not in outputs else None
        if widths is None or not _is_of_zeros(pad, constants):
            continue
        reading, before, after = readers[pad.output[0]], *_halves(widths.tolist())
        if len(reading) != 1 or any((*before[:2], *after[:2])) or min((*before, *after)) < 0:
            continue
        (convolution,) = reading
        attributes = {attribute.name: attribute for attribute in convolution.attribute}
        explicit = "auto_pad" not in attributes or attributes["auto_pad"].s in (b"", b"NOTSET")
        if convolution.op_type != "Conv" or convolution.input[0] != pad.output[0] or not explicit:
            continue
        wanted = [*before[2:], *after[2:]]
        if "pads" in attributes:
            wanted = [one + other for one, other in zip(wanted, attributes["pads"].ints, strict=True)]
            convolution.attribute.remove(attributes["pads"])
        convolution.attribute.append(helper.make_attribute("pads", wanted))
        convolution.input[0] = pad.input[0]
        graph.node.remove(pad)
    read = {tensor for node in graph.node for tensor in reads(node)} | outputs
    for initializer in [one for one in graph.initializer if one.name not in read]:
        graph.initializer.remove(initializer)


def _is_of_zeros(pad: NodeProto, constants: Arrays) -> bool:
    """Return whether a Pad puts zeros around all of its dimensions."""
    mode = next((attribute.s for attribute in pad.attribute if attribute.name == "mode"), b"constant")
    value = pad.input[2] if len(pad.input) > 2 else ""
    zeros = not value or (value in constants and not constants[value].any())
    return mode == b"constant" and zeros and not any(pad.input[3:])


def _halves(widths: list[int]) -> tuple[list[int], list[int]]:
    middle = len(widths) // 2
    return widths[:middle], widths[middle:]
