"""In: finished pieces of work. Out: a run directory that keeps them through any interruption, and gives them back."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import math
import os
import shutil
import struct
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hirelc_deploy.errors import HirelcError, InputError
from hirelc_deploy.outcome import Fidelity, Outcome, outcome_from_dict, outcome_to_dict
from hirelc_deploy.plan import CompressionPlan

SCHEMA_VERSION = 1
CONFIG, MACHINE, TRIALS, FACTS, PARETO, LOCK, RESULT = (
    "config.toml",
    "machine.json",
    "trials.jsonl",
    "facts.jsonl",
    "pareto.json",
    "run.lock",
    "result.json",
)
CONTENTS = "contents"
"""Fact that says by hashes of which model and data a run is."""
SHORTENED = "share of a recovery that the time budget allows"
FINALIST = "finalist "
"""Facts whose names begin so say of a recovered plan how it stands to the limits."""
BRANCHES = "branches that go at "
"""Facts whose names begin so say what a search at a latency budget leaves out."""
TRIAL_LOSS = "loss of "
"""Facts whose names begin so say what a plan lost after a trial recovery."""
PARTIAL = ".partial"
"""Ending of files being written; what a killed process leaves of them is removed on the next opening."""


@dataclass(frozen=True)
class TrialRecord:
    """One finished evaluation.

    Attributes:
        trial: Its number, from 1.
        time: UTC, ISO 8601.
        context: What else the outcome depends on (data, machine, versions), as one string; `` for nothing.
    """

    trial: int
    time: str
    plan: CompressionPlan
    fidelity: Fidelity
    context: str
    outcome: Outcome


def _utc_now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


class Run:
    """One run directory, opened by `Run.open` to write (one process at a time) or by `Run.read` to look.

    Every trial and every fact is one line of an append-only file, on the disk before the call returns. A line is
    written at once with its line feed, so a kill leaves at most one last line without one, which is dropped.

    Attributes:
        after_trial: Told of every trial that is journaled.
    """

    def __init__(
        self,
        directory: Path,
        lock: int | None,
        clock: Callable[[], str] = _utc_now,
        *,
        is_new: bool = False,
        made_folder: bool = False,
    ) -> None:
        """Args: `is_new`, nothing of the run was there before; `made_folder`, nor its folder."""
        self.directory = directory
        self._lock, self._clock = lock, clock
        self.after_trial: Callable[[TrialRecord], None] = lambda trial: None
        self._is_new, self._made_folder = is_new, made_folder
        self.config_text = _read_text(directory / CONFIG)
        self.machine = _read_machine(directory / MACHINE)
        self.trials = [_trial_from(line, where) for line, where in _lines(directory / TRIALS)]
        self._outcomes = {(t.plan.digest, t.fidelity, t.context): t.outcome for t in self.trials}
        self._facts = dict(_fact_from(line, where) for line, where in _lines(directory / FACTS))

    @classmethod
    def open(
        cls,
        directory: Path,
        config_text: str,
        machine: Mapping[str, Any],
        *,
        clock: Callable[[], str] = _utc_now,
    ) -> Run:
        """Create a run, or resume the one that is there.

        Args:
            directory: Absent, empty, or a run with the same options.
            config_text: The options as TOML; comments and order do not matter when they are compared.
            machine: Description of the machine, kept as it was when the run began.
            clock: Gives the time of each line.

        Raises:
            InputError: Other files in the directory, other options, in use by another process, not writable, or a
                journal that this program cannot read.
        """
        was_there, was_begun = directory.exists(), (directory / CONFIG).exists()
        try:
            _check_directory(directory)
            directory.mkdir(parents=True, exist_ok=True)
            lock = _acquire(directory / LOCK)
        except OSError as error:
            raise InputError(
                f"{directory}: cannot be used as a run directory ({error.strerror}); give another --out."
            ) from None
        try:
            for leftover in directory.rglob(f"*{PARTIAL}"):
                leftover.unlink()
            for name in (TRIALS, FACTS):
                _drop_torn_line(directory / name)
            if not (directory / MACHINE).exists():
                write_atomic(directory / MACHINE, json.dumps(dict(machine), indent=2) + "\n")
            if (directory / CONFIG).exists():
                _check_options(directory, config_text)
            else:
                write_atomic(directory / CONFIG, config_text)
            return cls(directory, lock, clock, is_new=not was_begun, made_folder=not was_there)
        except OSError as error:
            _let_go(lock)
            raise InputError(
                f"{directory}: cannot be used as a run directory ({error.strerror}); give another --out."
            ) from None
        except BaseException:
            _let_go(lock)
            raise

    @classmethod
    def read(cls, directory: Path) -> Run:
        """Open a run to look at it, also while another process writes it; raises InputError when it is none."""
        if not (directory / CONFIG).is_file() or not (directory / TRIALS).is_file():
            if inside := sorted(path.parent for path in directory.glob(f"*/{TRIALS}")):
                raise InputError(f"{directory}: holds several runs; give one of them, such as {inside[0]}.")
            raise InputError(f"{directory}: not a run directory; give the folder a search was told as --out.")
        return cls(directory, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
        if isinstance(error, HirelcError) and error.exit_code == InputError.exit_code:
            self._withdraw()

    def _withdraw(self) -> None:
        """Remove a run that was new and has judged nothing: what its input lacked may ask for other options."""
        if not self._is_new or self.trials:
            return
        for path in self.directory.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self._made_folder:
            self.directory.rmdir()

    def close(self) -> None:
        """Let others write this run."""
        if self._lock is not None:
            _let_go(self._lock)
            self._lock = None

    def knows(self, plan: CompressionPlan, fidelity: Fidelity, context: str = "") -> bool:
        """Return whether the outcome of a plan is journaled."""
        return (plan.digest, fidelity, context) in self._outcomes

    def evaluate_once(
        self,
        plan: CompressionPlan,
        fidelity: Fidelity,
        evaluate: Callable[[CompressionPlan, Fidelity], Outcome],
        context: str = "",
    ) -> Outcome:
        """Return the journaled outcome of a plan, or call `evaluate` and journal what it returns, failures too.

        What `evaluate` raises is passed on and leaves no line.
        """
        key = (plan.digest, fidelity, context)
        if key not in self._outcomes:
            value = outcome_to_dict(evaluate(plan, fidelity))
            line = {
                "schema_version": SCHEMA_VERSION,
                "trial": len(self.trials) + 1,
                "time": self._clock(),
                "plan": plan.to_dict(),
                "fidelity": fidelity,
                "context": context,
                "outcome": value,
            }
            self._append(TRIALS, line)
            record = _trial_from(json.loads(json.dumps(line)), TRIALS)
            self.trials.append(record)
            self._outcomes[key] = record.outcome
            self.after_trial(record)
        return self._outcomes[key]

    def take_over(self, trials: Iterable[TrialRecord], facts: Mapping[str, Any]) -> None:
        """Journal trials and facts of another run; what is known here stays as it is."""
        for trial in trials:
            self.evaluate_once(trial.plan, trial.fidelity, _answering(trial.outcome), trial.context)
        for key, value in facts.items():
            self.remember(key, _answering(value))

    def remember(self, key: str, compute: Callable[[], Any]) -> Any:
        """Return the journaled JSON value of `key`, or call `compute` and journal what it returns.

        Both give the value as JSON gives it back: tuples as lists, keys as strings.
        """
        if key not in self._facts:
            line = {"schema_version": SCHEMA_VERSION, "time": self._clock(), "key": key, "value": compute()}
            self._append(FACTS, line)
            self._facts[key] = json.loads(json.dumps(line))["value"]
        return self._facts[key]

    def fact(self, key: str) -> Any | None:
        """Return the journaled value of `key`, or None."""
        return self._facts.get(key)

    @property
    def facts(self) -> Mapping[str, Any]:
        """All that is journaled beside trials, by its names."""
        return self._facts

    def write_pareto(self, fronts: Mapping[str, Sequence[tuple[CompressionPlan, Outcome]]]) -> None:
        """Rewrite pareto.json: fidelity to the plans that no other plan of that fidelity beats."""
        value = {
            "schema_version": SCHEMA_VERSION,
            "fronts": {
                fidelity: [{"plan": plan.to_dict(), "outcome": outcome_to_dict(outcome)} for plan, outcome in front]
                for fidelity, front in fronts.items()
            },
        }
        write_atomic(self.directory / PARETO, json.dumps(value, indent=1) + "\n")

    def _append(self, name: str, value: Mapping[str, Any]) -> None:
        if self._lock is None:
            raise RuntimeError(f"{self.directory} is open for reading only")
        path = self.directory / name
        try:
            _append_line(path, json.dumps(value))
        except OSError as error:
            raise InputError(
                f"{path}: cannot be written ({error.strerror}); what was finished before is kept."
            ) from None


def _answering(value: Any) -> Callable[..., Any]:
    return lambda *_: value


def json_text(value: Any, indent: int) -> str:
    """Return JSON that every reader takes: NaN and infinities, for which it has no word, are null."""

    def plain(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {key: plain(inner) for key, inner in item.items()}
        if isinstance(item, list | tuple):
            return [plain(inner) for inner in item]
        if item is None or isinstance(item, bool | int | str):
            return item
        number = float(item)
        return number if math.isfinite(number) else None

    return json.dumps(plain(value), indent=indent, allow_nan=False)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there whole or as it was before, whatever happens."""
    with atomic_path(path) as partial:
        partial.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a path to write to; after a clean end, on the disk, it becomes `path`; else it is removed."""
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _append_line(path: Path, text: str) -> None:
    with path.open("ab", buffering=0) as file:
        file.write(text.encode() + b"\n")
        os.fsync(file.fileno())


def _check_directory(directory: Path) -> None:
    """Refuse a directory that holds something else than a run."""
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory}: a file of that name is there; give another --out.")
    if not directory.exists() or ((directory / CONFIG).is_file() and (directory / TRIALS).is_file()):
        return
    # Without config.toml, which is written last, only the beginnings of a run may be here.
    begun = {MACHINE, TRIALS, FACTS, LOCK}
    foreign = sorted(p.name for p in directory.iterdir() if p.name not in begun and not p.name.endswith(PARTIAL))
    if foreign:
        raise InputError(f"{directory}: holds {foreign[0]!r} and is not a run; give an empty or new folder as --out.")


def _acquire(path: Path) -> int:
    """Return a descriptor that holds the lock until it is closed or the process ends, however it ends.

    A record lock, not flock: a child process does not inherit it, so a worker that outlives a killed parent for a
    moment cannot keep the run locked.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise InputError(f"{path.parent}: another process is writing this run; wait for it, or end it.") from None
    _held[descriptor] = _file_of(os.fstat(descriptor))
    return descriptor


_held: dict[int, tuple[int, int]] = {}
"""Descriptors of the locks that this process holds, and the files they are of."""


def _file_of(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _let_go(lock: int) -> None:
    _held.pop(lock, None)
    os.close(lock)


def writer_of(directory: Path) -> int | None:
    """Return the number of the process that writes a run, 0 where it cannot be seen from here; None where none does.

    The lock is only asked about. A process that closes any descriptor of a file loses its locks on it, so of its own
    runs this one answers without a look.
    """
    path = directory / LOCK
    try:
        if _file_of(path.stat()) in _held.values():
            return os.getpid()
        with path.open("rb") as file:
            question = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, _, _, _, process = struct.unpack(FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, question))
    except OSError:
        return None
    return None if kind == fcntl.F_UNLCK else max(0, process)


FLOCK = "hhqqi"
"""Linux's `struct flock`: type, whence, start, length, process."""


def _drop_torn_line(path: Path) -> None:
    """Create the file, or cut off a last line that was not written to its end."""
    with path.open("ab+") as file:
        file.seek(0)
        content = file.read()
        file.truncate(len(_whole_lines(content)))
        file.flush()
        os.fsync(file.fileno())


def _whole_lines(content: bytes) -> bytes:
    """Return the content without a last line that has no line feed or, after a power loss, no JSON."""
    whole = content[: content.rfind(b"\n") + 1]
    last = whole[whole.rfind(b"\n", 0, -1) + 1 :]
    try:
        json.loads(last or b"{}")
    except (ValueError, RecursionError):
        return whole[: len(whole) - len(last)]
    return whole


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each line's value and where it stands; raises InputError for a line that this program cannot read."""
    if not path.exists():
        return
    for number, line in enumerate(_whole_lines(path.read_bytes()).splitlines(), start=1):
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise InputError(
                f"{where}: damaged (not JSON); delete this line, or start anew in another --out."
            ) from None
        version = value.get("schema_version") if isinstance(value, dict) else None
        if version != SCHEMA_VERSION:
            raise InputError(
                f"{where}: schema version {version!r}, this program reads version {SCHEMA_VERSION}; update it."
            )
        yield value, where


def _fact_from(value: Mapping[str, Any], where: str) -> tuple[str, Any]:
    if "key" not in value or "value" not in value:
        raise InputError(f"{where}: not a fact of a run (it needs key and value); delete this line.")
    return str(value["key"]), value["value"]


def _trial_from(value: Mapping[str, Any], where: str) -> TrialRecord:
    try:
        for key, kind in (("trial", int), ("time", str), ("fidelity", str), ("context", str)):
            if not isinstance(value[key], kind):
                raise TypeError(f"{key} is {value[key]!r:.60}")
        return TrialRecord(
            value["trial"],
            value["time"],
            CompressionPlan.from_dict(value["plan"], where),
            value["fidelity"],
            value["context"],
            outcome_from_dict(value["outcome"]),
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{where}: not a trial of a run ({error}).") from None


def _read_machine(path: Path) -> dict[str, Any]:
    try:
        machine = json.loads(_read_text(path))
    except (ValueError, RecursionError):
        machine = None
    if not isinstance(machine, dict):
        raise InputError(f"{path}: damaged (not a JSON object); delete it, and it is written anew.")
    return machine


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")  # editors on Windows begin with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}).") from None


def _check_options(directory: Path, config_text: str) -> None:
    """Raise InputError naming the options that differ from those the run began with."""
    path = directory / CONFIG
    try:
        before = _flat(tomllib.loads(_read_text(path)))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid TOML ({error}); restore it, or use another --out.") from None
    now = _flat(tomllib.loads(config_text))
    # What is not there is off: an older program did not have the option.
    names = [name for name in sorted(before.keys() | now.keys()) if before.get(name, False) != now.get(name, False)]
    if names:
        changes = "; ".join(f"{n} = {before.get(n, 'unset')!r} then, {now.get(n, 'unset')!r} now" for n in names[:3])
        more = f"; and {len(names) - 3} more" if len(names) > 3 else ""
        raise InputError(
            f"{directory}: this run began with other options ({changes}{more}). Use the same options to resume it, "
            "or another --out for a new run."
        )


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
