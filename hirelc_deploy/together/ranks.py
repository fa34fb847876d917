"""In: processes that torchrun started. Out: who this one is among them, and what they say and compute together.

Everything here is for one process too: then there is nothing to send, and no number changes. Numbers of processes
(ranks) count from 0, which leads: it alone judges, times and writes.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist
from torch.overrides import TorchFunctionMode

from hirelc_deploy.errors import InputError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

WAIT = datetime.timedelta(days=30)
"""Between two recoveries lie hours in which the others have nothing to do."""

ANSWER = datetime.timedelta(seconds=1)
"""Processes answer each other in milliseconds, once both are there."""

_joined = False


def join() -> None:
    """Connect to the other processes of torchrun, where it started this one.

    Raises:
        InputError: There are more processes on this machine than GPUs.
    """
    global _joined
    if _joined or not _by_torchrun() or int(os.environ["WORLD_SIZE"]) == 1:
        return
    from torch.distributed.rendezvous import rendezvous  # which not every build of torch has

    gpus, here = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if gpus and here > gpus:
        raise InputError(f"torchrun: {here} processes on a machine of {gpus} GPUs; give --nproc-per-node={gpus}.")
    if gpus:
        torch.cuda.set_device(device())
    store, rank, world = next(rendezvous("env://", timeout=WAIT))
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, store=_own_part(store, rank, world), rank=rank, world_size=world, timeout=WAIT)
    _joined = True


def _by_torchrun() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched()


def _own_part(store: Store, rank: int, world: int) -> Store:
    """Return a part of a store that no earlier start of these processes has used.

    Torchrun (torch 2.13) keeps one store through its restarts, and with it addresses of processes that are gone.
    """
    from torch.distributed.distributed_c10d import PrefixStore

    own = uuid.uuid4().hex
    if rank:
        store.set(f"number {rank}", own)
        leading = store.get(f"seen {own}").decode()
        store.set(f"heard {own} {leading}", "")
        return PrefixStore(leading, store)
    for other in range(1, world):
        while True:
            found = store.get(f"number {other}").decode()
            store.set(f"seen {found}", own)
            try:
                store.wait([f"heard {found} {own}"], ANSWER)
                break
            except dist.DistStoreError:  # of one that is gone, or slow
                continue
    return PrefixStore(own, store)


def leave() -> None:
    """Be one process again."""
    global _joined
    if _joined:
        dist.destroy_process_group()
    _joined = False


def count() -> int:
    """Return how many processes there are."""
    return dist.get_world_size() if _joined else 1


def number() -> int:
    """Return the number of this process."""
    return dist.get_rank() if _joined else 0


def here() -> int:
    """Return how many of the processes are on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if _joined else 1


def device() -> torch.device:
    """Return where this process computes: its own GPU, where there are any."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if _by_torchrun() else torch.device("cuda")


def share(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return this process's part of a batch; the parts of all processes, in order, are the batch."""
    return np.array_split(rows, count())[number()]


def told(value: T) -> T:
    """Return what process 0 calls this with; what the others give is not looked at.

    It is sent as a pickle, between processes that one person started with one command.
    """
    if count() == 1:
        return value
    values = [value]
    with _while_all_are_there():
        dist.broadcast_object_list(values, 0, device=torch.device("cpu"))
    return values[0]


def decided(decide: Callable[[], T]) -> T:
    """Return what process 0 decides: rounding may let others come to another end."""
    if number():
        return told(None)  # type: ignore[return-value]
    return told(decide())


@torch.no_grad()
def average(tensors: Iterable[Tensor]) -> None:
    """Replace float tensors, which have the same shapes in all processes, by their means over them."""
    given = list(tensors)
    if count() == 1 or not given:
        return
    flat = _summed(torch.cat([tensor.reshape(-1).float() for tensor in given])) / count()
    for tensor, mean in zip(given, flat.split([tensor.numel() for tensor in given]), strict=True):
        tensor.copy_(mean.view_as(tensor))


@torch.no_grad()
def variance(values: Tensor) -> Tensor:
    """Return the variance of numbers of which each process has a part."""
    if count() == 1:
        return values.var()
    sum_, numbers = _summed(torch.stack([values.sum(), values.new_tensor(values.numel())])).unbind()
    return _summed((values - sum_ / numbers).square().sum()) / (numbers - 1)


def _summed(values: Tensor) -> Tensor:
    """Return the sums over processes; `values` is theirs to change."""
    with _while_all_are_there():
        dist.all_reduce(values)
    return values


@contextlib.contextmanager
def _while_all_are_there() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):  # whose errors have no type of their own
            raise
        raise InputError(
            "torchrun: another of its processes ended; what was finished is kept. With --max-restarts=N torchrun goes "
            "on by itself from there; else run the same again."
        ) from error


# Batch norm over the parts of all processes


def synchronised_norms(wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """Return a region in which batch norms that are trained see the whole batch, where that is wanted."""
    return _SynchronisedNorms() if wanted and count() > 1 else contextlib.nullcontext()


class _SynchronisedNorms(TorchFunctionMode):
    """Torch's own synchronised norm works on GPUs alone, and not in subclasses such as timm's."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if function is F.batch_norm and (given.get("training") or (len(args) > 5 and args[5])):
            return _batch_norm(*args, **given)
        return function(*args, **given)


def _batch_norm(
    values: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Return what `torch.nn.functional.batch_norm` does to the whole batch, of which `values` are a part."""
    dims = [dim for dim in range(values.ndim) if dim != 1]
    shape = [1, -1] + [1] * (values.ndim - 2)
    rows = values.new_tensor([values.numel() // values.shape[1]], dtype=torch.float32)
    parts = _total(torch.cat([values.float().sum(dims), rows]))
    count = parts[-1].detach()
    mean = parts[:-1] / count
    centred = values.float() - mean.view(shape)
    var = _total(centred.square().sum(dims)) / count
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_((var * count / (count - 1).clamp(min=1)).to(running_var), momentum)
    found = centred * (var + eps).rsqrt().view(shape)
    if weight is not None:
        found = found * weight.view(shape)
    if bias is not None:
        found = found + bias.view(shape)
    return found.to(values.dtype)


def _total(values: Tensor) -> Tensor:
    found: Tensor = _Sum.apply(values)  # type: ignore[no-untyped-call]
    return found


class _Sum(torch.autograd.Function):
    """The sum over processes; what flows back into it is summed too, as every process uses it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _summed(values.clone())

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return _summed(slope.clone(memory_format=torch.contiguous_format))
