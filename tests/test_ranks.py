"""Several processes of torchrun, on this machine: what they compute together is what one computes."""

from __future__ import annotations

import copy
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_recovery import Noise, Pictures
from torch import Tensor, nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from hirelc_deploy.compress import devices, recovery
from hirelc_deploy.compress.integer import qat
from hirelc_deploy.compress.recovery import Recovery, Teacher, fine_tune
from hirelc_deploy.config import DataConfig, JobConfig, ModelConfig
from hirelc_deploy.demo.model import DemoNet
from hirelc_deploy.evaluate.effort import Effort
from hirelc_deploy.evaluate.training import teacher_of, weights_of_model
from hirelc_deploy.evaluate.uncut import UncutModel
from hirelc_deploy.jobs.assist import assist, check_others
from hirelc_deploy.jobs.workplace import Given, fitted_of
from hirelc_deploy.progress import Progress
from hirelc_deploy.runs import write_atomic
from hirelc_deploy.together import ranks
from hirelc_deploy.together.processes import DIES_WITH_RAY

QUIET = Progress(quiet=True)
CPU = torch.device("cpu")
READS = {"3": np.arange(8)}


@pytest.fixture(autouse=True)
def processes_can_be_copied() -> None:
    if "ray" in sys.modules and sys.version_info >= DIES_WITH_RAY:
        pytest.skip("in Python 3.13 no process is copied that has worked with Ray, as this one has in another test")


def in_each(work: Callable[[], Any], count: int = 2) -> list[Any]:
    """Return what `work` returns in each of so many copies of this process, which find what torchrun would tell."""
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    found = []
    for number in range(count):
        ours, theirs = context.Pipe()
        told = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        told |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        copy = context.Process(target=_answer, args=(work, theirs, told))
        copy.start()
        theirs.close()
        found.append((ours, copy))
    answers = [_received(ours) for ours, _ in found]
    for _, copy in found:
        copy.join()
    return answers


def _received(connection: Connection) -> Any:
    try:
        return connection.recv() if connection.poll(120) else "no answer in time"
    except EOFError:
        return None


def _answer(work: Callable[[], Any], connection: Any, told: dict[str, Any]) -> None:
    torch.set_num_threads(1)  # a copy of a process has none of its threads
    os.environ.update({name: str(value) for name, value in told.items()})
    try:
        ranks.join()
        connection.send(work())
        ranks.leave()
        assert ranks.count() == 1
    except BaseException as error:
        connection.send(f"{type(error).__name__}: {error}")
    connection.close()
    os._exit(0)  # what the tests' own process does at its end is not for a copy


def network(norm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8) if norm else nn.GroupNorm(2, 8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    ).eval()  # fmt: skip


def student(norm: bool = True) -> nn.Module:
    found = network(norm)
    with torch.no_grad():
        found[3].weight.normal_(0, 0.3)
    return found


def trained(recipe: Recovery, norm: bool, pictures: int = 64, **more: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Return the loss of every step, over all processes, and this process's weights at the end."""
    losses, learn, ended = list[float](), recovery._Training.learn, dict[str, Tensor]()
    whole = recovery.fine_tune

    def noted(self: recovery._Training, step: int, loss: Tensor) -> None:
        mean = loss.detach().clone()
        ranks.average([mean])
        losses.append(float(mean))
        learn(self, step, loss)

    def watched(*given: Any, **options: Any) -> nn.Module:
        model = whole(*given, **options)
        ended.update(model.state_dict())
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovery._Training, "learn", noted)
        patch.setattr(recovery, "fine_tune", watched)
        patch.setattr(recovery, "norms_stand_still", lambda *_: False)
        patch.setattr(devices, "multiplies_bfloat16", lambda _: False)  # which would round sums to three digits
        teacher = Teacher(network(norm), Pictures(pictures), 2, CPU)
        if ranks.number():
            recovery.assist(teacher)
        else:
            recovery.fine_tune(student(norm), teacher, recipe, seed=1, progress=QUIET, **more)
            recovery.dismiss()
    return losses, {name: values.numpy() for name, values in ended.items()}  # type: ignore[misc]


@pytest.mark.parametrize(("norm", "batch", "feature_weight"), [(False, 16, 0.0), (True, 16, 0.01), (True, 15, 0.0)])
def test_two_processes_with_half_a_batch_each_learn_as_one_with_the_whole(norm, batch, feature_weight):
    recipe = Recovery(50 / (64 // batch), batch, 0.05, feature_weight=feature_weight, sync_norms=True)
    work = partial(trained, recipe, norm, reads=READS)
    alone, weights = work()
    first, second = in_each(work)
    assert len(alone) == 50
    assert alone[-1] < alone[0]
    for losses, own in (first, second):
        assert np.abs(np.array(losses) - np.array(alone)).max() < 1e-5
        for name, values in own.items():
            assert np.abs(values - weights[name]).max() < 1e-3


def test_a_network_that_rounds_while_it_is_trained_is_sent_without_its_rounding():
    prepare = partial(qat.install, rounding=qat.Rounding({"3": 7, "7": 7}, {}))
    work = partial(trained, Recovery(2, 16, 0.05), True, as_exported=True, prepare=prepare)
    (alone, _), ((found, _), _) = work(), in_each(work)
    assert np.abs(np.array(found) - np.array(alone)).max() < 1e-5
    (plain, _) = trained(Recovery(2, 16, 0.05), True, as_exported=True)
    assert np.abs(np.array(plain) - np.array(alone)).max() > 1e-4


def test_batch_norms_that_see_their_own_part_end_alike_in_all_processes():
    recipe = Recovery(3.5, 16, 0.05, weights_ema=0.9)
    (losses, first), (_, second) = in_each(partial(trained, recipe, True))
    assert max(np.abs(first[name] - second[name]).max() for name in first) == 0
    assert losses[-1] < losses[0]


def test_a_batch_norm_over_two_processes_is_that_of_the_whole_batch():
    values = torch.randn(10, 3, 4, generator=torch.Generator().manual_seed(0)) * 2 + 1

    def normed(part: Tensor, together: bool) -> list[np.ndarray]:
        norm, part = nn.BatchNorm1d(3), part.clone().requires_grad_()
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([1.0, 2.0, -1.0]))
        with ranks.synchronised_norms(together):
            found = norm(part)
        found.pow(3).sum().backward()
        return [value.detach().numpy() for value in (found, part.grad, norm.running_mean, norm.running_var)]

    def half() -> list[np.ndarray]:
        return normed(values[:7] if ranks.number() == 0 else values[7:], True)

    whole, parts = normed(values, False), in_each(half)
    for index in (0, 1):
        assert np.allclose(np.concatenate([part[index] for part in parts]), whole[index], atol=1e-4)
    for part in parts:
        assert np.allclose(part[2], whole[2], atol=1e-6)
        assert np.allclose(part[3], whole[3], atol=1e-5)


def test_processes_agree_on_means_variances_and_what_the_first_one_says():
    values = torch.arange(7, dtype=torch.float32)

    def agreed() -> tuple[Any, ...]:
        number = ranks.number()
        mine = [torch.full((2,), number + 1.0), torch.tensor(10.0 * number)]
        ranks.average(mine)
        part = values[:4] if number == 0 else values[4:]
        said = ranks.decided(lambda: f"of {number}")
        return [one.tolist() for one in mine], float(ranks.variance(part)), said, ranks.share(np.arange(5)).tolist()

    first, second = in_each(agreed)
    assert first[:3] == second[:3] == ([[1.5, 1.5], 5.0], pytest.approx(float(values.var())), "of 0")
    assert first[3] + second[3] == [0, 1, 2, 3, 4]


def test_one_process_has_nobody_to_ask():
    values = torch.rand(5)
    before = values.clone()
    ranks.join()
    ranks.average([values])
    assert torch.equal(values, before)
    assert ranks.variance(values) == values.var()
    assert (ranks.count(), ranks.number(), ranks.here(), ranks.told("x")) == (1, 0, 1, "x")


# A whole job


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> JobConfig:
    """A small network with seeded weights, and 64 small pictures to train on."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "net.py").write_text(
        "from hirelc_deploy.demo.model import DemoNet\n"
        "def make():\n    return DemoNet((8,), blocks_per_stage=1, num_classes=2)\n"
    )
    torch.manual_seed(0)
    (folder / "w.safetensors").write_bytes(weights_of_model(DemoNet((8,), blocks_per_stage=1, num_classes=2)))
    pixels = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3)).astype(np.uint8)
    for name, first in (("data", 0), ("other", 1)):
        splits = {"train": 64, "calibration": 8, "selection": 8, "test": 8}
        arrays = {f"x_{split}": pixels[:count] + np.uint8(first) for split, count in splits.items()}
        np.savez(folder / name, **arrays, **{f"y_{split}": np.arange(count) % 2 for split, count in splits.items()})
    model = ModelConfig(f"{folder / 'net.py'}:make", str(folder / "w.safetensors"))
    return JobConfig(model, DataConfig(f"npz:{folder / 'data.npz'}"), sync_norms=True)


def job(config: JobConfig) -> dict[str, np.ndarray] | None:
    """Do what a job does about its recovery: the first process leads, the others assist."""
    if ranks.number():
        return assist(config, Given())
    fitted = fitted_of(config, Given())
    check_others(fitted.source, fitted.data)
    uncut = UncutModel(fitted.model, fitted.data, fitted.task, Effort(), QUIET)
    recipe = Recovery(2, 16, sync_norms=True)
    with torch.no_grad():
        found = copy.deepcopy(fitted.model)
        found.fc.weight.mul_(0.5)
    found = fine_tune(found, teacher_of(uncut, uncut.effort), recipe, seed=0, progress=QUIET)
    recovery.dismiss()
    return {name: values.numpy() for name, values in found.state_dict().items()}


def test_an_assisting_process_needs_the_configuration_alone(config: JobConfig):
    alone, (found, nothing) = job(config), in_each(partial(job, config))
    assert nothing is None
    assert alone is not None
    assert alone.keys() == found.keys()
    assert max(np.abs(alone[name] - values).max() for name, values in found.items()) < 1e-3


def test_a_process_that_finds_other_images_says_so(config: JobConfig):
    def work() -> Any:
        others = DataConfig(config.data.spec.replace("data.npz", "other.npz"))
        return job(replace(config, data=others) if ranks.number() else config)

    said = "InputError: torchrun: process 1 finds other images than process 0 under the same name; give all"
    assert in_each(work)[1] == f"{said} hosts the same files."


# What goes wrong


def test_a_batch_that_is_smaller_than_the_processes_are_is_refused():
    answers = in_each(partial(trained, Recovery(1, batch_size=1), True))
    assert set(answers) == {"InputError: recovery: 2 processes cannot share a batch of 1; start fewer."}


def test_a_network_that_cannot_be_sent_is_refused():
    class Local(nn.Sequential):
        pass

    def work() -> None:
        if ranks.number() == 0:
            fine_tune(Local(*network()), Teacher(network(), Pictures(), 2, CPU), Recovery(), seed=0, progress=QUIET)

    said = in_each(work)[0]
    assert said.startswith("InputError: Local cannot be sent to the other processes of torchrun")


def test_where_another_process_ends_one_sentence_says_so():
    def work() -> None:
        if ranks.number():
            os._exit(1)
        for _ in range(3):
            ranks.average([torch.ones(2)])

    said, nothing = in_each(work)
    assert nothing is None
    assert said.startswith("InputError: torchrun: another of its processes ended; what was finished")
    assert "--max-restarts=N torchrun goes on by itself from there" in said


def kept_training(folder: str, dies: bool) -> None:
    """Train with two processes, of which one dies in the second epoch when they are first started."""
    torch.set_num_threads(1)
    ranks.join()
    begun, out = Path(folder) / "begun", Path(folder) / "weights"
    learn = recovery._Training.learn

    def mortal(self: recovery._Training, step: int, loss: Tensor) -> None:
        if dies and step == 6 and ranks.number() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os._exit(1)
        learn(self, step, loss)

    recovery._Training.learn = mortal  # type: ignore[method-assign]  # in this process alone
    teacher = Teacher(network(), Pictures(), 2, CPU)
    if ranks.number():
        recovery.assist(teacher)
        return
    epochs = list[int]()

    def after_epoch(epoch: int, _model: nn.Module, standing: bytes) -> None:
        epochs.append(epoch)
        write_atomic(begun, standing)

    torch.manual_seed(int(os.environ["TORCHELASTIC_RESTART_COUNT"]))
    found = fine_tune(
        nn.Sequential(*student(), Noise()), teacher, Recovery(3, 16, 0.05), seed=1, progress=QUIET, reads=READS,
        begun=begun.read_bytes() if begun.exists() else b"", after_epoch=after_epoch,
    )  # fmt: skip
    recovery.dismiss()
    np.savez(out, epochs=epochs, **{name: values.numpy() for name, values in found.state_dict().items()})


def launched(folder: Path, dies: bool) -> dict[str, np.ndarray]:
    folder.mkdir()
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="kept", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=1, monitor_interval=0.05, start_method="fork", local_addr="localhost",
    )  # fmt: skip
    elastic_launch(config, kept_training)(str(folder), dies)
    return dict(np.load(folder / "weights.npz"))


@pytest.fixture
def plain_environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_a_process_that_dies_costs_nothing_but_the_epoch_it_died_in(tmp_path: Path, plain_environment: None):
    whole, killed = launched(tmp_path / "whole", False), launched(tmp_path / "killed", True)
    assert whole.pop("epochs").tolist() == [1, 2, 3]
    assert killed.pop("epochs").tolist() == [2, 3]
    assert all(np.array_equal(values, killed[name]) for name, values in whole.items())
