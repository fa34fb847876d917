"""In: small models cut at random. Out: proof that files filled in are those of an export, and when it is not tried."""

import numpy as np
import onnx
import pytest
import torch
from test_export import images, small_cnn, small_vit
from torch import nn

from hirelc_deploy.compress import slicing
from hirelc_deploy.compress.onnx_file import export, refill
from hirelc_deploy.compress.onnx_file.folding import fold, tensors_of
from hirelc_deploy.errors import ExportError
from hirelc_deploy.graph.units import build_graph


def random_cuts(model, example, count, seed=0):
    """Yield `count` models: the first cut in half everywhere, the others at random, with other weights each."""
    rng, graph = np.random.default_rng(seed), build_graph(model, example)
    for number in range(count):
        kept = {}
        for unit in graph.units:
            width = unit.widths[len(unit.widths) // 2 - 1] if number == 0 else int(rng.choice(unit.widths))
            kept[unit.name] = np.sort(rng.permutation(unit.size)[:width])
        cut = slicing.slice_model(model, graph, kept)
        with torch.no_grad():
            for parameter in cut.parameters():
                parameter.mul_(1 + 0.01 * number)
        yield cut


def answers(file, batch):
    session = export.open_session(file)
    return session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0]


@pytest.mark.parametrize(("build", "cuts", "least"), [(small_cnn, 8, 6), (small_vit, 5, 2)])
def test_files_filled_in_are_those_of_an_export(build, cuts, least, tmp_path):
    model, example = build(), images(2)
    exporter = refill.Exporter(example)
    batched, static = tmp_path / "batched.onnx", tmp_path / "static.onnx"
    exporter.write(model, batched, static)
    for cut in random_cuts(model, example, cuts):
        before = exporter.filled
        exporter.write(cut, batched, static)
        if exporter.filled == before:
            continue
        slow = export.exported(cut, example)
        slow_static = export.static_batch(slow.proto)
        ours, theirs = (
            refill._take_apart(slow.recipe, files, tensors_of(cut))
            for files in ((onnx.load(str(batched)), onnx.load(str(static))), (slow.proto, slow_static))
        )
        assert ours.signature == theirs.signature
        np.testing.assert_array_equal(ours.integers, theirs.integers)
        np.testing.assert_array_equal(answers(batched, images(3)), answers(slow.proto, images(3)))
        np.testing.assert_array_equal(answers(static, images(1)), answers(slow_static, images(1)))
    assert exporter.filled >= least
    assert exporter.filled + sum(exporter.exported.values()) == cuts + 1


def test_a_number_that_follows_one_width_is_told_from_two_exports():
    integers = np.array([[64, 3, 192], [32, 3, 96]])  # 192 = 3 * 64
    widths = np.array([[64, 10], [32, 10]])
    np.testing.assert_array_equal(refill.predicted(integers, widths, np.array([16, 10])), [16, 3, 48])
    offset = np.array([[64 + 8], [32 + 8]])  # behind a concatenation with eight channels that stay
    np.testing.assert_array_equal(refill.predicted(offset, widths, np.array([48, 10])), [56])


@pytest.mark.parametrize(
    ("integers", "widths", "asked", "reason"),
    [
        ([[8], [4]], [[8, 16], [4, 8]], [4, 16], "several widths"),  # cut together so far, now not
        ([[8], [8]], [[8, 16], [4, 16]], [8, 12], "no earlier export"),
        ([[8], [3]], [[8, 16], [8, 16]], [8, 16], "no single width"),
        ([[8], [7]], [[8], [6]], [5], "several widths"),  # would be 6.5
    ],
)
def test_what_exports_leave_open_is_not_guessed(integers, widths, asked, reason):
    with pytest.raises(refill._NotCertain, match=reason):
        refill.predicted(np.array(integers), np.array(widths), np.array(asked))


def test_a_third_export_settles_what_two_left_open():
    integers, widths = np.array([[8], [4], [8]]), np.array([[8, 16], [4, 8], [8, 8]])
    assert refill.predicted(integers, widths, np.array([4, 16])) == [4]


def test_a_filled_file_that_differs_from_torch_is_exported_instead(tmp_path, monkeypatch):
    model, example = small_cnn(), images(2)
    exporter = refill.Exporter(example)
    files = tmp_path / "batched.onnx", tmp_path / "static.onnx"
    exporter.write(model, *files)
    fill = refill.Template.fill

    def wrong(self, asked):
        protos = fill(self, asked)
        bias = next(i for i in protos[1].graph.initializer if i.name == "fc.bias")
        bias.CopyFrom(onnx.numpy_helper.from_array(np.full(10, 9.0, np.float32), "fc.bias"))
        return protos

    monkeypatch.setattr(refill.Template, "fill", wrong)
    exporter.write(model, *files)
    assert exporter.filled == 0
    assert any(reason.startswith("filled in, it fails: on 1 images") for reason in exporter.exported)
    with torch.no_grad():
        np.testing.assert_allclose(answers(files[1], images(1)), model(images(1)), atol=1e-5)


class Scaled(nn.Module):
    """ONNX Runtime multiplies the factor into the weight of the convolution: it is in the file under no name."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.factor = nn.Parameter(torch.full((1, 4, 1, 1), 2.0))

    def forward(self, x):
        return (self.conv(x) * self.factor).mean((2, 3))


def test_a_weight_that_the_runtime_has_changed_is_never_filled_in(tmp_path):
    model, exporter = Scaled().eval(), refill.Exporter(images(2))
    files = tmp_path / "batched.onnx", tmp_path / "static.onnx"
    exporter.write(model, *files)
    with torch.no_grad():
        model.factor.fill_(3.0)
    exporter.write(model, *files)
    assert exporter.filled == 0
    with torch.no_grad():
        np.testing.assert_allclose(answers(files[0], images(2)), model(images(2)), atol=1e-5)


def test_a_model_whose_exporter_does_not_tell_where_weights_come_from_is_always_exported(tmp_path, monkeypatch):
    first = export._torchscript
    monkeypatch.setattr(export, "_torchscript", lambda *given: export.Export(first(*given).proto, None))
    exporter = refill.Exporter(images(2))
    for _ in range(2):
        exporter.write(small_cnn(), tmp_path / "batched.onnx", tmp_path / "static.onnx")
    assert exporter.filled == 0
    assert exporter.exported["the exporter does not tell where weights come from"] == 1


def test_weights_that_are_not_finite_are_refused_when_filling_in_too(tmp_path):
    model, exporter = small_cnn(), refill.Exporter(images(2))
    files = tmp_path / "batched.onnx", tmp_path / "static.onnx"
    exporter.write(model, *files)
    with torch.no_grad():
        model.fc.weight[0, 0] = float("nan")
    with pytest.raises(ExportError, match=r"fc\.weight: holds NaN"):
        exporter.write(model, *files)


def test_a_norm_is_folded_into_the_convolution_that_only_it_reads():
    value = onnx.helper.make_tensor_value_info
    nodes = [
        onnx.helper.make_node("Conv", ["x", "conv.weight", "conv.bias"], ["a"], "conv/Conv"),
        onnx.helper.make_node("BatchNormalization", ["a", "g", "b", "m", "v"], ["y"], "bn/BN", epsilon=1.0),
    ]
    arrays = {
        "conv.weight": np.full((1, 1, 1, 1), 5.0, np.float32),
        "conv.bias": np.array([4.0], np.float32),
        **{name: np.array([number], np.float32) for name, number in zip("gbmv", (6.0, 7.0, 1.0, 3.0), strict=True)},
    }
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    ends = [value("x", 1, [1, 1, 1, 1])], [value("y", 1, [1, 1, 1, 1])]
    for also_read in (False, True):
        proto = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", *ends, initializers))
        if also_read:
            proto.graph.output.append(value("a", 1, [1, 1, 1, 1]))
        recipe = fold(proto, arrays, export.WEIGHT_OPERATORS)
        found = {i.name: onnx.numpy_helper.to_array(i).ravel().tolist() for i in proto.graph.initializer}
        if also_read:
            assert [node.op_type for node in proto.graph.node] == ["Conv", "BatchNormalization"]
        else:
            # scale = 6 / sqrt(3 + 1) = 3; weight 5 * 3; bias (4 - 1) * 3 + 7
            assert found == {"conv.weight": [15.0], "conv.bias": [16.0]}
            arrays2 = {**arrays, "g": np.array([2.0], np.float32)}
            assert recipe.constants(arrays2, recipe.settings)["conv.bias"] == [10.0]
