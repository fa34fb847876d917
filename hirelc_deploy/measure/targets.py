"""In: the name of a device. Out: which backend, board, threads and precisions to use, built in or from targets.toml."""

from __future__ import annotations

import dataclasses
import difflib
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit

from hirelc_deploy.config import toml_table
from hirelc_deploy.errors import InputError, TargetUnavailable, home, printable
from hirelc_deploy.measure import ray_pipe
from hirelc_deploy.measure.backend import Backend, Portable, Precision
from hirelc_deploy.measure.machine import describe, fingerprint
from hirelc_deploy.measure.pool import PoolBackend
from hirelc_deploy.measure.program import ProgramBackend
from hirelc_deploy.measure.registry import get_backend, installed_backends
from hirelc_deploy.measure.remote import FOLDER, Board
from hirelc_deploy.together.ray_cluster import installed

ENVIRONMENT_VARIABLE = "HIRELC_DEPLOY_TARGETS"
KEYS = ("backend", "also", "host", "via", "threads", "precisions", "power_mode", "python", "folder", "description")
ARM = ("aarch64", "arm64")
ARM_RUNTIMES = ("onnxruntime_arm", "openvino_cpu")
"""Backends of boards that also run on this machine, where it is ARM itself."""
HOST = re.compile(r"[^-\s]\S*\Z")
"""The SSH name of a board; one that starts with a dash would be an option of ssh."""


@dataclass(frozen=True)
class Target:
    """A device as the user names it.

    Attributes:
        precisions: Names that a plan may use, a subset of what the backend executes; empty for all of them.
        source: Where it was defined: `built in` or a file.
        hosts: SSH names of boards; several are a pool of equal ones. Empty for this machine.
        via: For each of `hosts` the Ray node that it hangs on, empty where it is reached from this machine.
        also: Further runtimes of the device, where they are there; not on boards. The search works in the fastest one,
            the last race has the files of all.
        remote: Whether the device is meant to be another machine, so that without a host there is none.
        power_mode: What the device must run in: the number of a Jetson's nvpmodel, or the name of a CPU governor.
        python: Command of the Python on the board that has the runtime.
        folder: On the board, for files while they are needed.
    """

    name: str
    backend: str
    threads: int = 1
    precisions: tuple[str, ...] = ()
    description: str = ""
    source: str = "built in"
    hosts: tuple[str, ...] = ()
    remote: bool = False
    power_mode: str = ""
    python: str = "python3"
    folder: str = FOLDER
    via: tuple[str, ...] = ()
    also: tuple[str, ...] = ()

    def ssh(self, host: str) -> tuple[str, ...]:
        """Return the command that stands for `ssh` to one of the hosts."""
        node = dict(zip(self.hosts, self.via, strict=False)).get(host)
        return (sys.executable, "-m", ray_pipe.__name__, node, "ssh") if node else ("ssh",)


BUILT_IN = (
    Target(
        "cpu",
        "onnxruntime_cpu",
        description="this machine's CPU, one thread, ONNX Runtime, and OpenVINO where it is there: the faster one",
        also=("openvino_cpu",),
    ),
    Target("openvino", "openvino_cpu", description="this machine's CPU, one thread, OpenVINO"),
    Target("gpu", "tensorrt_gpu", description="this machine's NVIDIA GPU, TensorRT"),
    Target(
        "jetson",
        "tensorrt_gpu",
        description="an NVIDIA Jetson over SSH, TensorRT. Orin Nano, NX, AGX: INT8 and FP16 (SM 8.7); Thor: FP8 too. "
        "Fix the power mode (sudo nvpmodel -m 0) and the clocks (sudo jetson_clocks).",
        remote=True,
    ),
    Target(
        "raspberrypi4",
        "onnxruntime_arm",
        description="a Raspberry Pi 4 (Cortex-A72) over SSH, ONNX Runtime; without 8-bit dot products, INT8 brings "
        "little time there: bytes shrink, and milliseconds come from cutting.",
        remote=True,
    ),
    Target(
        "raspberrypi5",
        "onnxruntime_arm",
        description="a Raspberry Pi 5 (Cortex-A76) over SSH, ONNX Runtime, INT8 by dot products",
        remote=True,
    ),
    Target("arm", "onnxruntime_arm", description="an ARM board over SSH, ONNX Runtime", remote=True),
    Target(
        "arm-openvino",
        "openvino_cpu",
        description="an ARM board over SSH, OpenVINO; FP16 in what stays float, where the CPU multiplies it (asimdhp)",
        remote=True,
    ),
)


def targets_file(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the user's file: $HIRELC_DEPLOY_TARGETS, else hirelc-deploy/targets.toml in the folder for configs."""
    if ENVIRONMENT_VARIABLE in environ:
        return Path(environ[ENVIRONMENT_VARIABLE]).expanduser()
    configs = environ.get("XDG_CONFIG_HOME")
    return (Path(configs).expanduser() if configs else home() / ".config") / "hirelc-deploy" / "targets.toml"


def known_targets(environ: Mapping[str, str] = os.environ) -> dict[str, Target]:
    """Return all targets by name; the user's file may redefine a built-in one.

    Raises:
        InputError: The file is broken, or $HIRELC_DEPLOY_TARGETS names one that is not there.
    """
    path = targets_file(environ)
    targets = {target.name: target for target in BUILT_IN}
    if path.exists() or ENVIRONMENT_VARIABLE in environ:
        targets |= read_targets(path)
    return targets


def find_target(name: str, environ: Mapping[str, str] = os.environ) -> Target:
    """Return the target called `name`; raises InputError where nobody knows it."""
    targets = known_targets(environ)
    if name in targets:
        return targets[name]
    near = difflib.get_close_matches(name.lower(), targets, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise InputError(
        f"target {name!r} is unknown; known targets: {', '.join(targets)}.{hint} "
        f"Define others in {targets_file(environ)}."
    )


def print_to_stderr(text: str) -> None:
    """Say something to a person who waits."""
    print(printable(f"hirelc-deploy: {text}"), file=sys.stderr)


def open_target(target: Target, say: Callable[[str], None] = print_to_stderr) -> Backend:
    """Return the target's backend, ready to run.

    Raises:
        InputError: The target asks for a precision that its backend does not execute.
        TargetUnavailable: The device cannot be reached, or the backend says that it cannot run there, and why.
    """
    backend = _backend_of(target, say)
    if isinstance(backend, ProgramBackend):
        try:
            backend.connect()
        except TargetUnavailable as error:
            raise TargetUnavailable(f"target {target.name!r}: {error}") from None
    reason = backend.availability()
    if reason is not None:
        raise TargetUnavailable(f"target {target.name!r}: {reason}")
    target_precisions(target, backend)
    return backend


def open_others(target: Target) -> list[Backend]:
    """Return the target's further backends that can run on this machine; what is missing, `doctor` says."""
    installed_here = {one.name: one.backend for one in installed_backends() if one.name in target.also}
    found = [installed_here.get(name) for name in target.also]
    return [backend for backend in found if backend is not None and backend.availability() is None]


def _backend_of(target: Target, say: Callable[[str], None]) -> Backend:
    if target.source == "built in" and target.backend not in {one.name for one in installed_backends()}:
        raise TargetUnavailable(f"target {target.name!r} needs the backend {target.backend}, which is not installed.")
    if not target.hosts:
        if target.remote and not (target.backend in ARM_RUNTIMES and platform.machine() in ARM):
            raise TargetUnavailable(
                f"target {target.name!r} has no board yet. Let yours know your key, and add it:\n"
                f"  ssh-copy-id me@board\n  hirelc-deploy targets add {target.name} --host me@board"
            )
        return get_backend(target.backend)
    boards = [open_board(target, host, say) for host in target.hosts]
    return boards[0] if len(boards) == 1 else PoolBackend(boards, say)


def open_board(target: Target, host: str, say: Callable[[str], None] = print_to_stderr) -> ProgramBackend:
    """Return the target's backend on one board; nothing but its power mode was asked yet.

    Raises:
        InputError: The backend cannot run on boards.
        TargetUnavailable: The board cannot be reached, or runs in another power mode.
    """
    backend = get_backend(target.backend)
    if not isinstance(backend, Portable):
        raise InputError(
            f"{target.source}: target {target.name!r}: backend {target.backend!r} runs on this machine only; "
            "remove `host`."
        )
    ssh = target.ssh(host)
    if ssh != ("ssh",):
        installed(f"target {target.name!r}: {host} hangs on another host (via)")
    board = Board(host, python=target.python, folder=target.folder, ssh=ssh, say=say)
    if target.power_mode:
        found = power_mode(board.hardware())
        if found != target.power_mode:
            governors = "/sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
            remedy = (
                f"  ssh -t {host} sudo nvpmodel -m {target.power_mode}"
                if target.power_mode.isdigit()
                else f"  ssh -t {host} 'echo {target.power_mode} | sudo tee {governors}'"
            )
            raise TargetUnavailable(
                f"target {target.name!r}: {host} runs in power mode {found or 'unknown'}, the profile says "
                f"{target.power_mode}. Switch it, or change power_mode in {target.source}:\n{remedy}"
            )
    return ProgramBackend(backend.name, backend.program, backend.precisions_on, board)


def power_mode(hardware: Mapping[str, Any]) -> str:
    """Return the number of a Jetson's power mode, else the CPU governor, else ``."""
    jetson = re.search(r"pmode:0*(\d+)", hardware.get("power_mode") or "")
    return jetson.group(1) if jetson else str(hardware.get("governor") or "")


@dataclass(frozen=True)
class CheckedBoards:
    """What boards said when a target was made of them.

    Attributes:
        machines: Host to `machine.describe` of it.
        seconds: Host to the seconds from the first connection to the answer of the runtime.
    """

    target: Target
    machines: Mapping[str, Mapping[str, Any]]
    precisions: tuple[Precision, ...]
    seconds: Mapping[str, float]

    def lines(self) -> list[str]:
        """Return what a person wants to know of them."""
        lines = []
        for host, machine in self.machines.items():
            versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
            lines += [
                f"{host}: {machine['cpu_model']}, {machine['cores']} cores, {machine['architecture']}",
                f"  {versions}, Python {machine['python']}; answered in {self.seconds[host]:.1f} s",
                f"  power mode {power_mode(machine) or 'unknown'}",
            ]
        for precision in self.precisions:
            kind = f"{precision.activation_type} activations, {precision.weight_bits}-bit weights"
            lines.append(f"  {precision.name}: {kind}. {precision.remark}".rstrip())
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return dataclasses.asdict(self)


def new_target(
    name: str,
    hosts: Sequence[str],
    like: str,
    python: str = "python3",
    folder: str | None = None,
    threads: int | None = None,
    via: Sequence[str] = (),
) -> Target:
    """Return a target on boards, made from the built-in profile `like`; raises InputError for what it cannot be."""
    profiles = {target.name: target for target in BUILT_IN}
    if like not in profiles:
        raise InputError(
            f"target {name!r}: there is no profile {like!r} to begin from; "
            f"say --like with one of {', '.join(profiles)}."
        )
    if not re.fullmatch(r"[^\s\"'\\\[\]]+", name):
        raise InputError(f"target {name!r}: a name is one word without quotes and brackets.")
    for host in hosts:
        if not HOST.match(host):
            raise InputError(f"host {host!r}: give the name of a board as `ssh` takes it, such as me@board.")
    if len(set(hosts)) < len(hosts):
        raise InputError(f"host {', '.join(hosts)}: the same board twice; each can do one thing at a time.")
    if not _fits(via, hosts):
        raise InputError(f"via {', '.join(via)}: give one for all boards, or one for each --host, in their order.")
    profile = profiles[like]
    return dataclasses.replace(
        profile,
        name=name,
        hosts=tuple(hosts),
        python=python,
        folder=folder or FOLDER,
        threads=threads or profile.threads,
        source="the command line",
        also=(),
        via=_for_each(via, hosts),
    )


def _fits(via: Sequence[str], hosts: Sequence[str]) -> bool:
    return len(via) in ((0, 1, len(hosts)) if hosts else (0,))


def _for_each(via: Sequence[str], hosts: Sequence[str]) -> tuple[str, ...]:
    return tuple(via) * len(hosts) if len(via) == 1 else tuple(via)


def check_boards(target: Target) -> CheckedBoards:
    """Connect to every board of a new target and return what they say, their power mode written into the target.

    Raises:
        TargetUnavailable: A board cannot be reached, lacks the runtime, or is not equal to the others.
    """
    machines, seconds = {}, {}
    for host in target.hosts:
        started = time.monotonic()
        backend = open_board(target, host)
        backend.connect()
        seconds[host] = time.monotonic() - started
        machines[host] = describe(backend)
        precisions = target_precisions(target, backend)
    if len({fingerprint(machine) for machine in machines.values()}) > 1:
        raise TargetUnavailable(
            f"target {target.name!r}: {' and '.join(machines)} differ in CPU, power mode or runtime version; "
            "the boards of a pool must be equal. Add them as targets of their own."
        )
    mode = power_mode(machines[target.hosts[0]])
    return CheckedBoards(dataclasses.replace(target, power_mode=mode), machines, precisions, seconds)


def add_target(path: Path, target: Target, *, replace: bool = False) -> None:
    """Write a target to the user's file.

    Raises:
        InputError: The file has one of this name and `replace` is not set, or it cannot be read or written.
    """
    try:
        text = path.read_text("utf-8-sig") if path.exists() else ""
        known = read_targets(path) if text else {}
        if target.name in known and not replace:
            raise InputError(f"{path}: has a target {target.name!r} already; say --replace to write it anew.")
        path.parent.mkdir(parents=True, exist_ok=True)
        tables = tomlkit.parse(text)  # with the user's own comments
        if tables and target.name not in tables:
            tables.add(tomlkit.nl())
        tables[target.name] = _table(target)
        path.write_text(tomlkit.dumps(tables), "utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}).") from None


def _table(target: Target) -> dict[str, Any]:
    hosts: str | list[str] = list(target.hosts) if len(target.hosts) > 1 else "".join(target.hosts)
    values = {
        "backend": target.backend,
        "also": list(target.also),
        "host": hosts,
        "via": target.via[0] if len({*target.via}) == 1 else list(target.via),
        "threads": target.threads,
        "precisions": list(target.precisions),
        "power_mode": target.power_mode,
        "python": "" if target.python == "python3" else target.python,
        "folder": "" if target.folder == FOLDER else target.folder,
        "description": target.description,
    }
    return {key: value for key, value in values.items() if value}


def target_precisions(target: Target, backend: Backend) -> tuple[Precision, ...]:
    """Return the precisions that plans for this target may use, in the backend's order."""
    offered = backend.precisions()
    unknown = set(target.precisions) - {precision.name for precision in offered}
    if unknown:
        names = ", ".join(precision.name for precision in offered)
        raise InputError(
            f"{target.source}: target {target.name!r} asks for precision {min(unknown)!r}, "
            f"but backend {backend.name!r} executes {names}."
        )
    return tuple(p for p in offered if not target.precisions or p.name in target.precisions)


def read_targets(path: Path) -> dict[str, Target]:
    """Read a targets file: one table per target, with `backend` and optionally threads, precisions, description.

    Raises:
        InputError: naming file and line, for a missing or broken file, an unknown key or backend, a wrong value.
    """
    try:
        text = path.read_text("utf-8-sig")  # editors on Windows begin with a mark
        tables = toml_table(text, str(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such targets file; create it or unset ${ENVIRONMENT_VARIABLE}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a targets file ({error}); save it as UTF-8.") from None
    return {name: _target(name, table, path, text) for name, table in tables.items()}


def _target(name: str, table: Any, path: Path, text: str) -> Target:
    def wrong(key: str, found: str) -> InputError:
        return InputError(f"{path}, line {_line_of(text, name, key)}: target {name!r}: {found}.")

    if not isinstance(table, dict):
        raise wrong(name, f"is {table!r}, not a table; write [{name}] and keys below it")
    for key in table:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise wrong(key, f"unknown key {key!r}{hint}; a target has {', '.join(KEYS)}")
    backends = [registered.name for registered in installed_backends()]
    if "backend" not in table:
        raise wrong("", f"has no backend; add one of: {', '.join(backends)}")
    backend, threads = table["backend"], table.get("threads", 1)
    if backend not in backends:
        raise wrong("backend", f"backend {backend!r} is not installed; known backends: {', '.join(backends)}")
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise wrong("threads", f"threads is {threads!r}; give a whole number of at least 1")
    precisions = table.get("precisions", [])
    if not isinstance(precisions, list) or not all(isinstance(item, str) for item in precisions):
        raise wrong("precisions", f'precisions is {precisions!r}; give a list of names, such as ["float", "int8"]')
    host = table.get("host", [])
    hosts = [host] if isinstance(host, str) else host
    if not isinstance(hosts, list) or not all(isinstance(one, str) and HOST.match(one) for one in hosts):
        raise wrong(
            "host", f'host is {host!r}; give the SSH name of a board such as "me@board", or a list of such names'
        )
    if len(set(hosts)) < len(hosts):
        raise wrong("host", f"host names the same board twice: {', '.join(hosts)}; each can do one thing at a time")
    via = table.get("via", [])
    nodes = [via] if isinstance(via, str) else via
    if not isinstance(nodes, list) or not all(isinstance(one, str) for one in nodes) or not _fits(nodes, hosts):
        raise wrong("via", f"via is {via!r}; give the name of a Ray node for all hosts, or a list with one for each")
    also = table.get("also", [])
    others = [one for one in backends if one != backend and not hosts]
    if not isinstance(also, list) or not all(one in others for one in also):
        known = ", ".join(others) or "none, because runtimes are not raced on boards"
        raise wrong("also", f"also is {also!r}; give a list of other backends: {known}")
    texts = {"description": "", "power_mode": "", "python": "python3", "folder": FOLDER} | table
    if odd := [key for key in ("description", "power_mode", "python", "folder") if not isinstance(texts[key], str)]:
        raise wrong(odd[0], f"{odd[0]} is {texts[odd[0]]!r}; give a text")
    return Target(
        name,
        backend,
        threads,
        tuple(precisions),
        texts["description"],
        str(path),
        tuple(hosts),
        power_mode=texts["power_mode"],
        python=texts["python"],
        folder=texts["folder"],
        via=_for_each(nodes, hosts),
        also=tuple(also),
    )


def _line_of(text: str, target: str, key: str) -> int:
    """Return the number of the line that sets `key` below [target], or that of the target, or 1."""
    header = re.compile(rf"""\s*\[\s*["']?{re.escape(target)}["']?\s*\]""")
    at = 1
    inside = False
    for number, line in enumerate(text.splitlines(), 1):
        if header.match(line):
            inside, at = True, number
        elif line.lstrip().startswith("["):
            inside = False
        elif key and re.match(rf"""\s*["']?{re.escape(key)}["']?\s*[=.]""", line) and (inside or key == target):
            return number
    return at
