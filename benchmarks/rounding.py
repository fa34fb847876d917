"""Question: do other ranges, or weights rounded otherwise than to the nearest step, lose less than our integer file?

    python benchmarks/rounding.py --model mobilenetv2_100 --weights weights/mobilenetv2_100.safetensors \\
        --data npz:imagenet.npz --name mobilenetv2

All files are the uncut model's, in the precisions that placement chose, so that all are equally fast. Ranges: ours
(percentiles), smallest and largest, least squared error, and ONNX Runtime's entropy. Weights, with our ranges: nearest
(ours), rounded up or down for the least error of the layer's answers, and rounded one after the other so that later
ones make up for earlier ones. Both see what comes into a layer for the calibration images. Biases take back the mean of
what rounding changes in all of them.

    up or down      the objective of AdaRound (Nagel et al. 2020, equation 13), solved by flipping one weight at a time
                    while that helps, in place of its relaxation: with the moments of the inputs it needs no training
    one by one      GPTQ (Frantar et al. 2022, section 3)

Files are judged on the test images. Records of several models are kept in results/rounding.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from forms import judged, opened
from integer_accuracy import Reader
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper
from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator
from record import RESULTS, provenance
from torch import Tensor

from hirelc_deploy.compress.integer.calibration import Ranges
from hirelc_deploy.compress.onnx_file.export import layer_of_node
from hirelc_deploy.config import DataConfig, JobConfig, ModelConfig
from hirelc_deploy.evaluate.pipeline import Pipeline

POSITIONS = 16
"""Outputs of an image that tell of a layer's inputs, picked at random."""

SWEEPS, STEPS, DAMPING = 4, 127, 0.01
ENTROPY_IMAGES = 64


@dataclass
class Inputs:
    """What comes into a layer, for each group: (groups, n, n) second moments about the mean, and (groups, n) means."""

    moments: Tensor
    means: Tensor


Rounding = Callable[[Tensor, Tensor], Tensor]
"""(rows, n) weights in steps and (n, n) moments to whole steps."""


def up_or_down(steps: Tensor, moments: Tensor) -> Tensor:
    """Return each weight's lower or upper step, so that no single other choice lowers the error."""
    low, found = steps.floor(), steps.round()
    wrong = (found - steps) @ moments
    for _ in range(SWEEPS):
        flips = 0
        for column in range(steps.shape[1]):
            change = torch.where(found[:, column] > low[:, column], -1.0, 1.0)
            gain = 2 * change * wrong[:, column] + moments[column, column]
            useful = (gain < 0) & (steps[:, column] != low[:, column])
            change = change * useful
            found[:, column] += change
            wrong += change[:, None] * moments[column]
            flips += int(useful.sum())
        if not flips:
            break
    return found


def one_by_one(steps: Tensor, moments: Tensor) -> Tensor:
    """Return the nearest steps, where what is not rounded yet makes up for what is."""
    size = len(moments)
    damped = moments + DAMPING * moments.diagonal().mean().clamp(min=1e-12) * torch.eye(size)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    left, found = steps.clone(), torch.empty_like(steps)
    for column in range(size):
        found[:, column] = left[:, column].round().clamp(-STEPS, STEPS)
        error = (left[:, column] - found[:, column]) / factor[column, column]
        left[:, column + 1 :] -= error[:, None] * factor[column, column + 1 :]
    largest = steps.abs().argmax(1, keepdim=True)  # else the quantizer would choose another scale
    return found.scatter(1, largest, steps.gather(1, largest).round())


class Layers:
    """The convolutions and linear layers of a float file that have weights of their own, and what comes into them."""

    def __init__(self, proto: ModelProto, images: Sequence[NDArray[np.float32]]) -> None:
        self.constants = {one.name: one for one in proto.graph.initializer}
        known, read = layer_of_node(proto), [tensor for node in proto.graph.node for tensor in node.input]
        self.nodes = [
            node
            for node in proto.graph.node
            if node.name in known
            and node.op_type in ("Conv", "Gemm")
            and node.input[1] in self.constants
            and all(read.count(tensor) == 1 for tensor in node.input[1:])
        ]
        watched = ModelProto()
        watched.CopyFrom(proto)
        del watched.graph.output[:]
        tensors = list(dict.fromkeys(node.input[0] for node in self.nodes))
        watched.graph.output.extend(helper.make_tensor_value_info(name, 1, None) for name in tensors)
        session = onnxruntime.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
        generator, name = torch.Generator().manual_seed(0), session.get_inputs()[0].name
        sums: dict[str, tuple[Tensor, Tensor, int]] = {}
        for batch in images:
            values = dict(zip(tensors, session.run(tensors, {name: batch}), strict=True))
            for node in self.nodes:
                seen = self._taken(node, torch.from_numpy(values[node.input[0]]), generator)
                squares, total, count = sums.get(node.name, (torch.zeros(()), torch.zeros(()), 0))
                sums[node.name] = squares + seen.transpose(1, 2) @ seen, total + seen.sum(1), count + seen.shape[1]
        self.inputs = {}
        for layer, (squares, total, count) in sums.items():
            mean = total / count
            self.inputs[layer] = Inputs(squares / count - mean[:, :, None] * mean[:, None, :], mean)

    def weight(self, node: NodeProto) -> Tensor:
        """Return the (groups, outputs of a group, n) weight of a layer."""
        found, says = torch.from_numpy(numpy_helper.to_array(self.constants[node.input[1]]).copy()), _attributes(node)
        if node.op_type == "Gemm" and not says.get("transB", 0):
            found = found.T
        return found.reshape(says.get("group", 1), -1, found[0].numel())

    def _taken(self, node: NodeProto, value: Tensor, generator: torch.Generator) -> Tensor:
        """Return (groups, rows, n) of what the weights of a layer are multiplied by."""
        if node.op_type == "Gemm":
            return value.reshape(1, -1, value.shape[-1])
        says = _attributes(node)
        kernel = says.get("kernel_shape") or list(self.constants[node.input[1]].dims[2:])
        top, left, bottom, right = says.get("pads", [0, 0, 0, 0])
        strides, dilations = says.get("strides", [1, 1]), says.get("dilations", [1, 1])
        columns = F.unfold(F.pad(value, (left, right, top, bottom)), kernel, dilations, stride=strides)
        some = torch.randperm(columns.shape[2], generator=generator)[:POSITIONS]
        return columns[:, :, some].unflatten(1, (says.get("group", 1), -1)).permute(1, 0, 3, 2).flatten(1, 2)


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def rounded(static: Path, layers: Layers, how: Rounding, out: Path) -> tuple[Path, float]:
    """Write a float file whose weights lie on whole steps; return it, and the error left beside nearest steps."""
    proto, ratios = onnx.load(str(static)), []
    constants = {one.name: one for one in proto.graph.initializer}
    for node in layers.nodes:
        weight, inputs = layers.weight(node), layers.inputs[node.name]
        scale = weight.abs().amax(2, keepdim=True).clamp(min=1e-12) / STEPS
        parts = zip(weight / scale, inputs.moments, strict=True)
        steps = torch.stack([how(part, moments) for part, moments in parts])
        errors = [((one - weight / scale) * scale) for one in ((weight / scale).round(), steps)]
        before, after = (float(((error @ inputs.moments) * error).sum()) for error in errors)
        ratios.append(after / before if before > 0 else 1.0)
        named = constants[node.input[1]]
        new = (steps * scale).reshape(-1, weight.shape[2])
        if node.op_type == "Gemm" and not _attributes(node).get("transB", 0):
            new = new.T
        named.CopyFrom(numpy_helper.from_array(new.reshape(tuple(named.dims)).contiguous().numpy(), named.name))
        if len(node.input) > 2 and node.input[2] in constants:
            named = constants[node.input[2]]
            bias, shift = numpy_helper.to_array(named), (errors[1] @ inputs.means[:, :, None]).numpy()
            named.CopyFrom(numpy_helper.from_array(bias - shift.reshape(bias.shape), named.name))
    out.write_bytes(proto.SerializeToString())
    return out, float(np.median(ratios))


def entropy(ranges: Ranges, batched: Path, images: Sequence[NDArray[np.float32]], scratch: Path) -> Ranges:
    """Return the ranges of ONNX Runtime's entropy calibration, where it has them."""
    calibrator = create_calibrator(
        str(batched), augmented_model_path=str(scratch), calibrate_method=CalibrationMethod.Entropy
    )
    for image in [image[None] for batch in images for image in batch][:ENTROPY_IMAGES]:
        calibrator.collect_data(_Named([image], onnx.load(str(batched)).graph.input[0].name))
    found = calibrator.compute_data().data
    low, high = dict(ranges.low), dict(ranges.high)
    for name, entry in found.items():
        if name in low:
            least, most = entry.range_value
            low[name], high[name] = float(np.ravel(least)[0]), float(np.ravel(most)[0])
    return replace(ranges, low=low, high=high)


class _Named(Reader):
    """Gives images by the name of a file's input."""

    def __init__(self, images: Sequence[NDArray[np.float32]], name: str) -> None:
        super().__init__(images)
        self._name = name

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        image = next(self._images, None)
        return None if image is None else {self._name: image}


def written(pipeline: Pipeline, folder: Path) -> tuple[dict[str, Path], dict[str, float]]:
    """Return name to file, and the median share of the error that each rounding leaves."""
    writer, placement = pipeline.files.writer, pipeline.files.placement
    exported = writer.exported(pipeline.model, folder)
    floats = frozenset(placement.float_layers)
    images = [batch.numpy() for batch in pipeline.uncut.calibration_batches()]

    def placed(name: str, static: Path, ranges: Ranges) -> Path:
        path = folder / f"{name}.onnx"
        precision = lambda layer: "float" if layer in floats else "int8"  # noqa: E731
        writer.write_form(exported.plain, static, ranges, path, placement.pattern, precision)
        return path

    files = {"fp32": pipeline.files.reference, "ours": placed("ours", exported.static, exported.ranges)}
    for method in ("minmax", "mse"):
        files[f"ranges {method}"] = placed(method, exported.static, writer.calibrated(exported.batched, method))
    found = entropy(exported.ranges, exported.batched, images, folder / "augmented.onnx")
    files["ranges entropy"] = placed("entropy", exported.static, found)
    layers, left = Layers(onnx.load(str(exported.batched)), images), dict[str, float]()
    for name, how in (("up or down", up_or_down), ("one by one", one_by_one)):
        static, left[name] = rounded(exported.static, layers, how, folder / f"{name} float.onnx")
        files[f"weights {name}"] = placed(name, static, exported.ranges)
    return files, left


def main() -> int:
    """Print and store one model's table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--calibration-images", type=int, default=200)
    parser.add_argument("--classes", type=int)
    parser.add_argument("--run", type=Path, help="folder of the run, kept; else it is gone afterwards")
    parser.add_argument("--name", required=True, help="of the model in the record")
    options = parser.parse_args()
    arguments = {"num_classes": options.classes} if options.classes else {}
    config = JobConfig(
        ModelConfig(options.model, options.weights, arguments),
        DataConfig(options.data, calibration_images=options.calibration_images),
    )
    with opened(config, options.run) as (pipeline, folder):
        files, left = written(pipeline, folder)
        test = pipeline.data.take_test()
        forms = judged(pipeline, files, test, [*files][2:])
        record = {
            **provenance("python " + " ".join(sys.argv)),
            "test_images": len(test),
            "calibration_images": len(pipeline.data.calibration),
            "placement": {"pattern": pipeline.files.placement.pattern, "floats": pipeline.files.placement.float_layers},
            "error_left": left,
            "forms": forms,
        }
    path = RESULTS / "rounding.json"
    models = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**models, options.name: record}, indent=1) + "\n", "utf-8")
    for form, row in forms.items():
        print(f"{options.name:<16} {form:<20} divergence {row['divergence']:.5f}, drop {row['drop']['points']:+.2f}")
    print(f"error left beside nearest steps, median of layers: {left}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
