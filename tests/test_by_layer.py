"""In: what a user wants otherwise for single layers. Out: proof that plans say it themselves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hirelc_deploy.evaluate.by_layer import ByLayer
from hirelc_deploy.plan import CompressionPlan

GRAPH: Any = SimpleNamespace(leaves_out=lambda layer, keep: False)


@pytest.mark.parametrize("default", ["float", "int8", "auto"])
def test_the_plan_of_a_bundle_says_what_stays_float(default: str) -> None:
    asked = CompressionPlan({}, {"a": "int8", "b": "int8"}, default)
    stated = ByLayer(frozenset({"a"})).stated(asked, GRAPH)
    assert (stated.precision["a"], stated.precision["b"]) == ("float", "int8")
