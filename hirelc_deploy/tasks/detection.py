"""In: boxes with classes, as detectors answer them, and the true boxes. Out: detection, judged by COCO's AP."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.answers import Answers, named, selected
from hirelc_deploy.tasks import detection_losses
from hirelc_deploy.tasks.average_precision import THRESHOLDS, Matches, average_precisions, matches, resampled_precisions
from hirelc_deploy.tasks.classification import INPUT_SIZE, check_names, check_options
from hirelc_deploy.tasks.colours import colour
from hirelc_deploy.tasks.contract import Arrays, Metric
from hirelc_deploy.tasks.custom import load_function
from hirelc_deploy.tasks.decoders import detection as decoder
from hirelc_deploy.tasks.decoding import foreign_imports
from hirelc_deploy.tasks.detection_boxes import CODE_UNITS, centred
from hirelc_deploy.tasks.detection_heads import Candidates, Decoded, Detr, Head, Ssd, Yolo
from hirelc_deploy.tasks.probabilities import are_chances, are_shares, log_of, logit_of

Target = Mapping[str, Tensor]
"""Of one image: boxes (k, 4), labels (k,), crowd (k,)."""

Decode = Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], list[dict[str, Any]]]

USUAL_NAMES = {
    "scores": ("scores", "logits", "pred_logits", "cls_logits", "class_logits"),
    "boxes": ("boxes", "pred_boxes", "bbox_regression", "box_codes", "output"),
    "labels": ("labels", "classes"),
}
"""What models call their outputs, by what these are."""

DEFAULTS: Mapping[str, Any] = {
    "head": None,
    "metric": "AP",
    "input_size": None,
    "outputs": None,
    "scores": None,
    "probabilities": False,
    "background": None,
    "anchors": None,
    "variances": list(CODE_UNITS),
    "code_order": "xywh",
    "objectness": False,
    "decode": None,
    "nms_iou": "of the head",
    "score_threshold": 0.3,
    "metric_threshold": 0.001,
    "max_detections": 100,
    "flips": True,
}

DECODED_BY = (
    *("head", "scores", "probabilities", "background", "variances", "code_order", "objectness"),
    "max_detections",
)
"""Options that the decoder is told as they are."""

HEADS = ("ssd", "detr", "yolo", "decoded")
THRESHOLD_COUNTS = {"AP": len(THRESHOLDS), "AP50": 1}
"""Metric to how many of the ten overlaps it takes, from 0.5 on; None for all."""


class Detection:
    """Find objects, their boxes and their classes.

    Targets are one mapping an image: `boxes` (k, 4) float32 corners x0, y0, x1, y1 in pixels of the model's input,
    `labels` (k,) int64 from 0 without a background, and where there are crowds `crowd` (k,) bool.

    Args:
        classes: Names in the order of the labels, without the background.
        options: `head`, the form of the answers, and what belongs to it:
            `ssd`: class scores (n, a, columns) and box codes (n, a, 4). `anchors`, (a, 4) centre x, centre y, width and
            height as shares of the input, or a .npy file of them; `scores`, sigmoid or softmax; `background`, its
            column, or null; `variances` ([0.1, 0.1, 0.2, 0.2]); `code_order`, xywh or yxhw; `input_size`.
            `detr`: logits (n, q, classes + 1), no object last, and boxes (n, q, 4), centre x, centre y, width and
            height as shares; with `scores` sigmoid (n, q, classes); `input_size`.
            `yolo`: one tensor (n, 4 + classes, a) of centre x, centre y, width and height in pixels and probabilities,
            or with `objectness` (n, a, 5 + classes).
            `decoded`: boxes (n, k, 4), corners in pixels, scores (n, k), labels (n, k); `background`, its label, or
            null.
            None, with `decode`: `file.py:function`, or a function, as `decode` of the decoders. Bundles take its file,
            which may import numpy alone and have a `line` too, and its name is `decode` of the decoder's options.
            `probabilities` of an ssd or a detr: scores are what softmax or sigmoid made already (false).
            For all: `outputs`, names of the answers in this order, or those of a tuple in its order if they are the
            words above (scores, boxes, labels); `input_size`, [channels, height, width], without which boxes are not
            clipped; `metric`, AP or AP50; `nms_iou`, the overlap from which the less sure box of a class is left out,
            or null for never (0.6 for ssd and yolo, else null); `score_threshold` of boxes that people see (0.3);
            `metric_threshold` of boxes that are judged (0.001); `max_detections` an image (100); `flips`, whether
            pictures may be mirrored in training (true).

    Raises:
        InputError: An option is unknown, missing, or does not fit.
    """

    name = "detection"
    mean_of_images = False
    in_probabilities: Mapping[str, Any] = {"probabilities": True}

    def __init__(self, classes: tuple[str, ...], options: Mapping[str, Any]) -> None:
        check_options(self.name, options, tuple(DEFAULTS))
        if not classes:
            raise InputError(
                "task detection: no class names were given; name the classes in the order of their labels."
            )
        check_names(self.name, classes)
        chosen = {**DEFAULTS, **options}
        _check_kinds(chosen)
        if chosen["metric"] not in THRESHOLD_COUNTS:
            raise InputError(f"task detection: there is no metric {chosen['metric']!r}; take AP or AP50.")
        self.classes = tuple(classes)
        self.metric = Metric(chosen["metric"])
        self.flips = bool(chosen["flips"])
        self.decoder = Path(decoder.__file__)
        self.decoder_arrays: Mapping[str, NDArray[Any]] = {}
        self._decode: Decode = decoder.decode
        self._size = _checked_size(chosen["input_size"])
        self._metric_threshold = float(chosen["metric_threshold"])
        self.head: Head | None = None
        if chosen["decode"] is not None:
            self._take_own(chosen)
        else:
            self.head = self._built_in(chosen)
        roles = self.head.roles if self.head else ()
        self._names = _output_names(chosen["outputs"], roles)
        nms = chosen["nms_iou"]
        self.decoder_options: Mapping[str, Any] = {
            **{key: chosen[key] for key in DECODED_BY},
            "outputs": {role: list(names) for role, names in self._names.items()},
            "score_threshold": float(chosen["score_threshold"]),
            "nms_iou": (0.6 if chosen["head"] in ("ssd", "yolo") else None) if nms == DEFAULTS["nms_iou"] else nms,
        }
        if self.head is None:
            self.decoder_options = {**self.decoder_options, "decode": self._decode.__name__}
        self._probabilities = bool(chosen["probabilities"])
        self._outputs = None if chosen["outputs"] is None else _as_list(chosen["outputs"])

    def _take_own(self, chosen: dict[str, Any]) -> None:
        """Take the user's decoder: its file goes into bundles, and nothing is known of its outputs."""
        own = chosen["decode"]
        self._decode = load_function(own, "--task-arg decode") if isinstance(own, str) else own
        file = inspect.getsourcefile(self._decode) if inspect.isfunction(self._decode) else None
        if chosen["head"] is not None or file is None:
            raise InputError(
                "task detection: decode stands beside head, or in no file; give a file's function and no head."
            )
        self.decoder = Path(file)
        if foreign := foreign_imports(self.decoder):
            raise InputError(
                f"task detection: decode is in {file}, which imports {foreign[0]}, but bundles have numpy alone; move "
                "the function into a file of its own."
            )

    def _built_in(self, chosen: dict[str, Any]) -> Head:
        head, count, background = chosen["head"], len(self.classes), chosen["background"]
        if head not in HEADS:
            raise InputError(f"task detection: head is {head!r}; take one of {', '.join(HEADS)}, or give decode.")
        if head in ("ssd", "detr") and self._size is None:
            raise InputError(
                f"task detection: boxes of {head} are shares of the input; give input_size, channels first."
            )
        if chosen["scores"] is None and head in ("ssd", "detr"):
            chosen["scores"] = "softmax"
        if chosen["scores"] not in (None, "sigmoid", "softmax"):
            raise InputError(f"task detection: scores are {chosen['scores']!r}; take sigmoid or softmax.")
        exclusive = chosen["scores"] == "softmax"
        if head == "detr":
            return Detr(count + exclusive, exclusive)
        if head == "yolo":
            return Yolo(count, bool(chosen["objectness"]))
        if head == "decoded":
            return Decoded(background)
        if exclusive and background is None:
            raise InputError(
                "task detection: scores of an ssd by softmax need a column for background; give its index."
            )
        if chosen["code_order"] not in ("xywh", "yxhw") or len(chosen["variances"]) != 4:
            raise InputError(
                f"task detection: code_order is {chosen['code_order']!r} with {len(chosen['variances'])} variances; "
                "take xywh or yxhw, and four variances, of x, y, w and h."
            )
        anchors = _anchors(chosen["anchors"])
        self.decoder_arrays = {"anchors": anchors}
        columns = count + (background is not None)
        if background is not None and not 0 <= background < columns:
            raise InputError(f"task detection: background is {background}; give its column, 0 to {columns - 1}.")
        rows_first = chosen["code_order"] == "yxhw"
        return Ssd(columns, background, exclusive, torch.from_numpy(anchors), tuple(chosen["variances"]), rows_first)

    def answers(self, answer: Any) -> Answers:
        """Return the outputs of the head, in their usual order, by the names that the model or the options give."""
        if self._outputs is not None:
            return selected(answer, self._outputs)
        if self.head is None:
            return named(answer)
        if isinstance(answer, Mapping) or dataclasses.is_dataclass(answer):
            found = named(answer)
            return {name: found[name] for name in self._found_names(found).values()}
        return selected(answer, list(self.head.roles))

    def ends_in_probabilities(self, answers: Iterable[Answers]) -> bool:
        """Return whether the scores of an ssd or a detr are what their softmax or sigmoid makes."""
        if not isinstance(self.head, Ssd | Detr):
            return False
        scores = (self._by_role(one)["scores"].movedim(-1, 1) for one in answers)
        return are_shares(scores) if self.head.exclusive else are_chances(scores)

    def check(self, answers: Answers, targets: Sequence[Target] | None) -> None:
        """Raise InputError where outputs are not of the head's form, or targets are not boxes of these images."""
        if self.head is not None:
            self.head.check(self._by_role(answers))
        if bad := [name for name, answer in answers.items() if not answer.isfinite().all()]:
            raise InputError(f"task detection: {bad[0]} is not finite everywhere; check the model and its input range.")
        count = len(next(iter(answers.values())))
        if targets is None:
            return
        if not isinstance(targets, Sequence) or len(targets) != count:
            given = len(targets) if isinstance(targets, Sequence) else "no list of"
            raise InputError(
                f"task detection: {count} images have {given} targets; give one mapping with boxes and labels for each."
            )
        for target in targets:
            _check_target(target, len(self.classes))

    def collate(self, targets: Sequence[Any]) -> list[Target]:
        """Return one mapping an image, with crowds (false where nothing is said)."""
        return [_tensors(target) for target in targets]

    def mirrored(self, targets: Sequence[Target]) -> list[Target]:
        """Return the targets of the mirrored pictures."""
        width = self._sides()[0]
        turn = torch.tensor([-1.0, 1, -1, 1])
        shift = torch.tensor([width, 0.0, width, 0])
        return [{**target, "boxes": (shift + turn * target["boxes"])[:, [2, 1, 0, 3]]} for target in targets]

    def divergence(self, wanted: Answers, found: Answers, temperature: float = 1.0) -> Tensor:
        """Return (n,) class and box divergences of the candidates that the uncut model sees something at.

        An answer of a form that only the user's own decoder knows is compared as it is, by its variance.
        """
        if self.head is None:
            return detection_losses.plain_divergence(wanted, found)
        return detection_losses.divergence(self._candidates(wanted), self._candidates(found), temperature)

    def surprise(self, answers: Answers, generator: torch.Generator) -> Tensor:
        """Return (n,) losses against classes and boxes that are drawn from the answers themselves."""
        if self.head is None:
            return detection_losses.plain_surprise(answers, generator)
        return detection_losses.surprise(self._candidates(answers), generator)

    def loss(self, answers: Answers, targets: Sequence[Target]) -> Tensor:
        """Return (n,) losses of classes and boxes against the targets.

        With the user's own decoder it is 0: nothing says how its outputs learn from boxes, so that training follows the
        uncut model alone.
        """
        if self.head is None:
            return torch.stack([answer.flatten(1).sum(1) * 0.0 for answer in answers.values()]).sum(0)
        candidates = self._candidates(answers)
        unit = candidates.boxes.new_ones(4) if self.head.in_pixels else candidates.boxes.new_tensor(self._sides())
        truths = [
            (
                centred(target["boxes"].to(unit) / unit),
                target["labels"].to(unit.device),
                target["crowd"].to(unit.device),
            )
            for target in targets
        ]
        return detection_losses.loss(self.head, candidates, truths)

    def parts(self, answers: Arrays, targets: Sequence[Target]) -> list[Matches]:
        """Return per image which of its boxes are true at each overlap, and how many there are to find."""
        options = {**self.decoder_options, "score_threshold": self._metric_threshold}
        options.update(classes=self.classes, input_size=self._size)
        results = self._decode(dict(answers), options, dict(self.decoder_arrays))
        return [self._matches(result, target) for result, target in zip(results, targets, strict=True)]

    def value(self, parts: Sequence[Matches]) -> float:
        """Return the mean average precision of the classes that have true boxes; 0 where none has."""
        return self.resamples(parts)(np.arange(len(parts)))

    def resamples(self, parts: Sequence[Matches]) -> Callable[[NDArray[np.int64]], float]:
        """Return a function from (n,) indices of the parts to the mean average precision of those parts."""
        precisions = resampled_precisions(parts, THRESHOLD_COUNTS[self.metric.name])

        def value(drawn: NDArray[np.int64]) -> float:
            each = precisions(np.bincount(drawn, minlength=len(parts))).mean(1)
            present = ~np.isnan(each)
            return float(each[present].mean()) if present.any() else 0.0

        return value

    def by_class(self, parts: Sequence[Matches]) -> dict[str, float]:
        """Return class name to average precision; without classes of which there is no true box."""
        each = average_precisions(parts)[:, : THRESHOLD_COUNTS[self.metric.name]].mean(1)
        return {name: float(each[k]) for k, name in enumerate(self.classes) if not np.isnan(each[k])}

    def draw(self, picture: Image.Image, result: Mapping[str, Any]) -> Image.Image:
        """Return the picture with the boxes, the surest on top, in their classes' colours, with name and score."""
        drawn = picture.convert("RGB")
        pen = ImageDraw.Draw(drawn)
        width = max(1, round(max(drawn.size) / 250))
        font = ImageFont.load_default(size=max(9, max(drawn.size) / 40))
        found = list(zip(result["boxes"], result["scores"], result["labels"], strict=True))
        for (x0, y0, x1, y1), score, label in reversed(found):
            ink = colour(label)
            pen.rectangle((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)), outline=ink, width=width)
            text = f"{self.classes[label]} {score:.2f}"
            left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
            at = (x0, max(0, y0 - bottom - 2))
            pen.rectangle((at[0], at[1], at[0] + right - left + 3, at[1] + bottom + 2), fill=ink)
            dark = 0.3 * ink[0] + 0.59 * ink[1] + 0.11 * ink[2] > 128
            pen.text((at[0] + 1 - left, at[1] + min(0, -top) + 1), text, fill="black" if dark else "white", font=font)
        return drawn

    def _matches(self, result: Mapping[str, Any], target: Target) -> Matches:
        found = (
            np.asarray(result["boxes"], dtype=np.float64).reshape(-1, 4),
            np.asarray(result["scores"], dtype=np.float64),
            np.asarray(result["labels"], dtype=np.int64),
        )
        boxes, labels, crowd = (np.asarray(target[key].cpu()) for key in ("boxes", "labels", "crowd"))
        return matches(found, (boxes.astype(np.float64), labels, crowd), len(self.classes))

    def _candidates(self, answers: Answers) -> Candidates:
        if self.head is None:
            raise TypeError("a decoder of the user's own has no candidates")
        found = self._by_role(answers)
        if self._probabilities and isinstance(self.head, Ssd | Detr):
            logits = log_of if self.head.exclusive else logit_of
            found = {**found, "scores": logits(found["scores"])}
        return self.head.candidates(found)

    def _by_role(self, answers: Answers) -> Answers:
        return {role: answers[name] for role, name in self._found_names(answers).items()}

    def _found_names(self, answers: Mapping[str, Any]) -> dict[str, str]:
        found = {}
        for role, names in self._names.items():
            name = next((name for name in names if name in answers), None)
            if len(self._names) == len(answers) == 1 and names is USUAL_NAMES[role]:
                (name,) = answers  # whatever it is called, there is no other
            if name is None:
                raise InputError(
                    f"task detection: none of the outputs {', '.join(answers)} is known as {role}; "
                    f"name them in the option outputs, in the order {', '.join(self._names)}."
                )
            found[role] = name
        return found

    def _sides(self) -> list[int]:
        if self._size is None:
            raise InputError(f"task detection: this needs the input's size; give {INPUT_SIZE}, channels first.")
        _, height, width = self._size
        return [width, height, width, height]


def _check_kinds(chosen: Mapping[str, Any]) -> None:
    """Raise InputError for an option whose value is not of its kind."""

    def real(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    def names(value: Any) -> bool:
        return isinstance(value, str) or (isinstance(value, list | tuple) and all(isinstance(n, str) for n in value))

    share, switch = "give a number from 0 to 1", "give true or false"
    overlap, variances = chosen["nms_iou"], chosen["variances"]
    for option, is_good, wanted in (
        ("score_threshold", real(chosen["score_threshold"]) and 0 <= chosen["score_threshold"] <= 1, share),
        ("metric_threshold", real(chosen["metric_threshold"]) and 0 <= chosen["metric_threshold"] <= 1, share),
        ("nms_iou", overlap in (None, DEFAULTS["nms_iou"]) or (real(overlap) and 0 <= overlap <= 1), share),
        ("max_detections", type(chosen["max_detections"]) is int and chosen["max_detections"] > 0, "give 1 or more"),
        ("background", chosen["background"] is None or type(chosen["background"]) is int, "give a whole number"),
        ("flips", isinstance(chosen["flips"], bool), switch),
        ("objectness", isinstance(chosen["objectness"], bool), switch),
        ("probabilities", isinstance(chosen["probabilities"], bool), switch),
        ("outputs", chosen["outputs"] is None or names(chosen["outputs"]), "give the names of the answers"),
        (
            "variances",
            isinstance(variances, list | tuple) and all(real(value) and value > 0 for value in variances),
            "give four numbers above 0",
        ),
    ):
        if not is_good:
            raise InputError(f"task detection: {option} is {chosen[option]!r}; {wanted}.")


def _as_list(outputs: Any) -> list[str]:
    return [outputs] if isinstance(outputs, str) else list(outputs)


def _output_names(outputs: Any, roles: Sequence[str]) -> dict[str, Sequence[str]]:
    """Return role to the names that its output may have."""
    if outputs is None or set(_as_list(outputs)) == set(roles):
        return {role: USUAL_NAMES[role] for role in roles}
    names = _as_list(outputs)
    if roles and len(names) != len(roles):
        raise InputError(f"task detection: outputs names {len(names)} answers; this head has {', '.join(roles)}.")
    return {role: [name] for role, name in zip(roles, names, strict=False)}


def _checked_size(given: Any) -> list[int] | None:
    if given is not None and not (
        isinstance(given, list | tuple)
        and len(given) == 3
        and all(isinstance(side, int) and side > 0 for side in given)
    ):
        raise InputError(
            f"task detection: input_size is {given!r}; give [channels, height, width] of the model's input, in whose "
            "pixels the boxes are."
        )
    return None if given is None else list(given)


def _anchors(given: Any) -> NDArray[np.float32]:
    if given is None:
        raise InputError(
            "task detection: the ssd head has no anchors; give them as an array (a, 4), or a .npy file of it."
        )
    try:
        anchors = np.asarray(
            np.load(given, allow_pickle=False) if isinstance(given, str | Path) else given, dtype=np.float32
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"task detection: anchors cannot be read ({error}); give an array (a, 4), or a .npy file."
        ) from None
    if anchors.ndim != 2 or anchors.shape[1] != 4 or not (anchors[:, 2:] > 0).all():
        raise InputError(
            f"task detection: anchors are {anchors.shape}; give (a, 4) centre x, centre y, and width, height above 0."
        )
    return anchors


def _tensors(target: Any) -> Target:
    if not isinstance(target, Mapping) or not {"boxes", "labels"} <= target.keys():
        raise InputError(
            f"task detection: a target is {type(target).__name__}; give a mapping with boxes (k, 4) and labels (k,)."
        )
    boxes = torch.as_tensor(np.asarray(target["boxes"], dtype=np.float32)).reshape(-1, 4)
    labels = torch.as_tensor(np.asarray(target["labels"], dtype=np.int64))
    crowd = torch.as_tensor(np.asarray(target.get("crowd", np.zeros(len(boxes))), dtype=bool))
    return {"boxes": boxes, "labels": labels, "crowd": crowd}


def _check_target(target: Any, classes: int) -> None:
    if not isinstance(target, Mapping) or not {"boxes", "labels", "crowd"} <= target.keys():
        raise InputError(
            f"task detection: a target is {type(target).__name__}; give a mapping with boxes (k, 4) and labels (k,)."
        )
    boxes, labels, crowd = target["boxes"], target["labels"], target["crowd"]
    if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1] or crowd.shape != boxes.shape[:1]:
        raise InputError(
            f"task detection: a target has boxes {tuple(boxes.shape)}, labels {tuple(labels.shape)} and crowds "
            f"{tuple(crowd.shape)}; give (k, 4), (k,) and (k,)."
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        wrong = int(labels.min()) if labels.min() < 0 else int(labels.max())
        raise InputError(
            f"task detection: a label is {wrong}, but classes are 0 to {classes - 1}, without a background."
        )
    if not bool((boxes[:, 2:] >= boxes[:, :2]).all()):
        raise InputError("task detection: a true box ends before it begins; give corners x0, y0, x1, y1 in pixels.")
