"""In: models as people hand them over. Out: proof that what is worked with is the same function, ordinary, and said."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm
from torch.nn.utils import weight_norm as hooked_weight_norm

from hirelc_deploy import api
from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.units import build_graph
from hirelc_deploy.inputs.models import source as sources
from hirelc_deploy.inputs.models.given import source_of
from hirelc_deploy.inputs.models.ordinary import notes_of
from hirelc_deploy.inputs.models.source import ModelSource


def net(*first: nn.Module, width: int = 8) -> nn.Sequential:
    """A net of (2, 3, 16, 16) images, behind layers of width channels."""
    return nn.Sequential(*first, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


def plain_net() -> nn.Sequential:
    torch.manual_seed(0)
    return net(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))


def images(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


# Weights that the forward pass computes


class ScaledLinear(nn.Module):
    """No nn.Linear, but what one does with a scaled weight."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(outputs, inputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 0.3, self.bias)


class Standardised(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Merged(nn.Module):
    """Branches that only hold parameters: each pass merges them into one kernel, as a RepVGG does."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(inputs, outputs, 3, bias=False), nn.BatchNorm2d(outputs))
        self.narrow = nn.Conv2d(inputs, outputs, 1)
        nn.init.uniform_(self.wide[1].running_var, 0.5, 1.5)
        nn.init.uniform_(self.wide[1].running_mean)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.wide[1].weight / (self.wide[1].running_var + self.wide[1].eps).sqrt()
        weight = self.wide[0].weight * scale[:, None, None, None] + F.pad(self.narrow.weight, [1] * 4)
        return F.conv2d(x, weight, self.wide[1].bias - self.wide[1].running_mean * scale + self.narrow.bias)


class LowRank(nn.Module):
    """A linear layer with an adapter (LoRA) that is merged in each pass."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base.weight + self.up @ self.down, self.base.bias)


class RunsParts(LowRank):
    """Runs what it holds: a layer of two products."""

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.t() @ self.up.t()  # type: ignore[no-any-return]


class Conditional(nn.Conv2d):
    """Weights that depend on the input cannot be stored."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight * input.mean(), self.bias, self.stride, self.padding)


def masked(kind: Callable[..., nn.Module], name: str, *more: object) -> nn.Module:
    layer = nn.Conv2d(3, 8, 3)
    kind(layer, name, *more)
    return layer


COMPUTED: dict[str, Callable[[], nn.Module]] = {
    "mask": lambda: net(masked(prune.l1_unstructured, "weight", 0.5)),
    "masks of channels, twice": lambda: net(
        prune.l1_unstructured(masked(prune.ln_structured, "weight", 2, 1, 0), "weight", 3)
    ),
    "mask of a bias": lambda: net(masked(prune.random_unstructured, "bias", 0.5)),
    "weight norm as a hook": lambda: net(hooked_weight_norm(nn.Conv2d(3, 8, 3))),
    "spectral norm as a hook": lambda: net(spectral_norm(nn.Conv2d(3, 8, 3))),
    "weight norm, parametrized": lambda: net(parametrizations.weight_norm(nn.Conv2d(3, 8, 3))),
    "spectral norm, parametrized": lambda: net(parametrizations.spectral_norm(nn.Conv2d(3, 8, 3))),
    "orthogonal, of a linear layer": lambda: net(nn.Conv2d(3, 8, 3))[:-1].append(
        parametrizations.orthogonal(nn.Linear(8, 4))
    ),
    "standardised": lambda: net(Standardised(3, 8, 3, 2, 1)),
    "merged of parts": lambda: net(Merged(3, 8)),
    "low rank, merged": lambda: net(nn.Conv2d(3, 8, 3))[:-1].append(LowRank(8, 4)),
    "scaled, of a class of one's own": lambda: net(nn.Conv2d(3, 8, 3))[:-1].append(ScaledLinear(8, 4)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", COMPUTED)
def test_weights_that_are_computed_in_each_pass_are_stored_and_compute_the_same(kind: str) -> None:
    torch.manual_seed(0)
    model = COMPUTED[kind]().eval()
    with torch.no_grad():
        wanted = model(images())
    before = dict(model.state_dict())
    found = source_of(model).build()
    with torch.no_grad():
        torch.testing.assert_close(found(images()), wanted, rtol=1e-5, atol=1e-6)
    assert {name.rpartition(".")[2] for name in found.state_dict()} <= {"weight", "bias"}
    assert [type(layer) for layer in found.modules() if list(layer.parameters(recurse=False))] == [nn.Conv2d, nn.Linear]
    assert not any(layer._forward_pre_hooks for layer in found.modules())
    assert "stored now, with the same values" in notes_of(found)[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the caller's own stays"


@pytest.mark.parametrize("kind", ["StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"])
def test_standardised_convolutions_of_timm_are_stored_those_that_pad_by_themselves_too(kind: str) -> None:
    torch.manual_seed(0)
    convolution = getattr(timm.layers, kind)
    model = net(convolution(3, 8, 3, stride=2), nn.BatchNorm2d(8), convolution(8, 8, 3)).eval()
    found = source_of(model).build()
    assert {type(layer).__name__ for layer in (found[0], found[2])} <= {"Conv2d", "Conv2dSame"}
    with torch.no_grad():
        torch.testing.assert_close(found(images()), model(images()), rtol=1e-5, atol=1e-6)


def test_a_layer_that_is_there_twice_is_stored_once_and_stays_shared() -> None:
    torch.manual_seed(0)
    shared = ScaledLinear(8, 8)
    model = net(nn.Conv2d(3, 8, 3))[:-1].extend([shared, nn.ReLU(), shared]).eval()
    found = source_of(model).build()
    assert type(found[-1]) is nn.Linear
    assert found[-1] is found[-3]
    with torch.no_grad():
        torch.testing.assert_close(found(images()), model(images()), rtol=1e-5, atol=1e-6)


def test_a_layer_whose_weights_depend_on_its_input_stays_as_it_is() -> None:
    found = source_of(net(Conditional(3, 8, 3))).build()
    assert type(found[0]) is Conditional
    assert notes_of(found) == ()


def test_a_layer_that_runs_the_layers_in_it_stays_as_it_is() -> None:
    found = source_of(net(nn.Conv2d(3, 8, 3))[:-1].append(RunsParts(8, 4))).build()
    assert type(found[-1]) is RunsParts
    assert notes_of(found) == ()
    assert not found[-1].base._forward_pre_hooks


def test_an_ordinary_model_is_not_touched_and_nothing_is_said() -> None:
    model = plain_net()
    found = source_of(model).build()
    assert found.state_dict().keys() == model.state_dict().keys()
    assert notes_of(found) == ()


# Wrappers, modes and settings


def with_part_compiled() -> nn.Module:
    model = plain_net()
    model[0] = torch.compile(model[0])
    return model


def with_forward_compiled() -> nn.Module:
    model = plain_net()
    model.forward = torch.compile(model.forward)  # type: ignore[method-assign]
    return model


def compiled_in_place() -> nn.Module:
    model = plain_net()
    model.compile()
    return model


@torch.inference_mode()
def in_inference_mode() -> nn.Module:
    return plain_net()


WRAPPED: dict[str, Callable[[], nn.Module]] = {
    "compiled": lambda: torch.compile(plain_net()),  # type: ignore[dict-item,return-value]
    "compiled in place": compiled_in_place,
    "compiled part": with_part_compiled,
    "compiled forward": with_forward_compiled,
    "parallel": lambda: nn.DataParallel(plain_net()),
    "parallel part": lambda: nn.Sequential(nn.DataParallel(plain_net()[:2]), *plain_net()[2:]),
    "averaged by timm": lambda: timm.utils.ModelEmaV2(plain_net()),
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(plain_net()),
    "inference mode": in_inference_mode,
    "rewritten by fx": lambda: torch.fx.symbolic_trace(plain_net()),
    "half": lambda: plain_net().half(),
    "bfloat16": lambda: plain_net().bfloat16(),
    "double": lambda: plain_net().double(),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_what_is_around_a_model_is_taken_off(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sources.ModelSource,
        "_from_factory",
        lambda self: sources.with_plain_parts(sources.unwrapped(WRAPPED[kind](), "--model net.py:f")),
    )
    wanted = plain_net().eval()
    rounding = {"half": 2e-2, "bfloat16": 1e-1}.get(kind, 1e-5)
    for source in (source_of(WRAPPED[kind]()), source_of(WRAPPED[kind]), ModelSource("net.py:f")):
        found = source.load()
        assert {tensor.dtype for tensor in found.parameters()} == {torch.float32}
        assert not any(tensor.is_inference() for tensor in (*found.parameters(), *found.buffers()))
        with torch.no_grad():
            torch.testing.assert_close(found(images()), wanted(images()), rtol=rounding, atol=rounding)
        assert [unit.size for unit in build_graph(found, images()).units] == [8]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["scripted", "traced", "scripted part", "exported"])
def test_a_model_without_code_is_refused_in_one_sentence_at_once(kind: str, tmp_path: Path) -> None:
    model = plain_net().eval()
    given: object = {
        "scripted": lambda: torch.jit.script(model),
        "traced": lambda: torch.jit.trace(model, images()),
        "scripted part": lambda: nn.Sequential(torch.jit.script(model[:2]), *model[2:]),
        "exported": lambda: torch.export.export(model, (images(),)),
    }[kind]()
    for call in (lambda: api.inspect(given), lambda: api.inspect(lambda: given)):  # type: ignore[arg-type, return-value]
        with pytest.raises(InputError, match=r"no code that could be cut; give the torch.nn.Module") as caught:
            call()
        assert "\n" not in str(caught.value)


SWITCHES = """
import torch
from torch import nn
torch.set_default_dtype(torch.float64)
torch.set_grad_enabled(False)

def make():
    torch.set_default_device("meta")
    torch.set_default_device("cpu")
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
"""


def test_a_model_file_that_switches_torch_globally_changes_nothing_for_others(tmp_path: Path) -> None:
    (tmp_path / "switching_net.py").write_text(SWITCHES)
    found = api.inspect(f"{tmp_path / 'switching_net.py'}:make", input_size=(3, 16, 16))
    assert [unit["size"] for unit in found.units] == [8]
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    torch.set_default_device(None)
    sys.modules.pop("switching_net", None)


@pytest.mark.parametrize("switch", ["dtype", "gradients", "inference"])
def test_a_caller_who_switched_torch_globally_gets_the_same_answer(switch: str) -> None:
    model = plain_net()
    usual = api.inspect(model, input_size=(3, 16, 16)).record
    if switch == "dtype":
        torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(switch != "gradients")
    try:
        with torch.inference_mode(switch == "inference"):
            found = api.inspect(model, input_size=(3, 16, 16)).record
        assert torch.get_default_dtype() == (torch.float64 if switch == "dtype" else torch.float32)
        assert torch.is_grad_enabled() == (switch != "gradients")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
    assert found == usual


# Frozen parameters


def frozen(*names: str) -> nn.Module:
    model = plain_net()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(names))
    return model


@pytest.mark.parametrize(("names", "count"), [(("0.", "1."), 4), (("",), 6), (("1.weight",), 1), (("5.bias",), 1)])
def test_all_parameters_are_trained_and_it_is_said(names: tuple[str, ...], count: int) -> None:
    model = frozen(*names)
    found = source_of(model).build()
    assert all(parameter.requires_grad for parameter in found.parameters())
    assert notes_of(found) == (f"{count} of 6 parameters were frozen (requires_grad=False); recovery trains all",)
    assert not all(parameter.requires_grad for parameter in model.parameters()), "the caller's own stays frozen"


def test_a_constant_of_a_box_decoder_stays_frozen() -> None:
    class DFL(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 1, 1, bias=False).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)  # type: ignore[no-any-return]

    found = source_of(nn.Sequential(nn.Conv2d(3, 8, 1), DFL())).build()
    assert [parameter.requires_grad for parameter in found.parameters()] == [True, True, False]
    assert notes_of(found) == ()
