"""In: a plan and a fidelity. Out: what came of it. The one path from a plan to a measured model.

plan -> slice -> recover -> integer file -> built -> measured outcome: the search, `apply` and the final build walk it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor, nn

from hirelc_deploy.ahead import Ahead, Evaluators
from hirelc_deploy.compress import calibration, guard, placement, qat, quantize, recovery, slicing
from hirelc_deploy.compress.branches import proven
from hirelc_deploy.compress.equalisation import write_equalised
from hirelc_deploy.compress.forms import Form, form_of
from hirelc_deploy.compress.guard import Guarded
from hirelc_deploy.compress.placement import Placement
from hirelc_deploy.compress.quantize import BLANKET, SIGMOID_GELU
from hirelc_deploy.compress.refill import Exporter
from hirelc_deploy.data import Data
from hirelc_deploy.errors import ExportError, InputError, SliceError, TargetUnavailable
from hirelc_deploy.graph.model_graph import Layer, ModelGraph, Share
from hirelc_deploy.graph.sensitivity import Gram, importance, input_grams
from hirelc_deploy.graph.units import build_graph
from hirelc_deploy.images import Images
from hirelc_deploy.measure import accuracy
from hirelc_deploy.measure.backend import Backend, Precision
from hirelc_deploy.measure.machine import describe, fingerprint
from hirelc_deploy.measure.protocol import QUICK, Timing, TimingLimits, compare
from hirelc_deploy.outcome import Failed, Fidelity, Measured, Outcome, outcome_from_dict, outcome_to_dict
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.progress import Progress
from hirelc_deploy.runs import Run, atomic_path, write_atomic

BATCH = 128
SMALL_BATCH = 32
"""Where only forward passes count: their tensors stay in the caches and their memory is not mapped anew each time. The
demo network, one core: 512 images judged in 0.79 s, not 0.90, to the same bits; 256 calibrated in 0.72 s, not 1.59."""
EQUALISING_BATCHES = 2
KEPT_BYTES = 2**28
"""Calibration images up to this size are kept in memory; more of them are read again for every file."""

FLOAT = "float"


@dataclass(frozen=True)
class Effort:
    """How much work the steps of an evaluation may do.

    Attributes:
        sensitivity_images: For importance and for the moments that compensation needs.
        norm_images: For re-estimating batch-norm statistics.
        search_images: Selection images that judge an F1 evaluation; F2 and F3 use the whole split.
        recovery: Fine-tuning of F3; None for no fine-tuning.
        timing: Of F2 and F3 outcomes.
    """

    sensitivity_images: int = 512
    norm_images: int = 256
    search_images: int = 512
    recovery: recovery.Recovery | None = field(default_factory=recovery.Recovery)
    timing: TimingLimits = QUICK


@dataclass(frozen=True)
class Cost:
    """Parameters, and multiply-accumulates of one inference."""

    params: int
    macs: int


@dataclass(frozen=True)
class Exported:
    """A model's float file, the two that integer files are made of, and what calibration saw in those.

    Attributes:
        plain: For one image, as exported.
        batched, static: For any number of images and for one, equalised where that changes something.
    """

    plain: Path
    batched: Path
    static: Path
    ranges: calibration.Ranges


class Uncut(Protocol):
    """What a cut is made of: a `Pipeline`, which computes it when asked, or a `Judge`, which has it."""

    @property
    def model(self) -> nn.Module:
        """The uncut model."""

    @property
    def graph(self) -> ModelGraph:
        """Its blocks, units and layers."""

    @property
    def scores(self) -> Mapping[str, NDArray[np.float64]]:
        """Unit name to the importance of each of its elements."""

    @property
    def grams(self) -> Mapping[str, Gram]:
        """Reader layer name to the moments of its input features."""

    @property
    def restated(self) -> nn.Module:
        """The uncut model with batch-norm statistics from `norm_batches`."""

    @property
    def norm_batches(self) -> Sequence[Tensor]:
        """Images for batch-norm statistics, preprocessed."""


@dataclass(frozen=True)
class Judge:
    """Judges cut models before any training (F1). It has all it needs, so it can be sent to another process or host.

    Attributes:
        images: (n, channels, height, width) selection images, preprocessed.
        labels: (n,) their classes, where there are any.
        answers: (n, classes) logits of the uncut model on them.
        roundings: What the integer file rounds for the sake of each block; none where all is judged in float.
    """

    model: nn.Module
    graph: ModelGraph
    scores: Mapping[str, NDArray[np.float64]]
    grams: Mapping[str, Gram]
    restated: nn.Module
    norm_batches: Sequence[Tensor]
    images: Tensor
    labels: NDArray[np.int64] | None
    answers: Tensor
    roundings: Sequence[qat.Rounding] = ()

    def answer(self, text: str) -> str:
        """Return the outcome of a plan, both as JSON, computed by one thread."""
        torch.set_num_threads(1)
        return json.dumps(outcome_to_dict(self.outcome(CompressionPlan.from_dict(json.loads(text), "plan"))))

    def outcome(self, plan: CompressionPlan) -> Outcome:
        """Return what a plan loses, or Failed where the model cannot take it."""
        seconds: dict[str, float] = {}
        try:
            with clocked(seconds, "slice"):
                model = cut(self, plan)
                cost = cost_of(self.model, self.graph, plan.keep)
        except SliceError as error:
            return Failed(plan.digest, "F1", "slice", str(error), seconds)
        with clocked(seconds, "judge"):
            round_as_asked(model, self.roundings, plan)
            with recovery.half_precision(torch.device("cpu")):
                logits = forward(model, self.images)
            loss, correct = judged(logits.numpy(), self.answers, self.labels)
        return Measured(plan.digest, "F1", loss, correct, cost.params, cost.macs, seconds=seconds)


class Pipeline:
    """One uncut model with its data and target, and everything about them that is computed once.

    Attributes:
        run: Remembers what was measured; its `files/` receives exported files and recovered weights, whole or absent.
        start: Weights of the cut model, recovered before, from which its recovery goes on.
        jobs: Processes that judge cut models (F1) side by side, with one thread each; below 2 this process judges.
        evaluators: Makes those processes from what answers in them and their number.
        rounds: Cut models are judged (F1) with the rounding of the layers that a plan leaves integer.
        after_epoch: Told the plan, the number from 1 and the model, in eval mode, after every whole epoch of recovery.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        backend: Backend,
        run: Run,
        *,
        effort: Effort,
        seed: int = 0,
        threads: int = 1,
        progress: Progress | None = None,
        graph: ModelGraph | None = None,
        start: Path | None = None,
        jobs: int = 1,
        evaluators: Callable[[Callable[[str], str], int], Evaluators] = Ahead,
        rounds: bool = False,
    ) -> None:
        self.model = model.eval()
        self.data = data
        self.backend = backend
        self.run = run
        self.files = run.directory / "files"
        self.files.mkdir(parents=True, exist_ok=True)
        self.effort = effort
        self.seed = seed
        self.threads = threads
        self.progress = progress or Progress(quiet=True)
        if graph is not None:
            self.graph = graph  # known from before the run was opened, so that a bad option leaves no run behind
        self.start = start
        self.jobs, self.evaluators, self.rounds = jobs, evaluators, rounds
        self.after_epoch: Callable[[CompressionPlan, int, nn.Module], None] = lambda plan, epoch, model: None
        self._begun: set[str] = set()
        self.machine = fingerprint(describe(backend))
        self._scratch = tempfile.TemporaryDirectory()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    # What is known about the uncut model, each computed at first use.

    @cached_property
    def example(self) -> Tensor:
        """(2, channels, height, width): two calibration images."""
        return two_images(self.data)

    @cached_property
    def graph(self) -> ModelGraph:
        """Blocks, units and layers of the uncut model; see `proven_graph`."""
        return proven_graph(self.model, self.data)

    @cached_property
    def integer(self) -> Precision:
        """The integer precision of the target."""
        for precision in self.backend.precisions():
            if precision.name == "int8":
                return precision
        raise TargetUnavailable(f"{self.backend.name}: this device executes no integer precision; use precision=float.")

    @cached_property
    def form(self) -> Form:
        """How the files of the target are written."""
        return form_of(self.backend.precisions())

    @cached_property
    def scores(self) -> dict[str, NDArray[np.float64]]:
        """Unit name to the importance of each of its elements."""
        split, most = self.sensitivity_split, self.effort.sensitivity_images
        with self.progress.stage("importance"):
            if split.labels is None:  # then the uncut model's own answers
                labels = torch.cat([forward(self.model, part).argmax(1) for part in batches(split, BATCH, most)])
            else:
                labels = torch.from_numpy(split.labels[:most])
            pairs = zip(batches(split, BATCH, most), labels.split(BATCH), strict=True)
            return importance(self.model, self.graph, pairs)

    @cached_property
    def grams(self) -> dict[str, Gram]:
        """Reader layer name to the moments of its input features."""
        with self.progress.stage("input moments"):
            images = batches(self.sensitivity_split, BATCH, self.effort.sensitivity_images)
            return input_grams(self.model, self.graph, images)

    @cached_property
    def sensitivity_split(self) -> Images:
        """Training images where there are any, else the calibration images."""
        return self.data.train if self.data.train is not None and len(self.data.train) else self.data.calibration

    @cached_property
    def norm_batches(self) -> list[Tensor]:
        """Training images for batch-norm statistics, preprocessed once."""
        return list(batches(self.sensitivity_split, BATCH, self.effort.norm_images))

    @cached_property
    def restated(self) -> nn.Module:
        """The uncut model with batch-norm statistics from `norm_batches`: what a cut model's are compared with."""
        model = copy.deepcopy(self.model)
        with recovery.half_precision(torch.device("cpu")):
            recovery.reestimate_norms(model, self.norm_batches)
        return model

    def calibration_batches(self) -> Iterable[Tensor]:
        """Return all calibration images: preprocessed once where they are few, else batch by batch each time."""
        if len(self.data.calibration) * self.example[0].nbytes <= KEPT_BYTES:
            return self._kept_calibration
        return batches(self.data.calibration, SMALL_BATCH)

    @cached_property
    def _kept_calibration(self) -> list[Tensor]:
        return list(batches(self.data.calibration, SMALL_BATCH))

    @cached_property
    def selection(self) -> tuple[Tensor, NDArray[np.int64] | None]:
        """All selection images, preprocessed once, and their labels."""
        images = self.data.selection
        return torch.cat(list(batches(images, BATCH))), images.labels

    @cached_property
    def answers(self) -> Tensor:
        """(n, classes) logits of the uncut model on the selection images."""
        with self.progress.stage("uncut model on the selection split"):
            return forward(self.model, self.selection[0])

    @cached_property
    def teacher(self) -> recovery.Teacher:
        """The uncut model as a teacher on the training split."""
        views = self.effort.recovery.views if self.effort.recovery else 1
        return recovery.Teacher(self.model, self.sensitivity_split, views, self.device)

    @cached_property
    def reference(self) -> Path:
        """The uncut model in float, FP16 where TensorRT runs it: what every ratio is relative to."""
        return self._uncut_file(FLOAT)

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
            runner = self.backend.build(self.blanket, self.threads)
            wholly_integer = not accuracy.operators(runner, self.example[:1].numpy()).float_ops
            tried = placement.changes(onnx.load(str(self._uncut.static)), wholly_integer=wholly_integer)
            with self.progress.stage("precision placement"):
                patterns = self.form.patterns
                found = placement.place(self.reference, tried, self._trial, self.time, patterns, self._divergence)
                return found.to_dict()

        return Placement.from_dict(self.run.remember(f"precision placement on {self.machine}", measure))

    def guarded(self, max_drop: float) -> tuple[CompressionPlan, Guarded]:
        """Return the uncut model's plan whose integer file loses at most `max_drop` points, and its price.

        Judged on the selection split, one standard error included, as finalists are; see `guard.guard`. Where there is
        a training split, and recovery is wanted, it is also the recovery of the placed file that may keep the drop.

        Raises:
            ConstraintError: Neither training nor turning layers back helps enough.
        """
        placed = self.placement
        always = frozenset(placed.float_layers)
        timed = {name: found["ratio"] for name, found in placed.candidates.items() if name in self.form.patterns}
        patterns = sorted(timed, key=lambda name: (name != placed.pattern, timed[name]))
        layers = [layer.name for layer in self.graph.layers if layer.name not in always]
        trials = guard.Trials(
            lambda pattern, floats: self._trial(pattern, floats | always),
            self._divergence,
            self._drop_with_error,
            self._milliseconds,
            self._placed_trained if self.effort.recovery and len(self.data.train) > 1 else None,
        )

        def measure() -> dict[str, Any]:
            with self.progress.stage("accuracy guard"):
                return guard.guard(patterns, layers, trials, max_drop).to_dict()

        found = Guarded.from_dict(self.run.remember(f"accuracy guard at {max_drop:g} on {self.machine}", measure))
        floats = [step.layer for step in found.reverted]
        pattern = "" if found.pattern == placed.pattern else found.pattern
        precision = dict.fromkeys(floats, "float")
        return CompressionPlan({}, precision, "auto", pattern, trained_rounding=found.trained), found

    def guarded_file(self, plan: CompressionPlan) -> Path:
        """Return the file of a plan that `guarded` returned."""
        if plan.trained_rounding:
            return self.file_of(plan, "F3")
        return self.build(self.cut(plan), plan, "F2")

    def _placed_trained(self) -> Path | None:
        """Return the placed file of weights that were trained while they were rounded; None where it cannot be made."""
        plan = CompressionPlan(default_precision="auto", trained_rounding=True)
        outcome = self.outcome(plan, "F3")
        if isinstance(outcome, Measured):
            return self.file_of(plan, "F3")
        self.progress.say(f"accuracy guard: training the placed file failed: {outcome.reason}")
        return None

    def _drop_with_error(self, path: Path) -> float:
        found = self.file_drop(path)
        return found.points + (found.high - found.low) / (2 * accuracy.Z_95)

    def _divergence(self, path: Path) -> float:
        images = self.selection[0][: self.effort.search_images].numpy()
        logits = self.backend.build(path, self.threads).infer(images)
        return accuracy.kl_divergence(self.answers[: len(logits)].numpy(), logits)

    def _milliseconds(self, files: Sequence[Path]) -> list[float]:
        timings = self.time(files)
        return [timings[0].median_ms * timing.ratio for timing in timings]

    @cached_property
    def reference_ms(self) -> float:
        """Milliseconds of the uncut float file, measured once: turns ratios into the milliseconds of one run."""
        key = f"reference ms on {self.machine}"
        return float(self.run.remember(key, lambda: self.time([self.reference])[0].median_ms))

    # The path of a plan.

    def outcome(self, plan: CompressionPlan, fidelity: Fidelity) -> Outcome:
        """Return what the run remembers of this plan, evaluating it first where it remembers nothing.

        What was timed counts only on the machine that timed it.
        """
        return self.run.evaluate_once(plan, fidelity, self.evaluate, "" if fidelity == "F1" else self.machine)

    def begin(self, plans: Sequence[CompressionPlan]) -> None:
        """Have those of these plans that are new judged side by side (F1); `outcome` then only waits for each.

        Outcomes are written down in the order in which they are asked for, as without `jobs`.
        """
        new = [plan for plan in plans if not self.run.knows(plan, "F1")]
        if self.jobs < 2 or len(new) < 2:
            return
        texts = [json.dumps(plan.to_dict()) for plan in new]
        self._ahead.begin(texts)
        self._begun.update(texts)

    @cached_property
    def _ahead(self) -> Evaluators:
        """Made when everything that an F1 evaluation needs is known."""
        return self.evaluators(self.judge.answer, self.jobs)

    @cached_property
    def judge(self) -> Judge:
        """What judges cut models before any training (F1)."""
        count = self.effort.search_images
        images, labels = self.selection
        return Judge(
            self.model,
            self.graph,
            self.scores,
            self.grams,
            self.restated,
            self.norm_batches,
            images[:count].clone(),  # a slice would be sent with all images behind it
            None if labels is None else labels[:count],
            self.answers[:count].clone(),
            tuple(self.roundings.values()),
        )

    @cached_property
    def roundings(self) -> dict[str, qat.Rounding]:
        """Block to what the fastest uncut file rounds for its sake; blocks that are float there are not in it.

        Read off files in each of which the layers of one block alone are integer. These are not equalised and their
        biases not corrected: where that helps, a cut model rounds worse than the file that ships (demo network, all
        integer: 0.0012 nats, its file 0.0009).
        """
        if not self.rounds:
            return {}
        plans = {}
        for block in self.graph.blocks:
            others = [layer.name for layer in self.graph.layers if layer.block != block]
            plans[block] = CompressionPlan({}, dict.fromkeys(others, FLOAT), default_precision="auto")
        with self.progress.stage("rounding of each block"):
            found = self._roundings(self.model, list(plans.values()))
        return {block: rounding for block, rounding in zip(plans, found, strict=True) if rounding.weights}

    def evaluate(self, plan: CompressionPlan, fidelity: Fidelity) -> Outcome:
        """Walk the path as far as `fidelity` says. What cannot be built or run comes back as Failed."""
        if fidelity == "F1" and (text := json.dumps(plan.to_dict())) in self._begun:
            self._begun.discard(text)
            if (answer := self._ahead.take(text)) is not None:
                return outcome_from_dict(json.loads(answer))
        if fidelity == "F1":
            return self.judge.outcome(plan)
        seconds: dict[str, float] = {}
        stage = "slice"
        try:
            with clocked(seconds, stage):
                model = self.cut(plan)
                cost = self.cost(plan)
            if fidelity == "F3" and (self.effort.recovery or self.start):
                stage = "recover"
                with clocked(seconds, stage):
                    model = self._recovered(model, plan)
            stage = "export"
            with clocked(seconds, stage):
                path = self.build(model, plan, fidelity)
            stage = "judge"
            with clocked(seconds, stage):
                loss, correct = self._judge_file(path)
            stage = "time"
            with clocked(seconds, stage):
                timing = self.time([self.reference, path])[1]
        except (SliceError, ExportError) as error:
            return Failed(plan.digest, fidelity, stage, str(error), seconds)
        return Measured(
            plan.digest,
            fidelity,
            loss,
            correct,
            cost.params,
            cost.macs,
            median_ms=timing.median_ms,
            ratio=timing.ratio,
            ratio_low=timing.ratio_low,
            ratio_high=timing.ratio_high,
            size_bytes=path.stat().st_size,
            seconds=seconds,
        )

    def cut(self, plan: CompressionPlan) -> nn.Module:
        """Return the sliced model, compensated, with batch-norm statistics of its own; not trained."""
        return cut(self, plan)

    def loss_after(self, plan: CompressionPlan, epochs: float) -> float:
        """Return what a cut model loses on the selection split after a recovery of so many epochs; journaled.

        On the whole split: 128 images of it have put two plans in the wrong order by a factor of three.
        """
        brief = replace(self.effort.recovery or recovery.Recovery(), epochs=epochs)

        def measure() -> float:
            model = self.cut(plan)
            kept = slicing.keep_indices(self.graph, plan, self.scores)
            reads, name = recovery.kept_inputs(self.graph, kept), f"trial recovery of {plan.digest}"
            recovery.fine_tune(
                model, self.teacher, brief, seed=self.seed, progress=self.progress, name=name, reads=reads
            )
            images, labels = self.selection
            round_as_asked(model, tuple(self.roundings.values()), plan)
            with recovery.half_precision(torch.device("cpu")):
                return judged(forward(model, images).numpy(), self.answers, labels)[0]

        return float(self.run.remember(f"loss of {plan.digest} after {epochs:g} epochs of recovery", measure))

    def cost(self, plan: CompressionPlan) -> Cost:
        """Return the parameters and multiply-accumulates that a plan leaves, counted without building it."""
        return cost_of(self.model, self.graph, plan.keep)

    def build(self, model: nn.Module, plan: CompressionPlan, fidelity: Fidelity) -> Path:
        """Write the file that a plan means for this model and return its path."""
        path = self.file_of(plan, fidelity)
        with atomic_path(path) as partial:
            self._write(model, partial, plan)
        return path

    def write_batched(self, model: nn.Module, plan: CompressionPlan, path: Path) -> None:
        """Write the file of a plan for any number of images at once; the one for a single image is what is timed."""
        pattern, precision_of = self.pattern_of(plan), self.precision_of(plan)
        with tempfile.TemporaryDirectory() as folder:
            exported = self._exported(model, Path(folder), equalise=not plan.trained_rounding)
            self._write_form(exported.batched, exported.batched, exported.ranges, path, pattern, precision_of)
        quantize.strip_for_shipping(path)

    def pattern_of(self, plan: CompressionPlan) -> str:
        """Return the pattern of operators around the integer layers that a plan asks for."""
        if plan.pattern and plan.default_precision != "float":
            return plan.pattern
        if plan.default_precision == "int8":
            return BLANKET
        if plan.default_precision == "auto" or {"int8", "int4"} & {*plan.precision.values()}:
            return self.placement.pattern
        return FLOAT

    def precision_of(self, plan: CompressionPlan) -> Callable[[str], str]:
        """Return layer name to `int8` or `float`; where the plan leaves it to measurement, the placement says."""
        if plan.default_precision != "auto":
            return plan.precision_of
        floats = frozenset(self.placement.float_layers)
        return lambda layer: plan.precision.get(layer, "float" if layer in floats else "int8")

    def file_of(self, plan: CompressionPlan, fidelity: Fidelity) -> Path:
        """Return where the exported file of a plan is, or would be."""
        return self.files / f"{plan.digest}-{fidelity}.onnx"

    def weights_of(self, plan: CompressionPlan) -> Path:
        """Return where the recovered weights of a plan are, or would be."""
        return self.files / f"{plan.digest}-F3.safetensors"

    def selection_drop(self, plan: CompressionPlan, fidelity: Fidelity) -> accuracy.PairedDrop:
        """Return how much accuracy an evaluated plan's file lost on the selection split; see `file_drop`."""
        return self.file_drop(self.file_of(plan, fidelity))

    def file_drop(self, path: Path) -> accuracy.PairedDrop:
        """Return how much accuracy a file lost against the uncut model on the selection split, paired, in points."""
        images, labels = self.selection
        if labels is None:
            return accuracy.PairedDrop(math.nan, math.nan, math.nan)
        logits = self.backend.build(path, self.threads).infer(images.numpy())
        return accuracy.paired_drop(accuracy.correct(self.answers.numpy(), labels), accuracy.correct(logits, labels))

    def time(self, files: Sequence[Path]) -> list[Timing]:
        """Time files against the first of them, briefly, on the target."""
        return compare(files, self.backend, threads=self.threads, limits=self.effort.timing)

    # Steps of the path.

    def _write(self, model: nn.Module, path: Path, plan: CompressionPlan) -> None:
        """Write the file that is shipped and timed: static batch of one, integer where the plan says so."""
        with tempfile.TemporaryDirectory() as folder:
            exported = self._exported(model, Path(folder), equalise=not plan.trained_rounding)
            self._quantize(exported, path, self.pattern_of(plan), self.precision_of(plan))

    def _exported(self, model: nn.Module, folder: Path, *, equalise: bool = True) -> Exported:
        """Export a model, checked against torch, and take its ranges on the calibration images.

        Args:
            equalise: Not for weights that are rounded already: with other factors they would be rounded again.
        """
        batched, static = folder / "batched.onnx", folder / "static.onnx"
        self.exporter.write(model, batched, static)
        equal, equal_static = batched, static
        if equalise:
            few = [batch.numpy() for batch in islice(self.calibration_batches(), EQUALISING_BATCHES)]
            equal, equal_static = write_equalised(batched, static, few)
        images = (batch.numpy() for batch in self.calibration_batches())
        ranges = calibration.calibrate(equal, images, threads=torch.get_num_threads())
        return Exported(static, equal, equal_static, ranges)

    def _quantize(self, exported: Exported, path: Path, pattern: str, precision_of: Callable[[str], str]) -> None:
        self._write_form(exported.plain, exported.static, exported.ranges, path, pattern, precision_of)
        layers = quantize.strip_for_shipping(path)
        write_atomic(self.files / f"{path.name.lstrip('.').partition('.')[0]}.layers.json", json.dumps(layers))

    def _write_form(
        self,
        plain: Path,
        equalised: Path,
        ranges: calibration.Ranges,
        path: Path,
        pattern: str,
        precision_of: Callable[[str], str],
    ) -> None:
        if pattern == FLOAT:
            self.form.write_float(plain, equalised, ranges, path)
        else:
            self.form.write_integer(equalised, ranges, precision_of, self.integer, pattern, path)

    @cached_property
    def exporter(self) -> Exporter:
        """Writes float files; it learns from each export how to do without the next."""
        return Exporter(self.example)

    @cached_property
    def _uncut(self) -> Exported:
        with self.progress.stage("export and calibrate the uncut model"):
            return self._exported(self.model, Path(self._scratch.name))

    def _uncut_file(self, pattern: str, floats: frozenset[str] = frozenset()) -> Path:
        path = self.files / (f"uncut-{pattern}.onnx" if not floats else f"uncut-{pattern}-{_digest(floats)}.onnx")
        if not path.exists():
            with atomic_path(path) as partial:
                self._quantize(self._uncut, partial, pattern, _integer_but(floats))
        return path

    def _trial(self, pattern: str, floats: frozenset[str]) -> Path:
        """Write a file that is only timed."""
        path = Path(self._scratch.name) / f"{pattern}-{_digest(floats)}.onnx"
        if not path.exists():
            static, ranges = self._uncut.static, self._uncut.ranges
            self.form.write_integer(static, ranges, _integer_but(floats), self.integer, pattern, path)
        return path

    def _judge_file(self, path: Path) -> tuple[float, float | None]:
        images, labels = self.selection
        return judged(self.backend.build(path, self.threads).infer(images.numpy()), self.answers, labels)

    def _recovered(self, model: nn.Module, plan: CompressionPlan) -> nn.Module:
        """Return the model cut to a plan after its recovery."""
        if self.start is not None and not self.weights_of(plan).exists():
            try:
                model.load_state_dict(load_file(str(self.start)))
            except RuntimeError as error:
                raise ExportError(f"{self.start}: these are not weights of this model cut to this plan.") from error
            model.eval()
        kept = slicing.keep_indices(self.graph, plan, self.scores) if self.effort.recovery else {}
        return self.trained(model, plan, recovery.kept_inputs(self.graph, kept))

    def trained(self, model: nn.Module, plan: CompressionPlan, reads: Mapping[str, NDArray[np.int64]]) -> nn.Module:
        """Return a cut model after the fine-tuning that `effort` asks for.

        Weights that a killed run left whole are taken as they are, a training that it left goes on after its last
        whole epoch.

        Args:
            plan: Names the weights on the disk.
            reads: See `recovery.fine_tune`.
        """
        path = self.weights_of(plan)
        if path.exists():
            model.load_state_dict(load_file(str(path)))
            return model.eval()
        training = path.with_suffix(".training")

        def after_epoch(epoch: int, student: nn.Module, standing: bytes) -> None:
            write_atomic(training, standing)
            self.after_epoch(plan, epoch, student)

        if self.effort.recovery is not None:
            name = f"recovery of {plan.digest}"
            self.progress.say(f"{name}: {self.effort.recovery.epochs:g} epochs")
            if plan.trained_rounding:
                qat.install(model, *self._roundings(model, [plan]))
            model = recovery.fine_tune(
                model,
                self.teacher,
                self.effort.recovery,
                seed=self.seed,
                progress=self.progress,
                name=name,
                # Features beyond the ends of their grids would not learn: they have no gradient, and drift further out.
                reads={} if plan.trained_rounding else reads,
                as_exported=plan.trained_rounding,
                begun=training.read_bytes() if training.exists() else b"",
                after_epoch=after_epoch,
            )
            qat.settle(model)
        write_atomic(path, weights_of_model(model))
        training.unlink(missing_ok=True)
        return model

    def _roundings(self, model: nn.Module, plans: Sequence[CompressionPlan]) -> list[qat.Rounding]:
        """Return what the integer files of plans round of this model; nothing where a file is float."""
        found = []
        with tempfile.TemporaryDirectory() as folder:
            exported = self._exported(model, Path(folder), equalise=False)
            batched, path = onnx.load(str(exported.batched)), Path(folder) / "integer.onnx"
            for plan in plans:
                # Its faster Gelu rounds numbers that the model does not have.
                pattern, precision_of = self.pattern_of(plan).removesuffix(SIGMOID_GELU), self.precision_of(plan)
                if pattern == FLOAT:
                    found.append(qat.Rounding({}, {}))
                    continue
                static, ranges = exported.static, exported.ranges
                self.form.write_integer(static, ranges, precision_of, self.integer, pattern, path)
                integer = onnx.load(str(path))
                found.append(qat.rounding_of(model, batched, integer, self.example, self.integer.weight_bits))
        return found


def weights_of_model(model: nn.Module) -> bytes:
    """Return a model's weights as a safetensors file; `save_file` would write one that only its owner can read."""
    # Clones, because safetensors refuses tensors that share memory, as tied layers do.
    return bytes(save({key: tensor.clone().contiguous() for key, tensor in model.state_dict().items()}))


def cut(uncut: Uncut, plan: CompressionPlan) -> nn.Module:
    """Return the sliced model, compensated, with batch-norm statistics of its own; not trained."""
    slicing.check_plan(uncut.graph, plan)
    if all(plan.keep.get(unit.name, unit.size) == unit.size for unit in uncut.graph.units):
        return slicing.slice_model(uncut.model, uncut.graph, {})
    kept = slicing.keep_indices(uncut.graph, plan, uncut.scores)
    model = slicing.slice_model(recovery.compensate(uncut.model, uncut.graph, kept, uncut.grams), uncut.graph, kept)
    with recovery.half_precision(torch.device("cpu")):
        recovery.correct_norms(model, slicing.slice_model(uncut.restated, uncut.graph, kept), uncut.norm_batches)
    return model


def round_as_asked(model: nn.Module, roundings: Sequence[qat.Rounding], plan: CompressionPlan) -> None:
    """Let a model round, in place, for the sake of each block that is there and is not float by the plan."""
    integer = {name for name, _ in model.named_modules() if plan.precision_of(name) != FLOAT}
    qat.install(model, qat.joined(each for each in roundings if integer & each.weights.keys()))


def judged(
    logits: NDArray[np.float32], answers: Tensor, labels: NDArray[np.int64] | None
) -> tuple[float, float | None]:
    """Return the divergence of (n, classes) logits from the uncut model's answers, and how many are right."""
    loss = accuracy.kl_divergence(answers.numpy(), logits)
    return loss, None if labels is None else float(np.mean(logits.argmax(1) == labels))


def two_images(data: Data) -> Tensor:
    """Return (2, channels, height, width): two calibration images."""
    return data.calibration.batch(np.arange(2) % len(data.calibration))


def proven_graph(
    model: nn.Module, data: Data, exclude: tuple[str, ...] = (), include: tuple[str, ...] = ()
) -> ModelGraph:
    """Return blocks, units and layers of a model; every unit was shown to cut exactly."""
    example = two_images(data)
    graph = build_graph(model, example, exclude=exclude, include=include)
    if not graph.layers:
        raise InputError(
            f"{type(model).__name__}: no convolution and no linear layer was seen in its forward pass; "
            "there is nothing to cut or to make integer."
        )
    return proven(model, graph, example)


def batches(images: Images, size: int, limit: int | None = None) -> Iterator[Tensor]:
    """Yield preprocessed images, in order, at most `size` at a time and `limit` in all."""
    count = len(images) if limit is None else min(limit, len(images))
    for start in range(0, count, size):
        yield images.batch(np.arange(start, min(start + size, count)))


def forward(model: nn.Module, pictures: Tensor) -> Tensor:
    """Return (n, classes) float32 logits of (n, channels, height, width) pictures, in batches."""
    with torch.no_grad():
        return torch.cat([model(batch).float() for batch in pictures.split(SMALL_BATCH)])


def _integer_but(floats: frozenset[str]) -> Callable[[str], str]:
    return lambda layer: "float" if layer in floats else "int8"


def _digest(layers: frozenset[str]) -> str:
    return hashlib.sha256("\n".join(sorted(layers)).encode()).hexdigest()[:12]


def cost_of(model: nn.Module, graph: ModelGraph, keep: Mapping[str, int]) -> Cost:
    """Return what is left of a model when units keep `keep` elements, those not named all of theirs."""
    gone = tuple(f"{u.branch.module}." for u in graph.units if u.branch and keep.get(u.name) == 0)
    left = {name: list(tensor.shape) for name, tensor in model.named_parameters() if not name.startswith(gone)}
    for name, width in keep.items():
        unit = graph.unit(name)
        for part in unit.slices:
            if part.tensor in left:
                left[part.tensor][part.dim] -= (unit.size - width) * part.index.shape[1]
    macs = sum(round(layer.macs * kept_share(layer, graph, keep)) for layer in graph.layers)
    return Cost(sum(math.prod(shape) for shape in left.values()), macs)


def kept_features(layer: Layer, graph: ModelGraph, keep: Mapping[str, int]) -> tuple[int, int]:
    """Return (input, output) features of a layer when units keep `keep` elements; units not named stay whole.

    (0, 0) where the layer is left out.
    """
    if graph.leaves_out(layer.name, keep):
        return 0, 0

    def features(count: int, shares: tuple[Share, ...]) -> int:
        cut = (share for share in shares if share.unit in keep)
        return count - sum((graph.unit(s.unit).size - keep[s.unit]) * s.per_element for s in cut)

    return features(layer.in_features, layer.reads), features(layer.out_features, layer.writes)


def kept_share(layer: Layer, graph: ModelGraph, keep: Mapping[str, int]) -> float:
    """Return the share of a layer's multiply-accumulates that stays; both ends of a depthwise layer move together."""
    narrow, wide = kept_features(layer, graph, keep)
    if layer.shape.depthwise or layer.shape.kind == "attention":
        return wide / layer.out_features
    return narrow * wide / (layer.in_features * layer.out_features)


@contextmanager
def clocked(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the time spent inside to `seconds[stage]`."""
    start = time.monotonic()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.monotonic() - start
