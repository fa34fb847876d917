"""In: a cut model and its plan. Out: the model after its recovery; a training that was killed goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import nn

from hirelc_deploy.compress import recovery, slicing
from hirelc_deploy.compress.devices import CPU, at
from hirelc_deploy.compress.features import kept_inputs
from hirelc_deploy.compress.integer import qat
from hirelc_deploy.errors import ExportError
from hirelc_deploy.evaluate.cutting import cut, forward_half, round_as_asked
from hirelc_deploy.evaluate.effort import Effort
from hirelc_deploy.evaluate.files import Files
from hirelc_deploy.evaluate.further import lies_within, recovered
from hirelc_deploy.evaluate.selection import loss_of
from hirelc_deploy.evaluate.uncut import UncutModel
from hirelc_deploy.outcome import Measured
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.progress import Progress
from hirelc_deploy.runs import TRIAL_LOSS, write_atomic
from hirelc_deploy.time_left import CUT, TRAINING_STEP

REHEARSED, LONG = 4, 10
"""Steps of a rehearsal, and how many times as many a recovery has that is worth one."""


class Training:
    """Recovers cut models by distillation from the uncut one.

    Attributes:
        files: Of the runtime whose plans are recovered.
        start: Weights of the cut model, recovered before, from which its recovery goes on.
        further: Share of a recovery that a plan gets which lies within one that is recovered: it begins at its weights.
            1 where every plan begins at the uncut model.
        roundings: Says what integer files round for the sake of each block; nothing where F1 is in float.
        after_epoch: Told the plan, the number from 1 and the model, in eval mode, after every whole epoch of recovery.
        scalars: Told the name of a training, the number of a step and what it measured, every few steps.
    """

    def __init__(
        self,
        uncut: UncutModel,
        files: Files,
        effort: Effort,
        seed: int,
        progress: Progress,
        start: Path | None,
        roundings: Callable[[], Sequence[qat.Rounding]],
    ) -> None:
        self.effort, self.seed, self.progress, self.start, self.further = effort, seed, progress, start, 1.0
        self.after_epoch: Callable[[CompressionPlan, int, nn.Module], None] = lambda plan, epoch, model: None
        self.scalars: Callable[[str, int, Mapping[str, float]], None] = lambda training, step, values: None
        self.files, self._uncut, self.roundings = files, uncut, roundings

    @cached_property
    def teacher(self) -> recovery.Teacher:
        """The uncut model as a teacher on the training split."""
        return teacher_of(self._uncut, self.effort, self.files.folder)

    def recovered(self, model: nn.Module, plan: CompressionPlan, until: float = 1.0) -> nn.Module:
        """Return the model cut to a plan after its recovery, or after a share of it; see `trained`."""
        if self.start is not None and not self.files.weights_of(plan).exists():
            try:
                model.load_state_dict(load_file(str(self.start)))
            except RuntimeError as error:
                raise ExportError(f"{self.start}: these are not weights of this model cut to this plan.") from error
            model.eval()
        share = 1.0
        if (large := self._around(plan)) is not None:
            base = recovered(self._uncut, large, load_file(str(self.files.weights_of(large))))
            model, share = at(cut(base, plan), CPU), self.further
        kept = slicing.keep_indices(self._uncut.graph, plan, self._uncut.scores) if self.effort.recovery else {}
        return self.trained(model, plan, kept_inputs(self._uncut.graph, kept), until, share)

    def _around(self, plan: CompressionPlan) -> CompressionPlan | None:
        """Return the recovered plan at whose weights another one begins: the smallest around it; journaled."""
        if self.further >= 1 or self.start is not None or self.effort.recovery is None:
            return None
        graph, run = self._uncut.graph, self.files.run
        known = {
            trial.plan.digest: trial
            for trial in run.trials
            if trial.fidelity == "F3" and trial.context == self.files.machine and isinstance(trial.outcome, Measured)
        }

        def smallest() -> str | None:
            around = [
                (one.outcome.params, digest)
                for digest, one in known.items()
                if isinstance(one.outcome, Measured)
                and digest != plan.digest
                and not one.plan.trained_rounding
                and self.files.weights_of(one.plan).exists()
                and lies_within(graph, plan, one.plan)
            ]
            return min(around)[1] if around else None

        digest = run.remember(f"recovery of {plan.digest} begins at", smallest)
        return known[digest].plan if digest in known else None

    def trained(
        self,
        model: nn.Module,
        plan: CompressionPlan,
        reads: Mapping[str, NDArray[np.int64]],
        until: float = 1.0,
        share: float = 1.0,
    ) -> nn.Module:
        """Return a cut model after the fine-tuning that `effort` asks for.

        Weights that a killed run left whole are taken as they are, a training that it left goes on after its last
        whole epoch, one that paused goes on from there.

        Args:
            plan: Names the weights on the disk.
            reads: See `recovery.fine_tune`.
            until: Share of the steps after which it pauses.
            share: Of the epochs that it gets.
        """
        path = self.files.weights_of(plan)
        if path.exists():
            model.load_state_dict(load_file(str(path)))
            return model.eval()
        training = path.with_suffix(".training")

        def after_epoch(epoch: int, student: nn.Module, standing: bytes) -> None:
            write_atomic(training, standing)
            self.after_epoch(plan, epoch, student)

        if self.effort.recovery is not None:
            name, asked = f"recovery of {plan.digest}", self.effort.recovery
            asked = replace(asked, epochs=share * asked.epochs)
            self.progress.say(f"{name}: {asked.epochs:.3g} epochs")
            rounding = self.files.roundings_of(model, [plan])[0] if plan.trained_rounding else qat.Rounding({}, {})
            model = recovery.fine_tune(
                model,
                self.teacher,
                asked,
                seed=self.seed,
                progress=self.progress,
                name=name,
                # Features beyond the ends of their grids would not learn: they have no gradient, and drift further out.
                reads={} if plan.trained_rounding else reads,
                as_exported=plan.trained_rounding,
                prepare=partial(qat.install, rounding=rounding),
                begun=training.read_bytes() if training.exists() else b"",
                after_epoch=after_epoch,
                watch=partial(self.scalars, name),
                pause=None if until >= 1 else recovery.Pause(until, partial(write_atomic, training)),
            )
            qat.settle(model)
        if until < 1:
            return model
        write_atomic(path, weights_of_model(model))
        training.unlink(missing_ok=True)
        return model

    def loss_at(self, plan: CompressionPlan, share: float) -> float:
        """Return what a cut model loses on the selection split with this share of its recovery done; journaled.

        Nothing is trained twice: a later call, and the recovery itself, go on from where this one pauses.
        """

        def measure() -> float:
            with self.progress.left.step(CUT):
                model = self._uncut.cut(plan)
            return self._judged(self.recovered(model, plan, share), plan)

        epochs = self.effort.recovery.epochs if self.effort.recovery else 0.0
        key = f"{TRIAL_LOSS}{plan.digest} with {share:g} of {epochs:g} epochs of recovery done"
        return float(self.files.run.remember(key, measure))

    def give_up(self, plan: CompressionPlan) -> None:
        """Delete what the recovery of a plan left behind where it paused."""
        self.files.weights_of(plan).with_suffix(".training").unlink(missing_ok=True)

    def _judged(self, model: nn.Module, plan: CompressionPlan) -> float:
        """Return what a cut model loses on the selection split.

        On the whole split: 128 images of it have put two plans in the wrong order by a factor of three.
        """
        round_as_asked(model, self.roundings(), plan)
        return loss_of(
            self._uncut.task, self._uncut.selection.shown(), partial(forward_half, at(model, self._uncut.device))
        )

    def loss_after(self, plan: CompressionPlan, epochs: float) -> float:
        """Return what a cut model loses on the selection split after a recovery of so many epochs; journaled."""

        def measure() -> float:
            return self._judged(self._briefly(plan, epochs, f"trial recovery of {plan.digest}"), plan)

        return float(self.files.run.remember(f"{TRIAL_LOSS}{plan.digest} after {epochs:g} epochs of recovery", measure))

    def steps(self, epochs: float | None = None) -> int:
        """Return the steps of a recovery, or of so many epochs of one; 0 where there is none."""
        if self.effort.recovery is None or len(self.teacher.images) < 2:
            return 0
        asked = self.effort.recovery if epochs is None else replace(self.effort.recovery, epochs=epochs)
        return recovery.steps_of(asked, recovery.batches_of(self.teacher, asked)[1])

    def shorten(self, share: float) -> None:
        """Let recoveries have this share of their epochs from here on."""
        if self.effort.recovery is not None and share < 1:
            epochs = share * self.effort.recovery.epochs
            self.progress.say(f"the time budget allows {epochs:.3g} of {self.effort.recovery.epochs:g} epochs.")
            self.effort = replace(self.effort, recovery=replace(self.effort.recovery, epochs=epochs))

    def rehearse(self, plan: CompressionPlan, *, short: bool = False) -> None:
        """Do a few steps of a recovery and throw them away, where nothing says yet what a step takes.

        Not where a whole recovery has hardly more. The images' gradients of the importance are no measure: they take
        0.9 times as long as a step's share for blood cells, and 4.5 times for CamVid's road scenes.

        Args:
            short: Also where a whole recovery has hardly more, but more: for a budget every minute counts.
        """
        steps = self.steps()
        if steps < (2 if short else LONG) * REHEARSED or self.progress.left.seconds_of(TRAINING_STEP) is not None:
            return
        state = torch.get_rng_state()
        self._briefly(plan, REHEARSED / self.steps(1.0), "rehearsal of the recovery")
        torch.set_rng_state(state)

    def step_seconds(self, plan: CompressionPlan) -> float:
        """Return what a step of a plan's recovery takes, by a few that are thrown away; the first ones do not count."""
        state, left = torch.get_rng_state(), self.progress.left
        self._briefly(plan, REHEARSED / self.steps(1.0), f"rehearsal of the recovery of {plan.digest}")
        before = left.measured(TRAINING_STEP)
        self._briefly(plan, REHEARSED / self.steps(1.0), f"rehearsal of the recovery of {plan.digest}")
        after = left.measured(TRAINING_STEP)
        torch.set_rng_state(state)
        return (after[1] - before[1]) / (after[0] - before[0])

    def _briefly(self, plan: CompressionPlan, epochs: float, name: str) -> nn.Module:
        """Return a cut model after so many epochs of its recovery."""
        brief = replace(self.effort.recovery or recovery.Recovery(), epochs=epochs)
        with self.progress.left.step(CUT):
            model = self._uncut.cut(plan)
        kept = slicing.keep_indices(self._uncut.graph, plan, self._uncut.scores)
        reads = kept_inputs(self._uncut.graph, kept)
        return recovery.fine_tune(
            model,
            self.teacher,
            brief,
            seed=self.seed,
            progress=self.progress,
            name=name,
            reads=reads,
            watch=partial(self.scalars, name),
        )


def teacher_of(uncut: UncutModel, effort: Effort, folder: Path | None = None) -> recovery.Teacher:
    """Return an uncut model as a teacher on its training split, where this process computes."""
    views = effort.recovery.views if effort.recovery else 1
    return recovery.Teacher(uncut.model, uncut.sensitivity_split, views, uncut.device, uncut.task, folder)


def weights_of_model(model: nn.Module) -> bytes:
    """Return a model's weights as a safetensors file; `save_file` would write one that only its owner can read."""
    # Clones, because safetensors refuses tensors that share memory, as tied layers do.
    return bytes(save({key: tensor.clone().contiguous() for key, tensor in model.state_dict().items()}))
