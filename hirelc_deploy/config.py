"""In: the options of a job. Out: one frozen, checked description of it that is written to and read from TOML."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomlkit

from hirelc_deploy.errors import InputError

SCHEMA_VERSION = 1
STRATEGIES = (
    *("hirelc", "two-stage", "knapsack", "greedy", "tpe", "nsga2"),
    *("flat", "random", "taylor", "uniform", "untrained"),
)
LARGEST_INPUT = 2**26
"""Values of one image (256 MiB in float32): what is larger is a slip of the pen, and would exhaust the memory."""
LARGEST_SEED = 2**32 - 1
"""What every random generator in use takes."""
_BYTES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class ModelConfig:
    """Which model; see `models.ModelSource`, whose fields these are."""

    spec: str
    weights: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    weights_key: str | None = None


@dataclass(frozen=True)
class DataConfig:
    """Which data; see `data.load_data`."""

    spec: str
    directory: str | None = None
    calibration_images: int | None = None
    selection_images: int | None = None

    def __post_init__(self) -> None:
        _at_least("calibration_images", self.calibration_images, 1, whole=True)
        _at_least("selection_images", self.selection_images, 1, whole=True)


@dataclass(frozen=True)
class PreprocessConfig:
    """What the user wants otherwise than the model says; see `images.Preprocess`."""

    input_size: tuple[int, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    geometry: str | None = None

    def __post_init__(self) -> None:
        size = self.input_size
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and not all(isinstance(value, numbers.Real) for value in values):
                raise InputError(f"{name} {values}: give numbers, one for each channel.")
        if size is None:
            return
        if len(size) != 3 or not all(isinstance(side, numbers.Integral) for side in size) or min(size) < 1:
            raise InputError(f"input_size {size}: give channels, height and width, each at least 1.")
        if math.prod(size) > LARGEST_INPUT:
            raise InputError(f"input_size {size}: {math.prod(size):,} values in one image; at most {LARGEST_INPUT:,}.")

    def overrides(self) -> dict[str, Any]:
        """Return the entries that were given, as `models.load_for` takes them."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class TaskConfig:
    """What the model is for, where data and model leave a doubt or the user wants it otherwise.

    Attributes:
        name: Of an installed task; None where data and model tell it.
        metric, loss: `file.py:function` or `package.module:function` in the place of the task's own.
        lower_is_better: Of a metric of the user's, where the function does not say it itself.
        options: Of the task.
    """

    name: str | None = None
    metric: str | None = None
    loss: str | None = None
    lower_is_better: bool | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name is not None and not isinstance(self.name, str):
            raise InputError(f"task = {self.name!r:.60}: give the name of an installed task, such as 'detection'.")


@dataclass(frozen=True)
class Limits:
    """What the shipped file must keep; None where there is no limit.

    Attributes:
        max_drop: What may be lost of the metric: percentage points, or its own unit where it is no share.
        max_latency_ms: Milliseconds of one inference on the target, of the whole batch.
        speedup: Times faster than the uncut float file.
        max_bytes: Size of the file.
        max_memory_bytes: Peak of the process on the target that loads and runs the file, its runtime included.
        max_energy_mj: Millijoules that the target draws during one inference, of the whole batch.
    """

    max_drop: float | None = None
    max_latency_ms: float | None = None
    speedup: float | None = None
    max_bytes: int | None = None
    max_memory_bytes: int | None = None
    max_energy_mj: float | None = None

    def __post_init__(self) -> None:
        _at_least("max_drop", self.max_drop, 0)
        _above_zero("max_latency_ms", self.max_latency_ms)
        _above_zero("speedup", self.speedup)
        _at_least("max_bytes", self.max_bytes, 1, whole=True)
        _at_least("max_memory_bytes", self.max_memory_bytes, 1, whole=True)
        _above_zero("max_energy_mj", self.max_energy_mj)

    def check_against(self, scale: float) -> None:
        """Raise InputError for a drop that no metric of this scale (100: points) can have."""
        if self.max_drop is not None and scale == 100 and self.max_drop > 100:
            raise InputError(f"max_drop = {self.max_drop:g}: percentage points, at most 100.")


@dataclass(frozen=True)
class SearchConfig:
    """How to look for a plan.

    Attributes:
        budget_seconds: Wall time from the opened run to its bundle, of all commands on it together; None for as long as
            the evaluations take.
        f1_evaluations: Sliced and compensated models judged per latency budget.
        finalists: Plans that are recovered by training at most.
        race: Plans of equal time that begin the recovery of a finalist, half of which leave at each rung; 0 for none.
        options: Widths offered per unit at most.
        warm_start: Folder of another run whose agents this one begins with, if they foretell what is measured here.
        depth: Whether residual branches may be left out.
        precisions: Whether blocks may stay float where the fastest file makes them integer.
        library: Folder of another run of the same model and data, of which this one takes what it measured.
        further_recovery: Share of a recovery that a plan gets which lies within one that is recovered: it begins at the
            weights of that one. None where every recovery begins at the uncut model.
    """

    strategy: str = "hirelc"
    budget_seconds: float | None = None
    f1_evaluations: int = 24
    finalists: int = 3
    options: int = 8
    warm_start: str | None = None
    depth: bool = True
    precisions: bool = False
    race: int = 0
    library: str | None = None
    further_recovery: float | None = None

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise InputError(f"strategy {self.strategy!r} is unknown; use {', '.join(STRATEGIES)}.")
        _above_zero("budget_seconds", self.budget_seconds)
        _at_least("trials", self.f1_evaluations, 1, whole=True)
        _at_least("finalists", self.finalists, 1, whole=True)
        _at_least("options", self.options, 2, whole=True)
        _at_least("race", self.race, 0, whole=True)
        _above_zero("further_recovery", self.further_recovery)
        if self.further_recovery is not None and self.further_recovery > 1:
            raise InputError(f"further_recovery = {self.further_recovery:g}: a share of a recovery, at most 1.")
        if self.further_recovery is not None and self.race:
            raise InputError("race and further_recovery: plans of a race train equally long; give one of them.")


@dataclass(frozen=True)
class JobConfig:
    """Everything that decides what a command computes. Two equal configurations mean the same job.

    Attributes:
        plan: The plan that `apply` was given; None for a search.
        threads: Of one inference on the target; None for what the target says.
        batch: Images of one inference: of every file, timing and table; None for one.
        recovery_epochs: Passes over the training split for a finalist, and for the uncut integer file where that loses
            more than is allowed; 0 for no training.
        learning_rate: Peak of the recovery's schedule; small for few images, which a large one learns by heart.
        recovery_batch: Images of one step of a recovery, over all processes; None for what suits a CPU.
        sync_norms: Batch norms see a recovery's whole batch where several processes share it.
        exclude: Patterns of units and layers that stay whole.
        include: Patterns of units and layers; when given, only these may be cut.
        float_layers: Patterns of layers that stay float in every integer file.
        equalise: Patterns of layers whose channels are made alike across activations.
        ranges: Pattern of layers to the calibration method of what they read and write.
    """

    model: ModelConfig
    data: DataConfig
    target: str = "cpu"
    plan: str | None = None
    seed: int = 0
    threads: int | None = None
    batch: int | None = None
    recovery_epochs: float = 1.0
    learning_rate: float = 0.01
    recovery_batch: int | None = None
    sync_norms: bool = False
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    float_layers: tuple[str, ...] = ()
    equalise: tuple[str, ...] = ()
    ranges: Mapping[str, str] = field(default_factory=dict)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    limits: Limits = field(default_factory=Limits)
    search: SearchConfig = field(default_factory=SearchConfig)

    def __post_init__(self) -> None:
        _at_least("seed", self.seed, 0, whole=True)
        if self.seed > LARGEST_SEED:
            raise InputError(f"seed = {self.seed}: give a whole number of at most {LARGEST_SEED}.")
        _at_least("threads", self.threads, 1, whole=True)
        _at_least("batch", self.batch, 1, whole=True)
        _at_least("recovery_epochs", self.recovery_epochs, 0)
        _above_zero("learning_rate", self.learning_rate)
        _at_least("recovery_batch", self.recovery_batch, 2, whole=True)
        if not isinstance(self.sync_norms, bool):
            raise InputError(f"sync_norms = {_shown(self.sync_norms)}: give true or false.")

    def to_toml(self) -> str:
        """Return the canonical text: equal for equal jobs, entries in the order of the fields, unset ones left out."""
        plain = {"schema_version": SCHEMA_VERSION, **_plain(self)}
        if self.ranges:
            plain["ranges"] = dict(self.ranges)  # in their order: the last pattern that fits counts
        _check_written(plain)
        return tomlkit.dumps(plain)

    @classmethod
    def from_toml(cls, text: str, where: str = "config.toml") -> JobConfig:
        """Read what `to_toml` wrote or a person did; raises InputError naming `where` and the entry."""
        value = toml_table(text, where)
        version = value.pop("schema_version", SCHEMA_VERSION)
        if version != SCHEMA_VERSION:
            raise InputError(f"{where}: schema version {version!r}, this program reads version {SCHEMA_VERSION}.")
        job = _typed(value, cls, where, "")
        assert isinstance(job, cls)
        return job

    @classmethod
    def read(cls, path: Path) -> JobConfig:
        """Read a TOML file; raises InputError where it is missing or wrong."""
        try:
            return cls.from_toml(path.read_text("utf-8-sig"), str(path))
        except FileNotFoundError:
            raise InputError(f"{path}: no such file.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read as TOML ({error}).") from None


def toml_table(text: str, where: str) -> dict[str, Any]:
    """Return the table that a TOML text holds; raises InputError naming `where` for what is none.

    A text may come from a stranger: it may nest without end, and hold numbers of any length, which TOML does not know.
    """
    try:
        table = tomllib.loads(text)
        _check_numbers(table)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid TOML ({error}).") from None
    return table


def _check_numbers(value: Any) -> None:
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("a whole number of more than 64 bits")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_numbers(inner)


def parse_duration(text: str) -> float:
    """Return the seconds of `90`, `90s`, `30m`, `1h` or `1h30m`; raises InputError unless they are above 0."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if (
        not parts
        or "".join(number + unit for number, unit in parts) != text
        or ("" in dict(parts).values() and parts[1:])
    ):
        raise InputError(f"duration {text!r}: write it like 90s, 30m or 1h30m.")
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    _above_zero(f"duration {text!r}", seconds)
    return seconds


def parse_bytes(text: str) -> int:
    """Return the bytes of `90000`, `200M` or `1.5GiB`; raises InputError unless they are at least 1."""
    match = re.fullmatch(rf"(\d{{1,15}}(?:\.\d{{1,9}})?)({'|'.join(_BYTES)})B?", text)
    count = int(float(match[1]) * _BYTES[match[2]]) if match else 0
    if count < 1:
        raise InputError(f"size {text!r:.60}: write it like 90000, 200M or 1.5GiB.")
    return count


def _at_least(name: str, value: float | None, least: float, *, whole: bool = False) -> None:
    kind = "whole" if whole else "finite"
    is_number = isinstance(value, numbers.Integral if whole else numbers.Real) and not isinstance(value, bool)
    if value is not None and not (is_number and math.isfinite(value) and value >= least):
        raise InputError(f"{name} = {_shown(value)}: give a {kind} number of at least {least:g}.")


def _above_zero(name: str, value: float | None) -> None:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if value is not None and not (is_number and math.isfinite(value) and value > 0):
        raise InputError(f"{name} = {_shown(value)}: give a finite number above 0.")


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float | int) else f"{value!r:.60}"


# TOML


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        items = {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
        return {name: item for name, item in items.items() if item is not None and item not in ({}, [])}
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in sorted(value.items()) if item is not None}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _check_written(value: Any) -> None:
    """Raise InputError for what a run's config.toml cannot hold: every option is a text, a number or a list of such."""
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{value} cannot be an option.")
    if isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            _check_written(inner)
    elif not isinstance(value, str | bool | int | float):
        raise InputError(f"option value {value!r}: a {type(value).__name__} cannot be written to a run's config.toml.")


def _typed(value: Any, hint: Any, where: str, name: str) -> Any:
    """Return `value` as the type `hint`; raises InputError naming the entry."""
    if isinstance(hint, types.UnionType):
        return _typed(value, next(kind for kind in hint.__args__ if kind is not types.NoneType), where, name)
    if dataclasses.is_dataclass(hint):
        return _typed_table(value, hint, where, name)
    origin = typing.get_origin(hint)
    if origin is tuple and isinstance(value, list):
        return tuple(_typed(item, hint.__args__[0], where, name) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    kind: Any = {tuple: list, Mapping: dict}.get(origin, origin) or hint
    if not isinstance(value, kind) or (isinstance(value, bool) and hint is not bool):
        raise InputError(f"{where}: {name} is {value!r}; it must be a {kind.__name__}.")
    return value


def _typed_table(value: Any, kind: Any, where: str, name: str) -> Any:
    if not isinstance(value, dict):
        raise InputError(f"{where}: {name} must be a table [{name}].")
    hints = typing.get_type_hints(kind)
    prefix = f"{name}." if name else ""
    for key in value:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f"did you mean {near[0]}?" if near else f"use {', '.join(hints)}."
            raise InputError(f"{where}: unknown entry {prefix}{key}; {hint}")
    required = (f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING)
    if missing := [key for key in required if key not in value]:
        raise InputError(f"{where}: {prefix}{missing[0]} is missing.")
    try:
        return kind(**{key: _typed(item, hints[key], where, prefix + key) for key, item in value.items()})
    except InputError as error:
        text = str(error)
        raise InputError(text if text.startswith(where) else f"{where}: {prefix}{text}") from None
