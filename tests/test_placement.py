"""In: made-up times of files. Out: proof that the fastest placement is found, and that wholes are timed, not sums."""

from types import SimpleNamespace

import onnx
import pytest
import torch

from hirelc_deploy.compress.integer.ends import End
from hirelc_deploy.compress.integer.forms import FORMS, SIXTEEN_BITS, with_whole_floats
from hirelc_deploy.compress.integer.placement import Placement, changes, only_in_ends, place
from hirelc_deploy.compress.integer.quantize import PATTERNS, SIGMOID_GELU
from hirelc_deploy.demo.model import DemoNet
from hirelc_deploy.errors import ExportError
from hirelc_deploy.evaluate.undecided import undecided
from hirelc_deploy.graph.model_graph import Layer, LayerShape
from hirelc_deploy.inputs import models  # noqa: F401  (makes timm importable beside a CPU torch)
from hirelc_deploy.measure.backend import BFLOAT_FORM, FLOAT_AS, HALF_FORM, Precision
from tests.test_quantize import write

END = "end of boxes"
CHANGES = {"a": frozenset("a"), "b": frozenset("bB"), "c": frozenset("c")}


class Clockwork:
    """Writes files that say what they are, and tells their times from a rule."""

    def __init__(self, folder, milliseconds):
        self.folder, self.milliseconds, self.timed = folder, milliseconds, []
        (folder / "float").write_text("float")

    def build(self, pattern, floats):
        path = self.folder / f"{pattern}-{''.join(sorted(floats))}"
        path.write_text(path.name)
        return path

    def time(self, files):
        def ms(path):
            pattern, _, floats = path.name.rpartition("-") if path.name != "float" else ("float", "", "")
            return self.milliseconds(pattern, floats)

        self.timed += files
        ratios = [ms(path) / ms(files[0]) for path in files]
        return [SimpleNamespace(ratio=r, ratio_low=r * 0.999, ratio_high=r * 1.001) for r in ratios]

    def place(self, patterns=tuple(PATTERNS)):
        return place(self.folder / "float", CHANGES, self.build, self.time, patterns)


def test_the_fastest_pattern_wins_where_no_change_helps(tmp_path):
    times = {"float": 10.0, "weights": 4.0}
    found = Clockwork(tmp_path, lambda pattern, floats: times.get(pattern, 5.0) + len(floats)).place()
    assert (found.pattern, found.float_layers) == ("weights", ())
    assert found.ratio == pytest.approx(0.4)
    assert found.candidates["all"]["ratio"] == pytest.approx(0.5)


def test_the_float_file_is_timed_once_where_there_is_one_way_to_go(tmp_path):
    clock = Clockwork(tmp_path, lambda pattern, floats: {"float": 10.0}.get(pattern, 5.0) - ("c" in floats))
    found = clock.place(("all",))
    assert (found.float_layers, found.ratio) == (("c",), pytest.approx(0.4))
    assert [path.name for path in clock.timed].count("float") == 1


@pytest.mark.parametrize("form", [BFLOAT_FORM, HALF_FORM])
@pytest.mark.parametrize(("gain", "pays"), [(0.8, True), (1.1, False), (0.998, False)])
def test_coarser_floats_are_tried_on_the_fastest_pattern_and_stay_where_they_pay(tmp_path, form, gain, pays):
    half = FORMS[form].half
    ends = (SIGMOID_GELU, half) if pays else ()

    def milliseconds(pattern, floats):
        base = {"float": 10.0, "weights": 4.0}.get(with_whole_floats(pattern).removesuffix(SIGMOID_GELU), 5.0)
        return base * gain ** sum(end in pattern for end in (SIGMOID_GELU, half)) + len(floats)

    clock = Clockwork(tmp_path, milliseconds)
    found = clock.place(FORMS[form].patterns)
    assert found.pattern == "".join(("weights", *ends))
    assert found.ratio == pytest.approx(0.4 * gain ** len(ends))
    in_half = {path.name for path in clock.timed if path.name.endswith(tuple(f"{end}-" for end in SIXTEEN_BITS))}
    assert in_half == {f"weights{''.join(ends[:1])}{half}-"}


@pytest.mark.parametrize(("form", "says"), [(BFLOAT_FORM, "bf16"), (HALF_FORM, "f16")])
def test_a_file_that_wants_16_bits_in_its_floats_says_which(tmp_path, form, says):
    _, static = write(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), tmp_path)
    form, precision = FORMS[form], Precision("int8", "uint8", "int8", 8)
    form.write_integer(static, None, lambda layer: "float", precision, form.half_pattern, tmp_path / "half.onnx")
    asked = onnx.load(str(tmp_path / "half.onnx"))
    assert {one.key: one.value for one in asked.metadata_props} == {FLOAT_AS: says}
    assert asked.graph == onnx.load(str(static)).graph


def test_what_the_device_refuses_is_passed_over_and_the_rest_is_placed(tmp_path):
    clock = Clockwork(tmp_path, lambda pattern, floats: {"float": 10.0, "weights": 4.0}.get(pattern, 5.0) - len(floats))
    refused, taken = {"all-", f"weights{FORMS[HALF_FORM].half}-", "weights-c"}, clock.time

    def time(files):
        if any(path.name in refused for path in files):
            raise ExportError("the device refuses it")
        return taken(files)

    found = place(tmp_path / "float", CHANGES, clock.build, time, ("all", "weights", "weights+f16"))
    assert (found.pattern, set(found.float_layers)) == ("weights", {"a", "b", "B"})
    assert found.candidates.keys() == {"weights", "a", "b"}
    with pytest.raises(ExportError, match="refuses the integer files of every pattern"):
        place(tmp_path / "float", CHANGES, clock.build, time, ("all",))


def test_layers_that_are_slow_as_integers_stay_float_together(tmp_path):
    gain = {"a": 1.0, "b": 0.5, "B": 0.5, "c": -1.0}
    clock = Clockwork(
        tmp_path, lambda pattern, floats: 10.0 if pattern == "float" else 6 - sum(gain[f] for f in floats)
    )
    found = clock.place()
    assert found.float_layers == ("B", "a", "b")
    assert found.ratio == pytest.approx(0.4)


def test_changes_that_only_help_alone_are_not_added_up(tmp_path):
    times = {"": 6.0, "a": 5.0, "Bb": 5.5, "Bab": 7.0, "c": 6.5}
    found = Clockwork(tmp_path, lambda pattern, floats: 10.0 if pattern == "float" else times[floats]).place()
    assert found.float_layers == ("a",)


def test_where_every_integer_file_is_slower_single_layers_become_integer_in_the_float_one(tmp_path):
    def milliseconds(pattern, floats):
        return 10.0 if pattern == "float" else 10 + 3 * ("a" not in floats) - ("c" not in floats)

    found = Clockwork(tmp_path, milliseconds).place()
    assert found.float_layers == ("B", "a", "b")
    assert found.ratio == pytest.approx(0.9)


def test_changes_that_are_decided_are_not_timed_as_whole_files(tmp_path):
    clock = Clockwork(tmp_path, lambda pattern, floats: {"float": 10.0}.get(pattern, 5.0) - ("c" in floats))
    found = place(
        tmp_path / "float",
        CHANGES,
        clock.build,
        clock.time,
        divergence=lambda path: 1.0,
        undecided=lambda tried: {name: tried[name] for name in tried if name != "b"},
    )
    assert found.float_layers == ("c",)
    assert {"a", "c"} < found.candidates.keys()
    assert "b" not in found.candidates
    assert not any("B" in path.name.rpartition("-")[2] for path in clock.timed)


def test_what_is_surely_no_faster_in_a_rough_look_is_not_timed_exactly(tmp_path):
    # Of the first eight one is faster and one as fast; all of the next are slower, so that the last is not looked at.
    names = [chr(ord("a") + index) for index in range(17)]
    cost = {name: 0.0 if index == 1 else -0.5 if index == 0 else 0.1 * index for index, name in enumerate(names)}
    clock = Clockwork(
        tmp_path, lambda pattern, floats: 10.0 if pattern == "float" else 5 + sum(cost[f] for f in floats)
    )
    looked = []

    def screen(files):
        looked.extend(path.name.rpartition("-")[2] for path in files[1:])
        return clock.time(files)

    exactly = []

    def time(files):
        exactly.extend(path.name.rpartition("-")[2] for path in files[1:])
        return clock.time(files)

    tried = {name: frozenset(name) for name in names}
    found = place(tmp_path / "float", tried, clock.build, time, ("all",), screen=screen)
    assert found.float_layers == ("a",)
    assert looked == names[:16]
    assert [name for name in exactly if name] == ["a", "a"]
    assert found.candidates.keys() == {"all", *names[:16]}


def test_what_a_rough_look_calls_as_fast_may_be_chosen_for_its_answers_and_is_timed_then(tmp_path):
    clock = Clockwork(tmp_path, lambda pattern, floats: 10.0 if pattern == "float" else 5.0 + ("b" in floats))
    exactly = []

    def time(files):
        exactly.extend(path.name.rpartition("-")[2] for path in files[1:])
        return clock.time(files)

    divergences = {"": 1.0, "a": 0.2, "b": 0.1, "c": 0.5}
    divergence = lambda path: divergences[path.name.rpartition("-")[2]]  # noqa: E731
    tried = {name: frozenset(name) for name in "abc"}
    found = place(tmp_path / "float", tried, clock.build, time, ("all",), divergence, screen=clock.time)
    assert found.float_layers == ("a",)
    assert [name for name in exactly if name] == ["a", "c"]


def test_where_every_integer_file_is_slower_every_layer_is_tried_in_the_float_one(tmp_path):
    clock = Clockwork(tmp_path, lambda pattern, floats: 10.0 if pattern == "float" else 12.0 - 3.0 * ("b" in floats))
    found = place(tmp_path / "float", CHANGES, clock.build, clock.time, undecided=lambda tried: {})
    assert {f"{name} in a float file" for name in CHANGES} < found.candidates.keys()


class Times:
    """A table in which a layer of so many input features takes so many microseconds in float; none of 7 can be had."""

    def __init__(self, integer_share):
        self.integer_share = integer_share

    def layer_ms(self, shape, in_features, out_features, precision):
        if in_features == 7:
            raise ExportError("the device refuses it")
        share = self.integer_share.get(in_features, 0.25)
        return in_features / 1000 * (1.0 if precision == "float" else share)


def layer(name, in_features, kind="conv"):
    shape = LayerShape(kind, 64)
    return Layer(name, shape, "block", in_features, 8, (), (), 1, 1)


def test_what_is_much_slower_in_float_is_decided_unless_it_costs_next_to_nothing():
    layers = [layer("large", 900), layer("near", 400), layer("tiny", 3), layer("scores", 500, "attention")]
    layers.append(layer("refused", 7))
    table = Times({400: 0.6})
    tried = {name: frozenset({name}) for name in ("large", "near", "tiny", "scores", "refused", "unknown")}
    tried["large and near"] = frozenset({"large", "near"})
    assert undecided(tried, layers, table).keys() == {"near", "tiny", "scores", "refused", "unknown"}
    assert undecided({"large and near": tried["large and near"]}, layers, Times({400: 0.9, 900: 0.9})) != {}


def test_small_changes_of_one_kind_are_tried_together_if_float_is_faster_in_all_of_them_or_in_none():
    layers = [layer("large", 900), *(layer(f"small {size}", size) for size in (1, 2, 3, 4)), layer("gate", 2, "linear")]
    tried = {one.name: frozenset({one.name}) for one in layers}
    found = undecided(tried, layers, Times({3: 1.5, 4: 1.5, 900: 0.9}))
    assert found == {
        "small 3 and 1 small of its kind": frozenset({"small 3", "small 4"}),
        "small 1 and 1 small of its kind": frozenset({"small 1", "small 2"}),
        "gate": frozenset({"gate"}),
        "large": frozenset({"large"}),
    }
    assert next(iter(found)) == "small 3 and 1 small of its kind"


def test_a_placement_comes_back_from_its_json():
    placement = Placement("weights", ("a", "b"), 0.5, {"all": {"ratio": 0.6}})
    assert Placement.from_dict(placement.to_dict()) == placement


def test_equal_layers_are_tried_together(tmp_path):
    torch.manual_seed(0)
    files = write(DemoNet(widths=(16, 32), blocks_per_stage=2), tmp_path)
    found = changes(onnx.load(str(files[1])))
    at_the_image = changes(onnx.load(str(files[1])), wholly_integer=True)
    assert at_the_image == {name: layers for name, layers in found.items() if name.startswith("first")}
    assert found["first 2 layers"] < found["first 4 layers"]
    (twins,) = (layers for layers in found.values() if "stages.1.1.conv1" in layers)
    assert twins == {"stages.1.0.conv2", "stages.1.1.conv1", "stages.1.1.conv2"}
    every = frozenset().union(*(layers for name, layers in found.items() if not name.startswith("first")))
    assert len(every) == sum(len(layers) for name, layers in found.items() if not name.startswith("first"))


def test_what_only_decodes_the_answers_is_told_from_the_rest():
    nodes = [("Conv", "a"), ("Sigmoid", "b"), ("Conv", "c"), ("Exp", "d"), ("Sigmoid", "e"), ("Mul", "f")]
    made = [onnx.helper.make_node(kind, ["x"], [name], name) for kind, name in nodes]
    proto = onnx.helper.make_model(onnx.helper.make_graph(made, "net", [], []))
    assert only_in_ends(proto, [End(("f",), frozenset("def"), ("Exp",))]) == {"Exp", "Mul"}
    assert only_in_ends(proto, []) == set()


def test_every_exact_pattern_is_timed(tmp_path):
    clock = Clockwork(tmp_path, lambda pattern, floats: 1.0)
    clock.place()
    exact = {name for name in PATTERNS if not name.endswith(SIGMOID_GELU)}
    assert {path.name.rpartition("-")[0] for path in clock.timed if path.name.endswith("-")} == exact


def test_the_faster_gelu_is_tried_in_the_fastest_pattern_and_taken_where_it_pays(tmp_path):
    times = {"float": 10.0, "weights": 4.0, "weights+sigmoid-gelu": 3.8, "all-softmax-add+sigmoid-gelu": 1.0}
    found = Clockwork(tmp_path, lambda pattern, floats: times.get(pattern, 5.0) + len(floats)).place()
    assert found.pattern == "weights+sigmoid-gelu"
    assert found.candidates[found.pattern]["ratio"] == pytest.approx(0.38)
    times["weights+sigmoid-gelu"] = 3.99
    assert (
        Clockwork(tmp_path, lambda pattern, floats: times.get(pattern, 5.0) + len(floats)).place().pattern == "weights"
    )


def test_among_files_as_fast_as_the_fastest_the_nearest_to_float_is_taken(tmp_path):
    # "all-softmax-add" answers best but is 2 % slower; "all" and a float layer of "weights" are within the hundredth.
    times = {"float": 10.0, "weights": 4.0, "all": 4.01, "all-softmax-add": 4.08}
    far = {"weights-": 0.02, "all-": 0.015, "all-softmax-add-": 0.001, "weights-a": 0.01, "weights-c": 0.0199}

    def ms(pattern, floats):
        return times.get(pattern, 5.0) + 0.02 * len(floats)

    clock = Clockwork(tmp_path, ms)
    found = place(
        tmp_path / "float", CHANGES, clock.build, clock.time, divergence=lambda path: far.get(path.name, 0.03)
    )
    assert (found.pattern, found.float_layers) == ("weights", ("a",))
    assert found.ratio == pytest.approx(0.402)
    far["weights-a"] = 0.0195
    again = place(
        tmp_path / "float", CHANGES, clock.build, clock.time, divergence=lambda path: far.get(path.name, 0.03)
    )
    assert (again.pattern, again.float_layers) == ("all", ())
    assert clock.place().pattern == "weights"


@pytest.mark.parametrize(
    ("faster", "nearer", "integer"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_an_end_becomes_integer_only_where_that_is_faster_and_answers_no_worse(tmp_path, faster, nearer, integer):
    end = End(("boxes",), frozenset({"concat", "add"}), ("Concat joins", "Exp turns"), frozenset({"expected"}))
    clock = Clockwork(
        tmp_path,
        lambda pattern, floats: 10.0 if pattern == "float" else 4.0 - 0.1 * (faster and END not in floats),
    )
    distance = lambda path: 0.01 + 0.02 * (not nearer and END not in path.name)  # noqa: E731
    tried = {**CHANGES, "expected": frozenset({"expected"})}
    found = place(tmp_path / "float", tried, clock.build, clock.time, divergence=distance, ends=[end])
    assert found.float_layers == (() if integer else (END, "expected"))
    assert found.ratio == pytest.approx(0.39 if integer else 0.4)
    assert "expected" not in found.candidates
    told = found.ends[END]
    assert (told["why"], told["operators"]) == ("Concat joins; Exp turns", 2)
    assert told["divergence"] == (0.01 if nearer else 0.03)
    assert ("ratio" in told) == nearer
    assert place(tmp_path / "float", tried, clock.build, clock.time, ends=[end]).float_layers == (END, "expected")
