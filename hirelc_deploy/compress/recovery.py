"""In: a cut model, the uncut one and images. Out: the cut model with as much of its accuracy back as was asked for.

Three steps, cheap first: closed-form compensation (no gradient), re-estimated batch-norm statistics, fine-tuning with
distillation from the uncut model (Hinton et al. 2015).
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor, nn

from hirelc_deploy.compress.devices import CPU, half_precision, laid_out
from hirelc_deploy.compress.features import FeatureMatch
from hirelc_deploy.compress.norms import NORM, norms_of
from hirelc_deploy.compress.row_file import RowFile
from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.answers import Answers, named
from hirelc_deploy.graph.model_graph import ModelGraph
from hirelc_deploy.graph.rules import CONVOLUTIONS
from hirelc_deploy.graph.sensitivity import Gram
from hirelc_deploy.inputs.data.images import Images
from hirelc_deploy.inputs.data.loader import Wanted, loaded
from hirelc_deploy.progress import Progress
from hirelc_deploy.tasks.classification import CLASSIFICATION
from hirelc_deploy.tasks.contract import Targets, Task, on_device
from hirelc_deploy.time_left import TRAINING_STEP
from hirelc_deploy.together import ranks

LIKE = 3.0
"""Batch statistics may move the uncut model by so many times what the cut moves it by; beyond, norms stand still.

The demo network: 1.1 times (a cut of 0.060 nats ends at 0.021, at 0.028 with norms that stand still), 0.04 times (1.49
nats: 0.39, 0.51); the road scenes of CamVid: 0.9 times (0.020: 0.019, 0.034); SSD-MobileNetV2 on blood cells, all of
one colour: 6.6 times (0.048: 0.180, 0.040)."""
LIKE_BATCHES = 4

STILL_RATE = 0.3
"""Of the learning rate where norms stand still: nothing scales what a step changes back. A small regression, RMSE lost
after one epoch at the whole rate, 0.3 and 0.1 of it: 0.191, 0.057, 0.020; blood cells, divergence after four: 0.035,
0.040, 0.042."""

DENSE = 1000
"""Numbers in the answer to one image, at places of it, from which answers teach without features. Divergence, metric:
CamVid's road scenes 0.019, mIoU .645 without and 0.022, .631 with them after two epochs; blood cells 0.035, AP50 .857
and 0.040, .835 after four; and an epoch takes two thirds of the time."""

MAP_BATCH = 8
"""Pictures of a batch where the answer is a map: each says as much as many. CamVid's road scenes, divergence after six
epochs of 8 and of 32 pictures: 0.0162 and 0.0175 on the film that is trained on, 0.0220 and 0.0234 on one left out."""

RIDGE = 1e-3
"""Added to the covariance of the kept features, as a share of their mean variance: keeps the solve stable."""


def compensate(
    model: nn.Module, graph: ModelGraph, kept: Mapping[str, NDArray[np.int64]], grams: Mapping[str, Gram]
) -> nn.Module:
    """Return a full-size copy whose readers make up, linearly, for the features they are about to lose.

    For a reader with input x, kept features S and covariance C, the best affine guess of x from x_S is
    mean + A (x_S - mean_S) with A = C[:, S] C[S, S]^-1. Weights become W A on S, and a bias takes what is constant.
    A convolution without bias leaves the constant to the batch norm behind it (`reestimate_norms`).

    Args:
        kept: Unit name to the ascending indices of its kept elements; units not named stay whole.
        grams: First and second moments of each reader's input features in the uncut model.
    """
    result = copy.deepcopy(model)
    removed: dict[str, list[NDArray[np.int64]]] = {}
    for unit in graph.units:
        if unit.name not in kept or len(kept[unit.name]) in (0, unit.size):  # without elements its readers go too
            continue
        gone = np.setdiff1d(np.arange(unit.size), kept[unit.name])
        for reader in unit.readers:
            removed.setdefault(reader.layer, []).append(reader.index[gone].ravel())
    modules = dict(result.named_modules())
    for name, parts in removed.items():
        layer = modules[name]
        if isinstance(layer, (*CONVOLUTIONS, nn.Linear)) and getattr(layer, "groups", 1) == 1:
            _fold(layer, grams[name], np.concatenate(parts))
    return result


@torch.no_grad()
def _fold(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear, gram: Gram, gone: NDArray[np.int64]) -> None:
    weight = layer.weight
    stay = np.setdiff1d(np.arange(len(gram.mean)), gone)
    here, there = (torch.from_numpy(places).to(weight.device) for places in (stay, gone))
    mean = torch.from_numpy(gram.mean).to(weight.device)
    covariance = torch.from_numpy(gram.second_moment).to(weight.device) - torch.outer(mean, mean)
    inner, across = covariance[here][:, here], covariance[here][:, there]
    inner.diagonal().add_(RIDGE * inner.trace() / len(stay) + 1e-12)
    guess = torch.linalg.solve(inner, across).T  # (gone, stay): gone features from the kept ones
    lost = weight[:, there]
    constant = (mean[there] - guess @ mean[here]).to(weight)
    weight[:, here] += torch.einsum("og...,gs->os...", lost, guess.to(weight))
    weight[:, there] = 0
    if layer.bias is not None:
        layer.bias += torch.einsum("og...,g->o", lost, constant)


DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True)
class Recovery:
    """How much fine-tuning a cut model gets.

    Attributes:
        epochs: Passes over the training split; may be a fraction.
        learning_rate: Peak of the schedule (linear warm-up over the first 5 %, cosine to zero).
        soft_weight: Share of the distillation term in the loss; the rest is the task's loss against the labels.
        temperature: Of the distillation, where answers are distributions.
        feature_weight: Weight of matching what the teacher's layers read (Romero et al. 2015, FitNets); 0 for answers
            alone. KL divergence on the selection split at weights of 30, 100, 300 and 1000: 0.037, 0.028, 0.027, 0.027
            for ResNet-18 cut to a sixteenth of its time, 0.4 epochs of CIFAR-10. The demo needs half as many epochs.
        views: Distinct augmented pictures of each image where the teacher's answers to them are kept; elsewhere every
            epoch has its own.
        weights_ema: Decay per step of the averaged weights that are kept at the end; 0 keeps the last ones.
        asked_batch: Images of one step where the user says it, else `batch_size`. The learning rate is meant for the
            usual batch and grows with it: in proportion for SGD (Goyal et al. 2017, section 2.1), with its root for
            AdamW (Malladi et al. 2022).
        sync_norms: Batch norms see the whole batch where several processes share it; else each sees its part.
    """

    epochs: float = 1.0
    batch_size: int = 64
    learning_rate: float = 0.01
    weight_decay: float = 5e-4
    soft_weight: float = 0.7
    temperature: float = 2.0
    feature_weight: float = 300.0
    views: int = 8
    weights_ema: float = 0.0
    asked_batch: int | None = None
    sync_norms: bool = False


class Teacher:
    """The uncut model's answers to augmented pictures, computed once per picture: it costs more than its student."""

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        views: int,
        device: torch.device,
        task: Task = CLASSIFICATION,
        folder: Path | None = None,
    ) -> None:
        """Args: `folder` is where answers are kept; see `RowFile`."""
        self.model = laid_out(copy.deepcopy(model).eval().requires_grad_(False), device)
        self.images = images
        self.views = views
        self.device = device
        self.task = task
        self._kept = RowFile(len(images), folder)

    def answers(self, rows: NDArray[np.int64], view: int, pictures: Tensor, *, afresh: bool = False) -> Answers:
        """Return the answers to `pictures`, which are view `view` of the images at `rows`.

        Args:
            afresh: Run the model even where its answer is known, and keep nothing.
        """
        known = None if afresh else self._kept.get(rows, view)
        if known is not None:
            return {name: values.to(self.device) for name, values in known.items()}
        with torch.no_grad(), half_precision(self.device):
            fresh = _answers(self.model, pictures)
        if not afresh:
            self._kept.keep(rows, view, fresh)
        return fresh

    @property
    def dense(self) -> bool:
        """Whether one answer says much at many places, as maps and candidates do."""
        return any(len(shape) > 1 and math.prod(shape) >= DENSE for shape in self._shapes)

    @property
    def maps(self) -> bool:
        """Whether one answer says much at many pixels."""
        return any(len(shape) == 3 and math.prod(shape) >= DENSE for shape in self._shapes)

    @cached_property
    def _shapes(self) -> list[torch.Size]:
        picture = self.images.views(np.arange(1), 0).to(self.device, memory_format=torch.channels_last)
        with torch.no_grad():
            return [values.shape[1:] for values in named(self.model(picture)).values()]

    def batches(self, wanted: Iterable[Wanted]) -> Generator[tuple[Wanted, Tensor, Targets | None], None, None]:
        """Yield what was wanted, the pictures, and what is true of them, collated by the task; None without labels."""
        for batch in loaded(self.images, wanted, targets=self.images.labelled, device=self.device, again=True):
            pictures = batch.pictures.contiguous(memory_format=torch.channels_last)
            known = batch.targets
            targets = None if known is None else on_device(self.task.collate(known), self.device)
            yield batch.wanted, pictures, targets


AfterEpoch = Callable[[int, nn.Module, bytes], None]
Watch = Callable[[int, Mapping[str, float]], None]

PAUSED_EMA = 0.95
"""Decay per step of the averaged weights by which a training that pauses is judged."""


@dataclass(frozen=True)
class Pause:
    """Where a training stops for a while.

    Attributes:
        share: Of all its steps.
        keep: Given all that is needed to go on from there.
    """

    share: float
    keep: Callable[[bytes], object] = bytes


def assist(teacher: Teacher) -> None:
    """Take part in every training that process 0 begins, until it calls `dismiss`."""
    while (asked := ranks.told(None)) is not None:
        student, recovery, options = asked
        fine_tune(student, teacher, recovery, progress=Progress(quiet=True), **options)


def dismiss() -> None:
    """Let the processes go that wait in `assist`."""
    ranks.told(None)


def _begin(student: nn.Module, recovery: Recovery, batch_size: int, pause: Pause | None, **options: Any) -> None:
    """Have the other processes train the same, where this is the one that leads, and prepare the student in each."""
    if ranks.number() == 0:
        try:
            ranks.told((student, recovery, {**options, "pause": pause and Pause(pause.share)}))
        except InputError:
            raise
        except Exception as error:  # of somebody's own class: anything can come out of it
            raise InputError(
                f"{type(student).__name__} cannot be sent to the other processes of torchrun ({error}); define what it "
                "is made of at the top of a module, or run without torchrun."
            ) from None
    if batch_size < ranks.count():
        raise InputError(f"recovery: {ranks.count()} processes cannot share a batch of {batch_size}; start fewer.")
    if options["prepare"] is not None:
        options["prepare"](student)


def fine_tune(
    student: nn.Module,
    teacher: Teacher,
    recovery: Recovery,
    *,
    seed: int,
    progress: Progress,
    name: str = "recovery",
    reads: Mapping[str, NDArray[np.int64]] = MappingProxyType({}),
    as_exported: bool = False,
    prepare: Callable[[nn.Module], object] | None = None,
    begun: bytes = b"",
    after_epoch: AfterEpoch = lambda epoch, student, standing: None,
    watch: Watch = lambda step, scalars: None,
    pause: Pause | None = None,
) -> nn.Module:
    """Train `student` in place to answer like the teacher and return it in eval mode, on the CPU.

    Convolutional networks with batch norm get SGD with Nesterov momentum, others AdamW at a tenth of the learning
    rate. Batch norm keeps running statistics as usual, unless `as_exported`, or unless the statistics of these batches
    say something else than those that it has (`norms_stand_still`); then steps are smaller (`STILL_RATE`). Features are
    matched where answers are not `dense`.

    Where torchrun started several processes, this is for the one that leads. The others, which wait in `assist`, take
    part: each batch is shared out, and gradients are averaged.

    Args:
        reads: Layer name to the features of its uncut input that the student still has (`kept_inputs`).
        as_exported: Let batch norm compute with the statistics that it has, and all in float32, as the file will.
        prepare: Changes the student in place before it is trained, wherever that is: what cannot be sent to others.
        begun: What `after_epoch` was last given of an interrupted training of this kind; the result is that of an
            undisturbed one.
        after_epoch: Called after every whole epoch with its number from 1, the student in eval mode, and all that is
            needed to go on from there.
        watch: Called every 20 steps with the number of the step, and its loss and learning rate by name.
        pause: Where to stop before the end; what comes back then has averaged weights, since the learning rate is high.
    """
    images, device = teacher.images, teacher.device
    if len(images) < 2:
        raise InputError(f"recovery: the training split has {len(images)} images; fine-tuning needs at least 2.")
    batch_size, per_epoch = batches_of(teacher, recovery)
    options = {"seed": seed, "reads": dict(reads), "as_exported": as_exported, "prepare": prepare, "begun": begun}
    _begin(student, recovery, batch_size, pause, **options)
    steps = steps_of(recovery, per_epoch)
    student = laid_out(student, device)
    still_norms = as_exported or ranks.decided(lambda: norms_stand_still(student, teacher, batch_size))
    student = _in_training(student, still_norms)
    optimizer = _optimizer(student, recovery)
    rate = _growth(optimizer, batch_size / _usual_batch(teacher, recovery))
    rate *= STILL_RATE if still_norms and not as_exported else 1.0
    decay = recovery.weights_ema or (PAUSED_EMA if pause else 0.0)
    averaged = copy.deepcopy(student) if decay else None
    match = FeatureMatch(student, teacher.model, reads if recovery.feature_weight and not teacher.dense else {})
    afresh = match.watches or teacher.dense  # features are not kept, and dense answers would take much room
    training = _Training(steps, student, averaged, decay, optimizer, rate, match.variances)
    first = training.resume(begun) if begun else 0
    training.agree()
    last = steps if pause is None else max(1, min(steps, round(pause.share * steps)))
    order = _order(len(images), batch_size, steps, seed, views=None if afresh else teacher.views)
    counted = progress.track(range(first, last), name, max(0, last - first), kind=TRAINING_STEP)
    shared = (
        replace(batch, rows=ranks.share(batch.rows)) for batch in itertools.islice(order, first, max(first, last))
    )
    with contextlib.closing(teacher.batches(shared)) as arriving:
        for step, (wanted, pictures, targets) in zip(counted, arriving, strict=True):
            # A process has other rows of a view each time, so what it kept would hardly ever be all that it needs.
            answers = teacher.answers(wanted.rows, wanted.view, pictures, afresh=afresh or ranks.count() > 1)
            precision = contextlib.nullcontext() if as_exported else half_precision(device)
            with precision, ranks.synchronised_norms(recovery.sync_norms):
                found = _answers(student, pictures)
            loss = distillation_loss(teacher.task, found, answers, targets, recovery)
            if match.watches:
                loss = loss + recovery.feature_weight * match.distance()
            loss = loss * (len(wanted.rows) * ranks.count() / batch_size)  # 1 where the parts are equal
            training.learn(step, loss)
            if step % 20 == 0:
                loss = loss.detach()
                ranks.average([loss])
                progress.note(f"loss {loss.item():.3f}")
                watch(step, {"loss": loss.item(), "learning rate": optimizer.param_groups[0]["lr"]})
            if (step + 1) % per_epoch == 0:
                training.agree()
                after_epoch((step + 1) // per_epoch, student.eval(), training.standing(step + 1))
                _in_training(student, still_norms)
    match.close()
    training.agree()
    if pause is not None:
        pause.keep(training.standing(max(first, last)))
    result = averaged or student
    return laid_out(result, CPU, torch.contiguous_format).eval()


def batches_of(teacher: Teacher, recovery: Recovery) -> tuple[int, int]:
    """Return the images of one batch, and the batches of one epoch."""
    batch_size = min(recovery.asked_batch or _usual_batch(teacher, recovery), len(teacher.images))
    return batch_size, len(teacher.images) // batch_size


def _usual_batch(teacher: Teacher, recovery: Recovery) -> int:
    return min(MAP_BATCH if teacher.maps else recovery.batch_size, len(teacher.images))


def _growth(optimizer: torch.optim.Optimizer, batches: float) -> float:
    """Return the factor of the learning rate where a step has so many times the images of the usual one."""
    return batches if isinstance(optimizer, torch.optim.SGD) else math.sqrt(batches)


def steps_of(recovery: Recovery, per_epoch: int) -> int:
    """Return the steps of a whole recovery."""
    return max(1, round(recovery.epochs * per_epoch))


def _order(count: int, batch_size: int, steps: int, seed: int, views: int | None) -> Iterator[Wanted]:
    """Yield what each step is trained on; every epoch has an order of its own, and one of so many `views` in turn."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        epoch, position = divmod(step, count // batch_size)
        if position == 0:
            order = torch.randperm(count, generator=generator).numpy()
        yield Wanted(order[position * batch_size : (position + 1) * batch_size], epoch % views if views else epoch)


@torch.no_grad()
def norms_stand_still(student: nn.Module, teacher: Teacher, batch_size: int) -> bool:
    """Return whether batch norms should compute with the statistics that they have while this student is trained.

    So they should where the uncut model, left to the statistics of the training's batches, is moved further from its
    own answers than by the cut (more than `LIKE` times as far): the student would first unlearn what it knows. Small
    batches do that, pictures that are all alike, and networks that were trained with norms frozen.
    """
    if not norms_of(student):
        return False
    by_batch = copy.deepcopy(teacher.model)
    for norm in norms_of(by_batch):
        norm.train()
    order = torch.randperm(len(teacher.images), generator=torch.Generator().manual_seed(0)).numpy()
    moved = cut = 0.0
    whole = len(order) // batch_size * batch_size
    for rows in order[:whole].reshape(-1, batch_size)[:LIKE_BATCHES]:
        pictures = teacher.images.views(rows, 0).to(teacher.device, memory_format=torch.channels_last)
        wanted = teacher.answers(rows, 0, pictures, afresh=True)
        moved += float(teacher.task.divergence(wanted, _answers(by_batch, pictures)).sum())
        cut += float(teacher.task.divergence(wanted, _answers(student.eval(), pictures)).sum())
    return moved > LIKE * cut


def _answers(model: nn.Module, pictures: Tensor) -> Answers:
    return {name: values.float() for name, values in named(model(pictures)).items()}


def _in_training(student: nn.Module, still_norms: bool) -> nn.Module:
    """Put a student in training mode, but leave drop-out off: it hides what student and teacher should have in common.

    VGG-16 with drop-out behind every layer, cut uniformly to about a ninth of its parameters: 38 % of 1,000 selection
    images; after 100 steps with drop-out 19 % (48 % with `feature_weight` 0), without it 79 % (76 %).

    What is trained stays so: a network's own `train` may freeze a part of it.
    """
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    student.train()
    for parameter in trained:
        parameter.requires_grad_(True)
    for module in student.modules():
        still = isinstance(module, NORM) and still_norms
        if still or isinstance(module, DROPOUTS):
            module.eval()
    return student


@dataclass
class _Training:
    """What changes while a student is trained.

    Attributes:
        steps: Of the whole training.
        decay: Of the averaged weights, per step.
        rate: Of the optimizer's learning rates, what the schedule reaches.
        variances: Of what the teacher's layers read; see `FeatureMatch`.
    """

    steps: int
    student: nn.Module
    averaged: nn.Module | None
    decay: float
    optimizer: torch.optim.Optimizer
    rate: float
    variances: dict[str, Tensor]

    def __post_init__(self) -> None:
        self._peaks = [self.rate * group["lr"] for group in self.optimizer.param_groups]

    def learn(self, step: int, loss: Tensor) -> None:
        """Move the student by one step against the slopes of a loss."""
        scale = min(1.0, (step + 1) / max(1.0, 0.05 * self.steps)) * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * scale
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        ranks.average(weight.grad for weight in self.student.parameters() if weight.grad is not None)
        nn.utils.clip_grad_norm_(self.student.parameters(), 5.0)
        self.optimizer.step()
        if self.averaged is not None:
            _average(self.averaged, self.student, min(self.decay, (step + 1) / (step + 10)))

    def agree(self) -> None:
        """Let all processes stand at the same: each has seen its own part of the batches, and drawn its own numbers."""
        if ranks.count() == 1:
            return
        models = [model for model in (self.student, self.averaged) if model is not None]
        ranks.average(buffer for model in models for buffer in model.buffers() if buffer.is_floating_point())
        torch.set_rng_state(ranks.told(torch.get_rng_state()))

    def standing(self, done: int) -> bytes:
        """Return where it stands after so many steps: weights, the optimizer's memory, the random generator's state."""
        averaged = self.averaged.state_dict() if self.averaged is not None else {}
        parts = {f"student {key}": value for key, value in self.student.state_dict().items()}
        parts |= {f"averaged {key}": value for key, value in averaged.items()}
        for index, parameter in enumerate(self.student.parameters()):
            memory = self.optimizer.state.get(parameter, {})
            parts |= {f"optimizer {index} {key}": value for key, value in memory.items() if value is not None}
        parts |= {f"variance {key}": value for key, value in self.variances.items()}
        parts |= {"steps": torch.tensor([done, self.steps]), "random": torch.get_rng_state()}
        return bytes(save({key: value.detach().cpu().clone().contiguous() for key, value in parts.items()}))

    def resume(self, standing: bytes) -> int:
        """Put everything back as `standing` found it; return the steps done, 0 if the length is another."""
        parts = load(standing)
        done, planned = parts.pop("steps").tolist()
        if planned != self.steps:
            return 0
        torch.set_rng_state(parts.pop("random"))
        parameters = list(self.student.parameters())
        for model, word in ((self.student, "student "), (self.averaged, "averaged ")):
            if model is not None:
                model.load_state_dict({k.removeprefix(word): v for k, v in parts.items() if k.startswith(word)})
        for key, value in parts.items():
            kind, _, rest = key.partition(" ")
            if kind == "variance":
                self.variances[rest] = value.to(parameters[0].device)
            elif kind == "optimizer":
                index, _, name = rest.partition(" ")
                parameter = parameters[int(index)]
                # In the layout of the parameter: another would be as right and slower.
                same = value.shape == parameter.shape
                kept = torch.empty_like(parameter.data).copy_(value) if same else value
                self.optimizer.state[parameter][name] = kept
        return int(done)


def distillation_loss(
    task: Task, found: Answers, wanted: Answers, targets: Targets | None, recovery: Recovery
) -> Tensor:
    """Return soft_weight * divergence at the temperature + (1 - soft_weight) * the task's loss, both means over images.

    Without targets the divergence stands alone.
    """
    soft = task.divergence(wanted, found, recovery.temperature).mean()
    if targets is None:
        return soft
    return recovery.soft_weight * soft + (1 - recovery.soft_weight) * task.loss(found, targets).mean()


def _optimizer(model: nn.Module, recovery: Recovery) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    if any(isinstance(m, NORM) for m in model.modules()):
        groups = [{"params": matrices, "weight_decay": recovery.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.SGD(groups, recovery.learning_rate, momentum=0.9, nesterov=True)
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, recovery.learning_rate / 10, betas=(0.9, 0.98))


@torch.no_grad()
def _average(averaged: nn.Module, student: nn.Module, decay: float) -> None:
    for mean, value in zip(averaged.state_dict().values(), student.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - decay)
        else:
            mean.copy_(value)
