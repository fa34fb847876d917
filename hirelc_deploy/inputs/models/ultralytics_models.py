"""In: the name of an ultralytics network. Out: that network, answering with one tensor; none of its code is here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.models.plain import answering, marked
from hirelc_deploy.user_code import first_line

TASKS: Mapping[str, Mapping[str, Any]] = {
    "detect": {"task": "detection", "head": "yolo"},
    "classify": {"task": "classification"},
}
"""Their word for a task to ours; others answer with more than boxes or classes."""

INPUT_SIZE = {"detect": (3, 640, 640), "classify": (3, 224, 224)}
"""The sizes their networks are trained at; --input-size gives another."""


def build(name: str) -> nn.Module:
    """Return the network of NAME.yaml with random weights; FILE.pt stands for the network of that name.

    Their networks answer in eval mode with boxes (n, 4 + classes, a), centre and size in pixels, and with what their
    losses read, which is left out here.
    """
    try:
        from ultralytics import YOLO
    except ImportError:
        raise InputError(
            "--model ultralytics:NAME.yaml needs ultralytics, whose licence is AGPL-3.0; if that suits you, "
            "install it with pip install 'hirelc-deploy[ultralytics]'."
        ) from None
    if not name.endswith((".yaml", ".pt")):
        raise InputError(f"--model ultralytics:{name}: give NAME.yaml and --weights FILE.safetensors, or FILE.pt.")
    network = f"{Path(name).stem}.yaml" if name.endswith(".pt") else name
    try:
        whole = YOLO(network)
    except Exception as error:  # a name that it does not know, or whatever else it may raise
        raise InputError(f"--model ultralytics:{name}: {network} cannot be built ({first_line(error)}).") from None
    if whole.task not in TASKS or getattr(whole.model, "end2end", False):
        found = whole.task if whole.task not in TASKS else "detect without suppression (end2end)"
        raise InputError(f"--model ultralytics:{name}: its task is {found}; give a network of {' or '.join(TASKS)}.")
    model: nn.Module = answering(whole.model, ("output",))
    names = whole.names.values() if isinstance(whole.names, Mapping) else whole.names
    options = {**TASKS[whole.task], "outputs": ["output"]}
    geometry = "letterbox" if whole.task == "detect" else "crop"
    config = {
        "input_size": INPUT_SIZE[whole.task],
        "mean": (0.0,) * 3,
        "std": (1.0,) * 3,
        "crop_pct": 1.0,
        "geometry": geometry,
        "interpolation": "bilinear",
    }
    return marked(model, options, [str(text) for text in names], config)


def weights_of(name: str) -> Path | None:
    """Return FILE.pt where the spec is one; the network in it is read as tensors, and none of its code is run."""
    if not name.endswith(".pt"):
        return None
    file = Path(name)
    if not file.is_file():
        raise InputError(f"{file}: no such weights file.")
    return file
