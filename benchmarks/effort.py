"""In: a pipeline and what is to differ of its effort. Out: the pipeline, all of whose parts work so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hirelc_deploy.evaluate.pipeline import Pipeline


def set_effort(pipeline: Pipeline, **changes: Any) -> None:
    """Change fields of the `Effort` of a pipeline that has not computed anything yet."""
    changed = replace(pipeline.effort, **changes)
    pipeline.effort = pipeline.uncut.effort = pipeline.training.effort = changed
