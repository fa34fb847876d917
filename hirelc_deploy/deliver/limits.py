"""In: the limits that a user set, and what a file is measured to be. Out: whether it keeps them."""

from __future__ import annotations

import math
from pathlib import Path

from hirelc_deploy.config import Limits
from hirelc_deploy.errors import ConstraintError, InputError
from hirelc_deploy.evaluate.files import Files
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.outcome import Measured
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.tasks.paired import PairedDrop, paired_drop

TOLERANCE = 0.02
"""A file within this share of its latency budget meets it: below what a brief timing can tell."""


def latency_budget_ms(limits: Limits, reference_ms: float) -> float | None:
    """Return the milliseconds that the limits allow, or None when they say nothing about time."""
    allowed = [limits.max_latency_ms] if limits.max_latency_ms is not None else []
    if limits.speedup is not None:
        allowed.append(reference_ms / limits.speedup)
    return min(allowed, default=None)


def check_memory(pipeline: Pipeline, most: int) -> None:
    """Refuse a limit on the memory of the running process that nothing can keep, before anything is trained.

    Raises:
        InputError: The target does not tell the memory of a process.
        ConstraintError: The narrowest network exceeds the limit.
    """
    files = pipeline.files
    if files.peak_memory_bytes(files.reference) is None:
        raise InputError(
            f"--max-memory: {files.backend.name} does not tell the memory of a running process on this target; "
            "leave it out."
        )
    plan = CompressionPlan({unit.name: unit.least for unit in pipeline.graph.units}, default_precision="auto")
    if not isinstance(pipeline.outcome(plan, "F2"), Measured):
        return  # nothing is known of the narrowest one; the finalists show what they need
    least = files.peak_memory_bytes(files.file_of(plan, "F2"))
    if least is not None and least > most:
        raise ConstraintError(
            f"search: {most:,} bytes of memory cannot be met: with every unit at its narrowest the process still takes "
            f"{least:,} bytes on this target, its runtime included. Allow more memory."
        )


def check_energy(pipeline: Pipeline) -> None:
    """Raise InputError where the target does not tell what it draws."""
    files = pipeline.files
    if files.energy_mj(files.reference) is None:
        raise InputError(
            f"--max-energy-mj: {files.backend.name} does not tell what it draws on this target (RAPL's counters under "
            "/sys/class/powercap, or the rail VDD_IN of a Jetson, readable for you); leave it out."
        )


def appetite(limits: Limits, files: Files, path: Path) -> tuple[int | None, float | None]:
    """Return the peak memory of a file's process and the energy of one inference; None where nothing limits them."""
    return (
        None if limits.max_memory_bytes is None else files.peak_memory_bytes(path),
        None if limits.max_energy_mj is None else files.energy_mj(path),
    )


def keeps_energy(limits: Limits, energy_mj: float | None) -> bool:
    """Return whether the energy of one inference keeps the limit on it; what was not told keeps none."""
    return limits.max_energy_mj is None or (energy_mj is not None and energy_mj <= limits.max_energy_mj)


def keeps_memory(limits: Limits, memory: int | None) -> bool:
    """Return whether the peak of a process keeps the limit on it; what was not told keeps none."""
    return limits.max_memory_bytes is None or (memory is not None and memory <= limits.max_memory_bytes)


def drop_error(drop: PairedDrop) -> float:
    """Return the standard error of a drop, from its 95 % interval."""
    return (drop.high - drop.low) / (2 * 1.96)


def too_few_images(pipeline: Pipeline, max_drop: float | None) -> str:
    """Return a sentence where the selection images are too few for any file to keep the limit on the drop, else ``.

    Even a file that answers each of them as the uncut model does has an error: n right or wrong answers tell a drop to
    1 / (n + 2) of the unit at best (see `paired_drop`), and with two answers changed to sqrt(3) times that.
    """
    parts, task = pipeline.uncut.selection.parts, pipeline.task
    if not max_drop or not parts or not task.mean_of_images:
        return ""
    error = drop_error(paired_drop(task, parts, parts))
    if error <= max_drop:
        return ""
    enough = math.ceil(math.sqrt(3) * error * (len(parts) + 2) / max_drop)
    return (
        f"{len(parts)} selection images are too few for --max-drop {max_drop:g}: of a file that answers all of them as "
        f"the uncut model does the drop is known to {error:.2f} {task.metric.unit}, and it must keep the limit by "
        f"that. Give --selection-images {enough} or more, or allow a drop of more than {error:.1f}."
    )


def keeps_limits(
    limits: Limits,
    outcome: Measured,
    drop: float,
    error: float,
    reference_ms: float,
    memory: int | None = None,
    energy_mj: float | None = None,
) -> bool:
    """Return whether a file keeps every limit.

    The drop on the selection split is an estimate, so it must stay below the limit by one standard error: about 84 of
    100 files judged so keep the limit on images nobody has seen.

    Args:
        memory: Peak bytes of the file's process, where the limits are about it.
        energy_mj: Of one inference, likewise.
    """
    if limits.max_drop is not None and not math.isnan(drop) and drop + error > limits.max_drop:
        return False
    if limits.max_bytes is not None and (outcome.size_bytes or 0) > limits.max_bytes:
        return False
    if not keeps_memory(limits, memory) or not keeps_energy(limits, energy_mj):
        return False
    budget = latency_budget_ms(limits, reference_ms)
    return budget is None or outcome.ratio is None or outcome.ratio * reference_ms <= budget * (1 + TOLERANCE)
