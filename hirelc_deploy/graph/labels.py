"""In: a trace. Out: which indices of which parameters, layer inputs and layer outputs can only be removed together.

Every index of a dimension that may be cut carries a label, an integer. Operations pass labels on and tie those that
must go together. A tensor's labels are `Factor`s: arrays over one dimension, or jointly over several once a
dimension has been split (query-key-value channels seen as 3 x heads x head size).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from hirelc_deploy.graph.sizes import Size, TensorRef
from hirelc_deploy.graph.trace import Op, Trace, refs

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
    kernel: tuple[int, ...] = (1, 1)
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
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
        macs_apart: Multiply-accumulates of an image in operations that are no layers of a plan.
    """

    couplings: Couplings
    parameters: dict[tuple[str, int], Labels] = field(default_factory=dict)
    attributes: dict[str, Labels] = field(default_factory=dict)
    averaged: set[str] = field(default_factory=set)
    uses: list[WeightUse | AttentionUse] = field(default_factory=list)
    macs_apart: int = 0


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
        kept = {s[0]: t[0] for s, t in _matching_dims(value.shape, shape) if len(s) == 1 and len(t) == 1}
        for sources, targets in _matching_dims(value.shape, shape):
            if len(sources) == 1 and len(targets) == 1:
                continue
            touching = [f for f in value.factors if set(f.dims) & set(sources)]
            if len(touching) > 1 or any(not set(f.dims) <= {*sources, *kept} for f in touching):
                for dim in sources:
                    value = self.freeze(value, dim, reason)
            elif touching:
                # Dims that stay are labelled on, jointly: head size where heads were merged with the batch.
                staying = [dim for dim in touching[0].dims if dim in kept]
                old, new_dims = (*staying, *sources), (*(kept[dim] for dim in staying), *targets)
                array = np.broadcast_to(_spread(touching[0], old), [value.shape[dim] for dim in old])
                new = self._reduced(Factor(new_dims, array.reshape([shape[dim] for dim in new_dims])))
                factors += new
                if new and len(new[0].dims) > 1:
                    self._splits.append(new[0].labels)
                value = Value(value.shape, tuple(f for f in value.factors if f is not touching[0]))
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
    "conv1d", "conv2d", "conv3d", "split", "split_with_sizes", "multi_head_attention_forward",
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


def result_shapes(op: Op) -> list[tuple[int, ...]]:
    """Return the shapes of the tensors that an operation returns."""
    return [ref.shape for ref in refs(op.result)]


def unknown(walk: Walk, op: Op) -> Sequence[Value]:
    """Keep whole everything that an operation reads."""
    return unfollowed(walk, op, walk.inputs(op))


def unfollowed(walk: Walk, op: Op, values: Iterable[Value]) -> Sequence[Value]:
    """Keep these values whole, and say that the operation is not followed."""
    for value in values:
        walk.freeze_all(value, f"read by {where(op)}, an operation that this program does not follow")
    return [Value(shape) for shape in result_shapes(op)]
