"""In: made-up losses of layers. Out: proof that the guard finds a fast file that keeps the drop."""

from dataclasses import replace
from pathlib import Path

import pytest

from hirelc_deploy.compress.integer.guard import Guarded, Other, Trials, given_back, guard, priced
from hirelc_deploy.errors import ConstraintError

POINTS = {"stem": 1.0, "depthwise": 3.0, "middle": 0.25, "head": 0.5, "wide": 3.0}
MS = {"stem": 0.5, "depthwise": 0.5, "middle": 0.5, "head": 0.0, "wide": 8.0}


class Files:
    """Files are a pattern and its float layers; each integer layer costs its points, and a tenth of them in nats."""

    def __init__(self, always=0.0, patterns=None, trained=None):
        self.patterns = patterns or {"all": (always, 4.0)}
        self.judged = []
        self.trained = trained  # points that the trained file loses

    def build(self, pattern, floats):
        return Path(pattern) / ("+".join(sorted(floats)) or "none")

    def lost(self, path):
        if path.name == "trained":
            return self.trained
        floats = set(path.name.split("+"))
        return self.patterns[path.parent.name][0] + sum(p for layer, p in POINTS.items() if layer not in floats)

    def drop(self, path):
        self.judged.append(str(path))
        return self.lost(path)

    def divergence(self, path):
        return self.lost(path) / 10

    def milliseconds(self, files):
        return [self.patterns[f.parent.name][1] + sum(MS.get(layer, 0) for layer in f.name.split("+")) for f in files]

    @property
    def trials(self):
        trained = None if self.trained is None else lambda: Path("all/trained")
        return Trials(self.build, self.divergence, self.drop, self.milliseconds, trained)

    def guard(self, max_drop):
        return guard(list(self.patterns), list(POINTS), self.trials, max_drop)


def test_a_file_that_holds_is_left_alone():
    files = Files()
    assert files.guard(max_drop=8.0) == Guarded("all", (), 7.75, 7.75, 0.0, 0.0)
    assert files.judged == ["all/none"]


def test_layers_go_back_by_what_they_save_for_a_millisecond():
    assert [step.layer for step in priced("all", list(POINTS), Files().trials)] == [
        *("head", "depthwise", "stem", "middle", "wide")
    ]
    found = Files().guard(max_drop=3.5)
    assert [step.layer for step in found.reverted] == ["head", "depthwise", "stem"]
    assert (found.points_before, found.points, found.ms_before, found.ms) == (7.75, 3.25, 4.0, 5.0)
    assert [step.divergence for step in found.reverted] == pytest.approx([0.05, 0.3, 0.1])
    assert [step.ms for step in found.reverted] == [0.0, 0.5, 0.5]
    assert Guarded.from_dict(found.to_dict()) == found


def test_an_end_counts_with_what_it_saves_where_all_is_rounded_because_alone_nothing_feeds_it():
    end = "end of boxes"

    class WithEnd(Files):
        def lost(self, path):
            fed = not {*POINTS} <= {*path.name.split("+")}
            return super().lost(path) + 20.0 * (fed and end not in path.name)

    first, *_ = priced("all", [*POINTS, end], WithEnd().trials)
    assert (first.layer, first.divergence) == (end, pytest.approx(2.0))
    found = guard(["all"], [*POINTS, end], WithEnd().trials, 8.0)
    assert [step.layer for step in found.reverted] == [end]


def test_layers_that_went_back_for_nothing_are_integers_again():
    together = {"a", "b"}  # alone neither helps

    def holds(floats):
        return together <= {*floats}

    assert given_back(["x", "a", "y", "z", "b"], holds) == ["a", "b"]
    assert given_back([], lambda floats: False) == []


def test_the_fastest_of_a_tamer_pattern_and_float_layers_is_taken():
    tame = {"all": (1.0, 4.0), "weights": (-7.0, 4.5)}
    found = Files(patterns=tame).guard(1.0)
    assert replace(found, others=()) == Guarded("weights", (), 8.75, 0.75, 4.0, 4.5)
    assert [(other.pattern, other.ms) for other in found.others] == [("all", 13.5)]
    slow = {"all": (1.0, 4.0), "weights": (-7.0, 6.0)}
    found = Files(patterns=slow).guard(5.5)
    assert (found.pattern, [step.layer for step in found.reverted]) == ("all", ["head", "depthwise"])
    assert found.ms == 4.5


def test_layers_of_the_pattern_that_loses_least_go_back_where_the_placed_one_cannot_hold():
    found = Files(patterns={"all": (9.0, 4.0), "weights": (2.0, 5.0)}).guard(5.75)
    assert found.pattern == "weights"
    assert found.points <= 5.75


def test_what_float_layers_cannot_mend_is_said():
    with pytest.raises(
        ConstraintError, match=r"all 5 layers float the drop, with one standard error, is still 2\.00 points"
    ):
        Files(always=2.0).guard(max_drop=1.0)


def test_training_is_taken_where_it_keeps_the_drop_in_less_time_than_float_layers_do():
    files = Files(trained=3.0)
    found = files.guard(3.5)
    assert (found.trained, found.reverted, found.points, found.ms_before, found.ms) == (True, (), 3.0, 4.0, 4.0)
    assert found.others == (Other(False, "all", ("head", "depthwise", "stem"), points=3.25, ms=5.0),)
    assert "all/trained" in files.judged
    assert Guarded.from_dict(found.to_dict()) == found


def test_training_that_does_not_keep_the_drop_is_told_and_not_taken():
    found = Files(trained=3.75).guard(3.5)
    assert not found.trained
    assert [step.layer for step in found.reverted] == ["head", "depthwise", "stem"]
    assert found.others == (Other(trained=True, pattern="all", floats=(), points=3.75, ms=0.0),)


def test_a_slower_trained_file_is_not_taken():
    tame = {"all": (1.0, 4.0), "weights": (-7.0, 3.5)}  # the second is the faster one after all
    found = Files(patterns=tame, trained=0.5).guard(1.0)
    assert (found.trained, found.pattern, found.ms) == (False, "weights", 3.5)
    assert found.others[0] == Other(trained=True, pattern="all", floats=(), points=0.5, ms=4.0)


def test_training_saves_what_float_layers_cannot_mend():
    assert Files(always=2.0, trained=0.5).guard(max_drop=1.0).trained


def test_a_file_that_cannot_be_trained_leaves_the_rest_as_it_was():
    files = Files()
    trials = Trials(files.build, files.divergence, files.drop, files.milliseconds, lambda: None)
    assert guard(["all"], list(POINTS), trials, 3.5) == files.guard(3.5)
