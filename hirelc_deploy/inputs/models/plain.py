"""In: a network whose forward pass answers with more than its task is about. Out: the same network, with that alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.answers import Answers, selected


@dataclass(frozen=True)
class OnlyOutputs:
    """A forward hook that lets these outputs through: one as a tensor, several by name and in this order.

    A hook, and no module around the network: its layers and its weights keep the names that its authors gave them.
    """

    outputs: tuple[str, ...]

    def __call__(self, model: nn.Module, _given: Any, answer: Any) -> Tensor | Answers:
        """Return the outputs that matter."""
        try:
            found = selected(answer, self.outputs)
        except InputError as error:
            raise InputError(f"{type(model).__name__}: {error}") from None
        return found if len(found) > 1 else next(iter(found.values()))


@dataclass(frozen=True)
class ChannelsReversed:
    """A forward pre-hook for networks that want blue before green before red."""

    def __call__(self, _model: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments with the channels of the images in reverse order."""
        images, *rest = given
        return (images.flip(1), *rest)


def answering(model: nn.Module, outputs: Sequence[str]) -> nn.Module:
    """Let the model answer with these outputs alone, and return it."""
    model.register_forward_hook(OnlyOutputs(tuple(outputs)))
    return model


def marked(
    model: nn.Module,
    task_options: dict[str, Any],
    class_names: Sequence[str] = (),
    preprocessing: dict[str, Any] | None = None,
) -> nn.Module:
    """Write on the model what it is for, by the convention of `source`, and return it. Empty entries are left out."""
    facts = {"task_options": task_options, "class_names": tuple(class_names), "pretrained_cfg": preprocessing}
    model.__dict__.update({name: value for name, value in facts.items() if value})
    return model
