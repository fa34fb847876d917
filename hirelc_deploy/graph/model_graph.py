"""In: nothing. Out: the frozen values that describe what a model consists of and what can be cut from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

IndexRows = NDArray[np.int64]
"""(size, k): row e holds the k positions along one tensor dimension that belong to element e of a unit."""


@dataclass(frozen=True)
class TensorSlice:
    """The part of one named parameter or buffer that goes away with the elements of a unit."""

    tensor: str
    dim: int
    index: IndexRows


@dataclass(frozen=True)
class Count:
    """A whole number kept by a module (`blocks.0.attn.num_heads`) that counts what a unit removes.

    `index` are positions among the things it counts, as in a `TensorSlice`.
    """

    attribute: str
    index: IndexRows


@dataclass(frozen=True)
class Reader:
    """A layer that reads a unit's output: `index` are positions among its input features."""

    layer: str
    index: IndexRows


@dataclass(frozen=True)
class Branch:
    """A residual branch that is left out when nothing of a unit stays (stochastic depth: Huang et al. 2016).

    Attributes:
        module: Everything in it goes. The tensor that it returns has the shape of the one it is given.
        passes: Its shortcut is in it: it becomes an identity. Otherwise that is around it, and it becomes a zero.
        more: How many results come behind that tensor, in a tuple, which nobody reads: an attention's weights.
    """

    module: str
    passes: bool
    more: int = 0


@dataclass(frozen=True)
class Unit:
    """Elements that can only be cut together: coupled channels, MLP hidden units or attention heads.

    Attributes:
        kind: `channels`, `residual channels`, `mlp units` or `attention heads`.
        size: Number of elements in the uncut model.
        block: Name of the architectural block it belongs to; a residual unit belongs to the stage.
        widths: Legal numbers of kept elements, ascending, the last one is `size`.
        slices: Everything that is removed with an element. Zeroing it gives the masked twin.
        readers: Layers whose input features come from this unit.
        counts: Numbers that modules keep and that shrink with the unit.
        branch: Left out when none of its elements stays; without one at least `widths[0]` stay.
    """

    name: str
    kind: str
    size: int
    block: str
    widths: tuple[int, ...]
    slices: tuple[TensorSlice, ...]
    readers: tuple[Reader, ...]
    counts: tuple[Count, ...] = ()
    branch: Branch | None = None

    @property
    def least(self) -> int:
        """The fewest elements that may stay: 0 where a branch goes with them."""
        return 0 if self.branch else self.widths[0]


@dataclass(frozen=True)
class LayerShape:
    """What the time of one layer depends on, apart from its widths.

    Attributes:
        kind: `conv`, `linear` or `attention` (the core between the projections: scores, softmax, mix).
        positions: Output positions per image: height * width of a convolution, tokens of a linear layer or attention.
        input_size: (height, width) of a convolution's input, or as many as it has dims; (1, tokens) otherwise.
        kernel, stride, padding, dilation: Of a convolution, likewise; (1, 1), (1, 1), (0, 0), (1, 1) otherwise.
        depthwise: The convolution has one filter per input channel; its two widths move together.
        groups: Of a convolution that is not depthwise; 1 otherwise.
        head_dim: Of attention; 0 otherwise. Its widths count heads.
        activation: `relu`, `relu6`, `gelu`, `silu`, `hardswish` directly behind the layer, or `` for none.
    """

    kind: str
    positions: int
    input_size: tuple[int, ...] = (1, 1)
    kernel: tuple[int, ...] = (1, 1)
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    depthwise: bool = False
    groups: int = 1
    head_dim: int = 0
    activation: str = ""


@dataclass(frozen=True)
class Share:
    """Part of a layer's inputs or outputs: `per_element` features for each element of a unit (head_dim for a head)."""

    unit: str
    per_element: int


@dataclass(frozen=True)
class Layer:
    """One layer whose widths and precision a plan decides, in execution order.

    `reads` and `writes` name the units that set its widths, those with most features first; what is in none is fixed.
    A layer behind a concatenation reads several.
    """

    name: str
    shape: LayerShape
    block: str
    in_features: int
    out_features: int
    reads: tuple[Share, ...]
    writes: tuple[Share, ...]
    params: int
    macs: int

    @property
    def in_unit(self) -> str | None:
        """The unit that most of its inputs belong to, if any."""
        return self.reads[0].unit if self.reads else None

    @property
    def out_unit(self) -> str | None:
        """The unit that most of its outputs belong to, if any."""
        return self.writes[0].unit if self.writes else None

    @property
    def units(self) -> frozenset[str]:
        """All units that set its widths."""
        return frozenset(share.unit for share in (*self.reads, *self.writes))


@dataclass(frozen=True)
class KeptWhole:
    """A layer that is never cut, and why, in words for the user."""

    layer: str
    reason: str


@dataclass(frozen=True)
class ModelGraph:
    """Blocks, units and layers of one model at one input size. `blocks` are in execution order.

    `averaged` names the weights of norms that divide by a mean over their features (ConvNeXt V2).
    """

    input_shape: tuple[int, int, int]
    blocks: tuple[str, ...]
    units: tuple[Unit, ...]
    layers: tuple[Layer, ...]
    kept_whole: tuple[KeptWhole, ...]
    params: int
    macs: int
    averaged: frozenset[str] = frozenset()

    def unit(self, name: str) -> Unit:
        """Return the unit called `name`; raises KeyError."""
        return self._units_by_name[name]

    @cached_property
    def gates(self) -> Mapping[str, str]:
        """Layer to the unit whose branch it is in: where nothing of that unit stays, the layer is left out."""
        branches = [(unit.name, f"{unit.branch.module}.") for unit in self.units if unit.branch]
        return {
            layer.name: unit for layer in self.layers for unit, path in branches if f"{layer.name}.".startswith(path)
        }

    def without_branches(self) -> ModelGraph:
        """Return the graph in which something of every unit stays."""
        return replace(self, units=tuple(replace(unit, branch=None) for unit in self.units))

    def leaves_out(self, layer: str, keep: Mapping[str, int]) -> bool:
        """Return whether a layer goes with its branch when units keep `keep` elements."""
        return layer in self.gates and keep.get(self.gates[layer]) == 0

    @cached_property
    def _units_by_name(self) -> Mapping[str, Unit]:
        return {unit.name: unit for unit in self.units}
