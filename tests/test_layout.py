from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A room imports from itself and from those above it.
ORDER = (
    ("errors", "progress", "time_left", "version", "user_code", "_torchvision_guard"),
    ("plan", "outcome", "config", "schemas", "trackers"),
    ("together",),
    ("graph",),
    ("tasks",),
    ("inputs", "demo"),
    ("measure", "testing", "hirelc_backends"),
    ("compress",),
    ("strategies",),
    ("runs",),
    ("run_log",),
    ("evaluate",),
    ("deliver",),
    ("results",),
    ("jobs",),
    ("returned", "options"),
    ("arguments",),
    ("api",),
    ("__init__", "cli", "__main__"),
)
STRATEGIES_SEE = {"errors", "plan", "outcome", "strategies"}
BACKENDS_SEE = {"errors", "measure", "hirelc_backends"}
RUNTIMES = {"onnxruntime", "tensorrt", "tensorrt_rtx", "nncf", "openvino", "ray"}
ADAPTERS = {
    "hirelc_backends",
    "compress/integer/four_bits.py",
    "compress/integer/quantize.py",
    "compress/onnx_file/export.py",
    "compress/integer/nncf_engine.py",
    "inputs/models/onnx_files/runtime.py",
    "together/ray_cluster.py",
    "deliver/bundle_template/runtime_onnxruntime.py",
    "deliver/bundle_template/runtime_openvino.py",
}
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}


def product_files() -> list[Path]:
    return sorted([*(ROOT / "hirelc_deploy").rglob("*.py"), *(ROOT / "backends").rglob("*.py")])


def part_of(file: Path) -> str:
    """Return the name of a file in ORDER."""
    relative = file.relative_to(ROOT)
    if relative.parts[0] == "backends":
        return relative.parts[1]
    return relative.parts[1].removesuffix(".py")


def imports(file: Path) -> Iterator[tuple[str, int]]:
    """Yield (dotted name, line) of every import, those inside functions too; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import hides its place in the order"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def own_imports(file: Path) -> Iterator[tuple[str, int]]:
    """Yield (part in ORDER, line) of the imports of this project."""
    parts = {name for line in ORDER for name in line}
    for name, line in imports(file):
        root, *rest = name.split(".")
        if root == "hirelc_backends":
            yield root, line
        elif root == "hirelc_deploy":
            yield (rest[0] if rest[0] in parts else "__init__"), line


@pytest.mark.parametrize("file", product_files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_one_way(file: Path) -> None:
    rank = {name: index for index, line in enumerate(ORDER) for name in line}
    part = part_of(file)
    assert part in rank, f"give {part} its place in ORDER"
    for name, line in own_imports(file):
        assert rank[name] <= rank[part], f"{file}:{line}: {part} must not import {name}"


def test_no_module_imports_itself_through_others() -> None:
    names = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removeprefix("backends."): file
        for file in product_files()
    }
    names = {name.removesuffix(".__init__"): file for name, file in names.items()}
    graph: dict[str, set[str]] = {}
    for name, file in names.items():
        wanted = {found if found in names else found.rpartition(".")[0] for found, _ in imports(file)}
        graph[name] = {
            found for found in wanted if found in names and found != name and not name.startswith(f"{found}.")
        }
    assert tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_the_search_knows_neither_compression_nor_devices() -> None:
    for file in (ROOT / "hirelc_deploy" / "strategies").glob("*.py"):
        assert {name for name, _ in own_imports(file)} <= STRATEGIES_SEE, file
        roots = {name.partition(".")[0] for name, _ in imports(file)}
        assert not roots & {"timm", "torchvision", "onnx", "safetensors", *RUNTIMES}, file


def test_a_backend_knows_only_the_contract() -> None:
    for file in (ROOT / "backends").rglob("*.py"):
        assert {name for name, _ in own_imports(file)} <= BACKENDS_SEE, file


def test_runtimes_are_imported_in_their_adapters_only() -> None:
    for file in product_files():
        place = (
            str(file.relative_to(ROOT / "hirelc_deploy")) if part_of(file) != "hirelc_backends" else "hirelc_backends"
        )
        for name, line in imports(file):
            assert name.partition(".")[0] not in RUNTIMES or place in ADAPTERS, f"{file}:{line}: {name}"


def test_nothing_reads_or_writes_pickles() -> None:
    for file in [*product_files(), *(ROOT / "benchmarks").rglob("*.py")]:
        for name, line in imports(file):
            assert name.partition(".")[0] not in PICKLES, f"{file}:{line}: {name}"
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
            assert given.get("allow_pickle") is not True, f"{file}:{node.lineno}: allow_pickle=True"
            called = ast.unparse(node.func)
            if called == "torch.load":
                assert given.get("weights_only") is True, f"{file}:{node.lineno}: torch.load without weights_only=True"
            if called == "torch.save":
                raise AssertionError(f"{file}:{node.lineno}: torch.save writes a pickle; use safetensors")


def test_the_command_starts_without_torch() -> None:
    code = "import sys, hirelc_deploy.cli; print([n for n in ('torch', 'timm', 'onnxruntime') if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
