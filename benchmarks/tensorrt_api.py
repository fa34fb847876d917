"""In: bindings wheels of TensorRT releases. Out: tests/data/tensorrt_api.json, the names each release's Python API has.

    pip download --no-deps --only-binary=:all: --python-version 3.11 -d bindings tensorrt-cu12-bindings==10.3.0 ...
    python benchmarks/tensorrt_api.py bindings/*.whl

The bindings of every release are real wheels, while most of the libraries behind them are not on PyPI. Importing needs
nine entry points of these libraries, and empty ones will do: no function of TensorRT is ever called. Needs `cc`, and
the Python version that the wheels are for. `tensorrt_rtx_bindings` is listed too where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

OUT = Path(__file__).resolve().parent.parent / "tests" / "data" / "tensorrt_api.json"
CLASSES = (
    *("Builder", "BuilderFlag", "EngineInspector", "IBuilderConfig", "ICudaEngine", "IExecutionContext", "IHostMemory"),
    *("ILogger", "INetworkDefinition", "IOptimizationProfile", "IProfiler", "ITensor", "ITimingCache", "Runtime"),
    *("LayerInformationFormat", "NetworkDefinitionCreationFlag", "OnnxParser", "ParserError", "ProfilingVerbosity"),
    *("TensorIOMode", "ComputeCapability", "nptype"),
)
"""What tensorrt_program.py touches; `nptype` is a function."""
ENTRIES = (
    *("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL"),
    *("createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getNvOnnxParserVersion"),
    *("getBuilderPluginRegistry", "getPluginRegistry", "initLibNvInferPlugins"),
)
LIST = """
import importlib, json, sys
module = importlib.import_module(sys.argv[1])
names = {name: sorted(one for one in dir(getattr(module, name)) if not one.startswith("_"))
         for name in sys.argv[2].split(",") if hasattr(module, name)}
print(json.dumps({"version": module.__version__, "names": names}))
"""


def listed(module: str, environment: dict[str, str]) -> dict[str, object]:
    """Return the version and the names of the classes of a module, asked in a process of its own."""
    command = [sys.executable, "-c", LIST, module, ",".join(CLASSES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def listed_wheel(wheel: Path, folder: Path) -> dict[str, object]:
    """Unpack a wheel, put empty libraries beside it, and list it."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    binary = next(folder.glob("tensorrt_bindings/tensorrt*.so")).read_bytes()
    source = folder / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in ENTRIES))
    for library in sorted({one.decode() for one in re.findall(rb"libnv[a-z_]+\.so\.\d+", binary)}):
        options = ["-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", str(folder / library)]
        subprocess.run(["cc", *options, str(source)], check=True)
    return listed("tensorrt_bindings", {**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(folder)})


def main() -> int:
    """List every wheel and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, nargs="+")
    surfaces = []
    for wheel in parser.parse_args().wheels:
        with tempfile.TemporaryDirectory() as folder:
            surfaces.append({"module": "tensorrt", **listed_wheel(wheel, Path(folder))})
    if importlib.util.find_spec("tensorrt_rtx_bindings"):
        surfaces.append({"module": "tensorrt_rtx", **listed("tensorrt_rtx_bindings", dict(os.environ))})
    surfaces.sort(key=lambda one: (one["module"], [int(part) for part in str(one["version"]).split(".")[:2]]))
    OUT.write_text("[\n" + ",\n".join(map(json.dumps, surfaces)) + "\n]\n", "utf-8")
    print(OUT.name, *(f"{one['module']} {one['version']}: {len(one['names'])} classes" for one in surfaces), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
