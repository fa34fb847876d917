"""In: a model and images. Out: one sentence where it is not a model that can be cut and exported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.trace import as_it_stands
from hirelc_deploy.inputs.models.onnx_files.whole import FileNetwork
from hirelc_deploy.inputs.models.ordinary import note
from hirelc_deploy.tasks.contract import Targets, Task
from hirelc_deploy.user_code import first_line

SAME_ANSWER = 1e-3  # of the largest output: batches of other sizes are summed in another order


def check_output(model: nn.Module, images: Tensor, task: Task, targets: Targets | None = None) -> Any:
    """Run the model on (b, channels, height, width) images and return what it answers.

    Raises InputError unless its answer is one of the task, the same for an image alone as beside others, and unless it
    leaves the images as they are and lets gradients through (but for a `FileNetwork`); see `let_train` too.

    Args:
        targets: What is true of the images, collated.
    """
    name, given = type(model).__name__, images.clone()
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        answer = _answer(model, given)
        try:
            outputs = task.answers(answer)
            task.check(outputs, targets)
        except InputError as error:
            raise type(error)(str(error).replace("the model", name, 1)) from None
    for output, values in outputs.items():
        if values.ndim == 0 or len(values) != len(images):
            raise InputError(
                f"{name} answers {len(images)} images with {output} of shape {tuple(values.shape)}; "
                "the first dimension of every output must be the image."
            )
    if not torch.equal(given, images):
        raise InputError(
            f"{name} changes the images it is given; let its forward work on a copy (x - 1, not x.sub_(1))."
        )
    if isinstance(model, FileNetwork):  # which was seen to answer each image as it does alone, and has no slopes
        return answer
    if frozen := [key for key, parameter in model.named_parameters() if key in trained and not parameter.requires_grad]:
        raise InputError(
            f"{name}: its forward pass freezes {frozen[0]} and {len(frozen) - 1} more weights (requires_grad), which "
            "recovery trains; take that out of it."
        )
    let_train(model, images[:1], task)
    with torch.enable_grad():
        one = images[:1].clone().requires_grad_()
        alone = task.answers(_answer(model, one))
        total = sum(values.sum() for values in alone.values() if values.requires_grad)
        try:
            slope = torch.autograd.grad(total, one, allow_unused=True)[0] if isinstance(total, Tensor) else None
        except RuntimeError as error:
            raise _without_slopes(model, error) from None
    for output, values in outputs.items():
        near = alone[output].shape == values[:1].shape
        if not near or _apart(alone[output], values[:1]) > SAME_ANSWER * float(values.detach().double().abs().max()):
            raise InputError(
                f"{name} answers an image alone otherwise than beside another, or otherwise each time; "
                "its forward must treat every image by itself, without chance."
            )
    if slope is None:
        raise InputError(
            f"{name} lets no gradient through to its input, by which channels are judged and recovered; "
            "remove no_grad, detach and numpy from its forward."
        )
    return answer


def let_train(model: nn.Module, image: Tensor, task: Task) -> None:
    """See that slopes of all weights can be had, as recovery needs them; raise InputError where they cannot.

    Where the model writes into a tensor that a slope needs (a slice of it, as in partial convolutions), torch keeps
    copies from then on; files do not have them. Where its code needs all numbers of one type (as what it writes into a
    slice), or has convolutions of three dims, it runs in float32 from then on where others run in bfloat16. Layers that
    no slope reaches are named in a note.

    Args:
        image: (1, channels, height, width).
    """
    with torch.no_grad():
        _answer(model, image.clone())
    if (error := _slope_error(model, image, task)) is not None and "inplace" in str(error):
        _run_within(model, saved_copies)
        error = _slope_error(model, image, task)
    if error is not None:
        raise _without_slopes(model, error)
    if layers := _unreached(model, image, task):
        some = ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
        note(
            model,
            f"no slope reaches the weights of {some} (no_grad, detach, or a choice by rank): recovery does not train "
            "them and cutting judges them blindly; --exclude keeps a layer whole",
        )
    if not _trains_in_half_precision(model, image):
        _run_within(model, float32_alone)


def _unreached(model: nn.Module, image: Tensor, task: Task) -> list[str]:
    """Return the layers that run, but whose weights change nothing of the answer as far as slopes tell."""
    ran = set[nn.Module]()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handle = register_module_forward_pre_hook(lambda module, _: ran.add(module))
    try:
        with torch.enable_grad():
            answers = task.answers(_answer(model, image.clone()))
    finally:
        handle.remove()
    total = sum(values.sum() for values in answers.values() if values.requires_grad)
    if not isinstance(total, Tensor) or not trained:
        return []
    slopes = torch.autograd.grad(total, trained, allow_unused=True)
    without = {id(parameter) for parameter, slope in zip(trained, slopes, strict=True) if slope is None}
    return [
        path
        for path, module in model.named_modules()
        if module in ran and any(id(parameter) in without for parameter in module.parameters(recurse=False))
    ]


def _without_slopes(model: nn.Module, error: Exception) -> InputError:
    return InputError(
        f"{type(model).__name__}: torch has no slopes of its weights, which recovery trains by "
        f"({first_line(error)}); correct its forward pass."
    )


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one.detach().double() - other.detach().double()).abs().max())


def _trains_in_half_precision(model: nn.Module, image: Tensor) -> bool:
    """Return whether a model runs in bfloat16, and with slopes that are right.

    Of convolutions of three dims they are not: torch 2.13 on a CPU gives the weights of a (3, 1, 1) one slopes of 1e37.
    """
    if any(isinstance(layer, nn.Conv3d | nn.ConvTranspose3d) for layer in model.modules()):
        return False
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        try:
            model(image.clone())
        except (RuntimeError, TypeError):  # torch's answer to operands of different types, and numpy's to bfloat16
            return False
    return True


def saved_copies() -> AbstractContextManager[Any]:
    """Let torch save copies for the slopes, which nobody writes into."""
    return torch.autograd.graph.saved_tensors_hooks(_copy, lambda kept: kept)


def _copy(value: Tensor) -> Tensor:
    return value if isinstance(value, nn.Parameter) else value.clone()


@contextmanager
def float32_alone() -> Iterator[None]:
    """Switch automatic half precision off."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@dataclass
class _Within:
    """Two hooks of a model: it runs within a context."""

    context: Callable[[], AbstractContextManager[Any]]
    opened: list[AbstractContextManager[Any]] = field(default_factory=list)

    def begin(self, *_: Any) -> None:
        self.opened.append(self.context())
        self.opened[-1].__enter__()

    def end(self, *_: Any) -> None:
        self.opened.pop().__exit__(None, None, None)


def _run_within(model: nn.Module, context: Callable[[], AbstractContextManager[Any]]) -> None:
    within = _Within(context)
    model.register_forward_pre_hook(within.begin)
    model.register_forward_hook(within.end, always_call=True)


def _slope_error(model: nn.Module, image: Tensor, task: Task) -> Exception | None:
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.enable_grad():
        try:
            answers = task.answers(model(image.clone()))
            total = sum(values.sum() for values in answers.values() if values.requires_grad)
            if isinstance(total, Tensor) and weights:
                torch.autograd.grad(total, weights, allow_unused=True)
        except Exception as error:  # what the user's forward pass raises with slopes alone
            return error
    return None


def _answer(model: nn.Module, images: Tensor) -> Any:
    try:
        with as_it_stands(model):
            return model(images)
    except InputError:
        raise
    except Exception as error:  # the user's forward may raise anything
        raise InputError(
            f"{type(model).__name__} fails on images of shape {tuple(images.shape)}: {first_line(error)}; "
            "check --input-size (channels, height, width)."
        ) from None


def check_finite(model: nn.Module, where: str) -> None:
    """Raise InputError naming the first parameter or norm statistic that holds NaN or infinity."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    tensors |= {name: value for name, value in model.named_buffers() if name.rpartition(".")[2].startswith("running_")}
    for name, value in tensors.items():
        if not value.isfinite().all():
            count = int((~value.isfinite()).sum())
            raise InputError(
                f"{where}: {name} holds {count} values that are NaN or infinite; train or export it again."
            )
