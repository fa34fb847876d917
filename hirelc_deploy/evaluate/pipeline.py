"""In: a plan and a fidelity. Out: what came of it. The one path from a plan to a measured model.

plan -> slice -> recover -> integer file -> built -> measured outcome: the search, `apply` and the final build walk it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from torch import nn

from hirelc_deploy.compress.devices import CPU
from hirelc_deploy.compress.integer import qat
from hirelc_deploy.errors import ExportError, SliceError
from hirelc_deploy.evaluate.by_layer import AS_USUAL, ByLayer
from hirelc_deploy.evaluate.clock import clocked
from hirelc_deploy.evaluate.cutting import FLOAT
from hirelc_deploy.evaluate.effort import Effort
from hirelc_deploy.evaluate.files import Files
from hirelc_deploy.evaluate.judge import Judge
from hirelc_deploy.evaluate.selection import First
from hirelc_deploy.evaluate.training import Training
from hirelc_deploy.evaluate.uncut import UncutModel
from hirelc_deploy.graph.costs import Cost, cost_of
from hirelc_deploy.graph.model_graph import ModelGraph
from hirelc_deploy.inputs.data.splits import Data
from hirelc_deploy.measure.backend import Backend
from hirelc_deploy.outcome import Failed, Fidelity, Measured, Outcome, outcome_from_dict
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.progress import Progress
from hirelc_deploy.runs import Run
from hirelc_deploy.tasks.classification import CLASSIFICATION
from hirelc_deploy.tasks.contract import Task
from hirelc_deploy.tasks.paired import PairedDrop
from hirelc_deploy.time_left import CUT, F1, F3, FILE
from hirelc_deploy.together.processes import Ahead, Evaluators


class Pipeline:
    """The ladder of fidelities of one uncut model with its data and target.

    Attributes:
        task: What the model is for.
        batch: Images of one inference on the target.
        uncut: What is known of the model before it is cut.
        files: Writes, runs and times files.
        others: The same for further runtimes of the device, whose files take part in the last race.
        training: Recovers cut models.
        run: Remembers what was measured.
        jobs: Processes that judge cut models (F1) side by side, with one thread each; below 2 this process judges.
        evaluators: Makes those processes from what answers in them and their number.
        trains_placed: Whether the accuracy guard may train the uncut integer file; no where a time budget forbids it.
        rounds: Cut models are judged (F1) with the rounding of the layers that a plan leaves integer.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        backend: Backend,
        run: Run,
        *,
        effort: Effort,
        task: Task = CLASSIFICATION,
        seed: int = 0,
        threads: int = 1,
        batch: int = 1,
        progress: Progress | None = None,
        graph: ModelGraph | None = None,
        start: Path | None = None,
        jobs: int = 1,
        evaluators: Callable[[Callable[[str], str], int], Evaluators] = Ahead,
        rounds: bool = False,
        others: Sequence[Backend] = (),
        by_layer: ByLayer = AS_USUAL,
    ) -> None:
        """Args: `graph`, `start` and `by_layer` as of `UncutModel`, `Training` and `Writer`."""
        self.data, self.backend, self.run, self.effort = data, backend, run, effort
        self.seed, self.threads, self.batch, self.task = seed, threads, batch, task
        self.progress = progress or Progress(quiet=True)
        self.jobs, self.evaluators, self.rounds = jobs, evaluators, rounds
        self.uncut = UncutModel(model, data, task, effort, self.progress, graph, run.directory)
        self.model = self.uncut.model
        self.files = Files(self.uncut, backend, run, threads, self.progress, by_layer=by_layer, batch=batch)
        self.others = tuple(
            Files(self.uncut, other, run, threads, self.progress, f"files-{other.name}", by_layer, batch)
            for other in others
        )
        roundings = lambda: tuple(self.roundings.values())  # noqa: E731
        self.training = Training(self.uncut, self.files, effort, seed, self.progress, start, roundings)
        self.trains_placed = True
        self._begun: set[str] = set()

    def in_run(self, run: Run) -> Pipeline:
        """Return the same for another run: what is known of the uncut model is shared, files and trainings are not.

        The test split can be had once again, as nothing of the other run's result decides here.
        """
        other = copy.copy(self)
        other.run, other.data = run, self.data.for_another_result()
        other.files, *others = (files.in_run(run) for files in (self.files, *self.others))
        other.others, other.trains_placed, other._begun = tuple(others), True, set()
        training = self.training
        other.training = Training(
            self.uncut, other.files, self.effort, self.seed, self.progress, training.start, training.roundings
        )
        return other

    def search_in(self, runtime: str) -> None:
        """Let one of the device's runtimes be that whose files are searched; before anything is evaluated."""
        every = (self.files, *self.others)
        self.files = next(files for files in every if files.backend.name == runtime)
        self.others = tuple(files for files in every if files is not self.files)
        self.backend, self.training.files = self.files.backend, self.files

    @property
    def graph(self) -> ModelGraph:
        """Blocks, units and layers of the uncut model."""
        return self.uncut.graph

    def outcome(self, plan: CompressionPlan, fidelity: Fidelity) -> Outcome:
        """Return what the run remembers of this plan, evaluating it first where it remembers nothing.

        What was timed counts only on the machine that timed it.
        """
        context, kind = ("", F1) if fidelity == "F1" else (self.files.machine, FILE)
        if self.run.knows(plan, fidelity, context):
            self.progress.left.answered(kind)
            for other in {"F1": (), "F2": (CUT,), "F3": (CUT, F3)}[fidelity]:
                self.progress.left.answered(other)

        def evaluate(plan: CompressionPlan, fidelity: Fidelity) -> Outcome:
            with self.progress.left.step(kind):
                return self.evaluate(plan, fidelity)

        return self.run.evaluate_once(plan, fidelity, evaluate, context)

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
        count = self.uncut.judged_images
        sent = replace(self.judge, shown=First(self.uncut.selection, count).copied())
        return self.evaluators(sent.answer, self.jobs)

    @cached_property
    def judge(self) -> Judge:
        """What judges cut models before any training (F1)."""
        uncut = self.uncut
        # Copies of a process that has used a GPU cannot; who judges must make no difference.
        cuttable = uncut.cuttable if self.jobs < 2 else uncut.cuttable.at(CPU)
        shown = First(uncut.selection, uncut.judged_images)
        return Judge(cuttable, self.task, shown, tuple(self.roundings.values()))

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
            found = self.files.roundings_of(self.model, list(plans.values()))
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
            with clocked(seconds, stage), self.progress.left.step(CUT):
                model = self.cut(plan)
                cost = self.cost(plan)
            if fidelity == "F3" and (self.effort.recovery or self.training.start):
                stage = "recover"
                with clocked(seconds, stage):
                    model = self.training.recovered(model, plan)
            stage = "export"
            with clocked(seconds, stage):
                path = self.files.build(model, plan, fidelity)
            stage = "judge"
            with clocked(seconds, stage):
                loss, value = self.files.judge(path)
            stage = "time"
            with clocked(seconds, stage):
                timing = self.files.time([self.files.reference, path])[1]
        except (SliceError, ExportError) as error:
            return Failed(plan.digest, fidelity, stage, str(error), seconds)
        return Measured(
            plan.digest,
            fidelity,
            loss,
            value,
            cost.params,
            cost.macs,
            size_bytes=path.stat().st_size,
            seconds=seconds,
            **timing.ratios,
        )

    def cut(self, plan: CompressionPlan) -> nn.Module:
        """Return the sliced model, compensated, with batch-norm statistics of its own; not trained."""
        return self.uncut.cut(plan)

    def cost(self, plan: CompressionPlan) -> Cost:
        """Return the parameters and multiply-accumulates that a plan leaves, counted without building it."""
        return cost_of(self.model, self.graph, plan.keep)

    def selection_drop(self, plan: CompressionPlan, fidelity: Fidelity) -> PairedDrop:
        """Return how much accuracy an evaluated plan's file lost on the selection split; see `Files.file_drop`."""
        return self.files.file_drop(self.files.file_of(plan, fidelity))
