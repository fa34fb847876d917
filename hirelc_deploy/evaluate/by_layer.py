"""In: a model's layers, and patterns of names from the user. Out: what is otherwise for single layers when rounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase

from hirelc_deploy.compress.integer.calibration import METHODS
from hirelc_deploy.errors import InputError


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

    def precision_of(self, asked: Callable[[str], str]) -> Callable[[str], str]:
        """Return layer name to precision: what `asked` says, but for the layers that stay float."""
        return lambda layer: "float" if layer in self.in_float else asked(layer)


AS_USUAL = ByLayer()


def _matching(layers: Sequence[str], pattern: str, option: str) -> list[str]:
    found = [name for name in layers if fnmatchcase(name, pattern)]
    if not found:
        near = get_close_matches(pattern, layers, 3, 0.4) or layers[:3]
        raise InputError(f"{option} {pattern}: no layer has this name; near names: {', '.join(near)}.")
    return found
