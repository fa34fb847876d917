"""In: a plan. Out: what the cut model loses before any training (F1); can be sent to other processes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from hirelc_deploy.compress.integer import qat
from hirelc_deploy.errors import SliceError
from hirelc_deploy.evaluate.clock import clocked
from hirelc_deploy.evaluate.cutting import Cuttable, cut, forward_half, round_as_asked
from hirelc_deploy.evaluate.selection import Shown, judged
from hirelc_deploy.graph.costs import cost_of
from hirelc_deploy.outcome import Failed, Measured, Outcome, outcome_to_dict
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.tasks.contract import Task


@dataclass(frozen=True)
class Judge:
    """Judges cut models before any training (F1). It has all it needs, so it can be sent to another process or host.

    Attributes:
        task: What the answers are for.
        shown: Selection images with what the uncut model answers to them; a list where they are sent.
        roundings: What the integer file rounds for the sake of each block; none where all is judged in float.
    """

    uncut: Cuttable
    task: Task
    shown: Iterable[Shown]
    roundings: Sequence[qat.Rounding] = ()

    def answer(self, text: str) -> str:
        """Return the outcome of a plan, both as JSON, computed by one thread."""
        torch.set_num_threads(1)
        return json.dumps(outcome_to_dict(self.outcome(CompressionPlan.from_dict(json.loads(text), "plan"))))

    def outcome(self, plan: CompressionPlan) -> Outcome:
        """Return what a plan loses, or Failed where the model cannot take it."""
        seconds: dict[str, float] = {}
        try:
            with clocked(seconds, "slice"):
                model = cut(self.uncut, plan)
                cost = cost_of(self.uncut.model, self.uncut.graph, plan.keep)
        except SliceError as error:
            return Failed(plan.digest, "F1", "slice", str(error), seconds)
        with clocked(seconds, "judge"):
            round_as_asked(model, self.roundings, plan)
            loss, value = judged(self.task, self.shown, partial(forward_half, model))
        return Measured(plan.digest, "F1", loss, value, cost.params, cost.macs, seconds=seconds)
