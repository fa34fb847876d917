"""In: made-up losses of layers. Out: proof that the guard turns back the worst layers, and no more than it must."""

from pathlib import Path

import pytest

from hirelc_deploy.compress.guard import guard, sensitivity
from hirelc_deploy.errors import ConstraintError

POINTS = {"stem": 1.0, "depthwise": 3.0, "middle": 0.25, "head": 0.5, "lucky": -0.25}


class Files:
    """Files that are their float layers; each integer layer costs its points, and a tenth of them in nats."""

    def __init__(self, always=0.0):
        self.always, self.judged = always, []

    def build(self, floats):
        return Path("+".join(sorted(floats)) or "none")

    def drop(self, path):
        floats = set(path.name.split("+"))
        self.judged.append(path.name)
        return self.always + sum(points for layer, points in POINTS.items() if layer not in floats)

    def divergence(self, path):
        return self.drop(path) / 10

    def milliseconds(self, files):
        return [4.0 + 0.5 * len(path.name.split("+")) * (path.name != "none") for path in files]

    def guard(self, max_drop):
        return guard(list(POINTS), self.build, self.divergence, self.drop, self.milliseconds, max_drop)


def test_a_file_that_holds_is_left_alone():
    files = Files()
    assert files.guard(max_drop=5.0) == []
    assert files.judged == ["none"]


def test_the_worst_layers_go_back_and_no_more_than_needed():
    reverted = Files().guard(max_drop=0.5)
    assert [step.layer for step in reverted] == ["depthwise", "stem"]
    assert [step.drop_points for step in reverted] == [1.5, 0.5]
    assert reverted[0].divergence == pytest.approx(0.3)
    assert [step.ms for step in reverted] == [0.5, 0.5]


def test_sensitivity_is_ordered_and_knows_rounding_that_helps():
    files = Files()
    found = sensitivity(list(POINTS), files.build, files.divergence)
    assert list(found) == ["depthwise", "stem", "head", "middle", "lucky"]
    assert found["lucky"] == pytest.approx(-0.025)


def test_what_float_layers_cannot_mend_is_said():
    with pytest.raises(ConstraintError, match=r"all 5 layers float the drop is still 2\.00 points, allowed are 1"):
        Files(always=2.0).guard(max_drop=1.0)
