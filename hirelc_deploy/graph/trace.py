"""In: a model and one image. Out: the operations of its forward pass, in order, with shapes and parameter names."""

from __future__ import annotations

import importlib
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import GetSetDescriptorType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.sizes import DimSource, Size, TensorRef, traced_numbers

BATCH = 2
"""Images in the traced batch: more than one, so that a size of 1 always means a dimension that carries nothing."""


@dataclass(frozen=True)
class Op:
    """One call of a torch function, its tensors replaced by `TensorRef`.

    Attributes:
        function: Plain name: `add` for `x + y`, `x += y`, `x.add_(y)` and `torch.add(x, y)`.
        result: A TensorRef, or a list of them where the function returns several.
        module: Path of the innermost module whose forward was running.
    """

    function: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    module: str

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument wherever the caller put it."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)


@dataclass(frozen=True)
class Trace:
    """One forward pass over `BATCH` images. `output` is a TensorRef or a nested container of them."""

    ops: tuple[Op, ...]
    output: Any


def trace(model: nn.Module, example: Tensor) -> Trace:
    """Run the model once on copies of the first image, in eval mode and without gradients, and record what it does.

    Args:
        model: Any module; its train/eval flags are as before afterwards.
        example: (n, channels, height, width) images; only the first is used.

    Raises:
        InputError: The model cannot run on such an image, or on an image alone.
    """
    check_one_input(model)
    images = example[:1].expand(BATCH, *example.shape[1:]).clone()
    recorder = _Recorder(model)
    drop_caches(model)
    try:
        with (
            eval_mode(model),
            torch.no_grad(),
            traced_numbers(model),
            _einops_anew(),
            recorder.module_names(),
            recorder,
            as_it_stands(model),
        ):
            output = model(images)
    except InputError:
        raise
    except Exception as error:  # the model is the user's code and may raise anything
        shape = "x".join(str(size) for size in example.shape[1:])
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(
            f"model {type(model).__name__}: its forward pass fails on a {shape} image ({reason}). "
            "Give the image size the model was made for."
        ) from error
    answers = recorder.refs_in(output)
    shapes = [ref.shape for ref in refs(answers)]
    if shapes and all(0 in shape for shape in shapes):
        raise InputError(f"model {type(model).__name__}: its answer is empty (shape {shapes[0]}); give it outputs.")
    return Trace(tuple(recorder.ops), answers)


@contextmanager
def as_it_stands(model: nn.Module) -> Iterator[None]:
    """Raise InputError inside, where a forward pass runs layers that are no part of the model, or casts to 16 bits.

    No copy of the model would have such layers, and no file of weights; its weights and images are float32.
    """
    own = {id(module) for module in model.modules()}

    def enter(module: nn.Module, _: Any) -> None:
        if id(module) not in own and next(module.parameters(recurse=False), None) is not None:
            raise InputError(
                f"model {type(model).__name__}: its forward pass runs a {type(module).__name__} that is no part of it, "
                "kept in a list, a function or a global name; make it an attribute, or an item of an nn.ModuleList."
            )

    handle = register_module_forward_pre_hook(enter)
    try:
        with _Float32(type(model).__name__):
            yield
    finally:
        handle.remove()


class _Float32(TorchFunctionMode):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype in (torch.half, torch.bfloat16):
            raise InputError(
                f"model {self.name}: its forward pass computes in {str(result.dtype).removeprefix('torch.')} "
                f"({_plain_name(func)}), but its weights and images are float32 here; take autocast, half() and "
                "casts to 16 bits out of it."
            )
        return result


@contextmanager
def _einops_anew() -> Iterator[None]:
    """Let einops compute shapes in each call: its cache takes numbers for equal that come from different places."""
    try:
        einops: Any = importlib.import_module("einops.einops")
        cached, anew = einops._reconstruct_from_shape, einops._reconstruct_from_shape_uncached
    except (ImportError, AttributeError):  # not there, or without such a cache
        yield
        return
    einops._reconstruct_from_shape = anew
    try:
        yield
    finally:
        einops._reconstruct_from_shape = cached


def check_one_input(model: nn.Module) -> None:
    """Raise InputError where a forward pass cannot be called with one tensor of images and nothing else."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return  # code without a signature: running it will tell
    try:
        signature.bind(None)
    except TypeError:
        found = signature.parameters.values()
        needed = [p.name for p in found if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        raise InputError(
            f"model {type(model).__name__}: its forward pass takes {', '.join(needed) or 'no tensor'}; it must work "
            "with one tensor of images alone, so wrap it in a module that holds or makes the rest."
        ) from None


def refs(value: Any) -> Iterator[TensorRef]:
    """Yield every TensorRef inside nested tuples, lists and dicts."""
    if isinstance(value, TensorRef):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from refs(item)
    elif isinstance(value, dict):
        yield from refs(list(value.values()))


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Run in eval mode, and give every module its own train/eval flag back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def drop_caches(model: nn.Module) -> None:
    """Make modules forget what they keep between runs in eval mode until they are trained (timm: attention biases)."""
    training = {module: module.training for module in model.modules()}
    model.train()
    for module, flag in training.items():
        module.training = flag


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self._path_of = {id(module): path for path, module in model.named_modules()}
        self._paths = [""]
        self._count = 0
        # Identity is by object: a weak reference tells a live tensor from a new one at the address of a dead one.
        self._known: dict[int, tuple[weakref.ref[Tensor], TensorRef]] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self._remember(tensor, name)

    @contextmanager
    def module_names(self) -> Iterator[None]:
        """Keep the path of the running module while models are called inside this context."""

        def enter(module: nn.Module, _: Any) -> None:
            self._paths.append(self._path_of.get(id(module), self._paths[-1]))

        def leave(module: nn.Module, _: Any, __: Any) -> None:
            self._paths.pop()

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        arg_refs, kwarg_refs = self.refs_in(args), self.refs_in(kwargs)
        result = func(*args, **kwargs)
        if _holds_tensor(result):
            # An in-place result gets a reference of its own, so that its users are seen as users of the new value.
            result_refs = self.refs_in(result, renew=True)
            self.ops.append(Op(_plain_name(func), arg_refs, kwarg_refs, result_refs, self._paths[-1]))
            return result
        ref = arg_refs[0] if arg_refs else None
        if isinstance(ref, TensorRef) and isinstance(result, torch.Size):
            return torch.Size([Size(size, DimSource(ref, dim)) for dim, size in enumerate(result)])
        if isinstance(ref, TensorRef) and func is Tensor.size:
            dim = args[1] if len(args) > 1 else kwargs["dim"]
            return Size(result, DimSource(ref, dim % len(ref.shape)))
        return result

    def refs_in(self, value: Any, renew: bool = False) -> Any:
        """Return `value` with each tensor replaced by its TensorRef."""
        if isinstance(value, Tensor):
            known = self._known.get(id(value))
            if known is None or known[0]() is not value or (renew and known[1].name is None):
                return self._remember(value, None)
            return known[1]
        if isinstance(value, (tuple, list)):
            items = [self.refs_in(item, renew) for item in value]
            return tuple(items) if isinstance(value, tuple) else items
        if isinstance(value, dict):
            return {key: self.refs_in(item, renew) for key, item in value.items()}
        return value

    def _remember(self, tensor: Tensor, name: str | None) -> TensorRef:
        self._count += 1
        ref = TensorRef(self._count, tuple(tensor.shape), name)
        self._known[id(tensor)] = (weakref.ref(tensor), ref)
        return ref


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_holds_tensor(item) for item in value)
    return isinstance(value, Tensor)


_OPERATOR_NAMES = {
    **{f"{way}{name}": name for name in ("add", "sub", "mul", "pow") for way in ("r", "i")},
    **dict.fromkeys(("truediv", "rtruediv", "itruediv", "rdiv", "idiv", "true_divide"), "div"),
    **dict.fromkeys(("multiply",), "mul"),
    **dict.fromkeys(("subtract", "rsub"), "sub"),
    **dict.fromkeys(("concat", "concatenate"), "cat"),
}


def _plain_name(func: Callable[..., Any]) -> str:
    name = func.__name__
    owner = getattr(func, "__self__", None)
    if name == "__get__" and isinstance(owner, (property, GetSetDescriptorType)):
        name = getattr(owner, "__name__", name)
    name = name.strip("_")
    return _OPERATOR_NAMES.get(name, name)
