"""In: the name of a file or module of the user's. Out: what it defines, or one sentence with the line that failed."""

from __future__ import annotations

import ast
import contextlib
import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import tomllib
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from hirelc_deploy.errors import InputError

OURS = str(Path(__file__).parent)
"""No line of this package led to an error of the user's."""


def parse_arguments(pairs: Sequence[str], option: str = "--model-arg") -> dict[str, Any]:
    """Return the values of `--model-arg key=value`: of JSON, TOML or Python where they parse, else the text itself."""
    arguments: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"{option} {pair!r}: write name=value.")
        if name in arguments:
            raise InputError(f"{option} {name} is given twice.")
        arguments[name] = _parse_value(text)
    return arguments


def _parse_value(text: str) -> Any:
    for parse in (json.loads, lambda item: tomllib.loads(f"value = {item}")["value"], ast.literal_eval):
        with contextlib.suppress(ValueError, KeyError, SyntaxError, RecursionError, MemoryError):
            return parse(text)
    return text


@contextlib.contextmanager
def usual_torch() -> Iterator[None]:
    """Work with torch's own settings, whatever a caller chose, and put theirs back; compiled code runs as written.

    They are the default dtype and device, whether gradients and autocast are on, and inference mode.
    """
    import torch

    with settings_kept(), contextlib.ExitStack() as stack:
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch.is_autocast_enabled("cpu"):
            stack.enter_context(torch.autocast("cpu", enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        try:
            yield
        finally:
            if "torch._dynamo" in sys.modules:
                torch.compiler.set_stance("default")


@contextlib.contextmanager
def settings_kept() -> Iterator[None]:
    """Undo what code of a user's switches for everybody.

    The default dtype and device of torch, gradients, how numpy and warnings meet errors, and the current folder.
    """
    import numpy as np
    import torch

    here = Path.cwd()
    dtype, device, gradients = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    try:
        with np.errstate(), warnings.catch_warnings():
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)
        if torch.get_default_device() != device:
            torch.set_default_device(device)
        os.chdir(here)


def run_as_written() -> None:
    """Let functions under torch.compile run as they are written, where any may have been compiled."""
    import torch

    if "torch._dynamo" in sys.modules:  # comes with the first call of torch.compile; to import it takes seconds
        torch.compiler.set_stance("force_eager")


@contextlib.contextmanager
def importing_from(file: Path | None) -> Iterator[None]:
    """Let a model file import its neighbours, and a module be found from the current folder; then forget the path.

    What its code switches for everybody is switched back.
    """
    before = list(sys.path)
    sys.path.append(str(file.resolve().parent if file is not None else Path.cwd()))
    try:
        with settings_kept():
            yield
    finally:
        sys.path[:] = before


def import_from(target: str, spec: str, option: str = "--model") -> ModuleType:
    """Return the module of a user's `file.py`, or one that is installed or in the current folder.

    Args:
        spec, option: What the user wrote, and behind which option.

    Raises:
        InputError: It is not there, or fails; with the line of the user's that led to it.
    """
    file = Path(target) if target.endswith(".py") else None
    with importing_from(file):
        return _import_file(file, option) if file is not None else _import_module(target, spec, option)


def _import_file(file: Path, option: str) -> ModuleType:
    if not file.is_file():
        raise InputError(f"{option} {file}: no such file.")
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
        raise InputError(f"{place_of(error, file, f'{option} {file}')}: {first_line(error)}.") from None
    return module


def _module_name(file: Path) -> str:
    """Return a name of its own, so that a file called like an installed package hides nothing."""
    return f"hirelc_model_{hashlib.sha256(os.fsencode(file.resolve())).hexdigest()[:12]}"


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


def _import_module(name: str, spec: str, option: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise InputError(
                f"{option} {spec}: there is no module {error.name!r}; install it, or give FILE.py:FUNCTION."
            ) from None
        raise InputError(f"{option} {spec}: {name} cannot be imported ({error}).") from None
    except (Exception, SystemExit) as error:
        raise InputError(f"{place_of(error, None, f'{option} {spec}')}: {first_line(error)}.") from None


def near_names(name: str, module: ModuleType) -> str:
    """Return what a sentence says of a name that a module has not."""
    near = difflib.get_close_matches(name, [key for key in vars(module) if not key.startswith("_")], n=3)
    return f"did you mean {' or '.join(near)}?" if near else "check the name after the colon."


def place_of(error: BaseException, file: Path | None, otherwise: str) -> str:
    """Return `file, line n` of the innermost line that led to an error: in `file`, or in no installed package."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    theirs = [frame for frame in frames if file is not None and Path(frame.filename) == file] or [
        frame for frame in frames if "site-packages" not in frame.filename and not frame.filename.startswith(OURS)
    ]
    return f"{theirs[-1].filename}, line {theirs[-1].lineno}" if theirs else otherwise


def first_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    return f"{type(error).__name__}: {text[:200].rstrip('.')}"
