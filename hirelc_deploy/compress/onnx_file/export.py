"""In: a torch module. Out: a float ONNX file that computes the same, its nodes named after the module's layers."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from hirelc_deploy.compress.onnx_file.folding import Arrays, Recipe, fold, tensors_of
from hirelc_deploy.compress.onnx_file.links import makers_of, reads
from hirelc_deploy.compress.onnx_file.pads import pad_in_convolutions
from hirelc_deploy.errors import ExportError, InputError, check_room
from hirelc_deploy.graph.answers import OUTPUT, Answers, answers, named
from hirelc_deploy.inputs.models.onnx_files.runtime import difference, least_scales

OPSET = 20
"""The first opset whose Gelu is one operator; before, a quantizer meets it as five and takes four of them apart."""

PARITY_TOLERANCE = 1e-4
"""Largest difference between torch and ONNX Runtime, as a share of the largest output. Float kernels reach 1e-6."""

UNWRITTEN = "cannot be exported"
"""Begins what is said where an exporter writes nothing."""

WEIGHT_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Export:
    """An exported model.

    Attributes:
        recipe: How its constants come from the module's tensors; None where that is not known.
    """

    proto: ModelProto
    recipe: Recipe | None


def export_onnx(model: nn.Module, example: Tensor, path: Path, *, dynamic_batch: bool = True) -> None:
    """Write `model` as float32 ONNX and check that ONNX Runtime computes what torch computes.

    BatchNorm is folded into convolutions, dropout and identities are gone, spatial means are GlobalAveragePool
    (which has an integer kernel, ReduceMean has none), and every node is called `layer/Operator` by the torch name
    of its layer. TorchScript's exporter comes first because it is 20 times faster than the one on torch.export
    (0.1 s against 2 s for the demo network); the slow one takes over where the fast one fails or differs.

    Args:
        example: (n, channels, height, width) images; only its shape, and the scale of its values, matter.
        dynamic_batch: Let the file take any number of images; else exactly n.

    Raises:
        ExportError: a weight or output that is not finite, a model that cannot be exported, or outputs that differ.
    """
    path.write_bytes(exported(model, example, dynamic_batch=dynamic_batch).proto.SerializeToString())


def exported(model: nn.Module, example: Tensor, *, dynamic_batch: bool = True) -> Export:
    """Return what `export_onnx` writes, with the recipe of its constants."""
    failures: list[str] = []
    with evaluating(model):
        probes = probe(model, example, (1, len(example) + 2) if dynamic_batch else (len(example),) * 2)
        for exporter in (_torchscript, _torch_export):
            try:
                export = exporter(model, example)
                proto = _finish(export.proto, example, dynamic_batch)
                check_parity(proto.SerializeToString(), probes)
            except ExportError as error:
                failures.append(str(error))
            else:
                return Export(proto, export.recipe)
        unwritten = all(failure.startswith(UNWRITTEN) for failure in failures)
        if dynamic_batch and unwritten and _fits_one_number_of_images(model, example):
            raise ExportError(
                f"{type(model).__name__}: can be written for one number of images, but not for any: that number is the "
                "groups of a convolution or the like; multiply image by image (torch.bmm, torch.einsum) in its place."
            )
    raise ExportError(f"{type(model).__name__}: {'; the second exporter: '.join(failures)}")


def _fits_one_number_of_images(model: nn.Module, example: Tensor) -> bool:
    try:
        _torchscript(model, example, False)
    except ExportError:
        return False
    return True


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; raises ExportError when its weights cannot be written."""
    _check_weights(model)
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def set_static_batch(path_in: Path, path_out: Path, batch: int = 1) -> None:
    """Write `path_in` for exactly `batch` images, with all shape arithmetic folded into constants.

    With known shapes ONNX Runtime also turns MatMul + bias into Gemm, whose integer kernel adds the bias by itself.
    Node names keep the layer they start with.

    Raises:
        InputError: an integer file. It keeps its shape arithmetic and its MatMul; quantize the static file instead.
    """
    proto = onnx.load(str(path_in))
    if any(node.op_type == "QuantizeLinear" for node in proto.graph.node):
        raise InputError(f"{path_in}: already quantized; set the batch of the float file, then quantize that.")
    path_out.write_bytes(static_batch(proto, batch).SerializeToString())


def static_batch(proto: ModelProto, batch: int = 1) -> ModelProto:
    """Return the float model for exactly `batch` images; see `set_static_batch`."""
    static = ModelProto()
    static.CopyFrom(proto)
    for value in (*static.graph.input, *static.graph.output):
        dimensions = value.type.tensor_type.shape.dim
        if len(dimensions) > 0:
            dimensions[0].Clear()
            dimensions[0].dim_value = batch
    del static.graph.value_info[:]
    return optimised(static)


def layer_of_node(proto: ModelProto) -> dict[str, str]:
    """Return node name to layer name for each Conv, ConvTranspose, Gemm and MatMul that has a constant weight.

    Works on float files and on those of `quantize`, whose constants pass a DequantizeLinear.
    """
    constants = {initializer.name for initializer in proto.graph.initializer}
    constants |= {
        node.output[0] for node in proto.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in constants
    }
    return {
        node.name: node.name.partition("/")[0]
        for node in proto.graph.node
        if node.op_type in (*WEIGHT_OPERATORS, "MatMulNBits") and node.input[1] in constants
    }


def give_each_layer_its_own_constants(proto: ModelProto) -> None:
    """Copy weights and biases that several nodes read, as equal biases are after export; in place.

    The quantizer replaces a constant for all its readers, so a float layer would read what was rounded for another.
    """
    constants = {initializer.name: initializer for initializer in proto.graph.initializer}
    readers = Counter(tensor for node in proto.graph.node for tensor in reads(node))
    for node in proto.graph.node:
        if node.op_type in WEIGHT_OPERATORS:
            for position, tensor in enumerate(node.input):
                if tensor in constants and readers[tensor] > 1:
                    copy = TensorProto()
                    copy.CopyFrom(constants[tensor])
                    copy.name = node.input[position] = f"{tensor}:{node.name}"
                    proto.graph.initializer.append(copy)


def open_session(model: ModelProto | Path | bytes, threads: int = 1) -> onnxruntime.InferenceSession:
    """Load a model into ONNX Runtime on the CPU; raises ExportError with the runtime's own words."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what fails is raised too
    source = str(model) if isinstance(model, Path) else model if isinstance(model, bytes) else model.SerializeToString()
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exception classes share no base below Exception
        raise ExportError(f"ONNX Runtime refuses the model: {str(error).strip().splitlines()[0]}") from None


def _check_weights(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            if tensor.dtype != torch.float32:
                raise ExportError(f"{name}: {tensor.dtype}, but the file is float32; call model.float() first.")
            if not torch.isfinite(tensor).all():
                raise ExportError(f"{name}: holds NaN or infinity; train or load the weights again.")


def _outputs(answer: Answers) -> dict[str, NDArray[np.float32]]:
    for name, output in answer.items():
        if not output.is_floating_point():
            raise ExportError(f"output {name!r} holds {output.dtype}; a model's outputs must be floats.")
        if not torch.isfinite(output).all():
            which = "" if len(answer) == 1 else f" {name!r}"
            raise ExportError(
                f"the model's output{which} holds NaN or infinity on its example; check weights and input scale."
            )
    return {name: output.numpy() for name, output in answer.items()}


Probe = tuple[Tensor, dict[str, NDArray[np.float32]]]
"""Images, and what torch answers to them, by name of the output."""


def probe(model: nn.Module, example: Tensor, sizes: Sequence[int]) -> list[Probe]:
    """Return torch's answers to batches of these sizes, unlike `example`."""
    generator = torch.Generator().manual_seed(0)
    scale = float(example.std()) if example.numel() > 1 and float(example.std()) > 0 else 1.0
    shapes = [(size, *example.shape[1:]) for size in sizes]
    images = [torch.randn(shape, generator=generator) * scale + example.mean() for shape in shapes]
    return [(one, _outputs(answers(model, one))) for one in images]


@contextlib.contextmanager
def _in_order(model: nn.Module, example: Tensor) -> Iterator[list[str]]:
    """Let a model of several outputs return them as a tuple, and yield their names; exporters take no mappings."""
    names = list(answers(model, example))
    if names == [OUTPUT]:
        yield names
        return
    hooks, forward = dict(model._forward_hooks), model.forward

    def in_order(images: Tensor) -> tuple[Tensor, ...]:
        answer: Any = forward(images)
        for hook in hooks.values():
            told = hook(model, (images,), answer)
            answer = answer if told is None else told
        return tuple(named(answer).values())

    model._forward_hooks.clear()
    model.forward = in_order
    try:
        yield names
    finally:
        del model.forward
        model._forward_hooks.update(hooks)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' notes for their own developers off the user's terminal and out of what programs read.

    A failing TorchScript export writes its whole graph to the standard output from C++, hence the file descriptor.
    """
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    sys.stdout.flush()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), open(os.devnull, "wb") as nowhere:
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        standard_output = os.dup(1)
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(standard_output, 1)
            os.close(standard_output)
            logger.setLevel(level)


def _reason(error: Exception) -> str:
    """Return the first line of an error without values; of those that begin with advice to torch's own developers, that
    of the innermost cause."""
    cause: BaseException = error
    while cause.__cause__ is not None and "Next steps" in str(error):
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[0].partition("  [Caused by")[0][:200].rstrip(". ") if lines else type(cause).__name__


def _torchscript(model: nn.Module, example: Tensor, dynamic_batch: bool = True) -> Export:
    buffer = io.BytesIO()
    try:
        with _quiet(), _in_order(model, example) as outputs:
            torch.onnx.export(
                model,
                (example,),
                buffer,  # type: ignore[arg-type]  # takes a file object too
                dynamo=False,
                opset_version=OPSET,
                input_names=["input"],
                output_names=outputs,
                dynamic_axes={name: {0: "batch"} for name in ("input", *outputs) if dynamic_batch},
                # Tensors arrive as the module has them; `fold` computes from them and remembers how.
                training=torch.onnx.TrainingMode.PRESERVE,
                do_constant_folding=False,
            )
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ExportError(f"{UNWRITTEN} ({_reason(error)})") from None
    proto = onnx.load_from_string(buffer.getvalue())
    _name_nodes(proto, _layers_by_weight(proto, model))
    return Export(proto, fold(proto, tensors_of(model), WEIGHT_OPERATORS))


def _torch_export(model: nn.Module, example: Tensor) -> Export:
    try:
        with _quiet(), _in_order(model, example) as outputs:
            program = torch.onnx.export(
                model,
                (example if len(example) > 1 else example.repeat(2, 1, 1, 1),),  # torch.export takes 1 for a constant
                dynamo=True,
                opset_version=OPSET,
                input_names=["input"],
                output_names=outputs,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ExportError(f"{UNWRITTEN} ({_reason(error)})") from None
    assert program is not None
    proto = program.model_proto
    modules = {name for name, _ in model.named_modules()}
    layers = []
    for node in proto.graph.node:
        scopes = {item.key: item.value for item in node.metadata_props}.get("pkg.torch.onnx.name_scopes", "[]")
        # A convolution that took in its BatchNorm has the scope of the latter, but still the weight of its own layer.
        owners = [tensor.rpartition(".")[0] for tensor in node.input if node.op_type in WEIGHT_OPERATORS]
        candidates = [*filter(None, owners), *reversed(ast.literal_eval(scopes))]
        layers.append(next((name for name in candidates if name in modules), ""))
    _name_nodes(proto, layers)
    return Export(proto, None)


def _layers_by_weight(proto: ModelProto, model: nn.Module) -> list[str]:
    """Return the layer of each node that TorchScript wrote: whose weight it reads, else where it was called.

    Scopes leave out modules that are not called themselves, so that `body.0.conv` may be called `conv`, as another
    layer is. Of layers that share a weight the file has one name, and there the scope says which it is.
    """
    modules, makers, tensors = dict(model.named_modules()), makers_of(proto.graph), tensors_of(model)
    layers = []
    for node in proto.graph.node:
        layer, weight = _layer_on_path(node.name.split("/")[1:-1], modules), ""
        if node.op_type in WEIGHT_OPERATORS:
            maker = makers.get(node.input[1])
            weight = maker.input[0] if maker is not None and maker.op_type == "Transpose" else node.input[1]
        owner = weight.rpartition(".")[0]
        if weight in tensors and owner in modules and not _share_a_weight(modules[owner], modules[layer]):
            layer = owner
        layers.append(layer)
    return layers


def _share_a_weight(one: nn.Module, other: nn.Module) -> bool:
    weight = getattr(one, "weight", None)
    return isinstance(weight, Tensor) and getattr(other, "weight", None) is weight


def _layer_on_path(path: list[str], modules: Container[str]) -> str:
    """Return the module that a TorchScript scope ends in: [`layer2`, `down`, `down.0`] is layer2.down.0."""
    layer, previous = "", ""
    for step in path:
        # A child of a Sequential repeats its parent's own name in front of its index.
        below = step.removeprefix(previous) if previous and step.startswith(f"{previous}.") else f".{step}"
        layer = next((name for name in (f"{layer}{below}".strip("."), f"{layer}.{step}") if name in modules), layer)
        previous = step
    return layer


def _name_nodes(proto: ModelProto, layers: list[str]) -> None:
    """Call each node `layer/Operator`, and a second one of the same layer and operator `layer/Operator_2`."""
    used: Counter[str] = Counter()
    for node, layer in zip(proto.graph.node, layers, strict=True):
        name = f"{layer}/{node.op_type}"
        used[name] += 1
        node.name = name if used[name] == 1 else f"{name}_{used[name]}"


def _finish(proto: ModelProto, example: Tensor, dynamic_batch: bool) -> ModelProto:
    """Pin every dimension but the batch, use GlobalAveragePool, fold constants, pad in convolutions."""
    graph = proto.graph
    for value in graph.input:
        if dynamic_batch and value.type.tensor_type.shape.dim[0].HasField("dim_value"):
            raise ExportError("what it computes depends on the number of images")
        for dimension, size in list(zip(value.type.tensor_type.shape.dim, example.shape, strict=True))[dynamic_batch:]:
            dimension.Clear()
            dimension.dim_value = size
    if not dynamic_batch:
        del graph.value_info[:]
        for value in graph.output:
            value.type.tensor_type.shape.dim[0].Clear()
            value.type.tensor_type.shape.dim[0].dim_value = len(example)
    pool_instead_of_mean(proto)
    finished = optimised(proto)
    pad_in_convolutions(finished)
    check_finite({i.name: numpy_helper.to_array(i) for i in finished.graph.initializer})
    return finished


def check_finite(constants: Arrays) -> None:
    """Raise ExportError when a float constant is not finite."""
    for name, value in constants.items():
        if value.dtype == np.float32 and not np.isfinite(value).all():
            raise ExportError(f"{name}: NaN or infinity after folding; its BatchNorm has a broken variance.")


def pool_instead_of_mean(proto: ModelProto) -> None:
    """Replace each ReduceMean over height and width of a 4-d tensor by GlobalAveragePool (and Flatten)."""
    graph = proto.graph
    shapes = onnx.shape_inference.infer_shapes(proto).graph
    rank = {v.name: len(v.type.tensor_type.shape.dim) for v in (*shapes.value_info, *shapes.input)}
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer if i.data_type == TensorProto.INT64}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    nodes: list[NodeProto] = []
    for node in graph.node:
        axes = constants.get(node.input[1]) if node.op_type == "ReduceMean" and len(node.input) > 1 else None
        if axes is None or rank.get(node.input[0]) != 4 or sorted(axis % 4 for axis in axes.tolist()) != [2, 3]:
            nodes.append(node)
            continue
        keep = next((a.i for a in node.attribute if a.name == "keepdims"), 1)
        pooled = node.output[0] if keep else f"{node.output[0]}_pooled"
        name = node.name.replace("ReduceMean", "GlobalAveragePool")
        nodes.append(helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], name))
        if not keep:
            flatten = node.name.replace("ReduceMean", "Flatten_pooled")
            nodes.append(helper.make_node("Flatten", [pooled], [node.output[0]], flatten, axis=1))
    del graph.node[:]
    graph.node.extend(nodes)


def optimised(proto: ModelProto) -> ModelProto:
    """Return the model after ONNX Runtime's basic rewrites, which stay within standard ONNX and fold all constants."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model.onnx"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(target)
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        file = proto.SerializeToString()
        try:
            onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime's exception classes share no base below Exception
            check_room(target.parent, len(file))
            raise ExportError(f"ONNX Runtime refuses the model ({_reason(error)})") from None
        try:
            return onnx.load(str(target))
        except (DecodeError, OSError):  # ONNX Runtime does not say that a file did not fit
            check_room(target.parent, len(file))
            raise


def check_parity(file: bytes, probes: list[Probe]) -> None:
    """Raise ExportError unless ONNX Runtime answers the probes as torch did."""
    session = open_session(file)
    if not session.get_inputs():
        raise ExportError("the exported file does not read its input: the forward pass leaves torch on the way")
    names = [output.name for output in session.get_outputs()]
    for images, wanted in probes:
        if names != list(wanted):
            raise ExportError(f"the exported file has outputs {', '.join(names)}, the model {', '.join(wanted)}")
        try:
            answer = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        except Exception as error:  # as in `open_session`
            raise ExportError(f"on {len(images)} images ONNX Runtime fails ({_reason(error)})") from None
        for found, (name, expected) in zip(answer, wanted.items(), strict=True):
            which = "" if len(names) == 1 else f" for {name}"
            if found.shape != expected.shape:
                raise ExportError(f"ONNX Runtime returns shape {found.shape}{which}, torch {expected.shape}")
            apart = difference(found, expected)
            if apart > PARITY_TOLERANCE:  # looked at more closely
                apart = difference(found, expected, least_scales(onnx.load_from_string(file).graph)[name])
            if not apart <= PARITY_TOLERANCE:
                raise ExportError(
                    f"on {len(images)} images ONNX Runtime differs from torch by {apart:.1e} of the largest "
                    f"output{which}, allowed is {PARITY_TOLERANCE:g}"
                )
