"""In: a file of weights. Out: its tensors, in the model; nothing that the file may contain is executed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from hirelc_deploy.errors import InputError
from hirelc_deploy.user_code import first_line

WRAPPING_KEYS = ("state_dict", "model_state_dict", "model")  # where checkpoints keep the weights
WRAPPING_PREFIXES = ("module.", "_orig_mod.", "model.")  # DataParallel, torch.compile, training frameworks
SHOWN_KEYS = 3


# Weights


def load_weights(model: nn.Module, file: Path, unused: tuple[str, ...] = ()) -> None:
    """Copy the weights of a file into the model, each of them or none; half precision becomes float32.

    Args:
        unused: Prefixes of tensors that the file may have beside the model's.

    Raises InputError for a file that is missing, broken, not plain tensors, or from another model.
    """
    given = _without_prefix(read_state_dict(file), model)
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in given and not name.endswith("num_batches_tracked")]
    given = {name: value for name, value in given.items() if name in wanted or not name.startswith(unused)}
    unexpected = [name for name in given if name not in wanted]
    shared = [name for name in wanted if name in given]
    reshaped = [name for name in shared if given[name].shape != wanted[name].shape]
    problems = []
    if missing:
        problems.append(f"lacks {_some(f'{name} {tuple(wanted[name].shape)}' for name in missing)}")
    if unexpected:
        problems.append(
            f"has {_some(f'{name} {tuple(given[name].shape)}' for name in unexpected)}, unknown to the model"
        )
    if reshaped:
        both = (f"{name} {tuple(given[name].shape)}, in the model {tuple(wanted[name].shape)}" for name in reshaped)
        problems.append(f"has {_some(both)}")
    if problems:
        raise InputError(f"{file}: not the weights of this model: it {'; it '.join(problems)}.")
    for name in shared:
        if wanted[name].is_floating_point() and not given[name].is_floating_point():
            raise InputError(f"{file}: {name} is {given[name].dtype}; give float weights, quantization is done here.")
        if not given[name].isfinite().all() and name in dict(model.named_parameters()):
            raise InputError(f"{file}: {name} holds NaN or infinity; train or export it again.")
    model.load_state_dict(given, strict=False)


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """Read tensors by name; nothing that such a file may contain is ever executed."""
    if not file.is_file():
        raise InputError(f"{file}: no such weights file.")
    if file.suffix == ".safetensors":
        try:
            tensors: dict[str, Tensor] = safetensors.torch.load_file(file)
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(f"{file}: not a whole safetensors file ({first_line(error)}).") from None
        return tensors
    if file.suffix not in (".pth", ".pt", ".bin"):
        raise InputError(f"{file}: weights are read from .safetensors, .pth, .pt and .bin files.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, which tell the user nothing
            value = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch names no base class for what a broken or hostile file makes it raise
        # Its message is not passed on: it tells how to load the file all the same, which would run what is in it.
        raise InputError(
            f"{file}: refused, it holds more than plain tensors or is broken ({type(error).__name__}); "
            "save model.state_dict(), best as safetensors."
        ) from None
    for key in WRAPPING_KEYS:
        if isinstance(value, Mapping) and isinstance(value.get(key), Mapping):
            value = value[key]
            break
    if not isinstance(value, Mapping) or not value:
        raise InputError(f"{file}: holds a {type(value).__name__}, not a state dict (name to tensor).")
    for name, item in value.items():
        if not isinstance(name, str) or not isinstance(item, Tensor):
            raise InputError(f"{file}: entry {name!r} is a {type(item).__name__}; a state dict maps names to tensors.")
    return dict(value)


def _without_prefix(given: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    wanted = model.state_dict()
    for prefix in WRAPPING_PREFIXES:
        if all(name.startswith(prefix) for name in given) and not any(name.startswith(prefix) for name in wanted):
            given = {name.removeprefix(prefix): value for name, value in given.items()}
    return given


def _some(items: Iterable[str]) -> str:
    listed = list(items)
    more = len(listed) - SHOWN_KEYS
    return ", ".join(listed[:SHOWN_KEYS]) + (f" and {more} more" if more > 0 else "")
