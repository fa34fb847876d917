"""In: a model, its float file and the integer file made of it. Out: the model, rounding where the file does.

Trained so (quantisation-aware training, Jacob et al. 2018, section 3), a network learns weights that are good when
rounded. Gradients pass a rounding unchanged (the straight-through estimator, Bengio et al. 2013) and stop where it
clips. What is rounded, and on which grid, is read off the integer file itself, so every pattern is covered.

Batch norm needs no folding here: weights have one symmetric scale per output channel, and such rounding does not see
the factor that a batch norm brings to a channel. The trained model leaves with its weights rounded. They are their own
grid then: the file made of it holds exactly what was trained, and there is no mean shift for biases to correct.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hirelc_deploy.compress.onnx_file.export import layer_of_node
from hirelc_deploy.compress.onnx_file.links import makers_of
from hirelc_deploy.compress.onnx_file.rewrite import source_of
from hirelc_deploy.compress.onnx_file.watch import Watch
from hirelc_deploy.graph.rules import CONVOLUTIONS

SAME = 1e-3
"""Share of the largest value within which a tensor of a float file is the one that a module made. Kernels reach 1e-5,
different tensors of one size are far more than this apart; a rounding step is 4e-3."""

RENAMED = "_QuantizeLinear_Input"
"""Ends the name that ONNX Runtime's quantizer gives to what was an output of the graph."""

INPUT, OUTPUT = "input", "output"


@dataclass(frozen=True)
class Grid:
    """Whole multiples of `scale`, from `low` to `high` of them."""

    scale: float
    low: int
    high: int


@dataclass(frozen=True)
class Rounding:
    """What an integer file rounds, in terms of the modules of its model.

    Attributes:
        weights: Layer name to the number of steps on either side of zero.
        tensors: (module name, INPUT or OUTPUT) to the grid in each call of the module within one forward pass; None
            in calls that are not rounded.
        unseen: Rounded tensors that no module reads or writes as such.
    """

    weights: Mapping[str, int]
    tensors: Mapping[tuple[str, str], tuple[Grid | None, ...]]
    unseen: tuple[str, ...] = ()


def rounding_of(
    model: nn.Module, float_file: ModelProto, integer: ModelProto, example: Tensor, weight_bits: int
) -> Rounding:
    """Return what a file of `quantize` rounds.

    A tensor belongs to the first module that was seen to write, or read, the numbers that it holds in the float file.

    Args:
        float_file: Of any batch, not equalised.
        integer: Made of the same export.
        example: (n, channels, height, width) images.
        weight_bits: Of the target's integer precision.
    """
    grids = grids_of(integer)
    made = {tensor for node in float_file.graph.node for tensor in node.output} | {float_file.graph.input[0].name}
    wanted = [tensor for tensor in grids if tensor in made]
    watch = Watch(float_file)
    for tensor in wanted:
        watch.sample(tensor, 1)
    values = watch.open()(example.numpy()) if wanted else []
    seen = list(_seen(model, example))
    calls = {key: 1 + max(call for other, call, _ in seen if other == key) for key, _, _ in seen}
    tensors: dict[tuple[str, str], list[Grid | None]] = {}
    unseen = [tensor for tensor in grids if tensor not in made]
    for tensor, value in zip(wanted, values, strict=True):
        found = next(((key, call) for key, call, other in seen if _same(value, other)), None)
        if found is None:
            unseen.append(tensor)
        else:
            key, call = found
            tensors.setdefault(key, [None] * calls[key])[call] = grids[tensor]
    layers, makers, modules = layer_of_node(integer), makers_of(integer.graph), dict(model.named_modules())
    weights = {
        layers[node.name]: 2 ** (weight_bits - 1) - (weight_bits == 8)
        for node in integer.graph.node
        if node.name in layers
        and node.input[1] in makers
        and isinstance(modules.get(layers[node.name]), (*CONVOLUTIONS, nn.Linear))
    }
    return Rounding(weights, {key: tuple(each) for key, each in tensors.items()}, tuple(unseen))


def grids_of(integer: ModelProto) -> dict[str, Grid]:
    """Return tensor of the float file to the grid on which an integer file rounds it."""
    constants = {initializer.name: initializer for initializer in integer.graph.initializer}
    # Cast: bytes that only become signed ones.
    rounded = {node.output[0] for node in integer.graph.node if node.op_type in ("DequantizeLinear", "Cast")}
    found = {}
    for node in integer.graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] in constants.keys() | rounded:
            continue
        scale, zero = (numpy_helper.to_array(constants[name]) for name in node.input[1:3])
        if scale.size == 1:
            ends, middle = np.iinfo(zero.dtype), int(zero.reshape(()))
            grid = Grid(float(scale.reshape(())), int(ends.min) - middle, int(ends.max) - middle)
            found[source_of(node.input[0].removesuffix(RENAMED))] = grid
    return found


@torch.no_grad()
def _seen(model: nn.Module, example: Tensor) -> Iterator[tuple[tuple[str, str], int, NDArray[np.float32]]]:
    """Yield ((module name, end), number of the call, its values) of every tensor that a module reads or writes."""
    seen: list[tuple[tuple[str, str], int, NDArray[np.float32]]] = []
    calls: defaultdict[tuple[str, str], int] = defaultdict(int)

    def note(name: str, end: str, value: Any) -> None:
        key = (name, end)
        if isinstance(value, Tensor) and value.is_floating_point():
            # A copy: the next module may work in place.
            seen.append((key, calls[key], value.float().contiguous().numpy().ravel().copy()))
        calls[key] += 1

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda _, args, name=name: note(name, INPUT, args[0])))
        hooks.append(module.register_forward_hook(lambda _, args, result, name=name: note(name, OUTPUT, result)))
    model(example)
    for hook in hooks:
        hook.remove()
    yield from seen


def joined(roundings: Iterable[Rounding]) -> Rounding:
    """Return everything that some of these round.

    A file in which several layers are integer rounds what the files round in each of which one of them is: an operator
    between layers is integer as soon as something integer feeds it (`quantize`).
    """
    weights: dict[str, int] = {}
    tensors: dict[tuple[str, str], tuple[Grid | None, ...]] = {}
    for rounding in roundings:
        weights |= rounding.weights
        for key, grids in rounding.tensors.items():
            known = tensors.get(key, (None,) * len(grids))
            tensors[key] = tuple(one or other for one, other in zip(known, grids, strict=True))
    return Rounding(weights, tensors)


def _same(one: NDArray[np.float32], other: NDArray[np.float32]) -> bool:
    return one.size == other.size and float(np.abs(one - other).max()) <= SAME * float(np.abs(one).max())


def install(model: nn.Module, rounding: Rounding) -> None:
    """Let a model round as the file does, in place, until `settle`; what it lacks (a branch left out) is passed by."""
    modules = dict(model.named_modules())
    for layer, steps in rounding.weights.items():
        if layer in modules:
            parametrize.register_parametrization(modules[layer], "weight", RoundedWeight(steps))
    for (name, end), grids in rounding.tensors.items():
        if name not in modules:
            continue
        if end == INPUT:
            modules[name].register_forward_pre_hook(RoundedInput(grids))
        else:
            modules[name].register_forward_hook(RoundedOutput(grids))


def settle(model: nn.Module) -> nn.Module:
    """Take the rounding out of a model, in place, but leave its weights rounded; return it."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, _RoundedCalls):
                    del hooks[key]
    return model


class Rounded(torch.autograd.Function):
    """Rounding to a grid, halves to even. The gradient is that of the clipping alone.

    Six times faster on a CPU than `torch.fake_quantize_per_tensor_affine`.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, grid: Grid) -> Tensor:
        """Return the nearest values of the grid."""
        ctx.save_for_backward(values)
        ctx.ends = grid.scale * grid.low, grid.scale * grid.high
        return (values / grid.scale).round_().clamp_(grid.low, grid.high).mul_(grid.scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the gradient where nothing was clipped."""
        (values,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradients[0], values, *ctx.ends), None


class RoundedWeight(nn.Module):
    """A weight rounded to `steps` steps on either side of zero, the largest of each output channel being the last."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, weight: Tensor) -> Tensor:
        """Return the rounded weight; gradients pass it unchanged."""
        with torch.no_grad():
            largest = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True)
            scale = largest.clamp(min=torch.finfo(torch.float32).tiny) / self.steps
            off = (weight / scale).round_().mul_(scale).sub_(weight)
        return weight + off


class _RoundedCalls:
    """Rounds what passes one end of a module, in each call as its grid says."""

    def __init__(self, grids: Sequence[Grid | None]) -> None:
        self.grids, self.call = tuple(grids), 0

    def _rounded(self, value: Tensor) -> Tensor:
        grid = self.grids[self.call % len(self.grids)]
        self.call += 1
        if grid is None:
            return value
        rounded: Tensor = Rounded.apply(value, grid)  # type: ignore[no-untyped-call]  # torch's
        return rounded


class RoundedInput(_RoundedCalls):
    """A forward pre-hook."""

    def __call__(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments, the first one rounded."""
        return (self._rounded(args[0]), *args[1:])


class RoundedOutput(_RoundedCalls):
    """A forward hook."""

    def __call__(self, _module: nn.Module, _args: tuple[Any, ...], result: Tensor) -> Tensor:
        """Return the rounded result."""
        return self._rounded(result)
