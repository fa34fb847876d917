"""In: a runtime on a device. Out: the contract by which the tool builds, runs and times files on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Precision:
    """A precision this device really executes.

    Attributes:
        name: `float` or `int8`.
        activation_type: `uint8`, `int8` or `float32`.
        weight_type: `int8` or `float32`.
        weight_bits: Bits used of the weight type; 7 where 8-bit products would saturate (x86 without VNNI).
        remark: What the user should know, in one sentence, or ``.
    """

    name: str
    activation_type: str
    weight_type: str
    weight_bits: int
    remark: str = ""


@dataclass(frozen=True)
class OperatorTime:
    """One operator of a profiled run: what ran, whether its arithmetic was integer, and its share of the time."""

    name: str
    operator: str
    is_integer: bool
    microseconds: float


class Runner(Protocol):
    """One built file, ready to run."""

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return (n, classes) outputs of (n, channels, height, width) images, whatever batch the file was built for."""

    def profile(self, image: NDArray[np.float32], runs: int) -> list[OperatorTime]:
        """Return the time of each operator in execution order: the mean of the fastest half of `runs` inferences.

        Other programs can only add time, so the slower half says more about them than about the file.
        """


class TimingProcess(Protocol):
    """A separate process on the device that holds fresh sessions of several files."""

    def rounds(self, count: int) -> NDArray[np.int64]:
        """Return (count, files, 2) nanoseconds: wall and CPU time of one inference of each file.

        Files take turns in random order, a few timed runs in a row after untimed ones of the same file, so that none
        pays for caches that another has just emptied.

        Raises TargetUnavailable when the process ends or stops answering.
        """


class Backend(Protocol):
    """A runtime on a device. One module, one entry point in the group `hirelc_deploy.backends`."""

    name: str

    def availability(self) -> str | None:
        """Return None where this backend can run, else the reason and the remedy in one sentence."""

    def precisions(self) -> tuple[Precision, ...]:
        """Return what the device executes, `float` first."""

    def versions(self) -> dict[str, str]:
        """Return name to version of the runtime and what it depends on."""

    def build(self, model: Path, threads: int = 1) -> Runner:
        """Load a file; raises `ExportError` with the runtime's own words when it refuses."""

    def open_timing(self, files: Sequence[Path], threads: int, seed: int) -> AbstractContextManager[TimingProcess]:
        """Start one timing process, warmed up (20 runs of each file), garbage collection off."""


BackendFactory = Callable[[], Backend]
"""What an entry point of `hirelc_deploy.backends` names: called without arguments, it must not import the runtime."""
