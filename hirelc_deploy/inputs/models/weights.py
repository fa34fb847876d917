"""In: a file of weights. Out: its tensors, in the model; nothing that the file may contain is executed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.models.ordinary import note
from hirelc_deploy.user_code import first_line

USUAL_KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params", "generator")
"""Where checkpoints keep the weights, the likeliest first."""

AVERAGED = re.compile(r"(^|[^a-z])(ema|swa|averaged?|shadow)([^a-z]|$)")
"""What marks averaged weights beside the raw ones, in the name of an entry."""

WRAPPING_PARTS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What data parallelism, torch.compile and checkpointing of activations put into names of tensors."""

DEPTH = 3
"""State dicts are looked for in entries of entries of a checkpoint, no deeper."""

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
"""Files that torch.save wrote."""

SHOWN_KEYS = 3


# Weights


def load_weights(model: nn.Module, file: Path, unused: tuple[str, ...] = (), key: str | None = None) -> None:
    """Copy the weights of a file into the model, each of them or none; half precision becomes float32.

    Of several state dicts in a checkpoint the averaged one is taken, as timm does; a note on the model says which.

    Args:
        unused: Prefixes of tensors that the file may have beside the model's.
        key: The entry that is meant, such as `model_ema`, or the beginning of its tensors' names.

    Raises InputError for a file that is missing, broken, not plain tensors, or from another model.
    """
    given = _chosen(_candidates(file), model, file, key)
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


def read_state_dict(file: Path, key: str | None = None) -> tuple[dict[str, Tensor], str]:
    """Read the tensors that are most likely meant, by name; nothing that such a file may contain is ever executed.

    Returns:
        The tensors, and a sentence where there was a choice, else ``.
    """
    found = _candidates(file)
    if key is not None and key not in found:
        raise InputError(f"{file}: there is no state dict under --weights-key {key}; {_names_of(found)}.")
    chosen = key if key is not None else min(found, key=_rank)
    return found[chosen], _choice(file, chosen, found) if key is None and _is_averaged(chosen) else ""


State = dict[str, Tensor]


def _candidates(file: Path) -> dict[str, State]:
    """Return the state dicts in a file, by the entry that they are under; one that is the whole file is under ``."""
    if not file.is_file():
        raise InputError(f"{file}: no such weights file.")
    if file.suffix == ".safetensors":
        try:
            return {"": safetensors.torch.load_file(file)}
        except Exception as error:  # beside its own error the library raises Python's and torch's
            raise InputError(f"{file}: not a whole safetensors file ({first_line(error)}).") from None
    if file.suffix not in SUFFIXES:
        raise InputError(f"{file}: weights are read from .safetensors, {', '.join(SUFFIXES[:-1])} and {SUFFIXES[-1]}.")
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
    if not isinstance(value, Mapping) or not value:
        raise InputError(f"{file}: holds a {type(value).__name__}, not a state dict (name to tensor).")
    found = dict(_state_dicts(value, "", DEPTH))
    if not found:
        others = [(name, item) for name, item in value.items() if not isinstance(item, Tensor)]
        if len(others) < len(value) and not any("." in str(name) for name, _ in others):
            return {"": {str(name): item for name, item in value.items() if isinstance(item, Tensor)}}
        name, item = others[0] if others else next(iter(value.items()))
        raise InputError(f"{file}: entry {name!r} is a {type(item).__name__}; a state dict maps names to tensors.")
    return found


def _state_dicts(value: Mapping[Any, Any], path: str, depth: int) -> Iterator[tuple[str, State]]:
    """Yield the entries, this one included, that map names to tensors alone."""
    if value and all(isinstance(name, str) and isinstance(item, Tensor) for name, item in value.items()):
        yield path, dict(value)
    for name, item in value.items():
        if isinstance(item, Mapping) and depth:
            yield from _state_dicts(item, f"{path}.{name}" if path else str(name), depth - 1)


def _is_averaged(path: str) -> bool:
    return AVERAGED.search(path.lower()) is not None


def _rank(path: str) -> tuple[bool, int]:
    """Return what is smallest for the entry that is most likely meant."""
    last = path.rpartition(".")[2].lower()
    return not _is_averaged(path), USUAL_KEYS.index(last) if last in USUAL_KEYS else len(USUAL_KEYS)


def _chosen(found: Mapping[str, State], model: nn.Module, file: Path, key: str | None) -> State:
    """Return the state dict that is meant, its names those of the model."""
    wanted = model.state_dict()
    fitting = {
        ".".join(filter(None, (path, prefix))): renamed
        for path, state in found.items()
        for prefix, renamed in _renamed(state, wanted).items()
    }
    whole = {path: state for path, state in fitting.items() if _same_shapes(state, wanted)}
    fitting = whole or fitting
    if key is not None:
        meant = [path for path in fitting if path == key or path.startswith(f"{key}.")]
        if meant:
            return fitting[meant[0]]
        if key in found:
            return _nearest(found[key], wanted)
        raise InputError(
            f"{file}: there are no weights of this model under --weights-key {key}; {_names_of(fitting or found)}."
        )
    if not fitting:
        return _nearest(found[min(found, key=_rank)], wanted)
    first, *others = sorted(fitting, key=_rank)
    if others and _rank(first) == _rank(others[0]):
        raise InputError(
            f"{file}: holds several state dicts of this model: {', '.join(fitting)}; choose one with --weights-key."
        )
    if others:
        note(model, _choice(file, first, fitting))
    return fitting[first]


def _same_shapes(state: State, wanted: State) -> bool:
    return all(state[name].shape == value.shape for name, value in wanted.items() if name in state)


def _choice(file: Path, chosen: str, among: Mapping[str, State]) -> str:
    """Return what a user is told of a choice between state dicts."""
    kind = ", the averaged weights," if _is_averaged(chosen) else ""
    names = ", ".join(name for name in among if name)
    return f"{file.name}: {chosen or 'the whole file'}{kind} is taken; --weights-key chooses among {names}"


def _names_of(found: Mapping[str, State]) -> str:
    names = [name for name in found if name]
    return f"give {' or '.join(names)}" if names else "leave it out: the whole file is one state dict"


def _renamed(state: State, wanted: State) -> dict[str, State]:
    """Return prefix to what is below it, for those under which all tensors of the model are, by the model's names.

    What wrappers put into the names is taken out; a counter of batches may be missing, as older files have none.
    """
    state = _without_wrapping(state, wanted)
    needed = {name for name in wanted if not name.endswith("num_batches_tracked")}
    if not needed:
        return {"": state}
    probe = max(needed, key=len)
    found = {}
    for name in state:
        prefix = name.removesuffix(probe)
        if name.endswith(probe) and (not prefix or prefix.endswith(".")):
            below = {other.removeprefix(prefix): value for other, value in state.items() if other.startswith(prefix)}
            if needed <= below.keys():
                found[prefix.rstrip(".")] = below
    return found


def _nearest(state: State, wanted: State) -> State:
    """Return a state dict that does not fit, under the names that come nearest to the model's, for the error."""
    state = _without_wrapping(state, wanted)
    for prefix in ("model.", "net."):
        if all(name.startswith(prefix) for name in state) and not any(name.startswith(prefix) for name in wanted):
            return {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _without_wrapping(state: State, wanted: State) -> State:
    """Take the parts of names that wrappers put there out, unless the model itself has such names."""
    parts = [part for part in WRAPPING_PARTS if not any(part in name.split(".") for name in wanted)]
    if not any(part in name.split(".") for part in parts for name in state):
        return state
    counters = ("n_averaged",)  # of torch's AveragedModel, beside its `module.`
    return {
        ".".join(step for step in name.split(".") if step not in parts): value
        for name, value in state.items()
        if name not in counters
    }


def _some(items: Iterable[str]) -> str:
    listed = list(items)
    more = len(listed) - SHOWN_KEYS
    return ", ".join(listed[:SHOWN_KEYS]) + (f" and {more} more" if more > 0 else "")
