"""In: what the user wrote behind --model, and weights. Out: a model in eval mode and float32 that was seen to work."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import sys
import tomllib
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hirelc_deploy import _torchvision_guard
from hirelc_deploy.data import Data
from hirelc_deploy.errors import InputError
from hirelc_deploy.images import INTERPOLATIONS, Preprocess

_torchvision_guard.install()  # before anyone's import of timm; timm itself takes seconds and is imported when needed

WRAPPING_KEYS = ("state_dict", "model_state_dict", "model")  # where checkpoints keep the weights
WRAPPING_PREFIXES = ("module.", "_orig_mod.", "model.")  # DataParallel, torch.compile, training frameworks
SHOWN_KEYS = 3
SAME_ANSWER = 1e-3  # of the largest output: batches of other sizes are summed in another order


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: enough to build it again.

    Attributes:
        spec: A timm name, `file.py:factory` or `package.module:factory`.
        weights: A .safetensors file, or a .pth, .pt or .bin file with a state dict.
        arguments: Keyword arguments of the factory, or of `timm.create_model`.
        pretrained: Let timm fetch its own weights over the network; timm names only.
    """

    spec: str
    weights: Path | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    pretrained: bool = False

    @property
    def is_timm(self) -> bool:
        """True for a timm name."""
        return ":" not in self.spec and not self.spec.endswith(".py")

    @property
    def is_untrained(self) -> bool:
        """True where the model can only have random weights: a timm name with neither weights nor `pretrained`."""
        return self.is_timm and self.weights is None and not self.pretrained

    def with_classes(self, count: int) -> ModelSource:
        """Return the source with this number of classes, unless it says one, or is a factory that decides itself."""
        if not self.is_timm or "num_classes" in self.arguments or not count:
            return self
        return replace(self, arguments={**self.arguments, "num_classes": count})

    def build(self) -> nn.Module:
        """Return the model as its factory makes it, on the CPU in eval mode, without reading `weights`."""
        if self.pretrained and not self.is_timm:
            raise InputError(f"--pretrained: {self.spec} is not a timm name; give its weights with --weights FILE.")
        model = self._from_timm() if self.is_timm else self._from_factory()
        for tensor_name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if is_lazy(tensor) or tensor.is_meta:
                kind = "has no shape yet (a lazy layer)" if is_lazy(tensor) else "has no values (device meta)"
                raise InputError(f"--model {self.spec}: {tensor_name} {kind}; build the model with its real tensors.")
        return model.cpu().float().eval()

    def load(self) -> nn.Module:
        """Return the model with its weights, all of them finite."""
        model = self.build()
        if self.weights is not None:
            load_weights(model, self.weights)
        check_finite(model, str(self.weights or self.spec))
        return model

    def describe(self) -> dict[str, Any]:
        """Return the source as JSON values for a manifest, with hashes of the files it depends on."""
        value: dict[str, Any] = {
            "kind": "timm" if self.is_timm else "factory",
            "spec": self.spec,
            "arguments": dict(self.arguments),
            "pretrained": self.pretrained,
        }
        if self.is_timm:
            value["timm_version"] = importlib.metadata.version("timm")
        elif self._factory_file is not None:
            value["spec_sha256"] = _sha256(self._factory_file)
        if self.weights is not None:
            value["weights"] = {"file": self.weights.name, "sha256": _sha256(self.weights)}
        return value

    @property
    def _factory_file(self) -> Path | None:
        target = self.spec.rpartition(":")[0]
        return Path(target) if target.endswith(".py") else None

    def _from_timm(self) -> nn.Module:
        import timm

        name = self.spec
        if not timm.is_model(name):
            near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3, cutoff=0.5)
            hint = (
                f"did you mean {' or '.join(near)}?" if near else "give a timm name, file.py:factory or module:factory."
            )
            raise InputError(f"--model {name!r}: timm has no model of this name; {hint}")
        trained, wanted = timm.get_pretrained_cfg(name), self.arguments.get("num_classes")
        if self.pretrained and trained is not None and wanted not in (None, trained.num_classes):
            raise InputError(
                f"--model {name} --pretrained: its weights know {trained.num_classes} classes, not {wanted}, and the "
                "last layer would be random; train it for your classes first and give the result with --weights."
            )
        try:
            model = timm.create_model(name, pretrained=self.pretrained, **self.arguments)
        except Exception as error:  # whatever the constructor of any of a thousand models, or the network, may raise
            if self.pretrained:
                raise InputError(
                    f"--model {name} --pretrained: the weights could not be had ({_first_line(error)}); "
                    "with no network, give a file with --weights."
                ) from None
            raise InputError(f"--model {name} with {_arguments_text(self.arguments)}: {_first_line(error)}.") from None
        model = _as_module(model, name)
        model.__dict__["pretrained_cfg"] = _config_for(model, self.arguments)
        return model

    def _from_factory(self) -> nn.Module:
        target, _, name = self.spec.rpartition(":")
        file = self._factory_file
        if not target or not name:
            file = Path(self.spec.rstrip(":"))
            raise InputError(f"--model {self.spec}: name the function that builds the model, {file}:FACTORY.")
        with _importing_from(file):
            module = _import_file(file) if file is not None else _import_module(target, self.spec)
            factory = getattr(module, name, None)
            if not callable(factory):
                near = difflib.get_close_matches(name, [key for key in vars(module) if not key.startswith("_")], n=3)
                hint = f"did you mean {' or '.join(near)}?" if near else "check the name after the colon."
                raise InputError(f"--model {self.spec}: there is no function {name!r} in {target}; {hint}")
            try:
                inspect.signature(factory).bind(**self.arguments)
            except TypeError as error:
                raise InputError(
                    f"--model {self.spec}: {name} cannot be called with {_arguments_text(self.arguments)} ({error}); "
                    "pass its arguments with --model-arg name=value."
                ) from None
            except ValueError:
                pass  # a builtin without a signature: calling it will tell
            try:
                model = factory(**self.arguments)
            except (Exception, SystemExit) as error:
                raise InputError(f"{_place(error, file, self.spec)}: {_first_line(error)}.") from None
        return _as_module(model, self.spec)


def load_for(
    source: ModelSource, data: Data, overrides: Mapping[str, Any] | None = None
) -> tuple[nn.Module, Data, ModelSource]:
    """Load a model for a data set: classes from the data, preprocessing from the model, and one forward pass to check.

    Args:
        overrides: Entries of `Preprocess` that the user asked for; see `preprocess_of`.

    Returns:
        The model, the data in the form of its input, and the source with the number of classes filled in.
    """
    source = source.with_classes(len(data.classes))
    model = source.load()
    data = data.preprocessed(preprocess_of(model, data, overrides))
    check_output(model, data.calibration.batch(range(min(2, len(data.calibration)))), len(data.classes))
    return model, data, source


def preprocess_of(model: nn.Module, data: Data | None = None, overrides: Mapping[str, Any] | None = None) -> Preprocess:
    """Return the preprocessing for a model.

    Each entry comes from the first that names it: `overrides`; the model's `pretrained_cfg` (timm's convention, which a
    factory of the user may follow too); the data's own image size with pixels in [0, 1] as they are; 3 x 224 x 224.
    """
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    config = config if isinstance(config, Mapping) else config.to_dict()
    names = ("input_size", "mean", "std", "crop_pct", "interpolation")
    known = {name: config[name] for name in names if config.get(name) is not None}
    chosen = {name: value for name, value in (overrides or {}).items() if value is not None}
    if unknown := set(chosen) - set(names):
        raise InputError(f"preprocessing: unknown entry {sorted(unknown)[0]!r}; use {', '.join(names)}.")
    native = data.preprocess.input_size if data is not None and data.labelled else (3, 224, 224)
    value = {"input_size": native, "crop_pct": 1.0, "interpolation": "bicubic", **known, **chosen}
    channels, *_ = value["input_size"]
    for name, fallback in (("mean", 0.0), ("std", 1.0)):
        given = tuple(value.get(name, (fallback,)))
        value[name] = given * channels if len(given) == 1 else given
    if "interpolation" not in chosen and value["interpolation"] not in INTERPOLATIONS:
        value["interpolation"] = "bicubic"  # some timm models were trained with `random` or `lanczos`
    return Preprocess.from_dict(value)


def _config_for(model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return timm's preprocessing of a model, corrected for arguments that change its input."""
    config: dict[str, Any] = dict(model.pretrained_cfg)  # type: ignore[arg-type]  # which timm leaves as it was
    channels, height, width = config["input_size"]
    size = arguments.get("img_size", (height, width))
    height, width = (size, size) if isinstance(size, int) else size
    config["input_size"] = (arguments.get("in_chans", channels), height, width)
    if config["input_size"][0] != channels:  # timm sums or repeats the filters; grey pixels have the mean of the means
        for name in ("mean", "std"):
            config[name] = (sum(config[name]) / len(config[name]),) * config["input_size"][0]
    return config


def check_output(model: nn.Module, images: Tensor, classes: int = 0) -> int:
    """Run the model on (b, channels, height, width) images and return its number of outputs.

    Raises InputError unless it answers with one finite (b, outputs) tensor, of `classes` outputs where that is not 0,
    the same for an image alone as beside others, leaves the images as they are, and lets gradients through.
    """
    name, shape, given = type(model).__name__, tuple(images.shape), images.clone()
    with torch.no_grad():
        output = _answer(model, given)
    if not isinstance(output, Tensor):
        raise InputError(
            f"{name} returns a {type(output).__name__}; it must return one (batch, classes) tensor; "
            "wrap it in a module whose forward picks that tensor."
        )
    if output.ndim != 2 or output.shape[0] != shape[0]:
        raise InputError(
            f"{name} answers {shape[0]} images with shape {tuple(output.shape)}; a classifier returns (batch, classes)."
        )
    if not output.isfinite().all():
        raise InputError(f"{name} answers with NaN or infinity; check its weights and preprocessing.")
    if classes and output.shape[1] != classes:
        raise InputError(
            f"{name} has {output.shape[1]} outputs, but the data has {classes} classes; "
            f"use a model and weights for {classes} classes (timm: --model-arg num_classes={classes})."
        )
    if not torch.equal(given, images):
        raise InputError(
            f"{name} changes the images it is given; let its forward work on a copy (x - 1, not x.sub_(1))."
        )
    with torch.enable_grad():
        one = images[:1].clone().requires_grad_()
        alone = _answer(model, one)
        slope = torch.autograd.grad(alone.sum(), one, allow_unused=True)[0] if alone.requires_grad else None
    if alone.shape != output[:1].shape or (alone - output[:1]).abs().max() > SAME_ANSWER * output.abs().max():
        raise InputError(
            f"{name} answers an image alone otherwise than beside another, or otherwise each time; "
            "its forward must treat every image by itself, without chance."
        )
    if slope is None:
        raise InputError(
            f"{name} lets no gradient through to its input, by which channels are judged and recovered; "
            "remove no_grad, detach and numpy from its forward."
        )
    return output.shape[1]


def _answer(model: nn.Module, images: Tensor) -> Any:
    try:
        return model(images)
    except Exception as error:  # the user's forward may raise anything
        raise InputError(
            f"{type(model).__name__} fails on images of shape {tuple(images.shape)}: {_first_line(error)}; "
            "check --input-size (channels, height, width)."
        ) from None


def check_finite(model: nn.Module, where: str) -> None:
    """Raise InputError naming the first parameter or norm statistic that holds NaN or infinity."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    tensors |= {name: value for name, value in model.named_buffers() if name.rpartition(".")[2].startswith("running_")}
    for name, value in tensors.items():
        if not value.isfinite().all():
            count = int((~value.isfinite()).sum())
            raise InputError(
                f"{where}: {name} holds {count} values that are NaN or infinite; train or export it again."
            )


# Weights


def load_weights(model: nn.Module, file: Path) -> None:
    """Copy the weights of a file into the model, each of them or none; half precision becomes float32.

    Raises InputError for a file that is missing, broken, not plain tensors, or from another model.
    """
    given = _without_prefix(read_state_dict(file), model)
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in given and not name.endswith("num_batches_tracked")]
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
            raise InputError(f"{file}: not a whole safetensors file ({_first_line(error)}).") from None
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


# The user's own code


def parse_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """Return the values of `--model-arg key=value`: JSON or TOML values where they parse, else the text itself."""
    arguments: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"--model-arg {pair!r}: write name=value.")
        if name in arguments:
            raise InputError(f"--model-arg {name} is given twice.")
        arguments[name] = _parse_value(text)
    return arguments


def _parse_value(text: str) -> Any:
    for parse in (json.loads, lambda item: tomllib.loads(f"value = {item}")["value"]):
        with contextlib.suppress(ValueError, KeyError):
            return parse(text)
    return text


@contextlib.contextmanager
def _importing_from(file: Path | None) -> Iterator[None]:
    """Let a model file import its neighbours, and a module be found from the current folder; then forget the path."""
    before = list(sys.path)
    sys.path.append(str(file.resolve().parent if file is not None else Path.cwd()))
    try:
        yield
    finally:
        sys.path[:] = before


def _import_file(file: Path) -> ModuleType:
    if not file.is_file():
        raise InputError(f"--model {file}: no such file.")
    name = _module_name(file)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and typing look a class's module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise InputError(f"{_place(error, file, str(file))}: {_first_line(error)}.") from None
    return module


def _module_name(file: Path) -> str:
    """Return a name of its own, so that a file called like an installed package hides nothing."""
    return f"hirelc_model_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]}"


def factory_modules(spec: str) -> list[ModuleType]:
    """Return the loaded modules behind a model that no installation brought: another host may not have them.

    Args:
        spec: A timm name, `file.py:factory` or `package.module:factory`.
    """
    target = spec.rpartition(":")[0]
    if target.endswith(".py"):
        name = _module_name(Path(target))
    else:
        name = target.partition(".")[0]
        if name == __name__.partition(".")[0] or name in importlib.metadata.packages_distributions():
            return []
    return [sys.modules[name]] if name in sys.modules else []


def _import_module(name: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise InputError(
                f"--model {spec}: there is no module {error.name!r}; install it, or give FILE.py:FACTORY."
            ) from None
        raise InputError(f"--model {spec}: {name} cannot be imported ({error}).") from None
    except (Exception, SystemExit) as error:
        raise InputError(f"{_place(error, None, spec)}: {_first_line(error)}.") from None


def _place(error: BaseException, file: Path | None, spec: str) -> str:
    """Return `file, line n` of the user's innermost line that led to an error."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if file is not None and Path(frame.filename) == file] or [
        frame for frame in frames if "site-packages" not in frame.filename and frame.filename != __file__
    ]
    theirs = [frame for frame in theirs if not frame.filename.startswith("<")]
    return f"{theirs[-1].filename}, line {theirs[-1].lineno}" if theirs else f"--model {spec}"


def _as_module(value: Any, spec: str) -> nn.Module:
    if isinstance(value, nn.Module):
        return value
    raise InputError(f"--model {spec}: returns {value!r:.80}, which is not a torch.nn.Module.")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    return f"{type(error).__name__}: {text[:200].rstrip('.')}"


def _arguments_text(arguments: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value!r}" for name, value in arguments.items()) or "no arguments"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
