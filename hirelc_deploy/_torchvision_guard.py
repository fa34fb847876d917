"""In: the installed torch and torchvision. Out: a torchvision that can be imported although its compiled part cannot.

The torchvision wheel of a package index is built for CUDA. Beside a CPU torch its extension does not load, and
torchvision then stops at import time, because it registers shape rules for operators that nobody declared. timm imports
torchvision always, and needs only its Python parts. Declaring those operators is enough; no installed file is touched.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

# The operators of torchvision's extension that its Python code names at import time (torchvision 0.21 to 0.28).
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # a declaration lives as long as its library object


def install() -> bool:
    """Make `import torchvision` possible; call before the first import of torchvision or timm.

    Returns:
        True when the operators had to be declared; False when nothing was needed: the wheels match, torchvision is
        absent, or it is imported already. Takes about 10 ms once, and nothing when called again.
    """
    if _declared or "torchvision" in sys.modules:
        return False
    found = importlib.util.find_spec("torchvision")
    if found is None or not found.submodule_search_locations:
        return False
    if _extension_loads(Path(found.submodule_search_locations[0])) or hasattr(torch.ops.torchvision, "nms"):
        return False
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _declared.append(library)
    return True


def _extension_loads(package: Path) -> bool:
    """Load torchvision's extension the way torchvision will do it itself, so that nothing is loaded twice."""
    files = [file for file in package.glob("_C*") if file.suffix in (".so", ".pyd")]
    try:
        for file in files:
            torch.ops.load_library(str(file))
    except OSError:
        return False
    return bool(files)
