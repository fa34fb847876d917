"""In: a model, its graph and a device. Out: what INT8, bf16, cutting and other runtimes can bring there, foretold.

Nothing is trained and no compressed file is timed as a whole. Pieces of the network are (`evaluate/foretold.py`), those
of one half as wide too, and the uncut float file. A verdict is no promise: it says what is worth a search.
"""

from __future__ import annotations

import json
import math
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from hirelc_deploy.compress import slicing
from hirelc_deploy.compress.integer import calibration, forms, quantize
from hirelc_deploy.compress.integer.forms import form_of
from hirelc_deploy.compress.onnx_file.refill import Exporter
from hirelc_deploy.compress.onnx_file.whole import FileExporter
from hirelc_deploy.errors import ExportError, InputError, SliceError
from hirelc_deploy.evaluate.cutting import FLOAT
from hirelc_deploy.evaluate.foretold import Foretold, Form, FormName, Times, foretell, time_pieces
from hirelc_deploy.evaluate.pieces import pieces_of
from hirelc_deploy.graph.model_graph import ModelGraph
from hirelc_deploy.inputs.models.given import GivenModel, Source
from hirelc_deploy.inputs.models.onnx_files.proto import names_within
from hirelc_deploy.inputs.models.onnx_files.whole import FileNetwork
from hirelc_deploy.measure.backend import Backend, Precision
from hirelc_deploy.measure.machine import describe
from hirelc_deploy.measure.protocol import Timing, TimingLimits, compare
from hirelc_deploy.measure.registry import installed_backends
from hirelc_deploy.measure.runtimes import SideBySide
from hirelc_deploy.measure.targets import Target, known_targets
from hirelc_deploy.progress import Progress

SECONDS = 60.0
"""Of the whole verdict, where nothing else is asked for."""

TRIED = ("all", "all-softmax-add", "weights-depthwise")
"""Patterns that are foretold. On ten networks (benchmarks/results/placement.json) the fastest of them was within 3 % of
the fastest exact one as a whole file."""

HALF = 0.5
"""Share of the channels, heads and hidden units that the cut network keeps."""

FLOAT_SHARE, UNCUT_SHARE = 0.15, 0.6
"""Of the time that is left: for the uncut float file, then for its pieces before those of the cut one."""

WITH_BFLOAT = frozenset(("avx512_bf16", "amx_bf16", "bf16"))
"""Features of CPUs that multiply bfloat16: x86 and, last, ARM."""

AS_PLACED = "uniform:keep=1.0,precision=auto"
"""The plan that cuts nothing and lets the clock decide what becomes integer."""

ACCURACY = "accuracy after rounding, cutting and training; the commands measure it on your data (DATA)"
TOO_SHORT = "the time was too short; give more with --seconds"


@dataclass(frozen=True)
class Place:
    """Where a model shall run.

    Attributes:
        backend: Of the target, what every figure is relative to, in float.
        others: Its further backends that can run here.
        missing: Those that cannot, and why.
    """

    target: Target
    threads: int
    backend: Backend
    others: tuple[Backend, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def backends(self) -> tuple[Backend, ...]:
        """All that can run here, the target's own first."""
        return self.backend, *self.others


def place_of(target: Target, threads: int | None, backend: Backend) -> Place:
    """Return the place with all runtimes that the target may use."""
    others, missing = [], {}
    for one in installed_backends():
        if one.name in target.also:
            problem = one.problem if one.backend is None else one.backend.availability()
            if one.backend is not None and problem is None:
                others.append(one.backend)
            else:
                missing[one.name] = str(problem)
    return Place(target, threads or target.threads, backend, tuple(others), missing)


@dataclass(frozen=True)
class Commands:
    """Writes the command that does what a verdict speaks of."""

    source: Source
    options: Sequence[str]
    target: Target

    def __call__(self, verb: str, out: str, plan: str = "", target: str = "") -> str:
        """Return the command line; of a model that only Python has, the call."""
        target = target or self.target.name
        if isinstance(self.source, GivenModel):
            given = f'"{plan}", ' if plan else ""
            return f'hirelc_deploy.{verb}(model, data, {given}target="{target}", out="runs/{out}")'
        source = self.source
        weights = source.weights or ("WEIGHTS" if source.is_untrained else None)
        parts = ["hirelc-deploy", verb, "--model", source.spec]
        for name, value in source.arguments.items():
            parts += ["--model-arg", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
        parts += ["--weights", str(weights)] if weights else []
        parts += ["--weights-key", source.weights_key] if source.weights_key else []
        parts += ["--pretrained"] if source.pretrained else []
        parts += [*self.options, "--data", "DATA", "--target", target]
        return shlex.join([*parts, *(["--plan", plan] if plan else []), "--out", f"runs/{out}"])


def verdict_of(
    network: nn.Module,
    graph: ModelGraph,
    images: Tensor,
    place: Place,
    command: Commands,
    *,
    seconds: float,
    started: float,
    progress: Progress,
) -> dict[str, Any]:
    """Return what is foretold, as JSON values; see `schemas`.

    Args:
        images: (2, channels, height, width), of the scale that the model takes.
        seconds: From `started` on, by `progress.clock`; the piece that is being timed then is finished.

    Raises:
        InputError: The model has a Loop or an If.
        ExportError: The uncut model cannot be written, or the runtime refuses it in float.
    """
    clock, until = progress.clock, started + seconds
    exporter = FileExporter(images) if isinstance(network, FileNetwork) else Exporter(images)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        before = clock()
        with progress.stage("export of the uncut model"):
            plain, ranges = float_file(exporter, network, images, folder)
        export_seconds = clock() - before
        with progress.stage("the uncut float file as a whole"):
            whole = _timed_whole(place, plain, ranges, folder, FLOAT_SHARE * (until - clock()), clock)
        # A second export, of the cut network, takes as long as the first at most.
        can_cut = bool(graph.units) and clock() + 2 * export_seconds < until
        share = UNCUT_SHARE if can_cut else 1.0
        proto = onnx.load(str(plain))
        if any(names_within(node) for node in proto.graph.node):
            raise InputError(
                "--verdict: the model has a Loop or an If, which cannot be timed in pieces; apply it with --plan "
                "uniform:precision=auto, which measures the whole file."
            )
        pieces = pieces_of(proto)
        offered: dict[FormName, Form] = {}
        for backend in place.backends:
            offered |= _forms(backend, ranges, place.target)
        name = f"{len(pieces.files)} kinds of pieces"
        times = partial(time_pieces, folder=folder, threads=place.threads, progress=progress)
        uncut = times(pieces, offered, until=clock() + share * (until - clock()), name=name)
        answers = Answers(place, whole, uncut, command)
        if answers.float in uncut.refused:
            raise ExportError(uncut.refused[answers.float])
        half = None
        if can_cut and uncut.covered:
            own = [form for form in (answers.float, answers.fastest_integer(place.backend)) if form is not None]
            try:
                with progress.stage("export of the cut model"):
                    cut, ranges = float_file(exporter, halved(network, graph), images, folder)
            except (SliceError, ExportError) as error:
                answers.refusal = str(error)
            else:
                forms_of_half = {form: _forms(place.backend, ranges, place.target)[form] for form in own}
                cut_pieces = pieces_of(onnx.load(str(cut)))
                name = f"{len(cut_pieces.files)} kinds of pieces, half as wide"
                half = times(cut_pieces, forms_of_half, until=until, name=name)
    return {
        "target": place.target.name,
        "runtime": place.backend.name,
        "threads": place.threads,
        "seconds": clock() - started,
        "float_ms": whole[place.backend.name].median_ms,
        "note": whole[place.backend.name].note,
        "pieces": len(pieces.parts),
        "kinds": len(pieces.files),
        "covered": uncut.covered,
        "foretold": [answers.integer(), answers.sixteen_bits(), *answers.cut(half, graph), *answers.runtimes()],
        "unknown": [ACCURACY],
        "machine": describe(place.backend),
    }


def float_file(
    exporter: Exporter | FileExporter, network: nn.Module, images: Tensor, folder: Path
) -> tuple[Path, calibration.Ranges]:
    """Return the float file for one image, and the ranges of all its tensors on these images."""
    batched, static = folder / "batched.onnx", folder / "static.onnx"
    exporter.write(network, batched, static)
    ranges = calibration.calibrate(batched, [images.numpy()], threads=torch.get_num_threads())
    known = quantize.known_ranges(onnx.load(str(static)), ranges)
    low, high = ({name: ends[side] for name, ends in known.items()} for side in (0, 1))
    return static, replace(ranges, low=low, high=high)


def halved(network: nn.Module, graph: ModelGraph) -> nn.Module:
    """Return the network with HALF of each unit; which half changes no time."""
    keep = slicing.uniform_plan(graph, HALF, FLOAT).keep
    return slicing.slice_model(network, graph, {unit: np.arange(width) for unit, width in keep.items()})


def _forms(backend: Backend, ranges: calibration.Ranges, target: Target) -> dict[FormName, Form]:
    """Return how a backend's pieces are written: in float, with 16 bits, and in the patterns of TRIED."""
    precisions = backend.precisions()
    form = form_of(precisions)

    def write_float(plain: Path, out: Path) -> None:
        form.write_float(plain, plain, ranges, out)

    def write(pattern: str, precision: Precision, plain: Path, out: Path) -> None:
        form.write_integer(plain, ranges, lambda layer: "int8", precision, pattern, out)

    found = {(backend.name, FLOAT): Form(backend, write_float)}
    integer = next((one for one in precisions if one.name == "int8"), None)
    if integer is not None:
        allowed = not target.precisions or integer.name in target.precisions
        patterns = [pattern for pattern in TRIED if allowed and pattern in form.patterns]
        for pattern in filter(None, (form.half_pattern, *patterns)):
            found[backend.name, pattern] = Form(backend, partial(write, pattern, integer))
    return found


def _timed_whole(
    place: Place,
    plain: Path,
    ranges: calibration.Ranges,
    folder: Path,
    seconds: float,
    clock: Callable[[], float],
) -> dict[str, Timing]:
    """Return the time of the uncut float file on each runtime, side by side with the target's own."""
    files: dict[Path, Backend] = {}
    for backend in place.backends:
        path = folder / f"{backend.name}-float.onnx"
        form_of(backend.precisions()).write_float(plain, plain, ranges, path)
        files[path] = backend
    limits = TimingLimits(processes=1, min_rounds=20, max_rounds=100, half_width=0.01, seconds=max(seconds, 1.0))
    timer = SideBySide(files) if place.others else place.backend
    timings = compare([*files], timer, threads=place.threads, limits=limits, now=clock)
    return {backend.name: timing for backend, timing in zip(place.backends, timings, strict=True)}


class Answers:
    """Puts what was measured into words.

    Attributes:
        refusal: Why the cut network could not be written.
    """

    def __init__(self, place: Place, whole: Mapping[str, Timing], uncut: Times, command: Commands) -> None:
        self._place, self._whole, self._uncut, self._command = place, whole, uncut, command
        self.float: FormName = (place.backend.name, FLOAT)
        self.refusal = ""

    def fastest_integer(self, backend: Backend) -> FormName | None:
        """Return the fastest pattern with integers that was timed; None where there is none."""
        timed = [form for form in self._uncut.turns if form[0] == backend.name and form[1] in TRIED]
        if not timed or not self._uncut.covered:
            return None
        return min(timed, key=lambda form: self._uncut.microseconds(form)[0])

    def integer(self) -> dict[str, Any]:
        """Return the answer about INT8."""
        form = self.fastest_integer(self._place.backend)
        if form is None:
            return self._why_not("int8", self._place.backend)
        return self._answer("int8", self._foretold(form), form, self._command("apply", "int8", AS_PLACED))

    def sixteen_bits(self) -> dict[str, Any]:
        """Return the answer about bfloat16, or FP16, in what is float now."""
        names = forms.WHOLLY_SIXTEEN_BITS
        for form in self._uncut.turns:
            if form[1] in names and self._uncut.covered:
                command = self._command("search", names[form[1]], target=self._target_of(form[0]))
                return self._answer(names[form[1]], self._foretold(form), form, command)
        if form_of(self._place.backend.precisions()).float_name == "fp16":
            return self._without("bf16", "impossible", "what is float on this target has 16 bits already")
        for form in (*self._uncut.turns, *self._uncut.refused):
            if form[1] in names:
                return self._without(names[form[1]], "unknown", self._uncut.refused.get(form, TOO_SHORT))
        features = describe(self._place.backend)["features"]
        if features is None or WITH_BFLOAT & {*features}:
            return self._without("bf16", "unknown", "no runtime of this target that can run here offers it")
        return self._without("bf16", "impossible", "this CPU does not multiply it")

    def cut(self, half: Times | None, graph: ModelGraph) -> list[dict[str, Any]]:
        """Return the answers about HALF of the channels, in float and with integers."""
        what = "cutting half of the channels"
        if not graph.units:
            return [self._without(what, "impossible", "nothing of this model can be cut")]
        if half is None or not half.covered:
            return [self._without(what, "unknown", self.refusal or TOO_SHORT)]
        found = []
        for form in half.turns:
            name = what if form == self.float else f"{what}, with int8"
            plan = f"uniform:keep={HALF},precision={'float' if form == self.float else 'auto'}"
            command = self._command("apply", "half" if form == self.float else "half-int8", plan)
            found.append(self._answer(name, self._foretold(form, half), form, command, " at most"))
        return found

    def runtimes(self) -> list[dict[str, Any]]:
        """Return the answers about the target's other runtimes, in float and with integers."""
        found = []
        for backend in self._place.others:
            target = self._target_of(backend.name)
            if (backend.name, FLOAT) not in self._uncut.turns or not self._uncut.covered:
                found.append(self._why_not(target, backend))
                continue
            for form in ((backend.name, FLOAT), self.fastest_integer(backend)):
                if form is not None:
                    name = f"{target}, {FLOAT if form[1] == FLOAT else 'int8'}"
                    plan = "uniform:keep=1.0,precision=float" if form[1] == FLOAT else AS_PLACED
                    command = self._command("apply", target, plan, target)
                    found.append(self._answer(name, self._foretold(form), form, command))
        missing = self._place.missing.items()
        return [*found, *(self._without(self._target_of(name), "unknown", why) for name, why in missing)]

    def _foretold(self, form: FormName, times: Times | None = None) -> Foretold:
        """Return the speed-up over the target's own float file."""
        times = times or self._uncut
        own_float = self._uncut.microseconds((form[0], FLOAT))
        whole = self._whole[form[0]]
        ms = whole.cpu_median_ms if whole.clock == "cpu" else whole.median_ms
        missed = math.log(1000 * ms / own_float[0])
        covered = min(times.covered, self._uncut.covered)
        return foretell(own_float, times.microseconds(form), missed, covered, 1 / whole.ratio)

    def _answer(self, what: str, found: Foretold, form: FormName, command: str, more: str = "") -> dict[str, Any]:
        return {
            "what": what,
            "verdict": found.verdict,
            "speedup": found.speedup,
            "speedup_low": found.low,
            "speedup_high": found.high,
            "ms": self._whole[self._place.backend.name].median_ms / found.speedup,
            "covered": found.covered,
            "runtime": form[0],
            "pattern": form[1],
            "says": f"{what}: {found.verdict}, {found}{more}",
            "command": command,
        }

    def _without(self, what: str, verdict: str, why: str) -> dict[str, Any]:
        """Return an answer without numbers: `unknown`, or `impossible`."""
        numbers = dict.fromkeys(("speedup", "speedup_low", "speedup_high", "ms", "covered", "runtime", "pattern"))
        says = f"{what}: {'cannot be known; ' if verdict == 'unknown' else ''}{why}"
        return {"what": what, "verdict": verdict, **numbers, "says": says, "command": ""}

    def _why_not(self, what: str, backend: Backend) -> dict[str, Any]:
        refused = [why for form, why in self._uncut.refused.items() if form[0] == backend.name]
        if refused or not self._uncut.covered:
            return self._without(what, "unknown", refused[0] if refused else TOO_SHORT)
        return self._without(what, "impossible", "this target executes no such precision")

    def _target_of(self, backend: str) -> str:
        """Return the target that a search for this runtime alone is told; the backend's name where there is none."""
        here = (target.name for target in known_targets().values() if target.backend == backend and not target.hosts)
        return self._place.target.name if backend == self._place.backend.name else next(here, backend)


def verdict_text(record: Mapping[str, Any]) -> str:
    """Return what `inspect --verdict` prints for people."""
    lines = [
        f"verdict for {record['target']} ({record['runtime']}, threads: {record['threads']}), foretold in "
        f"{record['seconds']:.0f} s from {record['pieces']} pieces of {record['kinds']} kinds, none of it measured:",
    ]
    for one in record["foretold"]:
        lines.append(f"  {one['says']}")
        if one["command"]:
            lines.append(f"    {one['command']}")
    lines += [f"  cannot be known beforehand: {text}" for text in record["unknown"]]
    lines.append(f"measured, as a whole file: float {record['float_ms']:.3g} ms, which every speed-up is over")
    lines += [f"note: {record['note']}"] if record["note"] else []
    return "\n".join(lines)
