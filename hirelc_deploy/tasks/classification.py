"""In: (n, classes) logits and labels. Out: classification by the contract; tasks of one output borrow from it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from hirelc_deploy.errors import InputError, WidthError
from hirelc_deploy.graph.answers import Answers, named, selected
from hirelc_deploy.tasks.contract import Arrays, Metric, Targets
from hirelc_deploy.tasks.decoders import classification as decoder
from hirelc_deploy.tasks.probabilities import LOGITS, PROBABILITIES, SCORES_ARE, are_shares, log_of

INPUT_SIZE = "input_size"
"""Option that every task is given: [channels, height, width] of the model's input."""

Value = TypeVar("Value")


class Classification:
    """One class an image: answers are (n, classes) logits, targets (n,) class numbers from 0.

    Options:
        outputs: Name of the output that holds the logits, in a list of one.
        scores: `probabilities` where the model ends in a softmax; else `logits`.
    """

    name = "classification"
    metric = Metric("accuracy")
    mean_of_images = True
    flips = True
    decoder = Path(decoder.__file__)
    in_probabilities = SCORES_ARE

    def __init__(self, classes: tuple[str, ...], options: Mapping[str, Any]) -> None:
        self.classes = tuple(classes)
        self.output = output_option(self.name, options, known=("outputs", "scores"))
        self.scores = choice_option(self.name, options, "scores", (LOGITS, PROBABILITIES))
        self.decoder_options: Mapping[str, Any] = {} if self.scores == LOGITS else {"scores": self.scores}
        self.decoder_arrays: Mapping[str, NDArray[Any]] = {}

    def answers(self, answer: Any) -> Answers:
        """Return the logits by the name of their output."""
        return one_output(answer, self.output, "(batch, classes)")

    def _logits(self, answers: Answers) -> Tensor:
        """Return (n, classes) logits; those of probabilities are their logarithms."""
        found = only(answers)
        return found if self.scores == LOGITS else log_of(found)

    def ends_in_probabilities(self, answers: Iterable[Answers]) -> bool:
        """Return whether the rows of all answers are distributions, as a softmax makes them."""
        return are_shares(map(only, answers))

    def check(self, answers: Answers, targets: Targets | None) -> None:
        """Raise InputError unless answers are finite (n, classes) logits, and targets numbers of their classes."""
        logits = only(answers)
        check_rows(logits, targets, 2, "a classifier returns (batch, classes)")
        check_width(logits.shape[1], self.classes)
        if targets is not None and len(targets):
            low, high = int(targets.min()), int(targets.max())
            if low < 0 or high >= logits.shape[1]:
                raise InputError(
                    f"labels run from {low} to {high}, but the model has {logits.shape[1]} outputs; "
                    f"give labels from 0 to {logits.shape[1] - 1}."
                )

    def collate(self, targets: Sequence[Any]) -> Tensor:
        """Return (n,) int64 labels."""
        return labels_of(targets)

    def divergence(self, wanted: Answers, found: Answers, temperature: float = 1.0) -> Tensor:
        """Return (n,) T^2 * KL(wanted || found at temperature T), in nats (Hinton et al. 2015)."""
        log_p, log_q = (F.log_softmax(self._logits(each) / temperature, 1) for each in (wanted, found))
        return temperature**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)

    def surprise(self, answers: Answers, generator: torch.Generator) -> Tensor:
        """Return (n,) cross-entropies against the model's own first choice.

        It is not a drawn label, which the Fisher information would ask for: importance without labels was measured
        with the first choice, and every figure of this project that needs it stands on that.
        """
        logits = self._logits(answers)
        return F.cross_entropy(logits, logits.detach().argmax(1), reduction="none")

    def loss(self, answers: Answers, targets: Targets) -> Tensor:
        """Return (n,) cross-entropies in nats."""
        logits = self._logits(answers)
        return F.cross_entropy(logits, targets.to(logits.device), reduction="none")

    def parts(self, answers: Arrays, targets: Targets) -> list[float]:
        """Return 1.0 for each image whose largest logit is at its label, else 0.0."""
        logits, labels = only(answers), np.asarray(targets)
        check_count(len(logits), len(labels))
        if len(labels) and labels.max() >= logits.shape[1]:  # or its image would count as a miss
            raise InputError(
                f"labels hold {labels.max()}, but the model has {logits.shape[1]} outputs; give labels from 0 to "
                f"{logits.shape[1] - 1}."
            )
        return [float(hit) for hit in logits.argmax(1) == labels]

    def value(self, parts: Sequence[Any]) -> float:
        """Return the share of images answered right, in [0, 1]."""
        return mean_of(parts)

    def by_class(self, parts: Sequence[Any]) -> Mapping[str, float]:
        """Return nothing: a part is one number, and does not say of which class its image is."""
        return {}

    def draw(self, picture: Image.Image, result: Mapping[str, Any]) -> Image.Image:
        """Return the picture with its class on it."""
        return captioned(picture, decoder.line(dict(result)))


def check_options(task: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise InputError for an option that the task does not know; the size of the input is told to every task."""
    for option in options:
        if option not in (*known, INPUT_SIZE):
            near = difflib.get_close_matches(str(option), known, n=1)
            hint = f"did you mean {near[0]}? It knows" if near else "it knows"
            raise InputError(f"task {task}: there is no option {option!r}; {hint} {', '.join(known)}.")


def output_option(task: str, options: Mapping[str, Any], known: Sequence[str]) -> tuple[str, ...]:
    """Return the name in the option `outputs`, of a task with one output; nothing where it is not given.

    Raises:
        InputError: It is not one name, or an option is not in `known`.
    """
    check_options(task, options, known)
    given = options.get("outputs") or ()
    names = tuple(given) if isinstance(given, list | tuple) else (given,)
    if len(names) > 1 or not all(isinstance(name, str) for name in names):
        raise InputError(f"task {task}: outputs names {given!r}; name the one output that counts, as in ['logits'].")
    return names


def choice_option(task: str, options: Mapping[str, Any], option: str, choices: Sequence[str]) -> str:
    """Return the value of an option that is one of `choices`, of which the first is the default."""
    given = options.get(option, choices[0])
    if given not in choices:
        raise InputError(f"task {task}: {option} is {given!r}; use {' or '.join(choices)}.")
    return str(given)


def number_option(task: str, options: Mapping[str, Any], option: str, default: float, high: float = math.inf) -> float:
    """Return the value of an option that is a number above 0 and below `high`."""
    given = options.get(option, default)
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < high:
        below = f" and below {high:g}" if math.isfinite(high) else ""
        raise InputError(f"task {task}: {option} is {given!r}; give a number above 0{below}.")
    return float(given)


def switch_option(task: str, options: Mapping[str, Any], option: str, default: bool) -> bool:
    """Return the value of an option that is true or false."""
    given = options.get(option, default)
    if not isinstance(given, bool):
        raise InputError(f"task {task}: {option} is {given!r}; give true or false.")
    return given


def check_names(task: str, classes: Sequence[str]) -> None:
    """Raise InputError where two classes have one name, under which only one of them would be judged."""
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if list(classes).count(name) > 1)
        raise InputError(f"task {task}: the class name {twice!r} is there twice; give each class a name of its own.")


def one_output(answer: Any, output: Sequence[str], wanted: str) -> Answers:
    """Return the only tensor of a model's answer, or the one that is named, by its name."""
    found = selected(answer, output) if output else named(answer)
    if len(found) != 1:
        raise InputError(
            f"the model returns a {type(answer).__name__} of {len(found)} tensors; it must return one {wanted} tensor; "
            "name it with the task's option outputs, or wrap the model in a module whose forward picks that tensor."
        )
    return found


def only(answers: Mapping[str, Value]) -> Value:
    """Return what the only output holds."""
    (value,) = answers.values()
    return value


def check_rows(answer: Tensor, targets: Targets | None, dimensions: int | Sequence[int], rule: str) -> None:
    """Raise InputError unless a tensor is finite, has one row an image, and this number of dimensions.

    Args:
        rule: What such a model returns, as the end of a sentence.
    """
    shape = tuple(answer.shape)
    images = len(targets) if targets is not None else (shape or (1,))[0]
    if len(shape) not in ((dimensions,) if isinstance(dimensions, int) else dimensions) or shape[0] != images:
        raise InputError(f"the model answers {images} images with shape {shape}; {rule}.")
    if not answer.isfinite().all():
        raise InputError("the model answers with NaN or infinity; check its weights and preprocessing.")


def check_width(outputs: int, classes: Sequence[str], words: str = "classes") -> None:
    """Raise InputError unless there are as many outputs as names, where there are names."""
    if classes and outputs != len(classes):
        raise WidthError(
            f"the model has {outputs} outputs, but the data has {len(classes)} {words}; "
            f"use a model and weights for {len(classes)} {words} (timm: --model-arg num_classes={len(classes)})."
        )


def check_count(answers: int, targets: int) -> None:
    """Raise InputError unless both are of as many images."""
    if answers != targets:
        raise InputError(f"{answers} answers for {targets} targets; both must come from the same images.")


def labels_of(targets: Sequence[Any]) -> Tensor:
    """Return (n,) int64 of one class number an image.

    Raises:
        InputError: One of them is not a whole number.
    """
    labels = torch.as_tensor([_number(target) for target in targets], dtype=torch.float64)
    if not torch.equal(labels, labels.round()):
        raise InputError("labels: a class number is not whole; give class numbers from 0.")
    return labels.long()


def _number(target: Any) -> float:
    try:
        return float(target)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"labels: {target!r:.60} is no class number; give one whole number an image.") from None


def mean_of(parts: Sequence[Any]) -> float:
    """Return the mean of one number an image; in any order the same to the last digit."""
    if not parts:
        raise InputError("no images to take the metric of.")
    return math.fsum(parts) / len(parts)


def captioned(picture: Image.Image, text: str) -> Image.Image:
    """Return an RGB copy with a line of text on it, white on black in the upper left corner."""
    drawn = picture.convert("RGB")
    pen = ImageDraw.Draw(drawn)
    pen.rectangle(pen.textbbox((2, 1), text), fill="black")
    pen.text((2, 1), text, fill="white")
    return drawn


CLASSIFICATION = Classification((), {})
"""Of any number of classes without names."""
