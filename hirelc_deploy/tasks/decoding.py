"""In: a task and what a file answered. Out: what its decoder, which travels in bundles, makes of it for people."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
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

    The decoder's function is `decode`, or that which the option `decode` of a user's own file names.

    Args:
        input_size: (channels, height, width) of the model's input.
        overrides: Of the decoder's options, such as another threshold.
    """
    options = {**decoder_options(task, input_size), **overrides}
    decode = getattr(_module(task.decoder), options.get("decode") or "decode")
    results: list[Mapping[str, Any]] = decode(dict(outputs), options, dict(task.decoder_arrays))
    return results


def line(task: Task, result: Mapping[str, Any]) -> str:
    """Return what a terminal says of one result: the decoder's `line`, or the result as JSON where it has none."""
    said = getattr(_module(task.decoder), "line", None)
    return json.dumps(dict(result), default=lambda array: array.tolist()) if said is None else str(said(dict(result)))


def foreign_imports(file: Path) -> list[str]:
    """Return the packages that a decoder imports as it is loaded, beside numpy: a bundle's machine has no others."""
    found: set[str] = set()
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or ".").partition(".")[0])
    return sorted(found - sys.stdlib_module_names - {"numpy"})


def _module(file: Path) -> ModuleType:
    """Return the decoder as a bundle runs it: from its file alone."""
    spec = importlib.util.spec_from_file_location(f"hirelc_decoder_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
