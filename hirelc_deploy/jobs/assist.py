"""In: a configuration. Out: nothing; this process takes part in the recoveries of the leading one, to its end."""

from __future__ import annotations

from hirelc_deploy.compress import recovery
from hirelc_deploy.config import JobConfig
from hirelc_deploy.errors import InputError
from hirelc_deploy.evaluate.effort import Effort
from hirelc_deploy.evaluate.training import teacher_of
from hirelc_deploy.evaluate.uncut import UncutModel
from hirelc_deploy.inputs.data.splits import Data
from hirelc_deploy.inputs.models.given import Source
from hirelc_deploy.jobs.workplace import Given, contents_of, fitted_of
from hirelc_deploy.progress import Progress
from hirelc_deploy.together import ranks


def assist(config: JobConfig, given: Given) -> None:
    """Load the model and its images as the leading process does, and train as it says."""
    fitted = fitted_of(config, given)
    check_others(fitted.source, fitted.data)
    uncut = UncutModel(fitted.model, fitted.data, fitted.task, Effort(), Progress(quiet=True))
    recovery.assist(teacher_of(uncut, uncut.effort))


def check_others(source: Source, data: Data) -> None:
    """Raise InputError where this process found other weights or images than the leading one; all of them ask."""
    if ranks.count() == 1:
        return
    own = contents_of(source, data)
    leading = ranks.told(own)
    if changed := [name for name, value in own.items() if leading[name] != value]:
        raise InputError(
            f"torchrun: process {ranks.number()} finds other {changed[0]} than process 0 under the same name; give all "
            "hosts the same files."
        )
