"""In: a model's layers, and patterns of names from the user. Out: what is otherwise for single layers when rounded."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

from hirelc_deploy.compress.integer.calibration import METHODS
from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.model_graph import ModelGraph
from hirelc_deploy.plan import CompressionPlan


@dataclass(frozen=True)
class ByLayer:
    """What the user wants otherwise for single layers, in every integer file.

    Attributes:
        in_float: Layers that stay float, whatever plan or placement say.
        ranges: Layer to the calibration method, of METHODS, of what it reads and writes.
        equalised: Layers whose channels are made alike across activations, also where none is far wider.
    """

    in_float: frozenset[str] = frozenset()
    ranges: Mapping[str, str] = field(default_factory=dict)
    equalised: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls, layers: Sequence[str], in_float: Iterable[str], ranges: Mapping[str, str], equalised: Iterable[str]
    ) -> ByLayer:
        """Return what patterns (`stages.1.*`) of layer names mean for these layers; the last one that fits counts.

        Raises:
            InputError: A pattern that fits no layer, or an unknown method.
        """
        for pattern, method in ranges.items():
            if method not in METHODS:
                raise InputError(f"--ranges {pattern}={method!s:.60}: use {', '.join(METHODS)}.")
        return cls(
            frozenset(name for pattern in in_float for name in _matching(layers, pattern, "--float-layers")),
            {n: method for pattern, method in ranges.items() for n in _matching(layers, pattern, "--ranges")},
            frozenset(name for pattern in equalised for name in _matching(layers, pattern, "--equalise")),
        )

    def __or__(self, other: ByLayer) -> ByLayer:
        """Return both; where they differ about a layer's ranges, the other one counts."""
        ranges = {**self.ranges, **other.ranges}
        return ByLayer(self.in_float | other.in_float, ranges, self.equalised | other.equalised)

    @property
    def options(self) -> str:
        """The options of `search` and `apply` that ask for this."""
        words = [("--float-layers", name) for name in sorted(self.in_float)]
        words += [("--ranges", f"{name}={method}") for name, method in sorted(self.ranges.items())]
        words += [("--equalise", name) for name in sorted(self.equalised)]
        return shlex.join(word for pair in words for word in pair)

    def stated(self, plan: CompressionPlan, graph: ModelGraph) -> CompressionPlan:
        """Return a plan that says itself which layers stay float, for those who see the plan alone."""
        if plan.default_precision == "float" or not self.in_float:
            return plan
        floats = [layer for layer in self.in_float if not graph.leaves_out(layer, plan.keep)]
        return replace(plan, precision={**plan.precision, **dict.fromkeys(floats, "float")})

    def precision_of(self, asked: Callable[[str], str]) -> Callable[[str], str]:
        """Return layer name to precision: what `asked` says, but for the layers that stay float."""
        return lambda layer: "float" if layer in self.in_float else asked(layer)


AS_USUAL = ByLayer()


def _matching(layers: Sequence[str], pattern: str, option: str) -> list[str]:
    found = [name for name in layers if name == pattern or fnmatchcase(name, pattern)]
    if not found:
        near = get_close_matches(pattern, layers, 3, 0.4) or layers[:3]
        raise InputError(f"{option} {pattern}: no layer has this name; near names: {', '.join(near)}.")
    return found
