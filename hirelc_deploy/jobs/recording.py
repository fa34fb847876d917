"""In: an opened workplace. Out: the same while its job works: what it says is kept in the run, and how it ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hirelc_deploy.errors import HirelcError
from hirelc_deploy.jobs.workplace import Workplace
from hirelc_deploy.run_log import RunLog


@contextmanager
def recorded(workplace: Workplace) -> Iterator[None]:
    """Keep the log of a job and how far it is in its run, which is closed at the end."""
    with workplace.run as run:
        progress = workplace.pipeline.progress
        log = RunLog(run.directory, workplace.command, progress.left)
        progress.keep_in(log)
        try:
            yield
        except BaseException as error:
            log.end(_sentence(error))
            raise
        log.end()


def _sentence(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command resumes."
    return str(error) if isinstance(error, HirelcError) else f"{type(error).__name__}: {error}"
