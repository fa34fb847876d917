"""In: what the user wrote behind --model, and weights. Out: a model in eval mode and float32 that was seen to work."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.preprocess import INTERPOLATIONS, Preprocess
from hirelc_deploy.inputs.data.splits import Data
from hirelc_deploy.inputs.models.checks import check_finite, check_output
from hirelc_deploy.inputs.models.user_code import first_line, import_file, import_module, importing_from, place_of
from hirelc_deploy.inputs.models.weights import load_weights


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
                    f"--model {name} --pretrained: the weights could not be had ({first_line(error)}); "
                    "with no network, give a file with --weights."
                ) from None
            raise InputError(f"--model {name} with {_arguments_text(self.arguments)}: {first_line(error)}.") from None
        model = _as_module(model, name)
        model.__dict__["pretrained_cfg"] = _config_for(model, self.arguments)
        return model

    def _from_factory(self) -> nn.Module:
        target, _, name = self.spec.rpartition(":")
        file = self._factory_file
        if not target or not name:
            file = Path(self.spec.rstrip(":"))
            raise InputError(f"--model {self.spec}: name the function that builds the model, {file}:FACTORY.")
        with importing_from(file):
            module = import_file(file) if file is not None else import_module(target, self.spec)
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
                raise InputError(f"{place_of(error, file, self.spec)}: {first_line(error)}.") from None
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


def _as_module(value: Any, spec: str) -> nn.Module:
    if isinstance(value, nn.Module):
        return value
    raise InputError(f"--model {spec}: returns {value!r:.80}, which is not a torch.nn.Module.")


def _arguments_text(arguments: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value!r}" for name, value in arguments.items()) or "no arguments"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
