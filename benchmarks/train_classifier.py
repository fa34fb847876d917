"""Trains or fine-tunes a classifier with labels alone, for models that have no published weights for a data set.

    python benchmarks/train_classifier.py --model benchmarks/pretrained.py:efficientnet_lite0 \
        --model-arg imagenet_weights=weights/efficientnet_lite0.safetensors --data npz:cifar10.npz \
        --input-size 3,64,64 --epochs 3 --learning-rate 0.03 --out weights/efficientnet_lite0_cifar10.safetensors

Only the training split is used; the selection split is read once an epoch to print an accuracy. Weights are written in
half precision.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from hirelc_deploy.compress.devices import half_precision, laid_out
from hirelc_deploy.inputs.data.batches import batches
from hirelc_deploy.inputs.data.images import Images
from hirelc_deploy.inputs.data.load import load_data
from hirelc_deploy.inputs.fitting import fit
from hirelc_deploy.inputs.models.source import ModelSource
from hirelc_deploy.user_code import parse_arguments

BATCH = 128


def accuracy(model: nn.Module, images: Images, device: torch.device) -> float:
    """Return the share of right answers, in half precision where the device has it."""
    assert images.labels is not None
    model.eval()
    with torch.no_grad(), half_precision(device):
        answers = [model(pictures.to(device)).argmax(1).cpu() for pictures in batches(images, 250)]
    model.train()
    return float((torch.cat(answers).numpy() == images.labels).mean())


def main() -> int:
    """Train with SGD, a linear warm-up and a cosine to zero; every picture of every epoch is a new crop and flip."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--model-arg", action="append", default=[])
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--input-size")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--learning-rate", type=float, default=0.03)
    parser.add_argument("--float32", action="store_true", help="no bfloat16: depthwise layers on a CPU learn faster so")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = tuple(map(int, options.input_size.split(","))) if options.input_size else None
    source = ModelSource(options.model, options.weights, parse_arguments(options.model_arg))
    fitted = fit(source, load_data(options.data), {"input_size": size} if size else None)
    model, data = fitted.model, fitted.data
    assert data.train.labels is not None
    labels = torch.from_numpy(data.train.labels)
    model = laid_out(model, device).train()
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    groups = [{"params": matrices, "weight_decay": 5e-5}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, options.learning_rate, momentum=0.9, nesterov=True)
    per_epoch = len(data.train) // BATCH
    steps, started = round(options.epochs * per_epoch), time.monotonic()
    order = torch.randperm(len(data.train))
    for step in range(steps):
        epoch, position = divmod(step, per_epoch)
        if position == 0:
            order = torch.randperm(len(data.train))
        rows = order[position * BATCH : (position + 1) * BATCH]
        pictures = data.train.views(rows.numpy(), epoch).to(device, memory_format=torch.channels_last)
        rate = options.learning_rate * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with contextlib.nullcontext() if options.float32 else half_precision(device):
            logits = model(pictures)
        loss = F.cross_entropy(logits.float(), labels[rows].to(device), label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"{step}/{steps} loss {loss.item():.3f} {time.monotonic() - started:.0f} s", flush=True)
        if position == per_epoch - 1 or step == steps - 1:
            print(f"epoch {epoch + 1}: selection {accuracy(model, data.selection, device):.4f}", flush=True)
    state = {k: (v.half() if v.is_floating_point() else v).cpu().contiguous() for k, v in model.state_dict().items()}
    save_file(state, str(options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
