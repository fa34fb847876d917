"""In: a network that is known as a file alone. Out: its layers, and its files for any number of images and for one."""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto, NodeProto, helper, version_converter
from torch import Tensor, nn

from hirelc_deploy.compress.onnx_file import export
from hirelc_deploy.compress.onnx_file.links import shapes_of
from hirelc_deploy.errors import ExportError, InputError
from hirelc_deploy.graph.model_graph import KeptWhole, Layer, LayerShape, ModelGraph
from hirelc_deploy.inputs.models.onnx_files.network import layer_of, scopes
from hirelc_deploy.inputs.models.onnx_files.whole import FileNetwork, WholeFile
from hirelc_deploy.user_code import first_line

OLDEST_OPSET = 13
"""The first opset in which a weight has one scale per channel."""


@dataclass(frozen=True)
class Forms:
    """The files of a network that is known as a file alone, their nodes named after layers.

    Attributes:
        batched: For any number of images; `static` where the file takes one.
        static: For one image.
    """

    batched: ModelProto
    static: ModelProto


class FileExporter:
    """Writes the files of a `FileNetwork`, as `Exporter` writes those of a network of layers."""

    def __init__(self, example: Tensor, batch: int = 1) -> None:
        self.batch = batch
        self.filled = 0
        self.exported: Counter[str] = Counter()
        self._example = example

    def write(self, model: nn.Module, batched: Path, static: Path) -> None:
        """Write a model for any number of images, and for `batch`; raises ExportError where they answer otherwise.

        Raises:
            InputError: A batch of a file that takes one image.
        """
        assert isinstance(model, FileNetwork)
        forms = forms_of(model.file)
        if self.batch > 1 and not model.file.batched:
            raise InputError(f"{model.file.name}: it takes one image at a time; leave --batch out.")
        exactly, several = export.probe(model, self._example, (self.batch, len(self._example) + 2))
        batched.write_bytes(forms.batched.SerializeToString())
        fixed = export.static_batch(forms.batched, self.batch) if self.batch > 1 else forms.static
        static.write_bytes(fixed.SerializeToString())
        export.check_parity(static.read_bytes(), [exactly])
        if model.file.batched:
            export.check_parity(batched.read_bytes(), [several])
        self.exported["it is a file"] += 1


@functools.lru_cache(maxsize=1)
def forms_of(file: WholeFile) -> Forms:
    """Return the files of a network in the opset of all others, constants folded and batch norms in their layers.

    Raises:
        InputError: It cannot be brought to an opset with one scale per channel.
    """
    model = _converted(file)
    _name_layers(model)
    export.pool_instead_of_mean(model)
    try:
        batched = export.optimised(model)
        static = export.static_batch(batched)
    except ExportError as error:
        raise InputError(f"{file.name}: {error}") from None
    return Forms(batched if file.batched else static, static)


def graph_of(model: FileNetwork) -> ModelGraph:
    """Return the layers of a network that is known as a file alone: in no unit, and why; loops' bodies are not seen."""
    static = forms_of(model.file).static
    names = export.layer_of_node(static)
    weights = {tensor.name: tuple(tensor.dims) for tensor in static.graph.initializer}
    shapes = shapes_of(onnx.shape_inference.infer_shapes(static).graph)
    layers = tuple(_layer(node, names[node.name], weights, shapes) for node in static.graph.node if node.name in names)
    if not layers:
        raise InputError(
            f"{model.file.name}: no convolution and no linear layer outside of loops and branches; "
            "there is nothing to make integer."
        )
    size = [dimension.dim_value for dimension in static.graph.input[0].type.tensor_type.shape.dim]
    return ModelGraph(
        (size[1], size[2], size[3]),
        (),
        (),
        layers,
        (KeptWhole(model.file.name, model.file.reason),),
        sum(parameter.numel() for parameter in model.parameters()),
        sum(layer.macs for layer in layers),
    )


def _converted(file: WholeFile) -> ModelProto:
    """Return the model in the opset of all others where ONNX has a way there, else as it is."""
    opset = next(one.version for one in file.model.opset_import if one.domain in ("", "ai.onnx"))
    model = ModelProto()
    model.CopyFrom(file.model)
    if opset >= export.OPSET:
        return model
    try:
        converted = version_converter.convert_version(model, export.OPSET)
        export.open_session(converted)
    except Exception as error:  # the library's exception classes share no base below Exception
        if opset < OLDEST_OPSET:
            raise InputError(
                f"{file.name}: {file.reason}, and from opset {opset} it cannot be brought to {export.OPSET} "
                f"({first_line(error)}); export it with {OLDEST_OPSET} or later."
            ) from None
        return model
    return converted


def _name_layers(model: ModelProto) -> None:
    """Call each node `layer/Operator`; a layer is named after its weight, else after its node, and no two alike."""
    used: Counter[str] = Counter()
    for node in model.graph.node:
        layer = scopes(node.name, node.op_type)
        if node.op_type in export.WEIGHT_OPERATORS:
            layer = layer_of(node.input[1]) or layer or node.name or node.op_type
            layer = layer.replace("/", ".").strip(".")
            used[layer] += 1
            layer = layer if used[layer] == 1 else f"{layer}_{used[layer]}"
        name = f"{layer.replace('/', '.')}/{node.op_type}"
        used[name] += 1
        node.name = name if used[name] == 1 else f"{name}_{used[name]}"


def _layer(
    node: NodeProto, name: str, weights: dict[str, tuple[int, ...]], shapes: dict[str, tuple[int, ...]]
) -> Layer:
    """Return what is known of a layer; sizes that a loop decides count as 1."""
    of: dict[str, Any] = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    weight, found = weights[node.input[1]], shapes.get(node.output[0], ())
    result = tuple(max(1, size) for size in found)
    params = math.prod(weight)
    if node.op_type in ("Gemm", "MatMul"):
        outputs, inputs = (weight[0], weight[1]) if of.get("transB") else (weight[-1], weight[-2 if weight[1:] else -1])
        tokens = math.prod(result[:-1])
        linear = LayerShape("linear", tokens, (1, tokens))
        return Layer(name, linear, "", inputs, outputs, (), (), params, params * tokens)
    groups = of.get("group", 1)
    given = tuple(max(1, size) for size in shapes.get(node.input[0], ()))
    turned = node.op_type == "ConvTranspose"
    inputs, outputs = (weight[0], weight[1] * groups) if turned else (weight[1] * groups, weight[0])
    positions = math.prod(result[2:])
    size, kernel, stride = _pair(given[2:]), _pair(weight[2:]), _pair(of.get("strides", ()))
    dilation, pads = _pair(of.get("dilations", ())), of.get("pads", ())
    padding = _pair(pads[: len(pads) // 2], 0)
    if not turned and (_pair(pads[len(pads) // 2 :], 0) != padding or of.get("auto_pad", b"NOTSET") != b"NOTSET"):
        # Unlike at both ends: the layer takes as long as one without padding on what it then sees.
        answers = zip(_pair(result[2:]), stride, dilation, kernel, strict=True)
        size, padding = _pair([(o - 1) * s + d * (k - 1) + 1 for o, s, d, k in answers]), (0, 0)
    shape = LayerShape(
        "conv",
        positions,
        size,
        kernel,
        stride,
        padding,
        dilation,
        depthwise=groups > 1 and groups == inputs == outputs,
        groups=1 if groups == inputs == outputs else groups,
    )
    places = math.prod(given[2:]) if turned else positions
    return Layer(name, shape, "", inputs, outputs, (), (), params, params * places)


def _pair(sizes: Any, missing: int = 1) -> tuple[int, int]:
    """Return the last two of some sizes, (height, width)."""
    height, width = (*[missing] * (2 - len(sizes)), *sizes)[-2:]
    return int(height), int(width)
