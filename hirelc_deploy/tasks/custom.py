"""In: a task and a user's own metric or loss. Out: the same task, judged or trained by it."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.answers import Answers
from hirelc_deploy.tasks.contract import Arrays, Metric, Targets, Task
from hirelc_deploy.tasks.paired import resamples_of
from hirelc_deploy.user_code import first_line, import_from, near_names, place_of

OBJECT_METHODS = ("reset", "update", "compute")  # what an object like those of torchmetrics has
IN_POINTS = 100.0  # scale of a share in [0, 1]


class _Around:
    """A task that does all as another one does."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.name, self.classes, self.metric = task.name, task.classes, task.metric
        self.mean_of_images, self.flips, self.decoder = task.mean_of_images, task.flips, task.decoder
        self.decoder_options, self.decoder_arrays = task.decoder_options, task.decoder_arrays

    def answers(self, answer: Any) -> Answers:
        """Return the outputs that matter; see `Task`."""
        return self.task.answers(answer)

    def check(self, answers: Answers, targets: Targets | None) -> None:
        """Raise InputError for what cannot be of this task; see `Task`."""
        self.task.check(answers, targets)

    def collate(self, targets: Sequence[Any]) -> Targets:
        """Return the targets of a batch; see `Task`."""
        return self.task.collate(targets)

    def divergence(self, wanted: Answers, found: Answers, temperature: float = 1.0) -> Tensor:
        """Return (n,) how far found answers are from wanted ones; see `Task`."""
        return self.task.divergence(wanted, found, temperature)

    def surprise(self, answers: Answers, generator: torch.Generator) -> Tensor:
        """Return (n,) losses against drawn targets; see `Task`."""
        return self.task.surprise(answers, generator)

    def loss(self, answers: Answers, targets: Targets) -> Tensor:
        """Return (n,) losses; see `Task`."""
        return self.task.loss(answers, targets)

    def parts(self, answers: Arrays, targets: Targets) -> list[Any]:
        """Return what each image brings to the metric; see `Task`."""
        found = self.task.parts(answers, targets)
        self.mean_of_images = self.task.mean_of_images
        return found

    def value(self, parts: Sequence[Any]) -> float:
        """Return the metric; see `Task`."""
        found = self.task.value(parts)
        self.mean_of_images = self.task.mean_of_images
        return found

    def by_class(self, parts: Sequence[Any]) -> Mapping[str, float]:
        """Return the metric of each class; see `Task`."""
        return self.task.by_class(parts)

    def draw(self, picture: Image.Image, result: Mapping[str, Any]) -> Image.Image:
        """Return the picture with the result on it; see `Task`."""
        return self.task.draw(picture, result)


def without_own(task: Task) -> Task:
    """Return the task around which metrics and losses of the user's were put."""
    while isinstance(task, _Around):
        task = task.task
    return task


class Kept(NamedTuple):
    """An image's outputs by name, each without the first dimension, and its target: for a metric of the whole set."""

    outputs: dict[str, NDArray[np.float32]]
    target: Any


class WithMetric(_Around):
    """A task whose metric is a user's function, `metric(outputs, targets)`, or an object with update and compute.

    The function is given the outputs of several images as a float32 tensor on the CPU, or a dict of such by name where
    there are several outputs, and their targets as the task collates them. It returns one number an image, and then the
    metric is their mean; or one number, and then it is a function of the whole set, called with all images at once.
    An object has `reset()`, `update(outputs, targets)` and `compute()`, as those of torchmetrics have.

    Which of both is learnt from the first batch, unless the function has an attribute `per_image`, True or False.
    `mean_of_images` is False until then, or until `value` has seen the parts.

    Args:
        name: Of the metric; the function's own where it is empty.
        higher_is_better: Else the opposite of the function's attribute `lower_is_better`, or its `higher_is_better`, or
            True.
        scale: Times which a value counts in limits and reports. Else the function's attribute `scale`, or 100 (points)
            where higher is better and 1 where lower is. The 100 is a guess that a value above 1 refutes: it is refused.
    """

    def __init__(
        self,
        task: Task,
        function: Any,
        name: str = "",
        higher_is_better: bool | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__(task)
        if isinstance(function, type):
            function = _called("metric", function)
        self.function = function
        self.is_object = all(callable(getattr(function, method, None)) for method in OBJECT_METHODS)
        if not self.is_object and not callable(function):
            raise InputError(f"metric {function!r:.60} cannot be called; give a function of outputs and targets.")
        if higher_is_better is None:
            higher_is_better = _higher_is_better(function)
        given = scale if scale is not None else getattr(function, "scale", None)
        self._guessed = given is None and higher_is_better
        number = float(given) if given is not None else IN_POINTS if higher_is_better else 1.0
        if not 0 < number < math.inf:
            raise InputError(f"{_at(function)}: the scale of metric {_name(function)} is {number}; give one above 0.")
        unit = str(getattr(function, "unit", "points" if number == IN_POINTS else ""))
        self.metric = Metric(name or _name(function), number, unit, higher_is_better)
        said = False if self.is_object else getattr(function, "per_image", None)
        self._per_image: bool | None = None if said is None else bool(said)
        self.mean_of_images = bool(said)

    def parts(self, answers: Arrays, targets: Targets) -> list[Any]:
        """Return the metric of each image, or where it is a function of the whole set its outputs and target."""
        count = len(next(iter(answers.values())))
        if count != len(targets):
            raise InputError(f"{count} answers for {len(targets)} targets; both must come from the same images.")
        kept = [Kept({name: value[i] for name, value in answers.items()}, targets[i]) for i in range(count)]
        if not kept or self._per_image is False:
            return kept
        # One value of one image may be either kind, so that image is shown twice.
        twice = self._per_image is None and count == 1
        values = self._values(kept * 2 if twice else kept, whole=False)
        self._learn(values.ndim == 1)
        return [float(value) for value in values[:count]] if self._per_image else kept

    def value(self, parts: Sequence[Any]) -> float:
        """Return the mean over images, or what the function says of all of them."""
        if not parts:
            raise InputError("no images to take the metric of.")
        kept = isinstance(parts[0], Kept)
        self._learn(not kept)
        if not kept:
            return math.fsum(parts) / len(parts)
        return float(self._values(parts))

    def by_class(self, parts: Sequence[Any]) -> Mapping[str, float]:
        """Return nothing: the function does not say of which class its values are."""
        return {}

    def _learn(self, per_image: bool) -> None:
        self._per_image = self.mean_of_images = per_image

    def _values(self, kept: Sequence[Kept], whole: bool = True) -> Tensor:
        """Return (n,) values of n images, or one value without a dimension; NaN only of what is not the whole set."""
        outputs = {
            name: torch.from_numpy(np.stack([part.outputs[name] for part in kept]).astype(np.float32))
            for name in kept[0].outputs
        }
        targets: Any = [part.target for part in kept]
        targets = torch.stack(targets) if isinstance(targets[0], Tensor) else copy.deepcopy(targets)
        given, function = _as_given(outputs), self.function
        if self.is_object:
            with torch.no_grad():
                _called("metric", function.reset, of=function)
                _called("metric", function.update, given, targets, of=function)
                found = _called("metric", function.compute, of=function)
            values = _numbers("metric", function, found, None)
        else:
            with torch.no_grad():
                found = _called("metric", function, given, targets)
            values = _numbers("metric", function, found, len(kept) if self._per_image is not False else None, whole)
            if self._per_image and values.ndim == 0:
                if len(kept) > 1:
                    raise InputError(
                        f"{_at(function)}: metric {_name(function)} returns one number for {len(kept)} images, but one "
                        "an image before; let it always return the same."
                    )
                values = values[None]
        if self._guessed and values.abs().max() > 1 + 1e-6:
            raise InputError(
                f"{_at(function)}: metric {_name(function)} returns {float(values.abs().max()):g}, which is no share "
                f"in [0, 1]; set {_name(function)}.scale = 1 to count drops in its own unit, or lower_is_better = True."
            )
        return values


class WithLoss(_Around):
    """A task that is trained by a user's function, `loss(outputs, targets)`.

    The function is given what a metric is (see `WithMetric`), but where the model is and with gradients. It returns one
    number an image, or one number, their mean.
    """

    def __init__(self, task: Task, function: Callable[[Any, Any], Any]) -> None:
        super().__init__(task)
        function = _called("loss", function) if isinstance(function, type) else function
        if not callable(function):
            raise InputError(f"loss {function!r:.60} cannot be called; give a function of outputs and targets.")
        self.function = function

    def resamples(self, parts: Sequence[Any]) -> Callable[[NDArray[np.int64]], float]:
        """Return a function from (n,) indices of the parts to the metric of those parts."""
        return resamples_of(self.task, parts)

    def loss(self, answers: Answers, targets: Targets) -> Tensor:
        """Return (n,) losses; a loss of one number is that of every image."""
        first = next(iter(answers.values()))
        here = targets.to(first.device, copy=True) if isinstance(targets, Tensor) else copy.deepcopy(targets)
        found = _called("loss", self.function, _as_given(answers), here)
        _numbers("loss", self.function, found, len(first))
        needs = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in answers.values())
        if not isinstance(found, Tensor) or (needs and not found.requires_grad):
            raise InputError(
                f"{_at(self.function)}: loss {_name(self.function)} returns a number without a gradient; compute it "
                "with torch from the outputs, without detach, item or numpy."
            )
        return found.reshape(-1).expand(len(first)) if found.numel() == 1 else found


def load_function(spec: str, option: str) -> Any:
    """Return the function, or metric object, that a user names on the command line.

    Args:
        spec: `file.py:function` or `package.module:function`, looked for from the current folder too.
        option: Such as `--metric`, for error messages.
    """
    target, _, name = spec.rpartition(":")
    if not target or not name or target.endswith(":"):
        raise InputError(f"{option} {spec}: name the function behind a colon, as in file.py:function.")
    module = import_from(target, spec, option)
    found = getattr(module, name, None)
    if found is not None and not callable(found) and not all(hasattr(found, method) for method in OBJECT_METHODS):
        raise InputError(f"{option} {spec}: {name} is {found!r:.40}, which cannot be called; name a function.")
    if not callable(found) and not all(hasattr(found, method) for method in OBJECT_METHODS):
        raise InputError(f"{option} {spec}: there is no function {name!r} in {target}; {near_names(name, module)}")
    return found


def _as_given(outputs: Mapping[str, Tensor]) -> Any:
    """Return copies, which the user's function may change in place."""
    copies = {name: output.clone() for name, output in outputs.items()}
    return next(iter(copies.values())) if len(copies) == 1 else copies


def _called(role: str, function: Any, *arguments: Any, of: Any = None) -> Any:
    """Return what a user's function returns; what it raises becomes a sentence that says where."""
    named = function if of is None else of
    try:
        return function(*arguments)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        place = place_of(error, Path(_file(named)) if _file(named) else None, _at(named))
        given = " and ".join(_shape(argument) for argument in arguments)
        raise InputError(
            f"{place}: {role} {_name(named)} raises {first_line(error)}; "
            + (f"it is given {given}." if arguments else "let it take no arguments.")
        ) from None


def _numbers(role: str, function: Any, found: Any, images: int | None, whole: bool = True) -> Tensor:
    """Return one finite number without a dimension, or (images,) of them where `images` is not None, as float64.

    Args:
        whole: One number must be finite too. A batch may be without what it is about, such as a second class.
    """
    start = f"{_at(function)}: {role} {_name(function)} returns"
    wanted = "return one finite number" + (f", or one for each of the {images} images." if images is not None else ".")
    try:
        if found is None or isinstance(found, str | bytes | Mapping):
            raise TypeError
        values = (
            found.detach().cpu().double() if isinstance(found, Tensor) else torch.as_tensor(np.asarray(found, float))
        )
    except (TypeError, ValueError, RuntimeError):
        shown = "None" if found is None else f"a {type(found).__name__}"
        raise InputError(f"{start} {shown}; {wanted}") from None
    if values.numel() == 1 and (images != 1 or values.ndim != 1):
        values = values.reshape(())
    if values.ndim > 0 and tuple(values.shape) != (images,):
        raise InputError(f"{start} shape {tuple(values.shape)}; {wanted}")
    if not values.isfinite().all() and (whole or values.ndim):
        raise InputError(f"{start} {'NaN' if values.isnan().any() else 'infinity'}; {wanted}")
    return values


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return f"a dict of {', '.join(map(str, value))}"
    return f"a {type(value).__name__} of {len(value)}" if isinstance(value, Sequence) else f"a {type(value).__name__}"


def _higher_is_better(function: Any) -> bool:
    lower = getattr(function, "lower_is_better", None)
    if lower is not None:
        return not lower
    higher = getattr(function, "higher_is_better", None)
    return True if higher is None else bool(higher)


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", None) or type(function).__name__)


def _code(function: Any) -> Any:
    """Return something of the user's that knows its file and line: the function, or the class of an object."""
    plain = inspect.unwrap(getattr(function, "func", function))  # of a functools.partial too
    return plain if inspect.isroutine(plain) or inspect.isclass(plain) else type(plain)


def _file(function: Any) -> str:
    with contextlib.suppress(TypeError, OSError):
        return inspect.getsourcefile(_code(function)) or ""
    return ""


def _at(function: Any) -> str:
    """Return `file, line n` of where a function is defined, or its module where Python does not know."""
    with contextlib.suppress(TypeError, OSError):
        return f"{inspect.getsourcefile(_code(function))}, line {inspect.getsourcelines(_code(function))[1]}"
    return str(getattr(function, "__module__", None) or type(function).__module__)
