"""In: answers made by hand. Out: proof that what is not finite is found, and that what ran is counted."""

import numpy as np
import pytest

from hirelc_deploy.errors import ExportError
from hirelc_deploy.measure import accuracy
from hirelc_deploy.measure.backend import OperatorTime


class FixedRunner:
    """Ran five operators, two of them with integer arithmetic."""

    def infer(self, images):
        return {"output": images[:, 0, 0, :2]}

    def profile(self, image, runs):
        kinds = [
            ("QuantizeLinear", False),
            ("QLinearConv", True),
            ("Transpose", False),
            ("QGemm", True),
            ("Add", False),
        ]
        return [OperatorTime(str(i), operator, integer, 1.0) for i, (operator, integer) in enumerate(kinds)]


def test_answers_that_are_not_finite_are_told_with_their_image():
    good = np.zeros((3, 4, 2, 2), dtype=np.float32)
    bad = np.zeros((3, 2), dtype=np.float32)
    assert accuracy.finite({"map": good, "numbers": bad}) == {"map": good, "numbers": bad}
    bad[2, 1] = np.nan
    with pytest.raises(ExportError, match="numbers: NaN or infinity on image 12;"):
        accuracy.finite({"map": good, "numbers": bad}, first=10)


def test_operators_that_only_move_numbers_are_not_counted():
    assert accuracy.operators(FixedRunner(), np.zeros((1, 3, 2, 2))) == (2, 1)
