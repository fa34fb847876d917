"""In: a folder, or a model, of `transformers`. Out: a network of one image tensor that answers what its task asks."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.models.ordinary import note
from hirelc_deploy.inputs.models.plain import ChannelsReversed, answering, marked
from hirelc_deploy.inputs.models.weights import read_state_dict
from hirelc_deploy.user_code import first_line

TASKS = {
    "ForImageClassificationWithTeacher": ("classification", "logits"),
    "ForImageClassification": ("classification", "logits"),
    "ForSemanticSegmentation": ("segmentation", "logits"),
    "ForObjectDetection": ("detection", "logits", "pred_boxes"),
    "ForDepthEstimation": ("regression", "predicted_depth"),
    "ModelWithProjection": ("embedding", "image_embeds"),
    "Model": ("embedding", "pooler_output"),
}
"""End of an architecture's name to its task and outputs; the first that fits counts."""

IMAGE_TOWERS = {"CLIPModel": "CLIPVisionModelWithProjection", "SiglipModel": "SiglipVisionModel"}
"""Models of images and texts to the class that reads the image half from the same folder."""

PROBLEMS = {"multi_label_classification": "multilabel", "regression": "regression"}
"""What a config may say of its classifier, to the task; all others are classification."""

EXCLUSIVE = {"detr", "yolos", "table-transformer"}
"""Detectors whose classes exclude each other, by softmax, no object last (Carion et al. 2020)."""

INDEPENDENT = {
    "conditional_detr", "d_fine", "dab-detr", "deformable_detr", "deimv2", "lw_detr", "rf_detr", "rt_detr",
    "rt_detr_v2",
}  # fmt: skip
"""Detectors with a sigmoid for each class."""

ATTENTION = "eager"
"""Products and softmax as operations of their own. All models have this form, `sdpa` only some: DETR with a ResNet has
not. Both are cut alike and take the same time in ONNX Runtime (ViT-Ti: 1.01), but this file has a quarter fewer nodes:
its scale is one product, not two with roots."""

LARGE = 384
"""From this size on ConvNeXt's pictures are stretched, below they are cropped, as in its image processor."""

INTERPOLATION = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers; what is not here (lanczos, box, hamming) is nearest to bicubic."""


def build(folder: Path, arguments: Mapping[str, Any]) -> nn.Module:
    """Return the network of a folder with random weights; `arguments` replace entries of its config."""
    transformers = _transformers()
    config = _config(transformers, folder, arguments)
    network = _network_class(transformers, config, folder)
    try:
        with _quiet(transformers):
            model: nn.Module = network(config)
    except Exception as error:  # whatever the constructor of any of hundreds of models may raise
        raise InputError(f"--model hf:{folder}: {network.__name__} cannot be built ({first_line(error)}).") from None
    return _as_plain(model, _settings(transformers, folder))


def load(folder: Path, arguments: Mapping[str, Any], weights: Path | None = None, key: str | None = None) -> nn.Module:
    """Return the network of a folder with its weights, or with those of another file, or of an entry of that file.

    transformers reads no file here: it gets tensors, and brings the names that older versions gave them up to date.
    """
    transformers = _transformers()
    config = _config(transformers, folder, arguments)
    network = _network_class(transformers, config, folder)
    state: dict[str, Tensor] = {}
    files = [weights] if weights is not None else _weight_files(folder)
    said = ""
    for file in files:
        part, said = read_state_dict(file, key if weights is not None else None)
        state |= part
    try:
        with _quiet(transformers):
            model, found = network.from_pretrained(
                None, config=config, state_dict=state, output_loading_info=True, dtype=torch.float32
            )
    except Exception as error:  # tensors of other shapes, or whatever the constructor may raise
        raise InputError(f"{files[0]}: not the weights of {network.__name__} ({first_line(error)}).") from None
    if missing := sorted(found["missing_keys"]):
        raise InputError(
            f"{files[0]}: lacks {missing[0]} and {len(missing) - 1} more tensors of {network.__name__}, which would be "
            "random; give the weights of the whole model."
        )
    settings = _settings(transformers, folder)
    if settings is None:
        raise InputError(
            f"--model hf:{folder}: there is no preprocessor_config.json, so nobody knows the mean and size of its "
            "images; save its image processor there (processor.save_pretrained)."
        )
    if said:
        note(model, said)
    return _as_plain(model, settings)


def is_of_transformers(model: object) -> bool:
    """Return whether a model is one of transformers, without importing it."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def as_plain(model: Any) -> nn.Module:
    """Let a loaded model of transformers answer what its task asks, in place, and return it.

    Its preprocessing is read from the folder that it was loaded from, where that is one.
    """
    if "set_attn_implementation" in dir(model):
        with contextlib.suppress(ValueError):
            model.set_attn_implementation(ATTENTION)
    folder = Path(getattr(model, "name_or_path", "") or "-")
    return _as_plain(model, _settings(_transformers(), folder) if folder.is_dir() else None)


def files_of(folder: Path, *, with_weights: bool) -> list[Path]:
    """Return the files of a folder that a model depends on."""
    settings = (folder / name for name in ("config.json", "preprocessor_config.json"))
    return [file for file in (*settings, *(_weight_files(folder) if with_weights else [])) if file.is_file()]


def preprocessing(settings: Mapping[str, Any] | None, config: Any) -> dict[str, Any]:
    """Return an image processor's settings in timm's words, with `geometry`: stretch, crop or letterbox.

    A processor without a fixed size (the shorter edge is given, as for DETR) becomes a square of that edge, which holds
    the whole picture. Without settings only the input size is known.
    """
    channels = getattr(config, "num_channels", 3)
    sizes: tuple[int, int] | None
    if settings is None:
        sizes = _height_width(getattr(config, "image_size", None))
        return {"input_size": (channels, *sizes)} if sizes else {}
    size, crop = settings.get("size"), settings.get("crop_size") if settings.get("do_center_crop") else None
    geometry, share = "stretch", 1.0
    edges = size if isinstance(size, Mapping) else {"shortest_edge": size} if crop and size else {"both": size}
    short = edges.get("shortest_edge")
    if not settings.get("do_resize", True):
        sizes, geometry = _height_width(crop or getattr(config, "image_size", None)), "crop"
    elif crop is not None:
        sizes, geometry = _height_width(crop), "crop"
        before = _height_width(short or edges)
        share = min(1.0, min(sizes) / min(before)) if sizes and before else 1.0
    elif short and settings.get("crop_pct"):
        sizes = (short, short)
        geometry, share = ("crop", settings["crop_pct"]) if short < LARGE else ("stretch", 1.0)
    elif short or "longest_edge" in edges:
        sizes = _height_width(short or edges["longest_edge"])
        geometry = "letterbox" if "longest_edge" in edges else "crop"
    else:
        sizes = _height_width(edges.get("both") or edges)
        geometry = "crop" if settings.get("keep_aspect_ratio") else "stretch"
    if not sizes:
        raise InputError(
            f"preprocessor_config.json: no size of images follows from size {size!r}; give height and width."
        )
    return {
        "input_size": (channels, *sizes),
        "crop_pct": share,
        "geometry": geometry,
        "interpolation": INTERPOLATION.get(int(settings.get("resample") or 3), "bicubic"),
        **_normalisation(settings, channels),
    }


def _normalisation(settings: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """Return mean and std of pixels in [0, 1]; the processor may scale pixels of 0 to 255 otherwise."""
    scale = 255 * (settings.get("rescale_factor") or 1 / 255) if settings.get("do_rescale", True) else 255.0
    shift = 1.0 if settings.get("rescale_offset") and settings.get("do_rescale", True) else 0.0
    chosen = settings.get("do_normalize", bool(settings.get("image_mean")))
    means, stds = (settings.get(name) if chosen else None for name in ("image_mean", "image_std"))
    means, stds = (
        tuple(value) if isinstance(value, (tuple, list)) else (value,) * channels
        for value in (0.0 if means is None else means, 1.0 if stds is None else stds)
    )
    return {
        "mean": tuple((mean + shift) / scale for mean in means),
        "std": tuple(std / scale for std in stds),
    }


def _height_width(size: Any) -> tuple[int, int] | None:
    if isinstance(size, Mapping):
        size = (size.get("height"), size.get("width"))
    if isinstance(size, int):
        return size, size
    given = tuple(size) if isinstance(size, (tuple, list)) else ()
    return (given[0], given[1]) if len(given) == 2 and all(isinstance(edge, int) for edge in given) else None


def _as_plain(model: nn.Module, settings: Mapping[str, Any] | None) -> nn.Module:
    name, config = type(model).__name__, model.config
    end = next((end for end in TASKS if name.endswith(end)), None)
    if end is None or getattr(model, "main_input_name", "pixel_values") != "pixel_values":
        raise InputError(
            f"{name} is for none of classification, semantic segmentation, detection, depth and image embedding; "
            "give a model of transformers that is, or wrap it in a module of your own."
        )
    task, *outputs = TASKS[end]
    options: dict[str, Any] = {"task": task, "outputs": outputs}
    if task == "classification":
        options["task"] = PROBLEMS.get(str(getattr(config, "problem_type", None)), task)
    elif task == "detection":
        options |= {"head": "detr", "scores": _scores(config, name)}
    elif task == "regression":
        options["flips"] = True  # the depth of a mirrored picture is the mirrored depth
    if settings is not None and settings.get("do_flip_channel_order"):
        model.register_forward_pre_hook(ChannelsReversed())
    labels = getattr(config, "id2label", None) or {}
    names = [str(labels[number]) for number in sorted(labels)] if end.startswith("For") and task != "regression" else []
    return marked(answering(model, outputs), options, names, preprocessing(settings, config))


def _scores(config: Any, name: str) -> str:
    if config.model_type in EXCLUSIVE:
        return "softmax"
    if config.model_type in INDEPENDENT:
        return "sigmoid"
    raise InputError(f"{name}: the form of its boxes is not known here; wrap it in a module of your own.")


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise InputError(
            "--model hf:FOLDER needs transformers; install it with pip install 'hirelc-deploy[hf]'."
        ) from None
    return transformers


def _config(transformers: Any, folder: Path, arguments: Mapping[str, Any]) -> Any:
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(f"--model hf:{folder}: there is no {file}; give a folder that save_pretrained wrote.")
    try:
        value = json.loads(file.read_text("utf-8-sig"))
    except ValueError as error:
        raise InputError(f"{file}: not JSON ({first_line(error)}).") from None
    if isinstance(value, dict) and "architecture" in value and "model_type" not in value:
        raise InputError(f"--model hf:{folder}: it is a folder of timm; give --model local-dir:{folder}.")
    try:
        config, unknown = transformers.AutoConfig.from_pretrained(
            str(folder),
            local_files_only=True,
            trust_remote_code=False,
            return_unused_kwargs=True,
            attn_implementation=ATTENTION,
            **arguments,
        )
    except Exception as error:  # an unknown model type, code of its own, values of the wrong type
        raise InputError(f"{file}: transformers cannot use it ({first_line(error)}).") from None
    if unknown := sorted(set(unknown) - {"trust_remote_code"}):
        raise InputError(f"--model hf:{folder}: {type(config).__name__} has no entry {unknown[0]!r}; see {file}.")
    return config


def _network_class(transformers: Any, config: Any, folder: Path) -> Any:
    named = (getattr(config, "architectures", None) or [None])[0]
    if named is None:
        named = transformers.AutoModel._model_mapping[type(config)].__name__
    named = IMAGE_TOWERS.get(named, named)
    network = getattr(transformers, named, None)
    if network is None:
        raise InputError(
            f"{folder / 'config.json'}: transformers {transformers.__version__} has no architecture {named!r}; "
            "code that a folder brings is not run."
        )
    return network


def _weight_files(folder: Path) -> list[Path]:
    """Return a folder's files of weights: safetensors, in parts or whole, else a state dict without any code in it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            parts = sorted({str(part) for part in json.loads(index.read_text("utf-8"))["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{index}: not an index of weights ({first_line(error)}).") from None
        return [folder / Path(part).name for part in parts]
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
    return [folder / "model.safetensors"]


def _settings(transformers: Any, folder: Path) -> dict[str, Any] | None:
    """Return all settings of the image processor, with the defaults of its kind; None where the folder has none."""
    if not (folder / "preprocessor_config.json").is_file():
        return None
    try:
        with _quiet(transformers):
            processor = transformers.AutoImageProcessor.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # code of its own, or a kind that this version lacks
        raise InputError(f"{folder / 'preprocessor_config.json'}: cannot be used ({first_line(error)}).") from None
    return dict(processor.to_dict())


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep progress bars and advice of transformers off the terminal."""
    logging = transformers.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
