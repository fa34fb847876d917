"""In: a network of which one block cannot bear rounding, on the fake device. Out: proof that the search trades it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_pipeline import EFFORT, data_file, tiny_net  # noqa: F401  # a fixture is found by its name
from toy_problem import additive_problem

from hirelc_deploy.compress import slicing
from hirelc_deploy.compress.integer import qat
from hirelc_deploy.evaluate import network_time, tables
from hirelc_deploy.evaluate.cutting import round_as_asked
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.inputs.data.load import load_data
from hirelc_deploy.measure.table import LatencyTable
from hirelc_deploy.outcome import Measured
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.runs import Run
from hirelc_deploy.strategies.baselines import make_strategy
from hirelc_deploy.strategies.hierarchy import neighbours
from hirelc_deploy.strategies.knapsack import solve
from hirelc_deploy.strategies.loop import run_search
from hirelc_deploy.strategies.problem import Decision, Problem
from hirelc_deploy.strategies.votes import vote
from hirelc_deploy.testing.fake_backend import FakeBackend

HURT = "stages.1.0"
"""A block in which one channel is a thousand times larger than the others, and read a thousand times less."""


def open_pipeline(data: Path, folder: Path, *, rounds: bool) -> Pipeline:
    model = tiny_net()
    block = model.get_submodule(HURT)
    with torch.no_grad():
        block.bn1.weight[0] *= 1000
        block.bn1.bias[0] = 1000.0
        block.conv2.weight[:, 0] /= 1000
    run = Run.open(folder, "seed = 0\n", {"cpu": "fake"})
    return Pipeline(model, load_data(f"npz:{data}"), FakeBackend(), run, effort=EFFORT, rounds=rounds)


@pytest.fixture(scope="module")
def pipeline(data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:  # noqa: F811
    return open_pipeline(data_file, tmp_path_factory.mktemp("run") / "run", rounds=True)


@pytest.fixture(scope="module")
def network(pipeline: Pipeline) -> network_time.NetworkTime:
    return network_time.fit_network_time(pipeline, LatencyTable(pipeline.backend, None))[0]


@pytest.fixture(scope="module")
def problem(pipeline: Pipeline, network: network_time.NetworkTime) -> Problem:
    return tables.build_problem(pipeline, network, options=3)


def precisions(problem: Problem) -> list[Decision]:
    return [decision for decision in problem.decisions if decision.kind == "precision"]


def random_choices(problem: Problem, count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [np.array([rng.integers(len(d.options)) for d in problem.decisions]) for _ in range(count)]


def test_every_integer_block_decides_between_float_and_what_it_is_in_the_best_file(
    pipeline: Pipeline, problem: Problem
):
    found = precisions(problem)
    assert [d.block for d in found] == ["conv1", "stages.0.0", HURT, "fc"]
    assert {layer for d in found for layer in d.layers} == {layer.name for layer in pipeline.graph.layers}
    assert all(d.options == ("float", "int8") for d in found)
    assert all(d.loss[0] == 0 <= d.loss[1] and d.ms[0] > 0 == d.ms[1] for d in found)
    hurt = next(d for d in found if d.block == HURT)
    assert hurt.loss[1] > 3 * max(d.loss[1] for d in found if d is not hurt)
    assert {len(d.features) for d in problem.decisions} == {10}


def test_without_the_option_there_are_widths_alone_and_nothing_is_rounded(data_file: Path, tmp_path: Path):  # noqa: F811
    pipeline = open_pipeline(data_file, tmp_path / "run", rounds=False)
    network, _ = network_time.fit_network_time(pipeline, LatencyTable(pipeline.backend, None))
    problem = tables.build_problem(pipeline, network, options=3)
    assert {d.kind for d in problem.decisions} == {"width"}
    assert all(d.loss[-1] == 0 and d.layers == () for d in problem.decisions)
    assert all(plan.default_precision == "auto" for plan in (trial.plan for trial in pipeline.run.trials))
    assert problem.plan_of(np.array([0] * len(problem.decisions))).precision == {}


def test_predicted_times_of_mixed_plans_are_sums_of_the_layer_table(
    problem: Problem, network: network_time.NetworkTime
):
    for choices in random_choices(problem, 20):
        plan = problem.plan_of(choices)
        wanted = network.predict(plan.keep, lambda layer, plan=plan: plan.precision.get(layer, "int8"))
        assert problem.predict_ms(choices) == pytest.approx(wanted)


def test_a_measured_table_has_all_that_such_times_need(pipeline: Pipeline, problem: Problem):
    table = LatencyTable(pipeline.backend, None)
    network = network_time.NetworkTime(pipeline.graph, table, 0.0, 1.0)
    network_time.measure_table(pipeline, network, 3)
    before = table.measured
    tables.build_problem(pipeline, network, options=3)
    assert table.measured == before > 0


def test_a_plan_says_which_layers_stay_float_and_means_its_choices(pipeline: Pipeline, problem: Problem):
    for choices in random_choices(problem, 20):
        plan = problem.plan_of(choices)
        slicing.check_plan(pipeline.graph, plan)
        back = problem.choices_of(plan)
        assert back is not None
        assert problem.plan_of(back) == plan
        gone = {layer.name for layer in pipeline.graph.layers if pipeline.graph.leaves_out(layer.name, plan.keep)}
        floats = {layer for d, c in zip(problem.decisions, choices, strict=True) if not c for layer in d.layers}
        assert plan.precision == dict.fromkeys(floats - gone, "float")
    one_layer = CompressionPlan({}, {precisions(problem)[1].layers[0]: "float"}, "auto")
    assert problem.choices_of(one_layer) is None


def test_a_block_that_stays_float_is_judged_unrounded(pipeline: Pipeline):
    layers = pipeline.roundings[HURT].weights
    whole, without = (
        pipeline.evaluate(CompressionPlan({}, dict.fromkeys(floats, "float"), "auto"), "F1") for floats in ((), layers)
    )
    alone = pipeline.evaluate(CompressionPlan({}, dict.fromkeys(layers, "int8"), "float"), "F1")
    unrounded = pipeline.evaluate(CompressionPlan(default_precision="float"), "F1")
    assert isinstance(whole, Measured)
    assert isinstance(without, Measured)
    assert isinstance(alone, Measured)
    assert isinstance(unrounded, Measured)
    assert without.loss < 0.5 * whole.loss
    assert alone.loss > 0.5 * whole.loss
    assert unrounded.loss < without.loss


def test_files_round_what_their_blocks_round_alone(pipeline: Pipeline):
    blocks = list(pipeline.roundings)
    for floats in ([], [HURT], blocks[::2], blocks[1:]):
        layers = [layer for block in floats for layer in pipeline.roundings[block].weights]
        plan = CompressionPlan({}, dict.fromkeys(layers, "float"), "auto")
        (whole,) = pipeline.files.roundings_of(pipeline.model, [plan])
        joined = qat.joined(pipeline.roundings[block] for block in blocks if block not in floats)
        assert joined.weights == whole.weights
        assert joined.tensors.keys() == whole.tensors.keys()
        for key, grids in whole.tensors.items():
            assert [grid is None for grid in grids] == [grid is None for grid in joined.tensors[key]]


def test_a_model_without_a_branch_rounds_the_rest(pipeline: Pipeline):
    plan = CompressionPlan({"stages.0.0.conv1": 0}, default_precision="auto")
    model = pipeline.cut(plan)
    plain = model(pipeline.data.selection.batch(np.arange(8)))
    round_as_asked(model, tuple(pipeline.roundings.values()), plan)
    assert not torch.equal(model(pipeline.data.selection.batch(np.arange(8))), plain)
    assert torch.equal(qat.settle(model)(pipeline.data.selection.batch(np.arange(8))).argmax(1), plain.argmax(1))


@pytest.mark.parametrize("strategy", ["hirelc", "knapsack", "greedy"])
def test_a_search_keeps_float_what_rounding_hurts_where_time_allows(
    pipeline: Pipeline, problem: Problem, strategy: str
):
    hurt = next(index for index, d in enumerate(problem.decisions) if d.kind == "precision" and d.block == HURT)
    budget_ms = problem.uncut_ms + 1.01 * problem.decisions[hurt].ms[0]
    result = run_search(
        problem,
        make_strategy(strategy, problem, budget_ms, 0),
        pipeline.outcome,
        f1_evaluations=12,
        f2_evaluations=1,
    )
    assert all(problem.predict_ms(trial.choices) <= budget_ms for trial in result.trials)
    best, outcome = result.best or (None, None)
    assert best is not None
    assert best.precision.keys() >= pipeline.roundings[HURT].weights.keys()
    assert outcome is not None
    assert outcome.fidelity == "F2"


def test_float_is_paid_by_cuts_where_these_cost_less_and_rounding_is_borne_where_not(problem: Problem):
    hurt = next(index for index, d in enumerate(problem.decisions) if d.kind == "precision" and d.block == HURT)
    assert problem.decisions[hurt].ms[0] > 0.2 * problem.uncut_ms

    def with_cut_losses(factor: float) -> Problem:
        decisions = (replace(d, loss=factor * d.loss) if d.kind == "width" else d for d in problem.decisions)
        return replace(problem, decisions=tuple(decisions))

    cheap, dear = (solve(with_cut_losses(factor), 0.95 * problem.uncut_ms) for factor in (1e-3, 1e3))
    assert cheap[hurt] == 0
    assert dear[hurt] == 1
    assert all(c < len(d.options) - 1 for d, c in zip(problem.decisions, cheap, strict=True) if d.block == HURT)


def test_float_weights_are_charged_four_bytes(pipeline: Pipeline, problem: Problem):
    uncut = np.array([len(d.options) - 1 for d in problem.decisions])
    for index, decision in enumerate(problem.decisions):
        if decision.kind == "precision":
            one = np.where(np.arange(len(uncut)) == index, 0, uncut)
            integer, mixed = tables.weight_bytes(pipeline.graph, problem.decisions, np.stack([uncut, one]))
            params = sum(layer.params for layer in pipeline.graph.layers if layer.name in decision.layers)
            assert mixed - integer == pytest.approx(3 * params)
            assert decision.size_bytes.tolist() == [3 * params, 0]


def test_a_cut_plan_with_a_float_block_becomes_a_file_with_that_block_float(pipeline: Pipeline, problem: Problem):
    layers = list(pipeline.roundings[HURT].weights)
    plan = CompressionPlan({"stages.1.0.conv1": 16}, dict.fromkeys(layers, "float"), "auto")
    outcome = pipeline.evaluate(plan, "F2")
    assert isinstance(outcome, Measured)
    runner = pipeline.backend.build(pipeline.files.file_of(plan, "F2"), 1)
    times = runner.profile(pipeline.uncut.example[:1].numpy(), 1)
    assert sum(operator.operator == "Conv" for operator in times) == len(layers) == 3
    assert any(operator.operator == "QLinearConv" for operator in times)


def nominal(problem: Problem) -> Problem:
    """Return an additive problem whose first decision is a precision: its last option is the faster one."""
    first, *rest = problem.decisions
    decision = replace(
        first,
        kind="precision",
        options=("a", "b", "float", "int8"),
        ms=np.array([0.3, 0.2, 0.1, 0.0]),
        loss=np.array([0.0, 0.1, 0.2, 0.3]),
        layers=("layer",),
    )
    return replace(problem, decisions=(decision, *rest))


def test_precisions_are_elected_by_plurality_and_widths_by_the_median():
    problem = nominal(additive_problem(0, decisions=2))
    ballots = np.array([[0, 0], [3, 3], [3, 2], [0, 1], [1, 1]])
    assert vote(problem.decisions, ballots, np.array([1.0, 1.0, 1.0, 0.9, 1.0])).tolist() == [3, 1]
    assert vote(problem.decisions, ballots, np.array([1.2, 1.0, 1.0, 0.9, 1.0])).tolist() == [0, 1]


def test_a_slower_precision_is_exchanged_for_a_narrower_width():
    problem = nominal(additive_problem(0, decisions=2))
    near = {tuple(row) for row in neighbours(problem, np.array([3, 2]), np.inf).tolist()}
    assert {(0, 2), (1, 2), (2, 2), (0, 1), (1, 1), (2, 1)} <= near  # any option; slower beside narrower
    assert not {(0, 3), (1, 3), (2, 3)} & near  # both would take longer
