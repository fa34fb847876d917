"""In: a model that exists already, or what makes one. Out: the same as a `ModelSource`, of copies of it."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.models import hugging_face
from hirelc_deploy.inputs.models.checks import check_finite
from hirelc_deploy.inputs.models.ordinary import (
    WITHOUT_CODE,
    all_trained,
    copied,
    stored_weights,
    unwrapped,
    with_plain_parts,
)
from hirelc_deploy.inputs.models.source import ModelSource, ready
from hirelc_deploy.user_code import first_line, settings_kept


@dataclass(frozen=True)
class GivenModel:
    """A model from memory, with the methods of `ModelSource`: a copy, so that the caller's own can change.

    Attributes:
        model: On the CPU, in eval mode and float32, never handed out itself.
        spec: Module and name of its class, or of the function that made it.
    """

    model: nn.Module
    spec: str
    weights: Path | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    kind: str = "module"
    is_timm: bool = False
    is_installed: bool = False
    is_untrained: bool = False

    def with_classes(self, _count: int) -> GivenModel:
        """Return itself: the model is as it is."""
        return self

    def with_input_size(self, _size: Sequence[int] | None) -> GivenModel:
        """Return itself: the model takes what it takes."""
        return self

    def build(self) -> nn.Module:
        """Return a copy of the uncut model."""
        return copy.deepcopy(self.model)

    def load(self) -> nn.Module:
        """Return a copy of the uncut model, all its weights finite."""
        check_finite(self.model, self.spec)
        return self.build()

    def describe(self) -> dict[str, Any]:
        """Return the source as JSON values for a manifest; the hash is of what it prints and of its tensors."""
        digest = hashlib.sha256(repr(self.model).encode())
        for name, tensor in self.model.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
        return {
            "kind": self.kind,
            "spec": self.spec,
            "arguments": dict(self.arguments),
            "pretrained": self.pretrained,
            "spec_sha256": digest.hexdigest(),
        }


Source = ModelSource | GivenModel
"""Where a model comes from."""


def source_of(
    model: str | nn.Module | Callable[..., nn.Module] | Source,
    weights: str | Path | None = None,
    arguments: Mapping[str, Any] | None = None,
    pretrained: bool = False,
    weights_key: str | None = None,
) -> Source:
    """Return where a model comes from.

    Args:
        model: What `--model` takes, a module, a model of transformers, or a function or class that makes a module.
        weights: A file, beside a text.
        arguments: Of a function, or beside a text.
        pretrained, weights_key: See `ModelSource`.

    Raises:
        InputError: It is nothing of that, or a module that cannot be copied or worked with.
    """
    if isinstance(model, ModelSource | GivenModel):
        return model
    given = dict(arguments or {})
    if isinstance(model, str):
        return ModelSource(model, Path(weights) if weights is not None else None, given, pretrained, weights_key)
    if weights is not None or pretrained:
        raise InputError(
            f"model {_name_of(model)}: it has its weights; load others into it before, and give no weights."
        )
    if isinstance(model, nn.Module):
        if given:
            raise InputError(f"model {_name_of(model)}: it is made already; arguments are for functions that make one.")
        return _given(model, _name_of(unwrapped(model, f"model {type(model).__name__}")))
    if isinstance(model, WITHOUT_CODE):
        return _given(model, type(model).__name__)
    if not callable(model):
        raise InputError(f"model {model!r:.80}: give a torch.nn.Module, a function that makes one, or a text.")
    try:
        with settings_kept():
            made = model(**given)
    except Exception as error:  # the user's function may raise anything
        raise InputError(f"model {_name_of(model)}: {first_line(error)}.") from None
    return _given(made, _name_of(model), given)


def _given(model: object, spec: str, arguments: Mapping[str, Any] | None = None) -> GivenModel:
    where = f"model {spec}"
    own = with_plain_parts(copied(unwrapped(model, where), where))
    if hugging_face.is_of_transformers(own):
        own = hugging_face.as_plain(own)
    return GivenModel(all_trained(stored_weights(ready(own, where))), spec, arguments=dict(arguments or {}))


def _name_of(model: object) -> str:
    named = model if hasattr(model, "__qualname__") else type(model)
    return f"{getattr(named, '__module__', '')}.{getattr(named, '__qualname__', '')}"
