"""In: networks with linear bottlenecks. Out: proof that equalised channels compute the same, and are of like range."""

import numpy as np
import onnx
import pytest
import timm
import torch
from torch import nn

from hirelc_deploy.compress.integer.equalisation import equalise, streams, write_equalised
from hirelc_deploy.compress.onnx_file import export
from hirelc_deploy.inputs import models  # noqa: F401  (makes timm importable beside a CPU torch)


def images(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 3, 32, 32)).astype(np.float32)


def exported(model, folder):
    batched, static = folder / "batched.onnx", folder / "static.onnx"
    export.export_onnx(model.eval(), torch.from_numpy(images(2)), batched)
    export.set_static_batch(batched, static)
    return batched, static


class Bottlenecks(nn.Module):
    """Two linear bottlenecks with a sum, whose channels are of very unlike range, and a head behind a ReLU."""

    def __init__(self):
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 6, 1)
        self.wide, self.depthwise, self.narrow = (
            nn.Conv2d(6, 16, 1),
            nn.Conv2d(16, 16, 3, 1, 1, groups=16),
            nn.Conv2d(16, 6, 1),
        )
        self.last, self.fc = nn.Conv2d(6, 12, 1), nn.Linear(12, 4)
        with torch.no_grad():
            spread = torch.tensor([100.0, 10, 1, 1, 0.1, 0.01])
            for layer in (self.first, self.narrow):
                layer.weight.mul_(spread[:, None, None, None])
                layer.bias.mul_(spread)

    def forward(self, x):
        x = self.first(self.stem(x).relu())
        x = x + self.narrow(self.depthwise(self.wide(x).relu()).relu())
        return self.fc(self.last(x).relu().mean((2, 3)))


class ReluBetween(nn.Module):
    """What a residual network has: a ReLU behind the sum."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.a(x).relu()
        return self.c((x + self.b(x)).relu()).mean((2, 3))


@pytest.fixture(scope="module")
def bottlenecks(tmp_path_factory):
    torch.manual_seed(0)
    return exported(Bottlenecks(), tmp_path_factory.mktemp("bottlenecks"))


def test_a_stream_holds_the_sum_with_its_writers_and_readers(bottlenecks):
    proto = onnx.load(str(bottlenecks[0]))
    [stream] = streams(proto)
    layers = export.layer_of_node(proto)
    assert {layers[node.name] for node in stream.writers} == {"first", "narrow"}
    assert {layers[node.name] for node in stream.readers} == {"wide", "last"}
    assert len(stream.tensors) == 3


def test_nothing_is_scaled_across_an_activation(tmp_path):
    batched, static = exported(ReluBetween(), tmp_path)
    assert streams(onnx.load(str(batched))) == []
    assert write_equalised(batched, static, [images(4)]) == (batched, static)


def test_equalised_files_compute_the_same_and_their_channels_are_alike(bottlenecks):
    before = [path.read_bytes() for path in bottlenecks]
    equal = write_equalised(*bottlenecks, [images(16)])
    assert [path.read_bytes() for path in bottlenecks] == before
    for path, batch in zip(equal, (images(5, 1), images(1, 1)), strict=True):
        found = export.open_session(path).run(None, {"input": batch})[0]
        wanted = export.open_session(bottlenecks[0]).run(None, {"input": batch})[0]
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    spreads = []
    for path in (bottlenecks[0], equal[0]):
        proto = onnx.load(str(path))
        total = streams(proto)[0].tensors
        proto.graph.output.extend(onnx.helper.make_tensor_value_info(t, onnx.TensorProto.FLOAT, None) for t in total)
        values = export.open_session(proto).run(list(total), {"input": images(16)})
        largest = np.max([np.abs(value).max((0, 2, 3)) for value in values], axis=0)
        spreads.append(largest.max() / largest.min())
    assert spreads[1] < spreads[0] / 20


def test_mobilenetv2_has_seven_streams_and_stays_what_it_is(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv2_050", num_classes=5)
    batched, static = exported(model, tmp_path)
    proto = onnx.load(str(batched))
    assert len(streams(proto)) == 7
    written, read = equalise(proto, [images(8)])
    assert set(written).isdisjoint(read)
    found = export.open_session(write_equalised(batched, static, [images(8)])[1]).run(None, {"input": images(1, 3)})[0]
    wanted = export.open_session(static).run(None, {"input": images(1, 3)})[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5 * np.abs(wanted).max())
