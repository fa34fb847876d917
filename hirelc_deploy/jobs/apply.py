"""In: a workplace and one plan. Out: that plan, built and delivered."""

from __future__ import annotations

import time
from typing import Any

from hirelc_deploy.config import Limits
from hirelc_deploy.deliver.agenda import Agenda
from hirelc_deploy.deliver.finalists import sizes_of
from hirelc_deploy.errors import ExportError
from hirelc_deploy.jobs.shipping import deliver
from hirelc_deploy.jobs.workplace import Workplace, finished, read_plan
from hirelc_deploy.outcome import Failed
from hirelc_deploy.runs import RESULT


def run_apply(workplace: Workplace, plan_text: str) -> dict[str, Any]:
    """Build the one plan that was asked for, deliver it and return the result record."""
    pipeline, run = workplace.pipeline, workplace.run
    if (run.directory / RESULT).exists():
        return finished(run.directory)
    started = time.monotonic()
    plan = read_plan(plan_text, pipeline.graph)
    if pipeline.uncut.doubt:
        pipeline.progress.say(f"warning: {pipeline.uncut.doubt}")
    agenda = Agenda(pipeline.progress.left, run, pipeline.files.machine, sizes_of(pipeline, Limits(), 0))
    agenda.apply()
    _ = pipeline.files.reference  # what no file can hold is refused here, before the work
    outcome = pipeline.outcome(plan, "F3")
    if isinstance(outcome, Failed):
        raise ExportError(f"apply: the plan could not be built; {outcome.stage} says: {outcome.reason}")
    return deliver(workplace, plan, {}, started, always=True)
