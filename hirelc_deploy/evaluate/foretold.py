"""In: pieces of networks, and how files are written. Out: the times of whole files that were never made, with errors.

A piece is profiled by the runtime as a file of its own. Conversions at its two ends count only where its neighbour does
not convert too: between two integer pieces nothing is rounded twice, and between two convolutions nothing is reordered.
What such a sum misses of a whole file (calls, caches) is taken to be the same share in each: only ratios are foretold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from hirelc_deploy.errors import ExportError
from hirelc_deploy.evaluate.pieces import Pieces, inside_a_network
from hirelc_deploy.measure.backend import Backend, OperatorTime
from hirelc_deploy.measure.protocol import MARGIN
from hirelc_deploy.measure.table import (
    BORDER,
    CONVERSIONS,
    LEAST_RUNS,
    MACS_PER_SECOND,
    REFORMAT,
    SECONDS_PER_LAYER,
)
from hirelc_deploy.progress import Progress

TURNS = 3
"""Every form of a piece is profiled so often, the forms taking turns. The shortest counts: others can only add time."""

USUAL_ERROR = 0.15
"""Half the width of an interval, in log time, where turns agree and nothing is missing. Three patterns of each of three
networks (ResNet-18, ViT-Tiny, MobileNetV3-Small) on a crowded x86 core with VNNI: their speed-ups were foretold 5 % off
in the median, 14 % at most. benchmarks/verdict.py measures it on more."""

SWEPT = 1 << 22
"""Bytes read before each run of a piece: more than a core's own caches hold. ResNet-18 at 64x64 is 5.0 times as fast in
INT8 as in float (measure/worker.py). Foretold were 3.3 where nothing was read between runs, 4.5 with 4 or 16 MiB."""

MOST_RUNS = 50
"""Of one turn; the time of small pieces scatters more between turns than within one."""

ROUNDING = frozenset(("QuantizeLinear", "DequantizeLinear", "FakeQuantize", "Convert", "Cast", REFORMAT))
"""Conversions between float and integer, as ONNX, OpenVINO and TensorRT call them."""


FormName = tuple[str, str]
"""Name of a backend, and of a pattern or `float`."""


@dataclass(frozen=True)
class PieceTime:
    """Microseconds of a piece: of its own operators, and of the conversions before the first and behind the last."""

    own: float
    entry: float = 0.0
    exit: float = 0.0

    @property
    def sum(self) -> float:
        """Of the whole file."""
        return self.own + self.entry + self.exit


@dataclass(frozen=True)
class Form:
    """One way in which a piece is written and run.

    Attributes:
        write: Makes a file (second) of a float piece (first); raises ExportError where that has no such form.
    """

    backend: Backend
    write: Callable[[Path, Path], None]


@dataclass(frozen=True)
class Times:
    """What was measured of one network.

    Attributes:
        turns: Form to the times of each turn, by kind of piece. All forms have the same kinds.
        refused: Form to the reason why it cannot be had.
    """

    pieces: Pieces
    turns: Mapping[FormName, Sequence[Mapping[int, PieceTime]]]
    refused: Mapping[FormName, str]

    @property
    def covered(self) -> float:
        """The share of the network's work that was timed."""
        return self.pieces.covered(next(iter(self.turns.values()))[0]) if self.turns else 0.0

    def microseconds(self, form: FormName) -> list[float]:
        """Return what the whole network would take by the best of all turns, then by each."""
        turns = self.turns[form]
        best = {kind: min((times[kind] for times in turns), key=lambda time: time.sum) for kind in turns[0]}
        # What was not timed is taken to be as much faster or slower as the rest.
        return [total(self.pieces, times) / self.covered for times in (best, *turns)]


@dataclass(frozen=True)
class Foretold:
    """How many times as fast as the uncut float file another file would be; never a measurement.

    Attributes:
        low, high: Within these it is expected to be.
        covered: Share of the work whose pieces were timed.
    """

    speedup: float
    low: float
    high: float
    covered: float

    @property
    def verdict(self) -> str:
        """One of the words of `protocol.Timing`."""
        low, high = math.log(self.low), math.log(self.high)
        if low > MARGIN:
            return "faster"
        if high < -MARGIN:
            return "slower"
        return "same" if max(abs(low), abs(high)) < MARGIN else "not told apart"

    def __str__(self) -> str:
        """Return the number and its interval."""
        return f"{self.speedup:.2g} times ({self.low:.2g} to {self.high:.2g})"


def time_pieces(
    pieces: Pieces,
    forms: Mapping[FormName, Form],
    folder: Path,
    *,
    threads: int,
    until: float,
    progress: Progress,
    name: str,
) -> Times:
    """Profile one piece of each kind in every form, those with most work first, while `progress.clock` allows it.

    Args:
        folder: Receives files, each for as long as it is needed.
        until: Of the clock; a piece that was begun is finished.
        name: Of the stage, for people who wait.
    """
    turns: dict[FormName, list[dict[int, PieceTime]]] = {form: [{} for _ in range(TURNS)] for form in forms}
    refused: dict[FormName, str] = {}
    order = pieces.by_work()
    for kind in progress.track(_while(order, lambda: progress.clock() < until), name, len(order)):
        plain = folder / "piece.onnx"
        plain.write_bytes(pieces.files[kind].SerializeToString())
        runs = int(min(max(SECONDS_PER_LAYER * MACS_PER_SECOND / pieces.work[kind], LEAST_RUNS), MOST_RUNS))
        sources: dict[tuple[int, bytes], Callable[[], PieceTime]] = {}
        wanted = {}
        for number, (form, how) in enumerate(forms.items()):
            if form in refused:
                continue
            path = folder / f"form{number}.onnx"
            try:
                how.write(plain, path)
                key = id(how.backend), path.read_bytes()
                if key not in sources:
                    sources[key] = _profiled(how.backend, path, threads, runs)
            except ExportError as error:
                refused[form] = str(error)
            else:
                wanted[form] = key
        for turn in range(TURNS):
            for key, profile in list(sources.items()):
                asking = [form for form, source in wanted.items() if source == key]
                try:
                    time = profile()
                except ExportError as error:
                    refused |= dict.fromkeys(asking, str(error))
                    del sources[key]
                else:
                    for form in asking:
                        turns[form][turn][kind] = time
    return Times(pieces, {form: times for form, times in turns.items() if form not in refused}, refused)


def _while(items: Iterable[int], condition: Callable[[], bool]) -> Iterable[int]:
    for item in items:
        if not condition():
            return
        yield item


def _profiled(backend: Backend, path: Path, threads: int, runs: int) -> Callable[[], PieceTime]:
    """Return what profiles a file; raises ExportError where the runtime refuses it."""
    proto = onnx.load(str(path))
    wrapped, shape = inside_a_network(proto, SWEPT)
    path.write_bytes(wrapped.SerializeToString())
    runner = backend.build(path, threads)
    names = frozenset(node.name for node in proto.graph.node)
    image = np.random.default_rng(0).random(shape, np.float32)
    return lambda: piece_time(runner.profile(image, runs), names)


def piece_time(operators: Sequence[OperatorTime], names: frozenset[str]) -> PieceTime:
    """Return the time of a piece from the profile of its file.

    Args:
        operators: In the order in which they ran.
        names: Of the file's nodes; a move of theirs is the network's own and no conversion.
    """

    def converts(operator: OperatorTime) -> bool:
        kind = operator.operator.partition(" ")[0]
        return kind in ROUNDING or (kind in CONVERSIONS and operator.name not in names)

    ran = [operator for operator in operators if not operator.name.startswith(BORDER)]
    own = [index for index, operator in enumerate(ran) if not converts(operator)]
    if not own:
        return PieceTime(sum(operator.microseconds for operator in ran))
    times = [operator.microseconds for operator in ran]
    first, last = own[0], own[-1] + 1
    return PieceTime(sum(times[first:last]), sum(times[:first]), sum(times[last:]))


def total(pieces: Pieces, times: Mapping[int, PieceTime]) -> float:
    """Return microseconds of all parts whose kinds were timed, each end's conversions where they are needed."""
    microseconds = 0.0
    for part in pieces.parts:
        if part.kind not in times:
            continue
        own = times[part.kind]
        before = [times[kind].exit if kind in times else 0.0 for kind in part.before]
        after = [times[kind].entry if kind in times else 0.0 for kind in part.after]
        microseconds += own.own
        microseconds += own.entry if not any(before) else 0.0
        microseconds += own.exit if not all(after) else 0.0
    return microseconds


def foretell(
    reference: Sequence[float], found: Sequence[float], missed: float, covered: float, known: float = 1.0
) -> Foretold:
    """Return how many times as fast as the reference a form is.

    Args:
        reference, found: Microseconds of both, as `Times.microseconds` says.
        missed: Log of the time of a whole float file over what its pieces add up to.
        covered: Share of the work that was timed; the rest may be twice as fast, or half.
        known: How many times as fast the reference itself was than what the result is relative to.
    """
    middle, *turns = [math.log(a / b) for a, b in zip(reference, found, strict=True)]
    scatter = (max(turns) - min(turns)) / 2
    middle += math.log(known)
    doubt = math.hypot(USUAL_ERROR, scatter, missed / 2) + (1 - covered) * math.log(2)
    return Foretold(math.exp(middle), math.exp(middle - doubt), math.exp(middle + doubt), covered)
