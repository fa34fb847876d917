"""In: a file of weights. Out: its tensors, in the model; nothing that the file may contain is executed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.models.ordinary import note
from hirelc_deploy.inputs.models.pickled import Inert, name_of, read_pickled
from hirelc_deploy.user_code import first_line

USUAL_KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params", "generator")
"""Where checkpoints keep the weights, the likeliest first."""

AVERAGED = re.compile(r"(^|[^a-z])(ema|swa|averaged?|averaging|avg|polyak|shadow)([^a-z]|$)")
"""What marks averaged weights beside the raw ones, in the name of an entry."""

WRAPPING_PARTS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What data parallelism, torch.compile and checkpointing of activations put into names of tensors."""

COUNTERS = ("n_averaged", "steps", "step", "decay", "num_updates", "initted", "total_ops", "total_params")
"""What averaging and counters of operations (thop) leave beside the weights; nothing is computed with it."""

QUANTIZERS = re.compile(
    r"(^|\.)(activation_post_process\w*|\w*_fake_quant|fake_quant_\w+|pre_ops|external_quantizers)\."
)
"""Names of what quantization-aware training in torch and NNCF keeps beside float weights."""

ADAPTERS = re.compile(r"(^|\.)(lora_\w+|hada_w\d\w*|base_layer)(\.|$)")
"""Names of what peft and others put beside or around weights; it changes what the network computes."""

DEPTH = 3
"""State dicts are looked for in entries of entries of a checkpoint, no deeper."""

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".pkl")
"""Files that torch.save wrote."""

SAFETENSORS = ".safetensors"

BEGUN = torch.tensor(1)
"""Models that an average was made of, where a file does not count them; before the first there is no average."""

ZIP = b"PK"

STRANGERS = {b"version https://git-lfs": "a pointer of Git LFS; fetch the file with `git lfs pull`", b"<": "a web page"}
"""How files begin that are there in place of weights, and what they are."""

SHOWN_KEYS = 3

NEAR = 3
"""A file is near a model where more than one of so many names are the same."""


# Weights


def load_weights(model: nn.Module, file: Path, unused: tuple[str, ...] = (), key: str | None = None) -> None:
    """Copy the weights of a file into the model, each of them or none; half precision becomes float32.

    Of several state dicts in a checkpoint the averaged one is taken, as timm does; a note on the model says which.

    Args:
        unused: Prefixes of tensors that the file may have beside the model's.
        key: The entry that is meant, such as `model_ema`, or the beginning of its tensors' names.

    Raises InputError for a file that is missing, broken, not plain tensors, or from another model.
    """
    wanted = model.state_dict()
    found = _candidates(file)
    if key is None:
        _refuse_adapters(file, [name for state in found.values() for name in state if name not in wanted])
    given = _without_left_behind(_chosen(found, model, file, key), model, file)
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
        given[name] = _float_values(given[name], wanted[name], f"{file}: {name}")
        if not given[name].isfinite().all() and name in dict(model.named_parameters()):
            raise InputError(f"{file}: {name} holds NaN or infinity; train or export it again.")
    model.load_state_dict(given, strict=False)


def _float_values(value: Tensor, wanted: Tensor, where: str) -> Tensor:
    """Return a tensor in a form that can be looked at and copied; raises InputError where it holds no float weights."""
    if value.is_meta:
        raise InputError(f"{where} has no values (device meta); save the model with its real tensors.")
    if wanted.is_floating_point() and not value.is_floating_point():
        raise InputError(f"{where} is {value.dtype}; give float weights, quantization is done here.")
    dense = value if value.layout == torch.strided else value.to_dense()
    return dense.float() if dense.is_floating_point() and dense.dtype != torch.float64 else dense


def _without_left_behind(given: State, model: nn.Module, file: Path) -> State:
    """Return the state dict without what training tools left in it that is no weight, which a note on the model says.

    Raises InputError where it is what the network needs: adapters beside the weights, or integers in their place.
    """
    wanted = model.state_dict()
    more = [name for name in given if name not in wanted]
    _refuse_adapters(file, more)
    if integer := [name for name, value in given.items() if value.is_quantized]:
        raise InputError(f"{file}: is quantized already ({_some(integer)}); give its float weights.")
    quantizers = [name for name in more if QUANTIZERS.search(name)]
    if quantizers:
        note(
            model,
            f"{file.name}: scales of quantization-aware training ({_some(quantizers)}) are left out; "
            "the float weights beside them are taken",
        )
    counters = [name for name in more if name.rpartition(".")[2] in COUNTERS and given[name].numel() == 1]
    shapes = {(_bare(name), value.shape) for name, value in wanted.items()}
    copies = [
        name
        for name in more
        if _is_averaged(name) and any((_bare(name)[at:], given[name].shape) in shapes for at in range(len(name)))
    ]
    left = {*quantizers, *counters, *copies}
    return {name: value for name, value in given.items() if name not in left}


def _bare(name: str) -> str:
    """Return the name of a tensor as buffers of averages have it: without dots and underscores."""
    return re.sub(r"[._]", "", name)


def _refuse_adapters(file: Path, names: Iterable[str]) -> None:
    if adapters := [name for name in names if ADAPTERS.search(name)]:
        raise InputError(
            f"{file}: holds adapters beside the weights ({_some(adapters)}); merge them into the weights, in peft with "
            "merge_and_unload(), and save that state dict."
        )


def read_state_dict(file: Path, key: str | None = None) -> tuple[dict[str, Tensor], str]:
    """Read the tensors that are most likely meant, by name; nothing that such a file may contain is ever executed.

    Returns:
        The tensors, and a sentence where there was a choice, else ``.
    """
    found = _candidates(file)
    _refuse_adapters(file, [name for path, state in found.items() if key in (None, path) for name in state])
    if key is not None and key not in found:
        raise InputError(f"{file}: there is no state dict under --weights-key {key}; {_names_of(found)}.")
    swapped = _is_swapped(found)
    chosen = key if key is not None else min(found, key=lambda path: _rank(path, swapped))
    return found[chosen], _choice(file, chosen, found, swapped) if key is None and _is_averaged(chosen, swapped) else ""


State = dict[str, Tensor]


def _candidates(file: Path) -> dict[str, State]:
    """Return the state dicts in a file, by the entry that they are under; one that is the whole file is under ``."""
    value = _content(file)
    found = {} if _is_of_optimizer("", value) else dict(_state_dicts(value, "", DEPTH))
    if found:
        return {path: state for path, state in found.items() if int(state.get("n_averaged", BEGUN)) > 0} or found
    if any(_is_of_optimizer(name, item) for name, item in (("", value), *value.items())):
        raise InputError(f"{file}: holds the state of an optimizer and no weights; give the file of the model.")
    others = [(name, item) for name, item in value.items() if not isinstance(item, Tensor)]
    if strange := [name_of(item) for _, item in others if isinstance(item, Inert)]:
        raise InputError(_refusal(file, f"({strange[0]})"))
    if len(others) < len(value) and not any("." in str(name) for name, _ in others):
        return {"": {str(name): item for name, item in value.items() if isinstance(item, Tensor)}}
    name, item = others[0] if others else next(iter(value.items()))
    raise InputError(f"{file}: entry {name!r} is a {type(item).__name__}; a state dict maps names to tensors.")


def _content(file: Path) -> Mapping[Any, Any]:
    """Return what a file holds, whichever of the two kinds it is, whatever its name says."""
    if not file.is_file():
        raise InputError(f"{file}: no such weights file.")
    suffix = file.suffix.lower()
    if suffix not in (SAFETENSORS, *SUFFIXES):
        raise InputError(f"{file}: weights are read from {SAFETENSORS}, {', '.join(SUFFIXES[:-1])} and {SUFFIXES[-1]}.")
    with file.open("rb") as stream:
        begin = stream.read(24)
    for beginning, kind in STRANGERS.items():
        if begin.startswith(beginning):
            raise InputError(f"{file}: holds no weights but {kind}.")
    if begin[8:9] == b"{" or (suffix == SAFETENSORS and not begin.startswith(ZIP)):
        try:
            value = safetensors.torch.load_file(file)
        except Exception as error:  # beside its own error the library raises Python's and torch's
            raise InputError(f"{file}: not a whole safetensors file ({first_line(error)}).") from None
    else:
        try:
            value = read_pickled(file)
        except Exception as error:  # torch names no base class for what a broken or hostile file makes it raise
            # Its message is not passed on: it tells how to load the file all the same, which would run what is in it.
            raise InputError(_refusal(file, f"or is broken ({type(error).__name__})")) from None
    if isinstance(value, Inert):
        raise InputError(_refusal(file, f"({name_of(value)})"))
    if not isinstance(value, Mapping) or not value:
        raise InputError(f"{file}: holds a {type(value).__name__}, not a state dict (name to tensor).")
    return value


def _refusal(file: Path, reason: str) -> str:
    return f"{file}: refused, it holds more than plain tensors {reason}; save model.state_dict(), best as safetensors."


def _state_dicts(value: Mapping[Any, Any], path: str, depth: int) -> Iterator[tuple[str, State]]:
    """Yield the entries, this one included, that map names to tensors alone, and lists of averaged tensors."""
    if value and all(isinstance(name, str) and isinstance(item, Tensor) for name, item in value.items()):
        yield path, dict(value)
    for name, item in value.items():
        below = f"{path}.{name}" if path else str(name)
        if isinstance(item, Mapping) and depth and not _is_of_optimizer(name, item):
            yield from _state_dicts(item, below, depth - 1)
        elif isinstance(item, list) and item and _is_averaged(below) and all(isinstance(one, Tensor) for one in item):
            yield below, {f"{number}": one for number, one in enumerate(item)}


def _is_of_optimizer(name: object, item: object) -> bool:
    return isinstance(item, Mapping) and ("optim" in str(name).lower() or "param_groups" in item)


def _is_swapped(found: Mapping[str, State]) -> bool:
    """Return whether a checkpoint has the averaged weights where others have the raw ones, as MMEngine writes it.

    Its averaged models count `steps`, and before a file is written the two state dicts change their places.
    """
    return "state_dict" in found and "steps" in found.get("ema_state_dict", {})


def _is_averaged(path: str, swapped: bool = False) -> bool:
    if swapped:
        return path.partition(".")[0] == "state_dict"
    return AVERAGED.search(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", path).lower()) is not None


def _rank(path: str, swapped: bool = False) -> tuple[bool, int, int]:
    """Return what is smallest for the entry that is most likely meant."""
    parts = path.lower().split(".")
    first, last = (USUAL_KEYS.index(part) if part in USUAL_KEYS else len(USUAL_KEYS) for part in (parts[0], parts[-1]))
    return not _is_averaged(path, swapped), first, last


def _chosen(found: Mapping[str, State], model: nn.Module, file: Path, key: str | None) -> State:
    """Return the state dict that is meant, its names those of the model."""
    wanted, swapped = model.state_dict(), _is_swapped(found)
    fitting = _fitting(found, wanted)
    whole = {path: state for path, state in fitting.items() if _same_shapes(state, wanted)}
    completed = {}
    if whole and not any(_is_averaged(path, swapped) for path in whole):
        completed = _completed(found, whole[min(whole, key=_rank)], model)
    fitting = {**whole, **completed} or fitting
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
    first, *others = sorted(fitting, key=lambda path: _rank(path, swapped))
    if others and _rank(first, swapped) == _rank(others[0], swapped):
        raise InputError(
            f"{file}: holds several state dicts of this model: {', '.join(fitting)}; choose one with --weights-key."
        )
    if others:
        note(model, _choice(file, first, fitting, swapped))
    if first in completed and len(completed[first]) > len(dict(model.named_parameters())):
        note(
            model,
            f"{file.name}: {first} has parameters alone; statistics and other buffers are those of the raw weights",
        )
    if not swapped and not any(_is_averaged(name) for name in (first, *wanted)) and (left := _called_averaged(found)):
        note(
            model,
            f"{file.name}: what is called averaged there ({_some(left)}) does not fit the model and is left out; "
            f"{first or 'the rest'} is taken",
        )
    return fitting[first]


def _fitting(found: Mapping[str, State], wanted: State) -> dict[str, State]:
    """Return path to tensors, by the model's names, wherever all that are wanted are there."""
    return {
        ".".join(filter(None, (path, prefix))): renamed
        for path, state in found.items()
        for prefix, renamed in _renamed(state, wanted).items()
    }


def _completed(found: Mapping[str, State], raw: State, model: nn.Module) -> dict[str, State]:
    """Return averaged parameters that were kept without the buffers, with those of the raw weights beside them.

    They are under their names or, as torch_ema writes them, in a list in the order of the parameters.
    """
    wanted = model.state_dict()
    parameters = {name: wanted[name] for name, _ in model.named_parameters() if name in wanted}
    lists = {
        path: dict(zip(parameters, state.values(), strict=True))
        for path, state in found.items()
        if all(name.isdigit() for name in state) and len(state) == len(parameters)
    }
    named = _fitting({path: state for path, state in found.items() if path not in lists}, parameters)
    return {
        path: {**raw, **{name: state[name] for name in parameters}}
        for path, state in (lists | named).items()
        if _is_averaged(path) and _same_shapes(state, parameters)
    }


def _called_averaged(found: Mapping[str, State]) -> list[str]:
    """Return entries, and beginnings of names of tensors, that sound like averaged weights."""
    names = [
        f"{path}.{name}" if path else name for path, state in found.items() for name in state if name not in COUNTERS
    ]
    parts = [name.split(".") for name in names]
    ends = [next((end for end, part in enumerate(one, 1) if _is_averaged(part)), 0) for one in parts]
    return list(dict.fromkeys(".".join(one[:end]) for one, end in zip(parts, ends, strict=True) if end))


def _same_shapes(state: State, wanted: State) -> bool:
    return all(state[name].shape == value.shape for name, value in wanted.items() if name in state)


def _choice(file: Path, chosen: str, among: Mapping[str, State], swapped: bool = False) -> str:
    """Return what a user is told of a choice between state dicts."""
    kind = ", the averaged weights," if _is_averaged(chosen, swapped) else ""
    names = ", ".join(name for name in among if name)
    return f"{file.name}: {chosen or 'the whole file'}{kind} is taken; --weights-key chooses among {names}"


def _names_of(found: Mapping[str, State]) -> str:
    names = [name for name in found if name]
    return f"give {' or '.join(names)}" if names else "leave it out: the whole file is one state dict"


def _renamed(state: State, wanted: State) -> dict[str, State]:
    """Return prefix to what is below it, for those under which all tensors of the model are, by the model's names.

    What wrappers put into the names is taken out, and a part that all names of the model begin with may be missing; so
    may a counter of batches, as older files have none.
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
            below = _below(state, prefix)
            if needed <= below.keys():
                found[prefix.rstrip(".")] = below
    outer = probe.partition(".")[0] + "."
    if found or any(not name.startswith(outer) for name in wanted):
        return found
    inner = _renamed(state, _below(wanted, outer))
    return {prefix: {f"{outer}{name}": value for name, value in below.items()} for prefix, below in inner.items()}


def _below(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _nearest(state: State, wanted: State) -> State:
    """Return a state dict that does not fit, under the names that come nearest to the model's, for the error."""
    state = _without_wrapping(state, wanted)
    parts = [name.split(".") for name in state]
    prefixes = dict.fromkeys(".".join((*one[:end], "")) if end else "" for one in parts for end in range(len(one)))
    known = {prefix: len(_below(state, prefix).keys() & wanted.keys()) for prefix in prefixes}
    best = max(known, key=lambda prefix: known[prefix])
    return _below(state, best) if known[best] * NEAR > len(wanted) else state


def _without_wrapping(state: State, wanted: State) -> State:
    """Take the parts of names that wrappers put there out, unless the model itself has such names."""
    parts = [part for part in WRAPPING_PARTS if not any(part in name.split(".") for name in wanted)]
    if not any(part in name.split(".") for part in parts for name in state):
        return state
    return {
        ".".join(step for step in name.split(".") if step not in parts): value
        for name, value in state.items()
        if name not in COUNTERS
    }


def _some(items: Iterable[str]) -> str:
    listed = list(items)
    more = len(listed) - SHOWN_KEYS
    return ", ".join(listed[:SHOWN_KEYS]) + (f" and {more} more" if more > 0 else "")
