"""Files that are broken, or made to do harm: one sentence each, nothing opened outside, no memory to speak of."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx_nets import FLOAT, IMAGE, external, graph_of, model_of, node, saved, small_net, values
from typer.testing import CliRunner

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.models.onnx_files import runtime
from hirelc_deploy.inputs.models.onnx_files.load import build

MEGABYTES = 500
"""What reading a small file may take beside what is loaded already."""

Case = Callable[[Path], Path]
CASES: dict[str, tuple[Case, str]] = {}
HUGE = 2**40


def case(words: str) -> Callable[[Case], Case]:
    """Register a file and what its sentence must say."""

    def register(make: Case) -> Case:
        CASES[make.__name__.strip("_")] = (make, words)
        return make

    return register


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def changed(folder: Path, change: Callable[[ModelProto], Any]) -> Path:
    model = small_net()
    change(model)
    return saved(model, folder / "net.onnx")


def made(folder: Path, *nodes: Any, tensors: dict[str, np.ndarray] | None = None, **options: Any) -> Path:
    return saved(model_of(nodes, tensors or {}, **options), folder / "net.onnx")


@case("no such")
def _missing(folder: Path) -> Path:
    return folder / "net.onnx"


@case("0 bytes")
def _empty(folder: Path) -> Path:
    return saved(b"", folder / "net.onnx")


@case("no such")
def _a_folder(folder: Path) -> Path:
    (folder / "net.onnx").mkdir()
    return folder / "net.onnx"


@case("not a whole ONNX file")
def _truncated(folder: Path) -> Path:
    return saved(small_net().SerializeToString()[:-200], folder / "net.onnx")


@case("not a whole ONNX file")
def _text(folder: Path) -> Path:
    return saved(b"not a network, but a line of text\n" * 40, folder / "net.onnx")


@case("not a whole ONNX file")
def _noise(folder: Path) -> Path:
    return saved(np.random.default_rng(0).bytes(4000), folder / "net.onnx")


@case("not a whole ONNX file")
def _a_zip(folder: Path) -> Path:
    return saved(b"PK\x03\x04" + bytes(2000), folder / "net.onnx")


@case("no graph")
def _no_graph(folder: Path) -> Path:
    return saved(ModelProto(ir_version=8), folder / "net.onnx")


@case("no nodes")
def _no_nodes(folder: Path) -> Path:
    return changed(folder, lambda model: model.graph.ClearField("node"))


@case("no outputs")
def _no_outputs(folder: Path) -> Path:
    return changed(folder, lambda model: model.graph.ClearField("output"))


@case("it has 0")
def _no_input(folder: Path) -> Path:
    def change(model: ModelProto) -> None:
        model.graph.ClearField("input")
        model.graph.initializer.append(numpy_helper.from_array(values(1, 3, 16, 16), "x"))

    return changed(folder, change)


@case("it has 2")
def _two_inputs(folder: Path) -> Path:
    return changed(folder, lambda model: model.graph.input.append(helper.make_tensor_value_info("z", FLOAT, [1])))


@case("INT64 with 2 dimensions")
def _words(folder: Path) -> Path:
    return made(folder, node("Gather", ["t", "x"]), tensors={"t": values(9, 4)}, image=("n", 7), kind=TensorProto.INT64)


@case("opset 8")
def _old_opset(folder: Path) -> Path:
    return saved(small_net(opset=8), folder / "net.onnx")


@case("opset 999")
def _future_opset(folder: Path) -> Path:
    return saved(small_net(opset=999), folder / "net.onnx")


@case("not a valid ONNX graph")
def _missing_tensor(folder: Path) -> Path:
    return changed(folder, lambda model: model.graph.initializer.pop())


@case("there twice")
def _tensor_twice(folder: Path) -> Path:
    return changed(folder, lambda model: model.graph.initializer.append(model.graph.initializer[0]))


@case("not a valid ONNX graph")
def _value_twice(folder: Path) -> Path:
    return made(folder, node("Relu", ["x"]), node("Sigmoid", ["x"]))


@case("not a valid ONNX graph")
def _cycle(folder: Path) -> Path:
    return made(folder, node("Add", ["x", "b"], ["a"]), node("Relu", ["a"], ["b"]), node("Relu", ["b"]))


@case("not a valid ONNX graph")
def _unsorted(folder: Path) -> Path:
    return made(folder, node("Relu", ["a"]), node("Sigmoid", ["x"], ["a"]))


@case("not a valid ONNX graph")
def _unknown_operator(folder: Path) -> Path:
    return made(folder, node("Frobnicate", ["x"]))


@case("com.microsoft.FusedConv")
def _custom_operator(folder: Path) -> Path:
    model = model_of([node("FusedConv", ["x"], domain="com.microsoft")])
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return saved(model, folder / "net.onnx")


@case("is not a registered function/op")
def _operator_of_nobody(folder: Path) -> Path:
    model = model_of([node("Frobnicate", ["x"], domain="own")])
    model.opset_import.append(helper.make_opsetid("own", 1))
    return saved(model, folder / "net.onnx")


@case("quantized already (QLinearConv)")
def _quantized(folder: Path) -> Path:
    return made(folder, node("QLinearConv", ["x"] * 8))


@case("quantized already (DequantizeLinear)")
def _quantized_weights(folder: Path) -> Path:
    return made(folder, node("DequantizeLinear", ["w", "s"], ["v"]), node("Conv", ["x", "v"]))


@case("needs 1728")
def _short_tensor(folder: Path) -> Path:
    def change(model: ModelProto) -> None:
        model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-8]

    return changed(folder, change)


@case("needs")
def _huge_shape(folder: Path) -> Path:
    return changed(folder, lambda model: model.graph.initializer[0].dims.__setitem__(0, HUGE))


@case("needs")
def _overflowing_shape(folder: Path) -> Path:
    return changed(folder, lambda model: model.graph.initializer[0].dims.extend([2**62, 2**62]))


@case("has the shape")
def _negative_shape(folder: Path) -> Path:
    return changed(folder, lambda model: model.graph.initializer[0].dims.__setitem__(0, -16))


@case("type STRING")
def _texts_as_weights(folder: Path) -> Path:
    return changed(folder, lambda model: setattr(model.graph.initializer[0], "data_type", TensorProto.STRING))


@case("needs")
def _other_type(folder: Path) -> Path:
    return changed(folder, lambda model: setattr(model.graph.initializer[0], "data_type", TensorProto.INT64))


@case("type 77")
def _no_type(folder: Path) -> Path:
    return changed(folder, lambda model: setattr(model.graph.initializer[0], "data_type", 77))


@case("outside of the file's folder")
def _external_absolute(folder: Path) -> Path:
    return saved(external(small_net(), str(outside(folder))), folder / "net.onnx")


@case("outside of the file's folder")
def _external_above(folder: Path) -> Path:
    outside(folder)
    return saved(external(small_net(), "../outside/secret.bin"), folder / "net.onnx")


@case("outside of the file's folder")
def _external_above_in_the_middle(folder: Path) -> Path:
    outside(folder)
    (folder / "sub").mkdir()
    return saved(external(small_net(), "sub/../../outside/secret.bin"), folder / "net.onnx")


@case("outside of the file's folder")
def _external_of_windows(folder: Path) -> Path:
    return saved(external(small_net(), "C:\\secret.bin"), folder / "net.onnx")


@case("outside of the file's folder")
def _external_link(folder: Path) -> Path:
    (folder / "w.bin").symlink_to(outside(folder))
    return saved(external(small_net(), "w.bin"), folder / "net.onnx")


@case("outside of the file's folder")
def _external_in_linked_folder(folder: Path) -> Path:
    (folder / "sub").symlink_to(outside(folder).parent)
    return saved(external(small_net(), "sub/secret.bin"), folder / "net.onnx")


@case("not beside the file")
def _external_missing(folder: Path) -> Path:
    return saved(external(small_net(), "w.bin"), folder / "net.onnx")


@case("not beside the file")
def _external_folder(folder: Path) -> Path:
    (folder / "w.bin").mkdir()
    return saved(external(small_net(), "w.bin"), folder / "net.onnx")


@case("which has 100")
def _external_short(folder: Path) -> Path:
    (folder / "w.bin").write_bytes(bytes(100))
    return saved(external(small_net(), "w.bin"), folder / "net.onnx")


@case("which has 9000")
def _external_negative_offset(folder: Path) -> Path:
    (folder / "w.bin").write_bytes(bytes(9000))
    return saved(external(small_net(), "w.bin", offset=-8), folder / "net.onnx")


@case("larger than any in a network of pictures")
def _constant_bomb(folder: Path) -> Path:
    tensors = {"s": ints(HUGE, 8)}
    return made(folder, node("ConstantOfShape", ["s"], ["c"]), node("Add", ["x", "c"]), tensors=tensors)


@case("larger than any in a network of pictures")
def _expand_bomb(folder: Path) -> Path:
    return made(folder, node("Expand", ["x", "s"]), tensors={"s": ints(HUGE, 1, 3, 16, 16)})


@case("larger than any in a network of pictures")
def _tile_bomb(folder: Path) -> Path:
    return made(folder, node("Tile", ["x", "t"]), tensors={"t": ints(1, 2**20, 2**10, 1)})


@case("larger than any in a network of pictures")
def _range_bomb(folder: Path) -> Path:
    tensors = {"a": np.array(0, np.int64), "b": np.array(HUGE, np.int64), "c": np.array(1, np.int64)}
    return made(folder, node("Range", ["a", "b", "c"], ["r"]), node("Add", ["x", "r"]), tensors=tensors)


@case("larger than any in a network of pictures")
def _resize_bomb(folder: Path) -> Path:
    tensors = {"e": values(0), "s": np.array([1, 1, 9e5, 9e5], np.float32)}
    return made(folder, node("Resize", ["x", "e", "s"], mode="nearest"), tensors=tensors)


@case("larger than any in a network of pictures")
def _pad_bomb(folder: Path) -> Path:
    return made(folder, node("Pad", ["x", "p"]), tensors={"p": ints(0, 0, 0, 0, 0, 0, HUGE, 0)})


@case("larger than any in a network of pictures")
def _convolution_bomb(folder: Path) -> Path:
    return made(folder, node("Conv", ["x", "w"], pads=[2**20] * 4), tensors={"w": values(4, 3, 3, 3)})


@case("larger than any in a network of pictures")
def _pooling_bomb(folder: Path) -> Path:
    return made(folder, node("MaxPool", ["x"], kernel_shape=[3, 3], pads=[2**20] * 4))


@case("larger than any in a network of pictures")
def _broadcast_bomb(folder: Path) -> Path:
    tensors = {"a": values(1, 40000, 1), "b": values(1, 1, 40000)}
    return made(folder, node("Mul", ["a", "b"], ["c"]), node("Add", ["x", "c"]), tensors=tensors)


@case("larger than any picture")
def _huge_image(folder: Path) -> Path:
    return saved(small_net(image=("n", 3, 2**20, 2**20)), folder / "net.onnx")


@case("larger than any picture")
def _huge_batch(folder: Path) -> Path:
    return saved(small_net(image=(2**40, 3, 16, 16)), folder / "net.onnx")


@case("calls itself")
def _recursive_function(folder: Path) -> Path:
    return with_functions(folder, {"f": ["g"], "g": ["f"]})


@case("calls itself")
def _function_of_itself(folder: Path) -> Path:
    return with_functions(folder, {"f": ["f"]})


@case("more than 100000 nodes")
def _billion_functions(folder: Path) -> Path:
    return with_functions(folder, {"f": ["f1"] * 10, **{f"f{i}": [f"f{i + 1}"] * 10 for i in range(1, 12)}, "f12": []})


@case("operator Loop (node y) cannot be read: there is no module for it, and as it is ONNX Runtime did not answer")
def _loop(folder: Path) -> Path:
    body = graph_of([node("Identity", ["go"], ["on"]), node("Relu", ["v"], ["w"])], ["on", "w"])
    body.output[0].type.tensor_type.elem_type = TensorProto.BOOL
    for name, kind, shape in (("i", TensorProto.INT64, []), ("go", TensorProto.BOOL, []), ("v", FLOAT, None)):
        body.input.append(helper.make_tensor_value_info(name, kind, shape))
    tensors = {"m": np.array(2**62, np.int64), "c": np.array(True)}
    return made(folder, node("Loop", ["m", "c", "x"], body=body), tensors=tensors)


@case("operator RandomNormalLike")
def _chance(folder: Path) -> Path:
    return made(folder, node("RandomNormalLike", ["x"]))


@case("operator NonMaxSuppression")
def _suppression(folder: Path) -> Path:
    nodes = (
        node("Reshape", ["x", "s"], ["b"]),
        node("NonMaxSuppression", ["b", "b"], ["k"]),
        node("Cast", ["k"], to=1),
    )
    return made(folder, *nodes, tensors={"s": ints(0, -1, 4)})


@case("does not depend on the images")
def _constant_answer(folder: Path) -> Path:
    return made(folder, node("Relu", ["x"], ["z"]), node("Relu", ["w"]), tensors={"w": values(1, 5)})


@case("whole numbers")
def _whole_numbers(folder: Path) -> Path:
    return made(folder, node("ArgMax", ["x"], axis=1))


@case("NaN or infinity")
def _not_finite(folder: Path) -> Path:
    return made(folder, node("Log", ["x"]))


@case("operator Conv")
def _wrong_channels(folder: Path) -> Path:
    return made(folder, node("Conv", ["x", "w"]), tensors={"w": values(4, 5, 3, 3)})


@case("operator Reshape")
def _impossible_shape(folder: Path) -> Path:
    return made(folder, node("Reshape", ["x", "s"]), tensors={"s": ints(7, 11)})


@case("operator Transpose")
def _impossible_order(folder: Path) -> Path:
    return made(folder, node("Transpose", ["x"], perm=[0, 0, 0, 0]))


@case("operator Gather")
def _out_of_bounds(folder: Path) -> Path:
    return made(folder, node("Gather", ["x", "i"], axis=1), tensors={"i": ints(3)})


@case("sparse")
def _sparse(folder: Path) -> Path:
    sparse = helper.make_sparse_tensor(
        helper.make_tensor("w", FLOAT, [1], [1.0]), helper.make_tensor("i", TensorProto.INT64, [1], [3]), [8]
    )
    return changed(folder, lambda model: model.graph.sparse_initializer.append(sparse))


def outside(folder: Path) -> Path:
    """Return a file beside the folder, with as many bytes as the first tensor needs."""
    place = folder.parent / "outside"
    place.mkdir(exist_ok=True)
    (place / "secret.bin").write_bytes(bytes(1728))
    return place / "secret.bin"


def with_functions(folder: Path, calls: dict[str, list[str]]) -> Path:
    model = model_of([helper.make_node("f", ["x"], ["y"], domain="own")])
    model.opset_import.append(helper.make_opsetid("own", 1))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    for name, called in calls.items():
        names = ["a", *(f"v{number}" for number in range(len(called)))]
        nodes = [
            helper.make_node(other, [given], [result], domain="own")
            for other, given, result in zip(called, names, names[1:], strict=False)
        ]
        nodes.append(helper.make_node("Relu", [names[-1]], ["b"]))
        model.functions.append(helper.make_function("own", name, ["a"], ["b"], nodes, opsets))
    return saved(model, folder / "net.onnx")


OPENED: list[str] = []
WATCHING = [False]


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if WATCHING[0] and event == "open" and isinstance(arguments[0], str | bytes | Path):
        OPENED.append(str(arguments[0]))


sys.addaudithook(_note)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "given"
    place.mkdir()
    return place


@pytest.fixture(autouse=True)
def _little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop without end is waited for at the first try, in a process of its own."""
    monkeypatch.setattr(runtime, "SECONDS", 4)


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_is_one_sentence(folder: Path, name: str) -> None:
    make, words = CASES[name]
    path = make(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    there = sorted(folder.parent.rglob("*"))
    OPENED.clear()
    WATCHING[0] = True
    try:
        with pytest.raises(InputError) as refusal:
            build(path)
    finally:
        WATCHING[0] = False
    text = str(refusal.value)
    assert words in text
    assert "\n" not in text
    assert "net.onnx" in text
    assert not [one for one in OPENED if "outside" in one]
    assert sorted(folder.parent.rglob("*")) == there
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEGABYTES * 1024


def test_there_are_forty_and_more() -> None:
    assert len(CASES) >= 40


@pytest.mark.parametrize("name", ["truncated", "external_above", "expand_bomb", "loop", "quantized"])
def test_the_command_ends_with_exit_code_two(folder: Path, name: str) -> None:
    from hirelc_deploy.cli import main  # noqa: F401  registers the commands
    from hirelc_deploy.cli.application import app

    path = CASES[name][0](folder)
    result = CliRunner().invoke(app, ["inspect", "--model", str(path)])
    assert isinstance(result.exception, InputError | SystemExit)
    assert getattr(result.exception, "exit_code", 2) == 2


def test_weights_beside_the_file_are_read(folder: Path) -> None:
    model = small_net()
    (folder / "w.bin").write_bytes(bytes(64) + model.graph.initializer[0].raw_data)
    path = saved(external(model, "w.bin", offset=64), folder / "net.onnx")
    assert build(path).state_dict()["stem.weight"].shape == (16, *IMAGE[1:2], 3, 3)
    onnx.load(str(path))
