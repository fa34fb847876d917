"""In: a model and a device. Out: the model there, as it runs fastest."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

CPU = torch.device("cpu")


def at(model: nn.Module, device: torch.device) -> nn.Module:
    """Return a model on a device: itself where it is there, else a copy, laid out for it."""
    if device_of(model) == device:
        return model
    return laid_out(copy.deepcopy(model), device, _layout(device))


def device_of(model: nn.Module) -> torch.device:
    """Return where a model's weights are; the CPU where it has none."""
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), CPU)


def laid_out(
    model: nn.Module, device: torch.device, memory_format: torch.memory_format = torch.channels_last
) -> nn.Module:
    """Move a model to a device; convolutions run fastest with the channels last."""
    for tensor in (*model.to(device).parameters(), *model.buffers()):
        if tensor.ndim == 4:  # torch refuses this layout for weights of three dims
            tensor.data = tensor.data.contiguous(memory_format=memory_format)
    return model


def sent(pictures: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Yield batches of (n, channels, height, width) pictures on a device."""
    for batch in pictures:
        yield batch if batch.device == device else batch.to(device, memory_format=_layout(device))


def _layout(device: torch.device) -> torch.memory_format:
    return torch.contiguous_format if device == CPU else torch.channels_last


def half_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Return a bfloat16 region where the device multiplies bfloat16 in hardware, else one that changes nothing."""
    return torch.autocast(device.type, torch.bfloat16) if multiplies_bfloat16(device) else contextlib.nullcontext()


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether bfloat16 products are faster than float32 ones here."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
