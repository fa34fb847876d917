"""Trains the YOLO-shaped and the DETR-shaped detector of task_networks.py on blood cells, one after the other.

    python benchmarks/train_detector.py --shared ../shared/tasks --data "voc:bccd,classes=RBC;WBC;Platelets" \\
        --out weights/yolo_bccd.safetensors
    python benchmarks/train_detector.py --shape detr --begin weights/yolo_bccd.safetensors --epochs 100 \\
        --learning-rate 1e-3 --shared ../shared/tasks --data "voc:bccd,classes=RBC;WBC;Platelets" \\
        --out weights/detr_bccd.safetensors

YOLO shape: its backbone begins with the SSD's weights. A cell learns a box where it lies in the box and near its
middle; of several boxes the smallest. Losses: focal (Lin et al. 2017) for the classes, generalised overlap (Rezatofighi
et al. 2019) and the cross-entropy of the two nearest bins (Li et al. 2020) for the sides. The backbone's batch norms
keep their statistics: the pictures are all of one colour.

DETR shape: the trained cells stay as they are. The decoder behind them learns, after each of its layers, from the loss
of the detection task: one query a box, focal loss, distances.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import task_networks
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hirelc_deploy.inputs.data.load import load_data
from hirelc_deploy.inputs.data.loader import Wanted, loaded
from hirelc_deploy.inputs.data.preprocess import Preprocess
from hirelc_deploy.tasks.detection import Detection

NEAR_MIDDLE = 1.5
"""Cells from the middle of a box within which cells learn it."""
FROZEN_BLOCKS = 7


def assigned(cells: Tensor, target: Mapping[str, Tensor], classes: int) -> tuple[Tensor, Tensor]:
    """Return (cells,) class of each cell, or `classes` for none, and (4, cells) corners in cells."""
    boxes = target["boxes"] * (task_networks.CELLS / task_networks.SIDE)
    found = torch.full((cells.shape[1],), classes)
    corners = torch.zeros(4, cells.shape[1])
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for index in areas.argsort(descending=True).tolist():  # the smallest comes last and stays
        low, high = boxes[index, :2, None], boxes[index, 2:, None]
        far = (cells - (low + high) / 2).abs().amax(0)
        inside = ((cells > low) & (cells < high)).all(0) & (far < NEAR_MIDDLE) | (far == far.min())
        found[inside] = target["labels"][index]
        corners[:, inside] = boxes[index][:, None]
    return found, corners


def losses(model: task_networks.DflDetector, pictures: Tensor, targets: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Return the loss of a batch."""
    sides, scores = model.logits(pictures)
    pairs = [assigned(model.cells, target, model.classes) for target in targets]
    labels, corners = torch.stack([label for label, _ in pairs]), torch.stack([corner for _, corner in pairs])
    wanted = F.one_hot(labels, model.classes + 1)[..., :-1].transpose(1, 2).float()
    chance = scores.sigmoid()
    wrong = wanted * (1 - chance) + (1 - wanted) * chance
    weight = wanted * 0.25 + (1 - wanted) * 0.75
    classes = F.binary_cross_entropy_with_logits(scores, wanted, reduction="none") * weight * wrong**2
    there = labels < model.classes
    count = max(1, int(there.sum()))
    low, high = model.corners(sides)
    found = torch.cat([low, high], 1).transpose(1, 2)[there]
    true = corners.transpose(1, 2)[there]
    at = model.cells.T.expand(len(targets), -1, -1)[there]
    distances = torch.cat([at - true[:, :2], true[:, 2:] - at], 1).clamp(0, model.bins - 1.01)
    logits = sides.permute(0, 3, 2, 1)[there]  # (boxes, 4, bins)
    return classes.sum() / count + 2 * (1 - overlap(found, true)).mean() + 0.25 * two_bins(logits, distances)


def overlap(first: Tensor, second: Tensor) -> Tensor:
    """Return (n,) generalised overlaps of (n, 4) corners, from -1 to 1."""

    def area(low: Tensor, high: Tensor) -> Tensor:
        return (high - low).clamp(min=0).prod(1)

    both = area(torch.maximum(first[:, :2], second[:, :2]), torch.minimum(first[:, 2:], second[:, 2:]))
    around = area(torch.minimum(first[:, :2], second[:, :2]), torch.maximum(first[:, 2:], second[:, 2:]))
    union = area(first[:, :2], first[:, 2:]) + area(second[:, :2], second[:, 2:]) - both
    return both / union.clamp(min=1e-6) - (around - union) / around.clamp(min=1e-6)


def two_bins(logits: Tensor, distances: Tensor) -> Tensor:
    """Return the mean cross-entropy of (n, 4, bins) with the two bins beside each of (n, 4) distances."""
    below = distances.floor()
    share = distances - below
    told = logits.log_softmax(-1)
    near, next_one = (told.gather(-1, (below.long() + step).unsqueeze(-1)).squeeze(-1) for step in (0, 1))
    return -((1 - share) * near + share * next_one).mean()


Loss = Callable[[Tensor, Sequence[Mapping[str, Tensor]]], Tensor]


def yolo_shape(shared: str) -> tuple[nn.Module, list[dict[str, Any]], list[nn.Module], Loss]:
    """Return the network, what learns with its share of the rate, what stays in eval mode, and the loss."""
    model = task_networks.yolo_bccd(shared)
    assert isinstance(model, task_networks.DflDetector)
    weights = load_file(str(Path(shared) / "ssd_bccd.safetensors"))
    begun = {
        name.replace("head.", "last.", 1): value
        for name, value in weights.items()
        if not name.startswith(("cls", "box"))
    }
    model.load_state_dict({name: value for name, value in begun.items() if not name.startswith("extras")}, strict=False)
    model.scores[-1].bias.data.fill_(-math.log(99))  # at first nothing is there (Lin et al. 2017)
    backbone = [model.stem, *model.blocks, model.last]
    for part in backbone[: 1 + FROZEN_BLOCKS]:
        part.requires_grad_(False)
    known = {id(parameter) for part in backbone for parameter in part.parameters()}
    groups = [
        {"params": [p for p in model.parameters() if p.requires_grad and id(p) in known], "lr": 0.1},
        {"params": [p for p in model.parameters() if p.requires_grad and id(p) not in known], "lr": 1.0},
    ]
    norms = [module for part in backbone for module in part.modules() if isinstance(module, nn.BatchNorm2d)]
    return model, groups, norms, partial(losses, model)


def detr_shape(shared: str, cells: Path) -> tuple[nn.Module, list[dict[str, Any]], list[nn.Module], Loss]:
    """Return the same of the other shape.

    Args:
        cells: Weights of the YOLO shape.
    """
    model = task_networks.detr_bccd(shared)
    assert isinstance(model, task_networks.DetrDetector)
    model.first.load_state_dict(load_file(str(cells)))
    model.first.requires_grad_(False)
    says = {name: value for name, value in vars(model)["task_options"].items() if name != "task"}
    task = Detection(
        tuple(vars(model)["class_names"]), {**says, "input_size": [3, task_networks.SIDE, task_networks.SIDE]}
    )

    def loss(pictures: Tensor, targets: Sequence[Mapping[str, Tensor]]) -> Tensor:
        found = [task.answers(answer) for answer in model.steps(pictures)]
        return torch.stack([task.loss(each, task.collate(targets)).mean() for each in found]).sum()

    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 1.0}]
    return model, groups, [model.first], loss


def main() -> None:
    """Train and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("yolo", "detr"), default="yolo")
    parser.add_argument("--begin", type=Path, help="for detr: weights of the other shape")
    parser.add_argument("--shared", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    options = parser.parse_args()
    if options.shape == "detr" and options.begin is None:
        parser.error("--shape detr needs --begin, the weights of the other shape")
    torch.manual_seed(0)
    made = yolo_shape(options.shared) if options.shape == "yolo" else detr_shape(options.shared, options.begin)
    model, groups, still, loss_of = made
    peaks = [options.learning_rate * group.pop("lr") for group in groups]
    optimizer = torch.optim.AdamW(groups, options.learning_rate, weight_decay=1e-3)
    data = load_data(options.data).preprocessed(Preprocess(**task_networks.SSD_INPUT))
    images, generator = data.train, torch.Generator().manual_seed(0)
    per_epoch = len(images) // options.batch
    orders = [torch.randperm(len(images), generator=generator).numpy() for _ in range(options.epochs)]
    order = [
        Wanted(rows[step * options.batch : (step + 1) * options.batch].astype(np.int64), epoch)
        for epoch, rows in enumerate(orders)
        for step in range(per_epoch)
    ]
    started = time.monotonic()
    model.train()
    for part in still:
        part.eval()
    for step, batch in enumerate(loaded(images, order, targets=True)):
        scale = min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / len(order)))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * scale
        assert batch.targets is not None
        loss = loss_of(batch.pictures, list(batch.targets))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        if step % per_epoch == 0:
            print(f"epoch {step // per_epoch}, loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in model.eval().state_dict().items()}, str(options.out))


if __name__ == "__main__":
    main()
