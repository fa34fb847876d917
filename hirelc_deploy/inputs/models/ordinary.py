"""In: a network as somebody made it. Out: the same function as an ordinary module, and what was changed, in words.

Ordinary means: no wrapper around it or a part of it, tensors that can be trained, and weights that are stored and not
computed in the forward pass. Nothing here changes what the network computes.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.models.carried import carried, carry
from hirelc_deploy.user_code import first_line, run_as_written

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
WRAPPERS_BY_NAME = ("ModelEmaV2", "ModelEmaV3")
"""Of timm, known without an import: they keep the averaged network under `module`."""

WITHOUT_CODE = (torch.jit.ScriptModule, torch.jit.ScriptFunction, torch.export.ExportedProgram)

QUANTIZERS = (
    "torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.qat", "torch.ao.nn.intrinsic.qat",
    "torch.ao.quantization.fake_quantize", "torch.ao.quantization.observer", "nncf", "bitsandbytes",
)  # fmt: skip
"""Packages whose layers hold integers, or round to their grid."""

FLOATS_IN_QUANTIZERS = ("FloatFunctional",)
"""Sums of torchvision's networks that are ready to be quantized, and are not."""

CONSTANTS = ("DFL",)
"""Modules whose frozen weight is arithmetic and nothing learned: the numbers 0 to 15 of a YOLO's box distances."""

PLAIN = (Tensor, nn.Parameter, nn.Buffer)
"""Tensors without a class of their own, which would know better how to copy themselves."""

LARGEST_KERNEL = 32
"""Parameters of more rows are no kernels but maps, such as positions."""

NOTES = "load_notes"
"""Where a model keeps the sentences about how it was loaded."""

SAME = 1e-5
"""Largest difference between a layer and its twin with stored weights, as a share of the largest output."""


def notes_of(model: nn.Module) -> tuple[str, ...]:
    """Return the sentences that tell a user how the model was loaded."""
    return tuple(vars(model).get(NOTES, ()))


def note(model: nn.Module, text: str) -> None:
    """Keep a sentence for the user on the model."""
    model.__dict__[NOTES] = (*notes_of(model), text)


def unwrapped(model: Any, where: str) -> nn.Module:
    """Return the network inside of what torch.compile, data parallelism and weight averaging put around it.

    Raises InputError for what is no network, or one without code that could be cut.
    """
    model = _inner(model)
    parts = model.named_modules() if isinstance(model, nn.Module) else [("", model)]
    for path, part in parts:
        exported = isinstance(part, torch.fx.GraphModule) and "train" in vars(part)  # which ExportedProgram.module sets
        if isinstance(part, WITHOUT_CODE) or exported:
            raise InputError(
                f"{where}: {f'its part {path} is' if path else 'it is'} a {type(part).__name__}; a scripted, traced or "
                "exported model has no code that could be cut; give the torch.nn.Module that it was made from."
            )
        if type(part).__module__.startswith(QUANTIZERS) and type(part).__name__ not in FLOATS_IN_QUANTIZERS:
            raise InputError(
                f"{where}: its part {path} is a {type(part).__name__}: it is quantized, or prepared for that; give the "
                "float network that it was made from."
            )
    if not isinstance(model, nn.Module):
        raise InputError(f"{where}: returns {model!r:.80}, which is not a torch.nn.Module.")
    return model


def with_plain_parts(model: nn.Module) -> nn.Module:
    """Unwrap the parts of a network in place, let its forward passes run uncompiled, and copies call their own."""
    run_as_written()
    for parent in model.modules():
        for name, child in list(parent._modules.items()):  # a module that is there twice under each of its names
            if (inner := _inner(child)) is not child:
                setattr(parent, name, inner)
        parent._compiled_call_impl = None  # what `model.compile()` sets
        own: Any = vars(parent).get("forward")
        if hasattr(own, "_torchdynamo_orig_callable"):  # bound to the module that it was compiled for, not to a copy
            written: Any = inspect.unwrap(own)
            parent.forward = MethodType(getattr(written, "__func__", written), parent)
    carry(model)
    return model


def _inner(model: Any) -> Any:
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and (isinstance(model, WRAPPERS) or type(model).__name__ in WRAPPERS_BY_NAME):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@torch.no_grad()
def copied(model: nn.Module, where: str) -> nn.Module:
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
        with carried(model):
            return copy.deepcopy(model, memo)
    except Exception as error:  # the user's attributes may not let themselves be copied
        raise InputError(f"{where}: cannot be copied ({first_line(error)}); give a function that makes it.") from None


def with_plain_tensors(model: nn.Module, where: str) -> nn.Module:
    """Return the model, or a copy where a tensor comes from inference mode or a module keeps one that is no float32."""
    others = (torch.half, torch.bfloat16, torch.double)
    kept = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers(), *kept) if not is_lazy(tensor)]
    foreign = any(tensor.is_inference() for tensor in tensors)
    return copied(model, where) if foreign or any(tensor.dtype in others for tensor in kept) else model


def all_trained(model: nn.Module) -> nn.Module:
    """Let every parameter take part in recovery, in place; say so where some were frozen."""
    constants = {
        id(parameter)
        for module in model.modules()
        if type(module).__name__ in CONSTANTS
        for parameter in module.parameters()
    }
    floats = [p for p in model.parameters() if p.is_floating_point() and id(p) not in constants]
    frozen = [parameter for parameter in floats if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    if frozen:
        note(model, f"{len(frozen)} of {len(floats)} parameters were frozen (requires_grad=False); recovery trains all")
    return model


# Weights that the forward pass computes


def stored_weights(model: nn.Module) -> nn.Module:
    """Store what layers compute of their weights in each forward pass, in place; say so where some did.

    Masks of torch.nn.utils.prune, weight and spectral norms as hooks or parametrizations, standardised weights: a layer
    becomes the plain one that computes the same. One whose weights depend on its input stays as it is.
    """
    found = [path for path, module in list(model.named_modules()) if _without_torchs_own(module)]
    twins: dict[int, nn.Module] = {}
    for path, module in model.named_modules():
        if path and (twin := _twin(module)) is not None:
            twins[id(module)] = twin
            found.append(path)
    for parent in model.modules():
        for name, child in list(parent._modules.items()):
            if id(child) in twins:
                setattr(parent, name, twins[id(child)])
    if found:
        layers = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        note(model, f"weights that were computed in each forward pass are stored now, with the same values: {layers}")
    return model


@torch.no_grad()
def _without_torchs_own(module: nn.Module) -> bool:
    """Take what torch.nn.utils put on a module off it, its effect kept; return whether there was any."""
    changed = False
    if parametrize.is_parametrized(module):
        parametrizations: Any = module.parametrizations
        for name in list(parametrizations):
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        changed = True
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
        elif isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
        else:
            continue
        changed = True
    return changed


CONVOLUTIONS: Mapping[str, type[nn.Module]] = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}


@dataclass(frozen=True)
class _Call:
    """A convolution or matrix product as it ran."""

    function: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def arg(self, place: int, name: str, default: Any = None) -> Any:
        """Return an argument wherever the caller put it."""
        return self.args[place] if place < len(self.args) else self.kwargs.get(name, default)


class _Calls(TorchFunctionMode):
    """Remembers the convolutions and matrix products that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[_Call] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in CONVOLUTIONS or name == "linear":
            self.found.append(_Call(name, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _twin(module: nn.Module) -> nn.Module | None:
    """Return the plain layer that computes what a layer of somebody's own does; None where there is none.

    The layer runs on two noises. It has a twin if it made one product, by the same weight both times, which is no
    parameter of its own, and ran no module in it: those only hold parameters, as the branches that a RepVGG merges.
    """
    own = list(module.parameters())
    is_torchs = type(module).__module__.startswith("torch.nn.modules") and not module._forward_pre_hooks
    if not own or is_torchs:
        return None
    noises = _noises(module, max(own, key=lambda parameter: (parameter.ndim, parameter.numel())))
    hooks = [part.register_forward_pre_hook(_is_run) for part in module.modules() if part is not module]
    try:
        ran = [_run(module, noise) for noise in noises]
    except Exception:  # not made for such an input; code of somebody's own raises anything
        return None
    finally:
        for hook in hooks:
            hook.remove()
    if [len(calls) for calls, _ in ran] != [1, 1]:
        return None
    call, again = (calls[0] for calls, _ in ran)
    weight = call.arg(1, "weight")
    if any(weight is parameter for parameter in own) or not torch.equal(weight, again.arg(1, "weight")):
        return None
    for twin in _candidates(call):
        twin.train(module.training)
        twin._forward_hooks = module._forward_hooks
        if all(_alike(_run(twin, noise)[1], answer) for noise, (_, answer) in zip(noises, ran, strict=True)):
            return twin
    return None


def _is_run(part: nn.Module, _: Any) -> None:
    raise InputError(f"a {type(part).__name__} is run, so that there is more than one product")


def _noises(module: nn.Module, weight: Tensor) -> list[Tensor]:
    """Return two inputs for which a layer with this weight should be made; none for other weights."""
    generator = torch.Generator().manual_seed(0)
    if weight.ndim < 2 or max(weight.shape[2:], default=0) > LARGEST_KERNEL:
        return []
    groups = getattr(module, "groups", 1)
    channels = weight.shape[1] * (groups if isinstance(groups, int) else 1)
    shape = (3, channels) if weight.ndim == 2 else (2, channels, *(8 * size + 1 for size in weight.shape[2:]))
    return [torch.randn(shape, generator=generator) for _ in range(2)]


def _run(module: nn.Module, noise: Tensor) -> tuple[list[_Call], Tensor]:
    calls = _Calls()
    with calls:
        answer: Tensor = module(noise)
    return calls.found, answer


def _alike(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= SAME * wanted.abs().max())


def _candidates(call: _Call) -> Iterator[nn.Module]:
    """Yield plain layers with the arguments of a call; for convolutions that pad by themselves timm's too."""
    weight, bias = call.arg(1, "weight"), call.arg(2, "bias")
    if call.function == "linear":
        twins: list[nn.Module] = [nn.Linear(weight.shape[1], weight.shape[0], bias is not None)]
    else:
        names = (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1))
        options = {name: call.arg(place, name, default) for place, (name, default) in enumerate(names, 3)}
        size = weight.shape[1] * options["groups"], weight.shape[0], tuple(weight.shape[2:])
        kind: Any = CONVOLUTIONS[call.function]
        twins = [kind(*size, bias=bias is not None, **options)]
        if call.function == "conv2d":
            from timm.layers import Conv2dSame

            twins.append(Conv2dSame(*size, bias=bias is not None, **options))
    for twin in twins:
        stored: Any = twin
        stored.weight = nn.Parameter(weight.detach().clone())
        stored.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        yield twin
