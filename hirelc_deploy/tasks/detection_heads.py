"""In: what a detector answers, in one of four forms. Out: its candidates in one form, and who is to find what."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from hirelc_deploy.errors import InputError
from hirelc_deploy.tasks.detection_boxes import CODE_UNITS, centred, codes, corners, overlaps

SURE = 1e-6
"""Probabilities of heads that answer these rather than logits are kept this far from 0 and 1."""

SMALLEST = 1 / 500
"""Width or height, as a share of the input, below which boxes count as empty."""

FOUND = 0.5
"""Overlap from which an anchor, or a box, is taken for the true one (Liu et al. 2016)."""

UNSURE = 0.05
"""Probability below which it does not matter what a query sees."""


@dataclass(frozen=True)
class Candidates:
    """The places where a detector may see something.

    Attributes:
        logits: (n, a, k) of classes; the last is the background where `exclusive`.
        exclusive: Probabilities by softmax over k, else by a sigmoid each.
        boxes: (n, a, 4) centre x, centre y, width and height, in the unit of the head.
        smallest: In the same unit, the width or height below which a box counts as empty.
        codes: (n, a, 4) what the head answers of boxes in CODE_UNITS of anchors; None where it answers boxes.
        anchors: (a, 4) centred boxes that codes start from; None where it answers boxes.
        labels: (n, a) classes where the head has chosen; k is 1 then.
        is_a_set: A place means nothing: what one query sees in one answer another may see in the next.
    """

    logits: Tensor
    exclusive: bool
    boxes: Tensor
    smallest: float
    codes: Tensor | None = None
    anchors: Tensor | None = None
    labels: Tensor | None = None
    is_a_set: bool = False

    def probabilities(self) -> Tensor:
        """Return (n, a, k) probabilities of the classes, without the background."""
        return self.logits.softmax(-1)[..., :-1] if self.exclusive else self.logits.sigmoid()

    def foreground(self) -> Tensor:
        """Return (n, a) the largest probability of a class that is not the background."""
        return self.probabilities().amax(-1)

    def of_class(self, labels: Tensor, image: int) -> Tensor:
        """Return (g, a) probability that each candidate of an image has each of (g,) classes."""
        if self.labels is not None:
            return torch.where(self.labels[image] == labels[:, None], self.logits[image, :, 0].sigmoid(), 0.0)
        probabilities = self.logits[image].softmax(-1) if self.exclusive else self.logits[image].sigmoid()
        return probabilities.T[labels]

    def codes_from(self, reference: Candidates) -> Tensor:
        """Return (n, a, 4) how far the boxes are from those of `reference`, in CODE_UNITS of anchor or reference."""
        if self.codes is not None and reference.codes is not None:
            return self.codes - reference.codes
        return codes(self.boxes, reference.boxes, self.smallest)


class Head(Protocol):
    """A form of answer."""

    @property
    def roles(self) -> Sequence[str]:
        """Its outputs by what they are, in their usual order."""

    @property
    def in_pixels(self) -> bool:
        """Whether boxes are in pixels; else they are shares of the input."""

    def check(self, outputs: Mapping[str, Tensor]) -> None:
        """Raise InputError where the shapes, by role, are not of this form."""

    def candidates(self, outputs: Mapping[str, Tensor]) -> Candidates:
        """Return the candidates of a batch from its outputs by role."""

    def assigned(self, candidates: Candidates, image: int, boxes: Tensor, labels: Tensor) -> Tensor:
        """Return (a,) which of g true boxes each candidate of an image is to find, or -1.

        Args:
            candidates: Of a batch.
            image: Which of it.
            boxes: (g, 4) centred, in the head's unit; at least one.
            labels: (g,) classes.
        """


@dataclass(frozen=True)
class Ssd:
    """Class scores (n, a, columns) and box codes (n, a, 4) of anchors (a, 4)."""

    columns: int
    background: int | None
    exclusive: bool
    anchors: Tensor
    variances: tuple[float, ...]
    rows_first: bool
    roles: ClassVar[Sequence[str]] = ("scores", "boxes")
    in_pixels: ClassVar[bool] = False

    def check(self, outputs: Mapping[str, Tensor]) -> None:
        """Raise InputError where scores, codes and anchors do not go together."""
        wanted = {"scores": (len(self.anchors), self.columns), "boxes": (len(self.anchors), 4)}
        _check_shapes(outputs, wanted, f"{len(self.anchors)} anchors and {self.columns} score columns")

    def candidates(self, outputs: Mapping[str, Tensor]) -> Candidates:
        """Return a candidate for each anchor."""
        scores, answered = outputs["scores"], outputs["boxes"]
        anchors = self.anchors.to(answered)
        if self.background is not None:
            columns = [k for k in range(self.columns) if k != self.background]
            scores = scores[..., columns + [self.background] * self.exclusive]
        if self.rows_first:
            answered = answered[..., [1, 0, 3, 2]]
        shifts = answered * answered.new_tensor(self.variances)
        centres = shifts[..., :2] * anchors[:, 2:] + anchors[:, :2]
        sizes = shifts[..., 2:].clamp(max=math.log(1000 / 16)).exp() * anchors[:, 2:]  # as the decoder: no overflow
        boxes, own = torch.cat([centres, sizes], -1), shifts / shifts.new_tensor(CODE_UNITS)
        return Candidates(scores, self.exclusive, boxes, SMALLEST, own, anchors)

    def assigned(self, candidates: Candidates, image: int, boxes: Tensor, labels: Tensor) -> Tensor:
        """Give each anchor the box that it overlaps most, from one half on, and each box at least its best anchor."""
        over = overlaps(boxes, self.anchors.to(boxes))
        most, which = over.max(0)
        which = torch.where(most >= FOUND, which, -1)
        which[over.argmax(1)] = torch.arange(len(boxes), device=boxes.device)
        return which


@dataclass(frozen=True)
class Detr:
    """Logits (n, q, columns), no object last where they exclude each other, and boxes (n, q, 4) as shares."""

    columns: int
    exclusive: bool
    roles: ClassVar[Sequence[str]] = ("scores", "boxes")
    in_pixels: ClassVar[bool] = False

    def check(self, outputs: Mapping[str, Tensor]) -> None:
        """Raise InputError where logits and boxes do not go together."""
        _check_shapes(outputs, {"scores": (None, self.columns), "boxes": (None, 4)}, f"{self.columns} score columns")

    def candidates(self, outputs: Mapping[str, Tensor]) -> Candidates:
        """Return a candidate for each query."""
        return Candidates(outputs["scores"], self.exclusive, outputs["boxes"], SMALLEST, is_a_set=True)

    def assigned(self, candidates: Candidates, image: int, boxes: Tensor, labels: Tensor) -> Tensor:
        """Give each box one query, the best pair first.

        A pair is worth its probability, minus five times the distance of its four numbers, plus twice its overlap: the
        costs of DETR (Carion et al. 2020), whose overlap is the generalised one, and whose pairing is the best of all.
        """
        ours = candidates.boxes[image]
        distance = (boxes[:, None] - ours).abs().sum(-1)
        return _one_each(candidates.of_class(labels, image) - 5 * distance + 2 * overlaps(boxes, ours), -math.inf)


@dataclass(frozen=True)
class Yolo:
    """One output with decoded boxes in pixels and probabilities of classes, as Ultralytics exports it."""

    classes: int
    objectness: bool
    roles: ClassVar[Sequence[str]] = ("boxes",)
    in_pixels: ClassVar[bool] = True

    def check(self, outputs: Mapping[str, Tensor]) -> None:
        """Raise InputError where the channels are not those of boxes and classes."""
        wanted = (None, 5 + self.classes) if self.objectness else (4 + self.classes, None)
        _check_shapes(outputs, {"boxes": wanted}, f"{self.classes} classes")

    def candidates(self, outputs: Mapping[str, Tensor]) -> Candidates:
        """Return a candidate for each place; objectness times class is the probability where there is one."""
        found = outputs["boxes"] if self.objectness else outputs["boxes"].transpose(1, 2)
        probabilities = found[..., 4:5] * found[..., 5:] if self.objectness else found[..., 4:]
        return Candidates(probabilities.clamp(SURE, 1 - SURE).logit(), False, found[..., :4], 1.0)

    def assigned(self, candidates: Candidates, image: int, boxes: Tensor, labels: Tensor) -> Tensor:
        """Give each box the ten places of the largest sqrt(probability) * overlap^6 with their centre in the box.

        As task alignment does (Feng et al. 2021, TOOD). A place of two boxes goes to that which it overlaps more.
        """
        ours = candidates.boxes[image]
        over = overlaps(boxes, ours)
        edges = corners(boxes)[:, None]
        inside = ((ours[:, :2] > edges[..., :2]) & (ours[:, :2] < edges[..., 2:])).all(-1)
        aligned = candidates.of_class(labels, image).sqrt() * over**6 * inside
        best = torch.zeros_like(inside).scatter_(1, aligned.topk(min(10, len(ours)), 1).indices, True) & (aligned > 0)
        most, which = (over * best).max(0)
        return torch.where(most > 0, which, -1)


@dataclass(frozen=True)
class Decoded:
    """Boxes (n, k, 4) by their corners in pixels, scores (n, k) and labels (n, k)."""

    background: int | None
    roles: ClassVar[Sequence[str]] = ("boxes", "scores", "labels")
    in_pixels: ClassVar[bool] = True

    def check(self, outputs: Mapping[str, Tensor]) -> None:
        """Raise InputError where boxes, scores and labels do not go together."""
        _check_shapes(outputs, {"boxes": (None, 4), "scores": (None,), "labels": (None,)}, "boxes, scores and labels")

    def candidates(self, outputs: Mapping[str, Tensor]) -> Candidates:
        """Return a candidate for each box."""
        boxes, scores, labels = outputs["boxes"], outputs["scores"], outputs["labels"].round().long()
        if self.background is not None:
            scores = scores * (labels != self.background)
            labels = torch.where(labels == self.background, -1, labels - (labels > self.background).long())
        return Candidates(scores[..., None].clamp(SURE, 1 - SURE).logit(), False, centred(boxes), 1.0, labels=labels)

    def assigned(self, candidates: Candidates, image: int, boxes: Tensor, labels: Tensor) -> Tensor:
        """Give each box one answer of its class that overlaps it by half or more, the best pair first."""
        same = candidates.labels[image] == labels[:, None] if candidates.labels is not None else labels[:, None] >= 0
        return _one_each(overlaps(boxes, candidates.boxes[image]) * same, FOUND)


def paired(wanted: Candidates, found: Candidates) -> tuple[Candidates, Candidates]:
    """Return both so that equal places mean the same object.

    Heads with places of their own have that already. Lists of boxes that were chosen change their order, so each found
    box goes to the wanted one of its class that it overlaps most. What has no partner is given one that says nothing.
    Queries are a set, and where an image chooses them (Zhu et al. 2021, two-stage) rounding changes their order.
    """
    if wanted.is_a_set and found.is_a_set:
        return wanted, _in_order_of(wanted, found)
    if wanted.labels is None or found.labels is None:
        return wanted, found
    partners = []
    for image in range(len(wanted.boxes)):
        ours, theirs = wanted.boxes[image].detach(), found.boxes[image].detach()
        over = _alike(ours, theirs) * (wanted.labels[image][:, None] == found.labels[image])
        partners.append(_one_each(over, FOUND))  # (found boxes,) its wanted one, or -1
    partner = torch.stack(partners)
    met = (partner >= 0)[..., None]
    nothing = torch.full_like(found.logits, math.log(SURE / (1 - SURE)))
    rows = partner.clamp(min=0)[..., None]
    theirs = torch.where(met, wanted.logits.gather(1, rows), nothing)
    their_boxes = torch.where(met, wanted.boxes.gather(1, rows.expand(-1, -1, 4)), found.boxes.detach())
    missed = torch.ones_like(wanted.labels, dtype=torch.bool)
    for image in range(len(missed)):
        missed[image, partner[image][partner[image] >= 0]] = False
    lost = torch.full_like(wanted.logits, math.log(SURE / (1 - SURE)))
    unmet = torch.where(missed[..., None], wanted.logits, lost)
    return (
        replace(wanted, logits=torch.cat([theirs, unmet], 1), boxes=torch.cat([their_boxes, wanted.boxes], 1)),
        replace(found, logits=torch.cat([found.logits, lost], 1), boxes=torch.cat([found.boxes, wanted.boxes], 1)),
    )


def _in_order_of(wanted: Candidates, found: Candidates) -> Candidates:
    """Return found queries each at the place of the wanted one that it is most like; as they are where these see alike.

    Of queries on one object the surer one goes to the surer one: alike are the probabilities too.
    """
    both = wanted.probabilities().detach(), found.probabilities().detach()
    sure = torch.maximum(both[0].amax(-1), both[1].amax(-1))
    orders = []
    for image, (ours, theirs) in enumerate(zip(*both, strict=True)):
        over = _alike(wanted.boxes[image].detach(), found.boxes[image].detach())
        if ((over.diagonal() >= FOUND) | (sure[image] < UNSURE)).all():
            orders.append(torch.arange(len(ours), device=over.device))
        else:
            orders.append(_one_each(over - (ours[:, None] - theirs).abs().amax(-1), -math.inf).argsort())
    order = torch.stack(orders)[..., None]
    logits = found.logits.gather(1, order.expand_as(found.logits))
    return replace(found, logits=logits, boxes=found.boxes.gather(1, order.expand_as(found.boxes)))


def _alike(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return (g, a) overlaps of boxes, 1 for equal ones that are empty and overlap nothing."""
    return torch.maximum(overlaps(ours, theirs), (ours[:, None] == theirs).all(-1).to(ours))


def _one_each(fit: Tensor, least: float) -> Tensor:
    """Return (a,) row of each column, or -1: the best of all (g, a) pairs first, each row and column once."""
    fit = fit.detach().clone()
    which = torch.full((fit.shape[1],), -1, dtype=torch.long, device=fit.device)
    for _ in range(min(fit.shape)):
        best = int(fit.argmax())
        row, column = divmod(best, fit.shape[1])
        if not fit[row, column] > least:
            break
        which[column] = row
        fit[row], fit[:, column] = -math.inf, -math.inf
    return which


def _check_shapes(outputs: Mapping[str, Tensor], wanted: Mapping[str, tuple[int | None, ...]], reason: str) -> None:
    """Raise InputError where an output's shape after the image is not as wanted, or numbers of candidates differ."""
    counts = set()
    for role, sizes in wanted.items():
        shape = tuple(outputs[role].shape)
        if len(shape) != len(sizes) + 1 or any(size not in (None, shape[k + 1]) for k, size in enumerate(sizes)):
            said = ", ".join("any" if size is None else str(size) for size in sizes)
            raise InputError(f"task detection: the output for {role} is {shape}, but {reason} need (n, {said}).")
        if len(wanted) > 1:
            counts.add(shape[:2])
    if len(counts) > 1:
        raise InputError(f"task detection: outputs have {sorted(counts)} images and boxes; all must have the same.")
