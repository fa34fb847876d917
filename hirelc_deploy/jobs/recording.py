"""In: an opened workplace. Out: the same while its job works: what it says and measures is kept, and how it ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hirelc_deploy.errors import HirelcError
from hirelc_deploy.jobs.workplace import Workplace
from hirelc_deploy.jobs.workplace import finished as finished_record
from hirelc_deploy.outcome import Measured
from hirelc_deploy.run_log import RunLog
from hirelc_deploy.runs import RESULT, TrialRecord
from hirelc_deploy.trackers.contract import Trackers


@contextmanager
def recorded(workplace: Workplace) -> Iterator[None]:
    """Keep the log of a job and how far it is in its run, and tell its trackers; the run is closed at the end."""
    with workplace.run as run:
        progress = workplace.pipeline.progress
        log = RunLog(run.directory, workplace.command, progress.left)
        progress.keep_in(log)
        trackers = Trackers(workplace.track, run.directory, workplace.command, run.remember, progress.say)
        run.after_trial = lambda trial: trackers.trial(trial.trial, trial.fidelity, values_of(trial))
        if workplace.track:
            workplace.pipeline.training.scalars = trackers.scalars
        finished = False
        try:
            yield
            finished = True
            if workplace.track and (run.directory / RESULT).exists():
                trackers.result(result_values(run.directory), [run.directory / "bundle", run.directory / "report.html"])
        except BaseException as error:
            log.end(_sentence(error))
            raise
        else:
            log.end()
        finally:
            trackers.close(finished)


def values_of(trial: TrialRecord) -> dict[str, float | None]:
    """Return what an evaluation measured, by name."""
    if not isinstance(trial.outcome, Measured):
        return {}
    names = ("loss", "accuracy", "ratio", "median_ms", "size_bytes", "params", "macs")
    return {**{name: getattr(trial.outcome, name) for name in names}, "seconds": sum(trial.outcome.seconds.values())}


def result_values(directory: Path) -> dict[str, float | None]:
    """Return the figures of a finished run's shipped file, by name."""
    record = finished_record(directory)
    latency, found = record["latency"], record["accuracy"]
    return {
        **{name: record[name] for name in ("params", "macs", "size_bytes", "size_ratio")},
        **{name: latency[name] for name in ("median_ms", "ratio", "ratio_low", "ratio_high")},
        **{f"accuracy {name}": value for name, value in found.items()},
    }


def _sentence(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command resumes."
    return str(error) if isinstance(error, HirelcError) else f"{type(error).__name__}: {error}"
