"""In: a trace. Out: which indices of which parameters, layer inputs and layer outputs can only be removed together.

Every index of a dimension that may be cut carries a label, an integer. Operations pass labels on and tie those that
must go together. A tensor's labels are `Factor`s: arrays over one dimension, or jointly over several once a
dimension has been split (query-key-value channels seen as 3 x heads x head size).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hirelc_deploy.graph.sizes import DimSource, Size
from hirelc_deploy.graph.trace import Op, TensorRef, Trace, refs

Labels = NDArray[np.int64]

ANSWER = "its outputs are the model's answer"
"""Why the last layer stays whole."""


class Couplings:
    """Union-find over labels, with reasons why some labels must stay and marks that tell what others are."""

    def __init__(self) -> None:
        self._parent: Labels = np.empty(0, np.int64)
        self._size = 0
        self._edges: list[tuple[Labels, Labels]] = []
        self.pins: list[tuple[Labels, str]] = []
        self.marks: list[tuple[Labels, str]] = []

    def fresh(self, count: int) -> Labels:
        """Return `count` labels tied to nothing."""
        self._size += count
        return np.arange(self._size - count, self._size)

    def tie(self, first: Labels, second: Labels) -> None:
        """Make every pair of (broadcast) labels one: they are removed together or not at all."""
        if first is not second:
            a, b = np.broadcast_arrays(first, second)
            self._edges.append((a.ravel(), b.ravel()))

    def pin(self, labels: Labels, reason: str) -> None:
        """Keep these labels in any plan; the first reason given is the one a user reads."""
        self.pins.append((labels.ravel(), reason))

    def mark(self, labels: Labels, kind: str) -> None:
        """Note what these labels are."""
        self.marks.append((labels.ravel(), kind))

    def roots(self, labels: Labels) -> Labels:
        """Return the smallest label of the class of each label."""
        self._merge()
        return self._parent[labels]

    def _merge(self) -> None:
        if not self._edges and len(self._parent) == self._size:
            return
        parent = np.arange(self._size)
        parent[: len(self._parent)] = self._parent
        if self._edges:
            a = np.concatenate([edge[0] for edge in self._edges])
            b = np.concatenate([edge[1] for edge in self._edges])
            self._edges.clear()
            while True:
                a, b = parent[a], parent[b]
                differ = a != b
                if not differ.any():
                    break
                a, b = a[differ], b[differ]
                # Hook the larger root under the smallest partner, then shorten every path to its root.
                np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
                while not np.array_equal(shorter := parent[parent], parent):
                    parent = shorter
        self._parent = parent


@dataclass(frozen=True)
class Factor:
    """Labels over `dims` of a tensor: `labels` has one axis per dim, in this order."""

    dims: tuple[int, ...]
    labels: Labels


@dataclass(frozen=True)
class Value:
    """A tensor's shape and its labelled dims; no dim is in two factors, and no labelled dim has size 1."""

    shape: tuple[int, ...]
    factors: tuple[Factor, ...] = ()

    def factor_of(self, dim: int) -> Factor | None:
        """Return the factor that labels `dim`."""
        return next((factor for factor in self.factors if dim in factor.dims), None)

    def moved(self, shape: Sequence[int], new_dim: Callable[[int], int]) -> Value:
        """Return a view whose dim `new_dim(d)` is this value's dim d."""
        factors = (Factor(tuple(new_dim(d) for d in f.dims), f.labels) for f in self.factors)
        return Value(tuple(shape), tuple(factors))


@dataclass
class WeightUse:
    """A convolution or linear layer as it ran: labels of its features (None where they cannot be cut)."""

    name: str
    kind: str
    weight: str
    input: TensorRef
    output: TensorRef
    in_features: int
    out_features: int
    in_labels: Labels | None
    out_labels: Labels | None
    groups: int = 1
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    called: bool = True
    """Whether a layer module ran: others may use its weight in their own forward, where no hook sees the input."""

    @property
    def depthwise(self) -> bool:
        """Whether each filter sees one input channel, so that inputs and outputs go together."""
        return 1 < self.groups == self.in_features


@dataclass
class AttentionUse:
    """The core of an attention: scores, softmax and mix, between the projections. `queries` are those of an image."""

    name: str
    heads: int
    head_dim: int
    queries: int
    keys: int
    labels: Labels | None
    products: int = 2
    input: TensorRef | None = None


@dataclass
class Labelled:
    """What the walk over a trace found.

    Attributes:
        parameters: (name, dim) to the labels of that dimension's indices.
        attributes: Path of a whole number that a module keeps to the labels of what it counts.
        averaged: Weights of global response norms, which divide by a mean over their channels.
    """

    couplings: Couplings
    parameters: dict[tuple[str, int], Labels] = field(default_factory=dict)
    attributes: dict[str, Labels] = field(default_factory=dict)
    averaged: set[str] = field(default_factory=set)
    uses: list[WeightUse | AttentionUse] = field(default_factory=list)


def label(model: nn.Module, traced: Trace) -> Labelled:
    """Walk over the operations and return the couplings they make."""
    walk = Walk(model)
    for op in traced.ops:
        handler = HANDLERS.get(op.function, unknown)
        if op.function not in READS_SIZES:
            walk.freeze_numbers(op)
        result = handler(walk, op)
        outputs = [op.result] if isinstance(op.result, TensorRef) else list(refs(op.result))
        values = [result] if isinstance(result, Value) else list(result)
        for ref, value in zip(outputs, values, strict=True):
            if ref.name is None:
                walk.values[ref.uid] = value
    for ref in refs(traced.output):
        walk.freeze_all(walk.value(ref), ANSWER)
    walk.settle()
    return walk.found


Axis = tuple[Labels, int]
"""One axis of an array of labels: the indices along one dimension."""


class Walk:
    """The state of one walk: the labels of every tensor seen so far."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        saved = model.state_dict()
        self._fixed = {
            name
            for name, buffer in model.named_buffers()
            if name not in saved and bool((buffer != buffer.flatten()[:1].squeeze()).any())
        }
        self.values: dict[int, Value] = {}
        self.found = Labelled(Couplings())
        self.couplings = self.found.couplings
        self._splits: list[Labels] = []
        self._equal_sizes: list[tuple[Axis | None, Axis | None, str]] = []

    def value(self, ref: TensorRef) -> Value:
        """Return the labels of a tensor.

        A parameter or buffer gets its own for each dim. A tensor of unknown origin has none, nor has a buffer that is
        not saved (a bundle could not bring back which part of it stayed) unless all its elements are alike.
        """
        if ref.name is not None and ref.name not in self._fixed:
            dims = (d for d, size in enumerate(ref.shape) if size > 1)
            return Value(ref.shape, tuple(Factor((d,), self._parameter(ref.name, d, ref.shape[d])) for d in dims))
        return self.values.get(ref.uid, Value(ref.shape))

    def _parameter(self, name: str, dim: int, size: int) -> Labels:
        if (name, dim) not in self.found.parameters:
            self.found.parameters[name, dim] = self.couplings.fresh(size)
        return self.found.parameters[name, dim]

    def attribute(self, path: str, size: int) -> Labels:
        """Return the labels of what a module's attribute counts."""
        if path not in self.found.attributes:
            self.found.attributes[path] = self.couplings.fresh(size)
        return self.found.attributes[path]

    def inputs(self, op: Op) -> list[Value]:
        """Return the values of all tensor arguments."""
        return [self.value(ref) for ref in refs((op.args, op.kwargs))]

    def freeze(self, value: Value, dim: int, reason: str) -> Value:
        """Make it impossible to remove indices along `dim`, and return the value without labels there.

        Where the dim is labelled jointly with others, an index of those others can still go, as a whole.
        """
        factor = value.factor_of(dim)
        if factor is None:
            return value
        others = tuple(f for f in value.factors if f is not factor)
        if len(factor.dims) == 1:
            self.couplings.pin(factor.labels, reason)
            return Value(value.shape, others)
        axis = factor.dims.index(dim)
        first = factor.labels.take([0], axis)
        self.couplings.tie(factor.labels, first)
        rest = Factor(tuple(d for d in factor.dims if d != dim), first.squeeze(axis))
        return Value(value.shape, (*others, rest))

    def freeze_all(self, value: Value, reason: str) -> None:
        """Keep every labelled index of this value."""
        for factor in value.factors:
            self.couplings.pin(factor.labels, reason)

    def one_dim(self, value: Value, dim: int, reason: str) -> tuple[Value, Labels | None]:
        """Return the labels along `dim` alone; a joint labelling is frozen along `dim` and gives None."""
        factor = value.factor_of(dim)
        if factor is not None and len(factor.dims) > 1:
            value, factor = self.freeze(value, dim, reason), None
        return value, None if factor is None else factor.labels

    def tie_or_pin(self, first: Labels | None, second: Labels | None, reason: str) -> None:
        """Tie two label arrays; where one side cannot be cut, the other must stay."""
        if first is not None and second is not None:
            self.couplings.tie(first, second)
        elif (known := first if first is not None else second) is not None:
            self.couplings.pin(known, reason)

    def elementwise(self, values: Sequence[Value], reason: str) -> Value:
        """Return the value of an elementwise operation with broadcasting: aligned labels are tied."""
        shape = np.broadcast_shapes(*(value.shape for value in values))
        rank = len(shape)
        aligned = [_with_rank(value, rank) for value in values]
        for dim in range(rank):
            wide = [i for i, v in enumerate(aligned) if v.shape[dim] > 1]
            if any(aligned[i].factor_of(dim) is None for i in wide):
                for i in wide:
                    aligned[i] = self.freeze(aligned[i], dim, reason)
        return Value(tuple(shape), tuple(self._tie_factors([f for v in aligned for f in v.factors])))

    def _tie_factors(self, factors: list[Factor]) -> Iterable[Factor]:
        while factors:
            group, dims = [factors.pop(0)], set[int]()
            while dims != (dims := dims.union(*(f.dims for f in group))):
                group += [f for f in factors if dims & set(f.dims)]
                factors = [f for f in factors if not dims & set(f.dims)]
            order = tuple(sorted(dims))
            arrays = [_spread(factor, order) for factor in group]
            for array in arrays[1:]:
                self.couplings.tie(arrays[0], array)
            shape = np.broadcast_shapes(*(array.shape for array in arrays))
            widest = max(arrays, key=lambda array: array.size)
            yield Factor(order, np.broadcast_to(widest, shape))

    def reshape(self, value: Value, shape: tuple[int, ...], reason: str) -> Value:
        """Return the value seen in another shape: labels are split and merged with their dims."""
        factors: list[Factor] = []
        for sources, targets in _matching_dims(value.shape, shape):
            if len(sources) == 1 and len(targets) == 1:
                continue
            touching = [f for f in value.factors if set(f.dims) & set(sources)]
            if len(touching) > 1 or any(not set(f.dims) <= set(sources) for f in touching):
                for dim in sources:
                    value = self.freeze(value, dim, reason)
            elif touching:
                sizes = tuple(value.shape[d] for d in sources)
                array = np.broadcast_to(_spread(touching[0], tuple(sources)), sizes)
                new = self._reduced(Factor(tuple(targets), array.reshape([shape[d] for d in targets])))
                factors += new
                if new and len(new[0].dims) > 1:
                    self._splits.append(new[0].labels)
                value = Value(value.shape, tuple(f for f in value.factors if f is not touching[0]))
        kept = {s[0]: t[0] for s, t in _matching_dims(value.shape, shape) if len(s) == 1 and len(t) == 1}
        moved = (Factor(tuple(kept[d] for d in f.dims), f.labels) for f in value.factors)
        return Value(shape, (*moved, *factors))

    def _reduced(self, factor: Factor) -> list[Factor]:
        """Return the factor without the axes along which its labels do not differ; empty when none is left."""
        labels, dims = self.couplings.roots(factor.labels), list(factor.dims)
        for axis in reversed(range(len(dims))):
            first = labels.take([0], axis)
            if (labels == first).all():
                labels = first.squeeze(axis)
                del dims[axis]
        return [Factor(tuple(dims), labels)] if dims else []

    def axis(self, size: Size) -> Axis | None:
        """Return the labels that a number counts; None where it counts what cannot be cut."""
        if size < 1:
            return None
        if isinstance(size.source, str):
            return self.attribute(size.source, int(size)), 0
        assert size.source is not None
        return self._axis_of(self.value(size.source.ref), size.source.dim)

    @staticmethod
    def _axis_of(value: Value, dim: int) -> Axis | None:
        factor = value.factor_of(dim)
        return None if factor is None else (factor.labels, factor.dims.index(dim))

    def written_size(self, value: Value, dim: int, size: int, op: Op) -> Value:
        """Return `value`, whose `dim` was given this size by the model's code: where it came from must agree."""
        if size < 0:
            return value
        if not isinstance(size, Size):
            place = op.module or "the model's own forward"
            return self.freeze(value, dim, f"its size is written as {size} in {place}")
        if size.source is not None:
            self.must_agree(self._axis_of(value, dim), self.axis(size), op)
        return value

    def must_agree(self, first: Axis | None, second: Axis | None, op: Op) -> None:
        """Let what two axes count stay equally many."""
        if first is None or second is None or first[0] is not second[0] or first[1] != second[1]:
            self._equal_sizes.append((first, second, f"must be as many as what cannot be cut, by {where(op)}"))

    def filled(self, value: Value, dim: int, size: int) -> Value:
        """Return `value`, whose `dim` repeats one thing `size` times, with the labels of what was counted."""
        axis = self.axis(size) if isinstance(size, Size) and size.source is not None else None
        if axis is None or axis[0].ndim > 1 or value.shape[dim] == 1:
            return value
        return Value(value.shape, (*value.factors, Factor((dim,), axis[0])))

    def freeze_numbers(self, op: Op) -> None:
        """Keep whole what the numbers among the arguments count: the operation would do something else with fewer."""
        for size in _sizes((op.args, op.kwargs)):
            axis = None if size.source is None else self.axis(size)
            if axis is not None:
                self.couplings.pin(axis[0], f"its number is an argument of {where(op)}")

    def settle(self) -> None:
        """Settle what could only be decided with all couplings known: axes of splits, and sizes that must agree."""
        while True:
            self._settle_splits()
            changed = False
            for first, second, reason in self._equal_sizes:
                one = None if first is None else self._line(*first)
                other = None if second is None else self._line(*second)
                if one is not None and other is not None:
                    changed |= not np.array_equal(self.couplings.roots(one), self.couplings.roots(other))
                self.tie_or_pin(one, other, reason)
            if not changed:
                return

    def _line(self, labels: Labels, axis: int) -> Labels | None:
        """Return the labels along an axis of a settled split, or None if it is another axis that gets shorter."""
        if labels.ndim == 1:
            return labels
        roots = self.couplings.roots(labels)
        line = only(axis, labels.ndim)
        return labels[line].ravel() if (roots == roots[line]).all() else None

    def _settle_splits(self) -> None:
        """Tie split dims so that what is removed stays a whole slice along one axis: the axis with most choices."""
        while True:
            changed = False
            for labels in self._splits:
                roots = self.couplings.roots(labels)
                count = len(np.unique(roots))
                if any(count == self._choices(roots, axis) for axis in range(roots.ndim)):
                    continue
                axis = max(range(roots.ndim), key=lambda axis: self._choices(roots, axis))
                self.couplings.tie(labels, labels[only(axis, labels.ndim)])
                changed = True
            if not changed:
                return

    @staticmethod
    def _choices(roots: Labels, axis: int) -> int:
        """Return how many classes are left after tying over all axes but `axis`."""
        trial = Couplings()
        values, dense = np.unique(roots, return_inverse=True)
        trial.fresh(len(values))
        dense = dense.reshape(roots.shape)
        trial.tie(dense, dense[only(axis, roots.ndim)])
        return len(np.unique(trial.roots(dense)))


def _sizes(value: Any) -> Iterable[Size]:
    """Yield every number with a source inside nested arguments."""
    if isinstance(value, Size):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _sizes(item)
    elif isinstance(value, dict):
        yield from _sizes(list(value.values()))


def _with_rank(value: Value, rank: int) -> Value:
    missing = rank - len(value.shape)
    return value.moved((1,) * missing + value.shape, lambda dim: dim + missing)


def only(axis: int, rank: int) -> tuple[slice, ...]:
    """Return the index that takes all of one axis and the first of every other."""
    return tuple(slice(None) if a == axis else slice(0, 1) for a in range(rank))


def _spread(factor: Factor, dims: tuple[int, ...]) -> Labels:
    """Return the labels with one axis for each of `dims`, of size 1 where the factor says nothing."""
    order = sorted(range(len(factor.dims)), key=lambda axis: dims.index(factor.dims[axis]))
    array = factor.labels.transpose(order)
    index = tuple(slice(None) if dim in factor.dims else None for dim in dims)
    return array[index]


def _matching_dims(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Return the smallest groups of old and new dims that hold the same elements in the same order."""
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        if i < len(old) and old[i] == 1 and not (j < len(new) and new[j] == 1):
            groups.append(([i], list[int]()))
            i += 1
            continue
        if j < len(new) and new[j] == 1 and not (i < len(old) and old[i] == 1):
            groups.append(([], [j]))
            j += 1
            continue
        sources, targets = [i], [j]
        left, right = old[i], new[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left *= old[i]
                sources.append(i)
                i += 1
            else:
                right *= new[j]
                targets.append(j)
                j += 1
        groups.append((sources, targets))
    return groups


# ---- one entry per operation -----------------------------------------------------------------------------------

Handler = Callable[[Walk, Op], "Value | Sequence[Value]"]
HANDLERS: dict[str, Handler] = {}
"""Function name (as in `Op.function`) to the rule that passes its labels on. An operation that is not here keeps
everything it reads whole."""


READS_SIZES = {
    "reshape", "view", "unflatten", "view_as", "reshape_as", "expand", "expand_as", "broadcast_to", "zeros", "ones",
    "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "layer_norm", "rms_norm", "group_norm",
    "conv2d", "split", "split_with_sizes", "multi_head_attention_forward",
}  # fmt: skip
"""Functions whose rules follow the numbers they are given; elsewhere what a number counts stays whole."""


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register a rule for these function names."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def where(op: Op) -> str:
    """Return the words that tell a user which operation is meant."""
    return f"{op.function} in {op.module}" if op.module else f"{op.function} in the model's own forward"


def _result_shapes(op: Op) -> list[tuple[int, ...]]:
    return [ref.shape for ref in refs(op.result)]


def unknown(walk: Walk, op: Op) -> Sequence[Value]:
    """Keep whole everything that an operation reads."""
    return _unfollowed(walk, op, walk.inputs(op))


def _unfollowed(walk: Walk, op: Op, values: Iterable[Value]) -> Sequence[Value]:
    for value in values:
        walk.freeze_all(value, f"read by {where(op)}, an operation that this program does not follow")
    return [Value(shape) for shape in _result_shapes(op)]


@handles(
    "relu", "relu6", "hardtanh", "gelu", "silu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "leaky_relu", "elu",
    "celu", "selu", "mish", "softplus", "clamp", "clip", "exp", "log", "sqrt", "rsqrt", "neg", "abs", "square",
    "reciprocal", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "contiguous",
    "clone", "detach", "to", "type", "float", "half", "double", "bfloat16", "type_as", "cpu", "cuda", "nan_to_num",
    "zeros_like", "ones_like", "logsigmoid", "threshold", "sin", "cos", "erf", "requires_grad", "data", "alias",
    "fill", "zero", "rand_like", "randn_like", "empty_like", "full_like", "identity", "copy",
)  # fmt: skip
def _same(walk: Walk, op: Op) -> Value:
    return walk.value(next(iter(refs((op.args, op.kwargs)))))


@handles(
    "add", "sub", "mul", "div", "pow", "maximum", "minimum", "where", "masked_fill", "lerp", "addcmul",
    "floor_divide", "remainder", "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or",
)  # fmt: skip
def _elementwise(walk: Walk, op: Op) -> Value:
    given = list(refs((op.args, op.kwargs)))
    values = [walk.value(ref) for ref in given]
    result = walk.elementwise(values, f"meets values that cannot be cut in {where(op)}")
    if op.function == "add" and sum(ref.name is None for ref in given) > 1:
        for factor in result.factors:
            walk.couplings.mark(factor.labels, "residual channels")
    return result


@handles("conv2d")
def _conv2d(walk: Walk, op: Op) -> Value:
    x_ref, w_ref = op.arg(0, "input"), op.arg(1, "weight")
    if len(x_ref.shape) != 4:
        return unknown(walk, op)[0]
    x, weight = walk.value(x_ref), walk.value(w_ref)
    groups = op.arg(6, "groups", 1)
    reason = f"meets channels that cannot be cut at {op.module}"
    for dim in (2, 3):
        x = walk.freeze(x, dim, reason)
    x, inputs = walk.one_dim(x, 1, reason)
    weight, filters = walk.one_dim(weight, 0, reason)
    weight, columns = walk.one_dim(weight, 1, reason)
    channels = x_ref.shape[1]
    if groups == 1:
        walk.tie_or_pin(inputs, columns, "it reads the image" if inputs is None else reason)
    elif groups == channels:
        if inputs is not None and filters is not None:
            walk.couplings.tie(inputs[:, None], filters.reshape(channels, -1))
        else:
            walk.tie_or_pin(inputs, filters, reason)
    else:
        # Every group must stay as large as the others: an index goes from all groups at once.
        if inputs is not None and columns is not None:
            walk.couplings.tie(inputs.reshape(groups, -1), columns)
        else:
            walk.tie_or_pin(inputs, columns, reason)
        if filters is not None:
            walk.couplings.tie(filters.reshape(groups, -1), filters.reshape(groups, -1)[:1])
    tie_bias(walk, op.arg(2, "bias"), filters)
    stride, dilation = _pair(op.arg(3, "stride", 1)), _pair(op.arg(5, "dilation", 1))
    kernel = (w_ref.shape[2], w_ref.shape[3])
    padding = op.arg(4, "padding", 0)
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        padding = [size // 2 for size in total]
    use = _weight_use(walk, op, "conv", (channels, w_ref.shape[0]), (inputs, filters))
    use.groups, use.kernel, use.stride, use.padding, use.dilation = groups, kernel, stride, _pair(padding), dilation
    kept = tuple(f for f in x.factors if f.dims == (0,))
    return Value(op.result.shape, kept + factors_at(1, filters))


@handles("linear")
def _linear(walk: Walk, op: Op) -> Value:
    x_ref, w_ref = op.arg(0, "input"), op.arg(1, "weight")
    last = len(x_ref.shape) - 1
    reason = f"meets features that cannot be cut at {op.module}"
    x, inputs = walk.one_dim(walk.value(x_ref), last, reason)
    weight, rows = walk.one_dim(walk.value(w_ref), 0, reason)
    weight, columns = walk.one_dim(weight, 1, reason)
    walk.tie_or_pin(inputs, columns, "it reads the image" if inputs is None else reason)
    tie_bias(walk, op.arg(2, "bias"), rows)
    _weight_use(walk, op, "linear", (x_ref.shape[-1], w_ref.shape[0]), (inputs, rows))
    kept = tuple(f for f in x.factors if last not in f.dims)
    return Value(op.result.shape, kept + factors_at(last, rows))


def _weight_use(
    walk: Walk, op: Op, kind: str, features: tuple[int, int], labels: tuple[Labels | None, Labels | None]
) -> WeightUse:
    """Note the layer; keep what it touches where its weight is not a saved one."""
    x, weight = op.arg(0, "input"), op.arg(1, "weight")
    layer = walk.modules.get(op.module)
    if weight.name is None:
        for array in labels:
            if array is not None:
                walk.couplings.pin(array, f"computed in {op.module or 'the model itself'}, not in a plain layer module")
    name = op.module if weight.name is None else weight.name.removesuffix(".weight")
    use = WeightUse(name, kind, weight.name or "", x, op.result, *features, *labels)
    use.called = isinstance(layer, (nn.Conv2d, nn.Linear)) and weight.name == f"{op.module}.weight"
    walk.found.uses.append(use)
    return use


def tie_bias(walk: Walk, bias: TensorRef | None, features: Labels | None) -> None:
    """Let a bias go with the features it is added to."""
    if bias is not None:
        _, labels = walk.one_dim(walk.value(bias), 0, "")
        walk.tie_or_pin(features, labels, "shares its bias with features that cannot be cut")


def factors_at(dim: int, labels: Labels | None) -> tuple[Factor, ...]:
    """Return the labels of one dim as factors, none where it has none."""
    return () if labels is None else (Factor((dim,), labels),)


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return int(value[0]), int(value[-1])


@handles("batch_norm", "instance_norm", "prelu")
def _per_channel(walk: Walk, op: Op) -> Value:
    x, *parameters = walk.inputs(op)
    reason = f"meets channels that cannot be cut at {where(op)}"
    x, channels = walk.one_dim(x, 1, reason)
    for parameter in parameters:
        if math.prod(parameter.shape) > 1:
            walk.tie_or_pin(channels, walk.one_dim(parameter, len(parameter.shape) - 1, reason)[1], reason)
    return x


@handles("layer_norm", "rms_norm")
def _layer_norm(walk: Walk, op: Op) -> Value:
    """Mean and variance are those of the features that are there: the masked twin takes them over the kept ones."""
    x, *parameters = walk.inputs(op)
    sizes = op.arg(1, "normalized_shape")
    last = len(x.shape) - 1
    reason = f"normalised together with the other features by {op.module or 'the model'}"
    if len(sizes) > 1 or not parameters or op.arg(2, "weight") is None or op.arg(2, "weight").name is None:
        for offset in range(len(sizes)):
            x = walk.freeze(x, last - offset, reason)
        for parameter in parameters:
            walk.freeze_all(parameter, reason)
        return x
    x, features = walk.one_dim(x, last, reason)
    for parameter in parameters:
        walk.tie_or_pin(
            features, walk.one_dim(parameter, 0, reason)[1], f"meets features that cannot be cut at {where(op)}"
        )
    return walk.written_size(x, last, sizes[0], op)


@handles("group_norm")
def _group_norm(walk: Walk, op: Op) -> Value:
    """As a layer norm over each group: every group must stay as large as the others."""
    x, *parameters = walk.inputs(op)
    groups, weight = op.arg(1, "num_groups"), op.arg(2, "weight")
    reason = f"normalised together with the other channels of its group by {op.module or 'the model'}"
    x, channels = walk.one_dim(x, 1, reason)
    if channels is None or weight is None or weight.name is None:
        for parameter in parameters:
            walk.freeze_all(parameter, reason)
        return walk.freeze(x, 1, reason)
    for parameter in parameters:
        walk.tie_or_pin(channels, walk.one_dim(parameter, 0, reason)[1], reason)
    by_group = channels.reshape(groups, -1)
    walk.couplings.tie(by_group, by_group[:1])
    return x


@handles("softmax", "log_softmax", "normalize", "cumsum")
def _along_dim(walk: Walk, op: Op) -> Value:
    x = walk.value(op.arg(0, "input"))
    dim = op.arg(2, "dim", 1) if op.function == "normalize" else op.arg(1, "dim")
    dims = range(len(x.shape)) if dim is None else [dim]
    for d in dims:
        x = walk.freeze(x, d % len(x.shape), f"normalised together with the others by {where(op)}")
    return x


RESPONSE_NORMS = ("GlobalResponseNorm", "GRN")
"""Class names of the norm of ConvNeXt V2 (Woo et al. 2023), in timm and in its authors' code."""


@handles("mean", "sum", "amax", "amin", "var", "std", "norm")
def _reduction(walk: Walk, op: Op) -> Value:
    x = walk.value(op.arg(0, "input"))
    rank, dims = len(x.shape), op.arg(2 if op.function == "norm" else 1, "dim")
    if not isinstance(dims, (int, tuple, list, type(None))):
        return unknown(walk, op)[0]
    reduced = set(range(rank)) if dims is None else {d % rank for d in ([dims] if isinstance(dims, int) else dims)}
    response_norm = walk.modules.get(op.module)
    if op.function == "mean" and type(response_norm).__name__ in RESPONSE_NORMS and len(reduced) == 1:
        walk.found.averaged.add(f"{op.module}.{'weight' if hasattr(response_norm, 'weight') else 'gamma'}")
        x = Value(x.shape, tuple(f for f in x.factors if f.dims != tuple(reduced)))
    for dim in reduced:
        x = walk.freeze(x, dim, f"mixed with the others by {where(op)}")
    if len(op.result.shape) == rank:
        return Value(op.result.shape, x.factors)
    left = [d for d in range(rank) if d not in reduced]
    return x.moved(op.result.shape, left.index)


@handles(
    "max_pool2d", "avg_pool2d", "lp_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate", "pad",
)  # fmt: skip
def _spatial(walk: Walk, op: Op) -> Value | Sequence[Value]:
    x = walk.value(next(iter(refs((op.args, op.kwargs)))))
    shapes = _result_shapes(op)
    if len(shapes) != 1 or len(shapes[0]) != len(x.shape):
        return unknown(walk, op)
    channels = {0, 1} if op.function != "pad" and len(x.shape) == 4 else set()
    if op.function == "pad":
        padded = op.arg(1, "pad")
        channels = {d for d in range(len(x.shape)) if not any(_amounts(padded, len(x.shape) - 1 - d))}
    for dim in set(range(len(x.shape))) - channels:
        x = walk.freeze(x, dim, f"moved or padded by {where(op)}")
    return Value(shapes[0], x.factors)


def _amounts(padded: Sequence[int], place: int) -> Sequence[int]:
    return padded[2 * place : 2 * place + 2]


@handles("roll", "flip")
def _reordered(walk: Walk, op: Op) -> Value:
    x = walk.value(op.arg(0, "input"))
    given = op.arg(2, "dims") if op.function == "roll" else op.kwargs.get("dims", op.args[1:])
    moved = np.atleast_1d(np.array(range(len(x.shape)) if given is None or given == () else given)).ravel()
    for dim in moved.tolist():
        x = walk.freeze(x, dim % len(x.shape), f"moved by {where(op)}")
    return x


@handles("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as")
def _reshape(walk: Walk, op: Op) -> Value:
    x = walk.value(next(iter(refs((op.args, op.kwargs)))))
    if any(isinstance(arg, torch.dtype) for arg in op.args):
        return unknown(walk, op)[0]
    result = walk.reshape(x, op.result.shape, f"reshaped together with other dimensions by {where(op)}")
    for dim, size in enumerate(_given_sizes(op, len(x.shape))):
        result = walk.written_size(result, dim, size, op)
    return result


def _given_sizes(op: Op, rank: int) -> Sequence[int]:
    """Return the size that the code gave each dimension of a new shape, negative where it gave none."""
    given = list(op.args[1:]) or list(op.kwargs.values())
    if op.function in ("view_as", "reshape_as", "expand_as"):
        return [Size(size, DimSource(given[0], dim)) for dim, size in enumerate(given[0].shape)]
    if op.function == "unflatten":
        dim, sizes = op.arg(1, "dim") % rank, op.arg(2, "sizes")
        return [*([-1] * dim), *sizes]
    if op.function in ("reshape", "view", "expand", "broadcast_to"):
        return list(given[0]) if isinstance(given[0], (tuple, list)) else given
    return []


def permuted(value: Value, order: Sequence[int]) -> Value:
    """Return the value with its dims in another order."""
    return value.moved([value.shape[d] for d in order], list(order).index)


@handles("permute", "transpose", "t", "T", "mT", "swapaxes", "swapdims", "movedim")
def _permute(walk: Walk, op: Op) -> Value:
    x = walk.value(op.arg(0, "input"))
    # The order of the dims is what the same function does to an empty tensor of that rank.
    probe = torch.empty(0).new_empty(tuple(range(2, len(x.shape) + 2)), device="meta")
    method = getattr(probe, op.function)
    options = {name: value for name, value in op.kwargs.items() if name != "input"}
    moved = method(*op.args[1:], **options) if callable(method) else method
    return permuted(x, [size - 2 for size in moved.shape])


@handles("expand", "expand_as", "broadcast_to", "repeat", "tile")
def _expand(walk: Walk, op: Op) -> Value:
    x, shape = walk.value(next(iter(refs((op.args, op.kwargs))))), op.result.shape
    offset = len(shape) - len(x.shape)
    for dim, size in enumerate(x.shape):
        if size != shape[dim + offset]:
            x = walk.freeze(x, dim, f"repeated by {where(op)}")
    result = x.moved(shape, lambda d: d + offset)
    for dim, size in enumerate(_given_sizes(op, len(x.shape))):
        if dim < offset or x.shape[dim - offset] != shape[dim]:
            result = walk.filled(result, dim, size)
        else:
            result = walk.written_size(result, dim, size, op)
    return result


@handles("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty")
def _constant(walk: Walk, op: Op) -> Value:
    """A tensor whose elements are alike: it has as many as its sizes say, and any may go."""
    given = [arg for arg in op.args if not isinstance(arg, TensorRef)]
    shape = op.kwargs.get("size", given[0] if given and isinstance(given[0], (tuple, list)) else given)
    result = Value(op.result.shape)
    for dim, size in enumerate(shape[: len(result.shape)]):
        result = walk.filled(result, dim, size)
    return result


def repeated(value: Value, dim: int, times: int) -> Value:
    """Return the value with each index along `dim` in a row `times` times."""
    dim %= len(value.shape)
    shape = (*value.shape[:dim], value.shape[dim] * times, *value.shape[dim + 1 :])
    factors = (Factor(f.dims, f.labels.repeat(times, f.dims.index(dim))) if dim in f.dims else f for f in value.factors)
    return Value(shape, tuple(factors))


@handles("repeat_interleave")
def _repeat_interleave(walk: Walk, op: Op) -> Value:
    x, times, dim = walk.value(op.arg(0, "input")), op.arg(1, "repeats"), op.arg(2, "dim")
    if not isinstance(times, int) or dim is None:
        return unknown(walk, op)[0]
    return repeated(x, dim, times)


@handles("cat")
def _cat(walk: Walk, op: Op) -> Value:
    values = [walk.value(ref) for ref in op.arg(0, "tensors")]
    rank = len(values[0].shape)
    dim = op.arg(1, "dim", 0) % rank
    reason = f"joined with values that cannot be cut by {where(op)}"
    pieces: list[Labels | None] = []
    others: list[Value] = []
    for value in values:
        rest, labels = walk.one_dim(value, dim, reason)
        pieces.append(labels)
        shape = tuple(1 if d == dim else size for d, size in enumerate(value.shape))
        others.append(Value(shape, tuple(f for f in rest.factors if f.dims != (dim,))))
    joined = walk.elementwise(others, reason)
    if all(piece is None for piece in pieces):
        return Value(op.result.shape, joined.factors)
    whole = [
        piece if piece is not None else walk.couplings.fresh(v.shape[dim])
        for piece, v in zip(pieces, values, strict=True)
    ]
    for piece, labels in zip(pieces, whole, strict=True):
        if piece is None:
            walk.couplings.pin(labels, reason)
    return Value(op.result.shape, (*joined.factors, Factor((dim,), np.concatenate(whole))))


@handles("stack")
def _stack(walk: Walk, op: Op) -> Value:
    values = [walk.value(ref) for ref in op.arg(0, "tensors")]
    joined = walk.elementwise(values, f"stacked with values that cannot be cut by {where(op)}")
    dim = op.arg(1, "dim", 0) % len(op.result.shape)
    return joined.moved(op.result.shape, lambda d: d + (d >= dim))


@handles("unbind")
def _unbind(walk: Walk, op: Op) -> Sequence[Value]:
    x = walk.value(op.arg(0, "input"))
    dim = op.arg(1, "dim", 0) % len(x.shape)
    return [_selected(walk, x, dim, index, op) for index in range(x.shape[dim])]


def _selected(walk: Walk, x: Value, dim: int, index: int, op: Op) -> Value:
    """Return one index of `dim`; of a joint labelling, what is left must be the same at every index."""
    factor = x.factor_of(dim)
    if factor is not None:
        others = tuple(f for f in x.factors if f is not factor)
        if len(factor.dims) == 1:
            x = walk.freeze(x, dim, f"picked by its number in {where(op)}")
        else:
            axis = factor.dims.index(dim)
            part = Factor(tuple(d for d in factor.dims if d != dim), factor.labels.take([index], axis).squeeze(axis))
            x = Value(x.shape, (*others, part))
    shape = x.shape[:dim] + x.shape[dim + 1 :]
    return x.moved(shape, lambda d: d - (d > dim))


@handles("chunk", "split", "tensor_split", "split_with_sizes")
def _chunk(walk: Walk, op: Op) -> Sequence[Value]:
    x = walk.value(op.arg(0, "input"))
    dim = op.arg(2, "dim", 0) % len(x.shape)
    x, labels = walk.one_dim(x, dim, f"divided by {where(op)}")
    sizes = [shape[dim] for shape in _result_shapes(op)]
    given = op.args[1] if len(op.args) > 1 else next(value for name, value in op.kwargs.items() if name != "dim")
    whole = given.quotient_of if isinstance(given, Size) else None
    if whole is not None and whole == x.shape[dim]:
        x = walk.written_size(x, dim, whole, op)
    written = _written_parts(op.function, given, sizes)
    if labels is not None and None in written:
        # Their sizes follow from the whole, so equal parts must stay equal.
        if len(set(sizes)) > 1:
            walk.couplings.pin(labels, f"divided into parts of fixed sizes by {where(op)}")
        else:
            walk.couplings.tie(labels.reshape(len(sizes), -1), labels[None, : sizes[0]])
    rest = tuple(f for f in x.factors if f.dims != (dim,))
    pieces, start = [], 0
    for size, number in zip(sizes, written, strict=True):
        shape = (*x.shape[:dim], size, *x.shape[dim + 1 :])
        piece = Value(shape, (*rest, *factors_at(dim, None if labels is None else labels[start : start + size])))
        pieces.append(piece if number is None else walk.written_size(piece, dim, number, op))
        start += size
    return pieces


def _written_parts(function: str, given: Any, sizes: Sequence[int]) -> list[int | None]:
    """Return for each part the size that the code gave it, or None where that follows from the size of the whole."""
    if function in ("chunk", "tensor_split"):
        return [None] * len(sizes)
    numbers = given if isinstance(given, (tuple, list)) else [given] * len(sizes)
    parts = zip(numbers, sizes, strict=True)
    return [
        None if isinstance(number, Size) and number.source is None else number if number == size else size
        for number, size in parts
    ]


@handles("getitem", "select", "narrow")
def _getitem(walk: Walk, op: Op) -> Value:
    x = walk.value(op.args[0])
    key = op.args[1] if op.function == "getitem" else None
    if op.function == "select":
        key = (slice(None),) * (op.arg(1, "dim") % len(x.shape)) + (op.arg(2, "index"),)
    elif op.function == "narrow":
        start = op.arg(2, "start")
        key = (slice(None),) * (op.arg(1, "dim") % len(x.shape)) + (slice(start, start + op.arg(3, "length")),)
    keys = list(key) if isinstance(key, tuple) else [key]
    picked = [k for k in keys if isinstance(k, TensorRef)]
    if not all(k is None or k is Ellipsis or isinstance(k, (int, slice, TensorRef)) for k in keys):
        return unknown(walk, op)[0]
    if picked and any(isinstance(k, int) for k in keys):
        return unknown(walk, op)[0]
    if Ellipsis in keys:
        place = keys.index(Ellipsis)
        missing = len(x.shape) - sum(k is not None and k is not Ellipsis for k in keys)
        keys[place : place + 1] = [slice(None)] * missing
    dim, by_tensor = 0, list[int]()
    for k in keys:
        if k is None:
            x = x.moved((*x.shape[:dim], 1, *x.shape[dim:]), lambda d, at=dim: d + (d >= at))  # type: ignore[misc]
            dim += 1
        elif isinstance(k, TensorRef):
            by_tensor.append(dim)
            dim += 1
        elif isinstance(k, int):
            x = _selected(walk, x, dim, k % x.shape[dim], op)
        else:
            x = _part(walk, x, dim, k, op)
            dim += 1
    return _picked(walk, x, by_tensor, picked, op) if picked else x


def _part(walk: Walk, x: Value, dim: int, part: slice, op: Op) -> Value:
    """Return a slice of `dim`; it can be cut where the slice's ends are numbers that a module or a shape gives."""
    size, reason = x.shape[dim], f"picked by its number in {where(op)}"
    start, stop, step = part.indices(size)
    shape = (*x.shape[:dim], len(range(start, stop, step)), *x.shape[dim + 1 :])
    if shape == x.shape:
        return x
    ends = [end for end in (part.start, part.stop) if end is not None and end != 0]
    if step != 1 or not all(isinstance(end, Size) and end.source is not None and 0 < end <= size for end in ends):
        return Value(shape, walk.freeze(x, dim, reason).factors)
    x, labels = walk.one_dim(x, dim, reason)
    for end in ends:
        walk.must_agree(None if labels is None else (labels[:end], 0), walk.axis(end), op)
    rest = tuple(f for f in x.factors if f.dims != (dim,))
    return Value(shape, (*rest, *factors_at(dim, None if labels is None else labels[start:stop])))


def _picked(walk: Walk, x: Value, dims: Sequence[int], indices: Sequence[TensorRef], op: Op) -> Value:
    """Return x with `dims` replaced by those of the index tensors, at the place of the first of them."""
    for index in indices:
        walk.freeze_all(walk.value(index), f"they are numbers of what is picked in {where(op)}")
    for dim in dims:
        x = walk.freeze(x, dim, f"picked by its number in {where(op)}")
    try:
        new = np.broadcast_shapes(*(index.shape for index in indices))
    except ValueError:
        return _unfollowed(walk, op, [x])[0]
    shape = (*x.shape[: dims[0]], *new, *x.shape[dims[-1] + 1 :])
    if list(dims) != list(range(dims[0], dims[-1] + 1)) or shape != op.result.shape:
        return _unfollowed(walk, op, [x])[0]
    return x.moved(shape, lambda d: d if d < dims[0] else d - len(dims) + len(new))


@handles("index_select", "embedding")
def _index_select(walk: Walk, op: Op) -> Value:
    if op.function == "embedding":
        table, dim, index = op.arg(1, "weight"), 0, op.arg(0, "input")
    else:
        table, dim, index = op.arg(0, "input"), op.arg(1, "dim"), op.arg(2, "index")
    return _picked(walk, walk.value(table), [dim % len(table.shape)], [index], op)
