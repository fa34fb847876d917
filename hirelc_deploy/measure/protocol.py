"""In: files and a backend. Out: how long each takes, its ratio to the first with an interval, and a verdict.

Why it is more than a loop, from measurements on a crowded machine of two cores: two benchmarks run one after the other
called the same file different in 36 to 86 % of trials, because processes differ by 2 to 4 % and load comes and goes.
What is steady is the ratio of runs that lie side by side (0.2 to 0.3 % between sessions). So the files take turns in
random order, every few milliseconds; a round is one timed run of each. Rounds come from several processes, one of them
working at a time; the statistic is the median of log ratios; its interval comes from a bootstrap over processes, then
short blocks of rounds; and a verdict needs the whole interval beyond a margin, because looking at the data to decide
when to stop makes a bare interval lie in 5 to 18 % of trials.

Before and after each turn the device says how hot, how fast and how throttled it is. A turn in which it slowed itself
down is thrown away and taken again when it has cooled, a few times at most; then the numbers say so.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hirelc_deploy.errors import InputError
from hirelc_deploy.measure.backend import DeviceState, Timer, TimingProcess

Verdict = Literal["reference", "faster", "slower", "same", "not told apart"]
Clock = Literal["cpu", "wall"]

MARGIN = math.log(1.01)
"""Differences below 1 % are not called differences: with it, false verdicts fell from 5 to 18 % of trials to 0.0 %."""
CONTENDED = 1.2
"""Wall p90 over CPU p90 above this means that other programs took the core: 1.0 alone, 3.9 at a load of 14."""
STEP_ROUNDS = 20
"""Rounds of one process before the next one works, at most."""
BLOCK_ROUNDS = 5
"""Rounds that the bootstrap draws together: what disturbs one run of a burst disturbs its neighbours."""
MOST_REPEATS = 5
"""Turns of one comparison that are taken again because the device slowed itself down."""
CLOCK_FALL = 0.98
"""A clock below this share of what it was at the start of the turn is a device that slows down (edge boards hold theirs
to the last kilohertz under a fixed governor)."""
COOL_PAUSE_SECONDS, COOL_PAUSES = 5.0, 12
COOL_ABOVE_START_C = 3.0
"""Cooling ends this many degrees above where the comparison began, or after a minute."""
LOOKS_DRAWS, FINAL_DRAWS = 200, 1000
"""Bootstrap draws when deciding whether to stop, and for the interval that is reported."""

Samples = NDArray[np.int64]
"""(processes, rounds, files, 2) nanoseconds: wall time and CPU time."""


@dataclass(frozen=True)
class TimingLimits:
    """When a comparison stops: at `half_width` for every file, but within these rounds (of all processes) and seconds.

    Attributes:
        half_width: Of the 95 % interval of the ratio, as a fraction.
        seconds: Wall-clock limit, starting and warming up the processes included; one visit to each is always made.
    """

    processes: int = 5
    min_rounds: int = 100
    max_rounds: int = 2000
    half_width: float = 0.0075
    seconds: float = 120.0

    def __post_init__(self) -> None:
        if self.processes < 1 or not 1 <= self.min_rounds <= self.max_rounds:
            raise InputError(f"timing limits: at least 1 process and 1 <= min_rounds <= max_rounds, found {self}.")
        if not self.half_width > 0 or not self.seconds > 0:
            raise InputError(f"timing limits: half_width and seconds must be above 0, found {self}.")


FULL = TimingLimits()
"""For numbers that are reported."""
QUICK = TimingLimits(processes=2, min_rounds=40, max_rounds=200, half_width=0.01, seconds=30.0)
"""For use inside a search. A bootstrap over two processes sees only half of the variance between sessions, so intervals
are too narrow and verdicts are hints: enough to rank candidates, not to report them."""

ROUGH = TimingLimits(processes=2, min_rounds=20, max_rounds=20, seconds=30.0)
"""Shows which files are surely slower than the first by more than 1 %: fewer than 5 % of those that are not."""


@dataclass(frozen=True)
class Timing:
    """What was found about one file. Times are of one inference, of all images of its batch.

    Attributes:
        median_ms: Wall time: median over processes of each one's median. Compare across days only by `ratio`.
        min_ms, p90_ms, p99_ms: Wall time over all runs: the shortest, and what 90 and 99 of 100 runs stay within.
        cpu_median_ms: CPU time of the thread (of the process when there are several threads).
        ratio: Time of this file / time of the reference, the median over rounds; judged by `clock`.
        ratio_low, ratio_high: 95 % interval of `ratio`.
        wall_ratio: The same statistic by wall time, whatever `clock` says.
        clock: `cpu` with one thread (other programs cannot inflate it), else `wall`.
        verdict: About `ratio` against a margin of 1 %. `not told apart` is an answer too.
        rounds: Of all processes together.
        contended: Other programs took the core while this ran; None with several threads, where it cannot be told.
        note: What a reader must know about these numbers, in sentences, or ``.
        batch: Images of one inference.
        device: What the device said of itself from the first to the last turn; None where it says nothing.
        samples: (processes, rounds, 2) nanoseconds, wall and CPU, of every run of this file.
    """

    file: Path
    median_ms: float
    min_ms: float
    p90_ms: float
    p99_ms: float
    cpu_median_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    wall_ratio: float
    clock: Clock
    verdict: Verdict
    rounds: int
    contended: bool | None
    note: str
    device: Mapping[str, Any] | None
    samples: Samples = field(repr=False, compare=False)
    batch: int = 1

    @property
    def ratios(self) -> dict[str, float]:
        """The times that an `outcome.Measured` keeps, by its names for them."""
        return {name: getattr(self, name) for name in ("median_ms", "ratio", "ratio_low", "ratio_high")}

    @property
    def images_per_second(self) -> float:
        """Throughput by the median wall time, one inference after the other."""
        return 1000.0 * self.batch / self.median_ms

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the samples, as JSON values."""
        value = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "samples"}
        return {**value, "file": str(self.file), "images_per_second": self.images_per_second}


def compare(
    files: Sequence[Path],
    backend: Timer,
    *,
    threads: int = 1,
    batch: int = 1,
    limits: TimingLimits = FULL,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    samples_path: Path | None = None,
    now: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> list[Timing]:
    """Time `files` side by side on `backend` and judge each against the first.

    With one thread the judgement is by CPU time and wall time is reported beside it; with more it is by wall time,
    which on a shared machine says little (spread of 20-run medians: 22 % against 3 %).

    Args:
        batch: Images of one inference, as all the files have them.
        progress: Called with (rounds done, rounds at most) after each turn of all processes.
        samples_path: Where to keep every single run, as .npz: `files` (n,), `nanoseconds` (processes, rounds, n, 2).

    Raises:
        InputError: No file, or a file that is not there.
        ExportError: The runtime refuses a file.
        TargetUnavailable: The device stopped answering.
    """
    if not files:
        raise InputError("timing: no file was given; name at least one.")
    deadline = now() + limits.seconds
    clock: Clock = "cpu" if threads == 1 else "wall"
    with ExitStack() as stack:
        processes = [
            # An even first seed: a backend may use neighbouring seeds for orders that are each other's mirror.
            stack.enter_context(backend.open_timing(files, threads, 2 * limits.processes * seed + number))
            for number in range(limits.processes)
        ]
        samples = np.zeros((limits.processes, 0, len(files), 2), np.int64)
        watch = Watch()
        step = BLOCK_ROUNDS  # the first turn only finds out how long a round takes
        while True:
            started = now()
            turn = np.stack(one_turn(processes, step))
            if watch.slowed_down([process.states for process in processes]) and watch.repeats < MOST_REPEATS:
                watch.repeats += 1
                cool_down(processes[0], watch, pause)
                if now() < deadline or samples.size == 0:
                    continue
            samples = np.concatenate([samples, turn], axis=1)
            done = samples.shape[0] * samples.shape[1]
            if progress is not None:
                progress(done, limits.max_rounds)
            if _settled(samples, clock, limits, seed):
                break
            seconds_per_round = (now() - started) / step  # one round of every process
            affordable = int((deadline - now()) / seconds_per_round) if seconds_per_round > 0 else STEP_ROUNDS
            wanted = limits.min_rounds if done < limits.min_rounds else limits.max_rounds
            step = min(STEP_ROUNDS, affordable, math.ceil((wanted - done) / limits.processes))
            if step < 1:
                break
    if samples_path is not None:
        np.savez_compressed(samples_path, files=np.array([str(file) for file in files]), nanoseconds=samples)
    watch.restarts = sum(process.restarts for process in processes)
    return judge(files, samples, clock, seed=seed, min_rounds=limits.min_rounds, watch=watch, batch=batch)


@dataclass
class Watch:
    """What the device said of itself during one comparison.

    Attributes:
        first, last: States at the beginning and the end.
        reasons: Why it slowed itself down, at any time.
        repeats: Turns thrown away for that.
        unsteady: Whether a turn was kept in which it did.
        restarts: Timing processes that were lost and started again.
        peak_memory_bytes: Of the largest timing process, all files loaded.
    """

    first: DeviceState | None = None
    last: DeviceState | None = None
    reasons: set[str] = field(default_factory=set)
    repeats: int = 0
    unsteady: bool = False
    restarts: int = 0
    peak_memory_bytes: int = 0

    def slowed_down(self, states: Sequence[tuple[DeviceState, DeviceState] | None]) -> bool:
        """Take note of the states before and after the turn of each process; say whether the turn is worth keeping."""
        reasons: set[str] = set()
        for before, after in filter(None, states):
            self.first, self.last = self.first or before, after
            self.peak_memory_bytes = max(self.peak_memory_bytes, after.peak_memory_bytes or 0)
            reasons |= set(after.throttled)
            if before.frequency_khz and after.frequency_khz and after.frequency_khz < CLOCK_FALL * before.frequency_khz:
                reasons.add("its clock fell")
        self.reasons |= reasons
        self.unsteady |= bool(reasons) and self.repeats >= MOST_REPEATS
        return bool(reasons)

    def to_dict(self) -> dict[str, Any] | None:
        """Return it as JSON values, None where the device said nothing."""
        if self.first is None or self.last is None:
            return None
        return {
            "temperature_c": [self.first.temperature_c, self.last.temperature_c],
            "frequency_khz": [self.first.frequency_khz, self.last.frequency_khz],
            "power_w": self.last.power_w,
            "peak_memory_bytes": self.peak_memory_bytes or None,
            "slowed_down": sorted(self.reasons),
            "repeated_turns": self.repeats,
            "restarts": self.restarts,
        }

    def note(self) -> str:
        """Return a sentence for the reader, or ``."""
        why = ", ".join(sorted(self.reasons))
        kept = f"The device slowed itself down while it was timed ({why}): cool or feed it better and repeat."
        taken = f"The device slowed itself down ({why}); turns taken again after it had recovered: {self.repeats}."
        lost = f"Timing processes lost and started again: {self.restarts}."
        slowed = kept if self.unsteady else taken if self.repeats else ""
        return " ".join(filter(None, (slowed, lost if self.restarts else "")))


def cool_down(process: TimingProcess, watch: Watch, pause: Callable[[float], None]) -> None:
    """Wait until the device is as cool as at the start, or a minute; a single round asks it each time."""
    start = watch.first.temperature_c if watch.first is not None else None
    for _ in range(COOL_PAUSES):
        pause(COOL_PAUSE_SECONDS)
        process.rounds(1)
        if process.states is None:
            return
        state = process.states[1]
        cool = start is None or state.temperature_c is None or state.temperature_c <= start + COOL_ABOVE_START_C
        if cool and not state.throttled:
            return


def one_turn(processes: Sequence[TimingProcess], count: int) -> list[Samples]:
    """Return the rounds of every process, one process working at a time on each device.

    The boards of a pool are different places and work side by side.
    """
    places: dict[int, list[int]] = {}
    for index, process in enumerate(processes):
        places.setdefault(id(process.place), []).append(index)
    found: dict[int, Samples] = {}

    def work(indices: Sequence[int]) -> None:
        for index in indices:
            found[index] = processes[index].rounds(count)

    if len(places) == 1:
        work(range(len(processes)))
    else:
        with ThreadPoolExecutor(len(places)) as executor:
            list(executor.map(work, places.values()))
    return [found[index] for index in range(len(processes))]


def judge(
    files: Sequence[Path],
    samples: Samples,
    clock: Clock,
    *,
    seed: int = 0,
    min_rounds: int = 1,
    watch: Watch | None = None,
    batch: int = 1,
) -> list[Timing]:
    """Return what `samples` say about each file; no clock is read and nothing runs.

    Args:
        samples: (processes, rounds, files, 2) nanoseconds; runs with equal process and round were taken side by side.
        min_rounds: With fewer than these in all, the note says that time ran out.
        watch: What the device said meanwhile.
    """
    log_ratios = _log_ratios(samples, clock)
    wall_ratios = np.exp(np.median(_log_ratios(samples, "wall"), axis=(1, 2)))
    intervals = np.percentile(_bootstrap_medians(log_ratios, FINAL_DRAWS, seed), [2.5, 97.5], axis=1).T
    rounds = samples.shape[0] * samples.shape[1]
    timings = []
    for index, file in enumerate(files):
        wall, cpu = samples[:, :, index, 0] / 1e6, samples[:, :, index, 1] / 1e6
        low, high = intervals[index]
        contended = bool(np.percentile(wall, 90) > CONTENDED * np.percentile(cpu, 90)) if clock == "cpu" else None
        notes = [
            f"Other programs took the core: wall time is up to {np.percentile(wall, 90) / np.percentile(cpu, 90):.1f} "
            "times CPU time; trust the ratio, not the milliseconds."
            if contended
            else "",
            f"Stopped by the time limit after {rounds} of at least {min_rounds} rounds." if rounds < min_rounds else "",
            _drift(log_ratios[index], samples[:, :, index, 1 if clock == "cpu" else 0]),
            watch.note() if watch is not None else "",
        ]
        timings.append(
            Timing(
                file=file,
                median_ms=float(np.median(np.median(wall, axis=1))),
                min_ms=float(wall.min()),
                p90_ms=float(np.percentile(wall, 90)),
                p99_ms=float(np.percentile(wall, 99)),
                cpu_median_ms=float(np.median(np.median(cpu, axis=1))),
                ratio=float(np.exp(np.median(log_ratios[index]))),
                ratio_low=float(np.exp(low)),
                ratio_high=float(np.exp(high)),
                wall_ratio=float(wall_ratios[index]),
                clock=clock,
                verdict="reference" if index == 0 else _verdict(low, high),
                rounds=rounds,
                contended=contended,
                note=" ".join(filter(None, notes)),
                device=watch.to_dict() if watch is not None else None,
                samples=samples[:, :, index],
                batch=batch,
            )
        )
    return timings


def _verdict(low: float, high: float) -> Verdict:
    if low > MARGIN:
        return "slower"
    if high < -MARGIN:
        return "faster"
    return "same" if max(abs(low), abs(high)) < MARGIN else "not told apart"


def _log_ratios(samples: Samples, clock: Clock) -> NDArray[np.float64]:
    """Return (files, processes, rounds) log of each run's time over the reference's in the same round."""
    # Some systems count CPU time in coarse ticks; a run that saw none would be log 0.
    nanoseconds = np.maximum(samples[..., 1 if clock == "cpu" else 0], 1).astype(np.float64)
    logs: NDArray[np.float64] = np.log(nanoseconds)
    return np.moveaxis(logs - logs[:, :, :1], 2, 0)


def _bootstrap_medians(log_ratios: NDArray[np.float64], draws: int, seed: int) -> NDArray[np.float64]:
    """Return (files, draws) medians over blocks of rounds from drawn processes; a block may wrap around the end."""
    files, processes, rounds = log_ratios.shape
    rng = np.random.default_rng(seed)
    drawn_processes = rng.integers(processes, size=(draws, processes, 1))
    starts = rng.integers(rounds, size=(draws, processes, math.ceil(rounds / BLOCK_ROUNDS)))
    blocks = (starts[..., None] + np.arange(BLOCK_ROUNDS)) % rounds
    drawn_rounds = blocks.reshape(draws, processes, -1)[..., :rounds]
    flat = (drawn_processes * rounds + drawn_rounds).reshape(draws, -1)
    return np.stack([np.median(one.ravel()[flat], axis=1) for one in log_ratios]).reshape(files, draws)


def _settled(samples: Samples, clock: Clock, limits: TimingLimits, seed: int) -> bool:
    """Return whether every file is known as exactly as the limits ask."""
    if samples.shape[0] * samples.shape[1] < limits.min_rounds:
        return False
    candidates = _log_ratios(samples, clock)[1:] if samples.shape[2] > 1 else _spread_of_one_file(samples, clock)
    low, high = np.percentile(_bootstrap_medians(candidates, LOOKS_DRAWS, seed), [2.5, 97.5], axis=1)
    return bool(np.all((high - low) / 2 <= limits.half_width))


def _spread_of_one_file(samples: Samples, clock: Clock) -> NDArray[np.float64]:
    """Return (1, processes, rounds) log times around each process's median: a file alone has no ratio to narrow."""
    logs = np.log(np.maximum(samples[:, :, 0, 1 if clock == "cpu" else 0], 1).astype(np.float64))
    spread: NDArray[np.float64] = logs - np.median(logs, axis=1, keepdims=True)
    return spread[None]


def _drift(log_ratios: NDArray[np.float64], nanoseconds: NDArray[np.int64]) -> str:
    """Return a sentence when the first and second half of the rounds disagree by more than the margin and chance."""
    half = log_ratios.shape[1] // 2
    if half < 10:
        return ""
    notes = []
    for values, what in ((log_ratios, "its ratio to the reference"), (np.log(np.maximum(nanoseconds, 1)), "its time")):
        centred = values - np.median(values, axis=1, keepdims=True)
        change = np.median(centred[:, half:]) - np.median(centred[:, :half])
        # Spread of a median of n values is 1.25 sigma / sqrt(n); 1.48 MAD stands for sigma; two halves are compared.
        chance = 1.25 * 1.48 * np.median(np.abs(centred)) * math.sqrt(2 / (half * len(values)))
        if abs(change) > max(MARGIN, 4 * chance):
            notes.append(f"{what} changed by {100 * math.expm1(change):+.1f} %")
    return f"Not steady: from the first to the second half of the rounds {' and '.join(notes)}." if notes else ""
