"""In: plans and models. Out: their files, and those of the uncut model; what files answer and how long they take."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from torch import nn

from hirelc_deploy.compress.integer import placement, qat, quantize
from hirelc_deploy.compress.integer.forms import with_whole_floats
from hirelc_deploy.compress.integer.placement import Placement
from hirelc_deploy.compress.integer.quantize import BLANKET, SIGMOID_GELU
from hirelc_deploy.errors import InputError
from hirelc_deploy.evaluate.by_layer import AS_USUAL, ByLayer
from hirelc_deploy.evaluate.cutting import FLOAT, tensors
from hirelc_deploy.evaluate.selection import Answering, judged, loss_of, parts_of
from hirelc_deploy.evaluate.uncut import UncutModel
from hirelc_deploy.evaluate.undecided import undecided
from hirelc_deploy.evaluate.writer import Exported, Writer
from hirelc_deploy.measure import accuracy
from hirelc_deploy.measure.backend import Backend
from hirelc_deploy.measure.batch import filled
from hirelc_deploy.measure.machine import describe, fingerprint
from hirelc_deploy.measure.protocol import ROUGH, Timing, TimingLimits, compare
from hirelc_deploy.measure.table import LatencyTable
from hirelc_deploy.outcome import Fidelity
from hirelc_deploy.plan import END_OF, CompressionPlan
from hirelc_deploy.progress import Progress
from hirelc_deploy.runs import Run, atomic_path
from hirelc_deploy.tasks.paired import PairedDrop, paired_drop

ENERGY_ROUNDS = 100
"""At least 0.1 s with what settles before each burst: 100 steps of RAPL's counter, which moves every millisecond."""
ENERGY_TURNS = 2
"""The counter starts again once in minutes to hours, so not in two turns in a row."""


class Files:
    """The files of one run on one target.

    Attributes:
        batch: Images of one inference: every file takes exactly so many, and is timed with them.
        folder: Receives exported files and recovered weights, whole or absent.
        machine: Of the target: what was timed counts only there.
    """

    def __init__(
        self,
        uncut: UncutModel,
        backend: Backend,
        run: Run,
        threads: int,
        progress: Progress,
        folder: str = "files",
        by_layer: ByLayer = AS_USUAL,
        batch: int = 1,
    ) -> None:
        self.backend, self.run, self.threads, self.batch = backend, run, threads, batch
        self.folder = run.directory / folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.machine = fingerprint(describe(backend))
        self.writer = Writer(uncut, backend, self.folder, lambda: self.across_activations, by_layer, batch)
        self._uncut, self._progress = uncut, progress
        self._scratch = tempfile.TemporaryDirectory()

    def in_run(self, run: Run, folder: str | None = None) -> Files:
        """Return the files of another run of the same model, or another folder's, written and timed in the same way."""
        by_layer, folder = self.writer.by_layer, folder or self.folder.name
        return Files(self._uncut, self.backend, run, self.threads, self._progress, folder, by_layer, self.batch)

    @cached_property
    def reference(self) -> Path:
        """The uncut model in float, FP16 where TensorRT runs it: what every ratio is relative to."""
        return self._uncut_file(FLOAT)

    @cached_property
    def half(self) -> Path | None:
        """The uncut model with 16 bits in place of `reference`'s 32; None where that is no form of the target."""
        pattern = self.writer.form.half_pattern
        return self._uncut_file(pattern) if pattern else None

    @cached_property
    def blanket(self) -> Path:
        """The uncut model with everything integer that the runtime's own quantizer would make integer."""
        return self._uncut_file(BLANKET)

    @cached_property
    def placed(self) -> Path:
        """The uncut model in the precision placement that was fastest on the target."""
        chosen = self.placement
        return self._uncut_file(chosen.pattern, frozenset(chosen.float_layers))

    @cached_property
    def placement(self) -> Placement:
        """What becomes integer in the fastest file of the uncut model, timed as whole files on the target."""

        def measure() -> dict[str, Any]:
            runner, exported = self.backend.build(self.blanket, self.threads), self._exported
            proto, ends = onnx.load(str(exported.static)), quantize.ends_of(exported.static, exported.ranges)
            in_float = accuracy.float_kinds(runner, filled(self._uncut.example.numpy(), self.batch))
            wholly_integer = in_float <= placement.only_in_ends(proto, ends)
            changes = placement.changes(proto, wholly_integer=wholly_integer)
            free = {name: layers - self.writer.by_layer.in_float for name, layers in changes.items()}
            tried = {name: layers for name, layers in free.items() if layers}
            with self._progress.stage("precision placement"):
                patterns = self.writer.form.patterns
                table = LatencyTable(self.backend, None, self.threads, self.batch)
                found = placement.place(
                    self.reference,
                    tried,
                    self.trial,
                    self.time,
                    patterns,
                    self.divergence,
                    ends,
                    partial(undecided, layers=self._uncut.graph.layers, table=table),
                    partial(self.time, limits=ROUGH),
                )
                return found.to_dict()

        return Placement.from_dict(self.run.remember(f"precision placement on {self.machine}", measure))

    @cached_property
    def across_activations(self) -> bool:
        """Whether channels are made alike across activations: where one is far wider, and integers then answer better.

        Judged by the uncut model's file with all layers integer, beside the same one without it.
        """

        def measure() -> bool:
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place)
                if not self.writer.has_wide_channels(self._uncut.model, folder):
                    return False
                divergences = []
                for across in (False, True):
                    exported = self.writer.exported(self._uncut.model, folder, across=across)
                    static, ranges, path = exported.static, exported.ranges, folder / f"{across}.onnx"
                    decoding = frozenset(end.name for end in quantize.ends_of(static, ranges))
                    pattern, layers = self.writer.form.patterns[0], _integer_but(decoding)
                    self.writer.write_integer(static, ranges, layers, pattern, path)
                    divergences.append(self.divergence(path))
            return divergences[1] < divergences[0]

        if all(precision.name != "int8" for precision in self.backend.precisions()):
            return False
        return bool(self.run.remember(f"channels alike across activations on {self.machine}", measure))

    @cached_property
    def reference_ms(self) -> float:
        """Milliseconds of the uncut float file, measured once: turns ratios into the milliseconds of one run."""
        key = f"reference ms on {self.machine}"
        return float(self.run.remember(key, lambda: self.time([self.reference])[0].median_ms))

    def pattern_of(self, plan: CompressionPlan) -> str:
        """Return the pattern of operators around the integer layers that a plan asks for."""
        if plan.pattern and (plan.default_precision != "float" or plan.pattern == self.writer.form.half_pattern):
            return plan.pattern
        if plan.default_precision == "int8":
            return BLANKET
        if plan.default_precision == "auto" or {"int8", "int4"} & {*plan.precision.values()}:
            return self.placement.pattern
        return FLOAT

    def precision_of(self, plan: CompressionPlan) -> Callable[[str], str]:
        """Return name of a layer or end to `int8` or `float`; where a plan leaves it open, the placement says.

        Layers that the user wants in float are float.

        Raises:
            InputError: The plan names an end that the files do not have.
        """
        for name in filter(lambda name: name.startswith(END_OF), plan.precision):
            if name not in self.placement.ends:
                known = "; ".join(self.placement.ends) or "none"
                raise InputError(f"plan: {name!r} does not exist in this model; it has: {known}.")
        if plan.default_precision != "auto":
            return self.writer.by_layer.precision_of(plan.precision_of)
        floats = frozenset(self.placement.float_layers)
        placed = lambda layer: plan.precision.get(layer, "float" if layer in floats else "int8")  # noqa: E731
        return self.writer.by_layer.precision_of(placed)

    def file_of(self, plan: CompressionPlan, fidelity: Fidelity) -> Path:
        """Return where the exported file of a plan is, or would be."""
        return self.folder / f"{plan.digest}-{fidelity}.onnx"

    def weights_of(self, plan: CompressionPlan) -> Path:
        """Return where the recovered weights of a plan are, or would be."""
        return self.folder / f"{plan.digest}-F3.safetensors"

    def build(self, model: nn.Module, plan: CompressionPlan, fidelity: Fidelity) -> Path:
        """Write the file that a plan means for this model and return its path."""
        path = self.file_of(plan, fidelity)
        with atomic_path(path) as partial:
            self.write_plan(model, plan, partial)
        return path

    def write_plan(self, model: nn.Module, plan: CompressionPlan, path: Path) -> None:
        """Write the file that is shipped and timed: for a fixed batch, integer where the plan says so."""
        with tempfile.TemporaryDirectory() as folder:
            exported = self.writer.exported(model, Path(folder), equalise=not plan.trained_rounding)
            self.writer.write(exported, path, self.pattern_of(plan), self.precision_of(plan))

    def write_batched(self, model: nn.Module, plan: CompressionPlan, path: Path) -> None:
        """Write the file of a plan for any number of images at once; the one for a fixed batch is what is timed."""
        pattern, precision_of = self.pattern_of(plan), self.precision_of(plan)
        with tempfile.TemporaryDirectory() as folder:
            exported = self.writer.exported(model, Path(folder), equalise=not plan.trained_rounding)
            self.writer.write_form(exported.batched, exported.batched, exported.ranges, path, pattern, precision_of)
        quantize.strip_for_shipping(path)

    def trial(self, pattern: str, floats: frozenset[str]) -> Path:
        """Write a file that is only timed."""
        path = Path(self._scratch.name) / f"{pattern}-{_digest(floats)}.onnx"
        if not path.exists():
            static, ranges = self._exported.static, self._exported.ranges
            self.writer.write_integer(static, ranges, _integer_but(floats), pattern, path)
        return path

    def roundings_of(self, model: nn.Module, plans: Sequence[CompressionPlan]) -> list[qat.Rounding]:
        """Return what the integer files of plans round of this model; nothing where a file is float."""
        found = []
        with tempfile.TemporaryDirectory() as folder:
            exported = self.writer.exported(model, Path(folder), equalise=False)
            batched, path = onnx.load(str(exported.batched)), Path(folder) / "integer.onnx"
            for plan in plans:
                # Its faster Gelu rounds numbers that the model does not have; 16-bit floats change no grid of integers.
                pattern = with_whole_floats(self.pattern_of(plan)).removesuffix(SIGMOID_GELU)
                precision_of = self.precision_of(plan)
                if pattern == FLOAT:
                    found.append(qat.Rounding({}, {}))
                    continue
                static, ranges = exported.static, exported.ranges
                self.writer.write_integer(static, ranges, precision_of, pattern, path)
                integer = onnx.load(str(path))
                found.append(
                    qat.rounding_of(model, batched, integer, self._uncut.example, self.writer.integer.weight_bits)
                )
        return found

    def divergence(self, path: Path) -> float:
        """Return how far the answers of a file are from the float ones, on a part of the selection images."""
        shown = self._uncut.selection.shown(self._uncut.judged_images)
        return loss_of(self._uncut.task, shown, self.answers_of(path))

    def answers_of(self, path: Path) -> Answering:
        """Return what answers pictures by a file."""
        runner = self.backend.build(path, self.threads)
        return lambda pictures: tensors(runner.infer(pictures.numpy()))

    def file_drop(self, path: Path) -> PairedDrop:
        """Return how much a file lost of the metric against the uncut model on the selection split, paired."""
        task, selection = self._uncut.task, self._uncut.selection
        if selection.parts is None:
            return PairedDrop(math.nan, math.nan, math.nan)
        return paired_drop(task, selection.parts, parts_of(task, selection.shown(), self.answers_of(path)))

    def judge(self, path: Path) -> tuple[float, float | None]:
        """Return the divergence of a file from the uncut model, and its metric, on the selection split."""
        return judged(self._uncut.task, self._uncut.selection.shown(), self.answers_of(path))

    def time(self, files: Sequence[Path], limits: TimingLimits | None = None) -> list[Timing]:
        """Time files against the first of them on the target, briefly unless told otherwise."""
        limits = limits or self._uncut.effort.timing
        return compare(files, self.backend, threads=self.threads, limits=limits, batch=self.batch)

    def peak_memory_bytes(self, path: Path) -> int | None:
        """Return the peak of a process on the target that loads and runs this file alone; None where none tells."""

        def measure() -> int | None:
            with self.backend.open_timing([path], self.threads, 0) as process:
                process.rounds(1)
                return process.states[1].peak_memory_bytes if process.states else None

        found = self.run.remember(f"peak memory of {path.name} on {self.machine}", measure)
        return None if found is None else int(found)

    def energy_mj(self, path: Path) -> float | None:
        """Return the millijoules that the target draws during one inference of a file; None where it does not tell.

        The mean power while it runs this file alone, times the median time of an inference.
        """

        def measure() -> float | None:
            with self.backend.open_timing([path], self.threads, 0) as process:
                for _ in range(ENERGY_TURNS):
                    nanoseconds = process.rounds(ENERGY_ROUNDS)[:, 0, 0]
                    watts = process.states[0].mean_power_w(process.states[1]) if process.states else None
                    if watts is not None:
                        return watts * float(np.median(nanoseconds)) / 1e6
            return None

        found = self.run.remember(f"energy of {path.name} on {self.machine}", measure)
        return None if found is None else float(found)

    def milliseconds(self, files: Sequence[Path]) -> list[float]:
        """Return the times of files that were timed side by side."""
        timings = self.time(files)
        return [timings[0].median_ms * timing.ratio for timing in timings]

    @cached_property
    def _exported(self) -> Exported:
        with self._progress.stage("export and calibrate the uncut model"):
            return self.writer.exported(self._uncut.model, Path(self._scratch.name))

    def _uncut_file(self, pattern: str, floats: frozenset[str] = frozenset()) -> Path:
        path = self.folder / (f"uncut-{pattern}.onnx" if not floats else f"uncut-{pattern}-{_digest(floats)}.onnx")
        if not path.exists():
            with atomic_path(path) as partial:
                self.writer.write(self._exported, partial, pattern, _integer_but(floats))
        return path


def _integer_but(floats: frozenset[str]) -> Callable[[str], str]:
    return lambda layer: "float" if layer in floats else "int8"


def _digest(layers: frozenset[str]) -> str:
    return hashlib.sha256("\n".join(sorted(layers)).encode()).hexdigest()[:12]
