"""In: what the user wrote behind --model, and weights. Out: a model in eval mode and float32 that was seen to work.

A model may say of itself what its code cannot. Three plain attributes are read, of a user's model as of any other:

- `task_options`, a dict: `task`, a task's name, and the options of that task, such as
  `{"task": "detection", "head": "detr", "outputs": ["logits", "pred_boxes"]}`.
- `class_names`, a tuple of texts in the order of its outputs, without a background that detectors have.
- `pretrained_cfg`, a dict of its preprocessing in timm's words; see `preprocess_of`.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.trace import check_one_input
from hirelc_deploy.inputs.data.preprocess import INTERPOLATIONS, Preprocess
from hirelc_deploy.inputs.data.splits import Data
from hirelc_deploy.inputs.models import hugging_face, torchvision_models, ultralytics_models
from hirelc_deploy.inputs.models.checks import check_finite
from hirelc_deploy.inputs.models.onnx_files import load as onnx_files
from hirelc_deploy.inputs.models.ordinary import (
    all_trained,
    stored_weights,
    unwrapped,
    with_plain_parts,
    with_plain_tensors,
)
from hirelc_deploy.inputs.models.weights import SAFETENSORS, SUFFIXES, load_weights
from hirelc_deploy.user_code import first_line, import_from, importing_from, near_names, place_of

PREFIXES = ("hf", "torchvision", "ultralytics")
"""Libraries that a spec may name before its colon."""

TIMM_PREFIXES = ("hf-hub", "hf_hub", "local-dir")
"""What timm understands before a colon: a model of the Hugging Face Hub, or a folder of one."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: enough to build it again.

    Attributes:
        spec: A timm name, with a tag or not, `hf-hub:OWNER/NAME` or `local-dir:FOLDER`, as timm takes them;
            `file.py:factory` or `package.module:factory`; `hf:FOLDER` of transformers; `torchvision:NAME`;
            `ultralytics:NAME.yaml`; `FILE.onnx`.
        weights: A .safetensors file, or a .pth, .pt or .bin file with a state dict.
        arguments: Keyword arguments of the factory, of `timm.create_model` or torchvision's function, or entries of the
            config of transformers; of an ONNX file `input_size`, where it leaves that open, and the values of inputs
            beside the images.
        pretrained: Let timm fetch its own weights over the network; timm names only.
        weights_key: Which of several state dicts in the file is meant; see `load_weights`.
    """

    spec: str
    weights: Path | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    weights_key: str | None = None

    @property
    def kind(self) -> str:
        """`timm`, `hf`, `torchvision`, `ultralytics`, `onnx` or `factory`."""
        if self.spec.lower().endswith(".onnx"):
            return "onnx"
        before, colon, _ = self.spec.partition(":")
        if colon:
            return before if before in PREFIXES else "timm" if before in TIMM_PREFIXES else "factory"
        return "factory" if self.spec.endswith(".py") else "timm"

    @property
    def is_timm(self) -> bool:
        """True for a name that timm understands."""
        return self.kind == "timm"

    @property
    def is_installed(self) -> bool:
        """True where an installed library builds it: no code, file or network of anybody's has a part in it."""
        return self.kind == "torchvision" or (self.is_timm and ":" not in self.spec)

    @property
    def is_untrained(self) -> bool:
        """True where the model can only have random weights: a library's name with neither weights nor `pretrained`."""
        bare = self.kind in ("timm", "torchvision") or (self.kind == "ultralytics" and not self.spec.endswith(".pt"))
        return bare and self.weights is None and not self.pretrained

    def with_classes(self, count: int) -> ModelSource:
        """Return the source with this number of classes, unless it says one, or is a factory that decides itself."""
        if self.kind not in ("timm", "torchvision") or "num_classes" in self.arguments or not count:
            return self
        return replace(self, arguments={**self.arguments, "num_classes": count})

    def with_input_size(self, size: Sequence[int] | None) -> ModelSource:
        """Return the source with the size of its images, where that is part of the network: in an ONNX file."""
        if self.kind != "onnx" or size is None or "input_size" in self.arguments:
            return self
        return replace(self, arguments={**self.arguments, "input_size": list(size)})

    def build(self) -> nn.Module:
        """Return the model as `load` does, without reading `weights`."""
        return all_trained(stored_weights(self.made()))

    def made(self) -> nn.Module:
        """Return the model as its factory makes it, on the CPU in eval mode; weights may be computed in each pass."""
        if self.pretrained and not self.is_timm:
            raise InputError(f"--pretrained: {self.spec} is not a timm name; give its weights with --weights FILE.")
        match self.kind:
            case "timm":
                model = self._from_timm()
            case "hf":
                model = hugging_face.build(Path(self._name), self.arguments)
            case "torchvision":
                model = torchvision_models.build(self._name, self.arguments)
            case "onnx":
                model = self._from_onnx()
            case "ultralytics":
                self._take_no_arguments()
                model = ultralytics_models.build(self._name)
            case _:
                model = self._from_factory()
        return ready(with_plain_tensors(model, f"--model {self.spec}"), f"--model {self.spec}")

    def load(self) -> nn.Module:
        """Return the model with its weights, all of them finite, stored as they are used, and trained in recovery."""
        weights = self._weights
        if self.kind == "hf" and not self.pretrained:
            found = hugging_face.load(Path(self._name), self.arguments, weights, self.weights_key)
            model = ready(found, f"--model {self.spec}")
        else:
            model = self.made()
            if weights is not None:
                unused = torchvision_models.UNUSED_WEIGHTS if self.kind == "torchvision" else ()
                load_weights(model, weights, unused, self.weights_key)
        check_finite(model, str(weights or self.spec))
        return all_trained(stored_weights(model))

    def describe(self) -> dict[str, Any]:
        """Return the source as JSON values for a manifest, with hashes of the files it depends on."""
        value: dict[str, Any] = {
            "kind": self.kind,
            "spec": self.spec,
            "arguments": dict(self.arguments),
            "pretrained": self.pretrained,
        }
        if self.kind not in ("factory", "onnx"):
            package = "transformers" if self.kind == "hf" else self.kind
            value[f"{package}_version"] = importlib.metadata.version(package)
        elif self.kind == "onnx":
            value["spec_sha256"] = _sha256(Path(self.spec))
        elif self._factory_file is not None:
            value["spec_sha256"] = _sha256(self._factory_file)
        if self.kind == "hf":
            files = hugging_face.files_of(Path(self._name), with_weights=self.weights is None)
            value["spec_sha256"] = _sha256_of_all(files)
        if (weights := self._weights) is not None:
            value["weights"] = {"file": weights.name, "sha256": _sha256(weights)}
            if self.weights_key is not None:
                value["weights"]["key"] = self.weights_key
        return value

    @property
    def _name(self) -> str:
        """What stands behind the colon."""
        return self.spec.partition(":")[2]

    @property
    def _weights(self) -> Path | None:
        """The file of weights; that of ultralytics may be named in the spec."""
        if self.weights is None and self.kind == "ultralytics":
            return ultralytics_models.weights_of(self._name)
        return self.weights

    @property
    def _factory_file(self) -> Path | None:
        target = self.spec.rpartition(":")[0]
        return Path(target) if target.endswith(".py") else None

    def _take_no_arguments(self) -> None:
        if self.arguments:
            raise InputError(
                f"--model {self.spec}: takes no {_arguments_text(self.arguments)}; its .yaml says all of the network."
            )

    def _from_onnx(self) -> nn.Module:
        if self.weights is not None:
            raise InputError(f"--weights {self.weights}: {self.spec} has its weights in it; leave --weights out.")
        told = {name: value for name, value in self.arguments.items() if name != "input_size"}
        return onnx_files.build(Path(self.spec), self.arguments.get("input_size"), told)

    def _from_timm(self) -> nn.Module:
        import timm

        name, elsewhere = self.spec, ":" in self.spec
        if "pretrained" in self.arguments:
            raise InputError(f"--model {name}: pretrained is no --model-arg; give --pretrained, or --weights FILE.")
        if not elsewhere and not timm.is_model(name):
            self._refuse_a_path()
            near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3, cutoff=0.5)
            hint = (
                f"did you mean {' or '.join(near)}?" if near else "give a timm name, file.py:factory or module:factory."
            )
            raise InputError(f"--model {name!r}: timm has no model of this name; {hint}")
        try:
            trained = None if elsewhere else timm.get_pretrained_cfg(name)
        except RuntimeError:  # a tag that this network has not
            tagged = timm.list_pretrained(f"{name.partition('.')[0]}.*") or [name.partition(".")[0]]
            raise InputError(f"--model {name!r}: timm has no such weights of it; give {' or '.join(tagged)}.") from None
        wanted = self.arguments.get("num_classes")
        if self.pretrained and trained is not None and wanted not in (None, trained.num_classes):
            raise InputError(
                f"--model {name} --pretrained: its weights know {trained.num_classes} classes, not {wanted}, and the "
                "last layer would be random; train it for your classes first and give the result with --weights."
            )
        try:
            with _quiet_hub():
                model = timm.create_model(name, pretrained=self.pretrained, **self.arguments)
        except Exception as error:  # whatever the constructor of any of a thousand models, or the network, may raise
            if elsewhere:
                raise InputError(
                    f"--model {name}: it could not be had ({first_line(error)}); with no network give a timm name and "
                    "its weights with --weights FILE."
                ) from None
            if self.pretrained:
                raise InputError(
                    f"--model {name} --pretrained: the weights could not be had ({first_line(error)}); "
                    "with no network, give a file with --weights."
                ) from None
            raise InputError(f"--model {name} with {_arguments_text(self.arguments)}: {first_line(error)}.") from None
        model = unwrapped(model, f"--model {name}")
        known = model.pretrained_cfg.get("num_classes")  # type: ignore[union-attr, operator]
        if self.pretrained and elsewhere and wanted not in (None, known):
            raise InputError(
                f"--model {name} --pretrained: its weights know {known} classes, not {wanted}, and the last layer "
                "would be random; train it for your classes first and give the result with --weights."
            )
        model.__dict__["pretrained_cfg"] = _config_for(model, self.arguments)
        return model

    def _refuse_a_path(self) -> None:
        """Raise InputError where the spec is no name of a model but a place that weights may lie in."""
        if Path(self.spec).suffix.lower() in (SAFETENSORS, *SUFFIXES):
            raise InputError(
                f"--model {self.spec}: that is a file of weights; give it with --weights, and its network as --model: "
                "a timm name or FILE.py:FUNCTION."
            )
        if Path(self.spec).is_dir():
            raise InputError(
                f"--model {self.spec}: that is a folder; give hf:{self.spec} for one of transformers, "
                f"local-dir:{self.spec} for one of timm."
            )

    def _refuse_a_prefix(self) -> None:
        """Raise InputError where what stands before the colon was meant to be that of a library."""
        before, _, name = self.spec.partition(":")
        if before == "timm":
            raise InputError(f"--model {self.spec}: names of timm stand alone; give --model {name}.")
        near = difflib.get_close_matches(before.lower(), (*PREFIXES, "hf-hub", "local-dir"), n=1, cutoff=0.75)
        if (
            near
            and not before.endswith(".py")
            and (not before.isidentifier() or importlib.util.find_spec(before) is None)
        ):
            raise InputError(f"--model {self.spec}: there is no {before!r}; did you mean {near[0]}:{name}?")

    def _from_factory(self) -> nn.Module:
        self._refuse_a_prefix()
        target, _, name = self.spec.rpartition(":")
        file = self._factory_file
        if not target or not name:
            file = Path(self.spec.rstrip(":"))
            raise InputError(f"--model {self.spec}: name the function that builds the model, {file}:FACTORY.")
        with importing_from(file):
            module = import_from(target, self.spec)
            factory = getattr(module, name, None)
            if not callable(factory):
                hint = near_names(name, module)
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
                raise InputError(f"{place_of(error, file, f'--model {self.spec}')}: {first_line(error)}.") from None
        return with_plain_parts(unwrapped(model, f"--model {self.spec}"))


def preprocess_of(model: nn.Module, data: Data | None = None, overrides: Mapping[str, Any] | None = None) -> Preprocess:
    """Return the preprocessing for a model.

    Each entry comes from the first that names it: `overrides`; the model's `pretrained_cfg` (timm's convention, which a
    factory of the user may follow too, with `geometry` and `pad_value` of `Preprocess`); the data's own image size and
    geometry with pixels in [0, 1] as they are; a crop of 3 x 224 x 224.
    """
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    config = config if isinstance(config, Mapping) else config.to_dict()
    names = ("input_size", "mean", "std", "crop_pct", "interpolation", "geometry", "pad_value")
    known = {name: config[name] for name in names if config.get(name) is not None}
    chosen = {name: value for name, value in (overrides or {}).items() if value is not None}
    if unknown := set(chosen) - set(names):
        raise InputError(f"preprocessing: unknown entry {sorted(unknown)[0]!r}; use {', '.join(names)}.")
    native = {"input_size": (3, 224, 224), "crop_pct": 1.0, "interpolation": "bicubic"}
    if data is not None:
        native |= {"input_size": data.preprocess.input_size, "geometry": data.preprocess.geometry}
    value = {**native, **known, **chosen}
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


def ready(model: nn.Module, where: str) -> nn.Module:
    """Return a model on the CPU, in eval mode and float32; raises InputError where it cannot run on images alone."""
    for tensor_name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor) or tensor.is_meta:
            kind = "has no shape yet (a lazy layer)" if is_lazy(tensor) else "has no values (device meta)"
            raise InputError(f"{where}: {tensor_name} {kind}; build the model with its real tensors.")
    check_one_input(model)
    model = model.cpu().float()
    try:
        same = model.train() is model and model.eval() is model
    except Exception as error:  # a user's own may raise anything
        raise InputError(
            f"{where}: its train() or eval() fails ({first_line(error)}); give the torch.nn.Module as it was trained."
        ) from None
    if not same:
        raise InputError(f"{where}: its train() or eval() does not return it; end both with `return self`.")
    return model


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keep the Hub's reports of each try off the terminal; what came of them is said in one sentence."""
    hub = logging.getLogger("huggingface_hub")
    before = hub.level
    hub.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        hub.setLevel(before)


def _arguments_text(arguments: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value!r}" for name, value in arguments.items()) or "no arguments"


def _sha256_of_all(files: Iterable[Path]) -> str:
    return hashlib.sha256("".join(f"{file.name} {_sha256(file)}\n" for file in files).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
