"""In: a model and its data. Out: everything that is known of the model before it is cut, each found at first use."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hirelc_deploy.compress import norms, slicing
from hirelc_deploy.compress.branches import proven
from hirelc_deploy.compress.devices import CPU, at, half_precision, sent
from hirelc_deploy.compress.onnx_file.whole import graph_of
from hirelc_deploy.errors import InputError
from hirelc_deploy.evaluate import effort as sizes
from hirelc_deploy.evaluate.cutting import Cuttable, arrays, cut, forward, is_whole
from hirelc_deploy.evaluate.effort import (
    ANSWER_BYTES,
    BATCH,
    CALIBRATION_VALUES,
    GRADIENT_VALUES,
    LEAST_BATCH,
    SMALL_BATCH,
    Effort,
)
from hirelc_deploy.evaluate.selection import Selection
from hirelc_deploy.graph.model_graph import ModelGraph
from hirelc_deploy.graph.sensitivity import Gram, Losses, importance, input_grams
from hirelc_deploy.graph.units import build_graph
from hirelc_deploy.inputs.data.batches import batches, two_images
from hirelc_deploy.inputs.data.images import Images
from hirelc_deploy.inputs.data.splits import Data
from hirelc_deploy.inputs.models.onnx_files.whole import FileNetwork
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.progress import Progress
from hirelc_deploy.tasks import guessing
from hirelc_deploy.tasks.contract import Task, on_device
from hirelc_deploy.together import ranks
from hirelc_deploy.user_code import first_line


def proven_graph(
    model: nn.Module, data: Data, exclude: tuple[str, ...] = (), include: tuple[str, ...] = ()
) -> ModelGraph:
    """Return blocks, units and layers of a model; every unit was shown to cut exactly."""
    example = two_images(data)
    graph = seen_graph(model, example, exclude, include)
    if not graph.layers:
        raise InputError(
            f"{type(model).__name__}: no convolution and no linear layer was seen in its forward pass; "
            "there is nothing to cut or to make integer."
        )
    return proven(model, graph, example) if graph.units else graph


def seen_graph(
    model: nn.Module, images: Tensor, exclude: tuple[str, ...] = (), include: tuple[str, ...] = ()
) -> ModelGraph:
    """Return blocks, units and layers as they are seen in the model; nothing was proven."""
    if isinstance(model, FileNetwork):
        return graph_of(model)
    return build_graph(model, images, exclude=exclude, include=include)


class UncutModel:
    """The model as it was given, with its data."""

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        task: Task,
        effort: Effort,
        progress: Progress,
        graph: ModelGraph | None = None,
        folder: Path | None = None,
    ) -> None:
        """Args:

        graph: Where it is known from before the run was opened, so that a bad option leaves no run behind.
        folder: Holds what is too much for the memory; None is where temporary files are.
        """
        self.model = model.eval()
        self.data = data
        self.task = task
        self.effort = effort
        self.progress = progress
        self._folder = folder
        if graph is not None:
            self.graph = graph

    @cached_property
    def example(self) -> Tensor:
        """(2, channels, height, width): two calibration images."""
        return two_images(self.data)

    @cached_property
    def device(self) -> torch.device:
        """Where models compute: this process's GPU, or the CPU where there is none or the model does not run on it."""
        found = ranks.device()
        if found == CPU or isinstance(self.model, FileNetwork):
            return CPU
        try:
            with torch.no_grad():
                at(self.model, found)(self.example.to(found))
        except (RuntimeError, TypeError) as error:  # torch's answer to tensors of two devices, and numpy's to a GPU's
            self.progress.say(f"the model does not run on {found} ({first_line(error)}); the CPU does all.")
            return CPU
        return found

    @cached_property
    def there(self) -> nn.Module:
        """The model where models compute; the same one where that is the CPU."""
        return at(self.model, self.device)

    @cached_property
    def graph(self) -> ModelGraph:
        """Blocks, units and layers of the uncut model; see `proven_graph`."""
        return proven_graph(self.model, self.data)

    @cached_property
    def scores(self) -> dict[str, NDArray[np.float64]]:
        """Unit name to the importance of each of its elements: by labels, else by the uncut model's own answers."""
        split, task = self.sensitivity_split, self.task
        generator = torch.Generator().manual_seed(0)
        # Activations with their gradients are kept for a whole batch.
        size = max(LEAST_BATCH, min(BATCH, GRADIENT_VALUES // self.example[0].numel()))

        def losses(start: int) -> Losses:
            if not split.labelled:
                return lambda answers: task.surprise(answers, generator)
            rows = np.arange(start, min(start + size, len(split), self.effort.sensitivity_images))
            targets = on_device(task.collate(split.targets(rows)), self.device)
            return lambda answers: task.loss(answers, targets)

        with self.progress.stage("importance"):
            parts = enumerate(sent(batches(split, size, self.effort.sensitivity_images), self.device))
            return importance(self.there, self.graph, ((part, losses(index * size)) for index, part in parts))

    @cached_property
    def grams(self) -> dict[str, Gram]:
        """Reader layer name to the moments of its input features."""
        with self.progress.stage("input moments"):
            images = sent(batches(self.sensitivity_split, BATCH, self.effort.sensitivity_images), self.device)
            return input_grams(self.there, self.graph, images)

    @cached_property
    def sensitivity_split(self) -> Images:
        """Training images where there are any, else the calibration images."""
        return self.data.train if self.data.train is not None and len(self.data.train) else self.data.calibration

    @cached_property
    def norm_batches(self) -> list[Tensor]:
        """Training images for batch-norm statistics, preprocessed once."""
        return list(sent(batches(self.sensitivity_split, BATCH, self.effort.norm_images), self.device))

    @cached_property
    def restated(self) -> nn.Module:
        """The uncut model with batch-norm statistics from `norm_batches`: what a cut model's are compared with."""
        model = copy.deepcopy(self.there)
        with half_precision(self.device):
            norms.reestimate_norms(model, self.norm_batches)
        return model

    @cached_property
    def cuttable(self) -> Cuttable:
        """What plans are cut of, where this process computes."""
        return Cuttable(self.there, self.graph, self.scores, self.grams, self.restated, self.norm_batches)

    def cut(self, plan: CompressionPlan) -> nn.Module:
        """Return the sliced model, compensated, with batch-norm statistics of its own, on the CPU; not trained."""
        if is_whole(self.graph, plan):  # for which no importance need be known
            return slicing.slice_model(self.model, self.graph, {})
        return at(cut(self.cuttable, plan), CPU)

    @property
    def calibration_batch(self) -> int:
        """Images of one batch of a calibration."""
        return max(1, min(SMALL_BATCH, CALIBRATION_VALUES // self.example[0].numel()))

    def calibration_batches(self) -> Iterable[Tensor]:
        """Return all calibration images: preprocessed once where they are few, else batch by batch each time."""
        if len(self.data.calibration) * self.example[0].nbytes <= sizes.KEPT_BYTES:
            return self._kept_calibration
        return batches(self.data.calibration, self.calibration_batch)

    @cached_property
    def _kept_calibration(self) -> list[Tensor]:
        kept = list(batches(self.data.calibration, self.calibration_batch))
        if self.data.calibration.canvases is not None:
            self.data.calibration.canvases.forget()
        return kept

    @cached_property
    def selection(self) -> Selection:
        """The selection images, with what the uncut model answers to them."""
        return Selection(self.data.selection, self.task, partial(forward, self.there), self.progress, self._folder)

    @cached_property
    def doubt(self) -> str | None:
        """A sentence where the uncut model does no better than guessing, as with classes in another order."""
        images, task, parts = self.data.selection, self.task, self.selection.parts
        if parts is None or len(images) < guessing.LEAST_IMAGES:
            return None
        others, elsewhere, start = np.random.default_rng(0).permutation(len(images)), list[Any](), 0
        try:
            value = task.value(parts)
            for part in self.selection.shown():
                rows = others[start : start + len(part)]
                elsewhere += task.parts(arrays(part.answers), task.collate(images.targets(rows)))
                start += len(part)
            guessed = task.value(elsewhere)
        except InputError:  # a metric that says nothing of such a set
            return None
        if not guessing.guesses(task, value, guessed, len(images)):
            return None
        return guessing.doubt(task, value, guessed, task.classes or self.data.classes)

    @cached_property
    def judged_images(self) -> int:
        """Selection images that judge an F1 evaluation: fewer where answers are large (maps of many classes)."""
        return max(1, min(self.effort.search_images, ANSWER_BYTES // self.selection.answer_bytes))
