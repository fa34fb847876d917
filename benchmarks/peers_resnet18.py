"""Question: what do existing tools give on ResNet-18 / CIFAR-10 with the recovery that we use?

Torch-Pruning (global group Taylor importance, channels rounded to 8), then the same distillation and the same number of
epochs as `hirelc-deploy`, then ONNX Runtime's static quantizer with its settings for this CPU (Q/DQ, unsigned
activations, per-channel signed weights, min-max ranges).

    pip install torch-pruning==1.6.1
    python benchmarks/peers_resnet18.py --weights weights/cifar_resnet18.safetensors --data npz:cifar10.npz \
        --ratio 0.3 --epochs 1 --out peers

Writes peers/fp32.onnx, peers/int8.onnx and peers/cut-RATIO-int8.onnx and prints one JSON object with the accuracy of
each on all test images. Time them with ours in one run:

    hirelc-deploy benchmark peers/fp32.onnx peers/int8.onnx peers/cut-0.3-int8.onnx RUN/bundle/model.onnx
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torch_pruning
from answers import drop, right
from hirelc_backends.onnxruntime_cpu import OnnxRuntimeCpu
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import Tensor, nn

from hirelc_deploy.compress.integer import quantize
from hirelc_deploy.compress.onnx_file import export
from hirelc_deploy.compress.recovery import Recovery, Teacher, fine_tune
from hirelc_deploy.inputs.data.batches import batches
from hirelc_deploy.inputs.data.load import load_data
from hirelc_deploy.inputs.data.splits import Data
from hirelc_deploy.inputs.fitting import fit
from hirelc_deploy.inputs.models.source import ModelSource
from hirelc_deploy.progress import Progress

IMPORTANCE_IMAGES = 512


class OneByOne(CalibrationDataReader):  # type: ignore[misc]  # untyped library
    """Feeds calibration images to ONNX Runtime's quantizer, one at a time."""

    def __init__(self, images: Tensor, name: str) -> None:
        self._rest = iter([{name: image[None].numpy()} for image in images])

    def get_next(self) -> dict[str, object] | None:
        """Return the next input, or None."""
        return next(self._rest, None)


def gradients(model: nn.Module, data: Data) -> dict[str, Tensor]:
    """Return the summed gradients of the loss on IMPORTANCE_IMAGES training images, by parameter name."""
    watched = copy.deepcopy(model)
    labels = data.train.labels
    assert labels is not None
    start = 0
    for pictures in batches(data.train, 128, IMPORTANCE_IMAGES):
        F.cross_entropy(watched(pictures), torch.from_numpy(labels[start : start + len(pictures)])).backward()
        start += len(pictures)
    return {name: parameter.grad for name, parameter in watched.named_parameters() if parameter.grad is not None}


def cut_globally(
    model: nn.Module, data: Data, ratio: float, slopes: Mapping[str, Tensor]
) -> tuple[nn.Module, dict[str, NDArray[np.int64]]]:
    """Return a copy without `ratio` of all channels, the least important by global group Taylor scores.

    Args:
        slopes: Of the parameters; see `gradients`.

    Returns:
        The copy, and by layer name which of its uncut input features it still reads (layers that lost some).
    """
    cut = copy.deepcopy(model)
    for name, parameter in cut.named_parameters():
        parameter.grad = slopes[name].clone()
    pruner = torch_pruning.pruner.BasePruner(
        cut,
        data.calibration.batch(range(1)),
        torch_pruning.importance.GroupTaylorImportance(),
        pruning_ratio=ratio,
        global_pruning=True,
        max_pruning_ratio=0.9,
        ignored_layers=[cut.fc],
        round_to=8,
    )
    names = {module: name for name, module in cut.named_modules()}
    reads: dict[str, NDArray[np.int64]] = {}
    for group in pruner.step(interactive=True):
        for dependency, gone in group:
            layer = dependency.target.module
            if isinstance(layer, nn.Conv2d | nn.Linear) and dependency.handler.__name__ == "prune_in_channels":
                before = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
                reads[names[layer]] = np.setdiff1d(np.arange(before), gone)
        group.prune()
    cut.zero_grad()
    check_reads(model, cut, reads)
    return cut, reads


def check_reads(model: nn.Module, cut: nn.Module, reads: Mapping[str, NDArray[np.int64]]) -> None:
    """Raise RuntimeError unless every row of a cut layer's weights is a row of the uncut one's at these inputs."""
    layers, narrow = dict(model.named_modules()), dict(cut.named_modules())
    for name, index in reads.items():
        rows = {row.numpy().tobytes() for row in layers[name].weight.detach()[:, index].flatten(1)}
        if not all(row.numpy().tobytes() in rows for row in narrow[name].weight.detach().flatten(1)):
            raise RuntimeError(f"{name}: it is not known which features the cut layer reads.")


def write_files(model: nn.Module, data: Data, folder: Path, name: str) -> tuple[Path, Path]:
    """Write the float and the INT8 file of a model, both with a batch of one and without needless bytes."""
    floating, integer = folder / f"{name}-fp32.onnx", folder / f"{name}-int8.onnx"
    with tempfile.TemporaryDirectory() as scratch:
        batched, static = Path(scratch) / "batched.onnx", Path(scratch) / "static.onnx"
        export.export_onnx(model, data.calibration.batch(range(2)), batched)
        export.set_static_batch(batched, static)
        reader = OneByOne(
            data.calibration.batch(range(len(data.calibration))), export.open_session(static).get_inputs()[0].name
        )
        quantize_static(
            static,
            integer,
            reader,
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        floating.write_bytes(static.read_bytes())
    quantize.strip_for_shipping(floating)
    quantize.strip_for_shipping(integer)
    return floating, integer


def main() -> int:
    """Cut, recover, quantize and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--ratio", type=float, required=True, help="share of channels that go")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    data = load_data(options.data)
    factory = f"{Path(__file__).with_name('pretrained.py')}:cifar_resnet18"
    fitted = fit(ModelSource(factory, options.weights), data)
    model, data = fitted.model, fitted.data
    started = time.monotonic()
    cut, _ = cut_globally(model, data, options.ratio, gradients(model, data))
    params = sum(p.numel() for p in cut.parameters())
    if options.epochs:
        recipe = Recovery(options.epochs)
        teacher = Teacher(model, data.train, recipe.views, torch.device("cpu"))
        cut = fine_tune(cut, teacher, recipe, seed=0, progress=Progress(), name="recovery")
    seconds = time.monotonic() - started
    fp32, int8 = write_files(model, data, options.out, "uncut")
    _, ours = write_files(cut.eval(), data, options.out, f"cut-{options.ratio:g}")
    test = data.take_test()
    answers = {path.stem: right(path, test, OnnxRuntimeCpu()) for path in (fp32, int8, ours)}
    record = {
        "ratio": options.ratio,
        "epochs": options.epochs,
        "params": params,
        "seconds": round(seconds, 1),
        **drop(answers["uncut-fp32"], answers[ours.stem]),
        "accuracy": {name: float(correct.mean()) for name, correct in answers.items()},
        "size_bytes": {path.stem: path.stat().st_size for path in (fp32, int8, ours)},
    }
    print(json.dumps(record, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
