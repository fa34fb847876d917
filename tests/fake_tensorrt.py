# ruff: noqa: N802, N815 - the driver's own names
"""In: a recorded API surface. Out: a TensorRT and a CUDA driver with those names only, that compute one known thing.

The engine doubles the first five numbers of its input, and its GPU takes two milliseconds for that, whatever the file;
`fake_gpu_program.py` has one that reads files. Nothing here says anything about a GPU; it shows that the code calls
what the releases have, in an order that makes sense.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

SURFACES = json.loads((Path(__file__).parent / "data" / "tensorrt_api.json").read_text("utf-8"))
SHAPE, OUTPUTS, GPU_MILLISECONDS = (1, 3, 4, 4), 5, 2.0
INSPECTED = {
    "Layers": [
        {
            "Name": "conv + relu",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "x", "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}],
            "Outputs": [{"Name": "y", "Format/Datatype": "Row major linear FP16 format"}],
        },
        {"Name": "reformat", "LayerType": "Reformat", "Inputs": [{"Format/Datatype": "Row major Int8 format"}]},
    ]
}


@dataclass(frozen=True)
class Network:
    """What a parsed file is to the engine: its types and shapes, what it computes, and how long that takes."""

    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, Any]
    compute: Callable[[np.ndarray], list[np.ndarray]]
    milliseconds: float
    inspected: Mapping[str, Any]
    layer_milliseconds: Mapping[str, float]


class FakeDriver:
    """libcuda, with host memory for the GPU's. A stream works at once; a graph is the launches made while capturing."""

    def __init__(self, gpu: str = "Fake GPU", capability: tuple[int, int] = (8, 7), devices: int = 1) -> None:
        self.gpu, self.capability, self.devices = gpu, capability, devices
        self.milliseconds = 0.0
        self.live: dict[int, Any] = {}
        self.capturing = False
        self.recorded: list[Callable[[], None]] = []
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)
        function = getattr(self, f"_{name}", lambda *arguments: None)

        def called(*arguments: Any) -> int:
            self.calls.append(name)
            return function(*arguments) or 0

        entry = SimpleNamespace(argtypes=())
        made = type("Entry", (), {"__call__": lambda _, *arguments: called(*arguments)})()
        made.argtypes = entry.argtypes
        return made

    def _cuDeviceGetCount(self, count: Any) -> None:
        count._obj.value = self.devices

    def _cuDeviceGetName(self, name: Any, size: int, device: Any) -> None:
        name.value = self.gpu.encode()

    def _cuDriverGetVersion(self, value: Any) -> None:
        value._obj.value = 12060

    def _cuDeviceTotalMem_v2(self, size: Any, device: Any) -> None:
        size._obj.value = 8 << 30

    def _cuDeviceGetAttribute(self, value: Any, number: int, device: Any) -> None:
        value._obj.value = {75: self.capability[0], 76: self.capability[1]}.get(number, 1)

    def _cuMemAlloc_v2(self, address: Any, size: int) -> None:
        buffer = ctypes.create_string_buffer(size)
        address._obj.value = ctypes.addressof(buffer)
        self.live[ctypes.addressof(buffer)] = buffer

    def _cuMemHostAlloc(self, pointer: Any, size: int, flags: int) -> None:
        self._cuMemAlloc_v2(pointer, size)

    def _cuMemFree_v2(self, address: int) -> None:
        del self.live[address]

    _cuMemFreeHost = _cuMemFree_v2

    def _cuMemcpyHtoDAsync_v2(self, to: int, source: int, size: int, stream: Any) -> None:
        ctypes.memmove(to, source, size)

    _cuMemcpyDtoHAsync_v2 = _cuMemcpyHtoDAsync_v2

    def _cuStreamCreate(self, made: Any, flags: int) -> None:
        made._obj.value = 7

    def _cuEventCreate(self, made: Any, flags: int) -> None:
        made._obj.value = 100 + len(self.live) + len(self.calls)

    def _cuEventRecord(self, event: Any, stream: Any) -> None:
        self.live[-event.value] = self.milliseconds

    def _cuEventElapsedTime(self, elapsed: Any, start: Any, end: Any) -> None:
        elapsed._obj.value = self.live[-end.value] - self.live[-start.value]

    def _cuStreamBeginCapture_v2(self, stream: Any, mode: int) -> None:
        self.capturing = True

    def _cuStreamEndCapture(self, stream: Any, graph: Any) -> None:
        self.capturing, graph._obj.value = False, 9

    def _cuGraphInstantiateWithFlags(self, made: Any, graph: Any, flags: int) -> None:
        made._obj.value = len(self.recorded)

    def _cuGraphLaunch(self, graph: Any, stream: Any) -> None:
        self.recorded[graph.value - 1]()


class Limited:
    """An object that only has the names a release has, whatever the one behind it can do."""

    def __init__(self, behind: Any, names: set[str], kind: str) -> None:
        object.__setattr__(self, "_parts", (behind, names, kind))

    def __getattr__(self, name: str) -> Any:
        behind, names, kind = object.__getattribute__(self, "_parts")
        if name not in names:
            raise AttributeError(f"{kind} of this release has no {name}")
        return getattr(behind, name)

    def __setattr__(self, name: str, value: Any) -> None:
        behind, names, kind = object.__getattribute__(self, "_parts")
        if name not in names:
            raise AttributeError(f"{kind} of this release has no {name}")
        setattr(behind, name, value)


class FakeTensorrt(ModuleType):
    """A module with the classes and members of one recorded release.

    Attributes:
        refuses_strong: Strongly typed builds fail, as if an old release could not do them.
        settings: What the builder configuration was told.
    """

    def __init__(self, surface: dict[str, Any], driver: FakeDriver) -> None:
        super().__init__(surface["module"])
        self.__version__ = surface["version"]
        self.surface, self.driver = {name: set(names) for name, names in surface["names"].items()}, driver
        self.refuses_strong, self.refuses_all, self.builds = False, False, 0
        self.settings: dict[str, Any] = {}
        self.parsed = b""
        self.profilers: list[Any] = []

    def understood(self, model: bytes) -> Network:
        """Return what a file is; raises ValueError with the parser's words where it is refused."""
        if model == b"bad":
            raise ValueError("zero point must be 0")
        return Network(
            {"x": SHAPE, "y": (1, OUTPUTS)},
            {"x": np.float32, "y": np.float32},
            lambda image: [2 * image.ravel()[:OUTPUTS]],
            {b"fast": 1.0, b"slow": 3.0}.get(model, GPU_MILLISECONDS),
            INSPECTED,
            {layer["Name"]: 0.25 for layer in INSPECTED["Layers"]},
        )

    def limited(self, kind: str, behind: Any) -> Any:
        return Limited(behind, self.surface[kind], kind)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self.surface:
            raise AttributeError(f"this release has no {name}")
        if name == "nptype":
            return lambda kind: kind
        if name in ("ILogger", "IProfiler"):
            severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2)
            return type(name, (), {"__init__": lambda _: None, "Severity": severity})
        made = {"Builder": self._builder, "OnnxParser": self._parser, "Runtime": self._runtime}
        if name in made:
            return made[name]
        # Enumerations: a member is its place in the list, under a name that int() can take.
        members = sorted(self.surface[name])
        return self.limited(name, SimpleNamespace(**{member: at for at, member in enumerate(members)}))

    def _builder(self, log: Any) -> Any:
        def first_input(at: int) -> Any:
            name, shape = next(iter(self.understood(self.parsed).shapes.items()))
            return self.limited("ITensor", SimpleNamespace(name=name, shape=shape))

        network = SimpleNamespace(get_input=first_input)
        config = SimpleNamespace(
            profiling_verbosity=None,
            num_compute_capabilities=0,
            clear_flag=lambda flag: self.settings.setdefault("cleared", []).append(flag),
            set_flag=lambda flag: self.settings.setdefault("set", []).append(flag),
            set_compute_capability=lambda chip, at: self.settings.update(chip=chip),
            create_timing_cache=lambda blob: self.limited("ITimingCache", SimpleNamespace(serialize=lambda: b"timed")),
            set_timing_cache=lambda cache, ignore_mismatch: self.settings.update(cache=cache),
            get_timing_cache=lambda: self.settings["cache"],
        )

        def create_network(flags: int) -> Any:
            self.settings["flags"] = flags
            return self.limited("INetworkDefinition", network)

        def build(network: Any, config: Any) -> bytes | None:
            self.builds += 1
            if self.refuses_all or (self.refuses_strong and self.settings["flags"]):
                log.log(1, "no implementation found")
                return None
            return b"plan of " + self.parsed

        return self.limited(
            "Builder",
            SimpleNamespace(
                create_network=create_network,
                create_builder_config=lambda: self.limited("IBuilderConfig", config),
                build_serialized_network=build,
            ),
        )

    def _parser(self, network: Any, log: Any) -> Any:
        errors: list[str] = []

        def parse(model: bytes) -> bool:
            self.parsed = model
            try:
                self.understood(model)
            except ValueError as error:
                errors.append(str(error))
            return not errors

        def error_at(at: int) -> Any:
            return self.limited("ParserError", SimpleNamespace(desc=lambda: errors[at]))

        parsed = SimpleNamespace(parse=parse, num_errors=1, get_error=error_at)
        return self.limited("OnnxParser", parsed)

    def _runtime(self, log: Any) -> Any:
        return self.limited("Runtime", SimpleNamespace(deserialize_cuda_engine=self._engine))

    def _engine(self, plan: bytes) -> Any:
        if not plan.startswith(b"plan of "):
            return None
        network = self.understood(plan[len(b"plan of ") :])
        names = list(network.shapes)
        modes = dict.fromkeys(names, self.TensorIOMode.OUTPUT) | {names[0]: self.TensorIOMode.INPUT}
        information = json.dumps(network.inspected)
        inspector = SimpleNamespace(execution_context=None, get_engine_information=lambda form: information)
        return self.limited(
            "ICudaEngine",
            SimpleNamespace(
                num_io_tensors=len(names),
                get_tensor_name=names.__getitem__,
                get_tensor_mode=modes.__getitem__,
                get_tensor_shape=network.shapes.__getitem__,
                get_tensor_dtype=network.types.__getitem__,
                create_execution_context=lambda: self._context(network),
                create_engine_inspector=lambda: self.limited("EngineInspector", inspector),
            ),
        )

    def _context(self, network: Network) -> Any:
        addresses: dict[str, int] = {}

        def at(name: str) -> np.ndarray:
            shape, kind = network.shapes[name], np.dtype(network.types[name])
            raw = (ctypes.c_ubyte * (int(np.prod(shape)) * kind.itemsize)).from_address(addresses[name])
            return np.frombuffer(raw, kind).reshape(shape)

        def work() -> None:
            self.driver.milliseconds += network.milliseconds
            source, *results = network.shapes
            for name, result in zip(results, network.compute(at(source)), strict=True):
                at(name)[...] = result

        def execute(stream: int) -> bool:
            if self.driver.capturing:
                self.driver.recorded.append(work)
            else:
                work()
            return True

        def report() -> None:
            for name, milliseconds in network.layer_milliseconds.items():
                context.profiler.report_layer_time(name, milliseconds)

        context = SimpleNamespace(
            get_tensor_shape=network.shapes.__getitem__,
            set_input_shape=lambda name, shape: True,
            set_tensor_address=addresses.__setitem__,
            execute_async_v3=execute,
            profiler=None,
            enqueue_emits_profile=True,
            report_to_profiler=report,
        )
        return self.limited("IExecutionContext", context)
