"""In: what a search or a person decided. Out: one frozen, checked and hashable description of a compressed model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hirelc_deploy.errors import InputError

SCHEMA_VERSION = 1
PRECISIONS = ("int8", "float", "auto")
LAYER_PRECISIONS = ("int8", "int4", "float")
END_OF = "end of "
"""Starts the name of what decodes outputs, in the place of a layer's name; names of modules have no spaces."""

LARGEST_WIDTH = 2**31 - 1
"""What is wider is no layer."""


@dataclass(frozen=True)
class CompressionPlan:
    """How wide each unit stays and in which precision each layer runs.

    Attributes:
        keep: Unit name to the number of elements (channels, heads, MLP units) it keeps; a unit not named stays whole.
            With 0 its residual branch is left out, where it has one.
        precision: Layer name to `int8`, `float` or, for Linear layers, `int4` (weights in four bits, float
            activations); a layer not named takes `default_precision`. So has what decodes the answers: `end of boxes`.
        default_precision: `int8`, `float`, or `auto` (placed by measurement on the target).
        pattern: Which operators around integer layers are integer too, a key of `quantize.PATTERNS`, for some
            targets with `+bf16` or `+f16` behind it; the measured placement's where it is empty.
        trained_rounding: The recovery rounds as the integer file does, so that the weights get used to it.
    """

    keep: Mapping[str, int] = field(default_factory=dict)
    precision: Mapping[str, str] = field(default_factory=dict)
    default_precision: str = "int8"
    pattern: str = ""
    trained_rounding: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", MappingProxyType(dict(sorted(self.keep.items()))))
        object.__setattr__(self, "precision", MappingProxyType(dict(sorted(self.precision.items()))))
        for layer, precision in self.precision.items():
            if precision not in LAYER_PRECISIONS:
                raise InputError(f"plan: layer {layer!r} asks for precision {precision!r}; use int8, int4 or float.")
        if self.default_precision not in PRECISIONS:
            raise InputError(f"plan: precision {self.default_precision!r} is unknown; use int8, float or auto.")
        for unit, width in self.keep.items():
            if isinstance(width, bool) or not isinstance(width, int) or not 0 <= width <= LARGEST_WIDTH:
                raise InputError(f"plan: unit {unit!r} keeps {width!r:.60}; give a whole number of at least 0.")

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[Any, ...]:
        values = dict(self.keep), dict(self.precision), self.default_precision, self.pattern, self.trained_rounding
        return (CompressionPlan, values)

    @property
    def digest(self) -> str:
        """Return 16 hex digits that are equal for equal plans only."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def precision_of(self, layer: str) -> str:
        """Return the precision this plan asks for `layer`."""
        return self.precision.get(layer, self.default_precision)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values, with its schema version."""
        return {
            "schema_version": SCHEMA_VERSION,
            "keep": dict(self.keep),
            "precision": dict(self.precision),
            "default_precision": self.default_precision,
            **({"pattern": self.pattern} if self.pattern else {}),
            **({"trained_rounding": True} if self.trained_rounding else {}),
        }

    @classmethod
    def from_dict(cls, value: Any, where: str = "plan") -> CompressionPlan:
        """Check and rebuild a plan written by `to_dict`; raises InputError naming `where`."""
        if not isinstance(value, dict):
            raise InputError(f"{where}: a plan is a JSON object, found {type(value).__name__}.")
        known = ("keep", "precision", "default_precision", "pattern", "trained_rounding")
        unknown = set(value) - {"schema_version", *known}
        if unknown:
            raise InputError(
                f"{where}: unknown key {sorted(unknown)[0]!r}; a plan has {', '.join(known[:-1])} and {known[-1]}."
            )
        version = value.get("schema_version", SCHEMA_VERSION)
        if version != SCHEMA_VERSION:
            raise InputError(
                f"{where}: schema version {version!r}, this program reads version {SCHEMA_VERSION}; update it."
            )
        keep, precision = value.get("keep", {}), value.get("precision", {})
        if not isinstance(keep, dict) or not isinstance(precision, dict):
            raise InputError(f"{where}: keep and precision must be objects that map a name to a value.")
        pattern = value.get("pattern", "")
        if not isinstance(pattern, str):
            raise InputError(f"{where}: pattern must be a name, found {type(pattern).__name__}.")
        trained = value.get("trained_rounding", False)
        if not isinstance(trained, bool):
            raise InputError(f"{where}: trained_rounding must be true or false, found {type(trained).__name__}.")
        try:
            return cls(keep, precision, value.get("default_precision", "int8"), pattern, trained)
        except InputError as error:
            raise InputError(str(error).replace("plan:", f"{where}:", 1)) from None

    @classmethod
    def read(cls, path: Path) -> CompressionPlan:
        """Read a plan file; raises InputError for a missing, broken or wrong file."""
        try:
            return cls.from_dict(json.loads(path.read_text("utf-8-sig")), str(path))
        except FileNotFoundError:
            raise InputError(f"{path}: no such plan file; give a file or uniform:keep=0.5,precision=int8.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read as a plan ({error}); save it as UTF-8.") from None
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: not valid JSON (line {error.lineno}: {error.msg}).") from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
            raise InputError(f"{path}: not valid JSON ({error}).") from None


def parse_uniform(text: str) -> tuple[float, str]:
    """Return (keep ratio, precision) of `uniform:keep=0.5,precision=int8`; both parts have a default (1.0, int8).

    With `int4` the Linear layers have weights in four bits; the precision of others is placed by measurement.
    """
    keep, precision = 1.0, "int8"
    for part in filter(None, text.removeprefix("uniform:").split(",")):
        name, _, value = part.partition("=")
        if name == "keep":
            try:
                keep = float(value)
            except ValueError:
                keep = -1.0
            if not 0 < keep <= 1:
                raise InputError(f"plan {text!r}: keep={value!r} is not a ratio in (0, 1].")
        elif name == "precision":
            if value not in {*PRECISIONS, *LAYER_PRECISIONS}:
                raise InputError(f"plan {text!r}: precision {value!r} is unknown; use int8, int4, float or auto.")
            precision = value
        else:
            raise InputError(f"plan {text!r}: unknown part {part!r}; use uniform:keep=0.5,precision=int8.")
    return keep, precision
