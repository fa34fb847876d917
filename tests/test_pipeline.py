import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from toy_problem import WIDTHS, Toy

from hirelc_deploy.compress import slicing
from hirelc_deploy.compress.integer.placement import Placement
from hirelc_deploy.compress.integer.quantize import BLANKET
from hirelc_deploy.compress.recovery import Recovery
from hirelc_deploy.config import Limits, SearchConfig
from hirelc_deploy.deliver import finalists
from hirelc_deploy.deliver import race as delivery
from hirelc_deploy.deliver.limits import TOLERANCE, keeps_limits
from hirelc_deploy.demo.model import DemoNet
from hirelc_deploy.errors import ConstraintError, InputError
from hirelc_deploy.evaluate import network_time, tables
from hirelc_deploy.evaluate.effort import Effort
from hirelc_deploy.evaluate.guarded import guarded, guarded_file
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.evaluate.uncut import UncutModel
from hirelc_deploy.graph.units import build_graph
from hirelc_deploy.inputs.data.images import ArrayImages
from hirelc_deploy.inputs.data.load import load_data
from hirelc_deploy.jobs.search import closest_plan
from hirelc_deploy.jobs.shipping import shipped_model
from hirelc_deploy.measure.backend import only
from hirelc_deploy.measure.table import LatencyTable
from hirelc_deploy.outcome import Failed, Measured
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.progress import Progress
from hirelc_deploy.runs import Run
from hirelc_deploy.strategies import depth
from hirelc_deploy.strategies.knapsack import smallest, solve
from hirelc_deploy.strategies.problem import Problem
from hirelc_deploy.tasks.classification import CLASSIFICATION
from hirelc_deploy.tasks.paired import PairedDrop
from hirelc_deploy.testing.fake_backend import FakeBackend, Faults

EFFORT = Effort(64, 32, 32, Recovery(epochs=3, batch_size=16, soft_weight=1.0), Effort().timing)


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 16x16 images that differ in brightness."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in {"train": 128, "calibration": 16, "selection": 48, "test": 64}.items():
        labels = np.arange(count) % 2
        pixels = rng.integers(0, 128, (count, 16, 16, 3)) + labels[:, None, None, None] * 100
        arrays[f"x_{split}"], arrays[f"y_{split}"] = pixels.astype(np.uint8), labels
    path = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(path, **arrays)
    return path


def tiny_net() -> nn.Module:
    torch.manual_seed(0)
    return DemoNet((16, 32), blocks_per_stage=1, num_classes=2).eval()


def make_pipeline(data_file: Path, folder: Path, backend: FakeBackend | None = None) -> Pipeline:
    run = Run.open(folder, "seed = 0\n", {"cpu": "fake"})
    return Pipeline(tiny_net(), load_data(f"npz:{data_file}"), backend or FakeBackend(), run, effort=EFFORT)


@pytest.fixture(scope="module")
def pipeline(data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return make_pipeline(data_file, tmp_path_factory.mktemp("run") / "run")


def test_the_uncut_float_plan_loses_nothing(pipeline: Pipeline):
    outcome = pipeline.evaluate(CompressionPlan(default_precision="float"), "F2")
    assert isinstance(outcome, Measured)
    assert outcome.loss < 1e-6
    assert outcome.ratio == pytest.approx(1.0)
    assert outcome.params == sum(p.numel() for p in tiny_net().parameters())


@pytest.mark.parametrize(("side", "batch"), [(16, 32), (64, 32), (224, 6), (2048, 1)])
def test_large_images_are_calibrated_a_few_at_a_time(side: int, batch: int) -> None:
    uncut = UncutModel(tiny_net(), load_data("pixels:2"), CLASSIFICATION, EFFORT, Progress(quiet=True))
    uncut.example = torch.empty(2, 3, side, side, device="meta")
    assert uncut.calibration_batch == batch


def test_cost_counted_from_the_plan_is_that_of_the_sliced_model(pipeline: Pipeline):
    rng = np.random.default_rng(1)
    for _ in range(5):
        plan = CompressionPlan({u.name: int(rng.choice(u.widths)) for u in pipeline.graph.units})
        kept = slicing.keep_indices(pipeline.graph, plan, pipeline.uncut.scores)
        sliced = slicing.slice_model(pipeline.model, pipeline.graph, kept)
        counted = build_graph(sliced, pipeline.uncut.example)
        cost = pipeline.cost(plan)
        assert cost.params == sum(p.numel() for p in sliced.parameters())
        assert cost.macs == counted.macs


def test_an_integer_plan_gives_a_smaller_and_on_this_device_faster_file(pipeline: Pipeline):
    whole = pipeline.evaluate(CompressionPlan(default_precision="int8"), "F2")
    half = pipeline.evaluate(slicing.uniform_plan(pipeline.graph, 0.5, "int8"), "F2")
    assert isinstance(whole, Measured)
    assert isinstance(half, Measured)
    assert (half.size_bytes or 0) < (whole.size_bytes or 0) < pipeline.files.reference.stat().st_size
    assert (half.ratio or 9) < (whole.ratio or 9) < 1


def test_recovery_lowers_the_loss_and_its_weights_are_reused_after_a_kill(pipeline: Pipeline):
    plan = slicing.uniform_plan(pipeline.graph, 0.25, "float")
    before = pipeline.evaluate(plan, "F2")
    after = pipeline.evaluate(plan, "F3")
    assert isinstance(before, Measured)
    assert isinstance(after, Measured)
    assert after.loss < before.loss
    again = pipeline.evaluate(plan, "F3")
    assert isinstance(again, Measured)
    assert again.loss == after.loss
    assert again.seconds["recover"] < after.seconds["recover"]


def test_a_killed_recovery_goes_on_after_its_last_epoch_to_the_same_weights(data_file: Path, tmp_path: Path):
    whole, killed = make_pipeline(data_file, tmp_path / "whole"), make_pipeline(data_file, tmp_path / "killed")
    plan = slicing.uniform_plan(whole.graph, 0.5, "float")
    seen: list[int] = []

    def stop(_plan: CompressionPlan, epoch: int, _model: nn.Module) -> None:
        seen.append(epoch)
        if seen == [1, 2]:
            raise KeyboardInterrupt

    killed.training.after_epoch = stop
    with pytest.raises(KeyboardInterrupt):
        killed.evaluate(plan, "F3")
    assert not killed.files.weights_of(plan).exists()
    killed.evaluate(plan, "F3")
    whole.evaluate(plan, "F3")
    assert seen == [1, 2, 3]
    assert killed.files.weights_of(plan).read_bytes() == whole.files.weights_of(plan).read_bytes()
    assert not list(killed.files.folder.glob("*.training"))


def test_layers_that_share_their_weights_are_recovered_and_kept(data_file: Path, tmp_path: Path):
    pipeline = make_pipeline(data_file, tmp_path / "run")
    layer = nn.Conv2d(3, 3, 3, padding=1)
    pipeline.model = nn.Sequential(
        layer, nn.ReLU(), layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)
    ).eval()
    plan = CompressionPlan(default_precision="float")
    assert isinstance(pipeline.evaluate(plan, "F3"), Measured)
    assert pipeline.files.weights_of(plan).exists()


def test_a_file_the_runtime_refuses_is_a_failed_outcome(data_file: Path, tmp_path: Path):
    broken = make_pipeline(data_file, tmp_path / "run", FakeBackend(faults=Faults(refuse="-F2")))
    outcome = broken.evaluate(slicing.uniform_plan(broken.graph, 0.5, "int8"), "F2")
    assert isinstance(outcome, Failed)
    assert outcome.stage == "judge"
    assert "refuse" in outcome.reason


def test_predicted_network_time_follows_the_table_and_the_fit(pipeline: Pipeline):
    network, fit = network_time.fit_network_time(pipeline, LatencyTable(pipeline.backend, None))
    plan = slicing.uniform_plan(pipeline.graph, 0.5, "auto")
    measured = pipeline.evaluate(plan, "F2")
    assert isinstance(measured, Measured)
    predicted = network.predict(dict(plan.keep), lambda _: "int8")
    assert predicted == pytest.approx((measured.ratio or 0) * pipeline.files.reference_ms, rel=0.35)
    assert network.predict({}, lambda _: "int8") > predicted
    assert fit["samples"] == 3


def test_widths_that_buy_no_time_are_not_offered(pipeline: Pipeline):
    network, _ = network_time.fit_network_time(pipeline, LatencyTable(pipeline.backend, None))
    for unit in pipeline.graph.units:
        offered = network_time.offered_widths(unit, network, 5)
        assert offered[-1] == unit.size
        assert len(offered) <= 5
        times = [
            sum(
                network.layer_ms(layer, {unit.name: width}, "int8")
                for layer in pipeline.graph.layers
                if unit.name in layer.units
            )
            for width in offered
        ]
        assert all(narrow < wide for narrow, wide in itertools.pairwise(times))


def test_times_from_arrays_are_those_of_the_layer_table(pipeline: Pipeline):
    network, _ = network_time.fit_network_time(pipeline, LatencyTable(pipeline.backend, None))
    problem = tables.build_problem(pipeline, network, options=3)
    rng = np.random.default_rng(0)
    for _ in range(10):
        choices = np.array([rng.integers(len(decision.options)) for decision in problem.decisions])
        keep = dict(problem.plan_of(choices).keep)
        assert problem.predict_ms(choices) == pytest.approx(network.predict(keep, lambda _: "int8"))


def test_with_many_options_only_those_near_a_solution_are_measured(monkeypatch: pytest.MonkeyPatch):
    toy = Toy(0)
    truth = {decision.name: decision.loss for decision in toy.problem.decisions}
    offered = dict.fromkeys(truth, WIDTHS)
    removed = {
        name: np.array([0.64, 0.36, 0.16, 0.04, 0.0]) * weight for name, weight in zip(truth, toy.weight, strict=True)
    }
    asked: list[str] = []

    def outcome(plan: CompressionPlan, fidelity: str) -> Measured:
        ((name, width),) = plan.keep.items()
        asked.append(plan.digest)
        return Measured(plan.digest, "F1", float(truth[name][WIDTHS.index(width)]), None, 1, 1)

    def problem_of(losses: Mapping[str, np.ndarray]) -> Problem:
        decisions = tuple(replace(decision, loss=losses[decision.name]) for decision in toy.problem.decisions)
        return replace(toy.problem, decisions=decisions)

    begun: list[list[CompressionPlan]] = []
    stub: Any = SimpleNamespace(progress=Progress(quiet=True), outcome=outcome, begin=begun.append)
    complete = tables.single_losses(stub, removed, offered, problem_of)
    assert len(asked) == 4 * len(truth)
    assert [len(plans) for plans in begun] == [len(asked)]  # all of them may be judged side by side
    assert all(np.array_equal(complete[name], truth[name]) for name in truth)
    asked.clear()
    monkeypatch.setattr(tables, "MEASURED_SINGLES", 0)
    monkeypatch.setattr(tables, "PROBED_BUDGETS", (0.5,))
    found = tables.single_losses(stub, removed, offered, problem_of)
    assert len(asked) == len(set(asked)) < 4 * len(truth)
    problem = problem_of(found)
    shortest_ms = smallest(problem)[1]
    answer = solve(problem, shortest_ms + 0.5 * (problem.uncut_ms - shortest_ms))
    for decision, choice in zip(problem.decisions, answer, strict=True):
        assert decision.loss[choice] == truth[decision.name][choice]


def test_losses_between_measured_widths_follow_the_fisher_sum():
    # One measured loss of 0.4 where 8 is removed: an eighth of it is removed for an eighth of the loss.
    assert tables.interpolated_losses(np.array([8.0, 4.0, 1.0, 0.0]), {0: 0.4}) == pytest.approx([0.4, 0.2, 0.05, 0.0])
    # Between 0.01 at 1 and 1.0 at 100 a straight line on logarithms: 0.1 at 10.
    assert tables.interpolated_losses(np.array([100.0, 10.0, 1.0, 0.0]), {0: 1.0, 2: 0.01}) == pytest.approx(
        [1.0, 0.1, 0.01, 0.0]
    )


def test_what_a_width_removes_is_the_least_important():
    removed = tables.removed_fisher(np.array([5.0, 1.0, 3.0, 0.5]), (1, 2, 4))
    assert removed == pytest.approx([4.5, 1.5, 0.0])


def test_few_of_many_positions_are_chosen_evenly_with_both_ends():
    assert network_time.evenly_spaced(np.array([0.0, 1.0, 2.0, 9.0, 10.0, 20.0]), 3) == [0, 4, 5]
    assert network_time.evenly_spaced(np.array([0.0, 1.0]), 3) == [0, 1]


def test_a_search_ships_a_plan_within_its_speed_limit(data_file: Path, tmp_path: Path):
    pipeline = make_pipeline(data_file, tmp_path / "run")
    limits = Limits(speedup=3.0)
    config = SearchConfig("hirelc", f1_evaluations=4, finalists=1, options=3)
    search = finalists.Search(pipeline, pipeline.run, LatencyTable(pipeline.backend, None), limits, config)
    found = search.finalists()
    assert len(found) == 1
    assert (found[0].outcome.ratio or 9) <= 1 / 3.0 * (1 + TOLERANCE)
    ours = delivery.Contender("ours", pipeline.files.file_of(found[0].plan, "F3"), found[0].plan)
    shipped = delivery.race(pipeline, ours)
    assert shipped.shipped is ours
    counted = [t for t in pipeline.run.trials if t.fidelity == "F1"]
    assert len(counted) <= 4 * len(search.searches) + sum(len(d.options) - 1 for d in search.problem.decisions)


def test_a_file_is_timed_longer_where_a_brief_timing_leaves_its_limit_open(data_file: Path, tmp_path: Path):
    pipeline = make_pipeline(data_file, tmp_path / "run")
    table = LatencyTable(pipeline.backend, None)
    search = finalists.Search(pipeline, pipeline.run, table, Limits(speedup=2.0), SearchConfig())
    plan = CompressionPlan()
    outcome = pipeline.outcome(plan, "F3")
    assert isinstance(outcome, Measured)
    clear = replace(outcome, ratio=0.9, ratio_low=0.88, ratio_high=0.92)
    assert search._decided(plan, clear) is clear
    vague = replace(clear, ratio_low=0.4)
    decided = search._decided(plan, vague)
    assert decided.ratio == pytest.approx(outcome.ratio, rel=0.05)
    assert (decided.loss, decided.size_bytes) == (outcome.loss, outcome.size_bytes)
    pipeline.files.time = None  # type: ignore[assignment]
    assert search._decided(plan, vague) == decided, "it is remembered"


def test_a_file_that_leaves_its_time_unused_is_followed_by_one_that_keeps_more(
    data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fitted(*args: Any) -> Any:  # everything looks slower than it is
        network, fit = network_time.fit_network_time(*args)
        return replace(network, fixed=1.5 * network.fixed, scale=1.5 * network.scale), fit

    monkeypatch.setattr(finalists, "fit_network_time", fitted)
    pipeline = make_pipeline(data_file, tmp_path / "run")
    config = SearchConfig("knapsack", f1_evaluations=4, finalists=1, options=6)
    table = LatencyTable(pipeline.backend, None)
    search = finalists.Search(pipeline, pipeline.run, table, Limits(speedup=4.0), config)
    chosen = search._best_plan(pipeline.files.reference_ms / 4.0)
    best = [result.best for result in search.searches if result.best is not None]
    ratios, losses = [outcome.ratio or 1.0 for _, outcome in best], [outcome.loss for _, outcome in best]
    assert ratios[0] < (1 - finalists.UNUSED) / 4.0
    assert ratios[0] < max(ratios[1:])
    met = [loss for loss, ratio in zip(losses, ratios, strict=True) if ratio <= (1 + TOLERANCE) / 4.0]
    assert chosen == best[losses.index(min(met))][0]


@pytest.mark.parametrize(("keeps", "trained"), [(True, 1), (False, 2)])
def test_where_no_finalist_keeps_the_limits_a_slower_one_follows(
    data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps: bool, trained: int
):
    monkeypatch.setattr(finalists, "ENTRY_LOSS", np.inf)
    monkeypatch.setattr(finalists, "keeps_limits", lambda *args: keeps)
    pipeline = make_pipeline(data_file, tmp_path / "run")
    config = SearchConfig("knapsack", f1_evaluations=2, finalists=1, options=3)
    search = finalists.Search(
        pipeline, pipeline.run, LatencyTable(pipeline.backend, None), Limits(max_drop=99.0), config
    )
    found = search.finalists()
    assert len(found) == trained
    assert [f.keeps_limits for f in found] == [keeps] * trained
    macs = [f.outcome.macs for f in found]
    assert macs == sorted(macs)


@pytest.mark.parametrize(("keeps", "trained"), [([False, True], 2), ([False, False], 2), ([True], 1)])
def test_at_an_asked_speed_a_finalist_that_loses_too_much_is_followed_by_one_without_other_branches(
    data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps: list[bool], trained: int
):
    pipeline = make_pipeline(data_file, tmp_path / "run")
    branches = sorted(unit.name for unit in pipeline.graph.units if unit.branch)
    depths = [frozenset(branches[:1]), frozenset[str]()]
    answers = iter(keeps)
    monkeypatch.setattr(finalists, "settled_depth", lambda *args: list(depths))
    monkeypatch.setattr(finalists, "keeps_limits", lambda *args: next(answers))
    config = SearchConfig("knapsack", f1_evaluations=2, finalists=3, options=3)
    table = LatencyTable(pipeline.backend, None)
    search = finalists.Search(pipeline, pipeline.run, table, Limits(speedup=2.0, max_drop=9.0), config)
    found = search.finalists()
    assert [finalist.keeps_limits for finalist in found] == keeps
    assert [depth.gone_from(finalist.plan) for finalist in found] == depths[:trained]


def test_an_impossible_speed_is_refused_before_anything_is_trained(data_file: Path, tmp_path: Path):
    pipeline = make_pipeline(data_file, tmp_path / "run")
    table = LatencyTable(pipeline.backend, None)
    with pytest.raises(ConstraintError, match="cannot be met"):
        finalists.Search(pipeline, pipeline.run, table, Limits(speedup=1000.0), SearchConfig())
    assert not any(trial.fidelity == "F3" for trial in pipeline.run.trials)


def test_a_slower_candidate_is_never_shipped(pipeline: Pipeline):
    slow = delivery.Contender("ours", pipeline.files.reference, CompressionPlan(default_precision="float"))
    outcome = delivery.race(pipeline, slow)
    assert outcome.shipped.name == outcome.best_unpruned
    assert outcome.timings[outcome.best_unpruned].ratio < 1
    assert delivery.race(pipeline, slow, always=True).shipped is slow


def test_without_a_candidate_the_best_unpruned_file_is_shipped(pipeline: Pipeline):
    outcome = delivery.race(pipeline, None)
    assert outcome.shipped.name == outcome.best_unpruned
    assert pipeline.files.blanket.name == f"uncut-{BLANKET}.onnx"


def test_an_unpruned_file_that_breaks_a_limit_is_not_shipped_however_fast(pipeline: Pipeline):
    outcome = delivery.race(pipeline, None, keeps=lambda file, timing: file.name == "fp32")
    assert outcome.shipped.name == "fp32"
    assert outcome.best_unpruned != "fp32"
    with pytest.raises(ConstraintError, match="no unpruned file does"):
        delivery.race(pipeline, None, keeps=lambda file, timing: False)


def test_a_limit_within_the_standard_error_of_the_drop_is_said_to_need_more_images(pipeline: Pipeline):
    plan = CompressionPlan()
    outcome = Measured(plan.digest, "F3", 0.1, 0.9, 1, 1, ratio=0.25, size_bytes=1000)
    found = finalists.Finalist(plan, outcome, 0.4, 1.2, keeps_limits=False)
    says = closest_plan(pipeline, [found], 1.0)
    assert "4.00 times faster" in says
    assert "0.40 points (standard error 1.20)" in says
    assert f"these {len(pipeline.data.selection)} selection images make smaller" in says
    assert "selection images" not in closest_plan(pipeline, [found], 0.3)
    assert closest_plan(pipeline, [], 1.0) == ""


def test_a_size_that_the_narrowest_network_exceeds_is_refused_before_anything_is_timed(data_file: Path, tmp_path: Path):
    pipeline = make_pipeline(data_file, tmp_path / "run")
    with pytest.raises(ConstraintError, match="100 bytes cannot be met"):
        finalists.Search(
            pipeline, pipeline.run, LatencyTable(pipeline.backend, None), Limits(max_bytes=100), SearchConfig()
        )
    assert not pipeline.run.trials


def test_importance_without_labels_takes_the_uncut_models_own_answers(data_file: Path, tmp_path: Path):
    labelled = make_pipeline(data_file, tmp_path / "labelled")
    images = labelled.data.train
    images._labels = labelled.model(images.batch(range(len(images)))).argmax(1).numpy()  # type: ignore[attr-defined]
    answered = make_pipeline(data_file, tmp_path / "answered")
    answered.data.train._labels = None  # type: ignore[attr-defined]
    assert labelled.uncut.scores.keys() == answered.uncut.scores.keys()
    for name, score in labelled.uncut.scores.items():
        np.testing.assert_allclose(answered.uncut.scores[name], score, rtol=1e-4)


@pytest.mark.parametrize(
    ("drop", "error", "ratio", "size", "kept"),
    [
        (0.4, 0.5, 0.2, 1000, True),
        (0.6, 0.5, 0.2, 1000, False),  # the drop could be above 1.0 by its standard error
        (0.0, 0.1, 0.26, 1000, False),  # slower than 4 times
        (0.0, 0.1, 0.2, 3000, False),
    ],
)
def test_limits_hold_only_when_every_one_is_kept(drop: float, error: float, ratio: float, size: int, kept: bool):
    limits = Limits(max_drop=1.0, speedup=4.0, max_bytes=2000)
    outcome = Measured("x", "F3", 0.1, 0.9, 1, 1, ratio=ratio, size_bytes=size)
    assert keeps_limits(limits, outcome, drop, error, reference_ms=10.0) is kept


def test_layer_records_tell_widths_before_and_after(pipeline: Pipeline):
    plan = slicing.uniform_plan(pipeline.graph, 0.5, "int8")
    records = {r["name"]: r for r in delivery.layer_records(pipeline.graph, plan, pipeline.files.precision_of(plan))}
    first = records["conv1"]
    assert (first["in_full"], first["in_kept"], first["out_full"]) == (3, 3, 16)
    assert first["out_kept"] == plan.keep[next(u.name for u in pipeline.graph.units if "residual" in u.name)]
    assert sum(r["macs"] for r in records.values()) == pytest.approx(pipeline.cost(plan).macs, rel=1e-6)


def test_the_guard_turns_layers_back_until_the_drop_holds(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch):
    """Every integer layer is made to cost a point here; one more is the standard error of nothing lost."""

    def file_drop(path: Path) -> PairedDrop:
        proto = onnx.load(str(path))
        points = float(sum(node.op_type == "QuantizeLinear" for node in proto.graph.node))
        return PairedDrop(points, points, points)

    monkeypatch.setattr(pipeline.files, "file_drop", file_drop)
    plain, nothing = guarded(pipeline, 100.0)
    assert nothing.reverted == ()
    assert plain.precision == {}
    plan, found = guarded(pipeline, 3.0)
    assert 0 < len(found.reverted) < len(pipeline.graph.layers)
    assert found.points <= 3.0 < found.points_before
    assert found.ms > 0
    layers = {step.layer for step in found.reverted}
    assert set(plan.precision) == layers
    assert plan.default_precision == "auto"
    precision_of = pipeline.files.precision_of(plan)
    assert {precision_of(layer) for layer in layers} == {"float"}
    names = [contender.name for contender in delivery.unpruned(pipeline, 3.0)]
    assert names[-1] == "int8 guarded"
    assert "int8 guarded" not in [contender.name for contender in delivery.unpruned(pipeline, 100.0)]


def test_the_guard_turns_operators_between_layers_back_where_that_does(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
):
    def file_drop(path: Path) -> PairedDrop:  # residual sums cost two points each, layers nothing
        proto = onnx.load(str(path))
        rounded = {node.input[0] for node in proto.graph.node if node.op_type == "QuantizeLinear"}
        points = 2.0 * sum(node.op_type == "Add" and node.output[0] in rounded for node in proto.graph.node)
        return PairedDrop(points, points, points)

    monkeypatch.setattr(pipeline.files, "file_drop", file_drop)
    placed = Placement(
        "all", (), 0.4, {"all": {"ratio": 0.4}, "weights": {"ratio": 0.6}, "first 2 layers": {"ratio": 0.9}}
    )
    monkeypatch.setattr(pipeline.files, "placement", placed)
    plan, found = guarded(pipeline, 1.0)
    assert (found.pattern, found.reverted, found.points) == ("weights", (), 0.0)
    assert found.points_before > 1.0
    assert (plan.pattern, dict(plan.precision)) == ("weights", {})
    assert pipeline.files.pattern_of(plan) == "weights"
    assert CompressionPlan.from_dict(plan.to_dict()) == plan
    assert plan.digest != CompressionPlan(default_precision="auto").digest


def test_a_plan_may_ask_for_linear_layers_in_four_bits(pipeline: Pipeline):
    plan = slicing.uniform_plan(pipeline.graph, 0.5, "int4")
    assert plan.precision == {"fc": "int4"}
    outcome = pipeline.outcome(plan, "F2")
    assert isinstance(outcome, Measured)
    operators = {node.op_type for node in onnx.load(str(pipeline.files.file_of(plan, "F2"))).graph.node}
    assert "MatMulNBits" in operators
    with pytest.raises(InputError, match="no Linear layer"):
        slicing.check_plan(pipeline.graph, CompressionPlan(precision={"stages.1.0.conv2": "int4"}))


def test_many_calibration_images_are_read_batch_by_batch_and_are_the_same(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
):
    kept = pipeline.uncut.calibration_batches()
    assert pipeline.uncut.calibration_batches() is kept
    monkeypatch.setattr("hirelc_deploy.evaluate.effort.KEPT_BYTES", 0)
    streamed = pipeline.uncut.calibration_batches()
    assert not isinstance(streamed, list)
    assert torch.equal(torch.cat(list(streamed)), torch.cat(list(kept)))


def test_which_branches_go_is_settled_by_trial_recoveries(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch):
    network, _ = network_time.fit_network_time(pipeline, LatencyTable(pipeline.backend, None))
    problem = tables.build_problem(pipeline, network, options=3)
    known = [CompressionPlan({"stages.0.0.conv1": 8}, default_precision="auto")]
    asked: list[float] = []

    def loss_after(plan: CompressionPlan, epochs: float) -> float:
        asked.append(epochs)
        return 0.1 + plan.keep.get("stages.0.0.conv1", 16)

    monkeypatch.setattr(pipeline.training, "loss_after", loss_after)
    budget_ms = 0.8 * problem.uncut_ms
    assert finalists.settled_depth(pipeline, problem, budget_ms, known)[0] == {"stages.0.0.conv1"}
    assert asked == pytest.approx([20 / 8] * 2)  # of 8 steps an epoch
    assert finalists.settled_depth(pipeline, depth.with_depth(problem, frozenset()), budget_ms, known) == []
    monkeypatch.setattr(pipeline, "effort", replace(EFFORT, recovery=None))
    assert finalists.settled_depth(pipeline, problem, budget_ms, known) == []


def test_the_branches_of_the_nearest_other_budget_are_known_here():
    facts = {
        "branches that go at 1 ms on a": {"budget_ms": 1.0, "gone": ["x"]},
        "branches that go at 4 ms on a": {"budget_ms": 4.0, "gone": ["x", "y"]},
        "reference ms on a": 9.0,
    }
    own = "branches that go at 1.9 ms on a"
    assert finalists.nearest_depth(facts, 1.9, own) == {"x"}
    assert finalists.nearest_depth(facts, 2.1, own) == {"x", "y"}
    assert finalists.nearest_depth(facts, 1.0, "branches that go at 1 ms on a") == {"x", "y"}
    assert finalists.nearest_depth({}, 1.0, own) is None


def test_a_trial_recovery_lowers_the_loss_and_is_remembered(pipeline: Pipeline):
    plan = CompressionPlan({"stages.0.0.conv1": 0, "stages.0.residual": 8}, default_precision="auto")
    before = pipeline.evaluate(plan, "F1")
    assert isinstance(before, Measured)
    after = pipeline.training.loss_after(plan, 3)
    assert after < before.loss
    assert pipeline.training.loss_after(plan, 3) == after
    assert pipeline.run.fact(f"loss of {plan.digest} after 3 epochs of recovery") == after


def test_a_recovery_goes_on_from_where_it_was_judged(data_file: Path, tmp_path: Path):
    plan = CompressionPlan({"stages.0.0.conv1": 0, "stages.0.residual": 8}, default_precision="auto")
    straight, judged = make_pipeline(data_file, tmp_path / "straight"), make_pipeline(data_file, tmp_path / "judged")
    before = judged.evaluate(plan, "F1")
    early, later = judged.training.loss_at(plan, 0.3), judged.training.loss_at(plan, 0.8)
    assert isinstance(before, Measured)
    assert early < before.loss
    assert later < before.loss
    assert judged.run.fact(f"loss of {plan.digest} with 0.3 of 3 epochs of recovery done") == early
    for pipeline in (straight, judged):
        pipeline.evaluate(plan, "F3")
    one, other = (load_file(str(p.files.weights_of(plan))) for p in (straight, judged))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_plan_without_a_branch_walks_the_whole_path(pipeline: Pipeline):
    plan = CompressionPlan({"stages.0.0.conv1": 0, "stages.1.residual": 16}, default_precision="auto")
    whole, found = pipeline.evaluate(CompressionPlan(default_precision="auto"), "F2"), pipeline.evaluate(plan, "F3")
    assert isinstance(whole, Measured)
    assert isinstance(found, Measured)
    assert found.params < whole.params
    assert (found.ratio or 9) < (whole.ratio or 9)
    nodes = onnx.load(str(pipeline.files.file_of(plan, "F3"))).graph.node
    assert not [node.name for node in nodes if node.name.startswith("stages.0.0.conv")]
    shipped = shipped_model(pipeline, delivery.Contender("ours", pipeline.files.file_of(plan, "F3"), plan))
    weights = load_file(str(pipeline.files.weights_of(plan)))
    assert all(torch.equal(shipped.state_dict()[key], value) for key, value in weights.items())
    assert {slicing.IDENTITY, slicing.ZERO} & {
        value for value in slicing.shapes(shipped).values() if isinstance(value, str)
    }


def test_without_depth_a_search_keeps_something_of_every_unit(pipeline: Pipeline):
    network = network_time.NetworkTime(
        pipeline.graph.without_branches(), LatencyTable(pipeline.backend, None), 0.0, 1.0
    )
    for unit in network.graph.units:
        assert min(network_time.offered_widths(unit, network, 5)) > 0
    deep = replace(network, graph=pipeline.graph)
    assert [0 in network_time.offered_widths(unit, deep, 5) for unit in pipeline.graph.units].count(True) == 1


TRAINED = CompressionPlan(default_precision="auto", trained_rounding=True)


def counted_drop(path: Path) -> PairedDrop:
    """Lose a point for every rounded tensor, half a point in a file that was trained."""
    proto = onnx.load(str(path))
    points = 0.5 if "-F3" in path.name else float(sum(node.op_type == "QuantizeLinear" for node in proto.graph.node))
    return PairedDrop(points, points, points)


def test_the_guard_takes_the_trained_file_where_that_keeps_the_drop_in_less_time(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pipeline.files, "file_drop", counted_drop)
    plan, found = guarded(pipeline, 2.0)
    assert (plan, found.trained, found.reverted, found.points) == (TRAINED, True, (), 0.5)
    assert found.others
    assert all(not other.trained and found.ms <= other.ms for other in found.others)
    assert CompressionPlan.from_dict(plan.to_dict()) == plan
    contender = delivery.unpruned(pipeline, 2.0)[-1]
    assert (contender.name, contender.path) == ("int8 guarded", guarded_file(pipeline, plan))
    weights = load_file(str(pipeline.files.weights_of(plan)))
    shipped = shipped_model(pipeline, contender).state_dict()
    assert all(torch.equal(shipped[key], value) for key, value in weights.items())
    assert sorted(weights) == sorted(pipeline.model.state_dict())
    name = "stages.1.0.conv1.weight"
    steps, before = (
        w / w.abs().amax((1, 2, 3), keepdim=True) * 127 for w in (weights[name], tiny_net().state_dict()[name])
    )
    assert torch.allclose(steps, steps.round(), atol=1e-3)
    assert not torch.equal(steps.round(), before.round())


def test_without_recovery_or_training_images_the_guard_only_turns_layers_back(
    data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    still = make_pipeline(data_file, tmp_path / "still")
    still.effort = replace(EFFORT, recovery=None)
    bare = make_pipeline(data_file, tmp_path / "bare")
    images = bare.data.train
    assert isinstance(images, ArrayImages)
    none = ArrayImages(images._pixels, images._all_labels, np.empty(0, np.int64), images._preprocess)
    bare.data = replace(bare.data, train=none)
    for pipeline in (still, bare):
        monkeypatch.setattr(pipeline.files, "file_drop", counted_drop)
        plan, found = guarded(pipeline, 2.0)
        assert not found.trained
        assert not plan.trained_rounding
        assert not any(other.trained for other in found.others)
        assert not pipeline.run.trials


def test_a_killed_training_of_rounded_weights_goes_on_to_the_same_ones(data_file: Path, tmp_path: Path):
    whole, killed = make_pipeline(data_file, tmp_path / "whole"), make_pipeline(data_file, tmp_path / "killed")
    placed = Placement("all-softmax-add", ("conv1",), 0.4, {})
    for pipeline in (whole, killed):
        pipeline.files.__dict__["placement"] = placed

    def stop(_plan: CompressionPlan, epoch: int, _model: nn.Module) -> None:
        raise KeyboardInterrupt

    killed.training.after_epoch = stop
    with pytest.raises(KeyboardInterrupt):
        killed.evaluate(TRAINED, "F3")
    killed.training.after_epoch = whole.training.after_epoch
    killed.evaluate(TRAINED, "F3")
    whole.evaluate(TRAINED, "F3")
    assert killed.files.weights_of(TRAINED).read_bytes() == whole.files.weights_of(TRAINED).read_bytes()


def test_the_file_of_trained_weights_for_many_images_answers_as_that_for_one(pipeline: Pipeline, tmp_path: Path):
    pipeline.outcome(TRAINED, "F3")
    model = pipeline.cut(TRAINED)
    model.load_state_dict(load_file(str(pipeline.files.weights_of(TRAINED))))
    pipeline.files.write_batched(model, TRAINED, tmp_path / "batched.onnx")
    images = pipeline.data.selection.batch(np.arange(len(pipeline.data.selection))).numpy()
    one, many = (
        only(pipeline.backend.build(path, 1).infer(images))
        for path in (pipeline.files.file_of(TRAINED, "F3"), tmp_path / "batched.onnx")
    )
    assert np.abs(one - many).max() < 0.05 * np.abs(one).max()
