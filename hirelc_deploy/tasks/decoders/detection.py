"""In: a detector's outputs as arrays. Out: the boxes they mean, one dict an image. For Python 3.8 and numpy alone."""

from __future__ import annotations

from typing import Any

import numpy as np

STEP = 128  # boxes that are compared with each other at once; those of one object mostly lie within one step
CANDIDATES = 5000  # boxes an image that suppression looks at; 100 are kept, and those below are far less sure
LARGEST = np.log(1000 / 16)  # of a size code: anchors grow to 62 times at most, as in torchvision, so nothing overflows


def decode(outputs: dict[str, Any], options: dict[str, Any], arrays: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one dict an image: boxes (x0, y0, x1, y1 in pixels of the input), scores, labels and names; best first.

    Args:
        outputs: Name to (n, ...) float array.
        options: `classes`, `input_size` (channels, height, width) and what the task says in its `decoder_options`.
        arrays: For SSD `anchors`, (a, 4) centre x, centre y, width, height as shares of the input.
    """
    only = list(outputs) if len(outputs) == 1 else []  # whatever it is called, there is no other
    known = {role: next(k for k in [*names, *only] if k in outputs) for role, names in options["outputs"].items()}
    by_role = {role: outputs[name] for role, name in known.items()}
    boxes, scores, labels = HEADS[options["head"]](by_role, options, arrays)
    return [_picked(boxes[i], scores[i], None if labels is None else labels[i], options) for i in range(len(boxes))]


def line(result: dict[str, Any]) -> str:
    """Return one line for a terminal: the five best boxes and how many more."""
    best = ["%s %.2f" % pair for pair in list(zip(result["names"], result["scores"]))[:5]]  # noqa: B905, UP031
    more = len(result["names"]) - len(best)
    return (", ".join(best) or "nothing found") + (f", and {more} more" if more > 0 else "")


def _ssd(outputs: dict[str, Any], options: dict[str, Any], arrays: dict[str, Any]) -> Any:
    scores, anchors = _probabilities(outputs["scores"], options), arrays["anchors"]
    if options["background"] is not None:
        scores = np.delete(scores, options["background"], axis=-1)
    order = [0, 1, 2, 3] if options["code_order"] == "xywh" else [1, 0, 3, 2]
    codes = outputs["boxes"][..., order] * np.array(options["variances"], dtype=np.float32)
    centres = codes[..., :2] * anchors[:, 2:] + anchors[:, :2]
    sizes = np.exp(np.minimum(codes[..., 2:], LARGEST)) * anchors[:, 2:]
    return _corners(centres, sizes) * _pixels(options), scores, None


def _detr(outputs: dict[str, Any], options: dict[str, Any], arrays: dict[str, Any]) -> Any:
    scores, boxes = _probabilities(outputs["scores"], options), outputs["boxes"]
    boxes = _corners(boxes[..., :2], boxes[..., 2:]) * _pixels(options)
    if options["scores"] == "sigmoid":
        return boxes, scores, None
    return boxes, scores[..., :-1].max(-1), scores[..., :-1].argmax(-1)  # the last is no object; one class a query


def _yolo(outputs: dict[str, Any], options: dict[str, Any], arrays: dict[str, Any]) -> Any:
    found = outputs["boxes"] if options["objectness"] else outputs["boxes"].transpose(0, 2, 1)
    scores = found[..., 4:5] * found[..., 5:] if options["objectness"] else found[..., 4:]
    return _corners(found[..., :2], found[..., 2:4]), scores, None


def _decoded(outputs: dict[str, Any], options: dict[str, Any], arrays: dict[str, Any]) -> Any:
    labels, scores, background = np.rint(outputs["labels"]).astype(int), outputs["scores"], options["background"]
    if background is not None:
        scores, labels = np.where(labels == background, -1, scores), labels - (labels > background)
    known = (labels >= 0) & (labels < len(options["classes"]))  # -1 is a common label of places that are not filled
    return outputs["boxes"], np.where(known, scores, -1), labels


HEADS = {"ssd": _ssd, "detr": _detr, "yolo": _yolo, "decoded": _decoded}


def _picked(boxes: np.ndarray, scores: np.ndarray, labels: Any, options: dict[str, Any]) -> dict[str, Any]:
    flat = scores.ravel()
    chosen = np.flatnonzero(flat >= options["score_threshold"])
    if len(chosen) > CANDIDATES:
        chosen = np.sort(chosen[np.argpartition(-flat[chosen], CANDIDATES)[:CANDIDATES]])
    chosen = chosen[np.argsort(-flat[chosen], kind="stable")]
    classes = scores.size // max(len(boxes), 1)
    boxes, labels = boxes[chosen // classes], chosen % classes if labels is None else labels[chosen]
    if options["nms_iou"] is None:
        kept = np.arange(len(chosen))[: options["max_detections"]]
    else:
        kept = _kept(boxes, labels, options["nms_iou"], options["max_detections"])
    boxes, labels = boxes[kept], labels[kept]
    if options.get("input_size"):
        boxes = np.clip(boxes, 0, _pixels(options))
    names = [options["classes"][label] for label in labels]
    return {"boxes": boxes.tolist(), "scores": flat[chosen[kept]].tolist(), "labels": labels.tolist(), "names": names}


def _kept(boxes: np.ndarray, labels: np.ndarray, overlap: float, limit: int) -> np.ndarray:
    """Return the places of at most `limit` boxes, best first, that overlap no better one of their class by more."""
    kept = np.empty(0, dtype=int)
    for start in range(0, len(boxes), STEP):
        if len(kept) >= limit:
            break
        step = np.arange(start, min(start + STEP, len(boxes)))
        step = step[~_too_near(boxes, labels, step, kept, overlap).any(1)]
        worse = np.triu(_too_near(boxes, labels, step, step, overlap), 1)
        alive = np.ones(len(step), dtype=bool)
        for row in range(len(step)):
            if alive[row]:
                alive &= ~worse[row]
        kept = np.concatenate([kept, step[alive]])
    return kept[:limit]


def _too_near(boxes: np.ndarray, labels: np.ndarray, ours: np.ndarray, theirs: np.ndarray, overlap: float) -> Any:
    """Return (ours, theirs) whether boxes of one class overlap by more than this share of their union."""
    (x0, y0, x1, y1), (u0, v0, u1, v1) = boxes[ours].T[..., None], boxes[theirs].T
    shared = np.maximum(np.minimum(x1, u1) - np.maximum(x0, u0), 0)
    shared *= np.maximum(np.minimum(y1, v1) - np.maximum(y0, v0), 0)
    whole = (x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - shared
    return (shared > overlap * whole) & (labels[ours][:, None] == labels[theirs])


def _corners(centres: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([centres - sizes / 2, centres + sizes / 2], -1)


def _pixels(options: dict[str, Any]) -> np.ndarray:
    return np.array([*options["input_size"][:0:-1]] * 2, dtype=np.float32)


def _probabilities(logits: np.ndarray, options: dict[str, Any]) -> Any:
    if options.get("probabilities"):
        return logits
    if options["scores"] == "sigmoid":
        return 1 / (1 + np.exp(-np.clip(logits, -80, 80)))
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)
