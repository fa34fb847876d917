"""In: candidates of detectors. Out: how far two are apart, their own surprise, and their loss against true boxes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hirelc_deploy.tasks.detection_boxes import codes, overlaps
from hirelc_deploy.tasks.detection_heads import FOUND, Candidates, Head, paired

FLOOR = 0.01
"""Weight of a candidate that sees nothing: two thousand of these weigh as much as an image's twenty sure ones."""

ALPHA, GAMMA = 0.25, 2.0
"""Of the focal loss (Lin et al. 2017)."""

NEGATIVES = 3
"""The hardest candidates without an object that count, for each with one (Liu et al. 2016)."""


def divergence(wanted: Candidates, found: Candidates, temperature: float) -> Tensor:
    """Return (n,) class and box divergences, mean over candidates, each weighted by how surely it sees something.

    The class part is the Kullback-Leibler divergence in nats, times the temperature squared: of one distribution where
    classes exclude each other, else summed over classes. The box part is the smooth L1 distance of the codes, mean over
    the four, of what the uncut model sees alone: where that is nothing, a box says nothing.
    """
    wanted, found = paired(wanted, found)
    seen = wanted.foreground().detach()
    weights = seen + FLOOR
    if wanted.labels is not None:  # a list has no places without an object: what is found too much must weigh by itself
        weights = torch.maximum(weights, found.foreground().detach())
    class_part = _class_divergence(wanted.logits / temperature, found.logits / temperature, wanted.exclusive)
    apart = found.codes_from(wanted)
    box_part = F.smooth_l1_loss(apart, torch.zeros_like(apart), reduction="none").mean(-1)
    return (weights * class_part * temperature**2 + seen * box_part).sum(1) / weights.sum(1)


def surprise(candidates: Candidates, generator: torch.Generator) -> Tensor:
    """Return (n,) losses against classes and boxes that are drawn from the candidates themselves.

    Every candidate draws its class, or each class of it whether it is there, and boxes are moved by Gaussian noise.
    Gradients of different draws are independent and of mean zero, so that the expected square of their sum is the sum
    of the expected squares. Each is weighted by the root of its weight in `divergence`: the sum is the curvature there.
    """
    seen = candidates.foreground().detach()
    share = 1 / (seen + FLOOR).sum(1, keepdim=True)
    class_part = _drawn_class_loss(candidates, generator)
    own = candidates.codes_from(_held(candidates))
    noise = torch.randn(own.shape, generator=generator, device=generator.device, dtype=torch.float64).to(own)
    box_part = (own - (own.detach() + noise)).square().sum(-1) / 4  # gradient noise / 2: the mean over four has 1/4
    return (((seen + FLOOR) * share).sqrt() * class_part + (seen * share).sqrt() * box_part).sum(1)


def loss(head: Head, candidates: Candidates, truths: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Return (n,) losses against true boxes, over the number of candidates that are to find one.

    The head says which those are. Classes: cross-entropy with the hardest candidates that are to find nothing, three
    for each that is to find something, where classes exclude each other; else the focal loss. Boxes: smooth L1 distance
    of codes, mean over the four. Crowds are nobody's, and who lies on one need not be background either.

    Args:
        head: Whose candidates these are.
        candidates: Of n images.
        truths: Per image (g, 4) centred boxes in the head's unit, (g,) classes, (g,) whether each is a crowd.
    """
    return torch.stack([_image_loss(head, candidates, image, *truth) for image, truth in enumerate(truths)])


def plain_divergence(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Tensor:
    """Return (n,) half the squared distance over the variance, mean over outputs: for outputs of unknown form."""
    parts = [((found[k] - w) ** 2).flatten(1).mean(1) / _variance(w) for k, w in wanted.items()]
    return torch.stack(parts).mean(0) / 2


def plain_surprise(answers: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    """Return (n,) losses against outputs moved by noise: squared gradients are the curvature of `plain_divergence`."""
    total = torch.zeros(1)
    for answer in answers.values():
        noise = torch.randn(answer.shape, generator=generator, device=generator.device, dtype=torch.float64).to(answer)
        scale = (_variance(answer) * answer[0].numel() * len(answers)).sqrt()
        total = total.to(answer) + ((answer - answer.detach() + noise) ** 2).flatten(1).sum(1) / 2 / scale
    return total


def _variance(answer: Tensor) -> Tensor:
    return answer.detach().flatten(1).var(1, correction=0).clamp(min=1e-12)


def _held(candidates: Candidates) -> Candidates:
    """Return the candidates as constants."""
    own = None if candidates.codes is None else candidates.codes.detach()
    return replace(candidates, boxes=candidates.boxes.detach(), codes=own)


def _class_divergence(wanted: Tensor, found: Tensor, exclusive: bool) -> Tensor:
    if exclusive:
        wanted_log, found_log = wanted.log_softmax(-1), found.log_softmax(-1)
        return (wanted_log.exp() * (wanted_log - found_log)).sum(-1)
    here = wanted.sigmoid() * (F.logsigmoid(wanted) - F.logsigmoid(found))
    absent = (-wanted).sigmoid() * (F.logsigmoid(-wanted) - F.logsigmoid(-found))
    return (here + absent).sum(-1)


def _drawn_class_loss(candidates: Candidates, generator: torch.Generator) -> Tensor:
    logits = candidates.logits
    shape = (*logits.shape[:2], 1) if candidates.exclusive else logits.shape
    chance = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64).to(logits.device)
    if candidates.exclusive:
        reached = logits.detach().double().softmax(-1).cumsum(-1) <= chance
        return -logits.log_softmax(-1).gather(-1, reached[..., :-1].sum(-1, keepdim=True))[..., 0]
    drawn = (chance < logits.detach().double().sigmoid()).to(logits)
    return F.binary_cross_entropy_with_logits(logits, drawn, reduction="none").sum(-1)


def _image_loss(head: Head, candidates: Candidates, image: int, boxes: Tensor, labels: Tensor, crowd: Tensor) -> Tensor:
    logits, places = candidates.logits[image], candidates.boxes[image]
    which = torch.full((len(logits),), -1, dtype=torch.long, device=logits.device)
    true_boxes, true_labels = boxes[~crowd], labels[~crowd]
    if len(true_boxes):
        with torch.no_grad():
            which = head.assigned(candidates, image, true_boxes, true_labels)
    finds = which >= 0
    counts = torch.ones_like(finds)
    if crowd.any():
        start = places.detach() if candidates.anchors is None else candidates.anchors
        counts = finds | (overlaps(start, boxes[crowd], of_ours=True).amax(1) < FOUND)
    found = max(1, int(finds.sum()))
    class_labels = true_labels if candidates.labels is None else torch.zeros_like(true_labels)
    class_loss = _class_loss(logits, finds, counts, class_labels[which[finds]], candidates.exclusive)
    wanted = true_boxes[which[finds]]
    if candidates.codes is not None and candidates.anchors is not None:
        apart = candidates.codes[image, finds] - codes(wanted, candidates.anchors[finds], candidates.smallest)
    else:
        apart = codes(places[finds], wanted, candidates.smallest)
    box_loss = F.smooth_l1_loss(apart, torch.zeros_like(apart), reduction="sum") / 4
    return (class_loss + box_loss) / found


def _class_loss(logits: Tensor, finds: Tensor, counts: Tensor, labels: Tensor, exclusive: bool) -> Tensor:
    """Return the sum over candidates; (f,) labels are those of the candidates that are to find something."""
    if exclusive:
        wanted = torch.full((len(logits),), logits.shape[1] - 1, dtype=torch.long, device=logits.device)
        wanted[finds] = labels
        each = F.cross_entropy(logits, wanted, reduction="none")
        empty = each[counts & ~finds]
        hardest = empty.topk(min(len(empty), NEGATIVES * max(1, int(finds.sum())))).values
        return each[finds].sum() + hardest.sum()
    wanted_here = torch.zeros_like(logits)
    wanted_here[finds, labels] = 1.0
    cross_entropy = F.binary_cross_entropy_with_logits(logits, wanted_here, reduction="none")
    wrong = (wanted_here - logits.sigmoid()).abs()
    balance = ALPHA * wanted_here + (1 - ALPHA) * (1 - wanted_here)
    return (balance * wrong**GAMMA * cross_entropy)[counts].sum()
