"""In: nothing. Out: the options that several commands share, and how they become a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hirelc_deploy.errors import InputError

Model = Annotated[
    str,
    typer.Option(
        "--model", help="A timm name, FILE.onnx, file.py:factory, hf:DIR or torchvision:NAME.", show_default=False
    ),
]
ModelArg = Annotated[
    list[str] | None, typer.Option("--model-arg", help="Argument of the factory, as key=value; may be repeated.")
]
Weights = Annotated[Path | None, typer.Option("--weights", help="Trained weights: .safetensors, or .pth read safely.")]
WeightsKey = Annotated[
    str | None,
    typer.Option("--weights-key", help="Which of several state dicts in that file; averaged weights come first."),
]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Let timm fetch its own trained weights.")]
DataSpec = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="npz:, imagefolder:, webdataset:, coco:, yolo:, voc:, masks:, csv: or hfdata:PATH, FILE.py:factory, "
        "torch/cifar10, synthetic:N. An ONNX file can do without: structure and speed, no accuracy.",
        show_default=False,
    ),
]
TaskName = Annotated[
    str | None, typer.Option("--task", help="What the model is for, where model and data leave a doubt.")
]
TaskArg = Annotated[
    list[str] | None, typer.Option("--task-arg", help="Option of the task, as key=value; may be repeated.")
]
MetricSpec = Annotated[
    str | None, typer.Option("--metric", help="file.py:function of (outputs, targets) in place of the task's metric.")
]
LowerIsBetter = Annotated[bool, typer.Option("--lower-is-better", help="Of that metric.")]
LossSpec = Annotated[
    str | None, typer.Option("--loss", help="file.py:function of (outputs, targets) in place of the task's loss.")
]
Geometry = Annotated[str | None, typer.Option(help="How pictures get the input's size: crop, stretch or letterbox.")]
CropPct = Annotated[
    float | None,
    typer.Option(help="Share of the resized picture that a crop keeps; 1 where the model says nothing."),
]
Interpolation = Annotated[str | None, typer.Option(help="Of resizing: nearest, bilinear, bicubic or box.")]
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Folder of a torchvision data set (torch/...).")]
Target = Annotated[str, typer.Option("--target", help="A target profile; `hirelc-deploy targets` lists them.")]
RecoveryEpochs = Annotated[
    float,
    typer.Option(
        help="Passes over the training split per finalist, and for the uncut integer file where it loses more than is "
        "allowed; 0 for no training."
    ),
]
LearningRate = Annotated[float, typer.Option(help="Peak learning rate of the recovery; smaller for few images.")]
RecoveryBatch = Annotated[
    int | None, typer.Option(help="Images of one step of the recovery, over all GPUs; the learning rate grows with it.")
]
SyncNorms = Annotated[
    bool, typer.Option("--sync-norms", help="Batch norms see the whole batch where processes of torchrun share it.")
]
CalibrationImages = Annotated[int | None, typer.Option(help="Training images set aside for activation ranges.")]
SelectionImages = Annotated[int | None, typer.Option(help="Training images set aside for choosing.")]
InputSize = Annotated[str | None, typer.Option(help="channels,height,width of the model's input.")]
Mean = Annotated[str | None, typer.Option(help="Per-channel mean of the normalisation, as 0.49,0.48,0.45.")]
Std = Annotated[str | None, typer.Option(help="Per-channel standard deviation of the normalisation.")]
Exclude = Annotated[list[str] | None, typer.Option(help="Pattern of units or layers that stay whole; may be repeated.")]
Include = Annotated[
    list[str] | None, typer.Option(help="Pattern of units or layers; when given, only these are cut. May be repeated.")
]
FloatLayers = Annotated[
    list[str] | None, typer.Option(help="Pattern of layers that stay float in every integer file; may be repeated.")
]
Equalise = Annotated[
    list[str] | None,
    typer.Option(help="Pattern of layers whose channels are made alike across activations, too; may be repeated."),
]
RangesOf = Annotated[
    list[str] | None,
    typer.Option(
        "--ranges", help="LAYERS=minmax, percentile or mse: how the ranges at their ends are taken; may be repeated."
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of one inference; the target's own if not given.")]
Batch = Annotated[
    int | None, typer.Option(min=1, help="Images of one inference, as a server gathers them; 1 if not given.")
]
Out = Annotated[Path, typer.Option("--out", help="Folder that is made for the results.", show_default=False)]
Jobs = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Processes that judge cut models side by side, one thread each; same results. 1 if not given, "
        "with --ray one per free CPU, at most 8.",
        show_default=False,
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Have them on the hosts of a Ray cluster that this machine is a node of: HOST:PORT, auto, "
        "or local (this machine alone).",
    ),
]
Track = Annotated[
    list[str] | None,
    typer.Option(
        "--track", help="tensorboard or mlflow: is told the scalars of every training, trials, bundle and report."
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of every random choice.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing while working.")]


def arguments_of(option: str, pairs: Sequence[str] | None) -> dict[str, Any]:
    """Return the values of an option that is given as name=value, each once; see `user_code.parse_arguments`."""
    from hirelc_deploy.user_code import parse_arguments

    return parse_arguments(pairs or [], option)


def methods(option: str, pairs: Sequence[str] | None) -> dict[str, str]:
    """Return pattern to method of an option that is given as PATTERN=METHOD."""
    found: dict[str, str] = {}
    for pair in pairs or ():
        pattern, equals, method = pair.rpartition("=")
        if not equals or not pattern:
            raise InputError(f"{option} {pair!r}: write LAYERS=METHOD, as in 'stages.1.*=minmax'.")
        found.pop(pattern, None)  # the last one counts, as among patterns
        found[pattern] = method
    return found


def numbers(option: str, text: str | None, kind: type[int] | type[float]) -> tuple[Any, ...] | None:
    """Return the numbers of an option; raises InputError where they are none."""
    try:
        return None if text is None else tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{option} {text!r}: give numbers with commas between them.") from None
