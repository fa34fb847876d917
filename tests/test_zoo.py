"""benchmarks/zoo.py: a small part of its table, and that it tells equal from different and done from stuck."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hirelc_deploy.compress.slicing import slice_model
from hirelc_deploy.demo.model import DemoNet
from hirelc_deploy.graph.units import build_graph

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
spec = importlib.util.spec_from_file_location("zoo", BENCHMARKS / "zoo.py")
zoo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(zoo)


@pytest.mark.parametrize("name", ["mobilenetv3_small_100", "deit_tiny_patch16_224"])
def test_half_of_a_model_is_exact_and_runs_as_a_file_of_integers(name):
    row = zoo.our_row(name, 0.5)
    assert row["units"] > 0
    assert row["params_kept"] <= 0.6
    assert row["difference"] <= zoo.EXACT
    assert row["effect"] > 0.1, "a cut without effect proves nothing"
    assert row["onnx_difference"] <= 1e-4
    assert row["int8"]


def test_random_plans_are_exact():
    row = zoo.random_plans("mobilenetv3_small_100", 3)
    assert (row["plans"], row["exact"]) == (3, 3)
    assert row["params_kept"][0] < row["params_kept"][1] < 1


def test_zeroing_by_values_finds_what_a_slicer_removed():
    model, images = DemoNet((16, 32), 1).eval(), torch.randn(2, 3, 16, 16)
    zoo.randomise(model, images)
    graph = build_graph(model, images)
    kept = {unit.name: torch.arange(1, unit.size, 2).numpy() for unit in graph.units}
    sliced = slice_model(model, graph, kept)
    twin = zoo.zeroed(model, sliced)
    assert torch.count_nonzero(twin.stages[0][0].conv1.weight) == sliced.stages[0][0].conv1.weight.numel()
    assert zoo.difference(zoo.outputs(sliced, images), zoo.outputs(twin, images)) <= zoo.EXACT
    assert zoo.difference(zoo.outputs(model, images), zoo.outputs(twin, images)) > zoo.EXACT


JOBS = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import zoo

def broken():
    raise IndexError("index 5")

print(json.dumps(dict(zoo.each([lambda: time.sleep(60), broken, lambda: {"fine": 1}], [0.5, 60, 60], at_once=2))))
"""


def test_a_model_that_hangs_or_dies_is_reported_and_the_others_go_on(tmp_path):
    # In a process of its own: a copy of one that has worked with Ray dies in Python 3.13.
    (tmp_path / "jobs.py").write_text(JOBS)
    command = [sys.executable, str(tmp_path / "jobs.py"), str(BENCHMARKS)]
    rows = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert rows["0"] == {"error": "not done after 0.5 s", "bug": True}
    assert rows["1"]["error"].startswith("IndexError: index 5 (jobs.py:")
    assert rows["2"] == {"fine": 1}
