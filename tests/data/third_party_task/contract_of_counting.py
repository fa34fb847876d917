"""The contract suite that hirelc-deploy ships, for the task of this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from counting import Counting

from hirelc_deploy.graph.answers import Answers
from hirelc_deploy.tasks.contract import Task
from hirelc_deploy.testing.task_contract import TaskContract


class TestCounting(TaskContract):
    def make(self) -> Task:
        return Counting((), {"noun": "cells"})

    def answers(self, count: int, seed: int) -> Answers:
        return {"output": torch.rand(count, 1, 8, 12, generator=torch.Generator().manual_seed(seed))}

    def targets(self, count: int, seed: int) -> list[Any]:
        return torch.randint(9, (count,), generator=torch.Generator().manual_seed(seed)).tolist()

    def perfect(self, targets: Sequence[Any]) -> Answers:
        return {
            "output": torch.tensor([float(target) for target in targets]).view(-1, 1, 1, 1).expand(-1, 1, 8, 12) / 96
        }
