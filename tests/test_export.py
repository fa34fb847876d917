"""In: small torch models. Out: proof that their ONNX files compute the same, name their layers, and fail in words."""

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from hirelc_deploy.compress.onnx_file import export
from hirelc_deploy.demo.model import DemoNet
from hirelc_deploy.errors import ExportError, InputError
from hirelc_deploy.graph.answers import named
from hirelc_deploy.inputs import models  # noqa: F401  (makes timm importable beside a CPU torch)


def small_cnn():
    torch.manual_seed(0)
    model = DemoNet(widths=(8, 16), blocks_per_stage=1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def small_vit():
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(img_size=16, patch_size=8, num_classes=5, embed_dim=32, depth=2, num_heads=2).eval()


def images(count, size=16, seed=1):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def run(path, batch):
    session = export.open_session(path)
    return session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0]


def operators(path):
    return Counter(node.op_type for node in onnx.load(str(path)).graph.node)


@pytest.mark.parametrize("build", [small_cnn, small_vit])
def test_the_file_computes_what_torch_computes_at_any_batch(build, tmp_path):
    model = build()
    export.export_onnx(model, images(2), tmp_path / "m.onnx")
    for count in (1, 5):
        with torch.no_grad():
            wanted = model(images(count)).numpy()
        np.testing.assert_allclose(run(tmp_path / "m.onnx", images(count)), wanted, atol=1e-5)


@pytest.mark.parametrize("build", [small_cnn, small_vit])
@pytest.mark.parametrize("static", [False, True])
def test_every_weight_layer_of_torch_is_the_layer_of_one_node(build, static, tmp_path):
    model = build()
    path = tmp_path / "m.onnx"
    export.export_onnx(model, images(2), path)
    if static:
        export.set_static_batch(path, path)
    layers = export.layer_of_node(onnx.load(str(path)))
    expected = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert sorted(layers.values()) == sorted(expected)


def test_a_node_carries_the_weight_of_the_layer_it_is_named_after(tmp_path):
    model = small_vit()
    export.export_onnx(model, images(2), tmp_path / "m.onnx")
    proto = onnx.load(str(tmp_path / "m.onnx"))
    weights = {i.name: onnx.numpy_helper.to_array(i) for i in proto.graph.initializer}
    layers = export.layer_of_node(proto)
    for node in proto.graph.node:
        if node.name in layers:
            theirs = model.get_submodule(layers[node.name]).weight.detach().numpy()
            ours = weights[node.input[1]]
            np.testing.assert_array_equal(ours.T if node.op_type == "MatMul" else ours, theirs)


class Grandchildren(nn.Module):
    """Calls layers of modules that are not called themselves, one of them named as another layer is, and two that
    share a weight."""

    def __init__(self):
        super().__init__()
        self.body = nn.Module()
        self.body.first = nn.Conv2d(3, 4, 3, padding=1)
        self.body.blocks = nn.ModuleList(nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3, padding=1)}) for _ in range(2))
        self.body.tokens = nn.Linear(4, 4)
        self.first, self.tied = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.tied.weight = self.first.weight

    def forward(self, x):
        x = self.body.first(x)
        for block in self.body.blocks:
            x = block["conv"](x)
        x = self.tied(self.first(x))
        return self.body.tokens(x.flatten(2).transpose(1, 2)).mean(1)


def test_layers_of_modules_that_are_not_called_keep_their_names(tmp_path):
    torch.manual_seed(0)
    export.export_onnx(Grandchildren().eval(), images(2), tmp_path / "m.onnx")
    layers = export.layer_of_node(onnx.load(str(tmp_path / "m.onnx"))).values()
    body = ["body.blocks.0.conv", "body.blocks.1.conv", "body.first", "body.tokens"]
    assert sorted(layers) == [*body, "first", "tied"]


class Padded(nn.Module):
    """A convolution behind a padding of its own."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.conv, self.other = kind, nn.Conv2d(3, 4, 3, 2, padding=(1, 0)), nn.Conv2d(3, 4, 1, 2)

    def forward(self, x):
        if self.kind == "unlike":
            return self.conv(nn.functional.pad(x, (0, 1, 2, 0)))
        if self.kind == "read twice":
            x = nn.functional.pad(x, (0, 1, 0, 1))
            return self.conv(x).mean() + self.other(x)
        if self.kind == "cropped":
            return self.conv(nn.functional.pad(x, (-1, 1, 0, 0)))
        if self.kind == "of ones":
            return self.conv(nn.functional.pad(x, (0, 1, 0, 1), value=1.0))
        return self.conv(nn.functional.pad(x, (0, 1, 0, 1), mode="reflect"))


@pytest.mark.parametrize(
    ("kind", "left"), [("unlike", 0), ("read twice", 1), ("cropped", 1), ("of ones", 1), ("mirrored", 1)]
)
def test_a_convolution_pads_for_itself_where_zeros_are_put_around_what_it_alone_reads(kind, left, tmp_path):
    torch.manual_seed(0)
    model = Padded(kind).eval()
    export.export_onnx(model, images(2), tmp_path / "m.onnx")
    assert operators(tmp_path / "m.onnx")["Pad"] == left
    with torch.no_grad():
        np.testing.assert_allclose(run(tmp_path / "m.onnx", images(3)), model(images(3)).numpy(), atol=1e-5)
    if kind == "unlike":
        (conv,) = onnx.load(str(tmp_path / "m.onnx")).graph.node
        assert next(list(a.ints) for a in conv.attribute if a.name == "pads") == [3, 0, 1, 1]


def test_batch_norm_is_folded_and_means_are_pools(tmp_path):
    export.export_onnx(small_cnn(), images(2), tmp_path / "m.onnx")
    found = operators(tmp_path / "m.onnx")
    assert found["BatchNormalization"] == found["ReduceMean"] == found["Identity"] == 0
    assert found["GlobalAveragePool"] == 1


def test_a_static_file_has_no_shape_arithmetic_and_adds_biases_in_gemm(tmp_path):
    model = small_vit()
    export.export_onnx(model, images(2), tmp_path / "m.onnx")
    export.set_static_batch(tmp_path / "m.onnx", tmp_path / "s.onnx")
    found = operators(tmp_path / "s.onnx")
    assert found["Shape"] == 0
    assert found["Gemm"] == sum(isinstance(module, nn.Linear) for module in model.modules())
    session = export.open_session(tmp_path / "s.onnx")
    assert session.get_inputs()[0].shape == [1, 3, 16, 16]
    np.testing.assert_allclose(run(tmp_path / "s.onnx", images(1)), run(tmp_path / "m.onnx", images(1)), atol=1e-5)


def test_a_file_can_be_written_for_one_batch_size(tmp_path):
    model = small_cnn()
    export.export_onnx(model, images(3), tmp_path / "m.onnx", dynamic_batch=False)
    session = export.open_session(tmp_path / "m.onnx")
    assert session.get_inputs()[0].shape == [3, 3, 16, 16]
    assert session.get_outputs()[0].shape == [3, 10]


def test_export_leaves_the_model_in_training_mode_if_it_was(tmp_path):
    model = small_cnn().train()
    export.export_onnx(model, images(2), tmp_path / "m.onnx")
    assert model.training
    assert model.bn1.training


def refuse(*_):
    raise ExportError("not this one")


def test_the_slow_exporter_takes_over_and_names_layers_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_torchscript", refuse)
    model = small_cnn()
    export.export_onnx(model, images(2), tmp_path / "m.onnx")
    layers = export.layer_of_node(onnx.load(str(tmp_path / "m.onnx")))
    expected = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert sorted(layers.values()) == sorted(expected)


class DependsOnBatch(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) * (2 if len(x) == 1 else 1)


def test_a_model_that_a_trace_does_not_describe_is_refused_with_both_reasons(tmp_path):
    with pytest.raises(ExportError, match=r"differs from torch by .*; the second exporter: "):
        export.export_onnx(DependsOnBatch(), images(2), tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


class KernelsOfImages(nn.Module):
    """A kernel for each image, images and channels in one dimension, as in conditional convolutions."""

    def __init__(self):
        super().__init__()
        self.kernels, self.choice, self.out = nn.Parameter(torch.randn(3, 8 * 3 * 9)), nn.Linear(3, 3), nn.Linear(8, 4)

    def forward(self, x):
        count, channels, height, width = x.shape
        kernels = (self.choice(x.mean((2, 3))).softmax(1) @ self.kernels).reshape(count * 8, channels, 3, 3)
        y = nn.functional.conv2d(x.reshape(1, count * channels, height, width), kernels, groups=count)
        return self.out(y.reshape(count, 8, *y.shape[2:]).mean((2, 3)))


def test_a_model_that_can_be_written_for_one_number_of_images_alone_is_refused_in_a_sentence(tmp_path, monkeypatch):
    def unwritten(*_):
        raise ExportError(export.UNWRITTEN)

    monkeypatch.setattr(export, "_torch_export", unwritten)
    with pytest.raises(ExportError, match=r"for one number of images, but not for any: .*torch.bmm") as caught:
        export.export_onnx(KernelsOfImages(), images(2), tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)


def test_a_file_that_fails_when_it_runs_is_a_failed_export(capfd):
    """So that the second exporter takes over: a shape that a trace of two images wrote down."""
    value = onnx.helper.make_tensor_value_info
    reshape = onnx.helper.make_node("Reshape", ["input", "shape"], ["output"])
    shape = onnx.numpy_helper.from_array(np.array([2, 12], np.int64), "shape")
    ends = [value("input", 1, ("batch", 3, 2, 2))], [value("output", 1, ("batch", 12))]
    graph = onnx.helper.make_graph([reshape], "g", *ends, [shape])
    file = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    one = torch.zeros(1, 3, 2, 2), {"output": np.zeros((1, 12), np.float32)}
    with pytest.raises(ExportError, match="on 1 images ONNX Runtime fails"):
        export.check_parity(file.SerializeToString(), [one])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("operator", "good"), [("Sigmoid", True), ("Exp", False)])
def test_tiny_probabilities_are_compared_as_of_half_a_percent(operator, good):
    """What a network answers where it sees nothing: ONNX Runtime's sigmoid is off by 1e-7, however small it is."""
    value = onnx.helper.make_tensor_value_info
    ends = [value("input", 1, ("batch", 3, 2, 2))], [value("output", 1, ("batch", 3, 2, 2))]
    graph = onnx.helper.make_graph([onnx.helper.make_node(operator, ["input"], ["output"])], "g", *ends)
    file = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    nothing = torch.full((1, 3, 2, 2), -12.0)
    probe = nothing, {"output": nothing.exp().numpy() + np.float32(1e-8)}
    if good:
        export.check_parity(file.SerializeToString(), [probe])
    else:
        with pytest.raises(ExportError, match="differs from torch by"):
            export.check_parity(file.SerializeToString(), [probe])


class Bessel(nn.Module):
    """A function that ONNX does not have."""

    def forward(self, x):
        return torch.special.i0(x).mean((2, 3))


def test_a_failing_export_says_why_and_writes_nothing_to_the_terminal(tmp_path, capfd):
    with pytest.raises(ExportError, match="aten::i0"):
        export.export_onnx(Bessel(), images(2), tmp_path / "m.onnx")
    assert capfd.readouterr().out == ""


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    model = small_cnn()
    with torch.no_grad():
        model.stages[1][0].conv1.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ExportError, match=r"stages\.1\.0\.conv1\.weight: holds NaN"):
        export.export_onnx(model, images(2), tmp_path / "m.onnx")


def test_a_broken_norm_is_told_before_it_reaches_a_file(tmp_path):
    model = small_cnn()
    model.bn1.running_var.fill_(-1.0)
    with pytest.raises(ExportError, match="NaN or infinity"):
        export.export_onnx(model, images(2), tmp_path / "m.onnx")


def test_half_precision_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(ExportError, match=r"call model\.float\(\)"):
        export.export_onnx(small_cnn().half(), images(2).half(), tmp_path / "m.onnx")


@pytest.mark.parametrize("exporter", ["first", "second"])
@pytest.mark.parametrize("kind", ["tuple", "dict", "hooked"])
def test_several_outputs_are_written_by_name_and_the_model_is_left_as_it_was(tmp_path, kind, exporter, monkeypatch):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            features = self.body(x)
            found = {"maps": features, "means": features.mean((2, 3))}
            return tuple(found.values()) if kind == "tuple" else found

    model = Two().eval()
    if kind == "hooked":
        model.register_forward_hook(lambda _module, _images, answer: {"only_means": answer["means"]})
    if exporter == "second":
        monkeypatch.setattr(export, "_torchscript", refuse)
    before = named(model(images(2)))
    export.export_onnx(model, images(2), tmp_path / "m.onnx")
    names = {"tuple": ["output_0", "output_1"], "dict": ["maps", "means"], "hooked": ["only_means"]}[kind]
    session = export.open_session(tmp_path / "m.onnx")
    assert [output.name for output in session.get_outputs()] == names == list(before)
    assert "body/Conv" in {node.name for node in onnx.load(tmp_path / "m.onnx").graph.node}
    assert "forward" not in vars(model)
    assert len(model._forward_hooks) == (kind == "hooked")


def test_a_file_that_is_no_model_is_refused_in_the_runtimes_words(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    with pytest.raises(ExportError, match="ONNX Runtime refuses"):
        export.open_session(tmp_path / "m.onnx")


def test_the_batch_of_an_integer_file_is_not_changed_afterwards(tmp_path):
    q = onnx.helper.make_node("QuantizeLinear", ["x", "s"], ["y"])
    graph = onnx.helper.make_graph([q], "g", [], [])
    onnx.save(onnx.helper.make_model(graph), str(tmp_path / "q.onnx"))
    with pytest.raises(InputError, match="already quantized"):
        export.set_static_batch(tmp_path / "q.onnx", tmp_path / "s.onnx")
