"""Bits of each layer: every byte is foreseen, the limit holds, and better bits are found than equal ones."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from test_codec import files, integer_cnn  # noqa: F401  (fixtures)

from hirelc_deploy.compress.storage import codec
from hirelc_deploy.deliver.stored_bits import StoredBits
from hirelc_deploy.errors import ConstraintError
from tests.test_quantize import images, run


@pytest.fixture(scope="module")
def choice(integer_cnn):  # noqa: F811
    """Judge by the first layer more than by all others, which no equal bits can serve."""
    wanted = run(integer_cnn, images(4))
    first = codec.coded_tensors(onnx.load(str(integer_cnn)))[0]

    def judge(path):
        restored = next(t for t in onnx.load(str(path)).graph.initializer if t.name == first.name)
        off = numpy_helper.to_array(restored).astype(np.float64) - numpy_helper.to_array(first)
        return float(np.square(off).mean()) + float(np.square(run(path, images(4)) - wanted).mean())

    return StoredBits(integer_cnn, judge, "linear")


def test_bytes_are_foreseen_exactly(choice):
    problem, rng = choice.problem(measured=False), np.random.default_rng(0)
    for _ in range(5):
        choices = rng.integers(len(codec.BITS), size=len(choice.names))
        assert problem.predict_ms(choices) == choice.evaluate(problem.plan_of(choices).keep)[1]


@pytest.mark.parametrize("strategy", ["two-stage", "knapsack"])
def test_the_limit_holds_and_the_layer_that_matters_gets_the_bits(choice, strategy):
    equal = choice.evaluate(dict.fromkeys(choice.names, 4))
    found = choice.choose(equal[1], strategy, 24, 0)
    assert found.size_bytes <= equal[1]
    assert found.loss < equal[0]
    assert found.evaluations == len(found.curve) <= 24
    assert found.bits[choice.names[0]] > 4


def test_a_limit_below_the_fewest_bits_is_one_sentence(choice):
    with pytest.raises(ConstraintError, match="with 2 bits everywhere"):
        choice.choose(1000, "two-stage", 4, 0)
