"""In: ONNX files in TensorRT's form, and a chip. Out: the kernels that NVIDIA's compiler makes of them, without a GPU.

TensorRT-RTX compiles ahead of time on any x86-64 or aarch64 machine (`pip install hirelc-deploy[tensorrt-rtx]`). Its
parser, typing rules and graph compiler are those of TensorRT 11, so a file that it takes, fuses and runs in integers
will be understood on a device too. It times nothing, and TensorRT 10.3 on a Jetson may still decide otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from hirelc_backends.tensorrt_program import Unusable, build_plan, is_rtx, load_tensorrt
from hirelc_deploy.errors import ExportError, TargetUnavailable

ORIN_CLASS = "SM86"
"""The chip nearest to a Jetson Orin (SM 8.7) that it can compile for."""
EIGHT_BITS = frozenset({"int8", "fp8_e4m3"})


@dataclass(frozen=True)
class Kernel:
    """One launch of a compiled network.

    Attributes:
        kind: The compiler's word: `corrltn` (convolution), `fully_connected`, `runtime_fusion` (either of them with
            what follows), `function` (all else).
        input_types: Of its inputs, in order, such as `int8` or `half`; `?` where the plan does not say.
        nodes: Names of the ONNX nodes it computes, or computes a part of.
    """

    kind: str
    name: str
    input_types: tuple[str, ...]
    nodes: tuple[str, ...]

    @property
    def is_attention(self) -> bool:
        """Whether it is both products of an attention and the Softmax between them."""
        return "mha" in self.name

    @property
    def is_product(self) -> bool:
        """Whether it convolves or multiplies matrices."""
        fused = self.kind == "runtime_fusion" and re.search(r"Corr|Fc|Gemm", self.name) is not None
        return fused or self.kind in ("corrltn", "fully_connected") or self.is_attention

    @property
    def is_integer(self) -> bool:
        """Whether it multiplies 8-bit numbers by 8-bit numbers (FP8 counts)."""
        return self.is_product and len(self.input_types) >= 2 and set(self.input_types[:2]) <= EIGHT_BITS


def availability() -> str | None:
    """Return None where TensorRT-RTX can be imported, else the reason and the remedy."""
    try:
        _runtime()
    except Unusable as error:
        return f"{error}; install it with `pip install hirelc-deploy[tensorrt-rtx]`."
    return None


def version() -> str:
    """Return the name and version of the compiler; raises Unusable where there is none."""
    trt = _runtime()
    return f"{trt.__name__} {trt.__version__}"


def compile_kernels(model: Path, chip: str = ORIN_CLASS) -> list[Kernel]:
    """Return the kernels of a file in execution order.

    Raises:
        TargetUnavailable: TensorRT-RTX is not installed, or cannot compile for this chip.
        ExportError: its parser or compiler refuses the file; its own words.
    """
    try:
        trt = _runtime()
    except Unusable as error:
        raise TargetUnavailable(f"{error}; install it with `pip install hirelc-deploy[tensorrt-rtx]`.") from None
    known = [name for name in dir(trt.ComputeCapability) if name.startswith("SM")]
    if chip not in known:
        raise TargetUnavailable(f"chip {chip!r} is not one that TensorRT-RTX compiles for: {', '.join(sorted(known))}.")
    try:
        plan, _ = build_plan(trt, model.read_bytes(), chip=chip)
    except Unusable as error:
        raise ExportError(f"{model}: {error}.") from None
    kernels = read_kernels(plan)
    if not kernels:
        raise ExportError(
            f"{model}: TensorRT-RTX {trt.__version__} built it, but lists its kernels in a form that is not known "
            "here; version 1.7 was tried."
        )
    return kernels


def _runtime() -> Any:
    import importlib

    def only_rtx(name: str) -> Any:
        if name == "tensorrt":
            raise ImportError("compiles for the GPU that is here only")
        return importlib.import_module(name)

    trt = load_tensorrt(only_rtx)
    assert is_rtx(trt)
    return trt


def read_kernels(plan: bytes) -> list[Kernel]:
    """Return the kernels that a plan lists in its text, which NVIDIA does not document.

    Each compiled region starts at `{ForeignNode[`: first its tensors with their types, then after ` label ` one entry
    per kernel. The bodies of fused kernels follow, each behind a header of its own, and are not launches.
    """
    kernels: list[Kernel] = []
    for region in plan.split(b"{ForeignNode[")[1:]:
        head, _, body = region.decode("utf-8", "replace").partition("\n label ")
        types = dict(re.findall(r'\n  (?:sub_)?tensor=\{[^\n]*? name="([^"]+)"[^\n]* type=(\w+)', head))
        for entry in re.split(r"\n  (?=[a-z_]+=\{ name=)", body.partition("\n  version = ")[0])[1:]:
            kernels.append(_kernel(entry, types))
    return kernels


def _kernel(entry: str, types: dict[str, str]) -> Kernel:
    kind = entry.partition("=")[0]
    name = re.match(r'\w+=\{ name="?([^" ]+)', entry)
    inputs = re.search(r" input(?:_args)?=\{([^}]*)\}", entry)
    names = re.findall(r'"([^"]+)"', inputs[1]) if inputs else []
    nodes = re.findall(r"\[ONNX Layer: ([^\]]+)\]", entry)
    return Kernel(kind, name[1] if name else "", tuple(types.get(one, "?") for one in names), tuple(nodes))


@dataclass(frozen=True)
class Compiled:
    """What became of the layers that a file wanted in integers.

    Attributes:
        kernels: Launches of one inference.
        wanted: ONNX nodes that read rounded activations and rounded weights.
        integer: Those of them that a kernel computes in integers.
        left_float: The others, by name.
        float_products: Convolutions and matrix products in floating point, wanted or not.
        attentions, integer_attentions: Fused attention kernels, and those of them in integers.
        per_block: Block to the kernels whose first node lies in it.
    """

    kernels: int
    wanted: int
    integer: int
    left_float: tuple[str, ...]
    float_products: int
    attentions: int
    integer_attentions: int
    per_block: dict[str, int]


def examine(model: Path, kernels: Sequence[Kernel], blocks: Sequence[str] = ()) -> Compiled:
    """Return what the compiler made of a file; `blocks` are prefixes of node names, such as `layer1.0`."""
    proto = onnx.load(str(model), load_external_data=False)
    restored = {node.output[0] for node in proto.graph.node if node.op_type == "DequantizeLinear"}
    wanted = {
        node.name
        for node in proto.graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul") and set(node.input[:2]) <= restored
    }
    products = [kernel for kernel in kernels if kernel.is_product]
    integer = {node for kernel in products if kernel.is_integer for node in kernel.nodes} & wanted
    found = [
        next((b for node in k.nodes for b in blocks if node.startswith((f"{b}.", f"{b}/"))), None) for k in kernels
    ]
    per_block = {block: found.count(block) for block in blocks}
    return Compiled(
        kernels=len(kernels),
        wanted=len(wanted),
        integer=len(integer),
        left_float=tuple(sorted(wanted - integer)),
        float_products=sum(not kernel.is_integer for kernel in products),
        attentions=sum(kernel.is_attention for kernel in kernels),
        integer_attentions=sum(kernel.is_attention and kernel.is_integer for kernel in kernels),
        per_block=per_block,
    )
