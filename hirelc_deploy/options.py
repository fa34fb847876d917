"""In: nothing. Out: the names and types of what the calls of Python have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from hirelc_deploy.progress import Listener, Progress


class JobOptions(TypedDict, total=False):
    """What `search` and `apply` have in common, beside model, data, task and folder; all of it may be left out.

    Attributes:
        weights: A .safetensors file, or .pth read safely.
        weights_key: Which of several state dicts in that file; without it averaged weights come first.
        model_args: Arguments of the factory.
        pretrained: Let timm fetch its own weights.
        data_dir: Folder of a torchvision data set, or of the pictures of COCO files.
        calibration_images, selection_images: Training images set aside for ranges, and for choosing.
        collate_fn: Of the user's data sets, where their items need one.
        classes: Names of the classes of the user's data sets.
        lower_is_better: Of the user's metric.
        task_options: Of the task.
        input_size: (channels, height, width) of the model's input.
        mean, std: Of the normalisation, per channel.
        geometry, interpolation: Of pictures of another size: `crop`, `stretch` or `letterbox`, and how.
        crop_pct: Share of the resized picture that a crop keeps, in (0, 1].
        recovery_epochs, learning_rate: Of the recovery of each finalist.
        recovery_batch: Images of one step of it, over all processes; the learning rate grows with it.
        sync_norms: Batch norms see the whole batch where processes of torchrun share it.
        exclude, include: Patterns of units and layers.
        float_layers: Patterns of layers that stay float in every integer file.
        equalise: Patterns of layers whose channels are made alike across activations, too.
        ranges: Pattern of layers to how the ranges at their ends are taken: `minmax`, `percentile` or `mse`.
        threads: Of one inference.
        batch: Images of one inference; one where it is None.
        seed: Of every random choice.
        progress: Called with a line of text for everything that is begun or done; without it nothing is said.
        track: `tensorboard`, `mlflow`: told the scalars of every training, every trial and the result.
        command: What the bundle says it was made by.
    """

    weights: str | Path | None
    weights_key: str | None
    model_args: Mapping[str, Any] | None
    pretrained: bool
    data_dir: str | Path | None
    calibration_images: int | None
    selection_images: int | None
    collate_fn: Callable[[list[Any]], Any] | None
    classes: Sequence[str] | None
    lower_is_better: bool | None
    task_options: Mapping[str, Any] | None
    input_size: Sequence[int] | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    geometry: str | None
    interpolation: str | None
    crop_pct: float | None
    recovery_epochs: float
    learning_rate: float
    recovery_batch: int | None
    sync_norms: bool
    exclude: Sequence[str]
    include: Sequence[str]
    float_layers: Sequence[str]
    equalise: Sequence[str]
    ranges: Mapping[str, str] | None
    threads: int | None
    batch: int | None
    seed: int
    progress: Listener | Progress | None
    track: Sequence[str]
    command: str


class SearchOptions(JobOptions, total=False):
    """What `search` and `family` have in common, beside model, data, limits and folder; see `search`."""

    task: str | None
    target: str
    metric: Callable[..., Any] | str | None
    loss: Callable[..., Any] | str | None
    strategy: str
    budget: str | float | None
    trials: int
    finalists: int
    race: int
    options: int
    warm_start: str | Path | None
    library: str | Path | None
    further_recovery: float | None
    depth: bool
    precisions: bool
    jobs: int | None
    ray: str | None
