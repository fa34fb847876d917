"""In: a model that exists already, or what makes one. Out: the same as a `ModelSource`, of copies of it."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.models import hugging_face
from hirelc_deploy.inputs.models.checks import check_finite
from hirelc_deploy.inputs.models.source import ModelSource, ready
from hirelc_deploy.user_code import first_line

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


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
) -> Source:
    """Return where a model comes from.

    Args:
        model: What `--model` takes, a module, a model of transformers, or a function or class that makes a module.
        weights: A file, beside a text.
        arguments: Of a function, or beside a text.
        pretrained: See `ModelSource`.

    Raises:
        InputError: It is nothing of that, or a module that cannot be copied or worked with.
    """
    if isinstance(model, ModelSource | GivenModel):
        return model
    given = dict(arguments or {})
    if isinstance(model, str):
        return ModelSource(model, Path(weights) if weights is not None else None, given, pretrained)
    if weights is not None or pretrained:
        raise InputError(
            f"model {_name_of(model)}: it has its weights; load others into it before, and give no weights."
        )
    if isinstance(model, nn.Module):
        if given:
            raise InputError(f"model {_name_of(model)}: it is made already; arguments are for functions that make one.")
        return _given(model, _name_of(_unwrapped(model)))
    _refuse_compiled(model)
    if not callable(model):
        raise InputError(f"model {model!r:.80}: give a torch.nn.Module, a function that makes one, or a text.")
    try:
        made = model(**given)
    except Exception as error:  # the user's function may raise anything
        raise InputError(f"model {_name_of(model)}: {first_line(error)}.") from None
    _refuse_compiled(made)
    if not isinstance(made, nn.Module):
        raise InputError(f"model {_name_of(model)}: returns {made!r:.80}, which is not a torch.nn.Module.")
    return _given(made, _name_of(model), given)


def _given(model: nn.Module, spec: str, arguments: Mapping[str, Any] | None = None) -> GivenModel:
    model = _unwrapped(model)
    for module in model.modules():
        _refuse_compiled(module)
    own = _copied(model, f"model {spec}")
    for path, module in list(own.named_modules()):
        if hasattr(module, "_orig_mod") and path:  # a part that torch.compile was called on
            parent, _, child = path.rpartition(".")
            setattr(own.get_submodule(parent), child, _unwrapped(module))
    if hugging_face.is_of_transformers(own):
        own = hugging_face.as_plain(own)
    if not any(parameter.requires_grad for parameter in own.parameters()):
        own.requires_grad_()  # frozen as a whole, as for inference: nothing could be recovered
    return GivenModel(ready(own, f"model {spec}"), spec, arguments=dict(arguments or {}))


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside of what torch.compile, data parallelism and weight averaging put around it."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, WRAPPERS):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _refuse_compiled(model: object) -> None:
    if isinstance(model, torch.jit.ScriptModule | torch.jit.ScriptFunction | torch.export.ExportedProgram):
        raise InputError(
            f"model {type(model).__name__}: a scripted, traced or exported model has no code that could be cut; give "
            "the torch.nn.Module that it was made from."
        )


@torch.no_grad()
def _copied(model: nn.Module, where: str) -> nn.Module:
    """Return a copy on the CPU in float32 whose tensors are ordinary ones, also where those of the model came from
    inference mode."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(value, Tensor) and id(value) not in memo and not value.is_meta and type(value) in PLAIN:
                kind = torch.float32 if value.is_floating_point() else value.dtype
                plain = torch.empty(value.shape, dtype=kind).copy_(value)
                ours = nn.Parameter(plain, value.requires_grad) if isinstance(value, nn.Parameter) else plain
                memo[id(value)] = ours
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # the user's attributes may not let themselves be copied
        raise InputError(f"{where}: cannot be copied ({first_line(error)}); give a function that makes it.") from None


PLAIN = (Tensor, nn.Parameter, nn.Buffer)
"""Tensors without a class of their own, which would know better how to copy themselves."""


def _name_of(model: object) -> str:
    named = model if hasattr(model, "__qualname__") else type(model)
    return f"{getattr(named, '__module__', '')}.{getattr(named, '__qualname__', '')}"
