"""In: a task and what a file answered. Out: what its decoder, which travels in bundles, makes of it for people."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from hirelc_deploy.tasks.contract import Arrays, Task


def decoder_options(task: Task, input_size: Sequence[int]) -> dict[str, Any]:
    """Return the JSON values that the decoder of a task is called with."""
    return {"classes": list(task.classes), "input_size": list(input_size), **task.decoder_options}


def decoded(
    task: Task, outputs: Arrays, input_size: Sequence[int], overrides: Mapping[str, Any] = MappingProxyType({})
) -> list[Mapping[str, Any]]:
    """Return one result an image.

    Args:
        input_size: (channels, height, width) of the model's input.
        overrides: Of the decoder's options, such as another threshold.
    """
    options = {**decoder_options(task, input_size), **overrides}
    results: list[Mapping[str, Any]] = _module(task.decoder).decode(dict(outputs), options, dict(task.decoder_arrays))
    return results


def line(task: Task, result: Mapping[str, Any]) -> str:
    """Return what a terminal says of one result."""
    return str(_module(task.decoder).line(dict(result)))


def _module(file: Path) -> ModuleType:
    """Return the decoder as a bundle runs it: from its file alone."""
    spec = importlib.util.spec_from_file_location(f"hirelc_decoder_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
